"""Training: what it says of the data, that it learns, resumes, starts from other weights, stops."""

import re
import shutil
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from conftest import line_image, make_script, write_csv
from PIL import Image

import crnn
import train_crnn
from crnn import CRNN, Charset, InputError, load_checkpoint, load_image

TEXTS = ["cat", "dog", "7+5", "007", "NA", "llama", "null", "1e5", "up", "$9.50", "a b", "42"]
NUMBERS = [f"{i * 7919 % 10000:04}" for i in range(32)]


def tiny_data(folder):
    """24 images of 12 texts, the same for training and validation. Returns their csv."""
    return str(write_csv(folder, TEXTS * 2, source="mine", split=["train"] * 12 + ["val"] * 12))


@pytest.fixture
def tiny(train, tmp_path):
    """The training script on tiny_data."""
    train.set(DATA_CSV=tiny_data(tmp_path / "own data ü"))
    train.set(write_history=Mock())  # drawing curves takes half of the time
    return train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model that tiny has trained: crnn.pth, and crnn.resume.pth beside it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        paths = dict(DATA_CSV=tiny_data(folder / "data"), MODEL_PATH=str(folder / "crnn.pth"))
        script = make_script(train_crnn, patch, **paths)
        script.set(write_history=Mock())
        script.main()
    return folder


@pytest.fixture
def by_heart(train):
    """The training script, set to learn 32 numbers by heart that stand in train, val and test."""
    path = write_csv(Path(train.DATA_CSV).parent, NUMBERS)
    rows = pd.read_csv(path, dtype=str)
    pd.concat([rows.assign(split=each) for each in ("train", "val", "test")]).to_csv(path)
    fast = dict(matrix_learning_rate=2e-2, learning_rate=1e-2, channels=(16, 32, 48, 64), hidden=64)
    train.set(FROM_NOTHING=train.FROM_NOTHING | fast, EPOCHS=20, BATCH_SIZE=8, AUGMENT=0, BLANKS=0)
    train.set(write_history=Mock())
    return train


def resume_state(folder):
    """What a training in folder can resume from, and with it its network after the last epoch."""
    return torch.load(Path(folder) / "crnn.resume.pth", weights_only=True)


def differing(these, those):
    """The names under which two networks' weights differ."""
    return [name for name in these if not torch.equal(these[name], those[name])]


def folder_of(train):
    return Path(train.MODEL_PATH).parent


# ---- learning


def test_overfits_32_images(by_heart, capsys):
    by_heart.main()
    output = capsys.readouterr().out
    line = r"^Epoch (\d+)/20 — Loss: (\d+\.\d{4}) — Accuracy: (\d+\.\d\d)% — CER: \d+\.\d\d%"
    epochs, losses, accuracies = zip(*re.findall(line, output, re.M))
    assert list(map(int, epochs)) == list(range(1, 21))
    assert max(map(float, accuracies)) == 100
    assert float(losses[-1]) < 0.1
    assert "normal in the first epochs" in output
    assert f"✅ Model saved to {by_heart.MODEL_PATH}" in output
    model = load_checkpoint(by_heart.MODEL_PATH)
    assert model.charset.characters == "0123456789"
    assert model.calibration != crnn.UNCALIBRATED


def test_two_processes_learn_what_one_does(by_heart, tmp_path):
    by_heart.constants.pop("write_history")  # processes of their own have no Mock
    output = by_heart.run(tmp_path, processes=2)
    assert len(re.findall("^Epoch", output, re.M)) == 20  # one of them speaks
    assert output.count("✅") == 1
    assert "gloo" not in output  # no thread of the process group is left at the end
    assert re.search(r"^Epoch 20/20 .* Accuracy: (100|9\d)\.", output, re.M)
    assert re.search(r"custom +32 +(100|9\d)\.", output)  # every test row is read once


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_precisions_train(tiny, capsys, precision):
    tiny.set(PRECISION=precision)
    tiny.main()
    assert f"in torch.{precision}" in capsys.readouterr().out
    saved = load_checkpoint(tiny.MODEL_PATH).state_dict()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_the_same_seed_gives_the_same_weights(tiny, trained):
    tiny.set(DATA_CSV=str(trained / "data" / "data.csv"))
    tiny.main()
    again = resume_state(folder_of(tiny))
    assert differing(resume_state(trained)["net"], again["net"]) == []


def test_few_images_get_more_epochs_and_a_word_of_advice(tiny, capsys):
    tiny.set(MIN_STEPS=10)
    tiny.main()
    output = capsys.readouterr().out
    epochs, batches = map(int, re.search(r"(\d+) epochs of (\d+) batches", output).groups())
    assert epochs == -(-10 // batches)
    assert len(resume_state(folder_of(tiny))["history"]) == epochs
    advice = output.index('set INIT_WEIGHTS = "ocr_crnn_model/pretrained.pth"')
    assert advice < output.index("Epoch 1/")


def test_a_batch_must_be_shared_equally(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="BATCH_SIZE = 32: set a multiple of 3"):
        train.main()


def test_updates_are_made_orthogonal(train):
    torch.manual_seed(0)
    for rows, columns in ((24, 60), (60, 24)):  # square ones may keep singular values near 0
        singular = torch.linalg.svdvals(train.orthogonalize(torch.randn(3, rows, columns)))
        assert singular.min() > 0.3
        assert singular.max() < 1.5


def test_every_weight_is_learned_by_one_optimizer(train):
    net = train.WithShortcut(CRNN(Charset("abc"), (8, 16, 24, 32), 32, blocks=1))
    parts = train.make_optimizers(net, 10)
    matrices, others = (parts[name].param_groups[0]["params"] for name in ("muon", "adamw"))
    assert sorted(map(id, matrices + others)) == sorted(map(id, net.parameters()))
    assert min(p.ndim for p in matrices) == 2


def test_empty_paper_is_read_as_nothing(tiny):
    torch.manual_seed(0)
    paper = tiny.draw_empty_paper(torch.ones(50, 1, 32, 96))
    assert paper.min() == 0
    assert paper.mean((1, 2, 3)).max() <= 0.5
    assert (paper.amax((1, 2, 3)) > 0.99).float().mean() > 0.4  # much is stretched, as in reading
    tiny.set(BLANKS=1.0, EPOCHS=30)
    tiny.main()
    assert resume_state(folder_of(tiny))["history"][-1]["loss"] < 0.1  # nothing is what it learned
    images = list(255 - (paper * 255)[:, 0].byte())
    readings = crnn.read_images(load_checkpoint(tiny.MODEL_PATH), images, 8)
    assert {reading.text for reading in readings} == {""}


def test_augmentation_keeps_the_text_readable(train):
    torch.manual_seed(0)
    ink = crnn.to_ink(load_image(line_image("Rg7")))[None, None].repeat(200, 1, 1, 1)
    changed = train.augment(ink, 1.0)
    assert changed.shape == ink.shape
    assert torch.isfinite(changed).all()
    share = changed.clamp(0, 1).sum((1, 2, 3)) / ink.sum((1, 2, 3))
    assert share.min() > 0.4  # not wiped out
    assert share.max() < 2.2  # not drowned
    assert (changed - ink).abs().mean((1, 2, 3)).min() > 0.005  # each is another image
    assert torch.allclose(train.augment(ink, 0.0).sum(), ink.sum(), rtol=0.12)


# ---- data


def test_own_csv_with_two_columns(train, capsys):
    write_csv(Path(train.DATA_CSV).parent, [f"{word}{i}" for i in range(8) for word in TEXTS])
    train.main()
    output = capsys.readouterr().out
    assert re.search(r"custom +\d+ +\d+ +\d+", output)  # train, val and test, by hash
    assert "96 rows" in output
    assert "Test rows, never trained on" in output
    assert output.count(" | ") == 3  # examples
    assert len(pd.read_csv(folder_of(train) / "history.csv")) == 1
    assert Image.open(folder_of(train) / "training_curves.png").width > 800


def test_says_which_rows_are_skipped_and_why(train, capsys):
    folder = Path(train.DATA_CSV).parent
    path = write_csv(folder, TEXTS * 4, split=["train"] * 36 + ["val"] * 12)
    (folder / "half ü.png").write_bytes((folder / "0.png").read_bytes()[:90])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    bad = {"missing.png": "cat", "half ü.png": "cat", "zero.png": "cat", "text.png": "cat"}
    bad |= {"0.png": "", "1.png": "caté", "2.png": "l" * 400, "3.png": "a\tb"}
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(f"{name},{label},train\n" for name, label in bad.items())
    train.set(MIN_CHARACTER_ROWS=2)
    train.main()
    output = capsys.readouterr().out
    counts, reasons = zip(*re.findall(r"skipped: (\d) rows, (\w+)", output))
    assert reasons == ("character", "empty", "label", "line", "missing")
    assert counts == ("1", "1", "1", "1", "4")
    for particulars in ("missing.png", "half ü.png", "zero.png", "'é' (U+00E9)", "799 frames"):
        assert particulars in output
    assert "é" not in load_checkpoint(train.MODEL_PATH).charset.characters


NOTHING = {
    None: "check the path, or run python prepare_ocr_dataset.py",
    "": "cannot be read",
    "image_path,label\n": "no rows",
    "path,label\na,b\n": "no column image_path",
    "image_path,label,split\na.png,abc,dev\n": "'dev'",
    "image_path,label,split\na.png,abc,train\n": "no row to train on",
    "image_path,label,split\na.png,abc,test\n": "no training labels",
}


@pytest.mark.parametrize("content, complaint", NOTHING.items())
def test_nothing_to_train_on(train, content, complaint):
    Path(train.DATA_CSV).parent.mkdir()
    if content is not None:
        Path(train.DATA_CSV).write_text(content)
    with pytest.raises(InputError, match=complaint) as stop:
        train.main()
    assert train.DATA_CSV in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not Path(train.MODEL_PATH).exists()


def test_a_folder_is_no_place_for_a_model(train, tmp_path):
    (tmp_path / "models").mkdir()
    train.set(MODEL_PATH=str(tmp_path / "models"))
    with pytest.raises(InputError, match="MODEL_PATH = .* is no file"):
        train.main()
    assert (tmp_path / "models").is_dir()


def test_without_val_rows_training_rows_stand_in(train, capsys):
    write_csv(Path(train.DATA_CSV).parent, TEXTS, split="train")
    train.main()
    assert "no val rows" in capsys.readouterr().out


def test_few_labels_with_many_images_are_all_trained_on(train, capsys):
    path = write_csv(Path(train.DATA_CSV).parent, ["on", "no", "YES", "NO"] * 20)
    buckets, _, _ = train.load_rows(*train.read_rows(""))
    assert sum(map(len, buckets)) > 50
    assert "never trained on" not in capsys.readouterr().out
    rows = crnn.read_labels(path)
    rows["split"] = ["val" if label == "no" else "train" for label in rows.label]
    crnn.write_labels(rows, path)
    train.load_rows(*train.read_rows(""))
    output = capsys.readouterr().out
    assert "never trained on, as all their images are in val or test: 'no' (20 images)" in output


def test_buckets_hold_every_row(train):
    folder = write_csv(Path(train.DATA_CSV).parent, TEXTS, split="train").parent
    rows, charset = train.read_rows("")
    labels = []
    for bucket in train.load_rows(rows, charset)[0]:
        for pixels, target, length in bucket:
            labels.append(charset.decode(target[:length].tolist()))
            image = load_image(folder / f"{TEXTS.index(labels[-1])}.png")
            assert torch.equal(pixels[0], crnn.pad(image))
    assert sorted(labels) == sorted(TEXTS)


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_cover_an_epoch_once(tiny, monkeypatch, processes):
    buckets, _, _ = tiny.load_rows(*tiny.read_rows(""))
    tiny.set(BATCH_SIZE=4)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    seen, numbers = [], []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        batches = list(tiny.shuffle_batches(buckets, torch.Generator().manual_seed(0)))
        seen += [(id(bucket), i) for bucket, indices in batches for i in indices.tolist()]
        numbers.append([(id(bucket), len(indices)) for bucket, indices in batches])
    assert len(set(seen)) == sum(map(len, buckets))
    assert processes > 1 or len(seen) == len(set(seen))
    assert max(length for _, length in numbers[0]) <= 4 // processes
    assert [place for place, _ in numbers[0]] == [place for place, _ in numbers[-1]]  # in step


# ---- stopping and resuming


def test_killed_and_resumed_reaches_the_same_weights(by_heart, tmp_path):
    """kill -9 in the second half, then RESUME: the very weights of an uninterrupted run."""
    by_heart.set(EPOCHS=12)
    by_heart.main()
    whole = resume_state(folder_of(by_heart))
    by_heart.set(MODEL_PATH=str(tmp_path / "killed" / "crnn.pth"))
    by_heart.constants.pop("write_history")  # a process of its own has no Mock
    killed = subprocess.Popen(by_heart.command(tmp_path), stdout=subprocess.PIPE, encoding="utf-8")
    for line in killed.stdout:
        if line.startswith("Epoch 7/"):
            killed.kill()
    assert killed.wait() != 0
    assert resume_state(folder_of(by_heart))["epoch"] in range(6, 12)
    load_checkpoint(by_heart.MODEL_PATH)  # whole
    by_heart.set(RESUME=True)
    by_heart.main()
    resumed = resume_state(folder_of(by_heart))
    assert differing(whole["net"], resumed["net"]) == []
    assert [e["losses"] for e in whole["history"]] == [e["losses"] for e in resumed["history"]]


FAULTS = dict(missing="cannot be used", damaged="cannot be used", other="other data or constants")


@pytest.mark.parametrize("fault, complaint", FAULTS.items())
def test_nothing_to_resume(tiny, trained, fault, complaint):
    folder_of(tiny).mkdir()
    if fault == "other":
        shutil.copy(trained / "crnn.resume.pth", folder_of(tiny))
    elif fault == "damaged":
        (folder_of(tiny) / "crnn.resume.pth").write_bytes(b"half of it")
    tiny.set(RESUME=True, EPOCHS=3)
    with pytest.raises(InputError, match=f"crnn.resume.pth .*{complaint}.* set RESUME = False"):
        tiny.main()


@pytest.mark.parametrize("init", [None, "crnn.pth"])
def test_a_start_that_is_stopped_loses_no_model(tiny, trained, capsys, init):
    """Twice in the first epoch: the model of the day before is still there."""
    folder_of(tiny).mkdir()
    shutil.copy(trained / "crnn.pth", tiny.MODEL_PATH)
    tiny.set(INIT_WEIGHTS=init and str(trained / init))
    tiny.set(train_epoch=Mock(side_effect=KeyboardInterrupt))
    for _ in range(2):
        assert tiny.main() == 130
        assert "stopped in epoch 1: nothing was saved" in capsys.readouterr().out
    assert Path(tiny.MODEL_PATH).read_bytes() == (trained / "crnn.pth").read_bytes()
    assert list(folder_of(tiny).iterdir()) == [Path(tiny.MODEL_PATH)]


def test_the_model_of_an_earlier_training_is_kept(tiny, trained, capsys):
    folder_of(tiny).mkdir()
    shutil.copy(trained / "crnn.pth", tiny.MODEL_PATH)
    tiny.set(EPOCHS=3)  # kept once, though three epochs are saved
    tiny.main()
    (former,) = folder_of(tiny).glob("crnn.20*.pth")
    assert former.name in capsys.readouterr().out
    assert former.read_bytes() == (trained / "crnn.pth").read_bytes()


def test_a_worse_epoch_is_not_saved(tiny, capsys):
    """Of epochs that read 50, 40, 50 and 10 % of the val rows the third is kept."""
    right = iter([6, 5, 6, 1])

    def read(model, rows):
        number = next(right, 1)
        predictions = [*rows.label[:number], *[""] * (len(rows) - number)]
        return rows.drop(columns="image").assign(prediction=predictions, confidence=0.5)

    tiny.set(EPOCHS=4, read=read)
    tiny.main()
    assert load_checkpoint(tiny.MODEL_PATH).facts["epoch"] == 3


@pytest.mark.parametrize("place", ["file/crnn.pth", "file/deeper/crnn.pth"])
def test_an_output_folder_that_cannot_be_written(tiny, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    tiny.set(MODEL_PATH=str(tmp_path / place))
    with pytest.raises(SystemExit, match="^cannot write") as stop:
        crnn.run(tiny.main)
    assert "\n" not in str(stop.value)


# ---- fine-tuning


def test_starts_from_other_weights_by_character(tiny, trained, capsys):
    before = load_checkpoint(trained / "crnn.pth", learn=True)
    known = before.charset.characters
    charset = Charset("é" + known[::-1])
    tiny.set(INIT_WEIGHTS=str(trained / "crnn.pth"))
    model = tiny.make_model(charset)
    assert capsys.readouterr().out.endswith(": 'é' (U+00E9)\n")  # the character new to it
    rows = [crnn.BLANK, *charset.encode(known)]
    assert torch.equal(model.linear.weight[rows], before.linear.weight)
    others = set(differing(before.state_dict(), model.state_dict()))
    assert others == {"linear.weight", "linear.bias"}


def test_fine_tuning_keeps_the_size_and_the_averages(tiny, trained, capsys):
    before = trained / "crnn.pth"
    tiny.set(INIT_WEIGHTS=str(trained / "crnn.pth"))
    tiny.set(FROM_NOTHING=dict(tiny.FROM_NOTHING, hidden=16))
    tiny.main()
    assert "the starting weights — Accuracy" in capsys.readouterr().out
    tuned = load_checkpoint(tiny.MODEL_PATH)
    assert tuned.architecture["hidden"] == 32
    assert tuned.facts["init"] == str(trained / "crnn.pth")
    states = [load_checkpoint(path, learn=True).state_dict() for path in (tiny.MODEL_PATH, before)]
    changed = differing(*states)
    assert "cnn.0.1.weight" in changed
    assert "cnn.0.1.running_mean" not in changed
    assert not [name for name in resume_state(folder_of(tiny))["net"] if "shortcut" in name]


def test_fine_tuning_can_grow_the_network(tiny, trained):
    """New blocks change nothing at first: the starting weights go on learning with them."""
    tiny.set(INIT_WEIGHTS=str(trained / "crnn.pth"), GROW=dict(row_blocks=(1, 2), blocks=1))
    start = load_checkpoint(tiny.INIT_WEIGHTS, learn=True).eval()
    grown = tiny.make_model(start.charset).eval()
    assert len(grown.cnn) == len(start.cnn) + 4
    ink = torch.rand(2, 1, crnn.HEIGHT, 60)
    assert torch.equal(grown(ink), start(ink))
    crnn.save_checkpoint(trained / "grown.pth", grown)
    tiny.set(INIT_WEIGHTS=str(trained / "grown.pth"), GROW=dict(blocks=0))
    with pytest.raises(InputError, match="does not hold the network"):
        tiny.make_model(start.charset)


def test_norms_are_frozen_at_the_statistics_of_the_average(train):
    train.set(FROM_NOTHING=train.FROM_NOTHING | dict(frozen_norms=0.25))
    model, average = (CRNN(Charset("ab"), (8, 16, 24, 32), 16).train() for _ in range(2))
    norm = average.cnn[0][1]
    norm.running_mean.fill_(3)
    train.freeze_norms(model, average, epoch=3, epochs=4)
    assert model.cnn[0][1].training and model.cnn[0][1].running_mean.max() == 0
    train.freeze_norms(model, average, epoch=4, epochs=4)
    assert not model.cnn[0][1].training and model.cnn[0][1].running_mean.min() == 3
    assert model.cnn[1].training


def test_the_saved_weights_are_a_mean_of_the_last_steps(train):
    train.set(AVERAGE=0.5)
    mean, counts = [torch.zeros(1), torch.zeros(1, dtype=torch.long)], torch.tensor(7)
    for step in range(400):
        train.average_in(mean, [torch.tensor([float(step)]), counts], step)
    assert 250 < float(mean[0]) < 350
    assert int(mean[1]) == 7
    train.set(AVERAGE=0)  # none
    train.average_in(mean, [torch.ones(1), counts], 9)
    assert float(mean[0]) == 1


def test_weights_that_no_epoch_improves_are_not_replaced(tiny, trained, capsys):
    perfect = Mock(side_effect=lambda model, rows: rows.assign(prediction=rows.label, confidence=1))
    tiny.set(INIT_WEIGHTS=str(trained / "crnn.pth"), read=perfect)
    tiny.set(train_epoch=Mock(return_value=[1.0]), end_epoch=Mock())
    tiny.main()
    assert "nothing was saved: more labels may help" in capsys.readouterr().out
    assert not Path(tiny.MODEL_PATH).exists()
