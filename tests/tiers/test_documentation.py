"""The Python in docs/tiers.md runs as it is printed, from top to bottom, and leaves nothing behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ..held import Held

PAGE = Path(__file__).parents[2] / "docs" / "tiers.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text("utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    before = Held.now()
    names: dict[str, Any] = {}
    for block in blocks:
        # Behind as many empty lines as there are lines before it, so that a traceback names the page's line.
        source = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        exec(compile(source, str(PAGE), "exec"), names)
    assert (tmp_path / "prompt.kv").stat().st_size > 0
    assert not Held.now().beyond(before)
