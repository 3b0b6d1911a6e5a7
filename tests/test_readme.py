"""The Python in README.md runs as it is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .held import Held
from .pages import python_blocks, run_block

README = Path(__file__).parent.parent / "README.md"
BLOCKS = python_blocks(README)
OURS = [block for block in BLOCKS if "transformers" not in block]
MODEL = '"path/or/name"'


def test_every_block_is_run_below() -> None:
    assert len(BLOCKS) == len(OURS) + len([block for block in BLOCKS if "transformers" in block])
    assert len(OURS) == 2


def test_the_allocator_runs_and_gives_everything_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = Held.now()
    names: dict[str, Any] = {}  # the second goes on where the first ends
    for block in OURS:
        run_block(block, README, names)
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
            run_block(block.replace(MODEL, repr(str(tiny_model_folder))), README, names)
    assert n_loads == 2  # a tokenizer and a model
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out
