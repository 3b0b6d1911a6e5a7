"""The benchmark program of the study runs, in its smallest setting, and writes the JSON that readers rely on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import frag
from vmem_kv.errors import ConfigError
from vmem_kv.replay.study import SCHEMES

RESULTS = Path(frag.__file__).parent / "results"

FROM_A_CHANGED_CHECKOUT = {
    # Results from before programs refused this. Their commit is the one that was being changed.
    "allocator-cpu.json": "written by another program, which does not refuse",
}


def origin_faults(path: Path) -> list[str]:
    """What keeps a reader from knowing which commit made a file of results."""
    run = json.loads(path.read_text()).get("run", {})
    faults = []
    if not re.fullmatch(r"[0-9a-f]{40}", str(run.get("commit"))):
        faults.append("names no commit")
    if run.get("has_uncommitted_changes") is not False:
        faults.append("made in a checkout with uncommitted changes, or does not say")
    return faults


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_results_say_which_commit_they_come_from(path: Path) -> None:
    if path.name in FROM_A_CHANGED_CHECKOUT:
        # One that was made again leaves the list.
        assert origin_faults(path) == ["made in a checkout with uncommitted changes, or does not say"]
    else:
        assert origin_faults(path) == []


def test_the_list_of_exceptions_names_files_that_exist() -> None:
    assert {path.name for path in RESULTS.glob("*.json")} >= FROM_A_CHANGED_CHECKOUT.keys()


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"commit": None, "has_uncommitted_changes": False},
        {"commit": "a" * 40, "has_uncommitted_changes": True},
        {"commit": "a" * 40},
    ],
)
def test_results_of_unknown_origin_would_be_noticed(tmp_path: Path, run: dict[str, object]) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"run": run}))
    assert origin_faults(path)


def test_a_dirty_checkout_writes_no_results_unless_told() -> None:
    clean = {"commit": "a" * 40, "has_uncommitted_changes": False}
    frag.check_origin(clean, allow_dirty=False)
    for run in ({**clean, "has_uncommitted_changes": True}, {**clean, "commit": None}):
        with pytest.raises(ConfigError, match="--allow-dirty"):
            frag.check_origin(run, allow_dirty=False)
        frag.check_origin(run, allow_dirty=True)


def test_the_program_asks_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, out = tmp_path / "t.csv", tmp_path / "x.json"
    trace.write_text("prompt_tokens,output_tokens\n50,50\n")
    facts = {"commit": "a" * 40, "has_uncommitted_changes": True}
    monkeypatch.setattr(frag, "describe_run", lambda: dict(facts))
    with pytest.raises(ConfigError, match="differs from its commit"):
        frag.main([str(trace), "--json", str(out)])
    assert not out.exists()
    frag.main([str(trace), "--budget", "1GiB", "--schemes", "16", "--json", str(out), "--allow-dirty"])
    assert origin_faults(out)


def test_frag(tmp_path: Path) -> None:
    rows = [f"{10 + i * 37 % 900},{1 + i * 13 % 60}" for i in range(300)]
    trace = tmp_path / "azure_like.csv"
    trace.write_text("prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    out, plot = tmp_path / "frag.json", tmp_path / "frag.png"
    frag.main(
        [
            str(trace),
            "--budget",
            "1GiB",
            "--decode-steps",
            "20",
            "--json",
            str(out),
            "--plot",
            str(plot),
            "--allow-dirty",
        ]
    )
    record = json.loads(out.read_text())
    assert record["program"] == "frag"
    assert record["settings"]["allow_dirty"] == "True"
    assert {"commit", "command", "cpu", "date", "n_cpus"} <= record["run"].keys()
    assert [row["scheme"] for row in record["rows"]] == list(SCHEMES)
    assert [(s["trace"], s["layout"]) for s in record["steps"]] == [("azure_like", k) for k in frag.LAYOUTS]
    assert all(s["steady_calls"][1:] == [0, 0] for s in record["steps"])
    assert [t["verdict"] for t in record["targets"]][-1] == "pass"
    assert all(t["points"] for t in record["targets"])
    owned = [t for t in record["targets"] if t["what"].startswith("live / owned")]
    assert ["host pages" in owned[0]["points"][0]["where"], "2 MiB" in owned[1]["points"][0]["where"]] == [True, True]
    assert plot.stat().st_size > 0


def test_long_traces_are_cut_by_tokens(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("prompt_tokens,output_tokens\n" + "50,50\n" * 10)
    assert [frag.count_requests(trace, n) for n in (1, 100, 350, 1000, 1e9)] == [1, 1, 3, 10, 10]


def test_a_picture_can_be_made_again_from_results(tmp_path: Path) -> None:
    trace, out, plot = tmp_path / "t.csv", tmp_path / "x.json", tmp_path / "x.png"
    trace.write_text("prompt_tokens,output_tokens\n" + "50,50\n" * 10)
    words = [str(trace), "--budget", "1GiB", "--schemes", "16", "token", "--decode-steps", "0"]
    frag.main([*words, "--json", str(out), "--allow-dirty", "--plot", str(plot)])
    drawn = plot.read_bytes()
    plot.unlink()
    frag.main(["--redraw", str(out), "--plot", str(plot)])
    assert plot.read_bytes() == drawn
    for wrong in ([], ["--redraw", str(out)], [str(trace), "--redraw", str(out), "--plot", str(plot)]):
        with pytest.raises(SystemExit):
            frag.main(wrong)


@pytest.mark.parametrize("patience", ["nan", "-1"])
def test_a_patience_that_is_no_time_is_refused(tmp_path: Path, patience: str) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,50,50\n")
    with pytest.raises(ConfigError, match="must be a number of seconds"):
        frag.main([str(trace), "--load", "recorded", "--patience", patience])
