"""Shared by the tests: the scripts on the path, a way to draw a line of text, and tiny EMNIST files."""
import struct
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
FONT = str(ROOT / "myFonts" / "DejaVuSans.ttf")


def line_image(text, size=24, margin=4):
    """A picture of text, black on white, mode L."""
    font = ImageFont.truetype(FONT, size)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (right + 2 * margin, bottom + 2 * margin), 255)
    ImageDraw.Draw(image).text((margin, margin), text, font=font, fill=0)
    return image


def write_csv(folder, texts, name="data.csv", **columns):
    """Draw texts into folder, and a csv with their labels beside them. Returns the csv's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        line_image(text).save(folder / f"{i}.png")
    rows = pd.DataFrame(dict(image_path=[f"{i}.png" for i in range(len(texts))], label=texts, **columns))
    rows.to_csv(folder / name, index=False)
    return folder / name


def write_idx(raw, images, labels):
    """Write images (n, 28, 28), upright, and labels (n,) as EMNIST's train and test files, transposed as EMNIST stores them."""
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        with open(raw / f"emnist-byclass-{part}-images-idx3-ubyte", "wb") as file:
            file.write(struct.pack(">IIII", 0x803, len(images), 28, 28) + images.transpose(0, 2, 1).tobytes())
        with open(raw / f"emnist-byclass-{part}-labels-idx1-ubyte", "wb") as file:
            file.write(struct.pack(">II", 0x801, len(labels)) + labels.astype(np.uint8).tobytes())


def fake_emnist(datasets, per_class=24):
    """EMNIST files in datasets/emnist with printed characters instead of handwritten ones, all 62 classes."""
    characters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    font = ImageFont.truetype(FONT, 22)
    images, labels = [], []
    for i in range(per_class * len(characters)):
        image = Image.new("L", (28, 28), 0)
        ImageDraw.Draw(image).text((14, 14), characters[i % 62], font=font, fill=255, anchor="mm")
        images.append(np.asarray(image))
        labels.append(i % 62)
    write_idx(datasets / "emnist" / "EMNIST" / "raw", np.stack(images), np.array(labels))


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """The preparation script with tiny constants and its own datasets folder."""
    import prepare_ocr_dataset as script
    tiny = dict(DATASETS_DIR=str(tmp_path / "datasets"), FONTS_DIR=str(ROOT / "myFonts"), NUM_TRDG=24, NUM_MATH=24, NUM_EMNIST=24,
                NUM_EMNIST_WORDS=24, NUM_EMNIST_MATH=24, NUM_HANDWRITING=24, NUM_WORKERS=1, FONTS=())
    for name, value in tiny.items():
        monkeypatch.setattr(script, name, value)
    script.emnist.cache_clear(), script.emnist_places.cache_clear(), script.emnist_looks.cache_clear()
    return script


@pytest.fixture
def train(tmp_path, monkeypatch):
    """The training script with a small network and its own model folder."""
    import train_crnn as script
    tiny = dict(MODEL_PATH=str(tmp_path / "model" / "crnn.pth"), DATA_CSV=str(tmp_path / "datasets" / "data.csv"), NUM_WORKERS=1,
                INIT_WEIGHTS=None, CHANNELS=(8, 16, 24, 32), HIDDEN=32, EPOCHS=1, MIN_STEPS=0, MIN_CHARACTER_ROWS=1, DEVICE="cpu")
    for name, value in tiny.items():
        monkeypatch.setattr(script, name, value)
    return script


@pytest.fixture
def infer(tmp_path, monkeypatch):
    """The inference script on the files of the fixtures above."""
    import inference_crnn as script
    tiny = dict(MODEL_PATH=str(tmp_path / "model" / "crnn.pth"), DATA_CSV=str(tmp_path / "datasets" / "data.csv"),
                PRETRAINED=str(tmp_path / "no pretrained.pth"),
                PREDICTIONS_CSV=str(tmp_path / "predictions.csv"), REPORT_DIR=None, DEVICE="cpu")
    for name, value in tiny.items():
        monkeypatch.setattr(script, name, value)
    return script
