"""The benchmark programs run, in their smallest setting, and write the JSON that readers rely on. No times are read."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import torch
from transformers import StaticCache

from benchmarks import allocator, generate
from benchmarks.records import Spread, Target
from benchmarks.systems import ATTENTIONS, CACHES, TINY, Bench

from .held import open_files

TINY_RUN = ["--model", TINY, "--contexts", "36", "128", "--batches", "2", "--steps", "4", "--rounds", "2"]

SHORTEST_RUN = ["--model", TINY, "--contexts", "36", "--batches", "1", "--steps", "3", "--rounds", "1"]
SHORTEST_RUN += ["--prefill-contexts", "--threads", "1"]


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


def read(path: Path) -> dict:
    record = json.loads(path.read_text())
    assert record["schema"] == 1
    run = record["run"]
    for name in ("date", "command", "commit", "python", "torch", "transformers", "cpu", "n_cpus"):
        assert name in run
    assert {target["verdict"] for target in record["targets"]} <= {"pass", "miss", "not measured"}
    return record


def test_generate(tmp_path: Path) -> None:
    out, plot = tmp_path / "generate.json", tmp_path / "generate.png"
    options = ["--prefill-contexts", "16", "--threads", "1", "--json", str(out), "--plot", str(plot)]
    generate.main([*TINY_RUN, "--dtypes", "float32", *options])
    record = read(out)
    assert record["program"] == "generate"
    assert record["run"]["threads"] == 1
    assert plot.stat().st_size > 0

    visits = record["visits"]
    systems = {(v["context"], v["cache"], v["attention"], v["round"]) for v in visits}
    expected = {(n, c, a, r) for n in (36, 128) for c in CACHES for a in ATTENTIONS for r in (0, 1)}
    assert systems == expected | {(n, "static_max", ATTENTIONS[0], 0) for n in (36, 128)}
    assert len(visits) == len(systems)
    for visit in visits:
        assert 3 <= visit["n_steps"] <= 4
        assert visit["live_bytes"] == 2 * 2 * 2 * 2 * visit["context"] * 16 * 4  # layers, K and V, batch, heads
        assert visit["peak_kv_bytes"] >= visit["live_bytes"]
        assert visit["logits_difference"] < 1e-4
        assert (visit["bookkeeping_share"] is None) == (visit["cache"] != "vmem")
    # 128 tokens of 64 bytes fill a page of 8 KiB per head: the step behind them maps one in each plane.
    grown = [v["growth_tokens"] for v in visits if v["cache"] == "vmem" and v["context"] == 128]
    assert grown == [128] * 4
    # At 36, the pages are filled first: growth is measured wherever the context ends.
    ours = [v for v in visits if v["cache"] == "vmem" and v["context"] == 36]
    assert {v["growth_tokens"] for v in ours} == {128}
    assert {v["live_bytes_after_growth"] for v in ours} == {v["live_bytes"] // 36 * 129 for v in ours}
    # Who is first takes turns.
    order = [(v["round"], v["cache"], v["attention"]) for v in visits if v["context"] == 36]
    assert order[0] == (0, CACHES[0], ATTENTIONS[0])
    assert order[6] == (1, CACHES[1], ATTENTIONS[1])
    equality = [target for target in record["targets"] if "logits" in target["what"]]
    assert [target["verdict"] for target in equality] == ["pass", "pass"]
    assert [len(target["points"]) for target in equality] == [4, 4]

    assert {(p["cache"], p["round"]) for p in record["prefills"]} == {(c, r) for c in CACHES for r in (0, 1)}
    assert len(record["summary"]["decode_ratios"]) == 2 * 6
    assert len(record["summary"]["first_token_ratios"]) == 2


def test_a_cache_that_changes_the_logits_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Bench._step

    def wrong(self, cache, index):
        return step(self, cache, index) + isinstance(cache, StaticCache)

    monkeypatch.setattr(Bench, "_step", wrong)
    out = tmp_path / "generate.json"
    with pytest.raises(SystemExit, match="logits to StaticCache"):
        generate.main([*SHORTEST_RUN, "--dtypes", "float32", "--attentions", "sdpa", "--json", str(out)])
    verdicts = [t["verdict"] for t in read(out)["targets"] if "logits" in t["what"]]
    assert verdicts == ["pass", "miss"]


def test_generate_refuses_a_context_shorter_than_its_steps() -> None:
    with pytest.raises(SystemExit):
        generate.main(["--model", TINY, "--contexts", "16", "--steps", "16"])


def test_allocator(tmp_path: Path) -> None:
    out = tmp_path / "allocator.json"
    before = open_files()
    allocator.main(["--rounds", "1", "--page-sizes", "4096", "--json", str(out)])
    assert not open_files() - before
    record = read(out)
    assert record["program"] == "allocator"
    paths = allocator.available_paths()
    assert set(record["ensure_us"]) == set(record["warm_slot_us"]) == set(paths)
    rows = [(row["path"], row["page_bytes"], row["growth"], row["n_pages"]) for row in record["pages"]]
    assert rows == [(p, 4096, g, n) for p in paths for g, n in (("decode", 480), ("prefill", 960))]


def test_verdicts_follow_the_medians() -> None:
    near = Spread.of([1.1, 0.9, 1.0])
    assert (near.median, near.low, near.high) == (1.0, 0.9, 1.1)
    far = Spread.of([0.5])
    assert Target("speed", 1.0, True, (("here", near),)).verdict == "pass"
    assert Target("speed", 1.0, True, (("here", near), ("there", far))).verdict == "miss"
    assert Target("speed", 1.0, True, (("here", near), ("there", far))).worst == ("there", far)
    assert Target("cost", 0.6, False, (("here", near), ("there", far))).n_kept == 1
    assert Target("cost", 0.6, False, ()).verdict == "not measured"
