"""Draw the training data: pictures of short texts under datasets/, and datasets/data.csv with their labels.

    python prepare_ocr_dataset.py
    torchrun --nnodes=10 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 prepare_ocr_dataset.py     on ten machines that share the folder

Five sources, each a folder: trdg_custom (printed text through TRDG), synthetic_math (expressions), emnist_images (single
handwritten characters), emnist_words (strings composed of them), handwriting (text in handwriting fonts). The constants
below are yours to edit. The same constants draw the same files, byte for byte, whatever the number of workers and machines.
"""
import contextlib
import hashlib
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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# How many pictures of each source; 0 leaves it out. One in 20 is kept for validation and one for the test.
NUM_TRDG = 34_000  # printed text
NUM_MATH = 14_000  # expressions
NUM_EMNIST = 45_000  # single handwritten characters, as many as the EMNIST files hold at most
NUM_EMNIST_WORDS = 22_000  # strings composed of EMNIST characters
NUM_HANDWRITING = 28_000  # text in handwriting fonts

# What may be drawn
CHARSET = ("".join(chr(i) for i in range(32, 127))  # printable ASCII, the space included
           + "×÷±√π≤≥≠")
MAX_LENGTH = 28  # characters in a label
HELD_OUT_FONTS = 0.12  # share of the font families that only validation and test rows are drawn in

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
            if len(characters) < 26:
                notes.append(f"{path} is left out: it draws only {len(characters)} characters of the charset")
                continue
            fonts.append(Font(str(path), kind, family, characters, doubtful, False))
    return hold_out_families(fonts), notes


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


def pick_font(label, kind, split, alone):
    """A font of a kind that draws every character of a label, or None; held-out ones for val and test.

    A family first and then one of its files, so that those with many weights are not seen more often. A label that stands
    alone, with no word around its characters, gets no font in which one of them looks like another.
    """
    needed, held_out = frozenset(label), split != "train"
    families = {}
    for font in FONTS:
        if font.kind == kind and font.held_out == held_out and needed <= font.characters and not (alone and needed & font.doubtful):
            families.setdefault(font.family, []).append(font)
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
        lambda: f"No. {n(1, 5)}", lambda: f"{r(1, 99)}/{r(1, 99)}", lambda: f"{n(1, 3)}x{n(1, 3)}", lambda: f"{n(1, 3)} kg",
    ])()


def punctuated(split):
    """Words with punctuation in the places where it stands in real text."""
    pattern = random.choice([
        "{w}.", "{w},", "{w}!", "{w}?", "{w}:", "{w};", "({w})", '"{w}"', "'{w}'", "[{w}]", "{{{w}}}", "<{w}>", "{w}'s", "{w}...",
        "{w}, {w}", "{w}. {W}", "{w}: {n}", "{w}; {w}", "{w}-{w}", "{w}/{w}", "{w} & {w}", "{w} - {w}", "{w} ({n})", "{w} #{n}",
        "{w}@{w}.com", "www.{w}.org", "@{w}", "#{w}", "{w}_{w}", "{w} = {n}", "{w}+{w}", "{n}% {w}", "~{n}", "{w}*", "* {w}",
        "{w} | {w}", "\\{w}", "`{w}`", "${n}.{n}", "{n}^{n}", "C:\\{w}", "{w}({n})", "{W} {n}", "{n}. {W}", "{W}, {W}", "{w}?!",
        "Mr. {W}", "{n} {w}", "{w}={w}", "{w}[{n}]", "!{w}", "{w}%", "{w}>{n}", "{w}<{n}", "{n}:{n}", "{w}|{n}", "~{w}", "\"{W}\"",
    ])
    return re.sub(r"{([wWn])}", lambda m: {"w": lambda: random_word(split), "n": lambda: random_digits(1, 3),
                                           "W": lambda: random.choice(words(split)).capitalize()}[m[1]](),
                  pattern.replace("{{", "{").replace("}}}", "}}"))


def random_single():
    pool = weighted(letters=6, digits=2, signs=3)
    return random.choice({"letters": string.ascii_letters, "digits": string.digits, "signs": string.punctuation}[pool])


def random_text(split, by_hand=False):
    """One label made of the words of a split, and whether it stands alone, with no word around its characters.

    By hand, people write more words and fewer codes and odd strings, and expressions, which print has a source of its own for.
    """
    kind = weighted(words=42, punctuated=14, number=14, math=12, code=5, string=5, single=8) if by_hand else \
        weighted(words=38, punctuated=16, number=16, code=10, string=11, single=9)
    draw = {"words": lambda: " ".join(random_word(split) for _ in range(random.choices((1, 2, 3), (6, 3, 1))[0])),
            "punctuated": lambda: punctuated(split), "number": random_number, "math": random_math, "code": random_code,
            "string": lambda: random_string(string.ascii_letters + string.digits + string.punctuation, 1, 12),
            "single": random_single}
    return draw[kind](), kind in ("code", "string", "single")


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
# TRDG

@cache
def trdg_generator():
    """TRDG's generator class, repaired for Pillow >= 10 and made about three times faster, once per process.

    TRDG 1.8.0 asks fonts for getsize, which Pillow removed (its issues 315 and 343). Here the height of a line is the
    font's own line box instead, so that a comma stays low and a quote high. It also reads the font file anew for every
    picture and shapes every character twice; a cache and the basic layout change no picture of Latin text but its kerning.
    """
    try:
        with contextlib.redirect_stdout(None):  # it prints that its handwriting network, not used here, lacks modules
            from trdg import computer_text_generator
            from trdg.generators import GeneratorFromStrings
    except ImportError as error:
        raise SystemExit(f"{TRDG_MISSING} ({error})")
    load = lru_cache(maxsize=4096)(partial(ImageFont.truetype, layout_engine=ImageFont.Layout.BASIC))
    computer_text_generator.ImageFont = SimpleNamespace(truetype=load)
    computer_text_generator.get_text_height = lambda font, text: max(sum(font.getmetrics()), font.getbbox(text)[3])
    return GeneratorFromStrings


def draw_line(text, font, alone=False):
    """A grey picture of text in a font, through TRDG, its margins cut at random. None when TRDG clipped or lost the ink.

    TRDG's canvas ends where the last character's advance ends and cuts what reaches beyond; a space on either side
    makes room for it.
    """
    colour = random.choice(["#000000,#505050"] * 6 + ["#404040,#808080", "#000060,#4040A0", "#600000,#A04040"])
    height = random.randrange(24, 53, 2)  # of the line box, in pixels; even, so that the cache holds every font at every size
    wave = random.random() < 0.08 and height >= 36  # TRDG moves rows and columns by up to the root of the height
    image, mask = next(trdg_generator()(
        [f" {text} "], count=1, fonts=[font.path], size=height, text_color=colour,
        word_split=random.random() < 0.75, character_spacing=random.choice([0, 0, 1, 2, height // 12]),
        space_width=random.uniform(1, 1.7), skewing_angle=random.choice([0, 0, 1, 2, 3]), random_skew=True,
        distorsion_type=random.randint(1, 2) if wave else 0, distorsion_orientation=random.randint(0, 2),  # not 3: it tears strokes
        background_type=random.choice([0, 1]), blur=random.choice([0, 0, 0.6, 1]), random_blur=True,
        margins=(0, 0, 0, 0), output_mask=True))[0]
    box = mask.getbbox()  # not in grey: TRDG numbers the characters in the mask's blue, and the first are nearly black
    if box is None or box[0] < 2 or box[2] > mask.width - 2:
        return None
    left, top, right, bottom = random_margins(box, image.size, tight=not alone and len(text) > 2 and random.random() < 0.5)
    return image.convert("L").crop((left, top, right, bottom))


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


def draw_text(split, kind, text, alone=False):
    """Draw a text in a random font of a kind. None when no font can show all its characters, or its ink was clipped."""
    font = pick_font(text, kind, split, alone)
    return font and draw_line(text, font, alone)


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
    print(f"EMNIST is missing: {reason}. The sources emnist_images and emnist_words are left out, and the script goes on; a "
          f"model trained without them read 55 % of single handwritten characters instead of 87 %. To have them, put "
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
    return images[order], labels[order]


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


X_HEIGHT = dict.fromkeys("acemnorsuvwxz", 0.68)  # height against a capital's; EMNIST scales every character to one size
DESCENT = dict(g=0.3, j=0.28, p=0.3, q=0.3, y=0.3)  # how far below the baseline, against a capital's height


def compose(text, split):
    """Set EMNIST characters side by side as a hand would: sizes, baseline and spacing loose, one slant. Grey, dark on light."""
    images, _ = emnist(DATASETS_DIR, SEED, split)
    places = emnist_places(DATASETS_DIR, SEED, split)
    capital = random.randint(20, 34)  # height of a capital letter, in pixels
    looseness, spacing = random.uniform(0.02, 0.12), random.uniform(-0.04, 0.3)  # against capital
    canvas = Image.new("L", (capital * 2 * (len(text) + 2), capital * 3))
    baseline, x = capital * 2, capital
    for c in text:
        if c == " ":
            x += round(capital * random.uniform(0.5, 0.9))
            continue
        glyph = Image.fromarray(images[random.choice(places[c])])
        glyph = glyph.crop(glyph.point(lambda tone: 255 * (tone > 60)).getbbox() or glyph.getbbox())
        scale = capital * X_HEIGHT.get(c, 1) * random.gauss(1, looseness) / glyph.height
        glyph = glyph.resize((max(1, round(glyph.width * scale)), max(4, round(glyph.height * scale))), Image.Resampling.BICUBIC)
        bottom = baseline + round(capital * (DESCENT.get(c, 0) + random.gauss(0, looseness)))
        canvas.paste(glyph, (x, max(0, bottom - glyph.height)), glyph)
        x += max(2, round(glyph.width + capital * (spacing + random.gauss(0, looseness))))
    slant = random.gauss(0, 0.12)
    canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, (1, slant, -slant * baseline, 0, 1, 0), Image.Resampling.BILINEAR)
    box = canvas.getbbox()
    margins = [random.randint(1, capital // 3) for _ in range(4)]
    box = (box[0] - margins[0], box[1] - margins[1], box[2] + margins[2], box[3] + margins[3])  # beyond the canvas: black
    return on_paper(ImageOps.invert(canvas.crop(box)))


def on_paper(image):
    """Dark ink of random strength on paper of a random tone with a little noise."""
    ink, paper = random.randint(0, 90), random.randint(200, 255)
    noise = np.random.default_rng(random.getrandbits(63)).normal(0, random.choice([0, 2, 6]), (image.height, image.width))
    tones = ink + np.asarray(image) * ((paper - ink) / 255) + noise
    return Image.fromarray(tones.clip(0, 255).round().astype(np.uint8))


def random_emnist_text(split):
    """Letters and digits only: words in several cases, numbers, codes, arbitrary strings; sometimes two words."""
    kind = weighted(word=50, number=20, code=12, string=12, two=6)
    if kind in ("word", "two"):
        return " ".join(re.sub("[^A-Za-z]", "", random_word(split)) for _ in range(2 if kind == "two" else 1))
    return {"number": lambda: random_digits(2, 8), "string": lambda: random_string(ALPHANUMERIC, 2, 7),
            "code": lambda: random_string(string.ascii_uppercase + string.digits, 3, 8)}[kind]()


# ---------------------------------------------------------------------------------------------------------------------
# One sample per call. Each function is given an index, draws from the generators seeded by it, and returns a picture and
# its label; the picture is None when this text cannot be drawn, and the next text is tried.

def draw_trdg(index):
    split, _ = split_and_rank(index)
    text, alone = random_text(split)
    return draw_text(split, PRINTED, text, alone), text


def draw_handwriting(index):
    split, _ = split_and_rank(index)
    text, alone = random_text(split, by_hand=True)
    return draw_text(split, HAND, text, alone), text


def draw_math(index):
    split, _ = split_and_rank(index)
    text = random_math()
    return draw_text(split, PRINTED, text), text


def draw_emnist(index):
    split, rank = split_and_rank(index)
    images, labels = emnist(DATASETS_DIR, SEED, split)
    return ImageOps.invert(Image.fromarray(images[rank])), str(labels[rank])


def draw_emnist_word(index):
    split, _ = split_and_rank(index)
    text = random_emnist_text(split)
    drawable = set(text) <= emnist_places(DATASETS_DIR, SEED, split).keys() | {" "} and len(text) <= MAX_LENGTH
    return compose(text, split) if drawable else None, text


SOURCES = {  # name and folder -> what draws one sample, and the constant that says how many
    "trdg_custom": (draw_trdg, "NUM_TRDG"),
    "synthetic_math": (draw_math, "NUM_MATH"),
    "emnist_images": (draw_emnist, "NUM_EMNIST"),
    "emnist_words": (draw_emnist_word, "NUM_EMNIST_WORDS"),
    "handwriting": (draw_handwriting, "NUM_HANDWRITING"),
}
TRIES = 200  # texts tried for one sample


class CannotDraw(Exception):
    """No text of a source can be drawn with these constants. No SystemExit, which would end a worker without a word."""


def draw_sample(source, folder, index):
    """Draw sample index of a source into folder. Returns file name, label, split and seconds. Runs in the workers."""
    import cv2
    from crnn import frames_needed, num_frames, HEIGHT

    start = time.perf_counter()
    random.seed(f"{SEED} {source} {index}")  # of a string: the same on every platform
    cv2.setRNGSeed(random.getrandbits(31))  # TRDG's noise
    for _ in range(TRIES):
        image, label = SOURCES[source][0](index)
        if image and 0 < len(label) <= MAX_LENGTH and label.strip() == label and set(label) <= set(CHARSET):
            if frames_needed(label) <= num_frames(round(image.width * HEIGHT / image.height)):
                break
    else:
        raise CannotDraw(f"no {source} picture could be drawn in {TRIES} tries (the last label was {label!r}): are CHARSET, "
                         f"MAX_LENGTH and the fonts in {FONTS_DIR} too narrow for it? Set {SOURCES[source][1]} = 0 to leave it out")
    name = f"{index:05}.png"
    image.save(Path(folder) / name, compress_level=3)
    return name, label, split_and_rank(index)[0], time.perf_counter() - start


def start_worker(constants):
    """Give a worker this process's constants: a spawned one has imported the script afresh and knows only its defaults."""
    globals().update(constants)


def draw_source(source, count, folder):
    """Draw this process's share of a source into folder, with NUM_WORKERS to a machine. Returns a list of what draw_sample returns."""
    from crnn import rank, world_size

    folder.mkdir(parents=True, exist_ok=True)
    draw, indices = partial(draw_sample, source, str(folder)), range(rank(), count, world_size())
    bar = partial(tqdm, total=len(indices), desc=f"{source:<15}", unit="img", smoothing=0.05, disable=rank() > 0)
    number = max(1, NUM_WORKERS // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # of workers for this process
    if number == 1:
        return list(bar(map(draw, indices)))
    constants = {name: value for name, value in globals().items() if name.isupper() and name != "SOURCES"}
    with ProcessPoolExecutor(number, multiprocessing.get_context(START_METHOD), start_worker, (constants,)) as workers:
        return list(bar(workers.map(draw, indices, chunksize=32)))


# ---------------------------------------------------------------------------------------------------------------------
# What is left behind: the pictures, preview.png, data.csv, a table

def move_in(drawn, target):
    """Put freshly drawn pictures in the place of the former ones, and remove those beyond. Files with other names are left alone."""
    target.mkdir(parents=True, exist_ok=True)
    for path in target.iterdir():
        if re.fullmatch(r"\d{5,}\.png", path.name) and not (drawn / path.name).exists():
            path.unlink()
    for path in drawn.iterdir():
        os.replace(path, target / path.name)


def draw_preview(rows, path):
    """A contact sheet: for every source, a row of training and a row of test pictures with their labels."""
    from crnn import whole_file

    columns, width, height = 7, 230, 74
    strips = [(source, split) for source in rows.source.unique() for split in ("train", "test")]
    font = ImageFont.truetype(str(Path(FONTS_DIR) / "DejaVuSans.ttf"), 13) if (Path(FONTS_DIR) / "DejaVuSans.ttf").exists() \
        else ImageFont.load_default(13)
    sheet = Image.new("L", (columns * width + 120, len(strips) * height), 255)
    draw = ImageDraw.Draw(sheet)
    for row, (source, split) in enumerate(strips):
        draw.text((6, row * height + 20), f"{source}\n{split}", font=font, fill=0)
        for column, sample in enumerate(rows[(rows.source == source) & (rows.split == split)].head(columns).itertuples()):
            with Image.open(Path(DATASETS_DIR) / sample.image_path) as image:
                image = ImageOps.contain(image.convert("L"), (width - 12, 40))
            x, y = 120 + column * width, row * height + 6
            sheet.paste(image, (x, y))
            draw.rectangle((x - 1, y - 1, x + image.width, y + image.height), outline=160)
            draw.text((x, y + 46), sample.label, font=font, fill=90)
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def main():
    """Draw every source, then put pictures, preview.png and data.csv in place. Raises SystemExit with one line when it cannot."""
    import pandas as pd
    from crnn import Charset, gather, join_processes, rank, write_labels

    global FONTS
    started = time.perf_counter()
    join_processes()
    try:
        Charset(CHARSET)
    except ValueError as error:
        raise SystemExit(f"CHARSET: {error}")
    counts = {source: globals()[constant] for source, (_, constant) in SOURCES.items()}
    if not any(counts.values()):
        raise SystemExit("nothing to draw: every NUM_ constant at the top of prepare_ocr_dataset.py is 0")
    trdg_generator()
    FONTS, notes = find_fonts()
    for note in notes:
        print(note)
    for kind in (PRINTED, HAND):
        held_out = sorted({font.family for font in FONTS if font.kind == kind and font.held_out})
        print(f"{sum(font.kind == kind for font in FONTS)} {kind} fonts; only in val and test: {', '.join(held_out) or 'none'}")
    for source, kind in (("trdg_custom", PRINTED), ("synthetic_math", PRINTED), ("handwriting", HAND)):
        if counts[source] and len({font.family for font in FONTS if font.kind == kind}) < 2:
            print(f"{source} is left out: it needs {kind} fonts of at least two families, one of them for val and test")
            counts[source] = 0
    if counts["emnist_images"] or counts["emnist_words"]:
        if not gather(find_emnist() if rank() == 0 else None)[0]:  # where it must be downloaded, once
            counts["emnist_images"] = counts["emnist_words"] = 0
        elif (most := emnist_count(counts["emnist_images"])) < counts["emnist_images"]:
            counts["emnist_images"] = most
            print(f"NUM_EMNIST is lowered to {most:,}: no more without drawing a character twice")

    datasets = Path(DATASETS_DIR)
    staging = datasets / ".drawing"  # what stood before stays in place until all is drawn
    rows = []
    try:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        gather(None)
        for source, count in counts.items():
            if count:
                rows += [(f"{source}/{name}", label, source, split, seconds)
                         for name, label, split, seconds in draw_source(source, count, staging / source)]
        rows = [row for part in gather(rows) for row in part]
        if rank() > 0:
            return  # the first process sees to the rest
        if not rows:
            raise SystemExit("nothing could be drawn: see the lines above")
        rows.sort(key=lambda row: (list(SOURCES).index(row[2]), len(row[0]), row[0]))  # a longer name has a higher number
        (datasets / "data.csv").unlink(missing_ok=True)  # its labels belong to the former pictures
        for source in filter(counts.get, counts):
            move_in(staging / source, datasets / source)
        table = pd.DataFrame(rows, columns=["image_path", "label", "source", "split", "seconds"])
        draw_preview(table, datasets / "preview.png")
        write_labels(table.drop(columns="seconds"), datasets / "data.csv")
    except CannotDraw as error:
        raise SystemExit(str(error))
    except BrokenProcessPool:
        raise SystemExit("a worker process died, most likely for want of memory: set NUM_WORKERS lower")
    except (OSError, KeyboardInterrupt) as error:
        kept = "data.csv and the pictures of an earlier run are as they were" if (datasets / "data.csv").exists() else \
            "there is no data.csv until this script has run to its end"
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(f"stopped: {kept}")
        raise SystemExit(f"cannot write to {datasets}: {error}. Make room there, or set DATASETS_DIR to another folder; {kept}")
    finally:
        if rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)

    table["characters"] = table.label.str.len()
    summary = table.groupby(["source", "split"], sort=False).agg(
        images=("label", "size"), characters=("characters", "sum"), seconds=("seconds", "sum"))
    print(f"\n{summary.to_string(float_format='{:.1f}'.format)}")
    print(f"\n{len(table):,} pictures in {time.perf_counter() - started:.0f} s (seconds above are summed over {NUM_WORKERS} workers)"
          f"\nlabels in {(datasets / 'data.csv').as_posix()}, a look at them in {(datasets / 'preview.png').as_posix()}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main()
