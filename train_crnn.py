"""Train the CRNN on datasets/data.csv, or on a csv of your own with image_path,label.

    python train_crnn.py
    torchrun --nproc_per_node=4 train_crnn.py       (on four GPUs, or four processes of a CPU)

Prints which rows it leaves out, one line per epoch, and at the end a table of the test rows. What
reads the validation rows best is in MODEL_PATH, with all that reading needs: an epoch, the starting
weights, or the mean of these and the last epoch. Beside it are history.csv and training_curves.png.
Stop with Ctrl-C at any time; RESUME goes on.
"""

import os
import shutil
import tempfile
import time
import unicodedata
import zlib
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import crnn
from crnn import BLANK, CRNN, HEIGHT, InputError, num_frames, rank, whole_file, world_size

# --------------------------------------------------------------------------------------------------
# Data and files
DATA_CSV = "datasets/data.csv"  # image_path,label and perhaps source,split; paths from its folder
MODEL_PATH = "ocr_crnn_model/crnn.pth"  # the best weights; the state to resume from lies beside it
INIT_WEIGHTS = "ocr_crnn_model/pretrained.pth"  # checkpoint to start from; None: from nothing
RESUME = False  # go on from the last complete epoch of the same data and constants
MIN_CHARACTER_ROWS = 3  # a rarer character of the training labels is treated as a typo

# Recipes. Learning rates are the peaks of one-cycle schedules.
FROM_NOTHING = dict(
    channels=(32, 64, 96, 192),  # of the CNN's stages; the last is the number of features per frame
    hidden=192,  # LSTM units in each direction
    blocks=0,  # residual ones on the features
    matrix_learning_rate=1e-2,  # of Muon, for the matrices of the convolutions and the LSTM
    learning_rate=3e-3,  # of AdamW, for all other weights
    shortcut_weight=0.1,  # of a second CTC loss, on the CNN's features; its head is not kept
    frozen_norms=0.25,  # final share of training with batch norm frozen
)
# From INIT_WEIGHTS, whose characters and size are kept. Larger steps would unlearn what the new
# images do not show, and the first errors of a second head would pull learned weights away.
FINE_TUNE = dict(matrix_learning_rate=1e-3, learning_rate=3e-4, shortcut_weight=0, frozen_norms=1)
EPOCHS = 1  # passes over the training rows; from nothing, 3 are few and 10 are better
MIN_STEPS = 1_500  # batches; with few images there are more epochs, until there are as many
BATCH_SIZE = 32  # images of a step, all of about one width, over all processes together
WARM_UP = 0.1  # share of training in which the learning rates rise to their peak
WEIGHT_DECAY = 1e-2  # of AdamW
DROPOUT = 0.0  # share of the features and of the LSTM's output that is zeroed
AUGMENT = 1.0  # strength of the random changes to the training images; 0: none
BLANKS = 0.01  # share of blank images, labelled ""

# How
SEED = 0  # the same seed, data and machine give the same weights
NUM_WORKERS = min(os.cpu_count() or 1, 61)  # that decode images at the start; Windows takes 61
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # under torchrun, a GPU for each process
PRECISION = None  # "bfloat16", "float16", "float32"; None: bfloat16 where the hardware has it
# --------------------------------------------------------------------------------------------------

BUCKET = 16  # pixels; the training images of a batch are padded to a common multiple of it
SHOWN = 3  # rows named per reason for leaving rows out, and examples shown per epoch
# Constants that may differ when a training is resumed; all others must be the same.
FREE = {"FREE", "DATA_CSV", "MODEL_PATH", "RESUME", "NUM_WORKERS", "DEVICE", "SHOWN"}


def recipe():
    """The recipe of this training."""
    return FINE_TUNE if INIT_WEIGHTS else FROM_NOTHING


# --------------------------------------------------------------------------------------------------
# Data


def read_rows(known):
    """All rows of DATA_CSV, and the Charset of the known characters and those of their labels."""
    rows = crnn.add_split(crnn.read_labels(DATA_CSV))
    spaced = rows.label != rows.label.str.strip(" ")
    if spaced.any():
        rows["label"] = rows.label.str.strip(" ")
        print(f"{spaced.sum():,} labels lose the space at an end: no image tells it from a margin")
    unknown_splits = sorted(set(rows.split) - {"train", "val", "test"})
    if unknown_splits:
        raise InputError(f"{DATA_CSV} has the split {unknown_splits[0]!r}: use train, val or test")
    trained = rows.label[rows.split == "train"]
    held = [c for label in trained for c in set(label) if not is_control(c)]
    counts = pd.Series(held, dtype=str).value_counts()
    new = sorted(c for c, n in counts.items() if n >= MIN_CHARACTER_ROWS and c not in known)
    if not known and not new:
        few = f"MIN_CHARACTER_ROWS = {MIN_CHARACTER_ROWS}"
        raise InputError(f"{DATA_CSV} has no training labels: {few} of them must share a character")
    return rows, crnn.Charset(known + "".join(new))


def is_control(character):
    """Line breaks, tabs, zero-width and other characters that no image shows."""
    return unicodedata.category(character)[0] == "C"


def reason_to_leave_out(label, image, reason, charset):
    """Why a row cannot be used, and its particulars; (None, "") where it can. See crnn.try_load."""
    if not label:
        return "empty label", ""
    if any(map(is_control, label)):
        return "line break or control character in the label", repr(label)
    if charset.unknown(label):
        rare = f"character in fewer than MIN_CHARACTER_ROWS = {MIN_CHARACTER_ROWS} training labels"
        return rare, crnn.describe(charset.unknown(label)[0])
    if image is None:
        return "missing or unreadable image", reason
    needed, frames = crnn.frames_needed(label), num_frames(image.shape[1])
    if needed > frames:
        return "label that cannot fit its image", f"it needs {needed} frames, {frames} are there"
    return None, ""


def load_images(paths):
    """Yield what crnn.try_load returns for each path, in order; worker processes decode them."""
    workers = crnn.workers_per_process(NUM_WORKERS)
    with ExitStack() as stack:
        loaded = map(load_array, paths)
        if workers > 1 and len(paths) >= 500:  # starting processes takes longer than reading fewer
            pool = stack.enter_context(ProcessPoolExecutor(workers))
            loaded = pool.map(load_array, paths, chunksize=128)
        look = dict(unit="img", disable=rank() > 0 or None)  # None: no bar in a log file
        yield from tqdm(loaded, "reading images", len(paths), **look)


def load_array(path):
    """crnn.try_load with the image as an array, which passes between processes cheaply."""
    image, reason = crnn.try_load(path)
    return (None, reason) if image is None else (image.numpy(), None)


# Training images padded with paper to one width, so that a batch is one indexing: images, uint8
# (n, 1, HEIGHT, W); targets, int64 (n, longest), filled up with BLANK; lengths of these, int64 (n,)
Bucket = namedtuple("Bucket", "images targets lengths")


def make_bucket(width, images, targets):
    """A Bucket of arrays (HEIGHT, <= width) and lists of classes."""
    pixels = torch.full((len(images), 1, HEIGHT, width), 255, dtype=torch.uint8)  # (n, 1, H, W)
    padded = torch.full((len(images), max(map(len, targets))), BLANK)  # (n, longest)
    for i, (image, target) in enumerate(zip(images, targets)):
        pixels[i, 0, :, : image.shape[1]] = torch.from_numpy(image)
        padded[i, : len(target)] = torch.tensor(target)
    return Bucket(pixels, padded, torch.tensor(list(map(len, targets))))


def bucket_width(width):
    """Steps of BUCKET pixels up to 256, then ever wider ones, since long lines are few."""
    step = BUCKET * max(1, 2 ** max(0, (width - 1).bit_length() - 8))
    return -(-width // step) * step


def load_rows(rows, charset):
    """Decode the images of rows: a dict from width to Bucket, and val and test rows with image."""
    paths = [str(Path(DATA_CSV).parent / path) for path in rows.image_path]
    widths, reasons, images = {}, [], []
    for row, (image, reason) in zip(rows.itertuples(), load_images(paths)):
        reasons.append(reason_to_leave_out(row.label, image, reason, charset))
        used = reasons[-1][0] is None
        images.append(image if used and row.split != "train" else None)
        if used and row.split == "train":
            arrays, targets = widths.setdefault(bucket_width(image.shape[1]), ([], []))
            arrays.append(image)
            targets.append(charset.encode(row.label))
    # One by one, so that the decoded images are not held twice.
    buckets = {width: make_bucket(width, *widths.pop(width)) for width in sorted(widths)}
    rows = rows.assign(reason=[r for r, _ in reasons], particulars=[p for _, p in reasons])
    everything = pd.concat(gather(rows))
    report_data(everything, charset)
    if not ((everything.split == "train") & everything.reason.isna()).any():
        raise InputError(f"{DATA_CSV} leaves no row to train on: see the reasons above")
    rows = rows.assign(image=images)
    return buckets, rows[rows.image.notna()]


def report_data(rows, charset):
    """Print rows by source and split, the charset, the longest label, and what is left out, why."""
    kept, left_out = rows[rows.reason.isna()], rows[rows.reason.notna()]
    print(f"{DATA_CSV}: {len(rows):,} rows, of which used:")
    print(kept.groupby(["source", "split"]).size().unstack(fill_value=0).to_string())
    longest = max(kept.label, key=len, default="")
    print(f"longest label: {len(longest)} characters, {longest!r}")
    print(f"charset: {len(charset.characters)} characters, {charset.characters!r}")
    for reason, group in left_out.groupby("reason"):
        print(f"left out: {len(group):,} rows, {reason}")
        for row in group.head(SHOWN).itertuples():
            print(f"    {row.image_path} {row.label[:40]!r} {row.particulars}".rstrip())


def some_training_rows(buckets, charset):
    """Some training images with their labels in the form of val rows, for data that has none."""
    print("no val rows: exact match is measured on training rows, which says little about others")
    rows = []
    for bucket in buckets.values():
        for image, target, length in zip(*(tensor[:200] for tensor in bucket)):
            rows.append((image[0].numpy(), charset.decode(target[:length].tolist()), "train"))
    return pd.DataFrame(rows, columns=["image", "label", "source"])


def gather(part):
    """A list of every process's part, in the order of ranks. Each waits here for all others."""
    parts = [part]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, part)
    return parts


def common_sizes(buckets):
    """How many images of each width every process has, so that all can make the same batches."""
    sizes = gather({width: len(bucket.images) for width, bucket in buckets.items()})
    widths = sorted(set().union(*sizes))
    common = {width: min(size.get(width, 0) for size in sizes) for width in widths}
    dropped = sum(sum(size.values()) for size in sizes) - len(sizes) * sum(common.values())
    if dropped:
        print(f"{dropped:,} images, others each epoch, are dropped to keep the processes in step")
    return {width: size for width, size in common.items() if size}


def shuffled_batches(buckets, sizes, batch_size):
    """(bucket, indices) of every batch of an epoch in random order, by torch's own generator."""
    # All processes come with the same seed and get the same widths in the same order, since the
    # slowest of them sets the pace; then each takes a seed, and so images, of its own.
    order = torch.randperm(sum(-(-size // batch_size) for size in sizes.values())).tolist()
    torch.manual_seed(torch.initial_seed() + rank())
    batches = []
    for width, size in sizes.items():
        chosen = torch.randperm(len(buckets[width].images))[:size]
        batches += [(buckets[width], indices) for indices in chosen.split(batch_size)]
    return [batches[i] for i in order]


# --------------------------------------------------------------------------------------------------
# Augmentation: random changes to a whole batch of ink (N, 1, H, W) at once. Not inverted, since
# load_image makes dark ink on light paper of every image.


def augment(ink, strength):
    """Ink (N, 1, H, W) moved, bent and worn, each line in its own way."""
    return worn(moved(ink, strength), strength)


def spreading(ink, strength):
    """A function that gives random numbers from -strength to strength, of a shape."""
    return lambda *shape: (torch.rand(*shape, device=ink.device) * 2 - 1) * strength


def moved(ink, strength):
    """Ink (N, 1, H, W) scaled, turned, slanted, shifted and bent."""
    (n, _, height, width), spread = ink.shape, spreading(ink, strength)
    ratio = width / height  # grid_sample counts both axes from -1 to 1
    angle, slant = spread(n) * 0.04, spread(n) * 0.25  # radians; columns per row
    scale_x = 1 + 0.05 * strength + spread(n) * 0.07  # mostly smaller
    scale_y = 1 + 0.06 * strength + spread(n) * 0.12
    # Within the room so made: a character moved out of the image would still be in the label.
    shift_x = spread(n) * (scale_x - 1).relu()
    shift_y = spread(n) * ((scale_y - 1).relu() + 0.04)
    matrix = [scale_x, slant / ratio, shift_x, angle * ratio, scale_y, shift_y]
    matrix = torch.stack(matrix, 1).view(n, 2, 3)  # (N, 6) -> (N, 2, 3)
    grid = F.affine_grid(matrix, list(ink.shape), align_corners=False)  # (N, H, W, 2)
    bend = spread(n, 2, 3, 2 + width // 16) * 0.05  # (N, 2, 3, few)
    bend[:, 0] /= max(1, ratio)
    bend = F.interpolate(bend, (height, width), mode="bilinear", align_corners=True)  # (N, 2, H, W)
    return F.grid_sample(ink, grid + bend.permute(0, 2, 3, 1), align_corners=False)  # (N, 1, H, W)


def worn(ink, strength):
    """Ink (N, 1, H, W) thicker or thinner, on ruled paper, blurred or sharp, faint and noisy."""
    (n, _, height, width), spread = ink.shape, spreading(ink, strength)
    weight = (spread(n, 1, 1, 1) - 0.1) * some(n, 0.5, ink)
    thicker, thinner = over3x3(ink, torch.maximum), over3x3(ink, torch.minimum)
    ink = ink + weight.clamp(min=0) * 0.6 * (thicker - ink)
    ink = ink + (-weight).clamp(min=0) * 0.35 * (thinner - ink)
    if width > 2 * height:  # in narrow images a ruled line could be taken for a dash
        ink = torch.maximum(ink, ruled_lines(ink) * some(n, 1 / 12, ink) * min(1, strength))
    blur = spread(n, 1, 1, 1) * some(n, 0.7, ink)  # below 0: sharper, as large scans come out
    ink = ink + blur * (over3x3(ink, torch.add) / 9 - ink)
    contrast, noise = 1 + spread(n, 1, 1, 1) * 0.15, spread(n, 1, 1, 1).clamp(min=0) * 0.08
    return ink * contrast + noise * torch.randn_like(ink)


def some(n, share, like):
    """1 for a share of the lines, 0 for the others, (n, 1, 1, 1)."""
    return (torch.rand(n, 1, 1, 1, device=like.device) < share).float()


def ruled_lines(ink):
    """A nearly level line from side to side for each of (N, 1, H, W), as ink of the same shape."""
    n, _, height, width = ink.shape
    place, tilt, tone = torch.rand(3, n, 1, 1, 1, device=ink.device)
    rows = torch.arange(height, device=ink.device)[:, None]  # (H, 1)
    across = torch.linspace(-1, 1, width, device=ink.device)  # (W,)
    distance = (rows - place * height - (tilt - 0.5) * 4 * across).abs()  # (N, 1, H, W)
    return (1.2 - distance).clamp(0, 1) * tone


def empty_paper(like):
    """Paper without text, of the shape of ink (N, 1, H, W), in the tones that load_image leaves."""
    n, _, height, width = like.shape
    rand = partial(torch.rand, device=like.device)
    light = rand(n, 1, 2, 3)
    middle = (light[..., 0] + light[..., 2]) / 2
    aside = rand(n, 1, 1) < 0.5  # some are lit from one side
    light[..., 1] = torch.where(aside, middle, light[..., 1])
    shade = F.interpolate(light, (height, width), mode="bilinear", align_corners=True)
    grain, soft = torch.randn_like(like), 0.5 + rand(n, 1, 1, 1) / 2  # it is smoothed as well
    grain = soft * 2 / 9 * over3x3(grain, torch.add) + (1 - soft) * grain
    ink = rand(n, 1, 1, 1) ** 2 * shade + 0.3 * rand(n, 1, 1, 1) ** 2 * grain  # most are faint
    ink = ink * some(n, 0.75, ink)
    ink = (ink - ink.amin((2, 3), keepdim=True)).clamp(0, 1)
    if width > 2 * height:
        ink = torch.maximum(ink, ruled_lines(ink) * some(n, 0.25, ink))
    ink = ink / ink.amax((2, 3), keepdim=True).clamp(min=crnn.MIN_TONES / 255)
    ink = torch.where(ink.mean((2, 3), keepdim=True) > 0.5, 1 - ink, ink)
    ends = (rand(n, 1, 1, 1) * 2 * width).clamp(min=8)  # half are narrower than their batch
    return ink * (torch.arange(width, device=like.device) < ends)


def over3x3(x, combine):
    """Every pixel combined with its neighbours, (N, 1, H, W); here faster than torch's poolings."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")  # (N, 1, H + 2, W + 2)
    x = combine(combine(x[..., :-2], x[..., 1:-1]), x[..., 2:])  # (N, 1, H + 2, W)
    return combine(combine(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])  # (N, 1, H, W)


# --------------------------------------------------------------------------------------------------
# Optimizers


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates (Keller Jordan 2024, kellerjordan.github.io/posts/muon)."""

    # A convolution counts as a matrix (out, in * rows * columns), an LSTM's weight as four,
    # one per gate. torch's own Muon takes two-dimensional weights only, one at a time.

    def __init__(self, matrices, lr, momentum=0.95):
        super().__init__(matrices, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Update all weights, those of equal shape in one go."""
        for group in self.param_groups:
            updates = {}  # shape -> weights and their updates
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
                average = self.state[weight]["average"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"])  # Nesterov's look ahead
                gates = 4 if update.ndim == 2 else 1
                update = update.reshape(gates, len(update) // gates, -1)  # (gates, rows, columns)
                updates.setdefault(update.shape[1:], []).append((weight, update))
            for (rows, columns), pairs in updates.items():
                new = orthogonal(torch.cat([update for _, update in pairs]))  # (n, rows, columns)
                new = new * max(1, rows / columns) ** 0.5
                parts = new.split([len(update) for _, update in pairs])
                for (weight, _), part in zip(pairs, parts):
                    weight.add_(part.reshape(weight.shape), alpha=-group["lr"])


# Of x -> a x + b x^3 + c x^5, fitted so that three steps bring singular values near 1; the usual
# five of 3.4445, -4.7750, 2.0315 take longer.
NEWTON_SCHULZ = ((4.7229, -12.9631, 9.3512), (3.3768, -6.3701, 3.3536), (3.2799, -5.2171, 3.0111))


def orthogonal(x):
    """Matrices (n, rows, columns) to their nearest orthogonal ones, roughly, by Newton-Schulz."""
    wide = x.mT if x.shape[1] > x.shape[2] else x
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = wide.to(crnn.compute_dtype(x.device.type, PRECISION))
    for a, b, c in NEWTON_SCHULZ:
        square = wide @ wide.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        wide = torch.baddbmm(wide, square, wide, beta=a)
    return (wide.mT if x.shape[1] > x.shape[2] else wide).to(x.dtype)


def make_optimizers(net, steps):
    """Muon for the matrices of convolutions and LSTMs, AdamW for all else, and their schedules."""
    layers = [*net.crnn.convolutions, net.crnn.forth, net.crnn.back]
    matrices = [p for layer in layers for p in layer.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if not any(p is matrix for matrix in matrices)]
    rates = recipe()["matrix_learning_rate"], recipe()["learning_rate"]
    adamw = torch.optim.AdamW(others, rates[1], weight_decay=WEIGHT_DECAY, fused=True)
    optimizers = [Muon(matrices, rates[0]), adamw]
    cycle = dict(total_steps=steps + 1, pct_start=WARM_UP, cycle_momentum=False)
    make = torch.optim.lr_scheduler.OneCycleLR
    return optimizers, [make(each, rate, **cycle) for each, rate in zip(optimizers, rates)]


# --------------------------------------------------------------------------------------------------
# Training


class WithShortcut(nn.Module):
    """The CRNN and, if the recipe weights it, a second CTC head on the features of its CNN."""

    def __init__(self, model):
        super().__init__()
        features, classes = model.architecture["channels"][-1], model.charset.num_classes
        self.crnn = model
        # It makes the features learn sooner, and is dropped afterwards.
        self.shortcut = nn.Linear(features, classes) if recipe()["shortcut_weight"] else None

    def forward(self, ink, widths):
        """Ink (N, 1, H, W) and widths (N,) to the logits of each head, (T, N, C)."""
        features = self.crnn.features(ink, widths)  # (T, N, D)
        logits = self.crnn.sequence(features)  # (T, N, C)
        return (logits, self.shortcut(features)) if self.shortcut else (logits,)


def starting_model(charset):
    """The network to train: a new one, or that of INIT_WEIGHTS with its weights by character."""
    if not INIT_WEIGHTS:
        sizes = {name: recipe()[name] for name in ("channels", "hidden", "blocks")}
        return CRNN(charset, dropout=DROPOUT, **sizes)
    start = crnn.load_checkpoint(INIT_WEIGHTS, learn=True)
    model = CRNN(charset, **dict(start.architecture, dropout=DROPOUT))
    weights, known = start.float().state_dict(), start.charset.index
    for name in ("linear.weight", "linear.bias"):
        rows = model.state_dict()[name].clone()  # (C,) or (C, D), of this charset
        rows[BLANK] = weights[name][BLANK]
        for c in filter(known.get, charset.characters):
            rows[charset.index[c]] = weights[name][known[c]]
        weights[name] = rows
    model.load_state_dict(weights)
    new = [crnn.describe(c) for c in charset.characters if c not in known]
    print(f"starting from {INIT_WEIGHTS}; characters new to it: {' '.join(new) or 'none'}")
    return model


def train_step(net, optimizers, scaler, images, targets, lengths):
    """One step on uint8 images (N, 1, H, W) and their targets, see Bucket. Returns the loss."""
    device = next(net.parameters()).device
    dtype = crnn.compute_dtype(device.type, PRECISION)
    ink = crnn.to_ink(images.to(device))  # (N, 1, H, W)
    if AUGMENT:
        ink = augment(ink, AUGMENT)
    blank = torch.rand(len(ink)) < BLANKS  # (N,)
    if blank.any():
        ink[blank.to(device)] = empty_paper(ink[blank.to(device)])
    lengths = lengths.masked_fill(blank, 0)  # (N,)
    widths = torch.full((len(ink),), ink.shape[3])  # the padding is paper, and part of the image
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        heads = net(ink, widths)  # (T, N, C) each
    # In float32, and the mean over images of the loss per character
    log_probs = [logits.float().log_softmax(2) for logits in heads]
    frames, targets = num_frames(widths), targets.to(device)
    losses = [F.ctc_loss(each, targets, frames, lengths, blank=BLANK) for each in log_probs]
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    scaler.scale(losses[0] + recipe()["shortcut_weight"] * sum(losses[1:])).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(net.parameters(), 5.0)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return losses[0].detach()


def train_epoch(net, optimizers, schedules, scaler, buckets, sizes, description):
    """One pass over all buckets. Returns the mean losses per image of up to 20 parts of it."""
    batches = shuffled_batches(buckets, sizes, BATCH_SIZE // world_size())
    part, parts, losses, counts = -(-len(batches) // 20), [], [], []
    look = dict(unit="img", leave=False, disable=rank() > 0 or None)  # None: not in log files
    with tqdm(total=sum(sizes.values()), desc=description, **look) as bar:
        for step, (bucket, indices) in enumerate(batches, start=1):
            batch = [tensor[indices] for tensor in bucket]
            losses.append(train_step(net, optimizers, scaler, *batch) * len(indices))
            counts.append(len(indices))
            for schedule in schedules:
                schedule.step()
            bar.update(len(indices))
            if step % part == 0 or step == len(batches):
                parts.append(float(torch.stack(losses).sum()) / sum(counts))
                losses, counts = [], []
                bar.set_postfix_str(f"loss {parts[-1]:.4f}", refresh=False)
                if parts[-1] != parts[-1]:
                    raise InputError("the loss is NaN: lower the learning rates in the recipes")
    return parts


def read(model, rows):
    """Read the images of every process's rows. Returns all rows with prediction and confidence."""
    images = [torch.from_numpy(image) for image in rows.image]
    readings = crnn.read_images(crnn.folded(model), images, 32)
    predictions, confidences = [r.text for r in readings], [r.confidence for r in readings]
    rows = rows.drop(columns="image").assign(prediction=predictions, confidence=confidences)
    return pd.concat(gather(rows))


def calibrate(confidences, correct):
    """Slope and offset for crnn.calibrated, fitted to readings and whether they were right."""
    # By Platt 1999, whose targets, a little short of 0 and 1, keep the fit finite
    confidences = torch.tensor(confidences, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    correct = torch.tensor(correct, dtype=torch.float64)
    x = torch.stack([confidences.logit(), torch.ones_like(confidences)], 1)  # (N, 2)
    right, wrong = correct.sum(), (1 - correct).sum()
    target = torch.where(correct > 0, (right + 1) / (right + 2), 1 / (wrong + 2))  # (N,)
    prior = torch.tensor(crnn.UNCALIBRATED, dtype=torch.float64)
    weights, little = prior, 1e-3
    for _ in range(30):  # Newton's method
        p = (x @ weights).sigmoid()
        curvature = (x * (p * (1 - p))[:, None]).T @ x + little * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(curvature, x.T @ (target - p) - little * (weights - prior))
        weights = weights + step.clamp(-1, 1)
    return tuple(weights.tolist())


# --------------------------------------------------------------------------------------------------
# Outputs: the model, the state to resume from, history.csv and training_curves.png


def resume_path():
    """Where the state after the last complete epoch is."""
    return Path(MODEL_PATH).with_suffix(".resume.pth")


def keep_if_best(state, model, name, exact, cer, rows):
    """Save the network of that name where it reads the val rows no worse than the best before."""
    if exact >= state["best"] and rank() == 0:
        if state["best"] < 0 and Path(MODEL_PATH).exists():
            former = Path(MODEL_PATH).with_suffix(".former.pth")
            with whole_file(former) as temporary:
                shutil.copyfile(MODEL_PATH, temporary)
            print(f"    the model of an earlier training is kept as {former.as_posix()}")
        data = dict(data=str(DATA_CSV), rows=int((rows.split == "train").sum()), seed=SEED)
        model.facts = dict(name=name, epoch=state["epoch"], val_exact=exact, val_cer=cer, **data)
        crnn.save_checkpoint(MODEL_PATH, model)
    state["best"] = max(state["best"], exact)


def score(state, model, name, val, rows):
    """Read the val rows with a network that is no epoch's, say how well, and keep it if better."""
    exact, cer = crnn.score_table(read(model, val)).iloc[-1][["exact", "CER"]].tolist()
    print(f"{name} — Accuracy: {exact:.2%} — CER: {cer:.2%}", flush=True)
    if exact > state["best"]:  # of few val rows both may read all, and the epoch has learned more
        keep_if_best(state, model, name, exact, cer, rows)


def fingerprint(rows):
    """What must be the same for a resumed training to reach the same weights: rows, constants."""
    text = rows[["image_path", "label", "split"]].to_csv(index=False)
    names = [name for name in globals() if len(name) > 1 and name.isupper() and name not in FREE]
    constants = {name: globals()[name] for name in names if not callable(globals()[name])}
    return f"{zlib.crc32(text.encode()):08x} {world_size()} {constants}"


def load_state(expected, parts):
    """Put the parts back as they were saved. Returns the state, if its fingerprint is expected."""
    path, remedy = resume_path(), "set RESUME = False to train from the start"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        same = saved["fingerprint"] == expected
    except Exception as error:  # torch.load raises pickle, zip, key and runtime errors
        raise InputError(
            f"RESUME: {path} is unreadable ({type(error).__name__}): {remedy}"
        ) from None
    if not same:
        raise InputError(f"RESUME: {path} is of other data or constants: restore them, or {remedy}")
    for name, part in parts.items():
        part.load_state_dict(saved.pop(name))
    print(f"resuming after epoch {saved['epoch']}")
    return saved


def write_history(history, curves):
    """history.csv, a row per epoch, and training_curves.png. history: dicts as main makes them."""
    folder, table = Path(MODEL_PATH).parent, pd.DataFrame(history).set_index("epoch")
    with whole_file(folder / "history.csv") as temporary:
        table.drop(columns="losses").to_csv(temporary, float_format="%.5g", lineterminator="\n")
    if not curves:
        return
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    losses = {e - 1 + (i + 1) / len(x): y for e, x in table.losses.items() for i, y in enumerate(x)}
    pd.Series(losses).plot(ax=axes[0], logy=True, title="training: CTC loss per character")
    for ax, measure in zip(axes[1:], ("exact", "CER")):
        columns = 100 * table.filter(regex=f"^{measure} ")
        columns.columns = [name.removeprefix(measure) for name in columns]
        columns.plot(ax=ax, marker="o", title=f"validation: {measure}, %")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.xaxis.get_major_locator().set_params(integer=True)
    with whole_file(folder / "training_curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=80)
    pyplot.close(figure)


def start_processes():
    """Join the other processes, if any. Returns the device of this one."""
    if BATCH_SIZE % world_size():
        raise InputError(f"BATCH_SIZE = {BATCH_SIZE}: set a multiple of {world_size()} processes")
    device = torch.device(DEVICE)
    if world_size() > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    crnn.join_processes("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)  # numbers too small to matter slow a CPU down
    return device


def load_data():
    """All rows of DATA_CSV, its Charset, and this process's buckets, val rows and test rows."""
    known = crnn.load_checkpoint(INIT_WEIGHTS).charset.characters if INIT_WEIGHTS else ""
    rows, charset = read_rows(known)
    # Deal rows out by label length, so that every rank gets the same mix of widths.
    order = np.argsort(rows.label.str.len(), kind="stable")[rank() :: world_size()]
    share = rows.iloc[order] if world_size() > 1 else rows
    buckets, scored = load_rows(share, charset)
    val, test = (scored[scored.split == split] for split in ("val", "test"))
    if not sum(gather(len(val))):
        val = some_training_rows(buckets, charset)
    return rows, charset, buckets, val, test


def finish(state, device, val, test):
    """Calibrate the best weights on the val rows, save them, and score them on the test rows."""
    crnn.wait_for_all()  # the first process has written it before it comes here
    best = crnn.load_checkpoint(MODEL_PATH, device, learn=True)
    best.calibration = crnn.UNCALIBRATED  # also where an earlier run has come as far as this
    seen = read(best, val)
    best.calibration = calibrate(list(seen.confidence), list(seen.label == seen.prediction))
    if rank() == 0:
        crnn.save_checkpoint(MODEL_PATH, best)
    print(f"✅ Model saved to {MODEL_PATH}")
    if best.facts["epoch"] == 0:
        print("no epoch read better, so these are the starting weights: more labels may help")
    if not sum(gather(len(test))):
        return
    print(f"\nTest rows, never trained on, read by {best.facts['name']} (folded: O = 0)")
    seen = read(best, test)
    for column in seen.columns.intersection(["source", "style"]):
        print(f"{crnn.format_score_table(crnn.score_table(seen, column))}\n")
    error = crnn.calibration_error(seen.confidence, seen.label == seen.prediction)
    print(f"confidence and the share of right readings lie {error:.1%} apart (calibration error)")


def main():
    """Train, save the best weights, and score them on the test rows."""
    device = start_processes()
    Path(MODEL_PATH).parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=Path(MODEL_PATH).parent).close()  # fails now, not after an epoch
    rows, charset, buckets, val, test = load_data()
    sizes = common_sizes(buckets)
    batches = sum(-(-size // (BATCH_SIZE // world_size())) for size in sizes.values())
    if not batches:
        raise InputError(f"{len(rows)} rows are too few for {world_size()} processes: start fewer")
    epochs = max(EPOCHS, -(-MIN_STEPS // batches))

    net = WithShortcut(starting_model(charset)).to(device)
    model, mean = net.crnn, AveragedModel(net.crnn)
    mean.update_parameters(model)  # the first it is of; the last epoch's weights are the second
    optimizers, schedules = make_optimizers(net, epochs * batches)
    dtype = crnn.compute_dtype(device.type, PRECISION)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = dict(net=net, scaler=scaler, muon=optimizers[0], adamw=optimizers[1])
    parts |= {f"schedule {i}": schedule for i, schedule in enumerate(schedules)}
    weights = f"{sum(p.numel() for p in model.parameters()):,} weights"
    print(f"{weights}, {epochs} epochs of {batches:,} batches on {device} in {dtype}")

    state = dict(epoch=0, best=-1.0, seconds=0.0, history=[], fingerprint=fingerprint(rows))
    if RESUME:
        state = load_state(state["fingerprint"], parts)
    trained = net if world_size() == 1 else nn.parallel.DistributedDataParallel(net)
    try:
        if INIT_WEIGHTS and not RESUME:  # they are kept where no epoch reads as well as they do
            score(state, model, "the starting weights", val, rows)
        for epoch in range(state["epoch"] + 1, epochs + 1):
            started = time.perf_counter()
            torch.manual_seed(SEED + 1_000_003 * epoch)  # by its number, so that resuming is exact
            net.train()
            frozen = recipe()["frozen_norms"]
            if epoch > max(frozen < 1, epochs * (1 - frozen)):  # the first has no averages to use
                model.norms.eval()
            name = f"epoch {epoch}/{epochs}"
            losses = train_epoch(trained, optimizers, schedules, scaler, buckets, sizes, name)
            speed = world_size() * sum(sizes.values()) / (time.perf_counter() - started)
            seen = read(model, val)
            table = crnn.score_table(seen)
            exact, cer = table.iloc[-1][["exact", "CER"]].tolist()
            state["seconds"] += time.perf_counter() - started
            said = f"Loss: {np.mean(losses):.4f} — Accuracy: {exact:.2%} — CER: {cer:.2%}"
            said = f"Epoch {epoch}/{epochs} — {said} — {speed:.0f} img/s — {state['seconds']:.0f} s"
            print(said, flush=True)
            shown = epoch % -(-epochs // 10) == 0 or epoch == epochs
            if shown:
                for row in seen[epoch % 7 :: max(1, len(seen) // SHOWN)][:SHOWN].itertuples():
                    print(f"    {row.label} | {row.prediction}")
            if (seen.prediction == "").mean() > 0.9:
                print("    nearly all is still blank: this is normal in the first epochs of CTC")
            state["epoch"] = epoch
            facts = dict(epoch=epoch, seconds=round(state["seconds"], 1), losses=losses)
            facts |= dict(images_per_second=round(speed, 1), loss=float(np.mean(losses)))
            for measure in ("exact", "CER"):
                facts |= {f"{measure} {source}": float(v) for source, v in table[measure].items()}
            state["history"].append(facts)
            keep_if_best(state, model, f"epoch {epoch}", exact, cer, rows)
            if rank() == 0:
                saved = {name: part.state_dict() for name, part in parts.items()}
                crnn.save_tensors(resume_path(), dict(state, **saved))
                write_history(state["history"], curves=shown)
        if INIT_WEIGHTS:
            # Halfway back, less is unlearned that the new images lack (Wortsman et al. 2022)
            mean.update_parameters(model)
            score(state, mean.module, "the mean of the first and last weights", val, rows)
    except KeyboardInterrupt:
        print(f"\nstopped after epoch {state['epoch']}; with RESUME = True it goes on from there")
        if state["best"] < 0 or world_size() > 1:
            return 130
    del trained  # it holds the process group
    finish(state, device, val, test)
    crnn.leave_processes()


if __name__ == "__main__":
    crnn.run(main)
