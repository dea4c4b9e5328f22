"""Draw the training data: images of short texts under datasets/, and datasets/data.csv.

    python prepare_ocr_dataset.py

An image follows from the constants, its source and its index alone. So a run can be stopped at any
time: the next one draws only what is missing or was drawn with other constants, and the files are
the same byte for byte on any machine and with any number of workers. Images of your own join them:
put them and a labels.csv (image_path,label) into datasets/custom, or into a folder of it for each
set of images.
"""

import contextlib
import hashlib
import math
import os
import random
import re
import socket
import string
import time
import zlib
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import cache, lru_cache, partial
from glob import glob
from importlib.metadata import version
from multiprocessing import parent_process
from pathlib import Path
from random import choice, gauss, randint, uniform
from threading import Thread
from types import SimpleNamespace
from typing import NamedTuple
from unicodedata import normalize

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.contrib.concurrent import process_map

import crnn
from crnn import InputError, split_of, whole_file

# --------------------------------------------------------------------------------------------------
# How many images of each source; 0 skips it. One in 20 is for validation, one for the test. These
# numbers suit a first run of eight minutes, drawing and training: mostly what is soon learned. The
# bundled weights learned from far more, and far more handwriting.
NUM_IMAGES = {
    "trdg_custom": 7_200,  # printed text, set by TRDG
    "synthetic_math": 1_600,  # printed expressions
    "emnist_images": 2_800,  # single handwritten characters as EMNIST has them, none twice
    "emnist_words": 1_400,  # strings put together from EMNIST characters
    "emnist_math": 400,  # expressions of EMNIST characters and signs by UNIPEN's writers
    "handwriting": 1_800,  # text in handwriting fonts
    "unipen_words": 500,  # words and short texts as people wrote them
    "unipen_text": 500,  # other text, put together from one person's characters
    "unipen_math": 800,  # expressions, put together from one person's characters
}

# What may be drawn
CHARSET = "".join(map(chr, range(32, 127))) + "×÷±√π≤≥≠"  # printable ASCII with the space, signs
MAX_LENGTH = 28  # characters in a label
STYLED = 0.6  # share of images in a style such as form or photograph; the others are plain
WARPED = 0.75  # share of handwritten training images that are warped, as if by one more hand each
HELD_OUT_FONTS = 0.1  # share of font families that only validation and test images are drawn in

# Where
FONTS_DIR = "myFonts"  # fonts in its folder handwriting/ count as handwritten, others as printed
DATASETS_DIR = "datasets"  # for images, data.csv and preview.png; EMNIST files are in its emnist/

# How
SEED = 0  # another seed draws other images
NUM_WORKERS = min(crnn.usable_cores(), 61)  # processes that draw; Windows takes 61 at most
DOWNLOAD_TIMEOUT = 20  # seconds without an answer after which a download is given up
# --------------------------------------------------------------------------------------------------

SHAPING = "SEED CHARSET MAX_LENGTH STYLED WARPED HELD_OUT_FONTS".split()  # they change the images
PRINTED, HANDWRITTEN = "printed fonts", "handwritten fonts"  # what images are drawn with
EMNIST, STROKES = "EMNIST", "UNIPEN"
OURS = Path(__file__).parent / "myFonts"
UNIPEN_RECORD = "https://zenodo.org/api/records/1195803"  # answers with its files, as json
TEXTS_FILE = OURS / "words" / "texts.txt"  # the grammar
WORDS_FILE = OURS / "words" / "english.txt"  # the most frequent first
LEFT_OUT_FILE = OURS / "left_out.csv"  # characters that a font draws as something else
PLACES_FILE = OURS / "places.csv"  # how characters stand on a line by hand
TRIES = 2_000  # texts tried for one image: with a narrow CHARSET few fit
CHUNK = 200  # images that a worker draws at a time
COLUMNS = ["image_path", "label", "source", "split", "style"]  # of data.csv

DIGITS = string.digits
ALPHANUMERIC = DIGITS + string.ascii_uppercase + string.ascii_lowercase  # as EMNIST's labels are
MATH_SIGNS = "×÷±√π≤≥≠"  # drawn in expressions only
SPLITS = "train", "val", "test"
CYCLE = 20  # one image in so many is for validation, and one for the test


# ---- Chance. All of it is Python's own, from which TRDG draws too, and is seeded for each image.
def chance(share):
    return random.random() < share


def generator():
    """A numpy generator, seeded from Python's random."""
    return np.random.default_rng(random.getrandbits(63))


def clouds(shape, patches):
    """Values from 0 to 1, float32 (H, W), changing slowly: so many patches over the height."""
    few = [max(2, round(patches * side / shape[0]) + 1) for side in shape]  # rows, columns
    values = generator().random(few, dtype=np.float32)
    return cv2.resize(values, shape[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)  # (H, W)


# ---- Words. A word's letters decide its split: no test word is trained on, in capitals or not.
@cache
def find_words():
    """Split -> its words: of TRDG's dictionary, and those people use, the most frequent first."""
    dictionary = Path(text_generator().__file__).parent / "dicts" / "en.txt"
    # At most 12 letters of any alphabet, with ' and - inside
    is_word = re.compile(r"[^\W\d_](([^\W\d_]|['-]){0,10}[^\W\d_])?").fullmatch
    words = {split: ([], []) for split in SPLITS}
    for number, path in enumerate((dictionary, WORDS_FILE)):
        for word in filter(is_word, path.read_text(encoding="utf-8").split()):
            if split := word_split(word):
                words[split][number].append(word)
    return words


def word_split(text):
    """The split of a word and all its parts, None where they differ: power-driven shows power."""
    splits = {split_of(part) for part in {text, *re.findall(r"[^\W\d_]{2,}", text)}}
    return splits.pop() if len(splits) == 1 else None


def pick_word(split):
    """A word: half the time as people use them, else any of the whole dictionary."""
    dictionary, used = find_words()[split]
    # Rank n as often as n ** (-2/3): by Zipf's law, 1/n, rare words would hardly be seen.
    return choice(dictionary) if chance(0.5) else used[int(len(used) * random.random() ** 3)]


def invent(split, endings=()):
    """Halves of two words, or half of one and an ending: like most names, new to the reader."""
    while True:
        a, b = (word.lower() for word in random.choices(find_words()[split][0], k=2))
        word = a[: len(a) // 2 + 1] + (choice(endings) if endings else b[len(b) // 2 :])
        if len(word) < 14 and word_split(word) == split:
            return word


def cased(word, shares=(53, 27, 20)):
    """In lower case, capitalized or in capitals; some with an accent that CHARSET has, as café."""
    word = random.choices([word.lower(), word.capitalize(), word.upper()], shares)[0]
    swaps = [(normalize("NFD", c)[0], c) for c in CHARSET if c.isalpha() and not c.isascii()]
    swaps = [swap for swap in swaps if swap[0] in word]  # (e, é)
    return word.replace(*choice(swaps), 1) if swaps and chance(0.3) else word


def random_string(characters, shortest, longest):
    return "".join(random.choices(characters, k=randint(shortest, longest)))


# ---- Texts, by the grammar of TEXTS_FILE, which explains itself
RANDOM = {  # kinds of text besides the grammar's, each of a split
    "nothing": lambda split: "",
    "hash": lambda split: "#",
    "digits": lambda split: random_string(DIGITS, 4, 12),
    "word": lambda split: cased(pick_word(split)),
    "Word": lambda split: cased(pick_word(split), (0, 1, 0)),
    "WORD": lambda split: cased(pick_word(split), (0, 0, 1)),
    "invented": lambda split: cased(invent(split)),
    "brand": lambda split: cased(invent(split, read_grammar()["ending"]), (10, 70, 20)),
    "written": lambda split: choice(people(split).labels),
    "group": lambda split: random_string(choice(read_grammar()["group_of"]), 1, 5),
    "mixed": lambda split: random_string(ALPHANUMERIC, 2, 7),
    # No sign of mathematics: nobody tells a lone × from x
    "any": lambda split: choice([c for c in CHARSET if c not in MATH_SIGNS + " "] or [""]),
    "string": lambda split: "".join(expand("any", split) for _ in range(randint(1, 12))),
    "look_alikes": lambda split: random_string(choice([*read_grammar()["alike"], DIGITS]), 2, 6),
}
STANDING_ALONE = {"code", "string", "mixed", "single", "look_alikes"}  # no word tells O from 0
# Nobody can count underscores that touch, tell one from a ruled line, or '' from a double quote.
AMBIGUOUS = re.compile(r"__|^_$|['\"`]{2}")


@cache
def read_grammar():
    """Kind of text -> its alternatives, of TEXTS_FILE. InputError: one names an unknown kind."""
    text = TEXTS_FILE.read_text(encoding="utf-8")
    text = re.sub(r"(\d+)\*({\w+})", lambda m: int(m[1]) * f"{m[2]}  ", text)  # 9*{name}
    # A line, and the indented ones that go on with it
    rows = re.findall(r"^(\w\S*)(.*(?:\n[ \t].*)*)", text, re.M)
    grammar = {kind: re.split(r"\s{2,}", texts.strip()) for kind, texts in rows}
    for kind, alternatives in grammar.items():
        if kind.endswith("_mix") and not re.fullmatch(r"({\w+})+", "".join(alternatives)):
            raise InputError(f"{TEXTS_FILE}: {kind} is to list kinds, each like {{word}}")
        for name in re.findall(r"{(\w+)}", " ".join(alternatives)):
            if name not in grammar.keys() | RANDOM.keys():
                raise InputError(f"{TEXTS_FILE}: {kind} has {{{name}}}, but no line begins so")
    return grammar


def expand(kind, split):
    """A random text of a kind, its words those of a split."""
    if kind in RANDOM:
        return RANDOM[kind](split)
    template = choice(read_grammar()[kind])
    return re.sub(r"{(\w+)}|#", lambda m: expand(m[1], split) if m[1] else choice(DIGITS), template)


def pick_text(texts, split):
    """A text of a mix or of a kind, and whether it stands alone: no word around its characters."""
    kind = random.choices(read_grammar().get(f"{texts}_mix", [texts]))[0].strip("{}")
    text = expand(kind, split).replace("·", choice(["", "", " "]))
    return text, kind in STANDING_ALONE or len(text) < 2


def acceptable(label):
    """Whether a label can be asked of a reader: known before anything is drawn."""
    fits = 0 < len(label) <= MAX_LENGTH and label == label.strip()
    return fits and set(label) <= set(CHARSET) and not AMBIGUOUS.search(label)


# ---- Fonts. A font draws only characters it has, and only those it draws unlike all its others.
# Pairs that many fonts draw alike, and the overlap above which, seen by eye, they are the same
SAME_FROM = {"O0": 0.75, "Il": 0.72, "I|": 0.72, "l|": 0.72, "1l": 0.72, "1I": 0.72}
SPACES = [1.7] * 9 + [6]  # the widest space, in the font's spaces; one line in ten has columns


class Font(NamedTuple):
    path: str
    kind: str  # PRINTED or HANDWRITTEN
    family: str
    characters: frozenset  # which it draws, and draws unlike all others
    doubtful: frozenset  # of these, those that only the rest of a word tells from a look-alike
    held_out: bool = False  # only for validation and test images
    size: int = 0  # of a line, in pixels


# A font file at a size in pixels; in the basic layout, since every text is shaped twice
typeface = lru_cache(12_000)(partial(ImageFont.truetype, layout_engine=ImageFont.Layout.BASIC))


@cache
def find_fonts():
    """The usable Fonts of FONTS_DIR, and lines about the others and about those held out."""
    fonts, notes = [], []
    left_out = pd.read_csv(LEFT_OUT_FILE, dtype=str, keep_default_na=False, index_col=0).characters
    # Also behind links, without a Mac's ._ files, and in one order on all systems
    found = [Path(FONTS_DIR, path) for path in glob("**", root_dir=FONTS_DIR, recursive=True)]
    usable = [p for p in found if p.suffix.lower() in {".ttf", ".otf", ".woff", ".woff2"}]
    for path in sorted(usable, key=Path.as_posix):
        kind = HANDWRITTEN if "handwriting" in path.relative_to(FONTS_DIR).parts else PRINTED
        try:
            font = survey_font(str(path), kind, CHARSET)
            known = font.characters - set(left_out.get(font.family, ""))
            fonts.append(font._replace(characters=known))
        except OSError as error:
            notes.append(f"{path} is skipped: not a usable font ({error})")
    held_out = {kind: held_out_families(fonts, kind) for kind in (PRINTED, HANDWRITTEN)}
    for kind, families in held_out.items():
        if families:
            notes.append(f"{kind} held out for validation and test: {', '.join(sorted(families))}")
    return [font._replace(held_out=font.family in held_out[font.kind]) for font in fonts], notes


def survey_font(path, kind, charset):
    """A Font with the characters it draws legibly. OSError: not a usable font."""
    face, smallest = typeface(path, 40), typeface(path, 20)
    family = ((face.getname()[0] or "").split() or [Path(path).stem])[0].lower()
    characters = distinct_characters(face, charset)
    n, *below = (face.getbbox(c, anchor="ls")[3] for c in "npgy")  # pixels below the baseline
    if max(below) - n < 3:  # capitals for small letters: none reaches below the line
        characters -= {c for c in characters if c.islower() and c not in MATH_SIGNS}
    # Thin dashes may be hinted away in the smallest size of a line.
    characters -= {c for c in characters - {" "} if not any(bytes(smallest.getmask(c)))}
    if len(characters) < min(10, len(charset)):  # not even the digits
        raise OSError(f"it draws only {len(characters)} of CHARSET")
    pairs = [p for p in SAME_FROM if set(p) <= characters and overlap(face, *p) > SAME_FROM[p]]
    return Font(path, kind, family, frozenset(characters), frozenset("".join(pairs)))


def distinct_characters(face, charset):
    """The characters that a font draws, each by a shape of its own."""

    def shape(c):
        mask, offset = face.getmask2(c, mode="L")
        return mask.size, bytes(mask), offset

    unknown = {shape(c)[:2] for c in ("\uffff", "\ue0ff", "\U0010fffd")}  # no font assigns these
    same_shape = {}
    for c in charset:
        size, pixels, offset = shape(c)
        above_line = offset[1] < -1  # by more than a pixel: it would be cut off
        if c == " " or (any(pixels) and (size, pixels) not in unknown and not above_line):
            same_shape.setdefault((size, pixels, offset), []).append(c)
    # If c and C look alike, only C is kept; if I and l do, neither is: no label could be read.
    return {min(same) for same in same_shape.values() if len({c.lower() for c in same}) == 1}


def overlap(face, a, b):
    """How much of two slightly blurred glyphs, one set on the other, is common: 1 if the same."""
    blurred = []
    for c in (a, b):
        left, top, right, bottom = face.getbbox(c, anchor="ls")
        image = Image.new("L", (100, 100))
        place = (50 - (left + right) / 2, 50 - (top + bottom) / 2)
        ImageDraw.Draw(image).text(place, c, font=face, fill=255, anchor="ls")
        blurred.append(cv2.GaussianBlur(np.asarray(image, dtype=np.float32), (0, 0), 1.5))
    a, b = blurred  # (100, 100) each
    dotted = abs(a[46:54, 47:53].mean() - b[46:54, 47:53].mean()) > 60  # as a slashed zero is
    return 0.0 if dotted else float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def held_out_families(fonts, kind):
    """The families of a kind that only validation and test images are drawn in."""
    drawn = defaultdict(set)  # family -> its characters, in the order of a hash
    for font in sorted(fonts, key=lambda font: hashlib.sha256(font.family.encode()).digest()):
        if font.kind == kind:
            drawn[font.family] |= font.characters
    chosen, most = [], math.ceil(HELD_OUT_FONTS * len(drawn))
    for family in drawn:  # but none that alone has a character: it is to be trained on
        others = (drawn[f] for f in drawn if f not in (family, *chosen))
        if len(chosen) < most and drawn[family] <= set().union(*others):
            chosen.append(family)
    for c in sorted(set().union(*drawn.values())):  # few have √, and each must be tested
        able = [family for family in drawn if c in drawn[family]]
        if len(able) > 1 and not set(able) & set(chosen):
            chosen.append(able[0])
    return chosen


def pick_font(line):
    """A Font that draws all of a Line's label, or None."""
    needed, in_style, others = frozenset(line.label), {}, {}
    for font in find_fonts()[0]:
        if font.kind != line.source.kind or font.held_out != (line.split != "train"):
            continue
        bar = line.label == "I" and "1" not in font.doubtful  # alone on a sign, a bar is an I
        if not needed <= font.characters or (line.alone and needed & font.doubtful and not bar):
            continue  # where no word helps, no character may look like another
        wanted = not line.style.fonts or re.search(line.style.fonts, os.path.basename(font.path))
        (in_style if wanted else others).setdefault(font.family, []).append(font)
    families = list((in_style or others).values())
    # Even sizes, so that the cache of typefaces holds every font at each; some as in a sharp scan
    size = 2 * choice([1, 1, 2]) * randint(10, 22)
    # A family first and then one of its files, so that many weights are not seen more often
    return choice(choice(families))._replace(size=size) if families else None


# ---- Pens for fonts. A pen takes a text, and a Font or a Hand, and gives a line's ink, float32
# (H, W), 0 = paper, 1 = ink, or None where it cannot. H is the line box: a comma stays low.
def typeset(text, font):
    """A text in a font, with all that reaches beyond its line: ink (H, W)."""
    size, face = font.size, typeface(font.path, font.size)
    ascent, descent = face.getmetrics()
    gap, space = choice([0, 0, 0, 1, 2, size // 12]), uniform(1, choice(SPACES))
    width = 2 * len(text) + max(SPACES) * text.count(" ") + 4  # in sizes: no character is wider
    canvas = Image.new("L", (width * size, 5 * size))
    draw, x, baseline = ImageDraw.Draw(canvas), 2.0 * size, 3 * size
    for piece in text if gap else re.split("( )", text):  # words have the font's kerning
        draw.text((x, baseline), piece, font=face, fill=255, anchor="ls")
        x += face.getlength(piece) * (space if piece == " " else 1) + gap
    return line_box(np.asarray(canvas), baseline - ascent, baseline + descent, size // 3)


def line_box(canvas, top, bottom, margin):
    """Crop a uint8 canvas to a line, and further out where ink goes beyond it: ink (H, W)."""
    first, last, left, right = ink_box(canvas)
    top, bottom = min(top, first or top), max(bottom, last + 1)
    return canvas[top:bottom, max(0, left - margin) : right + 1 + margin].astype(np.float32) / 255


def ink_box(ink, share=0.1):
    """First and last row, first and last column with ink of a share of the darkest; 0: none."""
    inked = ink > share * max(0.1, ink.max())
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    return (*rows[[0, -1]].tolist(), *columns[[0, -1]].tolist()) if len(rows) else (0, 0, 0, 0)


@cache
def text_generator():
    """TRDG's text generator, repaired for Pillow >= 10, which removed getsize (issues 315, 343)."""
    try:
        with contextlib.redirect_stdout(None):  # it prints that its handwriting network is missing
            from trdg import computer_text_generator as trdg
    except ImportError as error:
        raise InputError(f"no trdg: pip install --no-deps trdg==1.8.0 ({error})") from None
    # It also reads the font file anew for every image, and shapes every character twice.
    trdg.ImageFont = SimpleNamespace(truetype=lambda font, size: typeface(font, size))
    trdg.get_text_height = lambda face, text: sum(face.getmetrics())
    blind = SimpleNamespace(text=lambda *_, **__: None)  # for the mask that it draws besides
    trdg.ImageDraw = SimpleNamespace(Draw=lambda i, **m: blind if m else ImageDraw.Draw(i))
    return trdg


def typeset_by_trdg(text, font):
    """A text as TRDG sets it: ink (H, W), its word and character spacing at random."""
    gap, space = choice([0, 0, 1, 2, font.size // 12]), uniform(1, choice(SPACES))
    look = dict(orientation=0, space_width=space, character_spacing=gap, word_split=chance(0.9))
    line = f" {text} "  # room for what reaches beyond the first and the last character
    image, _ = text_generator().generate(line, font.path, "#000000", font.size, fit=False, **look)
    ink = np.asarray(image.getchannel("A"), dtype=np.float32) / 255  # (H, W)
    face = typeface(font.path, font.size)
    (_, top, _, bottom), (ascent, descent) = face.getbbox(text, anchor="ls"), face.getmetrics()
    cut = -top > ascent or bottom > descent or ink[:, [0, 1, -2, -1]].any()  # beyond its line
    return None if cut else ink


# ---- What people wrote, downloaded once
@cache
def fetch(kind):
    """Whether EMNIST's characters or UNIPEN's strokes are there; downloads them if need be."""
    from torchvision.datasets import EMNIST as emnist_files

    before, folder = socket.getdefaulttimeout(), Path(DATASETS_DIR).as_posix()
    files = "emnist-byclass-{train,test}-{images-idx3,labels-idx1}-ubyte"
    remedy = f"{files} from {emnist_files.url} into {folder}/emnist/EMNIST/raw/"
    if kind == STROKES:
        page, name = UNIPEN_RECORD.replace("/api", ""), Path(STROKES_FILE).name
        remedy = f"{page} into {folder}/unipen/, without any {name}"
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision's download has none of its own
    try:
        return bool(load_strokes() if kind == STROKES else all(map(emnist, SPLITS)))
    except Exception as error:  # also those of tarfile, zlib and json: the other sources are drawn
        print(f"could not get {kind} ({error}), so its sources are skipped. ", end="")
        print(f"To use it, unpack {remedy}")
        return False
    finally:
        socket.setdefaulttimeout(before)


# ---- EMNIST: single handwritten characters; who wrote them is not known
@cache
def emnist(split):
    """A split's images, white on black, uint8 (n, 28, 28), labels (n,), and label -> its places."""
    from torchvision import datasets

    folder, train = f"{DATASETS_DIR}/emnist", split != "test"
    data = datasets.EMNIST(folder, split="byclass", train=train, download=True)
    images = data.data.numpy().transpose(0, 2, 1)  # stored transposed -> (n, rows, columns)
    labels = np.array(list(ALPHANUMERIC))[data.targets.numpy()]  # (n,)
    order = np.random.default_rng(SEED).permutation(len(images))
    if split != "test":  # of the train file, one in CYCLE is for validation
        order = order[(order % CYCLE == 0) == (split == "val")]
    order = order[np.isin(labels[order], list(CHARSET))]
    images, labels = np.ascontiguousarray(images[order]), labels[order]
    return images, labels, {c: np.flatnonzero(labels == c) for c in ALPHANUMERIC}


# ---- Pen strokes of UNIPEN's writers: downloaded and parsed once, then kept in one compact file
CATEGORIES = "[178]*"  # 1a to 1d: digits, capitals, small letters, signs; 7: words; 8: texts
MISCOUNTED = {"lou"}  # contributors who count components differently: their words are cut
STROKES_FILE = "unipen/strokes.npz"  # the compact file, in DATASETS_DIR
PER_CHARACTER, PER_TEXT = 8, 2  # samples kept of one character, one word or text, of one writer
LONGEST = 40  # characters in a text; longer ones run over several lines
STROKES_HEIGHT = 128  # a writer's median character is scaled to this, and so is the median word
IN_PIECES = set('+=:;"#!?$%*')  # a single stroke with such a label is only a piece of the sign
TOLERANCE = 1.3  # how far a simplified line may lie from the written one, in the same unit

# A sample: its strokes (points, 2) each, y down, or packed as strokes_of() takes them; its label;
# and its writer (contributor/name)
Written = namedtuple("Written", "strokes label writer")


def download_unipen(folder):
    """Download the archives of Zenodo's record, and unpack them below a folder."""
    from torchvision.datasets.utils import download_and_extract_archive as download

    files = pd.read_json(UNIPEN_RECORD, typ="series")["files"]
    unpacked = folder.with_name("unipen.part")  # not found there if a run stops half-way
    for file in files:  # links end in /content: the archive's name, and so its type, is the key
        url, md5 = file["links"]["self"], file["checksum"].removeprefix("md5:")
        download(url, folder, unpacked, file["key"], md5, remove_finished=True)
    unpacked.rename(folder / "original")


def parse_unipen(root, target):
    """Parse the files of root's data/ and include/ into one compact one; say what was skipped."""
    contributors = sorted({path.name for path in root.glob("data/*/*")} - MISCOUNTED)
    bar = dict(desc="reading UNIPEN", max_workers=max(1, NUM_WORKERS), chunksize=1)
    parts = process_map(partial(parse, root), contributors, disable=None, **bar)  # not in log files
    samples = [sample for part, _ in parts for sample in part]
    if not samples:
        raise InputError(f"no pen strokes can be read in {root}")
    skipped = sum((counts for _, counts in parts), Counter())
    inks = [np.concatenate(sample.strokes) for sample in samples]  # (points, 2) each
    arrays = dict(
        # The step to each point from the one before, to a sample's first from (0, 0)
        steps=np.concatenate([np.diff(ink, axis=0, prepend=0) for ink in inks]).astype(np.int16),
        points=np.uint16([len(stroke) for sample in samples for stroke in sample.strokes]),
        strokes=np.uint16([len(sample.strokes) for sample in samples]),
        writers="\n".join(sample.writer for sample in samples),
        labels="\n".join(sample.label for sample in samples),
    )
    with whole_file(target) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(skipped.items()))
    print(f"UNIPEN: {len(samples):,} samples kept, skipped: {reasons}")


def parse(root, contributor):
    """What is kept of a contributor's samples, Written, and a Counter of why others are not."""
    skipped, groups = Counter(), defaultdict(list)
    files = filter(Path.is_file, root.glob(f"data/{CATEGORIES}/{contributor}/**/*"))
    # By name, since a file of the same name in another category mostly cuts up the same ink.
    for path in sorted(files, key=lambda path: path.parts[::-1]):
        for sample in read_samples(path, root, skipped):
            groups[sample.writer, len(sample.label) == 1].append(sample)
    return [s for _, part in sorted(groups.items()) for s in choose(part, skipped)], skipped


@lru_cache(maxsize=32)
def read_blocks(path, include):
    """The (keyword, content) of a UNIPEN file; where it includes a file, of that instead."""
    try:
        text = path.read_text(encoding="latin-1")  # turns every line end into \n
    except OSError:
        return [("MISSING", path.name)]
    blocks = []
    # A keyword begins a line, but some files lift the pen in the middle of one.
    for block in re.split(r"^\s*\.(?=[A-Z])|(?<=\d)\.(?=PEN_)", text, flags=re.M)[1:]:
        keyword, content = (*block.split(None, 1), "")[:2]
        if keyword == "INCLUDE":
            blocks += read_blocks(include / content.strip(), include)
        else:
            blocks.append((keyword, content))
    return blocks


def read_samples(path, root, skipped):
    """Yield the Written samples of a data file, and count in skipped what cannot be one."""
    file, facts, ink, segments = path.relative_to(root / "data").as_posix(), {}, [], []
    for keyword, content in read_blocks(path, root / "include"):
        if keyword in ("PEN_DOWN", "PEN_UP") and content:  # those without points do not count
            ink.append(content if keyword == "PEN_DOWN" else "")
        elif keyword == "SEGMENT":
            # What, where, how good, and a label in quotation marks
            segments += re.findall(r'^\w+\s+([\d:,-]+)\s+(\S+)\s+"((?:\\.|[^"\\])*)"', content)
        elif content:
            facts[keyword] = content.split()
    skipped["ink files missing"] += "MISSING" in facts
    contributor, [name, *_] = file.split("/")[1], facts.get("WRITER_ID", ["unknown"])
    writer = f"{contributor}/{re.sub('_[0-9]$', '', name)}"  # somebody's sessions: Name_1, Name_2
    ratio = 1.0  # of a tablet's points per inch: most have one for both axes, or name none
    with contextlib.suppress(LookupError, ValueError, ZeroDivisionError):
        across, down = (float(facts[f"{axis}_POINTS_PER_INCH"][0]) for axis in "XY")
        ratio = across / down
    for place, quality, label in segments:
        # \@ marks what is crossed out, @_ what is no text, a leading @ a remark.
        bad = quality == "BAD" or r"\@" in label or "@_" in label or label.startswith("@ ")
        label = re.sub(r"\\(.)|(?<=\w) (?=[.,;:!?])", r"\1", label)  # nobody wrote that space
        # Single characters come from category 1 alone: as words they have lost their size.
        if bad or len(label) > LONGEST or (len(label) == 1) != file.startswith("1"):
            continue
        try:
            strokes = cut_out(place, ink, len(facts.get("COORD", "XY")))
            yield Written([stroke * np.float32([1, -ratio]) for stroke in strokes], label, writer)
        except (IndexError, ValueError):  # no such place, or something among the numbers
            skipped["in no such place"] += 1


def cut_out(place, ink, columns):
    """The strokes (points, 2) of a place like 0:12-1:40,5: components, with parts of some."""
    strokes = []
    pattern = r"(\d+)(?::(\d+))?(?:-(\d+)(?::(\d+))?)?"  # first component, point, last, point
    for first, start, last, end in re.findall(pattern, place):
        components = range(int(first), int(last or first) + 1)
        part = [np.float32(ink[i].split()).reshape(-1, columns)[:, :2] for i in components]
        part[-1] = part[-1][: int(end) + 1 if end else None]
        part[0] = part[0][int(start or 0) :]
        strokes += [stroke for stroke in part if len(stroke)]  # (points, 2) each
    if not strokes:
        raise ValueError(f"nothing is written at {place}")
    return strokes


def choose(samples, skipped):
    """Yield the samples of a writer that are worth keeping, at one size and simplified."""
    height = np.median([np.ptp(np.concatenate(s.strokes)[:, 1]) for s in samples])
    scale, seen = STROKES_HEIGHT / max(1, height), Counter()
    for sample in random.Random(0).sample(samples, len(samples)):
        strokes, label = [np.float32(scale) * stroke for stroke in sample.strokes], sample.label
        seen[label] += 1
        if seen[label] > (PER_CHARACTER if len(label) == 1 else PER_TEXT):
            skipped["more of the same"] += 1
        elif not believable(strokes, label):
            skipped["unlike their label"] += 1
        else:  # simplified to few points, rounded, starting from (0, 0)
            low = np.concatenate(strokes).min(0)
            lines = [cv2.approxPolyDP((s - low)[:, None], TOLERANCE, False) for s in strokes]
            yield sample._replace(strokes=[np.int32(np.round(line[:, 0])) for line in lines])


def believable(strokes, label):
    """Whether ink can be its label: no stray stroke, and a text on one line, with its spaces."""
    width, height = np.ptp(np.concatenate(strokes), axis=0)
    if label in IN_PIECES and len(strokes) == 1:
        return False
    if len(label) == 1:  # people who wrote mostly dots have a tiny median, hence huge signs
        compact = height < 330 and width < 2.5 * height
        return compact if label.isalnum() else max(width, height) < 100 * STROKES_HEIGHT
    if height > 330 or not max(14, 0.15 * height) < width / len(label) < 330:
        return False
    # Gaps between pieces of ink: a space must show as one, and a word must not fall apart.
    left, right = np.array(sorted((s[:, 0].min(), s[:, 0].max()) for s in strokes)).T
    gaps = np.sort(left[1:] - np.maximum.accumulate(right)[:-1])[::-1]  # the widest first
    spaces = label.count(" ")
    apart = len(gaps) >= spaces and all(12 < gap < 260 for gap in gaps[:spaces])
    return apart and all(gap < 110 for gap in gaps[spaces:])


@cache
def load_strokes():
    """The samples of UNIPEN's compact file, Written, with packed strokes; makes it if need be."""
    path = Path(DATASETS_DIR, STROKES_FILE)
    if not path.exists():
        anywhere = f"{path.parent.as_posix()}/**/data/7"  # as somebody has unpacked or linked it
        if not glob(anywhere, recursive=True):
            download_unipen(path.parent)
        parse_unipen(Path(min(glob(anywhere, recursive=True))).parents[1], path)
    with np.load(path) as file:
        points, ends = file["points"], file["strokes"].cumsum()[:-1]
        steps = np.split(file["steps"], points.cumsum()[ends - 1])
        writers, labels = (str(file[name]).split("\n") for name in ("writers", "labels"))
    return list(map(Written, zip(steps, np.split(points, ends)), labels, writers))


# What the writers of a split have written. texts: label -> its samples, of all writers; labels: of
# every such sample; writers: of each, character -> samples.
People = namedtuple("People", "texts labels writers")


@cache
def people(split):
    """The People of a split."""
    texts, writers = {}, {}
    for sample in load_strokes():
        label, writer = sample.label, sample.writer
        if split_of(writer.split("/")[-1]) != split:  # a person's, whoever collected the writing
            continue
        # Held-out words are never trained on, whoever wrote them.
        words = re.findall("[A-Za-z]{2,}", label) if split == "train" else []
        if len(label) == 1:
            writers.setdefault(writer, {}).setdefault(label, []).append(sample)
        elif all(split_of(word) == "train" for word in words):
            texts.setdefault(label, []).append(sample)
    labels = [label for label, samples in texts.items() for _ in samples]
    return People(texts, labels, list(writers.values()))


def strokes_of(sample):
    """The strokes of a packed sample, a list of float32 (points, 2), y down, near (0, 0)."""
    steps, points = sample.strokes  # from point to point (points, 2); of each stroke, how many
    places = steps.astype(np.int32).cumsum(0).astype(np.float32)  # (points, 2)
    return np.split(places, points.cumsum()[:-1])


# Signs that UNIPEN lacks, put together from what their writer has, and the x of many who join
# letters: for each part, which characters it may be, and its left, top, width (below 0: mirrored)
# and height in heights of the sign; height 0: as flat as it comes
SIGNS = {
    "≠": [("=", 0, 0.27, 0.85, 0.45), ("/", 0.25, 0, 0.45, 1)],
    "±": [("+", 0, 0, 0.8, 0.7), ("-_", 0, 0.95, 0.8, 0)],
    "≤": [("<", 0, 0, 0.8, 0.65), ("-_", 0, 0.95, 0.8, 0)],
    "≥": [(">", 0, 0, 0.8, 0.65), ("-_", 0, 0.95, 0.8, 0)],
    "÷": [("-", 0, 0.5, 1, 0), (".", 0.46, 0.08, 0.08, 0.08), (".", 0.46, 0.87, 0.08, 0.08)],
    "×": [("x+", 0, 0, 0.9, 0.9)],
    "x": [("c", 0.4, 0, -0.4, 0.55), ("c", 0.4, 0, 0.4, 0.55)],
    "√": [("V", 0, 0, 0.45, 1), ("-_", 0.45, 0, 0.8, 0)],
    "π": [("-_~", 0, 0, 1, 0), ("|/(", 0.2, 0.1, 0.1, 0.85), ("|(L", 0.65, 0.1, 0.15, 0.85)],
}


def put_together(c, writers):
    """The strokes of a sign of SIGNS, by the first of these writers who has its parts, or None."""
    able = (w for w in writers if all(set(parts) & w.keys() for parts, *_ in SIGNS[c]))
    writer, sign = next(able, None), []
    for parts, *box in SIGNS[c] if writer else []:
        part = choice([part for part in parts if part in writer])
        if c == "√" and sign:  # the bar begins at the tip of the right arm, mostly
            box[:2] = np.divide(max(sign[-1].tolist()), STROKES_HEIGHT)
        strokes = fit_in_box(strokes_of(choice(writer[part])), *box)  # (points, 2) each
        if c == "√" and not sign:  # the left arm is only begun
            arm, low = strokes[0], strokes[0][:, 1].argmax()
            arm[:low, 1] = arm[low, 1] - uniform(0.2, 0.6) * (arm[low, 1] - arm[:low, 1])
        if c in "≤≥" and sign and chance(0.5):  # the bar slants as the lower arm does
            slope = uniform(0.2, 0.4) * (1 if c == "≤" else -1)
            strokes = [stroke @ np.float32([[1, slope], [0, 1]]) for stroke in strokes]
        if part == "+" and c == "×":  # a cross, lying
            strokes = [stroke @ np.float32([[1, 1], [-1, 1]]) for stroke in strokes]
        sign += strokes
    return sign or None


def fit_in_box(strokes, left, top, width, height):
    """Scale strokes to a box (1 is STROKES_HEIGHT), with the variation of a human hand."""
    every = np.concatenate(strokes)
    low, size = every.min(0), np.maximum(np.ptp(every, axis=0), 1)
    across = width * gauss(1, 0.15) / size[0]
    # A bar keeps its slope and bends unless they are large beside it: some are drawn tiny.
    down = height * gauss(1, 0.1) / size[1] if height else min(across, 0.15 / size[1])
    corner = [left + gauss(0, 0.03), top + gauss(0, 0.03)]
    return [np.float32(STROKES_HEIGHT * ((s - low) * [across, down] + corner)) for s in strokes]


# ---- Hands: how one person writes. EMNIST's characters are all one size, pen strokes have lost
# their height on the line, and the sizes of signs are erratic: load_places() restores all three.
@cache
def load_places():
    """Character -> how it stands on its line, in heights of a capital; as A does, if not listed.

    anchor: which part of it is placed, 0 its bottom, 1 its top; height: how high above the
    baseline; least, most: how tall it is, or of a sign its larger side.
    """
    rows = pd.read_csv(PLACES_FILE, index_col=0, keep_default_na=False).itertuples()
    listed = {c: row for row in rows for c in row.Index}
    return defaultdict(lambda: listed["A"], listed)


class Hand(NamedTuple):  # of one line; lengths are in heights of a capital
    split: str
    capital: int  # the height of a capital in pixels
    stroke: float  # width of the pen
    slant: float  # columns per row
    looseness: float  # how much sizes, places and spaces vary
    spacing: float  # between characters; below 0 they touch
    samples: dict  # label -> samples of one writer or, of texts, of all; none: EMNIST's
    wide: float  # how much strokes are stretched
    joined: bool  # whether the letters of a word hang together
    point: float  # how high a point stands: some write it in the middle, as between factors
    haste: float  # the reach over which corners are rounded off


def pick_hand(line):
    """A Hand for a Line: EMNIST's, that of all people or of one who has its letters, or None."""
    split, samples = line.split, {}
    if line.source.pen is retrace:
        samples = people(split).texts
    elif line.source.kind == STROKES:
        needed = set(line.label) & set(ALPHANUMERIC)
        some = random.choices(people(split).writers, k=40)  # of so many, one nearly always can
        samples = next((writer for writer in some if needed <= writer.keys()), None)
    if samples is None:
        return None
    wide, slant, haste = 1, 0, 0
    if split == "train":
        wide, slant, haste = 2 ** uniform(-0.5, 0.4), gauss(0, 0.15), choice([0, uniform(0, 0.08)])
    # EMNIST's pens were thick: so is the one for the signs among its characters.
    stroke = uniform(*choice([(0.04, 0.07), (0.05, 0.11)] if samples else [(0.08, 0.16)]))
    # Size alone tells a lone c from C.
    looseness = uniform(0, 0.06 if line.alone else choice([0.06, 0.15]))
    spacing = uniform(*choice([(-0.08, 0.1), (0, 0.35), (0.1, 0.6)] if samples else [(-0.1, 0.3)]))
    habits = wide, bool(samples) and chance(0.4), choice([0, 0, 0, 0, 0.4]), haste
    capital = choice([1, 1, 2]) * randint(20, 34)
    return Hand(split, capital, stroke, slant, looseness, spacing, samples, *habits)


def compose(text, hand):
    """Characters of a hand, and signs of anybody, set side by side as it would: ink (H, W)."""
    capital, baseline = hand.capital, 3 * hand.capital
    canvas, x = np.zeros((5 * capital, capital * (3 * len(text) + 6)), np.uint8), 2 * capital
    left_off = None  # where the pen was after the last letter of a joined hand, (x, y)
    for c in text:
        if c == " ":
            x += round(capital * (uniform(0.5, 0.9) + max(0, hand.spacing)))
            left_off = None
            continue
        by_emnist = c in ALPHANUMERIC and not hand.samples
        found = (take_from_emnist if by_emnist else write_character)(c, hand)
        if found is None:
            return None
        glyph, depth, ends = found
        y = baseline + depth - len(glyph)
        part = canvas[y : y + len(glyph), x : x + glyph.shape[1]]
        np.maximum(part, glyph, out=part)
        if left_off is not None and c in string.ascii_lowercase:
            join(canvas, left_off, ends[0] + (x, y), hand)
        left_off = ends[1] + (x, y) if hand.joined and c in string.ascii_letters else None
        # What touches a point or a dash would hide it.
        gap = hand.spacing if c in ALPHANUMERIC else max(hand.spacing, 0.15)
        x += max(2, round(glyph.shape[1] + capital * (gap + gauss(0, hand.looseness))))
    top, bottom = baseline - round(1.3 * capital), baseline + round(0.4 * capital)
    return line_box(canvas, top, bottom, capital // 3)


def join(canvas, start, end, hand):
    """Lead the pen from the end of a letter to the start of the next: low at first, then up."""
    low = np.array([start[0] / 2 + end[0] / 2, max(start[1], end[1])])
    t = np.linspace(0, 1, 9)[:, None]  # (9, 1)
    path = (1 - t) ** 2 * start + 2 * t * (1 - t) * low + t**2 * end  # (9, 2)
    width = max(1, round(hand.stroke * hand.capital))
    path = np.round(16 * path).astype(np.int32)
    cv2.polylines(canvas, [path], False, 255, width, cv2.LINE_AA, shift=4)


def take_from_emnist(c, hand):
    """Like write_character(), but without ends: EMNIST has no pen strokes."""
    (images, _, numbers), place = emnist(hand.split), load_places()[c]
    if not len(numbers[c]):
        return None
    size, glyph = (place.least + place.most) / 2, images[choice(numbers[c])]  # (28, 28)
    top, bottom, left, right = ink_box(glyph, 0.25)
    glyph = glyph[top : bottom + 1, left : right + 1]
    scale = hand.capital * size * gauss(1, hand.looseness) / len(glyph)
    width, height = max(1, round(glyph.shape[1] * scale)), max(4, round(len(glyph) * scale))
    depth = hand.capital * (place.anchor * size - place.height + gauss(0, hand.looseness))
    return cv2.resize(glyph, (width, height), interpolation=cv2.INTER_CUBIC), round(depth), None


def write_character(c, hand):
    """A character of the hand's writer or, if a sign is missing, anybody's, or None."""
    borrowed = c not in hand.samples  # this writer has written none
    writers = [hand.samples, *random.choices(people(hand.split).writers, k=200 * borrowed)]
    if c in SIGNS and (c != "x" or hand.joined):
        strokes = put_together(c, writers)
    else:
        samples = next((writer[c] for writer in writers if c in writer), None)
        strokes = samples and strokes_of(choice(samples))
    if not strokes:
        return None
    place = load_places()[c]
    width, height = np.ptp(np.concatenate(strokes), axis=0)
    size = max(1, height if c in ALPHANUMERIC else max(width, height))
    # A writer's capitals are 128 high in the median. Somebody else's sign has no size in this hand.
    tall = min(max(size / STROKES_HEIGHT, place.least), place.most)
    tall = uniform(place.least, place.most) if borrowed else tall
    scale = hand.capital * tall * gauss(1, hand.looseness) / size
    rise = max(place.height, hand.point if c == "." else place.height)
    depth = place.anchor * scale * height - hand.capital * (rise + gauss(0, hand.looseness))
    glyph, ends = trace(strokes, scale, hand)
    # The image, uint8 (h, w), pixels below the baseline, and the ends of the pen's way, (2, 2)
    return glyph, round(depth + hand.stroke * hand.capital / 2), ends


def trace(strokes, scale, hand):
    """Strokes as a round pen draws them, uint8 (h, w), no larger than the ink, and ends, (2, 2)."""
    width = max(2, round(2 * hand.stroke * hand.capital))  # twice as large first, to be smooth
    # (points, 2) each; not as a matrix product, whose last bit differs between processors
    lines = [np.stack([hand.wide * x - hand.slant * y, y], 1) for x, y in (s.T for s in strokes)]
    lines = [hurry(line * np.float32(2 * scale), 2 * hand.haste * hand.capital) for line in lines]
    every = np.concatenate(lines)
    low, size = every.min(0), np.ceil(np.ptp(every, 0) / 2).astype(int) * 2 + 2 * (width // 2 + 1)
    glyph = np.zeros(size[::-1], np.uint8)
    for line in lines:  # in sixteenths of a pixel; a dot is a line to itself
        path = np.round(16 * (np.concatenate([line, line[-1:]]) - low + width // 2 + 1))
        cv2.polylines(glyph, [path.astype(np.int32)], False, 255, width, cv2.LINE_AA, shift=4)
    # The pen leaves off at the end of the longest: dots and bars wait until a word is done.
    ends = np.stack([lines[0][0], max(lines, key=len)[-1]])  # (2, 2)
    glyph = cv2.resize(glyph, (size // 2).tolist(), interpolation=cv2.INTER_AREA)
    return glyph, (ends - low + width // 2 + 1) / 2


def hurry(line, reach):
    """The path of a pen (points, 2), its corners and loops rounded off over a reach in pixels."""
    along = np.append(0, np.hypot(*np.diff(line, axis=0).T).cumsum())  # (points,)
    reach = min(reach, along[-1] / 12)  # a sign stays a sign
    if reach < 0.5:
        return line
    even = np.linspace(0, along[-1], int(along[-1]) + 2)
    x, y = (np.interp(even, along, places) for places in line.T)
    return cv2.GaussianBlur(np.float32([x, y]), (0, 0), reach, sigmaY=1e-3).T  # (more points, 2)


def retrace(text, hand):
    """A word or text as somebody has written it: ink (H, W)."""
    strokes = strokes_of(choice(hand.samples[text]))
    # A writer's texts are 128 high in the median, as a whole: with ascenders and descenders.
    glyph, _ = trace(strokes, 1.3 * hand.capital / STROKES_HEIGHT, hand)
    return np.pad(glyph, hand.capital // 4).astype(np.float32) / 255


# ---- Effects: what the world does to a line. Each takes ink, float32 (H, W), and gives ink of any
# size; most lengths are in parts of its height, so that an effect is the same at every size.
def apply(steps, ink):
    """Apply steps to a line: each an effect with its settings, at a chance given by its share."""
    for share, effect, *settings in steps:
        if chance(share):
            ink = effect(ink, *settings)
    return ink


def warp(ink):
    """Warp a line (H, W), or the network would learn fifty handwriting fonts by heart."""
    tall, more = len(ink), len(ink) // 8  # rows to move into
    ink = np.pad(ink, ((more, more), (4, 4)))
    reach, patches = uniform(0, 0.2) * tall, uniform(1.5, 3)
    places = np.indices(ink.shape, np.float32)  # where a pixel is taken from, (2, H, W)
    y, x = (place + reach * (clouds(ink.shape, patches) - 0.5) for place in places)
    ink = cv2.remap(ink, x, y, cv2.INTER_LINEAR)
    top, bottom, _, _ = ink_box(ink)
    return ink[min(top, more) : max(bottom + 1, len(ink) - more)]  # no smaller than it was


def crop(ink, keep_height):
    """A line (H, W) with its paper cut at random, 2 pixels or more from the ink; some stretched."""
    (h, w), (first, last, left, right) = ink.shape, ink_box(ink)
    rooms = first, h - 1 - last, left, w - 1 - right
    top, bottom, left, right = (randint(0, max(0, room - 2)) for room in rooms)
    if keep_height:  # where size and place of characters tell c from C, a comma from a quote
        top = bottom = 0
    return apply([(0.3, stretched)], ink[top : h - bottom, left : w - right])


def in_cells(glyphs):
    """Characters (h, w) one by one in boxes of a form, or above a comb: ink (H, W)."""
    sides = [ink_box(glyph)[2:] for glyph in glyphs]
    glyphs = [glyph[:, left : right + 1] for glyph, (left, right) in zip(glyphs, sides)]
    height, width = (max(glyph.shape[axis] for glyph in glyphs) for axis in (0, 1))
    pitch = round(max(width * uniform(1.05, 1.4), height * uniform(0.4, 0.9))) + 2
    h, w = round(height * uniform(1.05, 1.4)), pitch * len(glyphs) + 1
    ink, y = np.zeros((h, w), np.float32), randint(0, h - height)
    for i, glyph in enumerate(glyphs):
        x = pitch * i + round((pitch - glyph.shape[1]) * uniform(0.35, 0.65))
        up = max(0, min(h - len(glyph), y + randint(-height // 20, height // 20)))
        ink[up : up + len(glyph), x : x + glyph.shape[1]] = glyph
    top, bottom = uniform(0, 0.08) * h, h - 1 - uniform(0, 0.08) * h
    start = choice([top, top, bottom - uniform(0.1, 0.35) * h])  # a comb has no top
    lines = [((x, start), (x, bottom)) for x in range(0, w, pitch)]
    lines += [((0, y), (w - 1, y)) for y in {bottom, top if start == top else bottom}]
    rim = randint(0, 3)  # pixels, how the fields are cut out of the form
    return add_lines(ink, lines)[rim : h - rim, rim : w - rim]


def add_lines(ink, ends, tone=(0.3, 1)):
    """Ink with straight lines from (x, y) to (x, y) of a tone, 1 or 2 pixels wide in 50 rows."""
    mask, width = np.zeros(ink.shape, np.uint8), round(choice([1, 1, 2]) * max(1, len(ink) / 50))
    cv2.polylines(mask, np.int32(np.round(ends)), False, 255, width, cv2.LINE_AA)
    return np.maximum(ink, mask.astype(np.float32) * (uniform(*tone) / 255))


# ---- Effects on place and shape
def room(ink, least=0.0, most=0.25):
    """More paper on each side."""
    top, right, bottom, left = (round(uniform(least, most) * len(ink)) for _ in range(4))
    return np.pad(ink, ((top, bottom), (left, right)))


def framed(ink, least=-0.04, most=0.15):
    """Cut out near the text or, below 0, a little into it; in heights of the text."""
    top, bottom, left, right = ink_box(ink, 0.15)
    line = bottom - top
    if line < 0.4 * len(ink):  # a comma, a dash
        return ink
    if right - left < line / 3:  # a single upright stroke would be cut away
        least = max(0, least)
    top, left = (max(0, side - round(uniform(least, most) * line)) for side in (top, left))
    bottom, right = (side + 1 + round(uniform(least, most) * line) for side in (bottom, right))
    return ink[top:bottom, left:right]


def stretched(ink):
    """Condensed or extended, in octaves."""
    width = max(4, round(ink.shape[1] * 2 ** uniform(-0.6, 0.4)))
    return cv2.resize(ink, (width, len(ink)), interpolation=cv2.INTER_AREA)


def leaning(ink, least=0.05, most=0.25):
    """To the right, as the digits of many displays do, by so many columns a row; below 0 left."""
    (h, w), slant = ink.shape, uniform(least, most)
    aside = np.float32([[1, -slant, max(0, slant) * h], [0, 1, 0]])
    return cv2.warpAffine(ink, aside, (round(w + abs(slant) * h), h))


def snapped(ink):
    """Seen at an angle by a camera that is out of focus or shaken."""
    h, w = ink.shape
    corners = np.float32([(0, 0), (w, 0), (w, h), (0, h)])
    moved = corners + (generator().random((4, 2), dtype=np.float32) - 0.5) * 0.14 * h
    ink = cv2.warpPerspective(ink, cv2.getPerspectiveTransform(corners, moved), (w, h))
    if chance(0.5):
        return cv2.GaussianBlur(ink, (0, 0), uniform(0.4, h / 40))
    length = randint(2, max(2, h // 18))  # of a point's way while the shutter is open
    ways = np.ones((1, length)), np.ones((length, 1)), np.eye(length), np.eye(length)[::-1]
    return cv2.filter2D(ink, -1, choice(ways) / length)


# ---- Effects of other ink
def form_lines(ink, numbers=(1, 1, 2, 3, 4)):
    """Underlined, some dotted, between rules or, with all four lines, in a box."""
    h, w = ink.shape
    top, bottom, _, _ = ink_box(ink, 0.3)
    low, high = bottom + uniform(-0.12, 0.12) * h, top - uniform(0.03, 0.2) * h
    left, right, slope = (uniform(-0.1, 0.1) * h for _ in range(3))
    lines = [((0, low), (w, low + slope / 5)), ((0, high), (w, high + slope / 5))]
    lines += [((left, 0), (left, h)), ((w - 1 - right, 0), (w - 1 - right, h))]
    lines = add_lines(np.zeros_like(ink), lines[: choice(numbers)], (0.4, 1))
    lines *= (np.arange(w) % 6 < 3) | (not chance(0.1))  # some dotted, to write on
    return np.maximum(ink, lines)


def neighbours(ink, most=0.14, each=0.4, aside=False):
    """Parts of the lines above and below show or, with aside, of the characters left and right."""
    reach, ink = int(most * len(ink)) + 1, ink.T if aside else ink
    for _ in range(2):  # below, upside down, and then above
        ink = ink[::-1]
        top, bottom, _, _ = ink_box(ink, 0.3)
        if top > 3 and chance(each):  # only on paper that is free of our own ink
            part = randint(1, min(top - 2, reach, bottom + 1 - top))
            other = np.roll(ink[bottom + 1 - part : bottom + 1], randint(0, ink.shape[1]), 1)
            ink = np.concatenate([np.maximum(ink[:part], other), ink[part:]])
    return np.ascontiguousarray(ink.T) if aside else ink


def lined(ink, pitches, bend, tones):
    """Ruled or squared paper; with lines bent far, the background of a cheque."""
    (y, x), pitch = np.indices(ink.shape) / len(ink) + uniform(0, 1), uniform(*pitches)  # heights
    reach, length = uniform(0, bend), uniform(0.3, 3)
    waves = [y + reach * np.sin(x / length), x + reach * np.sin(y / length)][: choice([1, 1, 2])]
    far = np.min([np.abs(np.sin(np.pi * wave / pitch)) for wave in waves], axis=0)  # (H, W)
    far *= pitch * len(ink) / np.pi  # from a line, in pixels
    return np.maximum(ink, np.float32(uniform(*tones) * (uniform(0.6, 2) - far).clip(0, 1)))


def specks(ink):
    """Dirt on the glass of a copier."""
    dots = np.float32(generator().random(ink.shape) < uniform(0, 0.002))
    return np.maximum(ink, cv2.dilate(dots, np.ones((randint(1, 3), randint(1, 3)), np.uint8)))


# ---- Effects on how the ink lies
def bold(ink, least=0.04, most=0.08):
    """By a felt pen or a heavy press, its corners round; below 0 thinner instead."""
    more = uniform(least, most)
    size, change = max(2, round(abs(more) * len(ink))), cv2.dilate if more > 0 else cv2.erode
    changed = change(ink, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
    return changed if changed.max() > 0.7 * ink.max() else ink  # a thin dash would go


def pressed(ink):
    """By pen: pressure that varies along the line; or a head that heats unevenly."""
    thin, thick = (change(ink, np.ones((2, 2), np.uint8)) for change in (cv2.erode, cv2.dilate))
    pressure = clouds(ink.shape, 4) * uniform(0.3, 1)
    light, heavy = 0.4 * ink + 0.6 * thin, ink + (pressure - 0.35) * (thick - ink)
    return np.where(pressure < 0.35, light, heavy)


def starved(ink):
    """Level or upright strokes nearly lost in places, as by a worn head or a coarse scan."""
    top, bottom, _, _ = ink_box(ink)
    if bottom - top < 0.4 * len(ink):  # a dash would be lost as a whole
        return ink
    size = max(2, round(uniform(0.05, 0.12) * len(ink)))
    thin = cv2.erode(ink, np.ones(choice([(size, 1), (1, size)]), np.uint8))
    lost = 3 * clouds(ink.shape, choice([0.5, 1, 2])) - uniform(0.8, 1.8)  # (H, W)
    return ink + np.float32(lost.clip(0, uniform(0.6, 1))) * (thin - ink)


def lost_points(ink):
    """Points and other specks hardly printed, as by a worn head."""
    top, bottom, _, _ = ink_box(ink)
    number, places, boxes, _ = cv2.connectedComponentsWithStats(np.uint8(ink > 0.15 * ink.max()))
    small = boxes[:, 2:4].max(1) < 0.3 * (bottom - top)  # (components,), widths and heights
    return ink * np.where(small, uniform(0.1, 0.7), 1).astype(np.float32)[places]


def blur(ink):
    return cv2.GaussianBlur(ink, (0, 0), uniform(0.4, 0.9))


def coarse(ink, least=11, most=18, two_tones=0.0):
    """Scanned with so few rows a line, a share (two_tones) in black and white, and enlarged."""
    (h, w), (top, bottom, *_) = ink.shape, ink_box(ink)
    # Counted over the ink, not the paper around it; a dash or a comma counts as half the height
    rows = round(randint(least, most) * h / max(h / 2, bottom + 1 - top))
    small = cv2.resize(ink, (max(4, round(w * rows / h)), rows), interpolation=cv2.INTER_AREA)
    if chance(two_tones):
        grain = 0.04 * generator().standard_normal(small.shape, np.float32)
        small = np.float32(small + grain > uniform(0.2, 0.4) * small.max())
    how = choice([cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC])
    return cv2.resize(small, (w, h), interpolation=how).clip(0, 1)


def lettered(ink):
    """Shaded, with an outline or a shadow, or in relief; what is below 0 is lighter than paper."""
    wide, move = bold(ink, 0.04, 0.09), max(1, round(uniform(0.03, 0.06) * len(ink)))
    aside = np.roll(wide, [choice([-move, move]), choice([-move, move])], (0, 1))
    looks = [ink] * 4 + [np.maximum(wide - ink, uniform(-0.3, 0.2) * ink)]
    looks += [np.maximum(ink, uniform(0.2, 0.6) * aside), ink - 0.35 * (aside - ink).clip(0)]
    looks += [uniform(0.4, 0.8) * ink + 0.5 * (ink - np.roll(ink, (2, 2), (0, 1)))]
    return choice(looks) * (1 - choice([0, 0, 0.2, 0.4]) * clouds(ink.shape, 1))


def give_tones(
    ink, dark=(0, 110), light=(190, 255), grain=(0, 3, 6), inverse=0, jpeg=(), shade=0, pale=0
):
    """Ink (H, W) of a tone on paper of another, with noise, as an image, uint8 (H, W).

    inverse: share of light on dark; jpeg: a range of qualities; shade: how unevenly it may be lit;
    pale: share with hardly any contrast.
    """
    page = np.float32(randint(*light))
    if shade:
        page = page * (1 - uniform(0, shade) * clouds(ink.shape, uniform(0.3, 1.2)))
    ink = ink * (1 - randint(*dark) / 255) * (uniform(0.2, 0.5) if chance(pale) else 1)
    image = page * (1 - ink) + choice(grain) * generator().standard_normal(ink.shape, np.float32)
    image = image.clip(0, 255).round().astype(np.uint8)
    image = 255 - image if chance(inverse) else image
    if jpeg:
        coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, randint(*jpeg)])[1]
        image = cv2.imdecode(coded, cv2.IMREAD_GRAYSCALE)
    return image


# ---- Styles: how a line looks in the real world. To drop a style, delete its row.
class Style(NamedTuple):
    weight: float  # how often, against the others of its kind
    effects: list  # what is done to the ink, one after the other, see apply()
    tones: dict = {}  # see give_tones()
    texts: str = ""  # a mix or one kind of text, else as the source has it
    fonts: str = ""  # a pattern for the names of font files
    cells: bool = False  # characters are set one by one, in the boxes of a form


NARROW = "condensed|narrow|mono|oswald|teko|league|abel|dosis"

# Tones
LIGHT = dict(light=(205, 255))
CLEAN = dict(dark=(0, 90), light=(205, 255))
FAINT = dict(dark=(40, 150), light=(215, 250))
PHOTO = dict(dark=(13, 128), light=(140, 250), grain=(2, 5, 9), jpeg=(20, 75), shade=0.5, pale=0.2)
PLATE = dict(dark=(0, 130), light=(130, 255), grain=(0, 2, 5), inverse=0.5)
SLIP = dict(dark=(0, 150), light=(195, 255), grain=(0, 2, 6, 14), jpeg=(30, 95))
SIGN = dict(dark=(0, 120), light=(150, 255), grain=(0, 0, 3), inverse=0.6, jpeg=(25, 90), pale=0.15)
DIAL = SIGN | dict(shade=0.3)

# Effects that several styles share: how often each is at work (1: always), and its settings
PRESS = (0.4, bold, 0, 0.06)
WORN = [(0.25, lost_points), (0.25, starved)]
HEATED = [*WORN, (0.4, pressed), (1, coarse, 15, 24)]
COPY = [(1, neighbours), (0.1, form_lines, [1, 2]), (1, partial(coarse, two_tones=0.6), 20, 48)]
COPY += [(0.15, specks), (0.5, blur), (1, framed)]
SCAN = [*WORN, PRESS, (0.3, pressed), (1, room, 0, 0.15), *COPY]
WAVES = (0.8, lined, (0.06, 0.25), 0.3, (0.1, 0.4))
BESIDE = partial(neighbours, aside=True)
BOARD = [PRESS, (1, room, 0.12), (1, BESIDE, 0.06, 0.15), (1, lettered)]
SEGMENTS = [(0.5, bold, -0.06, 0), (0.6, leaning), (1, room, 0, 0.3)]  # with wider gaps
FAR = (0.2, coarse, 10, 18)
SEEN = [(1, snapped), (1, framed)]
BETWEEN = [(1, room, 0.05, 0.2), (1, BESIDE, 0.12, 0.4)]  # other characters
CUT_OUT = [(0.5, bold, 0, 0.1), (1, framed), *BETWEEN]  # of a word
# The digit before and the one after come into the window of a meter.
ROLLING = [(0.7, neighbours, 0.3, 0.6), (0.3, form_lines, [1, 3, 4]), (1, snapped), (1, framed, 0)]

EVERYWHERE = {
    "form": Style(2.5, [(1, room), (1, neighbours), (1, form_lines)], CLEAN),
    "fields": Style(1.5, [(1, room, 0, 0.12)], CLEAN, "fields", cells=True),
    "photograph": Style(2.5, [(1, room, 0.08, 0.33), (1, snapped), FAR], PHOTO),
    "margins": Style(1.5, [(1, room, 0, 0.5), (0.4, framed, 0)]),
}
STYLES = {
    PRINTED: {
        "plain": Style(0, [(0.4, blur)], LIGHT),
        "receipt": Style(4, [*HEATED, (1, framed)], SLIP, "receipt", NARROW),
        "scanned": Style(4, SCAN, SLIP, "receipt"),
        "label": Style(2, [PRESS, (1, room), (0.35, form_lines, [4])], PLATE, "label"),
        "sign": Style(6, [*BOARD, FAR, *SEEN], SIGN, "sign"),
        "letter": Style(3, [*CUT_OUT, *BOARD, *SEEN], SIGN, "large"),
        "display": Style(2, [*SEGMENTS, (1, blur), (0.5, snapped)], DIAL, "display", "dseg"),
        "counter": Style(1, [*BETWEEN, *ROLLING], DIAL, "dial"),
    }
    | EVERYWHERE,
    HANDWRITTEN: {
        "plain": Style(0, [(0.3, blur)]),
        "pen": Style(3, [(1, pressed)], LIGHT),
        "pencil": Style(2, [], FAINT),
        "marker": Style(1.5, [(1, bold), (1, blur)]),
        "ruled": Style(3, [(1, room), (1, lined, (0.3, 0.9), 0.03, (0.15, 0.6))], LIGHT),
        "copied": Style(3, [PRESS, *COPY], CLEAN),
        "cheque": Style(3.5, [PRESS, (1, room), WAVES, (0.5, blur)], CLEAN, "cheque"),
    }
    | EVERYWHERE,
}
STYLES[EMNIST] = STYLES[STROKES] = STYLES[HANDWRITTEN]


# ---- Images
class Source(NamedTuple):
    kind: str  # of what it is drawn with, and so of its styles
    pick: object  # gives a Font or a Hand for a Line, or None
    pen: object  # draws a whole label; None: EMNIST's images as they are
    texts: str  # a mix or one kind of text
    cell_pen: object = None  # draws characters one by one in cells, if any
    also: tuple = ()  # kinds that it is drawn with besides: EMNIST has no signs


SOURCES = {
    "trdg_custom": Source(PRINTED, pick_font, typeset_by_trdg, "printed", typeset),
    "synthetic_math": Source(PRINTED, pick_font, typeset, "math"),
    "emnist_images": Source(EMNIST, None, None, ""),
    "emnist_words": Source(EMNIST, pick_hand, compose, "emnist", compose, also=(STROKES,)),
    "emnist_math": Source(EMNIST, pick_hand, compose, "math", also=(STROKES,)),
    "handwriting": Source(HANDWRITTEN, pick_font, typeset, "by_hand", typeset),
    "unipen_words": Source(STROKES, pick_hand, retrace, "written"),
    "unipen_text": Source(STROKES, pick_hand, compose, "by_hand", compose),
    "unipen_math": Source(STROKES, pick_hand, compose, "math"),
}


# What is to be drawn, decided before anything is. alone: no word around its characters tells O from
# 0; texts: the mix the label is from.
Line = namedtuple("Line", "label alone split source style texts")


def sample(source, index):
    """Image, uint8 (H, W), label, split and style. InputError: the constants allow hardly any."""
    random.seed(f"{SEED} {source} {index}")  # a string's seed is the same on every platform
    row, split = SOURCES[source], {1: "val", 2: "test"}.get(index % CYCLE, "train")
    if row.pen is None:  # a character as EMNIST has it, none twice
        images, labels, _ = emnist(split)
        place = index if split == "train" else index // CYCLE
        return 255 - images[place], str(labels[place]), split, "plain"
    styles = {n: s for n, s in STYLES[row.kind].items() if row.cell_pen or not s.cells}
    weights = [style.weight for style in styles.values()]
    for _ in range(TRIES):
        name = random.choices(list(styles), weights)[0] if chance(STYLED) else "plain"
        style = styles[name]
        # Expressions stay expressions in every style.
        texts = style.texts if style.texts and row.cell_pen else row.texts
        label, alone = pick_text(texts, split)
        line = Line(label, alone, split, row, style, texts)
        tool = row.pick(line) if acceptable(label) and not unclear(line) else None  # a Font, a Hand
        image = None if tool is None else draw(line, tool)
        if image is not None and is_readable(image, label):
            return image, label, split, name
    remedy = f"widen CHARSET and MAX_LENGTH, or set NUM_IMAGES[{source!r}] = 0"
    raise InputError(f"no {source} image in {TRIES} tries, the last label was {label!r}: {remedy}")


def unclear(line):
    """Whether a Line's label could only be guessed, as no word around it helps."""
    alike = [set(s[1:]) for s in ("1Il|", "0Oo") if len(set(s) & set(CHARSET)) > 1]  # O is 0
    by_hand = line.source.pen is compose and set(line.label) & set().union(*alike)
    close = framed in [effect for _, effect, *_ in line.style.effects]  # cut so, c may be C
    cut = close and len(line.label) < 3 and not set(line.label) <= set(read_grammar()["large"])
    return line.alone and bool(by_hand or cut)


def is_readable(image, label):
    """Whether the network sees ink in an image, and has frames for all of its label."""
    # As an array: torch's threads hang in a forked worker, and a wide line stopped a run for good.
    seen = crnn.load_image(image).numpy()  # (HEIGHT, W)
    return crnn.fits(label, seen) and int((seen < 128).sum()) >= 3  # pixels: a full stop


def draw(line, tool):
    """A Line by a Font or a Hand, from pen to tones: an image, uint8 (H, W), or None."""
    label, source, style = line.label, line.source, line.style
    text, by_hand = label, source.pen is compose and not line.alone  # a lone X is an X
    if by_hand and line.texts == "math":  # some write sin, cos, x with a capital, but not exp
        text = re.sub("sin|cos|(?<!e)x", lambda m: m[0].title() if chance(0.15) else m[0], label)
    elif by_hand and line.texts == "cheque":  # in amounts, some write 9 as g or q
        text = re.sub("9", lambda _: choice("9999gq"), label)
    # One by one, as into the boxes of a form, or as a whole: ink (h, w) each
    inks = [source.cell_pen(c, tool) for c in label] if style.cells else [source.pen(text, tool)]
    if any(ink is None for ink in inks):
        return None
    # Only in training: the other splits are to show fonts and characters as they are.
    if source.kind != PRINTED and line.split == "train" and chance(WARPED):
        inks = [warp(ink) for ink in inks]
    keep_height = line.alone or len(label) < 3 or chance(0.5)
    ink = in_cells(inks) if style.cells else crop(inks[0], keep_height)
    return give_tones(apply(style.effects, ink), **style.tones)


# ---- Drawing, a chunk at a time. A chunk is done once its csv, written last, has the current mark.
# A task for a worker: the images of a source with these indices
Chunk = namedtuple("Chunk", "source indices mark csv")


def find_marks(sources):
    """For each source, a hash of all that shapes its images: not comments, counts and folders."""
    parts = [globals()[name] for name in SHAPING] + [crnn.preprocessing()]
    parts += [version("pillow"), version("trdg"), cv2.__version__, np.__version__]
    for script in (__file__, crnn.__file__):
        code = Path(script).read_text(encoding="utf-8").split("# " + "-" * 98 + "\n", 2)[-1]
        # Without comments; as text, since ast differs between Pythons
        parts.append(re.sub(r"(?m)^ *# .*\n|  # .*$", "", code))
    parts += [(Path(font.path).name, font.kind) for font in find_fonts()[0]]
    files = [TEXTS_FILE, WORDS_FILE, LEFT_OUT_FILE, PLACES_FILE]
    files += [font.path for font in find_fonts()[0]]
    parts += [zlib.crc32(Path(file).read_bytes()) for file in files]
    common, path = f"{zlib.crc32(repr(parts).encode()):08x}", Path(DATASETS_DIR, STROKES_FILE)
    # UNIPEN may come later: no printed image is redrawn.
    pens = f" {zlib.crc32(path.read_bytes()):08x}" if path.exists() else ""
    penned = {name for name, row in SOURCES.items() if STROKES in (row.kind, *row.also)}
    return {name: common + pens * (name in penned) for name in sources}


def rows_of(chunk):
    """The rows of a chunk that is done, a DataFrame, or None."""
    with contextlib.suppress(InputError, KeyError):  # not there, or damaged
        rows = crnn.read_labels(chunk.csv).head(len(chunk.indices))
        present = len(rows) == len(chunk.indices) and (rows["mark"] == chunk.mark).all()
        data_csv = chunk.csv.parents[1] / "data.csv"  # whose paths these are
        if present and all(map(Path.exists, crnn.image_paths(rows, data_csv))):
            return rows[COLUMNS]
    return None


def draw_chunk(chunk):
    """Draw a chunk's images and, when all are there, write its csv. Runs in the workers."""
    chunk.csv.parent.mkdir(parents=True, exist_ok=True)
    chunk.csv.unlink(missing_ok=True)  # its labels are those of the images about to be replaced
    rows = []
    for index in chunk.indices:
        image, label, split, style = sample(chunk.source, index)
        path = chunk.csv.with_name(f"{index:05}.png")
        how = cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE  # small enough, and quickly
        path.write_bytes(cv2.imencode(".png", image, how)[1])
        rows.append((f"{chunk.source}/{path.name}", label, chunk.source, split, style))
    crnn.write_labels(pd.DataFrame(rows, columns=COLUMNS).assign(mark=chunk.mark), chunk.csv)
    return len(rows)


def start_worker(constants):
    """Prepare a worker, and end it if its parent is killed: it would draw on, and wait for ever."""
    globals().update(constants)
    cv2.setNumThreads(1)  # there is a worker to a processor already
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def draw_all(counts):
    """Draw what is missing. Returns the rows of all images, and how many were missing."""
    chunks, marks, folder = [], find_marks(counts), Path(DATASETS_DIR)
    for source, count in counts.items():
        for start in range(0, count, CHUNK):
            indices, csv_path = range(count)[start : start + CHUNK], f"{source}/{start:05}.csv"
            chunks.append(Chunk(source, indices, marks[source], folder / csv_path))
    missing = [chunk for chunk in chunks if rows_of(chunk) is None]
    for leftover in [*folder.glob(".*.part"), *folder.glob("*/.*.part")]:  # of killed processes
        leftover.unlink(missing_ok=True)
    if missing:  # the labels of the former images
        (folder / "data.csv").unlink(missing_ok=True)
    cv2.setNumThreads(1)  # before the fork: a worker would wait for ever for threads left behind
    # A spawned worker has the constants as written in this file: give it the current values.
    constants = {name: globals()[name] for name in [*SHAPING, "FONTS_DIR", "DATASETS_DIR"]}
    new = sum(len(chunk.indices) for chunk in missing)
    workers, bar = max(1, NUM_WORKERS), crnn.progress(desc="drawing", total=new)
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=[constants]) as pool, bar:
        for number in (pool.map if workers > 1 else map)(draw_chunk, missing):
            bar.update(number)
    return pd.concat(map(rows_of, chunks), ignore_index=True), new


# ---- What can be drawn, and what is written
def count_images():
    """How many images of each source there will be: of those whose fonts or data are there."""
    if unknown := NUM_IMAGES.keys() - SOURCES.keys():
        raise InputError(f"NUM_IMAGES names {min(unknown)}: choose from {', '.join(SOURCES)}")
    print(*find_fonts()[1], sep="\n")
    counts = {source: int(number) for source, number in NUM_IMAGES.items() if number > 0}
    # Validation and test need a font family of their own.
    kinds = {font.kind for font in find_fonts()[0] if font.held_out}
    for source in list(counts):
        for needed in (SOURCES[source].kind, *SOURCES[source].also):
            if not (fetch(needed) if needed in (EMNIST, STROKES) else needed in kinds):
                needs = f"two families of {needed} in {FONTS_DIR}" if "fonts" in needed else needed
                print(f"{source} is skipped: it needs {needs}")
                counts.pop(source, None)
    if "emnist_images" in counts:  # no character twice
        most = [len(emnist(s)[1]) * (1 if s == "train" else CYCLE) for s in SPLITS]
        counts["emnist_images"] = min(counts["emnist_images"], *most)
        if not counts["emnist_images"]:
            print("emnist_images is skipped: CHARSET has no letter and no digit")
            del counts["emnist_images"]
    if not counts:
        raise InputError("nothing to draw: set a number in NUM_IMAGES, see also the lines above")
    return counts


def custom_rows():
    """The rows of labels.csv in datasets/custom and in its folders, in the form of data.csv."""
    datasets, tables, listed = Path(DATASETS_DIR), {}, set()
    folder = datasets / "custom"
    found = glob("**/labels*.csv", root_dir=folder, recursive=True)  # also behind links
    paths = sorted(folder / path for path in found)
    with_labels = {path.parent for path in paths}
    for place in sorted({folder, *folder.glob("*/")} - with_labels):
        if any(place.glob("*.*")) and folder not in with_labels:  # whose csv may name any image
            print(f"{place.as_posix()} is skipped: it has no labels.csv with image_path,label")
    # Newest first: of an image corrected twice, and so in two files, the newest label counts.
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)[::-1]:
        rows = crnn.read_labels(path)
        rows = crnn.add_split(rows.assign(source=rows.get("source", path.parent.name)))
        try:
            real = map(os.path.realpath, crnn.image_paths(rows, path))  # .. of a link is elsewhere
            images = [os.path.relpath(image, os.path.realpath(datasets)) for image in real]
        except ValueError:  # of Windows: no path leads there
            raise InputError(f"{path}: images on another drive, move them to {folder}") from None
        rows["image_path"] = [Path(image).as_posix() for image in images]
        tables[path] = rows[~rows.image_path.isin(listed)].assign(style="custom")[COLUMNS]
        listed.update(rows.image_path)
    none = pd.DataFrame(columns=COLUMNS)
    return pd.concat([none, *(tables[path] for path in paths)], ignore_index=True)


def contact_sheet(path, cells, columns):
    """Save a sheet of cells to look at: (path, PIL image or None; captions, two (text, colour))."""
    width, margin, tall, line = 230, 6, 40, 17  # pixels: a cell, around it; an image, a caption
    height = tall + 2 * line + margin
    font = ImageFont.truetype(str(OURS / "DejaVuSans.ttf"), 13)  # it has every sign of the charset
    rows = max(1, math.ceil(len(cells) / columns))
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, captions) in enumerate(cells):
        x, y = i % columns * width + margin, i // columns * height + margin
        if image:
            with crnn.open_image(image) as opened:
                image = ImageOps.contain(opened.convert("RGB"), (width - 2 * margin, tall - 2))
            sheet.paste(ImageOps.expand(image, 1, "#bbbbbb"), (x - 1, y - 1))
        for number, (text, colour) in enumerate(captions):
            draw.text((x, y + tall + number * line), text, font=font, fill=colour)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def draw_preview(rows):
    """preview.png: of every style of every source, four training and three test images."""
    cells, datasets = [], Path(DATASETS_DIR)
    for (source, style), group in rows.groupby(["source", "style"], sort=False):
        shown = pd.concat([group[group.split == "train"][:4], group[group.split == "test"][:3]])
        cells.append((None, [(source, "black"), (style, "black")]))
        for row in shown.itertuples():
            captions = [(row.label, "#666666"), (row.split, "#aaaaaa")]
            cells.append((datasets / row.image_path, captions))
        cells += [(None, [])] * (7 - len(shown))
    contact_sheet(datasets / "preview.png", cells, columns=8)


def main():
    """Draw every source, then write data.csv and preview.png."""
    started, datasets = time.perf_counter(), Path(DATASETS_DIR)
    crnn.Charset(CHARSET)  # refuses a repeated character
    if not Path(FONTS_DIR).is_dir():
        raise InputError(f"no folder FONTS_DIR = {FONTS_DIR!r}: start in the project's folder")
    text_generator(), read_grammar()  # fail here, and not in every worker
    custom = custom_rows()  # report a mistake in them before all is drawn
    drawn, new = draw_all(count_images())
    draw_preview(drawn)
    rows = pd.concat([drawn, custom], ignore_index=True)
    crnn.write_labels(rows, datasets / "data.csv")
    print(f"\n{rows.groupby(['source', 'split'], sort=False).size().unstack(fill_value=0)}")
    counts = Counter("".join(rows.label[rows.split == "train"]))
    rare = ", ".join(f"'{c}' {counts[c]}" for c in CHARSET if counts[c] < 50)
    print(f"characters that occur fewer than 50 times, too rarely to learn well: {rare or 'none'}")
    seconds, place = time.perf_counter() - started, datasets.as_posix()
    print(f"\n{len(rows):,} images ({new:,} new) in {seconds:.0f} s. Labels and preview:")
    print(f"{place}/data.csv, {place}/preview.png")


if __name__ == "__main__":
    crnn.run(main)
