"""The drawn data: determinism, splits, fonts, EMNIST, bad input."""
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import FONT, ROOT, fake_emnist, write_idx
from crnn import frames_needed, load_image, num_frames, read_labels


def contents(folder):
    """Every file below a folder but EMNIST's, as bytes."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and "raw" not in p.parts}


def test_all_sources(prepare, capsys):
    fake_emnist(Path(prepare.DATASETS_DIR))
    prepare.main()
    rows = read_labels(Path(prepare.DATASETS_DIR) / "data.csv")
    assert list(rows.columns) == ["image_path", "label", "source", "split"]
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
    assert "synthetic_math" in capsys.readouterr().out


@pytest.mark.parametrize("method, sources", [
    ("spawn", 2), pytest.param("fork", 5, marks=pytest.mark.skipif(os.name == "nt", reason="no fork"))])
def test_workers_change_nothing(prepare, method, sources, monkeypatch, tmp_path):
    """One process against two, whose constants differ from the script's defaults, so that a worker must have been told them."""
    fake_emnist(Path(prepare.DATASETS_DIR))
    monkeypatch.setattr(prepare, "SEED", 7)
    monkeypatch.setattr(prepare, "NUM_TRDG", 70)  # more than the chunk that one worker takes
    if sources == 2:  # spawned workers import all anew, which takes seconds for every source
        for name in ("NUM_MATH", "NUM_EMNIST", "NUM_HANDWRITING"):
            monkeypatch.setattr(prepare, name, 0)
    prepare.main()
    one = contents(prepare.DATASETS_DIR)
    shutil.copytree(Path(prepare.DATASETS_DIR) / "emnist", tmp_path / "two" / "emnist")
    for name, value in dict(DATASETS_DIR=str(tmp_path / "two"), NUM_WORKERS=2, START_METHOD=method).items():
        monkeypatch.setattr(prepare, name, value)
    prepare.main()
    assert len(one) == 70 + (sources - 1) * 24 + 2 and contents(tmp_path / "two") == one


def test_two_machines_draw_what_one_does(prepare, monkeypatch, tmp_path):
    fake_emnist(Path(prepare.DATASETS_DIR))
    monkeypatch.setattr(prepare, "NUM_HANDWRITING", 0)
    prepare.main()
    one = contents(prepare.DATASETS_DIR)
    shutil.copytree(Path(prepare.DATASETS_DIR) / "emnist", tmp_path / "two" / "emnist")
    constants = {name: value for name, value in vars(prepare).items() if name.startswith("NUM_")}
    constants |= dict(FONTS_DIR=prepare.FONTS_DIR, DATASETS_DIR=str(tmp_path / "two"))
    (tmp_path / "run.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport prepare_ocr_dataset\n"
                                     f"vars(prepare_ocr_dataset).update({constants!r})\nprepare_ocr_dataset.main()\n")
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "run.py")],
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert contents(tmp_path / "two") == one and run.stdout.count("labels in") == 1
    assert not (tmp_path / "two" / ".drawing").exists()


def test_another_seed_draws_other_pictures(prepare, monkeypatch):
    for name in ("NUM_MATH", "NUM_EMNIST", "NUM_EMNIST_WORDS", "NUM_HANDWRITING"):
        monkeypatch.setattr(prepare, name, 0)
    prepare.main()
    first = contents(prepare.DATASETS_DIR)
    monkeypatch.setattr(prepare, "SEED", 1)
    prepare.main()
    assert contents(prepare.DATASETS_DIR)["data.csv"] != first["data.csv"]


def test_fewer_pictures_leave_no_old_ones_behind(prepare, monkeypatch):
    for name in ("NUM_MATH", "NUM_EMNIST", "NUM_EMNIST_WORDS"):
        monkeypatch.setattr(prepare, name, 0)
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
    for name in ("NUM_TRDG", "NUM_MATH", "NUM_EMNIST_WORDS", "NUM_HANDWRITING"):
        monkeypatch.setattr(prepare, name, 0)
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
        assert 0.1 < len(families[True]) / len(families[True] | families[False]) < 0.2 and not families[True] & families[False]
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


# ---- bad input

@pytest.mark.parametrize("case, complaint", [
    ("nothing", "every NUM_ constant"), ("repeated character", "more than once"), ("read-only", "cannot write to"),
    ("impossible", "Set NUM_TRDG = 0")])
def test_one_line_says_what_to_do(prepare, monkeypatch, tmp_path, case, complaint):
    changes = {"nothing": dict(NUM_TRDG=0), "repeated character": dict(CHARSET="aa"),
               "read-only": dict(DATASETS_DIR=str(tmp_path / "file" / "datasets")), "impossible": dict(CHARSET="≠", FONTS=())}[case]
    (tmp_path / "file").write_text("in the way")
    for name, value in dict(dict.fromkeys(["NUM_MATH", "NUM_EMNIST", "NUM_EMNIST_WORDS", "NUM_HANDWRITING"], 0), **changes).items():
        monkeypatch.setattr(prepare, name, value)
    if case == "impossible":
        monkeypatch.setattr(prepare, "NUM_WORKERS", 2)  # the complaint of a worker must reach the user
        monkeypatch.setattr(prepare, "find_fonts", lambda: ([prepare.Font(FONT, "printed", f, frozenset("≠"), frozenset(), f == "b") for f in "ab"], []))
    with pytest.raises(SystemExit, match=complaint) as stop:
        prepare.main()
    assert "\n" not in str(stop.value)


def test_no_fonts_of_ones_own(prepare, monkeypatch, tmp_path, capsys):
    """An empty font folder: said so, and TRDG's own fonts are drawn in."""
    (tmp_path / "no fonts").mkdir()
    monkeypatch.setattr(prepare, "FONTS_DIR", str(tmp_path / "no fonts"))
    for name in ("NUM_EMNIST", "NUM_EMNIST_WORDS"):
        monkeypatch.setattr(prepare, name, 0)
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
    for name in ("NUM_MATH", "NUM_EMNIST", "NUM_EMNIST_WORDS", "NUM_HANDWRITING"):
        monkeypatch.setattr(prepare, name, 0)
    prepare.main()
    before = contents(prepare.DATASETS_DIR)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(prepare, "SEED", 1)
    with pytest.raises(SystemExit, match="No space left on device"):
        prepare.main()
    assert contents(prepare.DATASETS_DIR) == before
