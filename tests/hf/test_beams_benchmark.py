"""The measurement of beam search runs in its smallest setting, and its record says what readers rely on. No times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import beams
from benchmarks.systems import TINY

N_PROMPT, N_BEAMS, N_STEPS = 300, 4, 20


def test_beams_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "beams.json"
    sizes = ["--prompt", str(N_PROMPT), "--beams", str(N_BEAMS), "--steps", str(N_STEPS)]
    beams.main(["--model", TINY, *sizes, "--json", str(out)])
    record = json.loads(out.read_text())
    assert record["program"] == "beams"
    assert record["tokens_are_equal"]
    token_bytes = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, size, fp32
    assert record["live_bytes"] == token_bytes * (N_PROMPT + N_BEAMS * N_STEPS)
    visits = {(visit["cache"], visit["beginning"]): visit for visit in record["visits"]}
    assert visits.keys() == {(cache, beginning) for cache in beams.CACHES for beginning in beams.BEGINNINGS}
    one_row = token_bytes * N_PROMPT
    assert visits["dynamic", "once"]["end_bytes"] >= N_BEAMS * one_row
    for visit in record["visits"]:
        assert visit["peak_bytes"] >= visit["end_bytes"] > one_row


def test_a_cache_that_changes_the_tokens_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beams.TimedVmem, "reorder_cache", lambda self, beam_idx: self.timed.milliseconds.append(0.0))
    with pytest.raises(SystemExit, match="different tokens"):
        beams.main(["--model", TINY, "--prompt", "60", "--steps", "20"])
