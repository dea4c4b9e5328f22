"""Charset, pictures, network, decoding, checkpoints, csv files and scores."""
import math
import os
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import line_image
import crnn
from crnn import (BLANK, CRNN, UNCALIBRATED, Charset, Reading, add_split, calibrate, calibrated, calibration_error, fold_lookalikes,
                  frames_needed, greedy_decode, load_checkpoint, load_image, num_frames, pad_batch, read_images, read_labels, save_checkpoint, score_table, whole_file, write_labels)
from prepare_ocr_dataset import CHARSET


def small_model(charset, seed=0):
    torch.manual_seed(seed)
    model = CRNN(charset.num_classes, channels=(8, 16, 24, 32), hidden=16)
    for norm in model.norms:  # as after training, so that padding would leak if it could
        torch.nn.init.normal_(norm.bias), torch.nn.init.normal_(norm.running_mean, 0, 0.1)
    return model.eval()


# ---- charset

@pytest.mark.parametrize("label", ["a", "Hello, World!", "007", " a b ", "√16 ≤ 4.5 ≠ π ± × ÷ ≥", '"', "\\", CHARSET])
def test_charset_round_trip(label):
    charset = Charset(CHARSET)
    indices = charset.encode(label)
    assert charset.decode(indices) == label
    assert BLANK not in indices and all(1 <= i < charset.num_classes for i in indices)


def test_charset_is_ascii_and_math():
    assert len(CHARSET) == 103 and Charset(CHARSET).num_classes == 104
    assert CHARSET[:95] == "".join(map(chr, range(32, 127))) and CHARSET[95:] == "×÷±√π≤≥≠"


def test_charset_refuses_duplicates_and_strangers():
    with pytest.raises(ValueError, match=r"'b' \(U\+0062\)"):
        Charset("abcb")
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\)"):
        Charset("abc").encode("bé")
    with pytest.raises(ValueError, match="empty"):
        Charset("")
    for index in (BLANK, 4, -1):  # Python would read -1 as the last character
        with pytest.raises(ValueError, match="class"):
            Charset("abc").decode([index])


# ---- pictures

def reference():
    return load_image(line_image("R7"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "I", "F", "HSV", "YCbCr"])
def test_every_mode_gives_the_same_picture(mode):
    grey = line_image("R7")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = grey.convert("RGB").convert(mode) if mode in ("HSV", "YCbCr", "CMYK") else grey.convert(mode)
    tensor = load_image(image)
    assert tensor.dtype == torch.uint8 and tensor.shape == reference().shape
    assert (tensor.float() - reference().float()).abs().mean() < (12 if mode == "1" else 2)


@pytest.mark.parametrize("text", ["R7", "W", ".", "|", "EMBW#@", "l", "-"])
def test_polarity_does_not_matter(text):
    grey = line_image(text)
    light_on_dark = Image.eval(grey, lambda tone: 255 - tone)
    assert torch.equal(load_image(grey), load_image(light_on_dark))
    assert load_image(grey).float().mean() > 128


@pytest.mark.parametrize("tone", [0, 255])
def test_transparent_background(tone):
    """Black or white ink on a transparent ground of any hidden colour."""
    alpha = np.asarray(Image.eval(line_image("R7"), lambda t: 255 - t))
    for hidden in (0, 255):
        rgba = np.where(alpha[..., None] > 0, tone, hidden).repeat(3, 2)
        image = Image.fromarray(np.concatenate([rgba, alpha[..., None]], 2).astype(np.uint8), "RGBA")
        assert (load_image(image).float() - reference().float()).abs().mean() < 2


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    line_image("R7").rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(load_image(tmp_path / "turned.png"), reference())


def test_arrays_are_pictures():
    grey = np.asarray(line_image("R7"))
    for array in (grey, grey / 255, grey > 128, np.repeat(grey[..., None], 3, 2), grey.astype(np.float32) / 255):
        assert (load_image(array).float() - reference().float()).abs().mean() < 12


def test_odd_sizes():
    assert load_image(Image.new("L", (40, 1), 255)).shape == (32, 1280)
    assert load_image(Image.new("L", (1, 40), 255)).shape == (32, 1)
    assert load_image(Image.new("L", (3, 100), 255), height=64).shape == (64, 2)
    blank = load_image(Image.fromarray(np.random.default_rng(0).integers(228, 236, (40, 90), dtype=np.uint8)))
    assert blank.min() > 190  # faint noise is not stretched into ink


@pytest.mark.parametrize("content, complaint", [
    (b"", "not a picture"), (b"this is text", "not a picture"), (None, "no such file"), ("half", "cannot be read"), ("wide", "too wide")])
def test_unreadable_pictures_are_named(tmp_path, content, complaint):
    path = tmp_path / "täst 1.png"
    if content == "half":
        line_image("Rg7 and more of it").save(path)
        path.write_bytes(path.read_bytes()[:300])
    elif content == "wide":
        Image.new("L", (9000, 2), 255).save(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as error:
        load_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ---- network

def test_frames_follow_the_width():
    model = small_model(Charset("ab"))
    for width in (1, 3, 4, 5, 31, 32, 33):
        logits, frames = model(torch.zeros(1, 1, 32, width), torch.tensor([width]))
        assert logits.shape == (num_frames(width), 1, 3) and frames.tolist() == [math.ceil(width / 4)]


def test_a_line_reads_the_same_alone_and_in_a_batch():
    charset = Charset(CHARSET)
    model = small_model(charset)
    pictures = [load_image(line_image(text)) for text in ("a", "wide enough to matter", "17", "€")]
    ink, widths = pad_batch(pictures)
    together, frames = model(ink, widths)
    for i, picture in enumerate(pictures):
        alone, count = model(*pad_batch([picture]))
        assert count[0] == frames[i]
        torch.testing.assert_close(together[:frames[i], i], alone[:, 0], atol=2e-5, rtol=1e-4)
    assert [r.text for r in read_images(model, charset, pictures, 4)] == [r.text for r in read_images(model, charset, pictures, 1)]


def test_reading_computes_what_training_learned():
    """Without gradients, batch norm is folded into the convolutions and the work is done in place."""
    model = small_model(Charset(CHARSET))
    torch.manual_seed(0)
    for norm in model.norms:
        for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            values.copy_(torch.rand(len(values)) + 0.3)
    ink, widths = pad_batch([load_image(line_image(text)) for text in ("a", "wide enough to matter", "17")])
    learned, frames = model(ink, widths)
    with torch.inference_mode():
        read, _ = model(ink, widths)
    assert learned.requires_grad and not read.requires_grad
    for i, count in enumerate(frames):
        torch.testing.assert_close(read[:count, i], learned[:count, i].detach(), atol=1e-4, rtol=1e-4)


# ---- CTC

@pytest.mark.parametrize("path, text", [("--a-b", "ab"), ("aab-b", "abb"), ("-----", ""), ("aaaaa", "a"), ("a-a-a", "aaa"),
                                        ("abba-", "aba"), ("bbb-b", "bb"), ("-b--a", "ba")])
def test_greedy_decoding_table(path, text):
    """Graves et al. 2006, equation 1: merge repeats, then remove blanks."""
    logits = torch.full((len(path) + 3, 1, 3), -9.0)  # (T, N, C); three frames of padding, full of "b", are not read
    logits[:, 0, 2] = 9
    for t, c in enumerate(path):
        logits[t, 0] = -9
        logits[t, 0, "-ab".index(c)] = 9
    reading, = greedy_decode(logits, torch.tensor([len(path)]), Charset("ab"))
    assert reading.text == text and reading.confidence > 0.99
    assert [c.character for c in reading.characters] == list(text) and all(c.confidence > 0.99 for c in reading.characters)
    edges = [edge for c in reading.characters for edge in (c.left, c.right)]
    assert edges == sorted(edges) and all(0 <= edge <= 1 for edge in edges)


@pytest.mark.parametrize("path, text", [(" a-b ", "ab"), ("  -a ", "a"), ("a- -b", "a b"), (" - - ", "")])
def test_spaces_at_the_ends_are_margin(path, text):
    logits = torch.full((len(path), 1, 4), -9.0)  # (T, N, C)
    for t, c in enumerate(path):
        logits[t, 0, "-ab ".index(c)] = 9
    reading, = greedy_decode(logits, torch.tensor([len(path)]), Charset("ab "))
    assert reading.text == text and "".join(c.character for c in reading.characters) == text and reading.confidence > 0.99


def test_confidence_is_the_probability_of_the_text():
    probabilities = torch.tensor([[0.3, 0.7], [0.4, 0.6]])  # two frames of blank, "a"
    reading, = greedy_decode(probabilities.log()[:, None], torch.tensor([2]), Charset("a"))
    assert reading.text == "a"
    assert reading.confidence == pytest.approx(0.7 * 0.6 + 0.7 * 0.4 + 0.3 * 0.6)  # aa, a-, -a
    assert reading.characters == [("a", pytest.approx(0.7), 0, 1, [])]
    empty, = greedy_decode((1 - probabilities).log()[:, None], torch.tensor([2]), Charset("a"))
    assert empty.text == "" and empty.confidence == pytest.approx(0.7 * 0.6) and empty.characters == []


def test_batches_hold_similar_widths():
    widths = [10, 400, 12, *range(90, 150, 3), 11, 1000]
    batches = list(crnn.similar_widths(widths, 15))
    assert sorted(i for batch in batches for i in batch) == list(range(len(widths)))
    assert [[widths[i] for i in batch] for batch in batches] == [[10, 11, 12], [*range(90, 121, 3)], [*range(123, 150, 3)], [400], [1000]]
    assert list(map(len, crnn.similar_widths([50] * 7, 3))) == [3, 3, 1] and list(crnn.similar_widths([], 3)) == []


def test_small_and_condensed_lines_are_seen_closer():
    """Between high margins a line is brought nearer; condensed, it is widened; single characters and blank paper stay what they are."""
    ink = lambda image: int(((image < 155).sum(1) > 0).sum())  # rows with ink
    small = Image.new("L", (400, 120), 255)
    small.paste(line_image("Serial 4711", size=20, margin=0), (60, 50))
    seen = load_image(small)
    plain = crnn.at_height(small, 32)
    assert seen.shape[0] == 32 and ink(seen) > 2 * ink(torch.from_numpy(plain)) and seen.shape[1] > 2 * plain.shape[1]
    line = line_image("Serial number 4711")
    condensed = line.resize((line.width // 2, line.height))
    aspect = condensed.width / condensed.height
    assert 1.3 < load_image(condensed).shape[1] / (32 * aspect) <= 1.5
    for image in (line_image("c"), line_image(","), Image.new("L", (300, 100), 255), line_image("-", margin=40)):
        assert crnn.closer_view(crnn.at_height(image, 32)) is None


def test_unsure_readings_get_a_second_look(monkeypatch):
    small = Image.new("L", (200, 100), 255)
    small.paste(line_image("Rg 7", size=20, margin=0), (60, 40))
    wide, smaller = crnn.looks(load_image(small))
    ink = lambda image: int(((image < 155).sum(1) > 0).sum())  # rows with ink
    assert wide.shape[0] == smaller.shape[0] == 32
    assert ink(wide) > ink(smaller) > 1.5 * ink(load_image(small)) and wide.shape[1] > 1.25 * load_image(small).shape[1]
    assert [look.shape for look in crnn.looks(torch.full((32, 40), 255, dtype=torch.uint8))] == [(32, 50), (32, 34)]

    seen = []
    def read_once(model, charset, images, batch_size):
        seen.append(len(images))
        return [Reading(f"{image.shape[1]}", 0.9 if image.shape[1] in (300, wide.shape[1]) else 0.3, []) for image in images]
    monkeypatch.setattr(crnn, "read_once", read_once)
    sure = torch.full((32, 300), 255, dtype=torch.uint8)
    readings = crnn.read_images(None, None, [sure, load_image(small)], 8, calibration=(2.0, 0.0))
    assert seen == [2, 2] and [r.text for r in readings] == ["300", f"{wide.shape[1]}"]
    assert readings[0].confidence == crnn.calibrated(0.9, (2.0, 0.0)) > 0.9


def test_where_characters_stand_and_what_else_they_could_be():
    probabilities = torch.full((8, 1, 4), 0.01)  # (T, N, C): blank, O, 0, 1
    probabilities[:, 0, 0] = 0.97
    probabilities[1, 0] = torch.tensor([0.02, 0.6, 0.37, 0.01])
    probabilities[5, 0] = torch.tensor([0.01, 0.005, 0.005, 0.98])
    reading, = greedy_decode(probabilities.log(), torch.tensor([8]), Charset("O01"))
    assert reading.text == "O1"
    first, second = reading.characters
    assert first.alternatives == [("0", pytest.approx(0.37))] and second.alternatives == []
    assert (first.left, first.right) == (0, pytest.approx(3.5 / 8)) and (second.left, second.right) == (pytest.approx(3.5 / 8), pytest.approx(7.5 / 8))


def test_calibration_makes_confidence_the_share_of_right_readings():
    rng = np.random.default_rng(0)
    true = rng.uniform(0.02, 0.98, 4000)
    correct = rng.random(4000) < true
    overconfident = 1 / (1 + np.exp(-3 * np.log(true / (1 - true)) - 1))
    calibration = calibrate(list(overconfident), list(correct))
    assert calibration[0] == pytest.approx(1 / 3, abs=0.03) and calibration[1] == pytest.approx(-1 / 3, abs=0.1)
    after = [calibrated(c, calibration) for c in overconfident]
    assert calibration_error(overconfident, correct) > 0.1 and calibration_error(after, correct) < 0.03
    slope, offset = calibrate([0.9] * 10, [True] * 10)  # nothing to learn from
    assert 0 < slope < 10 and calibrated(0.9, (slope, offset)) > 0.85 and calibrated(0.3, UNCALIBRATED) == 0.3
    assert calibrated(1.0, (slope, offset)) <= 1 and calibrated(0.0, (slope, offset)) >= 0


@pytest.mark.parametrize("label", ["a", "ab", "aa", "aab", "abab", "aaa", "abbba"])
def test_feasibility_is_what_ctc_loss_says(label):
    target = Charset("ab").encode(label)
    for frames in range(1, 12):
        loss = F.ctc_loss(torch.zeros(frames, 1, 3).log_softmax(2), torch.tensor([target]), torch.tensor([frames]),
                          torch.tensor([len(target)]))
        assert torch.isfinite(loss) == (frames_needed(label) <= frames)


# ---- files

def test_checkpoint_round_trip(tmp_path):
    charset = Charset(CHARSET)
    model = small_model(charset)
    save_checkpoint(tmp_path / "new folder" / "ü.pth", model, charset, epoch=3)
    again, charset_again, facts = load_checkpoint(tmp_path / "new folder" / "ü.pth")
    pictures = [load_image(line_image("Round trip"))]
    ink, widths = pad_batch(pictures)
    assert torch.equal(model(ink, widths)[0], again(ink, widths)[0])
    assert charset_again.characters == CHARSET and facts == {"epoch": 3} and not again.training
    assert [p.name for p in (tmp_path / "new folder").iterdir()] == ["ü.pth"]  # no temporary file left


def test_half_precision_halves_the_file(tmp_path):
    model, charset = small_model(Charset(CHARSET)), Charset(CHARSET)
    save_checkpoint(tmp_path / "full.pth", model, charset)
    save_checkpoint(tmp_path / "half.pth", model, charset, "float16")
    assert (tmp_path / "half.pth").stat().st_size < 0.65 * (tmp_path / "full.pth").stat().st_size
    again = load_checkpoint(tmp_path / "half.pth")[0]
    assert all(a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-3, atol=1e-6)
               for a, b in zip(model.state_dict().values(), again.state_dict().values()))


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["missing", "pickle", "torch pickle", "text", "empty", "other dict", "other network"])
def test_foreign_checkpoints_are_refused(tmp_path, kind):
    path, trap = tmp_path / "model.pth", tmp_path / "trap"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trap)))
    elif kind == "torch pickle":
        torch.save(dict(format=1, charset=Malicious(trap)), path)
    elif kind == "other dict":
        torch.save(dict(state_dict={}), path)
    elif kind == "other network":
        torch.save(dict(format=1, charset="abc", architecture=dict(num_classes=9), weights={}, facts={}), path)
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else b"hello there")
    with pytest.raises(ValueError, match="train_crnn.py") as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not trap.exists()


def test_a_failed_write_leaves_the_former_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("former")
    with pytest.raises(OSError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "former" and list(tmp_path.iterdir()) == [path]


AWKWARD = ["NA", "null", "None", "nan", "007", "1e5", '"', ",", "'", '""', "a,b", " a", "#", "-", "=1+1", "\\", "True", "≤", "1.0"]


def test_awkward_labels_survive(tmp_path):
    rows = pd.DataFrame(dict(image_path=[f"{i}.png" for i in range(len(AWKWARD))], label=AWKWARD, source="x", split="train"))
    write_labels(rows, tmp_path / "data.csv")
    assert read_labels(tmp_path / "data.csv").to_dict("list") == rows.to_dict("list")


@pytest.mark.parametrize("text, complaint", [
    (None, "prepare_ocr_dataset.py first"), ("", "cannot be read"), ("image_path,label\n", "no rows"), ("image_path,text\na,b\n", "no column label"),
    ("image_path,label\na,b,c,d\n1,2\n\"", "cannot be read"), (b"image_path,label\na.png,\xff\xfe\n", "cannot be read")])
def test_unusable_csv(tmp_path, text, complaint):
    path = tmp_path / "data.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=complaint) as error:
        read_labels(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_split_by_hash():
    rows = add_split(pd.DataFrame(dict(image_path=[f"{i}.png" for i in range(4000)], label=[f"word{i % 500}" for i in range(4000)])))
    assert (rows.source == "custom").all()
    assert rows.groupby("label").split.nunique().max() == 1  # a label is in one split only
    assert rows.split.value_counts(normalize=True)["train"] == pytest.approx(0.8, abs=0.06)
    singles = add_split(pd.DataFrame(dict(image_path=[f"{i}.png" for i in range(400)], label=["a", "b"] * 200)))
    assert singles.groupby("label").split.nunique().min() == 3  # single characters are in all


# ---- scores

def test_scores_add_up_before_they_divide():
    table = score_table(["O", "b", "abcdefgh", "l"], ["0", "b", "abXdefg", "I"], ["one", "one", "two", "one"])
    assert table.loc["one", "exact"] == pytest.approx(1 / 3) and table.loc["one", "folded"] == 1
    assert table.loc["two", "CER"] == pytest.approx(2 / 8) and math.isnan(table.loc["two", "folded"])
    assert table.loc["all", "images"] == 4 and table.loc["all", "CER"] == pytest.approx(4 / 11)


def test_look_alikes():
    assert fold_lookalikes("0Oo") == "000" and fold_lookalikes("1Il|") == "1111"
    assert fold_lookalikes("CKMPSUVWXYZJ") == "ckmpsuvwxyzj" and fold_lookalikes("ABab") == "ABab"
