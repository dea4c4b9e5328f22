"""Read images of short text with a trained CRNN.

    python inference_crnn.py                           a few test rows of datasets/data.csv
    python inference_crnn.py scan.png forms/ own.csv   images, folders, csv files (image_path,label)

Prints each reading and writes all of them to predictions.csv. Images with a label are scored and
get a report, images without one get a page to correct their readings in, both in REPORT_DIR. Exit
status 1 if any image cannot be read. From Python: recognize(images).
"""

import base64
import html
import importlib.util
import io
import itertools
import json
import os
import sys
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from glob import glob
from pathlib import Path

import torch
from PIL import Image, ImageOps
from rapidfuzz.distance import Levenshtein
from tqdm.contrib.concurrent import thread_map

import crnn
from crnn import InputError, load_checkpoint, whole_file

# --------------------------------------------------------------------------------------------------
MODEL_PATH = "ocr_crnn_model/crnn.pth"  # checkpoint of train_crnn.py; it holds its charset
PRETRAINED = "ocr_crnn_model/pretrained.pth"  # the bundled weights, used if there is no MODEL_PATH
DATA_CSV = "datasets/data.csv"  # its test rows are read when no paths are given
NUM_SAMPLES = 20  # how many of them, evenly spread
BATCH_SIZE = 48  # images per pass through the network
ALLOWED = None  # "0123456789.,-": the only characters that can occur; None: all
LEXICON = None  # "names.txt": the only texts that can occur, one per line; None: any
MIN_CONFIDENCE = 0.5  # a reading below this is marked for a person to check
PREDICTIONS_CSV = "predictions.csv"  # all readings
PREDICTIONS_JSONL = None  # "predictions.jsonl": also a line per image with every character
ONNX_PATH = None  # "crnn.onnx": also export the model (pip install onnx onnxscript)
REPORT_DIR = "ocr_crnn_model/report"  # index.html if labelled, check.html if not; None: neither
NUM_THREADS = crnn.usable_cores()  # that decode images
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where to read
# --------------------------------------------------------------------------------------------------

CHUNK = 1024  # images in memory at a time: 16 MB at 500 pixels of width
SURE = 0.9  # confidence below which a narrow, tall image is also read as a turned line
CHECKED_AT_ONCE = 5_000  # images on the page to correct, the least sure: about 10 MB
# Of PREDICTIONS_CSV; unrestricted is what was read without the lexicon, where there is one
COLUMNS = ["image_path", "label", "source", "prediction", "confidence", "unrestricted"]
TEMPLATES = Path(__file__).parent / "ocr_crnn_model"  # the pages, each with a CONTENT to replace


def model_path():
    """The user's checkpoint, else the bundled one; of this folder, else beside the script."""
    here = Path(__file__).parent
    places = [Path(MODEL_PATH), here / MODEL_PATH, Path(PRETRAINED), here / PRETRAINED]
    return next(filter(Path.is_file, places), places[0])


def describe_weights(facts):
    """The weights used, how well they read their validation rows, and how to use better ones."""
    path = model_path()
    line = f"reading with {path.as_posix()}"
    if "val_exact" in facts:
        number = f"{facts['val_rows']:,} " if "val_rows" in facts else ""
        line += f" ({facts['val_exact']:.1%} of its {number}validation rows read without error)"
    if path not in (Path(MODEL_PATH), Path(__file__).parent / MODEL_PATH):
        line += f"\nas there is no {Path(MODEL_PATH).as_posix()}"
    if facts.get("init", "unknown") is None:
        line += "\nit was trained from scratch; to read with the bundled weights, set "
        line += f'MODEL_PATH = "{Path(PRETRAINED).as_posix()}"'
    return line


def export_onnx(path, model):
    """Write the network as ONNX: crnn.to_ink(crnn.pad(image)), (N, 1, 32, W), to logits (T, N, C).

    Its metadata hold the charset: class 0 is the CTC blank, class i is charset[i - 1].
    """
    if missing := [p for p in ("onnx", "onnxscript") if not importlib.util.find_spec(p)]:
        raise InputError(f"writing {path} needs packages: pip install {' '.join(missing)}")
    example = torch.zeros(2, 1, crnn.HEIGHT, 96)  # N and W may be any others
    sizes = {0: torch.export.Dim("N", min=1, max=2**12), 3: torch.export.Dim("W", min=8, max=2**14)}
    names = dict(input_names=["ink"], output_names=["logits"], dynamic_shapes={"ink": sizes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own workings
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False, **names)
    program.model.metadata_props["charset"] = model.charset.characters
    with whole_file(path) as temporary:
        program.save(temporary, external_data=False)
    print(f"exported to {path}")


def recognize(images, model=None, allowed=None, lexicon=None):
    """Read one image of one line, or many: see crnn.load_image for what an image may be.

    model: what crnn.load_checkpoint returned or, slower for many calls, a path; None: model_path().
    allowed, lexicon: see crnn.know; None: ALLOWED and LEXICON. Returns a list of crnn.Reading
    (text, confidence, characters, unrestricted), None for an image that cannot be read; the reason
    is printed to standard error. InputError: a bad checkpoint, allowed or lexicon.
    """
    if is_single(images):
        images = [images]
    elif not isinstance(images, (list, tuple)):
        # At once, as an iterator may change and yield one object again and again
        fixed = (*crnn.PATHS, bytes)
        images = (i if isinstance(i, fixed) else load(i, at_once=True) for i in images)
    if not isinstance(model, crnn.CRNN):
        model = load_checkpoint(model or model_path(), DEVICE)
    if model.training:
        model = crnn.folded(model)  # or reading would change its batch norms
    allowed = ALLOWED if allowed is None else allowed
    lexicon = LEXICON if lexicon is None else lexicon
    known = crnn.know(model.charset, allowed, lexicon)
    return list(read_each(images, model, itertools.repeat(known)))


def is_single(images):
    """Whether this is one image: an array (H, W) or (H, W, 1, 3 or 4), a tensor (3, H, W)."""
    kinds = (*crnn.PATHS, *crnn.CONTENTS, Image.Image)
    if not hasattr(images, "__iter__") or isinstance(images, kinds) or hasattr(images, "read"):
        return True  # also None, which cv2.imread makes of a file that is not there
    shape = getattr(images, "shape", ())
    encoded = len(shape) == 1 and str(images.dtype).endswith("uint8")  # a file's bytes
    colours = isinstance(images, torch.Tensor) and shape[:1] in [(1,), (3,), (4,)]
    return encoded or len(shape) == 2 or (len(shape) == 3 and (colours or shape[2] < 5))


def read_each(images, model, known):
    """Yield what recognize returns. Holds CHUNK images at a time, however many there are."""
    both = zip(images, known)
    while chunk := list(itertools.islice(both, CHUNK)):
        yield from read_chunk(*zip(*chunk), model)


# An image, decoded. pixels, reason: see crnn.try_load; turned: by 90 degrees either way, if the
# image is narrow; None: cannot be turned
Loaded = namedtuple("Loaded", "pixels reason turned")


def load(image, at_once=False):
    """The Loaded of an image, turned only when that is asked for or, if it may change, at once."""
    if isinstance(image, Loaded):
        return image
    pixels, reason = crnn.try_load(image)
    narrow = pixels is not None and pixels.shape[1] <= crnn.HEIGHT / 2
    turned = (crnn.try_load(image, turns)[0] for turns in (1, 3) if narrow)
    return Loaded(pixels, reason, list(turned) if at_once else turned)


def read_chunk(images, known, model):
    """The Readings of images, None for one that cannot be read. known: see crnn.read_images."""
    with ThreadPoolExecutor(max(1, NUM_THREADS)) as pool:  # enough, as Pillow releases the GIL
        loaded = list(pool.map(load, images))
    there = [i for i, image in enumerate(loaded) if image.pixels is not None]
    pixels, kinds = [loaded[i].pixels for i in there], [known[i] for i in there]
    readings = dict(zip(there, crnn.read_images(model, pixels, max(1, BATCH_SIZE), kinds)))
    unsure = [i for i in there if readings[i].confidence < SURE]
    turned = [(i, view) for i in unsure for view in loaded[i].turned if view is not None]
    views, kinds = [view for _, view in turned], [known[i] for i, _ in turned]
    others = crnn.read_images(model, views, max(1, BATCH_SIZE), kinds)
    for (i, _), other in zip(turned, others):  # three characters or more: a lone I would be a dash
        if len(other.text) > 2 and other.confidence > readings[i].confidence:
            readings[i] = other
    for image in loaded:
        if image.reason:
            print(f"skipped: {image.reason}", file=sys.stderr, flush=True)
    return [readings.get(i) for i in range(len(images))]


# ---- Samples, and what is read in them
# An image to read. label: "" if unknown; allowed, lexicon: "" for ALLOWED and LEXICON
Sample = namedtuple("Sample", "image_path label source split allowed lexicon", defaults=[""] * 5)


def list_csv(path):
    """The Samples of a csv; its paths, also those of a column lexicon, start at its own folder."""
    rows = crnn.add_split(crnn.read_labels(path)).reindex(columns=Sample._fields, fill_value="")
    names = rows.lexicon.str.strip().str.replace("\\", "/")
    lexica = [name and Path(path).parent / name for name in names]
    rows = rows.assign(image_path=crnn.image_paths(rows, path), lexicon=lexica)
    return list(map(Sample._make, rows.itertuples(index=False)))


def list_samples(arguments):
    """A Sample for every image that the arguments name."""
    samples, kinds = [], Image.registered_extensions()  # by suffix; PDF is not in Image.OPEN
    # The shell of Windows does not expand *.png
    named = [[a] if os.path.exists(a) else sorted(glob(a)) or [a] for a in map(str, arguments)]
    if [""] in named:  # an unset variable of a shell: Path takes it for this folder
        raise InputError("an argument is empty: name images, folders with some, or a csv")
    for path in map(Path, itertools.chain(*named)):
        if os.path.isdir(path):
            # Without hidden files, such as a Mac's ._ files: * does not match a leading dot
            names = glob("**/*", root_dir=path, recursive=True)
            files = {path / name for name in names if os.path.isfile(path / name)}
            images = {file for file in files if kinds.get(file.suffix.lower()) in Image.OPEN}
            samples += map(Sample, sorted(images))
            if others := sorted(f for f in files - images if f.suffix.lower() != ".csv"):
                such = f"{len(others):,} in no format that Pillow reads, such as {others[0].name}"
                print(f"{path}: {such}", file=sys.stderr)
        elif path.suffix.lower() == ".csv":
            samples += list_csv(path)
        else:
            samples.append(Sample(path))
    if not samples:
        raise InputError("no images to read: name images, folders with some, or a csv")
    return samples


def pick_test_rows():
    """NUM_SAMPLES of the test rows of DATA_CSV, evenly spread."""
    if not os.path.exists(DATA_CSV):
        raise InputError(f"no {DATA_CSV}: name images to read, python inference_crnn.py PATH")
    rows = [sample for sample in list_csv(DATA_CSV) if sample.split == "test"]
    if not rows:
        raise InputError(f"{DATA_CSV} has no test rows: name images, python inference_crnn.py PATH")
    n = max(1, min(NUM_SAMPLES, len(rows)))
    return [rows[i * len(rows) // n] for i in range(n)]


def show(sample, reading):
    """Print one reading and, if it is doubtful, what its most doubtful character could be."""
    print(f"Image: {sample.image_path.as_posix()}")
    if sample.label:
        print(f"Ground Truth: {sample.label}")
    sure = reading.confidence >= MIN_CONFIDENCE
    doubt = "" if sure else ", please check"
    doubtful = [c for c in reading.characters if c.alternatives]
    if doubtful and not sure:  # such as ": O 0.61 · 0 0.37"
        least = min(doubtful, key=lambda c: c.confidence)
        pairs = [(least.character, least.confidence), *least.alternatives]
        doubt += ": " + " · ".join(f"{c} {p:.2f}" for c, p in pairs)
    if reading.unrestricted not in (None, reading.text):
        doubt += f"; without the lexicon {reading.unrestricted}"
    print(f"Predicted   : {reading.text}  (confidence {reading.confidence:.2f}{doubt})\n")


def know_each(samples, charset):
    """The crnn.Known of each sample, made once for each kind: a form's fields are of few kinds."""
    known = {("", ""): crnn.know(charset, ALLOWED, LEXICON)}
    for path, *_, allowed, lexicon in samples:
        try:
            if (allowed, lexicon) not in known:
                known[allowed, lexicon] = crnn.know(charset, allowed or ALLOWED, lexicon or LEXICON)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return [known[sample.allowed, sample.lexicon] for sample in samples]


def read_all(samples, model):
    """Read samples, show each, and write PREDICTIONS_JSONL.

    Returns a DataFrame of what could be read: COLUMNS, and a column others, which lists the
    alternatives of each character of the prediction, such as ["1I", ""].
    """
    import pandas as pd  # here, so that recognize() from Python does not wait for it

    known, rows = know_each(samples, model.charset), []
    target = whole_file(PREDICTIONS_JSONL) if PREDICTIONS_JSONL else nullcontext(os.devnull)
    with target as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as lines:
        readings = read_each([sample.image_path for sample in samples], model, known)
        for sample, reading in zip(samples, readings):
            if reading is None:
                continue
            with suppress(BrokenPipeError):  # as head leaves it: what is read is still written
                show(sample, reading)
            names = [sample.image_path.as_posix(), sample.label, sample.source]
            row = [*names, reading.text, reading.confidence, reading.unrestricted or ""]
            if PREDICTIONS_JSONL:
                characters = [c._asdict() for c in reading.characters]
                record = dict(zip(COLUMNS, row), characters=characters)
                lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            # Characters as such would take gigabytes for 100,000 images.
            others = ["".join(other for other, _ in c.alternatives) for c in reading.characters]
            rows.append([*row, others])
        if not rows:  # perhaps a mistyped path: what an earlier run has read stays
            raise InputError("no image could be read, see above: nothing was written")
    return pd.DataFrame(rows, columns=[*COLUMNS, "others"])


def write_predictions(rows):
    """Write PREDICTIONS_CSV or, where that cannot be replaced, one beside it. Returns its path."""
    table = rows[COLUMNS].assign(confidence=rows.confidence.map("{:.4f}".format))
    path = PREDICTIONS_CSV
    try:
        crnn.write_labels(table, path, "utf-8-sig")  # or Excel shows é as Ã©
    except PermissionError:  # on Windows, while Excel has it open
        path = free_name(path)
        crnn.write_labels(table, path, "utf-8-sig")
    return path


# ---- Pages
def write_page(name, template, content):
    """Write REPORT_DIR/name, a template with its CONTENT replaced. Returns its path."""
    page = (TEMPLATES / template).read_text(encoding="utf-8").replace("CONTENT", content, 1)
    path = Path(REPORT_DIR) / name
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # odd file names
    return path


def free_name(path):
    """The first of labels.csv, labels_2.csv, labels_3.csv, ... that is not there yet."""
    stem, suffix = os.path.splitext(path)
    names = (f"{stem}_{i}{suffix}" for i in itertools.count(2))
    return next(name for name in itertools.chain([str(path)], names) if not os.path.exists(name))


def thumbnail(path):
    """A small picture of an image, grey, as a data URL: its page needs no other file."""
    try:
        with Image.open(path) as image:
            grey = crnn.to_grey(ImageOps.exif_transpose(image))
    except OSError as error:  # deleted since it was read
        print(f"{path}: no picture on the page ({error})", file=sys.stderr)
        return ""
    grey.thumbnail((1400, 64))  # pixels: sharp at the page's 3.5em, and 3 kB
    memory = io.BytesIO()
    grey.save(memory, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(memory.getvalue()).decode()}"


def write_check(rows):
    """Write a page to correct readings in, the least sure first. Returns its path.

    It saves them as labels.csv, or under another name that is free, for the folder of the images.
    """
    rows = rows.sort_values("confidence", kind="stable")[:CHECKED_AT_ONCE]
    folders = [os.path.dirname(os.path.abspath(path)) for path in rows.image_path]
    try:
        folder = Path(os.path.commonpath(folders))
    except ValueError:
        remedy = "read each drive in a run of its own to correct them on a page"
        raise InputError(f"the images are on two drives: {remedy}") from None
    file = os.path.basename(free_name(folder / "labels.csv"))
    how = dict(max_workers=max(1, NUM_THREADS), desc="check.html", unit="img", disable=None)
    images = thread_map(thumbnail, rows.image_path, **how)
    paths = [Path(os.path.relpath(path, folder)).as_posix() for path in rows.image_path]
    rows = rows.assign(path=paths, text=rows.prediction, image=images).round({"confidence": 2})
    rows = rows[["path", "text", "confidence", "unrestricted", "others", "image"]]
    job = dict(folder=folder.as_posix().rstrip("/"), file=file, rows=rows.to_dict("records"))
    content = json.dumps(job, ensure_ascii=False).replace("<", "\\u003c")  # no </script> within it
    return write_page("check.html", "check.html", content)


# ---- Report. rows: a DataFrame with columns image_path, label, source, prediction, confidence.
def edits(label, prediction):
    """What turns a label into a prediction: (character, read instead), "" for none, in order."""
    return [
        ("" if kind == "insert" else label[i], "" if kind == "delete" else prediction[j])
        for kind, i, j in Levenshtein.editops(label, prediction)
    ]


def show_surest_errors(rows, most=60):
    """The surest wrong predictions, with their images, as HTML."""
    items = []
    for row in rows[rows.label != rows.prediction].nlargest(most, "confidence").itertuples():
        text = html.escape(f"{row.label} read as {row.prediction} ({row.confidence:.2f})")
        items.append(f'<p><img alt="" src="{thumbnail(row.image_path)}"> {text}</p>')
    return "\n".join(items)


def write_report(rows):
    """Write index.html, a page with all its tables and images in it. Returns its path."""
    import pandas as pd

    errors = [edit for pair in zip(rows.label, rows.prediction) for edit in edits(*pair)]
    errors = pd.DataFrame(errors, columns=["label", "read"])
    errors = errors.replace({"": "(nothing)", " ": "(space)"}).value_counts().head(25)
    scores = crnn.score_table(rows)
    summary = {
        "exact match": scores.exact.iloc[-1],
        "exact match, any case": (rows.label.str.lower() == rows.prediction.str.lower()).mean(),
        "character error rate": scores.CER.iloc[-1],
        "calibration error": crnn.calibration_error(rows.confidence, rows.label == rows.prediction),
    }
    tenths = [min(int(confidence * 10), 9) for confidence in rows.confidence]
    bands = rows.assign(band=[f"{tenth / 10} to {(tenth + 1) / 10}" for tenth in tenths])
    percent = dict.fromkeys(["share", "exact", "±", "CER"], "{:.1%}".format)
    table = partial(pd.DataFrame.to_html, formatters=percent, border=0, index_names=False)
    sections = {
        "All": table(pd.Series(summary, name="share").to_frame()),
        "By source": table(scores),
        "By confidence": table(crnn.score_table(bands, "band")),
        "The most frequent errors": table(errors.reset_index(name="times"), index=False),
        "The surest errors": show_surest_errors(rows),
    }
    content = f"<h1>{len(rows):,} labelled images read with {html.escape(str(model_path()))}</h1>\n"
    content += "\n".join(f"<h2>{name}</h2>\n<div>{part}</div>" for name, part in sections.items())
    return write_page("index.html", "report.html", content)


# ---- Main
def main(arguments=()):
    """Read what the arguments name, or some test rows. Returns the exit status."""
    if options := {a for a in arguments if a.startswith("-") and not os.path.exists(a)}:
        print(__doc__)
        if options & {"-h", "--help"}:
            return 0
        print(f"no option {min(options)}: edit the constants at the top", file=sys.stderr)
        return 2
    crnn.check_output(PREDICTIONS_CSV, "PREDICTIONS_CSV")
    if PREDICTIONS_JSONL:
        crnn.check_output(PREDICTIONS_JSONL, "PREDICTIONS_JSONL")
    if REPORT_DIR:
        crnn.check_output(Path(REPORT_DIR) / "index.html", "REPORT_DIR")
    model = load_checkpoint(model_path(), DEVICE)
    print(describe_weights(model.facts))
    if ONNX_PATH:
        export_onnx(ONNX_PATH, load_checkpoint(model_path()))
    samples = list_samples(arguments) if arguments else pick_test_rows()
    rows = read_all(samples, model)
    path = write_predictions(rows)
    labelled, bare = rows[rows.label != ""], rows[rows.label == ""].drop_duplicates("image_path")
    lines = []  # printed at the end, where nobody may be listening any more
    if len(labelled):
        labelled = labelled.assign(source=labelled.source.replace("", "unnamed"))
        with suppress(BrokenPipeError):
            print(f"{crnn.format_score_table(crnn.score_table(labelled))}\n")
        if REPORT_DIR:
            lines.append(f"report: {write_report(labelled).as_posix()}")
    if len(bare) and REPORT_DIR:
        some = "the readings" if len(bare) <= CHECKED_AT_ONCE else "the least sure readings"
        try:
            lines.append(f"to correct {some}, open {write_check(bare).as_posix()} in a browser")
        except InputError as error:
            lines.append(str(error))
    unsure, skipped = (rows.confidence < MIN_CONFIDENCE).sum(), len(samples) - len(rows)
    images = "1 image" if len(rows) == 1 else f"{len(rows):,} images"
    unsure = f"{unsure:,} below MIN_CONFIDENCE = {MIN_CONFIDENCE}"
    lines += [f"{images} read, {unsure}, {skipped:,} skipped", f"readings: {path}"]
    with suppress(BrokenPipeError):
        print(*lines, sep="\n")
    return int(skipped > 0)


if __name__ == "__main__":
    crnn.run(main, sys.argv[1:])
