"""Training: what it says of the data, that it learns, resumes, starts from other weights, and stops in good order."""
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from conftest import ROOT, line_image, write_csv
from crnn import Charset, load_checkpoint, load_image, read_images, read_labels

TEXTS = ["cat", "dog", "7+5", "007", "NA", "llama", "B-12", "x=3", "ok", "null", "1e5", "up", "$9.50", "a b", "Zoo", "42"]


@pytest.fixture(scope="module")
def own_csv(tmp_path_factory):
    """32 pictures of 16 texts, the same for training and validation."""
    folder = tmp_path_factory.mktemp("own data ü")
    return write_csv(folder, TEXTS * 2, source="mine", split=["train"] * 16 + ["val"] * 16)


def weights(path):
    return load_checkpoint(path)[0].state_dict()


def test_overfits_32_pictures(train, monkeypatch, tmp_path, capsys):
    texts = [f"{i * 7919 % 10000:04}" for i in range(32)]
    path = write_csv(tmp_path / "datasets", texts, split="train")
    rows = pd.read_csv(path, dtype=str)
    pd.concat([rows, rows.assign(split="val")]).to_csv(path, index=False)
    for name, value in dict(EPOCHS=40, BATCH_SIZE=8, AUGMENT=0, DROPOUT=0, LEARNING_RATE=1e-2, CHANNELS=(16, 32, 48, 64), HIDDEN=64).items():
        monkeypatch.setattr(train, name, value)
    train.main()
    output = capsys.readouterr().out
    lines = re.findall(r"^Epoch (\d+)/40 — Loss: (\d+\.\d{4}) — Accuracy: (\d+\.\d\d)% — CER: \d+\.\d\d%", output, re.M)
    assert [int(epoch) for epoch, _, _ in lines] == list(range(1, 41))
    assert max(float(accuracy) for _, _, accuracy in lines) == 100
    assert float(lines[-1][1]) < 0.1 < float(lines[0][1])
    assert "this is normal" in output  # the first epochs give blanks only
    assert f"✅ Model saved to {train.MODEL_PATH}" in output
    model, charset, facts = load_checkpoint(train.MODEL_PATH)
    assert facts["val_exact"] == 1 and charset.characters == "".join(sorted(set("".join(texts))))


def test_own_csv_with_two_columns(train, tmp_path, capsys):
    write_csv(tmp_path / "datasets", [f"{word}{i}" for i in range(6) for word in TEXTS])
    train.main()
    output = capsys.readouterr().out
    assert re.search(r"custom +\d+ +\d+ +\d+", output) and "96 rows" in output  # train, val, test by hash
    assert "Test rows, never trained on" in output and output.count(" | ") == 3


def test_says_which_rows_are_left_out_and_why(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "MIN_CHARACTER_ROWS", 2)
    folder = tmp_path / "datasets"
    path = write_csv(folder, TEXTS * 4, split="train")
    line_image("x" * 40).save(folder / "whole.png")
    (folder / "half ü.png").write_bytes((folder / "whole.png").read_bytes()[:200])
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    bad = [("missing.png", "cat"), ("half ü.png", "cat"), ("zero.png", "cat"), ("text.png", "cat"), ("0.png", ""), ("1.png", "caté"),
           ("2.png", "l" * 400), ("3.png", "a\tb")]
    rows = pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False),
                      pd.DataFrame([(p, label, "train") for p, label in bad], columns=["image_path", "label", "split"])])
    rows.to_csv(path, index=False)
    train.main()
    output = capsys.readouterr().out
    assert "left out: 4 rows, missing or unreadable picture" in output
    for name in ("missing.png", "half ü.png", "zero.png"):
        assert name in output
    assert "left out: 1 rows, empty label" in output
    assert "'é' (U+00E9)" in output and "left out: 1 rows, character outside the charset" in output
    assert "400 characters need 799 frames" in output
    assert "left out: 1 rows, line break or control character" in output
    assert "é" not in load_checkpoint(train.MODEL_PATH)[1].characters and "no val rows" in output


@pytest.mark.parametrize("content, complaint", [
    (None, "prepare_ocr_dataset.py first"), ("", "cannot be read"), ("image_path,label\n", "no rows"), ("path,label\na,b\n", "no column image_path"),
    ("image_path,label,split\na.png,abc,dev\n", "'dev'"), ("image_path,label,split\na.png,abc,train\n", "no row to train on"),
    ("image_path,label,split\na.png,abc,test\n", "no training labels")])
def test_nothing_to_train_on(train, tmp_path, content, complaint):
    Path(train.DATA_CSV).parent.mkdir()
    if content is not None:
        Path(train.DATA_CSV).write_text(content)
    with pytest.raises(SystemExit, match=complaint) as stop:
        train.main()
    assert "\n" not in str(stop.value) and train.DATA_CSV in str(stop.value)
    assert not Path(train.MODEL_PATH).exists()


def test_resuming_reaches_the_same_weights(train, own_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "DATA_CSV", str(own_csv))
    monkeypatch.setattr(train, "EPOCHS", 4)
    train.main()
    whole = torch.load(train.resume_path(), weights_only=True)["net"]

    monkeypatch.setattr(train, "MODEL_PATH", str(tmp_path / "stopped" / "crnn.pth"))
    save = train.save_state
    def stop_after_two(state, *rest):
        save(state, *rest)
        if state["epoch"] == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "save_state", stop_after_two)
    train.main()
    assert "stopped after epoch 2: set RESUME = True" in capsys.readouterr().out
    monkeypatch.setattr(train, "save_state", save)
    monkeypatch.setattr(train, "RESUME", True)
    train.main()
    resumed = torch.load(train.resume_path(), weights_only=True)["net"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    monkeypatch.setattr(train, "LEARNING_RATE", 1e-4)
    with pytest.raises(SystemExit, match="other data or other constants"):
        train.main()


def test_the_same_seed_gives_the_same_weights(train, own_csv, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "DATA_CSV", str(own_csv))
    train.main()
    first = weights(train.MODEL_PATH)
    monkeypatch.setattr(train, "MODEL_PATH", str(tmp_path / "again" / "crnn.pth"))
    train.main()
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(train.MODEL_PATH).items())


def test_a_former_model_is_kept(train, own_csv, monkeypatch):
    monkeypatch.setattr(train, "DATA_CSV", str(own_csv))
    train.main()
    first = Path(train.MODEL_PATH).read_bytes()
    train.main()
    assert Path(train.MODEL_PATH).with_suffix(".former.pth").read_bytes() == first


def test_starts_from_other_weights_by_character(train, own_csv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "DATA_CSV", str(own_csv))
    train.main()
    before, known, _ = load_checkpoint(train.MODEL_PATH)
    charset = Charset("é" + known.characters[::-1])
    torch.manual_seed(1)
    load_checkpoint(train.MODEL_PATH)  # makes a network too, from the same chance
    fresh = train.CRNN(**dict(before.architecture, num_classes=charset.num_classes)).linear.weight[charset.index["é"]]
    torch.manual_seed(1)
    model = train.carry_over(train.MODEL_PATH, charset)
    for c in known.characters:
        assert torch.equal(model.linear.weight[charset.index[c]], before.linear.weight[known.index[c]])
    assert torch.equal(model.linear.weight[0], before.linear.weight[0]) and torch.equal(model.linear.weight[charset.index["é"]], fresh)
    assert torch.equal(model.lstm.weight_ih_l0, before.lstm.weight_ih_l0)
    assert "did not know: 'é' (U+00E9)" in capsys.readouterr().out
    monkeypatch.setattr(train, "INIT_WEIGHTS", train.MODEL_PATH)
    monkeypatch.setattr(train, "MODEL_PATH", str(tmp_path / "tuned" / "crnn.pth"))
    monkeypatch.setattr(train, "HIDDEN", 16)  # the checkpoint's own counts
    train.main()
    assert "before the first epoch — Accuracy" in capsys.readouterr().out
    assert load_checkpoint(train.MODEL_PATH)[0].architecture["hidden"] == 32
    monkeypatch.setattr(train, "INIT_WEIGHTS", str(tmp_path / "no such.pth"))
    with pytest.raises(SystemExit, match="INIT_WEIGHTS = .*no such.pth.*set INIT_WEIGHTS = None"):
        train.main()


def test_a_new_shortcut_head_changes_no_learned_weights(train, own_csv, tmp_path, monkeypatch):
    """With INIT_WEIGHTS the second loss has no part in the training; from nothing it has."""
    monkeypatch.setattr(train, "DATA_CSV", str(own_csv))
    trained = []
    for init in (None, str(tmp_path / "start.pth")):
        for weight in (0.1, 5.0):
            monkeypatch.setattr(train, "INIT_WEIGHTS", init)
            monkeypatch.setattr(train, "SHORTCUT_WEIGHT", weight)
            train.main()
            state = torch.load(train.resume_path(), weights_only=True)
            trained.append(state["net"]["crnn.convolutions.0.weight"])
        shutil.copy(train.MODEL_PATH, tmp_path / "start.pth")
    assert not torch.equal(trained[0], trained[1]) and torch.equal(trained[2], trained[3])


@pytest.mark.parametrize("keep_last, kept", [(False, [0, 0, 2, 2]),  # of equally good ones the last
                                             (True, [0, 1, 2, 3])])
def test_weights_that_no_epoch_improves_are_kept(train, monkeypatch, keep_last, kept):
    monkeypatch.setattr(train, "KEEP_LAST", keep_last)
    charset = Charset("abc")
    model = train.CRNN(charset.num_classes, 32, train.CHANNELS, train.HIDDEN)
    rows = pd.DataFrame(dict(split=["train", "val"]))
    state, epochs_kept = dict(epoch=0, best=-1.0), []
    for epoch, exact in enumerate([0.5, 0.4, 0.5, 0.1]):
        train.keep_if_best(dict(state, epoch=epoch), model, charset, rows, exact, 0.0)
        state["best"] = max(state["best"], exact)
        epochs_kept.append(load_checkpoint(train.MODEL_PATH)[2]["epoch"])
    assert epochs_kept == kept


@pytest.mark.parametrize("place", ["file/crnn.pth", "file/deeper/crnn.pth"])
def test_an_output_folder_that_cannot_be_written(train, own_csv, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(train, "MODEL_PATH", str(tmp_path / place))
    with pytest.raises(SystemExit, match="Set MODEL_PATH") as stop:
        train.main()
    assert "\n" not in str(stop.value)


def test_a_full_disk_during_training(train, own_csv, monkeypatch):
    monkeypatch.setattr(train, "DATA_CSV", str(own_csv))
    train.main()
    before = Path(train.MODEL_PATH).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(train, "check_output_folder", lambda: None)  # the disk fills up during the epoch
    with pytest.raises(SystemExit, match="No space left on device"):
        train.main()
    assert Path(train.MODEL_PATH).read_bytes() == before


# ---- the parts

@pytest.mark.parametrize("max_memory", [8, 0], ids=["in memory", "in a file"])
def test_buckets_hold_every_row(train, tmp_path, monkeypatch, capsys, max_memory):
    path = write_csv(tmp_path / "datasets", TEXTS, split="train")
    monkeypatch.setattr(train, "MAX_MEMORY", max_memory)
    Path(train.MODEL_PATH).parent.mkdir()
    charset = train.read_rows("")[1]
    assert charset.characters == "".join(sorted(set("".join(TEXTS))))
    read = []
    for width, bucket in train.load_rows(*train.read_rows(""))[0].items():
        assert bucket.pixels.dtype == torch.uint8 and bucket.pixels.shape[1:] == (1, 32, width)
        for pixels, target, length in zip(bucket.pixels, bucket.targets, bucket.lengths):
            label = charset.decode(target[:length].tolist())
            read.append(label)
            picture = load_image(Path(path).parent / f"{TEXTS.index(label)}.png")
            assert torch.equal(pixels[0, :, :picture.shape[1]], picture) and (pixels[0, :, picture.shape[1]:] == 255).all()
            assert width - picture.shape[1] < (16 if width <= 256 else 32)
    assert sorted(read) == sorted(TEXTS)
    assert ("temporary file" in capsys.readouterr().out) == (max_memory == 0)


def test_batches_cover_an_epoch_once(train, own_csv, monkeypatch):
    monkeypatch.setattr(train, "DATA_CSV", str(own_csv))
    buckets, scored = train.load_rows(*train.read_rows(""))
    batches = train.shuffled_batches(buckets, train.common_sizes(buckets), 3)
    seen = [(bucket.width, i) for bucket, indices in batches for i in indices.tolist()]
    assert len(seen) == len(set(seen)) == sum(len(bucket.pixels) for bucket in buckets.values())
    assert max(len(indices) for _, indices in batches) == 3 and len(seen) + len(scored) == len(read_labels(own_csv))


def test_spaces_at_the_ends_of_labels_are_not_learned(train, tmp_path, capsys):
    write_csv(tmp_path / "datasets", [" cat", "a dog ", "up"], split="train")
    rows, charset = train.read_rows("")
    assert list(rows.label) == ["cat", "a dog", "up"] and " " in charset.characters
    assert "2 labels begin or end with a space" in capsys.readouterr().out


def test_few_pictures_get_more_epochs(train, own_csv, monkeypatch, capsys):
    monkeypatch.setattr(train, "DATA_CSV", str(own_csv))
    monkeypatch.setattr(train, "MIN_STEPS", 10)
    train.main()
    epochs, batches = map(int, re.search(r"(\d+) epochs of (\d+) batches", capsys.readouterr().out).groups())
    assert (epochs - 1) * batches < 10 <= epochs * batches and len(pd.read_csv(Path(train.MODEL_PATH).parent / "history.csv")) == epochs


def test_updates_are_made_orthogonal(train):
    torch.manual_seed(0)
    for rows, columns in ((24, 60), (60, 24)):  # a square one may have singular values near 0, which stay small
        singular = torch.linalg.svdvals(train.orthogonal(torch.randn(3, rows, columns)))
        assert singular.min() > 0.3 and singular.max() < 1.5


def test_every_weight_is_learned_by_one_optimizer(train):
    net = train.WithShortcut(train.CRNN(10, 32, train.CHANNELS, train.HIDDEN), shortcut_weight=0.1)
    optimizers, _ = train.make_optimizers(net, 10)
    learned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(learned) == sorted(id(p) for p in net.parameters())
    assert all(p.ndim > 1 for p in optimizers[0].param_groups[0]["params"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_precisions_train(train, own_csv, monkeypatch, capsys, precision):
    monkeypatch.setattr(train, "DATA_CSV", str(own_csv))
    monkeypatch.setattr(train, "PRECISION", precision)
    train.main()
    assert f"in torch.{precision}" in capsys.readouterr().out
    assert all(tensor.dtype == torch.float32 for tensor in weights(train.MODEL_PATH).values() if tensor.is_floating_point())


# ---- several processes, and processes that are killed

def script(train, path, **constants):
    """A script that sets the constants of the fixture, and these, and trains."""
    named = {name: getattr(train, name) for name in ("MODEL_PATH", "DATA_CSV", "NUM_WORKERS", "CHANNELS", "HIDDEN", "MIN_STEPS",
                                                     "MIN_CHARACTER_ROWS", "DEVICE")}
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_crnn\n"
                    f"vars(train_crnn).update({dict(named, **constants)!r})\nif __name__ == '__main__':\n    train_crnn.main()\n")
    return str(path)


def overfitting(folder):
    """A csv of 32 pictures that stand in train, val and test."""
    path = write_csv(folder, [f"{i * 7919 % 10000:04}" for i in range(32)], split="train")
    rows = pd.read_csv(path, dtype=str)
    pd.concat([rows, rows.assign(split="val"), rows.assign(split="test")]).to_csv(path, index=False)


def test_two_processes_learn_what_one_does(train, tmp_path):
    overfitting(tmp_path / "datasets")
    path = script(train, tmp_path / "run.py", EPOCHS=40, BATCH_SIZE=8, AUGMENT=0, CHANNELS=(16, 32, 48, 64), HIDDEN=64)
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", path],
                         capture_output=True, text=True, encoding="utf-8", timeout=150)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(re.findall("^Epoch", run.stdout, re.M)) == 40 and run.stdout.count("✅") == 1  # one of them speaks
    assert "40 epochs of 4 batches on cpu" in run.stdout and "2 processes" in run.stdout
    assert re.search(r"^Epoch 40/40 .* Accuracy: (100|9\d)\.", run.stdout, re.M)
    assert re.search(r"custom +32 +(100|9\d)\.", run.stdout)  # every test row is read once
    facts = load_checkpoint(train.MODEL_PATH)[2]
    assert facts["val_exact"] > 0.9


def test_processes_must_share_a_batch_equally(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="BATCH_SIZE = 32 cannot be shared equally among 3"):
        train.main()


def test_killed_and_resumed_reaches_the_same_weights(train, tmp_path):
    """kill -9 somewhere in the second half, then RESUME: the very weights of an uninterrupted run."""
    overfitting(tmp_path / "datasets")
    constants = dict(EPOCHS=30, BATCH_SIZE=8)
    subprocess.run([sys.executable, script(train, tmp_path / "whole.py", **constants)], check=True, capture_output=True, timeout=300)
    whole = torch.load(train.resume_path(), weights_only=True)

    model = tmp_path / "killed" / "crnn.pth"
    killed = subprocess.Popen([sys.executable, script(train, tmp_path / "killed.py", MODEL_PATH=str(model), **constants)],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8")
    for line in killed.stdout:
        if line.startswith("Epoch 17/"):
            killed.kill()
    killed.wait()
    left = torch.load(model.with_suffix(".resume.pth"), weights_only=True)
    assert killed.returncode != 0 and 16 <= left["epoch"] < 30
    load_checkpoint(model)  # whole
    subprocess.run([sys.executable, script(train, tmp_path / "resumed.py", MODEL_PATH=str(model), RESUME=True, **constants)],
                   check=True, capture_output=True, timeout=300)
    resumed = torch.load(model.with_suffix(".resume.pth"), weights_only=True)
    assert all(torch.equal(whole["net"][name], resumed["net"][name]) for name in whole["net"])
    assert [e["loss"] for e in whole["history"]] == [e["loss"] for e in resumed["history"]]
    assert len(pd.read_csv(model.parent / "history.csv")) == 30
    with Image.open(model.parent / "training_curves.png") as curves:
        assert curves.width > 800


def test_empty_paper_is_to_be_read_as_nothing(train, own_csv, monkeypatch, capsys):
    torch.manual_seed(0)
    paper = train.empty_paper(50, 32, 96, torch.device("cpu"))
    assert paper.shape == (50, 1, 32, 96) and paper.min() == 0 and 0 < paper.max() <= 1 and (paper.amax((1, 2, 3)) == 0).any()
    assert paper.mean((1, 2, 3)).max() <= 0.5 and (paper.amax((1, 2, 3)) > 0.99).float().mean() > 0.5  # stretched, as load_image does it
    monkeypatch.setattr(train, "DATA_CSV", str(own_csv))
    monkeypatch.setattr(train, "BLANKS", 1.0)
    monkeypatch.setattr(train, "EPOCHS", 30)
    train.main()
    model, charset, _ = load_checkpoint(train.MODEL_PATH)
    assert {reading.text for reading in read_images(model, charset, list(255 - (paper * 255)[:, 0].byte()), 8)} == {""}


def test_augmentation_keeps_the_text_readable(train):
    torch.manual_seed(0)
    ink = train.to_ink(load_image(line_image("Rg7")))[None, None].repeat(200, 1, 1, 1)
    changed = train.augment(ink, 1.0)
    assert changed.shape == ink.shape and torch.isfinite(changed).all()
    share = changed.clamp(0, 1).sum((1, 2, 3)) / ink.sum((1, 2, 3))
    assert share.min() > 0.4 and share.max() < 2.2  # neither wiped out nor drowned
    assert (changed - ink).abs().mean((1, 2, 3)).min() > 0.005  # each is another picture
    assert torch.allclose(train.augment(ink, 0.0).sum(), ink.sum(), rtol=0.12)
