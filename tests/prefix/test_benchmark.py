"""The benchmark runs, in its smallest setting, and writes what readers rely on. No times are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich")

from benchmarks import prefix_index


def test_prefix_index(tmp_path: Path) -> None:
    out = tmp_path / "prefix_index.json"
    prefix_index.main(["--entries", "20", "--tokens", "5000", "--rounds", "1", "--json", str(out)])
    record = json.loads(out.read_text())
    assert (record["schema"], record["program"], record["n_entries"]) == (1, "prefix_index", 20)
    assert {(cost["operation"], cost["policy"]) for cost in record["costs"]} == {
        (operation, policy)
        for operation in ("match a list", "match an array", "match a short list", "insert and evict", "extend and cut")
        for policy in ("lru", "cost_aware")
    }
    assert [target["verdict"] in ("pass", "miss") for target in record["targets"]] == [True]
