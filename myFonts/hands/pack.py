"""Pack the pen strokes of UNIPEN and detexify into hands.npz, as prepare_ocr_dataset.py draws them.

    python myFonts/hands/pack.py FOLDER             (of unipen/*.npz and detexify/*.npz)
    python myFonts/hands/pack.py FOLDER MODEL.pth   (the first time, to find wrong labels)

FOLDER: arrays dx, dy, points_in_stroke, strokes_in_sample, labels, writer, writers, made of the
files of github.com/GreenCappuccino/train_r01_v07, commit 552a4d4, and kirel/detexify-next, 6831c81.

Left out: ink that cannot be what its label says, more of a kind than drawing needs, and samples of
refused.csv, in which a model that was trained on the others confidently reads something else. What
is kept is smoothed where a tablet was coarse, and then simplified, so that it stays small.
"""

import csv
import hashlib
import io
import random
import re
import sys
import zipfile
from collections import Counter, defaultdict
from itertools import count
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import crnn  # noqa: E402
import prepare_ocr_dataset as prepare  # noqa: E402

PER_CHARACTER, PER_TEXT = 8, 2  # samples kept of one character, one word or text, of one writer
TOLERANCE = 1.3  # how far a simplified line may lie from the written one; characters are 128 high
SIGNS = "×÷±√π≤≥≠\\"  # taken from detexify; UNIPEN has none, and the last of few writers
REFUSED = ["file", "place", "label", "read"]  # columns of refused.csv


def load(path):
    """The samples of a file of strokes: (points of each stroke (n, 2), label, writer)."""
    with np.load(path) as file:
        labels, names = str(file["labels"]).split("\n"), str(file["writers"]).split("\n")
        steps = np.stack([file["dx"], file["dy"]], 1).astype(np.float32)  # (points, 2)
        counts, writers = file["strokes_in_sample"].tolist(), file["writer"].tolist()
        ends = np.cumsum(file["points_in_stroke"].astype(np.int64))
    strokes = [np.cumsum(part, axis=0) for part in np.split(steps, ends[:-1])]
    starts = np.cumsum([0, *counts]).tolist()
    pieces = (strokes[a:b] for a, b in zip(starts, starts[1:]))
    return [(piece, label, names[w]) for piece, label, w in zip(pieces, labels, writers)]


def pseudonym(name):
    """What stands for a person, DONOR/NAME: not the name, but on the name's side of the split."""
    person = re.sub(r"_\d$", "", name.split("/")[-1])  # somebody's sessions: Name_1, Name_2
    codes = (hashlib.sha256(f"{name} {n}".encode()).hexdigest()[:8] for n in count())
    return next(code for code in codes if prepare.word_split(code) == prepare.word_split(person))


def grids(samples):
    """How coarse each writer's tablet was: a low percentile of the steps between points."""
    steps = defaultdict(list)
    for strokes, _, writer in samples:
        for stroke in strokes:
            moved = np.abs(np.diff(stroke, axis=0))
            steps[writer].append(moved[moved > 0])
    return {writer: np.percentile(np.concatenate(v), 15) for writer, v in steps.items()}


def smooth(stroke, grid):
    """A stroke (n, 2) without the stairs of a coarse tablet; its ends stay where they are."""
    lengths = np.append(0, np.hypot(*np.diff(stroke, axis=0).T).cumsum())
    if grid < 3 or len(stroke) < 4 or lengths[-1] < 6 * grid:
        return stroke
    n = int(lengths[-1] / 2) + 2
    even = np.linspace(0, lengths[-1], n)
    points = np.stack([np.interp(even, lengths, axis) for axis in stroke.T], 1)  # (n, 2)
    reach = min(int(1.5 * grid), n // 2)  # in points, two units apart
    kernel = np.hanning(2 * reach + 3)[1:-1]
    kernel /= kernel.sum()
    before, after = (
        2 * points[0] - points[reach:0:-1],
        2 * points[-1] - points[-2 : -reach - 2 : -1],
    )
    padded = np.concatenate([before, points, after])  # (n + 2 reach, 2)
    return np.stack([np.convolve(axis, kernel, "valid") for axis in padded.T], 1)  # (n, 2)


def simplified(strokes, grid):
    """Strokes (n, 2) as few whole points from (0, 0) on, int32."""
    strokes = [smooth(stroke, grid) for stroke in strokes]
    low = np.concatenate(strokes).min(0)
    lines = [
        cv2.approxPolyDP(np.float32(s - low)[:, None], TOLERANCE, False)[:, 0] for s in strokes
    ]
    return [np.round(line).astype(np.int32) for line in lines]


def compact(strokes, label):
    """Whether the ink of a character is no wider than any is; a trailing pen makes some so."""
    width, height = np.ptp(np.concatenate(strokes), axis=0)
    return len(label) == 1 and (not label.isalnum() or (height < 330 and width < 2.5 * height))


def believable(strokes, label):
    """Whether the ink of a word or text can be its label: one line, wide enough, with its gaps."""
    # Characters are in a file of their own, at their true size; @_ marks what is no text.
    if len(label) < 2 or "@_" in label:
        return False
    every = np.concatenate(strokes)
    width, height = np.ptp(every, axis=0)
    if height > 330 or width < 14 * len(label) or width > 330 * len(label):
        return False
    # Gaps between pieces of ink: a space must show as one, and a word must not fall apart.
    spans = sorted((s[:, 0].min(), s[:, 0].max()) for s in strokes)
    reach = np.maximum.accumulate([high for _, high in spans])
    gaps = sorted((low - r for (low, _), r in zip(spans[1:], reach)), reverse=True)
    spaces = label.count(" ")
    words_apart = len(gaps) >= spaces and all(12 < gap < 260 for gap in gaps[:spaces])
    return words_apart and (not gaps[spaces:] or gaps[spaces] < 110)


def chosen(samples, most, refused, kind):
    """Places of at most so many samples of each label of each writer, without refused ones."""
    # These count, so that no other takes their place, which nobody has looked at.
    order = random.Random(0).sample(range(len(samples)), len(samples))
    seen, kept = Counter(), []
    for i in order:
        strokes, label, writer = samples[i]
        seen[writer, label] += 1
        if seen[writer, label] <= most and (kind, str(i)) not in refused:
            kept.append(i)
    return sorted(kept)


def collected(folder):
    """What goes into hands.npz: (strokes, label, writer, file, place in it), by writer."""
    with open(HERE / "refused.csv", encoding="utf-8", newline="") as file:
        refused = {(row["file"], row["place"]) for row in csv.DictReader(file)}
    packed = []
    for name in ("chars", "words", "texts"):
        samples = load(folder / f"unipen/unipen_{name}.npz")
        coarse, single = grids(samples), name == "chars"
        most, fits = (PER_CHARACTER, compact) if single else (PER_TEXT, believable)
        for i in tqdm(chosen(samples, most, refused, name), name):
            strokes, label, writer = samples[i]
            if fits(strokes, label):
                ink = simplified(strokes, coarse[writer])
                packed.append((ink, label, pseudonym(writer), name, i))
    for i, (strokes, label, _) in enumerate(load(folder / "detexify/detexify_symbols.npz")):
        if label in SIGNS:  # its drawers are not known: shares of it stand for them in the split
            packed.append((simplified(strokes, 1), label, f"detexify{i % 20}", "signs", i))
    return sorted(packed, key=lambda sample: sample[2])


def refuse(packed, model_path):
    """Add to refused.csv what a model flatly refuses to read as its label."""
    from rapidfuzz.distance import Levenshtein

    model, images = crnn.folded(crnn.load_checkpoint(model_path)), []
    for i, (_, label, *_) in enumerate(tqdm(packed, "drawing")):
        hand = prepare.Hand(28, 0.06, 0, 0, 0.2, None, {label: [i]})
        ink = (prepare.composed if len(label) == 1 else prepare.retraced)(label, hand, "train")
        images.append(crnn.load_image(1 - ink))
    with open(HERE / "refused.csv", "a", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        for (_, label, _, name, place), reading in zip(packed, crnn.read_once(model, images, 64)):
            pair = [text.lower().replace(" ", "") for text in (label, reading.text)]
            wrong = Levenshtein.distance(*pair) / len(pair[0])
            sure, far = (0.9, 0.5) if len(label) == 1 else (0.4, 0.7)
            # Not signs: their drawings are right, but of more shapes than a model has seen.
            if name != "signs" and wrong >= far and reading.confidence > sure:
                rows.writerow([name, place, label, reading.text])


def main(folder, model_path=None):
    if not (HERE / "refused.csv").exists():
        with open(HERE / "refused.csv", "w", encoding="utf-8", newline="") as file:
            file.write(",".join(REFUSED) + "\n")
    packed = collected(Path(folder))
    write(packed)
    if model_path:
        refuse(packed, model_path)
        write(collected(Path(folder)))


def write(packed):
    """hands.npz of samples, compressed better than numpy would."""
    writers = sorted({writer for _, _, writer, *_ in packed})
    number = {writer: i for i, writer in enumerate(writers)}
    lines = [line for strokes, *_ in packed for line in strokes]
    # Of every point the step from the one before, of a sample's first from (0, 0)
    inks = [np.concatenate(strokes) for strokes, *_ in packed]
    steps = np.concatenate([np.diff(ink, axis=0, prepend=0) for ink in inks]).astype(np.int16)
    arrays = dict(
        dx=steps[:, 0],
        dy=steps[:, 1],
        points_in_stroke=np.array([len(line) for line in lines], np.uint16),
        strokes_in_sample=np.array([len(strokes) for strokes, *_ in packed], np.uint8),
        writer=np.array([number[writer] for _, _, writer, *_ in packed], np.uint16),
        writers=np.array("\n".join(writers)),
        labels=np.array("\n".join(label for _, label, *_ in packed)),
    )
    with zipfile.ZipFile(HERE / "hands.npz", "w", zipfile.ZIP_LZMA) as file:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            # A ZipInfo bears no time, so that the same samples make the same file.
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue(), zipfile.ZIP_LZMA)
    size = (HERE / "hands.npz").stat().st_size / 1e6
    print(
        f"{len(packed):,} samples of {len(writers)} writers, {len(steps):,} points: {size:.1f} MB"
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if sys.argv[1:] else __doc__)
