"""Reading: from Python, from the command line, and the three scripts in sequence."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, fake_emnist, line_image, write_csv
from PIL import Image

import crnn
from crnn import CRNN, Character, Charset, InputError, Reading, load_checkpoint, save_checkpoint


@pytest.fixture
def checkpoint(infer):
    """An untrained network: what it reads is nonsense, how it is reported is not."""
    characters = "".join(map(chr, range(32, 127)))
    save_checkpoint(infer.MODEL_PATH, CRNN(Charset(characters), (8, 16, 24, 32), 16))
    return Path(infer.MODEL_PATH)


@pytest.fixture
def line(tmp_path, checkpoint):
    """The path of an image of one line, with a model to read it."""
    line_image("Rg7").save(tmp_path / "a b ü.png")
    return str(tmp_path / "a b ü.png")


def predictions(infer):
    """PREDICTIONS_CSV, all of it strings."""
    return pd.read_csv(infer.PREDICTIONS_CSV, dtype=str, keep_default_na=False)


def python(*arguments, **options):
    """Run python. Returns what it printed, and its status."""
    pipes = dict(capture_output=True, text=True, encoding="utf-8", timeout=120)
    return subprocess.run([sys.executable, *map(str, arguments)], **pipes, **options)


# ---- reading


def test_recognize_takes_paths_images_and_arrays(infer, checkpoint, line, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"bad")
    image = line_image("Rg7")
    same = [Path(line), line, image, np.asarray(image)]
    readings = infer.recognize([*same, tmp_path / "bad.png", line_image("wider")], checkpoint)
    assert [reading is None for reading in readings] == [False, False, False, False, True, False]
    assert "bad.png" in capsys.readouterr().err
    assert len({reading.text for reading in readings[:4]}) == 1
    assert 0 <= readings[5].confidence <= 1
    for model in (load_checkpoint(checkpoint), str(checkpoint), None):
        assert infer.recognize([line], model)[0].text == readings[0].text
    assert infer.recognize([], checkpoint) == []


def test_reads_images_folders_and_csv(infer, line, tmp_path, capsys):
    labels, folder = ["cat", "NA", "007", "it's"], tmp_path / "my forms"
    path = write_csv(folder, labels, name="own.csv")
    line_image("single").save(tmp_path / "single.PNG")
    assert infer.main([str(tmp_path / "single.PNG"), str(folder), str(path)]) == 0
    output, rows = capsys.readouterr().out, predictions(infer)
    assert list(rows) == ["image_path", "label", "source", "prediction", "confidence"]
    assert list(rows.label) == [""] * 5 + labels
    assert list(rows.source) == [""] * 5 + ["custom"] * 4
    assert re.search(r"^custom +4 ", output, re.M)  # scored by source
    assert len(re.findall(r"^Image: .*\nPredicted   : ", output, re.M)) == 5
    block = r"^Image: (.+)\nGround Truth: (.+)\nPredicted   : .*  \(confidence \d\.\d\d.*\)\n\n"
    shown = [(str(folder / f"{i}.png"), label) for i, label in enumerate(labels)]
    assert re.findall(block, output, re.M) == shown


def test_the_constant_number_of_test_rows(infer, checkpoint, tmp_path):
    write_csv(tmp_path / "datasets", [f"w{i}" for i in range(60)], split=["train", "test"] * 30)
    infer.set(NUM_SAMPLES=7)
    assert infer.main() == 0
    numbers = [int(label[1:]) for label in predictions(infer).label]
    assert len(numbers) in (5, 6, 7)
    assert {number % 2 for number in numbers} == {1}
    assert max(numbers) - min(numbers) > 40  # spread over all


def test_the_shipped_weights_stand_in_for_a_model_of_ones_own(infer, checkpoint, line, capsys):
    shipped = checkpoint.with_name("pretrained.pth")
    shutil.copy(checkpoint, shipped)
    infer.set(PRETRAINED=str(shipped))
    infer.main([line])
    assert f"reading with {checkpoint}" in capsys.readouterr().out
    checkpoint.unlink()
    infer.main([line])
    assert f"reading with {shipped}" in capsys.readouterr().out
    assert infer.recognize([line])[0] is not None
    shipped.unlink()
    with pytest.raises(InputError, match="no .*crnn.pth: run python train_crnn.py"):
        infer.main([line])


@pytest.mark.parametrize("least, marked", [(1.1, True), (0, False)])
def test_low_confidence_is_marked(infer, line, capsys, least, marked):
    infer.set(MIN_CONFIDENCE=least)
    infer.main([line])
    output = capsys.readouterr().out
    assert ("please check" in output) == marked
    assert f"1 images read, {int(marked)} below MIN_CONFIDENCE" in output


def test_doubtful_characters_are_named(infer):
    doubtful = Character("O", 0.61, 0, 0.5, [("0", 0.37)])
    surer = Character("1", 0.9, 0.5, 1, [("l", 0.05)])
    reading = Reading("1O", 0.3, [surer, doubtful])
    assert infer.doubtful_character(reading) == ": O 0.61 · 0 0.37"
    assert infer.doubtful_character(Reading("", 0.3, [])) == ""


def test_foreign_images_can_be_read(infer, checkpoint):
    """The test set that other programs made: complete, and every image of it loads."""
    assert infer.main([str(ROOT / "tests" / "foreign" / "labels.csv")]) == 0
    rows = predictions(infer)
    assert len(rows) == 120
    assert rows.image_path.nunique() == 120
    assert "" not in set(rows.label)
    sources = " ".join(sorted(set(rows.source)))
    assert sources == "form hand label math receipt screen single typeset"


def test_unreadable_images_are_reported_and_the_rest_is_read(infer, checkpoint, tmp_path, capsys):
    folder = write_csv(tmp_path / "mixed", ["cat", "dog"]).parent
    (folder / "zero.png").write_bytes(b"")
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:90])
    (folder / "text.jpg").write_text("no image")
    assert infer.main([str(folder), str(tmp_path / "missing.png")]) == 1
    captured = capsys.readouterr()
    assert len(predictions(infer)) == 2
    assert "4 skipped" in captured.out
    for name in ("zero.png", "half.png", "text.jpg", "missing.png"):
        assert name in captured.err


def test_nothing_that_can_be_read(infer, checkpoint, tmp_path, capsys):
    assert infer.main([str(tmp_path / "missing.png")]) == 1
    assert "1 skipped" in capsys.readouterr().out
    assert len(predictions(infer)) == 0


# ---- results


def test_programs_get_a_line_per_image(infer, checkpoint, tmp_path):
    path = write_csv(tmp_path / "own", ["cat", "NA"], name="own.csv")
    (tmp_path / "own" / "bad.png").write_bytes(b"bad")
    infer.set(PREDICTIONS_JSONL=str(tmp_path / "predictions.jsonl"))
    infer.main([str(tmp_path / "own" / "bad.png"), str(path)])
    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    lines, rows = list(map(json.loads, text.splitlines())), predictions(infer)
    assert [line["label"] for line in lines] == ["cat", "NA"]
    assert [line["prediction"] for line in lines] == list(rows.prediction)
    for line in lines:
        assert "".join(c["character"] for c in line["characters"]) == line["prediction"]
        for c in line["characters"]:
            assert 0 <= c["left"] <= c["right"] <= 1
            assert 0 <= c["confidence"] <= 1


@pytest.mark.parametrize("cut", [False, True])
def test_an_interrupted_run_goes_on(infer, checkpoint, tmp_path, capsys, cut):
    """No whole chunk is read again, and the end is that of a whole run."""
    path = write_csv(tmp_path / "own", [f"w{i}" for i in range(12)], name="own.csv")
    (tmp_path / "own" / "3.png").write_bytes(b"bad")
    files = tmp_path / "predictions.csv", tmp_path / "predictions.jsonl"
    infer.set(CHUNK=5, PREDICTIONS_JSONL=str(files[1]))
    assert infer.main([str(path)]) == 1
    whole = [file.read_bytes() for file in files]
    first, then = Mock(wraps=infer.recognize), Mock(wraps=infer.recognize)
    first.side_effect = [DEFAULT, KeyboardInterrupt]
    infer.set(recognize=first)
    with pytest.raises(SystemExit, match="^stopped"):
        crnn.run(infer.main, [str(path)])
    (part,) = tmp_path.glob(".predictions.csv.*.part")
    if cut:
        part.write_bytes(part.read_bytes()[:-9])
    infer.set(recognize=then)
    assert infer.main([str(path)]) == 1
    output = capsys.readouterr().out
    assert sum(len(call.args[0]) for call in then.call_args_list) == (12 if cut else 7)
    assert ("going on after 5 images" in output) == (not cut)
    assert output.count("1 skipped") == 2  # also where that was before the interruption
    assert [file.read_bytes() for file in files] == whole
    assert list(tmp_path.glob(".predictions*")) == []


REMEDIES = [
    ("MODEL_PATH", "missing.pth", "run python train_crnn.py"),
    ("MODEL_PATH", "bad.csv", "is not our checkpoint"),
    ("DATA_CSV", "missing.csv", "check the path, or run python prepare_ocr_dataset.py"),
    ("DATA_CSV", "train.csv", "has no test rows"),
    ("PREDICTIONS_CSV", "bad.csv/predictions.csv", "cannot write"),
    ("argument", "empty", "holds no images"),
    ("argument", "bad.csv", "no column label"),
]


@pytest.mark.parametrize("constant, name, remedy", REMEDIES)
def test_one_line_says_what_to_do(infer, line, tmp_path, constant, name, remedy):
    write_csv(tmp_path, ["a"], name="train.csv", split="train")
    (tmp_path / "bad.csv").write_text("image_path,text\nx.png,x\n")
    (tmp_path / "empty").mkdir()
    path = str(tmp_path / name)
    arguments = {"argument": [path], "PREDICTIONS_CSV": [line]}.get(constant, [])
    infer.set(**({} if constant == "argument" else {constant: path}))
    with pytest.raises(SystemExit, match=remedy) as stop:
        crnn.run(infer.main, arguments)
    assert "\n" not in str(stop.value)


@pytest.fixture
def awkward(tmp_path):
    """Rows as a report takes them, with errors of all kinds and signs that pages and plots use."""
    labels = ["AA", "b c", "$5", "<b>", "one", "<"]
    rows = pd.read_csv(write_csv(tmp_path / "own", labels, source="own"))
    rows["image_path"] = [str(tmp_path / "own" / name) for name in rows.image_path]
    read = ["AA", "bc", "S5!", "<B>", "One", "("]
    return rows.assign(prediction=read, confidence=[0.99, 0.4, 0.8, 0.9, 0.6, 0.2])


def test_the_report_counts_errors(infer, awkward):
    assert list(infer.summary(awkward).values()) == [
        "16.7% of 6",  # exact match
        "50.0% of 6",  # exact match but for case
        "33.3% of 6",  # exact match, look-alikes folded
        "42.86% of 14 characters",  # character error rate
        "4",  # characters read as another
        "1",  # characters read where there is none
        "1",  # characters not read
        "2",  # errors that are only of case
        "1 of 1",  # spaces lost or invented
        "48.5%",  # expected calibration error
    ]


def test_the_report_stands_alone(infer, awkward, tmp_path):
    infer.set(REPORT_DIR=str(tmp_path / "report"), MODEL_PATH="R&D.pth")
    infer.write_report(awkward)
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert page.count("src=") == 2
    assert "://" not in page
    assert re.search(r"<td>\$</td>\s*<td>S</td>\s*<td>1</td>", page)
    assert re.search(r"<td>&lt;</td>\s*<td>\(</td>", page)
    assert "<th>own</th>" in page  # by source
    assert "R&amp;D.pth" in page
    assert Image.open(tmp_path / "report" / "surest_errors.png").width > 300
    infer.write_report(awkward[:1])  # without any error
    assert "100.0% of 1" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


# ---- the page to correct readings in

AWKWARD = ["a,\"b\" 'c'", "1×÷±√π≤≥≠", "<b>&amp;</script>", "two  spaces", "=SUM(1)", "007", "NA"]


@pytest.fixture
def scans(infer, checkpoint, tmp_path):
    """A folder of images without labels, some with awkward names, read into a page."""
    infer.set(REPORT_DIR=str(tmp_path / "report"))
    (tmp_path / "my scans" / "ü").mkdir(parents=True)
    for i, text in enumerate(AWKWARD):
        line_image(text).save(tmp_path / "my scans" / ("ü" if i % 2 else "") / f"'{i}', <&>.png")
    assert infer.main([str(tmp_path / "my scans")]) == 0
    return tmp_path / "my scans"


def test_readings_can_be_corrected(infer, scans, tmp_path, capsys):
    page = (tmp_path / "report" / "check.html").read_text(encoding="utf-8")
    job = json.loads(page.split("type=application/json>")[1].split("</script>")[0])
    assert job["file"] == "labels.csv" and Path(job["folder"]) == scans
    confidences = [row["confidence"] for row in job["rows"]]
    assert len(confidences) == len(AWKWARD) and confidences == sorted(confidences)
    assert all((scans / row["path"]).is_file() for row in job["rows"])
    assert "://" not in page
    infer.set(CHECKED_AT_ONCE=3)
    infer.main([str(scans)])
    found = sorted(path.name for path in (tmp_path / "report").glob("check*.html"))
    assert found == ["check.html", "check_2.html", "check_3.html"]
    (scans / "labels.csv").write_text("image_path,label\n")  # of an earlier page
    infer.set(CHECKED_AT_ONCE=5000)
    infer.main([str(scans)])
    page = (tmp_path / "report" / "check.html").read_text(encoding="utf-8")
    assert '"file": "labels_2.csv"' in page  # overwrites nothing
    assert len(list((tmp_path / "report").glob("check*.html"))) == 1  # no former pages
    assert f"{tmp_path.as_posix()}/report/check.html" in capsys.readouterr().out


def test_corrections_reach_the_training(infer, train, scans, tmp_path):
    """In a browser, where there are Playwright and Chromium: every sign survives to the labels."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    browsers = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if not chromium:
        pytest.skip("no chromium")
    read = predictions(infer).assign(prediction="l0ok", confidence=0.3)
    infer.write_check(read.assign(others=[["1I", "O", "", " "]] * len(read)))
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto((tmp_path / "report" / "check.html").as_uri())
        first, line = page.locator(".field").first, page.locator("pre").first
        line.locator("button", has_text="O").click()
        assert first.input_value() == "lOok"
        first.fill("look here")
        assert line.evaluate("line => line.inert")  # the places are others now
        paths = page.eval_on_selector_all("small", "all => all.map(s => s.textContent)")[1:]
        wanted = {}
        for i, said in enumerate(paths):
            path = said.removeprefix(" not readable. ").rsplit(", ", 1)[0]
            wanted[path] = AWKWARD[int(re.search(r"'(\d)'", path)[1])]
            page.locator(".field").nth(i).fill(wanted[path])
            page.keyboard.press("Enter")  # to the next
            here = page.evaluate(
                "[...document.querySelectorAll('.field')].indexOf(document.activeElement)"
            )
            assert here == min(i + 1, len(paths) - 1)
        page.locator("section input[type=checkbox]").nth(1).check()  # not readable
        del wanted[list(wanted)[1]]
        page.reload()  # nothing is lost
        assert page.locator("section.checked").count() == len(paths)
        page.set_viewport_size({"width": 600, "height": 300})
        page.evaluate("scrollTo(0, document.body.scrollHeight)")  # the header stays on top
        with page.expect_download() as download:
            page.click("#save", timeout=5000)
        download.value.save_as(scans / download.value.suggested_filename)
        browser.close()
    train.set(DATA_CSV=str(scans / "labels.csv"))
    rows, _ = train.read_rows("")
    assert dict(zip(rows.image_path, rows.label)) == wanted
    assert all(crnn.try_load(scans / path)[0] is not None for path in rows.image_path)


def test_onnx_reads_what_pytorch_reads(infer, checkpoint, line, tmp_path):
    """Where its packages are installed; any number of images of any width."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    infer.set(ONNX_PATH=str(tmp_path / "model.onnx"))
    assert infer.main([line]) == 0
    model = load_checkpoint(checkpoint)
    session = onnxruntime.InferenceSession(infer.ONNX_PATH, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["charset"] == model.charset.characters
    for number, width in ((1, 9), (1, 100), (3, 57), (8, 333)):
        ink = torch.rand(number, 1, 32, width)
        with torch.inference_mode():
            expected = model(ink, torch.full((number,), width))[0].log_softmax(2)
        assert np.allclose(session.run(None, {"ink": ink.numpy()})[0], expected, atol=1e-3)


def test_onnx_without_its_packages(infer, line, tmp_path, monkeypatch):
    infer.set(ONNX_PATH=str(tmp_path / "model.onnx"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install onnx onnxscript"):
        infer.main([line])


def test_readers_of_the_benchmark(checkpoint, tmp_path):
    path, out = write_csv(tmp_path / "words", ["one", "two"], source="words"), tmp_path / "out.csv"
    # Where tesserocr is installed, its data is not in that folder.
    environment = dict(os.environ, PEERS_MODEL=str(checkpoint), TESSDATA_PREFIX=str(tmp_path))
    command = ROOT / "tests" / "peers.py", "ours", path, out
    ours = python(*command, env=environment)
    assert ours.returncode == 0, ours.stderr
    assert float(ours.stdout) > 0
    assert list(pd.read_csv(out).label) == ["one", "two"]
    missing = python(command[0], "Tesseract", path, out, env=environment)
    assert missing.returncode == 3
    assert "not installed: apt install tesseract-ocr-eng" in missing.stdout


def test_importing_a_script_does_nothing(tmp_path):
    """From another folder: no output, no file, no process."""
    code = "import sys; sys.path.insert(0, sys.argv[1])\n"
    code += "import prepare_ocr_dataset, train_crnn, inference_crnn, crnn"
    done = python("-B", "-c", code, ROOT, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_the_three_scripts_in_sequence(prepare, train, infer, capsys):
    """As a user runs them: data is drawn, a model learns from it, and test rows are read."""
    fake_emnist(prepare.DATASETS_DIR)
    prepare.main()
    train.set(EPOCHS=2)
    train.main()
    assert infer.main() == 0
    output, rows = capsys.readouterr().out, predictions(infer)
    for source in prepare.SOURCES:
        assert output.count(source) >= 3  # in every script's table
    assert "Epoch 2/2" in output
    assert "✅ Model saved to" in output
    assert len(rows) > 0
    assert output.count("Image: ") == len(rows)
    assert {Path(path).parent.name for path in rows.image_path} <= set(prepare.SOURCES)
    assert set(load_checkpoint(train.MODEL_PATH).charset.characters) <= set(prepare.CHARSET)
