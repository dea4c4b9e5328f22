"""Reading: from Python, from the command line, and the three scripts in sequence."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import ROOT, fake_emnist, line_image, write_csv
from crnn import CRNN, Character, Charset, Reading, load_checkpoint, save_checkpoint


@pytest.fixture
def checkpoint(infer):
    """An untrained network: what it reads is nonsense, how it is reported is not."""
    charset = Charset("".join(map(chr, range(32, 127))))
    model = CRNN(charset.num_classes, channels=(8, 16, 24, 32), hidden=16)
    save_checkpoint(infer.MODEL_PATH, model, charset)
    return infer.MODEL_PATH


def predictions(infer):
    with open(infer.PREDICTIONS_CSV, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_recognize_takes_paths_pictures_and_arrays(infer, checkpoint, tmp_path, capsys):
    image = line_image("Rg7")
    image.save(tmp_path / "a b ü.png")
    (tmp_path / "bad.png").write_bytes(b"bad")
    sources = [tmp_path / "a b ü.png", str(tmp_path / "a b ü.png"), image, np.asarray(image), tmp_path / "bad.png", line_image("wider than that")]
    readings = infer.recognize(sources, checkpoint)
    assert len(readings) == 6 and readings[4] is None and "bad.png" in capsys.readouterr().err
    assert len({r.text for r in readings[:4]}) == 1 and all(0 <= r.confidence <= 1 for r in readings if r)
    assert infer.recognize(sources[:1], load_checkpoint(checkpoint))[0].text == readings[0].text
    assert infer.recognize([], checkpoint) == []


def test_reads_pictures_folders_and_csv(infer, checkpoint, tmp_path, capsys):
    write_csv(tmp_path / "my forms", ["cat", "NA", "007", "it's"], name="own.csv")
    line_image("single").save(tmp_path / "single.PNG")
    status = infer.main([str(tmp_path / "single.PNG"), str(tmp_path / "my forms"), str(tmp_path / "my forms" / "own.csv")])
    output, rows = capsys.readouterr().out, predictions(infer)
    assert status == 0 and len(rows) == 1 + 4 + 4 and output.count("Image: ") == 9
    assert [row["label"] for row in rows[5:]] == ["cat", "NA", "007", "it's"] and {row["label"] for row in rows[:5]} == {""}
    assert [row["source"] for row in rows[5:]] == ["custom"] * 4 and output.count("Ground Truth: ") == 4
    assert list(rows[0]) == ["image_path", "label", "source", "prediction", "confidence"]
    assert re.search(r"^custom +4 ", output, re.M)  # scored by source
    blocks = re.findall(r"^Image: (.+)\nGround Truth: (.+)\nPredicted   : (.*)  \(confidence \d\.\d\d(?:, please check)?\)\n\n", output, re.M)
    assert [(Path(path).name, label) for path, label, _ in blocks] == [("0.png", "cat"), ("1.png", "NA"), ("2.png", "007"), ("3.png", "it's")]


def test_the_constant_number_of_test_rows(infer, checkpoint, tmp_path, monkeypatch, capsys):
    write_csv(tmp_path / "datasets", [f"w{i}" for i in range(60)], split=["train", "test"] * 30)
    monkeypatch.setattr(infer, "NUM_SAMPLES", 7)
    assert infer.main() == 0
    rows = predictions(infer)
    assert 5 <= len(rows) <= 7 and all(int(row["label"][1:]) % 2 for row in rows)


def test_the_shipped_weights_stand_in_for_a_model_of_ones_own(infer, checkpoint, tmp_path, monkeypatch, capsys):
    line_image("abc").save(tmp_path / "line.png")
    shipped = tmp_path / "pretrained.pth"
    shutil.copy(checkpoint, shipped)
    monkeypatch.setattr(infer, "PRETRAINED", str(shipped))
    infer.main([str(tmp_path / "line.png")])
    assert f"reading with {checkpoint}" in capsys.readouterr().out
    Path(checkpoint).unlink()
    infer.main([str(tmp_path / "line.png")])
    assert f"reading with {shipped}" in capsys.readouterr().out and infer.recognize([line_image("abc")])[0] is not None
    shipped.unlink()
    with pytest.raises(SystemExit, match="no .*crnn.pth: run python train_crnn.py first"):
        infer.main([str(tmp_path / "line.png")])


def test_low_confidence_is_marked(infer, checkpoint, tmp_path, monkeypatch, capsys):
    line_image("x").save(tmp_path / "x.png")
    monkeypatch.setattr(infer, "MIN_CONFIDENCE", 1.1)
    infer.main([str(tmp_path / "x.png")])
    assert "please check" in capsys.readouterr().out
    monkeypatch.setattr(infer, "MIN_CONFIDENCE", 0)
    infer.main([str(tmp_path / "x.png")])
    assert "please check" not in capsys.readouterr().out


def test_foreign_pictures_can_be_read(infer, checkpoint, capsys):
    """The test set that other programs made: complete, and every picture of it loads."""
    assert infer.main([str(ROOT / "tests" / "foreign" / "labels.csv")]) == 0
    rows = predictions(infer)
    assert len(rows) == 120 and len({row["image_path"] for row in rows}) == 120 and all(row["label"] for row in rows)
    assert {row["source"] for row in rows} == {"form", "receipt", "label", "screen", "hand", "math", "single", "typeset"}


def test_programs_get_a_line_per_picture(infer, checkpoint, tmp_path, monkeypatch, capsys):
    write_csv(tmp_path / "own", ["cat", "NA"], name="own.csv")
    monkeypatch.setattr(infer, "PREDICTIONS_JSONL", str(tmp_path / "predictions.jsonl"))
    infer.main([str(tmp_path / "own" / "own.csv")])
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["label"] for line in lines] == ["cat", "NA"] and [line["prediction"] for line in lines] == [r["prediction"] for r in predictions(infer)]
    for line in lines:
        assert "".join(c["character"] for c in line["characters"]) == line["prediction"]
        assert all(0 <= c["left"] <= c["right"] <= 1 and 0 <= c["confidence"] <= 1 for c in line["characters"])


def test_onnx_reads_what_pytorch_reads(infer, checkpoint, tmp_path, monkeypatch, capsys):
    """Where its packages are installed; any number of pictures of any width."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    line_image("x").save(tmp_path / "x.png")
    monkeypatch.setattr(infer, "ONNX_PATH", str(tmp_path / "model.onnx"))
    assert infer.main([str(tmp_path / "x.png")]) == 0
    model, charset, _ = load_checkpoint(checkpoint)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["charset"] == charset.characters
    for number, width in ((1, 9), (1, 100), (3, 57), (8, 333)):
        ink = torch.rand(number, 1, 32, width)
        with torch.inference_mode():
            expected = model(ink, torch.full((number,), width))[0].log_softmax(2)
        assert np.allclose(session.run(None, {"ink": ink.numpy()})[0], expected.numpy(), atol=1e-3)


def test_onnx_without_its_packages(infer, checkpoint, tmp_path, monkeypatch):
    line_image("x").save(tmp_path / "x.png")
    monkeypatch.setattr(infer, "ONNX_PATH", str(tmp_path / "model.onnx"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install onnx onnxscript"):
        infer.main([str(tmp_path / "x.png")])


@pytest.mark.parametrize("cut", [False, True])
def test_an_interrupted_run_goes_on(infer, checkpoint, tmp_path, monkeypatch, capsys, cut):
    """What is read is not read again, not even where the last line was cut in half; the end is that of an uninterrupted run."""
    write_csv(tmp_path / "own", [f"w{i}" for i in range(12)], name="own.csv")
    monkeypatch.setattr(infer, "CHUNK", 5)
    monkeypatch.setattr(infer, "PREDICTIONS_JSONL", str(tmp_path / "predictions.jsonl"))
    arguments = [str(tmp_path / "own" / "own.csv")]
    infer.main(arguments)
    whole = [(tmp_path / name).read_bytes() for name in ("predictions.csv", "predictions.jsonl")]
    recognize, asked = infer.recognize, []

    def stopped(images, checkpoint):
        asked.extend(images)
        if len(asked) == 10:
            raise KeyboardInterrupt
        return recognize(images, checkpoint)

    monkeypatch.setattr(infer, "recognize", stopped)
    with pytest.raises(SystemExit, match="goes on"):
        infer.main(arguments)
    if cut:
        part, = tmp_path.glob(".predictions.csv.*.part")
        part.write_bytes(part.read_bytes()[:-9])
    del asked[:]
    infer.main(arguments)
    assert len(asked) == 7 + cut and "going on after" in capsys.readouterr().out
    assert [(tmp_path / name).read_bytes() for name in ("predictions.csv", "predictions.jsonl")] == whole
    assert not list(tmp_path.glob(".predictions*"))


def test_doubtful_characters_are_named(infer):
    reading = Reading("O1", 0.3, [Character("O", 0.61, 0, 0.5, [("0", 0.37)]), Character("1", 0.9, 0.5, 1, [("l", 0.05)])])
    assert infer.doubtful_characters(reading) == ": O 0.61 · 0 0.37"
    assert infer.doubtful_characters(Reading("", 0.3, [])) == ""


def test_the_report_counts_errors_and_stands_alone(infer, tmp_path, monkeypatch, capsys):
    """A page with all its pictures in it, whose figures are those of known readings, awkward characters included."""
    folder = tmp_path / "report"
    monkeypatch.setattr(infer, "REPORT_DIR", str(folder))
    labels, predictions = ["AA", "b c", "$5", "<b>", "one"], ["AA", "bc", "S5", "<b>", "One"]
    csv_path = write_csv(tmp_path / "own", labels)
    rows = pd.DataFrame(dict(path=[csv_path.parent / f"{i}.png" for i in range(5)], label=labels, prediction=predictions,
                             confidence=[0.99, 0.4, 0.8, 0.9, 0.6], source="own"))
    figures = dict(infer.summary(rows))
    assert figures["exact match"] == "40.0% of 5" and figures["exact match but for case"] == "60.0% of 5"
    assert figures["character error rate"].startswith("23.08%") and figures["characters not read"] == "1"
    assert figures["characters read as another"] == "2" and figures["errors that are only of case"] == "1"
    assert figures["spaces lost or invented"] == "1 among 1 spaces" and figures["exact match of lines with doubled characters"] == "100.0% of 1"
    infer.write_report(rows)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "http" not in page and "<td>$<td>S<td>1" in page and "<td>own" in page
    for name in ("confusions.png", "reject_curve.png", "worst_errors.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 300
    infer.write_report(rows[:1])  # without any error
    assert "100.0% of 1" in (folder / "index.html").read_text(encoding="utf-8")


def test_unreadable_pictures_are_reported_and_the_rest_is_read(infer, checkpoint, tmp_path, capsys):
    folder = tmp_path / "mixed"
    write_csv(folder, ["cat", "dog"])
    (folder / "zero.png").write_bytes(b"")
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:90])
    (folder / "text.jpg").write_text("no picture")
    assert infer.main([str(folder), str(tmp_path / "missing.png")]) == 1
    captured = capsys.readouterr()
    assert len(predictions(infer)) == 2 and "4 skipped" in captured.out
    for name in ("zero.png", "half.png", "text.jpg", "missing.png"):
        assert name in captured.err


@pytest.mark.parametrize("case, complaint", [
    ("no checkpoint", "train_crnn.py first"), ("foreign checkpoint", "not a checkpoint of this project"), ("no data.csv", "prepare_ocr_dataset.py first"),
    ("no test rows", "no test rows"), ("empty folder", "holds no pictures"), ("csv without label", "no column label"), ("unwritable", "PREDICTIONS_CSV")])
def test_one_line_says_what_to_do(infer, checkpoint, tmp_path, monkeypatch, case, complaint):
    line_image("x").save(tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("image_path,text\nx.png,x\n")
    arguments = {"empty folder": [str(tmp_path / "empty")], "csv without label": [str(tmp_path / "bad.csv")],
                 "unwritable": [str(tmp_path / "x.png")]}.get(case, [])
    if case == "no checkpoint":
        Path(checkpoint).unlink()
    if case == "foreign checkpoint":
        Path(checkpoint).write_bytes(b"something else")
    if case == "no test rows":
        write_csv(tmp_path / "datasets", ["a", "b"], split="train")
    if case == "unwritable":
        monkeypatch.setattr(infer, "PREDICTIONS_CSV", str(tmp_path / "x.png" / "predictions.csv"))
    with pytest.raises(SystemExit, match=complaint) as stop:
        infer.main(arguments)
    assert "\n" not in str(stop.value)


def test_readers_of_the_benchmark(infer, checkpoint, tmp_path):
    csv_path = write_csv(tmp_path / "words", ["one", "two"], source="words")
    def run(reader):
        return subprocess.run([sys.executable, str(ROOT / "tests" / "peers.py"), reader, str(csv_path), str(tmp_path / "out.csv")], capture_output=True,
                              text=True, encoding="utf-8", env=dict(os.environ, PEERS_MODEL=str(checkpoint), TESSDATA_PREFIX=str(tmp_path)))
    ours = run("ours")
    assert ours.returncode == 0 and float(ours.stdout) > 0
    assert [row["label"] for row in csv.DictReader(open(tmp_path / "out.csv", encoding="utf-8"))] == ["one", "two"]
    missing = run("Tesseract")  # where tesserocr is installed, its data is not in that folder
    assert missing.returncode == 3 and "not installed: apt install tesseract-ocr-eng" in missing.stdout


def test_importing_a_script_does_nothing(tmp_path):
    """From another folder: no output, no file, no process."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import prepare_ocr_dataset, train_crnn, inference_crnn, crnn"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == "" and not list(tmp_path.iterdir())


def test_the_three_scripts_in_sequence(prepare, train, infer, monkeypatch, capsys):
    """As a user runs them, on tiny constants: data is drawn, a model learns from it, and test rows are read."""
    fake_emnist(Path(prepare.DATASETS_DIR))
    prepare.main()
    monkeypatch.setattr(train, "EPOCHS", 2)
    train.main()
    assert infer.main() == 0
    output = capsys.readouterr().out
    for source in prepare.SOURCES:
        assert output.count(source) >= 3  # in every script's table
    assert "Epoch 2/2" in output and "✅ Model saved to" in output and output.count("Image: ") == len(predictions(infer)) > 0
    assert set(load_checkpoint(train.MODEL_PATH)[1].characters) <= set(prepare.CHARSET)
    assert {Path(row["image_path"]).parent.name for row in predictions(infer)} <= set(prepare.SOURCES)
