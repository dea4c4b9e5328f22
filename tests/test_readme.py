"""The README names only what is there."""

import re

from conftest import ROOT

CODE = "".join(script.read_text(encoding="utf-8") for script in ROOT.glob("*.py"))
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SPANS = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S)))
CONSTANTS = sorted({name for span in SPANS for name in re.findall(r"\b[A-Z]+_[A-Z_]+\b", span)})
FILES = {span for span in SPANS if re.fullmatch(r"[\w./]*(/|\.(py|md|txt|csv|png|pth))", span)}


def test_every_constant_is_in_a_script():
    assert len(CONSTANTS) > 10
    assert [name for name in CONSTANTS if not re.search(rf"^{name} = ", CODE, re.M)] == []


def test_every_file_is_there_or_a_script_writes_it():
    missing = {path for path in FILES if not (ROOT / path).exists()}
    assert len(FILES) > 10
    assert {path for path in missing if path.strip("/").split("/")[-1] not in CODE} == set()
