"""The GPU suite without a GPU: its runner against planted crashes, and the whole of it on the emulated driver."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import torch

from benchmarks.gpu import correctness, emulator, facts, generation, interference, misuse, paged, speed, suite
from benchmarks.gpu.bench import N_IN_FLIGHT, EmulatedBench, EventClock, HostClock, Series
from benchmarks.gpu.cases import ANYTHING, Part
from benchmarks.gpu.interference import (
    Disturber,
    DriverCalls,
    describe_calls,
    histogram,
    judge,
    split_times,
    summary,
)
from benchmarks.gpu.plan import EMULATED, ON_A_DEVICE, SMALL, Point, choose_plan
from benchmarks.gpu.preflight import missing_device, read_answer
from benchmarks.gpu.results import NOT_A_TIMING, Results
from benchmarks.gpu.runner import MAX_CRASHES, MAX_EQUAL_ERRORS, last_lines, run_part
from benchmarks.gpu.sequences import Store, plain, reference, relative_error
from benchmarks.gpu.suite import PARTS
from benchmarks.gpu.summary import MAX_LINES, is_bad, summarise
from vmem_kv.errors import ConfigError
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.tensors import SlotKV

ROOT = Path(__file__).resolve().parent.parent


def planted(name: str) -> Part:
    return Part("planted", "Planted", f"tests.gpu_suite_{name}", 1.0)


def run_planted(name: str, folder: Path, budget_s: float = 800.0) -> Results:
    part = planted(name)
    results = Results(folder, "run", {}, is_emulated=True)
    results.begin(part)
    run_part(part, results, emulate=True, quick=True, budget_s=budget_s)
    return results


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone, before the look or in the middle of it
        return False


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
        "hang": "crashed (timeout after 5 s)",
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


def test_the_preflight_says_what_is_missing_however_it_ends() -> None:
    assert read_answer(0, "noise\nnull\n", "a warning") is None
    assert read_answer(0, 'noise\n"no device; check nvidia-smi"\n', "") == "no device; check nvidia-smi"
    assert "status -11" in str(read_answer(-11, "", "Fatal Python error\n\n"))
    assert "Fatal Python error" in str(read_answer(-11, "null", "Fatal Python error\n\n"))
    assert "no last words" in str(read_answer(0, "", ""))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about machines without a device")
def test_the_preflight_runs_and_answers_in_one_sentence() -> None:
    sentence = missing_device()
    assert sentence is not None
    assert "ended its process" not in sentence
    assert "\n" not in sentence


def test_an_emulated_driver_that_was_not_built_is_built_or_missed_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = emulator.build(tmp_path)
    assert hasattr(ctypes.CDLL(str(library)), "vmem_emulator_abi")
    monkeypatch.setattr(emulator, "_COMPILERS", ("no-such-compiler",))

    def not_built() -> Path:
        raise ConfigError("not built")

    monkeypatch.setattr(emulator, "find_emulator", not_built)
    assert suite.main(["--emulate", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no C compiler" in line


def fill(results: Results, *outcomes: dict) -> Results:
    part = planted("plants")
    results.begin(part)
    for outcome in outcomes:
        results.add_row(part, "a table", {"case": "c", **outcome}, [])
    return results


def test_only_what_went_wrong_unexpectedly_is_bad() -> None:
    good = [
        {"outcome": "ok"},
        {"outcome": "results unchanged"},
        {"outcome": "no fault", "expected": "a fault"},
        {"outcome": "crashed (signal SIGSEGV)", "expected": "a fault"},
        {"outcome": "crashed (signal SIGSEGV)", "expected": ANYTHING},
        {"outcome": "the device was lost", "expected": ANYTHING},
        {"outcome": "raised AcceleratorError: x (the device was lost)", "expected": "a fault"},
        {"outcome": "needs a GPU"},
        {"value": 3},
    ]
    bad = [
        {"outcome": "WRONG"},
        {"outcome": "WRONG: a breach"},
        {"outcome": "RESULTS CHANGED"},
        {"outcome": "raised ValueError: x", "expected": "a fault"},
        {"outcome": "crashed (signal SIGSEGV)"},
        {"outcome": "crashed (signal SIGSEGV)", "expected": "no fault"},
        {"outcome": "the device was lost"},
        {"outcome": "raised AcceleratorError: x (the device was lost)"},
    ]
    assert [row for row in good if is_bad(row)] == []
    assert [row for row in bad if not is_bad(row)] == []


def test_the_summary_is_short_counts_and_names_what_is_bad(tmp_path: Path) -> None:
    rows = [{"outcome": "ok"}] * 3 + [{"outcome": "raised X: planted\nin two lines", "detail": "d" * 500}] * 50
    results = fill(Results(tmp_path, "t", {}, is_emulated=False), *rows)
    results.add_skipped(planted("plants"), "late", "time budget: used up")
    lines = summarise(results)
    assert lines[0] == "planted: 53 rows, 3 ok, 0 WRONG, 50 raised, 0 crashed, 1 skipped (time budget: used up)"
    assert len(lines) <= MAX_LINES
    assert "planted" in lines[1]
    assert all("\n" not in line and len(line) <= 160 for line in lines)


def test_the_summary_ends_with_the_figures_that_matter(tmp_path: Path) -> None:
    results = Results(tmp_path, "t", {}, is_emulated=False)
    of = {part.name: part for part in PARTS}
    for name in ("facts", "speed", "interference", "generate"):
        results.begin(of[name])
    where = {"kernel": "k", "within 1 %": "yes"}
    for memory, ratio in (("per_layer", 1.002), ("per_layer", 0.97), ("per_layer", 1.0), ("plain, again", 1.001)):
        results.add_row(of["speed"], speed.RATIOS, {**where, "memory": memory, "ratio": ratio}, [])
    for case, ratio in (("none, again", 0.999), ("premapped", 1.004)):
        results.add_row(of["interference"], interference.STEPS, {"case": case, "median turn / none": ratio}, [])
    row = {"case": "dynamic", "context": 1024, "vmem speed / this": 0.98}
    results.add_row(of["generate"], generation.SPEED, row, [])
    results.add_row(of["generate"], generation.SPEED, {"case": "context 8192", "outcome": "raised X"}, [])
    for call, us in (("cuMemSetAccess", 31.0), ("cuMemUnmap", 29.0)):
        results.add_row(of["facts"], facts.CALLS, {"call": call, "page_bytes": 2 << 20, "p50_us": us}, [])
    text = "\n".join(summarise(results))
    assert "k, per_layer / plain over 3 points (0 of them" in text
    assert "median 1, worst 0.97 (plain, again: 1.001 to 1.001)" in text
    assert "premapped / none: 1.004 (none, again: 0.999)" in text
    assert "context 1024, vmem / dynamic: 0.98" in text
    assert "cuMemSetAccess, one page of 2 MiB: p50 31 us" in text
    assert "cuMemUnmap, one page of 2 MiB: p50 29 us" in text


@pytest.mark.parametrize(("outcome", "status"), [("ok", 0), ("WRONG", 1), ("raised X", 1), ("RESULTS CHANGED", 1)])
def test_the_exit_status_says_whether_anything_is_wrong(
    outcome: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_part(part: Part, sink: Results, **_: object) -> None:
        sink.add_row(part, "t", {"case": "c", "outcome": outcome}, [])

    monkeypatch.setattr(suite, "run_part", run_part)
    monkeypatch.setattr(suite, "missing_device", lambda: None)
    assert suite.main(["--out", str(tmp_path), "--parts", "facts"]) == status
    short = capsys.readouterr().out
    assert "| case |" not in short
    assert suite.main(["--out", str(tmp_path), "--parts", "facts", "--tables"]) == status
    long = capsys.readouterr().out
    assert "| case |" in long
    assert long.rstrip().splitlines()[-1] == short.rstrip().splitlines()[-1] == str(tmp_path / "gpu.md")


def test_what_was_skipped_for_want_of_time_runs_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str] | None] = []

    def run_part(part: Part, sink: Results, *, only: list[str] | None, **_: object) -> None:
        asked.append(only)
        if len(asked) == 1:
            sink.add_skipped(part, "dear", "time budget: it would not have fitted any more")
            sink.add_skipped(part, "hopeless", "8 processes of this part had ended badly")

    monkeypatch.setattr(suite, "run_part", run_part)
    monkeypatch.setattr(suite, "missing_device", lambda: None)
    assert suite.main(["--out", str(tmp_path), "--parts", "facts"]) == 0
    assert asked == [None, ["dear"]]
    skipped = json.loads((tmp_path / "gpu.json").read_text())["parts"]["facts"]["skipped"]
    assert [entry["case"] for entry in skipped] == ["hopeless"]


def test_some_cases_of_a_part_can_be_run_alone(tmp_path: Path) -> None:
    part, results = planted("plants"), Results(tmp_path, "run", {}, is_emulated=True)
    results.begin(part)
    names = ["good again", "dangerous", "last"]
    run_part(part, results, emulate=True, quick=True, budget_s=800.0, only=names)
    rows = results.parts["planted"].tables["rows"].rows
    assert [row["case"] for row in rows] == ["good", "dangerous", "good"]
    assert set(results.parts["planted"].tables) == {"rows"}
    assert rows[0]["pid"] != rows[1]["pid"] != rows[2]["pid"]


def test_a_part_that_raises_the_same_again_and_again_is_given_up(tmp_path: Path) -> None:
    part = run_planted("raises", tmp_path).parts["planted"]
    assert [row["outcome"] for row in part.tables["bad"].rows] == ["raised ValueError: planted"] * MAX_EQUAL_ERRORS
    assert len(part.skipped) == 8 - MAX_EQUAL_ERRORS


def test_the_hash_of_the_sources_follows_their_contents_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "vmem_kv").mkdir()
    source = tmp_path / "vmem_kv" / "a.py"
    source.write_text("1")
    first = suite.hash_sources(tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "gpu.json").write_text("{}")
    assert suite.hash_sources(tmp_path) == first
    source.write_text("2")
    assert suite.hash_sources(tmp_path) != first


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
    while len(rows) < 2:
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.05)
        if path.exists():
            tables = json.loads(path.read_text())["parts"]["planted"]["tables"]  # valid at any moment
            rows = tables["rows"]["rows"] if tables else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [row["case"] for row in rows] == ["good", "said before it hung"]
    assert "said before it hung" in (tmp_path / "run.md").read_text()
    while is_alive(rows[1]["pid"]):  # or the test's time runs out
        time.sleep(0.05)


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


@pytest.mark.timeout(1_800)
def test_the_suite_runs_on_the_emulated_driver(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("OUT", None)
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/run.py", "--emulate", "--quick", "--budget", "1500", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1_700,
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
    assert {"plain, strides of token_major", "plain, strides of group:2"} <= memories
    assert "plain, strides of per_layer" not in memories, "its rows follow each other, as those of plain do"
    assert all(
        row["ratio to equal strides"] > 0
        for row in tables["speed"][speed.RATIOS]["rows"]
        if row["memory"] in EMULATED.speed.layouts
    )
    steps = {row["case"]: row for row in tables["interference"][interference.STEPS]["rows"]}
    assert list(steps) == list(interference.MODES)
    growth = {name: row["pages per turn"] for name, row in steps.items()}
    assert growth["none"] == growth["none, again"] == 0 < growth["synchronous"] == growth["synchronous, new pages"]
    in_step = {name: row["pages mapped in the step"] for name, row in steps.items()}
    assert in_step["synchronous"] == growth["synchronous"]
    assert in_step["premapped"] <= growth["premapped"]
    beside = [row for row in tables["interference"][interference.KERNEL_TIMES]["rows"] if row["case"] != "none"]
    assert all(row["driver calls"] > 0 and row["error"] is None for row in beside)
    assert {row["case"] for row in tables["generate"]["generate"]["rows"]} == {"vmem", "dynamic", "static"}
    (same,) = tables["generate"][generation.TOKENS]["rows"]
    assert same["outcome"] == "ok"

    markdown = (tmp_path / "gpu-emulated.md").read_text()
    assert markdown in done.stdout
    end = done.stdout.partition(markdown)[2].strip().splitlines()
    assert len(end) <= MAX_LINES + 2
    assert end[0].startswith("facts: ")
    assert not [line for line in end if line.startswith("BAD")]
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
    assert outcomes(correctness.OVERREAD, "torch_flash") == ["WRONG"] * 2
    left_out = {row["memory"]: row["why"] for row in part.tables[speed.LEFT_OUT].rows}
    assert left_out["per_layer"] == "OutOfPages: planted"
    assert {row["memory"] for row in part.tables[speed.RATIOS].rows} >= {"plain", "token_major"}
    assert not [row for row in part.tables[speed.RATIOS].rows if row["memory"] == "per_layer"]
    biased = part.tables[correctness.NUMERICS].rows
    assert {row["outcome"] for row in biased} == {"WRONG"}
    refused = outcomes(interference.KERNEL_TIMES, "refused")
    assert len(refused) == 2
    assert all(words.startswith("raised CallFailed") for words in refused)
    assert outcomes("greedy", "numerics") == ["crashed (signal SIGSEGV)"]
    assert outcomes("overread", "overread") == ["crashed (signal SIGSEGV)"]
    assert outcomes("views", "views") == ["tensors look into the cache still"]
    assert set(part.tables) == {
        memory,
        facts.MISUSE,
        facts.DIFFERENCES,
        interference.KERNEL_TIMES,
        correctness.NUMERICS,
        correctness.OVERREAD,
        speed.RATIOS,
        speed.LEFT_OUT,
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
    assert clock.back_to_back(cuda.launch, n_calls).times_ms == [1.0] * n_calls
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


def test_plain_tensors_get_the_strides_of_layouts_in_tight_slots() -> None:
    bench = EmulatedBench(EMULATED)
    dense = plain(bench, SMALL, [40, 40], torch.float16)
    layer = LayerSpec.uniform(SMALL.n_kv_heads, SMALL.head_dim, 2)
    layouts = {
        kind: Layout.build(kind, [layer] * 4, n_slots=2, max_tokens=4096, page_bytes=2 << 20)
        for kind in ("per_layer", "group:2", "token_major")
    }
    found = speed.strided(layouts, dense, 1 << 30)
    assert set(found) == {"plain, strides of group:2", "plain, strides of token_major"}
    row = SMALL.n_kv_heads * SMALL.head_dim
    for kind, n_pieces in (("group:2", 2), ("token_major", 8)):
        store = found[f"plain, strides of {kind}"]
        assert store.slot_starts == dense.slot_starts
        assert store.kv.keys.shape == dense.kv.keys.shape
        for rows in (store.kv.keys, store.kv.values):
            assert rows.stride() == (n_pieces * row, SMALL.head_dim, 1)
        store.kv.keys.zero_()
        assert store.kv.values.count_nonzero() > 0.9 * store.kv.values.numel(), "K and V share no number"
        store.kv.keys.normal_()
    assert speed.strided(layouts, dense, 1000) == {}


def test_a_ratio_is_judged_only_where_it_can_be() -> None:
    assert speed.judge(1.005, 0.001, 0.1, 0.2) == "yes"
    assert speed.judge(0.98, 0.001, None, 0.2) == "no"
    assert speed.judge(1.0, 0.02, 0.1, 0.2) == "unclear"
    assert speed.judge(1.0, 0.001, 0.3, 0.2) == "host-bound"


def test_a_missing_block_table_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "_parameters_of_varlen_attn", lambda: ("query",))
    assert "takes no block table" in str(paged.why_no_table("torch_flash", is_cuda=True, is_decode=True))
    monkeypatch.setattr(paged, "_parameters_of_varlen_attn", lambda: ("query", "block_table"))
    assert paged.why_no_table("torch_flash", is_cuda=True, is_decode=True) is None
    assert paged.why_no_table("flash_attn", is_cuda=True, is_decode=True) is None
    for name, is_cuda, is_decode in (("torch_flash", False, True), ("flash_attn", True, False), ("sdpa", True, True)):
        assert paged.why_no_table(name, is_cuda=is_cuda, is_decode=is_decode)


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
    assert len(HostClock().back_to_back(lambda: None, 5).times_ms) == 5


class FakeCalls:
    """A binding on which every call succeeds."""

    cuda = SimpleNamespace(cuCtxGetCurrent=lambda: (0, 7), cuCtxSetCurrent=lambda context: (0,))

    @staticmethod
    def must(result: tuple) -> object:
        return result[1] if len(result) > 1 else None


def test_a_disturber_says_what_ended_it() -> None:
    def work(calls: DriverCalls) -> None:
        raise ValueError("planted")

    with Disturber(work, DriverCalls(FakeCalls())) as disturber:
        disturber._thread.join(120)
    assert disturber.error == "ValueError: planted"
    assert disturber.n_done == 0


def test_a_disturber_notes_its_calls_and_stops() -> None:
    enough = threading.Event()

    def work(calls: DriverCalls) -> None:
        calls.call(lambda: (0,))
        if len(calls.spans) == 3:
            enough.set()

    with Disturber(work, DriverCalls(FakeCalls())) as disturber:
        assert enough.wait(120)
    assert disturber.error is None
    assert disturber.n_done == len(disturber.calls.spans) >= 3
    assert all(begin <= end for begin, end in disturber.calls.spans)


def test_kernel_times_are_split_by_what_was_under_way() -> None:
    series = Series(10.0, [1000.0, 2000.0, 3000.0, 4000.0])  # ends at 11, 13, 16 and 20
    assert split_times(series, []) == ([], [1000.0, 2000.0, 3000.0, 4000.0])
    assert split_times(series, [(9.0, 10.0), (11.5, 11.6), (12.9, 13.1), (20.0, 21.0)]) == (
        [2000.0, 3000.0],
        [1000.0, 4000.0],
    )
    assert split_times(series, [(9.0, 21.0)]) == ([1000.0, 2000.0, 3000.0, 4000.0], [])
    calls = DriverCalls(FakeCalls())
    calls.spans, calls.n_pages = [(9.0, 11.0), (15.0, 16.0), (30.0, 31.0)], 12
    row = describe_calls(series, calls)
    assert row["driver calls"] == 3
    assert row["driver calls/s"] == pytest.approx(0.2)
    assert row["share of time in driver calls"] == pytest.approx(0.2)
    assert row["pages/s"] == pytest.approx(0.8)
    assert (row["n beside calls"], row["n beside none"]) == (2, 2)
    assert row["beside calls / beside none"] == pytest.approx(2000 / 3000)


def test_a_verdict_needs_less_noise_than_the_target() -> None:
    assert [judge(1.005, 0.002), judge(1.02, 0.002), judge(1.02, 0.02), judge(1.0, 0.02)] == [
        "yes",
        "no",
        "unclear",
        "unclear",
    ]


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
