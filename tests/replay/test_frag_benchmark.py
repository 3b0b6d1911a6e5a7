"""The benchmark program of the study runs, in its smallest setting, and writes the JSON that readers rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import frag
from vmem_kv.replay.study import SCHEMES


@pytest.mark.slow
def test_frag(tmp_path: Path) -> None:
    rows = [f"{10 + i * 37 % 900},{1 + i * 13 % 60}" for i in range(300)]
    trace = tmp_path / "azure_like.csv"
    trace.write_text("prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    out, plot = tmp_path / "frag.json", tmp_path / "frag.png"
    frag.main([str(trace), "--budget", "1GiB", "--decode-steps", "20", "--json", str(out), "--plot", str(plot)])
    record = json.loads(out.read_text())
    assert record["program"] == "frag"
    assert {"commit", "command", "cpu", "date", "n_cpus"} <= record["run"].keys()
    assert [row["scheme"] for row in record["rows"]] == list(SCHEMES)
    assert [(s["trace"], s["layout"]) for s in record["steps"]] == [("azure_like", k) for k in frag.LAYOUTS]
    assert all(s["steady_calls"][1:] == [0, 0] for s in record["steps"])
    assert [t["verdict"] for t in record["targets"]][-1] == "pass"
    assert all(t["points"] for t in record["targets"])
    assert plot.stat().st_size > 0


def test_long_traces_are_cut_by_tokens(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("prompt_tokens,output_tokens\n" + "50,50\n" * 10)
    assert [frag.count_requests(trace, n) for n in (1, 100, 350, 1000, 1e9)] == [1, 1, 3, 10, 10]
