"""Read images of short text with a trained CRNN.

    python inference_crnn.py                           a few test rows of datasets/data.csv
    python inference_crnn.py scan.png forms/ own.csv   images, folders, csv files (image_path,label)

Prints what it reads and writes predictions.csv; where labels are known, also a table of scores and
a report, where there are none a page to correct the readings in, both in REPORT_DIR. Exit status 1
when any image cannot be read. From Python: recognize(images).
"""

import base64
import csv
import html
import importlib.util
import io
import itertools
import json
import os
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

import crnn
from crnn import InputError, load_checkpoint, whole_file

# --------------------------------------------------------------------------------------------------
MODEL_PATH = "ocr_crnn_model/crnn.pth"  # checkpoint of train_crnn.py; it brings its charset
PRETRAINED = "ocr_crnn_model/pretrained.pth"  # to read with where there is no MODEL_PATH
DATA_CSV = "datasets/data.csv"  # whose test rows are read when no paths are given
NUM_SAMPLES = 20  # how many of them, spread over all
BATCH_SIZE = 48  # images read at once
MIN_CONFIDENCE = 0.5  # below this a prediction is marked for a person to check
PREDICTIONS_CSV = "predictions.csv"  # columns image_path,label,source,prediction,confidence
PREDICTIONS_JSONL = None  # "predictions.jsonl": a line per image, with every character; None: none
ONNX_PATH = None  # "crnn.onnx": the model as ONNX too (pip install onnx onnxscript); None: not
REPORT_DIR = "ocr_crnn_model/report"  # index.html: labels known; check.html: not; None: neither
NUM_THREADS = os.cpu_count() or 1  # that decode images
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where to read
# --------------------------------------------------------------------------------------------------

CHUNK = 1024  # images held in memory at a time
CHECKED_AT_ONCE = 5_000  # images on one page to correct
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"}


def model_path():
    """The checkpoint to read with."""
    ours = Path(MODEL_PATH).is_file() or not Path(PRETRAINED).is_file()
    return MODEL_PATH if ours else PRETRAINED


def recognize(images, model=None):
    """Read paths, PIL images or arrays (H, W[, 3 or 4]), each an image of one line.

    model: a checkpoint's path, or what crnn.load_checkpoint returned; None: model_path().
    Returns a list of crnn.Reading (text, confidence, characters), None where an image cannot be
    read; why is printed to standard error. Raises InputError for a checkpoint that is none.
    """
    if not isinstance(model, crnn.CRNN):
        model = load_checkpoint(model or model_path(), DEVICE)
    readings = []
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK]
        if NUM_THREADS > 1:  # Pillow decodes and scales outside of Python's lock
            with ThreadPoolExecutor(NUM_THREADS) as threads:
                loaded = list(threads.map(crnn.try_load, chunk))
        else:
            loaded = list(map(crnn.try_load, chunk))
        found = [image for image, _ in loaded if image is not None]
        read = iter(crnn.read_images(model, found, BATCH_SIZE))
        for image, reason in loaded:
            readings.append(None if image is None else next(read))
            if reason:
                print(f"skipped: {reason}", file=sys.stderr, flush=True)
    return readings


def from_csv(path, only_test=False):
    """(image path, label, source) of the rows of a csv, or of NUM_SAMPLES of its test rows."""
    rows = crnn.add_split(crnn.read_labels(path))
    if only_test:
        rows = rows[rows.split == "test"]
        rows = rows.iloc[:: max(1, -(-len(rows) // NUM_SAMPLES))]
    paths = [Path(path).parent / image_path for image_path in rows.image_path]
    return list(zip(paths, rows.label, rows.source))


def find_images(arguments):
    """(image path, label, source) for every image that the arguments name; "" where unknown."""
    found = []
    for path in map(Path, arguments):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise InputError(f"{path} holds no images ({' '.join(sorted(SUFFIXES))})")
            found += [(p, "", "") for p in inside]
        elif path.suffix.lower() == ".csv":
            found += from_csv(path)
        else:
            found.append((path, "", ""))
    return found


def show(path, label, reading):
    """Print one reading, and what else its most doubtful character could be."""
    print(f"Image: {path.as_posix()}")
    if label:
        print(f"Ground Truth: {label}")
    sure = reading.confidence >= MIN_CONFIDENCE
    doubt = "" if sure else f", please check{doubtful_character(reading)}"
    print(f"Predicted   : {reading.text}  (confidence {reading.confidence:.2f}{doubt})\n")


def doubtful_character(reading):
    """Alternatives of the most doubtful character, as in ": O 0.61 · 0 0.37"; "" for none."""
    unsure = [c for c in reading.characters if c.alternatives]
    if not unsure:
        return ""
    least = min(unsure, key=lambda c: c.confidence)
    pairs = [(least.character, least.confidence), *least.alternatives]
    return ": " + " · ".join(f"{c} {p:.2f}" for c, p in pairs)


# --------------------------------------------------------------------------------------------------
# Results. A line per image is written as it is read, to a hidden file in which an interrupted run
# is found again, and from which all that is asked for is made at the end.


def as_json(sample, reading):
    """A line of PREDICTIONS_JSONL. left and right are parts of the image's width."""
    path, label, source = sample
    facts = dict(image_path=path.as_posix(), label=label, source=source)
    if reading is None:
        return json.dumps(dict(facts, skipped=True))
    facts |= dict(prediction=reading.text, confidence=round(reading.confidence, 4))
    facts["characters"] = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in c._asdict().items()}
        for c in reading.characters
    ]
    return json.dumps(facts, ensure_ascii=False)


def read_all(samples, model):
    """Read samples, show each, and write the results. Returns them as a DataFrame, and skipped."""
    work = zlib.crc32(repr(samples).encode(), zlib.crc32(Path(model_path()).read_bytes()))
    out = Path(PREDICTIONS_CSV)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{work:08x}.part")
    with open(part, "a+b") as file:
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        # Whole chunks, and not half a line: what is read beside an image moves its last decimals.
        done = sum(line.endswith(b"\n") for line in lines) // CHUNK * CHUNK
        file.truncate(sum(map(len, lines[:done])))
        if done:
            print(f"going on after {done:,} images that an interrupted run has already read\n")
        for start in range(done, len(samples), CHUNK):
            chunk = samples[start : start + CHUNK]
            for sample, reading in zip(chunk, recognize([path for path, *_ in chunk], model)):
                file.write(f"{as_json(sample, reading)}\n".encode())
                if reading:
                    show(*sample[:2], reading)
            file.flush()
    return write_results(part)


def write_results(part):
    """PREDICTIONS_CSV and PREDICTIONS_JSONL of the lines in part. Returns as read_all does."""
    import pandas as pd  # here, so that recognize() from Python does not wait for it

    columns = ["image_path", "label", "source", "prediction", "confidence"]
    rows = []
    with open(part, encoding="utf-8") as file:  # line by line, since characters take much memory
        for record in map(json.loads, file):
            others = [c["alternatives"] for c in record.get("characters", ())]
            others = ["".join(c for c, _ in pairs) for pairs in others]
            rows.append([*map(record.get, columns), others])
    table = pd.DataFrame(rows, columns=[*columns, "others"])
    skipped = table.confidence.isna()
    table = table[~skipped]
    quoting = dict(quoting=csv.QUOTE_ALL, lineterminator="\n", float_format="%.4f")
    with whole_file(PREDICTIONS_CSV) as temporary:
        table.to_csv(temporary, index=False, columns=columns, **quoting)
    if PREDICTIONS_JSONL:
        with whole_file(PREDICTIONS_JSONL) as temporary, open(temporary, "wb") as file:
            lines = part.read_bytes().splitlines(keepends=True)
            file.writelines(line for line in lines if b'"skipped": true' not in line)
    part.unlink()
    return table, int(skipped.sum())


# --------------------------------------------------------------------------------------------------
# Pages on which a person corrects readings

CHECK = """<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>Check the readings</title><style>
body { font: 16px/1.4 sans-serif; max-width: 48em; margin: auto; padding: 0 1em }
header { position: sticky; top: 0; z-index: 1; background: white; padding: 0.5em 0 }
section { content-visibility: auto; contain-intrinsic-size: auto 10em; padding: 1em 0 1em 12px }
.unreadable img { opacity: 0.2 } small { overflow-wrap: anywhere; color: dimgrey }
img { max-width: 100%; height: 3.5em; object-fit: contain; object-position: left }
.field { font: 22px monospace; width: 100%; box-sizing: border-box }
pre { display: flex; flex-wrap: wrap; margin: 0.3em 0; font: 18px monospace }
pre * { display: block; font: inherit; min-width: 1ch } .checked { border-left: 6px solid green }
</style><header><b id=count></b> <button id=save>Save them</button> as <code id=target></code><br>
<small>Enter accepts a reading and goes to the next. A click on a character below a marked one takes
it. Only what is checked is saved.</small> <b id=lost hidden>This browser keeps nothing: save before
you leave.</b></header>
<main id=rows></main><script id=job type=application/json>JOB</script><script>
const find = id => document.getElementById(id), job = JSON.parse(find("job").textContent)
const make = (to, kind, facts) => to.appendChild(Object.assign(document.createElement(kind), facts))
// What is kept of a picture, for as long as it stays the same: "=" and its text, or "-": unreadable
function stored(row, ...value) {
  const key = `${job.folder}/${row.path} ${row.crc}`
  try { return value.length ? localStorage.setItem(key, value[0]) : localStorage.getItem(key) }
  catch { find("lost").hidden = false }
}
function keep(row) {
  row.kept = row.bad.checked ? "-" : `=${row.field.value}`
  stored(row, row.kept)
  show(row)
  count()
}
function show(row) {
  row.part.classList.toggle("checked", row.kept)
  row.part.classList.toggle("unreadable", row.bad.checked)
  row.line.inert = [...row.field.value].length != [...row.text].length  // no longer its places
}
function count() {
  const checked = job.rows.filter(row => row.kept).length
  find("count").textContent = `${checked} of ${job.rows.length} checked`
}
for (const row of job.rows) {
  const part = row.part = make(find("rows"), "section")
  row.kept = stored(row) ?? ""
  const value = row.kept.startsWith("=") ? row.kept.slice(1) : row.text
  make(part, "img", { src: row.image })
  const field = row.field = make(part, "input", { className: "field", value, spellcheck: false })
  const line = row.line = make(part, "pre"), label = make(part, "label")
  for (const [i, read] of [...row.text].entries()) {
    const place = make(line, "span"), others = [...row.others[i]]
    make(place, others.length ? "mark" : "span", { textContent: read })
    for (const other of others) make(place, "button", { textContent: other }).onclick = () => {
      field.value = [...field.value].with(i, other).join("")
      field.oninput()
      field.focus()
    }
  }
  row.bad = make(label, "input", { type: "checkbox", checked: row.kept == "-" })
  make(label, "small", { textContent: ` not readable. ${row.path}, confidence ${row.confidence}` })
  row.bad.onchange = () => keep(row)
  field.oninput = () => keep(row, row.bad.checked = false)
  field.onkeydown = event => {
    if (event.key != "Enter") return
    keep(row)
    part.nextElementSibling?.querySelector("input").focus()
  }
}
job.rows.forEach(show)
count()
find("target").textContent = `${job.folder}/${job.file}`
find("save").onclick = () => {
  const rows = job.rows.filter(row => row.kept > "=").map(row => [row.path, row.kept.slice(1)])
  const quoted = text => `"${text.replaceAll('"', '""')}"`
  const lines = [["image_path", "label"], ...rows].map(pair => pair.map(quoted) + "\\n")
  const href = URL.createObjectURL(new Blob(lines, { type: "text/csv" }))
  make(document.body, "a", { href, download: job.file }).click()
}
</script>"""


def thumbnail(path):
    """A small picture of an image, grey as the network sees it, as a data URL."""
    with Image.open(path) as image:
        grey = crnn.to_grey(ImageOps.exif_transpose(image))
    grey.thumbnail((1400, 64))
    memory = io.BytesIO()
    grey.save(memory, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(memory.getvalue()).decode()}"


def check_page(rows, folder, file):
    """The HTML of a page to correct readings in, which saves them as file, meant for folder."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        images = threads.map(thumbnail, rows.path)
        images = list(tqdm(images, "check.html", len(rows), unit="img", disable=None))
    names = [Path(path).relative_to(folder).as_posix() for path in rows.path]
    rows = rows.assign(path=names, text=rows.prediction, image=images).round({"confidence": 2})
    rows["crc"] = [zlib.crc32(image.encode()) for image in images]
    job = dict(folder=folder.as_posix(), file=file)
    job["rows"] = rows[["path", "text", "confidence", "others", "image", "crc"]].to_dict("records")
    text = json.dumps(job, ensure_ascii=False).replace("<", "\\u003c")  # no tag ends the script
    return CHECK.replace("JOB", text)


def write_check(rows):
    """Write pages to correct readings in, the least sure first. Returns their paths."""
    rows = rows.drop_duplicates("image_path").sort_values("confidence", kind="stable")
    rows, report = rows.assign(path=[*map(os.path.abspath, rows.image_path)]), Path(REPORT_DIR)
    try:
        folder = Path(os.path.commonpath([*map(os.path.dirname, rows.path)]))
    except ValueError:
        raise InputError("images on two drives: name one's, or set REPORT_DIR = None") from None
    for former in (*report.glob("check.html"), *report.glob("check_[0-9]*.html")):
        former.unlink()
    files = (f"labels{f'_{i}' * (i > 1)}.csv" for i in itertools.count(1))
    files, pages = (file for file in files if not (folder / file).exists()), []  # overwrites none
    for start in range(0, len(rows), CHECKED_AT_ONCE):
        pages.append(report / f"check{f'_{len(pages) + 1}' * bool(pages)}.html")
        page = check_page(rows[start : start + CHECKED_AT_ONCE], folder, next(files))
        with whole_file(pages[-1]) as temporary:
            temporary.write_text(page, encoding="utf-8")
    return pages


# --------------------------------------------------------------------------------------------------
# Report. rows: a DataFrame with columns image_path, label, source, prediction, confidence.


def edits(label, prediction):
    """What turns a label into a prediction: (character, read instead), "" for none, in order."""
    found = []
    for kind, i, j in Levenshtein.editops(label, prediction):
        found.append((label[i : i + (kind != "insert")], prediction[j : j + (kind != "delete")]))
    return found


def summary(rows):
    """Shares that tell one kind of error from another, as a dict of texts."""
    label, prediction = rows.label, rows.prediction
    found = [edit for pair in zip(label, prediction) for edit in edits(*pair)]
    fold = crnn.fold_lookalikes
    characters, spaces = max(1, label.str.len().sum()), label.str.count(" ").sum()

    def share(right):
        return f"{right.mean():.1%} of {len(right):,}" if len(right) else "none"

    return {
        "exact match": share(label == prediction),
        "exact match but for case": share(label.str.lower() == prediction.str.lower()),
        "exact match, look-alikes folded": share(label.map(fold) == prediction.map(fold)),
        "character error rate": f"{len(found) / characters:.2%} of {characters:,} characters",
        "characters read as another": f"{sum(bool(a and b) for a, b in found):,}",
        "characters read where there is none": f"{sum(not a for a, _ in found):,}",
        "characters not read": f"{sum(not b for _, b in found):,}",
        "errors that are only of case": f"{sum(a.lower() == b.lower() for a, b in found):,}",
        "spaces lost or invented": f"{sum(' ' in edit for edit in found):,} of {spaces:,}",
        "calibration error": f"{crnn.calibration_error(rows.confidence, label == prediction):.1%}",
    }


def plot_confidence(rows):
    """A png: what checking by hand buys, and whether confidence is the share that is right."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, (curve, reliability) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    ordered = rows.assign(right=rows.label == rows.prediction)
    ordered = ordered.sort_values("confidence", ascending=False, ignore_index=True)
    kept = ordered.index + 1
    wrong = 100 * (~ordered.right).cumsum() / kept
    curve.plot(100 * kept / len(rows), wrong)
    sure = int((rows.confidence >= MIN_CONFIDENCE).sum())
    if sure:
        name = f"MIN_CONFIDENCE = {MIN_CONFIDENCE}"
        curve.plot(100 * sure / len(rows), wrong[sure - 1], "o", label=name)
        curve.legend()
    curve.set(xlabel="kept, the surest first, %", ylabel="wrong, %", title="reject curve")
    groups = ordered.groupby((ordered.confidence * 10).clip(upper=9).astype(int))
    reliability.plot([0, 1], [0, 1], color="grey", linewidth=1)
    reliability.plot(groups.confidence.mean(), groups.right.mean(), marker="o")
    reliability.set(xlabel="confidence", ylabel="share that is right", title="reliability")
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=80)
    pyplot.close(figure)
    return memory.getvalue()


def embedded(png):
    """An html image that needs no other file."""
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def surest_errors(rows, path, most=60):
    """A contact sheet of the surest wrong predictions, saved to path; its png."""
    wrong = rows[rows.label != rows.prediction].sort_values("confidence", ascending=False)
    cells = []
    for row in wrong.head(most).itertuples():
        image = Image.fromarray(crnn.load_image(row.image_path).numpy())
        said = f"{row.prediction}   ({row.confidence:.2f})"
        cells.append((image, [(said, "#c00000"), (row.label, "#007020")]))
    crnn.contact_sheet(path, cells, columns=4)
    return path.read_bytes()


PAGE = (
    "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    "<title>Report</title><style>body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;"
    "padding:0 1em}table{border-collapse:collapse}td,th{padding:2px 12px;text-align:left}"
    "th{white-space:pre}div{overflow-x:auto}img{max-width:100%}h1{overflow-wrap:anywhere}</style>"
)


def write_report(rows):
    """index.html in REPORT_DIR: one page with all its tables and images in it."""
    import pandas as pd

    confused = Counter(e for pair in zip(rows.label, rows.prediction) for e in edits(*pair))
    shown = {"": "(nothing)", " ": "(space)"}
    errors = [(shown.get(a, a), shown.get(b, b), n) for (a, b), n in confused.most_common(25)]
    errors = pd.DataFrame(errors, columns=["label", "read", "times"])
    percent = dict.fromkeys(["exact", "CER", "folded"], "{:.1%}".format)
    table = partial(pd.DataFrame.to_html, formatters=percent, na_rep="-", border=0)
    sheet = Path(REPORT_DIR) / "surest_errors.png"
    sections = {
        "All": table(pd.Series(summary(rows), name="how often").to_frame()),
        "By source": table(crnn.score_table(rows)),
        "The most frequent errors": table(errors, index=False),
        "What confidence is worth": embedded(plot_confidence(rows)),
        "The surest errors, read in red": embedded(surest_errors(rows, sheet)),
    }
    page = f"{PAGE}<h1>{len(rows):,} labelled images read by {html.escape(str(model_path()))}</h1>"
    page += "".join(f"<h2>{name}</h2><div>{part}</div>" for name, part in sections.items())
    with whole_file(Path(REPORT_DIR) / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# ONNX


class Unpadded(torch.nn.Module):
    """What an exported CRNN computes, without what only padding needs."""

    def forward(self, ink):
        """Ink (N, 1, H, W), 0 = paper, 1 = ink, all of one width, to log-probs (T, N, C)."""
        return self.model.sequence(self.model.features(ink)).log_softmax(2)


def export_onnx(path, model):
    """Write the network as ONNX, with its characters, the classes from 1 on, in the metadata."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"writing {path} needs packages: pip install {' '.join(missing)}")
    example = torch.zeros(2, 1, crnn.HEIGHT, 100)
    sizes = {0: torch.export.Dim("N", min=1, max=2**12), 3: torch.export.Dim("W", min=8, max=2**14)}
    names = dict(input_names=["ink"], output_names=["log_probs"], dynamic_shapes={"ink": sizes})
    network = Unpadded()
    network.model = model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own workings
        program = torch.onnx.export(network, (example,), dynamo=True, verbose=False, **names)
    program.model.metadata_props["charset"] = model.charset.characters
    with whole_file(path) as temporary:
        program.save(temporary, external_data=False)
    print(f"{model_path()} written as {path}")


def main(arguments=()):
    """Read what the arguments name, or test rows where there are none. Returns the exit status."""
    model = load_checkpoint(model_path(), DEVICE)
    print(f"reading with {model_path()}")
    if ONNX_PATH:
        export_onnx(ONNX_PATH, load_checkpoint(model_path()))
    samples = find_images(arguments) if arguments else from_csv(DATA_CSV, only_test=True)
    if not samples:
        raise InputError(f"{DATA_CSV} has no test rows: name images, python inference_crnn.py PATH")
    rows, skipped = read_all(samples, model)
    labelled = rows.assign(source=rows.source.replace("", "unnamed"))[rows.label != ""]
    if len(labelled):
        print(f"{crnn.format_score_table(crnn.score_table(labelled))}\n")
        if REPORT_DIR:
            write_report(labelled)
            print(f"report: {Path(REPORT_DIR).as_posix()}/index.html")
    bare = rows[rows.label == ""]
    if len(bare) and REPORT_DIR:
        for page in write_check(bare):
            print(f"to correct these readings, open {page.as_posix()} in a browser")
    unsure = (rows.confidence < MIN_CONFIDENCE).sum()
    print(f"{len(rows):,} images read, {unsure:,} below MIN_CONFIDENCE = {MIN_CONFIDENCE}")
    print(f"{skipped:,} skipped; the readings are in {PREDICTIONS_CSV}")
    return int(skipped > 0)


if __name__ == "__main__":
    crnn.run(main, sys.argv[1:])
