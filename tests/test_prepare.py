"""The drawn data: honest labels, splits, fonts, downloads, what is drawn again, bad input."""

import itertools
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import cv2
import numpy as np
import pandas as pd
import pytest
import torchvision
from conftest import CHARSET, FONT, FORK, contents, fake_emnist, line_image, write_csv
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw

import crnn
import prepare_ocr_dataset
from crnn import InputError, load_image, read_labels

SPLITS = "train", "val", "test"


def strokes_like(text, height):
    """Strokes (points, 2) around the letters of a text, made thin."""
    image = np.asarray(line_image(text, size=height * 4 // 3, margin=9)) < 128
    thin = cv2.erode(np.uint8(image), np.ones((7, 7)))
    outlines, _ = cv2.findContours(thin, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    return [np.concatenate([line, line[:1]])[:, 0].astype(int) for line in outlines]


@pytest.fixture(scope="session")
def downloads(tmp_path_factory):
    """A folder with made-up EMNIST and UNIPEN, as of 40 people, their characters like printed."""
    folder, people = tmp_path_factory.mktemp("downloads"), [f"abc/{i}" for i in range(40)]
    fake_emnist(folder)
    texts = [chr(code) for code in range(33, 127)] + ["hello", "seven years", "Pkg", "no. 7"]
    inks = [strokes_like(text, 128 if len(text) == 1 else 90) for text in texts]
    written = prepare_ocr_dataset.Written
    samples = [written(*each, writer) for writer in people for each in zip(inks, texts)]
    with pytest.MonkeyPatch.context() as patch:
        parsed = [(samples, Counter())]  # of one contributor, with nothing skipped
        patch.setattr(prepare_ocr_dataset, "process_map", lambda *_, **__: parsed)
        prepare_ocr_dataset.parse_unipen(folder, folder / "unipen" / "strokes.npz")
    return folder


@pytest.fixture
def downloaded(prepare, downloads):
    shutil.copytree(downloads, prepare.DATASETS_DIR)


def fonts_by_name(prepare):
    return {Path(font.path).name: font for font in prepare.find_fonts()[0]}


def make_line(prepare, label, split="train", alone=False, source="trdg_custom", style="plain"):
    source = prepare.SOURCES[source]
    style = prepare.STYLES[source.kind][style]
    return prepare.Line(label, alone, split, source, style, source.texts)


def pick(prepare, *label_and_split, **line):
    """The Font or Hand that a line is given, or None."""
    line = make_line(prepare, *label_and_split, **line)
    return line.source.pick(line)


def draw(prepare, capsys, **constants):
    """Run main with these constants. Returns what it printed, how many images are new, all rows."""
    prepare.set(**constants)
    capsys.readouterr()
    prepare.main()
    output = capsys.readouterr().out
    rows = read_labels(Path(prepare.DATASETS_DIR) / "data.csv")
    return output, int(re.search(r"\(([\d,]+) new\)", output)[1]), rows


def read(model, images):
    """What a model reads in images, without spaces."""
    readings = crnn.read_images(model, list(map(load_image, images)), 20)
    return [reading.text.replace(" ", "") for reading in readings]


# ---- texts
def test_every_kind_of_text_can_be_drawn(prepare):
    random.seed(0)
    kinds = prepare.read_grammar().keys() | prepare.RANDOM.keys()
    drawable = sorted(kinds - {"written"})  # by the people of a download
    texts = [prepare.expand(kind, "val") for kind in drawable for _ in range(100)]
    left = "|".join(name for name in kinds if len(name) > 1)  # {n} is an expression in braces
    assert [text for text in texts if re.search(f"{{({left})}}", text)] == []
    mixes = itertools.cycle(["printed", "by_hand", "math"])
    texts = [prepare.pick_text(next(mixes), "train")[0] for _ in range(10_000)]
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
    assert {prepare.pick_text("plate", "val")[0] for _ in range(99)} >= {"", " "}
    for faulty, complaint in (("plate  B-{tow}", "plate has {tow}"), ("a_mix  B-7", "a_mix is to")):
        path.write_text(f"{faulty}\n", encoding="utf-8")
        prepare.set(TEXTS_FILE=path)
        with pytest.raises(InputError, match=complaint):
            prepare.main()


def test_words_of_the_test_are_not_trained_on(prepare):
    """Neither drawn nor made up, in whatever kind of text that is of words."""
    random.seed(0)
    known = prepare.find_words()  # all, and those in use
    words = {split: {word.lower() for word in known[split][0]} for split in SPLITS}
    assert min(map(len, words.values())) > 10_000
    for split in SPLITS:
        made_up = {prepare.invent(split, ends) for ends in [(), ("ol", "ex")] * 100}
        parts = {part for word in known[split][0] for part in re.findall(r"[^\W\d_]{2,}", word)}
        assert {crnn.split_of(part) for part in parts} == {split}
        assert {crnn.split_of(word) for word in [*made_up, *known[split][1]]} == {split}
        assert words[split] & made_up != made_up
    kinds = "words made_up name item punctuated due noted said firm".split()
    texts = [prepare.expand(kind, "train") for kind in kinds for _ in range(1000)]
    drawn, fixed = (
        set(re.findall("[a-z]{3,}", text.lower()))
        for text in (" ".join(texts), prepare.TEXTS_FILE.read_text(encoding="utf-8"))
    )
    drawn -= fixed  # SUB TOTAL is in all splits
    assert drawn & (words["val"] | words["test"]) == set()
    assert len(drawn & words["train"]) > 1000


def test_a_charset_narrow_or_wide_is_drawn(prepare, few_fonts):
    """Digits only; and accents and a currency: in words, alone and before a number."""
    for few in ("0123456789", "ABCDEFGH", "01"):
        prepare.set(CHARSET=few)
        drawn = "".join(prepare.sample("trdg_custom", i)[1] for i in range(20))
        assert drawn and set(drawn) <= set(few)
    prepare.set(CHARSET=CHARSET + "äöüé€")
    assert set("äöüé€") <= fonts_by_name(prepare)["poppins-400.woff2"].characters
    typed = "trdg_custom", "synthetic_math", "handwriting"  # the sources that fonts draw
    drawn = [prepare.sample(source, i)[1] for source in typed for i in range(60)]
    assert set("äöüé") & set("".join(drawn))
    texts = [prepare.pick_text("printed", "train")[0] for _ in range(8000)]
    assert set("äöüé€") <= {text for text in texts if len(text) == 1}
    assert len(re.findall("[a-z]{2}[äöüé][a-z]", " ".join(texts))) > 50  # not by chance
    assert re.search("€[0-9]", " ".join(texts))


# ---- fonts
def test_a_character_that_one_family_has_is_trained_on(prepare):
    for only in range(10):
        characters = (frozenset("aß" if i == only else "a") for i in range(10))
        fonts = [prepare.Font("", "", f"{i}", c, frozenset()) for i, c in enumerate(characters)]
        held_out = prepare.held_out_families(fonts, "")
        assert len(held_out) == 1 and held_out != [str(only)]


def test_fonts_of_the_test_are_not_trained_in(prepare):
    fonts, notes = prepare.find_fonts()
    assert [note for note in notes if "held out for validation and test: " not in note] == []
    for kind, source in ((prepare.PRINTED, "trdg_custom"), (prepare.HANDWRITTEN, "handwriting")):
        sides = {(font.family, font.held_out) for font in fonts if font.kind == kind}
        assert len({family for family, _ in sides}) == len(sides)  # no family is on both
        assert 0.1 <= np.mean([held_out for _, held_out in sides]) < 0.2
        for split in SPLITS:
            picked = [pick(prepare, "abc", split, source=source) for _ in range(30)]
            assert {font.held_out for font in picked} == {split != "train"}
    for split, style in itertools.product(SPLITS, ("receipt", "display")):  # fonts by their names
        picked = [pick(prepare, "12", split, style=style) for _ in range(30)]
        assert {font.held_out for font in picked} == {split != "train"}
    for kind in (True, False):  # nothing is trained on that is never tested
        sides = [f.characters for f in fonts if f.kind == prepare.PRINTED and f.held_out == kind]
        assert set().union(*sides) == set(prepare.CHARSET)


def test_fonts_are_only_used_for_what_they_draw(prepare):
    by_name = fonts_by_name(prepare)
    assert by_name["DejaVuSans.ttf"].characters == set(prepare.CHARSET)
    assert set("0123456789") <= by_name["dseg7-400.woff2"].characters
    # No glyph in the file; capitals instead; of seven segments
    for name, missing in {"caveat": "√π≤≥≠", "rock-salt": "abc", "dseg7": "ABC"}.items():
        assert not set(missing) & by_name[f"{name}-400.woff2"].characters
    rows = pd.read_csv(prepare.LEFT_OUT_FILE, dtype=str, keep_default_na=False)
    assert rows.family.is_unique and rows.why.str.len().min() > 5
    for row in rows.itertuples():
        drawn = [f.characters for f in by_name.values() if f.family == row.family]
        assert drawn and not set(row.characters) & set().union(*drawn), row.family
    # Neither nothing nor the box for the unknown, in a size that no font was chosen by
    for font in by_name.values():
        mask = prepare.typeface(font.path, 24).getmask
        boxes = {bytes(mask(c)) for c in "\u0378\ue123\U000e0fff"}  # unassigned
        masks = {c: bytes(mask(c)) for c in font.characters - {" "}}
        assert [c for c in masks if masks[c] in boxes or not any(masks[c])] == [], font.path


def test_a_font_without_a_name_goes_by_that_of_its_file(prepare, tmp_path):
    font = TTFont(FONT)
    del font["name"]
    path = str(tmp_path / "Nameless.ttf")
    font.save(path)
    assert prepare.survey_font(path, prepare.PRINTED, "0123456789").family == "nameless"


def test_look_alikes_stand_alone_only_where_they_can_be_told_apart(prepare, downloaded):
    by_name = fonts_by_name(prepare)
    assert set("Il") <= by_name["poppins-400.woff2"].doubtful
    assert not set("O0Il1") & by_name["jetbrains-mono-400.woff2"].doubtful  # 0 has a slash
    assert pick(prepare, "Il", "test", alone=True)  # and yet there are some to test it in
    for split in ("train", "val"):
        picked = [pick(prepare, "AI7", split, alone=True) for _ in range(50)]
        assert [font.path for font in picked if "I" in font.doubtful] == []
    assert any("I" in pick(prepare, "India", "train").doubtful for _ in range(50))
    for label, source in itertools.product(["O7", "lab"], ["emnist_words", "unipen_text"]):
        line = make_line(prepare, label, alone=True, source=source)  # by hand, nowhere
        assert prepare.unclear(line) and not prepare.unclear(line._replace(alone=False))


# One with swashes, and a display whose digits are as high as its line
PEN_FONTS = ["DejaVuSans.ttf", "playfair-display-400i.woff2", "dseg7-400.woff2"]


@pytest.mark.parametrize("pen", ["typeset", "typeset_by_trdg"])
@pytest.mark.parametrize("name", PEN_FONTS)
def test_a_font_draws_its_label_and_no_ink_is_lost(prepare, pen, name):
    """As much ink as Pillow draws: swashes, descenders and all."""
    font = fonts_by_name(prepare)[name]._replace(size=40)
    random.seed(0)
    texts = "fjord", "Qy", "j", "WAVE", "({[]})", "-", ",", "Hamburg,27", "88.8", "120"
    for text in [text for text in texts if set(text) <= font.characters]:
        image = Image.new("L", (60 + 40 * len(text), 200))
        face = prepare.typeface(font.path, 40)
        ImageDraw.Draw(image).text((50, 50), text, font=face, fill=255)
        expected = np.asarray(image, np.float32) / 255
        inks = [getattr(prepare, pen)(text, font) for _ in range(5)]  # spaced out, or not
        found = [ink for ink in inks if ink is not None]
        assert found, text
        for ink in found:
            assert ink.any(1).sum() == expected.any(1).sum()  # as high
            assert abs(ink.sum() / expected.sum() - 1) < 0.04, text  # letters may overlap


def test_a_leaning_line_keeps_its_ink(prepare):
    ink = np.zeros((40, 30), np.float32)
    ink[:, [0, 29]] = 1
    leaning = prepare.leaning(ink, 0.2, 0.2)  # 8 columns over its 40 rows
    assert leaning.shape == (40, 38) and abs(leaning.sum() - ink.sum()) < 2
    assert np.flatnonzero(leaning[0] > 0.4)[0] >= 7 and leaning[39, 0] > 0.4


# ---- hands
def test_writers_of_the_test_are_not_trained_on(prepare, downloaded):
    """Nor is anybody's word, since the ink of characters and of texts is shared."""
    names = {}
    for split in SPLITS:
        people = prepare.people(split)
        groups = [*people.writers, people.texts]  # label -> samples
        names[split] = {s.writer for group in groups for some in group.values() for s in some}
    words = re.findall("[A-Za-z]{2,}", " ".join(prepare.people("train").texts))
    assert {crnn.split_of(word) for word in words} == {"train"}
    assert min(map(len, names.values())) > 0
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 40


def test_signs_that_unipen_lacks_are_put_together(prepare, downloaded, shipped):
    random.seed(0)
    line = make_line(prepare, "7+4", "val", source="unipen_math")
    for sign in prepare.SIGNS:
        inks = [line.source.pen(f"7{sign}4", line.source.pick(line)) for _ in range(10)]
        texts = read(shipped, [np.uint8(255 - 255 * ink) for ink in inks])
        assert texts.count(f"7{sign}4") + (sign == "×") * texts.count("7x4") >= 6, sign


# ---- styles and images
@pytest.mark.parametrize("kind", ["printed fonts", "handwritten fonts"])
def test_every_style_shows_its_text(prepare, kind):
    """A black line on white in each style: with contrast, and with ink that the network sees.

    All but 1 of 8, that is: a dash in pale relief may be lost, and is drawn anew.
    """
    styles = prepare.STYLES[kind].items()
    for text, (name, style) in itertools.product(["Form 27", "-", "|"], styles):
        ink = 1 - np.asarray(line_image(text, size=30, margin=6), np.float32) / 255
        random.seed(name)
        inks = [prepare.apply(style.effects, ink) for _ in range(8)]
        images = [prepare.give_tones(each, **style.tones) for each in inks]
        readable = [image for image in images if prepare.is_readable(image, text)]
        assert len(readable) >= 7, (name, text)
        for image in readable:
            assert image.dtype == np.uint8
            assert int(image.max()) - int(image.min()) >= 25, (name, text)
            assert (load_image(image) < 128).sum() >= 3, (name, text)


@pytest.mark.parametrize("source", prepare_ocr_dataset.SOURCES)
def test_an_image_shows_its_label(prepare, downloaded, shipped, source):
    """The bundled weights read most: a wrong label, a lost or a mirrored character would show."""
    images, labels, *_ = zip(*[prepare.sample(source, index) for index in range(40)])
    right = [text == label.replace(" ", "") for text, label in zip(read(shipped, images), labels)]
    assert np.mean(right) >= 0.6


def test_all_sources(prepare, few_fonts, downloaded, capsys):
    _, new, rows = draw(prepare, capsys, NUM_IMAGES=dict.fromkeys(prepare.SOURCES, 10))
    assert new == 10 * len(prepare.SOURCES)
    folder = Path(prepare.DATASETS_DIR)
    assert list(rows.columns) == ["image_path", "label", "source", "split", "style"]
    assert set(rows.split) == set(SPLITS)
    assert {"plain", "form", "fields"} < set(rows["style"])
    assert list(rows.image_path) == [f"{s}/{i:05}.png" for s in prepare.SOURCES for i in range(10)]
    for row in rows.itertuples():
        assert prepare.acceptable(row.label)
        image = load_image(folder / row.image_path)
        assert image.min() == 0 and crnn.fits(row.label, image), row.image_path
    assert np.asarray(Image.open(folder / "preview.png")).min() == 0


def test_of_emnist_only_what_the_charset_holds_is_drawn(prepare, downloaded, capsys):
    prepare.set(CHARSET="0123456789")
    assert {prepare.sample("emnist_images", i)[1] for i in range(60)} <= set("0123456789")
    prepare.set(CHARSET="+-*/.,", NUM_IMAGES=dict(emnist_images=9, emnist_words=9))
    assert list(prepare.count_images()) == ["emnist_words"]
    assert "emnist_images is skipped: CHARSET has no letter" in capsys.readouterr().out


def test_no_character_of_emnist_is_drawn_twice(prepare, downloaded):
    prepare.set(NUM_IMAGES=dict(emnist_images=10_000))
    count = prepare.count_images()["emnist_images"]
    drawn = [prepare.sample("emnist_images", i) for i in range(count)]
    assert count > 1000
    assert len({(image.tobytes(), split == "test") for image, _, split, _ in drawn}) == count


# ---- drawing: the same files whoever draws them, and only those that are missing
@pytest.mark.parametrize("way", ["spawn", pytest.param("fork", marks=FORK)])
def test_workers_change_nothing(prepare, few_fonts, downloads, tmp_path, way):
    spawn = way == "spawn"  # one chunk for one worker, since it takes three seconds to start
    sources = dict(trdg_custom=8) if spawn else dict(trdg_custom=8, unipen_text=8)
    prepare.set(SEED=7, CHUNK=8 if spawn else 3, NUM_IMAGES=sources)
    prepare.set(ProcessPoolExecutor=partial(ProcessPoolExecutor, mp_context=get_context(way)))
    for name, number in dict(one=1, two=2).items():
        shutil.copytree(downloads, tmp_path / name)
        prepare.set(DATASETS_DIR=str(tmp_path / name), NUM_WORKERS=number)
        prepare.main()
    one = contents(tmp_path / "one")
    assert len([name for name in one if name.endswith(".png")]) == sum(sources.values()) + 1
    assert contents(tmp_path / "two") == one


STOPS = [(0, KeyboardInterrupt, 12 - 6), (1, OSError(28, "No space left"), 12 - 3)]


@pytest.mark.parametrize("seed, stop, new", STOPS)
def test_a_run_that_was_stopped_ends_in_the_same_bytes(prepare, few_fonts, capsys, seed, stop, new):
    """Also where it was stopped with other constants, which are then changed back."""
    draw(prepare, capsys, CHUNK=3, NUM_IMAGES=dict(trdg_custom=12))
    whole, sample = contents(prepare.DATASETS_DIR), prepare.sample
    if seed == 0:
        shutil.rmtree(Path(prepare.DATASETS_DIR) / "trdg_custom")
    prepare.set(SEED=seed, sample=Mock(wraps=sample, side_effect=[DEFAULT] * 8 + [stop]))
    with pytest.raises((KeyboardInterrupt, OSError)):
        prepare.main()
    left = contents(prepare.DATASETS_DIR)  # no labels of the former images
    assert not {"data.csv", "trdg_custom/00006.csv"} & left.keys()
    (Path(prepare.DATASETS_DIR) / "trdg_custom" / ".00006.csv.99.part").touch()  # by kill -9
    assert draw(prepare, capsys, SEED=0, sample=sample)[1] == new
    assert contents(prepare.DATASETS_DIR) == whole


def test_no_worker_outlives_a_killed_run(prepare, few_fonts, tmp_path):
    prepare.set(NUM_IMAGES=dict(trdg_custom=100_000), NUM_WORKERS=2)
    run = subprocess.Popen(prepare.command(tmp_path), stdout=subprocess.PIPE)
    while run.poll() is None and not any(Path(prepare.DATASETS_DIR).glob("trdg_custom/*.png")):
        time.sleep(0.05)
    assert run.poll() is None
    run.kill()
    run.communicate(timeout=20)  # until the last process that could print has ended


def test_only_what_changed_is_drawn_again(prepare, few_fonts, capsys, monkeypatch, tmp_path):
    csv_path = Path(prepare.DATASETS_DIR) / "trdg_custom" / "00000.csv"
    font = Path(prepare.FONTS_DIR) / "printed" / "abel-400.woff2"
    strokes = Path(prepare.DATASETS_DIR) / "unipen" / "strokes.npz"
    strokes.parent.mkdir(parents=True)
    grammar = tmp_path / "texts.txt"
    grammar.write_bytes(prepare.TEXTS_FILE.read_bytes() + b"\n# ours\n")

    def edit(module, old, new):
        code, path = Path(module.__file__).read_text(encoding="utf-8"), tmp_path / f"{old}.py"
        assert old in code
        path.write_text(code.replace(old, new), encoding="utf-8")
        monkeypatch.setattr(module, "__file__", str(path))

    steps = [
        (dict(NUM_IMAGES=dict(trdg_custom=6, handwriting=6)), None, 12),
        (dict(), None, 0),
        (dict(NUM_IMAGES=dict(trdg_custom=11, handwriting=6)), None, 5),  # from the chunk not full
        (dict(STYLED=0), None, 17),
        (dict(NUM_IMAGES=dict(trdg_custom=5)), None, 0),
        (dict(), lambda: csv_path.write_text("image_path,label"), 3),
        (dict(), csv_path.with_name("00004.png").unlink, 2),  # the chunk of a deleted image
        (dict(), lambda: (prepare.typeface.cache_clear(), font.unlink()), 5),
        (dict(), partial(strokes.write_bytes, b"of pens, arriving later"), 0),
        (dict(), partial(edit, prepare_ocr_dataset, "  # ", "  # Now "), 0),
        (dict(), partial(edit, prepare_ocr_dataset, "if ", "if not "), 5),
        (dict(), partial(edit, crnn, "return ", "return not "), 5),
        (dict(TEXTS_FILE=grammar), None, 5),
    ]
    prepare.set(CHUNK=3)
    for constants, change, missing in steps:
        if change:
            change()
        _, new, rows = draw(prepare, capsys, **constants)
        assert new == missing, constants
    assert list(rows.source) == ["trdg_custom"] * 5  # no others are listed
    assert set(rows["style"]) == {"plain"}


def test_images_of_ones_own(prepare, few_fonts, capsys):
    """In datasets/custom, and in folders of it that may name their source and split."""
    folder, texts = Path(prepare.DATASETS_DIR) / "custom", [f"A-{i}" for i in range(30)]
    write_csv(folder / "scans", texts)
    labels = [f"scans\\{i}.png,{text}" for i, text in enumerate(texts)]
    (folder / "labels.csv").write_text("\n".join(["image_path,label", *labels]))
    (folder / "scans" / "7.png").unlink()  # missing: it is left to the training to report
    write_csv(folder / "meters", ["12", "34"], "labels.csv", source="dials", split="test")
    constants = dict(NUM_IMAGES=dict(trdg_custom=2e0, synthetic_math=-1), NUM_WORKERS=0)
    own = draw(prepare, capsys, **constants)[2][2:]
    paths = [f"custom/scans/{i}.png" for i in range(30)]
    assert list(own.image_path) == [*paths, "custom/meters/0.png", "custom/meters/1.png"]
    assert list(own.label) == [*texts, "12", "34"]
    assert list(own.source) == ["custom"] * 30 + ["dials"] * 2
    assert set(own.split[:30]) == set(SPLITS)
    assert list(own.split[30:]) == ["test"] * 2
    corrected = folder / "labels (1).csv"
    write_csv(folder / "meters", ["13", "34"], "../labels (1).csv", source="meters")
    corrected.write_text(re.sub(r"(\d.png)", r"meters/\1", corrected.read_text()))
    os.utime(corrected, (2e9, 2e9))  # newer than labels.csv
    own = draw(prepare, capsys)[2][2:]
    assert len(own) == 32
    assert dict(zip(own.image_path, own.label)).items() >= {("custom/meters/0.png", "13")}
    corrected.unlink()
    if sys.platform != "win32":  # where only some may make links
        (folder / "meters").rename(folder.parent / "elsewhere")
        (folder / "meters").symlink_to(folder.parent / "elsewhere")
        linked = draw(prepare, capsys)[2][32:]
        assert list(linked.image_path) == ["elsewhere/0.png", "elsewhere/1.png"]
    for path in (folder, folder / "meters"):
        (path / "labels.csv").unlink()
    output, _, rows = draw(prepare, capsys)
    assert "no labels.csv" in output
    assert set(rows.source) == {"trdg_custom"}


# ---- what is missing or wrong
def test_what_cannot_be_used_is_named_and_left_out(prepare, few_fonts, capsys, monkeypatch):
    """A broken font, one family of handwriting, and a server that never answers, the worst case:
    found out in time, and said once."""
    (Path(prepare.FONTS_DIR) / "broken ü.ttf").write_bytes(b"no font")
    for path in sorted(Path(prepare.FONTS_DIR).glob("handwriting/*"))[1:]:
        path.unlink()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.EMNIST, "url", url + "gzip.zip")
        prepare.set(DOWNLOAD_TIMEOUT=1, UNIPEN_RECORD=url)
        start = time.monotonic()
        output, _, rows = draw(prepare, capsys, NUM_IMAGES=dict.fromkeys(prepare.SOURCES, 2))
    assert time.monotonic() - start < 30
    assert socket.getdefaulttimeout() is None  # as before
    for name, place in (("EMNIST", "emnist/EMNIST/raw/"), ("UNIPEN", "unipen/")):
        assert output.count(f"could not get {name}") == 1
        assert f"{Path(prepare.DATASETS_DIR).as_posix()}/{place}" in output
    assert "broken ü.ttf is skipped" in output
    assert "handwriting is skipped: it needs two families of handwritten fonts" in output
    assert set(rows.source) == {"trdg_custom", "synthetic_math"}


COMPLAINTS = [
    (dict(NUM_IMAGES={}), "set a number in NUM_IMAGES"),
    (dict(NUM_IMAGES=dict(unipen=9)), "NUM_IMAGES names unipen: choose from trdg_custom, "),
    (dict(CHARSET="aa"), "more than once"),
    (dict(WORDS_FILE=Path("none.txt")), "No such file or directory: 'none.txt'"),
    (dict(MAX_LENGTH=0), r"set NUM_IMAGES\['trdg_custom'\] = 0"),
    (dict(FONTS_DIR="no folder"), "start in the project's folder"),
    (dict(DATASETS_DIR=FONT + "/datasets"), "DejaVuSans.ttf"),  # a file is in the way
]


@pytest.mark.parametrize("changes, complaint", COMPLAINTS)
def test_one_line_says_what_to_do(prepare, few_fonts, changes, complaint):
    prepare.set(**dict(NUM_IMAGES=dict(trdg_custom=24), NUM_WORKERS=2, CHUNK=10) | changes)
    with pytest.raises((InputError, OSError), match=complaint) as stop:
        prepare.main()
    assert "\n" not in str(stop.value)


def test_a_contact_sheet_shows_images_and_captions(tmp_path):
    image, path = Image.new("L", (30, 20), 0), tmp_path / "new folder" / "sheet.png"
    image.save(tmp_path / "image.png")
    cells = [(image, []), (tmp_path / "image.png", [("label", "#c00000")]), (None, [])]
    prepare_ocr_dataset.contact_sheet(path, cells, columns=3)
    pixels = np.asarray(Image.open(path)).astype(int)  # (H, W, 3), a row of 80 pixels
    black, red = (pixels == 0).all(2), (pixels == (192, 0, 0)).all(2)  # both (H, W)
    assert black[:, :230].sum() > 1000  # the image, as large as its place allows
    assert black[:, 230:460].sum() > 1000  # and by its path
    assert red[:, 230:460].any()  # a caption
    assert (pixels[:, 460:] == 255).all()  # no cell, no ink
    prepare_ocr_dataset.contact_sheet(path, [], columns=2)
    assert np.array_equal(np.asarray(Image.open(path)), np.full((80, 460, 3), 255))
