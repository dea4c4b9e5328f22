"""The README names only what is there."""

import re

import pytest
from conftest import ROOT

import crnn
import inference_crnn
import prepare_ocr_dataset
import train_crnn

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.S)
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", PROSE)))
SCRIPTS = [crnn, inference_crnn, prepare_ocr_dataset, train_crnn]
CONSTANTS = sorted({name for span in SPANS for name in re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", span)})
FILES = [s for s in SPANS if re.fullmatch(r"[\w./]*(/|\.(py|md|txt|csv|png|pth|html))", s)]
USERS = {"own.csv", "labels.csv", "ocr_crnn_model/own.pth"}  # what a user makes or has
OUTPUTS = {"history.csv", "training_curves.png", "preview.png", "data.csv"}


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_constant_is_in_a_script(name):
    assert any(hasattr(script, name) for script in SCRIPTS)


def is_written(path):
    """Whether a script names a path, or the last part of one, as something that it writes."""
    source = "".join((ROOT / f"{script.__name__}.py").read_text("utf-8") for script in SCRIPTS)
    return path.split("/")[-1] in source or path.split("/")[0] in source


@pytest.mark.parametrize("path", sorted(set(FILES) - USERS))
def test_every_file_is_there_or_is_written(path):
    assert (ROOT / path).exists() or is_written(path)


def test_the_readme_names_constants_and_files():
    assert len(CONSTANTS) > 10
    assert len(FILES) > 10


@pytest.mark.parametrize("word", ["prepare_ocr_dataset.py", "python -m pytest"])
def test_both_commands_stand_in_blocks_of_their_own(word):
    blocks = re.findall(r"```\n(python -m venv.*?)```", TEXT, flags=re.S)
    assert sum(word in block for block in blocks) == 1
