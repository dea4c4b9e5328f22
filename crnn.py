"""What the three scripts share: charset, image to tensor, network, decoding, checkpoint.

An image of one short line of text becomes a grey tensor of HEIGHT rows. A small CNN turns every 4
columns of it into one frame, a bidirectional LSTM reads the frames, and each frame votes for a
character or for the CTC blank. Settings come in as arguments only.

    >>> path = "A--bb-b-oo--tt"  # the best class of each frame, - being the blank
    >>> "".join(c for c, _ in groupby(path) if c != "-")  # merge repeats, then drop blanks
    'Abbot'

Letters in shapes: N images, H height, W width (pixels), T frames, C classes, D features.
"""

import copy
import io
import math
import os
import re
import sys
import tempfile
import zlib
from collections import OrderedDict, defaultdict, namedtuple
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
BLANK = 0  # class of the CTC blank; the characters of a charset follow from class 1

# What the network sees. A checkpoint keeps the values it was trained with, see preprocessing().
HEIGHT = 32  # rows, in pixels; a multiple of 8
PIXELS_PER_FRAME = 4  # horizontal stride of the CNN
PADDING_STEP = 4  # pixels, see padded_width()
SMOOTHING = 0.8  # pixels, radius of a blur where text fills the height: scans have harder edges
MIN_TONES = 40  # of 256 grey levels: less contrast is not stretched, so blank paper stays blank
INK_TONE = 140  # of 256, paper being 255: darker pixels count as ink where a line is measured
MIN_STROKES = 5  # side by side; with fewer there is no pitch to measure
USUAL_PITCH = 8  # pixels from stroke to stroke; tighter lines are stretched, at most 1.5 times
LOW_LINE, USUAL_LINE = 0.36, 0.45  # text under 36 % of the height is zoomed to 45 %

# How it is read
SECOND_LOOK = 0.6  # confidence (not calibrated) below which an image is looked at in other ways
SHORTLIST = 50  # texts of a lexicon, nearest to what is read, that the network chooses from
DOUBT = 1.75  # nats per character that count against texts outside the lexicon or ALLOWED
MIN_ALTERNATIVE = 0.02  # probability below which an alternative is not reported
MAX_ASPECT = 256  # width over height beyond which an image is no line (400 characters have 200)

CHECKPOINT_FORMAT = 3  # raised when an older reader could misunderstand a newer file
UNCALIBRATED = (1.0, 0.0)  # slope and offset that leave a confidence as it is
SPACES = "[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]"  # of any width: all are read as one
# --------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """A mistake the user can fix. Its text is one line: what is wrong and what to do."""


def run(main, *arguments):
    """Run a script's main and exit with its status: the one place where an error becomes a line."""
    if hasattr(sys.stdout, "reconfigure"):  # for a Windows console, and names that are not UTF-8
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    if not arguments and len(sys.argv) > 1:
        print(sys.modules[main.__module__].__doc__, file=sys.stderr)
        print(f"{sys.argv[0]} takes no arguments: edit the constants at its top", file=sys.stderr)
        sys.exit(2)
    status = 1
    try:
        status = main(*arguments)
        print(end="", flush=True)  # a closed pipe fails here and not at exit
    except InputError as error:
        sys.exit(str(error))
    except BrokenProcessPool:
        sys.exit("a worker process died, probably out of memory: lower NUM_WORKERS")
    except BrokenPipeError:  # the program reading our output has quit, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except FileNotFoundError as error:  # missing inputs are InputErrors already
        sys.exit(f"{error.filename} is missing: fetch this project again, and run it in its folder")
    except OSError as error:
        sys.exit(f"cannot write: {error}. Free some space, or set another folder in the constants")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again (train_crnn.py: RESUME = True continues)")
    sys.exit(status)


def usable_cores():
    """How many cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if hasattr(os, "register_at_fork"):  # a forked child would wait for its parent's threads for ever
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


def progress(**options):
    """A tqdm bar that counts images, shown by the first process only and not in log files."""
    return tqdm(unit="img", disable=rank() > 0 or None, **options)


# ---- Charset
class Charset:
    """The characters a model knows: class 0 is the CTC blank, class i is characters[i - 1]."""

    def __init__(self, characters):
        if repeated := [c for c in characters if characters.count(c) > 1]:
            raise InputError(f"the charset holds {describe(repeated[0])} more than once: keep one")
        if not characters:
            raise InputError("the charset is empty: give it at least one character")
        self.characters = characters
        self.index = {c: i for i, c in enumerate(characters, start=1)}
        self.num_classes = len(characters) + 1  # with the blank
        # For each class, the class of its other case (A's for a's), or num_classes if it has none:
        # ς has none, since Σ is the capital of σ
        others = [o if (o := c.swapcase()) != c == o.swapcase() else "" for c in characters]
        self.other_case = [self.num_classes, *(self.index.get(o, self.num_classes) for o in others)]

    def encode(self, label):
        """The classes of a label, ints from 1. InputError names a character it does not hold."""
        if unknown := self.unknown(label):
            raise InputError(f"label {label!r} holds {unknown[0]}, not in the charset")
        return [self.index[c] for c in label]

    def decode(self, classes):
        """The text of classes without blanks; the inverse of encode. ValueError: no such class."""
        if not all(1 <= i < self.num_classes for i in classes):  # Python would take -1 as the last
            raise ValueError(f"{classes} are not all characters (1 to {self.num_classes - 1})")
        return "".join(self.characters[i - 1] for i in classes)

    def unknown(self, label):
        """The characters of a label that the charset does not hold, in their order, described."""
        return [describe(c) for c in label if c not in self.index]


def describe(character):
    """A character with its code point, for messages: 'é' (U+00E9)."""
    return f"{character!r} (U+{ord(character):04X})"


# ---- Image to tensor: the only pixel preprocessing in the repository, for training and for reading
PATHS = str, os.PathLike  # what names a file
CONTENTS = bytes, bytearray, memoryview  # what may be the bytes of one


def load_image(source, turns=0):
    """Read an image of one line of text as dark ink on light paper.

    source: path, PIL image, a file's bytes, a stream, or array (H, W), (H, W, 1, 3 or 4) or, as
    torch has them, (3, H, W), of whole numbers 0 to 255, bool, or floats 0 to 1 or to 255.
    turns: quarter-turns to the left first. Returns a uint8 tensor (HEIGHT, W), 255 = paper,
    0 = the darkest ink. Keeps the aspect ratio, except that closer_view() stretches condensed text
    and crops tall margins. Raises InputError, one line naming the image, when it cannot be read.
    """
    name = str(source) if isinstance(source, PATHS) else f"a {type(source).__name__}"
    shown = name.encode(errors="backslashreplace").decode()
    if shown != name:
        raise InputError(f"{shown}: a name that is not UTF-8, rename the file")
    try:
        with open_image(source) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):  # before its pixels take memory
                raise ValueError(f"{image.size}: too wide for a line of text, cut it into pieces")
            grey = to_grey(ImageOps.exif_transpose(image)).rotate(90 * turns, expand=True)
            if not turns and getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photo
                print(f"{name} has {image.n_frames} pages: the first is read", file=sys.stderr)
        check_lines(grey)
        pixels = scale(grey, *closer_view(scale(grey)))  # first as it is: how large is its text?
    except FileNotFoundError:
        raise InputError(f"{name}: no such file or folder") from None
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image that Pillow reads; save it as PNG") from None
    except Exception as error:  # on a damaged file Pillow raises nearly anything, even SyntaxError
        raise InputError(f"{name}: cannot be read ({error})") from None
    return torch.from_numpy(pixels)  # (HEIGHT, W)


def try_load(source, turns=0):
    """(image, None) as load_image returns it, or (None, the line that says why it cannot)."""
    try:
        return load_image(source, turns), None
    except InputError as error:
        return None, str(error)


def open_image(source):
    """A PIL image of whatever load_image takes."""
    if isinstance(source, Image.Image):
        return source.copy()  # the caller's own stays open
    if isinstance(source, CONTENTS):
        source = io.BytesIO(source)
    if isinstance(source, PATHS) or hasattr(source, "read"):
        return Image.open(source)
    array = np.asarray(source)
    if array.dtype == np.uint8 and array.ndim == 1:  # a file's bytes, as cv2.imencode returns them
        return open_image(array.tobytes())
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3) or not np.isfinite(array).all():
        raise ValueError(f"{array.dtype} {array.shape}: not finite numbers (H, W) or (H, W, 3)")
    if array.ndim == 3 and len(array) < 5 <= array.shape[2]:
        array = array.transpose(1, 2, 0)  # torch's (3, H, W) -> (H, W, 3)
    array = array[..., 0] if array.shape[2:] == (1,) else array  # (H, W, 1) -> (H, W)
    most = array.max(initial=0)
    if array.min(initial=0) < -0.1 * max(most, 1):  # a little is overshoot of resized floats
        raise ValueError("negative numbers: give 0 to 1, or 0 to 255")
    if most > 255 and array.ndim == 2:  # 16-bit tones: to_grey() finds their range
        return Image.fromarray(array.astype(np.float32))
    white = 1 if most <= (1.5 if array.dtype.kind == "f" else 1) else max(most, 255)
    return Image.fromarray(np.clip(array * (255 / white), 0, 255).astype(np.uint8))


def check_lines(grey):
    """Refuse a large picture of so many lines that it must be a page."""
    if min(grey.size) > 1000:  # smaller than a page, ten "lines" are a pattern, not text
        small = np.asarray(grey.resize((200, 400), Image.Resampling.BOX))  # (400, 200)
        inked = (to_dark_on_light(small) < INK_TONE).mean(1) > 0.02  # (400,)
        lines = np.count_nonzero(inked[1:] > inked[:-1])
        if lines > 10:
            raise ValueError(f"some {lines} lines of text: a page, cut its lines out first")


def to_grey(image):
    """Any PIL mode to mode L. Transparent parts become the paper that the ink stands out from."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit, 32-bit and float tones
        tones = np.nan_to_num(np.array(image, dtype=np.float64))
        # How many at either end may be sensor faults
        stray = min(tones.size // 2000 + 1, (tones.size - 1) // 2)
        low, high = np.partition(tones, (stray, -1 - stray), axis=None)[[stray, -1 - stray]]
        low = low if high - low > MIN_TONES / 255 * high else 0.0  # so blank paper stays blank
        return Image.fromarray(np.interp(tones, (low, high), (0, 255)).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        grey = np.asarray(rgb_to_grey(rgba.convert("RGB")), dtype=np.float64)  # (H, W)
        alpha = np.asarray(rgba.getchannel("A")) / 255  # (H, W)
        paper = 255 if (grey * alpha).sum() <= 128 * alpha.sum() else 0
        return Image.fromarray((grey * alpha + paper * (1 - alpha)).round().astype(np.uint8))
    # Via RGB, because Pillow converts CMYK, HSV and others only to that.
    return image.convert("L") if image.mode in ("1", "L") else rgb_to_grey(image.convert("RGB"))


def rgb_to_grey(image):
    """RGB to mode L: luminance or, where that loses the contrast, the colour band with the most."""
    bands = [image.convert("L"), *image.split()]
    small = [np.asarray(b.reduce(max(1, b.height // HEIGHT)), np.float32) for b in bands]  # (H, W)
    near = len(small[0]) // 4 + 1  # columns; pixels farther apart also differ by lighting
    contrasts = [np.square(band[:, near:] - band[:, :-near]).sum() for band in small]
    best = int(np.argmax(contrasts))
    # Plain dark blue on cream gains 1.4 times in red, so ask for twice; and ignore faint tints.
    if contrasts[best] <= max(2 * contrasts[0], small[0].size * MIN_TONES**2 / 4):
        return bands[0]
    return ImageOps.autocontrast(bands[best])


def scale(grey, top=0.0, bottom=1.0, stretch=1.0, smoothing=0.0):
    """A grey PIL image as dark ink on light paper: uint8 (HEIGHT, W).

    top, bottom: first and last row, as parts of the height; stretch: of the width; smoothing:
    radius of a blur, in pixels.
    """
    box = (0, top * grey.height, grey.width, bottom * grey.height)
    width = max(1, round(grey.width * stretch * HEIGHT / (box[3] - box[1])))
    small = grey.resize((width, HEIGHT), Image.Resampling.BICUBIC, box)
    return to_dark_on_light(np.asarray(small.filter(ImageFilter.GaussianBlur(smoothing))))


def to_dark_on_light(grey):
    """Grey uint8 array (H, W) of either polarity to the same with paper at 255, ink down to 0."""
    low, high = int(grey.min()), int(grey.max())
    dark = grey < (low + high) / 2
    # Text covers less than half of its image, so most pixels are paper. When it is a close call
    # (bold strokes, cut tightly), the pixels of the border decide.
    share = np.count_nonzero(dark) / dark.size
    if 0.4 < share < 0.6:
        share = np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]]).mean()
    ink = np.abs(grey.astype(np.float32) - (low if share > 0.5 else high))  # 0 = paper
    return (255 - ink * (255 / max(high - low, MIN_TONES))).round().astype(np.uint8)


def closer_view(image):
    """What scale() takes to bring the text of an image, uint8 (HEIGHT, W), to the usual size.

    Measures the height of the line and the pitch of its strokes. Crops to a low line, stretches
    tight strokes, and blurs the less the smaller the text is. Returns top, bottom, stretch and
    smoothing.
    """
    ink = image < INK_TONE
    top, bottom = inked_rows(ink)
    line = (bottom - top) / HEIGHT
    if not line:  # specks or a lone dot: no size to go by
        return 0.0, 1.0, 1.0, SMOOTHING
    ink = ink[top:bottom]
    starts = np.count_nonzero(ink[:, 1:] > ink[:, :-1], axis=1) + ink[:, 0]  # of each row, (H,)
    strokes = float(np.sort(starts)[-max(1, len(ink) // 3) :].mean())  # in the fullest third
    if strokes < MIN_STROKES:  # do not crop: place and size tell a comma from a quote, c from C
        return 0.0, 1.0, 1.0, SMOOTHING * line
    width = int(np.ptp(np.flatnonzero(ink.any(0)))) + 1  # from the first inked column to the last
    first, last = 0.0, 1.0
    if 1 / 8 <= line < LOW_LINE and width > 2.5 * line * HEIGHT:  # lower is a rule, not a line
        middle, reach = (top + bottom) / 2 / HEIGHT, line / USUAL_LINE / 2
        first, last = max(0.0, middle - reach), min(1.0, middle + reach)
    stretch = min(max(USUAL_PITCH * strokes * (last - first) / width, 1.0), 1.5)
    stretch = stretch if stretch > 1.05 else 1.0  # resampling for so little would only blur
    return first, last, stretch, SMOOTHING * line / (last - first)


def inked_rows(ink):
    """First row of a bool array (H, W) with more ink than specks, and the one after the last."""
    enough = max(1, ink.shape[1] / 100)
    rows = np.flatnonzero(np.count_nonzero(ink, axis=1) >= enough)
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)


def padded_width(width):
    """The width that a line is padded to, with paper: the one rule for training and reading.

    It follows from the line's own width alone, so a line reads the same in any batch.

    >>> [padded_width(w) for w in (1, 64, 65, 700)]
    [8, 64, 80, 768]
    """
    step = PADDING_STEP
    while width > 8 * step:  # at most a fifth is padding; finer steps would make batches smaller
        step *= 2
    # Narrower than 8 pixels, oneDNN's bfloat16 convolutions return garbage (torch 2.14.1, AMX).
    return max(8, math.ceil(width / step) * step)


def pad(image):
    """An image (HEIGHT, W) with paper on its right: (HEIGHT, padded_width(W))."""
    return F.pad(image, (0, padded_width(image.shape[1]) - image.shape[1]), value=255)


def to_ink(images):
    """uint8 tensor, 255 = paper, to the network's input of the same shape, 0 = paper, 1 = ink."""
    return 1 - images.float() / 255


def num_frames(width):
    """How many frames the network makes of a width in pixels."""
    return math.ceil(width / PIXELS_PER_FRAME)


def frames_needed(target):
    """The fewest frames, see num_frames, for a label or target: with fewer, the loss is infinite.

    One for each character, and a blank between equal neighbours (Graves et al. 2006).

    >>> frames_needed("Abbot")
    6
    """
    return len(target) + sum(a == b for a, b in zip(target, target[1:]))


def fits(label, image):
    """Whether an image (HEIGHT, W) has the frames that its label needs."""
    return frames_needed(label) <= num_frames(image.shape[1])


# ---- Network
def convolution(inputs, outputs, kernel, stride=1, padding=0):
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Block(nn.Sequential):
    """A residual convolution over three columns (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, features):
        layer = nn.Conv2d(features, features, (1, 3), padding=(0, 1), bias=False)
        nn.init.zeros_(layer.weight)  # a new block starts as the identity
        super().__init__(OrderedDict(convolution=layer, norm=nn.BatchNorm2d(features)))

    def forward(self, x):
        return F.relu(x + super().forward(x))  # the shape of x


class CRNN(nn.Module):
    """CNN, bidirectional LSTM and a linear layer, after Shi et al. 2015 (arXiv:1507.05717).

    Leaner than theirs: strided convolutions instead of pooling, residual blocks only where one row
    is left, one LSTM layer. The model owns its charset, calibration (slope and offset, see
    calibrated) and facts: plain values about its training.
    """

    def __init__(self, charset, channels, hidden, dropout=0.0, blocks=0):
        super().__init__()
        self.charset, self.calibration, self.facts = charset, UNCALIBRATED, {}
        self.architecture = dict(channels=list(channels), hidden=hidden, blocks=blocks)
        a, b, c, features = channels
        self.cnn = nn.Sequential(
            convolution(1, a, 3, stride=2, padding=1),  # (N, 1, 32, W) -> (N, a, 16, W/2)
            convolution(a, a, 3, padding=1),
            convolution(a, b, 3, stride=2, padding=1),  # -> (N, b, 8, W/4)
            convolution(b, b, 3, padding=1),
            convolution(b, c, 3, stride=(2, 1), padding=1),  # -> (N, c, 4, W/4)
            convolution(c, c, 3, padding=1),
            convolution(c, features, (HEIGHT // 8, 1)),  # all rows at once -> (N, D, 1, W/4)
            *[Block(features) for _ in range(blocks)],
        )
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(features, hidden, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, charset.num_classes)
        self.to(memory_format=torch.channels_last)  # faster on CPUs than channels first

    def features(self, ink):
        """Ink (N, 1, 32, W), 0 = paper, 1 = ink, to features (T, N, D)."""
        x = self.cnn(ink.contiguous(memory_format=torch.channels_last))  # (N, D, 1, T)
        return x.squeeze(2).permute(2, 0, 1)  # (T, N, D)

    def sequence(self, features):
        """Features (T, N, D) to logits (T, N, C)."""
        x, _ = self.lstm(self.dropout(features))  # (T, N, 2 * hidden)
        return self.linear(self.dropout(x))  # (T, N, C)

    def forward(self, ink):
        """Ink (N, 1, 32, W), 0 = paper, 1 = ink, to logits (T, N, C)."""
        return self.sequence(self.features(ink))


def folded(model):
    """A copy of a CRNN that only reads: each batch norm is folded into its convolution."""
    model = copy.deepcopy(model).eval()
    for layer in model.cnn:
        layer[0], layer[1] = fuse_conv_bn_eval(layer[0], layer[1]), nn.Identity()
    return model.to(memory_format=torch.channels_last)


def usable_device(name):
    """The torch.device of that name. InputError if this machine has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"DEVICE = {name!r}: set cpu ({str(error).splitlines()[0]})") from None


def compute_dtype(device_type, precision=None):
    """The dtype of that name; None: bfloat16 where it is native, else float32."""
    if precision:
        if precision not in ("bfloat16", "float32"):
            raise InputError(f"PRECISION = {precision!r}: set bfloat16, float32 or None")
        return getattr(torch, precision)
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float32
    can = getattr(torch.cpu, "get_capabilities", dict)() if device_type == "cpu" else {}
    return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32


# ---- Decoding
class Character(NamedTuple):
    """One character of a Reading, and what else it could be."""

    character: str
    confidence: float  # its probability in the frame it is read from
    alternatives: list  # (character, probability) of others in the same place, likeliest first


class Reading(NamedTuple):
    """What the network read in one image."""

    text: str
    confidence: float  # probability that the text is right, calibrated where the model is
    characters: list  # a Character for each of text; none where the text is from a lexicon
    unrestricted: str | None = None  # what was read without the lexicon, where there is one


def greedy_decode(logits, charset):
    """Best class per frame, repeats merged, blanks dropped: best path of Graves et al. 2006.

    logits: (T, N, C). Returns N Readings, uncalibrated.
    """
    log_probs = logits.detach().float().log_softmax(2).cpu()  # (T, N, C)
    best, classes = (tensor.T.tolist() for tensor in log_probs.max(2))  # N lists of T, both
    targets, peaks = [], []
    for path, sure in zip(classes, best):
        runs = groupby(range(len(path)), key=path.__getitem__)  # repeats are one character
        peaks.append([max(frames, key=sure.__getitem__) for c, frames in runs if c != BLANK])
        targets.append([path[frame] for frame in peaks[-1]])  # each where it is surest
    confidences = text_log_probability(log_probs, targets).exp().clamp(0, 1).tolist()
    lines = zip(log_probs.unbind(1), targets, peaks, confidences)
    return [make_reading(charset, *line) for line in lines]


def make_reading(charset, log_probs, target, peaks, confidence):
    """A Reading of a line: log_probs (T, C), the classes read, and the frame of each."""
    probabilities = log_probs[peaks].exp()  # (characters, C)
    likeliest = probabilities.topk(min(4, probabilities.shape[1]))  # (characters, 4)
    text, characters = charset.decode(target), []
    for c, classes, shares in zip(text, likeliest.indices.tolist(), likeliest.values.tolist()):
        likely = {charset.characters[i - 1]: p for i, p in zip(classes, shares) if i != BLANK}
        others = [(o, p) for o, p in likely.items() if o != c and p >= MIN_ALTERNATIVE]
        characters.append(Character(c, shares[0], others))  # what is read is the likeliest
    # A wide margin looks like a space, and no label begins or ends with one.
    kept = slice(len(text) - len(text.lstrip(" ")), len(text.rstrip(" ")))
    return Reading(text.strip(" "), confidence, characters[kept])


def text_log_probability(log_probs, targets):
    """The log of the probability of each text, summed over all its alignments: -CTC loss.

    log_probs: (T, N, C); targets: N lists of classes. Returns (N,).
    """
    frames, lengths = [len(log_probs)] * len(targets), list(map(len, targets))
    flat = torch.tensor(sum(targets, []), dtype=torch.long)  # (sum of lengths,)
    return -F.ctc_loss(log_probs, flat, frames, lengths, blank=BLANK, reduction="none")  # (N,)


def mean_log_probability(looks, targets):
    """The log of the probability of each text, on average over some Looks: (texts,)."""
    each = [look.log_probs[:, None].expand(-1, len(targets), -1) for look in looks]  # (T, texts, C)
    scores = [text_log_probability(log_probs, targets) for log_probs in each]  # (texts,) each
    return torch.stack(scores).logsumexp(0) - math.log(len(looks))  # (texts,)


def calibrated(confidence, calibration):
    """The share of readings with this raw confidence that are right (Platt 1999)."""
    slope, offset = calibration
    confidence = min(max(confidence, 1e-6), 1 - 1e-6)
    return 1 / (1 + math.exp(-slope * math.log(confidence / (1 - confidence)) - offset))


# ---- What the user knows: which characters can occur, or which texts
# What an image can show. taken_for, (C,): where each class's probability goes, C for nowhere; None:
# all characters are allowed; lexicon: the texts it can show; none: any; lowered: in lower case
Known = namedtuple("Known", "taken_for lexicon lowered", defaults=[None, (), ()])


def know(charset, allowed=None, lexicon=None):
    """The Known of the characters that are allowed, a string; None: all that the charset holds.

    If only one case of a letter is allowed, the other is read as it; what seems to show anything
    else gets confidence 0. lexicon: texts, or a file with one per line; None: any. Texts with other
    characters are left out, five of them named. InputError: none left, no such character or file.
    """
    allowed = normalize("NFC", "".join(map(str, "" if allowed is None else allowed)))
    if unknown := charset.unknown(allowed):
        raise InputError(f"ALLOWED has {unknown[0]}, which the model does not know: take it out")
    taken_for, can = None, set(charset.index)
    if allowed.strip():
        kept, nothing = {c: charset.index[c] for c in allowed}, charset.num_classes
        classes = [kept.get(c, kept.get(c.swapcase(), nothing)) for c in charset.characters]
        taken_for = torch.tensor([BLANK, *classes])  # (C,)
        can &= set(allowed + allowed.swapcase())
    if lexicon is None or isinstance(lexicon, str) and not lexicon:
        return Known(taken_for)
    texts = read_lexicon(lexicon)
    left_out = [text for text in texts if not set(text) <= can]
    reason = "the model does not know" if taken_for is None else "ALLOWED lacks"
    for text in left_out[:5]:
        names = " ".join(map(describe, sorted(set(text) - can)))
        print(f"LEXICON: {text!r} is left out, {reason} {names}", file=sys.stderr)
    if len(left_out) > 5:
        print(f"LEXICON: {len(left_out):,} texts are left out in all", file=sys.stderr)
    texts = tuple(text for text in texts if set(text) <= can)
    if not texts:
        raise InputError("LEXICON has no text left (see any lines above): give one per line")
    return Known(taken_for, texts, tuple(map(str.lower, texts)))


def read_lexicon(lexicon):
    """The texts of a lexicon, a list or the path of a file, each once and in one spelling."""
    if isinstance(lexicon, PATHS):
        try:
            lexicon = Path(lexicon).read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise InputError(f"LEXICON: no file {lexicon}; texts themselves go in a list") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"LEXICON: {lexicon} is not a text file in UTF-8 ({error})") from None
    texts, kinds = list(lexicon), (str, int, np.integer)  # an iterator is read once
    if isinstance(lexicon, CONTENTS) or not all(isinstance(text, kinds) for text in texts):
        raise InputError("LEXICON must be a file with a text per line, or a list of texts")
    texts = [normalize("NFC", re.sub(SPACES, " ", str(text))).strip() for text in texts]
    return list(dict.fromkeys(filter(None, texts)))


def find_in_lexicon(looks, charset, reading, known):
    """The Reading of the likeliest known text over some Looks (Shi et al. 2015, part 2.3).

    Case is ignored, since people write PARIS where a list has Paris, except to tell apart texts
    that differ in nothing else. reading: what is read in the Looks without the lexicon.
    """
    how = dict(scorer=Levenshtein.distance, limit=SHORTLIST)
    lowered, distances, places = zip(*process.extract(reading.text.lower(), known.lowered, **how))
    texts = [known.lexicon[i] for i in places]
    targets = [charset.encode(text) for text in (*texts, reading.text)]
    any_case = [look._replace(log_probs=add_cases(look.log_probs, charset)) for look in looks]
    # Both cases as one class, so that Aaron needs a blank between its As; else Aron fits as well
    one_case = [[min(c, charset.other_case[c]) for c in target] for target in targets[:-1]]
    scores = mean_log_probability(any_case, one_case)  # (texts,)
    if any(frames_needed(a) > frames_needed(b) for a, b in zip(one_case, targets)):
        scores = scores.maximum(mean_log_probability(looks, targets[:-1]))  # Aa without a blank
    if len(set(lowered)) < len(lowered):  # a text's share among its twins, as they are written
        twins = torch.tensor([[a == b for b in lowered] for a in lowered])  # (texts, texts)
        as_written = mean_log_probability(looks, targets[:-1]).where(twins, -math.inf)
        scores += as_written.log_softmax(1).diagonal().nan_to_num()
    best = int(scores.argmax())
    if scores[best] == -math.inf:  # all are too long
        return Reading("", 0.0, [], unrestricted=reading.text)
    # The text read without the lexicon competes too, unless listed: the image may show that.
    doubt = DOUBT * max(1, min(len(texts[best]), len(reading.text))) if distances[0] else math.inf
    other = mean_log_probability(looks, targets[-1:]) - doubt  # (1,)
    confidence = float(torch.cat([scores, other]).softmax(0)[best])
    return Reading(texts[best], confidence, [], unrestricted=reading.text)


def add_cases(log_probs, charset):
    """log_probs (T, C) with each letter given the sum of its two cases; they now sum to over 1."""
    padded = F.pad(log_probs, (0, 1), value=-math.inf)  # (T, C + 1)
    return torch.logaddexp(log_probs, padded[:, charset.other_case])  # (T, C)


# ---- Reading
# What the network sees in an image, looked at in one way: a Reading; log_probs, (T, C); forbidden:
# the nats that its frames lose in all to what is not allowed
Look = namedtuple("Look", "reading log_probs forbidden", defaults=[0.0])


def read_images(model, images, batch_size, known=None):
    """Read uint8 tensors (HEIGHT, W_i) as load_image returns them. Returns a list of Readings.

    known: what each can show, a list of Known; None: anything.
    """
    known = known or [Known()] * len(images)
    looks = [[look] for look in look_at(model, images, batch_size, known)]  # of each image
    unsure = [i for i, (look,) in enumerate(looks) if is_unsure(images[i], look.reading)]
    # All other ways at once, for larger batches
    views = [(i, change(images[i])) for change in SECOND_LOOKS for i in unsure]
    views = [(i, view) for i, view in views if view is not None]
    others = look_at(model, [v for _, v in views], batch_size, [known[i] for i, _ in views])
    for (i, _), look in zip(views, others):
        looks[i].append(look)
    return [choose_reading(model, *each) for each in zip(images, looks, known)]


def is_unsure(image, reading):
    """Whether to look again: unsure, or ink but no text, as with very bold letters."""
    return reading.confidence < SECOND_LOOK or (not reading.text and (image < INK_TONE).any())


@torch.inference_mode()
def look_at(model, images, batch_size, known):
    """The Looks of images as they are, in their order."""
    looks, groups = [None] * len(images), defaultdict(list)  # of one padded width each
    for i, image in enumerate(images):
        groups[padded_width(image.shape[1])].append(i)
    batches = [g[i : i + batch_size] for g in groups.values() for i in range(0, len(g), batch_size)]
    device = next(model.parameters()).device
    dtype = compute_dtype(device.type)
    for batch in batches:
        ink = to_ink(torch.stack([pad(images[i]) for i in batch]))[:, None]  # (N, 1, H, W)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            log_probs = model(ink.to(device)).float().log_softmax(2).cpu()  # (T, N, C)
        forbidden = [0.0] * len(batch)
        for n, i in enumerate(batch):
            if known[i].taken_for is not None:
                sums = torch.zeros(len(log_probs), log_probs.shape[2] + 1)  # (T, C + 1)
                sums.index_add_(1, known[i].taken_for, log_probs[:, n].exp())
                allowed = sums[:, :-1].log()  # (T, C)
                log_probs[:, n] = allowed.log_softmax(1)
                forbidden[n] = -float(allowed.logsumexp(1).sum())
        readings = greedy_decode(log_probs, model.charset)
        for i, *look in zip(batch, readings, log_probs.unbind(1), forbidden):
            looks[i] = Look(*look)
    return looks


def choose_reading(model, image, looks, known):
    """The calibrated Reading of an image: of what its Looks read, the likeliest on average."""
    look, reading = looks[0], looks[0].reading
    if len(looks) > 1:
        texts = list(dict.fromkeys(look.reading.text for look in looks))
        scores = mean_log_probability(looks, list(map(model.charset.encode, texts)))  # (texts,)
        look = next(look for look in looks if look.reading.text == texts[scores.argmax()])
        reading = look.reading._replace(confidence=min(1.0, float(scores.max().exp())))
    in_parts = reading.text and set(reading.text) <= set("=:;÷")  # their parts look like two lines
    other = look.forbidden > DOUBT * max(1, len(reading.text))  # not what is known
    other |= not in_parts and count_lines(image) > 1
    from_edge_to_edge = (image[:, [0, -1]] < INK_TONE).any(0).all()
    if set(reading.text) <= {"_", " "} and from_edge_to_edge:  # a ruled line
        reading = reading._replace(text="", characters=[])
    if known.lexicon and (reading.text or looks_written(image)):  # on blank paper, no text
        found = find_in_lexicon(looks, model.charset, reading, known)
        return found._replace(confidence=0.0) if other else found  # relative to the other texts
    if other or not reading.text and looks_written(image):
        return reading._replace(confidence=0.0)
    return reading._replace(confidence=calibrated(reading.confidence, model.calibration))


def count_lines(image):
    """How many bands of inked rows in an image (HEIGHT, W) are tall enough to be lines."""
    inked = (image < INK_TONE).any(1).numpy()  # (HEIGHT,)
    bands = np.flatnonzero(np.diff(inked, prepend=False, append=False)).reshape(-1, 2)  # from, to
    heights = bands[:, 1] - bands[:, 0]
    highest = heights.max(initial=0)
    bands = bands[heights >= max(4, 0.7 * highest)]  # below 4 rows: a ruled line
    gaps = bands[1:, 0] - bands[:-1, 1]
    # Bands closer than this are parts of one line, such as a 1 in seven segments.
    return len(bands[:1]) + np.count_nonzero(gaps >= highest / 3)


def looks_written(image):
    """Whether an image (HEIGHT, W) has strokes side by side, or one above the other: a column."""
    ink = (image < INK_TONE).numpy()
    strokes = np.count_nonzero(ink[:, 1:] > ink[:, :-1], axis=1)  # (HEIGHT,)
    beside = (strokes > 2).mean() > 0.25  # a box has two upright edges
    above = ink.shape[1] < HEIGHT / 2 and ink.mean() > 0.1
    return bool((beside or above) and ink.mean() < 0.4)  # denser "ink" is the grain of paper


def invert(image):
    """The image inverted, if it has so much ink that the ink may be the paper; else None."""
    return 255 - image if (image < 128).float().mean() > 0.2 else None  # most text has less


def shrink(image):
    """An image (HEIGHT, W) without tall margins, with 6 more rows of paper: (HEIGHT, new W)."""
    top, bottom = inked_rows(image.numpy() < 155)  # lighter than INK_TONE: keeps faint ink
    if 0 < bottom - top <= 0.75 * HEIGHT:
        margin = max(1, round(0.18 * (bottom - top)))  # about that of a line that fills its image
        image = image[max(0, top - margin) : bottom + margin]  # (fewer rows, W)
    return resize(F.pad(image, (0, 0, 5, 1), value=255))  # (HEIGHT, new W)


def resize(image, stretch=1.0, slant=0.0):
    """An image (rows, W), uint8, scaled to HEIGHT rows, and then in width by stretch.

    slant: columns per row that its letters then lean to the right.
    """
    width = max(PIXELS_PER_FRAME, round(image.shape[1] * stretch * HEIGHT / len(image)))
    resized = Image.fromarray(image.numpy()).resize((width, HEIGHT), Image.Resampling.BICUBIC)
    if slant:
        room = math.ceil(abs(slant) * HEIGHT)  # for corners that move out
        backwards = 1, slant, -slant * HEIGHT / 2 - room / 2, 0, 1, 0  # about the middle row
        how = (width + room, HEIGHT), Image.Transform.AFFINE, backwards, Image.Resampling.BICUBIC
        resized = resized.transform(*how, fillcolor=255)
    return torch.from_numpy(np.array(resized))  # (HEIGHT, width and any room)


# The other ways; what each gains is in tests/results.csv
SECOND_LOOKS = [invert, shrink, partial(resize, stretch=0.8), partial(resize, stretch=1.2)]
SECOND_LOOKS += [partial(resize, slant=-0.2), partial(resize, slant=0.2)]


# ---- Processes: one alone, or several of torchrun. The first, of rank 0, prints and writes.
def world_size():
    """How many processes there are, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


# ---- Files
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


def check_output(path, constant):
    """Fail now, not after the work, if path cannot be written. InputError if it names no file."""
    if not Path(path or "").name or Path(path).is_dir():
        raise InputError(f"{constant} = {path!r} is no file: give it the name of one")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=Path(path).parent).close()


def save_tensors(path, content):
    """torch.save, whole or not at all."""
    memory = io.BytesIO()  # since on a full disk torch raises a RuntimeError that names no file
    torch.save(content, memory)
    with whole_file(path) as temporary:
        temporary.write_bytes(memory.getbuffer())


def preprocessing():
    """The constants that decide what the network sees, by name."""
    names = "HEIGHT PIXELS_PER_FRAME PADDING_STEP SMOOTHING MIN_TONES INK_TONE MIN_STROKES "
    names += "USUAL_PITCH LOW_LINE USUAL_LINE"
    return {name: globals()[name] for name in names.split()}


def save_checkpoint(path, model):
    """Write all that reading needs, and model.facts, whole or not at all.

    The weights keep their dtype: model.half() halves the file.
    """
    if not isinstance(model.cnn[0][1], nn.BatchNorm2d):
        raise ValueError("a folded model only reads: load it with learn=True")
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    content = dict(format=CHECKPOINT_FORMAT, charset=model.charset.characters, facts=model.facts)
    content |= dict(architecture=model.architecture, calibration=list(model.calibration))
    save_tensors(path, content | dict(preprocessing=preprocessing(), weights=weights))


def load_checkpoint(path, device="cpu", learn=False):
    """The CRNN that save_checkpoint wrote, folded for reading, or with learn=True to train on.

    Raises InputError, one line, when it is missing, damaged, not a checkpoint of this project, or
    trained with other preprocessing.
    """
    remedy = "run python train_crnn.py first, or set MODEL_PATH (INIT_WEIGHTS) to another"
    if not Path(path).is_file():
        raise InputError(f"no {path}: {remedy}, or start in the project's folder")
    device = usable_device(device)
    try:
        content = torch.load(path, map_location=device, weights_only=True)  # runs no code of it
        if content["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {content['format']} instead of {CHECKPOINT_FORMAT}")
        for name, value in preprocessing().items():
            if (was := content["preprocessing"].get(name)) != value:
                kept = f"it learned with {name} = {was}, crnn.py has {value}"
                raise ValueError(f"{kept}: set it back, or train again")
        model = CRNN(Charset(content["charset"]), **content["architecture"])
        model.load_state_dict(content["weights"])
        model.calibration, model.facts = tuple(content["calibration"]), content["facts"]
    except Exception as error:  # torch.load alone raises pickle, zip, key and runtime errors
        reason = re.split(r"\n|\. ", f"{type(error).__name__} {error}")[0]  # not torch's advice
        raise InputError(f"{path} is no checkpoint for this code ({reason}): {remedy}") from None
    return model.to(device) if learn else folded(model.to(device))


def read_labels(csv_path):
    """A csv like data.csv as a DataFrame of strings: NA, null and 007 stay what they are.

    Raises InputError, one line with the fix, when it is missing, malformed, or lacks a column.
    """
    import pandas as pd  # here, so that recognize() from Python does not wait for it

    try:
        how = dict(na_filter=False, encoding="utf-8-sig", skipinitialspace=True)
        rows = pd.read_csv(csv_path, dtype=str, **how)  # fields that a line lacks are ""
    except FileNotFoundError:
        remedy = "check the path, or run python prepare_ocr_dataset.py for datasets/data.csv"
        raise InputError(f"no {csv_path}: {remedy}") from None
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        reason = " ".join(f"cannot be read ({error})".split())
        remedy = "write UTF-8, commas between fields, and quotes around fields with commas"
        raise InputError(f"{csv_path} {reason}: {remedy}") from None
    rows = rows.rename(columns=lambda name: name.strip().lower().removesuffix(".1"))
    if rows.columns.has_duplicates:  # as Label and label are now, or label and pandas' label.1
        raise InputError(f"{csv_path} names a column twice: {','.join(rows.columns)}")
    if lacking := {"image_path", "label"} - set(rows.columns):  # data.csv adds source and split
        wanted = f"its first line must be image_path,label, not {','.join(rows.columns)}"
        raise InputError(f"{csv_path} has no column {min(lacking)}: {wanted}")
    if not isinstance(rows.index, pd.RangeIndex):  # pandas has made the first field an index
        raise InputError(f"{csv_path} has too many fields in a line: quote labels with commas")
    rows = rows.assign(label=clean(rows.label, csv_path))
    rows = rows[(rows != "").any(axis=1)].reset_index(drop=True)  # without Excel's empty lines
    if rows.empty:
        raise InputError(f"{csv_path} has no rows: add lines of image_path,label")
    return rows


def clean(labels, csv_path):
    """Labels (a Series) in one Unicode form, no spaces at the ends: images show neither."""
    labels = labels.str.replace(SPACES, " ", regex=True).str.strip(" \t\u200b\ufeff")
    broken = labels.str.contains("[\n\r\x85\u2028\u2029]")
    if broken.any():
        place = f"{csv_path}, row {broken.argmax() + 1}: a label of several lines"
        raise InputError(f'{place}: close its quotation mark; one within a label is written as ""')
    return labels.map(partial(normalize, "NFC"))  # é may be one code point or two


def image_paths(rows, csv_path):
    """Where the images of read_labels are: paths start at the csv's folder, \\ may stand for /."""
    folder = Path(csv_path).parent
    paths = [folder / path for path in rows.image_path]
    others = [folder / path.strip().replace("\\", "/") for path in rows.image_path]
    return [a if a == b or a.exists() else b for a, b in zip(paths, others)]


def write_labels(rows, csv_path, encoding="utf-8"):
    """Write a DataFrame so that read_labels finds the same strings again; whole or not at all."""
    with whole_file(csv_path) as temporary:  # 1: quote all
        rows.to_csv(temporary, index=False, quoting=1, lineterminator="\n", encoding=encoding)


def split_of(key, parts=20):
    """The split of a word, a writer or a label: one in so many parts is val, and one is test.

    By a hash of its lower-case letters: no test word is trained on in another case.
    """
    return {0: "val", 1: "test"}.get(zlib.crc32(key.lower().encode()) % parts, "train")


def add_split(rows):
    """Fill in the columns source and split where a csv has none: train, val, test as 8 : 1 : 1."""
    rows = rows.assign(source=rows.get("source", "custom"), split=rows.get("split", ""))
    # All images of a label go to one split, so val and test hold texts never trained on. But a
    # character, or a label with many images (on, off), must be learned: those go one by one.
    many = rows.groupby("label").label.transform("size") >= 10
    keys = rows.label.where((rows.label.str.len() > 1) & ~many, rows.image_path)
    given = rows["split"].str.strip().str.lower()
    return rows.assign(split=[split or split_of(key, 10) for split, key in zip(given, keys)])


# ---- Scoring
def score_table(rows, by="source"):
    """Score the predictions of a DataFrame with columns label and prediction by another column.

    Returns a DataFrame, one row a group, the last all. Columns: images; exact, the share read
    without any error; ±, half of its 95 % interval; CER, edits over reference characters, summed
    over the group.
    """
    import pandas as pd

    edits = list(map(Levenshtein.distance, rows.label, rows.prediction))
    scored = rows[[by]].assign(images=1, exact=rows.label == rows.prediction, edits=edits)
    sums = scored.assign(characters=rows.label.str.len()).groupby(by).sum()
    if len(sums) > 1:
        sums = pd.concat([sums, sums.sum().to_frame("all").T])
    # Sums first and one division at the end: a mean of means would weigh small groups too much.
    sums["exact"] /= sums.images
    # Wilson's interval (1927): agrees with a bootstrap over the images, and holds near 0 and 1
    n, z = sums.images, 1.96
    sums["±"] = z * (sums.exact * (1 - sums.exact) / n + (z / n / 2) ** 2) ** 0.5 / (1 + z * z / n)
    sums["CER"] = sums.edits / sums.characters.clip(lower=1)
    return sums[["images", "exact", "±", "CER"]]


def format_score_table(table):
    """The table of score_table as text, shares in percent."""
    percent = {"exact": "{:.2%}".format, "±": "{:.1%}".format, "CER": "{:.2%}".format}
    return table.to_string(formatters=percent, index_names=False)


def calibration_error(confidences, correct):
    """Expected calibration error (Guo et al. 2017): the mean gap of confidence and accuracy."""
    gaps = np.array(confidences) - np.array(correct, dtype=float)
    sums, _ = np.histogram(confidences, bins=15, range=(0, 1), weights=gaps)
    return float(np.abs(sums).sum() / max(1, len(gaps)))
