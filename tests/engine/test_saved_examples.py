"""The Python of docs/serving.md runs as it is printed, with the default model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..core.subprocesses import ROOT
from ..pages import python_blocks, run_block

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(600)]
PAGE = ROOT / "docs" / "serving.md"


def test_the_examples_compute_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}  # the later ones use what the earlier ones define
    blocks = python_blocks(PAGE)
    assert len(blocks) == 2
    for block in blocks:
        run_block(block, PAGE, names)
    lines = capsys.readouterr().out.splitlines()
    session, prompt = (int(line.split()[0]) for line in lines if line.endswith("tokens were not computed again"))
    assert names["first"].n_cached_tokens == 0
    assert session == len(names["first"].prompt_token_ids) + 20 - 1
    assert len(names["answer"].prompt_token_ids) - 25 < prompt < len(names["answer"].prompt_token_ids)
    assert {path.name for path in tmp_path.iterdir()} == {"paris.session", "system.session"}
