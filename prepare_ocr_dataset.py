"""Draw the training data: pictures of short texts under datasets/, and datasets/data.csv with their labels.

    python prepare_ocr_dataset.py
    torchrun --nnodes=10 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 prepare_ocr_dataset.py     on ten machines that share the folder

Six sources, each a folder: trdg_custom (printed text through TRDG), synthetic_math (expressions), emnist_images (single
handwritten characters), emnist_words (strings composed of them), emnist_math (expressions, likewise), handwriting (text in
handwriting fonts). A seventh, custom, is what you put into datasets/custom/ beside a labels.csv with image_path,label.
The constants below are yours to edit. The same constants draw the same files, byte for byte, whatever the number of workers
and machines. Run again, the script draws only what is not there yet, or what other constants have drawn.
"""
import contextlib
import hashlib
import heapq
import json
import multiprocessing
import os
import random
import re
import shutil
import string
import sys
import threading
import time
import urllib.request
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# How many pictures of each source; 0 leaves it out. One in 20 is kept for validation and one for the test.
NUM_TRDG = 38_000  # printed text
NUM_MATH = 12_000  # printed expressions
NUM_EMNIST = 40_000  # single handwritten characters, as many as the EMNIST files hold at most
NUM_EMNIST_WORDS = 24_000  # strings composed of EMNIST characters
NUM_EMNIST_MATH = 6_000  # expressions composed of EMNIST characters and drawn operators
NUM_HANDWRITING = 28_000  # text in handwriting fonts

# What may be drawn
CHARSET = ("".join(chr(i) for i in range(32, 127))  # printable ASCII, the space included
           + "×÷±√π≤≥≠")
MAX_LENGTH = 28  # characters in a label
STYLED = 0.6  # share of the pictures drawn in one of the STYLES below, as forms, receipts or photographs are; the others: plain
WARPED = 0.75  # share of the training pictures by hand whose writing is warped, as if by more hands than there are fonts
HELD_OUT_FONTS = 0.1  # share of the font families that only validation and test rows are drawn in

# Where
FONTS_DIR = "myFonts"  # fonts: its folder handwriting/ by hand, all else in print; TRDG's own are added
DATASETS_DIR = "datasets"  # pictures, data.csv and preview.png go here; EMNIST files are looked for in its folder emnist/

# How
SEED = 0  # another seed draws other pictures
NUM_WORKERS = min(os.cpu_count() or 1, 61)  # processes that draw; Windows takes 61 at most
START_METHOD = None  # of these processes: "fork", "spawn", "forkserver", or None for the platform's own
EMNIST_PROBE_SECONDS = 20  # how long to look for the EMNIST server before going on without
# ---------------------------------------------------------------------------------------------------------------------

ALPHANUMERIC = string.digits + string.ascii_uppercase + string.ascii_lowercase  # EMNIST ByClass, in the order of its labels
PRINTED, HAND = "printed", "handwriting"
TRDG_BY_HAND = {"Pacifico.ttf", "Amatic-Bold.ttf", "AmaticSC-Regular.ttf", "FFF_Tusj.ttf"}  # of its fonts, those that imitate a hand
LOOK_ALIKES = {"O0": 0.5, "Il": 0.72, "I|": 0.72, "l|": 0.72, "1l": 0.72, "1I": 0.72}  # and the overlap from which they are alike
DRAWN_ONLY = {"dseg7": "0123456789-.: "}  # fonts that draw other characters as nobody would read them
LENT = "×÷±√π≤≥≠"  # characters that a font in print which lacks them borrows from another
LOAN = "|"  # stands between a font file, the one it borrows from, and what it borrows; no path on Windows holds it
TRDG_MISSING = "trdg is not installed: run pip install --no-deps trdg==1.8.0"
FONTS = ()  # every usable Font; filled by main and, in each worker, by start_worker

# ---------------------------------------------------------------------------------------------------------------------
# Splits. Every sample's split follows from its index, every word's from its letters, every font's from its family.

CYCLE = 20  # of this many samples, or shares of the words, one is for validation and one for the test


def split_and_rank(index):
    """The split of a sample, and how many samples of that split have lower indices."""
    turn, place = divmod(index, CYCLE)
    if place in (1, 2):
        return ("val", "test")[place - 1], turn
    return "train", turn * (CYCLE - 2) + max(0, place - 2)


def word_split(word):
    """Words are told apart without regard to case, so that no val or test word is trained on in another spelling."""
    return {0: "val", 1: "test"}.get(zlib.crc32(word.lower().encode()) % CYCLE, "train")


@cache
def dictionary():
    """The words of TRDG's English dictionary by split: letters, apostrophes and hyphens, at most 12 characters."""
    import trdg
    found = {"train": [], "val": [], "test": []}
    for word in (Path(trdg.__file__).parent / "dicts" / "en.txt").read_text(encoding="utf-8").split():
        if re.fullmatch(r"[A-Za-z][A-Za-z'-]{1,11}", word):
            found[word_split(word)].append(word)
    return found


def words(split):
    """The words that belong to a split."""
    return dictionary()[split]


# ---------------------------------------------------------------------------------------------------------------------
# Fonts

class Font(NamedTuple):
    path: str
    kind: str  # PRINTED or HAND
    family: str
    characters: frozenset  # of CHARSET, those that the font draws, and draws unlike all others
    doubtful: frozenset  # of these, those that only the rest of a word tells from a look-alike
    held_out: bool  # only for validation and test rows
    loan: str = ""  # another font file and the characters that are borrowed from it, as typeface takes them

    @property
    def face(self):
        """What typeface, and so TRDG, knows the font by."""
        return self.path + self.loan


def find_fonts():
    """Look at every font file of FONTS_DIR and of TRDG. Returns the usable Fonts and a list of lines about the others."""
    import trdg
    trdgs_own = Path(trdg.__file__).parent / "fonts" / "latin"
    fonts, notes = [], []
    for folder in (Path(FONTS_DIR), trdgs_own):
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".otf", ".woff", ".woff2"))
        if not paths:
            notes.append(f"{folder} holds no font files: put some there, or bring ours back with git checkout myFonts")
        for path in paths:
            kind = HAND if path.parent.name == "handwriting" or path.name in TRDG_BY_HAND else PRINTED
            try:
                family, characters, doubtful = survey_font(str(path), CHARSET)
            except OSError as error:
                notes.append(f"{path} is left out: it cannot be read as a font ({error})")
                continue
            if trdgs_own in path.parents and not characters & set(string.ascii_lowercase):
                continue  # BEBAS and the like, which draw capitals for it
            characters &= frozenset(DRAWN_ONLY.get(family, CHARSET))
            if len(characters) < 26 and family not in DRAWN_ONLY:
                notes.append(f"{path} is left out: it draws only {len(characters)} characters of the charset")
                continue
            fonts.append(Font(str(path), kind, family, characters, doubtful, False))
    return lend_signs(hold_out_families(fonts)), notes


def lend_signs(fonts):
    """Give the fonts in print that lack signs of LENT those of another, as browsers and word processors do, since few have √ or ≤.

    Held-out fonts lend to held-out ones only. A hash gives the family that lends, and of its fonts it is the one most alike in boldness.
    """
    lending = {True: {}, False: {}}  # held out or not -> family -> its fonts that have all signs
    for font in sorted(fonts, key=lambda font: Path(font.path).name):
        if font.kind == PRINTED and set(LENT) <= font.characters:
            lending[font.held_out].setdefault(font.family, []).append(font)
    with_loans = []
    for font in fonts:
        lacking = "".join(c for c in LENT if c in CHARSET and c not in font.characters)
        families = list(lending[font.held_out].values())
        if lacking and families and font.kind == PRINTED and font.family not in DRAWN_ONLY:
            family = families[zlib.crc32(Path(font.path).name.encode()) % len(families)]
            lender = min(family, key=lambda lender: abs(boldness(lender.path) - boldness(font.path)))
            font = font._replace(characters=font.characters | set(lacking), loan=f"{LOAN}{lender.path}{LOAN}{lacking}")
        with_loans.append(font)
    return with_loans


@cache
def boldness(path):
    """How thick a font's strokes are, in pixels at a size of 40, by its plus sign; 0 where it has none."""
    mask = ImageFont.truetype(path, 40, layout_engine=ImageFont.Layout.BASIC).getmask("+")
    return sum(bytes(mask)) / 255 / max(1, sum(mask.size))


@cache
def survey_font(path, charset):
    """The family of a font, by the first word of its name, and the characters whose label a picture in it can bear.

    Left out are characters that it draws as its box for the unknown, as nothing, as the same shape as another character
    (as many draw I and l), partly above its own line, and the lower case of fonts that draw small capitals for it.
    """
    font = ImageFont.truetype(path, 40, layout_engine=ImageFont.Layout.BASIC)

    def glyph(character):
        mask, offset = font.getmask2(character, mode="L")
        return mask.size, bytes(mask), offset

    unknown = {glyph(c)[:2] for c in ("\uffff", "\ue0ff", "\U0010fffd")}  # code points that no font assigns
    shapes = {}
    for c in charset:
        size, pixels, offset = glyph(c)
        if c == " " or (any(pixels) and (size, pixels) not in unknown and offset[1] >= -1):
            shapes.setdefault((size, pixels, offset), []).append(c)
    characters = {same[0] for same in shapes.values() if len({c.lower() for c in same}) == 1}  # A comes before a
    bottom = {c: font.getbbox(c, anchor="ls")[3] for c in "npgy"}  # below the baseline, in pixels
    if max(bottom["p"], bottom["g"], bottom["y"]) - bottom["n"] < 3:  # 3 of 40: none of them has a descender
        characters -= set(string.ascii_lowercase)
    if sum(glyph("≠")[1]) < sum(glyph("=")[1]):
        characters -= {"≠"}  # Lato's italics draw a mere stroke
    pairs = [pair for pair, limit in LOOK_ALIKES.items() if set(pair) <= characters and overlap(font, *pair) > limit]
    return font.getname()[0].split()[0].lower(), frozenset(characters), frozenset("".join(pairs))


def overlap(font, a, b):
    """How much of two slightly blurred glyphs, set one on the other, is common: 1 for one and the same shape.

    0 where only one of them has ink in its middle, as a slashed or dotted zero has. Around 0.75 lie I and l in most fonts
    without serifs, around 0.5 a round O and a 0 that is a fifth narrower.
    """
    def glyph(c):
        left, top, right, bottom = font.getbbox(c, anchor="ls")
        image = Image.new("L", (100, 100))
        ImageDraw.Draw(image).text((50 - (left + right) / 2, 50 - (top + bottom) / 2), c, font=font, fill=255, anchor="ls")
        return np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), dtype=np.float32)

    a, b = glyph(a), glyph(b)
    if abs(a[46:54, 47:53].mean() - b[46:54, 47:53].mean()) > 60:  # of 255
        return 0.0
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def hold_out_families(fonts):
    """Mark HELD_OUT_FONTS of the families of each kind, rounded up, as held out; a hash gives their order.

    Where they leave out a character that several families draw (few have √ and ≤), the next one that draws it goes with
    them. A kind with a single family keeps it for training.
    """
    held_out = set()
    for kind in (PRINTED, HAND):
        drawn = {}  # by each family
        for font in sorted(fonts, key=lambda font: hashlib.sha256(font.family.encode()).digest()):
            if font.kind == kind:
                drawn[font.family] = drawn.get(font.family, frozenset()) | font.characters
        chosen = list(drawn)[:min(-int(-HELD_OUT_FONTS * len(drawn) // 1), len(drawn) - 1)] if drawn else []
        for c in CHARSET:
            able = [family for family in drawn if c in drawn[family]]
            if len(able) > 1 and not set(able) & set(chosen):
                chosen.append(able[0])
        held_out |= {(kind, family) for family in chosen}
    return [font._replace(held_out=(font.kind, font.family) in held_out) for font in fonts]


@cache
def named(path, names):
    """Whether a font file's name matches a regular expression."""
    return bool(re.search(names, Path(path).name, re.IGNORECASE))


def pick_font(label, kind, split, alone, names=""):
    """A font of a kind that draws every character of a label, or None; held-out ones for val and test.

    A family first and then one of its files, so that those with many weights are not seen more often. A label that stands
    alone, with no word around its characters, gets no font in which one of them looks like another. Where there are any,
    a font whose file name matches the regular expression names.
    """
    needed, held_out = frozenset(label), split != "train"
    families, matching = {}, {}
    for font in FONTS:
        if font.kind == kind and font.held_out == held_out and needed <= font.characters and not (alone and needed & font.doubtful):
            families.setdefault(font.family, []).append(font)
            if names and named(font.path, names):
                matching.setdefault(font.family, []).append(font)
    families = matching or families
    return random.choice(random.choice(list(families.values()))) if families else None


# ---------------------------------------------------------------------------------------------------------------------
# Texts. All randomness is Python's global generator, seeded per sample, because TRDG draws from it too.

def weighted(**weights):
    """One of the names, with the given weights."""
    return random.choices(list(weights), list(weights.values()))[0]


def random_case(word):
    return {"lower": word.lower(), "capital": word.capitalize(), "upper": word.upper()}[weighted(lower=53, capital=27, upper=20)]


def random_word(split):
    return random_case(random.choice(words(split)))


def random_digits(shortest, longest):
    return "".join(random.choices(string.digits, k=random.randint(shortest, longest)))


def random_string(characters, shortest, longest):
    return "".join(random.choices(characters, k=random.randint(shortest, longest)))


def random_code():
    """Serial numbers, plates, article and form numbers: AB-1234-X."""
    def group():
        kind = weighted(upper=4, digits=4, both=3, lower=1)
        characters = {"upper": string.ascii_uppercase, "digits": string.digits,
                      "both": string.ascii_uppercase + string.digits, "lower": string.ascii_lowercase + string.digits}[kind]
        return random_string(characters, 1, 5)
    separator = random.choice(["-", "-", "", "", " ", "/", ".", "_", ":"])
    return separator.join(group() for _ in range(random.randint(1, 4)))


def random_number():
    """Whole numbers, decimals, prices, percentages, dates, times, phone numbers, in the forms that people write."""
    n, r = random_digits, random.randint
    day, month, year = f"{r(1, 31):02}", f"{r(1, 12):02}", str(r(1900, 2039))
    name = random.choice("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split())
    return random.choice([
        lambda: n(1, 4), lambda: n(5, 12), lambda: f"{r(1, 999)},{n(3, 3)}", lambda: f"{r(1, 99)},{n(3, 3)},{n(3, 3)}",
        lambda: f"{r(0, 999)}.{n(1, 4)}", lambda: f"{random.choice('+-')}{r(0, 999)}.{n(1, 2)}", lambda: f"{r(1, 9)}e{r(-9, 12)}",
        lambda: f"${r(0, 9999)}.{n(2, 2)}", lambda: f"{r(0, 999)}.{n(2, 2)}", lambda: f"{r(0, 99)},{n(2, 2)}-",
        lambda: f"${r(1, 99)},{n(3, 3)}.{n(2, 2)}", lambda: f"{r(0, 100)}%", lambda: f"{r(0, 99)}.{n(1, 1)} %",
        lambda: f"{day}/{month}/{year}", lambda: f"{day}.{month}.{year}", lambda: f"{year}-{month}-{day}",
        lambda: f"{int(day)} {name} {year}", lambda: f"{name} {int(day)}, {year}", lambda: f"{month}/{day}/{year[2:]}",
        lambda: f"{r(0, 23):02}:{n(1, 1)}{r(0, 9)}", lambda: f"{r(1, 12)}:{r(0, 59):02} {random.choice(('am', 'pm', 'AM', 'PM'))}",
        lambda: f"{r(0, 23):02}:{r(0, 59):02}:{r(0, 59):02}", lambda: f"({n(3, 3)}) {n(3, 3)}-{n(4, 4)}",
        lambda: f"+{r(1, 99)} {n(2, 3)} {n(3, 4)} {n(3, 4)}", lambda: f"{n(3, 3)}-{n(4, 4)}", lambda: f"#{n(1, 6)}",
        lambda: f"{n(1, 3)} {n(3, 3)}", lambda: f"{n(3, 3)} {n(3, 3)} {n(2, 3)}", lambda: f"{n(2, 2)} {n(2, 2)} {n(2, 2)}",
        lambda: f"{n(4, 4)} {n(4, 4)} {n(4, 4)}", lambda: f"No. {n(1, 5)}", lambda: f"{r(1, 99)}/{r(1, 99)}", lambda: f"{n(1, 3)}x{n(1, 3)}", lambda: f"{n(1, 3)} kg",
    ])()


def filled_in(pattern, split):
    """A pattern with {w} made a word, {W} a capitalised one, {I} a capital letter, {n} up to three digits and {p} a price."""
    return re.sub(r"{([wWInp])}", lambda m: {
        "w": lambda: random_word(split), "W": lambda: random.choice(words(split)).capitalize(), "I": lambda: random.choice(string.ascii_uppercase),
        "n": lambda: random_digits(1, 3), "p": lambda: f"{random.randint(0, 999)}.{random_digits(2, 2)}"}[m[1]](),
        pattern.replace("{{", "{").replace("}}}", "}}"))


def random_name(split):
    """A person, as forms and letters name them."""
    return filled_in(random.choice(["{I}. {W}"] * 3 + ["{I}. {I}. {W}", "{W} {W}", "{W} {I}. {W}", "{W}, {I}.", "{I}.{I}.", "{I}.{I}. {W}",
                                                        "Mr. {W}", "Mrs. {W}", "Dr. {W}", "{W}-{W}", "O'{W}", "{W}, {W}"]), split)


def random_item(split):
    """A line of a receipt or a list."""
    return filled_in(random.choice(["{n} x {W}"] * 2 + ["{n} x {w}", "{n}x {W}", "{W} x{n}", "{n} {W}", "{W} {n}", "{W}: {n}", "{W} {p}", "{W} ${p}",
                                                         "{W} (${p})", "{W}: ${p}", "{n} x {p}", "{W} no. {n}", "{w} {w} {p}", "{n}. {W}"]), split)


def punctuated(split):
    """Words with punctuation in the places where it stands in real text."""
    return filled_in(random.choice([
        "{w}.", "{w},", "{w}!", "{w}?", "{w}:", "{w};", "({w})", '"{w}"', "'{w}'", "[{w}]", "{{{w}}}", "<{w}>", "{w}'s", "{w}...",
        "{w}, {w}", "{w}. {W}", "{w}: {n}", "{w}; {w}", "{w}-{w}", "{w}/{w}", "{w} & {w}", "{w} - {w}", "{w} ({n})", "{w} #{n}",
        "{w}@{w}.com", "www.{w}.org", "@{w}", "#{w}", "{w}_{w}", "{w} = {n}", "{w}+{w}", "{n}% {w}", "~{n}", "{w}*", "* {w}",
        "{w} | {w}", "\\{w}", "`{w}`", "${n}.{n}", "{n}^{n}", "C:\\{w}", "{w}({n})", "{W} {n}", "{n}. {W}", "{W}, {W}", "{w}?!",
        "Mr. {W}", "{n} {w}", "{w}={w}", "{w}[{n}]", "!{w}", "{w}%", "{w}>{n}", "{w}<{n}", "{n}:{n}", "{w}|{n}", "~{w}", "\"{W}\"",
    ]), split)


@cache
def letter_statistics():
    """Which letters follow two others in the training words, as a dict of strings; a word begins and ends with a space."""
    following = {}
    for word in words("train")[::5]:
        if word.isalpha():
            word = f"  {word.lower()} "
            for i in range(len(word) - 2):
                following.setdefault(word[i:i + 2], []).append(word[i + 2])
    return {pair: "".join(letters) for pair, letters in following.items()}


def made_up_word(split):
    """A word of English letter statistics that belongs to a split, such as most names are to those who read them first."""
    while True:
        word = "  "
        while len(word) < 14 and not (len(word) > 2 and word[-1] == " "):
            word += random.choice(letter_statistics()[word[-2:]])
        word = word.strip()
        if len(word) > 2 and word_split(word) == split:
            return random_case(word)


def word_with_look_alikes(split):
    """Of a few words, the one with the most doubled letters and pairs that run into another letter: rn as m, cl as d, vv as w."""
    return random_case(max(random.choices(words(split), k=12), key=lambda w: len(re.findall(r"(.)\1|rn|cl|vv|nn|ii|li|il|ri|m|w", w.lower()))))


def random_look_alikes():
    """A string of characters that are easily taken for one another."""
    return random_string(random.choice(["O0Q", "Il1|", "1lI7", "S5s", "Z2z", "B8", "G6C", "q9g", "uvUV", "cCeo", "O0Il1", "5S8B6G", ".,", ":;i", "-~=", "({[", ")}]", "kKxX", "wWvV", "0123456789", "mnrnh"]), 2, 6)


def random_single():
    pool = weighted(letters=6, digits=2, signs=3)
    return random.choice({"letters": string.ascii_letters, "digits": string.digits, "signs": string.punctuation}[pool])


PRINTED_TEXTS = dict(words=28, made_up=8, doubled=5, name=6, item=6, punctuated=12, number=14, code=8, string=7, single=8, look_alikes=3)
HAND_TEXTS = dict(words=33, made_up=6, doubled=4, name=6, item=4, punctuated=10, number=13, math=12, code=5, string=4, single=7)
STANDING_ALONE = {"code", "string", "mixed", "single", "look_alikes"}  # kinds of text with no word around their characters


def random_text(split, kinds):
    """One label made of the words of a split, and whether it stands alone. kinds: their names and weights."""
    kind = weighted(**kinds)
    draw = {"words": lambda: " ".join(random_word(split) for _ in range(random.choices((1, 2, 3), (5, 3, 2))[0])),
            "made_up": lambda: " ".join(made_up_word(split) for _ in range(random.choices((1, 2), (3, 1))[0])),
            "doubled": lambda: word_with_look_alikes(split), "name": lambda: random_name(split), "item": lambda: random_item(split), "punctuated": lambda: punctuated(split), "number": random_number,
            "math": random_math, "code": random_code, "look_alikes": random_look_alikes, "single": random_single,
            "string": lambda: random_string(string.ascii_letters + string.digits + string.punctuation, 1, 12),
            "letters": lambda: "".join(re.findall("[A-Za-z]", random_word(split))), "mixed": lambda: random_string(ALPHANUMERIC, 2, 7)}
    return draw[kind](), kind in STANDING_ALONE


def random_math():
    """A linear expression, equation or inequality, or a short term with the other symbols of the charset."""
    def number():
        return random.choice([str(random.randint(0, 9)), str(random.randint(10, 999)),
                              f"{random.randint(0, 99)}.{random.randint(0, 99)}"])

    def term():
        v = random.choice("xyzabcnktmpq")
        return random.choice([number, number, lambda: v, lambda: f"{random.randint(2, 99)}{v}", lambda: f"{v}^{random.randint(2, 9)}",
                              lambda: f"√{random.randint(2, 400)}", lambda: f"{random.randint(2, 9)}π", lambda: "π", lambda: f"√{v}",
                              lambda: f"({v}{gap}{random.choice('+-')}{gap}{number()})", lambda: f"-{number()}",
                              lambda: f"{number()}/{number()}", lambda: f"±{number()}", lambda: f"{number()}%"])()

    gap = random.choice(["", "", " "])
    parts = [term()]
    for _ in range(random.choices((0, 1, 2), (2, 5, 2))[0]):
        parts += [random.choice("++--×÷±*/"), term()]
    if random.random() < 0.75:
        parts += [random.choice("====<>≤≥≠"), term()]
    text = gap.join(parts)
    bracket = random.choice([None] * 8 + ["()", "[]", "{}"])
    return f"{bracket[0]}{text}{bracket[1]}" if bracket else text


# ---------------------------------------------------------------------------------------------------------------------
# Styles. Each takes a line's ink, float32 (H, W), 0 = paper and 1 = ink, and gives the picture, uint8 (H, W), as it would look in
# the real world. Sizes in them are parts of the height H.

def cv2():
    """OpenCV, which trdg brings along; imported where it is needed, so that this script is imported quickly."""
    import cv2
    return cv2


def chance(share):
    return random.random() < share


def randoms():
    """A generator of arrays, seeded by the sample's own."""
    return np.random.default_rng(random.getrandbits(63))


def ink_of(image):
    """A grey picture, black on white, as ink."""
    return 1 - np.asarray(image, dtype=np.float32) / 255


def tones(ink, dark, light, noise=0.0):
    """Ink of a tone on paper of another, both from 0 to 255, numbers or arrays (H, W), as a picture; noise: standard deviation."""
    grey = light + ink * (dark - light)
    if noise:
        grey = grey + noise * randoms().standard_normal(ink.shape, dtype=np.float32)
    return grey.clip(0, 255).round().astype(np.uint8)


def slow_field(shape, patches):
    """Random values from 0 to 1, float32 (H, W), that change slowly: about so many times over the height."""
    rows = max(2, round(patches) + 1)
    small = randoms().random((rows, max(2, round(patches * shape[1] / shape[0]) + 1)), dtype=np.float32)
    return cv2().resize(small, shape[::-1], interpolation=cv2().INTER_CUBIC).clip(0, 1)


def with_margins(ink, top=0.0, right=0.0, bottom=0.0, left=0.0):
    """Ink with more paper around it, in parts of its height."""
    h = ink.shape[0]
    return np.pad(ink, ((round(top * h), round(bottom * h)), (round(left * h), round(right * h))))


def random_box(ink, most):
    """Ink with up to so much more paper on each side, in parts of its height."""
    return with_margins(ink, *(random.uniform(0, most) for _ in range(4)))


def ink_rows(ink):
    """The first and the last row with ink in it."""
    rows = np.flatnonzero(ink.max(1) > 0.3 * ink.max())
    return int(rows[0]), int(rows[-1])


def enlarged_from(ink, height):
    """Ink as it comes from a scan of so few rows, at its former size, with one of the usual interpolations."""
    h, w = ink.shape
    small = cv2().resize(ink, (max(4, round(w * height / h)), height), interpolation=cv2().INTER_AREA)
    how = random.choice([cv2().INTER_NEAREST, cv2().INTER_LINEAR, cv2().INTER_CUBIC])
    return cv2().resize(small, (w, h), interpolation=how).clip(0, 1)


def to_be_warped(split):
    """Whether as_by_another is to change the next picture by hand: only in training rows, since the others are to show real hands.

    There are some fifty handwriting fonts and 85,000 EMNIST characters, and a network learns those by heart (on rows that it was
    trained on it read 20 and 9 points more than on others).
    """
    return split == "train" and chance(WARPED)


def as_by_another(picture):
    """Writing, as a picture or as ink (H, W), warped as if someone else had written it: other proportions, other curves."""
    def uneven(length, pieces):  # places from 0 to length - 1, closer together in some pieces than in others
        steps = np.exp(randoms().normal(0, 0.25, pieces))
        return np.interp(np.linspace(0, pieces, length), np.arange(pieces + 1), np.append(0, steps.cumsum()) / steps.sum()) * (length - 1)

    h, w = picture.shape
    reach, patches = random.uniform(0, 0.14) * h, random.uniform(1.5, 3)
    y = uneven(h, 5)[:, None] + reach * (slow_field((h, w), patches) - 0.5)  # (H, W)
    x = uneven(w, max(2, round(2 * w / h)))[None] + reach * (slow_field((h, w), patches) - 0.5)  # (H, W)
    return cv2().remap(picture, x.astype(np.float32), y.astype(np.float32), cv2().INTER_LINEAR, borderMode=cv2().BORDER_REPLICATE)


def compressed(picture, worst=20):
    """The picture after JPEG compression at a random quality."""
    ok, data = cv2().imencode(".jpg", picture, [cv2().IMWRITE_JPEG_QUALITY, random.randint(worst, 75)])
    return cv2().imdecode(data, cv2().IMREAD_GRAYSCALE)


def strokes(shape, lines, thickness):
    """Straight lines from (x, y) to (x, y), in pixels, as ink of a shape."""
    mask = np.zeros(shape, np.uint8)
    for a, b in lines:
        cv2().line(mask, tuple(map(round, a)), tuple(map(round, b)), 255, thickness, cv2().LINE_AA)
    return mask.astype(np.float32) / 255


def form(ink):
    """On a printed form: underlined, in a box or between rules, with the lines above and below coming into the picture."""
    ink = random_box(ink, 0.25)
    h, w = ink.shape
    top, bottom = ink_rows(ink)
    page = ink.copy()
    for side, room in ((0, top - 2), (1, h - bottom - 3)):  # neighbours' strokes, on paper that is free of our own
        if room > 1 and chance(0.4):
            part = random.randint(1, min(room, h // 7, bottom + 1 - top))
            other = np.roll(ink[top:bottom + 1], random.randint(0, w), 1)
            if side == 0:
                page[:part] = np.maximum(page[:part], other[-part:])
            else:
                page[-part:] = np.maximum(page[-part:], other[:part])
    low, high = bottom + random.uniform(-0.12, 0.12) * h, top - random.uniform(0.03, 0.2) * h
    left, right = (random.uniform(-0.1, 0.1) * h for _ in range(2))
    tilt = random.uniform(-0.02, 0.02) * h
    below, above = ((0, low), (w, low + tilt)), ((0, high), (w, high + tilt))
    sides = [((left, 0), (left, h)), ((w - 1 - right, 0), (w - 1 - right, h))]
    lines = random.choice([[below], [below], [above, below], [above, below, *sides], [above, below, sides[0]]])
    ruled = strokes((h, w), lines, random.choice([1, 1, 2]))
    if lines == [below] and chance(0.3):  # a dotted line to write on
        ruled *= np.arange(w) % 6 < 3
    return tones(np.maximum(page, ruled * random.uniform(0.4, 1)), random.randint(0, 80), random.randint(215, 255), random.choice([0, 2, 5]))


def on_cells(ink, edges):
    """In the fields of a form, one character in each. edges: where the fields begin and end, columns of pixels."""
    h, w = ink.shape
    top, bottom = random.uniform(0, 0.08) * h, h - 1 - random.uniform(0, 0.08) * h
    start = {"boxes": top, "comb": bottom - random.uniform(0.1, 0.35) * h}[weighted(boxes=2, comb=1)]
    lines = [((x, start), (x, bottom)) for x in edges] + [((edges[0], bottom), (edges[-1], bottom))]
    if start == top:
        lines.append(((edges[0], top), (edges[-1], top)))
    ruled = strokes((h, w), lines, random.choice([1, 1, 2])) * random.uniform(0.3, 1)
    cut = random.randint(0, 3)  # how the fields are cut out of the form
    page = random_box(np.maximum(ink, ruled)[cut:h - cut, cut:w - cut], 0.12)
    return tones(page, random.randint(0, 90), random.randint(210, 255), random.choice([0, 2, 5]))


def typewriter(ink):
    """Struck letter by letter: none quite on the line, some faint, some twice, the ribbon's weave in their edges."""
    h, w = ink.shape
    letter = np.cumsum(np.diff(ink.max(0) > 0.2, prepend=False).clip(0) * (ink.max(0) > 0.2))  # which letter a column belongs to
    jitter, weight = randoms().integers(-1, 2, w + 1), randoms().uniform(0.55, 1, w + 1).astype(np.float32)
    for n in range(1, int(letter[-1]) + 1):
        columns = letter == n
        ink[:, columns] = np.roll(ink[:, columns], jitter[n] * max(1, h // 40), 0) * weight[n]
    if chance(0.2):
        ink = np.maximum(ink, 0.5 * np.roll(ink, 1, 1))
    soft = cv2().GaussianBlur(ink, (0, 0), random.uniform(0.5, 0.9))
    worn = ((soft - 0.35 * slow_field(ink.shape, 14)) * 1.6).clip(0, 1)
    return tones(worn, random.randint(10, 90), random.randint(200, 250), random.choice([2, 4, 8]))


def dot_matrix(ink):
    """Of needles or lamps: one dot per cell of a coarse grid."""
    rows, pitch = random.randint(17, 23), random.choice([3, 4])
    cells = cv2().resize(ink, (max(4, round(ink.shape[1] * rows / ink.shape[0])), rows), interpolation=cv2().INTER_AREA)
    place = np.linspace(-1, 1, pitch + 1)[:-1] + 1 / pitch
    dot = (random.uniform(1.15, 1.6) - np.hypot(*np.meshgrid(place, place))).clip(0, 1).astype(np.float32)
    on = cv2().resize((cells > 0.33).astype(np.float32), None, fx=pitch, fy=pitch, interpolation=cv2().INTER_NEAREST)
    page = on * np.tile(dot, cells.shape) * (0.7 + 0.3 * slow_field(on.shape, 3))
    return label(page) if chance(0.25) else tones(page, random.randint(10, 110), random.randint(205, 255), random.choice([0, 3, 6]))


def receipt(ink):
    """From a thermal printer: faint, coarse, its strokes broken by dead dots and uneven heat."""
    h, w = ink.shape
    ink = ink * (0.6 + 0.6 * slow_field(ink.shape, 2)).clip(0, 1)
    rows, columns = randoms().random((h, 1), dtype=np.float32), randoms().random((1, w), dtype=np.float32)
    ink = ink * np.where(rows < random.uniform(0, 0.15), random.uniform(0.2, 0.8), 1) * np.where(columns < 0.02, 0.3, 1)
    ink = enlarged_from(ink, random.randint(15, 24))
    return tones(ink, random.randint(40, 150), random.randint(215, 250), random.choice([0, 3, 6]))


def label(ink):
    """A label, plate or display: heavy, framed, dark on coloured or light on dark."""
    if chance(0.3):
        ink = cv2().dilate(ink, np.ones((2, 2), np.uint8))
    ink = random_box(ink, 0.3)
    h, w = ink.shape
    if chance(0.35):
        inset, corners = random.uniform(0, 0.06) * h, [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]
        corners = [(inset + x * (w - 1 - 2 * inset), inset + y * (h - 1 - 2 * inset)) for x, y in corners]
        ink = np.maximum(ink, strokes((h, w), list(zip(corners, corners[1:])), random.choice([1, 2, 3])))
    dark, light = sorted((random.randint(0, 140), random.randint(110, 255)))
    light = max(light, dark + 70)
    return tones(ink, *random.choice([(dark, light), (light, dark)]), random.choice([0, 2, 5]))


def photograph(ink):
    """By phone: at an angle, out of focus or shaken, in uneven light, compressed."""
    ink = random_box(with_margins(ink, 0.08, 0.08, 0.08, 0.08), 0.25)
    h, w = ink.shape
    corners = np.float32([(0, 0), (w, 0), (w, h), (0, h)])
    moved = corners + randoms().uniform(-0.07, 0.07, (4, 2)).astype(np.float32) * h
    ink = cv2().warpPerspective(ink, cv2().getPerspectiveTransform(corners, moved), (w, h))
    if chance(0.5):
        length = random.randint(2, max(2, h // 14))
        kernel = np.zeros((2 * length + 1,) * 2, np.float32)
        angle = random.uniform(0, np.pi)
        reach = np.array([np.cos(angle), np.sin(angle)]) * length / 2
        cv2().line(kernel, tuple(np.round(length - reach).astype(int).tolist()), tuple(np.round(length + reach).astype(int).tolist()), 1)
        ink = cv2().filter2D(ink, -1, kernel / kernel.sum())
    else:
        ink = cv2().GaussianBlur(ink, (0, 0), random.uniform(0.4, h / 30))
    light = random.randint(140, 250) * (1 - random.uniform(0, 0.5) * slow_field(ink.shape, random.uniform(0.3, 1.2)))
    return compressed(tones(ink, light * random.uniform(0.05, 0.5), light, random.choice([2, 5, 9])))


def low_resolution(ink):
    """Cut out of a picture in which the line is small, and enlarged."""
    picture = tones(enlarged_from(ink, random.randint(11, 18)), random.randint(0, 100), random.randint(190, 255), random.choice([0, 3]))
    return compressed(picture, 30) if chance(0.5) else picture


def margins(ink):
    """Cut at the ink, or with wide margins."""
    if chance(0.4):
        top, bottom = ink_rows(ink)
        ink = with_margins(ink[top:bottom + 1], *(random.uniform(0.01, 0.06) for _ in range(4)))
    else:
        ink = with_margins(ink, *(random.uniform(0.1, 0.6) for _ in range(4)))
    return tones(ink, random.randint(0, 110), random.randint(190, 255), random.choice([0, 2, 6]))


def worn(ink):
    """On paper that has been through something, or is printed all over: scratches and folds, specks, a mottled or patterned ground."""
    ink = random_box(ink, 0.2)
    h, w = ink.shape
    ground = slow_field(ink.shape, random.uniform(2, 10))
    if chance(0.3):  # waves, as on cheques and tickets
        y, x = np.mgrid[:h, :w].astype(np.float32)
        ground = 0.5 + 0.5 * np.sin((x * random.uniform(-1, 1) + y * random.uniform(-1, 1)) * random.uniform(8, 25) / h + 3 * ground)
    light = random.randint(160, 250) - random.uniform(0, 45) * ground
    page = tones(ink, light * random.uniform(0.05, 0.4), light, random.choice([2, 5, 10, 18]))
    scratches = np.zeros_like(ink)
    if w > 1.5 * h:  # in narrow pictures one could be taken for a slash; for the same reason they go from side to side
        ends = lambda: (0, random.uniform(0, h)) if chance(0.5) else (random.uniform(0, w), 0)
        lines = [(ends(), (w - x, h - y)) for x, y in (ends() for _ in range(random.choice([0, 1, 2, 4])))]
        scratches = strokes((h, w), lines, random.choice([1, 1, 1, 2])) * random.uniform(0.2, 0.7)
    specks = randoms().random(ink.shape, dtype=np.float32) < random.choice([0, 0, 0.004, 0.012])
    return tones(np.maximum(scratches, specks), random.choice([0, 0, 60, 255]), page.astype(np.float32))


def stamped(ink, edges):
    """Struck or stuck on one by one: each turned, moved and inked in its own way."""
    h, w = ink.shape
    page = np.zeros_like(ink)
    for left, right in zip(edges, edges[1:]):
        alone = np.zeros_like(ink)
        alone[:, left:right] = ink[:, left:right]
        turn = cv2().getRotationMatrix2D(((left + right) / 2, h / 2), random.gauss(0, 8), random.uniform(0.8, 1))
        turn[:, 2] += random.uniform(-0.06, 0.06) * h, random.uniform(-0.08, 0.08) * h
        page = np.maximum(page, cv2().warpAffine(alone, turn, (w, h)) * random.uniform(0.6, 1))
    return worn(page) if chance(0.3) else tones(page, random.randint(0, 110), random.randint(190, 255), random.choice([0, 3, 8]))


def pen(ink):
    """By pen: pressure that varies along the line."""
    thin, thick = (change(ink, np.ones((2, 2), np.uint8)) for change in (cv2().erode, cv2().dilate))
    pressure = slow_field(ink.shape, 4) * random.uniform(0.3, 1)
    ink = np.where(pressure < 0.35, 0.4 * ink + 0.6 * thin, ink + (pressure - 0.35) * (thick - ink))
    return tones(ink, random.randint(0, 120), random.randint(205, 255), random.choice([0, 3, 6]))


def pencil(ink):
    """By pencil: grey, and only where the paper's grain takes it."""
    grain = randoms().random(ink.shape, dtype=np.float32)
    ink = ink * (1 - random.uniform(0.3, 0.7) * grain) * (0.65 + 0.35 * slow_field(ink.shape, 4))
    return tones(ink, random.randint(70, 150), random.randint(215, 250), random.choice([2, 4, 6]))


def marker(ink):
    """By felt pen: broad, its corners round."""
    size = max(2, round(ink.shape[0] * random.uniform(0.04, 0.08)))
    ink = cv2().dilate(ink, cv2().getStructuringElement(cv2().MORPH_ELLIPSE, (size, size)))
    ink = cv2().GaussianBlur(ink, (0, 0), random.uniform(0.5, 1)) * (0.8 + 0.2 * slow_field(ink.shape, 5))
    return tones(ink, random.randint(0, 100), random.randint(200, 255), random.choice([0, 3, 6]))


def ruled(ink):
    """On ruled or squared paper."""
    ink = random_box(ink, 0.3)
    h, w = ink.shape
    pitch, place, tilt = random.uniform(0.3, 0.9) * h, random.uniform(0, 1) * h, random.uniform(-0.03, 0.03) * h
    lines = [((0, y), (w, y + tilt)) for y in np.arange(place % pitch, h, pitch)]
    if chance(0.35):
        lines += [((x, 0), (x - tilt, h)) for x in np.arange(random.uniform(0, pitch), w, pitch)]
    page = np.maximum(ink, strokes((h, w), lines, random.choice([1, 1, 2])) * random.uniform(0.15, 0.6))
    return tones(page, random.randint(0, 110), random.randint(205, 255), random.choice([0, 3, 6]))


class Style(NamedTuple):
    weight: float  # how often, against the others of its kind
    finish: Callable | None = None  # one of the functions above
    texts: dict | None = None  # kinds of text and their weights, see random_text; None: those of its kind
    fonts: str = ""  # regular expression that the names of its font files match, where there are any
    cells: bool = False  # every character in a field of its own: finish is given the ink and the columns of their edges


MONO, NARROW = "mono|coding|cousine|special|inconsolata|cascadia|code", "condensed|narrow|mono|oswald|teko|league|abel|dosis"
FIELDS = dict(code=4, number=4, words=3, letters=2, single=4)
NUMBERS = dict(number=8, item=5, words=3, code=3, punctuated=2)
STYLES = {
    PRINTED: {
        "form": Style(3, form), "fields": Style(1.5, on_cells, FIELDS, cells=True), "typewriter": Style(1, typewriter, fonts=MONO),
        "dot matrix": Style(0.5, dot_matrix, NUMBERS, fonts=f"{MONO}|vt323|dot|pixel|press|silk|tiny"),
        "receipt": Style(2, receipt, NUMBERS, fonts=NARROW), "photograph": Style(3, photograph), "margins": Style(2, margins),
        "label": Style(2, label, dict(code=6, number=3, words=5, punctuated=1, single=1)), "low resolution": Style(2, low_resolution),
        "worn": Style(1.5, worn), "stamped": Style(1, stamped, dict(code=6, number=3, words=1, letters=1), cells=True),
    },
    HAND: {
        "pen": Style(3, pen), "pencil": Style(2, pencil), "marker": Style(1.5, marker), "ruled": Style(3, ruled), "form": Style(1.5, form),
        "fields": Style(2, on_cells, FIELDS, cells=True), "photograph": Style(2, photograph), "margins": Style(1, margins), "worn": Style(1, worn),
    },
}
PLAIN = Style(0)


def pick_style(kind, cells=True):
    """The name of a style of a kind, and the Style; PLAIN for all but STYLED of the pictures."""
    styles = {name: style for name, style in STYLES[kind].items() if cells or not style.cells}
    if not chance(STYLED):
        return "plain", PLAIN
    name = random.choices(list(styles), [style.weight for style in styles.values()])[0]
    return name, styles[name]


def in_cells(text, draw, height):
    """Characters side by side in fields of one width. draw(c): ink (height, w). Returns ink (H, W) and the fields' edges, in pixels."""
    glyphs = [draw(c) for c in text]
    pitch = round(max(max(glyph.shape[1] for glyph in glyphs) * random.uniform(1.05, 1.4), height * random.uniform(0.4, 0.9))) + 2
    ink = np.zeros((round(height * random.uniform(1.05, 1.4)), pitch * len(text) + 1), np.float32)
    edges = [pitch * i for i in range(len(text) + 1)]
    y = random.randint(0, ink.shape[0] - height)
    for glyph, edge in zip(glyphs, edges):
        room = pitch - glyph.shape[1]
        x = edge + round(room * random.uniform(0.35, 0.65))
        up = max(0, min(ink.shape[0] - height, y + random.randint(-height // 20, height // 20)))
        ink[up:up + height, x:x + glyph.shape[1]] = glyph
    return ink, edges


def typed(character, face):
    """A character as ink (line height, its own width)."""
    left, _, right, _ = face.getbbox(character)
    image = Image.new("L", (max(1, right - left), sum(face.getmetrics())))
    ImageDraw.Draw(image).text((-left, 0), character, font=face, fill=255)
    return np.asarray(image, dtype=np.float32) / 255


# ---------------------------------------------------------------------------------------------------------------------
# TRDG

@lru_cache(maxsize=4096)
def typeface(font, size):
    """A font at a size in pixels: a file, or Font.face. TRDG calls it by these names."""
    path, *loan = font.split(LOAN)
    return WithLoan(path, size, *loan) if loan else ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


class WithLoan(ImageFont.FreeTypeFont):
    """A font that borrows characters from another, and sets them on its own baseline. What TRDG asks of a font, and no more."""

    def __init__(self, path, size, lender, borrowed):
        super().__init__(path, size, layout_engine=ImageFont.Layout.BASIC)
        self.lender, self.borrowed = typeface(lender, size), borrowed
        self.lower = self.getmetrics()[0] - self.lender.getmetrics()[0]  # of the other's ascender line, in pixels

    def runs(self, text):
        """(whether it is borrowed, the characters) for every part of a text."""
        return [(loan, "".join(part)) for loan, part in groupby(text, lambda c: c in self.borrowed)]

    def getlength(self, text, *args, **options):
        return sum((self.lender if loan else super(WithLoan, self)).getlength(part, *args, **options) for loan, part in self.runs(text))

    def getbbox(self, text, *args, **options):
        mask, (x, y) = self.getmask2(text, "L", *args, **options)
        return x, y, x + mask.size[0], y + mask.size[1]

    def getmask2(self, text, mode="", *args, **options):
        if not set(text) & set(self.borrowed):
            return super().getmask2(text, mode, *args, **options)
        x, parts = 0, []
        for loan, part in self.runs(text):
            mask, (left, top) = (self.lender if loan else super()).getmask2(part, mode, *args, **options)
            parts.append((mask, round(x) + left, max(0, top + self.lower) if loan else top))
            x += (self.lender if loan else super()).getlength(part)
        left, top = min(p[1] for p in parts), min(p[2] for p in parts)
        size = max(p[1] + p[0].size[0] for p in parts) - left, max(p[2] + p[0].size[1] for p in parts) - top
        together = Image.new("L", size)
        for mask, x, y in parts:
            box = (x - left, y - top, x - left + mask.size[0], y - top + mask.size[1])
            together.paste(ImageChops.lighter(together.crop(box), Image.frombytes("L", mask.size, bytes(mask))), box)
        return together.im, (left, top)


@cache
def trdg_generator():
    """TRDG's generator class, repaired for Pillow >= 10 and made about three times faster, once per process.

    TRDG 1.8.0 asks fonts for getsize, which Pillow removed (its issues 315 and 343). Here the height of a line is the
    font's own line box instead, so that a comma stays low and a quote high. It also reads the font file anew for every
    picture and shapes every character twice; typeface's cache and basic layout change no picture of Latin text but its kerning.
    """
    try:
        with contextlib.redirect_stdout(None):  # it prints that its handwriting network, not used here, lacks modules
            from trdg import computer_text_generator
            from trdg.generators import GeneratorFromStrings
    except ImportError as error:
        raise SystemExit(f"{TRDG_MISSING} ({error})")
    computer_text_generator.ImageFont = SimpleNamespace(truetype=typeface)
    computer_text_generator.get_text_height = lambda font, text: max(sum(font.getmetrics()), font.getbbox(text)[3])
    return GeneratorFromStrings


def draw_line(text, font, alone=False, plain=True):
    """A grey picture of text in a font, through TRDG, its margins cut at random. None when TRDG clipped or lost the ink.

    plain: in TRDG's own looks; else black on white, for a style to go on with. TRDG's canvas ends where the last character's
    advance ends and cuts what reaches beyond; a space on either side makes room for it.
    """
    colour = random.choice(["#000000,#505050"] * 6 + ["#404040,#808080", "#000060,#4040A0", "#600000,#A04040"]) if plain else "#000000"
    height = random.randrange(24, 53, 2)  # of the line box, in pixels; even, so that the cache holds every font at every size
    wave = random.random() < 0.08 and height >= 36  # TRDG moves rows and columns by up to the root of the height
    image, mask = next(trdg_generator()(
        [f" {text} "], count=1, fonts=[font.face], size=height, text_color=colour,
        word_split=random.random() < 0.9, character_spacing=random.choice([0, 0, 1, 2, height // 12]),
        space_width=random.uniform(1, 1.7), skewing_angle=random.choice([0, 0, 1, 2, 3]), random_skew=True,
        distorsion_type=random.randint(1, 2) if wave else 0, distorsion_orientation=random.randint(0, 2),  # not 3: it tears strokes
        background_type=random.choice([0, 1]) if plain else 1, blur=random.choice([0, 0, 0.6, 1]) if plain else 0, random_blur=True,
        margins=(0, 0, 0, 0), output_mask=True))[0]
    box = mask.getbbox()  # not in grey: TRDG numbers the characters in the mask's blue, and the first are nearly black
    if box is None or box[0] < 2 or box[2] > mask.width - 2:
        return None
    left, top, right, bottom = random_margins(box, image.size, tight=not alone and len(text) > 2 and random.random() < 0.5)
    image = image.convert("L").crop((left, top, right, bottom))
    if image.getextrema()[0] > 200:  # a thin dash, turned, may be in the mask alone
        return None
    if random.random() < 0.3:  # condensed and extended
        image = image.resize((max(4, round(image.width * 2 ** random.uniform(-0.6, 0.4))), image.height), Image.Resampling.BILINEAR)
    return image


def random_margins(box, size, tight):
    """Cut a picture at random, 2 pixels or more outside its ink box. Returns the box to keep.

    Its height is kept unless tight: the size and the place of characters that stand alone tell c from C and a comma from a quote.
    """
    (left, top, right, bottom), (width, height) = box, size
    left, right = random.randint(0, max(0, left - 2)), width - random.randint(0, max(0, width - right - 2))
    if tight:
        top, bottom = random.randint(0, max(0, top - 2)), height - random.randint(0, max(0, height - bottom - 2))
    else:
        top, bottom = 0, height
    return left, top, right, bottom


def draw_text(split, kind, text, alone, style):
    """Draw a text in a random font of a kind and in a style. None when no font can show all its characters, or its ink was clipped."""
    font = pick_font(text, kind, split, alone, style.fonts)
    if not font:
        return None
    warped = kind == HAND and to_be_warped(split)
    if style.cells:
        face = typeface(font.face, random.randrange(24, 45, 2))
        draw = lambda c: as_by_another(typed(c, face)) if warped else typed(c, face)
        return Image.fromarray(style.finish(*in_cells(text, draw, sum(face.getmetrics()))))
    image = draw_line(text, font, alone, plain=style.finish is None)
    if image and warped:
        image = Image.fromarray(as_by_another(np.asarray(image)))
    return Image.fromarray(style.finish(ink_of(image))) if image and style.finish else image


# ---------------------------------------------------------------------------------------------------------------------
# EMNIST

def find_emnist():
    """Whether the EMNIST files are there, after a download where there is a network. Prints what to do where they are not."""
    from torchvision.datasets import EMNIST

    raw = Path(DATASETS_DIR) / "emnist" / "EMNIST" / "raw"
    try:
        for train in (True, False):
            EMNIST(str(Path(DATASETS_DIR) / "emnist"), split="byclass", train=train)
        return True
    except RuntimeError:  # torchvision's word for files that are not there
        reason = probe(EMNIST.url)
    except (OSError, ValueError, AssertionError) as error:
        reason = f"the files in {raw} are damaged ({error})"
    if not reason:
        try:
            EMNIST(str(Path(DATASETS_DIR) / "emnist"), split="byclass", download=True)
            return True
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            reason = f"the download broke off ({error})"
    print(f"EMNIST is missing: {reason}. The sources emnist_images, emnist_words and emnist_math are left out, and the script goes on; a "
          f"model trained from nothing without them read 55 % of single handwritten characters instead of 87 %. To have them, put "
          f"the four files emnist-byclass-{{train,test}}-{{images-idx3,labels-idx1}}-ubyte, from the archive "
          f"{EMNIST.url} (about 560 MB), unpacked, into {raw.as_posix()}/ and run this script again.", flush=True)
    return False


def probe(url):
    """Why a server cannot be reached, or None when it answers. In a thread, because looking up a name knows no timeout."""
    answers = []

    def ask():
        try:
            urllib.request.urlopen(url, timeout=EMNIST_PROBE_SECONDS).close()
            answers.append(None)
        except (OSError, ValueError) as error:
            answers.append(f"the server cannot be reached ({error})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(EMNIST_PROBE_SECONDS)
    return answers[0] if answers else f"the server did not answer within {EMNIST_PROBE_SECONDS} seconds"


@cache
def emnist(datasets_dir, seed, split):
    """Upright EMNIST characters of a split, white on black, uint8 (n, 28, 28), in a shuffled order, with their labels, str (n,).

    Test rows come from EMNIST's test file; of its train file, one character in 20 is kept for validation.
    """
    from torchvision.datasets import EMNIST
    data = EMNIST(str(Path(datasets_dir) / "emnist"), split="byclass", train=split != "test")
    images = data.data.numpy().transpose(0, 2, 1)  # stored with rows and columns swapped -> (n, rows, columns)
    labels = np.array(list(ALPHANUMERIC))[data.targets.numpy()]
    order = np.random.default_rng(seed).permutation(len(images))
    if split != "test":
        order = order[(order % CYCLE == 0) == (split == "val")]
    return np.ascontiguousarray(images[order]), labels[order]


@cache
def emnist_places(datasets_dir, seed, split):
    """For each character, where it stands in the arrays of emnist."""
    labels = emnist(datasets_dir, seed, split)[1]
    return {c: np.flatnonzero(labels == c) for c in ALPHANUMERIC if (labels == c).any()}


def emnist_count(number):
    """How many single characters can be drawn without drawing one twice."""
    have = {split: len(emnist(DATASETS_DIR, SEED, split)[0]) for split in ("train", "val", "test")}
    while number and any(rank >= have[split] for split, rank in map(split_and_rank, range(max(0, number - CYCLE), number))):
        number -= 1
    return number


@cache
def emnist_looks(datasets_dir, seed, split):
    """Of every EMNIST character of a split: stroke width and height, in pixels, and slant, in columns per row, against its class. (n, 3)."""
    images, labels = emnist(datasets_dir, seed, split)
    looks = np.empty((len(images), 3), np.float32)
    rows, columns = np.mgrid[:28, :28].astype(np.float32)
    for start in range(0, len(images), 4096):
        ink = (images[start:start + 4096] > 100).astype(np.float32)  # (n, 28, 28)
        area = ink.sum((1, 2)).clip(1)
        edge = np.abs(np.diff(ink, axis=1)).sum((1, 2)) + np.abs(np.diff(ink, axis=2)).sum((1, 2))  # perimeter
        y, x = ((ink * place).sum((1, 2)) / area for place in (rows, columns))  # the centre
        dy, dx = rows - y[:, None, None], columns - x[:, None, None]
        slant = -(ink * dx * dy).sum((1, 2)) / (ink * dy * dy).sum((1, 2)).clip(1)
        looks[start:start + 4096] = np.stack([2.5 * area / edge.clip(1), ink.max(2).sum(1), slant], 1)
    for c in ALPHANUMERIC:  # an L leans to nobody's side
        if (labels == c).any():
            looks[labels == c, 2] -= np.median(looks[labels == c, 2])
    return looks


class Hand(NamedTuple):
    """One person's way to write: all in parts of a capital's height, but the slant, in columns per row."""
    capital: int  # height of a capital letter, in pixels
    stroke: float
    slant: float
    looseness: float  # how much sizes, places and spaces vary
    spacing: float  # between characters; below 0 they touch


def random_hand():
    return Hand(random.randint(20, 34), random.uniform(0.08, 0.2), random.gauss(0, 0.2), random.uniform(0.02, 0.1),
                random.uniform(-0.1, 0.3))


X_HEIGHT = dict.fromkeys("acemnorsuvwxz", 0.68)  # height against a capital's; EMNIST scales every character to one size
DESCENT = dict(g=0.3, j=0.28, p=0.3, q=0.3, y=0.3)  # how far below the baseline, against a capital's height
BAR, UPPER, LOWER = [(0, 0.56), (0.42, 0.56)], [(0, 0.46), (0.42, 0.46)], [(0, 0.68), (0.42, 0.68)]
SIGNS = {  # what EMNIST lacks, as strokes through points (x, y): y is 0 at a capital's top and 1 at the baseline
    "+": [BAR, [(0.21, 0.3), (0.21, 0.82)]], "-": [BAR], "=": [UPPER, LOWER], "≠": [UPPER, LOWER, [(0.34, 0.25), (0.08, 0.9)]],
    "×": [[(0, 0.35), (0.42, 0.8)], [(0.42, 0.35), (0, 0.8)]], "÷": [BAR, [(0.2, 0.33), (0.22, 0.35)], [(0.2, 0.78), (0.22, 0.8)]],
    "±": [UPPER, [(0.21, 0.22), (0.21, 0.7)], [(0, 0.86), (0.42, 0.86)]], "^": [[(0, 0.28), (0.18, 0), (0.36, 0.28)]],
    "√": [[(0, 0.6), (0.1, 0.52), (0.24, 1), (0.44, -0.02), (0.85, -0.04)]], "_": [[(0, 1.12), (0.55, 1.12)]],
    "π": [[(0, 0.44), (0.08, 0.36), (0.6, 0.36)], [(0.18, 0.38), (0.14, 1)], [(0.43, 0.38), (0.43, 0.92), (0.52, 0.98)]],
    "<": [[(0.4, 0.3), (0, 0.58), (0.4, 0.86)]], ">": [[(0, 0.3), (0.4, 0.58), (0, 0.86)]],
    "≤": [[(0.4, 0.22), (0, 0.46), (0.4, 0.7)], [(0, 0.9), (0.4, 0.9)]], "≥": [[(0, 0.22), (0.4, 0.46), (0, 0.7)], [(0, 0.9), (0.4, 0.9)]],
    "(": [[(0.22, -0.06), (0.06, 0.22), (0, 0.5), (0.06, 0.82), (0.22, 1.1)]], ")": [[(0, -0.06), (0.16, 0.22), (0.22, 0.5), (0.16, 0.82), (0, 1.1)]],
    "[": [[(0.2, 0), (0, 0), (0, 1.1), (0.2, 1.1)]], "]": [[(0, 0), (0.2, 0), (0.2, 1.1), (0, 1.1)]],
    "{": [[(0.26, 0), (0.13, 0.06), (0.13, 0.44), (0, 0.54), (0.13, 0.64), (0.13, 1.04), (0.26, 1.1)]],
    "}": [[(0, 0), (0.13, 0.06), (0.13, 0.44), (0.26, 0.54), (0.13, 0.64), (0.13, 1.04), (0, 1.1)]],
    "/": [[(0.42, -0.05), (0, 1.08)]], "\\": [[(0, -0.05), (0.42, 1.08)]], "|": [[(0, -0.1), (0, 1.2)]],
    ".": [[(0, 0.97), (0.02, 0.99)]], ",": [[(0.08, 0.93), (0.07, 1.05), (0, 1.2)]], ":": [[(0, 0.5), (0.02, 0.52)], [(0, 0.95), (0.02, 0.97)]],
    ";": [[(0.06, 0.5), (0.08, 0.52)], [(0.08, 0.92), (0.07, 1.04), (0, 1.18)]], "!": [[(0.02, 0), (0, 0.7)], [(0, 0.96), (0.02, 0.98)]],
    "?": [[(0, 0.18), (0.1, 0.02), (0.3, 0.02), (0.4, 0.18), (0.34, 0.36), (0.2, 0.5), (0.2, 0.7)], [(0.2, 0.96), (0.22, 0.98)]],
    "'": [[(0.02, 0), (0, 0.24)]], '"': [[(0.02, 0), (0, 0.24)], [(0.18, 0), (0.16, 0.24)]], "*": [[(0.15, 0.05), (0.15, 0.45)], [(0, 0.13), (0.3, 0.38)], [(0.3, 0.13), (0, 0.38)]],
    "%": [[(0.56, 0), (0.06, 1)], [(0.12, 0.04), (0, 0.2), (0.12, 0.38), (0.24, 0.2), (0.12, 0.04)], [(0.5, 0.62), (0.38, 0.78), (0.5, 0.96), (0.62, 0.78), (0.5, 0.62)]],
    "#": [[(0.2, 0), (0.1, 1)], [(0.48, 0), (0.38, 1)], [(0, 0.33), (0.56, 0.33)], [(0, 0.67), (0.56, 0.67)]],
    "$": [[(0.46, 0.14), (0.26, 0.04), (0.06, 0.16), (0.08, 0.36), (0.28, 0.5), (0.48, 0.66), (0.44, 0.88), (0.24, 0.97), (0.02, 0.84)], [(0.26, -0.1), (0.26, 1.1)]],
}


def sign(character, hand):
    """A sign that EMNIST lacks, as one would write it. Returns a picture, white on black, and how far it reaches below the baseline, in pixels."""
    scale, width = hand.capital * random.gauss(1, hand.looseness), max(2, round(2 * hand.stroke * hand.capital))
    lines = [np.array(line) + randoms().normal(0, 0.025, (len(line), 2)) for line in SIGNS[character]]
    for _ in range(2):  # corners rounded by Chaikin's cutting, https://doi.org/10.1016/0146-664X(74)90028-8
        lines = [np.concatenate([line[:1], *((line[i] * 3 + line[i + 1], line[i] + line[i + 1] * 3) / np.float64(4) for i in range(len(line) - 1)), line[-1:]])
                 for line in lines]
    points = np.concatenate(lines)
    corner, reach = points.min(0), points.max(0)
    mask = np.zeros(tuple(int(v) for v in np.ceil((reach - corner) * 2 * scale + 2 * width)[::-1] // 2 * 2 + 2), np.uint8)  # at twice the size
    for line in lines:
        cv2().polylines(mask, [np.round((line - corner) * 2 * scale + width).astype(np.int32)], False, 255, width, cv2().LINE_AA)
    mask = cv2().resize(mask, (mask.shape[1] // 2, mask.shape[0] // 2), interpolation=cv2().INTER_AREA)
    return Image.fromarray(mask), round((reach[1] - 1) * scale + width / 2)


def handwritten(character, hand, split):
    """A character of EMNIST, of several the one that suits the hand best, or a sign. Returns as sign does."""
    if character in SIGNS:
        return sign(character, hand)
    images, _ = emnist(DATASETS_DIR, SEED, split)
    candidates = random.choices(emnist_places(DATASETS_DIR, SEED, split)[character], k=8)
    stroke, height, slant = emnist_looks(DATASETS_DIR, SEED, split)[candidates].T
    size = X_HEIGHT.get(character, 1)
    unlike = np.abs(np.log(stroke / height * size / hand.stroke)) + 2 * np.abs(slant - hand.slant)
    glyph = images[candidates[int(unlike.argmin())]]  # (28, 28)
    if to_be_warped(split):
        glyph = as_by_another(glyph)
    rows, columns = (np.flatnonzero(glyph.max(axis) > 60) for axis in (1, 0))
    glyph = Image.fromarray(glyph[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1])
    scale = hand.capital * size * random.gauss(1, hand.looseness) / glyph.height
    glyph = glyph.resize((max(1, round(glyph.width * scale)), max(4, round(glyph.height * scale))), Image.Resampling.BICUBIC)
    return glyph, round(hand.capital * (DESCENT.get(character, 0) + random.gauss(0, hand.looseness)))


def compose(text, split):
    """Set characters side by side as one hand would: ink (H, W)."""
    hand = random_hand()
    capital = hand.capital
    canvas = Image.new("L", (capital * 2 * (len(text) + 2), capital * 3))
    baseline, x = capital * 2, capital
    for c in text:
        if c == " ":
            x += round(capital * (random.uniform(0.5, 0.9) + max(0, hand.spacing)))
            continue
        glyph, below = handwritten(c, hand, split)
        canvas.paste(glyph, (x, max(0, baseline + below - glyph.height)), glyph)
        gap = max(hand.spacing, 0.12) if c in SIGNS else hand.spacing  # what touches a point or a dash would hide it
        x += max(2, round(glyph.width + capital * (gap + random.gauss(0, hand.looseness))))
    slant = random.gauss(0, 0.08)
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, (1, slant, -slant * baseline, 0, 1, 0), Image.Resampling.BILINEAR)
    box = canvas.getbbox()
    around = [random.randint(2, capital // 3) for _ in range(4)]
    canvas = canvas.crop((box[0] - around[0], box[1] - around[1], box[2] + around[2], box[3] + around[3]))  # beyond the canvas: black
    return np.asarray(canvas, dtype=np.float32) / 255


def compose_cells(text, split):
    """The same in the fields of a form. Returns ink (H, W) and the fields' edges."""
    hand = random_hand()
    height = round(hand.capital * 1.7)  # of a field's inside

    def in_line(c):
        if c == " ":
            return np.zeros((height, 1), np.float32)
        glyph, below = handwritten(c, hand, split)
        ink = Image.new("L", (glyph.width, height))
        ink.paste(glyph, (0, max(0, min(height - glyph.height, round(hand.capital * 1.3) + below - glyph.height))))
        return np.asarray(ink, dtype=np.float32) / 255

    return in_cells(text, in_line, height)


EMNIST_TEXTS = dict(letters=42, number=22, mixed=12, code=12, words=7, name=5)


# ---------------------------------------------------------------------------------------------------------------------
# One sample per call. Each function is given an index, draws from the generators seeded by it, and returns a picture and
# its label; the picture is None when this text cannot be drawn, and the next text is tried.

def draw_trdg(index):
    split, _ = split_and_rank(index)
    name, style = pick_style(PRINTED)
    text, alone = random_text(split, style.texts or PRINTED_TEXTS)
    return draw_text(split, PRINTED, text, alone, style), text, name


def draw_handwriting(index):
    split, _ = split_and_rank(index)
    name, style = pick_style(HAND)
    text, alone = random_text(split, style.texts or HAND_TEXTS)
    return draw_text(split, HAND, text, alone, style), text, name


def draw_math(index):
    split, _ = split_and_rank(index)
    name, style = pick_style(PRINTED, cells=False)
    text = random_math()
    return draw_text(split, PRINTED, text, False, style), text, name


def draw_emnist(index):
    split, rank = split_and_rank(index)
    images, labels = emnist(DATASETS_DIR, SEED, split)
    return ImageOps.invert(Image.fromarray(images[rank])), str(labels[rank]), "plain"


def draw_emnist_word(index):
    split, _ = split_and_rank(index)
    name, style = pick_style(HAND)
    text, alone = random_text(split, style.texts or EMNIST_TEXTS)
    if alone and set(text) & set("IlOo") and (len(text) == 1 or set(text) & set(string.digits)):
        return None, text, name  # by hand these are 1 and 0, where no word says otherwise
    return draw_composed(split, text, style), text, name


def draw_emnist_math(index):
    split, _ = split_and_rank(index)
    name, style = pick_style(HAND, cells=False)
    text = random_math()
    return draw_composed(split, text, style), text, name


def draw_composed(split, text, style):
    """Draw a text in EMNIST characters, or None where it holds others."""
    if not set(text) <= emnist_places(DATASETS_DIR, SEED, split).keys() | SIGNS.keys() | {" "} or len(text) > MAX_LENGTH:
        return None
    if style.cells:
        return Image.fromarray(style.finish(*compose_cells(text, split)))
    ink = compose(text, split)
    if not style.finish:
        return Image.fromarray(tones(ink, random.randint(0, 90), random.randint(200, 255), random.choice([0, 2, 6])))
    return Image.fromarray(style.finish(ink))


class Source(NamedTuple):
    draw: Callable  # what draws one sample
    number: str  # the constant that says how many
    kinds: tuple  # of fonts; none: of EMNIST characters


SOURCES = {  # name and folder
    "trdg_custom": Source(draw_trdg, "NUM_TRDG", (PRINTED,)),
    "synthetic_math": Source(draw_math, "NUM_MATH", (PRINTED,)),
    "emnist_images": Source(draw_emnist, "NUM_EMNIST", ()),
    "emnist_words": Source(draw_emnist_word, "NUM_EMNIST_WORDS", ()),
    "emnist_math": Source(draw_emnist_math, "NUM_EMNIST_MATH", ()),
    "handwriting": Source(draw_handwriting, "NUM_HANDWRITING", (HAND,)),
}
TRIES = 200  # texts tried for one sample
CHUNK = 200  # samples that a worker draws at a time
RUN_TOGETHER = re.compile(r"__|['\"`]{2}")  # nobody can count joined underscores, or tell two apostrophes from a quotation mark
UNFRAMED = {"plain", "typewriter", "receipt", "low resolution", "pen", "pencil", "marker"}  # styles that draw nothing but the text


class CannotDraw(Exception):
    """No text of a source can be drawn with these constants. No SystemExit, which would end a worker without a word."""


def fault(picture, source, style):
    """What is wrong with a picture as the network will see it, uint8 (32, W), 255 = paper, in a word; None: nothing."""
    if (picture < 128).sum() < 3:
        return "blank"
    if source != "emnist_images" and style in UNFRAMED and (picture[:, [0, -1]] < 80).mean(0).max() > 0.15:
        return "clipped"
    return None


def draw_sample(source, folder, index):
    """Draw sample index of a source into folder. Returns file name, label, split and style."""
    from crnn import frames_needed, load_image, num_frames

    random.seed(f"{SEED} {source} {index}")  # of a string: the same on every platform
    cv2().setRNGSeed(random.getrandbits(31))  # TRDG's noise
    for _ in range(TRIES):
        image, label, style = SOURCES[source].draw(index)
        if image and 0 < len(label) <= MAX_LENGTH and label.strip() == label and set(label) <= set(CHARSET) \
                and not RUN_TOGETHER.search(label):
            picture = load_image(image).numpy()
            if frames_needed(label) <= num_frames(picture.shape[1]) and not fault(picture, source, style):
                break
    else:
        raise CannotDraw(f"no {source} picture could be drawn in {TRIES} tries (the last label was {label!r}): are CHARSET, "
                         f"MAX_LENGTH and the fonts in {FONTS_DIR} too narrow for it? Set {SOURCES[source].number} = 0 to leave it out")
    name = f"{index:05}.png"
    image.save(Path(folder) / name, compress_level=1)
    return name, label, split_and_rank(index)[0], style


def draw_chunk(source, folder, fingerprint, indices):
    """Draw some samples, and when all are there, write down what they are. Returns how many. Runs in the workers."""
    cv2().setNumThreads(1)  # there is a worker to a processor already
    rows = [draw_sample(source, folder, int(index)) for index in indices]
    path = chunk_manifest(Path(folder), indices[0])
    before = read_manifest(path, fingerprint)  # of a run that was interrupted, and whose pictures were then lost in part
    write_manifest(path, fingerprint, sorted({*before, *rows}, key=index_of))
    return len(rows)


def start_worker(constants):
    """Give a worker this process's constants: a spawned one has imported the script afresh and knows only its defaults."""
    globals().update(constants)


def draw_chunks(source, chunks, folder, fingerprint):
    """Draw this process's share of the chunks, arrays of indices, into folder, with NUM_WORKERS to a machine."""
    from crnn import rank, workers_per_process, world_size

    mine = chunks[rank()::world_size()]
    draw, number = partial(draw_chunk, source, str(folder), fingerprint), workers_per_process(NUM_WORKERS)
    with tqdm(total=sum(map(len, mine)), desc=f"{source:<15}", unit="img", smoothing=0.05, disable=rank() > 0) as bar:
        if number <= 1 or len(mine) <= 1:
            for done in map(draw, mine):
                bar.update(done)
            return
        constants = {name: value for name, value in globals().items() if name.isupper() and name not in ("SOURCES", "STYLES", "PLAIN")}
        with ProcessPoolExecutor(number, multiprocessing.get_context(START_METHOD), start_worker, (constants,)) as workers:
            for done in workers.map(draw, mine):
                bar.update(done)


# ---------------------------------------------------------------------------------------------------------------------
# Manifests: what is drawn already, and with which constants. Each source's folder has one, and while it is being drawn every chunk.

def fingerprint(source):
    """A number that changes with all that shapes the pictures of a source, but for their number: constants, code, fonts, EMNIST."""
    code = Path(__file__).read_text(encoding="utf-8").split("# " + "-" * 117)[2:]  # without the constants that the user edits
    parts = ["".join(code), repr((SEED, CHARSET, MAX_LENGTH, STYLED, WARPED if SOURCES[source].kinds != (PRINTED,) else None))]
    parts += [f"{Path(font.path).name} {font.held_out} {Path(font.loan).name} {zlib.crc32(Path(font.path).read_bytes())}"
              for font in FONTS if font.kind in SOURCES[source].kinds]
    if not SOURCES[source].kinds:
        parts += [str(zlib.crc32(emnist(DATASETS_DIR, SEED, split)[0].data)) for split in ("train", "val", "test")]
    return f"{zlib.crc32(chr(10).join(parts).encode()):08x}"


def write_manifest(path, fingerprint, rows):
    """One line with the fingerprint and one a row (name, label, split, style), as JSON. Returns how many rows."""
    from crnn import whole_file

    number = 0
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        print(json.dumps(fingerprint), file=file)
        for number, row in enumerate(rows, start=1):
            print(json.dumps(row), file=file)
    return number


def read_manifest(path, fingerprint):
    """Yield the rows of a manifest with this fingerprint; of a damaged one those before the damage: the others are drawn again."""
    try:
        with open(path, encoding="utf-8") as file:
            if json.loads(next(file, "null")) == fingerprint:
                for line in file:
                    yield tuple(json.loads(line))
    except (FileNotFoundError, ValueError):
        return


def chunk_manifest(staging, index):
    """Where the chunk that a sample belongs to is written down."""
    return staging / f"{index // CHUNK * CHUNK:09}.json"


def index_of(row):
    """Which sample a row of a manifest is: its file name is the index."""
    return int(row[0].split(".")[0])


def drawn_so_far(count, fingerprint, folder, staging):
    """Yield the rows of the pictures with an index below count that are in folder or in staging, by index.

    One after the other from the files, each of which is in order, so that a million pictures take no more memory than a thousand.
    """
    chunks = (row for first in range(0, count, CHUNK) for row in read_manifest(chunk_manifest(staging, first), fingerprint))
    manifests = [read_manifest(place / "manifest.json", fingerprint) for place in (folder, staging)]
    last = -1
    for row in heapq.merge(*manifests, chunks, key=index_of):
        index = index_of(row)
        if last < index < count and any((place / row[0]).exists() for place in (folder, staging)):
            last = index
            yield row


def draw_source(source, count, mark, folder, staging):
    """Draw what is missing of the first count samples of a source into staging. Returns how many are new. mark: the source's fingerprint."""
    from crnn import gather, rank

    kept = np.zeros(count, bool)
    if rank() == 0:  # looked up before anyone draws
        for row in drawn_so_far(count, mark, folder, staging):
            kept[index_of(row)] = True
    kept = gather(kept if rank() == 0 else None)[0]
    chunks = [first + np.flatnonzero(~kept[first:first + CHUNK]) for first in range(0, count, CHUNK)]
    chunks = [chunk for chunk in chunks if len(chunk)]
    if chunks:
        staging.mkdir(parents=True, exist_ok=True)
        draw_chunks(source, chunks, staging, mark)
    gather(None)  # all have drawn
    return int(count - kept.sum())


def move_in(staging, folder, fingerprint, count):
    """Put freshly drawn pictures in the place of the former ones, and remove those beyond. Files with other names are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if write_manifest(staging / "manifest.json", fingerprint, drawn_so_far(count, fingerprint, folder, staging)) < count:
        raise CannotDraw(f"pictures have vanished from {folder.as_posix()} while others were drawn: run the script again")
    (folder / "manifest.json").unlink(missing_ok=True)
    with os.scandir(folder) as entries:
        for entry in entries:
            if re.fullmatch(r"\d{5,}\.png", entry.name) and int(entry.name.split(".")[0]) >= count:
                os.unlink(entry.path)
    for index in range(count):
        with contextlib.suppress(FileNotFoundError):  # it was there before
            os.replace(staging / f"{index:05}.png", folder / f"{index:05}.png")
    os.replace(staging / "manifest.json", folder / "manifest.json")


def tables(counts, marks, own):
    """Yield all rows of data.csv, a few thousand at a time, as DataFrames. own: the rows of the user's own pictures, or None."""
    import pandas as pd

    for source in counts:
        rows = read_manifest(Path(DATASETS_DIR) / source / "manifest.json", marks[source])
        while part := list(islice(rows, 5_000)):
            yield pd.DataFrame([(f"{source}/{name}", label, source, split, style) for name, label, split, style in part],
                               columns=["image_path", "label", "source", "split", "style"])
    if own is not None:
        yield own


def custom_rows():
    """Rows of datasets/custom/labels.csv whose pictures can be read, as a DataFrame like data.csv, or None. Says which cannot."""
    from crnn import add_split, load_image, read_labels

    folder = Path(DATASETS_DIR) / "custom"
    if not (folder / "labels.csv").exists():
        if folder.is_dir() and any(folder.iterdir()):
            print(f"{folder.as_posix()} is left out: it has no labels.csv, whose first line must be image_path,label")
        return None
    try:
        rows = add_split(read_labels(folder / "labels.csv").drop(columns="source", errors="ignore"))
    except ValueError as error:
        raise SystemExit(str(error))
    complaints = []
    for row in tqdm(rows.itertuples(), total=len(rows), desc=f"{'custom':<15}", unit="img"):
        try:
            load_image(folder / row.image_path.replace("\\", "/"))
            complaints.append("" if row.label else f"{row.image_path}: empty label")
        except ValueError as error:
            complaints.append(str(error))
    bad = list(filter(None, complaints))
    for line in bad[:3] + ["..."] * (len(bad) > 3):
        print(f"custom, left out: {line}")
    if bad:
        print(f"custom: {len(bad):,} of {len(rows):,} rows of {(folder / 'labels.csv').as_posix()} are left out")
    rows["image_path"] = "custom/" + rows.image_path.str.replace("\\", "/")
    return rows.assign(style="custom")[[not line for line in complaints]]


# ---------------------------------------------------------------------------------------------------------------------
# What is left behind: preview.png, data.csv, tables

def draw_preview(rows, path):
    """A contact sheet: for every style of every source, a row of training and test pictures with their labels."""
    from crnn import whole_file

    columns, width, height = {"train": 4, "test": 3}, 230, 74
    groups = list(rows.groupby(["source", "style"], sort=False))
    font = ImageFont.truetype(str(Path(FONTS_DIR) / "DejaVuSans.ttf"), 13) if (Path(FONTS_DIR) / "DejaVuSans.ttf").exists() \
        else ImageFont.load_default(13)
    sheet = Image.new("L", (sum(columns.values()) * width + 120, len(groups) * height + 24), 255)
    draw = ImageDraw.Draw(sheet)
    draw.text((120, 4), "training pictures", font=font, fill=0)
    draw.text((120 + columns["train"] * width, 4), "test pictures: other words, other fonts", font=font, fill=0)
    for row, ((source, style), group) in enumerate(groups):
        draw.text((6, row * height + 34), f"{source}\n{style}", font=font, fill=0)
        shown = [(i + offset, sample) for split, offset in (("train", 0), ("test", columns["train"]))
                 for i, sample in enumerate(group[group.split == split].head(columns[split]).itertuples())]
        for column, sample in shown:
            with Image.open(Path(DATASETS_DIR) / sample.image_path) as image:
                image = ImageOps.contain(image.convert("L"), (width - 12, 40))
            x, y = 120 + column * width, row * height + 30
            sheet.paste(image, (x, y))
            draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=160)
            draw.text((x, y + 44), sample.label[:28], font=font, fill=90)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def overview(parts, every):
    """What there is to say about all rows, which come in parts, without keeping them.

    Returns two Counters, of (source, split) and of the characters in the training labels, and two DataFrames: one row in every
    so many, and the first four of each source, style and split.
    """
    import pandas as pd

    sizes, characters, spread, first = Counter(), Counter(), [], {}
    for part in parts:
        sizes.update(zip(part.source, part.split))
        characters.update("".join(part.label[part.split == "train"]))
        spread.append(part.iloc[::every].copy())  # a copy, since a slice would keep the whole part in memory
        for key, group in part.groupby(["source", "style", "split"], sort=False):
            first[key] = (pd.concat([first[key], group]) if key in first else group).head(4).copy()
    return sizes, characters, pd.concat(spread), pd.concat(first.values())


def check_sample(rows):
    """Open the pictures of rows as training will, but the user's own. Raises SystemExit naming one that is blank, clipped or unreadable."""
    from crnn import load_image

    for row in rows[rows.source != "custom"].itertuples():
        path = Path(DATASETS_DIR) / row.image_path
        try:
            wrong = fault(load_image(path).numpy(), row.source, row.style)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise SystemExit(f"{path.as_posix()}, labelled {row.label!r}: {wrong}. Remove {path.parent.as_posix()}/manifest.json and run this "
                             f"script again; it draws that folder anew")


def report_characters(counts):
    """Print how often every character stands in the training labels, a Counter, and which of CHARSET stand there too seldom to be learned."""
    print("\ncharacters in the training labels:")
    cells = [f"{c!r:>4}{n:>8,}" for c, n in counts.most_common()]
    for start in range(0, len(cells), 9):
        print(" ".join(cells[start:start + 9]))
    if rare := [c for c in CHARSET if counts[c] < 50]:
        print(f"fewer than 50 times, and so hardly learned: {' '.join(rare)}")


def find_sources(counts):
    """Look for fonts and EMNIST, and set the counts of those sources to 0 that lack what they are drawn with. Prints what it finds."""
    from crnn import gather, rank

    global FONTS
    FONTS, notes = find_fonts()
    for note in notes:
        print(note)
    for kind in (PRINTED, HAND):
        held_out = sorted({font.family for font in FONTS if font.kind == kind and font.held_out})
        print(f"{sum(font.kind == kind for font in FONTS)} {kind} fonts; only in val and test: {', '.join(held_out) or 'none'}")
    for source, (_, _, kinds) in SOURCES.items():
        if any(counts[source] and len({font.family for font in FONTS if font.kind == kind}) < 2 for kind in kinds):
            print(f"{source} is left out: it needs {kinds[0]} fonts of at least two families, one of them for val and test")
            counts[source] = 0
    by_emnist = [source for source in SOURCES if not SOURCES[source].kinds]
    if any(counts[source] for source in by_emnist):
        if not gather(find_emnist() if rank() == 0 else None)[0]:  # where it must be downloaded, once
            counts.update(dict.fromkeys(by_emnist, 0))
            return
        if (most := emnist_count(counts["emnist_images"])) < counts["emnist_images"]:
            counts["emnist_images"] = most
            print(f"NUM_EMNIST is lowered to {most:,}: no more without drawing a character twice")
        if counts["emnist_words"] or counts["emnist_math"]:
            for split in ("train", "val", "test"):
                emnist_looks(DATASETS_DIR, SEED, split)  # here once, and not in every forked worker


def main():
    """Draw every source, then put pictures, preview.png and data.csv in place. Raises SystemExit with one line when it cannot."""
    import pandas as pd
    from crnn import Charset, join_processes, leave_processes, rank, write_labels

    started = time.perf_counter()
    join_processes()
    try:
        Charset(CHARSET)
    except ValueError as error:
        raise SystemExit(f"CHARSET: {error}")
    counts = {source: globals()[number] for source, (_, number, _) in SOURCES.items()}
    if not any(counts.values()):
        raise SystemExit("nothing to draw: every NUM_ constant at the top of prepare_ocr_dataset.py is 0")
    trdg_generator()
    find_sources(counts)
    counts = {source: count for source, count in counts.items() if count}
    if not counts:
        raise SystemExit("nothing could be drawn: see the lines above")

    datasets = Path(DATASETS_DIR)
    staging = datasets / ".drawing"  # what stood before stays in place until all is drawn
    try:
        new, marks = {}, {source: fingerprint(source) for source in counts}
        fresh = {source: staging / f"{source} {mark}" for source, mark in marks.items()}  # never mixed with those of other constants
        for source, count in counts.items():
            new[source] = draw_source(source, count, marks[source], datasets / source, fresh[source])
        leave_processes()
        if rank() > 0:
            return  # the first process sees to the rest
        (datasets / "data.csv").unlink(missing_ok=True)  # its labels belong to the former pictures
        for source, count in counts.items():
            move_in(fresh[source], datasets / source, marks[source], count)
        own = custom_rows()
        sizes, characters, spread, first = overview(tables(counts, marks, own), every=max(1, sum(counts.values()) // 1000))
        check_sample(spread)
        draw_preview(first, datasets / "preview.png")
        write_labels(tables(counts, marks, own), datasets / "data.csv")
        shutil.rmtree(staging, ignore_errors=True)
    except CannotDraw as error:
        raise SystemExit(str(error))
    except BrokenProcessPool:
        raise SystemExit("a worker process died, most likely for want of memory: set NUM_WORKERS lower")
    except (OSError, KeyboardInterrupt) as error:
        kept = "data.csv and the pictures of an earlier run are as they were" if (datasets / "data.csv").exists() else \
            "there is no data.csv until this script has run to its end"
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(f"stopped: {kept}; run the script again and it goes on with what is drawn already")
        raise SystemExit(f"cannot write to {datasets}: {error}. Make room there, or set DATASETS_DIR to another folder; {kept}")

    print(f"\n{pd.Series(sizes).unstack(fill_value=0).reindex(list(dict.fromkeys(source for source, _ in sizes))).to_string()}")
    report_characters(characters)
    print(f"\n{sizes.total():,} pictures in {time.perf_counter() - started:.0f} s, {sum(new.values()):,} of them new"
          f"\nlabels in {(datasets / 'data.csv').as_posix()}, a look at them in {(datasets / 'preview.png').as_posix()}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main()
