"""Read pictures of short text with a trained CRNN.

    python inference_crnn.py                         a few test rows of datasets/data.csv
    python inference_crnn.py scan.png forms/ own.csv   pictures, folders of pictures, csv files with image_path,label

Prints what it reads in each picture and writes everything to predictions.csv; where labels are known, a table scores the
readings by source. Exit status 1 when any picture could not be read. From Python: recognize(images, checkpoint).
"""
import csv
import sys
from pathlib import Path

import torch

from crnn import (IMAGE_SUFFIXES, UNCALIBRATED, add_split, format_score_table, load_checkpoint, load_image, read_images, read_labels,
                  score_table, whole_file)

# ---------------------------------------------------------------------------------------------------------------------
MODEL_PATH = "ocr_crnn_model/crnn.pth"  # checkpoint that train_crnn.py saved; charset and preprocessing come with it
DATA_CSV = "datasets/data.csv"  # whose test rows are read when no paths are given
NUM_SAMPLES = 20  # how many of them, spread over all
BATCH_SIZE = 64  # pictures read at once
MIN_CONFIDENCE = 0.5  # below this a reading is marked for a person to check
PREDICTIONS_CSV = "predictions.csv"  # columns image_path,label,source,prediction,confidence
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where to read
# ---------------------------------------------------------------------------------------------------------------------

CHUNK = 1024  # pictures held in memory at a time


def recognize(images, checkpoint=None):
    """Read paths, PIL images or arrays (H, W[, 3 or 4]), each a picture of one line.

    checkpoint: its path, or what crnn.load_checkpoint returned; None: MODEL_PATH.
    Returns a list as long as images of crnn.Reading (text, confidence, characters), None where a picture cannot be read;
    why is printed to standard error. Raises ValueError when the checkpoint is missing or is not one.
    """
    model, charset, facts = checkpoint if isinstance(checkpoint, tuple) else load_checkpoint(checkpoint or MODEL_PATH, DEVICE)
    readings = [None] * len(images)
    for start in range(0, len(images), CHUNK):
        pictures = {}
        for i, image in enumerate(images[start:start + CHUNK], start):
            try:
                pictures[i] = load_image(image, model.architecture["height"])
            except ValueError as error:
                print(f"skipped: {error}", file=sys.stderr, flush=True)
        for i, reading in zip(pictures, read_images(model, charset, list(pictures.values()), BATCH_SIZE,
                                                     tuple(facts.get("calibration", UNCALIBRATED)))):
            readings[i] = reading
    return readings


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
    print(f"Predicted   : {reading.text}  (confidence {reading.confidence:.2f}"
          f"{', please check' if reading.confidence < MIN_CONFIDENCE else ''})\n")


def main(arguments=()):
    """Read what the arguments name, or test rows where there are none. Returns the exit status."""
    try:
        checkpoint = load_checkpoint(MODEL_PATH, DEVICE)
        samples = find_pictures(arguments) if arguments else from_csv(DATA_CSV, only_test=True)
    except ValueError as error:
        raise SystemExit(str(error))
    if not samples:
        raise SystemExit(f"{DATA_CSV} has no test rows: name pictures instead, python inference_crnn.py PATH")

    read = []  # (label, prediction, source) where the label is known
    skipped = to_check = 0
    try:
        with whole_file(PREDICTIONS_CSV) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
            table.writerow(["image_path", "label", "source", "prediction", "confidence"])
            for start in range(0, len(samples), CHUNK):
                chunk = samples[start:start + CHUNK]
                for (path, label, source), reading in zip(chunk, recognize([path for path, _, _ in chunk], checkpoint)):
                    if reading is None:
                        skipped += 1
                        continue
                    report(path, label, reading)
                    table.writerow([path.as_posix(), label, source, reading.text, f"{reading.confidence:.4f}"])
                    to_check += reading.confidence < MIN_CONFIDENCE
                    if label:
                        read.append((label, reading.text, source or "unnamed"))
    except OSError as error:
        raise SystemExit(f"cannot write {PREDICTIONS_CSV}: {error}. Make room, or set PREDICTIONS_CSV to another place")

    if read:
        print(f"{format_score_table(score_table(*zip(*read)))}\n")
    print(f"{len(samples) - skipped:,} pictures read, {to_check:,} of them below MIN_CONFIDENCE = {MIN_CONFIDENCE}; "
          f"{skipped:,} skipped; all in {PREDICTIONS_CSV}")
    return int(skipped > 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main(sys.argv[1:]))
