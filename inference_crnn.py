"""Read pictures of short text with a trained CRNN.

    python inference_crnn.py                         a few test rows of datasets/data.csv
    python inference_crnn.py scan.png forms/ own.csv   pictures, folders of pictures, csv files with image_path,label

Prints what it reads in each picture and writes everything to predictions.csv; where labels are known, a table scores the
readings by source, and REPORT_DIR gets a page to look at. Exit status 1 when any picture could not be read. From Python:
recognize(images, checkpoint).
"""
import base64
import csv
import html
import json
import os
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from crnn import (IMAGE_SUFFIXES, UNCALIBRATED, add_split, calibration_error, edits, export_onnx, fold_lookalikes, format_score_table,
                  load_checkpoint, load_image, read_images, read_labels, score_table, whole_file)

# ---------------------------------------------------------------------------------------------------------------------
MODEL_PATH = "ocr_crnn_model/crnn.pth"  # checkpoint that train_crnn.py saved; charset and preprocessing come with it
PRETRAINED = "ocr_crnn_model/pretrained.pth"  # the checkpoint to read with where there is no MODEL_PATH
DATA_CSV = "datasets/data.csv"  # whose test rows are read when no paths are given
NUM_SAMPLES = 20  # how many of them, spread over all
BATCH_SIZE = 48  # pictures read at once
MIN_CONFIDENCE = 0.5  # below this a reading is marked for a person to check
PREDICTIONS_CSV = "predictions.csv"  # columns image_path,label,source,prediction,confidence
PREDICTIONS_JSONL = None  # "predictions.jsonl": a line per picture with every character's confidence, place and alternatives; None: none
ONNX_PATH = None  # "ocr_crnn_model/crnn.onnx" writes the model in that format too (pip install onnx onnxscript); None: not
REPORT_DIR = "ocr_crnn_model/report"  # index.html and its plots, made where labels are known; None: none
NUM_THREADS = os.cpu_count() or 1  # that decode pictures
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where to read
# ---------------------------------------------------------------------------------------------------------------------

CHUNK = 1024  # pictures held in memory at a time


def model_path():
    """The checkpoint to read with."""
    return PRETRAINED if Path(PRETRAINED).is_file() and not Path(MODEL_PATH).is_file() else MODEL_PATH


def recognize(images, checkpoint=None):
    """Read paths, PIL images or arrays (H, W[, 3 or 4]), each a picture of one line.

    checkpoint: its path, or what crnn.load_checkpoint returned; None: model_path().
    Returns a list as long as images of crnn.Reading (text, confidence, characters), None where a picture cannot be read;
    why is printed to standard error. Raises ValueError when the checkpoint is missing or is not one.
    """
    model, charset, facts = checkpoint if isinstance(checkpoint, tuple) else load_checkpoint(checkpoint or model_path(), DEVICE)
    readings = [None] * len(images)
    load = partial(load_or_reason, height=model.architecture["height"])
    for start in range(0, len(images), CHUNK):
        if NUM_THREADS > 1:  # Pillow decodes and scales outside of Python's lock
            with ThreadPoolExecutor(NUM_THREADS) as threads:
                loaded = list(threads.map(load, images[start:start + CHUNK]))
        else:
            loaded = list(map(load, images[start:start + CHUNK]))
        pictures = {i: picture for i, picture in enumerate(loaded, start) if not isinstance(picture, str)}
        for reason in filter(lambda picture: isinstance(picture, str), loaded):
            print(f"skipped: {reason}", file=sys.stderr, flush=True)
        for i, reading in zip(pictures, read_images(model, charset, list(pictures.values()), BATCH_SIZE,
                                                     tuple(facts.get("calibration", UNCALIBRATED)))):
            readings[i] = reading
    return readings


def load_or_reason(image, height):
    """The picture as load_image gives it, or the line that says why it cannot be read."""
    try:
        return load_image(image, height)
    except ValueError as error:
        return str(error)


def from_csv(path, only_test=False):
    """(picture path, label, source) of the rows of a csv, spread evenly down to NUM_SAMPLES where only the test rows are wanted."""
    rows = add_split(read_labels(path))
    if only_test:
        rows = rows[rows.split == "test"]
        rows = rows.iloc[::max(1, -(-len(rows) // NUM_SAMPLES))]
    return [(Path(path).parent / row.image_path, row.label, row.source) for row in rows.itertuples()]


def find_pictures(arguments):
    """(picture path, label, source) for every picture that the arguments name; label and source are empty where unknown.

    Raises ValueError, one line, for a csv that cannot be used and a folder without pictures.
    """
    found = []
    for path in map(Path, arguments):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise ValueError(f"{path} holds no pictures ({' '.join(sorted(IMAGE_SUFFIXES))})")
            found += [(p, "", "") for p in inside]
        elif path.suffix.lower() == ".csv":
            found += from_csv(path)
        else:
            found.append((path, "", ""))
    return found


def report(path, label, reading):
    """Print one reading."""
    print(f"Image: {path.as_posix()}")
    if label:
        print(f"Ground Truth: {label}")
    doubt = ", please check" + doubtful_characters(reading) if reading.confidence < MIN_CONFIDENCE else ""
    print(f"Predicted   : {reading.text}  (confidence {reading.confidence:.2f}{doubt})\n")


def doubtful_characters(reading):
    """What else the most doubtful character of a reading could be, as in ": O 0.61 · 0 0.37"; nothing where there is no alternative."""
    unsure = min((c for c in reading.characters if c.alternatives), key=lambda c: c.confidence, default=None)
    if not unsure:
        return ""
    return ": " + " · ".join(f"{c} {p:.2f}" for c, p in [(unsure.character, unsure.confidence), *unsure.alternatives])


def as_json(path, label, source, reading):
    """A line of PREDICTIONS_JSONL. left and right are parts of the picture's width."""
    characters = [dict(character=c.character, confidence=round(c.confidence, 4), left=round(c.left, 4), right=round(c.right, 4),
                       alternatives=[[other, round(p, 4)] for other, p in c.alternatives]) for c in reading.characters]
    return json.dumps(dict(image_path=path.as_posix(), label=label, source=source, prediction=reading.text,
                           confidence=round(reading.confidence, 4), characters=characters), ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------------
# Report. rows: a DataFrame with columns path, label, prediction, confidence, source.

def summary(rows):
    """Shares that tell one kind of error from another, as a list of (what, value)."""
    pairs = list(zip(rows.label, rows.prediction))
    characters = max(1, int(rows.label.str.len().sum()))
    found = [edit for label, prediction in pairs for edit in edits(label, prediction)]
    doubled = [(label, prediction) for label, prediction in pairs if any(a == b for a, b in zip(label, label[1:]))]
    share = lambda right, of: f"{sum(right) / len(of):.1%} of {len(of):,}" if of else "none"
    return [
        ("exact match", share([a == b for a, b in pairs], pairs)),
        ("exact match but for case", share([a.lower() == b.lower() for a, b in pairs], pairs)),
        ("exact match, look-alikes folded", share([fold_lookalikes(a) == fold_lookalikes(b) for a, b in pairs], pairs)),
        ("character error rate", f"{len(found) / characters:.2%} of {characters:,} characters"),
        ("characters read as another", f"{sum(bool(a and b) for a, b in found):,}"),
        ("characters read where there is none", f"{sum(not a for a, b in found):,}"),
        ("characters not read", f"{sum(not b for a, b in found):,}"),
        ("errors that are only of case", f"{sum(a.lower() == b.lower() for a, b in found):,}"),
        ("spaces lost or invented", f"{sum(' ' in edit for edit in found):,} among {rows.label.str.count(' ').sum():,} spaces"),
        ("errors in punctuation and signs", f"{sum(bool(a) and not a.isalnum() and a != ' ' for a, b in found):,} among "
                                            f"{sum(not c.isalnum() and c != ' ' for label in rows.label for c in label):,} signs"),
        ("exact match of lines with doubled characters", share([a == b for a, b in doubled], doubled)),
        ("expected calibration error", f"{calibration_error(list(rows.confidence), list(rows.label == rows.prediction)):.1%}"),
    ]


def plot_confusions(rows, path, most=30):
    """The characters that are confused most, as a matrix: a row for what stands there, a column for what was read."""
    pyplot = plots()
    confused = Counter(edit for label, prediction in zip(rows.label, rows.prediction) for edit in edits(label, prediction))
    weight = Counter()
    for pair, n in confused.items():
        for c in set(pair):
            weight[c] += n
    shown = sorted(c for c, _ in weight.most_common(most))
    figure, axes = pyplot.subplots(figsize=(9, 8), layout="constrained")
    image = axes.imshow([[confused[a, b] for b in shown] for a in shown] or [[0]], cmap="Blues")
    names = [{"": "∅", " ": "␣"}.get(c, c) for c in shown]
    axes.set(xticks=range(len(shown)), yticks=range(len(shown)), xlabel="read (∅: nothing)", ylabel="label (∅: nothing there)",
             title="errors by character, the most frequent ones")
    axes.set_xticklabels(names, parse_math=False)  # a $ is a character here
    axes.set_yticklabels(names, parse_math=False)
    figure.colorbar(image, shrink=0.6)
    save_plot(figure, path)


def plot_reject_curve(rows, path):
    """What checking by hand buys: the share of wrong readings among those that are kept, by how many are kept."""
    pyplot = plots()
    ordered = rows.sort_values("confidence", ascending=False)
    wrong = (ordered.label != ordered.prediction).cumsum().to_numpy()
    kept = range(1, len(ordered) + 1)
    figure, (curve, reliability) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curve.plot([100 * n / len(ordered) for n in kept], [100 * w / n for w, n in zip(wrong, kept)])
    sure = int((rows.confidence >= MIN_CONFIDENCE).sum())
    if sure:
        curve.plot(100 * sure / len(rows), 100 * wrong[sure - 1] / sure, "o", label=f"MIN_CONFIDENCE = {MIN_CONFIDENCE}")
        curve.legend()
    curve.set(xlabel="readings kept, the surest first, %", ylabel="wrong among them, %", title="reject curve")
    groups = rows.assign(right=rows.label == rows.prediction).groupby((rows.confidence * 10).clip(upper=9).astype(int))
    reliability.plot([0, 1], [0, 1], color="grey", linewidth=1)
    reliability.plot(groups.confidence.mean(), groups.right.mean(), marker="o")
    reliability.set(xlabel="confidence", ylabel="share that is right", title="reliability")
    for axes in (curve, reliability):
        axes.grid(alpha=0.3)
    save_plot(figure, path)


def plots():
    import matplotlib
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot
    return pyplot


def save_plot(figure, path):
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    plots().close(figure)


def draw_errors(rows, path, most=60):
    """A sheet of the surest wrong readings: picture, what it was read as, and the label."""
    wrong = rows[rows.label != rows.prediction].sort_values("confidence", ascending=False).head(most)
    columns, width, height = 4, 300, 84
    sheet = Image.new("RGB", (columns * width, max(1, -(-len(wrong) // columns)) * height), "white")
    draw = ImageDraw.Draw(sheet)
    ours = Path(__file__).parent / "myFonts" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(ours), 13) if ours.exists() else ImageFont.load_default(13)
    for i, row in enumerate(wrong.itertuples()):
        x, y = i % columns * width + 6, i // columns * height + 4
        picture = Image.fromarray(load_image(row.path).numpy())
        sheet.paste(ImageOps.contain(picture, (width - 14, 40)), (x, y))
        draw.text((x, y + 42), f"{row.prediction}   ({row.confidence:.2f})", font=font, fill="#c00000")
        draw.text((x, y + 58), row.label, font=font, fill="#007020")
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def write_report(rows):
    """confusions.png, reject_curve.png, worst_errors.png and, with all of them in it, index.html, in REPORT_DIR."""
    folder = Path(REPORT_DIR)
    plot_confusions(rows, folder / "confusions.png")
    plot_reject_curve(rows, folder / "reject_curve.png")
    draw_errors(rows, folder / "worst_errors.png")
    table = lambda head, lines: "<table><tr>" + "".join(f"<th>{html.escape(h)}" for h in head) + "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in line) for line in lines) + "</table>"
    shares = lambda groups: [(name, f"{row.images:,.0f}", f"{row.exact:.1%}", f"{row.CER:.1%}", f"{row.folded:.1%}" if row.single else "-")
                             for name, row in score_table(list(rows.label), list(rows.prediction), list(groups)).iterrows()]
    lengths = rows.label.str.len().map(lambda n: " 1 character" if n == 1 else f"{(n - 2) // 4 * 4 + 2:2} to {(n - 2) // 4 * 4 + 5}")
    confused = Counter(edit for label, prediction in zip(rows.label, rows.prediction) for edit in edits(label, prediction))
    named = {"": "(nothing)", " ": "(space)"}
    head = ["", "images", "exact", "CER", "single characters, look-alikes folded"]
    picture = lambda name, what: f'<h2>{what}</h2><img alt="{what}" src="data:image/png;base64,' \
        + base64.b64encode((folder / name).read_bytes()).decode() + '">'
    page = [
        "<!doctype html><meta charset=utf-8><title>Readings</title><style>body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ccc;padding:2px 12px;text-align:left}img{max-width:100%}"
        "td:first-child{white-space:pre}</style>", f"<h1>{len(rows):,} labelled pictures read by {html.escape(str(MODEL_PATH))}</h1>",
        table(["what", "how often"], summary(rows)), "<h2>By source</h2>", table(head, shares(rows.source)), "<h2>By length</h2>",
        table(head, shares(lengths)), "<h2>The most frequent errors</h2>",
        table(["label", "read as", "times"], [(named.get(a, a), named.get(b, b), n) for (a, b), n in confused.most_common(25)]),
        picture("confusions.png", "Which characters are confused"), picture("reject_curve.png", "What confidence is worth"),
        picture("worst_errors.png", "The surest errors: read in red, label in green"),
    ]
    with whole_file(folder / "index.html") as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Results are written as they come, to hidden files that get their names when all is read

def unfinished(path, samples):
    """Where the results of reading these samples with this model stand until they are complete."""
    work = zlib.crc32(repr(samples).encode(), zlib.crc32(Path(model_path()).read_bytes()))
    return Path(path).with_name(f".{Path(path).name}.{work:08x}.part")


def resume(paths):
    """Cut files with a line per picture, the first with a header, to what all of them hold. Returns the rows of the first."""
    if not all(path.exists() for path in paths):
        return []
    lines = [path.read_text(encoding="utf-8").split("\n")[:-1] for path in paths]  # what comes after the last line's end is half a line
    complete = min([len(lines[0]) - 1] + [len(more) for more in lines[1:]])
    rows = list(csv.reader(lines[0][:complete + 1]))[1:]
    if len(rows) != complete or any(len(row) != 5 for row in rows):  # a label with a line break in it
        return []
    for path, kept, header in zip(paths, lines, (1, 0)):
        path.write_text("".join(f"{line}\n" for line in kept[:complete + header]), encoding="utf-8", newline="\n")
    return [(Path(path), label, source, prediction, float(confidence)) for path, label, source, prediction, confidence in rows]


def read_all(samples, checkpoint):
    """Read samples, print and write each reading. Returns rows (path, label, source, prediction, confidence), and how many were skipped."""
    paths = [unfinished(path, samples) for path in (PREDICTIONS_CSV, PREDICTIONS_JSONL) if path]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    read = resume(paths)
    done, skipped, rest = Counter(row[0] for row in read), 0, []
    for sample in samples:
        if done[sample[0]]:
            done[sample[0]] -= 1
        else:
            rest.append(sample)
    if read:
        print(f"going on after {len(read):,} pictures that an interrupted run has read\n")
    with ExitStack() as files:
        file, *lines = [files.enter_context(open(path, "a" if read else "w", newline="", encoding="utf-8")) for path in paths]
        table = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        if not read:
            table.writerow(["image_path", "label", "source", "prediction", "confidence"])
        for start in range(0, len(rest), CHUNK):
            chunk = rest[start:start + CHUNK]
            for (path, label, source), reading in zip(chunk, recognize([path for path, _, _ in chunk], checkpoint)):
                if reading is None:
                    skipped += 1
                    continue
                report(path, label, reading)
                read.append((path, label, source, reading.text, reading.confidence))
                table.writerow([path.as_posix(), *read[-1][1:4], f"{reading.confidence:.4f}"])
                for line in lines:
                    print(as_json(path, label, source, reading), file=line)
            for written in (file, *lines):
                written.flush()
    for path, name in zip(paths, filter(None, (PREDICTIONS_CSV, PREDICTIONS_JSONL))):
        os.replace(path, name)
    return read, skipped


def main(arguments=()):
    """Read what the arguments name, or test rows where there are none. Returns the exit status."""
    try:
        checkpoint = load_checkpoint(model_path(), DEVICE)
        print(f"reading with {model_path()}")
        if ONNX_PATH:
            export_onnx(ONNX_PATH, *checkpoint[:2])
            print(f"{model_path()} written as {ONNX_PATH}")
        samples = find_pictures(arguments) if arguments else from_csv(DATA_CSV, only_test=True)
    except ValueError as error:
        raise SystemExit(str(error))
    if not samples:
        raise SystemExit(f"{DATA_CSV} has no test rows: name pictures instead, python inference_crnn.py PATH")

    try:
        read, skipped = read_all(samples, checkpoint)
    except OSError as error:
        raise SystemExit(f"cannot write {PREDICTIONS_CSV}: {error}. Make room, or set PREDICTIONS_CSV to another place")
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on where it was")

    if any(label for _, label, *_ in read):
        import pandas as pd  # here, so that reading a single picture does not wait for it
        rows = pd.DataFrame([row for row in read if row[1]], columns=["path", "label", "source", "prediction", "confidence"])
        rows["source"] = rows.source.replace("", "unnamed")
        print(f"{format_score_table(score_table(list(rows.label), list(rows.prediction), list(rows.source)))}\n")
        if REPORT_DIR:
            write_report(rows)
            print(f"report: {Path(REPORT_DIR).as_posix()}/index.html")
    print(f"{len(read):,} pictures read, {sum(row[4] < MIN_CONFIDENCE for row in read):,} of them below MIN_CONFIDENCE = {MIN_CONFIDENCE}; "
          f"{skipped:,} skipped; all in {PREDICTIONS_CSV}")
    return int(skipped > 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main(sys.argv[1:]))
