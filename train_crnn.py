"""Train the CRNN on datasets/data.csv, or on a csv of your own with image_path,label.

    python train_crnn.py
    torchrun --nproc_per_node=4 train_crnn.py       (on four GPUs, or four processes of a CPU)

Prints which rows it skips and why, one line per epoch, and a table of the test rows at the end.
Saves the epoch with the best validation accuracy to MODEL_PATH, with everything inference needs,
and history.csv and training_curves.png beside it. Stop with Ctrl-C at any time; RESUME continues.
"""

import copy
import math
import os
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset
from tqdm.contrib.concurrent import thread_map

import crnn
from crnn import BLANK, CRNN, InputError, rank, whole_file, world_size

# --------------------------------------------------------------------------------------------------
# Data and files
DATA_CSV = "datasets/data.csv"  # image_path,label and perhaps source,split; paths from its folder
MODEL_PATH = "ocr_crnn_model/crnn.pth"  # the best epoch; the state to resume from is beside it
INIT_WEIGHTS = None  # None: from scratch; "ocr_crnn_model/pretrained.pth": fine-tune these weights
RESUME = False  # continue after the last complete epoch, with the same data and constants
MIN_CHARACTER_ROWS = 3  # a character in fewer training labels is treated as a typo

# Recipes. Learning rates are the peaks of one-cycle schedules.
FROM_NOTHING = dict(
    channels=(32, 64, 96, 192),  # of the CNN's stages; the last is the number of features per frame
    hidden=192,  # LSTM units in each direction
    blocks=0,  # residual convolutions on the features
    matrix_learning_rate=1e-2,  # of Muon, for the matrices of the convolutions and the LSTM
    learning_rate=3e-3,  # of AdamW, for all other weights
    shortcut_weight=0.1,  # of a second CTC loss, on the CNN's features; its head is not kept
    frozen_norms=0.25,  # final share of training with batch norm frozen
)
# Small steps, so that fine-tuning forgets little; no shortcut head, because its random weights
# would disturb the trained features. The size of the network is that of INIT_WEIGHTS.
FINE_TUNE = dict(matrix_learning_rate=1e-3, learning_rate=3e-4, shortcut_weight=0, frozen_norms=1)
EPOCHS = 6  # passes over the training rows
MIN_STEPS = 1_500  # batches; with few images, epochs are added until there are this many
BATCH_SIZE = 32  # images of one padded width in a step, over all processes together
WARM_UP = 0.1  # share of training in which the learning rates rise to their peak
WEIGHT_DECAY = 1e-2  # of AdamW
AVERAGE = 0.1  # the saved weights are averaged over about this last share of the steps so far
KEEP_START = 0.0  # share of INIT_WEIGHTS in the saved weights; 0.5 forgets little of what they knew
DROPOUT = 0.0  # share of the features and of the LSTM's output that is zeroed
AUGMENT = 1.0  # strength of the random changes to the training images; 0: none
BLANKS = 0.01  # share of training images that are replaced by empty paper, labelled ""

# How
SEED = 0  # the same seed, data and machine give the same weights, on a GPU nearly
NUM_THREADS = crnn.usable_cores()  # that decode images at the start
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # under torchrun, a GPU for each process
PRECISION = None  # "bfloat16" or "float32"; None: bfloat16 where the hardware has it
# --------------------------------------------------------------------------------------------------

SHOWN = 3  # rows named per reason for skipping rows, and examples shown per epoch
ENOUGH = 5_000  # usable images of all splits; fewer are too few to learn from scratch


def recipe():
    """The recipe of this training."""
    return FINE_TUNE if INIT_WEIGHTS else FROM_NOTHING


# ---- Data
def read_rows(known):
    """All rows of DATA_CSV, and the Charset: known characters and those common enough in train."""
    rows = crnn.add_split(crnn.read_labels(DATA_CSV))
    if unknown := sorted(set(rows.split) - {"train", "val", "test"}):
        raise InputError(f"{DATA_CSV} has the split {unknown[0]!r}: use train, val or test")
    counts = rows.label[rows.split == "train"].map(set).explode().value_counts()
    new = sorted(c for c, n in counts.items() if n >= MIN_CHARACTER_ROWS and c not in known)
    new = "".join(filter(str.isprintable, new))  # no tabs, zero-width or other invisible characters
    if not (rows.split == "train").any():
        raise InputError(f"{DATA_CSV} has only val and test labels: add a column split")
    if not known and not new:
        raise InputError(f"{DATA_CSV} has no character in MIN_CHARACTER_ROWS training labels")
    return rows, crnn.Charset(known + new)


def reason_to_skip(label, image, reason, charset):
    """Why a row cannot be used, and its particulars; (None, "") where it can. See crnn.try_load."""
    if not label:
        return "empty label", ""
    if not label.isprintable():
        return "line break or control character in the label", repr(label)
    if unknown := charset.unknown(label):
        few = f"character in fewer than MIN_CHARACTER_ROWS = {MIN_CHARACTER_ROWS} training labels"
        return few, unknown[0]
    if image is None:
        return "missing or unreadable image", reason
    if not crnn.fits(label, image):
        needed, frames = crnn.frames_needed(label), crnn.num_frames(image.shape[1])
        return "label that cannot fit its image", f"it needs {needed} frames, but has {frames}"
    return None, ""


def load_rows(rows, charset):
    """Decode the images of rows. Returns buckets of the train rows, and the val and test rows.

    The latter two are DataFrames with a column image, uint8 (HEIGHT, W).
    """
    paths = crnn.image_paths(rows, DATA_CSV)
    bar = dict(desc="reading images", unit="img", disable=rank() > 0 or None)
    loaded = thread_map(crnn.try_load, paths, max_workers=max(1, NUM_THREADS), **bar)
    reasons = [reason_to_skip(label, *seen, charset) for label, seen in zip(rows.label, loaded)]
    rows = rows.assign(image=[image for image, _ in loaded])
    rows["reason"], rows["particulars"] = zip(*reasons)
    report_data(rows, charset)
    kept = rows[rows.reason.isna()]
    train, val, test = (kept[kept.split == split] for split in ("train", "val", "test"))
    if train.empty:
        raise InputError(f"{DATA_CSV} leaves no row to train on: see the reasons above")
    if val.empty:
        print("no val rows: accuracy is that of training rows, which says little about new images")
        val = train[:: math.ceil(len(train) / 1000)]  # enough to see whether it learns
    widths = train.image.map(lambda image: crnn.padded_width(image.shape[1]))
    return [make_bucket(group, charset) for _, group in train.groupby(widths)], val, test


def make_bucket(rows, charset):
    """Rows whose images have one padded width, as a dataset of images, targets and lengths.

    uint8 (n, 1, HEIGHT, W), 255 = paper; int64 (n, longest), filled up with BLANK; and int64 (n,).
    """
    targets = [torch.tensor(charset.encode(label)) for label in rows.label]
    padded = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=BLANK)
    images = torch.stack([crnn.pad(image) for image in rows.image])[:, None]
    return TensorDataset(images, padded, torch.tensor([len(target) for target in targets]))


def report_data(rows, charset):
    """Print rows by source and split, the charset, and which rows are skipped or never trained."""
    kept, skipped = rows[rows.reason.isna()], rows[rows.reason.notna()]
    print(f"{DATA_CSV}: {len(rows):,} rows, of which used: {len(kept):,}")
    if len(kept):
        print(kept.groupby(["source", "split"]).size().unstack(fill_value=0).to_string())
        longest = max(kept.label, key=len)
        print(f"longest label: {len(longest)} characters, {longest!r}")
    print(f"charset: {len(charset.characters)} characters, {charset.characters!r}")
    for reason, group in skipped.groupby("reason"):
        print(f"skipped: {len(group):,} rows, {reason}")
        for row in group.head(SHOWN).itertuples():
            print(f"    {row.image_path} {row.label[:40]!r} {row.particulars}".rstrip())
    trained = set(kept.label[kept.split == "train"])
    counts = kept.label[~kept.label.isin(trained)].value_counts()
    repeated = counts[counts > 1]  # a text that occurs once is there to measure new texts by
    if len(repeated):
        names = ", ".join(f"{label!r} ({n} images)" for label, n in repeated.head(SHOWN).items())
        print(f"never trained on, as all their images are in val or test: {names}", end="")
        print(f" and {len(repeated) - SHOWN:,} more labels" * (len(repeated) > SHOWN))
    if not INIT_WEIGHTS and len(kept) < ENOUGH:
        print(f"{len(kept):,} images are too few to learn from scratch: to start from the bundled")
        print('weights, set INIT_WEIGHTS = "ocr_crnn_model/pretrained.pth"')


def shuffle_batches(buckets, generator):
    """(bucket, indices) of every batch of an epoch in random order; each process has its share."""
    orders = [(bucket, torch.randperm(len(bucket), generator=generator)) for bucket in buckets]
    batches = [(bucket, part) for bucket, order in orders for part in order.split(BATCH_SIZE)]
    # All processes shuffle alike, so that each has its part of the same batch; where the last of a
    # bucket is too small for that, its images are repeated.
    order = torch.randperm(len(batches), generator=generator).tolist()
    for bucket, indices in (batches[i] for i in order):
        indices = indices.repeat(math.ceil(world_size() / len(indices)))
        yield bucket, indices[rank() :: world_size()]


# ---- Augmentation: random changes to a whole batch of ink (N, 1, H, W) at once. Never inverted:
# all that load_image makes is dark ink on light paper.
def rand(like, low=0.0, high=1.0):
    """A random number from low to high for each of (N, 1, H, W), as (N, 1, 1, 1)."""
    return low + (high - low) * torch.rand(len(like), 1, 1, 1, device=like.device)


def move(ink, strength):
    """Ink (N, 1, H, W) scaled, turned, slanted, shifted and bent."""
    n, _, height, width = ink.shape
    ratio = width / height  # grid_sample counts both axes from -1 to 1
    limits = torch.tensor([0.04, 0.25, 0.07, 0.12, 1, 1], device=ink.device) * strength
    moves = (torch.rand(n, 6, device=ink.device) * 2 - 1) * limits  # (N, 6)
    angle, slant, scale_x, scale_y, x, y = moves.T  # radians, columns per row, parts; (N,) each
    scale_x, scale_y = 1 + 0.05 * strength + scale_x, 1 + 0.06 * strength + scale_y  # most smaller
    # Shifted only within the margin that this leaves: ink pushed out would still be in the label.
    x, y = x * (scale_x - 1).relu(), y * ((scale_y - 1).relu() + 0.04)
    matrix = torch.stack([scale_x, slant / ratio, x, angle * ratio, scale_y, y], 1)  # (N, 6)
    grid = F.affine_grid(matrix.view(n, 2, 3), list(ink.shape), align_corners=False)  # (N, H, W, 2)
    few = (torch.rand(n, 2, 3, 2 + width // 16, device=ink.device) * 2 - 1) * 0.05 * strength
    few[:, 0] /= max(1, ratio)
    bend = F.interpolate(few, (height, width), mode="bilinear", align_corners=True)  # (N, 2, H, W)
    return F.grid_sample(ink, grid + bend.permute(0, 2, 3, 1), align_corners=False)  # (N, 1, H, W)


def augment(ink, strength):
    """Ink (N, 1, H, W) moved, thicker or thinner, ruled, blurred or sharp, faint and noisy."""
    ink = move(ink, strength)
    weight = (rand(ink, -strength, strength) - 0.1) * (rand(ink) < 0.5)
    thicker, thinner = combine3x3(ink, torch.maximum), combine3x3(ink, torch.minimum)
    ink = ink + weight.clamp(min=0) * 0.6 * (thicker - ink)
    ink = ink + (-weight).clamp(min=0) * 0.35 * (thinner - ink)  # less, or thin strokes vanish
    if ink.shape[3] > 2 * ink.shape[2]:  # in narrow ones a ruled line could be taken for a dash
        ink = torch.maximum(ink, rule(ink) * (rand(ink) < 1 / 12) * min(1, strength))
    blur = rand(ink, -strength, strength) * (rand(ink) < 0.7)  # below 0: sharper, as large scans
    ink = ink + blur * (combine3x3(ink, torch.add) / 9 - ink)
    noise = rand(ink, -strength, strength).relu() * 0.08 * torch.randn_like(ink)
    return ink * rand(ink, 1 - 0.15 * strength, 1 + 0.15 * strength) + noise


def rule(like, lowest=1.0, pitch=1e4):
    """A nearly level line from side to side for each of (N, 1, H, W), as ink of the same shape.

    lowest: the part of the height, from the top, that it is in; pitch: rows to the next such line,
    by default out of sight.
    """
    n, _, height, width = like.shape
    place, tilt, tone, thickness = torch.rand(4, n, 1, 1, 1, device=like.device)
    rows = torch.arange(height, device=like.device)[:, None]  # (H, 1)
    across = torch.linspace(-1, 1, width, device=like.device)  # (W,)
    distance = rows - place * lowest * height - (tilt - 0.5) * 4 * across  # (N, 1, H, W)
    distance = ((distance + pitch / 2) % pitch - pitch / 2).abs()  # from the nearest
    return (1.2 + thickness**2 - distance).clamp(0, 1) * tone


def draw_empty_paper(like):
    """Paper without text, of the shape of ink (N, 1, H, W), in the tones that load_image leaves."""
    n, _, height, width = like.shape
    few = torch.rand(n, 1, 2, 3, device=like.device)  # tones, unevenly lit
    shade = F.interpolate(few, (height, width), mode="bilinear", align_corners=True)  # (N, 1, H, W)
    grain = 0.3 * combine3x3(torch.randn_like(like), torch.add) / 4
    faint = torch.rand(2, n, 1, 1, 1, device=like.device) ** 2  # squared, as most paper is even
    ink = faint[0] * shade + faint[1] * grain
    ink = ink - ink.amin((2, 3), keepdim=True)
    for pitch in (1e4, rand(ink, 10, 30)):  # a line, or ruled paper
        ink = torch.maximum(ink, rule(ink, pitch=pitch) * (rand(ink) < 0.25))
    boxed, whole = rand(ink) < 0.4, rand(ink) < 0.5
    for side in range(4):  # a form's box, or some of its edges
        edge = rule(ink.rot90(side, (2, 3)), lowest=0.15).rot90(-side, (2, 3))  # (N, 1, H, W)
        ink = torch.maximum(ink, edge * boxed * (whole | (rand(ink) < 0.7)))
    # Stretched and, if mostly dark, inverted, as load_image does it
    ink = ink / ink.amax((2, 3), keepdim=True).clamp(min=crnn.MIN_TONES / 255)
    return torch.where(ink.mean((2, 3), keepdim=True) > 0.5, 1 - ink, ink)


def combine3x3(x, combine):
    """Every pixel combined with its neighbours, (N, 1, H, W); faster here than torch's pooling."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")  # (N, 1, H + 2, W + 2)
    x = combine(combine(x[..., :-2], x[..., 1:-1]), x[..., 2:])  # (N, 1, H + 2, W)
    return combine(combine(x[..., :-2, :], x[..., 1:-1, :]), x[..., 2:, :])  # (N, 1, H, W)


# ---- Optimizers
class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates (Keller Jordan 2024, kellerjordan.github.io/posts/muon).

    A convolution counts as a matrix (out, in * rows * columns), an LSTM's weight as four, one per
    gate. torch's own Muon takes two-dimensional weights only.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if not self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
                average = self.state[weight]["average"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"])  # Nesterov's look ahead
                gates = 4 if weight.ndim == 2 else 1
                update = orthogonalize(update.reshape(gates, len(weight) // gates, -1))
                rate = group["lr"] * max(1, update.shape[1] / update.shape[2]) ** 0.5
                weight.add_(update.reshape(weight.shape), alpha=-rate)


# Of x -> a x + b x^3 + c x^5, fitted so that three steps bring singular values near 1; the usual
# five of 3.4445, -4.7750, 2.0315 take longer.
NEWTON_SCHULZ = ((4.7229, -12.9631, 9.3512), (3.3768, -6.3701, 3.3536), (3.2799, -5.2171, 3.0111))


def orthogonalize(x):
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
    """By name: Muon for the matrices of CNN and LSTM, AdamW for all else, and their schedules."""
    layers = [*net.crnn.cnn.parameters(), *net.crnn.lstm.parameters()]
    matrices = [p for p in layers if p.ndim > 1]
    others = [p for p in net.parameters() if not any(p is matrix for matrix in matrices)]
    rates = dict(muon=recipe()["matrix_learning_rate"], adamw=recipe()["learning_rate"])
    adamw = torch.optim.AdamW(others, rates["adamw"], weight_decay=WEIGHT_DECAY, fused=True)
    parts = dict(muon=Muon(matrices, dict(lr=rates["muon"], momentum=0.95)), adamw=adamw)
    # At least 1.5 steps: torch divides by 0 where it is one exactly
    rise = min(1.0, max(WARM_UP, 1.5 / (steps + 1)))
    cycle = dict(total_steps=steps + 1, pct_start=rise, cycle_momentum=False)
    for name, rate in rates.items():
        parts[f"{name} schedule"] = OneCycleLR(parts[name], rate, **cycle)
    return parts


# ---- Training
class WithShortcut(nn.Module):
    """The CRNN and, if the recipe weights it, a second CTC head on the features of its CNN."""

    def __init__(self, model):
        super().__init__()
        features, classes = model.architecture["channels"][-1], model.charset.num_classes
        self.crnn = model
        # It makes the features learn sooner, and is dropped afterwards.
        self.shortcut = nn.Linear(features, classes) if recipe()["shortcut_weight"] else None

    def forward(self, ink):
        """Ink (N, 1, H, W) to the logits of each head, (T, N, C)."""
        features = self.crnn.features(ink)  # (T, N, D)
        logits = self.crnn.sequence(features)  # (T, N, C)
        return (logits, self.shortcut(features)) if self.shortcut else (logits,)


def make_model(charset):
    """The network to train: a new one, or that of INIT_WEIGHTS with its weights by character."""
    if not INIT_WEIGHTS:
        sizes = {name: recipe()[name] for name in ("channels", "hidden", "blocks")}
        return CRNN(charset, dropout=DROPOUT, **sizes)
    start = crnn.load_checkpoint(INIT_WEIGHTS, learn=True)
    model = CRNN(charset, dropout=DROPOUT, **start.architecture)
    model.calibration = start.calibration
    model.cnn.load_state_dict(start.cnn.state_dict())
    model.lstm.load_state_dict(start.lstm.state_dict())
    classes = [BLANK, *charset.encode(start.charset.characters)]  # in this charset
    with torch.no_grad():
        for new, old in zip(model.linear.parameters(), start.linear.parameters()):
            new.zero_()[classes] = old  # (C,) or (C, D), of both charsets; new characters: 0
    new = " ".join(start.charset.unknown(charset.characters)) or "none"
    print(f"starting from {INIT_WEIGHTS}; characters new to it: {new}")
    return model


def freeze_norms(model, average, epoch, epochs):
    """Freeze the batch norms in the last epochs, so that training sees what reading will.

    At the average's statistics: a model's own mostly reflect the widths of its last batches.
    """
    learning = epochs * (1 - recipe()["frozen_norms"])  # epochs in which they still learn
    if epoch > learning and (INIT_WEIGHTS or epoch > 1):  # a new network has no averages at first
        for layer, mean in zip(model.modules(), average.modules()):
            if isinstance(layer, nn.BatchNorm2d):
                layer.load_state_dict(layer.state_dict() | dict(mean.named_buffers()))
                layer.eval()


def average_in(mean, weight, steps):
    """A mean of weights with one more: mostly of the last AVERAGE of the steps so far.

    Polynomial decay of Shamir and Zhang 2013 (arXiv:1212.1824). Buffers come along, so that batch
    norm fits the mean.
    """
    return mean + (weight - mean) / (1 + AVERAGE * steps)


def mix_in(start, average):
    """The average or, to keep some of the start, a mean with it: WiSE-FT (arXiv:2109.01903)."""
    if not (INIT_WEIGHTS and KEEP_START):
        return average
    model = copy.deepcopy(average)
    for mean, first in zip(model.state_dict().values(), start.state_dict().values()):
        if mean.is_floating_point():  # new characters begin at 0: nothing to keep there
            mean.copy_(mean.lerp(first, KEEP_START).where(first != 0, mean))
    return model


def train_step(net, parts, images, targets, lengths):
    """One step on images (N, 1, H, W) and their targets, see make_bucket. Returns the loss."""
    device = next(net.parameters()).device
    dtype = crnn.compute_dtype(device.type, PRECISION)
    ink = crnn.to_ink(images.to(device))  # (N, 1, H, W)
    if AUGMENT:
        ink = augment(ink, AUGMENT)
    blank = torch.rand(len(ink)) < BLANKS  # (N,)
    if blank.any():
        ink[blank.to(device)] = draw_empty_paper(ink[blank.to(device)])
    lengths = lengths.masked_fill(blank, 0)  # (N,)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        heads = net(ink)  # (T, N, C) each
    # In float32, and the mean over images of the loss per character
    log_probs = [logits.float().log_softmax(2) for logits in heads]
    frames, targets = torch.full((len(ink),), len(log_probs[0])), targets.to(device)
    losses = [F.ctc_loss(each, targets, frames, lengths, blank=BLANK) for each in log_probs]
    net.zero_grad()
    (losses[0] + recipe()["shortcut_weight"] * sum(losses[1:])).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 5.0)  # the first steps can be far larger
    for name in ("muon", "adamw", "muon schedule", "adamw schedule"):
        parts[name].step()
    return losses[0].detach()


def train_epoch(net, parts, buckets, epoch, epochs):
    """One pass over buckets. Returns the loss of every batch."""
    # Seeded by the epoch, so that resuming is exact: all share one order, each augments its own way
    batches = list(shuffle_batches(buckets, torch.Generator().manual_seed(SEED + epoch)))
    torch.manual_seed(SEED + 1_000_003 * epoch + rank())
    model = getattr(net, "module", net).crnn  # DistributedDataParallel wraps it in .module
    net.train()
    freeze_norms(model, parts["average"].module, epoch, epochs)
    losses, count = [], sum(len(indices) for _, indices in batches)
    with crnn.progress(total=count, desc=f"epoch {epoch}/{epochs}", leave=False) as bar:
        for bucket, indices in batches:
            losses.append(train_step(net, parts, *bucket[indices]))
            parts["average"].update_parameters(model)
            bar.update(len(indices))
    losses = torch.stack(losses).tolist()
    if not np.isfinite(losses).all():
        raise InputError("the loss is NaN: lower the learning rates in the recipes")
    return losses


def read(model, rows):
    """Read the images of rows. Returns rows with the columns prediction and confidence."""
    model, images, readings = crnn.folded(model), list(rows.image), []
    for start in range(0, len(images), 1024):  # one call holds the logits of all its images
        readings += crnn.read_images(model, images[start : start + 1024], 48)
    predictions, confidences = [r.text for r in readings], [r.confidence for r in readings]
    return rows.drop(columns="image").assign(prediction=predictions, confidence=confidences)


def calibrate(confidences, correct, prior=crnn.UNCALIBRATED):
    """Slope and offset for crnn.calibrated, fitted to readings and whether they were right."""
    # By Platt 1999, whose targets, a little short of 0 and 1, keep the fit finite
    confidences, correct = np.clip(confidences, 1e-6, 1 - 1e-6), np.array(correct, dtype=bool)
    x = np.stack([np.log(confidences / (1 - confidences)), np.ones(len(correct))], 1)  # (N, 2)
    right, wrong = correct.sum(), (~correct).sum()
    target = np.where(correct, (right + 1) / (right + 2), 1 / (wrong + 2))  # (N,)
    weights, pull = np.array(prior), 10.0  # towards the prior: few rows move it little
    step = np.linalg.inv(x.T @ x / 4 + pull * np.eye(2))  # (2, 2), never too far (Böhning 1992)
    for _ in range(1000):
        errors = 1 / (1 + np.exp(-x @ weights)) - target  # (N,)
        weights = weights - step @ (x.T @ errors + pull * (weights - prior))
    return tuple(weights.tolist())


# ---- Outputs: the model, the state to resume from, history.csv and training_curves.png
def resume_path():
    """Where the state after the last complete epoch is."""
    return Path(MODEL_PATH).with_suffix(".resume.pth")


def save_if_best(state, model, exact, cer, count, val_rows):
    """Save an epoch that reads the val rows at least as well as the best so far, or the start."""
    if exact < state["best"]:
        return
    path = Path(MODEL_PATH)
    if not state["saved"] and path.exists():  # of an earlier training: kept under its date
        date = time.strftime("%Y-%m-%d_%H.%M.%S", time.localtime(path.stat().st_mtime))
        former = path.with_name(f"{path.stem}.{date}.pth")
        os.replace(path, former)
        print(f"    the model of an earlier training is kept as {former.as_posix()}")
    data = dict(data=str(DATA_CSV), rows=count, val_rows=val_rows, seed=SEED)
    start = dict(init=INIT_WEIGHTS and str(INIT_WEIGHTS), epoch=state["epoch"])
    model.facts = dict(val_exact=exact, val_cer=cer, **start, **data)
    crnn.save_checkpoint(path, model)
    state["best"], state["saved"] = exact, True


def fingerprint(rows, steps):
    """The data and constants that a resumed training must share with its beginning, in short."""
    text = rows[["image_path", "label", "split"]].to_csv(index=False)
    text += repr([recipe(), str(INIT_WEIGHTS), BATCH_SIZE, WARM_UP, WEIGHT_DECAY, AVERAGE])
    text += repr([KEEP_START, DROPOUT, AUGMENT, BLANKS, PRECISION, world_size()])
    return f"{zlib.crc32(text.encode()):08x} {steps} {SEED}"


def load_state(expected, parts):
    """Put the parts back as they were saved. Returns the state, if its fingerprint is expected."""
    path = resume_path()
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["fingerprint"] != expected:
            raise InputError("it was made with other data or constants")
        for name, part in parts.items():
            part.load_state_dict(saved.pop(name))
    except Exception as error:  # torch.load raises pickle, zip, key and runtime errors
        reason = error if isinstance(error, (InputError, OSError)) else type(error).__name__
        remedy = "restore it, the data and the constants, or set RESUME = False"
        raise InputError(f"RESUME: {path} cannot be used ({reason}): {remedy}") from None
    print(f"resuming after epoch {saved['epoch']}")
    return saved


def write_history(history, curves):
    """history.csv, a row per epoch, and training_curves.png. history: dicts, see end_epoch."""
    folder, table = Path(MODEL_PATH).parent, pd.DataFrame(history).set_index("epoch")
    with whole_file(folder / "history.csv") as temporary:
        table.drop(columns="losses").to_csv(temporary, float_format="%.5g", lineterminator="\n")
    if not curves:
        return
    from matplotlib.figure import Figure  # not pyplot, which may open a window

    figure = Figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplots(1, 3, subplot_kw=dict(xlabel="epoch"))
    losses = pd.Series(sum(table.losses, []))
    losses.index = (losses.index + 1) / len(losses) * len(table)  # in epochs
    axes[0].semilogy(losses.rolling(max(1, len(losses) // len(table) // 20)).mean())
    axes[0].set_title("training: CTC loss per character")
    for ax, measure in zip(axes[1:], ("exact", "CER")):
        for name, shares in table.filter(regex=f"^{measure} ").items():
            ax.plot(100 * shares, marker="o", label=name.removeprefix(measure))
        ax.set_title(f"validation: {measure}, %")
    axes[2].legend(loc="center left", bbox_to_anchor=(1, 0.5))  # outside: sources can be many
    for ax in axes:
        ax.grid(alpha=0.3)
    with whole_file(folder / "training_curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def end_epoch(former, parts, losses, started, val, count, epochs):
    """Read the val rows, print how the epoch went, save what is worth keeping, update the state."""
    state = dict(former)
    model = mix_in(parts["start"], parts["average"].module)
    epoch, speed = state["epoch"] + 1, count / (time.perf_counter() - started)
    seen = read(model, val)
    table = crnn.score_table(seen)
    exact, cer = table.iloc[-1][["exact", "CER"]].tolist()
    state["epoch"], state["seconds"] = epoch, state["seconds"] + time.perf_counter() - started
    scores = f"Loss: {np.mean(losses):.4f} — Accuracy: {exact:.2%} — CER: {cer:.2%}"
    pace = f"{speed:.0f} img/s — {state['seconds']:.0f} s"
    print(f"Epoch {epoch}/{epochs} — {scores} — {pace}", flush=True)
    shown = epoch % math.ceil(epochs / 10) == 0 or epoch == epochs
    if shown:
        for row in seen.sample(min(SHOWN, len(seen)), random_state=epoch).itertuples():
            print(f"    {row.label} | {row.prediction}")
    if (seen.prediction == "").mean() > 0.9:
        print("    nearly all predictions are still empty: normal in the first epochs of CTC")
    facts = dict(epoch=epoch, seconds=round(state["seconds"], 1), losses=losses)
    facts |= dict(images_per_second=round(speed, 1), loss=float(np.mean(losses)))
    facts |= {f"{m} {source}": float(v) for m in ("exact", "CER") for source, v in table[m].items()}
    state["history"].append(facts)
    save_if_best(state, model, exact, cer, count, len(val))
    saved = {name: part.state_dict() for name, part in parts.items()}
    crnn.save_tensors(resume_path(), state | saved)
    former.update(state)  # only now, since Ctrl-C may come before it is saved
    try:
        write_history(state["history"], curves=shown)
    except PermissionError as error:  # on Windows, while Excel has it open
        print(f"    history.csv and the curves are left as they were ({error})")


def start_processes():
    """Join the other processes, if any: only the first prints from then on. Returns the device."""
    if BATCH_SIZE < 1 or BATCH_SIZE % world_size():
        raise InputError(f"BATCH_SIZE = {BATCH_SIZE}: set a multiple of {world_size()} processes")
    device, backend = crnn.usable_device(DEVICE), "gloo"
    if world_size() > 1:
        if device.type == "cuda":
            device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "nccl"
            if device.index >= torch.cuda.device_count():
                raise InputError(f"{torch.cuda.device_count()} GPUs: lower --nproc_per_node")
            torch.cuda.set_device(device)
        # Imported before the group exists: later, its default arguments would keep the group alive
        from torch.distributed.nn import functional  # noqa: F401, see the end of main

        dist.init_process_group(backend, timeout=timedelta(days=1))  # the others wait for rank 0
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, for good
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)  # denormal numbers slow a CPU down
    return device


def finish(state, device, val, test):
    """Calibrate the saved epoch on the val rows, save it, and score it on the test rows."""
    if not state["saved"]:
        print("no epoch read as well as the start, so nothing was saved: more labels may help")
        return
    best = crnn.load_checkpoint(MODEL_PATH, device, learn=True)
    best.calibration = crnn.UNCALIBRATED  # a resumed run may have calibrated it already
    seen = read(best, val)
    seen = seen[seen.confidence > 0]  # 0 marks what is no line of text, whatever was read
    correct = seen.label == seen.prediction
    best.calibration = calibrate(seen.confidence, correct, state["calibration"])
    crnn.save_checkpoint(MODEL_PATH, best)
    print(f"✅ Model saved to {MODEL_PATH}")
    if test.empty:
        return
    print(f"\nTest rows, never trained on, read by epoch {best.facts['epoch']}")
    seen = read(best, test)
    for column in seen.columns.intersection(["source", "style"]):
        print(f"{crnn.format_score_table(crnn.score_table(seen, column))}\n")
    error = crnn.calibration_error(seen.confidence, seen.label == seen.prediction)
    print(f"calibration error: {error:.1%} (average gap between confidence and accuracy)")


def main():
    """Train, save the best epoch, and score it on the test rows."""
    device = start_processes()
    crnn.check_output(MODEL_PATH, "MODEL_PATH")
    known = crnn.load_checkpoint(INIT_WEIGHTS).charset.characters if INIT_WEIGHTS else ""
    rows, charset = read_rows(known)
    buckets, val, test = load_rows(rows, charset)
    count = sum(map(len, buckets))  # training images
    number = sum(math.ceil(len(bucket) / BATCH_SIZE) for bucket in buckets)
    epochs = max(1, EPOCHS, math.ceil(MIN_STEPS / number))

    net = WithShortcut(make_model(charset)).to(device)
    parts = make_optimizers(net, epochs * number)
    parts["average"] = AveragedModel(net.crnn, avg_fn=average_in, use_buffers=True)
    parts |= dict(net=net, start=copy.deepcopy(net.crnn))
    weights = f"{sum(p.numel() for p in net.crnn.parameters()):,} weights"
    dtype = crnn.compute_dtype(device.type, PRECISION)
    print(f"{weights}, {epochs} epochs of {number:,} batches on {device} in {dtype}")

    state = dict(epoch=0, best=-1.0, saved=False, seconds=0.0, history=[])
    state["calibration"] = parts["start"].calibration
    state["fingerprint"] = fingerprint(rows, epochs * number)
    if RESUME:
        state = load_state(state["fingerprint"], parts)
    elif INIT_WEIGHTS and rank() == 0:  # only the first process compares
        state["best"] = float(crnn.score_table(read(net.crnn, val)).exact.iloc[-1])
        print(f"the starting weights — Accuracy: {state['best']:.2%}", flush=True)
    trained = net if world_size() == 1 else nn.parallel.DistributedDataParallel(net)
    try:
        for epoch in range(state["epoch"] + 1, epochs + 1):
            started = time.perf_counter()
            losses = train_epoch(trained, parts, buckets, epoch, epochs)
            if rank() == 0:  # the others wait in their next step
                end_epoch(state, parts, losses, started, val, count, epochs)
    except KeyboardInterrupt:
        done = f"after epoch {state['epoch']}: RESUME = True continues"
        print(f"\nstopped {done if state['epoch'] else 'in epoch 1: nothing was saved'}")
        if not state["saved"] or world_size() > 1:
            return 130
    del trained  # it holds the process group
    if rank() == 0:
        finish(state, device, val, test)
    # Else gloo's threads may abort a process while the interpreter shuts down (pytorch PR 179291).
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    crnn.run(main)
