"""The benchmark runs in its smallest setting and writes the JSON that readers rely on. No times are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")

import torch

from benchmarks import park

from ..held import Held


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


def test_park(tmp_path: Path) -> None:
    out = tmp_path / "park.json"
    before = Held.now()
    options = ["--lengths", "33", "70", "--rounds", "2", "--turns", "3", "--turn-tokens", "10", "--threads", "1"]
    park.main([*options, "--model", "tiny", "--prefill-tokens", "33", "--json", str(out)])
    assert not Held.now().files - before.files
    record = json.loads(out.read_text())
    assert (record["schema"], record["program"]) == (1, "park")

    rows = [(row["kind"], row["pages_from"], row["n_tokens"]) for row in record["moved"]]
    assert rows == [(k, p, n) for k in park.KINDS for p in park.POOLS for n in (33, 70)]
    for row in record["moved"]:
        assert row["n_bytes"] == 46_080 * row["n_tokens"]
        assert row["n_copies_per_gib"] < row["n_block_copies_per_gib"] or row["kind"] == "per_head"
        assert row["n_block_copies_per_gib"] == pytest.approx(60 * -(-row["n_tokens"] // 16) * 2**30 / row["n_bytes"])
    assert [(r["n_tokens"], r["is_measured"]) for r in record["recomputed"]] == [(33, True), (70, False)]
    assert record["recomputed"][1]["prefill_s"] > record["recomputed"][0]["prefill_s"] * 70 / 33
    turns = record["turns"]
    assert turns["kept_bytes"] == 46_080 * 30
    assert turns["dropped_bytes"] == 46_080 * (10 + 20 + 30)
    assert [len(target["points"]) for target in record["targets"]] == [6] * 8 + [2]
