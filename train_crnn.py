"""Train the CRNN on the pictures and labels of datasets/data.csv, or of a csv of your own with image_path,label.

    python train_crnn.py

Prints what the data said, one line per epoch, and at the end a table on the test rows. The best epoch, by exact match on the
validation rows, is in MODEL_PATH, with all that reading needs. Stop with Ctrl-C at any time; RESUME goes on where it stopped.
"""
import os
import shutil
import sys
import time
import unicodedata
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from crnn import (BLANK, CRNN, HEIGHT, Charset, add_split, describe, format_score_table, frames_needed, load_checkpoint, load_image,
                  num_frames, read_images, read_labels, save_checkpoint, save_tensors, score_table, to_ink, whole_file)

# ---------------------------------------------------------------------------------------------------------------------
# Data and files
DATA_CSV = "datasets/data.csv"  # columns image_path,label and, where there are, source,split; paths relative to its folder
MODEL_PATH = "ocr_crnn_model/crnn.pth"  # the best epoch; the state to resume from lies beside it
INIT_WEIGHTS = None  # checkpoint to start from, its output rows carried over by character; None: from nothing
RESUME = False  # go on from the last complete epoch of the same data and constants
MIN_CHARACTER_ROWS = 3  # a character in fewer training labels than this is taken for a slip, and its rows are left out

# Network
CHANNELS = (32, 64, 128, 192)  # of the CNN's stages; the last is the number of features per frame
HIDDEN = 192  # LSTM units in each direction
DROPOUT = 0.0  # share of the features and of the LSTM's output that is zeroed in training

# Training
EPOCHS = 3  # passes over the training rows
BATCH_SIZE = 32  # pictures, all of about one width
LEARNING_RATE = 3e-3  # the peak of the one-cycle schedule
WARM_UP = 0.1  # part of the training in which the learning rate rises to its peak
WEIGHT_DECAY = 1e-2  # of AdamW
SHORTCUT_WEIGHT = 0.1  # of a second CTC loss, on the CNN's features; its head is not kept
FROZEN_NORMS = 0.25  # last part of the training, in which batch norm uses its running averages, as it does for reading
AUGMENT = 1.0  # strength of the random changes to the training pictures; 0: none

# How
SEED = 0  # the same seed, data and machine give the same weights
NUM_WORKERS = min(os.cpu_count() or 1, 61)  # processes that decode pictures before the first epoch; Windows takes 61 at most
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
# ---------------------------------------------------------------------------------------------------------------------

BUCKET = 16  # pixels; the training pictures of a batch are padded to a common multiple of it
SHOWN = 3  # rows named per reason for leaving rows out, and examples shown per epoch


# ---------------------------------------------------------------------------------------------------------------------
# Data

def load_picture(path):
    """The picture as a uint8 array (HEIGHT, W), or the line that says why it cannot be read. Runs in the workers."""
    try:
        return load_image(path).numpy()
    except ValueError as error:
        return str(error)


def load_pictures(paths):
    """Decode pictures in NUM_WORKERS processes; memory grows by their bytes at HEIGHT rows."""
    def bar(results):
        return list(tqdm(results, total=len(paths), desc="reading pictures", unit="img"))

    if NUM_WORKERS <= 1 or len(paths) < 500:  # starting processes takes longer than reading so few
        return bar(map(load_picture, paths))
    try:
        with ProcessPoolExecutor(NUM_WORKERS) as workers:
            return bar(workers.map(load_picture, paths, chunksize=128))
    except BrokenProcessPool:
        raise SystemExit("a process that reads pictures died, most likely for want of memory: set NUM_WORKERS lower, or use fewer pictures")


def is_control(character):
    """Line breaks, tabs, zero-width and other characters that no picture shows."""
    return unicodedata.category(character)[0] == "C"


def choose_charset(labels, known):
    """The characters to learn: those of the known charset, then all others that enough labels hold, sorted."""
    counts = pd.Series([c for label in labels for c in set(label) if not is_control(c)], dtype=str).value_counts()
    return known + "".join(sorted(c for c, n in counts.items() if n >= MIN_CHARACTER_ROWS and c not in known))


def reason_to_leave_out(label, picture, charset):
    """Why a row cannot be trained on or tested with, in a few words, and its own particulars; (None, None) where it can."""
    if not label:
        return "empty label", ""
    if any(map(is_control, label)):
        return "line break or control character in the label", repr(label)
    if charset.unknown(label):
        return f"character outside the charset (in fewer than MIN_CHARACTER_ROWS = {MIN_CHARACTER_ROWS} training labels)", \
            describe(charset.unknown(label)[0])
    if isinstance(picture, str):
        return "missing or unreadable picture", picture
    frames = num_frames(picture.shape[1])
    if frames_needed(label) > frames:
        return "label that cannot fit its picture", f"{len(label)} characters need {frames_needed(label)} frames, it has {frames}"
    return None, None


def load_data(known_characters=""):
    """Read DATA_CSV and its pictures, and say what was found. Returns rows (with a column picture) and the Charset.

    Raises SystemExit with one line when there is nothing to train on.
    """
    try:
        rows = add_split(read_labels(DATA_CSV))
    except ValueError as error:
        raise SystemExit(str(error))
    unknown_splits = sorted(set(rows.split) - {"train", "val", "test"})
    if unknown_splits:
        raise SystemExit(f"{DATA_CSV} has the split {unknown_splits[0]!r}: use train, val or test, or leave the column out")
    characters = choose_charset(rows.label[rows.split == "train"], known_characters)
    if not characters:
        raise SystemExit(f"{DATA_CSV} has no training labels to learn from: at least {MIN_CHARACTER_ROWS} rows of the split train "
                         f"must share a character (MIN_CHARACTER_ROWS)")
    charset = Charset(characters)
    folder = Path(DATA_CSV).parent
    rows["picture"] = load_pictures([str(folder / path) for path in rows.image_path])

    reasons = [reason_to_leave_out(row.label, row.picture, charset) for row in rows.itertuples()]
    rows["reason"], rows["particulars"] = [r for r, _ in reasons], [p for _, p in reasons]
    report_data(rows, charset)
    rows = rows[rows.reason.isna()].reset_index(drop=True)
    if not (rows.split == "train").any():
        raise SystemExit(f"{DATA_CSV} leaves no row to train on: see the reasons above")
    if not (rows.split == "val").any():
        print("no val rows: exact match is measured on the training rows, which says little about unseen pictures")
    return rows, charset


def report_data(rows, charset):
    """Print rows by source and split, the charset, the longest label, and which rows are left out and why."""
    kept, left_out = rows[rows.reason.isna()], rows[rows.reason.notna()]
    print(f"{DATA_CSV}: {len(rows):,} rows, of which used:")
    splits = [s for s in ("train", "val", "test") if (kept.split == s).any()]
    if len(kept):
        print(kept.groupby(["source", "split"]).size().unstack(fill_value=0)[splits].to_string())
        longest = max(kept.label, key=len)
        print(f"longest label: {len(longest)} characters, {longest!r}")
    print(f"charset: {len(charset.characters)} characters, {charset.characters!r}")
    for reason, group in left_out.groupby("reason"):
        print(f"left out: {len(group):,} rows, {reason}")
        for row in group.head(SHOWN).itertuples():
            print(f"    {row.image_path} {row.label[:40]!r} {row.particulars}".rstrip())


class Bucket:
    """The training rows whose pictures are padded with paper to one width, as tensors, so that a batch is one indexing.

    pixels: uint8 (n, 1, HEIGHT, W); targets: int64 (n, longest), filled up with 0; lengths: int64 (n,).
    """

    def __init__(self, width, pictures, targets):
        self.pixels = torch.full((len(pictures), 1, HEIGHT, width), 255, dtype=torch.uint8)
        self.lengths = torch.tensor([len(target) for target in targets])
        self.targets = torch.full((len(targets), int(self.lengths.max())), BLANK)
        for i, (picture, target) in enumerate(zip(pictures, targets)):
            self.pixels[i, 0, :, :picture.shape[1]] = torch.from_numpy(picture)
            self.targets[i, :len(target)] = torch.tensor(target)


def make_buckets(rows, charset):
    """Sort rows into Buckets: every BUCKET pixels up to 256, then ever wider steps, since long lines are few."""
    widths = rows.picture.map(lambda picture: picture.shape[1])
    steps = widths.map(lambda w: BUCKET * max(1, 2 ** max(0, (w - 1).bit_length() - 8)))
    return [Bucket(int(width), list(group.picture), [charset.encode(label) for label in group.label])
            for width, group in rows.groupby(-(-widths // steps) * steps)]


def shuffled_batches(buckets):
    """(bucket, indices) of every batch of an epoch in random order, from torch's global generator."""
    batches = [(bucket, indices) for bucket in buckets for indices in torch.randperm(len(bucket.pixels)).split(BATCH_SIZE)]
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: random changes to a whole batch at once

def augment(ink, strength):
    """Ink (N, 1, H, W), 0 = paper, to the same shape: moved, turned, slanted and bent; strokes thicker or thinner; blurred; noisy."""
    n, _, height, width = ink.shape
    uniform = lambda *shape: (torch.rand(*shape, device=ink.device) * 2 - 1) * strength  # from -strength to strength
    ratio = width / height  # grid_sample counts both axes from -1 to 1
    angle, slant = uniform(n) * 0.04, uniform(n) * 0.25  # radians; columns per row
    scale_x, scale_y = 1 + uniform(n) * 0.12, 1.04 + uniform(n) * 0.14
    shift_x, shift_y = uniform(n) * 0.12 / max(1, ratio), uniform(n) * 0.1
    matrix = torch.stack([torch.stack([scale_x, slant / ratio, shift_x], 1),
                          torch.stack([angle * ratio, scale_y, shift_y], 1)], 1)  # (N, 2, 3)
    grid = F.affine_grid(matrix, list(ink.shape), align_corners=False)  # (N, H, W, 2)
    bend = uniform(n, 2, 3, 2 + width // 16) * torch.tensor([0.05 / max(1, ratio), 0.05], device=ink.device)[:, None, None]
    bend = F.interpolate(bend, (height, width), mode="bilinear", align_corners=True)  # (N, 2, 3, few) -> (N, 2, H, W)
    ink = F.grid_sample(ink, grid + bend.permute(0, 2, 3, 1), align_corners=False)  # (N, 1, H, W)

    thicker, thinner = highest_of_nine(ink), -highest_of_nine(-ink)
    weight = (uniform(n, 1, 1, 1) - 0.1) * (torch.rand(n, 1, 1, 1, device=ink.device) < 0.5)  # in half of the pictures
    ink = ink + weight.clamp(min=0) * 0.6 * (thicker - ink) + (-weight).clamp(min=0) * 0.35 * (thinner - ink)
    soft = F.avg_pool2d(ink, 3, 1, 1, count_include_pad=False)
    ink = ink + uniform(n, 1, 1, 1).clamp(min=0) * (torch.rand(n, 1, 1, 1, device=ink.device) < 0.3) * (soft - ink)
    contrast, noise = 1 + uniform(n, 1, 1, 1) * 0.15, uniform(n, 1, 1, 1).clamp(min=0) * 0.08
    return ink * contrast + noise * torch.randn_like(ink)


def highest_of_nine(x):
    """The highest value among every pixel and its neighbours, (N, 1, H, W) to the same; ten times faster than max_pool2d here."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")  # (N, 1, H + 2, W + 2)
    x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])  # (N, 1, H + 2, W)
    return torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])  # (N, 1, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# Training

def carry_over(model, charset, path):
    """Start from the weights of another checkpoint: output rows by character, all the rest as it is. Says which are new."""
    source, known, _ = load_checkpoint(path)
    wanted = dict(model.architecture, num_classes=0, dropout=0)
    if dict(source.architecture, num_classes=0, dropout=0) != wanted:
        raise SystemExit(f"INIT_WEIGHTS {path} holds another network ({source.architecture}): set CHANNELS and HIDDEN to match")
    weights = source.state_dict()
    for name in ("linear.weight", "linear.bias"):
        rows = model.state_dict()[name].clone()
        rows[BLANK] = weights[name][BLANK]
        for c in charset.characters:
            if c in known.index:
                rows[charset.index[c]] = weights[name][known.index[c]]
        weights[name] = rows
    model.load_state_dict(weights)
    new = [c for c in charset.characters if c not in known.index]
    print(f"starting from {path}; characters that it did not know: {' '.join(map(describe, new)) or 'none'}")


def train_epoch(model, shortcut, optimizer, schedule, buckets, description):
    """One pass over all buckets. Returns the mean loss per picture; raises SystemExit when it is no longer a number."""
    total, count, device = 0.0, 0, next(model.parameters()).device
    bar = tqdm(shuffled_batches(buckets), desc=description, unit="batch", leave=False, mininterval=1,
               disable=None)  # None: no bar in a log file, which gets a line per epoch anyway
    for bucket, indices in bar:
        ink = to_ink(bucket.pixels[indices].to(device))  # (N, 1, H, W)
        if AUGMENT:
            ink = augment(ink, AUGMENT)
        targets, lengths = bucket.targets[indices], bucket.lengths[indices]  # (N, longest), (N,)
        widths = torch.full((len(indices),), ink.shape[3])  # the padding is paper, and counts as part of the picture
        frames = num_frames(widths)
        features = model.features(ink, widths)  # (T, N, D)
        logits = model.sequence(features, frames)  # (T, N, C)
        loss = ctc_loss(logits, targets, frames, lengths)
        optimizer.zero_grad(set_to_none=True)
        (loss + SHORTCUT_WEIGHT * ctc_loss(shortcut(features), targets, frames, lengths)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        total, count = total + loss.item() * len(indices), count + len(indices)
        if total != total:
            raise SystemExit("the loss is not a number any more: set a lower LEARNING_RATE, and RESUME = True to go on from the "
                             "last complete epoch")
        bar.set_postfix_str(f"loss {total / count:.4f}", refresh=False)
    return total / count


def ctc_loss(logits, targets, frames, lengths):
    """CTC loss of logits (T, N, C) in float32, the mean over pictures of the loss per character."""
    return F.ctc_loss(logits.float().log_softmax(2), targets.to(logits.device), frames, lengths, blank=BLANK)


def predict(model, charset, rows):
    """The texts that the model reads in the pictures of rows, in their order."""
    model.eval()
    return [reading.text for reading in read_images(model, charset, [torch.from_numpy(p) for p in rows.picture], 4 * BATCH_SIZE)]


def resume_path():
    return Path(MODEL_PATH).with_suffix(".resume.pth")


def check_output_folder():
    """Fail now rather than after the first epoch where nothing can be written."""
    try:
        with whole_file(Path(MODEL_PATH).with_suffix(".check")) as temporary:
            temporary.write_bytes(b"")
        Path(MODEL_PATH).with_suffix(".check").unlink()
    except OSError as error:
        raise SystemExit(f"cannot write to {Path(MODEL_PATH).parent}: {error}. Set MODEL_PATH to a folder that can be written to")


def main():
    """Train, save the best epoch, and score it on the test rows."""
    check_output_folder()
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)  # numbers too small to matter slow a CPU down
    try:
        known = load_checkpoint(INIT_WEIGHTS)[1].characters if INIT_WEIGHTS else ""
    except ValueError as error:
        raise SystemExit(f"INIT_WEIGHTS: {error}")
    rows, charset = load_data(known)
    train, val, test = (rows[rows.split == split] for split in ("train", "val", "test"))
    val = val if len(val) else train
    buckets = make_buckets(train, charset)
    steps = EPOCHS * sum(-(-len(bucket.pixels) // BATCH_SIZE) for bucket in buckets)

    model = CRNN(charset.num_classes, HEIGHT, CHANNELS, HIDDEN, DROPOUT).to(DEVICE)
    if INIT_WEIGHTS:
        carry_over(model, charset, INIT_WEIGHTS)
    shortcut = nn.Linear(CHANNELS[-1], charset.num_classes).to(DEVICE)
    learned = [*model.parameters(), *shortcut.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=WARM_UP)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {EPOCHS} epochs of {steps // EPOCHS:,} batches on {DEVICE}")

    state = dict(epoch=0, best=-1.0, fingerprint=fingerprint(rows))  # best: exact match of the saved epoch, below 0 before there is one
    if RESUME:
        state = load_state(state["fingerprint"], model, shortcut, optimizer, schedule)
    started = time.perf_counter()
    try:
        for epoch in range(state["epoch"] + 1, EPOCHS + 1):
            torch.manual_seed(SEED + 1_000_003 * epoch)  # all chance of an epoch follows from its number: resuming is exact
            model.train()
            if epoch > max(1, EPOCHS * (1 - FROZEN_NORMS)):  # not in the first, which has no averages to use yet
                model.norms.eval()
            loss = train_epoch(model, shortcut, optimizer, schedule, buckets, f"epoch {epoch}/{EPOCHS}")
            predictions = predict(model, charset, val)
            scores = score_table(list(val.label), predictions, ["val"] * len(val)).loc["val"]
            print(f"Epoch {epoch}/{EPOCHS} — Loss: {loss:.4f} — Accuracy: {scores.exact:.2%} — CER: {scores.CER:.2%}"
                  f" — {time.perf_counter() - started:.0f} s", flush=True)
            for label, prediction in list(zip(val.label, predictions))[epoch % 7::max(1, len(val) // SHOWN)][:SHOWN]:
                print(f"    {label} | {prediction}")
            if sum(not p for p in predictions) > 0.9 * len(predictions):
                print("    nearly all output is still blank: this is normal in the first epochs of CTC training")
            if scores.exact > state["best"]:
                if state["best"] < 0:
                    keep_former_model()
                state["best"] = float(scores.exact)
                save_checkpoint(MODEL_PATH, model, charset, epoch=epoch, val_exact=state["best"], val_cer=float(scores.CER),
                                data=str(DATA_CSV), rows=len(train), seed=SEED)
            state["epoch"] = epoch
            save_state(state, model, shortcut, optimizer, schedule)
    except KeyboardInterrupt:
        print(f"\nstopped after epoch {state['epoch']}: set RESUME = True to go on from there")
        if state["best"] < 0:
            raise SystemExit(130)
    except OSError as error:
        resume = f", and RESUME = True goes on after epoch {state['epoch']}" if resume_path().exists() else ""
        raise SystemExit(f"cannot write to {Path(MODEL_PATH).parent}: {error}. Make room there or set MODEL_PATH; what was saved "
                         f"before is whole{resume}")
    print(f"✅ Model saved to {MODEL_PATH}")

    if len(test):
        best, charset, facts = load_checkpoint(MODEL_PATH, DEVICE)
        print(f"\nTest rows, never trained on, read by epoch {facts['epoch']} (exact: no error in the line; folded: single characters, "
              f"look-alikes such as 0 O o counted as one)")
        print(format_score_table(score_table(list(test.label), predict(best, charset, test), list(test.source))))


def keep_former_model():
    """Copy the model of an earlier training aside, before the first save of this one."""
    if Path(MODEL_PATH).exists():
        former = Path(MODEL_PATH).with_suffix(".former.pth")
        with whole_file(former) as temporary:
            shutil.copyfile(MODEL_PATH, temporary)
        print(f"    the model of an earlier training is kept as {former.as_posix()}")


def fingerprint(rows):
    """What must be the same for a resumed training to reach the same weights: the rows, and the constants that shape a step."""
    text = rows[["image_path", "label", "split"]].to_csv(index=False)
    constants = (CHANNELS, HIDDEN, DROPOUT, EPOCHS, BATCH_SIZE, LEARNING_RATE, WARM_UP, WEIGHT_DECAY, SHORTCUT_WEIGHT,
                 FROZEN_NORMS, AUGMENT, SEED)
    return f"{zlib.crc32(text.encode()):08x} {constants}"


def save_state(state, model, shortcut, optimizer, schedule):
    """Write all that training needs to go on, whole or not at all."""
    save_tensors(resume_path(), dict(state, model=model.state_dict(), shortcut=shortcut.state_dict(),
                                     optimizer=optimizer.state_dict(), schedule=schedule.state_dict()))


def load_state(expected, model, shortcut, optimizer, schedule):
    """Put the parts back as save_state found them. Returns the state. Raises SystemExit where its fingerprint is not the expected."""
    if not resume_path().exists():
        raise SystemExit(f"RESUME: no {resume_path()}: set RESUME = False to train from the start")
    try:
        saved = torch.load(resume_path(), map_location=DEVICE, weights_only=True)
        same = saved["fingerprint"] == expected
    except Exception as error:  # torch.load raises pickle, zip, key and runtime errors of many kinds for a foreign file
        raise SystemExit(f"RESUME: {resume_path()} cannot be read ({type(error).__name__}): set RESUME = False to train from the start")
    if not same:
        raise SystemExit(f"RESUME: {resume_path()} comes from other data or other constants: put them back, or set RESUME = False")
    for name, part in dict(model=model, shortcut=shortcut, optimizer=optimizer, schedule=schedule).items():
        part.load_state_dict(saved.pop(name))
    print(f"resuming after epoch {saved['epoch']}")
    return saved


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main()
