"""The serving benchmark runs, in its smallest setting, and concludes what its visits say. No times are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import torch

from benchmarks import serving, serving_profile
from benchmarks.serving_log import Log
from benchmarks.serving_report import evaluate, readme_table, speed_ratios
from benchmarks.serving_systems import Setting
from benchmarks.serving_visit import main as visit_main
from benchmarks.serving_visit import to_job, visit
from benchmarks.serving_workload import Workload, at_once, poisson, replay

VOCABULARY = 20
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # K and V, layers, heads, head_dim, float32
PROMPTS, OUTPUTS = (4, 20), (3, 9)
WARM_UP = at_once(1, (4, 4), (2, 2), VOCABULARY, 1)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


def setting_of(folder: Path) -> Setting:
    return Setting(str(folder), "float32", 1, TOKEN_BYTES, 1 << 20)


def test_all_engines_of_this_interpreter_answer_alike(tiny_model_folder: Path) -> None:
    # More requests than a static batch holds, and some that come later.
    workloads = [at_once(10, PROMPTS, OUTPUTS, VOCABULARY, 0), poisson(3, PROMPTS, OUTPUTS, 50.0, VOCABULARY, 2)]
    results = {
        system: visit(system, setting_of(tiny_model_folder), WARM_UP, workloads)
        for system in ("vmem_kv", "static", "continuous")
    }
    for system, of_system in results.items():
        for result, workload, ours in zip(of_system, workloads, results["vmem_kv"], strict=True):
            assert (result["system"], result["workload"]) == (system, workload.name)
            assert result["answers"] == ours["answers"]
            assert result["n_tokens"] == workload.n_output_tokens
            assert result["peak_kv_bytes"] >= result["peak_live_kv_bytes"] > 0
            assert result["timeline"][-1]["n_tokens"] == workload.n_output_tokens
            assert 0 < result["first_token_s"]["p50"] <= result["first_token_s"]["p99"] <= result["wall_s"]
    ours = results["vmem_kv"][0]
    assert ours["peak_live_kv_bytes"] <= ours["peak_needed_kv_bytes"] <= ours["peak_kv_bytes"]
    assert ours["peak_kv_bytes"] == ours["n_peak_pages"] * ours["page_bytes"]
    assert set(ours["driver_calls"]) == {"create", "map", "set_access"}
    assert 0 < ours["overhead_share"] < 1
    assert results["static"][0]["n_batches"] == 2


def test_a_job_travels_as_it_is(tiny_model_folder: Path, tmp_path: Path) -> None:
    workload = poisson(2, PROMPTS, OUTPUTS, 50.0, VOCABULARY, 0)
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    job.write_text(to_job("vmem_kv", setting_of(tiny_model_folder), WARM_UP, [workload]))
    assert Workload.from_json(json.loads(job.read_text())["workloads"][0]) == workload
    visit_main(job, result)
    (found,) = json.loads(result.read_text())
    assert found["n_tokens"] == workload.n_output_tokens


@pytest.mark.timeout(600)  # a visit is a process that imports torch and transformers, maybe on a busy machine
def test_the_program(tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "serving.json", tmp_path / "serving.png"
    options = ["--model", str(tiny_model_folder), "--systems", "vmem_kv", "--workloads", "at_once"]
    options += ["--requests", "3", "--threads", "1", "--prompts", "4", "9", "--outputs", "3", "5", "--rounds", "1"]
    serving.main([*options, "--json", str(out), "--plot", str(plot)])
    assert "| at once: vmem_kv |" in capsys.readouterr().out
    assert plot.stat().st_size > 0
    record = json.loads(out.read_text())
    assert (record["schema"], record["program"]) == (1, "serving")
    assert [(v["system"], v["order"]) for v in record["visits"]] == [("vmem_kv", 0)]
    for name in ("date", "command", "commit", "cpu", "n_cpus", "threads", "load_average_at_end"):
        assert name in record["run"]
    verdicts = {target["what"]: target["verdict"] for target in record["targets"]}
    assert verdicts["step time outside the model's forward, %"] in ("pass", "miss")
    assert verdicts["tokens/s, all at once, / vLLM, CPU build"] == "not measured"

    record["visits"].append(record["visits"][0] | {"system": "static", "order": 1})
    out.write_text(json.dumps(record))
    plot.unlink()
    serving.main(["--redraw", str(out), "--plot", str(plot)])
    assert plot.stat().st_size > 0
    record["visits"][1]["answers"] = ["other tokens", *record["visits"][1]["answers"][1:]]
    out.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="static, 67 % of at_once"):
        serving.main(["--redraw", str(out)])


@pytest.mark.parametrize(
    "options", [["--requests", "0"], ["--outputs", "0", "4"], ["--trace", "t.csv", "--arrivals", "1"]]
)
def test_senseless_options_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        serving.parse(options)


@pytest.mark.timeout(600)
def test_a_visit_that_fails_says_why(tmp_path: Path) -> None:
    options = serving.parse(["--threads", "1"])
    job = to_job("vmem_kv", setting_of(tmp_path / "nothing"), WARM_UP, [WARM_UP])
    with pytest.raises(SystemExit, match=r"nothing(.|\n)*the visit ended with status 1"):
        serving.visit(Path(sys.executable), job, options)


def test_this_engine_serves_around_every_peer_and_peers_take_turns() -> None:
    systems = ("vmem_kv", "static", "continuous", "vllm")
    assert list(serving.turns(systems, 0)) == [
        "vmem_kv", "static", "vmem_kv", "continuous", "vmem_kv", "vllm", "vmem_kv",
    ]  # fmt: skip
    assert list(serving.turns(systems, 1))[1::2] == ["continuous", "vllm", "static"]
    assert list(serving.turns(("static",), 0)) == ["static"]


def visit_of(system: str, order: int, speed: float, **fields: Any) -> dict[str, Any]:
    latency = {"p50": 1.0, "p99": 2.0}
    return {
        "system": system, "workload": "at_once", "round": 0, "order": order, "tokens_per_s": speed,
        "first_token_s": latency, "between_tokens_s": latency, "answers": ["a"],
        "peak_kv_bytes": 104, "peak_needed_kv_bytes": 100, "peak_live_kv_bytes": 90, "overhead_share": 0.05, **fields,
    }  # fmt: skip


def test_a_peer_is_held_against_its_neighbours_in_time() -> None:
    visits = [visit_of(s, i, v) for i, (s, v) in enumerate([("vmem_kv", 8.0), ("static", 2.0), ("vmem_kv", 6.0)])]
    visits += [visit_of("vllm", 3, 12.0), visit_of("vmem_kv", 4, 100.0)]
    assert speed_ratios(visits, "at_once", "static") == [3.5]
    assert speed_ratios(visits, "at_once", "vllm") == [53.0 / 12.0]
    assert speed_ratios(visits, "at_once", "continuous") == []
    assert "| at once: vLLM, CPU build | 12.0 | 4.42 | 1.00 / 2.00 s | 1000 / 2000 ms | 104 B (90 B) |" in readme_table(
        visits
    )
    verdicts = {(t.what, t.bound): t.verdict for t in evaluate(visits)}
    assert verdicts["tokens/s, all at once, / transformers `generate`, static batches of 8", 3.0] == "pass"
    assert verdicts["peak K/V memory / what live tokens need in whole pages", 1.05] == "pass"
    assert verdicts["step time outside the model's forward, %", 10.0] == "pass"
    worse = [v | {"peak_kv_bytes": 106, "overhead_share": 0.2, "answers": [v["system"]]} for v in visits]
    verdicts = {(t.what, t.bound): t.verdict for t in evaluate(worse)}
    assert verdicts["peak K/V memory / what live tokens need in whole pages", 1.05] == "miss"
    assert verdicts["step time outside the model's forward, %", 10.0] == "miss"
    assert verdicts["answers equal to this engine's, %", 100.0] == "miss"


def test_workloads_are_the_same_every_time_and_within_bounds() -> None:
    for make in (at_once, lambda *a: poisson(*a[:3], 2.0, *a[3:])):
        workload = make(50, PROMPTS, OUTPUTS, VOCABULARY, 7)
        assert workload == make(50, PROMPTS, OUTPUTS, VOCABULARY, 7)
        assert workload != make(50, PROMPTS, OUTPUTS, VOCABULARY, 8)
        assert all(PROMPTS[0] <= len(a.prompt) <= PROMPTS[1] for a in workload.asks)
        assert all(OUTPUTS[0] <= a.n_output <= OUTPUTS[1] for a in workload.asks)
        assert all(0 <= t < VOCABULARY for a in workload.asks for t in a.prompt)
        arrivals = [a.arrival_s for a in workload.asks]
        assert arrivals == sorted(arrivals)


def test_a_trace_keeps_its_shape() -> None:
    workload = replay("t", [(10.0, 100, 10), (11.0, 200, 20), (14.0, 900, 30)], (10, 30), (2, 6), 2.0, VOCABULARY, 0)
    assert [a.arrival_s for a in workload.asks] == [0.0, 0.25, 1.0]
    assert [len(a.prompt) for a in workload.asks] == [5, 10, 30]  # the last one cut to the most
    assert [a.n_output for a in workload.asks] == [2, 4, 6]


def test_the_log_counts_what_was_asked_for() -> None:
    workload = at_once(2, (5, 5), (3, 3), VOCABULARY, 0)
    log = Log(workload, 10)
    log.memory(400, 300)
    log.tokens(0, [1, 2])
    log.tokens(1, [1])
    log.tokens(0, [3, 4, 5])  # two too many
    log.memory(500, 250)
    with pytest.raises(RuntimeError, match="answer 1 has 1 tokens, 3 were asked for"):
        log.summary()
    log.tokens(1, [2, 3])
    summary = log.summary()
    assert summary["n_tokens"] == 6
    assert (summary["peak_kv_bytes"], summary["peak_needed_kv_bytes"]) == (500, 300)
    # The newest token of an answer is not computed yet: both prompts, and two tokens of the first one's answer.
    assert summary["peak_live_kv_bytes"] == 10 * (5 + 2 + 5)
    assert summary["answers"][0] == summary["answers"][1]


def test_the_profile_splits_steps_into_stages(tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.json"
    options = ["--requests", "2", "--prompts", "4", "9", "--outputs", "3", "5", "--threads", "1", "--json", str(out)]
    record = serving_profile.main([str(tiny_model_folder), *options])
    assert json.loads(out.read_text())["stages"].keys() == {"decode", "prompts"}
    for of_kind in record["stages"].values():
        assert set(of_kind["wall_s"]) == set(serving_profile.STAGES)
        for stage in ("schedule", "prepare", "attention", "linears", "sample", "answers"):
            assert of_kind["wall_s"][stage] > 0, stage
        assert 0 < of_kind["overhead_share"] < 1
