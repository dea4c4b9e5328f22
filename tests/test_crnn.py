"""How a script ends, charset, image to tensor, network, decoding, reading, files and scores."""

import copy
import doctest
import io
import os
import pickle
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import CHARSET, FONT, FOREIGN, WEIGHTS, line_image
from PIL import Image, ImageDraw, ImageFont, ImageOps

import crnn
from crnn import BLANK, Charset, InputError, load_checkpoint, load_image, read_images, read_labels
from train_crnn import calibrate


def lines(*texts):
    """What load_image makes of an image of each text."""
    return [load_image(line_image(text)) for text in texts]


def paper(size, text, *places, height=20):
    """A white image of some size with a line of text at each of some places."""
    image = Image.new("L", size, 255)
    for place in places:
        image.paste(line_image(text, size=height, margin=0), place)
    return image


SMALL_LINE = paper((200, 100), "Rg 7", (60, 40))


def rows_with_ink(image):
    """How many rows of an image, uint8 (H, W), have ink in them."""
    return int((image < 155).any(1).sum())


# ---- how a script ends
ENDS = [
    (InputError("no data.csv: write one"), SystemExit, "no data.csv: write one"),
    (KeyboardInterrupt(), SystemExit, "interrupted: run the same command again .*"),
    (OSError(28, "No space left", "a.csv"), SystemExit, "cannot write: .*No space left: 'a.csv'.*"),
    (FileNotFoundError(2, "No such file", "b.txt"), SystemExit, "b.txt is missing: fetch .*"),
    (ValueError("a mistake of ours"), ValueError, "a mistake of ours"),  # with its traceback
]


@pytest.mark.parametrize("error, kind, line", ENDS)
def test_what_the_user_can_mend_ends_in_one_line(error, kind, line):
    with pytest.raises(kind) as end:
        crnn.run(Mock(side_effect=error), "an argument")  # with none, it would look at pytest's
    assert re.fullmatch(line, str(end.value))  # where . is no line break


def test_a_script_takes_no_arguments_unless_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_crnn.py", "mine.csv"])
    with pytest.raises(SystemExit) as end:
        crnn.run(lambda: pytest.fail("it ran"))
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert __doc__ in errors and "takes no arguments: edit the constants" in errors


def test_a_script_prints_every_character_and_ends_with_the_status_of_its_main(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    with pytest.raises(SystemExit) as end:
        crnn.run(lambda text: print(text) or 1, "√16 ≤ 4.5")
    assert end.value.code == 1
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().decode("utf-8").strip() == "√16 ≤ 4.5"


# ---- charset
def test_a_charset_decodes_what_it_encodes():
    charset = Charset(CHARSET)
    for label in ("a", " a b ", "√16 ≤ 4.5", CHARSET):
        classes = charset.encode(label)
        assert charset.decode(classes) == label
        assert BLANK not in classes and max(classes) < charset.num_classes


def test_a_charset_refuses_what_it_cannot_map():
    with pytest.raises(InputError, match=r"'b' \(U\+0062\)"):
        Charset("abcb")
    with pytest.raises(InputError, match="empty"):
        Charset("")
    with pytest.raises(InputError, match=r"'é' \(U\+00E9\)"):
        Charset("abc").encode("bé")
    for index in (BLANK, 4, -1):  # Python would read -1 as the last character
        with pytest.raises(ValueError, match=f"{index}.* not all characters"):
            Charset("abc").decode([index])


# ---- image to tensor
def encode(image, kind="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def on_nothing(tone, hidden):
    """R7 in some tone on transparent ground, whose own tone, which nobody sees, is hidden."""
    alpha = 255 - TONES[..., None]
    colours = np.where(alpha > 0, tone, hidden).repeat(3, 2)
    return Image.fromarray(np.concatenate([colours, alpha], 2).astype(np.uint8), "RGBA")


R7 = line_image("R7")
TONES = np.asarray(R7)
COLOUR = np.repeat(TONES[..., None], 3, 2)
STRAY = TONES.astype(np.uint16) + 1000
STRAY[3, 3] = 65_000
TURNED = Image.Exif()
TURNED[0x0112] = 6  # stored turned by 90 degrees
MODES = "1 L P RGB RGBA LA CMYK I F HSV YCbCr".split()
SHOW_R7 = {mode: R7.convert("RGB").convert(mode) for mode in MODES}
SHOW_R7 |= {
    "I;16": Image.fromarray(TONES.astype(np.uint16) * 257),
    "a stray pixel is no range of tones": Image.fromarray(STRAY),
    "light on dark": Image.fromarray(255 - TONES),
    "turned by EXIF": encode(R7.rotate(90, expand=True), exif=TURNED),
    "the first of two pages": encode(R7, "TIFF", save_all=True, append_images=[line_image("g")]),
    "bytes": encode(R7),
    "memoryview": memoryview(encode(R7)),
    "stream": io.BytesIO(encode(R7)),
    "encoded, as by OpenCV": np.frombuffer(encode(R7), np.uint8),
    "uint8": TONES,
    "uint16": TONES.astype(np.uint16) * 257,
    "int64": TONES.astype(np.int64),
    "float64": TONES / 255,
    "float32": TONES.astype(np.float32) / 255,
    "float32 to 255": TONES.astype(np.float32),
    "overshot, as where resized": TONES / 255 * 1.15,
    "bool": TONES > 128,
    "mask of 0 and 1": (TONES > 128).astype(np.uint8),
    "one channel": TONES[..., None],
    "colour": COLOUR,
    "16-bit colour": COLOUR.astype(np.uint16) * 257,
    "channels first": torch.from_numpy(TONES / 255).expand(3, -1, -1),
}
SHOW_R7 |= {f"{a} on hidden {b}": on_nothing(a, b) for a in (0, 255) for b in (0, 255)}
SHOW_R7 |= {  # pairs of colours of one luminance
    f"{ink} on {ground}": ImageOps.colorize(R7, ink, ground)
    for pair in (("#c80000", "#003cd7"), ("#ff8c28", "#a5a5a5"))
    for ink, ground in (pair, pair[::-1])
}
SHOW_R7["transparent in its palette"] = on_nothing(0, 0).quantize(16)


def test_blank_paper_stays_blank_in_any_number_of_tones():
    paper = np.random.default_rng(0).normal(232, 2, (40, 90)).round()
    for tones in (paper.astype(np.uint8), paper.astype(np.uint16) * 257, paper.astype(np.uint16)):
        assert load_image(tones).min() > 200
    for size in ((1, 1), (1, 2), (2, 2)):
        assert load_image(np.full(size, 40_000, np.uint16)).min() > 200
    tinted = np.random.default_rng(0).integers(228, 236, (40, 90, 3), dtype=np.uint8)  # faintly
    assert load_image(Image.fromarray(tinted)).min() > 190


ROUGH = {"1", "bool", "mask of 0 and 1", "overshot, as where resized"}  # these lose tones
ROUGH |= {"transparent in its palette"}


@pytest.mark.parametrize("kind", SHOW_R7)
def test_an_image_of_any_kind_is_seen_as_the_same(kind, capsys):
    image, reason = crnn.try_load(SHOW_R7[kind])
    assert reason is None
    assert image.dtype == torch.uint8
    difference = (image.float() - load_image(R7).float()).abs().mean()
    assert difference < (12 if kind in ROUGH else 2)
    said = "a bytes has 2 pages: the first is read\n" if "two pages" in kind else ""
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("text", ["W", ".", "|", "EMBW#@", "l", "-"])
def test_polarity_does_not_matter(text):
    grey = line_image(text)
    assert torch.equal(load_image(grey), load_image(ImageOps.invert(grey)))
    assert load_image(grey).float().mean() > 128


def test_colours_that_differ_in_luminance_turn_grey_as_usual():
    toned = ImageOps.colorize(R7, "#203060", "#f0e0b0")
    noise = np.random.default_rng(0).integers(220, 250, (40, 90, 3), dtype=np.uint8)
    for image in (toned, Image.fromarray(noise)):
        assert crnn.rgb_to_grey(image) == image.convert("L")


PLACES = [(200, y) for y in range(100, 2100, 100)]
PAGE = paper((1600, 2200), "a line of the page", *PLACES, height=50)
REFUSED = [
    (None, "not finite numbers (H, W)"),
    ([1, 2], "not finite numbers (H, W)"),
    (np.full((9, 40), np.nan), "not finite numbers (H, W)"),
    (np.zeros((9, 40), "O"), "not finite numbers (H, W)"),
    (np.full((9, 40), -2.0), "negative numbers"),
    (np.linspace(-1, 1, 360).reshape(9, 40), "negative numbers"),
    (PAGE, "some 20 lines of text: a page"),
]


@pytest.mark.parametrize("wrong, complaint", REFUSED)
def test_what_is_no_line_is_refused_in_one_line(wrong, complaint):
    image, reason = crnn.try_load(wrong)
    assert image is None
    assert complaint in reason and "\n" not in reason


@pytest.mark.filterwarnings("ignore")  # Pillow's
@pytest.mark.parametrize("kind", "PNG JPEG WEBP TIFF BMP GIF".split())
def test_a_damaged_file_is_read_or_refused_in_one_line(kind):
    """With flipped bits or hostile bytes in its header, and cut off."""
    random.seed(kind)
    for i in range(40):
        data = bytearray(encode(R7, kind))
        for _ in range(random.randint(1, 20)):
            data[random.randrange(40 if i % 2 else len(data))] = random.choice([0, 255, 1 << i % 8])
        image, reason = crnn.try_load(bytes(data[: random.choice([len(data), 60, 300])]))
        assert (image is None) == bool(reason)
        assert "\n" not in (reason or "")


@pytest.mark.parametrize("size, width", [((40, 1), 1280), ((1, 40), 1), ((3, 100), 1)])
def test_odd_sizes_keep_their_aspect(size, width):
    assert load_image(Image.new("L", size, 255)).shape == (32, width)


def test_a_line_may_be_large():
    line = line_image("R7 g", size=900, margin=200)
    assert min(line.size) > 1000 and crnn.try_load(line)[0] is not None


def test_hard_edges_are_softened_and_those_of_small_text_less():
    hard = np.full((32, 60), 255, np.uint8)
    hard[:, 10:20] = hard[:, 40] = 0
    row = load_image(hard)[16]
    assert row[15] == 0
    assert 40 < row[40] < 140
    assert row[39] == row[41] < 230
    hard[:8] = hard[24:] = 255
    half = load_image(hard)[16]
    assert half[40] < row[40] - 20


def test_small_and_condensed_lines_are_seen_closer():
    small = paper((400, 120), "Serial 4711", (60, 50))
    seen, plain = load_image(small), crnn.scale(small)
    assert rows_with_ink(seen) > 2 * rows_with_ink(plain)
    assert seen.shape[1] > 2 * plain.shape[1]
    line = line_image("Serial number 4711")
    condensed = line.resize((line.width // 2, line.height))
    aspect = condensed.width / condensed.height
    assert 1.3 < load_image(condensed).shape[1] / (32 * aspect) <= 1.5


@pytest.mark.parametrize("text, margin", [("c", 4), (",", 4), ("-", 40), ("", 100)])
def test_single_characters_and_blank_paper_stay_what_they_are(text, margin):
    image = crnn.scale(line_image(text, margin=margin))
    assert crnn.closer_view(image)[:3] == (0, 1, 1)


def test_a_line_is_padded_by_its_own_width_alone():
    for width in range(1, 3000):
        padded = crnn.padded_width(width)
        assert 0 <= padded - width < max(8, 0.25 * width)
        assert padded % crnn.PIXELS_PER_FRAME == 0
        assert crnn.padded_width(padded) == padded


# ---- network
@pytest.mark.parametrize("width", [8, 100, 104])
def test_a_frame_is_four_columns_and_folding_changes_no_result(width):
    model = load_checkpoint(WEIGHTS, learn=True).eval().double()  # or rounding shows at times
    ink = torch.rand(2, 1, crnn.HEIGHT, width, dtype=torch.double)
    logits = model(ink)
    assert logits.shape == (width // 4, 2, len(CHARSET) + 1)
    assert crnn.num_frames(width) == len(logits)
    folded = crnn.folded(model)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(ink), logits)


def test_the_narrowest_image_gives_numbers(shipped):
    ink = torch.rand(1, 1, crnn.HEIGHT, crnn.padded_width(1))
    with torch.inference_mode():
        exact = shipped(ink)
        for _ in range(20):  # what comes of uninitialized memory comes at times
            with torch.autocast("cpu", torch.bfloat16):
                torch.testing.assert_close(shipped(ink).float(), exact, atol=0.5, rtol=0.1)


# ---- decoding and reading
PATHS = {"--a-b": "ab", "aab-b": "abb", "-----": "", "aaaaa": "a", "a-a-a": "aaa", "abba-": "aba"}
PATHS |= {"bbb-b": "bb", "-b--a": "ba", " a-b ": "ab", "  -a ": "a", "a- -b": "a b", " - - ": ""}


def decode(probabilities, characters):
    """The Reading of one line by its probabilities (T, C)."""
    return crnn.greedy_decode(probabilities.log()[:, None], Charset(characters))[0]


@pytest.mark.parametrize("path, text", PATHS.items())
def test_repeats_are_merged_then_blanks_removed_and_spaces_at_the_ends(path, text):
    """Graves et al. 2006, equation 1, but for the spaces."""
    classes = torch.tensor(["-a b".index(c) for c in path])
    reading = decode(F.one_hot(classes, 4) + 1e-8, "a b")
    assert reading.text == text
    assert reading.confidence > 0.99
    assert [c.character for c in reading.characters] == list(text)
    assert all(c.confidence > 0.99 for c in reading.characters)


def test_confidence_is_the_probability_of_the_text_and_of_a_character_in_its_surest_frame():
    probabilities = torch.tensor([[0.4, 0.6], [0.1, 0.9], [0.8, 0.2]])  # of blank, a
    others = 0.4 * 0.1 * 0.8 + 0.6 * 0.1 * 0.2  # ---, and a-a, which is aa
    once = "a", pytest.approx(1 - others), [("a", pytest.approx(0.9), [])], None
    assert decode(probabilities, "a") == once
    assert decode(probabilities[[2, 2]], "a") == ("", pytest.approx(0.8 * 0.8), [], None)


def test_a_reading_tells_what_else_its_characters_could_be():
    probabilities = torch.full((8, 4), 0.01)  # (T, C): blank, O, 0, 1
    probabilities[:, 0] = 0.97
    probabilities[1] = torch.tensor([0.02, 0.6, 0.37, 0.01])
    probabilities[5] = torch.tensor([0.01, 0.005, 0.005, 0.98])
    reading = decode(probabilities, "O01")
    assert reading.text == "O1"
    first, second = reading.characters
    assert (first.alternatives, second.alternatives) == ([("0", pytest.approx(0.37))], [])


@pytest.mark.parametrize("label", ["a", "ab", "aa", "aab", "abab", "aaa", "abbba"])
def test_the_frames_needed_are_those_of_the_ctc_loss(label):
    target = torch.tensor([Charset("ab").encode(label)])
    for frames in range(1, 12):
        log_probs = torch.zeros(frames, 1, 3).log_softmax(2)
        loss = F.ctc_loss(log_probs, target, torch.tensor([frames]), torch.tensor([len(label)]))
        assert torch.isfinite(loss) == (crnn.frames_needed(label) <= frames)


def test_calibration_makes_confidence_the_share_of_right_readings():
    rng = np.random.default_rng(0)
    true = rng.uniform(0.02, 0.98, 4000)
    correct = rng.random(4000) < true
    overconfident = 1 / (1 + np.exp(-3 * np.log(true / (1 - true)) - 1))
    slope, offset = calibrate(list(overconfident), list(correct))
    assert slope == pytest.approx(1 / 3, abs=0.03)
    assert offset == pytest.approx(-1 / 3, abs=0.1)
    assert crnn.calibration_error(overconfident, correct) > 0.1
    after = [crnn.calibrated(c, (slope, offset)) for c in overconfident]
    assert crnn.calibration_error(after, correct) < 0.03
    calibration = calibrate([0.9] * 10, [True] * 10)  # nothing to learn from
    assert 0 < calibration[0] < 10
    assert crnn.calibrated(0.9, calibration) > 0.85
    few = calibrate([0.6] * 15, [True] * 13 + [False] * 2)  # as after 200 images of one's own
    assert 0.3 < crnn.calibrated(0.3, few) < 0.5
    assert 0 <= crnn.calibrated(0.0, calibration) <= crnn.calibrated(1.0, calibration) <= 1
    assert crnn.calibrated(0.3, crnn.UNCALIBRATED) == pytest.approx(0.3, rel=1e-12)


def test_a_line_reads_the_same_alone_in_a_batch_and_in_any_order(shipped):
    """But for last bits of the confidence, as matrices of other sizes are multiplied otherwise."""
    images = lines("7", "Round trip", "17", "I", "$ 4.50", "wide enough to matter", "a+b", "18")
    alone = [read_images(shipped, [image], 1)[0] for image in images]
    together, backwards = (read_images(shipped, some, 4) for some in (images, images[::-1]))
    for reading, other in zip([*together, *backwards[::-1]], alone * 2):
        assert reading.text == other.text
        assert reading.confidence == pytest.approx(other.confidence, abs=0.02)  # in bfloat16


def test_the_readme_shows_the_frames_of_an_image(shipped):
    image = load_image(FOREIGN / "0007.png")
    with torch.inference_mode():
        logits = shipped(crnn.to_ink(crnn.pad(image))[None, None])  # (T, 1, C)
    path = "".join(("-" + CHARSET)[i] for i in logits[:, 0].argmax(1).tolist())
    assert re.fullmatch("-*A+-*b+-+b+-*o+-*t+-+t+-*", path)


def test_an_image_is_looked_at_again_if_it_is_unsure_or_its_ink_reads_as_nothing(shipped):
    """Here at larger text: the line is low."""
    image, blank = load_image(SMALL_LINE), torch.full((32, 40), 255, dtype=torch.uint8)
    (look,) = crnn.look_at(shipped, [image], 8, [crnn.know(shipped.charset)])
    assert look.reading.confidence < crnn.SECOND_LOOK
    assert read_images(shipped, [image], 8)[0].text == "Rg 7"
    sure, nothing = crnn.Reading("Rg 7", 0.9, []), crnn.Reading("", 0.9, [])
    assert crnn.is_unsure(image, sure._replace(confidence=0.3)) and crnn.is_unsure(image, nothing)
    assert not crnn.is_unsure(image, sure) and not crnn.is_unsure(blank, nothing)


def test_of_several_looks_the_text_that_is_likeliest_on_average_counts():
    """And not the surest of them."""
    model = SimpleNamespace(charset=Charset("ab"), calibration=crnn.UNCALIBRATED)
    logits = torch.tensor([[0.04, 0.56, 0.4], [0.04, 0.56, 0.4], [0.1, 0.3, 0.6]]).log()  # (N, C)
    readings = crnn.greedy_decode(logits[None], model.charset)  # of one frame each
    looks = [crnn.Look(r, log_probs[None]) for r, log_probs in zip(readings, logits)]
    reading = crnn.choose_reading(model, lines("a")[0], looks, crnn.Known())
    assert [r.text for r in readings] == ["a", "a", "b"]
    assert reading.text == "a" and reading.confidence == pytest.approx((0.56 + 0.56 + 0.3) / 3)
    known = crnn.know(model.charset, lexicon=["b", "bb"])
    reading = crnn.choose_reading(model, lines("a")[0], looks, known)
    assert reading.text == "b" and reading.unrestricted == "a"


def test_a_second_look_is_another_size_of_the_same_text():
    image = load_image(SMALL_LINE)
    assert rows_with_ink(crnn.shrink(image)) > 1.5 * rows_with_ink(image)  # without its margins
    filled = lines("Rg 7")[0][8:24].repeat_interleave(2, 0)
    assert rows_with_ink(crnn.shrink(filled)) < rows_with_ink(filled)
    blank = torch.full((32, 40), 255, dtype=torch.uint8)
    assert crnn.shrink(blank).shape == (32, 34)
    assert crnn.invert(image) is None
    assert torch.equal(crnn.invert(255 - image), image)  # perhaps the wrong polarity
    leaning = torch.full((32, 40), 255, dtype=torch.uint8)
    for row in range(32):
        leaning[row, 20 - round(0.2 * (row - 16))] = 0  # to the right, as many write
    inked = [(look < 155).sum(0).max() for look in (leaning, crnn.resize(leaning, slant=-0.2))]
    assert inked[0] < 10 and inked[1] > 20  # rows in one column
    back = crnn.resize(crnn.resize(leaning, slant=-0.2), slant=0.2)[:, 7:47]
    assert (back < 155).sum(0).max() < 10 and (back < 155).sum() > 20
    narrow = crnn.resize(image, 0.8)
    assert narrow.shape == (32, round(0.8 * image.shape[1]))
    assert rows_with_ink(narrow) == rows_with_ink(image)


def test_the_shipped_weights_read_what_they_always_read(shipped, monkeypatch):
    """But for two texts, since another processor rounds otherwise."""
    monkeypatch.setattr(crnn, "compute_dtype", lambda *_: torch.float32)
    rows = pd.read_csv(FOREIGN / "readings.csv", dtype=str, keep_default_na=False)
    readings = read_images(shipped, [load_image(FOREIGN / path) for path in rows.image_path], 48)
    same = [reading.text == text for reading, text in zip(readings, rows.prediction)]
    assert len(same) == 120
    assert sum(same) >= 118


# ---- what the user knows
def test_only_what_is_allowed_is_read(shipped):
    known = crnn.know(shipped.charset, "0123456789")
    (reading,) = read_images(shipped, lines("I0 S5"), 1, [known])
    assert reading.text.isdigit() and reading.text.endswith("5")
    others = {c for character in reading.characters for c, _ in character.alternatives}
    assert others <= set("0123456789")
    for allowed, text in (("ABLOT", "TOTAL"), ("ablot", "total"), ("ALOTalot", "Total")):
        case = crnn.know(shipped.charset, allowed)
        assert read_images(shipped, lines("Total"), 1, [case])[0].text == text
    digits, letters = read_images(shipped, lines("1907", "Abbot"), 2, [known] * 2)
    assert digits.confidence > 0.9
    assert letters.confidence == 0  # whatever digits they are taken for


def test_a_text_of_the_lexicon_may_be_written_in_capitals(shipped):
    """And Polish is told from polish where the lexicon has both."""
    images = lines("PARIS", "paris", "Polish", "POLISH", "polish")
    known = crnn.know(shipped.charset, lexicon=["Paris", "Polish", "polish", "Berlin"])
    readings = read_images(shipped, images, 8, [known] * 5)
    texts = [reading.text for reading in readings]
    assert texts[:3] == ["Paris", "Paris", "Polish"] and texts[4] == "polish"
    assert texts[3].lower() == "polish"
    assert all(reading.confidence > 0.9 for reading in readings[:3])
    assert readings[0].unrestricted == "PARIS"
    form = crnn.know(shipped.charset, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", ["Paris", "Berlin"])
    (filled_in,) = read_images(shipped, images[:1], 1, [form])
    assert filled_in.text == "Paris" and filled_in.confidence > 0.9
    without = crnn.know(shipped.charset, lexicon=["Perils", "Berlin"])
    assert read_images(shipped, images[:1], 8, [without])[0].confidence < 0.5


def test_blank_paper_shows_no_text_of_a_lexicon_and_several_lines_are_marked(shipped):
    known = crnn.know(shipped.charset, lexicon=["Paris", "Rome"])
    several = load_image(paper((80, 64), "Paris", (6, 4), (6, 36)))
    ruled = load_image(paper((80, 32), ""))
    ruled[24:26] = 0
    images = load_image(paper((80, 32), "")), ruled, several
    *empty, doubtful = read_images(shipped, images, 3, [known] * 3)
    assert [(reading.text, reading.unrestricted) for reading in empty] == [("", None)] * 2
    assert (doubtful.text, doubtful.confidence) == ("Paris", 0)


def test_what_is_read_competes_with_the_lexicon():
    charset, frame = Charset("ab"), torch.tensor([[0.02, 0.9, 0.08]]).log()  # blank, a, b
    look = crnn.Look(crnn.greedy_decode(frame[:, None], charset)[0], frame)
    known = crnn.know(charset, lexicon=["b"])
    confidence = crnn.find_in_lexicon([look], charset, look.reading, known).confidence
    assert confidence == pytest.approx(0.08 / (0.08 + 0.9 * np.exp(-crnn.DOUBT)))


HELD = [
    ("AA-r-o-n-", "Aron", "Aaron"),
    ("A-a-r-o-n", "Aaron", "Aron"),
    ("λ-ό-γ-ο-ς", "λόγος", "λόγο"),
]


@pytest.mark.parametrize("path, text, other", HELD)
def test_a_letter_that_is_held_is_not_taken_for_two(path, text, other):
    """Nor is ς, which has no capital of its own, left out."""
    charset = Charset("AaronλόγοςσΣ")
    logits = torch.full((len(path), 1, charset.num_classes), 0.006).log()  # (T, 1, C)
    for frame, c in enumerate(path):
        logits[frame, 0, charset.index.get(c, crnn.BLANK)] = np.log(0.97)
    looks = [crnn.Look(crnn.greedy_decode(logits, charset)[0], logits[:, 0].log_softmax(1))]
    known = crnn.know(charset, lexicon=[text, other])
    reading = crnn.find_in_lexicon(looks, charset, looks[0].reading, known)
    assert reading.text == text and reading.confidence > 0.9


def test_a_lexicon_is_read_by_and_what_it_lacks_is_doubted(shipped, tmp_path, capsys):
    """Also a long one, of which the texts nearest to what is read are compared."""
    images, path = lines("Serial", "Abbott", "Total"), tmp_path / "texts.txt"
    far = tuple(f"Q{i:04}" for i in range(200))
    texts = [*far, "Seria1", "", "Abbot", "Total ", "Sérial", "Other"]
    path.write_text("\n".join(texts), encoding="utf-8")
    known = crnn.know(shipped.charset, lexicon=path)
    assert "LEXICON: 'Sérial' is left out, the model does not know 'é'" in capsys.readouterr().err
    assert known.lexicon == (*far, "Seria1", "Abbot", "Total", "Other")
    readings = read_images(shipped, images, 3, [known] * 3)
    assert [r.text for r in readings] == ["Seria1", "Abbot", "Total"]
    assert [r.unrestricted for r in readings] == ["Serial", "Abbott", "Total"]
    assert readings[2].confidence > 0.9
    (unlike,) = read_images(shipped, images[:1], 1, [crnn.know(shipped.charset, None, ["Other"])])
    assert (unlike.text, unlike.confidence < 0.5) == ("Other", True)
    digits = crnn.know(shipped.charset, "0123456789", ["12", "1a"])  # both at once
    assert digits.lexicon == ("12",)


UNKNOWN = [
    (dict(allowed="0é"), r"ALLOWED has 'é' \(U\+00E9\)"),
    (dict(lexicon=["é"]), "no text left"),
    (dict(lexicon=["Total", None]), "a list of texts"),
    (dict(lexicon=Path("missing.txt")), "no file missing.txt"),
]


@pytest.mark.parametrize("limits, complaint", UNKNOWN)
def test_what_no_image_can_show_is_refused(limits, complaint):
    with pytest.raises(InputError, match=complaint):
        crnn.know(Charset(CHARSET), **limits)


def test_lines_and_columns_that_read_as_nothing_are_doubted():
    page = paper((300, 90), "several lines of it", (5, 4), (5, 34), (5, 64), height=18)
    box = np.full((40, 80), 255, np.uint8)
    box[[2, 37]] = box[:, [2, 77]] = 0
    assert crnn.looks_written(load_image(page))
    assert not crnn.looks_written(load_image(box))


def test_a_ruled_line_is_no_underscore(shipped):
    ruled = Image.new("L", (200, 40), 255)
    ImageDraw.Draw(ruled).line((0, 36, 200, 36), fill=0, width=2)
    readings = read_images(shipped, [load_image(ruled), *lines("_")], 1)
    assert [reading.text for reading in readings] == ["", "_"]
    assert min(reading.confidence for reading in readings) > 0.5


def test_of_several_lines_no_reading_looks_sure(shipped):
    images = [Image.new("L", (120, 100), 255) for _ in range(4)]
    for image, text in zip(images, ("12.50\n3.75", "12\n34", "A\nB", "one\ntwo\n3")):
        ImageDraw.Draw(image).text((9, 9), text, font=ImageFont.truetype(FONT, 24), fill=0)
    readings = read_images(shipped, list(map(load_image, images)), 4)
    assert max(reading.confidence for reading in readings) < 0.5
    halves = np.full((32, 20), 255, np.uint8)
    halves[[*range(2, 14), *range(17, 29)], 8:12] = 0  # a 1 in seven segments
    assert crnn.count_lines(load_image(halves)) == 1
    sums = read_images(shipped, lines("=", "7=7", "i:j"), 3)
    assert all(reading.confidence > 0 for reading in sums)


# ---- files
def test_a_checkpoint_keeps_all_that_reading_and_learning_need(tmp_path):
    model, path = load_checkpoint(WEIGHTS, learn=True).eval(), tmp_path / "new folder" / "ü.pth"
    model.calibration, model.facts = (1.25, -0.5), dict(epoch=3, data="ü.csv")
    crnn.save_checkpoint(path, model)
    reads, learns = load_checkpoint(path), load_checkpoint(path, learn=True)
    ink = torch.rand(1, 1, crnn.HEIGHT, 60)
    assert torch.equal(model(ink), learns.eval()(ink))
    assert torch.equal(crnn.folded(model)(ink), reads(ink))
    assert not reads.training
    assert reads.charset.characters == model.charset.characters
    assert (reads.calibration, reads.facts) == ((1.25, -0.5), dict(epoch=3, data="ü.csv"))
    assert list(path.parent.iterdir()) == [path]  # no temporary file left
    whole, weights = path.stat().st_size, model.state_dict()
    crnn.save_checkpoint(path, copy.deepcopy(model).half())  # half the precision, half the file
    assert path.stat().st_size < 0.65 * whole
    again = load_checkpoint(path, learn=True).state_dict()  # in float32 again
    torch.testing.assert_close(again, weights, rtol=1e-3, atol=1e-6)


def test_a_checkpoint_is_not_read_with_another_preprocessing(monkeypatch):
    code = Path(crnn.__file__).read_text(encoding="utf-8")
    part = code.split("# What the network sees.")[1].split("# How it is read")[0]
    for name in ", ".join(re.findall("^([A-Z_, ]+) =", part, re.M)).split(", "):
        complaint = (
            rf"pretrained.pth .*it learned with {name} = [\d.]+, crnn.py has 99: set it back, or"
        )
        with monkeypatch.context() as patch, pytest.raises(InputError, match=complaint):
            patch.setattr(crnn, name, 99)
            load_checkpoint(WEIGHTS)


class Malicious:  # it makes a folder where it is unpickled
    def __reduce__(self):
        return os.mkdir, ("trap",)


AWKWARD = ["NA", "null", "None", "nan", "007", "1e5", '"', ",", "'", '""', "a,b", "a  b", "#", "-"]
AWKWARD += ["=1+1", "\\", "True", "≤", "1.0"]
WIDE = b"P5 9000 2 255 " + b"\xff" * 18_000
OTHER = dict(format=crnn.CHECKPOINT_FORMAT, charset="abc", architecture=dict(hidden=9), weights={})
OTHER["preprocessing"] = crnn.preprocessing()
LINE_BREAK = b'image_path,label\n,\na,"b\rc"\n'  # after an empty row
UNUSABLE = {  # what reads it, its content, and what the error is to say
    "missing image": (load_image, None, "no such file"),
    "empty image": (load_image, b"", "not an image"),
    "text as an image": (load_image, b"this is text", "not an image"),
    "half an image": (load_image, encode(R7)[:300], "cannot be read"),
    "wide image": (load_image, WIDE, "too wide"),
    "missing checkpoint": (load_checkpoint, None, "train_crnn.py"),
    "empty checkpoint": (load_checkpoint, b"", "train_crnn.py"),
    "text as a checkpoint": (load_checkpoint, b"hello there", "train_crnn.py"),
    "pickle": (load_checkpoint, pickle.dumps(Malicious()), "train_crnn.py"),
    "torch pickle": (load_checkpoint, OTHER | {"charset": Malicious()}, "train_crnn.py"),
    "other dict": (load_checkpoint, {"state_dict": {}}, "train_crnn.py"),
    "other network": (load_checkpoint, OTHER, "train_crnn.py"),
    "other format": (load_checkpoint, OTHER | {"format": 2}, "format 2.*train_crnn.py"),
    "missing csv": (read_labels, None, "check the path, or run python prepare_ocr_dataset.py"),
    "empty csv": (read_labels, b"", "cannot be read"),
    "csv without rows": (read_labels, b"image_path,label\n", "no rows"),
    "csv of empty rows": (read_labels, b"image_path,label\n,\n ,\n", "no rows"),  # as of Excel
    "csv without labels": (read_labels, b"image_path,text\na,b\n", "no column label"),
    "malformed csv": (read_labels, b'image_path,label\na,b,c,d\n1,2\n"', "cannot be read"),
    "semicolons": (read_labels, b"image_path;label\na;1,50\nb;2\n", "not image_path;label"),
    "csv with a column twice": (read_labels, b"image_path,label,label\na,b,c\n", "column twice"),
    "csv with it in capitals": (read_labels, b"image_path,label,Label\na,b,c\n", "column twice"),
    "bare comma": (read_labels, b"image_path,label\na,b\nc,1,50\n", "quotes around"),
    "line break": (read_labels, LINE_BREAK, "row 2: a label of several lines"),
    "open quotation mark": (read_labels, b'image_path,label\na,"b\nc,d\n"', "row 1: .*quotation"),
    "not UTF-8": (read_labels, b"image_path,label\na.png,\xff\xfe\n", "cannot be read"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_file_is_named_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (read, content, complaint), path = UNUSABLE[name], tmp_path / "täst 1"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trap").exists()
    if read is load_image:
        assert crnn.try_load(path) == (None, str(error.value))


def test_awkward_labels_survive(tmp_path):
    rows = pd.DataFrame(dict(image_path="a.png", label=AWKWARD, source="x", split="train"))
    crnn.write_labels(rows, tmp_path / "data.csv")
    assert read_labels(tmp_path / "data.csv").to_dict("list") == rows.to_dict("list")


def test_labels_are_spelt_in_one_way_and_backslashes_lead_to_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").touch()
    columns = {"image_path": ["a\\b.png", "a/b.png "], " label": ["cafe\u0301 ", " a\u00a0b"]}
    crnn.write_labels(pd.DataFrame(columns), tmp_path / "own.csv", "utf-8-sig")
    rows = read_labels(tmp_path / "own.csv")
    assert list(rows.label) == ["café", "a b"]
    assert crnn.image_paths(rows, tmp_path / "own.csv") == [tmp_path / "a" / "b.png"] * 2
    (tmp_path / "own.csv").write_text('Image_Path, Label\na.png, "b\u2009c\t"\n', encoding="utf-8")
    assert list(read_labels(tmp_path / "own.csv").label) == ["b c"]


def test_a_label_is_in_one_split_unless_it_must_be_learned():
    paths = [f"{i}.png" for i in range(4000)]
    rows = pd.DataFrame(dict(image_path=paths, label=[f"word{i % 500}" for i in range(4000)]))
    rows = crnn.add_split(rows)
    assert (rows.source == "custom").all()
    assert rows.groupby("label").split.nunique().max() == 1
    assert (rows.split == "train").mean() == pytest.approx(0.8, abs=0.06)
    for labels in (["a", "b"], ["on", "off"]):  # characters, and labels with many images
        few = crnn.add_split(pd.DataFrame(dict(image_path=paths[:400], label=labels * 200)))
        assert few.groupby("label").split.nunique().min() == 3


def test_what_a_column_split_leaves_open_is_split_by_hash():
    rows = pd.DataFrame(dict(image_path=list("abc"), label=["one", "two", "six"]))
    by_hash = list(crnn.add_split(rows.copy()).split)
    rows = crnn.add_split(rows.assign(split=["Val ", "", ""]))
    assert list(rows.split) == ["val", *by_hash[1:]]


def test_no_text_changes_its_split():
    held = {n: split for n in range(60) if (split := crnn.split_of(str(n))) != "train"}
    assert held == {6: "val", 37: "val", 40: "val"} | dict.fromkeys((10, 19, 27, 38, 52), "test")


# ---- scores
def test_scores_add_up_before_they_divide():
    rows = [("O", "0", "one"), ("b", "b", "one"), ("abcdefgh", "abXdefg", "two"), ("l", "I", "one")]
    table = crnn.score_table(pd.DataFrame(rows, columns=["label", "prediction", "source"]))
    assert table.loc["one", "exact"] == pytest.approx(1 / 3)
    assert table.loc["two", "CER"] == pytest.approx(2 / 8)
    assert table.loc["all", "images"] == 4
    assert 0.25 < table.loc["all", "±"] < 0.5  # of one in four, 95 % between 5 and 70 %
    assert table.loc["all", "CER"] == pytest.approx(4 / 11)
    rows = pd.DataFrame(rows, columns=["label", "prediction", "source"]).replace("one", "all")
    assert crnn.score_table(rows).images.tolist() == [3, 1, 4]  # a source may bear that name


def test_the_examples_of_the_docstrings_are_true():
    assert doctest.testmod(crnn).failed == 0 < doctest.testmod(crnn).attempted
