"""The examples of docs/testing-a-driver.md run as they are printed."""

from __future__ import annotations

from typing import Any

import pytest

from vmem_kv import testing

from ..core.subprocesses import ROOT
from ..pages import python_blocks, run_block

PAGE = ROOT / "docs" / "testing-a-driver.md"


def test_the_examples_run_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}  # the later ones use what the earlier ones define
    printed = []
    for block in python_blocks(PAGE):
        run_block(block, PAGE, names)
        printed.append(capsys.readouterr().out)
    text = "".join(printed)
    assert f"{len(names['report'].rules)} rules hold" in printed[0]
    assert "scrub: fills its spans with zeros and nothing else: page 1 was not scrubbed" in printed[1]
    assert names["progress"].findings == []
    assert names["n_errors"] > 20
    assert "pages in quarantine" in text
    assert "injected at point" in text
    assert "3 pages fit" in text
    assert "reservation 0x" in text
    assert r"b'\xff\xff\xff\xff'" in text


def test_everything_public_is_on_the_page() -> None:
    text = PAGE.read_text("utf-8")
    assert [name for name in testing.__all__ if name not in text] == []
