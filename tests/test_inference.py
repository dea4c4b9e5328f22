"""Reading: from Python, from the command line, and the three scripts in sequence."""

import io
import json
import multiprocessing
import os
import re
import runpy
import shutil
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CHARSET, FORK, ROOT, WEIGHTS, contents, fake_emnist, line_image, write_csv
from PIL import Image

import crnn
from crnn import CRNN, Charset, InputError, load_checkpoint, save_checkpoint


@pytest.fixture
def checkpoint(infer):
    """An untrained network: what it reads is nonsense, how it is reported is not."""
    save_checkpoint(infer.MODEL_PATH, CRNN(Charset(CHARSET), (8, 16, 24, 32), 16))
    return Path(infer.MODEL_PATH)


@pytest.fixture
def line(tmp_path, checkpoint):
    """The path of an image of one line, with a model to read it."""
    line_image("Rg7").save(tmp_path / "a b ü.png")
    return str(tmp_path / "a b ü.png")


def predictions(infer):
    """PREDICTIONS_CSV, all of it strings."""
    return pd.read_csv(infer.PREDICTIONS_CSV, dtype=str, keep_default_na=False)


# ---- reading
def test_recognize_takes_paths_images_and_arrays(infer, checkpoint, line, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"bad")
    image = line_image("Rg7")
    images = [Path(line), line, image, np.asarray(image), tmp_path / "bad.png", line_image("wider")]
    infer.set(CHUNK=4)
    *same, bad, other = infer.recognize(images, checkpoint)
    assert bad is None
    assert "bad.png" in capsys.readouterr().err
    assert len({reading.text for reading in same}) == 1
    assert 0 <= other.confidence <= 1
    for model in (load_checkpoint(checkpoint), str(checkpoint), None):
        assert infer.recognize([line], model)[0].text == same[0].text
    assert infer.recognize([], checkpoint) == []
    for single in (line, image, np.asarray(image), np.stack([image] * 3, 2)):  # no list
        assert [reading.text for reading in infer.recognize(single)] == [same[0].text]
    assert len(infer.recognize(np.stack([image] * 6))) == 6
    assert infer.recognize(iter([line]), lexicon=np.array(["x"]))[0].text == "x"
    assert infer.recognize(None) == infer.recognize(5) == [None]  # cv2.imread of a missing file
    assert len(infer.recognize(torch.zeros(3, 32, 64))) == 1
    content = torch.frombuffer(bytearray(Path(line).read_bytes()), dtype=torch.uint8)
    assert infer.recognize(content)[0].text == same[0].text  # as torchvision.io.read_file has it
    damaged = Path(line).read_bytes()[:150]
    pages = (Image.open(io.BytesIO(content)) for content in (damaged, Path(line).read_bytes()))
    assert [reading and reading.text for reading in infer.recognize(pages)] == [None, same[0].text]
    assert infer.recognize([line], lexicon=map(str, range(3)))[0].text in "012"


def test_an_iterator_may_yield_one_object_again_and_again(infer, shipped):
    pages = [np.array(line_image(text).resize((64, 32))) for text in ("12", "34", "56")]
    tensor, image, stream = torch.zeros(32, 64), Image.new("L", (64, 32)), io.BytesIO()

    def as_stream(page):
        stream.seek(0)
        Image.fromarray(page).save(stream, "PNG")
        return stream

    for refill in (
        lambda page: tensor.copy_(torch.from_numpy(page)),
        lambda page: image.paste(Image.fromarray(page)) or image,
        as_stream,
    ):
        readings = infer.recognize(map(refill, pages), shipped)
        assert [reading.text for reading in readings] == ["12", "34", "56"]


def test_reading_changes_no_model_that_learns(infer, checkpoint, line):
    model = load_checkpoint(checkpoint, learn=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert infer.recognize(line, model)[0].text == infer.recognize(line)[0].text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_readings_are_kept_when_nobody_reads_what_is_printed(infer, line):
    show = Mock(side_effect=BrokenPipeError)  # as after | head
    infer.set(show=show)
    infer.main([line])
    assert len(predictions(infer)) == show.call_count == 1


def test_images_folders_and_csv_are_read_into_rows_and_json_lines(infer, line, tmp_path, capsys):
    labels, folder = ["cat", "NA", "007", "it's"], tmp_path / "my forms"
    path = write_csv(folder, labels, name="own.csv")
    line_image("single").save(tmp_path / "single.PNG")
    (tmp_path / "bad.png").write_bytes(b"bad")
    infer.set(PREDICTIONS_JSONL=str(tmp_path / "predictions.jsonl"), MIN_CONFIDENCE=0)
    files = tmp_path / "bad.png", tmp_path / "single.PNG", folder, path
    assert infer.main(list(map(str, files))) == 1  # since one is bad
    output, rows = capsys.readouterr().out, predictions(infer)
    assert list(rows) == infer.COLUMNS
    assert list(rows.label) == [""] * 5 + labels
    assert list(rows.source) == [""] * 5 + ["custom"] * 4
    assert re.search(r"^custom +4 ", output, re.M)  # scored by source
    assert "9 images read, 0 below MIN_CONFIDENCE = 0, 1 skipped" in output
    assert "please check" not in output  # the README shows one that is marked
    block = r"^Image: (.+)\nGround Truth: (.+)\nPredicted   : .*  \(confidence \d\.\d\d.*\)\n\n"
    shown = [((folder / f"{i}.png").as_posix(), label) for i, label in enumerate(labels)]
    assert re.findall(block, output, re.M) == shown
    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    records = list(map(json.loads, text.splitlines()))
    for column in ("label", "prediction"):
        assert [record[column] for record in records] == list(rows[column])
    for record in records:
        assert "".join(c["character"] for c in record["characters"]) == record["prediction"]
        for c in record["characters"]:
            assert 0 <= c["confidence"] <= 1


def test_the_test_rows_are_spread_evenly(infer, checkpoint, tmp_path):
    write_csv(tmp_path / "datasets", [f"w{i}" for i in range(60)], split=["train", "test"] * 30)
    infer.set(NUM_SAMPLES=7)
    assert infer.main() == 0
    assert list(predictions(infer).label) == ["w1", "w9", "w17", "w25", "w35", "w43", "w51"]


def test_it_says_which_weights_read_and_how_well(infer, checkpoint):
    said = infer.describe_weights(dict(val_exact=0.553, init=None))  # of a first run
    assert said.startswith(f"reading with {checkpoint.as_posix()} (55.3% of its validation rows")
    assert said.endswith(f'set MODEL_PATH = "{Path(infer.PRETRAINED).as_posix()}"')
    assert infer.describe_weights({}) == f"reading with {checkpoint.as_posix()}"
    infer.set(MODEL_PATH="mistyped.pth", PRETRAINED=str(checkpoint))
    assert infer.describe_weights({}).endswith("\nas there is no mistyped.pth")


def test_the_readme_shows_what_is_printed(infer, tmp_path, capsys, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    path, shown = re.search(r"\$ python inference_crnn.py (\S+)\n(.*?)```", readme, re.S).groups()
    for name in (path, "ocr_crnn_model/pretrained.pth"):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(crnn, "compute_dtype", lambda *_: torch.float32)  # as that was run
    infer.set(PRETRAINED="ocr_crnn_model/pretrained.pth", MODEL_PATH="ocr_crnn_model/crnn.pth")
    infer.set(REPORT_DIR="ocr_crnn_model/report", PREDICTIONS_CSV="predictions.csv")
    infer.set(MIN_CONFIDENCE=0.5)
    assert infer.main([path]) == 0
    assert shown.split() == capsys.readouterr().out.split()


def test_of_a_folder_what_is_no_image_is_named_and_the_rest_is_read(infer, line, tmp_path, capsys):
    folder, missing = tmp_path / "scans", str(tmp_path / "missing.png")
    folder.mkdir()
    for name in ("a.jfif", "b.pgm"):  # b is of another kind than its name says
        line_image("Rg7").save(folder / name, "JPEG" if "j" in name else "PNG")
    for name in ("._a.jfif", "c.pdf", "d.pdf", "notes.txt", "zero.png", "text.jpg", "labels.csv"):
        (folder / name).touch()
    (folder / "text.jpg").write_text("no image")
    shutil.copytree(folder, folder / ".hidden")
    assert infer.main([str(folder), missing]) == 1
    output, errors = capsys.readouterr()
    assert re.search("3 in no format that Pillow reads, such as .*\\.pdf", errors)
    assert "2 images read" in output and "3 skipped" in output
    assert len(predictions(infer)) == 2
    skipped = re.findall(r"^skipped: .*?([a-z]+\.\w+): ", errors, re.M)
    assert skipped == ["text.jpg", "zero.png", "missing.png"]


@FORK
def test_a_forked_child_reads_what_its_parent_has_loaded(infer, checkpoint, line):
    """torch's threads stay behind in the parent: a child that used them would wait for ever."""
    model, number = load_checkpoint(checkpoint), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (before,) = infer.recognize([line], model)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            (reading,) = pool.apply_async(infer.recognize, ([line], model)).get(timeout=60)
    finally:
        torch.set_num_threads(number)  # or the next tests have as many
    assert reading.text == before.text


def test_a_form_has_fields_of_several_kinds(infer, checkpoint, tmp_path):
    (tmp_path / "names.txt").write_text("Rg7\nOther\n")
    columns = dict(allowed=["0123456789", "", ""], lexicon=["", "names.txt", ""])
    path = write_csv(tmp_path, ["R7", "Rg7", "R7"], name="form.csv", **columns)
    infer.set(ALLOWED=list("R7gOthe"))
    infer.main([str(path)])
    rows = predictions(infer)
    assert set(rows.prediction[0]) <= set("0123456789")
    assert rows.prediction[1] == "" or rows.prediction[1] in ("Rg7", "Other")
    assert set(rows.prediction[2]) <= set("R7gOthe")
    path = write_csv(tmp_path, ["R7", "R7"], name="form.csv", allowed=["", "é"])
    with pytest.raises(crnn.InputError, match=r"1\.png: ALLOWED has 'é'"):
        infer.main([str(path)])


def test_a_quarter_turn_is_read(infer, shipped):
    turned = [line_image("R7-4052").transpose(Image.Transpose[f"ROTATE_{a}"]) for a in (90, 270)]
    readings = infer.recognize(turned, shipped)
    assert [reading.text for reading in readings] == ["R7-4052"] * 2
    end, other_end = os.pipe()  # a stream that cannot be read twice, to be turned
    with open(other_end, "wb") as file:
        turned[0].save(file, "PNG")
    with open(end, "rb") as stream:
        assert len(infer.recognize([stream], shipped)) == 1


def test_a_name_that_is_not_utf8_is_skipped(infer, line, tmp_path, capsys):
    try:
        shutil.copy(line, os.fsencode(tmp_path) + b"/caf\xe9.png")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 only")
    assert infer.main([str(tmp_path)]) == 1
    assert "caf\\udce9.png: a name that is not UTF-8" in capsys.readouterr().err
    assert len(predictions(infer)) == 1


def test_weights_are_found_beside_the_script(infer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    infer.set(MODEL_PATH="no.pth", PRETRAINED="ocr_crnn_model/pretrained.pth")
    assert infer.model_path() == WEIGHTS
    assert infer.recognize(line_image("R7"))[0].text == "R7"


def test_help_is_the_docstring(infer, capsys):
    assert infer.main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == infer.module.__doc__.strip()


# ---- results
def test_a_run_that_fails_leaves_the_former_results(infer, checkpoint, tmp_path, monkeypatch):
    """Where it is interrupted, and where its path is mistyped."""
    folder = write_csv(tmp_path / "own", ["one", "two", "three"]).parent
    infer.set(CHUNK=2, PREDICTIONS_JSONL=str(tmp_path / "predictions.jsonl"))
    assert infer.main([str(folder / "*.png")]) == 0  # as it comes on Windows
    assert list(predictions(infer).image_path) == [f"{folder.as_posix()}/{i}.png" for i in range(3)]
    former = contents(tmp_path)
    assert former["predictions.csv"][:3] == b"\xef\xbb\xbf"  # for Excel
    assert former["predictions.jsonl"].count(b"\n") == 3
    with pytest.raises(InputError, match="nothing was written"):
        infer.main(["lines.png"])
    assert contents(tmp_path) == former
    interrupted = Mock(wraps=crnn.read_images, side_effect=[DEFAULT, KeyboardInterrupt])
    monkeypatch.setattr(crnn, "read_images", interrupted)
    with pytest.raises(SystemExit, match="^interrupted"):
        crnn.run(infer.main, [str(folder)])
    assert contents(tmp_path) == former


REMEDIES = [
    (dict(MODEL_PATH="missing.pth"), [], "run python train_crnn.py"),
    (dict(DATA_CSV="train.csv"), [], "has no test rows"),
    (dict(PREDICTIONS_CSV="train.csv/predictions.csv"), ["0.png"], "cannot write"),
    (dict(ONNX_PATH="model.onnx"), [], "pip install onnx onnxscript"),
    (dict(PREDICTIONS_CSV="empty"), ["0.png"], "PREDICTIONS_CSV = 'empty' is no file"),
    (dict(PREDICTIONS_JSONL="empty"), ["0.png"], "PREDICTIONS_JSONL = 'empty' is no file"),
    (dict(), ["empty"], "no images to read"),
    (dict(), [""], "an argument is empty"),
]


@pytest.mark.parametrize("constants, arguments, remedy", REMEDIES)
def test_one_line_says_what_to_do(infer, checkpoint, tmp_path, constants, arguments, remedy):
    infer.monkeypatch.chdir(tmp_path)
    infer.monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no onnx
    write_csv(tmp_path, ["a"], name="train.csv", split="train")
    (tmp_path / "empty").mkdir()
    infer.set(**constants)
    with pytest.raises(SystemExit, match=remedy) as stop:
        crnn.run(infer.main, arguments)
    assert "\n" not in str(stop.value)


def test_the_report_counts_errors_and_stands_alone(infer, tmp_path):
    """Errors of all kinds, and signs that pages and plots give a meaning."""
    labels = ["AA", "b c", "$5", "<b>", "one", "<"]
    rows = pd.read_csv(write_csv(tmp_path / "own", labels, source="own"))
    rows["image_path"] = [str(tmp_path / "own" / name) for name in rows.image_path]
    rows["prediction"] = ["AA", "bc", "S5!", "<B>", "One", "("]
    rows["confidence"] = [0.99, 0.4, 0.8, 0.9, 0.6, 0.2]
    assert infer.edits("b c$5", "bcS5!") == [(" ", ""), ("$", "S"), ("", "!")]
    infer.set(REPORT_DIR=str(tmp_path / "report"), MODEL_PATH="R&D.pth")
    infer.write_report(rows)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    shares = {
        "exact match": "16.7%",
        "exact match, any case": "50.0%",
        "character error rate": "42.9%",
        "calibration error": "48.5%",
    }
    for cells in (*shares.items(), ("own", "6"), ("$", "S", "1"), ("&lt;", "(", "1")):
        row = r"</t[dh]>\s*<td>".join(map(re.escape, cells))
        assert re.search(f"<t[dh]>{row}</td>", page), cells
    assert page.count("src=") == page.count("data:image/jpeg;base64,") == 5
    assert re.search(r"<th>0.8 to 0.9</th>\s*<td>1</td>\s*<td>0.0%</td>", page)  # by confidence
    assert "://" not in page
    assert "R&amp;D.pth" in page
    assert "$5 read as S5! (0.80)" in page  # of the surest errors
    assert page.index("(0.90)") < page.index("(0.80)") < page.index("(0.20)")
    page = infer.write_report(rows[:1]).read_text(encoding="utf-8")  # without any error
    assert re.search(r"<th>exact match</th>\s*<td>100.0%</td>", page)


# ---- the page to correct readings in
AWKWARD = ["a,\"b\" 'c'", "1×÷±√π≤≥≠", "<b>&amp;</script>", "two  spaces", "=SUM(1)", "007", "NA"]


@pytest.fixture
def scans(infer, checkpoint, tmp_path):
    """A folder of images without labels, some with awkward names, read into a page."""
    infer.set(REPORT_DIR=str(tmp_path / "report"))
    (tmp_path / "my scans" / "ü").mkdir(parents=True)
    for i, text in enumerate(AWKWARD):
        name = f"'{i}', {'&' if os.name == 'nt' else '<&>'}.png"
        line_image(text).save(tmp_path / "my scans" / ("ü" if i % 2 else "") / name)
    assert infer.main([str(tmp_path / "my scans")]) == 0
    return tmp_path / "my scans"


def test_a_page_lists_the_least_sure_readings_to_correct(infer, scans, tmp_path, capsys):
    def read_page():
        page = (tmp_path / "report" / "check.html").read_text(encoding="utf-8")
        return page, json.loads(re.search("^const job = (.*)$", page, re.M)[1])

    page, job = read_page()
    assert job["file"] == "labels.csv" and Path(job["folder"]) == scans
    confidences = [row["confidence"] for row in job["rows"]]
    assert len(confidences) == len(AWKWARD) and confidences == sorted(confidences)
    assert all((scans / row["path"]).is_file() for row in job["rows"])
    assert all(len(row["others"]) == len(row["text"]) for row in job["rows"])
    assert "://" not in page
    (scans / "labels.csv").write_text("image_path,label\n")  # saved from that page
    infer.set(CHECKED_AT_ONCE=3)
    infer.main([str(scans)])
    assert "to correct the least sure readings, open" in capsys.readouterr().out
    fewer = read_page()[1]
    assert fewer["file"] == "labels_2.csv"
    assert [row["path"] for row in fewer["rows"]] == [row["path"] for row in job["rows"][:3]]


@pytest.fixture
def browser():
    """Chromium, where it is installed with Playwright."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    browsers = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not chromium:
        pytest.skip("no chromium")
    with browsers.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


def test_corrections_reach_the_labels(infer, scans, browser):
    """Every sign survives from the page to the labels."""
    read = predictions(infer).assign(prediction="l0ok", confidence=0.3)
    path = infer.write_check(read.assign(others=[["1I", "O", "", " "]] * len(read)))
    page = browser.new_page(viewport=dict(width=600, height=300))
    page.goto(path.absolute().as_uri())
    fields, suggestions = page.locator(".reading"), page.locator(".characters").first
    suggestions.locator("button", has_text="O").click()
    assert fields.first.input_value() == "lOok"
    fields.first.fill("look here")
    assert suggestions.evaluate("line => line.inert")  # they have lost their places
    wanted = {}
    for i, about in enumerate(page.locator("section small").all_text_contents()):
        path = about.removesuffix(", confidence 0.3")
        wanted[path] = AWKWARD[int(re.search(r"'(\d)'", path)[1])]
        fields.nth(i).fill(wanted[path])
        page.keyboard.press("Enter")  # to the next
        fields.nth(i).dispatch_event("keydown", dict(key="Enter", repeat=True))  # no further
        after = fields.nth(min(i + 1, len(read) - 1))
        assert after.evaluate("field => field == document.activeElement")
    fields.first.press("x")  # half typed
    assert page.locator("section.checked").count() == len(AWKWARD) - 1
    page.keyboard.press("Backspace")  # as it was
    fields.nth(1).focus()
    assert page.locator("section.checked").count() == len(AWKWARD)
    unreadable = page.locator("section input[type=checkbox]").nth(1)
    unreadable.check()
    unreadable.uncheck()  # a slip of the hand loses no correction
    assert page.locator("section.checked").count() == len(AWKWARD)
    assert fields.nth(1).input_value() == list(wanted.values())[1]
    unreadable.check()
    del wanted[list(wanted)[1]]
    page.reload()  # nothing is lost
    last = fields.nth(len(AWKWARD) - 1)
    last.fill("typed, and not left")
    page.reload()
    assert last.input_value() == "typed, and not left"
    last.fill(list(wanted.values())[-1])
    last.press("Enter")
    assert page.locator("section.checked").count() == len(AWKWARD)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")  # the header stays on top
    with page.expect_download() as download:
        page.click("#save", timeout=5000)
    download.value.save_as(scans / download.value.suggested_filename)
    rows = crnn.read_labels(scans / "labels.csv")
    assert dict(zip(rows.image_path, rows.label)) == wanted
    assert all(crnn.try_load(scans / path)[0] is not None for path in rows.image_path)


# ---- other programs, and all together
def test_onnx_reads_what_pytorch_reads(infer, checkpoint, line, tmp_path):
    """Where its packages are installed; any number of images of any width."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    infer.set(ONNX_PATH=str(tmp_path / "model.onnx"))
    assert infer.main([line]) == 0
    model = load_checkpoint(checkpoint)
    session = onnxruntime.InferenceSession(infer.ONNX_PATH, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["charset"] == model.charset.characters
    for number, width in ((1, 16), (1, 112), (3, 64), (8, 336)):
        ink = torch.rand(number, 1, crnn.HEIGHT, width)
        with torch.inference_mode():
            assert np.allclose(session.run(None, {"ink": ink.numpy()})[0], model(ink), atol=1e-3)


@pytest.mark.parametrize("script", ["crnn", "prepare_ocr_dataset", "train_crnn", "inference_crnn"])
def test_importing_a_script_does_nothing(tmp_path, monkeypatch, capfd, script):
    """From another folder: no output and no file."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / f"{script}.py"))
    assert tuple(capfd.readouterr()) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_the_three_scripts_in_sequence(prepare, few_fonts, train, infer, capsys):
    """As a user runs them: data is drawn, a model learns from it, and test rows are read."""
    fake_emnist(prepare.DATASETS_DIR)
    prepare.main()
    train.main()
    assert infer.main() == 0
    output, rows = capsys.readouterr().out, predictions(infer)
    drawn = set(crnn.read_labels(infer.DATA_CSV).source)
    assert "emnist_images" in drawn
    for source in drawn:
        assert output.count(source) >= 3  # in every script's table
    assert output.count("Image: ") == len(rows) > 0
    assert {Path(path).parent.name for path in rows.image_path} <= drawn
