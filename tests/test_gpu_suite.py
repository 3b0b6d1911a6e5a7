"""The GPU suite without a GPU: its runner against planted crashes, and the whole of it on the emulated driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

from benchmarks.gpu import correctness, facts, interference, misuse, speed, suite
from benchmarks.gpu.bench import N_IN_FLIGHT, EmulatedBench, EventClock, HostClock
from benchmarks.gpu.cases import Part
from benchmarks.gpu.interference import Disturber, histogram, summary
from benchmarks.gpu.plan import EMULATED, ON_A_DEVICE, SMALL, Point, choose_plan
from benchmarks.gpu.results import NOT_A_TIMING, Results
from benchmarks.gpu.runner import MAX_CRASHES, last_lines, run_part
from benchmarks.gpu.sequences import Store, plain, reference, relative_error
from benchmarks.gpu.suite import PARTS
from vmem_kv.tensors import SlotKV

ROOT = Path(__file__).resolve().parent.parent


def planted(name: str) -> Part:
    return Part("planted", "Planted", f"tests.gpu_suite_{name}", 1.0)


def run_planted(name: str, folder: Path, budget_s: float = 100.0) -> Results:
    part = planted(name)
    results = Results(folder, "run", {}, is_emulated=True)
    results.begin(part)
    run_part(part, results, emulate=True, quick=True, budget_s=budget_s)
    return results


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_whatever_ends_a_process_becomes_a_row_and_everything_else_runs(tmp_path: Path) -> None:
    results = run_planted("plants", tmp_path)
    part = results.parts["planted"]
    rows = part.tables["rows"].rows
    names = ["good", "said before the crash", "said before it hung", "good", "dangerous", "good"]
    assert [row["case"] for row in rows] == names
    bad = {row["case"]: row for row in part.tables["bad"].rows}
    assert {name: row["outcome"] for name, row in bad.items()} == {
        "crash": "crashed (signal SIGKILL)",
        "fault": "crashed (signal SIGSEGV)",
        "hang": "crashed (timeout after 1 s)",
        "raise": "raised ValueError: planted",
        "exit": "crashed (exit status 3)",
    }
    assert "these were its last words" in bad["crash"]["last words"]
    assert bad["crash"]["expected"] == "a crash"
    assert "_fault" in bad["fault"]["last words"]
    assert [(s["case"], s["reason"].partition(":")[0]) for s in part.skipped] == [("too dear", "time budget")]

    pids = [row["pid"] for row in rows if "pid" in row]
    hung, good_again, dangerous, last = pids[1:]
    assert good_again != dangerous != last, "a dangerous case has a process of its own"
    assert not is_alive(hung)


def test_a_part_that_only_crashes_is_given_up(tmp_path: Path) -> None:
    part = run_planted("crashes", tmp_path).parts["planted"]
    assert len(part.tables["bad"].rows) == MAX_CRASHES
    assert len(part.skipped) == 12 - MAX_CRASHES


def test_a_part_without_time_is_skipped(tmp_path: Path) -> None:
    part = run_planted("plants", tmp_path, budget_s=0.0).parts["planted"]
    assert not part.tables
    assert part.skipped == [{"case": "all", "reason": "time budget: used up"}]


def test_a_part_that_cannot_be_imported_is_a_row(tmp_path: Path) -> None:
    part = run_planted("nowhere", tmp_path).parts["planted"]
    (row,) = part.tables["workers"].rows
    assert row["case"] == "starting"
    assert "No module named" in row["last words"]


def test_without_a_device_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "missing_device", lambda: "there is no NVIDIA driver")
    assert suite.main(["--out", str(tmp_path)]) == 2
    assert "there is no NVIDIA driver; --emulate" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_valid_results_and_no_process(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.test_gpu_suite import run_planted\n"
        "run_planted('hang', Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    path = tmp_path / "run.json"
    rows: list[dict] = []
    deadline = time.monotonic() + 60
    while len(rows) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        if path.exists():
            tables = json.loads(path.read_text())["parts"]["planted"]["tables"]  # valid at any moment
            rows = tables["rows"]["rows"] if tables else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [row["case"] for row in rows] == ["good", "said before it hung"]
    assert "said before it hung" in (tmp_path / "run.md").read_text()
    while is_alive(rows[1]["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(rows[1]["pid"])


def test_last_lines_say_where_a_process_faulted() -> None:
    text = "noise\nbefore\nFatal Python error: Segmentation fault\n\nwhere\n" + "module\n" * 50
    assert last_lines(text).splitlines()[:4] == ["noise", "before", "Fatal Python error: Segmentation fault", "where"]
    assert last_lines("\n".join(map(str, range(100)))).splitlines() == [str(i) for i in range(92, 100)]


def test_emulated_times_are_marked_in_their_columns(tmp_path: Path) -> None:
    for is_emulated in (True, False):
        part, results = planted("plants"), Results(tmp_path, "t", {"x": 1}, is_emulated=is_emulated)
        results.begin(part)
        results.add_row(part, "a table", {"case": "a|b", "ms": 1.5}, ["ms"])
        results.save(now=True)
        text = results.markdown_path.read_text()
        assert (f"| case | ms ({NOT_A_TIMING}) |" in text) == is_emulated
        assert ("| case | ms |" in text) != is_emulated
        assert "| a\\|b | 1.5 |" in text
        assert json.loads(results.json_path.read_text())["emulated"] == is_emulated
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.json", "t.log", "t.md"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_suite_runs_on_the_emulated_driver(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("OUT", None)
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/run.py", "--emulate", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu-emulated.json").read_text())
    assert record["emulated"] is True
    assert list(record["parts"]) == [part.name for part in PARTS]
    tables = {name: part["tables"] for name, part in record["parts"].items()}

    every_row = [row for part in tables.values() for table in part.values() for row in table["rows"]]
    outcomes = [str(row.get("outcome")) for row in every_row]
    assert not [o for o in outcomes if "WRONG" in o or "raised" in o or "CHANGED" in o or "differs" in o]
    crashed = [row["case"] for row in every_row if "crashed" in str(row.get("outcome"))]
    assert crashed == ["fa3 without its slack"], "the one that loads whole tiles, and it alone"
    assert [row["case"] for row in every_row if row.get("outcome") == "needs a GPU"] == ["remap under a replayed graph"]
    assert not [part["skipped"] for part in record["parts"].values() if part["skipped"]]

    # The shipped answers are the emulator's own, all of them.
    probes = [probe.name for probe in (*misuse.PROBES, *misuse.DANGEROUS_PROBES)]
    assert [row["case"] for row in tables["facts"][facts.MISUSE]["rows"]] == probes
    assert sorted(misuse.expected_answers()) == sorted(probes)
    assert facts.DIFFERENCES not in tables["facts"]

    numerics = tables["correctness"][correctness.NUMERICS]["rows"]
    assert {row["case"] for row in numerics} == {"torch_flash", "fa3"}
    assert {row["batch"] for row in numerics} >= {"decode", "prefill", "chunked prefill and decode, ragged"}
    assert all(row["outcome"] == "ok" for row in numerics)
    tags = {row["case"]: row for row in tables["correctness"][correctness.MEMORY]["rows"]}
    assert tags["tags under churn"]["of"] >= EMULATED.correctness.n_tag_checks / 10
    assert tags["a planted wrong tag is seen"]["n"] == 1
    memories = {row["memory"] for row in tables["speed"][speed.RATIOS]["rows"]}
    assert memories >= {"plain", "plain, again", *EMULATED.speed.layouts}
    assert {row["case"] for row in tables["interference"][interference.STEPS]["rows"]} == {
        "none",
        "premapped",
        "synchronous",
    }
    growth = {row["case"]: row["pages per turn"] for row in tables["interference"][interference.STEPS]["rows"]}
    assert growth["none"] == 0 < growth["synchronous"]
    assert {row["case"] for row in tables["generate"]["generate"]["rows"]} == {"vmem", "dynamic", "static"}

    markdown = (tmp_path / "gpu-emulated.md").read_text()
    assert markdown in done.stdout
    for part in tables.values():
        for table in part.values():
            for column in table["timed_columns"]:
                if any(column in row for row in table["rows"]):
                    assert f"{column} ({NOT_A_TIMING})" in markdown


def test_every_check_sees_its_planted_fault(tmp_path: Path) -> None:
    part = run_planted("faults", tmp_path).parts["planted"]

    def outcomes(table: str, words: str) -> list[str]:
        return [row["outcome"] for row in part.tables[table].rows if words in row["case"]]

    memory = correctness.MEMORY
    assert outcomes(memory, "graph") == ["ok", "WRONG"]
    assert outcomes(memory, "values") == ["WRONG"] * 3
    aliased = outcomes(memory, "aliased prefix")
    assert aliased == ["WRONG"] * len(aliased)
    assert len(aliased) >= 2
    assert outcomes(facts.MISUSE, "free twice") == ["differs"] * 2  # once before the device is lost, and once after it
    assert len(part.tables[facts.DIFFERENCES].rows) == 2
    assert outcomes("workers", "lost") == ["the device was lost"]
    assert outcomes(interference.KERNEL_TIMES, "late write") == ["RESULTS CHANGED"] * 2
    biased = part.tables[correctness.NUMERICS].rows
    assert [row["outcome"] for row in biased] == ["WRONG"] * 4
    assert outcomes("greedy", "numerics") == ["crashed (signal SIGSEGV)"]
    assert outcomes("overread", "overread") == ["crashed (signal SIGSEGV)"]
    assert outcomes("views", "views") == ["tensors look into the cache still"]
    assert set(part.tables) == {
        memory,
        facts.MISUSE,
        facts.DIFFERENCES,
        interference.KERNEL_TIMES,
        correctness.NUMERICS,
        "greedy",
        "overread",
        "views",
        "workers",
    }, "and nothing else ended badly"


class FakeCuda:
    """A device on which every launch takes one millisecond, and events note when they were reached."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.n_waits = 0

    def Event(self, *, enable_timing: bool) -> FakeEvent:  # noqa: N802 - as torch.cuda calls it
        assert enable_timing
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.n_waits += 1

    def launch(self) -> None:
        self.now_ms += 1.0


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.at_ms: float | None = None

    def record(self) -> None:
        self.at_ms = self.cuda.now_ms

    def synchronize(self) -> None:
        assert self.at_ms is not None, "waiting for an event that was not recorded yet"

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.at_ms is not None
        assert end.at_ms is not None
        return end.at_ms - self.at_ms


def test_events_are_recorded_around_each_call_and_not_around_what_comes_before_it() -> None:
    cuda = FakeCuda()
    clock = EventClock(cuda)

    def twice() -> None:
        cuda.launch()
        cuda.launch()

    times = clock.measure({"once": cuda.launch, "twice": twice}, 4, cuda.launch)
    assert times == {"once": [1.0] * 4, "twice": [2.0] * 4}
    n_calls = 2 * N_IN_FLIGHT + 5
    assert clock.back_to_back(cuda.launch, n_calls) == [1.0] * n_calls
    assert cuda.n_waits


def test_the_reference_tells_one_row_too_many_from_the_right_rows() -> None:
    bench = EmulatedBench(EMULATED)
    store = plain(bench, SMALL, [40, 40], torch.float32)
    query = torch.randn(2, SMALL.n_q_heads, SMALL.head_dim)
    right = reference(query, store, [1, 1])
    assert relative_error(right.float(), right) < 1e-6
    kv = SlotKV(store.kv.keys, store.kv.values, store.kv.span_tokens)
    shifted = Store(kv, (1, 39), store.lengths)
    assert relative_error(reference(query, shifted, [1, 1]), right) > 2 * max(correctness.TOLERANCE.values())
    poisoned = right.clone()
    poisoned[0, 0, 0] = float("nan")
    assert not relative_error(poisoned, right) < 1e9


def test_the_reference_is_torchs_attention() -> None:
    bench = EmulatedBench(EMULATED)
    store = plain(bench, SMALL, [33], torch.float64)
    query = torch.randn(33, SMALL.n_q_heads, SMALL.head_dim, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1),
        store.kv.keys.transpose(0, 1),
        store.kv.values.transpose(0, 1),
        is_causal=True,
        enable_gqa=True,
    ).transpose(0, 1)
    assert relative_error(reference(query, store, [33]), expected) < 1e-12


def test_layouts_that_do_not_fit_together_are_left_out_from_the_end() -> None:
    scale, shape = ON_A_DEVICE.speed, ON_A_DEVICE.speed.shapes[0]
    assert [speed.n_layers(shape, kind) for kind in ("per_layer", "group:8", "token_major")] == [1, 8, 32]
    assert speed.fit_layouts(shape, Point(1, 1024), scale) == (list(scale.layouts), [])
    fitting, others = speed.fit_layouts(shape, Point(8, 131072), scale)
    assert "per_layer" in fitting
    assert others == ["token_major"]


def test_plans_cover_what_was_asked_for() -> None:
    points = ON_A_DEVICE.speed.points
    assert {1, 256} <= {point.batch for point in points}
    assert {1024, 131072} <= {point.context for point in points}
    assert ON_A_DEVICE.budget_s + 10 < 8 * 60
    assert choose_plan(emulate=False, quick=True).speed.points == points[:1]
    assert len(PARTS) == 5
    assert sum(part.weight for part in PARTS) == pytest.approx(1.0)


def test_every_mix_has_lengths_around_the_ends_of_pages() -> None:
    for mix in correctness.mixes(ON_A_DEVICE.correctness, 1024, 175):
        assert len(mix.lengths) == len(mix.n_queries)
        assert all(1 <= n <= length for n, length in zip(mix.n_queries, mix.lengths, strict=True))
    decode = correctness.mixes(ON_A_DEVICE.correctness, 1024, 175)[0]
    assert {1023, 1024, 1025, 2048, 1024 - 175} <= set(decode.lengths)


def test_a_clock_runs_everything_equally_often_and_takes_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = HostClock().measure(calls, 3, lambda: order.append("-"))
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order).replace("-", "") == "abcbcacab" * 2
    assert order.count("-") == 18
    assert len(HostClock().back_to_back(lambda: None, 5)) == 5


def test_a_disturber_says_what_ended_it() -> None:
    def work() -> None:
        raise ValueError("planted")

    with Disturber(work) as disturber:
        disturber._thread.join(10)
    assert disturber.error == "ValueError: planted"
    assert disturber.n_done == 0


def test_histograms_count_every_time_once() -> None:
    assert histogram([1.0, 1.0, 1.02, 3.0, 100.0], 1.0) == {
        "< 1.01": 2,
        "< 1.05": 1,
        "< 1.1": 0,
        "< 1.5": 0,
        "< 2": 0,
        "< 10": 1,
        ">= 10": 1,
    }
    assert summary([3.0, 1.0, 2.0])["p50_ms"] == 2.0
