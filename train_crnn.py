"""Train the CRNN on the pictures and labels of datasets/data.csv, or of a csv of your own with image_path,label.

    python train_crnn.py
    torchrun --nproc_per_node=4 train_crnn.py       on four GPUs, or four processes of a CPU
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_crnn.py     on each of two machines

Prints what the data said, one line per epoch, and at the end a table on the test rows. The best epoch, by exact match on the
validation rows, is in MODEL_PATH, with all that reading needs; beside it history.csv and training_curves.png. Stop with Ctrl-C
at any time; RESUME goes on where it stopped.
"""
import io
import os
import shutil
import sys
import tempfile
import time
import unicodedata
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from crnn import (BLANK, CRNN, HEIGHT, MIN_TONES, UNCALIBRATED, Charset, add_split, arithmetic, calibrate, calibration_error,
                  describe, format_score_table, frames_needed, gather, join_processes, leave_processes, load_checkpoint, load_image,
                  num_frames, rank, read_images, read_labels, save_checkpoint, save_tensors, score_table, to_ink, whole_file,
                  workers_per_process, world_size)

# ---------------------------------------------------------------------------------------------------------------------
# Data and files
DATA_CSV = "datasets/data.csv"  # columns image_path,label and, where there are, source,split; paths relative to its folder
MODEL_PATH = "ocr_crnn_model/crnn.pth"  # the best epoch; history.csv, the curves and the state to resume from lie beside it
INIT_WEIGHTS = "ocr_crnn_model/pretrained.pth"  # checkpoint to start from, its output rows carried over by character; None: from nothing
FILE_PRECISION = "float32"  # of the weights in MODEL_PATH; "float16" halves the file
RESUME = False  # go on from the last complete epoch of the same data and constants
MIN_CHARACTER_ROWS = 3  # a character in fewer training labels than this is taken for a slip, and its rows are left out
MAX_MEMORY = 8.0  # GB of training pictures that are held in memory; more of them go to a temporary file beside MODEL_PATH

# Network; with INIT_WEIGHTS it is that checkpoint's
CHANNELS = (32, 64, 96, 192)  # of the CNN's stages; the last is the number of features per frame
HIDDEN = 192  # LSTM units in each direction
DROPOUT = 0.0  # share of the features and of the LSTM's output that is zeroed in training

# Training
EPOCHS = 2  # passes over the training rows; from nothing, 3 are few and 10 are better
MIN_STEPS = 2_000  # batches; with few pictures there are more epochs than EPOCHS, until there are as many batches
BATCH_SIZE = 32  # pictures of a step, all of about one width, over all processes together
MATRIX_LEARNING_RATE = 1e-2  # of Muon, for the matrices of the convolutions and the LSTM: the peak of the one-cycle schedule
LEARNING_RATE = 3e-3  # of AdamW, for all other weights: likewise
WARM_START = 0.1  # with INIT_WEIGHTS, both are multiplied by this, since larger steps would unlearn what the new pictures do not show
WARM_UP = 0.1  # part of the training in which the learning rates rise to their peak
WEIGHT_DECAY = 1e-2  # of AdamW
SHORTCUT_WEIGHT = 0.1  # of a second CTC loss, on the CNN's features; its head is not kept; with INIT_WEIGHTS: 0
FROZEN_NORMS = 0.25  # last part of the training, in which batch norm uses its running averages, as for reading; with INIT_WEIGHTS: all of it
AUGMENT = 1.0  # strength of the random changes to the training pictures; 0: none
BLANKS = 0.01  # share of them that is replaced by empty paper, to be read as nothing
KEEP_LAST = False  # True: MODEL_PATH gets the last epoch, where the val rows lack what is to be learned, such as empty paper; False: the best

# How
SEED = 0  # the same seed, data and machine give the same weights
NUM_WORKERS = min(os.cpu_count() or 1, 61)  # that decode pictures before the first epoch; Windows takes 61 at most
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where to train; under torchrun each process takes a GPU of its own
PRECISION = None  # of network arithmetic: "bfloat16", "float16", "float32"; None: bfloat16 where the hardware computes in it
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
    """Yield the decoded pictures in the order of paths; NUM_WORKERS processes to a machine decode them."""
    def bar(results):
        return tqdm(results, total=len(paths), desc="reading pictures", unit="img", disable=rank() > 0)

    number = workers_per_process(NUM_WORKERS)
    if number <= 1 or len(paths) < 500:  # starting processes takes longer than reading so few
        yield from bar(map(load_picture, paths))
        return
    try:
        with ProcessPoolExecutor(number) as workers:
            yield from bar(workers.map(load_picture, paths, chunksize=128))
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


def read_rows(known_characters):
    """All rows of DATA_CSV with source and split, and the Charset that their labels make. Raises SystemExit with one line."""
    try:
        rows = add_split(read_labels(DATA_CSV))
    except ValueError as error:
        raise SystemExit(str(error))
    spaced = rows.label != rows.label.str.strip(" ")
    if spaced.any():
        rows["label"] = rows.label.str.strip(" ")
        print(f"{spaced.sum():,} labels begin or end with a space, which no picture tells from its margin: they are learned without it")
    unknown_splits = sorted(set(rows.split) - {"train", "val", "test"})
    if unknown_splits:
        raise SystemExit(f"{DATA_CSV} has the split {unknown_splits[0]!r}: use train, val or test, or leave the column out")
    characters = choose_charset(rows.label[rows.split == "train"], known_characters)
    if not characters:
        raise SystemExit(f"{DATA_CSV} has no training labels to learn from: at least {MIN_CHARACTER_ROWS} rows of the split train "
                         f"must share a character (MIN_CHARACTER_ROWS)")
    return rows, Charset(characters)


class Bucket:
    """Training pictures that are padded with paper to one width, in one piece of memory or of a file, so that a batch is one indexing.

    After close: pixels uint8 (n, 1, HEIGHT, W); targets int64 (n, longest), filled up with BLANK; lengths int64 (n,).
    """

    def __init__(self, width, on_disk):
        self.width, self.on_disk = width, on_disk
        self.store = tempfile.TemporaryFile(dir=Path(MODEL_PATH).parent) if on_disk else io.BytesIO()
        self.encoded = []  # a target per picture, as an array, a tenth of a list's bytes

    def add(self, picture, target):
        self.store.write(np.pad(picture, ((0, 0), (0, self.width - picture.shape[1])), constant_values=255))
        self.encoded.append(np.array(target, dtype=np.int16 if max(target) < 2 ** 15 else np.int32))

    def close(self):
        self.store.flush()
        pixels = np.memmap(self.store, np.uint8, "r+") if self.on_disk else np.frombuffer(self.store.getbuffer(), np.uint8)
        self.pixels = torch.from_numpy(pixels).view(-1, 1, HEIGHT, self.width)
        self.lengths = torch.tensor([len(target) for target in self.encoded])
        self.targets = torch.full((len(self.encoded), int(self.lengths.max())), BLANK)
        for row, target in zip(self.targets, self.encoded):
            row[:len(target)] = torch.from_numpy(target)
        del self.encoded


def bucket_width(width):
    """The width that a picture is padded to: steps of BUCKET pixels up to 256, then ever wider ones, since long lines are few."""
    step = BUCKET * max(1, 2 ** max(0, (width - 1).bit_length() - 8))
    return -(-width // step) * step


def load_rows(rows, charset):
    """Decode the pictures of rows, one after the other, and say what was found.

    Returns the training pictures as a dict from width to Bucket, and the rows of val and test with a column picture.
    """
    paths = [str(Path(DATA_CSV).parent / path) for path in rows.image_path]
    sizes = [p.size for p in map(load_picture, paths[::max(1, len(paths) // 200)]) if not isinstance(p, str)]
    on_disk = bool(sizes) and len(paths) * sum(sizes) / len(sizes) > MAX_MEMORY * 1e9
    if on_disk:
        print(f"the pictures take more than MAX_MEMORY = {MAX_MEMORY} GB: they go to a temporary file in {Path(MODEL_PATH).parent}")
    buckets, reasons, pictures = {}, [], []
    for row, picture in zip(rows.itertuples(), load_pictures(paths)):
        reason, particulars = reason_to_leave_out(row.label, picture, charset)
        reasons.append((reason, particulars))
        pictures.append(picture if row.split != "train" and not reason else None)
        if row.split == "train" and not reason:
            width = bucket_width(picture.shape[1])
            if width not in buckets:
                buckets[width] = Bucket(width, on_disk)
            buckets[width].add(picture, charset.encode(row.label))
    for bucket in buckets.values():
        bucket.close()
    rows = rows.assign(reason=[r for r, _ in reasons], particulars=[p for _, p in reasons], picture=pictures)
    everything = pd.concat(gather(rows.drop(columns="picture")))
    report_data(everything, charset)
    if not ((everything.split == "train") & everything.reason.isna()).any():
        raise SystemExit(f"{DATA_CSV} leaves no row to train on: see the reasons above")
    return buckets, rows[rows.picture.notna()]


def some_training_rows(buckets, charset, number=2_000):
    """Training pictures with their labels in the form of val rows, for data that has none."""
    print("no val rows: exact match is measured on training rows, which says little about unseen pictures")
    rows = [(picture[0].numpy(), charset.decode(target[:length].tolist()), "train") for bucket in buckets.values()
            for picture, target, length in zip(bucket.pixels[:number], bucket.targets, bucket.lengths)]
    return pd.DataFrame(rows[:number], columns=["picture", "label", "source"])


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


def common_sizes(buckets):
    """How many pictures of each width every process has, so that all of them can make the same batches."""
    sizes = gather({width: len(bucket.pixels) for width, bucket in buckets.items()})
    common = {width: min(size.get(width, 0) for size in sizes) for width in sorted(set().union(*sizes))}
    left_over = sum(sum(size.values()) for size in sizes) - len(sizes) * sum(common.values())
    if left_over:
        print(f"{left_over:,} pictures, others each epoch, have to wait, so that all {len(sizes)} processes make the same batches")
    return {width: size for width, size in common.items() if size}


def shuffled_batches(buckets, sizes, batch_size):
    """(bucket, indices) of every batch of an epoch, in random order, from torch's global generator.

    All processes come with the same seed and get the same widths in the same order, since the slowest of them sets the
    pace; then each takes a seed of its own, and so its own pictures and augmentation.
    """
    number = sum(-(-size // batch_size) for size in sizes.values())
    order = torch.randperm(number).tolist()
    torch.manual_seed(torch.initial_seed() + rank())
    batches = [(buckets[width], indices) for width, size in sizes.items()
               for indices in torch.randperm(len(buckets[width].pixels))[:size].split(batch_size)]
    return [batches[i] for i in order]


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: random changes to a whole batch at once

def augment(ink, strength):
    """Ink (N, 1, H, W), 0 = paper, to the same shape: moved, turned, slanted and bent; strokes thicker or thinner; on ruled paper;
    blurred; fainter; noisy. Not inverted, since load_image makes dark ink on light paper of every picture.
    """
    n, _, height, width = ink.shape
    uniform = lambda *shape: (torch.rand(*shape, device=ink.device) * 2 - 1) * strength  # from -strength to strength
    ratio = width / height  # grid_sample counts both axes from -1 to 1
    angle, slant = uniform(n) * 0.04, uniform(n) * 0.25  # radians; columns per row
    scale_x, scale_y = 1 + 0.05 * strength + uniform(n) * 0.07, 1 + 0.06 * strength + uniform(n) * 0.12  # mostly smaller
    shift_x, shift_y = uniform(n) * (scale_x - 1).relu(), uniform(n) * ((scale_y - 1).relu() + 0.04)  # within the room so made:
    # a character moved out of the picture would still be in the label
    matrix = torch.stack([torch.stack([scale_x, slant / ratio, shift_x], 1),
                          torch.stack([angle * ratio, scale_y, shift_y], 1)], 1)  # (N, 2, 3)
    grid = F.affine_grid(matrix, list(ink.shape), align_corners=False)  # (N, H, W, 2)
    bend = uniform(n, 2, 3, 2 + width // 16) * torch.tensor([0.05 / max(1, ratio), 0.05], device=ink.device)[:, None, None]
    bend = F.interpolate(bend, (height, width), mode="bilinear", align_corners=True)  # (N, 2, 3, few) -> (N, 2, H, W)
    ink = F.grid_sample(ink, grid + bend.permute(0, 2, 3, 1), align_corners=False)  # (N, 1, H, W)

    thicker, thinner = highest_of_nine(ink), -highest_of_nine(-ink)
    weight = (uniform(n, 1, 1, 1) - 0.1) * (torch.rand(n, 1, 1, 1, device=ink.device) < 0.5)  # in half of the pictures
    ink = ink + weight.clamp(min=0) * 0.6 * (thicker - ink) + (-weight).clamp(min=0) * 0.35 * (thinner - ink)
    if width > 2 * height:  # in narrow pictures a ruled line could be taken for a dash
        chosen = torch.rand(n, device=ink.device) < 1 / 12
        ink[chosen] = torch.maximum(ink[chosen], ruled_lines(int(chosen.sum()), height, width, strength, ink.device))
    soft = mean_of_nine(ink)
    ink = ink + uniform(n, 1, 1, 1).clamp(min=0) * (torch.rand(n, 1, 1, 1, device=ink.device) < 0.3) * (soft - ink)
    contrast, noise = 1 + uniform(n, 1, 1, 1) * 0.15, uniform(n, 1, 1, 1).clamp(min=0) * 0.08
    return ink * contrast + noise * torch.randn_like(ink)


def ruled_lines(n, height, width, strength, device):
    """A nearly level line from side to side, as ink (n, 1, H, W)."""
    place, tilt, tone = torch.rand(3, n, 1, 1, 1, device=device)
    rows = torch.arange(height, device=device)[:, None]  # (H, 1)
    across = torch.linspace(-1, 1, width, device=device)  # (W,)
    distance = (rows - place * height - (tilt - 0.5) * 4 * across).abs()  # (n, 1, H, W)
    return (1.2 - distance).clamp(0, 1) * tone * min(1, strength)


def empty_paper(n, height, width, device):
    """Paper without text, as ink (n, 1, H, W): grainy, unevenly lit, some spotless, some of it ruled; its tones as load_image leaves them."""
    light = torch.rand(n, 1, 2, 3, device=device)
    to_one_side = torch.rand(n, 1, 1, device=device) < 0.5
    light[..., 1] = torch.where(to_one_side, (light[..., 0] + light[..., 2]) / 2, light[..., 1])
    shade = F.interpolate(light, (height, width), mode="bilinear", align_corners=True)  # (n, 1, 2, 3) -> (n, 1, H, W)
    grain = torch.randn(n, 1, height, width, device=device)
    soft = torch.rand(n, 1, 1, 1, device=device)
    grain = soft * 2 * mean_of_nine(grain) + (1 - soft) * grain
    strengths = torch.rand(2, n, 1, 1, 1, device=device) ** 2  # most are faint
    spotless = torch.rand(n, 1, 1, 1, device=device) < 0.25
    ink = (strengths[0] * shade + 0.3 * strengths[1] * grain) * ~spotless
    ink = (ink - ink.amin((2, 3), keepdim=True)).clamp(0, 1)
    if n and width > 2 * height:
        ruled = torch.rand(n, device=device) < 0.25
        ink[ruled] = torch.maximum(ink[ruled], ruled_lines(int(ruled.sum()), height, width, 1, device))
    ink = ink / ink.amax((2, 3), keepdim=True).clamp(min=MIN_TONES / 255)
    return torch.where(ink.mean((2, 3), keepdim=True) > 0.5, 1 - ink, ink)


def mean_of_nine(x):
    """The mean of every pixel and its neighbours, (N, 1, H, W) to the same; six times faster than avg_pool2d here."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")  # (N, 1, H + 2, W + 2)
    x = x[..., :-2] + x[..., 1:-1] + x[..., 2:]  # (N, 1, H + 2, W)
    return (x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]) / 9  # (N, 1, H, W)


def highest_of_nine(x):
    """The highest value among every pixel and its neighbours, (N, 1, H, W) to the same; ten times faster than max_pool2d here."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")  # (N, 1, H + 2, W + 2)
    x = torch.maximum(torch.maximum(x[..., :-2], x[..., 1:-1]), x[..., 2:])  # (N, 1, H + 2, W)
    return torch.maximum(torch.maximum(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])  # (N, 1, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers

class Muon(torch.optim.Optimizer):
    """Momentum whose every update is made orthogonal, after Keller Jordan 2024 (kellerjordan.github.io/posts/muon).

    For matrices: a convolution's kernel counts as (out, in * rows * columns), an LSTM's weight as four, one a gate. torch's
    own Muon takes two-dimensional weights only, one at a time; here equal shapes are done in one go.
    """

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            updates = {}  # shape -> weights and their updates
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
                average = self.state[weight]["average"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"])  # Nesterov's look ahead
                gates = 4 if update.ndim == 2 else 1
                update = update.reshape(gates, update.shape[0] // gates, -1)  # (gates, rows, columns)
                updates.setdefault(update.shape[1:], []).append((weight, update))
            for (rows, columns), pairs in updates.items():
                new = orthogonal(torch.cat([update for _, update in pairs])) * max(1, rows / columns) ** 0.5  # (n, rows, columns)
                for (weight, update), part in zip(pairs, new.split([len(update) for _, update in pairs])):
                    weight.add_(part.reshape(weight.shape), alpha=-group["lr"])


# Of x -> a x + b x^3 + c x^5, three times: fitted so that singular values from 0.02 to 1 of the largest end within 0.12 of 1. With the
# five usual steps of 3.4445, -4.7750, 2.0315 they end between 0.7 and 1.2, and a training step takes a tenth longer.
NEWTON_SCHULZ = ((4.7229, -12.9631, 9.3512), (3.3768, -6.3701, 3.3536), (3.2799, -5.2171, 3.0111))


def orthogonal(x):
    """Matrices (N, rows, columns) to their nearest orthogonal ones, roughly: Newton-Schulz steps bring all singular values near 1."""
    wide = x.mT if x.shape[1] > x.shape[2] else x
    wide = (wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(arithmetic(x.device.type, PRECISION))
    for a, b, c in NEWTON_SCHULZ:
        square = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(square, square, square, beta=b, alpha=c), wide, beta=a)
    return (wide.mT if x.shape[1] > x.shape[2] else wide).to(x.dtype)


def make_optimizers(net, steps):
    """Muon for the matrices of the convolutions and the LSTM, AdamW for all else, each with its one-cycle schedule."""
    matrices = [p for name, p in net.crnn.named_parameters() if name.split(".")[0] in ("convolutions", "lstm") and p.ndim > 1]
    others = [p for p in net.parameters() if not any(p is matrix for matrix in matrices)]
    factor = WARM_START if INIT_WEIGHTS else 1
    optimizers = [Muon(matrices, MATRIX_LEARNING_RATE * factor),
                  torch.optim.AdamW(others, LEARNING_RATE * factor, weight_decay=WEIGHT_DECAY, fused=True)]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], total_steps=steps + 1, pct_start=WARM_UP,
                                                     cycle_momentum=False) for optimizer in optimizers]
    return optimizers, schedules


# ---------------------------------------------------------------------------------------------------------------------
# Training

class WithShortcut(nn.Module):
    """The CRNN with a second CTC head right on the features of its CNN, which makes them learn sooner and is dropped afterwards.

    With a shortcut_weight of 0 there is no such head.
    """

    def __init__(self, crnn, shortcut_weight):
        super().__init__()
        self.crnn, self.shortcut = crnn, nn.Linear(crnn.lstm.input_size, crnn.linear.out_features) if shortcut_weight else None

    def forward(self, ink, widths):
        """Ink (N, 1, H, W) and widths (N,) to the logits of each head, (T, N, C)."""
        features = self.crnn.features(ink, widths)  # (T, N, D)
        logits = self.crnn.sequence(features, num_frames(widths))  # (T, N, C)
        return (logits, self.shortcut(features)) if self.shortcut else (logits,)


def head_weights():
    """What the loss of each head of WithShortcut counts.

    A new head beside weights that have learned would pull them away, its first errors being large: after an epoch of 100,000 rows
    from the shipped weights, they read 82.9 % of the validation rows with it and 84.4 % without, 84.1 % before (one run each).
    """
    return 1, 0 if INIT_WEIGHTS else SHORTCUT_WEIGHT


def carry_over(path, charset):
    """The network of another checkpoint with its weights, but the output rows of this charset: by character, new ones from nothing."""
    source, known, _ = load_checkpoint(path)
    if source.architecture["height"] != HEIGHT:
        raise SystemExit(f"INIT_WEIGHTS {path} reads pictures of {source.architecture['height']} rows, not of {HEIGHT}")
    model = CRNN(**dict(source.architecture, num_classes=charset.num_classes, dropout=DROPOUT))
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
    return model


def train_epoch(net, optimizers, schedules, scaler, buckets, sizes, description):
    """One pass over all buckets. Returns the mean losses per picture of up to 20 parts of it; SystemExit when one is no number."""
    device = next(net.parameters()).device
    dtype = arithmetic(device.type, PRECISION)
    batches = shuffled_batches(buckets, sizes, BATCH_SIZE // world_size())
    parts, total, count = [], torch.zeros((), device=device), 0
    bar = tqdm(total=sum(sizes.values()), desc=description, unit="img", leave=False, mininterval=1,
               disable=None if rank() == 0 else True)  # None: no bar in a log file, which gets a line per epoch anyway
    for step, (bucket, indices) in enumerate(batches, start=1):
        ink = to_ink(bucket.pixels[indices].to(device))  # (N, 1, H, W)
        if AUGMENT:
            ink = augment(ink, AUGMENT)
        blank = torch.rand(len(indices)) < BLANKS
        ink[blank.to(device)] = empty_paper(int(blank.sum()), *ink.shape[2:], device)
        widths = torch.full((len(indices),), ink.shape[3])  # the padding is paper, and counts as part of the picture
        targets, frames = bucket.targets[indices], num_frames(widths)  # (N, longest), (N,)
        lengths = bucket.lengths[indices].masked_fill(blank, 0)  # (N,)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            heads = net(ink, widths)  # (T, N, C) each
        losses = [ctc_loss(logits, targets, frames, lengths) for logits in heads]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        scaler.scale(sum(weight * loss for weight, loss in zip(head_weights(), losses))).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        for optimizer, schedule in zip(optimizers, schedules):
            scaler.step(optimizer)
            schedule.step()
        scaler.update()
        total, count = total + losses[0].detach() * len(indices), count + len(indices)
        bar.update(len(indices))
        if step % -(-len(batches) // 20) == 0 or step == len(batches):
            parts.append(float(total) / count)
            total, count = torch.zeros((), device=device), 0
            bar.set_postfix_str(f"loss {parts[-1]:.4f}", refresh=False)
            if parts[-1] != parts[-1]:
                raise SystemExit("the loss is not a number any more: set lower learning rates and train again; the best epoch so far, "
                                 "where there is one, is in MODEL_PATH")
    bar.close()
    return parts


def ctc_loss(logits, targets, frames, lengths):
    """CTC loss of logits (T, N, C) in float32, the mean over pictures of the loss per character."""
    return F.ctc_loss(logits.float().log_softmax(2), targets.to(logits.device), frames, lengths, blank=BLANK)


def read(model, charset, rows, calibration=UNCALIBRATED):
    """Let every process read the pictures of its rows. Returns all rows of all processes, with columns prediction and confidence."""
    model.eval()
    readings = read_images(model, charset, [torch.from_numpy(p) for p in rows.picture], 32, calibration)
    rows = rows.drop(columns="picture").assign(prediction=[r.text for r in readings], confidence=[r.confidence for r in readings])
    return pd.concat(gather(rows))


def validate(model, charset, val):
    """The val rows as read returns them, their score_table, and its exact match and CER over all."""
    seen = read(model, charset, val)
    table = score(seen)
    return seen, table, float(table.exact.iloc[-1]), float(table.CER.iloc[-1])


def score(rows, by="source"):
    """The score_table of rows that read returned."""
    return score_table(list(rows.label), list(rows.prediction), list(rows[by]))


# ---------------------------------------------------------------------------------------------------------------------
# What is left behind: the model, the state to resume from, history.csv and training_curves.png

def resume_path():
    return Path(MODEL_PATH).with_suffix(".resume.pth")


def check_output_folder():
    """Fail now rather than after the first epoch where nothing can be written."""
    try:
        with whole_file(Path(MODEL_PATH).with_suffix(".check")) as temporary:
            temporary.write_bytes(b"")
        Path(MODEL_PATH).with_suffix(".check").unlink(missing_ok=True)  # another process may have been faster
    except OSError as error:
        raise SystemExit(f"cannot write to {Path(MODEL_PATH).parent}: {error}. Set MODEL_PATH to a folder that can be written to")


def keep_former_model():
    """Copy the model of an earlier training aside, before the first save of this one."""
    if Path(MODEL_PATH).exists():
        former = Path(MODEL_PATH).with_suffix(".former.pth")
        with whole_file(former) as temporary:
            shutil.copyfile(MODEL_PATH, temporary)
        print(f"    the model of an earlier training is kept as {former.as_posix()}")


def keep_if_best(state, model, charset, rows, exact, cer):
    """Save the network where it reads the val rows no worse than any before, or always with KEEP_LAST.

    state: with best, the highest exact match so far, and epoch.
    """
    if (exact >= state["best"] or KEEP_LAST) and rank() == 0:
        if state["best"] < 0:
            keep_former_model()
        save_checkpoint(MODEL_PATH, model, charset, FILE_PRECISION, epoch=state["epoch"], val_exact=exact, val_cer=cer, data=str(DATA_CSV),
                        rows=int((rows.split == "train").sum()), seed=SEED)
    state["best"] = max(state["best"], exact)


def fingerprint(rows):
    """What must be the same for a resumed training to reach the same weights: the rows, and the constants that shape a step."""
    text = rows[["image_path", "label", "split"]].to_csv(index=False)
    constants = (INIT_WEIGHTS, CHANNELS, HIDDEN, DROPOUT, EPOCHS, MIN_STEPS, BATCH_SIZE, MATRIX_LEARNING_RATE, LEARNING_RATE, WARM_START,
                 WARM_UP, WEIGHT_DECAY, head_weights(), FROZEN_NORMS, AUGMENT, BLANKS, SEED, PRECISION, world_size())
    return f"{zlib.crc32(text.encode()):08x} {constants}"


def save_state(state, parts):
    """Write all that training needs to go on, whole or not at all."""
    save_tensors(resume_path(), dict(state, **{name: part.state_dict() for name, part in parts.items()}))


def load_state(expected, parts):
    """Put the parts back as save_state found them. Returns the state. Raises SystemExit where its fingerprint is not the expected."""
    if not resume_path().exists():
        raise SystemExit(f"RESUME: no {resume_path()}: set RESUME = False to train from the start")
    try:
        saved = torch.load(resume_path(), map_location="cpu", weights_only=True)
        same = saved["fingerprint"] == expected
    except Exception as error:  # torch.load raises pickle, zip, key and runtime errors of many kinds for a foreign file
        raise SystemExit(f"RESUME: {resume_path()} cannot be read ({type(error).__name__}): set RESUME = False to train from the start")
    if not same:
        raise SystemExit(f"RESUME: {resume_path()} comes from other data or other constants: put them back, or set RESUME = False")
    for name, part in parts.items():
        part.load_state_dict(saved.pop(name))
    print(f"resuming after epoch {saved['epoch']}")
    return saved


def write_history(history, curves):
    """history.csv, a row per epoch, and training_curves.png. history: list of dicts, with the losses of parts of the epoch as a list."""
    folder = Path(MODEL_PATH).parent
    with whole_file(folder / "history.csv") as temporary:
        pd.DataFrame(history).drop(columns="losses").to_csv(temporary, index=False, float_format="%.5g", lineterminator="\n")
    if not curves:
        return
    import matplotlib
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, (losses, exact, cer) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    epochs = [epoch["epoch"] for epoch in history]
    losses.plot([epoch["epoch"] - 1 + (i + 1) / len(epoch["losses"]) for epoch in history for i in range(len(epoch["losses"]))],
                [loss for epoch in history for loss in epoch["losses"]])
    losses.set(title="training: CTC loss per character", yscale="log")
    for axes, measure, title in ((exact, "exact", "validation: exact match, %"), (cer, "CER", "validation: character error rate, %")):
        for column in [c for c in history[-1] if c.startswith(measure)]:
            axes.plot(epochs, [100 * epoch[column] for epoch in history], marker="o", label=column.removeprefix(measure).strip())
        axes.set(title=title)
    figure.legend(*exact.get_legend_handles_labels(), loc="outside right center")
    for axes in (losses, exact, cer):
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    with whole_file(folder / "training_curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    pyplot.close(figure)


def main():
    """Train, save the best epoch, and score it on the test rows."""
    if BATCH_SIZE % world_size():
        raise SystemExit(f"BATCH_SIZE = {BATCH_SIZE} cannot be shared equally among {world_size()} processes: set a multiple of it")
    device = torch.device(DEVICE)
    if world_size() > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    join_processes("nccl" if device.type == "cuda" else "gloo")
    check_output_folder()
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)  # numbers too small to matter slow a CPU down
    try:
        known = load_checkpoint(INIT_WEIGHTS)[1].characters if INIT_WEIGHTS else ""
    except ValueError as error:
        raise SystemExit(f"INIT_WEIGHTS = {INIT_WEIGHTS!r} cannot be started from ({error}). Bring the shipped weights back with "
                         f"git checkout ocr_crnn_model, or set INIT_WEIGHTS = None to train from nothing")
    rows, charset = read_rows(known)
    # Each process gets every so-manieth row in the order of label length, and so as many narrow and wide pictures as the others.
    share = rows.iloc[np.argsort(rows.label.str.len(), kind="stable")[rank()::world_size()]] if world_size() > 1 else rows
    buckets, scored = load_rows(share, charset)
    val, test = (scored[scored.split == split] for split in ("val", "test"))
    if not sum(gather(len(val))):
        val = some_training_rows(buckets, charset)
    sizes = common_sizes(buckets)
    batches = sum(-(-size // (BATCH_SIZE // world_size())) for size in sizes.values())
    if not batches:
        raise SystemExit(f"{len(rows)} rows are too few to be shared among {world_size()} processes: start fewer")
    epochs = max(EPOCHS, -(-MIN_STEPS // batches))

    if INIT_WEIGHTS:
        model = carry_over(INIT_WEIGHTS, charset)
    else:
        model = CRNN(charset.num_classes, HEIGHT, CHANNELS, HIDDEN, DROPOUT)
    net = WithShortcut(model, head_weights()[1]).to(device)
    optimizers, schedules = make_optimizers(net, epochs * batches)
    dtype = arithmetic(device.type, PRECISION)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = dict(net=net, scaler=scaler, **{f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)},
                 **{f"schedule {i}": schedule for i, schedule in enumerate(schedules)})
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {epochs} epochs of {batches:,} batches on {device} in "
          f"{dtype}" + f", {world_size()} processes" * (world_size() > 1))

    # best: exact match of the saved epoch, below 0 before there is one
    state = dict(epoch=0, best=-1.0, seconds=0.0, history=[], fingerprint=fingerprint(rows))
    if RESUME:
        state = load_state(state["fingerprint"], parts)
    trained = net if world_size() == 1 else nn.parallel.DistributedDataParallel(net)
    try:
        if INIT_WEIGHTS and not RESUME:  # they are kept where no epoch reads as well as they do
            _, _, exact, cer = validate(model, charset, val)
            print(f"before the first epoch — Accuracy: {exact:.2%} — CER: {cer:.2%}", flush=True)
            keep_if_best(state, model, charset, rows, exact, cer)
        for epoch in range(state["epoch"] + 1, epochs + 1):
            started = time.perf_counter()
            torch.manual_seed(SEED + 1_000_003 * epoch)  # all chance of an epoch follows from its number: resuming is exact
            net.train()
            if INIT_WEIGHTS or epoch > max(1, epochs * (1 - FROZEN_NORMS)):  # from nothing, the first has no averages to use yet
                model.norms.eval()
            losses = train_epoch(trained, optimizers, schedules, scaler, buckets, sizes, f"epoch {epoch}/{epochs}")
            speed = world_size() * sum(sizes.values()) / (time.perf_counter() - started)
            seen, table, exact, cer = validate(model, charset, val)
            state["seconds"] += time.perf_counter() - started
            print(f"Epoch {epoch}/{epochs} — Loss: {np.mean(losses):.4f} — Accuracy: {exact:.2%} — CER: {cer:.2%}"
                  f" — {speed:.0f} img/s — {state['seconds']:.0f} s", flush=True)
            now_and_then = epoch % -(-epochs // 10) == 0 or epoch == epochs
            if now_and_then:
                for row in seen[epoch % 7::max(1, len(seen) // SHOWN)][:SHOWN].itertuples():
                    print(f"    {row.label} | {row.prediction}")
            if (seen.prediction == "").mean() > 0.9:
                print("    nearly all output is still blank: this is normal in the first epochs of CTC training")
            state["epoch"] = epoch
            state["history"].append(dict(epoch=epoch, seconds=round(state["seconds"], 1), images_per_second=round(speed, 1),
                                         learning_rate=float(schedules[0].get_last_lr()[0]), losses=losses, loss=float(np.mean(losses)),
                                         **{f"exact {s}": float(v) for s, v in table.exact.items()},
                                         **{f"CER {s}": float(v) for s, v in table.CER.items()}))
            keep_if_best(state, model, charset, rows, exact, cer)
            if rank() == 0:
                save_state(state, parts)
                write_history(state["history"], curves=now_and_then)
    except KeyboardInterrupt:
        print(f"\nstopped after epoch {state['epoch']}: set RESUME = True to go on from there")
        if state["best"] < 0 or world_size() > 1:
            raise SystemExit(130)
    except OSError as error:
        resume = f", and RESUME = True goes on after epoch {state['epoch']}" if resume_path().exists() else ""
        raise SystemExit(f"cannot write to {Path(MODEL_PATH).parent}: {error}. Make room there or set MODEL_PATH; what was saved "
                         f"before is whole{resume}")
    gather(None)  # the first process has written the best epoch before it comes here
    best, charset, facts = load_checkpoint(MODEL_PATH, device)
    seen = read(best, charset, val)
    calibration = calibrate(list(seen.confidence), list(seen.label == seen.prediction))
    if rank() == 0:
        save_checkpoint(MODEL_PATH, best, charset, FILE_PRECISION, **dict(facts, calibration=list(calibration)))
    print(f"✅ Model saved to {MODEL_PATH}")

    if sum(gather(len(test))):
        print(f"\nTest rows, never trained on, read by epoch {facts['epoch']} (exact: no error in the line; folded: single characters, "
              f"look-alikes such as 0 O o counted as one)")
        seen = read(best, charset, test, calibration)
        print(format_score_table(score(seen)))
        if "style" in seen:
            print(f"\n{format_score_table(score(seen, by='style'))}")
        error = calibration_error(list(seen.confidence), list(seen.label == seen.prediction))
        print(f"\nconfidence and share of right readings lie {error:.1%} apart (expected calibration error)")
    leave_processes()


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main()
