"""Training: what it says of the data, that it learns, resumes, starts from other weights, stops."""

import re
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from conftest import line_image, write_csv
from PIL import Image

import crnn
from crnn import CRNN, Charset, InputError, load_checkpoint, load_image

TEXTS = ["cat", "dog", "7+5", "007", "NA", "llama", "null", "1e5", "up", "$9.50", "a b", "42"]


@pytest.fixture
def tiny(train, tmp_path):
    """The training script on 24 images of 12 texts, the same for training and validation."""
    splits = ["train"] * 12 + ["val"] * 12
    path = write_csv(tmp_path / "own data ü", TEXTS * 2, source="mine", split=splits)
    train.set(DATA_CSV=str(path), write_history=Mock())  # drawing curves takes half of the time
    return train


@pytest.fixture
def by_heart(train):
    """The training script, set to learn 32 numbers by heart that stand in train, val and test."""
    path = write_csv(Path(train.DATA_CSV).parent, [f"{i * 7919 % 10000:04}" for i in range(32)])
    rows = pd.read_csv(path, dtype=str)
    pd.concat([rows.assign(split=each) for each in ("train", "val", "test")]).to_csv(path)
    fast = dict(matrix_learning_rate=2e-2, learning_rate=1e-2, channels=(16, 32, 48, 64), hidden=64)
    train.set(FROM_NOTHING=train.FROM_NOTHING | fast, EPOCHS=20, BATCH_SIZE=8, AUGMENT=0, BLANKS=0)
    return train


def resume_state(train):
    """What a training can go on from, and with it the network, net, after the last epoch."""
    return torch.load(train.resume_path(), weights_only=True)


def differing(these, those):
    """The names under which two networks' weights differ."""
    return [name for name in these if not torch.equal(these[name], those[name])]


# ---- learning


def test_overfits_32_images(by_heart, capsys):
    by_heart.set(write_history=Mock())
    by_heart.main()
    output = capsys.readouterr().out
    line = r"^Epoch (\d+)/20 — Loss: (\d+\.\d{4}) — Accuracy: (\d+\.\d\d)% — CER: \d+\.\d\d%"
    epochs, losses, accuracies = zip(*re.findall(line, output, re.M))
    assert list(map(int, epochs)) == list(range(1, 21))
    assert max(map(float, accuracies)) == 100
    assert float(losses[-1]) < 0.1
    assert "this is normal" in output  # the first epochs give blanks only
    assert f"✅ Model saved to {by_heart.MODEL_PATH}" in output
    model = load_checkpoint(by_heart.MODEL_PATH)
    assert model.charset.characters == "0123456789"
    assert model.calibration != crnn.UNCALIBRATED


def test_two_processes_learn_what_one_does(by_heart, tmp_path):
    output = by_heart.run(tmp_path, processes=2)
    assert len(re.findall("^Epoch", output, re.M)) == 20  # one of them speaks
    assert output.count("✅") == 1
    assert "gloo" not in output  # no thread of the process group is left at the end
    assert "20 epochs of 4 batches on cpu" in output
    assert re.search(r"^Epoch 20/20 .* Accuracy: (100|9\d)\.", output, re.M)
    assert re.search(r"custom +32 +(100|9\d)\.", output)  # every test row is read once


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_precisions_train(tiny, capsys, precision):
    tiny.set(PRECISION=precision)
    tiny.main()
    assert f"in torch.{precision}" in capsys.readouterr().out
    saved = load_checkpoint(tiny.MODEL_PATH).state_dict()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_the_same_seed_gives_the_same_weights(tiny, tmp_path):
    tiny.main()
    first = resume_state(tiny)["net"]
    tiny.set(MODEL_PATH=str(tmp_path / "again" / "crnn.pth"))
    tiny.main()
    assert differing(first, resume_state(tiny)["net"]) == []


def test_few_images_get_more_epochs(tiny, capsys):
    tiny.set(MIN_STEPS=10)
    tiny.main()
    numbers = re.search(r"(\d+) epochs of (\d+) batches", capsys.readouterr().out).groups()
    epochs, batches = map(int, numbers)
    assert epochs == -(-10 // batches)
    assert len(resume_state(tiny)["history"]) == epochs


def test_a_batch_must_be_shared_equally(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="BATCH_SIZE = 32: set a multiple of 3"):
        train.main()


def test_updates_are_made_orthogonal(train):
    torch.manual_seed(0)
    for rows, columns in ((24, 60), (60, 24)):  # square ones may keep singular values near 0
        singular = torch.linalg.svdvals(train.orthogonal(torch.randn(3, rows, columns)))
        assert singular.min() > 0.3
        assert singular.max() < 1.5


@pytest.mark.parametrize("init, recipe", [(None, "FROM_NOTHING"), ("other.pth", "FINE_TUNE")])
def test_every_weight_is_learned_by_one_optimizer(train, init, recipe):
    train.set(INIT_WEIGHTS=init)
    net = train.WithShortcut(CRNN(Charset("abc"), (8, 16, 24, 32), 32))
    (muon, adamw), _ = train.make_optimizers(net, 10)
    matrices, others = (each.param_groups[0]["params"] for each in (muon, adamw))
    assert sorted(map(id, matrices + others)) == sorted(map(id, net.parameters()))
    assert min(p.ndim for p in matrices) == 2
    assert muon.defaults["lr"] == getattr(train, recipe)["matrix_learning_rate"]
    assert adamw.defaults["lr"] == getattr(train, recipe)["learning_rate"]


def test_empty_paper_is_read_as_nothing(tiny):
    torch.manual_seed(0)
    paper = tiny.empty_paper(torch.ones(50, 1, 32, 96))
    darkest = paper.amax((1, 2, 3))
    assert paper.min() == 0
    assert darkest.min() == 0  # some is spotless
    assert (darkest > 0.99).float().mean() > 0.5  # most is stretched, as load_image does it
    assert paper.mean((1, 2, 3)).max() <= 0.5
    tiny.set(BLANKS=1.0, EPOCHS=30)
    tiny.main()
    assert resume_state(tiny)["history"][-1]["loss"] < 0.1  # nothing is what it learned
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


def test_says_which_rows_are_left_out_and_why(train, capsys):
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
    counts, reasons = zip(*re.findall(r"left out: (\d) rows, (\w+)", output))
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


def test_without_val_rows_training_rows_stand_in(train, capsys):
    write_csv(Path(train.DATA_CSV).parent, TEXTS, split="train")
    train.main()
    assert "no val rows" in capsys.readouterr().out


def test_spaces_at_the_ends_of_labels_are_not_learned(train, capsys):
    write_csv(Path(train.DATA_CSV).parent, [" cat", "a dog ", "up"], split="train")
    rows, charset = train.read_rows("")
    assert list(rows.label) == ["cat", "a dog", "up"]
    assert " " in charset.characters
    assert "2 labels " in capsys.readouterr().out


def test_buckets_hold_every_row(train):
    folder = write_csv(Path(train.DATA_CSV).parent, TEXTS, split="train").parent
    rows, charset = train.read_rows("")
    labels = []
    for width, bucket in train.load_rows(rows, charset)[0].items():
        assert bucket.images.dtype == torch.uint8
        assert bucket.images.shape[1:] == (1, 32, width)
        for pixels, target, length in zip(*bucket):
            labels.append(charset.decode(target[:length].tolist()))
            image = load_image(folder / f"{TEXTS.index(labels[-1])}.png")
            assert torch.equal(pixels[0, :, : image.shape[1]], image)
            assert (pixels[0, :, image.shape[1] :] == 255).all()
            assert width - image.shape[1] < max(16, width / 8)
    assert sorted(labels) == sorted(TEXTS)


def test_batches_cover_an_epoch_once(tiny):
    buckets, scored = tiny.load_rows(*tiny.read_rows(""))
    batches = tiny.shuffled_batches(buckets, tiny.common_sizes(buckets), 3)
    seen = [(bucket.images.shape[3], i) for bucket, indices in batches for i in indices.tolist()]
    assert len(seen) == len(set(seen))
    assert len(seen) == sum(len(bucket.images) for bucket in buckets.values())
    assert len(seen) + len(scored) == len(crnn.read_labels(tiny.DATA_CSV))
    assert max(len(indices) for _, indices in batches) == 3


# ---- stopping and going on


def test_resuming_reaches_the_same_weights(tiny, tmp_path, capsys):
    tiny.set(EPOCHS=4)
    tiny.main()
    whole = resume_state(tiny)["net"]
    tiny.set(MODEL_PATH=str(tmp_path / "stopped" / "crnn.pth"))
    tiny.set(write_history=Mock(side_effect=[None, KeyboardInterrupt]))
    tiny.main()
    assert "stopped after epoch 2; with RESUME = True" in capsys.readouterr().out
    tiny.set(write_history=Mock(), RESUME=True)
    tiny.main()
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert differing(whole, resume_state(tiny)["net"]) == []


def test_killed_and_resumed_reaches_the_same_weights(by_heart, tmp_path):
    """kill -9 in the second half, then RESUME: the very weights of an uninterrupted run."""
    by_heart.set(EPOCHS=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_heart.module, "write_history", Mock())
        by_heart.main()
    whole = resume_state(by_heart)
    by_heart.set(MODEL_PATH=str(tmp_path / "killed" / "crnn.pth"))
    killed = subprocess.Popen(by_heart.command(tmp_path), stdout=subprocess.PIPE, encoding="utf-8")
    for line in killed.stdout:
        if line.startswith("Epoch 7/"):
            killed.kill()
    assert killed.wait() != 0
    assert resume_state(by_heart)["epoch"] in range(6, 12)
    load_checkpoint(by_heart.MODEL_PATH)  # whole
    by_heart.set(RESUME=True)
    by_heart.main()
    resumed, folder = resume_state(by_heart), Path(by_heart.MODEL_PATH).parent
    assert differing(whole["net"], resumed["net"]) == []
    assert [e["losses"] for e in whole["history"]] == [e["losses"] for e in resumed["history"]]
    assert len(pd.read_csv(folder / "history.csv")) == 12
    assert Image.open(folder / "training_curves.png").width > 800


@pytest.mark.parametrize("fault, complaint", dict(missing="", damaged="", other="of other").items())
def test_nothing_to_resume(tiny, fault, complaint):
    if fault != "missing":
        tiny.main()
    if fault == "damaged":
        tiny.resume_path().write_bytes(b"half of it")
    tiny.set(RESUME=True, WEIGHT_DECAY=0.5)
    with pytest.raises(InputError, match=f"crnn.resume.pth .*{complaint}.* set RESUME = False"):
        tiny.main()


def test_resuming_needs_the_same_constants_but_for_free_ones(tiny):
    rows, _ = tiny.read_rows("")
    before = tiny.fingerprint(rows)

    def tells(name, value):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny.module, name, value, raising=False)
            return tiny.fingerprint(rows) != before

    source = Path(tiny.__file__).read_text(encoding="utf-8")
    constants = set(re.findall("^([A-Z_]+) = ", source, re.M)) - {"FREE"}
    assert {name for name in constants if not tells(name, "other")} == tiny.FREE - {"FREE"}
    assert tells("A_NEW_CONSTANT", 1)
    assert tells("FINE_TUNE", dict(tiny.FINE_TUNE, frozen_norms=0.5))
    for column in ("image_path", "label", "split"):
        assert tiny.fingerprint(rows.assign(**{column: "other"})) != before


def test_ctrl_c_before_there_is_a_model(tiny, capsys):
    tiny.set(train_epoch=Mock(side_effect=KeyboardInterrupt))
    assert tiny.main() == 130
    assert "stopped after epoch 0" in capsys.readouterr().out
    assert not Path(tiny.MODEL_PATH).exists()


def test_a_former_model_is_kept(tiny, capsys):
    tiny.main()
    first = Path(tiny.MODEL_PATH).read_bytes()
    tiny.main()
    assert "crnn.former.pth" in capsys.readouterr().out
    assert Path(tiny.MODEL_PATH).with_suffix(".former.pth").read_bytes() == first


def test_weights_that_no_epoch_improves_are_kept(train):
    model, rows = CRNN(Charset("abc"), (8, 16, 24, 32), 32), pd.DataFrame(dict(split=["train"]))
    state, kept = dict(best=-1.0), []
    for epoch, exact in enumerate([0.5, 0.4, 0.5, 0.1]):
        state["epoch"] = epoch
        train.keep_if_best(state, model, "a name", exact, 0.0, rows)
        kept.append(load_checkpoint(train.MODEL_PATH).facts["epoch"])
    assert kept == [0, 0, 2, 2]  # of equally good ones the last


@pytest.mark.parametrize("place", ["file/crnn.pth", "file/deeper/crnn.pth"])
def test_an_output_folder_that_cannot_be_written(tiny, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    tiny.set(MODEL_PATH=str(tmp_path / place))
    with pytest.raises(SystemExit, match="^cannot write") as stop:
        crnn.run(tiny.main)
    assert "\n" not in str(stop.value)


def test_a_full_disk_leaves_the_model_as_it_is(tiny, monkeypatch):
    tiny.main()
    before, full = Path(tiny.MODEL_PATH).read_bytes(), OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left on device"):
        tiny.main()
    assert Path(tiny.MODEL_PATH).read_bytes() == before


def test_starts_from_other_weights_by_character(tiny, capsys):
    tiny.main()
    before = load_checkpoint(tiny.MODEL_PATH, learn=True)
    known = before.charset.characters
    charset = Charset("é" + known[::-1])
    torch.manual_seed(1)
    load_checkpoint(tiny.MODEL_PATH)  # makes a network too, from the same chance
    fresh = CRNN(charset, **before.architecture).linear.weight
    torch.manual_seed(1)
    tiny.set(INIT_WEIGHTS=tiny.MODEL_PATH)
    model = tiny.starting_model(charset)
    assert capsys.readouterr().out.endswith(": 'é' (U+00E9)\n")  # the character new to it
    new, e = model.linear.weight, charset.index["é"]
    rows = [crnn.BLANK, *charset.encode(known)]
    assert torch.equal(new[rows], before.linear.weight)
    assert torch.equal(new[e], fresh[e])
    others = set(differing(before.state_dict(), model.state_dict()))
    assert others == {"linear.weight", "linear.bias"}


def test_fine_tuning_keeps_the_size_and_the_averages(tiny, tmp_path, capsys):
    tiny.main()
    before = resume_state(tiny)["net"]
    tiny.set(INIT_WEIGHTS=tiny.MODEL_PATH, MODEL_PATH=str(tmp_path / "tuned" / "crnn.pth"))
    tiny.set(FROM_NOTHING=dict(tiny.FROM_NOTHING, hidden=16))
    tiny.main()
    assert "the starting weights — Accuracy" in capsys.readouterr().out
    assert load_checkpoint(tiny.MODEL_PATH).architecture["hidden"] == 32
    changed = differing(resume_state(tiny)["net"], before)
    assert "crnn.norms.0.weight" in changed
    assert "crnn.norms.0.running_mean" not in changed
    tiny.set(INIT_WEIGHTS="no such.pth")
    with pytest.raises(InputError, match="no such.pth"):
        tiny.main()


def test_the_mean_with_the_starting_weights(tiny, tmp_path, capsys):
    tiny.main()
    before = load_checkpoint(tiny.MODEL_PATH, learn=True).float().state_dict()
    score = Mock(wraps=tiny.score)
    tiny.set(INIT_WEIGHTS=tiny.MODEL_PATH, MODEL_PATH=str(tmp_path / "tuned" / "crnn.pth"))
    tiny.set(score=score)
    tiny.main()
    assert "the mean of the first and last weights — Accuracy" in capsys.readouterr().out
    mean, after = score.call_args.args[1].state_dict(), resume_state(tiny)["net"]
    for name in ("linear.weight", "convolutions.0.weight", "norms.0.running_mean"):
        assert torch.allclose(mean[name], (before[name] + after[f"crnn.{name}"]) / 2)


@pytest.mark.parametrize("best, kept", [(0.9, True), (1.0, False)])
def test_a_mean_that_reads_no_better_is_not_kept(train, best, kept):
    model = CRNN(Charset("abc"), (8, 16, 24, 32), 32)
    rows = pd.DataFrame(dict(label=["a"], prediction=["a"], source=["s"], split=["train"]))
    train.set(read=lambda model, val: val)
    train.score(dict(epoch=1, best=best), model, "the mean", rows, rows)
    assert Path(train.MODEL_PATH).exists() == kept


def test_a_new_shortcut_head_changes_no_learned_weights(tiny, tmp_path):
    trained, start = [], str(tmp_path / "start.pth")
    for init, path in ((None, start), (start, str(tmp_path / "tuned.pth"))):
        for weight in (0.1, 5.0):
            tiny.set(FROM_NOTHING=dict(tiny.FROM_NOTHING, shortcut_weight=weight))
            tiny.set(INIT_WEIGHTS=init, MODEL_PATH=path)
            tiny.main()
            trained.append(resume_state(tiny)["net"])
    assert "crnn.convolutions.0.weight" in differing(trained[0], trained[1])
    assert differing(trained[2], trained[3]) == []
    assert "shortcut.weight" in trained[0]
    assert "shortcut.weight" not in trained[2]
