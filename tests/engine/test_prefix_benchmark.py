"""The benchmark of cached prefixes in its smallest setting: what it counts, and that sharing changes no answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import prefix

SMALL = ["--model", "tiny", "--tokens", "60", "--own", "5", "--rounds", "2", "--requests", "3", "--outputs", "4"]


def test_hits_are_hits_and_answers_are_equal(tmp_path: Path) -> None:
    file = tmp_path / "prefix.json"
    prefix.main([*SMALL, "--json", str(file)])
    record = json.loads(file.read_text())
    assert record["first_token"]["n_cached_tokens"] == [60, 65]
    shared, alone = record["served"]
    assert [s["system"] for s in (shared, alone)] == [prefix.SHARED, prefix.ALONE]
    assert shared["n_prompt_tokens_computed"] == 2 * (60 + 3 * 5)
    assert alone["n_prompt_tokens_computed"] == 2 * 3 * 65
    assert shared["equal_answers"]
    (target,) = record["targets"]
    assert {point["where"] for point in target["points"]} == {"fork", "adopt"}


@pytest.mark.parametrize("wrong", [["--tokens", "0"], ["--peers", "continuous", "--model", "tiny"]])
def test_what_makes_no_sense_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prefix.parse(wrong)
    assert "error" in capsys.readouterr().err
