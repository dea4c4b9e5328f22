"""The drawn data: honest labels, splits, fonts, EMNIST, what is drawn again, bad input."""

import itertools
import os
import random
import re
import shutil
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pandas as pd
import pytest
import torchvision
from conftest import FONT, ROOT, fake_emnist, line_image, write_csv, write_idx
from PIL import Image, ImageDraw

import crnn
import prepare_ocr_dataset
from crnn import InputError, load_image, read_labels

SPLITS = "train", "val", "test"
TYPED = ["trdg_custom", "synthetic_math", "handwriting"]  # the sources that fonts draw
WRITTEN = ["unipen_words", "unipen_text", "unipen_math"]  # those of pen strokes
DRAWN = [*TYPED, "emnist_words", "emnist_math", *WRITTEN]  # all but EMNIST as it is

# Fonts are looked at once for all tests, since it takes two seconds.
prepare_ocr_dataset.survey_font = cache(prepare_ocr_dataset.survey_font)


def strokes_like(text, height):
    """Strokes (points, 2) that fill the letters of a text like a comb."""
    image = np.asarray(line_image(text, size=height * 4 // 3, margin=0)) < 128
    strokes = []
    for y in range(0, len(image), 6):
        ends = np.flatnonzero(np.diff(np.pad(image[y], 1).astype(int)))
        strokes += [np.array([(a, y), (b - 1, y)]) for a, b in ends.reshape(-1, 2)]
    return strokes


def write_unipen(datasets):
    """A compact file of pen strokes, as of 40 writers who wrote all that UNIPEN has."""
    texts = [chr(code) for code in range(33, 127)] + ["hello", "seven years", "Pkg", "no. 7"]
    drawn = [strokes_like(text, 128 if len(text) == 1 else 90) for text in texts]
    inks = [np.concatenate(strokes) for strokes in drawn]
    steps = np.concatenate([np.diff(ink, axis=0, prepend=0) for ink in inks]).astype(np.int16)
    points = np.uint16([len(stroke) for strokes in drawn for stroke in strokes])
    strokes = np.uint16([len(strokes) for strokes in drawn])
    writers = "\n".join(f"abc/{i}" for i in range(40) for _ in texts)
    arrays = dict(steps=np.tile(steps, (40, 1)), points=np.tile(points, 40))
    arrays |= dict(strokes=np.tile(strokes, 40), writers=writers, labels="\n".join(texts * 40))
    (datasets / "unipen").mkdir(parents=True)
    np.savez(datasets / "unipen" / "strokes.npz", **arrays)


@pytest.fixture(scope="session")
def downloads(tmp_path_factory):
    """A folder with made-up EMNIST and UNIPEN, their characters like printed ones."""
    folder = tmp_path_factory.mktemp("downloads")
    fake_emnist(folder)
    write_unipen(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh(prepare, downloads):
    """Made-up downloads in the datasets folder, and nothing that another test has cached."""
    shutil.copytree(downloads, prepare.DATASETS_DIR)
    for name, function in list(vars(prepare.module).items()):
        if hasattr(function, "cache_clear") and name not in ("survey_font", "typeface"):
            function.cache_clear()


@pytest.fixture
def unmarked(prepare):
    """For tests in which no code and no font changes: the mark takes a second."""
    prepare.set(find_mark=lambda: "mark")


def fonts_by_name(prepare):
    return {Path(font.path).name: font for font in prepare.find_fonts()[0]}


def make_line(prepare, label, split="train", alone=False, source="trdg_custom"):
    source = prepare.SOURCES[source]
    return prepare.Line(label, alone, split, source, prepare.STYLES[source.kind]["plain"])


def pick_font(prepare, label, split, **line):
    return prepare.pick_font(make_line(prepare, label, split, **line))


def contents(folder):
    """Every file below a folder but downloads, as bytes."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: text for name, text in names.items() if not re.match("emnist/|unipen/", name)}


def draw_again(prepare, capsys):
    """Run main. Returns how many images were new."""
    capsys.readouterr()
    prepare.main()
    return int(re.search(r"\(([\d,]+) new\)", capsys.readouterr().out)[1])


def data_rows(prepare):
    return read_labels(Path(prepare.DATASETS_DIR) / "data.csv")


def write_emnist(prepare, images, classes):
    write_idx(Path(prepare.DATASETS_DIR) / "emnist" / "EMNIST" / "raw", images, classes)


def boxed(ink, share=0):
    """The part of an array that has ink in it, more than a share of the darkest."""
    inked = ink > share * ink.max()
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def count_pieces(ink):
    return cv2.connectedComponents((ink > 0.1).astype(np.uint8))[0] - 1


# ---- texts


def test_every_kind_of_text_can_be_drawn(prepare):
    random.seed(0)
    kinds = prepare.read_grammar().keys() | prepare.RANDOM.keys()
    assert {kind for mix in prepare.MIXES.values() for kind in mix} <= kinds
    texts = [prepare.expand(kind, "val") for kind in sorted(kinds) for _ in range(100)]
    left = "|".join(name for name in kinds if len(name) > 1)  # {n} is an expression in braces
    assert [text for text in texts if re.search(f"{{({left})}}", text)] == []
    mixes = [prepare.MIXES[name] for name in ("printed", "by hand", "math")]
    texts = [prepare.pick_text(mixes[i % 3], "train")[0] for i in range(20_000)]
    assert set("".join(texts)) >= set(prepare.CHARSET)


def test_the_grammar_of_a_user(prepare, tmp_path):
    """Alternatives two spaces apart, on several lines; digits, gaps and other kinds."""
    path = tmp_path / "texts.txt"
    path.write_text("# ours\nplate  B-{two}\n       {two} C  ·\ntwo   ##\n", encoding="utf-8")
    prepare.set(TEXTS_FILE=path)
    random.seed(0)
    texts = {prepare.expand("plate", "train") for _ in range(200)}
    assert {re.sub(r"\d", "0", text) for text in texts} == {"B-00", "00 C", "·"}
    assert len(texts) > 50
    assert {prepare.pick_text(dict(plate=1), "val")[0] for _ in range(99)} >= {"", " "}
    path.write_text("plate  B-{tow}\n", encoding="utf-8")
    prepare.read_grammar.cache_clear()
    with pytest.raises(InputError, match="plate has {tow}"):
        prepare.main()


def test_words_of_the_test_are_not_trained_on(prepare):
    random.seed(0)
    known = prepare.find_words()
    words = {split: {word.lower() for word in known[split].all} for split in SPLITS}
    held_out = words["val"] | words["test"]
    assert words["train"] & held_out == set()
    assert words["val"] & words["test"] == set()
    assert min(map(len, words.values())) > 10_000
    for split in SPLITS:
        made_up = {prepare.invent(known[split]) for _ in range(100)}
        made_up |= {prepare.invent(known[split], ["ol", "ex"]) for _ in range(100)}
        assert {crnn.split_of(word) for word in [*made_up, *known[split].used]} == {split}
        assert len(made_up) > 150
    kinds = "words made_up doubled name item punctuated due noted said firm".split()
    texts = [prepare.expand(kind, "train") for kind in kinds for _ in range(1500)]
    assert held_out & set(re.findall("[a-z][a-z'-]+[a-z]", " ".join(texts).lower())) == set()


def test_frequent_words_are_drawn_more_often(prepare):
    random.seed(0)
    words = prepare.find_words()["train"]
    drawn = [prepare.pick_word(words) for _ in range(4000)]
    places = {word: place for place, word in enumerate(words.used)}
    common = [places[word] for word in drawn if word in places]
    assert 0.45 < len(common) / len(drawn) < 0.75
    assert np.median(common) < len(places) / 4


def test_a_wider_charset_draws_what_it_holds(prepare, few_fonts):
    """In words, alone and as a currency, in fonts that have them."""
    prepare.set(CHARSET=prepare.CHARSET + "äöüé€")
    assert set("äöüé€") <= fonts_by_name(prepare)["poppins-400.woff2"].characters
    drawn = [prepare.sample(source, i) for source in TYPED for i in range(60)]
    assert set("äöüé") & set("".join(label for _, label, _, _ in drawn))
    texts = [prepare.pick_text(prepare.MIXES["printed"], "train")[0] for _ in range(4000)]
    assert set("äöüé€") <= {text for text in texts if len(text) == 1}
    assert re.search("[a-z]{2}[äöüé][a-z]", " ".join(texts))
    assert re.search("€[0-9]", " ".join(texts))


def test_a_narrow_charset_still_finds_texts(prepare, few_fonts):
    prepare.set(CHARSET=prepare.DIGITS)
    for index in range(20):
        assert set(prepare.sample("trdg_custom", index)[1]) <= set(prepare.DIGITS)


# ---- fonts


def test_a_third_of_the_lines_are_twice_as_large(prepare):
    random.seed(0)
    sizes = [prepare.size_of_line(10, 22) for _ in range(600)]
    assert set(sizes) == {*range(10, 23), *range(20, 45, 2)}
    assert 0.15 < np.mean(np.greater(sizes, 22)) < 0.4


def test_fonts_of_the_test_are_not_trained_in(prepare):
    fonts, notes = prepare.find_fonts()
    assert notes == ()
    sides = {(font.kind, font.family, font.held_out) for font in fonts}
    assert len({side[:2] for side in sides}) == len(sides)  # no family is on both
    for kind, source in ((prepare.PRINTED, "trdg_custom"), (prepare.HANDWRITTEN, "handwriting")):
        assert 0.1 <= np.mean([held_out for k, _, held_out in sides if k == kind]) < 0.2
        for split in SPLITS:
            picked = [pick_font(prepare, "abc", split, source=source) for _ in range(30)]
            assert {font.held_out for font in picked} == {split != "train"}
    for kind in (True, False):  # nothing is trained on that is never tested
        sides = [f.characters for f in fonts if f.kind == prepare.PRINTED and f.held_out == kind]
        assert set().union(*sides) == set(prepare.CHARSET)


def test_families_are_drawn_in_equally_often(prepare):
    files = [("many", f"many{i}") for i in range(18)] + [("one", "one")]
    fonts = [prepare.Font(path, prepare.PRINTED, name, {"a"}, set()) for name, path in files]
    prepare.set(find_fonts=lambda: (fonts, ()))
    random.seed(0)
    picked = [pick_font(prepare, "a", "train").family for _ in range(400)]
    assert 160 < picked.count("one") < 240


def test_look_alikes_stand_alone_only_in_fonts_that_tell_them_apart(prepare):
    by_name = fonts_by_name(prepare)
    assert set("Il") <= by_name["poppins-400.woff2"].doubtful
    assert not set("O0Il1") & by_name["jetbrains-mono-400.woff2"].doubtful  # 0 has a slash
    assert pick_font(prepare, "Il", "test", alone=True)  # and yet there are some to test it in
    for split in ("train", "val"):
        picked = [pick_font(prepare, "AI7", split, alone=True) for _ in range(50)]
        assert [font.path for font in picked if "I" in font.doubtful] == []
    assert any("I" in pick_font(prepare, "India", "train").doubtful for _ in range(50))


def test_fonts_are_only_used_for_what_they_draw(prepare):
    by_name = fonts_by_name(prepare)
    assert by_name["DejaVuSans.ttf"].characters == set(prepare.CHARSET)
    assert not set("√π≤≥≠") & by_name["caveat-400.woff2"].characters  # not in the file
    assert not set("abc") & by_name["rock-salt-400.woff2"].characters  # capitals instead
    assert set("0123456789") <= by_name["dseg7-400.woff2"].characters
    assert not set("ABC") & by_name["dseg7-400.woff2"].characters  # of seven segments
    assert "%" not in by_name["alumni-sans-400.woff2"].characters  # see left_out.csv
    assert [font.kind for font in by_name.values()].count(prepare.HANDWRITTEN) >= 24


def test_every_row_of_left_out_names_a_family_and_a_reason(prepare):
    rows = pd.read_csv(prepare.LEFT_OUT_FILE, dtype=str, keep_default_na=False)
    assert set(rows.family) <= {font.family for font in prepare.find_fonts()[0]}
    assert rows.family.is_unique
    assert rows.why.str.len().min() > 5


def undrawn(prepare, font, characters):
    """The characters that a font, or its lender, draws as nothing or as its box for the unknown."""
    found, borrowed = [], set(font.borrowed)
    for path, some in ((font.path, characters - borrowed), (font.lender, characters & borrowed)):
        if some:
            face = prepare.typeface(path, font.size)
            boxes = {bytes(face.getmask(c)) for c in "\u0378\ue123\U000e0fff"}  # unassigned
            masks = {c: bytes(face.getmask(c)) for c in some - {" "}}
            found += [(path, c) for c, mask in masks.items() if mask in boxes or not any(mask)]
    return found


@pytest.mark.parametrize("size", [20, 44])  # in small sizes thin strokes may be hinted away
def test_every_font_draws_what_it_may_be_asked_for(prepare, size):
    fonts = [font._replace(size=size) for font in fonts_by_name(prepare).values()]
    assert [fault for font in fonts for fault in undrawn(prepare, font, font.characters)] == []


def test_signs_that_a_font_lacks_are_borrowed_and_stand_on_its_line(prepare):
    by_name = fonts_by_name(prepare)
    held_out = {font.path: font.held_out for font in by_name.values()}
    lent = [font for font in by_name.values() if font.lender]
    assert [font.path for font in lent if held_out[font.lender] != font.held_out] == []
    assert by_name["DejaVuSans.ttf"].borrowed == ""
    font = by_name["anton-400.woff2"]._replace(size=40)
    assert set("√≤") <= set(font.borrowed) <= font.characters
    assert "±" not in font.borrowed  # it has its own
    lender = font._replace(path=font.lender, lender="", borrowed="")

    def above(text, font):
        """The first and last row of a text's ink, counted from the baseline up."""
        rows = np.flatnonzero(prepare.typeset(text, font).any(1))
        return (prepare.typeface(font.path, 40).getmetrics()[0] - rows[[0, -1]]).tolist()

    assert above("≤", font) == above("≤", lender)
    sign, mixed = (boxed(prepare.typeset(text, font)) for text in ("≤", "8≤8"))
    assert np.array_equal(sign, boxed(prepare.typeset("≤", lender)))
    eight = boxed(prepare.typeset("8", font))
    assert abs(mixed.sum() - 2 * eight.sum() - sign.sum()) < 0.02 * mixed.sum()  # side by side


@pytest.mark.parametrize("pen", ["typeset", "typeset_by_trdg"])
@pytest.mark.parametrize("name", ["DejaVuSans.ttf", "playfair-display-400i.woff2"])
def test_a_font_draws_its_label_and_no_ink_is_lost(prepare, pen, name):
    """As much ink as Pillow draws: swashes, descenders and all."""
    font = fonts_by_name(prepare)[name]._replace(size=40)
    random.seed(0)
    for text in ("fjord", "Qy", "j", "WAVE", "({[]})", "-", ",", "Hamburg,27"):
        image = Image.new("L", (60 + 40 * len(text), 200))
        face = prepare.typeface(font.path, 40)
        ImageDraw.Draw(image).text((50, 50), text, font=face, fill=255)
        expected = boxed(np.asarray(image, np.float32) / 255)
        inks = [getattr(prepare, pen)(text, font) for _ in range(5)]  # spaced out, or not
        found = [boxed(ink) for ink in inks if ink is not None]
        assert found, text
        for ink in found:
            assert len(ink) == len(expected)
            assert abs(ink.sum() / expected.sum() - 1) < 0.04, text  # letters may overlap


def test_ink_that_reaches_the_edge_of_trdgs_image_is_drawn_again(prepare):
    cut = Image.new("RGBA", (60, 32))
    cut.paste((0, 0, 0, 255), (20, 15, 60, 17))
    prepare.set(text_generator=lambda: Mock(generate=lambda *_, **__: (cut, cut)))
    assert prepare.typeset_by_trdg("-", fonts_by_name(prepare)["DejaVuSans.ttf"]) is None


# ---- hands


def make_hand(prepare, stroke=0.15, **changes):
    return prepare.Hand("train", 32, stroke, 0.0, 0.0, 0.3)._replace(**changes)


def test_what_nobody_could_read_is_not_written_by_hand(prepare):
    """A lone O is 0, a lone l is 1."""
    for label, source in itertools.product(["O7", "lab"], ["emnist_words", "unipen_text"]):
        line = make_line(prepare, label, alone=True, source=source)
        assert line.source.pick(line) is None
        assert line.source.pick(line._replace(alone=False)) is not None


def test_a_hand_writes_the_characters_of_its_label_in_their_order(prepare):
    random.seed(0)
    ink = prepare.compose("A1 fR8", make_hand(prepare))
    ends = np.flatnonzero(np.diff(np.pad(ink.max(0) > 0.1, 1)))
    read = ""
    faces = {c: boxed(np.asarray(line_image(c, 60)) < 128).astype(np.float32) for c in "A1fR8"}
    for start, end in ends.reshape(-1, 2):
        piece = boxed(ink[:, start:end], 0.3)
        alike = {c: cv2.resize(face, piece.shape[::-1]) - piece for c, face in faces.items()}
        read += min(alike, key=lambda c, alike=alike: np.abs(alike[c]).sum())
    assert read == "A1fR8"
    assert np.diff(ends)[1::2].argmax() == 1  # the widest gap is the space


def test_writers_of_the_test_are_not_trained_on(prepare):
    """Nor is anybody's word, since the ink of characters and of texts is shared."""
    names, samples = {split: set() for split in SPLITS}, prepare.load_strokes()
    for split in SPLITS:
        people = prepare.people(split)
        numbers = sum((n for writer in people.writers for n in writer.values()), [])
        names[split] = {samples.writers[n] for n in numbers + sum(people.texts.values(), [])}
        words = {word for label in people.texts for word in re.findall("[A-Za-z]{2,}", label)}
        if split == "train":
            assert {crnn.split_of(word) for word in words} <= {"train"}
    assert min(map(len, names.values())) > 0
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 40


def test_characters_stand_on_their_line(prepare):
    random.seed(0)
    hand, feet, tops = make_hand(prepare, stroke=0.05), {}, {}
    for c in set(prepare.CHARSET) - {" "}:
        drawn = [prepare.write_character(c, hand)[:2] for _ in range(5)]
        assert min(glyph.max() for glyph, _ in drawn) > 100, c
        feet[c] = np.median([depth for _, depth in drawn]) / hand.capital
        tops[c] = np.median([len(glyph) - depth for glyph, depth in drawn]) / hand.capital
    assert max(tops[c] for c in ".,_") < 0.35 < 0.4 < min(tops[c] for c in "-=+aB5'")
    assert max(feet[c] for c in "'\"^*") < -0.3 < min(feet[c] for c in "aB5.,_|")
    assert min(feet[c] for c in "gpqy,|") > 0.04
    assert max(abs(feet[c]) for c in "aceABC123") < 0.12
    assert max(tops[c] for c in "aceno") < 1 < 1.3 < min(tops[c] for c in "B5") + 0.5
    assert prepare.write_character("é", hand) is None
    _, depth, _ = prepare.write_character(".", hand._replace(point=0.4))
    assert depth / hand.capital < -0.3  # as between factors


def test_a_hurried_pen_rounds_corners_off_and_leaves_dots_alone(prepare):
    corner = np.float32([(0, 0), (100, 0), (100, 100)])
    rounded = prepare.hurry(corner, 8.0)
    assert np.abs(rounded[[0, -1]] - corner[[0, -1]]).max() < 8  # it begins and ends there
    assert 2 < np.hypot(*(rounded - corner[1]).T).min() < 8
    dot = np.float32([(5, 5), (6, 5)])
    assert np.array_equal(prepare.hurry(dot, 8.0), dot)


def test_an_expression_written_in_capitals_keeps_its_label(prepare):
    written = {prepare.vary_capitals("sin x+cos y=t") for _ in range(300)}
    assert {"Sin x+cos y=t", "sin X+cos y=t", "sin x+Cos y=t"} <= written
    assert {text.lower() for text in written} == {"sin x+cos y=t"}
    assert {prepare.vary_capitals("exp(y)") for _ in range(300)} == {"exp(y)"}


def test_letters_of_a_joined_hand_hang_together(prepare):
    random.seed(0)
    pieces = {True: 0, False: 0}
    for writer, joined in itertools.product(prepare.people("train").writers[:20], pieces):
        hand = make_hand(prepare, stroke=0.06, samples=writer, joined=joined)
        for text in ("num", "n m", "num12"):
            pieces[joined] += count_pieces(prepare.compose(text, hand) > 0.1)
    assert pieces[True] < pieces[False] - 30


def test_a_hand_takes_characters_of_its_own_pen(prepare):
    """Of several characters of EMNIST, the one of its stroke width."""
    rng = np.random.default_rng(0)
    images = np.zeros((80, 28, 28), np.uint8)
    for image in images:
        cv2.line(image, (14, 5), (14, 22), 255, int(rng.integers(2, 9)))
    write_emnist(prepare, images, np.full(80, 1))
    random.seed(0)
    widths = []
    for stroke in (0.1, 0.35):
        glyphs = [prepare.take_from_emnist("1", make_hand(prepare, stroke))[0] for _ in range(30)]
        widths.append(np.mean([glyph.sum() / 255 / len(glyph) for glyph in glyphs]))
    assert widths[1] > 1.5 * widths[0]


# ---- effects and styles


def test_hard_edges_leave_thin_and_faint_strokes(prepare):
    random.seed(0)
    thin = np.zeros((40, 60), np.float32)
    thin[20, 10:50] = 0.4
    hard = [prepare.harden(prepare.tilt(thin)) for _ in range(100)]
    assert min(ink.max(0)[18:50].min() for ink in hard) > 0.1
    assert max(ink.max() for ink in hard) > 0.9


def test_a_worn_head_loses_strokes_of_one_direction_and_no_dash(prepare):
    random.seed(0)
    cross = np.zeros((40, 60), np.float32)
    cross[18:21, 10:50] = cross[2:38, 28:31] = 1
    lost = [(cross - prepare.starved()(cross)).clip(0) for _ in range(50)]
    assert max(part[18:21, 10:25].max() for part in lost) > 0.5
    assert max(part[4:15, 28:31].max() for part in lost) > 0.5
    assert not any(part[19, 15] > 0 and part[8, 29] > 0 for part in lost)  # both at once
    dash = cross * (np.arange(40) > 17)[:, None] * (np.arange(40) < 21)[:, None]
    assert np.array_equal(prepare.starved()(dash), dash)


def test_cells_hold_one_character_each(prepare):
    random.seed(0)
    bar = np.pad(np.ones((20, 6), np.float32), 8)
    for number in (1, 2, 5):
        assert count_pieces(prepare.in_cells([bar] * number, boxes=False)) == number
    assert prepare.in_cells([bar, 0 * bar, bar], boxes=False).shape[1] > 60  # a space has its cell
    boxes = [prepare.in_cells([bar] * 3, boxes=True) for _ in range(20)]
    assert max(np.mean(ink.max(1) > 0.1) for ink in boxes) == 1  # uprights from top to bottom


@pytest.mark.parametrize("text", ["Form 27", "-", ".", "|"])
@pytest.mark.parametrize("kind", ["printed fonts", "handwritten fonts"])
def test_every_style_shows_its_text(prepare, kind, text):
    """A black line on white in each style: with contrast, and with ink that the network sees."""
    ink = 1 - np.asarray(line_image(text, size=30, margin=6), np.float32) / 255
    blank = 0
    for name, style in prepare.STYLES[kind].items():
        for i in range(4):
            random.seed(f"{name} {i}")
            image = prepare.finish(ink, style)
            assert image.dtype == np.uint8
            assert int(image.max()) - int(image.min()) >= 25, (name, i)
            blank += int((load_image(image) < 128).sum()) < 3
    assert blank <= (4 if text == "." else 0)  # a lone full stop may fade: it is drawn again then


def test_training_images_alone_are_warped(prepare):
    """The other splits show fonts and characters as they are, and printed fonts always are."""
    warped = Mock(wraps=prepare.warp)
    prepare.set(WARPED=1.0, warp=warped)
    for source, index in itertools.product(DRAWN, (0, 1, 2)):  # 1 is for validation, 2 for the test
        warped.reset_mock()
        split = prepare.sample(source, index)[2]
        by_hand = source not in ("trdg_custom", "synthetic_math")
        assert bool(warped.call_count) == (by_hand and split == "train")


# ---- images


@pytest.fixture(scope="module")
def reader():
    return crnn.load_checkpoint(ROOT / "ocr_crnn_model" / "pretrained.pth")


@pytest.mark.parametrize("source", ["emnist_images", *DRAWN])
def test_an_image_shows_its_label(prepare, reader, source):
    """The bundled weights read most: a wrong label, a lost or a mirrored character would show."""
    drawn = [prepare.sample(source, index) for index in range(40)]
    readings = crnn.read_images(reader, [load_image(image) for image, *_ in drawn], 20)
    right = [reading.text == label for reading, (_, label, *_) in zip(readings, drawn)]
    assert np.mean(right) >= 0.4


def test_all_sources(prepare, capsys):
    assert draw_again(prepare, capsys) == 24 * 9
    rows, folder = data_rows(prepare), Path(prepare.DATASETS_DIR)
    assert list(rows.columns) == ["image_path", "label", "source", "split", "style"]
    assert set(rows.split) == set(SPLITS)
    assert {"plain", "form", "fields"} < set(rows["style"])
    assert list(rows.image_path) == [f"{s}/{i:05}.png" for s in prepare.SOURCES for i in range(24)]
    for row in rows.itertuples():
        assert prepare.acceptable(row.label)
        image = load_image(folder / row.image_path)
        assert image.min() == 0, f"{row.image_path} is blank"
        assert crnn.fits(row.label, image)
    assert np.asarray(Image.open(folder / "preview.png")).min() == 0


FORK = pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")
OTHERS = [  # how another run draws, and what
    pytest.param({}, ["trdg_custom", "handwriting"], marks=FORK),
    (dict(start_method="spawn"), ["trdg_custom"]),
    (dict(processes=2), ["trdg_custom", "emnist_images", "emnist_words"]),
]


@pytest.fixture
def few_fonts(prepare, tmp_path):
    """A folder of six fonts, for runs in other processes: they survey all that there are."""
    names = "printed/arvo-700 printed/abel-400 printed/poppins-400 handwriting/caveat-400"
    for name in [*names.split(), "handwriting/kalam-400", "handwriting/neucha-400"]:
        target = tmp_path / "fonts" / f"{name}.woff2"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "myFonts" / f"{name}.woff2", target)
    prepare.set(FONTS_DIR=str(tmp_path / "fonts"))


@pytest.mark.parametrize("how, sources", OTHERS)
def test_workers_and_machines_change_nothing(prepare, few_fonts, downloads, how, sources, tmp_path):
    prepare.set(SEED=7, CHUNK=10, NUM_IMAGES=dict.fromkeys(sources, 24))
    prepare.main()
    one = contents(prepare.DATASETS_DIR)
    assert len(one) == len(sources) * (24 + 3) + 2  # images, csvs of chunks, data.csv, preview.png
    shutil.copytree(downloads, tmp_path / "two")
    prepare.set(DATASETS_DIR=str(tmp_path / "two"), NUM_WORKERS=2)
    if how:
        assert prepare.run(tmp_path, **how).count(" new)") == 1  # one of them speaks
    else:
        fork = get_context("fork")
        prepare.set(ProcessPoolExecutor=partial(ProcessPoolExecutor, mp_context=fork))
        prepare.main()
    assert contents(tmp_path / "two") == one


@FORK
def test_a_forked_worker_draws_a_wide_line(prepare):
    """Torch's threads, which wide images wake, would wait for ever in a forked process."""
    wide = np.pad(np.zeros((20, 2600), np.uint8), 10, constant_values=255)
    assert int((load_image(wide) < 128).sum()) > 0  # they are awake here
    prepare.set(draw=lambda *arguments: wide)
    worker = get_context("fork").Process(target=prepare.sample, args=("trdg_custom", 0))
    worker.start()
    worker.join(60)
    worker.terminate()
    assert worker.exitcode == 0


@pytest.mark.parametrize("seed, new", [(0, 24 - 15), (1, 24 - 4)])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(prepare, capsys, seed, new):
    """Also where it was stopped with other constants, which are then changed back."""
    prepare.set(CHUNK=5, NUM_IMAGES=dict(trdg_custom=24))
    prepare.main()
    whole, sample = contents(prepare.DATASETS_DIR), prepare.sample
    if seed == 0:
        shutil.rmtree(Path(prepare.DATASETS_DIR) / "trdg_custom")
    prepare.set(SEED=seed)
    first = [sample("trdg_custom", i) for i in range(18)]
    prepare.set(sample=Mock(side_effect=[*first, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        prepare.main()
    assert "data.csv" not in contents(prepare.DATASETS_DIR)
    prepare.set(SEED=0, sample=sample)
    assert draw_again(prepare, capsys) == new
    assert contents(prepare.DATASETS_DIR) == whole


def test_only_what_changed_is_drawn_again(prepare, few_fonts, capsys):
    steps = [
        (dict(NUM_IMAGES=dict(trdg_custom=20, handwriting=20)), 40),
        (dict(), 0),
        (dict(NUM_IMAGES=dict(trdg_custom=25, handwriting=20)), 5),
        (dict(NUM_IMAGES=dict(trdg_custom=34, handwriting=20)), 14),  # from the chunk not full on
        (dict(STYLED=0), 54),
        (dict(NUM_IMAGES=dict(trdg_custom=12)), 0),
    ]
    prepare.set(CHUNK=10)
    for changes, new in steps:
        prepare.set(**changes)
        assert draw_again(prepare, capsys) == new, changes
    assert list(data_rows(prepare).source) == ["trdg_custom"] * 12  # no others are listed
    assert set(data_rows(prepare)["style"]) == {"plain"}
    (Path(prepare.DATASETS_DIR) / "trdg_custom" / "00000.csv").write_text("image_path,label")
    assert draw_again(prepare, capsys) == 10
    (Path(prepare.FONTS_DIR) / "printed" / "abel-400.woff2").unlink()
    prepare.find_fonts.cache_clear()
    assert draw_again(prepare, capsys) == 12


CHANGES = [(crnn, "if ", "if not ", True), (prepare_ocr_dataset, "if ", "if not ", True)]
CHANGES += [(prepare_ocr_dataset, "  # ", "  # Now ", False)]


@pytest.mark.parametrize("module, old, new, noticed", CHANGES)
def test_the_mark_notices_changed_code(prepare, monkeypatch, tmp_path, module, old, new, noticed):
    before, code = prepare.find_mark(), Path(module.__file__).read_text(encoding="utf-8")
    (tmp_path / "changed.py").write_text(code.replace(old, new), encoding="utf-8")
    assert code.replace(old, new) != code
    monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
    assert (prepare.find_mark() != before) == noticed


def test_images_of_ones_own(prepare, unmarked, capsys):
    """In datasets/custom, and in folders of it that may name their source and split."""
    prepare.set(NUM_IMAGES=dict(trdg_custom=20))
    folder = Path(prepare.DATASETS_DIR) / "custom"
    write_csv(folder / "scans", [f"A-{i}" for i in range(30)])
    labels = [f"scans\\{i}.png,A-{i}" for i in range(30)]
    (folder / "labels.csv").write_text("\n".join(["image_path,label", *labels]))
    write_csv(folder / "meters", ["12", "34"], "labels.csv", source="dials", split="test")
    prepare.main()
    own = data_rows(prepare)[20:]
    paths = [f"custom/scans/{i}.png" for i in range(30)]
    assert list(own.image_path) == [*paths, "custom/meters/0.png", "custom/meters/1.png"]
    assert list(own.label) == [*[f"A-{i}" for i in range(30)], "12", "34"]
    assert list(own.source) == ["custom"] * 30 + ["dials"] * 2
    assert set(own.split[:30]) == set(SPLITS)
    assert list(own.split[30:]) == ["test"] * 2
    (folder / "labels.csv").unlink()
    (folder / "meters" / "labels.csv").unlink()
    prepare.main()
    assert "no labels.csv" in capsys.readouterr().out
    assert set(data_rows(prepare).source) == {"trdg_custom"}


def test_an_own_image_that_is_missing_is_left_to_the_training_to_report(prepare, unmarked):
    prepare.set(NUM_IMAGES=dict(trdg_custom=3))
    path = write_csv(Path(prepare.DATASETS_DIR) / "custom", ["cat"], "labels.csv")
    (path.parent / "0.png").unlink()
    prepare.main()
    assert list(data_rows(prepare).label[3:]) == ["cat"]


def test_emnist_is_upright_and_dark_on_light(prepare):
    """An L, whose transpose is a Γ without its left-right mirror: a long bar down, a short one."""
    letter = np.zeros((28, 28), np.uint8)
    letter[4:24, 8:11] = 255
    letter[21:24, 8:18] = 255
    write_emnist(prepare, np.stack([letter] * 40), np.full(40, 21))
    for index in range(24):
        image, label, *_ = prepare.sample("emnist_images", index)
        assert label == "L"
        assert np.array_equal(image, 255 - letter)


def test_no_character_of_emnist_is_drawn_twice(prepare):
    images = np.random.default_rng(0).integers(0, 256, (124, 28, 28), dtype=np.uint8)
    write_emnist(prepare, images, np.arange(124) % 62)  # in each file
    prepare.set(NUM_IMAGES=dict(emnist_images=10_000))
    count = prepare.count_images()["emnist_images"]
    drawn = [prepare.sample("emnist_images", i) for i in range(count)]
    assert count > 100
    assert len({(image.tobytes(), split == "test") for image, _, split, _ in drawn}) == count


# ---- what is missing or wrong


def test_without_downloads_and_without_network(prepare, unmarked, capsys, monkeypatch):
    """A server that never answers is the worst case: found out in time, and said once."""
    for folder in ("emnist", "unipen"):
        shutil.rmtree(Path(prepare.DATASETS_DIR) / folder)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.EMNIST, "url", url + "gzip.zip")
        prepare.set(DOWNLOAD_TIMEOUT=1, UNIPEN_RECORD=url)
        start = time.monotonic()
        prepare.main()
    assert time.monotonic() - start < 30
    output = capsys.readouterr().out
    for name, place in (("EMNIST", "emnist/EMNIST/raw/"), ("UNIPEN", "unipen/")):
        assert output.count(f"could not get {name}") == 1
        assert f"{prepare.DATASETS_DIR}/{place}" in output
    assert set(data_rows(prepare).source) == set(TYPED)


COMPLAINTS = [
    (dict(NUM_IMAGES={}), "set a number in NUM_IMAGES"),
    (dict(NUM_IMAGES=dict(unipen=9)), "NUM_IMAGES names unipen: choose from trdg_custom, "),
    (dict(CHARSET="aa"), "more than once"),
    (dict(WORDS_FILE=Path("none.txt")), "none.txt is missing: it is part of the repository"),
    (dict(MAX_LENGTH=0), r"set NUM_IMAGES\['trdg_custom'\] = 0"),
    (dict(DATASETS_DIR=FONT + "/datasets"), "DejaVuSans.ttf/datasets"),  # a file is in the way
]


@pytest.mark.parametrize("changes, complaint", COMPLAINTS)
def test_one_line_says_what_to_do(prepare, unmarked, changes, complaint):
    prepare.set(**dict(NUM_IMAGES=dict(trdg_custom=24), NUM_WORKERS=2, CHUNK=10) | changes)
    with pytest.raises((InputError, OSError), match=complaint) as stop:
        prepare.main()
    assert "\n" not in str(stop.value)


def test_a_broken_font_is_skipped_by_name_and_one_family_is_too_few(prepare, few_fonts, capsys):
    (Path(prepare.FONTS_DIR) / "broken ü.ttf").write_bytes(b"no font")
    for path in sorted(Path(prepare.FONTS_DIR).glob("handwriting/*"))[1:]:
        path.unlink()
    prepare.set(NUM_IMAGES=dict.fromkeys(TYPED, 24))
    prepare.main()
    output = capsys.readouterr().out
    assert "broken ü.ttf is skipped" in output
    assert "handwriting is skipped: it needs two families of handwritten fonts" in output
    assert set(data_rows(prepare).source) == set(TYPED) - {"handwriting"}


def test_a_full_disk_is_an_error_and_leaves_no_labels_of_former_images(prepare, monkeypatch):
    prepare.set(NUM_IMAGES=dict(trdg_custom=24))
    prepare.main()
    prepare.set(SEED=1)
    monkeypatch.setattr(Image.Image, "save", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        prepare.main()
    assert [path for path in contents(prepare.DATASETS_DIR) if path.endswith(".csv")] == []
