"""UNIPEN's format in miniature, with what goes wrong in it; its download; signs it lacks."""

import functools
import hashlib
import json
import sys
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

import prepare_ocr_dataset as prepare  # noqa: E402
from crnn import split_of  # noqa: E402

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
"""


def write_unipen(root, contributor="acme"):
    """Write the miniature below root, as a contributor's. Returns root."""
    files = {f"include/{contributor}/ink.dat": INK.replace("acme", contributor)}
    files[f"data/1b/{contributor}/a.dat"] = CHARACTERS.replace("acme", contributor)
    files[f"data/7/{contributor}/set/a.dat"] = WORDS.replace("acme", contributor)
    for i, (name, text) in enumerate(files.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        line_end = ["\n", "\r\n", "\r"][i % 3]
        (root / name).write_text(text, encoding="latin-1", newline=line_end)
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """DATASETS_DIR; UNIPEN goes to its unipen/."""
    monkeypatch.setattr(prepare, "DATASETS_DIR", str(tmp_path / "datasets"))
    monkeypatch.setattr(prepare, "NUM_WORKERS", 2)
    for function in (prepare.unipen_is_there, prepare.load_strokes, prepare.people):
        function.cache_clear()
    yield tmp_path / "datasets"
    for function in (prepare.unipen_is_there, prepare.load_strokes, prepare.people):
        function.cache_clear()


def read_strokes():
    """label -> (writer, strokes from the top left corner on) of load_strokes."""
    samples, found = prepare.load_strokes(), {}
    for n, (writer, label) in enumerate(zip(samples.writers, samples.labels)):
        steps = samples.steps[samples.points[n] : samples.points[n + 1]]
        ends = np.cumsum(samples.strokes[n])
        found[label] = writer, [s.tolist() for s in np.split(steps.cumsum(0), ends)[:-1]]
    return found


def test_samples_are_cut_out_turned_and_brought_to_one_size(folder, capsys):
    write_unipen(folder / "unipen" / "CDROM" / "train")
    assert prepare.unipen_is_there()
    samples = read_strokes()
    assert set(samples) == {"A", "l", "\\", '"', "Vl"}
    # Of whoever wrote in two sessions; 128 high, y down, a step across half of one down.
    assert samples["A"] == ("acme/Ann_Smith", [[[0, 0], [13, 128]], [[90, 0], [90, 128]]])
    assert samples["l"][1] == [[[0, 0], [0, 128]]]  # the point in the middle of a line is dropped
    assert samples["\\"][1] == [[[0, 0], [0, 64]]]  # from its second point on
    assert samples['"'][1] == [[[0, 0], [13, 128]], [[90, 0], [90, 128]]]
    said = capsys.readouterr().out
    assert "5 samples kept" in said and "1 unlike their label" in said
    assert "2 ink files missing" in said and "2 in no such place" in said


def test_a_person_is_on_one_side_of_the_split_whoever_collected_the_writing(folder):
    names = (f"writer{i}" for i in range(10_000))
    sides = {name: [split_of(f"{c}/{name}") for c in ("acme", "beta")] for name in names}
    held_out = next(n for n in sides if split_of(n) == "val" and sides[n] == ["train", "train"])
    for i, contributor in enumerate(("acme", "beta"), start=1):
        root = write_unipen(folder / "unipen", contributor)
        ink = root / "include" / contributor / "ink.dat"
        ink.write_text(ink.read_text().replace("Ann_Smith_2", f"{held_out}_{i}"))
    assert prepare.unipen_is_there()
    assert [len(prepare.people(split).writers) for split in ("train", "val", "test")] == [0, 2, 0]


def test_an_odd_resolution_is_no_reason_to_stop(folder):
    ink = write_unipen(folder / "unipen") / "include" / "acme" / "ink.dat"
    ink.write_text(ink.read_text().replace("INCH 100", "INCH unknown"))
    assert prepare.unipen_is_there()
    assert "A" in prepare.load_strokes().labels


def test_a_contributor_who_counts_otherwise_is_left_out(folder):
    write_unipen(folder / "unipen")
    write_unipen(folder / "unipen", contributor="lou")
    assert prepare.unipen_is_there()
    assert set(prepare.load_strokes().writers) == {"acme/Ann_Smith"}


def test_the_file_is_the_same_whatever_the_number_of_workers(tmp_path, folder, monkeypatch):
    for contributor in ("acme", "beta", "gamma"):
        root = write_unipen(tmp_path / "original", contributor)
    for workers in (1, 3):
        monkeypatch.setattr(prepare, "NUM_WORKERS", workers)
        prepare.parse_unipen(root, tmp_path / f"{workers}.npz")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "3.npz").read_bytes()


def test_no_more_of_a_label_than_are_worth_keeping(folder):
    root = write_unipen(folder / "unipen")
    segments = '.SEGMENT CHARACTER 2 OK "l"\n' * 20
    (root / "data/1b/acme/more.dat").write_text(f".INCLUDE acme/ink.dat\n{segments}")
    assert prepare.unipen_is_there()
    assert prepare.load_strokes().labels.count("l") == prepare.PER_CHARACTER


LINE = np.float32([[0, 0], [60, 100], [120, 0]])


@pytest.mark.parametrize(
    ("strokes", "label", "believed"),
    [
        ([LINE], "vow", True),
        ([LINE], "v ow", False),  # where is the space?
        ([LINE, LINE + [170, 0]], "v ow", True),
        ([LINE, LINE + [300, 0]], "vow", False),  # a word that falls apart
        ([LINE], "v" * 20, False),  # too many for its width
        ([LINE * [1, 4]], "vow", False),  # two lines, or none
        ([LINE], "v", True),
        ([LINE * [4, 1]], "v", False),  # the pen trailed on
        ([LINE * [4, 1]], "-", True),
        ([LINE], "=", False),  # half of it
        ([LINE, LINE + [0, 50]], "=", True),
    ],
)
def test_ink_must_be_able_to_be_its_label(strokes, label, believed):
    assert prepare.believable(strokes, label) == believed


def test_smoothing_takes_the_stairs_of_a_coarse_tablet_and_leaves_the_ends():
    stairs = np.float32([[10 * ((i + 1) // 2), 10 * (i // 2)] for i in range(21)])
    smooth = prepare.smooth(stairs, 10)
    np.testing.assert_allclose(smooth[[0, -1]], stairs[[0, -1]])
    off = [np.abs(np.subtract(*s[3:-3].T) - 5).max() for s in (stairs, smooth)]
    assert off[1] < off[0] / 2
    assert prepare.smooth(stairs, 1) is stairs  # of a fine tablet, they are what was written


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that answers like Zenodo, with an archive of the miniature; yields its record."""
    site, archive = tmp_path / "site", tmp_path / "site" / "content"
    write_unipen(tmp_path / "CDROM" / "train_r01_v07")
    site.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "CDROM", "unipen/CDROM")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}"
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        file = {"key": "unipen-CDROM.tgz", "links": {"self": f"{url}/content"}}
        record = {"files": [file | {"checksum": f"md5:{md5}"}]}
        (site / "record").write_text(json.dumps(record))
        monkeypatch.setattr(prepare, "UNIPEN_RECORD", f"{url}/record")
        yield site / "record"
        http.shutdown()


def test_unipen_is_downloaded_and_parsed_once(server, folder):
    assert prepare.unipen_is_there()
    assert "Vl" in prepare.load_strokes().labels
    server.unlink()
    prepare.unipen_is_there.cache_clear()
    assert prepare.unipen_is_there()  # without asking again


@pytest.mark.parametrize("damage", ["checksum", "record", "server", "files"])
def test_a_failed_download_is_one_line_that_says_what_to_do(server, folder, damage, capsys):
    text = server.read_text()
    damaged = {"checksum": text.replace("md5:", "md5:0"), "record": text[:40]}
    (folder / "unipen").mkdir(parents=True)
    for name in ["data", "include"] if damage == "files" else []:  # unpacked, but nothing in them
        (folder / "unipen" / name).mkdir()
    server.write_text(damaged[damage]) if damage in damaged else server.unlink()
    assert not prepare.unipen_is_there()
    said = capsys.readouterr().out.strip().split("\n")[-1]
    assert "UNIPEN" in said and (folder / "unipen").as_posix() in said


# Strokes of the characters that signs are put together of, 100 high
PARTS = {
    "=": [[[0, 30], [60, 30]], [[0, 60], [60, 60]]],
    "/": [[[40, 0], [0, 100]]],
    "+": [[[0, 50], [100, 50]], [[50, 0], [50, 100]]],
    "-": [[[0, 0], [40, 0]]],
    "<": [[[60, 0], [0, 40], [60, 80]]],
    ">": [[[0, 0], [60, 40], [0, 80]]],
    ".": [[[0, 0]]],
    "x": [[[0, 0], [50, 50]], [[50, 0], [0, 50]]],
    "V": [[[0, 0], [30, 100], [60, 0]]],
    "|": [[[0, 0], [0, 100]]],
}


@pytest.fixture
def writer(monkeypatch):
    """Somebody who has written PARTS: character -> the only number of its samples."""
    strokes = [[np.float32(stroke) for stroke in strokes] for strokes in PARTS.values()]
    monkeypatch.setattr(prepare, "strokes_of", lambda number: strokes[number])
    return {c: [number] for number, c in enumerate(PARTS)}


@pytest.mark.parametrize("sign", prepare.SIGNS)
def test_a_sign_is_put_together_by_the_first_who_can(sign, writer):
    strokes = prepare.put_together(sign, [{}, {"e": [0]}, writer])
    assert all(s.dtype == np.float32 and s.ndim == 2 and s.shape[1] == 2 for s in strokes)
    assert 0 < np.ptp(np.concatenate(strokes), axis=0).max() < 400
    assert prepare.put_together(sign, [{}, {"e": [0]}]) is None


def test_the_parts_of_signs_stand_where_they_belong(writer):
    def middle(stroke):
        return (stroke.min(0) + stroke.max(0)) / 2  # (x, y), y down

    for _ in range(50):
        for sign in "±≤≥":
            *above, bar = prepare.put_together(sign, [writer])
            assert middle(bar)[1] > max(middle(stroke)[1] for stroke in above)
        bar, upper, lower = prepare.put_together("÷", [writer])
        assert middle(upper)[1] < middle(bar)[1] < middle(lower)[1]
        first, second, slash = prepare.put_together("≠", [writer])
        assert slash[:, 1].min() < middle(first)[1] < middle(second)[1] < slash[:, 1].max()
        v, bar = prepare.put_together("√", [writer])
        assert v[0, 1] > v[-1, 1] and middle(bar)[0] > middle(v)[0]
        bar, left, right = prepare.put_together("π", [writer])
        assert middle(bar)[1] < middle(left)[1] and middle(left)[0] < middle(right)[0]
