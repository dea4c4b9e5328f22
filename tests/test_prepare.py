"""The drawn data: honest labels, splits, fonts, EMNIST, what is drawn again, bad input."""

import itertools
import os
import random
import re
import shutil
import socket
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torchvision
from conftest import FONT, fake_emnist, line_image, write_csv, write_idx
from PIL import Image, ImageDraw

import crnn
import prepare_ocr_dataset
from crnn import InputError, frames_needed, load_image, num_frames, read_labels

SPLITS = "train", "val", "test"
TYPED = ["trdg_custom", "synthetic_math", "handwriting"]  # the sources that fonts draw
WRITTEN = ["unipen_words", "unipen_text", "unipen_math"]  # those of pen strokes
DRAWN = [*TYPED, "emnist_words", "emnist_math", *WRITTEN]  # all but EMNIST as it is
Sample = namedtuple("Sample", "image label split style writer ink")

# Fonts are looked at once for all tests, since it takes two seconds.
prepare_ocr_dataset.survey_font = cache(prepare_ocr_dataset.survey_font)


def settings(prepare):
    """The Settings that main makes of the constants."""
    return prepare.Settings(*(getattr(prepare, name.upper()) for name in prepare.Settings._fields))


def fonts_by_name(prepare):
    return {Path(font.path).name: font for font in prepare.find_fonts(settings(prepare))[0]}


def pick_font(prepare, label, split, alone=False, kind=prepare_ocr_dataset.PRINTED):
    return prepare.pick_font(kind, label, alone, "", split, settings(prepare))


def contents(folder):
    """Every file below a folder but EMNIST's, as bytes."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and "raw" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def draw_again(prepare, capsys):
    """Run main. Returns how many images were new."""
    capsys.readouterr()
    prepare.main()
    return int(re.search(r"(\d+) of them new", capsys.readouterr().out)[1])


def data_rows(prepare):
    return read_labels(Path(prepare.DATASETS_DIR) / "data.csv")


def samples(prepare, source, number):
    """Samples with the font or hand that wrote them, and the ink (H, W) that met their style."""
    draw, finish = Mock(wraps=prepare.draw), Mock(wraps=prepare.finish)
    prepare.set(draw=draw, finish=finish)
    for index in range(number):
        drawn = prepare.sample(source, index, settings(prepare))
        assert draw.call_args.args[0] == drawn[1]  # what is drawn is the label
        yield Sample(*drawn, writer=draw.call_args.args[4], ink=finish.call_args.args[0])


def write_emnist(prepare, images, classes):
    write_idx(Path(prepare.DATASETS_DIR) / "emnist" / "EMNIST" / "raw", images, classes)


def without_chance(prepare):
    """Of every choice the first, of every range the least."""
    prepare.set(choice=lambda options: options[0], chance=lambda share: share > 0.5)
    prepare.set(uniform=lambda low, high: low, gauss=lambda mean, deviation: mean)


def boxed(ink, share=0):
    """The part of an array that has ink in it, more than a share of the darkest."""
    inked = ink > share * ink.max()
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def by_pillow(text, font):
    """The ink of a text as Pillow draws it: uint8 (h, w), without margins."""
    image = Image.new("L", (60 + 40 * len(text), 200))
    ImageDraw.Draw(image).text((50, 50), text, font=font, fill=255)
    return boxed(np.asarray(image))


def test_a_third_of_the_lines_are_twice_as_large(prepare):
    random.seed(0)
    sizes = [prepare.size_of_line(10, 22) for _ in range(600)]
    assert set(sizes) == {*range(10, 23), *range(20, 45, 2)}
    assert 0.15 < np.mean(np.greater(sizes, 22)) < 0.4


def test_every_kind_of_text_expands(prepare):
    random.seed(0)
    names = {*prepare.GRAMMAR, *prepare.TERMINALS}
    templates = [template for group in prepare.GRAMMAR.values() for template in group]
    assert {name for text in templates for name in re.findall(r"{(\w+)}", text)} <= names
    assert {kind for mix in prepare.MIXES.values() for kind in mix} <= names
    plain = [re.sub(r"{\w+}", "", template) for template in templates]
    assert [text for text in plain if text.count("{") != text.count("}")] == []
    texts = [prepare.expand(name, "val") for name in sorted(names) for _ in range(200)]
    left = "|".join(name for name in names if len(name) > 1)  # {n} is an expression in braces
    assert [text for text in texts if re.search(f"{{({left})}}", text)] == []
    mixes = [prepare.MIXES[name] for name in ("printed", "by hand", "math")]
    texts = [prepare.pick_text(mixes[i % 3], "train")[0] for i in range(20_000)]
    assert set("".join(texts)) == set(prepare.CHARSET)
    assert len(prepare.CHARSET) == 103


def test_words_of_the_test_are_not_trained_on(prepare):
    random.seed(0)
    known = prepare.find_words()
    words = {split: {word.lower() for word in known[split].all} for split in SPLITS}
    held_out = words["val"] | words["test"]
    assert words["train"] & held_out == set()
    assert words["val"] & words["test"] == set()
    assert min(map(len, words.values())) > 10_000
    for split in SPLITS:
        made_up = {prepare.invented(known[split].all) for _ in range(100)}
        made_up |= {prepare.invented(known[split].all, prepare.ENDINGS.split()) for _ in range(100)}
        assert {prepare.word_split(word) for word in [*made_up, *known[split].used]} == {split}
        assert len(made_up) > 190
    kinds = "words made_up doubled name item punctuated written due noted said firm".split()
    texts = [prepare.expand(kind, "train") for kind in kinds for _ in range(1500)]
    assert held_out & set(re.findall("[a-z][a-z'-]+[a-z]", " ".join(texts).lower())) == set()


def test_fonts_of_the_test_are_not_trained_in(prepare):
    fonts, notes = prepare.find_fonts(settings(prepare))
    assert notes == ()
    sides = {(font.kind, font.family, font.held_out) for font in fonts}
    assert len({side[:2] for side in sides}) == len(sides)  # no family is on both
    for kind in (prepare.PRINTED, prepare.HANDWRITTEN):
        assert 0.1 <= np.mean([held_out for k, _, held_out in sides if k == kind]) < 0.2
        for split in SPLITS:
            picked = [pick_font(prepare, "abc", split, kind=kind) for _ in range(30)]
            assert {font.held_out for font in picked} == {split != "train"}
    for split in SPLITS:  # nothing is trained on that is never tested
        assert [c for c in prepare.CHARSET if not pick_font(prepare, c, split)] == []


def test_families_are_drawn_in_equally_often(prepare):
    files = [("many", f"many{i}") for i in range(18)] + [("one", "one")]
    fonts = [prepare.Font(path, prepare.PRINTED, name, {"a"}, set()) for name, path in files]
    prepare.set(find_fonts=lambda settings: (fonts, ()))
    random.seed(0)
    picked = [pick_font(prepare, "a", "train").family for _ in range(400)]
    assert 160 < picked.count("one") < 240


def test_look_alikes_stand_alone_only_in_fonts_that_tell_them_apart(prepare):
    by_name = fonts_by_name(prepare)
    assert set("Il") <= by_name["Lato-Regular.ttf"].doubtful
    assert not set("O0") & by_name["Lato-Regular.ttf"].doubtful
    assert not set("O0Il1") & by_name["jetbrains-mono-400.woff2"].doubtful  # 0 has a slash
    assert pick_font(prepare, "Il", "test", alone=True)  # and yet there are some to test it in
    for split in ("train", "val"):
        picked = [pick_font(prepare, "AI7", split, alone=True) for _ in range(50)]
        assert [font.path for font in picked if "I" in font.doubtful] == []
    assert any("I" in pick_font(prepare, "India", "train").doubtful for _ in range(50))
    for label in ("O7", "lab"):  # by hand, O is 0 and l is 1
        assert prepare.pick_hand("", label, True, "", "train", settings(prepare)) is None


def test_fonts_are_only_used_for_what_they_draw(prepare):
    by_name = fonts_by_name(prepare)
    assert by_name["DejaVuSans.ttf"].characters == set(prepare.CHARSET)
    assert not set("√π≤≥≠") & by_name["caveat-400.woff2"].characters  # not in the file
    assert not set("abc") & by_name["rock-salt-400.woff2"].characters  # capitals instead
    assert not {"BEBAS___.ttf", "Capture_it.ttf", "SEASRN__.ttf"} & set(by_name)  # as well
    assert not set("Il") & by_name["CaviarDreams.ttf"].characters  # one shape for both
    italic = prepare.survey_font(by_name["Lato-Italic.ttf"].path, "", prepare.CHARSET)
    assert "≠" not in italic.characters  # a mere stroke
    assert [font.kind for font in by_name.values()].count(prepare.HANDWRITTEN) >= 24


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


@pytest.mark.parametrize("source", TYPED)
def test_every_character_of_a_label_is_drawn(prepare, source):
    for drawn in samples(prepare, source, 60):
        assert undrawn(prepare, drawn.writer, set(drawn.label)) == []
        assert set(drawn.label) <= drawn.writer.characters
        assert drawn.writer.held_out == (drawn.split != "train")
        assert drawn.ink[:, [0, -1]].max() < 0.5  # swashes reach beyond their advance


def test_signs_that_a_font_lacks_are_borrowed_and_stand_on_its_line(prepare):
    by_name = fonts_by_name(prepare)
    held_out = {font.path: font.held_out for font in by_name.values()}
    lent = [font for font in by_name.values() if font.lender]
    assert [font.path for font in lent if held_out[font.lender] != font.held_out] == []
    assert by_name["DejaVuSans.ttf"].borrowed == ""
    font = by_name["anton-400.woff2"]._replace(size=40)
    assert set("√≤") <= set(font.borrowed) <= font.characters
    assert "±" not in font.borrowed  # it has its own
    plain = font._replace(lender="", borrowed="")
    lender = plain._replace(path=font.lender)
    without_chance(prepare)

    def above(text, font):
        """The first and last row of a text's ink, counted from the baseline up."""
        rows = np.flatnonzero(prepare.typed(text, font, "").any(1))
        return (prepare.typeface(font.path, 40).getmetrics()[0] - rows[[0, -1]]).tolist()

    assert np.array_equal(prepare.typed("8x", font, ""), prepare.typed("8x", plain, ""))
    assert above("≤", font) == above("≤", lender)
    sign, mixed = (boxed(prepare.typed(text, font, "")) for text in ("≤", "8≤8"))
    assert np.array_equal(sign, boxed(prepare.typed("≤", lender, "")))
    eight = boxed(prepare.typed("8", font, ""))
    assert abs(mixed.sum() - 2 * eight.sum() - sign.sum()) < 0.02 * mixed.sum()  # side by side


@pytest.mark.parametrize("pen", ["typed", "trdg"])
@pytest.mark.parametrize("name", ["DejaVuSans.ttf", "playfair-display-400i.woff2"])
def test_a_font_draws_its_label_and_no_ink_is_lost(prepare, pen, name):
    """Without chance to the pixel what Pillow draws: swashes, descenders and all."""
    without_chance(prepare)
    font = fonts_by_name(prepare)[name]._replace(size=40)
    face = prepare.typeface(font.path, 40)
    prepare.set(bent=lambda ink, warp: ink, cut_out=lambda ink, keep_height: ink)
    prepare.set(finish=lambda ink, edges, style: ink)
    row = prepare.SOURCES["trdg_custom"]._replace(pen=getattr(prepare, pen))
    plain = prepare.STYLES[row.kind]["plain"]
    for text in ("fjord", "Qy", "j", "WAVE", "({[]})", "-", ",", "Hamburg,27"):
        ink = prepare.draw(text, False, row, plain, font, "train", 0)
        assert np.array_equal(boxed(ink) * 255, by_pillow(text, face)), text


def test_ink_that_reaches_the_edge_of_trdgs_image_is_drawn_again(prepare):
    cut = Image.new("RGBA", (60, 32))
    cut.paste((0, 0, 0, 255), (20, 15, 60, 17))
    generator = Mock(generate=lambda *_, **__: (cut, cut))
    prepare.set(text_generator=Mock(return_value=generator))
    assert prepare.trdg("-", fonts_by_name(prepare)["DejaVuSans.ttf"], "train") is None


def hand(prepare, stroke=0.15):
    return prepare.Hand(32, stroke, 0.0, 0.0, 0.3, settings(prepare))


def test_a_hand_writes_the_characters_of_its_label_in_their_order(prepare):
    fake_emnist(prepare.DATASETS_DIR)
    random.seed(0)
    ink = prepare.composed("A1 fR8", hand(prepare), "train")
    ends = np.flatnonzero(np.diff(np.pad(ink.max(0) > 0.1, 1)))
    faces, read = {c: by_pillow(c, prepare.typeface(FONT, 60)) / 255 for c in "A1fR8"}, ""
    for start, end in ends.reshape(-1, 2):
        piece = boxed(ink[:, start:end], 0.3)
        alike = {c: cv2.resize(face, piece.shape[::-1]) - piece for c, face in faces.items()}
        read += min(alike, key=lambda c, alike=alike: np.abs(alike[c]).sum())
    assert read == "A1fR8"
    assert np.diff(ends)[1::2].argmax() == 1  # the widest gap is the space
    row, style = prepare.SOURCES["emnist_words"], prepare.STYLES[prepare.EMNIST]["fields"]
    prepare.set(finish=lambda *arguments: arguments)
    ink, edges, _ = prepare.draw("M 1", False, row, style, hand(prepare), "train", 0)
    first, space, last = (ink[:, a:b].sum() for a, b in zip(edges, edges[1:]))
    assert first > 1.5 * last
    assert space == 0


def test_frequent_words_are_drawn_more_often(prepare):
    random.seed(0)
    words = prepare.find_words()["train"]
    drawn = [prepare.some_word(words) for _ in range(4000)]
    places = {word: place for place, word in enumerate(words.used)}
    common = [places[word] for word in drawn if word in places]
    assert 0.45 < len(common) / len(drawn) < 0.75
    assert np.median(common) < len(places) / 4


def test_writers_of_the_test_are_not_trained_on(prepare):
    """Nor is anybody's word, since the ink of characters and of texts is shared."""
    names, samples = {split: set() for split in SPLITS}, prepare.hands()
    for split in SPLITS:
        people = prepare.people(split)
        numbers = sum((n for writer in people.writers for n in writer.values()), [])
        texts = sum(people.texts.values(), [])
        assert min(len(numbers), len(texts)) > 1000
        names[split] = {samples.writers[n] for n in numbers + texts}
        assert {c for writer in people.writers for c in writer} == set(prepare.CHARSET) - {" "}
    assert sum(map(len, names.values())) == len(set().union(*names.values()))
    assert 0.05 < 1 - len(names["train"]) / sum(map(len, names.values())) < 0.15


def test_strokes_stand_on_their_line(prepare):
    random.seed(0)
    without_chance(prepare)
    person, feet, tops = hand(prepare, stroke=0.05), {}, {}
    for c in set(prepare.CHARSET) - {" "}:
        glyph, below, _ = prepare.stroked(c, person, "train")
        assert glyph.max() > 100, c
        feet[c], tops[c] = below / person.capital, (len(glyph) - below) / person.capital
    assert max(tops[c] for c in ".,_") < 0.35 < 0.4 < min(tops[c] for c in "-=+aB5'")
    assert max(feet[c] for c in "'\"^*") < -0.3 < min(feet[c] for c in "aB5.,_|")
    assert min(feet[c] for c in "gpqy,|") > 0.04
    assert max(abs(feet[c]) for c in "aceABC123") < 0.12
    assert max(tops[c] for c in "aceno") < 1 < 1.3 < min(tops[c] for c in "B5") + 0.5
    assert prepare.stroked("é", person, "train") is None
    _, below, _ = prepare.stroked(".", person._replace(point=0.4), "train")
    assert below / person.capital < -0.3  # as between factors


def test_other_ways_to_write_a_character(prepare):
    random.seed(0)
    without_chance(prepare)
    writer = next(w for w in prepare.people("train").writers if {"c", "x"} <= w.keys())
    person = hand(prepare)._replace(writer=writer, joined=True)
    left, right = prepare.written_otherwise("x", [], person)  # back to back, of one height
    assert abs(left[:, 0].max() - right[:, 0].min()) < 1
    assert abs(np.ptp(left[:, 1]) - np.ptp(right[:, 1])) < 1
    prepare.set(chance=lambda share: True)
    bar = np.float32([(0, 9), (10, 9)])
    for c, sign in (("≤", 1), ("≥", -1)):
        arms, slanted = prepare.written_otherwise(c, [bar, bar], person)
        assert (arms == bar).all()
        assert sign * np.diff(slanted[:, 1]) > 1


def test_a_hurried_pen_rounds_corners_off_and_leaves_dots_alone(prepare):
    corner = np.float32([(0, 0), (100, 0), (100, 100)])
    rounded = prepare.hurried(corner, 8.0)
    assert np.abs(rounded[[0, -1]] - corner[[0, -1]]).max() < 8  # it begins and ends there
    assert 2 < np.hypot(*(rounded - corner[1]).T).min() < 8
    dot = np.float32([(5, 5), (6, 5)])
    assert np.array_equal(prepare.hurried(dot, 8.0), dot)


def test_an_expression_written_in_capitals_keeps_its_label(prepare):
    written = {prepare.in_capitals("sin x+cos y=t") for _ in range(300)}
    assert {"Sin x+cos y=t", "sin X+cos y=t", "sin x+Cos y=t"} <= written
    assert {text.lower() for text in written} == {"sin x+cos y=t"}
    assert {prepare.in_capitals("exp(y)") for _ in range(300)} == {"exp(y)"}


def test_hard_edges_leave_thin_and_faint_strokes(prepare):
    random.seed(0)
    thin = np.zeros((40, 60), np.float32)
    thin[20, 10:50] = 0.4
    bent = [prepare.bent(thin, False) for _ in range(100)]
    assert min(ink.max(0)[18:50].min() for ink in bent) > 0.1
    assert max(ink.max() for ink in bent) > 0.9


def test_a_worn_head_loses_strokes_of_one_direction_and_no_dash(prepare):
    cross = np.zeros((40, 60), np.float32)
    cross[18:21, 10:50] = cross[2:38, 28:31] = 1
    lost = [(cross - prepare.starved(cross)).clip(0) for _ in range(50)]
    assert max(part[18:21, 10:25].max() for part in lost) > 0.5
    assert max(part[4:15, 28:31].max() for part in lost) > 0.5
    assert not any(part[19, 15] > 0 and part[8, 29] > 0 for part in lost)  # both at once
    dash = cross * (np.arange(40) > 17)[:, None] * (np.arange(40) < 21)[:, None]
    assert np.array_equal(prepare.starved(dash), dash)


def test_letters_of_a_joined_hand_hang_together(prepare):
    random.seed(0)
    without_chance(prepare)
    writers = [w for w in prepare.people("train").writers if set("num") <= w.keys()][:20]
    pieces = {True: 0, False: 0}
    for writer, joined in itertools.product(writers, pieces):
        person = hand(prepare, stroke=0.06)._replace(writer=writer, joined=joined)
        for text in ("num", "n m", "num12"):
            ink = prepare.composed(text, person, "train")
            there = cv2.connectedComponents((ink > 0.1).astype(np.uint8))[0] - 1
            pieces[joined] += there
    assert pieces[True] < pieces[False] - 1.5 * len(writers)


def test_a_text_is_composed_of_one_writers_characters(prepare):
    random.seed(0)
    for drawn in samples(prepare, "unipen_text", 12):
        own = [c for c in drawn.label if c in prepare.ALPHANUMERIC]
        assert all(c in drawn.writer.writer for c in own)
        assert drawn.writer.writer in prepare.people(drawn.split).writers
    for drawn in samples(prepare, "unipen_words", 12):
        assert drawn.label in prepare.people(drawn.split).texts


def test_one_hand_takes_characters_of_its_own_kind(prepare):
    """Of several characters of EMNIST, the one of its stroke width and slant."""
    rng = np.random.default_rng(0)
    images = np.zeros((80, 28, 28), np.uint8)
    for image in images:  # bars, upright or slanting, thin or thick
        lean, width = rng.integers(-2, 3), int(rng.integers(2, 9))
        cv2.line(image, (14 + lean, 5), (14 - lean, 22), 255, width)
    write_emnist(prepare, images, np.full(80, 1))
    strokes, _, slants = prepare.emnist_class(settings(prepare), "train", "1")[1].T
    assert strokes.max() > 2 * strokes.min()
    assert slants.max() > 0.15
    random.seed(0)
    widths = []
    for writer in (hand(prepare, stroke=0.1), hand(prepare, stroke=0.35)):
        glyphs = [prepare.character("1", writer, "train")[0] for _ in range(30)]
        widths.append(np.mean([glyph.sum() / 255 / len(glyph) for glyph in glyphs]))
    assert widths[1] > 1.5 * widths[0]


def local_contrast(ink):
    """Ink (H, W) against what is around it, so that shadows and margins do not count."""
    return cv2.GaussianBlur(ink, (0, 0), 1) - cv2.GaussianBlur(ink, (0, 0), 4)


def likeness(ink, image, tilted=False):
    """How much an image, uint8 (H, W), shows of each piece of some ink (h, w): 1 if the same."""
    pattern = np.pad(ink, 6).astype(np.float32)
    (h, w), low = pattern.shape, 0.3 * pattern.max()
    edges = np.linspace(0, w, max(1, round(w / h / 1.5)) + 1).astype(int)
    parts = [slice(a, b) for a, b in zip(edges, edges[1:]) if pattern[:, a:b].max() > low]
    mask = np.float32(cv2.dilate(cv2.GaussianBlur(pattern, (0, 0), 1), np.ones((7, 7))) > 0.1)
    pattern, slack = local_contrast(pattern), 2 + tilted * round(0.15 * h)
    room = [(length // 2 + slack,) * 2 for length in (h, w)]
    page = local_contrast(np.pad(np.float32(255 - crnn.dark_on_light(image)), room))

    def places(area, part):
        found = cv2.matchTemplate(area, pattern[:, part], cv2.TM_CCOEFF_NORMED, mask=mask[:, part])
        return np.where(np.abs(found) < 1.01, found, 0)  # on flat paper it divides by nothing

    # Correlations of the pieces where the whole fits best or, if tilted, near it
    whole = places(page[slack:-slack, slack:-slack], slice(0, w))
    y, x = np.unravel_index(whole.argmax(), whole.shape)
    area = page[y : y + h + 2 * slack, x : x + w + 2 * slack]
    return [places(area[:, p.start : p.stop + 2 * slack], p).max() for p in parts]


@pytest.mark.parametrize("source", DRAWN)
def test_an_image_shows_the_ink_of_its_label_in_every_style(prepare, source):
    """And not the ink of another label, drawn as large.

    Measured on 5,000 samples: of the own ink the worst piece is alike by 0.45 or more in 999 of
    1,000, of another's by less than 0.4 in 99 of 100. Cameras tilt lines: there the mean counts,
    0.55 against 0.5. Stamps move every character, receipts and signs are stretched or bent, so that
    none is where it was.
    """
    fake_emnist(prepare.DATASETS_DIR)
    moved = {"stamped", "scanned", "one pitch", "sign", "curved", "spaced", "screen"}
    drawn = [sample for sample in samples(prepare, source, 40) if sample.style not in moved]
    shown, others = [], []
    for sample, other in zip(drawn, drawn[1:]):
        small = min(1, 50 / len(sample.ink))  # as the correlations were measured
        image = cv2.resize(sample.image, None, fx=small, fy=small, interpolation=cv2.INTER_AREA)
        scale = len(image) / len(sample.ink) if sample.style == "dot matrix" else small
        tilted = sample.style == "photograph"
        score, enough = (np.mean, 0.5) if tilted else (min, 0.4)
        h, w = (round(scale * length) for length in boxed(sample.ink, 0.1).shape)
        size = dict(dsize=(w, h), interpolation=cv2.INTER_AREA)
        inks = [cv2.resize(boxed(s.ink, 0.1), **size) for s in (sample, other)]
        own, wrong = (score(likeness(ink, image, tilted)) for ink in inks)
        assert own > 0.25, (sample.label, sample.style)
        shown.append(own > enough)
        if min(len(sample.label), len(other.label)) > 3:  # as large, a dash is an underscore
            others.append(wrong < enough)
    assert np.mean(shown) > 0.95
    assert np.mean(others) > 0.9


@pytest.mark.parametrize("text", ["Form 27", "-", ".", "|"])
@pytest.mark.parametrize("kind", ["printed fonts", "handwritten fonts"])
def test_every_style_shows_its_text(prepare, kind, text):
    """A black line on white in each style: with contrast, and with ink that the network sees."""
    ink = 1 - np.asarray(line_image(text, size=30, margin=6), np.float32) / 255
    edges, blank = [0, ink.shape[1] // 2, ink.shape[1] - 1], 0
    for name, style in prepare.STYLES[kind].items():
        for i in range(20):
            random.seed(f"{name} {i}")
            image = prepare.finish(ink, edges, style)
            assert image.dtype == np.uint8
            assert int(image.max()) - int(image.min()) >= 25, (name, i)
            blank += int((load_image(image) < 128).sum()) < 3
    assert blank <= (8 if text == "." else 0)  # a lone full stop may fade: it is drawn again then


@pytest.mark.parametrize("source", DRAWN)
def test_training_rows_alone_are_warped(prepare, source):
    """Validation and test rows show fonts and EMNIST characters as they are."""
    fake_emnist(prepare.DATASETS_DIR)
    bent, by_hand = Mock(wraps=prepare.bent), source not in ("trdg_custom", "synthetic_math")
    prepare.set(WARPED=1.0, bent=bent)
    for index in (0, 1, 2, 21, 22, 23):  # of 20, 1 is for validation and 2 for the test
        bent.reset_mock()
        split = prepare.sample(source, index, settings(prepare))[2]
        assert {call.args[1] for call in bent.call_args_list} == {by_hand and split == "train"}


def test_a_warped_line_is_the_same_text(prepare):
    random.seed(0)
    lines = [np.asarray(line_image(text, 30)) for text in ("Hamburg 27", "pretzel 45")]
    plain, other = (boxed(1 - np.float32(line) / 255) for line in lines)
    other, alike = cv2.resize(other, plain.shape[::-1]), []
    for _ in range(40):
        warped = prepare.bent(np.pad(plain, 12), True)
        image = np.uint8(255 - 255 * warped.clip(0, 1))
        alike.append([np.mean(likeness(ink, image, True)) for ink in (plain, other)])
        assert 0.5 < warped.sum() / plain.sum() < 1.5
        assert warped[:, [0, 1, -2, -1]].max() < 0.2  # nothing reaches the edge
    own, wrong = np.mean(alike, 0)
    assert wrong + 0.1 < own < 0.9


# ---- what main draws, and draws again


def test_all_sources(prepare, capsys):
    fake_emnist(prepare.DATASETS_DIR)
    assert draw_again(prepare, capsys) == 24 * 9
    rows, folder = data_rows(prepare), Path(prepare.DATASETS_DIR)
    assert list(rows.columns) == ["image_path", "label", "source", "split", "style"]
    assert "mark" in read_labels(folder / "handwriting" / "00000.csv").columns
    assert set(rows.split) == set(SPLITS)
    assert {"plain", "form", "fields"} < set(rows["style"])
    assert list(rows.image_path) == [f"{s}/{i:05}.png" for s in prepare.SOURCES for i in range(24)]
    for row in rows.itertuples():
        assert prepare.acceptable(row.label, settings(prepare))
        image = load_image(folder / row.image_path)
        assert image.min() == 0, f"{row.image_path} is blank"
        assert frames_needed(row.label) <= num_frames(image.shape[1])
    assert np.asarray(Image.open(folder / "preview.png")).min() == 0


FORK = pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")
OTHERS = [  # how another run draws, and what
    pytest.param({}, ["trdg_custom", "handwriting"], marks=FORK),
    (dict(start_method="spawn"), ["trdg_custom"]),
    (dict(processes=2), ["trdg_custom", "emnist_images", "emnist_words"]),
]


@pytest.mark.parametrize("how, sources", OTHERS)
def test_workers_and_machines_change_nothing(prepare, how, sources, tmp_path):
    prepare.set(SEED=7, CHUNK=10, FONTS_DIR=str(tmp_path), NUM_IMAGES=dict.fromkeys(sources, 24))
    fake_emnist(prepare.DATASETS_DIR)
    prepare.main()
    one = contents(prepare.DATASETS_DIR)
    assert len(one) == len(sources) * (24 + 3) + 2  # images, csvs of chunks, data.csv, preview.png
    fake_emnist(tmp_path / "two")
    prepare.set(DATASETS_DIR=str(tmp_path / "two"), NUM_WORKERS=2)
    if how:
        assert prepare.run(tmp_path, **how).count("of them new") == 1  # one of them speaks
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
    worker = get_context("fork").Process(
        target=prepare.sample, args=("trdg_custom", 0, settings(prepare))
    )
    worker.start()
    worker.join(60)
    worker.terminate()
    assert worker.exitcode == 0


def test_a_narrow_charset_still_finds_texts(prepare):
    for index in range(20):
        narrow = settings(prepare)._replace(charset=prepare.DIGITS)
        assert set(prepare.sample("unipen_words", index, narrow)[1]) <= set(prepare.DIGITS)


def test_another_seed_draws_other_images(prepare):
    seeds = [settings(prepare)._replace(seed=seed) for seed in (0, 1)]
    assert len({prepare.sample("trdg_custom", 0, s)[1] for s in seeds}) == 2


@pytest.mark.parametrize("seed, new", [(0, 24 - 15), (1, 24 - 4)])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(prepare, capsys, seed, new):
    """Also where it was stopped with other constants, which are then changed back."""
    prepare.set(CHUNK=5, NUM_IMAGES=dict(trdg_custom=24))
    prepare.main()
    whole, sample = contents(prepare.DATASETS_DIR), prepare.sample
    if seed == 0:
        shutil.rmtree(prepare.DATASETS_DIR)
    first = [sample("trdg_custom", i, settings(prepare)._replace(seed=seed)) for i in range(18)]
    prepare.set(SEED=seed, sample=Mock(side_effect=[*first, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        prepare.main()
    assert "data.csv" not in contents(prepare.DATASETS_DIR)
    prepare.set(SEED=0, sample=sample)
    assert draw_again(prepare, capsys) == new
    assert contents(prepare.DATASETS_DIR) == whole


def test_only_what_changed_is_drawn_again(prepare, capsys):
    find, no_caveat = prepare.find_fonts, Mock()
    no_caveat.side_effect = lambda s: ([f for f in find(s)[0] if "caveat" not in f.path], ())
    steps = [
        (dict(NUM_IMAGES=dict(trdg_custom=20, handwriting=20)), 40),
        (dict(), 0),
        (dict(NUM_IMAGES=dict(trdg_custom=25, handwriting=20)), 5),
        (dict(NUM_IMAGES=dict(trdg_custom=34, handwriting=20)), 14),  # from the chunk not full on
        (dict(WARPED=0), 20),  # which printed rows never are
        (dict(find_fonts=no_caveat), 20),
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


CHANGES = [
    (crnn, "HEIGHT = 32", "HEIGHT = 40", True),
    (prepare_ocr_dataset, "TRIES = 2_000", "TRIES = 3_000", True),
    (prepare_ocr_dataset, "SEED = 0", "SEED = 1", False),  # it counts by its value
    (prepare_ocr_dataset, "14_000", "15_000", False),
    (prepare_ocr_dataset, "  # ", "  # Now ", False),
]


@pytest.mark.parametrize("module, old, new, noticed", CHANGES)
def test_the_mark_notices_changed_code(prepare, monkeypatch, tmp_path, module, old, new, noticed):
    before = prepare.mark("handwriting", settings(prepare))
    code = Path(module.__file__).read_text(encoding="utf-8")
    assert old in code
    (tmp_path / "changed.py").write_text(code.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
    assert (prepare.mark("handwriting", settings(prepare)) != before) == noticed


def test_images_of_ones_own(prepare, capsys):
    prepare.set(NUM_IMAGES=dict(trdg_custom=20))
    folder = Path(prepare.DATASETS_DIR) / "custom"
    write_csv(folder / "scans", [f"A-{i}" for i in range(30)])
    labels = [f"scans\\{i}.png,A-{i}" for i in range(30)]
    (folder / "labels.csv").write_text("\n".join(["image_path,label", *labels]))
    prepare.main()
    own = data_rows(prepare)[20:]
    assert list(own.image_path) == [f"custom/scans/{i}.png" for i in range(30)]
    assert list(own.label) == [f"A-{i}" for i in range(30)]
    assert set(own.split) == set(SPLITS)
    (folder / "labels.csv").unlink()
    prepare.main()
    assert "no labels.csv" in capsys.readouterr().out
    assert set(data_rows(prepare).source) == {"trdg_custom"}


def test_an_own_image_that_is_missing_is_left_to_the_training_to_report(prepare):
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
        image, label, *_ = prepare.sample("emnist_images", index, settings(prepare))
        assert label == "L"
        assert np.array_equal(image, 255 - letter)


def test_no_character_of_emnist_is_drawn_twice(prepare):
    images = np.random.default_rng(0).integers(0, 256, (124, 28, 28), dtype=np.uint8)
    write_emnist(prepare, images, np.arange(124) % 62)  # in each file
    prepare.set(NUM_IMAGES=dict(emnist_images=10_000))
    count = prepare.find_sources(settings(prepare))["emnist_images"]
    drawn = [prepare.sample("emnist_images", i, settings(prepare)) for i in range(count)]
    assert count > 100
    assert len({(image.tobytes(), split == "test") for image, _, split, _ in drawn}) == count


def test_without_emnist_and_without_network(prepare, capsys, monkeypatch):
    """A server that never answers is the worst case: found out in time, and said once."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/gzip.zip"
        monkeypatch.setattr(torchvision.datasets.EMNIST, "url", url)
        prepare.set(DOWNLOAD_TIMEOUT=1)
        start = time.monotonic()
        prepare.main()
    assert time.monotonic() - start < 30
    output = capsys.readouterr().out
    assert output.count("EMNIST is missing") == 1
    assert f"{prepare.DATASETS_DIR}/emnist/EMNIST/raw" in output
    assert set(data_rows(prepare).source) == {*TYPED, *WRITTEN}


COMPLAINTS = [
    (dict(NUM_IMAGES={}), "set a number in NUM_IMAGES"),
    (dict(CHARSET="aa"), "more than once"),
    (dict(HANDS=Path("none.npz")), "none.npz is missing: it is part of the repository"),
    (dict(MAX_LENGTH=0), r"set NUM_IMAGES\['trdg_custom'\] = 0"),
    (dict(DATASETS_DIR=FONT + "/datasets"), "DejaVuSans.ttf/datasets"),  # a file is in the way
]


@pytest.mark.parametrize("changes, complaint", COMPLAINTS)
def test_one_line_says_what_to_do(prepare, changes, complaint):
    prepare.set(**dict(NUM_IMAGES=dict(trdg_custom=24), NUM_WORKERS=2, CHUNK=10) | changes)
    with pytest.raises((InputError, OSError), match=complaint) as stop:
        prepare.main()
    assert "\n" not in str(stop.value)


def test_a_broken_font_is_left_out_by_name_and_trdgs_own_are_there(prepare, tmp_path, capsys):
    (tmp_path / "broken ü.ttf").write_bytes(b"no font")
    prepare.set(FONTS_DIR=str(tmp_path), NUM_IMAGES=dict.fromkeys(TYPED, 24))
    prepare.main()
    output = capsys.readouterr().out
    assert output.count("is left out") == 1
    assert "broken ü.ttf is left out" in output
    assert set(data_rows(prepare).source) == set(TYPED)


def test_a_full_disk_is_an_error_and_leaves_no_labels_of_former_images(prepare, monkeypatch):
    prepare.set(NUM_IMAGES=dict(trdg_custom=24))
    prepare.main()
    prepare.set(SEED=1)
    monkeypatch.setattr(Image.Image, "save", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        prepare.main()
    assert [path for path in contents(prepare.DATASETS_DIR) if path.endswith(".csv")] == []
