"""Draw the training data: images of short texts under datasets/, and datasets/data.csv.

    python prepare_ocr_dataset.py

An image is a pure function of the constants, its source and its index. So nothing has to be kept
safe: whatever is missing, or was drawn with other constants, is drawn again, by any worker of any
machine, to the same bytes. What is in datasets/custom/labels.csv (image_path,label) joins them.
"""

import ast
import contextlib
import csv
import hashlib
import math
import os
import random
import re
import socket
import string
import time
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import cache, lru_cache, partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from random import choice, gauss, randint, uniform
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import crnn
from crnn import InputError, frames_needed, load_image, num_frames, rank, read_labels, whole_file

# --------------------------------------------------------------------------------------------------
# How many images of each source; 0 leaves it out. One in 20 is for validation, one for the test.
NUM_IMAGES = {
    "trdg_custom": 30_000,  # printed text, set by TRDG
    "synthetic_math": 6_000,  # printed expressions
    "emnist_images": 12_000,  # single handwritten characters as EMNIST has them, none twice
    "emnist_words": 8_000,  # strings composed of EMNIST characters
    "emnist_math": 3_000,  # expressions composed of EMNIST characters and people's signs
    "handwriting": 14_000,  # text in handwriting fonts
    "unipen_words": 14_000,  # words and short texts as people wrote them, see myFonts/hands
    "unipen_text": 7_000,  # text composed of one person's characters
    "unipen_math": 8_000,  # expressions composed of one person's characters
}

# What may be drawn
CHARSET = "".join(map(chr, range(32, 127))) + "×÷±√π≤≥≠"  # printable ASCII with the space, signs
MAX_LENGTH = 28  # characters in a label
STYLED = 0.6  # share of images in a style such as form or photograph; the others are plain
WARPED = 0.75  # share of handwritten training images that are warped (a hand of its own each)
HELD_OUT_FONTS = 0.1  # share of font families that only validation and test rows are drawn in

# Where
FONTS_DIR = "myFonts"  # its folder handwriting/ by hand, all else printed; TRDG's own are added
DATASETS_DIR = "datasets"  # for images, data.csv and preview.png; EMNIST files are in its emnist/

# How
SEED = 0  # another seed draws other images
NUM_WORKERS = min(os.cpu_count() or 1, 61)  # processes that draw; Windows takes 61 at most
DOWNLOAD_TIMEOUT = 20  # seconds without a word from the EMNIST server before going on without
# --------------------------------------------------------------------------------------------------

# What shapes an image: the constants above, put together by main and handed to the workers
SHAPING = "seed charset max_length styled warped held_out_fonts fonts_dir datasets_dir"
Settings = namedtuple("Settings", SHAPING)

# What is drawn with; pen strokes are those of people, see myFonts/hands/README.md
PRINTED, HANDWRITTEN = "printed fonts", "handwritten fonts"
EMNIST, STROKES = "EMNIST", "pen strokes"
HANDS = Path(__file__).parent / "myFonts" / "hands" / "hands.npz"
FREQUENT = Path(__file__).parent / "myFonts" / "words" / "english.txt"  # words, by frequency
TRIES = 2_000  # texts tried for one sample: of a narrow CHARSET few fit
CHUNK = 200  # samples that a worker draws at a time
COLUMNS = ["image_path", "label", "source", "split", "style"]  # of data.csv

# --------------------------------------------------------------------------------------------------
# Splits: every sample's follows from its index, every word's from its letters, every font's from
# its family, every writer's from the name.

CYCLE = 20  # of this many samples, or shares of the words, one is for validation and one for test


def split_of(index):
    """The split of a sample."""
    return {1: "val", 2: "test"}.get(index % CYCLE, "train")


def word_split(word):
    """By a hash of its letters in lower case: no test word is trained on in another spelling."""
    return {0: "val", 1: "test"}.get(zlib.crc32(word.lower().encode()) % CYCLE, "train")


# Of a split: all words of TRDG's dictionary, and those that people use, the most frequent first
Words = namedtuple("Words", "split all used")


@cache
def find_words():
    """The Words of every split, a dict."""
    import trdg

    words = {split: Words(split, [], []) for split in ("train", "val", "test")}
    dictionary = Path(trdg.__file__).parent / "dicts" / "en.txt"
    for kind, path in (("all", dictionary), ("used", FREQUENT)):
        text = path.read_text(encoding="utf-8").split()
        for word in filter(re.compile(r"[A-Za-z]([A-Za-z'-]{0,10}[A-Za-z])?").fullmatch, text):
            getattr(words[word_split(word)], kind).append(word)
    return words


# --------------------------------------------------------------------------------------------------
# Texts: a grammar. Alternatives are two spaces apart; {name} is another entry or a terminal, 0 a
# random digit, · a gap, the same all over a text: a space or nothing. First what stands on paper.
# An x between numbers stands in amounts only, which are printed: by hand, nobody tells it from ×.

GRAMMAR = {
    "words": "{word}  {word}  {word}  {word} {word}  {word} {word}  {word} {word} {word}",
    "made_up": "{invented}  {invented}  {invented} {invented}  {brand}  {brand}  {brand} {n}  "
    "{brand}-{A}  {brand} {n}mg  {brand} {Word}",
    "name": "{A}. {Word}  {A}. {Word}  {A}. {A}. {Word}  {Word} {Word}  {Word}, {A}.  {A}.{A}.  "
    "{Word} {A}. {Word}  Mr. {Word}  Mrs. {Word}  Dr. {Word}  {Word}-{Word}  O'{Word}",
    "item": "{n} x {Word}  {n} x {Word}  {n} x {word}  {n}x {Word}  {Word} x{n}  {n} {Word}  "
    "{Word} {n}  {Word}: {n}  {Word} {price}  {Word} ${price}  {Word} (${price})  {n}. {Word}  "
    "{Word}: ${price}  {Word} no. {n}  {word} {word} {price}",
    "punctuated": '{word}.  {word},  {word}!  {word}?  {word}:  {word};  ({word})  "{word}"  '
    "'{word}'  [{word}]  {{word}}  <{word}>  {word}'s  {word}...  {word}, {word}  {word}. {Word}  "
    "{word}: {n}  {word}; {word}  {word}-{word}  {word}/{word}  {word} & {word}  {word} - {word}  "
    "{word} ({n})  {word} #{n}  {word}@{word}.com  www.{word}.org  @{word}  #{word}  "
    "{word}_{word}  {word} = {n}  {word}+{word}  {n}% {word}  ~{n}  {word}*  * {word}  "
    "{word} | {word}  \\{word}  `{word}`  ${n}.{n}  {n}^{n}  C:\\{word}  {word}({n})  {Word} {n}  "
    "{n}. {Word}  {Word}, {Word}  {word}?!  Mr. {Word}  {n} {word}  {word}={word}  {word}[{n}]  "
    '!{word}  {word}%  {word}>{n}  {word}<{n}  {n}:{n}  {word}|{n}  ~{word}  "{Word}"',
    "number": "{n}  0000  {digits}  {digits}  {n},000  00,000,000  {n}.{n}  +{n}.0  -{n}.00  "
    "{d}e{n}  {d}e-{d}  ${price}  {price}  00,00-  ${n},000.00  {n}%  00.0 %  {date}  {date}  "
    "{date}  {date}  {date}  {time}  {time}  {time}  (000) 000-0000  +00 000 000 0000  000-0000  "
    "#{n}  #000{n}  {n} 000  000 000 {n}  00 00 00  0000 0000 0000  No. {n}  {n}/{n}  "
    "{n} kg",
    "code": "{group}  {group}{dash}{group}  {group}{dash}{group}{dash}{group}  {group} {group}",
    "amount": "{price}  {price}  {price}  {d}.00  0.00  {n},{price}  -{price}  ${price}  "
    "RM{price}  {price} EUR  $ {price}  {price}T  {price} SR  {n} X {price}  {d} @ {price}  "
    "@{price}  {d}.00%  ({price})  {d} x {price}  {price} *  {price} {A}  {d}pc @ {price}  "
    "{price} RM  {n}x{n}",
    "bill": "{due}  {due}:  {due} :  {due} {price}  {due}: {price}  {due} ($)  {due} @{d}%  "
    "{said}  {date} {time}  {noted}  {noted}: {digits}  {noted} #{n}  {noted} : {n}  "
    "Tel: 00-0000 0000  Tel : +{d} 00 000 0000  Tel. : 00.00.00.00  Tel No. 00-0000-0000  "
    "{noted} :  : {n}  : {WORD}  {said}:  {due} (RM)  {due} {said}  TEL NO: 00-000 0000  "
    "*{said}*  {noted}: {A}{A}-000000  {said} :  Date: {date}  Time: {time}  {time} {A}{A}00  "
    "{A}{A}00000000  {A}{zero}{zero}{zero}0000  {A}{A}{zero}{d}  {A}{A}{A}-{zero}{zero}{digits}  "
    "{noted}: {A}{A}{A}-{zero}{zero}{n}0{n}  {A}{A} {A}{zero}{zero}{digits}-{Word}  {noted} :  "
    "{noted} {zero}{digits}  {date} {time} {A}{A}{zero}{d} {A}{A}00  "
    "{d}-{zero}{d}-{d}{zero}{A}{d}  {due} :  {due} : {d}  Tel : +{d} {zero}{d} 0000 0000",
    "due": "TOTAL  Total  Subtotal  CASH  Cash  Change  BALANCE  Discount  Amount Due  Rounding  "
    "QTY  Price  Tip  Grand Total  Net  Amount  Items  Refund  VAT  GST  TAX  Sales Tax  Service  "
    "Total Qty  Item(s)  Qty(s)  SUB-TOTAL  Change Due  Paid Amount  Service Charge  "
    "Total inc. GST",
    "noted": "Invoice No  INVOICE  Receipt No.  Ref  Bill  REF.  Table  Cashier  Desk  A/C  "
    "Doc No.  NO.  No.  Inv No  Desk#  GST NO  Reg No.  TEL  Ticket  Salesperson  Card ID  "
    "TERMINAL",
    "said": "TAX INVOICE  Tax Invoice  WELCOME  Visit us again  Please come again  Description  "
    "DESC  U/P  Item  Customer  {WORD}/{WORD}  GST SUMMARY  Tax Summary  Rounding Adj  CASH BILL  "
    "Date  No refund  Paid  Points  {Word} {Word}  AMT  Amt  (RM)  ({Word})",
    "firm": "{WORD} {WORD}  {WORD} & {WORD}  {WORD} {WORD} LTD.  THE {WORD}  {n}, {WORD} ROAD,  "
    "00000 {WORD}, {WORD}  {d}/{n}-B, {WORD}  {WORD} {n}ML  {n} {WORD}  [KG] {WORD} {n}X{n}G  "
    "NO. {n}, {WORD} {d}/{n},  {A}{A} {d}{A} {WORD}  {WORD} 00{A} {n}  {WORD},  {Word} {Word}  "
    "{A}{A} 000000000 - {Word}  ({WORD})  ({d}000000-{A})  {WORD} (000)",
    "sign": "{WORD}  {WORD}  {WORD}  {WORD}  {WORD}  {WORD}  {WORD}  {Word}  {Word}  {word}  {n}  "
    "{WORD}!  {WORD} {n}  ${price}  {n}%  {d}0% OFF  {time}  {d}am-{d}pm  {Word}.com  {Word}'s",
    "math": "{sum}  {sum}  {sum}  {sum}  {sum}  ({sum})  [{sum}]  {{sum}}  {cut}  {cut}  {cut}  "
    "{piece}  {piece}",
    "sum": "{side}·{relation}·{term}  {side}·{relation}·{side}  {side}  {side}·{relation}·{term}",
    "cut": "{relation}·{side}  {side}·{relation}  {op}·{term}  {side}·{op}  )·{relation}·{side}  "
    "{side})  ({side}  )·{op}·{term}  {term}·{op}·({term}  [{term}  {side}]  {v})·{relation}  "
    "{op}·{fn}  {op}·{fn}{v}  {relation}·{fn}{v}  {op}·{fn}(  ({op}·{v}  {num})({num}  {v},·{v})  "
    "...·{op}  {v}(  {fn}({term}·{op}  ({side}·{op}·({side}  ...·{op}·{term}  "
    "{v}·{op}·...·{op}·{v}",
    "piece": "{function}  {function}  {pair}  |{side}|  {num}!  {v}{v}  {v}·{relation}·{num}  "
    "d{v}  d{v}·{op}·{v}  |{f}({v})|d{v}  {v}{d}·=·{v}{d}  {v}{v}{v}{v}  {d}{v}{v}π  "
    "{v}!·{op}·{d}  {v}·=·({num}  {term}d{v}  {V}·{relation}·{side}  {V}{v}  {v}·{op}·{v}  "
    "{v}{d}  {num}  {v}·+·{d}  {v}{v}·+·{v}  {term}·{relation}·{term}·{relation}·{term}  "
    "{V}·{op}·{V}  {fn}{d}·+·{fn}{d}{v}·=·{num}",
    "function": "{f}({v})  {f}({term})  {f}({v}·{op}·{num})  {fn}({v})  {fn}{v}  {fn}({d}{v})  "
    "{fn}({d}π{v})  {fn}({term})  {v}{fn}{V}",
    "pair": "({num},·{num})  ({v},·{v})  ({num},·{num},·{num})  {{num},·{num}}  [{num},·{num}]",
    "n": "{d}  {d}0  {d}00  0  00  000",
    "d": "1  2  3  4  5  6  7  8  9",
    "price": "{n}.00",
    "date": "{day}/{month}/{year}  {day}.{month}.{year}  {year}-{month}-{day}  {d} {Month} {year}  "
    "{day} {Month} {year}  {Month} {day}, {year}  {month}/{day}/00",
    "day": "{zero}{d}  1{d}  2{d}  31",
    "month": "{zero}{d}  {zero}{d}  {zero}{d}  11  12",
    "Month": "Jan  Feb  Mar  Apr  May  Jun  Jul  Aug  Sep  Oct  Nov  Dec",
    "year": "1900  1900  2{zero}{zero}0  2{zero}10  2{zero}20  2{zero}30",
    "time": "{hour}:{minute}  {d}:{minute} am  {d}:{minute} PM  {hour}:{minute}:{minute}",
    "hour": "{zero}0  10  10  2{zero}  21  22  23",
    "minute": "{zero}0  10  20  30  40  50",
    "dash": "-  -  -    /  .  _  :",
    "side": "{term}  {term}  {term}·{op}·{term}  {term}·{op}·{term}  {v}·{op}·{num}  "
    "{term}·{op}·{term}·{op}·{term}",
    "term": "{num}  {num}  {num}  {num}  {d}  {v}  {v}  {v}  {n}{v}  {d}{v}  {v}^{d}  √{n}  √{v}  "
    "{d}π  π  ({v}·+·{num})  ({v}·-·{num})  -{num}  {num}/{num}  ±{num}  {num}%  {function}  {V}  "
    "{v}{v}  ({side})  {d}({side})",
    "num": "{d}  0  {d}0  {d}00  {d}0.00  0.00  00.0  {d},0  0,00  {d},000  .0",
    "v": "x  x  x  x  x  x  x  x  x  x  y  y  y  y  y  a  a  a  a  a  n  n  n  n  n  b  b  b  b  "
    "c  c  c  z  z  i  i  k  k  m  m  d  d  f  g  h  j  p  q  r  s  t  u  v  w",
    "V": "A  B  C  C  D  E  F  G  H  L  M  N  P  R  T  Y",
    "f": "f  f  g  h  F  P",
    "fn": "sin  cos  tan  log  ln  lim  cot  exp  min",
    "op": "+  +  +  -  -  -  ×  ÷  ±  *  /",
    "relation": "=  =  =  =  <  >  ≤  ≥  ≠",
}
GRAMMAR = {name: alternatives.split("  ") for name, alternatives in GRAMMAR.items()}
UPPER, LOWER, DIGITS = string.ascii_uppercase, string.ascii_lowercase, string.digits
ALPHANUMERIC = DIGITS + UPPER + LOWER  # in the order of EMNIST's labels
SERIAL = UPPER.replace("I", "").replace("O", "") + DIGITS  # most machines avoid these two
GROUPS = [UPPER] * 4 + [DIGITS] * 4 + [SERIAL] * 3 + [LOWER + DIGITS]
SINGLES = [UPPER + LOWER] * 6 + [DIGITS] * 2 + [string.punctuation] * 3
ALIKE = "O0Q Il1| 1lI7 S5s Z2z B8 G6C q9g uvUV cCeo 5S8B6G ., :;i -~= ({[ )}] kKxX wWvV mnrnh"
ENDINGS = "in ol ex ix ax ox um ium one ine cin zole pril fen dine tab vir lax mox cal plus it on "
ENDINGS += "est ide ate pro max min cet zin rin via ana ora ton cor dol gel cap nex"
TERMINALS = {
    "A": lambda words: choice(UPPER),
    "zero": lambda words: "0",
    "digits": lambda words: random_string(DIGITS, 4, 12),
    "word": lambda words: cased(some_word(words)),
    "Word": lambda words: some_word(words).capitalize(),
    "WORD": lambda words: some_word(words).upper(),
    "invented": lambda words: cased(invented(words.all)),
    "brand": lambda words: cased(invented(words.all, ENDINGS.split()), (10, 70, 20)),
    "doubled": lambda words: cased(max(random.choices(words.all, k=12), key=confusing_pairs)),
    "letters": lambda words: cased(next(filter(str.isalpha, iter(partial(some_word, words), "")))),
    "written": lambda words: choice(people(words.split).labels),
    "group": lambda words: random_string(choice(GROUPS), 1, 5),
    "mixed": lambda words: random_string(ALPHANUMERIC, 2, 7),
    "string": lambda words: random_string(ALPHANUMERIC + string.punctuation, 1, 12),
    "single": lambda words: choice(choice(SINGLES)),
    "look_alikes": lambda words: random_string(choice([*ALIKE.split(), DIGITS]), 2, 6),
}
MIXES = {  # of the kinds of text, with their weights
    "printed": dict(words=28, made_up=8, doubled=5, name=6, item=6, punctuated=12, number=14)
    | dict(code=8, string=7, single=8, look_alikes=3),
    "by hand": dict(words=30, made_up=18, doubled=4, name=6, item=4, punctuated=10, number=13)
    | dict(math=12, code=5, string=4, single=7),
    "written": dict(written=1),
    "emnist": dict(letters=42, number=22, mixed=12, code=12, words=7, name=5),
    "math": dict(math=1),
    "fields": dict(code=4, number=4, words=3, letters=2, single=4),
    "receipt": dict(amount=7, bill=7, firm=6, number=4, item=2, words=1),
    "sign": dict(sign=16, made_up=2, words=2, name=1, code=1),
    "label": dict(code=6, number=3, words=5, punctuated=1, single=1),
    "stamp": dict(code=6, number=3, words=1, letters=1),
}
STANDING_ALONE = {"code", "string", "mixed", "single", "look_alikes"}  # no word tells O from 0
# Nobody can count joined underscores, or tell two apostrophes from a quotation mark.
RUN_TOGETHER = re.compile(r"__|['\"`]{2}")


def expand(name, split):
    """A random text of the grammar, its words those of a split."""
    if name in TERMINALS:
        return TERMINALS[name](find_words()[split])
    template = choice(GRAMMAR[name])
    return re.sub(r"{(\w+)}|0", lambda m: expand(m[1], split) if m[1] else choice(DIGITS), template)


def pick_text(mix, split):
    """A text of a mix of kinds, and whether it stands alone, with no word around its characters."""
    kind = random.choices(list(mix), list(mix.values()))[0]
    text = expand(kind, split).replace("·", choice(["", "", " "]))
    return text, kind in STANDING_ALONE or len(text) < 2


def acceptable(label, settings):
    """Whether a label can be asked of a reader: known before anything is drawn."""
    fits = 0 < len(label) <= settings.max_length and label == label.strip()
    return fits and set(label) <= set(settings.charset) and not RUN_TOGETHER.search(label)


def some_word(words):
    """A word, of Words: every other one as people use them, the others of all there are."""
    if chance(0.5):
        return choice(words.all)
    # The n-th most frequent as often as n ** (-2/3): by Zipf's law, 1/n, few others would be seen.
    return words.used[int(len(words.used) * random.random() ** 3)]


def random_string(characters, shortest, longest):
    return "".join(random.choices(characters, k=randint(shortest, longest)))


def cased(word, shares=(53, 27, 20)):
    return random.choices([word.lower(), word.capitalize(), word.upper()], shares)[0]


def confusing_pairs(word):
    """How many letters of a word are doubled or run into another: rn as m, cl as d, vv as w."""
    return len(re.findall(r"(.)\1|rn|cl|vv|nn|ii|li|il|ri|m|w", word.lower()))


def invented(words, endings=()):
    """Halves of two words, or one and an ending, as most names are to a new reader; of a split."""
    split = word_split(words[0])
    while True:
        a, b = (word.lower() for word in random.choices(words, k=2))
        word = a[: len(a) // 2 + 1] + (choice(endings) if endings else b[len(b) // 2 :])
        if len(word) < 14 and word_split(word) == split:
            return word


# --------------------------------------------------------------------------------------------------
# Fonts. A font is only asked for what it draws, and draws unlike everything else.

TRDG_BY_HAND = {"Pacifico.ttf", "Amatic-Bold.ttf", "AmaticSC-Regular.ttf", "FFF_Tusj.ttf"}
DRAWN_ONLY = {"dseg7": "0123456789-.: "}  # family: others are drawn as nobody would read them
# Characters left out, by family: drawn as another sign, as a blot or as nobody writes; oldstyle
# 0 and 1, like o and ı; Playwrite's ≤≥≠, since no other hand would be left to test them in
NOT_DRAWN = r"""alumni % audiowide & bungee ()[] cedarville &" cherry & covered $& dawning =%&
doto :; emblema ~ fff _ handlee & homemade SIT& jacques 01 kaushan ~ la I%& lemonada ~ limelight ÷
londrina × long &` loved {} ma F marck × mr ^ orbitron ()[] pacifico = permanent & pixelify ()<>
playfair 01 playwrite ≤≥≠ quattrocento ~ rufina 01 silkscreen & sixtyfour <>(){} tektur ()[]`
the &%{} tiny5 ~ titillium "÷ truculenta ~ vt323 ×~ walkway ="'÷ workbench <>(){} yellowtail &
zen \` zeyada [} sofia w"""
NOT_DRAWN = dict(re.findall(r"(\S+) (\S+)", NOT_DRAWN))
# The names of font files; of two, little is there at 20 pixels
FONT_FILE = re.compile(r"(?!Lato-Hairline|Raleway-Thin).*\.(ttf|otf|woff2?)", re.I)
BORROWED = "×÷±√π≤≥≠"  # what a printed font that lacks it borrows from another, as browsers do
# Pairs that many fonts draw alike, and the overlap from which nobody tells them apart
OVERLAP = {"O0": 0.5, "Il": 0.72, "I|": 0.72, "l|": 0.72, "1l": 0.72, "1I": 0.72}


# A font file and what it may be asked for: characters that it draws, and draws unlike all others;
# of these, doubtful ones that only the rest of a word tells from a look-alike. held_out: only for
# validation and test rows; size in pixels, of a line; borrowed characters come from the lender.
FIELDS = "path kind family characters doubtful held_out size lender borrowed"
Font = namedtuple("Font", FIELDS, defaults=[False, 0, "", ""])


SPACES = [1.7] * 9 + [6]  # the widest, in the font's own; in one line of ten columns are far apart

# A font file at a size in pixels; in the basic layout, since every text is shaped twice
typeface = lru_cache(12_000)(partial(ImageFont.truetype, layout_engine=ImageFont.Layout.BASIC))


@cache
def find_fonts(settings):
    """The usable Fonts of FONTS_DIR and of TRDG, and lines about the others."""
    import trdg

    folders = Path(settings.fonts_dir), Path(trdg.__file__).parent / "fonts" / "latin"
    fonts, notes = [], []
    # In one order on all systems
    paths = [path for folder in folders for path in sorted(folder.rglob("*"), key=Path.as_posix)]
    for path in [path for path in paths if FONT_FILE.fullmatch(path.name)]:
        by_hand = path.parent.name == "handwriting" or path.name in TRDG_BY_HAND
        try:
            font = survey_font(str(path), HANDWRITTEN if by_hand else PRINTED, settings.charset)
        except OSError as error:
            notes.append(f"{path} is left out: it cannot be read as a font ({error})")
            continue
        if folders[1] in path.parents and not font.characters & set(LOWER):
            continue  # BEBAS and the like, which draw capitals for small letters
        if len(font.characters) >= 26 or font.family in DRAWN_ONLY:
            fonts.append(font)
        else:
            notes.append(f"{path} is left out: it draws too few characters of the charset")
    held_out = {k: held_out_families(fonts, k, settings.held_out_fonts) for k in STYLES}
    fonts = [font._replace(held_out=font.family in held_out[font.kind]) for font in fonts]
    return tuple(with_loan(font, fonts) for font in fonts), tuple(notes)


def survey_font(path, kind, charset):
    """A Font with the characters whose label an image in it can bear."""
    face = typeface(path, 40)
    family = face.getname()[0].split()[0].lower()

    def glyph(character):
        mask, offset = face.getmask2(character, mode="L")
        return mask.size, bytes(mask), offset

    # Not those drawn as nothing, as the font's box for the unknown, or partly above its line.
    unknown = {glyph(c)[:2] for c in ("\uffff", "\ue0ff", "\U0010fffd")}  # no font assigns these
    shapes = {}
    for c in charset:
        size, pixels, offset = glyph(c)
        if c == " " or (any(pixels) and (size, pixels) not in unknown and offset[1] >= -1):
            shapes.setdefault((size, pixels, offset), []).append(c)
    # Of those of one shape, capitals for small letters; no others, such as I and l.
    characters = {same[0] for same in shapes.values() if len({c.lower() for c in same}) == 1}
    bottom = {c: face.getbbox(c, anchor="ls")[3] for c in "npgy"}  # below the baseline, in pixels
    if max(bottom["p"], bottom["g"], bottom["y"]) - bottom["n"] < 3:  # no descender: capitals
        characters -= set(LOWER)
    if sum(glyph("≠")[1]) < sum(glyph("=")[1]):  # Lato's italics draw a mere stroke
        characters -= {"≠"}
    small = typeface(path, 20)  # the least size of a line: thin dashes may be hinted away in it
    characters -= {c for c in characters - {" "} if not any(bytes(small.getmask(c)))}
    characters &= set(DRAWN_ONLY.get(family, charset)) - set(NOT_DRAWN.get(family, ""))
    near = [p for p in OVERLAP if set(p) <= characters and overlap(face, *p) > OVERLAP[p]]
    return Font(path, kind, family, frozenset(characters), frozenset("".join(near)))


def overlap(face, a, b):
    """How much of two slightly blurred glyphs, one set on the other, is common: 1 if the same."""
    blurred = []
    for c in (a, b):
        left, top, right, bottom = face.getbbox(c, anchor="ls")
        image = Image.new("L", (100, 100))
        place = (50 - (left + right) / 2, 50 - (top + bottom) / 2)
        ImageDraw.Draw(image).text(place, c, font=face, fill=255, anchor="ls")
        blurred.append(cv2.GaussianBlur(np.asarray(image, dtype=np.float32), (0, 0), 1.5))
    a, b = blurred
    dotted = abs(a[46:54, 47:53].mean() - b[46:54, 47:53].mean()) > 60  # as a slashed zero is
    return 0.0 if dotted else float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def held_out_families(fonts, kind, share):
    """The families of a kind that only validation and test rows are drawn in."""
    drawn = {}  # by each family, in the order of a hash
    for font in sorted(fonts, key=lambda font: hashlib.sha256(font.family.encode()).digest()):
        if font.kind == kind:
            drawn[font.family] = drawn.get(font.family, frozenset()) | font.characters
    number = math.ceil(share * len(drawn))
    chosen = list(drawn)[: max(0, min(number, len(drawn) - 1))]  # one at least is trained on
    for c in sorted(set().union(*drawn.values())):  # few have √, and none is to be untested
        able = [family for family in drawn if c in drawn[family]]
        if len(able) > 1 and not set(able) & set(chosen):
            chosen.append(able[0])
    return chosen


def with_loan(font, fonts):
    """A printed font that borrows the signs it lacks from another of its side of the split."""
    lacking = "".join(c for c in BORROWED if c not in font.characters)
    side = [f for f in fonts if f.kind == PRINTED and f.held_out == font.held_out]
    lenders = {os.path.basename(f.path): f.path for f in side if set(lacking) <= f.characters}
    if not lacking or not lenders or font.kind != PRINTED or font.family in DRAWN_ONLY:
        return font
    name = sorted(lenders)[zlib.crc32(os.path.basename(font.path).encode()) % len(lenders)]
    loan = dict(lender=lenders[name], borrowed=lacking)
    return font._replace(characters=font.characters | set(lacking), **loan)


def size_of_line(least, most):
    """From least to most; for one line in three doubled, as good scanners and cameras see it."""
    return choice([1, 1, 2]) * randint(least, most)


def pick_font(kind, label, alone, names, split, settings):
    """A Font that draws all of a label, or None; names: a pattern for its file, if any matches."""
    needed, families, matching = frozenset(label), {}, {}
    fonts, _ = find_fonts(settings)
    for font in fonts:
        if font.kind != kind or font.held_out != (split != "train") or needed - font.characters:
            continue
        if alone and needed & font.doubtful:
            continue  # where no word helps, no character may look like another
        families.setdefault(font.family, []).append(font)
        if names and re.search(names, os.path.basename(font.path)):
            matching.setdefault(font.family, []).append(font)
    # A family first and then one of its files, so that many weights are not seen more often. Even
    # sizes, so that the cache of typefaces holds every font at every size.
    families = list((matching or families).values())
    return choice(choice(families))._replace(size=2 * size_of_line(10, 22)) if families else None


# --------------------------------------------------------------------------------------------------
# Pens. A pen takes a text, a font or a hand, and a split, and gives a line's ink, float32 (H, W),
# 0 = paper, 1 = ink, or None where it cannot. H is the line box: a comma stays low, a quote high.


def typed(text, font, split):
    """A text in a font, each borrowed sign on the same baseline: ink (H, W)."""
    size, lender = font.size, font.lender or font.path
    own, other = typeface(font.path, size), typeface(lender, size)
    ascent, descent = own.getmetrics()
    gap, space = choice([0, 0, 0, 1, 2, size // 12]), uniform(1, choice(SPACES))
    room = 2 * len(text) + max(SPACES) * text.count(" ") + 4
    canvas = Image.new("L", (room * size, 5 * size))
    draw, x, baseline = ImageDraw.Draw(canvas), 2.0 * size, 3 * size
    # Runs of characters, with the font's kerning, or one by one with a gap.
    runs = groupby(text, lambda c: (c == " ", c in font.borrowed))
    for piece in text if gap else ["".join(run) for _, run in runs]:
        face = other if piece[0] in font.borrowed else own
        draw.text((x, baseline), piece, font=face, fill=255, anchor="ls")
        x += face.getlength(piece) * (space if piece[0] == " " else 1) + gap
    return line_box(np.asarray(canvas), baseline - ascent, baseline + descent, size // 3)


def line_box(canvas, top, bottom, margin):
    """A line's rows of a uint8 canvas, more where ink reaches beyond, as ink (H, W)."""
    first, last, left, right = ink_box(canvas)
    top, bottom = min(top, first or top), max(bottom, last + 1)
    part = canvas[top:bottom, max(0, left - margin) : right + 1 + margin]
    return part.astype(np.float32) / 255


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
            from trdg import computer_text_generator as generator
    except ImportError as error:
        raise InputError(f"no trdg: pip install --no-deps trdg==1.8.0 ({error})") from None
    # It also reads the font file anew for every image, and shapes every character twice.
    generator.ImageFont = SimpleNamespace(truetype=lambda font, size: typeface(font, size))
    generator.get_text_height = lambda face, text: sum(face.getmetrics())
    blind = SimpleNamespace(text=lambda *_, **__: None)  # for the mask that it draws besides
    generator.ImageDraw = SimpleNamespace(Draw=lambda i, **m: blind if m else ImageDraw.Draw(i))
    return generator


def trdg(text, font, split):
    """A text as TRDG sets it: ink (H, W), its word and character spacing at random."""
    if set(text) & set(font.borrowed):
        return typed(text, font, split)  # TRDG takes one font for a line
    gap, space = choice([0, 0, 1, 2, font.size // 12]), uniform(1, choice(SPACES))
    layout = dict(orientation=0, space_width=space, character_spacing=gap, fit=False)
    layout["word_split"] = chance(0.9)
    line = f" {text} "  # room for what reaches beyond the first and the last character
    image, _ = text_generator().generate(line, font.path, "#000000", font.size, **layout)
    ink = np.asarray(image.getchannel("A"), dtype=np.float32) / 255  # (H, W)
    cut = ink[[0, -1]].any() or ink[:, [0, 1, -2, -1]].any()  # beyond the line or the last advance
    return None if cut else ink


# --------------------------------------------------------------------------------------------------
# Pens of people: characters of EMNIST, or strokes of UNIPEN's writers, set as one hand would

# Where a character stands: EMNIST has one size for all, strokes have a size but have lost their
# place, and signs come in stray sizes. Which part of it (0 its foot, 1 its top) is how high above
# the baseline, and the least and most of its height, or of a sign's larger side; all in capitals.
PLACES = {
    "acemnorsuvwxz": (0, 0, 0.45, 0.9),
    "gpqy": (1, 0.65, 0.7, 1.25),
    "j": (1, 0.9, 0.8, 1.4),
    ".": (0, 0, 0.02, 0.1),
    ",": (1, 0.1, 0.15, 0.35),
    ";": (1, 0.6, 0.55, 0.85),
    ":": (0, 0.05, 0.35, 0.6),
    "'`\"^": (1, 1.05, 0.2, 0.45),
    "*": (1, 1, 0.35, 0.6),
    "-": (0.5, 0.42, 0.3, 0.7),
    "~": (0.5, 0.42, 0.45, 0.8),
    "=+×÷±<>≤≥≠": (0.5, 0.42, 0.5, 0.9),
    "_": (0.5, -0.12, 0.5, 1),
    "()[]{}|/\\": (0.5, 0.42, 1, 1.6),
    "√": (0.5, 0.5, 1, 1.5),
    "π": (0, 0, 0.5, 0.8),
}
CAPITAL = (0, 0, 0.9, 1.2)
PLACES = {c: PLACES.get(next((g for g in PLACES if c in g), ""), CAPITAL) for c in CHARSET}
# One person's way to write: lengths in parts of a capital's height, which is in pixels; slant in
# columns per row; looseness is how much sizes, places and spaces vary; spacing < 0: they touch.
# writer: samples of each label, of one person or, for whole texts, of all, see People; wide: how
# much strokes are stretched; joined: whether the letters of a word hang together; point: how high a
# point stands, since some write it in the middle, as between factors; haste: what is rounded off
FIELDS = "capital stroke slant looseness spacing settings writer wide joined point haste"
Hand = namedtuple("Hand", FIELDS, defaults=[None, 1, False, 0, 0])

# All steps between points (points, 2), and of each sample where its points begin, how many each of
# its strokes has, its writer's name, and its label
Samples = namedtuple("Samples", "steps points strokes writers labels")
# texts: label -> numbers of samples; labels: of all of them; writers: character -> numbers, of each
People = namedtuple("People", "texts labels writers")


@cache
def hands():
    """The Samples of HANDS."""
    with np.load(HANDS) as file:
        steps = np.stack([file["dx"], file["dy"]], 1)  # (points, 2)
        points, ends = file["points_in_stroke"].cumsum(), file["strokes_in_sample"].cumsum()
        strokes = np.split(file["points_in_stroke"], ends[:-1])  # of each sample
        names, labels = (str(file[name]).split("\n") for name in ("writers", "labels"))
        writers = [names[number] for number in file["writer"]]
    return Samples(steps, [0, *points[ends - 1].tolist()], strokes, writers, labels)


def strokes_of(number):
    """The strokes of a sample, a list of float32 (points, 2), y down, near (0, 0)."""
    samples = hands()
    steps = samples.steps[samples.points[number] : samples.points[number + 1]]
    places = steps.astype(np.int32).cumsum(0).astype(np.float32)  # (points, 2)
    return np.split(places, np.cumsum(samples.strokes[number])[:-1])


@cache
def people(split):
    """The People of a split."""
    texts, writers = {}, {}
    for number, (writer, label) in enumerate(zip(hands().writers, hands().labels)):
        if word_split(writer) != split:
            continue
        if len(label) == 1:
            writers.setdefault(writer, {}).setdefault(label, []).append(number)
            continue
        # Held-out words stay so, in whoever's hand.
        words = re.findall("[A-Za-z]+'?[A-Za-z]+", label) if split == "train" else []
        if all(word_split(word) == "train" for word in words):
            texts.setdefault(label, []).append(number)
    labels = [label for label, numbers in texts.items() for _ in numbers]
    return People(texts, labels, list(writers.values()))


@cache
def emnist(settings, split):
    """Upright EMNIST characters of a split, white on black, uint8 (n, 28, 28), and labels (n,)."""
    from torchvision import datasets

    folder = f"{settings.datasets_dir}/emnist"
    data = datasets.EMNIST(folder, split="byclass", train=split != "test")
    images = data.data.numpy().transpose(0, 2, 1)  # stored transposed -> (n, rows, columns)
    labels = np.array(list(ALPHANUMERIC))[data.targets.numpy()]  # (n,)
    order = np.random.default_rng(settings.seed).permutation(len(images))
    if split != "test":  # of the train file, one in CYCLE is for validation
        order = order[(order % CYCLE == 0) == (split == "val")]
    return np.ascontiguousarray(images[order]), labels[order]


@cache
def emnist_class(settings, split, character):
    """The images (n, 28, 28) of a character, and their stroke width, height and slant (n, 3)."""
    images, labels = emnist(settings, split)
    images = images[labels == character]
    ink = (images > 100).astype(np.float32)  # (n, 28, 28)
    area = ink.sum((1, 2)).clip(1)  # (n,)
    edges = [np.abs(np.diff(ink, axis=axis)).sum((1, 2)) for axis in (1, 2)]  # two of (n,)
    rows, columns = np.mgrid[:28, :28].astype(np.float32)
    y, x = ((ink * place).sum((1, 2)) / area for place in (rows, columns))  # the centre, both (n,)
    dy, dx = rows - y[:, None, None], columns - x[:, None, None]  # both (n, 28, 28)
    slant = -(ink * dx * dy).sum((1, 2)) / (ink * dy * dy).sum((1, 2)).clip(1)
    slant -= np.median(slant) if len(slant) else 0  # an L leans to nobody's side
    stroke = 2.5 * area / sum(edges).clip(1)  # area over half of the perimeter, nearly
    return images, np.stack([stroke, ink.max(2).sum(1), slant], 1)  # (n, 3)


def guesswork(label, alone):
    """Whether nobody could read a label by hand: O is 0 where no word says otherwise."""
    return alone and bool(set(label) & set("IlOo"))


def pick_hand(kind, label, alone, names, split, settings):
    """A Hand, or None for a label that nobody could read."""
    if guesswork(label, alone):
        return None
    looseness, spacing = uniform(0.02, 0.1), uniform(-0.1, 0.3)
    return Hand(
        size_of_line(20, 34), uniform(0.08, 0.16), gauss(0, 0.2), looseness, spacing, settings
    )


def pick_writer(kind, label, alone, names, split, settings):
    """A Hand of somebody who has written all letters and digits of a label, or None."""
    if guesswork(label, alone):
        return None
    needed, some = set(label) & set(ALPHANUMERIC), random.choices(people(split).writers, k=40)
    able = [writer for writer in some if needed <= writer.keys()]
    if not able:
        return None
    hand = as_written(able[0], split, settings)
    # Size alone tells a lone c from C.
    return hand._replace(looseness=min(hand.looseness, 0.06)) if alone else hand


def pick_text_writer(kind, label, alone, names, split, settings):
    """A Hand that has written a label as a whole."""
    return as_written(people(split).texts, split, settings)


def as_written(writer, split, settings):
    """A Hand that writes with these samples, a pen of any width; training rows lean and hurry."""
    wide, slant, haste = 1, 0, 0
    if split == "train":
        wide, slant, haste = 2 ** uniform(-0.5, 0.4), gauss(0, 0.15), choice([0, uniform(0, 0.08)])
    looseness = uniform(*choice([(0, 0.06), (0, 0.15)]))
    spacing = uniform(*choice([(-0.08, 0.1), (0, 0.35), (0.1, 0.6)]))
    stroke = choice([uniform(0.04, 0.07), uniform(0.05, 0.11)])
    shape = settings, writer, wide, chance(0.4), choice([0, 0, 0, 0, 0.4]), haste
    return Hand(size_of_line(20, 34), stroke, slant, looseness, spacing, *shape)


def in_capitals(expression):
    """An expression as some write it: sin and cos with a capital, x as large as X, but for exp."""
    return re.sub(
        "sin|cos|(?<!e)x", lambda m: m[0].capitalize() if chance(0.15) else m[0], expression
    )


def composed(text, hand, split):
    """Characters of a hand, and signs of anybody, set side by side as it would: ink (H, W)."""
    capital, baseline = hand.capital, 3 * hand.capital
    canvas, x = np.zeros((5 * capital, capital * (3 * len(text) + 6)), np.uint8), 2 * capital
    left_off = None  # where the pen was after the last letter of a joined hand, (x, y)
    for c in text:
        if c == " ":
            x += round(capital * (uniform(0.5, 0.9) + max(0, hand.spacing)))
            left_off = None
            continue
        by_emnist = c in ALPHANUMERIC and not hand.writer
        found = (character if by_emnist else stroked)(c, hand, split)
        if found is None:
            return None
        glyph, below, ends = found
        y = baseline + below - len(glyph)
        part = canvas[y : y + len(glyph), x : x + glyph.shape[1]]
        np.maximum(part, glyph, out=part)
        if left_off is not None and c in LOWER:
            join(canvas, left_off, ends[0] + (x, y), hand)
        left_off = ends[1] + (x, y) if hand.joined and c in UPPER + LOWER else None
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


def character(c, hand, split):
    """The EMNIST image of several that suits a hand best, uint8 (h, w), and its depth in pixels.

    Also None, where stroked() has the ends of the pen's way.
    """
    images, measures = emnist_class(hand.settings, split, c)
    if not len(images):
        return None
    some = random.choices(range(len(images)), k=8)
    stroke, height, slant = measures[some].T  # (8, 3) -> three of (8,)
    part, rise, least, most = PLACES[c]
    size = (least + most) / 2
    unlike = np.abs(np.log(stroke / height * size / hand.stroke)) + 2 * np.abs(slant - hand.slant)
    glyph = images[some[int(unlike.argmin())]]  # (28, 28)
    top, bottom, left, right = ink_box(glyph, 0.25)
    glyph = glyph[top : bottom + 1, left : right + 1]
    scale = hand.capital * size * gauss(1, hand.looseness) / len(glyph)
    width, height = max(1, round(glyph.shape[1] * scale)), max(4, round(len(glyph) * scale))
    depth = hand.capital * (part * size - rise + gauss(0, hand.looseness))
    return cv2.resize(glyph, (width, height), interpolation=cv2.INTER_CUBIC), round(depth), None


def stroked(c, hand, split):
    """A character of the hand's writer, or a sign of anybody: image, depth and ends, see traced."""
    samples = own = (hand.writer or {}).get(c)
    if not own:
        able = [writer for writer in random.choices(people(split).writers, k=200) if c in writer]
        if not able:
            return None
        samples = able[0][c]
    strokes = written_otherwise(c, strokes_of(choice(samples)), hand)
    width, height = np.ptp(np.concatenate(strokes), axis=0)
    part, rise, least, most = PLACES[c]
    rise = max(rise, hand.point) if c == "." else rise
    size = max(1, height if c in ALPHANUMERIC else max(width, height))
    # What is somebody else's has no size in this hand; detexify's signs all have one.
    tall = min(max(size / 128, least), most) if own else uniform(least, most)
    scale = hand.capital * tall * gauss(1, hand.looseness) / size
    depth = part * scale * height - hand.capital * (rise + gauss(0, hand.looseness))
    glyph, ends = traced(strokes, scale, hand)
    return glyph, round(depth + hand.stroke * hand.capital / 2), ends


def written_otherwise(c, strokes, hand):
    """Strokes of a character or, of some, those of another way to write it that UNIPEN lacks."""
    if c in "≤≥" and len(strokes) > 1 and chance(0.4):  # its bar slants as its lower arm does
        *arms, (x, y) = (*strokes[:-1], strokes[-1].T)
        slope = np.float32(uniform(0.2, 0.5) * (1 if c == "≤" else -1))
        return [*arms, np.stack([x, y + slope * (x - x.mean())], 1)]
    if c == "x" and hand.joined and "c" in hand.writer:  # two curves back to back
        left, right = (np.concatenate(strokes_of(choice(hand.writer["c"]))) for _ in range(2))
        left = left * np.float32([-1, 1]) * (np.ptp(right[:, 1]) / max(1, np.ptp(left[:, 1])))
        place = right[:, 0].min() - left[:, 0].max(), right[:, 1].min() - left[:, 1].min()
        return [left + np.float32(place), right]
    return strokes


def traced(strokes, scale, hand):
    """Strokes as a round pen draws them, uint8 (h, w), tight around the ink, and its ends, (2, 2).

    It leaves off where the stroke of most points ends: dots and bars wait until a word is done.
    """
    width = max(2, round(2 * hand.stroke * hand.capital))  # twice as large first, to be smooth
    # Not as a product of matrices, whose last bit is another on another processor
    lines = [np.stack([hand.wide * x - hand.slant * y, y], 1) for x, y in (s.T for s in strokes)]
    lines = [line * np.float32(2 * scale) for line in lines]  # (points, 2) each
    if hand.haste:
        lines = [hurried(line, 2 * hand.haste * hand.capital) for line in lines]
    every = np.concatenate(lines)
    low, size = every.min(0), np.ceil(np.ptp(every, 0) / 2).astype(int) * 2 + 2 * (width // 2 + 1)
    glyph = np.zeros(size[::-1], np.uint8)
    for line in lines:  # in sixteenths of a pixel; a dot is a line to itself
        path = np.round(16 * (np.concatenate([line, line[-1:]]) - low + width // 2 + 1))
        cv2.polylines(glyph, [path.astype(np.int32)], False, 255, width, cv2.LINE_AA, shift=4)
    ends = np.stack([lines[0][0], max(lines, key=len)[-1]])  # (2, 2)
    glyph = cv2.resize(glyph, (size // 2).tolist(), interpolation=cv2.INTER_AREA)
    return glyph, (ends - low + width // 2 + 1) / 2


def hurried(line, reach):
    """The way of a pen (points, 2), its corners and loops rounded off over a reach in pixels."""
    steps = np.hypot(*np.diff(line, axis=0).T)  # (points - 1,)
    along = np.append(0, steps.cumsum())
    reach = min(reach, along[-1] / 12)  # a sign stays a sign
    if reach < 0.5:
        return line
    even = np.linspace(0, along[-1], int(along[-1]) + 2)
    x, y = (np.interp(even, along, places) for places in line.T)
    return cv2.GaussianBlur(np.float32([x, y]), (0, 0), reach, sigmaY=1e-3).T  # (more points, 2)


def retraced(text, hand, split):
    """A word or text as somebody has written it: ink (H, W)."""
    strokes = strokes_of(choice(hand.writer[text]))
    glyph, _ = traced(strokes, 1.3 * hand.capital / 128, hand)
    return np.pad(glyph, hand.capital // 4).astype(np.float32) / 255


# --------------------------------------------------------------------------------------------------
# Styles: how a line looks in the real world. It is bent, cut out, or set in cells; then a chain of
# effects is done to its ink, float32 (H, W), most lengths in parts of its height; then come tones.


def bent(ink, warp):
    """A line (H, W) turned a little, now and then in waves, some with hard edges.

    warp: as if by another hand.
    """
    angle = uniform(-1, 1) * choice([0, 0, 1, 2, 3])  # degrees
    rise = np.tan(np.radians(angle)) * ink.shape[1]
    tall, room, more = len(ink), round(abs(rise) / 2) + 1, warp * len(ink) // 8  # to move into
    ink = np.pad(ink, ((room + more, room + more), (4, 4)))
    h, w = ink.shape
    y, x = np.mgrid[:h, :w].astype(np.float32)  # (H, W) each
    if warp:  # other proportions, other curves: fifty fonts would be learned by heart
        reach, patches = uniform(0, 0.14) * tall, uniform(1.5, 3)
        y = uneven(h, 5)[:, None] + reach * (clouds((h, w), patches) - 0.5)
        x = uneven(w, max(2, round(2 * w / tall)))[None] + reach * (clouds((h, w), patches) - 0.5)
    waves = 0.05 * tall * chance(0.08) * np.sin(np.arange(w) * uniform(3, 18) / tall)
    y = y + waves + rise * (np.arange(w) / w - 0.5)
    ink = cv2.remap(ink, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)
    # Some edges as hard as in black and white, around a tone so low that thin strokes stay
    pivot = 0.3 * ink.max()
    ink = ((ink - pivot) * choice([1, 1, 2, 4]) + pivot).clip(0, 1)
    top, bottom, _, _ = ink_box(ink)
    return ink[min(top, more) : max(bottom + 1, h - more)]  # no smaller than if it were not warped


def uneven(length, pieces):
    """Places from 0 to length - 1, (length,), closer together in some of so many pieces."""
    steps = np.append(0, np.exp(noise(pieces, 0.25)).cumsum())
    places = np.interp(np.linspace(0, pieces, length), np.arange(pieces + 1), steps)
    return places * ((length - 1) / steps[-1])


def cut_out(ink, keep_height):
    """A line (H, W) with its paper cut at random, 2 pixels or more from the ink; some stretched."""
    (h, w), box = ink.shape, ink_box(ink)
    rooms = box[0], h - 1 - box[1], box[2], w - 1 - box[3]
    top, bottom, left, right = (randint(0, max(0, room - 2)) for room in rooms)
    if keep_height:  # where size and place of characters tell c from C, a comma from a quote
        top = bottom = 0
    ink = ink[top : h - bottom, left : w - right]
    if chance(0.3):  # condensed and extended
        ink = stretched(ink, -0.6, 0.4)
    return ink


def stretched(ink, least=-0.2, most=0.6):
    """Condensed or extended, in octaves."""
    width = max(4, round(ink.shape[1] * 2 ** uniform(least, most)))
    return cv2.resize(ink, (width, len(ink)), interpolation=cv2.INTER_AREA)


def in_cells(glyphs):
    """Glyphs (h, w) in fields of one width: ink (H, W) and the fields' edges, in pixels."""
    glyphs = [glyph[:, ink_box(glyph)[2] : ink_box(glyph)[3] + 1] for glyph in glyphs]
    height, width = (max(glyph.shape[axis] for glyph in glyphs) for axis in (0, 1))
    pitch = round(max(width * uniform(1.05, 1.4), height * uniform(0.4, 0.9))) + 2
    ink = np.zeros((round(height * uniform(1.05, 1.4)), pitch * len(glyphs) + 1), np.float32)
    y = randint(0, len(ink) - height)
    for i, glyph in enumerate(glyphs):
        x = pitch * i + round((pitch - glyph.shape[1]) * uniform(0.35, 0.65))
        up = max(0, min(len(ink) - len(glyph), y + randint(-height // 20, height // 20)))
        ink[up : up + len(glyph), x : x + glyph.shape[1]] = glyph
    return ink, [pitch * i for i in range(len(glyphs) + 1)]


def chance(share):
    return random.random() < share


def generator():
    """A generator of arrays, seeded by the sample's own chance."""
    return np.random.default_rng(random.getrandbits(63))


def noise(shape, deviation):
    return generator().standard_normal(shape, dtype=np.float32) * np.float32(deviation)


def clouds(shape, patches):
    """From 0 to 1, float32 (H, W), slowly changing: about so many patches over the height."""
    rows = max(2, round(patches) + 1)
    columns = max(2, round(patches * shape[1] / shape[0]) + 1)
    few = generator().random((rows, columns), dtype=np.float32)
    return cv2.resize(few, shape[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1)


def lined(ink, lines, tone=(0.3, 1), widths=(1, 1, 2)):
    """Ink with straight lines from (x, y) to (x, y) of a tone; widths: in pixels, of 50 rows."""
    mask, width = np.zeros(ink.shape, np.uint8), round(choice(widths) * max(1, len(ink) / 50))
    for a, b in lines:
        cv2.line(mask, tuple(map(round, a)), tuple(map(round, b)), 255, width, cv2.LINE_AA)
    return np.maximum(ink, mask.astype(np.float32) * (uniform(*tone) / 255))


def room(ink, least=0.0, most=0.25):
    """More paper on each side."""
    top, right, bottom, left = (round(uniform(least, most) * len(ink)) for _ in range(4))
    return np.pad(ink, ((top, bottom), (left, right)))


def closely(ink, least=-0.04, most=0.15, share=1.0):
    """Cut out near the ink or, on some sides, a little into it."""
    top, bottom, left, right = ink_box(ink, 0.15)
    line = bottom - top
    if line < 0.4 * len(ink) or right - left < line / 3 or not chance(share):  # a comma, a dash
        return ink
    top, left = (max(0, side - round(uniform(least, most) * line)) for side in (top, left))
    bottom, right = (side + 1 + round(uniform(least, most) * line) for side in (bottom, right))
    return ink[top:bottom, left:right]


def clipped(ink, share=0.2):
    """Cut a little into the first and the last letter of a line, and never through a thin one."""
    top, bottom, left, right = ink_box(ink, 0.15)
    line, gaps = bottom - top, np.flatnonzero(ink[:, left : right + 1].max(axis=0) < 0.15)
    if right - left < 2 * line or not len(gaps) or not chance(share):
        return ink
    widths = gaps[0], right - left - gaps[-1]  # of what the outer letters show as one
    into = [round(min(uniform(0, 0.15) * line, 0.4 * width + 2)) for width in widths]
    return ink[:, max(0, left - 2 + into[0]) : right + 3 - into[1]]


def rules(ink):
    """Ruled or squared paper."""
    h, w = ink.shape
    pitch, tilt = uniform(0.3, 0.9) * h, uniform(-0.03, 0.03) * h
    lines = [((0, y), (w, y + tilt)) for y in np.arange(uniform(0, pitch), h, pitch)]
    if chance(0.35):
        lines += [((x, 0), (x - tilt, h)) for x in np.arange(uniform(0, pitch), w, pitch)]
    return lined(ink, lines, (0.15, 0.6))


def neighbours(ink, most=0.14, share=0.4, aside=False):
    """The lines above and below come into the image, on paper that is free of our own."""
    if aside:  # or the characters to the left and to the right
        return np.ascontiguousarray(neighbours(ink.T, 0.06 * len(ink) / ink.shape[1], 0.15).T)
    for _ in range(2):  # below, upside down, and then above
        ink = ink[::-1]
        top, bottom, _, _ = ink_box(ink, 0.3)
        if top > 3 and chance(share):
            part = randint(1, min(top - 2, int(most * len(ink)) + 1, bottom + 1 - top))
            other = np.roll(ink[bottom + 1 - part : bottom + 1], randint(0, ink.shape[1]), 1)
            ink = np.concatenate([np.maximum(ink[:part], other), ink[part:]])
    return ink


def form_lines(ink, share=1.0, numbers=(1, 1, 2, 3, 4)):
    """Underlined, some dotted, between rules or, with all four lines, in a box."""
    h, w = ink.shape
    top, bottom, _, _ = ink_box(ink, 0.3)
    low, high = bottom + uniform(-0.12, 0.12) * h, top - uniform(0.03, 0.2) * h
    left, right, tilt = (uniform(-0.1, 0.1) * h for _ in range(3))
    lines = [((0, low), (w, low + tilt / 5)), ((0, high), (w, high + tilt / 5))]
    lines += [((left, 0), (left, h)), ((w - 1 - right, 0), (w - 1 - right, h))]
    lines = lined(np.zeros_like(ink), lines[: choice(numbers)], (0.4, 1))
    lines *= (np.arange(w) % 6 < 3) | (not chance(0.1))  # some dotted, to write on
    return np.maximum(ink, lines) if chance(share) else ink


def fields(ink, edges):
    """In the fields of a form, boxes or a comb; edges: where they begin and end, in pixels."""
    h, w = ink.shape
    top, bottom = uniform(0, 0.08) * h, h - 1 - uniform(0, 0.08) * h
    start = choice([top, top, bottom - uniform(0.1, 0.35) * h])
    lines = [((x, start), (x, bottom)) for x in edges]
    lines += [((edges[0], y), (edges[-1], y)) for y in {bottom, top if start == top else bottom}]
    rim = randint(0, 3)  # how the fields are cut out of the form
    return lined(ink, lines)[rim : h - rim, rim : w - rim]


def evenly(ink, edges):
    """At one pitch, as machines set it."""
    return stretched(ink, -1, 0)


def stamped(ink, edges):
    """Struck or stuck on one by one: each turned, moved and inked in its own way."""
    h, w = ink.shape
    page = np.zeros_like(ink)
    for left, right in zip(edges, edges[1:]):
        alone = np.zeros_like(ink)
        alone[:, left:right] = ink[:, left:right]
        turn = cv2.getRotationMatrix2D(((left + right) / 2, h / 2), gauss(0, 8), uniform(0.8, 1))
        turn[:, 2] += uniform(-0.06, 0.06) * h, uniform(-0.08, 0.08) * h
        page = np.maximum(page, cv2.warpAffine(alone, turn, (w, h)) * uniform(0.6, 1))
    return page


def scratches(ink):
    """Scratches and folds from side to side, of ink or of paper, and specks."""
    h, w = ink.shape
    # Only in wide images: in narrow ones a scratch could be taken for a slash.
    number = choice([0, 1, 2, 4]) if w > 1.5 * h else 0
    ends = [((0, uniform(-0.5, 1.5) * h), (w, uniform(-0.5, 1.5) * h)) for _ in range(number)]
    lines = lined(np.zeros_like(ink), ends, (0.2, 0.7), (1, 1, 1, 2))
    specks = generator().random(ink.shape, dtype=np.float32) < choice([0, 0, 0.004, 0.012])
    return ink * (1 - lines) if chance(0.25) else np.maximum(np.maximum(ink, lines), specks)


def bold(ink, size=(0.04, 0.08), share=1.0):
    """By a felt pen or a heavy press, its corners round."""
    d = max(2, round(uniform(*size) * len(ink)))
    ball = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (d, d))
    return cv2.dilate(ink, ball) if chance(share) else ink


def pressed(ink, share=1.0):
    """By pen: pressure that varies along the line; or a head that heats unevenly."""
    if not chance(share):
        return ink
    thin, thick = (change(ink, np.ones((2, 2), np.uint8)) for change in (cv2.erode, cv2.dilate))
    pressure = clouds(ink.shape, 4) * uniform(0.3, 1)
    light, heavy = 0.4 * ink + 0.6 * thin, ink + (pressure - 0.35) * (thick - ink)
    return np.where(pressure < 0.35, light, heavy)


def starved(ink, share=1.0):
    """Level or upright strokes nearly lost in places, as by a worn head or a coarse scan."""
    top, bottom, _, _ = ink_box(ink)
    if bottom - top < 0.4 * len(ink) or not chance(share):  # a dash would be lost as a whole
        return ink
    size = max(2, round(uniform(0.05, 0.12) * len(ink)))
    thin = cv2.erode(ink, np.ones(choice([(size, 1), (1, size)]), np.uint8))
    lost = 3 * clouds(ink.shape, choice([0.5, 1, 2])) - uniform(0.8, 1.8)  # (H, W)
    return ink + np.float32(lost.clip(0, uniform(0.6, 1))) * (thin - ink)


def blur(ink, sigma=(0.4, 0.9), share=1.0):
    return cv2.GaussianBlur(ink, (0, 0), uniform(*sigma)) if chance(share) else ink


def lettered(ink):
    """Shaded, with an outline or a shadow, or in relief; what is below 0 is lighter than paper."""
    wide, move = bold(ink, (0.04, 0.09)), max(1, round(uniform(0.03, 0.06) * len(ink)))
    aside = np.roll(wide, [choice([-move, move]), choice([-move, move])], (0, 1))
    looks = [ink] * 4 + [np.maximum(wide - ink, uniform(-0.3, 0.2) * ink)]
    looks += [np.maximum(ink, uniform(0.2, 0.6) * aside), ink - 0.35 * (aside - ink).clip(0)]
    looks += [uniform(0.4, 0.8) * ink + 0.5 * (ink - np.roll(ink, (2, 2), (0, 1)))]
    return choice(looks) * (1 - choice([0, 0, 0.2, 0.4]) * clouds(ink.shape, 1))


def curved(ink, bend=2.0):
    """On an arc of up to so many radians, no taller than it can be read; up or down, and tilted."""
    (h, w), up = ink.shape, choice([1, -1])
    lean = min(max(np.radians(gauss(0, 6 * bend)), -2 * h / w), 2 * h / w)
    bend = bend * uniform(0.2, 1)
    bend = min(bend, 0.8 * w / h, 4 * h / w) + 0.01
    radius, angles = w / bend, lean + bend * np.linspace(-0.5, 0.5, 25)
    rim = -1j * np.outer([radius - h / 2, radius + h / 2], np.exp(1j * angles))
    x, y = (np.arange(part.min(), part.max()) for part in (rim.real, rim.imag))
    place = 1j * x - y[:, None]  # of each pixel (H, W), from the centre of the arc
    along, out = (np.angle(place) - lean) * radius + w / 2, radius + h / 2 - np.abs(place)
    return cv2.remap(ink[::up, ::up], *np.float32([along, out]), cv2.INTER_LINEAR)[::up, ::up]


def busy(ink):
    """On a picture: stains, and edges of other things."""
    ground = clouds(ink.shape, uniform(0.7, 4))
    ground = blur(np.float32(ground > uniform(0.5, 0.9))) if chance(0.4) else ground
    return ink + (1 - np.abs(ink)) * uniform(0, 0.25) * ground


def snapped(ink):
    """Seen at an angle by a camera that is out of focus or shaken."""
    h, w = ink.shape
    corners = np.float32([(0, 0), (w, 0), (w, h), (0, h)])
    moved = corners + (generator().random((4, 2), dtype=np.float32) - 0.5) * 0.14 * h
    ink = cv2.warpPerspective(ink, cv2.getPerspectiveTransform(corners, moved), (w, h))
    if chance(0.5):
        return blur(ink, (0.4, h / 30))
    length = randint(2, max(2, h // 14))
    line = np.zeros((2 * length + 1,) * 2, np.float32)
    line[length, length - length // 2 : length + length // 2 + 1] = 1
    turn = cv2.getRotationMatrix2D((length, length), uniform(0, 180), 1)
    kernel = cv2.warpAffine(line, turn, line.shape)
    return cv2.filter2D(ink, -1, kernel / kernel.sum())


def faded(ink, patches=4, least=0.5, grain=0.0, dead=0.0):
    """Unevenly inked; grain: only where the paper takes it; dead: share of rows left out."""
    faintest = uniform(least, 1)
    ink = ink * (faintest + (1 - faintest) * clouds(ink.shape, patches))
    ink = ink * (1 - uniform(0.4, 1) * grain * generator().random(ink.shape, dtype=np.float32))
    rows = np.where(generator().random((len(ink), 1)) < uniform(0, dead), uniform(0.2, 0.8), 1)
    columns = np.where(generator().random((1, ink.shape[1])) < 0.15 * dead, 0.3, 1)
    return (ink * rows * columns).astype(np.float32)


def coarse(ink, rows=(11, 18), ragged=0.0):
    """Scanned in so few rows, a share of the images in black and white, and enlarged again."""
    h, w = ink.shape
    n = randint(*rows)
    small = cv2.resize(ink, (max(4, round(w * n / h)), n), interpolation=cv2.INTER_AREA)
    if chance(ragged):
        small = np.float32(small + noise(small.shape, 0.04) > uniform(0.15, 0.3) * small.max())
    how = choice([cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC])
    return cv2.resize(small, (w, h), interpolation=how).clip(0, 1)


def dots(ink):
    """Of needles or lamps: one dot per cell of a coarse grid."""
    rows, pitch = randint(17, 23), choice([3, 4])
    columns = max(4, round(ink.shape[1] * rows / len(ink)))
    cells = cv2.resize(ink, (columns, rows), interpolation=cv2.INTER_AREA) > 0.33
    place = np.linspace(-1, 1, pitch + 1)[:-1] + 1 / pitch
    dot = (uniform(1.15, 1.6) - np.hypot(*np.meshgrid(place, place))).clip(0, 1)
    return np.kron(cells, dot).astype(np.float32)  # (rows, columns) -> times pitch each


def struck(ink):
    """Letter by letter, as typewriters do: none quite on the line, some faint, some twice."""
    inked = ink.max(0) > 0.2
    letters = np.cumsum(np.diff(inked, prepend=False) & inked) * inked  # whose letter a column is
    page = ink.copy()
    for n in range(1, letters.max() + 1):
        columns, move = letters == n, randint(-1, 1) * max(1, len(ink) // 40)
        page[:, columns] = np.roll(ink[:, columns], move, 0) * uniform(0.55, 1)
    return np.maximum(page, 0.5 * np.roll(page, 1, 1)) if chance(0.2) else page


def tones(ink, dark=(0, 110), light=(190, 255), grain=(0, 3, 6), **rare):
    """Ink (H, W) of a tone on paper of another, with noise, as an image, uint8 (H, W)."""
    # Rare: shade, how unevenly the paper is lit, and in how many patches; waves, as on cheques, and
    # light_on_dark, shares; jpeg, a range of qualities.
    paper = np.float32(randint(*light))
    if "shade" in rare:
        uneven = clouds(ink.shape, uniform(*rare["patches"]))  # (H, W)
        if chance(rare.get("waves", 0)):
            y, x = np.mgrid[: len(ink), : ink.shape[1]].astype(np.float32)
            across = (x * uniform(-1, 1) + y * uniform(-1, 1)) * uniform(8, 25) / len(ink)
            uneven = 0.5 + 0.5 * np.sin(across + 3 * uneven)
        paper = paper * (1 - uniform(0, rare["shade"]) * uneven)
    image = paper * (1 - ink * (1 - randint(*dark) / 255)) + noise(ink.shape, choice(grain))
    image = image.clip(0, 255).round().astype(np.uint8)
    image = 255 - image if chance(rare.get("light_on_dark", 0)) else image
    if "jpeg" in rare:
        quality = [cv2.IMWRITE_JPEG_QUALITY, randint(*rare["jpeg"])]
        image = cv2.imdecode(cv2.imencode(".jpg", image, quality)[1], cv2.IMREAD_GRAYSCALE)
    return image


# weight: how often, against the others of its kind; effects: what is done to the ink, one after the
# other, the first with the fields' edges where there are cells, one character in each; tones: see
# tones(); texts: a mix, else that of the source; fonts: pattern for the names of its font files.
Style = namedtuple("Style", "weight effects tones texts fonts cells", defaults=[{}, "", "", False])
MONO = "mono|coding|cousine|[Ss]pecial|inconsolata|cascadia|code"
NARROW = "[Cc]ondensed|narrow|mono|oswald|teko|league|abel|dosis"
NEEDLES = f"{MONO}|vt323|dot|pixel|press|silk|tiny"
CLEAN, LIGHT = dict(dark=(0, 90), light=(205, 255)), dict(light=(205, 255))
NEEDLE = CLEAN | dict(light_on_dark=0.2, grain=(0, 6, 14))
FAINT = dict(dark=(40, 150), light=(215, 250))
UNEVEN, USED = dict(shade=0.5, patches=(0.3, 1.2)), dict(shade=0.25, patches=(2, 10), waves=0.3)
SNAPSHOT = UNEVEN | dict(dark=(13, 128), light=(140, 250), grain=(2, 5, 9), jpeg=(20, 75))
USED |= dict(dark=(13, 102), light=(160, 250), grain=(2, 5, 10, 18))
PLATE = dict(dark=(0, 130), light=(130, 255), grain=(0, 2, 5), light_on_dark=0.5)
HEATED = [
    partial(starved, share=0.3),
    partial(pressed, share=0.4),
    partial(faded, patches=2, least=0.4, dead=0.15),
    partial(coarse, rows=(15, 24)),
]
WIDENED = partial(stretched, most=1)
WEAVE = partial(faded, patches=14, least=0.2)  # of an inked ribbon
PRESS = partial(bold, size=(0, 0.06), share=0.4)
FRAME = partial(form_lines, share=0.35, numbers=[4])
PAPER = [neighbours, partial(form_lines, share=0.1, numbers=[1, 2])]
PAPER += [partial(coarse, rows=(20, 48), ragged=0.6), partial(blur, share=0.5), closely]
SCANNED = [PRESS, partial(pressed, share=0.3), partial(starved, share=0.2)]
SCANNED += [partial(faded, patches=2, least=0.4)]
SCANNED += [partial(room, most=0.15), *PAPER]
SLIP = dict(dark=(0, 150), light=(195, 255), grain=(0, 2, 6, 14), jpeg=(30, 95))
GROUND = [partial(room, least=0.12), partial(neighbours, aside=True), lettered]
BOARD, CUT = [PRESS, *GROUND], [closely, busy]
SIGN = dict(dark=(0, 120), light=(150, 255), grain=(0, 0, 3), light_on_dark=0.6, jpeg=(25, 90))
ALL_KINDS = {
    "form": Style(2.5, [room, neighbours, form_lines], CLEAN),
    "fields": Style(1.5, [fields, partial(room, most=0.12)], CLEAN, "fields", cells=True),
    "photograph": Style(2.5, [partial(room, least=0.08, most=0.33), snapped], SNAPSHOT),
    "margins": Style(1.5, [partial(room, most=0.5), partial(closely, least=0, share=0.4)]),
    "worn": Style(1.2, [room, scratches], USED),
}
STYLES = {
    PRINTED: {
        "plain": Style(0, [partial(blur, share=0.4)], LIGHT),
        "typewriter": Style(1, [struck, blur, WEAVE], CLEAN, fonts=MONO),
        "dot matrix": Style(1, [WIDENED, dots, faded], NEEDLE, "receipt", NEEDLES),
        "receipt": Style(4, [*HEATED, closely, clipped], SLIP, "receipt", NARROW),
        "scanned": Style(4, [stretched, *SCANNED, clipped], SLIP, "receipt"),
        "one pitch": Style(1, [evenly, *SCANNED], SLIP, "receipt", MONO, cells=True),
        "label": Style(2, [PRESS, room, FRAME], PLATE, "label"),
        "sign": Style(
            3, [stretched, *BOARD, snapped, partial(curved, bend=0.1), *CUT], SIGN, "sign"
        ),
        "curved": Style(2, [*BOARD, partial(blur, share=0.5), curved, *CUT], SIGN, "sign"),
        "spaced": Style(1, [evenly, *GROUND, *CUT], SIGN, "sign", cells=True),
        "screen": Style(2, [stretched, PRESS, partial(coarse, rows=(14, 24)), *CUT], SIGN, "sign"),
        "low resolution": Style(2, [coarse], dict(jpeg=(30, 95))),
        "stamped": Style(1, [stamped, partial(blur, share=0.3)], {}, "stamp", cells=True),
    }
    | ALL_KINDS,
    HANDWRITTEN: {
        "plain": Style(0, [partial(blur, share=0.3)]),
        "pen": Style(3, [pressed], LIGHT),
        "pencil": Style(2, [partial(faded, grain=0.7)], FAINT),
        "marker": Style(1.5, [bold, blur, faded]),
        "ruled": Style(3, [room, rules], LIGHT),
        "copied": Style(3, [PRESS, *PAPER], CLEAN),
    }
    | ALL_KINDS,
}
STYLES[EMNIST] = STYLES[STROKES] = STYLES[HANDWRITTEN]


def pick_style(row, styled):
    """The name of a style for a Source, and the Style: plain for all but a share of the images."""
    styles = {n: style for n, style in STYLES[row.kind].items() if row.cell_pen or not style.cells}
    weights = [style.weight for style in styles.values()]
    name = random.choices(list(styles), weights)[0] if chance(styled) else "plain"
    return name, styles[name]


def cuts_closely(style):
    """Whether what a style leaves does not show how large a character is in its line."""
    return closely in [getattr(effect, "func", effect) for effect in style.effects]


def finish(ink, edges, style):
    """Ink (H, W) and the edges of its fields, if any, in a style: an image, uint8 (H, W)."""
    first, *rest = style.effects
    ink = first(ink, edges) if style.cells else first(ink)
    for effect in rest:
        ink = effect(ink)
    return tones(ink, **style.tones)


# --------------------------------------------------------------------------------------------------
# Samples

# kind: of what it is drawn with, and so of its styles; pick: a font or a hand for a label; pen: for
# lines; texts: a mix; cell_pen: for characters in fields, if any. No pen: EMNIST as it is.
Source = namedtuple("Source", "kind pick pen texts cell_pen", defaults=[None])
SOURCES = {
    "trdg_custom": Source(PRINTED, pick_font, trdg, "printed", typed),
    "synthetic_math": Source(PRINTED, pick_font, typed, "math"),
    "emnist_images": Source(EMNIST, None, None, ""),
    "emnist_words": Source(EMNIST, pick_hand, composed, "emnist", composed),
    "emnist_math": Source(EMNIST, pick_hand, composed, "math"),
    "handwriting": Source(HANDWRITTEN, pick_font, typed, "by hand", typed),
    "unipen_words": Source(STROKES, pick_text_writer, retraced, "written"),
    "unipen_text": Source(STROKES, pick_writer, composed, "by hand", composed),
    "unipen_math": Source(STROKES, pick_writer, composed, "math"),
}


def sample(source, index, settings):
    """Image, uint8 (H, W), label, split and style of a sample: a pure function of its arguments."""
    # All chance is Python's own, since TRDG draws from it; seeded by a string on every platform.
    random.seed(f"{settings.seed} {source} {index}")
    row, split = SOURCES[source], split_of(index)
    if row.pen is None:
        images, labels = emnist(settings, split)
        place = index if split == "train" else index // CYCLE  # none twice
        return 255 - images[place], str(labels[place]), split, "plain"
    for _ in range(TRIES):
        name, style = pick_style(row, settings.styled)
        own = style.texts and row.cell_pen  # expressions stay expressions in every style
        label, alone = pick_text(MIXES[style.texts if own else row.texts], split)
        if not acceptable(label, settings):
            continue
        if alone and len(label) < 3 and cuts_closely(style):
            continue  # where size and place alone tell c from C
        writer = row.pick(row.kind, label, alone, style.fonts, split, settings)  # a font or a hand
        image = writer and draw(label, alone, row, style, writer, split, settings.warped)
        if image is None:
            continue
        # The network must find room for the label, and ink. As an array, since torch's threads hang
        # in a worker that was forked: a wide line stopped a run for good.
        seen = load_image(image).numpy()  # (HEIGHT, W)
        if frames_needed(label) <= num_frames(seen.shape[1]) and int((seen < 128).sum()) >= 3:
            return image, label, split, name
    remedy = f"widen CHARSET and MAX_LENGTH, or set NUM_IMAGES[{source!r}] = 0"
    raise InputError(f"no {source} image in {TRIES} tries, the last label was {label!r}: {remedy}")


def draw(label, alone, row, style, writer, split, share):
    """A label from pen to tones: an image, uint8 (H, W), or None. share: of what is warped."""
    # Only in training rows: the others are to show fonts and characters as they are.
    warp = row.kind != PRINTED and split == "train" and chance(share)
    text = in_capitals(label) if row.texts == "math" and row.pen is composed else label
    pen, texts = (row.cell_pen, text) if style.cells else (row.pen, [text])
    inks = [pen(text, writer, split) for text in texts]  # (h, w) each
    if any(ink is None for ink in inks):
        return None
    inks = [bent(ink, warp) for ink in inks]
    if style.cells:
        return finish(*in_cells(inks), style)
    keep_height = alone or len(label) < 3 or chance(0.5)
    return finish(cut_out(inks[0], keep_height), None, style)


# --------------------------------------------------------------------------------------------------
# Drawing, a chunk at a time. It is done when its csv, written last, is there with the present mark.

# A task for a worker: so many samples of a source from index start on, their mark, and their csv
Chunk = namedtuple("Chunk", "source start number mark settings csv")


def mark(source, settings):
    """Changes with all that shapes the images of a source, but not with comments and numbers."""
    row = SOURCES[source]
    if row.kind == PRINTED:
        settings = settings._replace(warped=0)
    parts = [settings._replace(fonts_dir="", datasets_dir=""), version("pillow"), version("trdg")]
    parts += [cv2.__version__, np.__version__, syntax(__file__), syntax(crnn.__file__)]
    parts += [zlib.crc32(path.read_bytes()) for path in (HANDS, FREQUENT)]
    for font in find_fonts(settings)[0]:
        if font.kind == row.kind:
            parts += [os.path.basename(font.path), font.held_out, os.path.basename(font.lender)]
            parts += [zlib.crc32(Path(font.path).read_bytes())]
    if row.kind == EMNIST:
        splits = [emnist(settings, s) for s in ("train", "val", "test")]
        parts += [zlib.crc32(array.tobytes()) for arrays in splits for array in arrays]
    return f"{zlib.crc32(repr(parts).encode()):08x}"


@cache
def syntax(path):
    """The code of a file without its comments and without the constants at its top."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    # Numbers and places change nothing, and what is in the settings counts by its value.
    free = {"NUM_IMAGES", "NUM_WORKERS", "DOWNLOAD_TIMEOUT", *SHAPING.upper().split()}
    names = [getattr(getattr(part, "targets", [None])[0], "id", None) for part in tree.body]
    return [ast.dump(part) for part, name in zip(tree.body, names) if name not in free]


def rows_of(chunk):
    """The rows of a chunk that is done, a DataFrame, or None."""
    with contextlib.suppress(InputError, KeyError):  # not there, or damaged
        rows = read_labels(chunk.csv).head(chunk.number)
        if len(rows) == chunk.number and (rows["mark"] == chunk.mark).all():
            return rows[COLUMNS]
    return None


def draw_chunk(chunk):
    """Draw a chunk's images and, when all are there, write its csv. Runs in the workers."""
    cv2.setNumThreads(1)  # there is a worker to a processor already
    chunk.csv.parent.mkdir(parents=True, exist_ok=True)
    chunk.csv.unlink(missing_ok=True)  # its labels belong to the former images
    rows, names = [], ["image_path", "mark", "source", "label", "split", "style"]
    for index in range(chunk.start, chunk.start + chunk.number):
        image, *facts = sample(chunk.source, index, chunk.settings)
        path = chunk.csv.with_name(f"{index:05}.png")
        Image.fromarray(image).save(path, compress_level=1)
        rows.append((f"{chunk.source}/{path.name}", chunk.mark, chunk.source, *facts))
    write_labels(pd.DataFrame(rows, columns=names), chunk.csv)
    return chunk.number


def write_labels(rows, csv_path):
    """Write a DataFrame so that read_labels finds the same strings again; whole or not at all."""
    with whole_file(csv_path) as temporary:
        rows.to_csv(temporary, index=False, quoting=csv.QUOTE_ALL, lineterminator="\n")


def draw_all(counts, settings):
    """Draw what is missing, every process its share. Returns all chunks, and how many images."""
    chunks = []
    for source, count in counts.items():
        present = mark(source, settings)
        for start in range(0, count, CHUNK):
            csv_path = Path(settings.datasets_dir) / source / f"{start:05}.csv"
            number = min(CHUNK, count - start)
            chunks.append(Chunk(source, start, number, present, settings, csv_path))
    missing = [chunk for chunk in chunks if rows_of(chunk) is None]
    crnn.wait_for_all()  # all have looked before anyone draws
    if missing:  # the labels of the former images
        (Path(settings.datasets_dir) / "data.csv").unlink(missing_ok=True)
    mine, workers = missing[rank() :: crnn.world_size()], crnn.workers_per_process(NUM_WORKERS)
    look = dict(total=sum(chunk.number for chunk in mine), unit="img", disable=rank() > 0 or None)
    cv2.setNumThreads(1)  # before the fork: a worker would wait for ever for threads left behind
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="drawing", **look))  # None: no bar in a log file
        each = map
        if workers > 1 and len(mine) > 1:
            each = stack.enter_context(ProcessPoolExecutor(workers)).map
        for number in each(draw_chunk, mine):
            bar.update(number)
    crnn.wait_for_all()  # all have drawn
    return chunks, sum(chunk.number for chunk in missing)


# --------------------------------------------------------------------------------------------------
# What can be drawn, and what is written


@cache
def emnist_is_there(settings):
    """Whether the EMNIST files are there, if need be after a download by the first process."""
    from torchvision import datasets

    folder, former = f"{settings.datasets_dir}/emnist", socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torchvision's download has none of its own
    try:
        for train in (True, False):
            datasets.EMNIST(folder, split="byclass", train=train, download=rank() == 0)
        return True
    except (OSError, RuntimeError, ValueError, EOFError, AssertionError) as error:
        files = "emnist-byclass-{train,test}-{images-idx3,labels-idx1}-ubyte"
        print(f"EMNIST is missing ({error}): to draw with its handwritten characters, unpack")
        print(f"{files} of {datasets.EMNIST.url} (560 MB) into {folder}/EMNIST/raw/")
        return False
    finally:
        socket.setdefaulttimeout(former)


def find_sources(settings):
    """How many images of each source there will be, with the fonts and EMNIST that are there."""
    fonts, notes = find_fonts(settings)
    print(*notes, sep="\n", end="\n" * bool(notes))
    there = {font.kind for font in fonts if font.held_out}
    for kind in sorted(there):
        families = {font.family for font in fonts if font.held_out and font.kind == kind}
        print(f"{kind} only in val and test: {', '.join(sorted(families))}")
    counts = {source: number for source, number in NUM_IMAGES.items() if number}
    by_emnist = any(SOURCES[source].kind == EMNIST for source in counts)
    if rank() == 0:
        by_emnist = by_emnist and emnist_is_there(settings)
    crnn.wait_for_all()  # for the download
    there |= {STROKES, EMNIST} if by_emnist and emnist_is_there(settings) else {STROKES}
    for source in [source for source in counts if SOURCES[source].kind not in there]:
        kind = SOURCES[source].kind
        needs = kind if kind == EMNIST else f"two families of {kind} in FONTS_DIR"
        print(f"{source} is left out: it needs {needs}")
        del counts[source]
    if "emnist_images" in counts:  # no character twice
        have = {split: len(emnist(settings, split)[1]) for split in ("train", "val", "test")}
        most = min(have["train"], CYCLE * have["val"], CYCLE * have["test"])
        counts["emnist_images"] = min(counts["emnist_images"], most)
    return counts


def custom_rows(datasets):
    """The rows of datasets/custom/labels.csv, where there is one, in the form of data.csv."""
    folder = datasets / "custom"
    if not (folder / "labels.csv").exists():
        if folder.is_dir():
            print(f"{folder.as_posix()} is left out: it has no labels.csv with image_path,label")
        return pd.DataFrame(columns=COLUMNS)
    rows = crnn.add_split(read_labels(folder / "labels.csv"))
    rows["image_path"] = "custom/" + rows.image_path.str.replace("\\", "/")
    return rows.assign(source="custom", style="custom")[COLUMNS]


def draw_preview(rows, datasets):
    """preview.png: of every style of every source, four training and three test images."""
    cells = []
    for (source, style), group in rows.groupby(["source", "style"], sort=False):
        shown = pd.concat([group[group.split == "train"][:4], group[group.split == "test"][:3]])
        cells.append((None, [(source, "black"), (style, "black")]))
        for row in shown.itertuples():
            captions = [(row.label, "#666666"), (row.split, "#aaaaaa")]
            cells.append((datasets / row.image_path, captions))
        cells += [(None, [])] * (7 - len(shown))
    crnn.contact_sheet(datasets / "preview.png", cells, columns=8)


def report(rows):
    """Print how many rows there are, and the characters that the training labels hardly have."""
    print(f"\n{rows.groupby(['source', 'split'], sort=False).size().unstack(fill_value=0)}")
    counts = Counter("".join(rows.label[rows.split == "train"]))
    rare = " ".join(f"{c} {counts[c]}" for c in CHARSET if counts[c] < 50)
    print(f"characters in fewer than 50 places, and so hardly learned: {rare or 'none'}")


def main():
    """Draw every source, then write data.csv and preview.png."""
    started, datasets = time.perf_counter(), Path(DATASETS_DIR)
    crnn.Charset(CHARSET)  # refuses a repeated character
    for path in (HANDS, FREQUENT):
        if not path.exists():
            raise InputError(f"{path} is missing: it is part of the repository, fetch it again")
    kinds = SEED, CHARSET, MAX_LENGTH, STYLED, WARPED, HELD_OUT_FONTS
    settings = Settings(*kinds, FONTS_DIR, DATASETS_DIR)
    crnn.join_processes()
    text_generator()  # fails here, and not in every worker, where trdg is not installed
    counts = find_sources(settings)
    if not counts:
        raise InputError("nothing to draw: set a number in NUM_IMAGES, see also the lines above")
    chunks, new = draw_all(counts, settings)
    crnn.leave_processes()
    if rank() > 0:
        return  # the first process sees to the rest
    rows = pd.concat([*map(rows_of, chunks), custom_rows(datasets)], ignore_index=True)
    draw_preview(rows[rows.source != "custom"], datasets)  # of what is there for sure
    write_labels(rows, datasets / "data.csv")
    report(rows)
    seconds = time.perf_counter() - started
    print(f"\n{len(rows):,} images in {seconds:.0f} s, {new:,} of them new; labels and a preview:")
    print(f"{(datasets / 'data.csv').as_posix()}, {(datasets / 'preview.png').as_posix()}")


if __name__ == "__main__":
    crnn.run(main)
