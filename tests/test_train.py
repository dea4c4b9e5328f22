"""Training: what it says of the data, that it learns, resumes, starts from other weights, stops."""

import re
import shutil
import subprocess
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pandas as pd
import pytest
import torch
from conftest import FONT, RECIPE, ROOT, line_image, script_in, write_csv
from PIL import Image

import crnn
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
    tiny_data(folder / "datasets")
    with pytest.MonkeyPatch.context() as patch:
        script_in(folder, "train_crnn", patch, write_history=Mock()).main()
    return folder / "model"


@pytest.fixture
def former(tiny, trained):
    """tiny, with the model of an earlier training where its own is to go."""
    Path(tiny.MODEL_PATH).parent.mkdir()
    shutil.copy(trained / "crnn.pth", tiny.MODEL_PATH)
    return tiny


@pytest.fixture
def by_heart(train):
    """The training script, set to learn 32 numbers by heart that stand in train, val and test."""
    splits = ["train"] * 32 + ["val"] * 32 + ["test"] * 32
    write_csv(Path(train.DATA_CSV).parent, NUMBERS * 3, split=splits)
    fast = dict(matrix_learning_rate=2e-2, learning_rate=1e-2, channels=(16, 32, 48, 64), hidden=64)
    train.set(FROM_NOTHING=train.FROM_NOTHING | fast, EPOCHS=20, BATCH_SIZE=8, AUGMENT=0, BLANKS=0)
    train.set(write_history=Mock())
    return train


def resume_state(model_path):
    """What a training of a model can resume from, and with it its network after the last epoch."""
    return torch.load(Path(model_path).with_name("crnn.resume.pth"), weights_only=True)


def differing(these, those):
    """The names under which two networks' weights differ."""
    return [name for name in these if not torch.equal(these[name], those[name])]


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
def test_few_images_get_more_epochs_and_a_word_of_advice(tiny, capsys, precision):
    """In both precisions, of which the file has only one; and while Excel holds the history."""
    tiny.set(MIN_STEPS=10, PRECISION=precision)
    tiny.set(write_history=Mock(side_effect=PermissionError("history.csv")))
    tiny.main()
    output = capsys.readouterr().out
    plan = rf"(\d+) epochs of (\d+) batches on cpu in torch.{precision}"
    epochs, batches = map(int, re.search(plan, output).groups())
    assert epochs == -(-10 // batches) == len(resume_state(tiny.MODEL_PATH)["history"])
    assert output.count("left as they were (history.csv)") == epochs > 1
    assert "Model saved" in output
    advice = output.index('set INIT_WEIGHTS = "ocr_crnn_model/pretrained.pth"')
    assert advice < output.index("Epoch 1/")
    saved = load_checkpoint(tiny.MODEL_PATH).state_dict()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("shape", [(3, 24, 60), (3, 60, 24)])  # square ones may keep values near 0
def test_updates_are_made_orthogonal(train, shape):
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(train.orthogonalize(torch.randn(shape)))
    assert singular.min() > 0.3
    assert singular.max() < 1.5


def test_every_weight_is_learned_by_one_optimizer_in_any_number_of_steps(train):
    net = train.WithShortcut(CRNN(Charset("abc"), (8, 16, 24, 32), 32, blocks=1))
    for steps in range(1, 40):
        parts = train.make_optimizers(net, steps)
    matrices, others = (parts[name].param_groups[0]["params"] for name in ("muon", "adamw"))
    assert sorted(map(id, matrices + others)) == sorted(map(id, net.parameters()))
    assert min(p.ndim for p in matrices) == 2
    train.set(WARM_UP=1)
    train.make_optimizers(net, 40)


def test_empty_paper_is_read_as_nothing(tiny):
    torch.manual_seed(0)
    paper = tiny.draw_empty_paper(torch.ones(50, 1, 32, 96))
    assert paper.min() == 0
    assert paper.mean((1, 2, 3)).max() <= 0.5
    assert (paper.amax((1, 2, 3)) > 0.99).float().mean() > 0.4  # much is stretched, as in reading
    tiny.set(BLANKS=1.0, EPOCHS=30)
    tiny.main()
    assert resume_state(tiny.MODEL_PATH)["history"][-1]["loss"] < 0.1  # nothing is what it learned
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
    assert "96 rows, of which used: 96" in output
    assert "Test rows, never trained on" in output
    assert output.count(" | ") == 3  # examples
    assert len(pd.read_csv(Path(train.MODEL_PATH).with_name("history.csv"))) == 1
    assert Image.open(Path(train.MODEL_PATH).with_name("training_curves.png")).width > 800


def test_says_which_rows_are_skipped_and_which_labels_are_never_trained_on(train, capsys):
    """But not of a text that occurs once: it is there to measure new texts by."""
    folder = Path(train.DATA_CSV).parent
    path = write_csv(folder, TEXTS * 4, split=["train"] * 36 + ["val"] * 12)
    (folder / "half ü.png").write_bytes((folder / "0.png").read_bytes()[:90])
    bad = {"missing.png": "cat", "half ü.png": "cat"}
    bad |= {"0.png": "", "1.png": "caté", "2.png": "l" * 400, "3.png": "a\tb"}
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(f"{name},{label},train\n" for name, label in bad.items())
        file.write("4.png,lama,val\n5.png,lama,val\n6.png,mall,val\n")
    train.set(MIN_CHARACTER_ROWS=2)
    train.main()
    output = capsys.readouterr().out
    counts, reasons = zip(*re.findall(r"skipped: (\d) rows, (\w+)", output))
    assert reasons == ("character", "empty", "label", "line", "missing")
    assert counts == ("1", "1", "1", "1", "2")
    for particulars in ("missing.png", "half ü.png", "'é' (U+00E9)", "799 frames"):
        assert particulars in output
    assert "é" not in load_checkpoint(train.MODEL_PATH).charset.characters
    line = "never trained on, as all their images are in val or test: 'lama' (2 images)\n"
    assert line in output


# What stands in the csv, constants, and what is said
MISTAKES = [
    ("image_path,label,split\na.png,abc,dev\n", {}, "{csv} has the split 'dev'"),
    ("image_path,label,split\na.png,abc,train\n", {}, "{csv} leaves no row to train on"),
    ("image_path,label,split\na.png,abc,test\n", {}, "{csv} has only val and test labels"),
    # These are found out first, before the csv is missed
    (None, dict(BATCH_SIZE=32), "BATCH_SIZE = 32: set a multiple of 3"),
    (None, dict(DEVICE="abacus"), "DEVICE = 'abacus': set cpu"),
    (None, dict(MODEL_PATH=str(ROOT)), "is no file: give it the name of one"),
    (None, dict(MODEL_PATH=FONT + "/crnn.pth"), "DejaVuSans.ttf"),
]


@pytest.mark.parametrize("content, constants, complaint", MISTAKES)
def test_one_line_says_what_is_wrong(train, monkeypatch, content, constants, complaint):
    train.set(**constants)
    monkeypatch.setenv("WORLD_SIZE", "3" if "BATCH_SIZE" in constants else "1")
    Path(train.DATA_CSV).parent.mkdir()
    if content is not None:
        Path(train.DATA_CSV).write_text(content)
    with pytest.raises((InputError, OSError)) as stop:
        train.main()
    assert complaint.format(csv=train.DATA_CSV) in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not Path(train.MODEL_PATH).is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_hold_every_row_and_train_rows_may_stand_in(train, monkeypatch, capsys, processes):
    """Where there are no val rows."""
    folder = write_csv(Path(train.DATA_CSV).parent, TEXTS, split="train").parent
    rows, charset = train.read_rows("")
    buckets, val, test = train.load_rows(rows, charset)
    assert "no val rows" in capsys.readouterr().out
    assert (len(val), len(test)) == (len(TEXTS), 0)
    train.set(BATCH_SIZE=4)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    labels, sizes = [], []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        batches = list(train.shuffle_batches(buckets, torch.Generator().manual_seed(0)))
        sizes.append([(id(bucket), len(indices)) for bucket, indices in batches])
        for pixels, target, length in (row for b, indices in batches for row in zip(*b[indices])):
            labels.append(charset.decode(target[:length].tolist()))
            image = load_image(folder / f"{TEXTS.index(labels[-1])}.png")
            assert torch.equal(pixels[0], crnn.pad(image))
    assert set(labels) == set(TEXTS)
    assert processes > 1 or len(labels) == len(TEXTS)
    assert max(size for _, size in sizes[0]) <= 4 // processes
    assert [bucket for bucket, _ in sizes[0]] == [bucket for bucket, _ in sizes[-1]]  # in step


# ---- stopping and resuming
def test_killed_and_resumed_reaches_the_same_weights(by_heart, tmp_path):
    """kill -9 in the second half, then RESUME: the very weights of an uninterrupted run."""
    by_heart.set(EPOCHS=12, AUGMENT=1.0, BLANKS=0.1, DROPOUT=0.1)
    by_heart.main()
    whole = resume_state(by_heart.MODEL_PATH)
    by_heart.set(MODEL_PATH=str(tmp_path / "killed" / "crnn.pth"))
    by_heart.constants.pop("write_history")  # a process of its own has no Mock
    killed = subprocess.Popen(by_heart.command(tmp_path), stdout=subprocess.PIPE, encoding="utf-8")
    for line in killed.stdout:
        if line.startswith("Epoch 7/"):
            killed.kill()
    assert killed.wait() != 0
    assert resume_state(by_heart.MODEL_PATH)["epoch"] in range(6, 12)
    load_checkpoint(by_heart.MODEL_PATH)  # whole
    by_heart.set(RESUME=True)
    by_heart.main()
    resumed = resume_state(by_heart.MODEL_PATH)
    assert differing(whole["net"], resumed["net"]) == []
    assert [e["losses"] for e in whole["history"]] == [e["losses"] for e in resumed["history"]]


FAULTS = dict(missing="cannot be used", damaged="cannot be used", other="other data or constants")


@pytest.mark.parametrize("fault, complaint", FAULTS.items())
def test_nothing_to_resume(former, trained, fault, complaint):
    path = Path(former.MODEL_PATH).with_name("crnn.resume.pth")
    if fault == "other":
        shutil.copy(trained / path.name, path)
    elif fault == "damaged":
        path.write_bytes(b"half of it")
    former.set(RESUME=True, EPOCHS=3)
    with pytest.raises(InputError, match=f"{path.name} .*{complaint}.* set RESUME = False"):
        former.main()


def test_other_data_and_constants_are_noticed(train):
    rows = pd.DataFrame(dict(image_path=["a"], label=["b"], split=["train"]))
    prints = [train.fingerprint(each, 9) for each in (rows, rows.assign(label="c"))]
    prints.append(train.fingerprint(rows, 8))
    for name, value in dict(FROM_NOTHING={}, AUGMENT=0.5, SEED=1, INIT_WEIGHTS="x.pth").items():
        train.set(**{name: value})
        prints.append(train.fingerprint(rows, 9))
    assert len(set(prints)) == len(prints)


def stop_in_the_second_epoch(train):
    whole = train.train_epoch
    train.set(train_epoch=Mock(wraps=whole, side_effect=[DEFAULT, KeyboardInterrupt]))
    train.main()
    train.set(train_epoch=whole, RESUME=True)


def test_a_resumed_training_knows_its_best_epoch(tiny):
    tiny.set(EPOCHS=2, read=read_well(6))
    stop_in_the_second_epoch(tiny)
    tiny.set(read=read_well(5))
    tiny.main()
    assert load_checkpoint(tiny.MODEL_PATH).facts["epoch"] == 1


def test_what_is_saved_counts_when_its_curves_are_interrupted(tiny, capsys):
    tiny.set(EPOCHS=2, read=read_well(6), write_history=Mock(side_effect=KeyboardInterrupt))
    tiny.main()
    assert "stopped after epoch 1: RESUME = True continues" in capsys.readouterr().out


def test_a_mean_with_the_start_leaves_new_characters_as_learned_also_where_it_is_resumed(former):
    write_csv(Path(former.DATA_CSV).parent, ["é", *TEXTS], split=["train"] * 12 + ["val"])
    former.set(INIT_WEIGHTS=former.MODEL_PATH, KEEP_START=0.25, EPOCHS=2, read=read_well(0, 1, 1))
    stop_in_the_second_epoch(former)  # by now, what is at INIT_WEIGHTS has learned é
    former.set(read=read_well(1))
    former.main()
    model, state = load_checkpoint(former.MODEL_PATH, learn=True), resume_state(former.MODEL_PATH)
    assert state["start"]["linear.bias"][model.charset.index["é"]] == 0
    for name, saved in model.named_parameters():
        learned, first = state["average"][f"module.{name}"], state["start"][name]
        assert torch.allclose(saved, learned.lerp(first, 0.25).where(first != 0, learned)), name


@pytest.mark.parametrize("init", [None, "crnn.pth"])
def test_a_start_that_is_stopped_loses_no_model(former, trained, capsys, init):
    """Twice in the first epoch: the model of the day before is still there."""
    former.set(INIT_WEIGHTS=init and str(trained / init))
    former.set(train_epoch=Mock(side_effect=KeyboardInterrupt))
    for _ in range(2):
        assert former.main() == 130
        assert "stopped in epoch 1: nothing was saved" in capsys.readouterr().out
    assert Path(former.MODEL_PATH).read_bytes() == (trained / "crnn.pth").read_bytes()
    assert list(Path(former.MODEL_PATH).parent.iterdir()) == [Path(former.MODEL_PATH)]


def read_well(*numbers):
    """A stand-in for read: so many of the val rows are right in one epoch after the other."""
    numbers = iter(numbers)

    def read(model, rows):
        number = next(numbers, 1)
        predictions = [*rows.label[:number], *[""] * (len(rows) - number)]
        return rows.drop(columns="image").assign(prediction=predictions, confidence=0.5)

    return read


def test_a_worse_epoch_is_not_saved_and_an_earlier_model_is_kept(former, trained, capsys):
    former.set(EPOCHS=4, read=read_well(6, 5, 6, 1))
    former.main()
    assert load_checkpoint(former.MODEL_PATH).facts["epoch"] == 3  # the last of the best
    (kept,) = Path(former.MODEL_PATH).parent.glob("crnn.20*.pth")  # once, of two saved epochs
    assert kept.name in capsys.readouterr().out
    assert kept.read_bytes() == (trained / "crnn.pth").read_bytes()


def test_weights_that_no_epoch_improves_are_not_replaced(former, trained, capsys):
    former.set(INIT_WEIGHTS=str(trained / "crnn.pth"), read=read_well(12, 11))
    former.main()
    assert "nothing was saved: more labels may help" in capsys.readouterr().out
    assert Path(former.MODEL_PATH).read_bytes() == (trained / "crnn.pth").read_bytes()


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
    tiny.set(INIT_WEIGHTS=str(trained / "crnn.pth"), FROM_NOTHING=RECIPE | dict(hidden=16))
    tiny.main()
    assert "the starting weights — Accuracy" in capsys.readouterr().out
    tuned = load_checkpoint(tiny.MODEL_PATH)
    assert tuned.architecture["hidden"] == 32
    assert tuned.facts["init"] == tiny.INIT_WEIGHTS
    paths = tiny.MODEL_PATH, tiny.INIT_WEIGHTS
    changed = differing(*(load_checkpoint(path, learn=True).state_dict() for path in paths))
    assert "cnn.0.1.weight" in changed
    assert "cnn.0.1.running_mean" not in changed
    assert not [name for name in resume_state(tiny.MODEL_PATH)["net"] if "shortcut" in name]


def test_norms_are_frozen_at_the_statistics_of_the_average(train):
    model, average = (CRNN(Charset("ab"), (8, 16, 24, 32), 16).train() for _ in range(2))
    norm = average.cnn[0][1]
    norm.running_mean.fill_(3)
    train.freeze_norms(model, average, epoch=3, epochs=4)  # in conftest, the last quarter
    assert model.cnn[0][1].training and model.cnn[0][1].running_mean.max() == 0
    train.freeze_norms(model, average, epoch=4, epochs=4)
    assert not model.cnn[0][1].training and model.cnn[0][1].running_mean.min() == 3
    assert model.cnn[1].training


def test_what_is_saved_is_the_average(trained):
    state = resume_state(trained / "crnn.pth")
    saved = load_checkpoint(trained / "crnn.pth", learn=True).state_dict()
    assert differing(saved, {name: state["average"][f"module.{name}"] for name in saved}) == []
    last = {name: state["net"][f"crnn.{name}"] for name in saved}
    assert "linear.weight" in differing(saved, last)


def test_the_saved_weights_are_a_mean_of_the_last_steps(train):
    train.set(AVERAGE=0.5)
    mean = torch.zeros(1)
    for step in range(400):
        mean = train.average_in(mean, torch.tensor([float(step)]), step)
    assert 250 < float(mean) < 350
    train.set(AVERAGE=0)  # none
    assert train.average_in(mean, torch.ones(1), 9) == 1
