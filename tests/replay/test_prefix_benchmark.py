"""The benchmark program of shared prefixes, on small traces: bounds, clocks of sessions, targets, pictures."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import prefix_traces
from vmem_kv.errors import ConfigError

HEADER = "# block_size: 16\narrival_s,prompt_tokens,output_tokens,session_id,prefix_hashes\n"


def sessions(folder: Path, n_sessions: int = 5, n_turns: int = 6) -> Path:
    """Sessions one behind another, whose prompts grow by four blocks a turn."""
    rows = []
    for session in range(n_sessions):
        for turn in range(n_turns):
            first = 100 * session
            rows.append(f"{100 * session + turn},{64 * (turn + 1)},4,s{session},{first}-{first + 4 * turn + 3}")
    path = folder / "sessions.csv"
    path.write_text(HEADER + "\n".join(rows) + "\n")
    return path


def arrivals(path: Path) -> list[tuple[float, str]]:
    """Arrival and session of every row."""
    rows = [line.split(",") for line in path.read_text().splitlines()[2:]]
    return [(float(cells[0]), cells[3]) for cells in rows]


def test_sessions_start_so_far_apart_and_keep_their_pace(tmp_path: Path) -> None:
    found = prefix_traces.with_starts(sessions(tmp_path, 3, 2), Namespace(starts=None, session_gap=0.5), tmp_path)
    assert arrivals(found) == [(0, "s0"), (0.5, "s1"), (1, "s0"), (1, "s2"), (1.5, "s1"), (2, "s2")]


def test_sub_agents_keep_the_clock_of_their_session(tmp_path: Path) -> None:
    path = tmp_path / "agents.csv"
    path.write_text(HEADER + "0,64,4,a,1-4\n7,64,4,a/agent_1,5-8\n0,64,4,b,9-12\n")
    starts = tmp_path / "starts.csv"
    starts.write_text("# made\nsession_id,start_s\na,100\nb,103\n")
    folder = tmp_path / "out"
    folder.mkdir()
    found = prefix_traces.with_starts(path, Namespace(starts=starts, session_gap=None), folder)
    assert arrivals(found) == [(100, "a"), (103, "b"), (107, "a/agent_1")]


def test_all_of_the_bound_is_reached_without_a_bound_on_memory_and_less_with_one(tmp_path: Path) -> None:
    out, plot = tmp_path / "x.json", tmp_path / "x.png"
    words = [str(sessions(tmp_path)), "--session-gap", "0.3", "--speed", "100", "--shares", "0.3", "0.6", "1"]
    prefix_traces.main([*words, "--json", str(out), "--plot", str(plot), "--allow-dirty"])
    record = json.loads(out.read_text())
    assert record["program"] == "prefix_traces"
    rows = record["rows"]
    assert all(row["of_bound"] == 1 for row in rows if row["share"] is None)
    by_share = {row["share"]: row["of_bound"] for row in rows if row["policy"] == "lru" and not row["has_host"]}
    assert by_share[0.3] < by_share[1]
    with_host = {row["share"]: row["of_bound"] for row in rows if row["policy"] == "lru" and row["has_host"]}
    assert with_host[0.3] > by_share[0.3]
    assert {row["layout"] for row in rows} == set(prefix_traces.LAYOUTS)
    reached, tokens, work = record["targets"]
    assert (reached["verdict"], reached["n_kept"]) == ("pass", 3)
    assert [point["where"] for point in (*tokens["points"], *work["points"])] == ["sessions", "sessions"]
    drawn = plot.read_bytes()
    prefix_traces.main(["--redraw", str(out), "--plot", str(plot)])
    assert plot.read_bytes() == drawn


def test_gains_are_means_over_budgets_without_a_host_in_the_first_layout() -> None:
    def row(share: float | None, policy: str, figure: float, *, has_host: bool = False, layout: str = "") -> dict:
        name = layout or prefix_traces.LAYOUTS[0]
        return {"trace": "t", "share": share, "policy": policy, "has_host": has_host, "layout": name, "x": figure}

    rows = [row(0.1, "lru", 10), row(0.1, "cost", 14), row(0.5, "lru", 50), row(0.5, "cost", 48), row(None, "lru", 99)]
    rows += [row(0.1, "cost", 90, has_host=True), row(0.1, "lru", 0, layout="per_layer")]
    assert prefix_traces.gains(rows, lambda each: each["x"]) == {"t": 1.0}


def test_requests_that_are_skipped_are_not_remembered(tmp_path: Path) -> None:
    path = sessions(tmp_path, 2, 3)
    folder = tmp_path / "out"
    folder.mkdir()
    found = prefix_traces.without_first(path, 0.4, folder)
    assert found.read_text() == HEADER + "\n".join(path.read_text().splitlines()[4:]) + "\n"
    words = ["--policies-only", "--shares", "1", "--skip"]
    record = prefix_traces.main([str(path), *words, "0.4"])
    assert {row["n_requests"] for row in record["rows"]} == {4}
    # The first session has its last prompt of 192 tokens left, the second one all: 64 + 128 of 64 + 128 + 192.
    assert {row["bound"] for row in record["rows"]} == {(64 + 128) / (192 + 64 + 128 + 192)}
    for wrong in ("1", "-0.1", "nan"):
        with pytest.raises(ConfigError, match="leaves nothing"):
            prefix_traces.main([str(path), *words, wrong])


def test_policies_alone_are_compared_in_few_runs(tmp_path: Path) -> None:
    words = [str(sessions(tmp_path)), "--session-gap", "0.3", "--shares", "0.6", "1", "--policies-only"]
    record = prefix_traces.main(words)
    assert [(row["share"], row["policy"], row["has_host"]) for row in record["rows"]] == [
        (share, policy, False) for share in (0.6, 1) for policy in ("lru", "cost")
    ]
    reached, tokens, _ = record["targets"]
    assert (reached["verdict"], len(tokens["points"])) == ("not measured", 1)


def test_a_trace_that_shares_nothing_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,50,50\n")
    with pytest.raises(ConfigError, match="does not say what its prompts share"):
        prefix_traces.main([str(trace)])
    for wrong in ([], ["--redraw", "x.json"]):
        with pytest.raises(SystemExit):
            prefix_traces.main(wrong)
