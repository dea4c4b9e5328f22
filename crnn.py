"""What the three scripts must agree on: charset, image to tensor, network, decoding, checkpoint.

An image of a short line of text becomes a grey tensor of HEIGHT rows; a small CNN turns every 4
columns of it into one frame; an LSTM reads the frames in both directions; connectionist temporal
classification (CTC) aligns them with the text. Functions here take arguments only.

Letters in shapes: N images, H height, W width (pixels), T frames, C classes, D features.
"""

import copy
import io
import math
import os
import sys
import zlib
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps, UnidentifiedImageError
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

BLANK = 0  # class of the CTC blank; the characters of a charset follow from class 1
HEIGHT = 32  # rows of the tensor that the network sees, in pixels; a multiple of 8
PIXELS_PER_FRAME = 4  # horizontal stride of the CNN
SMOOTHING = 0.8  # pixels, radius of a blur where text fills the height: scans have harder edges
MAX_ASPECT = 256  # width over height beyond which an image is no line (400 characters have 200)
MIN_TONES = 40  # of 256 grey levels: fainter images are not stretched, so that blank stays blank
INK_TONE = 140  # of 256, paper being 255: darker pixels count as ink where lines are measured,
FAINT_TONE = 155  # and these where margins are cut off, so that no faint ink goes with them
BOLD = 0.3  # share of ink above which it may be the paper: unsure readings try it either way
MIN_STROKES = 5  # side by side; an image with fewer is left as it is
USUAL_PITCH = 8  # pixels of width from stroke to stroke; tighter lines are stretched, up to 1.5x
LOW_LINE, USUAL_LINE = 0.36, 0.45  # text below 36 % of the height is zoomed to 45 %
LABEL_COLUMNS = ["image_path", "label"]  # what any csv must have; data.csv adds source and split
CHECKPOINT_FORMAT = 2  # raised when an older reader could misunderstand a newer file
UNCALIBRATED = (1.0, 0.0)  # slope and offset that leave a confidence as it is
MIN_ALTERNATIVE = 0.02  # alternatives below this probability are not reported
SECOND_LOOK = 0.6  # confidence, not calibrated, below which an image is read again


class InputError(ValueError):
    """What the user can mend. Its text is one line that says what is wrong and what to do."""


def run(main, *arguments):
    """Run a script's main and exit with its status: the one place where an error becomes a line."""
    sys.stdout.reconfigure(encoding="utf-8")  # labels and readings, also on a Windows console
    try:
        sys.exit(main(*arguments))
    except InputError as error:
        sys.exit(str(error))
    except BrokenProcessPool:
        sys.exit("a worker process died, most likely for want of memory: set NUM_WORKERS lower")
    except OSError as error:  # unreadable inputs are InputErrors already
        sys.exit(f"cannot write: {error}. Make room there, or set another folder in the constants")
    except KeyboardInterrupt:
        sys.exit("stopped: run the same command to go on (train_crnn.py: with RESUME = True)")


# --------------------------------------------------------------------------------------------------
# Charset


class Charset:
    """The characters a model knows: class 0 is the CTC blank, class i is characters[i - 1]."""

    def __init__(self, characters):
        repeated = sorted({c for c in characters if characters.count(c) > 1})
        if repeated:
            raise InputError(f"the charset holds {describe(repeated[0])} more than once: keep one")
        if not characters:
            raise InputError("the charset is empty: give it at least one character")
        self.characters = characters
        self.index = {c: i for i, c in enumerate(characters, start=1)}
        self.num_classes = len(characters) + 1  # with the blank

    def encode(self, label):
        """The classes of a label, ints from 1. InputError names a character it does not hold."""
        unknown = self.unknown(label)
        if unknown:
            raise InputError(f"label {label!r} holds {describe(unknown[0])}, not in the charset")
        return [self.index[c] for c in label]

    def decode(self, classes):
        """The text of classes without blanks; the inverse of encode. ValueError: no such class."""
        if not all(1 <= i < self.num_classes for i in classes):  # Python would take -1 as the last
            raise ValueError(f"{classes} are not all characters (1 to {self.num_classes - 1})")
        return "".join(self.characters[i - 1] for i in classes)

    def unknown(self, label):
        """The characters of a label that the charset does not hold, in their order."""
        return [c for c in label if c not in self.index]


def describe(character):
    """A character with its code point, for messages: 'é' (U+00E9)."""
    return f"{character!r} (U+{ord(character):04X})"


# --------------------------------------------------------------------------------------------------
# Image to tensor: the only pixel preprocessing in the repository, for training and for reading

# What Pillow's decoders raise for damaged files; its PNG reader, for one, a SyntaxError.
DAMAGED = (OSError, SyntaxError, ValueError, TypeError, EOFError, MemoryError)
DAMAGED += (Image.DecompressionBombError,)


def load_image(source):
    """Read an image of one line of text as dark ink on light paper.

    source: path, PIL image, or array (H, W) or (H, W, 3 or 4) of uint8, bool, or floats 0 to 1.
    Returns a uint8 tensor (HEIGHT, W), 255 = paper, 0 = the darkest ink. Keeps the aspect ratio,
    except that closer_view() stretches condensed text and crops high margins.
    Raises InputError, one line naming the image, when it cannot be read as a line of text.
    """
    name = str(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"
    try:
        with open_image(source) as image:
            check_size(image)
            grey = to_grey(ImageOps.exif_transpose(image))
        check_lines(grey)
        pixels = at_height(grey, *closer_view(at_height(grey)))
    except FileNotFoundError:
        raise InputError(f"{name}: no such file or folder") from None
    except UnidentifiedImageError:
        reason = "not an image that Pillow reads; of a PDF, save each line as PNG"
        raise InputError(f"{name}: {reason}") from None
    except DAMAGED as error:
        raise InputError(f"{name}: cannot be read ({error})") from None
    return torch.from_numpy(pixels)  # (HEIGHT, W)


def try_load(source):
    """(image, None) as load_image returns it, or (None, the line that says why it cannot)."""
    try:
        return load_image(source), None
    except InputError as error:
        return None, str(error)


def open_image(source):
    """A PIL image of whatever load_image takes."""
    if isinstance(source, (str, os.PathLike)):
        return Image.open(source)
    if isinstance(source, Image.Image):
        return source.copy()  # the caller's own stays open
    array = np.asarray(source)
    if array.dtype == bool or np.issubdtype(array.dtype, np.floating):
        array = (np.clip(array, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(array)


def check_size(image):
    """Refuse what is no line, before its pixels are decoded and take memory."""
    size = "{} x {} pixels".format(*image.size)
    if 0 in image.size:
        raise ValueError(f"{size}: empty")
    # The longer side either way: an image turned by its EXIF tag is tall until it is turned.
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{size}: too wide for a line of text, cut it into pieces")


def check_lines(grey):
    """Refuse a large picture of so many lines that it must be a page, squeezed into one of them."""
    if min(grey.size) > 1000:  # in smaller ones, 10 lines are dots, squares or stripes
        small = np.asarray(grey.resize((200, 400), Image.Resampling.BOX))  # (400, 200)
        inked = (dark_on_light(small) < INK_TONE).mean(1) > 0.02  # (400,)
        lines = np.count_nonzero(inked[1:] > inked[:-1])
        if lines > 10:
            raise ValueError(f"some {lines} lines of text: a page, cut its lines out first")


def to_grey(image):
    """Any PIL mode to mode L. Transparent parts become the paper that the ink stands out from."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit, 32-bit and float tones
        tones = np.array(image, dtype=np.float64)
        tones -= tones.min()
        return Image.fromarray((tones * (255 / max(tones.max(), 1e-9))).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        grey = np.asarray(mixed(rgba.convert("RGB")), dtype=np.float64)  # (H, W)
        alpha = np.asarray(rgba.getchannel("A")) / 255  # (H, W)
        paper = 255 if (grey * alpha).sum() <= 128 * alpha.sum() else 0
        return Image.fromarray((grey * alpha + paper * (1 - alpha)).round().astype(np.uint8))
    # By way of RGB, because Pillow converts CMYK, HSV and others to it only.
    return image.convert("L") if image.mode in ("1", "L") else mixed(image.convert("RGB"))


def mixed(image):
    """RGB to mode L: luminance or, where that loses the contrast, the mixture that has the most."""
    small = np.asarray(image.reduce(max(1, image.height // HEIGHT)), dtype=np.float32)  # (H, W, 3)
    near = len(small) // 4 + 1  # pixels that differ by strokes: distant ones also by their light
    steps = (small[:, near:] - small[:, :-near]).reshape(-1, 3)  # (N, 3)
    mixture = np.linalg.eigh(steps.T @ steps)[1][:, -1]  # (3,), along which they are largest
    most, usual = steps @ mixture, steps @ (0.299, 0.587, 0.114)  # (N,)
    # In grey images the former's square is 3 times the latter's; a faint tint is no contrast.
    if most @ most <= max(4 * usual @ usual, len(steps) * MIN_TONES**2 / 4):
        return image.convert("L")
    mixture = mixture / np.copysign(np.abs(mixture).sum(), mixture.sum())  # what is bright stays so
    grey = image.convert("L", (*mixture, -255 * mixture.clip(max=0).sum()))  # within 0 to 255
    return ImageOps.autocontrast(grey)


def at_height(grey, top=0.0, bottom=1.0, stretch=1.0, smoothing=0.0):
    """A grey PIL image, or its part from top to bottom (0 to 1): uint8 (HEIGHT, W).

    smoothing: the radius of a blur, in pixels.
    """
    box = (0, top * grey.height, grey.width, bottom * grey.height)
    width = max(1, round(grey.width * stretch * HEIGHT / (box[3] - box[1])))
    small = grey.resize((width, HEIGHT), Image.Resampling.BICUBIC, box)
    return dark_on_light(np.asarray(small.filter(ImageFilter.GaussianBlur(smoothing))))


def dark_on_light(grey):
    """Grey uint8 array (H, W) of either polarity to the same with paper at 255, ink down to 0."""
    low, high = int(grey.min()), int(grey.max())
    dark = grey < (low + high) / 2
    # Text covers less than half of its image, so most pixels are paper. When it is a close call
    # (bold strokes, cut tightly), the pixels of the border decide.
    share = np.count_nonzero(dark) / dark.size
    if 0.4 < share < 0.6:
        share = np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]]).mean()
    if share > 0.5:
        grey, low, high = 255 - grey, 255 - high, 255 - low
    stretched = 255 - (high - grey.astype(np.float32)) * (255 / max(high - low, MIN_TONES))
    return stretched.round().astype(np.uint8)


def closer_view(image):
    """What at_height should change about an image, uint8 (H, W): (top, bottom, stretch, smoothing).

    Text is easiest to read at the size and pitch that most of it has; the smaller it is, the more
    smoothing would take from it.
    """
    height, ink = len(image), image < INK_TONE
    top, bottom = inked_rows(ink)
    if top == bottom:  # specks or a lone dot: no size to go by
        return 0.0, 1.0, 1.0, SMOOTHING
    rows, line = ink[top:bottom], bottom - top
    smoothing = SMOOTHING * line / height
    columns = np.flatnonzero(rows.any(0))
    width = int(columns[-1] - columns[0]) + 1
    starts = np.count_nonzero(rows[:, 1:] > rows[:, :-1], axis=1) + rows[:, 0]  # strokes of a row
    strokes = float(np.sort(starts)[-max(1, line // 3) :].mean())  # of the fullest third of them
    if strokes < MIN_STROKES:  # its place and size tell a comma from a quote and c from C
        return 0.0, 1.0, 1.0, smoothing
    first, last = 0.0, 1.0
    if height / 8 <= line < LOW_LINE * height and width > 2.5 * line:
        middle, reach = (top + bottom) / 2 / height, line / USUAL_LINE / 2 / height
        first, last = max(0.0, middle - reach), min(1.0, middle + reach)
    stretch = min(max(USUAL_PITCH * strokes * (last - first) / width, 1.0), 1.5)
    stretch = stretch if stretch > 1.05 else 1.0
    return first, last, stretch, smoothing / (last - first)


def inked_rows(ink):
    """First row of a bool array (H, W) with more ink than specks, and the one after the last."""
    enough = max(1, ink.shape[1] / 100)
    rows = np.flatnonzero(np.count_nonzero(ink, axis=1) >= enough)
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)


def to_ink(images):
    """uint8 tensor, 255 = paper, to the network's input of the same shape, 0 = paper, 1 = ink."""
    return 1 - images.float() / 255


def pad_batch(images, multiple=1):
    """Images (H, W_i) padded with paper, as ink (N, 1, H, W), and their true widths (N,)."""
    widths = torch.tensor([image.shape[1] for image in images])
    width = -(-int(widths.max()) // multiple) * multiple
    batch = torch.full((len(images), 1, HEIGHT, width), 255, dtype=torch.uint8)  # (N, 1, H, W)
    for row, image in zip(batch, images):
        row[0, :, : image.shape[1]] = image
    return to_ink(batch), widths


def num_frames(widths):
    """Frames the network makes of a width, for an int, array or tensor: width / 4, rounded up."""
    return (widths + PIXELS_PER_FRAME - 1) // PIXELS_PER_FRAME


def frames_needed(target):
    """The fewest frames for a label or target: with fewer, the loss is infinite (Graves et al.)."""
    # One each, and a blank between two equal neighbours
    return len(target) + sum(a == b for a, b in zip(target, target[1:]))


# --------------------------------------------------------------------------------------------------
# Network


class CRNN(nn.Module):
    """CNN, LSTM in both directions, and a linear layer, after Shi et al. 2015 (arXiv:1507.05717).

    Much leaner than theirs: strided convolutions instead of full-size layers and pooling, one LSTM
    layer. Residual blocks, if any, follow where the height is gone and a weight costs least (He et
    al. 2015, arXiv:1512.03385), each a convolution over three frames. It owns its charset and its
    calibration, so that no one can pair it with another's.
    """

    def __init__(self, charset, channels=(32, 64, 96, 192), hidden=192, dropout=0.0, blocks=0):
        super().__init__()
        self.charset, self.calibration, self.facts = charset, UNCALIBRATED, {}
        self.architecture = dict(channels=list(channels), hidden=hidden)
        self.architecture |= dict(dropout=dropout, blocks=blocks)
        a, b, c, features = channels
        plan = [  # in, out, kernel, stride (rows, columns), padding
            (1, a, 3, (2, 2), 1),
            (a, a, 3, (1, 1), 1),
            (a, b, 3, (2, 2), 1),
            (b, b, 3, (1, 1), 1),
            (b, c, 3, (2, 1), 1),
            (c, c, 3, (1, 1), 1),
            (c, features, (HEIGHT // 8, 1), (1, 1), 0),  # all remaining rows at once
            *[(features, features, (1, 3), (1, 1), (0, 1))] * blocks,
        ]
        convolutions = [nn.Conv2d(i, o, k, s, p, bias=False) for i, o, k, s, p in plan]
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in convolutions)
        for norm in self.norms[len(plan) - blocks :]:  # a new block changes nothing
            nn.init.zeros_(norm.weight)
        self.dropout = nn.Dropout(dropout)
        self.forth, self.back = nn.LSTM(features, hidden), nn.LSTM(features, hidden)
        self.linear = nn.Linear(2 * hidden, charset.num_classes)
        self.to(memory_format=torch.channels_last)  # faster on CPUs than channels first

    def features(self, ink, widths=None):
        """Ink (N, 1, H, W) and widths (N,), None if none is padded, to features (T, N, D)."""
        x = ink.contiguous(memory_format=torch.channels_last)
        padded = widths is not None and bool((widths < ink.shape[3]).any())
        for conv, norm in zip(self.convolutions, self.norms):
            # (N, 1, 32, W) -> (N, a, 16, W/2) -> (N, b, 8, W/4) -> (N, c, 4, W/4) -> (N, D, 1, W/4)
            before, x = x, norm(conv(x))
            if conv.kernel_size == (1, 3):  # a residual block
                x = x.add_(before)  # (N, D, 1, W/4)
            if padded:  # back to paper, or a line would read otherwise beside a wider one
                widths = (widths + conv.stride[1] - 1) // conv.stride[1]  # in columns of this layer
                inside = torch.arange(x.shape[3], device=x.device) < widths[:, None].to(x.device)
                x.mul_(inside[:, None, None])  # (N, columns) -> (N, 1, 1, columns)
            x = F.relu_(x)
        return x.squeeze(2).permute(2, 0, 1)  # (N, D, 1, T) -> (T, N, D)

    def sequence(self, features, frames=None):
        """Features (T, N, D) and frames (N,), None if none is padded, to logits (T, N, C)."""
        x = self.dropout(features)
        forth, _ = self.forth(x)  # (T, N, D) -> (T, N, hidden)
        back, _ = self.back(reverse(x, frames))  # (T, N, D) -> (T, N, hidden)
        x = torch.cat([forth, reverse(back, frames)], 2)  # (T, N, 2 * hidden)
        return self.linear(self.dropout(x))  # (T, N, 2 * hidden) -> (T, N, C)

    def forward(self, ink, widths):
        """Ink (N, 1, H, W), 0 = paper, 1 = ink, and true widths in pixels (N,).

        Returns logits (T, N, C) and frames (N,); what comes after a line's frames is meaningless.
        """
        frames = num_frames(widths)
        return self.sequence(self.features(ink, widths), frames), frames


def reverse(x, frames=None):
    """Lines (T, N, D) back to front, each within its own frames (N,); None: all have T."""
    # In half the time of a PackedSequence, for which torch has no fast kernel on CPUs
    if frames is None or int(frames.min()) == len(x):
        return x.flip(0)
    frames, number = frames.to(x.device), torch.arange(x.shape[1], device=x.device)  # both (N,)
    times = (frames - 1 - torch.arange(len(x), device=x.device)[:, None]).clamp(min=0)  # (T, N)
    places = (times * x.shape[1] + number).flatten()  # (T * N,)
    return x.flatten(0, 1).index_select(0, places).view(x.shape)  # (T * N, D) -> (T, N, D)


def folded(model):
    """A copy of a CRNN that only reads: each batch norm is folded into its convolution."""
    model = copy.deepcopy(model).eval()
    for i, norm in enumerate(model.norms):
        if isinstance(norm, nn.BatchNorm2d):
            model.convolutions[i] = fuse_conv_bn_eval(model.convolutions[i], norm)
            model.norms[i] = nn.Identity()
    return model.to(memory_format=torch.channels_last)


def compute_dtype(device_type, precision=None):
    """The dtype of that name; None: bfloat16 where the hardware computes in it, else the best."""
    if precision:
        return getattr(torch, precision)
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    can = getattr(torch.cpu, "get_capabilities", dict)() if device_type == "cpu" else {}
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


# --------------------------------------------------------------------------------------------------
# Decoding


class Character(NamedTuple):
    """One character of a Reading, and what else it could be."""

    character: str
    confidence: float  # highest probability in its frames
    left: float  # where it begins, halfway to its neighbour, from 0 to 1 of the image's width
    right: float  # where it ends, likewise
    alternatives: list  # (character, probability) of others in the same place, the likeliest first


class Reading(NamedTuple):
    """What the network read in one image."""

    text: str
    confidence: float  # probability that the text is right, calibrated where the model is
    characters: list  # a Character for each of text


def greedy_decode(logits, frames, charset):
    """Best class per frame, repeats merged, blanks removed: best path of Graves et al. 2006.

    logits: (T, N, C); frames: (N,), only a line's own are read. Returns N Readings, uncalibrated.
    """
    log_probs = logits.detach().float().log_softmax(2).cpu()  # (T, N, C)
    frames = frames.cpu()
    best, classes = log_probs.max(2)  # (T, N, C) -> both (T, N)
    best, classes = best.exp().T.tolist(), classes.T.tolist()  # N lists of T
    paths = [best_path(*line) for line in zip(classes, best, frames.tolist())]
    confidences = text_probability(log_probs, frames, [[c for c, _ in path] for path in paths])
    # Alternatives are looked up only where the best class leaves room for one.
    peaks = [(line, peak) for line, path in enumerate(paths) for _, peak in path]
    unsure = [(line, peak) for line, peak in peaks if best[line][peak] <= 1 - MIN_ALTERNATIVE]
    others = likeliest(log_probs, unsure, charset)
    lines = enumerate(zip(paths, best, frames.tolist(), confidences))
    return [make_reading(charset, line, *parts, others) for line, parts in lines]


def best_path(classes, best, count):
    """(class, frame of its peak) of each character in a line of count frames."""
    runs = groupby(range(count), key=classes.__getitem__)
    return [(c, max(run, key=best.__getitem__)) for c, run in runs if c != BLANK]


def make_reading(charset, line, path, best, count, confidence, others):
    """The Reading of a path as best_path returns it. others: see likeliest."""
    text = charset.decode([c for c, _ in path])
    # A wide margin looks like a space, and no label begins or ends with one.
    start = len(text) - len(text.lstrip(" "))
    text = text.strip(" ")
    peaks = [peak for _, peak in path[start : start + len(text)]]
    found = [others.get((line, peak), ()) for peak in peaks]
    alternatives = [[pair for pair in pairs if pair[0] != c] for c, pairs in zip(text, found)]
    sure = [best[peak] for peak in peaks]
    characters = map(Character, text, sure, *extents(peaks, count), alternatives)
    return Reading(text, confidence, list(characters))


def extents(peaks, count):
    """Where characters with these peaks begin and end: two lists, from 0 to 1 of count frames."""
    centres = [(peak + 0.5) / count for peak in peaks]
    between = [(a + b) / 2 for a, b in zip(centres, centres[1:])]
    if not between:
        return [0.0] * len(centres), [1.0] * len(centres)
    first, last = 2 * centres[0] - between[0], 2 * centres[-1] - between[-1]
    return [max(0.0, first), *between], [*between, min(1.0, last)]


def likeliest(log_probs, places, charset):
    """The likely characters at places (line, frame): place -> list of (character, probability)."""
    if not places:
        return {}
    lines, peaks = zip(*places)
    few = min(4, log_probs.shape[2])
    top, classes = log_probs[peaks, lines].exp().topk(few, dim=1)  # (T, N, C) -> both (places, 4)
    found = {}
    for place, *there in zip(places, classes.tolist(), top.tolist()):
        pairs = [(c, p) for c, p in zip(*there) if c != BLANK and p >= MIN_ALTERNATIVE]
        found[place] = [(charset.characters[c - 1], p) for c, p in pairs]
    return found


def text_probability(log_probs, frames, targets):
    """Probability of each target (classes), summed over all its alignments: the CTC loss, undone.

    log_probs: (T, N, C); frames: (N,). Returns N floats.
    """
    lengths = [len(target) for target in targets]
    longest = max(1, *lengths)
    padded = torch.tensor([t + [BLANK + 1] * (longest - len(t)) for t in targets])  # (N, longest)
    lengths = torch.tensor(lengths)
    loss = F.ctc_loss(log_probs, padded, frames, lengths, blank=BLANK, reduction="none")  # (N,)
    return loss.neg().exp().clamp(0, 1).tolist()


def calibrated(confidence, calibration):
    """The share of readings with such a confidence that are right (Platt 1999)."""
    slope, offset = calibration
    confidence = min(max(confidence, 1e-6), 1 - 1e-6)
    return 1 / (1 + math.exp(-slope * math.log(confidence / (1 - confidence)) - offset))


# --------------------------------------------------------------------------------------------------
# Reading


def read_images(model, images, batch_size):
    """Read uint8 tensors (H, W_i) as load_image returns them. Returns a list of Readings."""
    readings = read_once(model, images, batch_size)
    for look in (inverted, smaller, wider):  # the surest reading counts
        unsure = [i for i, reading in enumerate(readings) if reading.confidence < SECOND_LOOK]
        again = [(i, seen) for i in unsure if (seen := look(images[i])) is not None]
        for (i, _), reading in zip(again, read_once(model, [s for _, s in again], batch_size)):
            readings[i] = max(readings[i], reading, key=lambda reading: reading.confidence)
    return [r._replace(confidence=calibrated(r.confidence, model.calibration)) for r in readings]


# Second looks at an image, uint8 (H, W): each returns one (HEIGHT, another width).


def inverted(image):
    """As the other polarity, where so much is ink that it may be the paper; else None."""
    return 255 - image if (image < 128).float().mean() > BOLD else None


def smaller(image):
    """With paper above and below; a character keeps its part of the width."""
    height, width = image.shape
    padded = F.pad(without_margins(image), (0, 0, 5, 1), value=255)  # (rows, width)
    return scaled(padded, width * height / len(padded))


def wider(image):
    """Stretched, for letters that stand close together."""
    height, width = image.shape
    closer = without_margins(image)  # (fewer rows, width)
    return scaled(closer, 1.25 * width * height / len(closer))


def without_margins(image):
    """An image (H, W) with less of high margins above and below: (fewer rows, W)."""
    top, bottom = inked_rows(image.numpy() < FAINT_TONE)
    if not 0 < bottom - top <= 0.75 * len(image):
        return image
    margin = max(1, round(0.18 * (bottom - top)))
    return image[max(0, top - margin) : bottom + margin]


def scaled(image, width):
    """An image, uint8 (any height, any width), brought to (HEIGHT, width)."""
    size = max(PIXELS_PER_FRAME, round(width)), HEIGHT
    resized = Image.fromarray(image.numpy()).resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))


@torch.inference_mode()
def read_once(model, images, batch_size):
    """Read images as they are. Returns Readings in their order, not calibrated."""
    readings = [None] * len(images)
    device = next(model.parameters()).device
    dtype = compute_dtype(device.type)
    # Every new shape costs preparation, and memory that the next cannot use: few shapes.
    multiple = 8 if len(images) > 1 else 1
    for batch in similar_widths([image.shape[1] for image in images], batch_size):
        ink, widths = pad_batch([images[i] for i in batch], multiple)  # (N, 1, H, W), (N,)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, frames = model(ink.to(device), widths)  # (T, N, C), (N,)
        for i, reading in zip(batch, greedy_decode(logits, frames, model.charset)):
            readings[i] = reading
    return readings


def similar_widths(widths, batch_size):
    """Yield lists of up to batch_size indices, by width, so that little is padded."""
    batch = []
    # In small batches more, since one more batch would cost more than the padding.
    for i in sorted(range(len(widths)), key=widths.__getitem__):
        limit = (1.25 if len(batch) >= 8 else 2) * widths[batch[0]] + 8 if batch else math.inf
        if len(batch) == batch_size or widths[i] > limit:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# --------------------------------------------------------------------------------------------------
# Processes: one alone, or several that torchrun started. The first, of rank 0, prints and writes.


def world_size():
    """How many processes there are, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def workers_per_process(number):
    """How many of a machine's worker processes each process on it may have."""
    return number // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def join_processes(backend="gloo"):
    """Meet the others, if there are any; only the first prints from then on."""
    if world_size() > 1:
        # Before the group is there, which the defaults of its functions would hold for good
        import torch.distributed.nn.functional  # noqa: F401, see leave_processes

        dist.init_process_group(backend, timeout=timedelta(days=1))  # drawing millions takes long
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, for good


def wait_for_all():
    """Go on when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def leave_processes():
    """Leave the process group, which nothing may hold any more."""
    # Or gloo's threads may abort a process while the interpreter shuts down (pytorch PR 179291).
    if world_size() > 1:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# Files


@contextmanager
def whole_file(path):
    """Yield a temporary path in the same folder: renamed to path on success, deleted on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path, content):
    """torch.save, whole or not at all."""
    memory = io.BytesIO()  # since on a full disk torch raises a RuntimeError that names no file
    torch.save(content, memory)
    with whole_file(path) as temporary:
        temporary.write_bytes(memory.getbuffer())


def save_checkpoint(path, model):
    """Write all that reading needs, and model.facts, plain values for the log, whole or not at all.

    The weights keep their dtype: model.half() halves the file.
    """
    if not isinstance(model.norms[0], nn.BatchNorm2d):
        raise ValueError("a folded model only reads: load it with learn=True")
    content = dict(format=CHECKPOINT_FORMAT, charset=model.charset.characters, facts=model.facts)
    content |= dict(architecture=model.architecture, calibration=list(model.calibration))
    content["weights"] = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    save_tensors(path, content)


def load_checkpoint(path, device="cpu", learn=False):
    """The CRNN that save_checkpoint wrote, folded for reading, or ready to go on learning.

    Raises InputError, one line, when it is missing, damaged, or not a checkpoint of this project.
    """
    remedy = "run python train_crnn.py first, or set MODEL_PATH (INIT_WEIGHTS) to another"
    if not Path(path).is_file():
        raise InputError(f"no {path}: {remedy}, or start in the project's folder")
    try:
        content = torch.load(path, map_location=device, weights_only=True)  # runs no code of it
        if content["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {content['format']} instead of {CHECKPOINT_FORMAT}")
        model = CRNN(Charset(content["charset"]), **content["architecture"])
        model.load_state_dict(content["weights"])
        model.calibration, model.facts = tuple(content["calibration"]), content["facts"]
    except Exception as error:  # torch.load alone raises pickle, zip, key and runtime errors
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise InputError(f"{path} is not our checkpoint ({reason}): {remedy}") from None
    return model.to(device) if learn else folded(model.to(device))


def read_labels(csv_path):
    """A csv of the data.csv form as a DataFrame of strings: NA, null and 007 stay what they are.

    Raises InputError, one line with the fix, when it is missing, malformed, or lacks a column.
    """
    import pandas as pd  # here, so that reading a single image does not wait for it

    try:
        rows = pd.read_csv(csv_path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        remedy = "check the path, or run python prepare_ocr_dataset.py for datasets/data.csv"
        raise InputError(f"no {csv_path}: {remedy}") from None
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        reason = str(error).strip().replace("\n", " ")
        raise InputError(f"{csv_path} cannot be read: write it as UTF-8 csv ({reason})") from None
    if not isinstance(rows.index, pd.RangeIndex):  # pandas has made the first field an index
        raise InputError(f"{csv_path} has too many fields in a line: quote labels with commas")
    for column in LABEL_COLUMNS:
        if column not in rows.columns:
            wanted = f"its first line must be image_path,label (found: {','.join(rows.columns)})"
            raise InputError(f"{csv_path} has no column {column}: {wanted}")
    if rows.empty:
        raise InputError(f"{csv_path} has no rows: add lines of image_path,label")
    return rows.fillna("")  # a line with too few fields leaves NaN behind


def add_split(rows):
    """Fill in the columns source and split where a csv has none: train, val, test as 8 : 1 : 1."""
    if "source" not in rows:
        rows["source"] = "custom"
    if "split" not in rows:
        # Equal labels go to one split, so that val and test measure texts never trained on; single
        # characters go by their path, since one that is only in the test could not be learned.
        keys = rows.label.where(rows.label.str.len() > 1, rows.image_path)
        places = [zlib.crc32(key.encode()) % 10 for key in keys]
        rows["split"] = [{0: "val", 1: "test"}.get(place, "train") for place in places]
    return rows


# --------------------------------------------------------------------------------------------------
# Scoring and looking

LOOK_ALIKES = {"O": "0", "o": "0", "I": "1", "l": "1", "|": "1"}
LOOK_ALIKES = str.maketrans(LOOK_ALIKES | {c: c.lower() for c in "CKMPSUVWXYZJ"})


def fold_lookalikes(text):
    """One character for those that look alike by hand: {0 O o}, {1 I l |}, and c/C, k/K ..."""
    return text.translate(LOOK_ALIKES)


def score_table(rows, by="source"):
    """Score the predictions of a DataFrame with columns label and prediction by another column.

    Returns a DataFrame, one row a group, the last all. Columns: images; exact, the share read
    without any error; CER, edits over reference characters, summed over the group; single, how
    many labels are one character; folded, the share of those that match with look-alikes folded.
    """
    from rapidfuzz.distance import Levenshtein

    scored = rows[[by]].assign(images=1, exact=rows.label == rows.prediction)
    scored["edits"] = list(map(Levenshtein.distance, rows.label, rows.prediction))
    scored["characters"] = rows.label.str.len()
    scored["single"] = scored.characters == 1
    alike = rows.label.map(fold_lookalikes) == rows.prediction.map(fold_lookalikes)
    scored["folded"] = scored.single & alike
    sums = scored.groupby(by).sum()
    if len(sums) > 1:
        sums.loc["all"] = sums.sum()
    # Sums first and one division at the end: a mean of means would weigh small groups too much.
    sums["exact"] /= sums.images
    sums["CER"] = sums.edits / sums.characters.clip(lower=1)
    sums["folded"] /= sums.single.where(sums.single > 0)
    return sums[["images", "exact", "CER", "single", "folded"]]


def format_score_table(table):
    """The table of score_table as text, shares in percent."""
    percent = dict.fromkeys(["exact", "CER", "folded"], "{:.2%}".format)
    return table.to_string(formatters=percent, na_rep="-", index_names=False)


def calibration_error(confidences, correct, bins=15):
    """Expected calibration error (Guo et al. 2017): the gap of confidence and share of right."""
    confidences, correct = np.array(confidences), np.array(correct, dtype=float)
    places = np.minimum((confidences * bins).astype(int), bins - 1)
    gaps = [abs((confidences - correct)[places == i].sum()) for i in range(bins)]
    return float(sum(gaps) / max(1, len(correct)))


def contact_sheet(path, cells, columns, width=230):
    """Save a sheet of cells to look at: (path, PIL image or None; captions, two (text, colour))."""
    margin, tall, line = 6, 40, 17  # pixels: around a cell, height of an image, of a caption
    height = tall + 2 * line + margin
    ours = Path(__file__).parent / "myFonts" / "DejaVuSans.ttf"  # it has every sign of the charset
    font = ImageFont.truetype(str(ours), 13) if ours.exists() else ImageFont.load_default(13)
    sheet = Image.new("RGB", (columns * width, max(1, -(-len(cells) // columns)) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, captions) in enumerate(cells):
        x, y = i % columns * width + margin, i // columns * height + margin
        if image:
            with open_image(image) as opened:
                image = ImageOps.contain(opened.convert("RGB"), (width - 2 * margin, tall - 2))
            draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline="#bbbbbb")
            sheet.paste(image, (x, y))
        for number, (text, colour) in enumerate(captions):
            draw.text((x, y + tall + number * line), text, font=font, fill=colour)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
