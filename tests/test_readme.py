"""The Python in README.md runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from .held import Held

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text("utf-8")
# Behind as many empty lines as there are lines before them, so that a traceback names the README's line.
BLOCKS = [
    "\n" * TEXT.count("\n", 0, found.start(1)) + found[1]
    for found in re.finditer(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
]
OURS = [block for block in BLOCKS if "transformers" not in block]
MODEL = '"path/or/name"'


def run(block: str, names: dict[str, Any]) -> None:
    exec(compile(block, str(README), "exec"), names)


def test_every_block_is_run_below() -> None:
    assert len(BLOCKS) == len(OURS) + len([block for block in BLOCKS if "transformers" in block])
    assert len(OURS) == 2


def test_the_allocator_runs_and_gives_everything_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = Held.now()
    names: dict[str, Any] = {}  # the second goes on where the first ends
    for block in OURS:
        run(block, names)
    assert names["output"].shape == names["query"].shape
    assert capsys.readouterr().out
    assert not Held.now().beyond(before)


def test_the_blocks_for_transformers_run_in_turn(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    names: dict[str, Any] = {}  # the later ones use the model of the first
    n_loads = 0
    for block in BLOCKS:
        if "transformers" in block:
            n_loads += block.count(MODEL)
            run(block.replace(MODEL, repr(str(tiny_model_folder))), names)
    assert n_loads == 2  # a tokenizer and a model
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out
