"""Shared by the tests: the scripts with tiny constants, a runner for them, and small data."""

import importlib
import os
import re
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
FONT = str(ROOT / "myFonts" / "DejaVuSans.ttf")
WEIGHTS = ROOT / "ocr_crnn_model" / "pretrained.pth"  # as shipped
FOREIGN = ROOT / "tests" / "foreign"  # images by other programs
CHARSET = "".join(map(chr, range(32, 127))) + "×÷±√π≤≥≠"  # as shipped
FORK = pytest.mark.skipif(sys.platform != "linux", reason="no safe fork beside threads")

# Every download fails at once, in processes of their own too: nothing answers at that port.
os.environ.update(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
os.environ["no_proxy"] = "127.0.0.1"  # but for the servers that tests of downloads start


def line_image(text, size=24, margin=4):
    """An image of text, black on white, mode L."""
    font = ImageFont.truetype(FONT, size)
    _, _, right, bottom = font.getbbox(text)
    image = Image.new("L", (right + 2 * margin, bottom + 2 * margin), 255)
    ImageDraw.Draw(image).text((margin, margin), text, font=font, fill=0)
    return image


def write_csv(folder, texts, name="data.csv", **columns):
    """Draw texts into folder, and a csv with their labels beside them. Returns the csv's path."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        line_image(text).save(folder / f"{i}.png")
    paths = [f"{i}.png" for i in range(len(texts))]
    rows = pd.DataFrame(dict(image_path=paths, label=texts, **columns))
    rows.to_csv(folder / name, index=False)
    return folder / name


def contents(folder):
    """Every file below a folder, as bytes."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def fake_emnist(datasets, per_class=24):
    """EMNIST files in datasets/emnist: printed characters of all 62 classes, no two the same."""
    characters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" * per_class
    font, rng, images = ImageFont.truetype(FONT, 22), np.random.default_rng(0), []
    for c in characters:
        image = Image.fromarray(rng.integers(0, 40, (28, 28), dtype=np.uint8))
        ImageDraw.Draw(image).text((14, 14), c, font=font, fill=255, anchor="mm")
        images.append(np.asarray(image).T)  # (28, 28), transposed, as EMNIST stores them
    classes = np.tile(np.arange(62, dtype=np.uint8), per_class)
    raw = Path(datasets) / "emnist" / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in {"images-idx3": np.stack(images), "labels-idx1": classes}.items():
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)  # 8: bytes
        for part in ("train", "test"):
            (raw / f"emnist-byclass-{part}-{name}-ubyte").write_bytes(head + array.tobytes())


class Script:
    """A script as its module, and set() for its constants until the end of the test.

    constants: those of processes of its own, without set().
    """

    def __init__(self, module, monkeypatch=None, **constants):
        self.module, self.monkeypatch, self.constants = module, monkeypatch, constants

    def __getattr__(self, name):
        return getattr(self.module, name)

    def set(self, **constants):
        """Set constants, or functions, of the script; all must exist. Empties its caches."""
        for name, value in constants.items():
            self.monkeypatch.setattr(self.module, name, value)
            self.constants[name] = value
        for name in vars(self.module).keys() - SLOW:
            if hasattr(vars(self.module)[name], "cache_clear"):
                vars(self.module)[name].cache_clear()

    def command(self, folder):
        """A command that runs the script, as a user would, with the constants set so far."""
        name = self.module.__name__
        path = folder / f"{name}_{len(list(folder.glob('*.py')))}.py"
        path.write_text(
            f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport crnn, {name} as script\n"
            "import atexit, glob\n"  # threads that outlive a script may abort it as it ends
            "left = lambda: [open(p).read() for p in glob.glob('/proc/self/task/*/comm')]\n"
            "if __name__ == '__main__':\n"  # not in spawned workers: the script sees to them
            f"    vars(script).update({self.constants!r})\n"
            "    atexit.register(lambda: print('threads at exit:', *sorted(left())))\n"
            "    crnn.run(script.main)\n",
            encoding="utf-8",
        )
        return [sys.executable, str(path)]

    def run(self, folder, processes=1, timeout=150):
        """Run command() to its end, under torchrun where processes > 1. Returns what it printed."""
        command = self.command(folder)
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            command[1:1] = [*launcher, f"--nproc_per_node={processes}"]
        pipes = dict(capture_output=True, text=True, encoding="utf-8")
        run = subprocess.run(command, timeout=timeout, **pipes)
        assert run.returncode == 0, run.stderr[-2000:]
        return run.stdout


# Caches that are the same in all tests: to look at each font takes six seconds
SLOW = ["survey_font", "find_words", "typeface"]
# What a test finds in the scripts, whatever the user has edited there; each gets those it knows
RECIPE = dict(matrix_learning_rate=1e-2, learning_rate=3e-3, shortcut_weight=0.1, frozen_norms=0.25)
RECIPE |= dict(channels=(8, 16, 24, 32), hidden=32, blocks=0)
GENTLE = dict(matrix_learning_rate=1e-3, learning_rate=3e-4, shortcut_weight=0, frozen_norms=1)
CONSTANTS = dict(SEED=0, NUM_WORKERS=1, NUM_THREADS=1, DEVICE="cpu", PRECISION=None)
CONSTANTS |= dict(CHARSET=CHARSET, MAX_LENGTH=28, STYLED=0.6, WARPED=0.75, HELD_OUT_FONTS=0.1)
CONSTANTS |= dict(FONTS_DIR=str(ROOT / "myFonts"), DOWNLOAD_TIMEOUT=20, MIN_CHARACTER_ROWS=1)
CONSTANTS |= dict(INIT_WEIGHTS=None, RESUME=False, FROM_NOTHING=RECIPE, FINE_TUNE=GENTLE)
CONSTANTS |= dict(EPOCHS=1, MIN_STEPS=0, BATCH_SIZE=32, WARM_UP=0.1, AVERAGE=0.1, DROPOUT=0.0)
CONSTANTS |= dict(WEIGHT_DECAY=1e-2, KEEP_START=0.0, AUGMENT=1.0, BLANKS=0.01, NUM_SAMPLES=20)
CONSTANTS |= dict(MIN_CONFIDENCE=0.5, ALLOWED=None, LEXICON=None, PREDICTIONS_JSONL=None)
CONSTANTS |= dict(ONNX_PATH=None, REPORT_DIR=None)
# Likewise, in the folder of the test
FILES = dict(DATASETS_DIR="datasets", DATA_CSV="datasets/data.csv", MODEL_PATH="model/crnn.pth")
FILES |= dict(PRETRAINED="no.pth", PREDICTIONS_CSV="predictions.csv")


def script_in(folder, name, monkeypatch, **constants):
    """The Script of that name with all of its constants set, and all its files in a folder."""
    module = importlib.import_module(name)
    script = Script(module, monkeypatch)
    shared = CONSTANTS | {name: str(folder / path) for name, path in FILES.items()}
    script.set(**{name: value for name, value in shared.items() if hasattr(module, name)})
    script.set(**constants)
    code = Path(module.__file__).read_text(encoding="utf-8").split("# ---")[1]  # the constants
    missing = set(re.findall("^([A-Z_]+) = ", code, re.M)) - set(script.constants)
    assert not missing, f"conftest.py sets no {missing}: their edited values would reach the tests"
    return script


@pytest.fixture(scope="session")
def shipped():
    """The model of the repository, as it reads."""
    return importlib.import_module("crnn").load_checkpoint(WEIGHTS)


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """The preparation script with 24 images a source, one process and its own datasets folder."""
    module = importlib.import_module("prepare_ocr_dataset")
    if not hasattr(module.survey_font, "cache_clear"):  # the others of SLOW have a cache
        module.survey_font = cache(module.survey_font)
    number = dict.fromkeys(module.SOURCES, 24)
    return script_in(tmp_path, "prepare_ocr_dataset", monkeypatch, NUM_IMAGES=number)


@pytest.fixture
def few_fonts(prepare, tmp_path):
    """FONTS_DIR is a folder of six fonts, for tests that need no more."""
    few = "arvo-700 abel-400 poppins-400 caveat-400 kalam-400 neucha-400".split()
    others = {path.name for path in (ROOT / "myFonts").rglob("*.*") if path.stem not in few}
    shutil.copytree(ROOT / "myFonts", tmp_path / "fonts", ignore=lambda *_: others)
    prepare.set(FONTS_DIR=str(tmp_path / "fonts"))


@pytest.fixture
def train(tmp_path, monkeypatch):
    """The training script from nothing with a small network and its own model folder."""
    return script_in(tmp_path, "train_crnn", monkeypatch)


@pytest.fixture
def infer(tmp_path, monkeypatch):
    """The inference script on the files of the fixtures above."""
    return script_in(tmp_path, "inference_crnn", monkeypatch)
