"""What the three scripts must agree on: charset, image to tensor, the CRNN, greedy CTC decoding, the checkpoint, scoring.

A picture of a short line of text becomes a grey tensor of HEIGHT rows; a small CNN turns every 4 columns of it into one
frame; a bidirectional LSTM reads the frames in both directions; connectionist temporal classification (CTC) aligns them with
the text. Functions here take arguments only: the constants that a user edits are at the top of the scripts.

Letters in shapes: N images, H height, W width in pixels, T frames (one per 4 pixels of width), C classes, D features.
"""
import copy
import csv
import importlib.util
import io
import math
import os
import sys
import warnings
import zlib
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

BLANK = 0  # index of the CTC blank; the characters of a charset follow from index 1
HEIGHT = 32  # rows of the tensor that the network sees, in pixels; a multiple of 8
PIXELS_PER_FRAME = 4  # horizontal stride of the CNN
MAX_ASPECT = 256  # width over height beyond which a picture is no line of text (a 400-character line has about 200)
MIN_TONES = 40  # of 256 grey levels; a fainter picture is not stretched further, so that a blank one stays blank
USUAL_PITCH = 8  # pixels of width from stroke to stroke; a line in which they stand closer is widened, by half as much again at most
LOW_LINE, USUAL_LINE = 0.36, 0.45  # parts of the height; a line of text lower than the first is brought nearer until it has the second
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
LABEL_COLUMNS = ["image_path", "label"]  # the two that any csv must have; data.csv adds source and split
CHECKPOINT_FORMAT = 1  # raised when an older reader could misunderstand a newer file


# ---------------------------------------------------------------------------------------------------------------------
# Charset

class Charset:
    """The characters a model knows, in the order of its output classes: class 0 is the CTC blank, class i is characters[i-1].

    Raises ValueError when a character stands twice, or where there is none at all.
    """

    def __init__(self, characters):
        repeated = sorted({c for c in characters if characters.count(c) > 1})
        if repeated:
            raise ValueError(f"the charset holds {describe(repeated[0])} more than once: keep one")
        if not characters:
            raise ValueError("the charset is empty")
        self.characters = characters
        self.index = {c: i for i, c in enumerate(characters, start=1)}
        self.num_classes = len(characters) + 1  # with the blank

    def encode(self, label):
        """The class indices of a label, a list of ints >= 1. Raises ValueError naming a character that is not in the charset."""
        unknown = self.unknown(label)
        if unknown:
            raise ValueError(f"label {label!r} holds {describe(unknown[0])}, which is not in the charset")
        return [self.index[c] for c in label]

    def decode(self, indices):
        """The text of class indices without blanks; the inverse of encode. Raises ValueError for an index that is no character."""
        for i in indices:
            if not 1 <= i <= len(self.characters):
                raise ValueError(f"class {i} is no character of the charset (1 to {len(self.characters)})")
        return "".join(self.characters[i - 1] for i in indices)

    def unknown(self, label):
        """The characters of a label that the charset does not hold, in their order of appearance."""
        return [c for c in label if c not in self.index]


def describe(character):
    """A character with its code point, for messages: 'é' (U+00E9)."""
    return f"{character!r} (U+{ord(character):04X})"


# ---------------------------------------------------------------------------------------------------------------------
# Picture to tensor. This is the only pixel preprocessing in the repository, the same for training and for reading.

def load_image(source, height=HEIGHT):
    """Read a picture of one line of text as dark ink on light paper.

    source: path, PIL image, or array (H, W) or (H, W, 3 or 4) of uint8, bool, or floats from 0 to 1.
    Returns a uint8 tensor (height, W), 255 = paper, 0 = the darkest ink. The aspect ratio is kept but where text is condensed,
    and all of the picture but paper far above and below the text, see closer_view.
    Raises ValueError with one line naming the picture when it cannot be opened, is empty, or is far too wide for a line.
    """
    name = f"{source}" if isinstance(source, (str, os.PathLike)) else f"picture of type {type(source).__name__}"
    try:
        with open_image(source) as image:
            check_size(image)
            grey = to_grey(ImageOps.exif_transpose(image))
        ink = at_height(grey, height)
        view = closer_view(ink)
        if view:
            ink = at_height(grey, height, *view)
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not a picture in a format that Pillow reads") from None
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, MemoryError, Image.DecompressionBombError) as error:
        # The exceptions that Pillow's decoders raise for damaged files; a SyntaxError is what its PNG reader raises.
        raise ValueError(f"{name}: cannot be read ({error})") from None
    return torch.from_numpy(ink)  # (height, W)


def at_height(grey, height, top=0.0, bottom=1.0, widen=1.0):
    """The part of a grey PIL picture between top and bottom, from 0 to 1 of its height, as dark_on_light returns it, (height, W)."""
    box = (0, top * grey.height, grey.width, bottom * grey.height)
    width = max(1, round(grey.width * widen * height / (box[3] - box[1])))
    return dark_on_light(np.asarray(grey.resize((width, height), Image.Resampling.BICUBIC, box)))


def closer_view(picture):
    """What to change about a picture, uint8 (H, W), 255 = paper, before it is read: top, bottom and widen of at_height; None: nothing.

    Text is easiest to read at the size and pitch that most of it has: small text between high margins is brought nearer,
    and condensed text widened. Both only where there are at least 5 strokes side by side, and lines higher than an eighth of
    the picture, since the place of a single character tells a comma from a quote and c from C.
    """
    height, ink = len(picture), picture < 140
    top, bottom = inked_rows(ink)
    if top == bottom:
        return None
    rows = ink[top:bottom]
    columns = np.flatnonzero(rows.any(0))
    width, line = int(columns[-1] - columns[0]) + 1, bottom - top
    starts = np.count_nonzero(rows[:, 1:] > rows[:, :-1], axis=1) + rows[:, 0]  # of strokes in every row
    strokes = float(np.sort(starts)[-max(1, line // 3):].mean())
    if strokes < 5:
        return None
    first, last = 0.0, 1.0
    if height / 8 <= line < LOW_LINE * height and width > 2.5 * line:
        middle, reach = (top + bottom) / 2 / height, line / USUAL_LINE / 2 / height
        first, last = max(0.0, middle - reach), min(1.0, middle + reach)
    widen = min(max(USUAL_PITCH * strokes * (last - first) / width, 1.0), 1.5)
    return (first, last, widen) if widen > 1.05 or last - first < 1 else None


def inked_rows(ink):
    """The first row with ink in more than specks and the one after the last, of a bool array (H, W); 0, 0 where there is none."""
    rows = np.flatnonzero(np.count_nonzero(ink, axis=1) >= max(1, ink.shape[1] / 100))
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)


def open_image(source):
    if isinstance(source, (str, os.PathLike)):
        return Image.open(source)
    if isinstance(source, Image.Image):
        return source.copy()
    array = np.asarray(source)
    if array.dtype == bool or np.issubdtype(array.dtype, np.floating):
        array = (np.clip(array, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(array)


def check_size(image):
    if 0 in image.size:
        raise ValueError(f"{image.width} x {image.height} pixels: empty")
    # Asked before the pixels are decoded. A picture turned by its EXIF tag may be tall here and wide afterwards.
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: too wide for a line of text, cut it into pieces")


def to_grey(image):
    """Any PIL mode to mode L; transparent parts become paper, white or black, whichever the visible ink stands out from."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit, 32-bit and float tones: stretched over 8 bits
        tones = np.asarray(image, dtype=np.float64)
        low, high = tones.min(), tones.max()
        return Image.fromarray(((tones - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float64)  # (H, W, 4)
        grey, alpha = rgba[..., :3] @ (0.299, 0.587, 0.114), rgba[..., 3] / 255  # both (H, W)
        ink = (grey * alpha).sum() / max(alpha.sum(), 1e-9)
        paper = 255 if ink < 128 else 0
        return Image.fromarray((grey * alpha + paper * (1 - alpha)).round().astype(np.uint8))
    return image.convert("RGB").convert("L") if image.mode not in ("1", "L") else image.convert("L")


def dark_on_light(grey):
    """Grey uint8 array (H, W) of either polarity to the same picture with paper at 255 and the darkest ink at 0.

    Text covers less than half of its picture, so the tone of most pixels is the paper; when it is a close call (bold
    strokes cut tightly), the pixels of the border decide.
    """
    low, high = int(grey.min()), int(grey.max())
    dark = grey < (low + high) / 2
    share = np.count_nonzero(dark) / dark.size
    if 0.4 < share < 0.6:
        share = np.concatenate([dark[0], dark[-1], dark[:, 0], dark[:, -1]]).mean()
    if share > 0.5:
        grey, low, high = 255 - grey, 255 - high, 255 - low
    stretched = 255 - (high - grey.astype(np.float32)) * (255 / max(high - low, MIN_TONES))
    return stretched.round().astype(np.uint8)


def to_ink(images):
    """uint8 tensor of any shape, 255 = paper, to the network's input, float32 of the same shape: 0 = paper, 1 = ink."""
    return 1 - images.float() / 255


def pad_batch(images, multiple=1):
    """Batch uint8 tensors (H, W_i) of one height, padded with paper to the widest, or to a multiple of so many pixels.

    Returns ink, float32 (N, 1, H, W), and the true widths, int64 (N,).
    """
    widths = torch.tensor([image.shape[1] for image in images])
    width = -(-int(widths.max()) // multiple) * multiple
    batch = torch.full((len(images), 1, images[0].shape[0], width), 255, dtype=torch.uint8)  # (N, 1, H, W)
    for row, image in zip(batch, images):
        row[0, :, :image.shape[1]] = image
    return to_ink(batch), widths


def num_frames(widths):
    """Frames the network makes of so many pixels of width, for an int, an array or a tensor: width / 4, rounded up."""
    return (widths + PIXELS_PER_FRAME - 1) // PIXELS_PER_FRAME


def frames_needed(target):
    """The fewest frames CTC needs for a label or a target: one each, and a blank between two equal neighbours.

    With fewer the loss is infinite (Graves et al. 2006, section 3): such a picture can never be learned.
    """
    return len(target) + sum(a == b for a, b in zip(target, target[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# Network

class CRNN(nn.Module):
    """CNN, bidirectional LSTM and a linear layer over the classes, after Shi, Bai and Yao 2015 (arXiv:1507.05717).

    Much leaner than theirs: strided convolutions instead of full-size layers and pooling, one LSTM layer. Columns past an
    image's own width are held at zero after every convolution and skipped by the LSTM, so that a line reads the same alone
    and beside wider ones.
    """

    def __init__(self, num_classes, height=HEIGHT, channels=(32, 64, 96, 192), hidden=192, dropout=0.1):
        super().__init__()
        if height % 8:
            raise ValueError(f"height {height} is not a multiple of 8")
        self.architecture = dict(num_classes=num_classes, height=height, channels=list(channels), hidden=hidden, dropout=dropout)
        a, b, c, features = channels
        plan = [  # in, out, kernel, stride (rows, columns), padding
            (1, a, 3, (2, 2), 1),
            (a, a, 3, (1, 1), 1),
            (a, b, 3, (2, 2), 1),
            (b, b, 3, (1, 1), 1),
            (b, c, 3, (2, 1), 1),
            (c, c, 3, (1, 1), 1),
            (c, features, (height // 8, 1), (1, 1), 0),  # all remaining rows at once
        ]
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, k, s, p, bias=False) for i, o, k, s, p in plan)
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in self.convolutions)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(features, hidden, bidirectional=True)
        self.linear = nn.Linear(2 * hidden, num_classes)
        self.to(memory_format=torch.channels_last)  # about 1.4 times faster on CPUs than channels first

    def features(self, ink, widths=None):
        """Ink (N, 1, H, W) and widths (N,), None where nothing is padded, to one feature vector per frame, (T, N, D)."""
        x = ink.contiguous(memory_format=torch.channels_last)
        padded = widths is not None and bool((widths < ink.shape[3]).any())  # most batches hold one width only and need no mask
        learning = self.training or torch.is_grad_enabled()  # else in place, and batch norm within the convolution: a fifth faster
        for conv, norm in zip(self.convolutions, self.norms):
            # (N, 1, 32, W) -> (N, a, 16, W/2) -> (N, b, 8, W/4) -> (N, c, 4, W/4) -> (N, D, 1, W/4)
            x = F.relu(norm(conv(x))) if learning else normed(conv, norm, x).relu_()
            if padded:
                widths = (widths + conv.stride[1] - 1) // conv.stride[1]  # pixels -> columns of this layer
                inside = (torch.arange(x.shape[3], device=x.device) < widths[:, None].to(x.device))[:, None, None]  # (N, 1, 1, columns)
                x = x * inside if learning else x.mul_(inside)
        return x.squeeze(2).permute(2, 0, 1)  # (N, D, 1, T) -> (T, N, D)

    def sequence(self, features, frames=None):
        """Features (T, N, D) and frames (N,), None where nothing is padded, to logits (T, N, C)."""
        x = self.dropout(features)
        if frames is None or int(frames.min()) == x.shape[0]:
            x, _ = self.lstm(x)  # (T, N, D) -> (T, N, 2 * hidden)
        else:
            x = self.padded_lstm(x, frames.to(x.device))  # (T, N, D) -> (T, N, 2 * hidden)
        return self.linear(self.dropout(x))  # (T, N, 2 * hidden) -> (T, N, C)

    def padded_lstm(self, x, frames):
        """The LSTM on lines (T, N, D) of which only the first frames (N,) count: each is turned about by itself for the way back.

        Half the time of a PackedSequence, for which torch has no fast kernel on CPUs. What comes after a line's end is without meaning.
        """
        def one_way(x, suffix):
            state = x.new_zeros(1, x.shape[1], self.lstm.hidden_size)
            weights = [getattr(self.lstm, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            return torch.lstm(x, (state, state), weights, True, 1, 0.0, self.training, False, False)[0]  # (T, N, hidden)

        def turned(x):
            return x.flatten(0, 1).index_select(0, places).view(x.shape)  # (T, N, D) -> (T * N, D) -> (T, N, D)

        number = torch.arange(x.shape[1], device=x.device)  # (N,)
        times = (frames - 1 - torch.arange(len(x), device=x.device)[:, None]).clamp(min=0)  # (T, N)
        places = (times * x.shape[1] + number).flatten()  # (T * N,)
        return torch.cat([one_way(x, ""), turned(one_way(turned(x), "_reverse"))], 2)  # (T, N, 2 * hidden)

    def forward(self, ink, widths):
        """Ink (N, 1, H, W), 0 = paper, 1 = ink, and true widths in pixels (N,). Returns logits (T, N, C) and frames (N,)."""
        frames = num_frames(widths)
        return self.sequence(self.features(ink, widths), frames), frames


def normed(conv, norm, x):
    """norm(conv(x)) in one step, its running averages in the convolution's weights, as only reading may: (N, in, H, W) to (N, out, H', W')."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()  # (out,)
    return F.conv2d(x, conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale, conv.stride, conv.padding)


def arithmetic(device_type, precision=None):
    """The dtype to compute in: of that name, or where it is None, bfloat16 if the hardware computes in it, and float16 on older GPUs."""
    if precision:
        return getattr(torch, precision)
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    able = torch.cpu.get_capabilities() if device_type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

class Character(NamedTuple):
    """One character of a Reading, and what else it could be."""
    character: str
    confidence: float  # highest probability in its frames
    left: float  # where it begins in the picture, halfway to its neighbour, from 0 to 1 of the width
    right: float  # where it ends, likewise
    alternatives: list  # (character, probability) of others in the same place, the likeliest first


class Reading(NamedTuple):
    """What the network read in one picture."""
    text: str
    confidence: float  # probability that the text is right; without calibration, that the network gives to it, all alignments together
    characters: list  # a Character for each of text


MIN_ALTERNATIVE = 0.02  # probability below which an alternative is not worth a word
UNCALIBRATED = (1.0, 0.0)  # slope and offset that leave a confidence as it is


def greedy_decode(logits, frames, charset):
    """Best class per frame, repeats merged, blanks removed (Graves et al. 2006, best path decoding), and spaces at both ends.

    logits: (T, N, C); frames: (N,), only a line's own frames are read. Returns a list of N Readings, their confidence not
    calibrated. A wide margin looks like a space, and no label begins or ends with one.
    """
    log_probs = logits.detach().float().log_softmax(2).cpu()  # (T, N, C)
    best, classes = log_probs.max(2)  # both (T, N)
    best, classes = best.exp().T.tolist(), classes.T.tolist()  # both N lists of T
    paths = []  # per line, (class, frame of its peak) of every character
    for line_classes, line_best, count in zip(classes, best, frames.tolist()):
        runs = groupby(range(count), key=line_classes.__getitem__)
        paths.append([(c, max(run, key=line_best.__getitem__)) for c, run in runs if c != BLANK])
    confidences = text_probability(log_probs, frames.cpu(), [[c for c, _ in path] for path in paths])
    likely = likeliest(log_probs, [(line, peak) for line, path in enumerate(paths) for _, peak in path if best[line][peak] <= 1 - MIN_ALTERNATIVE])
    readings = []
    for line, (path, count) in enumerate(zip(paths, frames.tolist())):
        text = charset.decode([c for c, _ in path])
        start = len(text) - len(text.lstrip(" "))
        text = text.strip(" ")
        peaks = [peak for _, peak in path[start:start + len(text)]]
        others = [[(charset.characters[c - 1], p) for c, p in likely.get((line, peak), ()) if charset.characters[c - 1] != character]
                  for character, peak in zip(text, peaks)]
        characters = list(map(Character, text, [best[line][peak] for peak in peaks], *extents(peaks, count), others))
        readings.append(Reading(text, confidences[line], characters))
    return readings


def extents(peaks, count):
    """Where characters with these peaks begin, and where they end, two lists of numbers from 0 to 1; count: frames of the line."""
    centres = [(peak + 0.5) / count for peak in peaks]
    between = [(a + b) / 2 for a, b in zip(centres, centres[1:])]
    if not between:
        return [0.0] * len(centres), [1.0] * len(centres)
    first, last = max(0.0, 2 * centres[0] - between[0]), min(1.0, 2 * centres[-1] - between[-1])
    return [first, *between], [*between, last]


def likeliest(log_probs, places):
    """The classes that are likely at places (line, frame), as a dict from place to a list of (class, probability). log_probs (T, N, C)."""
    if not places:
        return {}
    lines, peaks = zip(*places)
    probabilities, classes = log_probs[peaks, lines].exp().topk(min(4, log_probs.shape[2]), dim=1)  # both (places, 4)
    return {place: [(c, p) for c, p in zip(*there) if c != BLANK and p >= MIN_ALTERNATIVE]
            for place, *there in zip(places, classes.tolist(), probabilities.tolist())}


def text_probability(log_probs, frames, targets):
    """Probability of each target, a list of classes, summed over all its alignments. log_probs (T, N, C), frames (N,)."""
    lengths = [len(target) for target in targets]
    longest = max(1, *lengths)
    padded = torch.tensor([target + [BLANK + 1] * (longest - len(target)) for target in targets])  # (N, longest)
    loss = F.ctc_loss(log_probs, padded, frames, torch.tensor(lengths), blank=BLANK, reduction="none")  # (N,)
    return loss.neg().exp().clamp(0, 1).tolist()


def calibrate(confidences, correct):
    """Fit calibrated to lists of confidences and of whether the readings were right, after Platt 1999. Returns slope and offset.

    His targets, a little short of 0 and 1, keep the fit finite where all readings are right.
    """
    confidences, correct = torch.tensor(confidences, dtype=torch.float64), torch.tensor(correct, dtype=torch.float64)
    x = torch.stack([confidences.clamp(1e-6, 1 - 1e-6).logit(), torch.ones_like(confidences)], 1)  # (N, 2)
    target = torch.where(correct > 0, (correct.sum() + 1) / (correct.sum() + 2), 1 / (len(correct) - correct.sum() + 2))
    weights = torch.tensor(UNCALIBRATED, dtype=torch.float64)
    for _ in range(30):  # Newton's method
        p = (x @ weights).sigmoid()
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(curvature, x.T @ (target - p) - 1e-3 * (weights - torch.tensor(UNCALIBRATED, dtype=torch.float64)))
        weights = weights + step.clamp(-1, 1)
    return tuple(weights.tolist())


def calibrated(confidence, calibration):
    """The share of readings with such a confidence that are right, by the slope and offset of calibrate."""
    slope, offset = calibration
    if calibration == UNCALIBRATED:
        return confidence
    confidence = min(max(confidence, 1e-6), 1 - 1e-6)
    return 1 / (1 + math.exp(-slope * math.log(confidence / (1 - confidence)) - offset))


def calibration_error(confidences, correct, bins=15):
    """Expected calibration error (Guo et al. 2017): how far confidence and share of right readings lie apart, weighted by their number."""
    confidences, correct = np.array(confidences), np.array(correct, dtype=float)
    places = np.minimum((confidences * bins).astype(int), bins - 1)
    gaps = [abs((confidences - correct)[places == i].sum()) for i in range(bins)]
    return float(sum(gaps) / max(1, len(correct)))


SECOND_LOOK = 0.6  # confidence, not calibrated, below which a picture is read again


def looks(image):
    """Two other ways to look at an image, uint8 (H, W) as load_image returns it: wider and smaller, and nearer where its margins are high.

    In both of them a character stands at the same part of the width.
    """
    height, width = image.shape
    top, bottom = inked_rows(image.numpy() < 155)
    if 0 < bottom - top <= 0.75 * height:
        margin = max(1, round(0.18 * (bottom - top)))
        image = image[max(0, top - margin):bottom + margin]  # fewer rows
    yield scaled(image, height, 1.25 * width * height / len(image))
    yield scaled(F.pad(image, (0, 0, 5, 1), value=255), height, width * height / (len(image) + 6))


def scaled(image, height, width):
    """An image, uint8 (H, W), brought to another size."""
    size = max(PIXELS_PER_FRAME, round(width)), height
    return torch.from_numpy(np.array(Image.fromarray(image.numpy()).resize(size, Image.Resampling.BICUBIC)))


def read_images(model, charset, images, batch_size, calibration=UNCALIBRATED):
    """Read uint8 tensors (H, W_i) as load_image returns them; those that are read with little confidence once more, in other looks.

    calibration: see calibrate. Returns a list of Readings in the order of images, of several looks the one with the most confidence.
    """
    readings = read_once(model, charset, images, batch_size)
    again = [(i, look) for i, reading in enumerate(readings) if reading.confidence < SECOND_LOOK for look in looks(images[i])]
    for (i, _), reading in zip(again, read_once(model, charset, [look for _, look in again], batch_size)):
        readings[i] = max(readings[i], reading, key=lambda reading: reading.confidence)
    return [reading._replace(confidence=calibrated(reading.confidence, calibration)) for reading in readings]


def similar_widths(widths, batch_size):
    """Yield lists of indices, by width, batch_size or fewer of them: no picture is padded by more than a quarter and 8 pixels, or
    in batches of up to 8, where one batch more would cost more than the padding, to more than twice its width and 8 pixels.
    """
    batch = []
    for i in sorted(range(len(widths)), key=widths.__getitem__):
        if len(batch) == batch_size or batch and widths[i] > (1.25 if len(batch) >= 8 else 2) * widths[batch[0]] + 8:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def read_once(model, charset, images, batch_size):
    """Read images as they are, sorted by width so that little is padded. Returns Readings in their order, not calibrated."""
    readings = [None] * len(images)
    device = next(model.parameters()).device
    dtype = arithmetic(device.type)
    for batch in similar_widths([image.shape[1] for image in images], batch_size):
        # Every new shape costs preparation, and memory that the next cannot use: few shapes.
        ink, widths = pad_batch([images[i] for i in batch], multiple=8 if len(images) > 1 else 1)  # (N, 1, H, W), (N,)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, frames = model(ink.to(device), widths)  # (T, N, C), (N,)
        for i, reading in zip(batch, greedy_decode(logits, frames, charset)):
            readings[i] = reading
    return readings


# ---------------------------------------------------------------------------------------------------------------------
# Processes: one alone, or several that torchrun started, each with its share of the work. The first, of rank 0, prints and writes.

def world_size():
    """How many processes there are, as torchrun tells them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def workers_per_process(number):
    """How many of so many worker processes to a machine each process that torchrun started on it may have."""
    return number // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def join_processes(backend="gloo"):
    """Meet the others, where there are any; only the first prints from then on."""
    if world_size() > 1:
        dist.init_process_group(backend, timeout=timedelta(days=1))  # drawing millions of pictures, one may wait long for another
        if rank():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")


def leave_processes():
    """Part from the others, where there are any, once nothing is left to tell them. A process that ends without it may be killed
    by gloo's threads while the interpreter shuts down (https://github.com/pytorch/pytorch/pull/179291).
    """
    if world_size() > 1:
        dist.destroy_process_group()


def gather(part):
    """A list of every process's part, in the order of their ranks, in every process. Each waits here for all others."""
    parts = [part]
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, part)
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Files

@contextmanager
def whole_file(path):
    """Yield a temporary path in the same folder; it replaces path when the block ends well and is removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path, content):
    """torch.save, whole or not at all. Through memory, because on a full disk torch raises a RuntimeError that names no file."""
    memory = io.BytesIO()
    torch.save(content, memory)
    with whole_file(path) as temporary:
        temporary.write_bytes(memory.getbuffer())


def save_checkpoint(path, model, charset, precision="float32", **facts):
    """Write all that reading needs, whole or not at all. facts: plain values for the log, such as epoch and accuracy.

    precision: of the weights in the file; the network that load_checkpoint makes of them computes in float32 either way.
    """
    dtype = getattr(torch, precision)
    weights = {k: v.detach().cpu().to(dtype if v.is_floating_point() else v.dtype) for k, v in model.state_dict().items()}
    checkpoint = dict(format=CHECKPOINT_FORMAT, charset=charset.characters, architecture=model.architecture, weights=weights, facts=facts)
    save_tensors(path, checkpoint)


def load_checkpoint(path, device="cpu"):
    """Rebuild what save_checkpoint wrote, and nothing else: weights_only=True runs no code from the file.

    Returns the CRNN in eval mode, its Charset and the dict of facts.
    Raises ValueError, one line naming the file, when it is missing, damaged, or not a checkpoint of this project.
    """
    if not Path(path).is_file():
        raise ValueError(f"no {path}: run python train_crnn.py first, or set MODEL_PATH to a checkpoint")
    foreign = f"{path} is not a checkpoint of this project: train one with python train_crnn.py, or set MODEL_PATH to another"
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip, key and runtime errors of many kinds for a foreign file
        raise ValueError(f"{foreign} ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        found = checkpoint.get("format", "none") if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{foreign} (format {found}, expected {CHECKPOINT_FORMAT})")
    try:
        charset = Charset(checkpoint["charset"])
        model = CRNN(**checkpoint["architecture"])
        model.load_state_dict(checkpoint["weights"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{foreign} ({str(error).splitlines()[0]})") from None
    return model.to(device).eval(), charset, checkpoint["facts"]


class Unpadded(nn.Module):
    """What an exported CRNN computes, without what only padding needs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ink):
        """Ink (N, 1, H, W), 0 = paper, 1 = ink, all of one width, to log-probabilities (T, N, C), T = W / 4 rounded up."""
        return self.model.sequence(self.model.features(ink)).log_softmax(2)


def export_onnx(path, model, charset):
    """Write the network as ONNX, for any number of pictures of one common width: ink (N, 1, H, W) to log_probs (T, N, C).

    The charset, whose characters are the classes from 1, is in the file's metadata. Raises ValueError, one line, when a
    package that this needs is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"writing {path} needs packages that are not installed: pip install {' '.join(missing)}")
    model = copy.deepcopy(model).cpu().eval()
    example = torch.zeros(2, 1, model.architecture["height"], 100)
    sizes = {0: torch.export.Dim("N", min=1, max=2 ** 12), 3: torch.export.Dim("W", min=8, max=2 ** 14)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own workings
        program = torch.onnx.export(Unpadded(model), (example,), input_names=["ink"], output_names=["log_probs"],
                                    dynamic_shapes={"ink": sizes}, dynamo=True, verbose=False)
    program.model.metadata_props["charset"] = charset.characters
    with whole_file(path) as temporary:
        program.save(temporary, external_data=False)


def read_labels(csv_path):
    """A csv of the data.csv form as a DataFrame of strings; labels such as NA, null and 007 stay what they are.

    Raises ValueError, one line with the fix, when the file is missing, empty, malformed, or lacks a column.
    """
    import pandas as pd  # here, so that reading a single picture does not wait for it

    try:
        rows = pd.read_csv(csv_path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"no {csv_path}: run python prepare_ocr_dataset.py first, or set DATA_CSV to your own csv") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{csv_path} cannot be read as a UTF-8 csv ({error}): write it again, "
                         f"or run python prepare_ocr_dataset.py") from None
    missing = [column for column in LABEL_COLUMNS if column not in rows.columns]
    if missing:
        raise ValueError(f"{csv_path} has no column {missing[0]}: its first line must be image_path,label "
                         f"(found: {','.join(rows.columns)})")
    if rows.empty:
        raise ValueError(f"{csv_path} has no rows: run python prepare_ocr_dataset.py, or add lines of image_path,label")
    return rows.fillna("")  # a line with too few fields leaves NaN behind


def write_labels(rows, csv_path):
    """Write a DataFrame, or several one after the other, so that read_labels finds the same strings again; whole or not at all."""
    with whole_file(csv_path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        for i, part in enumerate([rows] if hasattr(rows, "to_csv") else rows):
            part.to_csv(file, index=False, header=i == 0, quoting=csv.QUOTE_ALL, lineterminator="\n")


def add_split(rows):
    """Fill in the columns source and split where a csv has none; the split by a hash, 8 : 1 : 1.

    Equal labels go to the same split, so that val and test measure texts never trained on. Single characters go by the
    hash of their path instead: a character that is only in the test could not be learned.
    """
    if "source" not in rows:
        rows["source"] = "custom"
    if "split" not in rows:
        keys = rows.label.where(rows.label.str.len() > 1, rows.image_path)
        rows["split"] = [{0: "val", 1: "test"}.get(zlib.crc32(key.encode()) % 10, "train") for key in keys]
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Scoring

LOOK_ALIKES = str.maketrans({"O": "0", "o": "0", "I": "1", "l": "1", "|": "1", **{c: c.lower() for c in "CKMPSUVWXYZJ"}})


def fold_lookalikes(text):
    """One character for those that a single handwritten character cannot tell apart: {0 O o}, {1 I l |}, and c/C, k/K ..."""
    return text.translate(LOOK_ALIKES)


def score_table(labels, predictions, groups):
    """Score predictions by group. Three equally long lists of strings. Returns a DataFrame, one row a group, the last all.

    Columns: images; exact, the share read without any error; CER, edits over reference characters, summed over the group;
    single, how many labels are one character; folded, the share of those that match with look-alikes folded (NaN: none).
    """
    import pandas as pd
    from rapidfuzz.distance import Levenshtein

    rows = pd.DataFrame(dict(group=groups, images=1, exact=[a == b for a, b in zip(labels, predictions)],
                             edits=[Levenshtein.distance(a, b) for a, b in zip(labels, predictions)],
                             characters=[len(a) for a in labels], single=[len(a) == 1 for a in labels],
                             folded=[len(a) == 1 and fold_lookalikes(a) == fold_lookalikes(b) for a, b in zip(labels, predictions)]))
    sums = rows.groupby("group", sort=True).sum()
    if len(sums) > 1:
        sums.loc["all"] = sums.sum()
    return pd.DataFrame(dict(images=sums.images, exact=sums.exact / sums.images, CER=sums.edits / sums.characters.clip(lower=1),
                             single=sums.single, folded=sums.folded / sums.single.where(sums.single > 0)))


def edits(label, prediction):
    """What turns a label into a prediction: (character read instead of, character), "" for none, in the order of the line."""
    from rapidfuzz.distance import Levenshtein

    found = []
    for kind, i, j in Levenshtein.editops(label, prediction):
        found.append((label[i] if kind != "insert" else "", prediction[j] if kind != "delete" else ""))
    return found


def format_score_table(table):
    """The table of score_table as text, shares in percent."""
    percent = "{:.2%}".format
    return table.to_string(formatters=dict(exact=percent, CER=percent, folded=percent), na_rep="-", index_names=False)
