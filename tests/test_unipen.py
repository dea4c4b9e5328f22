"""UNIPEN: its format in miniature, with what goes wrong in it; and its download."""

import functools
import hashlib
import json
import os
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from crnn import split_of

INK = """\
.VERSION 1.0
.COMMENT Mr. Smith's tablet; .PEN_DOWN in a comment is none
.X_POINTS_PER_INCH 200
.Y_POINTS_PER_INCH 100
.COORD X Y T
.WRITER_ID Ann_Smith_2
.INCLUDE acme/nowhere.doc
.PEN_DOWN
0 100 1
20 0 2
.PEN_UP
20 0 3
140 100 4
.PEN_DOWN
.PEN_UP
.PEN_DOWN
140 100 5
140 50 6
140 0 7.PEN_UP
140 0 8
.PEN_DOWN
60 100 9
oops 0 10
"""
# Components: 0 falls to the right, 1 is not ink, 2 falls straight, 3 is not ink, 4 is damaged.
CHARACTERS = r"""
.VERSION 1.0
.INCLUDE acme/ink.dat
.SEGMENT CHARACTER 0-2 OK "A"
.SEGMENT CHARACTER   2 ? "l"
.SEGMENT CHARACTER 2:1-2:2 ? "\\"
.SEGMENT CHARACTER 0:0,2 ? "\""
.SEGMENT CHARACTER 0 BAD "B"
.SEGMENT CHARACTER 0 OK "\@"
.SEGMENT CHARACTER 4 OK "C"
.SEGMENT CHARACTER 9 OK "D"
.SEGMENT CHARACTER 2 OK "="
.SEGMENT CHARACTER without a place
"""
WORDS = """
.INCLUDE acme/ink.dat
.SEGMENT TEXT 0-2 OK "V"
.SEGMENT TEXT 0-2 OK "@ remark"
.SEGMENT TEXT 0-2 OK "Vl"
.SEGMENT TEXT 0-2 OK "V l l"
.SEGMENT TEXT 0-2 OK "Vl/Vl/Vl/Vl"
"""


def write_unipen(root, contributor="acme", **changes):
    """Write the miniature below root, as a contributor's, some words changed. Returns root."""
    files = {f"include/{contributor}/ink.dat": INK, f"data/1b/{contributor}/a.dat": CHARACTERS}
    files[f"data/7/{contributor}/set/a.dat"] = WORDS
    for i, (name, text) in enumerate(files.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        for old, new in dict(acme=contributor, **changes).items():
            text = text.replace(old, new)
        line_end = ["\n", "\r\n", "\r"][i % 3]
        (root / name).write_text(text, encoding="latin-1", newline=line_end)
    return root


@pytest.fixture
def folder(prepare):
    """Where UNIPEN goes."""
    return Path(prepare.DATASETS_DIR) / "unipen"


def test_samples_are_cut_out_and_brought_to_one_size(prepare, folder, tmp_path, capsys):
    place = write_unipen(folder / "CDROM" / "train")
    if os.name == "posix":  # linked to from there
        place.parent.rename(tmp_path / "elsewhere")
        (folder / "CDROM").symlink_to(tmp_path / "elsewhere")
    assert prepare.fetch(prepare.STROKES)
    samples = prepare.load_strokes()
    strokes = {s.label: [stroke.tolist() for stroke in prepare.strokes_of(s)] for s in samples}
    # 128 high, y down, a step across half of one down
    assert len(samples) == 5 and strokes == {
        "A": [[[0, 0], [13, 128]], [[90, 0], [90, 128]]],
        "l": [[[0, 0], [0, 128]]],  # the point in the middle of a line is dropped
        "\\": [[[0, 0], [0, 64]]],  # from its second point on
        '"': [[[0, 0], [13, 128]], [[90, 0], [90, 128]]],
        "Vl": [[[0, 0], [13, 128]], [[90, 0], [90, 128]]],
    }
    assert {s.writer for s in samples} == {"acme/Ann_Smith"}  # who wrote in two sessions
    output = capsys.readouterr().out
    for skipped in ("3 unlike their label", "2 ink files missing", "2 in no such place"):
        assert skipped in output


def test_a_person_is_on_one_side_of_the_split_whoever_collected_it(prepare, folder, tmp_path):
    """And the parsed file is the same whatever the number of workers."""
    names = (f"writer{i}" for i in range(10_000))
    sides = {name: [split_of(f"{c}/{name}") for c in ("acme", "beta")] for name in names}
    held_out = next(n for n in sides if split_of(n) == "val" and sides[n] == ["train", "train"])
    for i, contributor in enumerate(("acme", "beta"), start=1):
        write_unipen(folder, contributor, Ann_Smith_2=f"{held_out}_{i}")
    assert prepare.fetch(prepare.STROKES)
    assert [len(prepare.people(split).writers) for split in ("train", "val", "test")] == [0, 2, 0]
    prepare.set(NUM_WORKERS=3)
    prepare.parse_unipen(folder, tmp_path / "3.npz")
    assert (folder / "strokes.npz").read_bytes() == (tmp_path / "3.npz").read_bytes()


def test_whom_and_what_to_leave_out(prepare, folder):
    """A contributor who counts otherwise, and more of the same; an odd resolution stops nothing."""
    write_unipen(folder, "lou")
    write_unipen(folder, "beta", **{"INCH 100": "INCH unknown"})
    segments = '.SEGMENT CHARACTER 2 OK "l"\n' * 20
    (folder / "data/1b/beta/more.dat").write_text(f".INCLUDE beta/ink.dat\n{segments}")
    assert prepare.fetch(prepare.STROKES)
    samples = prepare.load_strokes()
    assert {s.writer for s in samples} == {"beta/Ann_Smith"}
    assert [s.label for s in samples].count("l") == prepare.PER_CHARACTER


@pytest.fixture
def server(prepare, tmp_path):
    """A server that answers like Zenodo, with an archive of the miniature; yields its record."""
    site, archive = tmp_path / "site", tmp_path / "site" / "content"
    write_unipen(tmp_path / "CDROM" / "train_r01_v07")
    site.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "CDROM", "unipen/CDROM")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, args=[0.02], daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}"
        file = dict(key="unipen-CDROM.tgz", links=dict(self=f"{url}/content"))
        file["checksum"] = f"md5:{hashlib.md5(archive.read_bytes()).hexdigest()}"
        (site / "record").write_text(json.dumps(dict(files=[file])))
        prepare.set(UNIPEN_RECORD=f"{url}/record")
        yield site / "record"
        http.shutdown()


def test_unipen_is_downloaded_and_parsed_once(prepare, server):
    assert prepare.fetch(prepare.STROKES)
    assert "Vl" in [sample.label for sample in prepare.load_strokes()]
    server.unlink()
    prepare.fetch.cache_clear()
    prepare.load_strokes.cache_clear()
    assert prepare.fetch(prepare.STROKES)  # without asking again


@pytest.mark.parametrize("damage", ["checksum", "record", "server", "files", "strokes"])
def test_a_failed_download_says_what_to_do(prepare, server, folder, damage, capsys):
    text = server.read_text()
    damaged = dict(checksum=text.replace("md5:", "md5:0"), record=text[:40])
    for name in ["data", "include"] if damage == "files" else []:  # unpacked, but nothing in them
        (folder / name).mkdir(parents=True)
    server.write_text(damaged[damage]) if damage in damaged else server.unlink()
    if damage == "strokes":
        folder.mkdir(parents=True)
        (folder / "strokes.npz").write_bytes(b"PK\x03\x04 cut short")
    assert not prepare.fetch(prepare.STROKES)
    line = capsys.readouterr().out.strip().split("\n")[-1]
    assert "UNIPEN" in line and folder.as_posix() in line
