"""The drawn data: determinism, splits, fonts, EMNIST, bad input."""
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from conftest import FONT, ROOT, fake_emnist, line_image, write_csv, write_idx
from crnn import frames_needed, load_image, num_frames, read_labels


def contents(folder):
    """Every file below a folder but EMNIST's and the unfinished, as bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*")
            if p.is_file() and not {"raw", ".drawing"} & set(p.parts)}


def only(prepare, monkeypatch, **numbers):
    """Draw these sources only."""
    for name in [name for name in vars(prepare) if name.startswith("NUM_") and name != "NUM_WORKERS"]:
        monkeypatch.setattr(prepare, name, numbers.get(name, 0))


def test_all_sources(prepare, capsys):
    fake_emnist(Path(prepare.DATASETS_DIR))
    prepare.main()
    rows = read_labels(Path(prepare.DATASETS_DIR) / "data.csv")
    assert list(rows.columns) == ["image_path", "label", "source", "split", "style"]
    assert rows.source.value_counts().to_dict() == dict.fromkeys(prepare.SOURCES, 24)
    assert (Path(prepare.DATASETS_DIR) / "emnist_images" / "00000.png").exists()
    assert set(rows.split) == {"train", "val", "test"} and rows.image_path.is_unique
    for row in rows.itertuples():
        assert row.image_path == f"{row.source}/{Path(row.image_path).name}" and "\\" not in row.image_path
        assert set(row.label) <= set(prepare.CHARSET) and row.label == row.label.strip()
        picture = load_image(Path(prepare.DATASETS_DIR) / row.image_path)
        assert picture.min() == 0, f"{row.image_path} is blank"
        assert frames_needed(row.label) <= num_frames(picture.shape[1])
    with Image.open(Path(prepare.DATASETS_DIR) / "preview.png") as sheet:
        assert sheet.width > 1000 and np.asarray(sheet).min() == 0
    assert not (Path(prepare.DATASETS_DIR) / ".drawing").exists()
    message = capsys.readouterr().out
    assert "synthetic_math" in message and "144 of them new" in message and "fewer than 50 times" in message
    assert {"plain", "form", "fields"} < set(rows["style"])


@pytest.mark.parametrize("method, sources", [
    ("spawn", 2), pytest.param("fork", 6, marks=pytest.mark.skipif(os.name == "nt", reason="no fork"))])
def test_workers_change_nothing(prepare, method, sources, monkeypatch, tmp_path):
    """One process against two, whose constants differ from the script's defaults, so that a worker must have been told them."""
    fake_emnist(Path(prepare.DATASETS_DIR))
    monkeypatch.setattr(prepare, "SEED", 7)
    monkeypatch.setattr(prepare, "CHUNK", 10)
    if sources == 2:  # spawned workers import all anew, which takes seconds for every source
        only(prepare, monkeypatch, NUM_TRDG=24, NUM_EMNIST_WORDS=24)
    prepare.main()
    one = contents(prepare.DATASETS_DIR)
    shutil.copytree(Path(prepare.DATASETS_DIR) / "emnist", tmp_path / "two" / "emnist")
    for name, value in dict(DATASETS_DIR=str(tmp_path / "two"), NUM_WORKERS=2, START_METHOD=method).items():
        monkeypatch.setattr(prepare, name, value)
    prepare.main()
    assert len(one) == sources * (24 + 1) + 2 and contents(tmp_path / "two") == one


def test_two_machines_draw_what_one_does(prepare, monkeypatch, tmp_path):
    fake_emnist(Path(prepare.DATASETS_DIR))
    only(prepare, monkeypatch, NUM_TRDG=24, NUM_MATH=24, NUM_EMNIST=24, NUM_EMNIST_WORDS=24)
    prepare.main()
    one = contents(prepare.DATASETS_DIR)
    shutil.copytree(Path(prepare.DATASETS_DIR) / "emnist", tmp_path / "two" / "emnist")
    constants = {name: value for name, value in vars(prepare).items() if name.startswith("NUM_")}
    constants |= dict(CHUNK=10, FONTS_DIR=prepare.FONTS_DIR, DATASETS_DIR=str(tmp_path / "two"))
    (tmp_path / "run.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport prepare_ocr_dataset\n"
                                     f"vars(prepare_ocr_dataset).update({constants!r})\nprepare_ocr_dataset.main()\n")
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "run.py")],
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert contents(tmp_path / "two") == one and run.stdout.count("labels in") == 1
    assert not (tmp_path / "two" / ".drawing").exists()


def test_another_seed_draws_other_pictures(prepare, monkeypatch):
    only(prepare, monkeypatch, NUM_TRDG=24)
    prepare.main()
    first = contents(prepare.DATASETS_DIR)
    monkeypatch.setattr(prepare, "SEED", 1)
    prepare.main()
    assert contents(prepare.DATASETS_DIR)["data.csv"] != first["data.csv"]


def test_fewer_pictures_leave_no_old_ones_behind(prepare, monkeypatch):
    only(prepare, monkeypatch, NUM_TRDG=24, NUM_HANDWRITING=24)
    prepare.main()
    own = Path(prepare.DATASETS_DIR) / "trdg_custom" / "my own.png"
    own.write_bytes(b"not ours")
    monkeypatch.setattr(prepare, "NUM_TRDG", 10)
    monkeypatch.setattr(prepare, "NUM_HANDWRITING", 0)
    prepare.main()
    assert len(list((Path(prepare.DATASETS_DIR) / "trdg_custom").glob("[0-9]*.png"))) == 10 and own.exists()
    assert len(list((Path(prepare.DATASETS_DIR) / "handwriting").glob("*.png"))) == 24  # left out is left alone, and not listed
    assert set(read_labels(Path(prepare.DATASETS_DIR) / "data.csv").source) == {"trdg_custom"}


def test_emnist_is_upright_and_dark_on_light(prepare, monkeypatch):
    """An L, whose transpose is a Γ without its left-right mirror: a long bar down the left, a short one along the bottom."""
    letter = np.zeros((28, 28), np.uint8)
    letter[4:24, 8:11] = 255
    letter[21:24, 8:18] = 255
    write_idx(Path(prepare.DATASETS_DIR) / "emnist" / "EMNIST" / "raw", np.stack([letter] * 40), np.full(40, 21))
    only(prepare, monkeypatch, NUM_EMNIST=24)
    prepare.main()
    rows = read_labels(Path(prepare.DATASETS_DIR) / "data.csv")
    assert set(rows.label) == {"L"}
    for path in rows.image_path:
        with Image.open(Path(prepare.DATASETS_DIR) / path) as image:
            assert np.array_equal(np.asarray(image), 255 - letter)


def test_emnist_rows_are_not_drawn_twice(prepare):
    fake_emnist(Path(prepare.DATASETS_DIR), per_class=2)  # 124 characters in each file, of which 7 for val
    count = prepare.emnist_count(10_000)
    ranks = [prepare.split_and_rank(i) for i in range(count)]
    have = {split: len(prepare.emnist(prepare.DATASETS_DIR, prepare.SEED, split)[0]) for split in ("train", "val", "test")}
    assert have["train"] + have["val"] == 124 and have["test"] == 124
    assert count > 100 and len(set(ranks)) == count and all(rank < have[split] for split, rank in ranks)


def test_without_emnist_and_without_network(prepare, capsys, monkeypatch):
    """A server that accepts and never answers is the worst case: found out in time, said once, and the rest is drawn."""
    import socket
    import torchvision
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(torchvision.datasets.EMNIST, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/gzip.zip")
        monkeypatch.setattr(prepare, "EMNIST_PROBE_SECONDS", 1)
        start = time.monotonic()
        prepare.main()
    assert time.monotonic() - start < 30
    message = capsys.readouterr().out
    assert message.count("EMNIST is missing") == 1 and "emnist/EMNIST/raw" in message and "560 MB" in message
    assert set(read_labels(Path(prepare.DATASETS_DIR) / "data.csv").source) == {"trdg_custom", "synthetic_math", "handwriting"}


def test_words_and_fonts_of_the_test_are_not_trained_on(prepare):
    words = {split: {w.lower() for w in prepare.words(split)} for split in ("train", "val", "test")}
    assert not words["train"] & words["val"] and not words["train"] & words["test"] and not words["val"] & words["test"]
    assert min(map(len, words.values())) > 10_000
    prepare.FONTS, notes = prepare.find_fonts()
    assert not notes
    for kind in (prepare.PRINTED, prepare.HAND):
        families = {held_out: {f.family for f in prepare.FONTS if f.kind == kind and f.held_out == held_out} for held_out in (True, False)}
        assert prepare.HELD_OUT_FONTS <= len(families[True]) / len(families[True] | families[False]) < 0.2 and not families[True] & families[False]
        for split in ("train", "val", "test"):
            assert prepare.pick_font("abc", kind, split, False).held_out == (split != "train")
    for c in prepare.CHARSET:  # nothing is trained on that is never tested
        assert prepare.pick_font(c, prepare.PRINTED, "train", False) and prepare.pick_font(c, prepare.PRINTED, "test", False), c


def test_families_are_drawn_in_equally_often(prepare):
    prepare.FONTS = tuple(prepare.Font(f"{family}{i}", "printed", family, frozenset("a"), frozenset(), False)
                          for family, files in (("many", 18), ("one", 1)) for i in range(files))
    random.seed(0)
    share = sum(prepare.pick_font("a", "printed", "train", False).family == "one" for _ in range(400)) / 400
    assert 0.4 < share < 0.6


def test_look_alikes_stand_alone_only_in_fonts_that_tell_them_apart(prepare):
    prepare.FONTS, _ = prepare.find_fonts()
    by_name = {Path(f.path).name: f for f in prepare.FONTS}
    assert set("Il") <= by_name["Lato-Regular.ttf"].doubtful and not set("O0") & by_name["Lato-Regular.ttf"].doubtful
    assert not set("O0Il1") & by_name["jetbrains-mono-400.woff2"].doubtful  # a slashed zero, serifs on I and l
    assert prepare.pick_font("Il", prepare.PRINTED, "test", True)  # and yet there are some to test it in
    for split in ("train", "val"):
        assert all("I" not in prepare.pick_font("AI7", prepare.PRINTED, split, True).doubtful for _ in range(50))
    assert any("I" in prepare.pick_font("India", prepare.PRINTED, "train", False).doubtful for _ in range(50))


def test_fonts_are_only_used_for_what_they_draw(prepare):
    prepare.FONTS, _ = prepare.find_fonts()
    by_name = {Path(f.path).name: f for f in prepare.FONTS}
    assert len([f for f in prepare.FONTS if f.kind == prepare.HAND]) >= 24
    assert by_name["DejaVuSans.ttf"].characters == set(prepare.CHARSET)
    assert not set("√π≤≥≠") & by_name["caveat-400.woff2"].characters  # not in the file
    assert not set("abc") & by_name["rock-salt-400.woff2"].characters and "A" in by_name["rock-salt-400.woff2"].characters
    assert not {"BEBAS___.ttf", "Capture_it.ttf", "SEASRN__.ttf"} & set(by_name)  # capitals for lower case
    assert not set("Il") & by_name["CaviarDreams.ttf"].characters  # one shape for both
    assert "≠" not in prepare.survey_font(by_name["Lato-Italic.ttf"].path, prepare.CHARSET)[1]  # a mere stroke


def test_signs_that_a_font_lacks_are_borrowed(prepare):
    """A borrowed sign stands on the line as the lender draws it; all else is the font's own, and held-out fonts keep to themselves."""
    prepare.FONTS, _ = prepare.find_fonts()
    by_name = {Path(f.path).name: f for f in prepare.FONTS}
    borrower = by_name["anton-400.woff2"]
    lender, borrowed = borrower.loan.split(prepare.LOAN)[1:]
    assert set("√≤") <= set(borrowed) <= borrower.characters and "±" not in borrowed and not by_name["DejaVuSans.ttf"].loan
    held_out = {f.path for f in prepare.FONTS if f.held_out}
    assert all((f.loan.split(prepare.LOAN)[1] in held_out) == f.held_out for f in prepare.FONTS if f.loan)
    font, alone, other = (prepare.typeface(name, 40) for name in (borrower.face, borrower.path, lender))

    def drawn(text, font, y=0):
        image = Image.new("L", (300, 120))
        ImageDraw.Draw(image).text((10, 20 + y), text, font=font, fill=255)
        return np.asarray(image)

    assert np.array_equal(drawn("8x", font), drawn("8x", alone)) and font.getmetrics() == alone.getmetrics()
    lower = alone.getmetrics()[0] - other.getmetrics()[0]  # the baselines of both lie so far apart
    assert np.array_equal(drawn("≤", font), drawn("≤", other, lower))
    mixed = drawn("8√8", font)
    first, second = round(alone.getlength("8")), round(alone.getlength("8") + other.getlength("√"))
    assert np.array_equal(mixed[:, :10 + first], drawn("8", font)[:, :10 + first])
    assert mixed[:, 10 + first:10 + second].any() and mixed[:, 10 + second:].any()
    assert font.getlength("8√8") == 2 * alone.getlength("8") + other.getlength("√")
    left, top, right, bottom = font.getbbox("8√8")
    assert mixed[20 + top:20 + bottom, 10 + left:10 + right].sum() == mixed.sum()


@pytest.mark.parametrize("font", ["DejaVuSans.ttf", "handwriting/caveat-400.woff2"])
def test_no_ink_is_clipped(prepare, font):
    """Italics and swashes reach beyond their advance: the picture's left and right columns must be paper."""
    survey = prepare.survey_font(str(ROOT / "myFonts" / font), prepare.CHARSET)
    drawn = 0
    for i in range(60):
        random.seed(i)
        text = random.choice(["fjord", "Qy", "j", "f", "J", "Åg"[1:], "WAVE", "({[]})"])
        image = prepare.draw_line(text, prepare.Font(str(ROOT / "myFonts" / font), prepare.HAND, *survey, False))
        if image is not None:
            drawn += 1
            tones = np.asarray(image).astype(int)
            assert tones.min() < 160 and tones[:, [0, -1]].min() > 130, (i, text)
    assert drawn > 40


def test_lost_ink_is_drawn_again(prepare, monkeypatch):
    """TRDG turned a thin dash until it was in its mask only; the form's rules then found no line to stand under."""
    mask = Image.new("RGB", (60, 32))
    mask.paste((0, 0, 9), (20, 15, 40, 17))
    monkeypatch.setattr(prepare, "trdg_generator", lambda: lambda *_, **__: iter([[(Image.new("RGB", (60, 32), "white"), mask)]]))
    font = prepare.Font(FONT, prepare.PRINTED, "dejavu", frozenset("-"), frozenset(), False)
    monkeypatch.setattr(prepare, "FONTS", (font,))
    assert prepare.draw_text("train", prepare.PRINTED, "-", True, prepare.STYLES[prepare.PRINTED]["form"]) is None


# ---- styles and composed handwriting

@pytest.mark.parametrize("text", ["Form 27", "-", ".", "|"])
@pytest.mark.parametrize("kind", ["printed", "handwriting"])
def test_every_style_shows_its_text(prepare, kind, text):
    """Each finish of a black line on white: a picture with contrast, neither blank nor clipped.

    A lone full stop may fade away; draw_sample draws it again then.
    """
    black = line_image(text, size=30, margin=6)
    for name, style in prepare.STYLES[kind].items():
        faults = []
        for i in range(20):
            random.seed(f"{name} {i}")
            ink = prepare.ink_of(black)
            picture = style.finish(ink, [0, ink.shape[1] // 2, ink.shape[1] - 1]) if style.cells else style.finish(ink)
            assert picture.dtype == np.uint8 and picture.ndim == 2
            faults.append(prepare.fault(load_image(Image.fromarray(picture)).numpy(), "trdg_custom", name))
            assert float(picture.max()) - float(picture.min()) >= 25, (name, i)
        assert sum(map(bool, faults)) <= (8 if text == "." else 0), (name, faults)


def test_every_sign_is_drawn_and_every_hand_keeps_its_text(prepare):
    fake_emnist(Path(prepare.DATASETS_DIR))
    for i, c in enumerate(prepare.SIGNS):
        random.seed(i)
        glyph, below = prepare.sign(c, prepare.random_hand())
        assert np.asarray(glyph).max() > 200 and -30 < below < 20, c
    random.seed(0)
    one, two = prepare.compose("8", "train"), prepare.compose("8 8=88", "train")
    assert two.shape[1] > 3 * one.shape[1] and 0 <= two.min() and two.max() > 0.9
    ink, edges = prepare.compose_cells("A 1", "train")
    assert len(edges) == 4 and ink[:, edges[1] + 2:edges[2] - 1].max() == 0 and ink[:, :edges[1]].max() > 0.9  # the space's field is empty
    assert prepare.draw_composed("train", "é", prepare.PLAIN) is None


def test_one_hand_takes_characters_of_its_own_kind(prepare):
    """Of several characters of EMNIST that one hand may take, the one of its stroke width and slant."""
    rng = np.random.default_rng(0)
    images = np.zeros((80, 28, 28), np.uint8)
    for image in images:  # bars, upright or slanting, thin or thick
        width, slant = rng.integers(2, 9), rng.uniform(-0.4, 0.4)
        for y in range(4, 24):
            x = round(14 - slant * (y - 14) - width / 2)
            image[y, x:x + width] = 255
    write_idx(Path(prepare.DATASETS_DIR) / "emnist" / "EMNIST" / "raw", images, np.full(80, 1))
    looks = prepare.emnist_looks(prepare.DATASETS_DIR, prepare.SEED, "train")
    assert looks[:, 0].max() > 2 * looks[:, 0].min() and looks[:, 1].max() == 20 and looks[:, 2].max() > 0.2
    random.seed(0)
    widths = {}
    for stroke in (0.1, 0.35):
        hand = prepare.Hand(20, stroke, 0.0, 0.0, 0.1)
        glyphs = [prepare.handwritten("1", hand, "train")[0] for _ in range(30)]
        widths[stroke] = np.mean([np.asarray(glyph).sum() / 255 / glyph.height for glyph in glyphs])
    assert widths[0.35] > 1.5 * widths[0.1]


def test_training_rows_alone_are_warped(prepare, monkeypatch, tmp_path):
    """Validation and test rows show fonts and EMNIST characters as they are."""
    fake_emnist(Path(prepare.DATASETS_DIR))
    prepare.find_sources(dict.fromkeys(prepare.SOURCES, 1))
    monkeypatch.setattr(prepare, "WARPED", 1.0)
    warp, warped = prepare.as_by_another, []
    monkeypatch.setattr(prepare, "as_by_another", lambda picture: warped.append(picture.shape) or warp(picture))
    for source, by_hand in dict(trdg_custom=False, synthetic_math=False, emnist_words=True, emnist_math=True, handwriting=True).items():
        for index in (0, 1, 2, 21, 22, 23):  # of 20, 1 is for validation and 2 for the test
            warped.clear()
            _, _, split, _ = prepare.draw_sample(source, tmp_path, index)
            assert bool(warped) == (by_hand and split == "train"), (source, index)


def test_a_warped_line_is_the_same_text(prepare):
    picture = np.asarray(line_image("Hamburg 27", size=30, margin=6))
    random.seed(0)
    ink = 255 - picture.astype(float)
    kept, differ = [], []
    for _ in range(40):
        warped = prepare.as_by_another(picture)
        assert warped.shape == picture.shape and warped.dtype == np.uint8 and warped[:2].min() > 200  # nothing reaches the edge
        kept.append((255 - warped.astype(float)).sum() / ink.sum())
        differ.append(np.abs(warped.astype(float) - picture).sum() / ink.sum())
    assert 0.6 < min(kept) and max(kept) < 1.6 and min(differ) > 0.1 and max(differ) < 2
    assert prepare.as_by_another(np.zeros((20, 3), np.float32)).max() == 0


def test_made_up_words_keep_to_their_split(prepare):
    random.seed(0)
    for split in ("train", "val", "test"):
        made = [prepare.made_up_word(split) for _ in range(100)]
        assert all(prepare.word_split(word) == split and 2 < len(word) < 15 for word in made)
        assert len(set(made)) > 90


# ---- going on, and images of one's own

def test_an_interrupted_run_goes_on(prepare, monkeypatch, capsys):
    """Stopped in the middle: what is drawn stays, is not drawn again, and the end is that of an uninterrupted run."""
    monkeypatch.setattr(prepare, "CHUNK", 5)
    only(prepare, monkeypatch, NUM_TRDG=24, NUM_MATH=12)
    prepare.main()
    whole = contents(prepare.DATASETS_DIR)
    shutil.rmtree(prepare.DATASETS_DIR)
    draw, drawn = prepare.draw_sample, []

    def stopped(source, folder, index):
        if len(drawn) == 18:
            raise KeyboardInterrupt
        drawn.append(index)
        return draw(source, folder, index)

    monkeypatch.setattr(prepare, "draw_sample", stopped)
    with pytest.raises(SystemExit, match="run the script again"):
        prepare.main()
    monkeypatch.setattr(prepare, "draw_sample", draw)
    capsys.readouterr()
    prepare.main()
    assert "36 pictures" in capsys.readouterr().out
    assert contents(prepare.DATASETS_DIR) == whole
    assert not (Path(prepare.DATASETS_DIR) / ".drawing").exists()


def test_constants_changed_back_find_their_own_pictures(prepare, monkeypatch):
    """What a stopped run with other constants has drawn must not come to lie under the labels of the former."""
    only(prepare, monkeypatch, NUM_TRDG=24)
    prepare.main()
    whole = contents(prepare.DATASETS_DIR)
    draw = prepare.draw_sample

    def stopped(source, folder, index):
        if index == 12:
            raise KeyboardInterrupt
        return draw(source, folder, index)

    monkeypatch.setattr(prepare, "SEED", 1)
    monkeypatch.setattr(prepare, "draw_sample", stopped)
    with pytest.raises(SystemExit, match="as they were"):
        prepare.main()
    monkeypatch.setattr(prepare, "SEED", 0)
    monkeypatch.setattr(prepare, "draw_sample", draw)
    prepare.main()
    assert contents(prepare.DATASETS_DIR) == whole


def test_only_what_changed_is_drawn_again(prepare, monkeypatch, capsys):
    only(prepare, monkeypatch, NUM_TRDG=20, NUM_HANDWRITING=20)

    def new():
        capsys.readouterr()
        prepare.main()
        return int(capsys.readouterr().out.split(" of them new")[0].split()[-1])

    folder = Path(prepare.DATASETS_DIR)
    assert new() == 40 and new() == 0
    monkeypatch.setattr(prepare, "NUM_TRDG", 25)
    assert new() == 5
    (folder / "handwriting" / "00003.png").unlink()
    assert new() == 1
    (folder / "trdg_custom" / "manifest.json").write_text("{")
    assert new() == 25
    find = prepare.find_fonts
    monkeypatch.setattr(prepare, "find_fonts", lambda: ([f for f in find()[0] if "caveat" not in f.path], []))
    assert new() == 20
    monkeypatch.setattr(prepare, "WARPED", 0)
    assert new() == 20
    monkeypatch.setattr(prepare, "STYLED", 0)
    assert new() == 45
    assert set(read_labels(folder / "data.csv")["style"]) == {"plain"}


def test_images_of_ones_own(prepare, monkeypatch, capsys):
    """Good rows join data.csv as source custom; bad ones are left out by name; nothing of the folder is touched."""
    only(prepare, monkeypatch, NUM_TRDG=20)
    folder = Path(prepare.DATASETS_DIR) / "custom"
    write_csv(folder / "scans", [f"A-{i}" for i in range(30)])
    line_image("new").save(folder / "new.png")
    (folder / "broken.png").write_bytes(b"no picture")
    labels = [(f"scans\\{i}.png", f"A-{i}") for i in range(30)] + [("new.png", "new"), ("broken.png", "x"), ("missing.png", "y"), ("new.png", "")]
    (folder / "labels.csv").write_text("image_path,label\n" + "\n".join(map(",".join, labels)) + "\n")
    prepare.main()
    rows = read_labels(Path(prepare.DATASETS_DIR) / "data.csv")
    own = rows[rows.source == "custom"]
    assert len(own) == 31 and len(rows) == 51 and set(own.split) == {"train", "val", "test"} and set(own["style"]) == {"custom"}
    assert all((Path(prepare.DATASETS_DIR) / path).exists() for path in own.image_path)
    message = capsys.readouterr().out
    assert "broken.png" in message and "missing.png" in message and "empty label" in message and "3 of 34 rows" in message
    (folder / "labels.csv").unlink()
    prepare.main()
    assert "no labels.csv" in capsys.readouterr().out
    assert "custom" not in set(read_labels(Path(prepare.DATASETS_DIR) / "data.csv").source)


@pytest.mark.parametrize("wrong", ["blank", "clipped", "cannot be read"])
def test_the_check_opens_pictures_and_names_the_bad_one(prepare, wrong, tmp_path):
    folder = Path(prepare.DATASETS_DIR) / "trdg_custom"
    folder.mkdir(parents=True)
    rows = pd.DataFrame(dict(image_path=["trdg_custom/00000.png"], label="HHH", source="trdg_custom", style="plain"))
    line_image("HHH").save(folder / "00000.png")
    prepare.check_sample(rows)
    if wrong == "blank":
        Image.new("L", (60, 30), 255).save(folder / "00000.png")
    elif wrong == "clipped":
        image = line_image("HHH")
        last = np.flatnonzero(np.asarray(image).min(0) < 50)[-1]  # column of the last stem
        image.crop((0, 0, int(last) + 1, image.height)).save(folder / "00000.png")
    else:
        (folder / "00000.png").write_bytes((folder / "00000.png").read_bytes()[:100])
    with pytest.raises(SystemExit, match=f"00000.png.*{wrong}"):
        prepare.check_sample(rows)


# ---- bad input

@pytest.mark.parametrize("case, complaint", [
    ("nothing", "every NUM_ constant"), ("repeated character", "more than once"), ("read-only", "cannot write to"),
    ("impossible", "Set NUM_TRDG = 0")])
def test_one_line_says_what_to_do(prepare, monkeypatch, tmp_path, case, complaint):
    changes = {"nothing": dict(NUM_TRDG=0), "repeated character": dict(CHARSET="aa"),
               "read-only": dict(DATASETS_DIR=str(tmp_path / "file" / "datasets")), "impossible": dict(CHARSET="≠", FONTS=())}[case]
    (tmp_path / "file").write_text("in the way")
    only(prepare, monkeypatch, NUM_TRDG=24)
    for name, value in changes.items():
        monkeypatch.setattr(prepare, name, value)
    if case == "impossible":
        monkeypatch.setattr(prepare, "NUM_WORKERS", 2)  # the complaint of a worker must reach the user
        monkeypatch.setattr(prepare, "CHUNK", 10)
        monkeypatch.setattr(prepare, "find_fonts", lambda: ([prepare.Font(FONT, "printed", f, frozenset("≠"), frozenset(), f == "b") for f in "ab"], []))
    with pytest.raises(SystemExit, match=complaint) as stop:
        prepare.main()
    assert "\n" not in str(stop.value)


def test_no_fonts_of_ones_own(prepare, monkeypatch, tmp_path, capsys):
    """An empty font folder: said so, and TRDG's own fonts are drawn in."""
    (tmp_path / "no fonts").mkdir()
    monkeypatch.setattr(prepare, "FONTS_DIR", str(tmp_path / "no fonts"))
    only(prepare, monkeypatch, NUM_TRDG=24, NUM_MATH=24, NUM_HANDWRITING=24)
    prepare.main()
    message = capsys.readouterr().out
    assert f"{tmp_path / 'no fonts'} holds no font files" in message
    assert set(read_labels(Path(prepare.DATASETS_DIR) / "data.csv").source) == {"trdg_custom", "synthetic_math", "handwriting"}


def test_a_broken_font_is_left_out_by_name(prepare, monkeypatch, tmp_path):
    folder = tmp_path / "fonts"
    shutil.copytree(ROOT / "myFonts", folder)
    (folder / "broken ü.ttf").write_bytes(b"no font")
    monkeypatch.setattr(prepare, "FONTS_DIR", str(folder))
    fonts, notes = prepare.find_fonts()
    assert len(notes) == 1 and "broken ü.ttf" in notes[0] and len(fonts) > 24


def test_a_full_disk_leaves_the_former_data(prepare, monkeypatch):
    only(prepare, monkeypatch, NUM_TRDG=24)
    prepare.main()
    before = contents(prepare.DATASETS_DIR)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(prepare, "SEED", 1)
    with pytest.raises(SystemExit, match="No space left on device"):
        prepare.main()
    assert contents(prepare.DATASETS_DIR) == before
