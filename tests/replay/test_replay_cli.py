"""`vmem-kv replay` and `vmem-kv frag` as a user types them, on small traces of every form."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner, Result

from vmem_kv.cli import replay as replay_command
from vmem_kv.cli.app import app
from vmem_kv.driver.host import HostDriver
from vmem_kv.replay.memory import AllocatorMemory, Key
from vmem_kv.replay.study import SCHEMES

PAIR = "prompt_tokens,output_tokens\n"
SMALL = ("--model", "smollm2-135m", "--budget", "64MiB", "--max-batch", "64")

TRACES: dict[str, tuple[str, bytes]] = {
    "two lines": ("normalised", (PAIR + "100,50\n").encode()),
    "normalised": ("normalised", b"arrival_s,prompt_tokens,output_tokens\n0,100,50\n1.5,30,5\n"),
    "gzipped": ("normalised", gzip.compress((PAIR + "100,50\n").encode())),
    "Azure": ("Azure", b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"),
    "BurstGPT": ("BurstGPT", b"Timestamp,Model,Request tokens,Response tokens,Total tokens\n5,ChatGPT,472,18,490\n"),
    "Mooncake": ("Mooncake", b'{"timestamp": 0, "input_length": 675, "output_length": 50, "hash_ids": [0]}\n'),
    "ShareGPT": (
        "ShareGPT",
        b'[{"conversations": [{"from": "human", "value": "why is that?"}, {"from": "gpt", "value": "because"}]}]',
    ),
}


def run(*arguments: str | Path, columns: int = 120) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns)})


def write(folder: Path, content: str | bytes, name: str = "mine.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def many(n_requests: int = 60) -> str:
    """Requests of unlike lengths, four a second."""
    rows = [f"{i / 4},{10 + i * 37 % 900},{1 + i * 13 % 60}" for i in range(n_requests)]
    return "arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n"


def replayed(folder: Path, path: Path, *options: str) -> dict[str, Any]:
    out = folder / "out.json"
    result = run("replay", path, *options, "--json", out)
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(out.read_text())
    return data


@pytest.mark.parametrize("what", TRACES)
def test_every_form_is_replayed_and_studied(tmp_path: Path, what: str) -> None:
    form, content = TRACES[what]
    path = write(tmp_path, content)
    for command in ("replay", "frag"):
        result = run(command, path, *SMALL)
        assert result.exit_code == 0, result.output
        assert f"{form} form" in result.stdout
        assert "\nTraceback" not in result.output


def test_help_teaches_with_examples() -> None:
    assert "vmem-kv replay mooncake.jsonl --model llama-3-70b" in run("replay", "--help", columns=200).stdout
    assert "--plot frag.png" in run("frag", "--help", columns=200).stdout


def test_the_table_names_each_figure_and_what_it_counts(tmp_path: Path) -> None:
    result = run("replay", write(tmp_path, many()), *SMALL)
    for text in ("requests done", "rejected", "preempted", "live / active", "live / owned", "waste:", "driver calls"):
        assert text in result.stdout
    for text in ("p50 / p99", "owned pages", "of 60", "smollm2-135m, 23,040 bytes a token"):
        assert text in result.stdout


def test_json_says_what_the_table_says(tmp_path: Path) -> None:
    data = replayed(tmp_path, write(tmp_path, many()), *SMALL, "--layout", "token_major", "--page-bytes", "64k")
    assert data["counts"]["n_done"] == 60
    assert data["counts"]["n_output_tokens"] == sum(1 + i * 13 % 60 for i in range(60))
    assert data["layout"] == "token_major"
    assert data["page_bytes"] == 65536
    assert data["load"] == "recorded"
    assert data["is_complete"]
    assert sum(data["driver_calls"].values()) == data["n_driver_calls"] > data["n_batches"]
    assert sum(data["batches"].values()) == data["n_batches"]
    assert 0 < data["n_peak_mappings"] <= data["max_mappings"] == 500_000
    assert data["averaged"] in ("whole", "loaded")
    assert 0 < data["whole"]["live_of_owned"] <= data["whole"]["live_of_mapped"] <= data["whole"]["live_of_active"] <= 1
    assert data["driver_calls_per_1000_tokens"] > 0
    assert data["step_times"]["p50_us"] <= data["step_times"]["p99_us"]


def test_options_change_what_they_say(tmp_path: Path) -> None:
    path = write(tmp_path, many())
    base = (*SMALL, "--layout", "token_major", "--page-bytes", "64k", "--load", "full")
    warm, cold = replayed(tmp_path, path, *base), replayed(tmp_path, path, *base, "--no-warm")
    assert "unmap" not in warm["driver_calls"] or warm["driver_calls"]["unmap"] < cold["driver_calls"]["unmap"]
    assert cold["whole"]["live_of_mapped"] > warm["whole"]["live_of_mapped"]
    assert replayed(tmp_path, path, *base, "--max-requests", "7")["counts"]["n_done"] == 7
    assert replayed(tmp_path, path, *base, "--max-batch", "3")["n_peak_running"] == 3
    slow = replayed(tmp_path, path, *SMALL, "--speed", "0.01", "--patience", "1")
    assert slow["counts"]["n_rejected"] > 10
    assert replayed(tmp_path, path, *SMALL, "--budget", "4MiB", "--page-bytes", "4k")["counts"]["n_rejected"] > 0
    fit = replayed(tmp_path, path, *base, "--policy", "shortest")
    assert fit["policy"] == "shortest"


@pytest.mark.parametrize("command", ["replay", "frag"])
def test_a_request_that_no_budget_like_this_holds_is_said_to_be_rejected_and_why(tmp_path: Path, command: str) -> None:
    result = run(command, write(tmp_path, PAIR + "90000,2\n100,5\n"), *SMALL)
    assert result.exit_code == 0, result.output
    assert "The budget holds one sequence of 2,912 tokens at most" in result.stdout
    assert "longer than the budget could hold 1" in result.stdout
    assert "Raise --budget" in result.stdout


def test_a_budget_too_small_for_the_usual_layout_gets_the_finest(tmp_path: Path) -> None:
    path = write(tmp_path, many())
    assert replayed(tmp_path, path, *SMALL)["layout"] == "token_major"
    assert replayed(tmp_path, path, *SMALL, "--budget", "1GiB")["layout"] == "per_layer"


def test_arrivals_that_go_back_are_not_used_and_that_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n5,100,5\n0,100,5\n")
    result = run("replay", path, *SMALL)
    assert result.exit_code == 0, result.output
    assert "all waiting from the start (the trace's arrivals go back in time)" in result.stdout


def test_how_a_trace_is_played_is_said_as_it_is(tmp_path: Path) -> None:
    header = "arrival_s,prompt_tokens,output_tokens\n"
    some = write(tmp_path, header + "5,100,5\n,100,5\n")
    says = write(tmp_path, f"# arrival_s: seconds since its session began\n{header}5,100,5\n", "session.csv")
    failed = write(tmp_path, "Timestamp,Request tokens,Response tokens\n5,472,18\n6,10,0\n", "burst.csv")
    two = write(tmp_path, PAIR + "100,5\n100,5\n", "two.csv")
    for path, text in (
        (some, "all waiting from the start (the trace has 1 request without an arrival, of 2: no arrival is used)"),
        (says, "at their recorded arrivals (of which the file says: seconds since its session began)"),
        (failed, "1 left out that failed (0 response tokens)"),
        (two, "all waiting from the start, fcfs"),
    ):
        result = run("replay", path, *SMALL, columns=200)
        assert result.exit_code == 0, result.output
        assert text in result.stdout
    result = run("replay", some, *SMALL, "--load", "recorded")
    assert "1 request without an arrival, of 2; replay it with --load full" in result.stderr


def test_memory_may_be_real(tmp_path: Path) -> None:
    options = ("--model", "smollm2-135m", "--budget", "32MiB", "--load", "full", "--no-warm", "--layout", "token_major")
    path = write(tmp_path, many(20))
    real = replayed(tmp_path, path, *options, "--memory", "real", "--page-bytes", "64k")
    books = replayed(tmp_path, path, *options, "--memory", "accounted", "--page-bytes", "64k")
    assert real["counts"] == books["counts"]
    assert real["driver_calls"] is real["n_driver_calls"] is None
    assert real["n_batches"] > 0
    assert real["whole"]["live_of_active"] == pytest.approx(books["whole"]["live_of_active"])


def test_an_80_layer_model_on_141_gb_runs_here(tmp_path: Path) -> None:
    rows = PAIR + "100000,20\n" * 6
    data = replayed(tmp_path, write(tmp_path, rows), "--model", "llama-3-70b", "--budget", "141GiB")
    assert data["counts"]["n_done"] == 6
    assert data["peak_live_bytes"] > 120 << 30


def test_frag_compares_all_schemes_and_draws_them(tmp_path: Path) -> None:
    paths = [write(tmp_path, many(), "one.csv"), write(tmp_path, many(30), "two.csv.x")]
    png, svg, out = tmp_path / "a.png", tmp_path / "a.svg", tmp_path / "a.json"
    result = run("frag", *paths, *SMALL, "--plot", png, "--svg", svg, "--json", out)
    assert result.exit_code == 0, result.output
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()[:1000]
    assert "Waste a, in live / active" in result.stdout
    rows = json.loads(out.read_text())["rows"]
    assert [(row["trace"], row["scheme"]) for row in rows] == [(t, s) for t in ("one", "two") for s in SCHEMES]
    for row in rows:
        assert row["model"] == "smollm2-135m"
        assert row["counted_as_waste"]
        assert row["counts"]["n_done"] + row["counts"]["n_rejected"] == row["n_requests"]
        assert len(row["series"]["until_s"]) <= 128
        assert (row["max_mappings"] is None) == (not row["scheme"].startswith("vmem_kv"))
        assert row["n_driver_calls"] >= row["n_batches"]
    for name in ("one", "two"):
        assert len({row["averaged"] for row in rows if row["trace"] == name}) == 1


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_the_table_of_frag_fits_the_terminal(tmp_path: Path, columns: int) -> None:
    result = run("frag", write(tmp_path, many()), *SMALL, "--budget", "512MiB", columns=columns)
    table = [line for line in result.stdout.splitlines() if "%" in line]
    assert len(table) == len(SCHEMES)
    assert all(len(line) <= columns and line.split()[-1] in "abcde" for line in table)


@pytest.mark.parametrize("columns", [40, 60])
def test_a_narrow_terminal_gets_each_scheme_with_its_figures_below_it(tmp_path: Path, columns: int) -> None:
    words = ("--scheme", "maximum", "--scheme", "token-major, 2 MiB", "--scheme", "of 256")
    result = run("frag", write(tmp_path, many()), *SMALL, *words, columns=columns)
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    for scheme in SCHEMES:
        if scheme.startswith("maximum") or "token-major" in scheme or "256" in scheme:
            at = lines.index(scheme)
            block = lines[at + 1 : at + 11]
            assert [line[2:16].strip() for line in block] == [
                *("live / active", "live / owned", "mean batch", "most ran", "fit"),
                *("rejected", "preempted", "batches/1,000", "calls/1,000", "waste"),
            ]
            assert all(line.split()[-1] for line in block)
            assert max(map(len, block)) <= 40


def test_frag_says_how_many_fit_at_once(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    # 100 tokens at the end. The budget holds 2,912 tokens: 29 of them, or 26 in blocks of 16.
    options = ("--scheme", "maximum", "--scheme", "OF 16", "--json", out)
    for n_requests, fits in ((40, [(29, True), (26, True)]), (20, [(20, False), (20, False)])):
        result = run("frag", write(tmp_path, PAIR + "90,11\n" * n_requests), *SMALL, *options)
        assert result.exit_code == 0, result.output
        rows = json.loads(out.read_text())["rows"]
        assert [(row["n_fitting"], row["is_full"]) for row in rows] == fits
        assert [row["headroom"] for row in rows] == [0.0, 0.01]
        assert rows[0]["max_tokens"] == 100
        assert ("20+" in result.stdout) == (n_requests == 20)


def test_frag_takes_words_of_schemes(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    run("frag", write(tmp_path, many(5)), *SMALL, "--scheme", "maximum", "--scheme", "OF 16", "--json", out)
    names = [row["scheme"] for row in json.loads(out.read_text())["rows"]]
    assert names == ["maximum length", "PagedAttention, blocks of 16"]


def conversations(n_sessions: int = 6, n_turns: int = 5) -> str:
    """Sessions whose prompts grow by two blocks of 16 a turn, all behind one common head of four."""
    rows = []
    for turn in range(n_turns):
        for session in range(n_sessions):
            first = 100 * (session + 1)
            runs = f"0-3 {first}-{first + 2 * turn + 1}"
            rows.append(f"{10 * turn + session},{16 * (6 + 2 * turn) + 5},8,{session},{runs}")
    return "# block_size: 16\narrival_s,prompt_tokens,output_tokens,session_id,prefix_hashes\n" + "\n".join(rows) + "\n"


def test_prefixes_are_shared_where_a_trace_says_what_is(tmp_path: Path) -> None:
    path = write(tmp_path, conversations())
    alone = replayed(tmp_path, path, *SMALL)
    found = {
        policy: replayed(tmp_path, path, *SMALL, "--share", "--prefix-policy", policy)["sharing"]
        for policy in ("lru", "cost")
    }
    assert "sharing" not in alone
    for sharing in found.values():
        # Each turn but the first has all but two blocks and a tail; the first one of all but one session has the head.
        n_hit = 16 * (sum(6 * (4 + 2 * turn) for turn in range(1, 5)) + 5 * 4)
        assert sharing["n_hit_tokens"] == n_hit
        assert sharing["n_adopted"] == 24
        assert sharing["hit_rate"] == pytest.approx(sharing["bound"])
    result = run("replay", path, *SMALL, "--share")
    for text in ("of the upper bound", "100.0%", "adopted whole", "copies", "may pass 100 %"):
        assert text in result.stdout
    assert "did not come as recorded" not in result.stdout
    full = run("replay", path, *SMALL, "--share", "--load", "full")
    assert "Requests did not come as recorded" in full.stdout


def test_a_host_tier_spares_what_a_small_budget_gives_up(tmp_path: Path) -> None:
    path = write(tmp_path, conversations(n_sessions=12))
    options = (*SMALL, "--budget", "16MiB", "--layout", "token_major", "--page-bytes", "64k", "--share")
    small, helped = replayed(tmp_path, path, *options), replayed(tmp_path, path, *options, "--host-bytes", "64MiB")
    assert small["sharing"]["n_evicted"] > 0
    assert small["sharing"]["hit_rate"] < helped["sharing"]["hit_rate"] <= helped["sharing"]["bound"]
    assert helped["sharing"]["n_restored_tokens"] > 0


SHARED = "# block_size: 16\nprompt_tokens,output_tokens,prefix_hashes\n40,2,1-2\n"

BAD: dict[str, tuple[Callable[[Path], list[str | Path]], str]] = {
    "missing": (lambda d: ["replay", d / "no.csv"], "name a request trace"),
    "folder": (lambda d: ["replay", d], "this is a folder"),
    "empty": (lambda d: ["replay", write(d, "")], "holds no request"),
    "junk": (lambda d: ["replay", write(d, bytes(range(256)))], "holds zero bytes"),
    "negative": (lambda d: ["replay", write(d, PAIR + "5,5\n-1,5\n")], "line 3: prompt tokens are -1"),
    "columns": (lambda d: ["frag", write(d, "a,b\n1,2\n")], "no form known here"),
    "second trace": (lambda d: ["frag", write(d, PAIR + "1,2\n"), write(d, "x", "b.csv")], "b.csv"),
    "budget": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--budget", "lots"], "--budget: 'lots' is not a size"),
    "page size": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--page-bytes", "big"], "--page-bytes: 'big' is not"),
    "no budget": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--budget", "0"], "--budget is 0"),
    "small budget": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--budget", "1k"], "--budget"),
    "below a page": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--budget", "1m"], "less than one page"),
    "frag, below a page": (lambda d: ["frag", write(d, PAIR + "1,2\n"), "--budget", "1m"], "raise --budget"),
    "below a page in each plane": (
        lambda d: ["replay", write(d, PAIR + "1,2\n"), "--budget", "64m", "--layout", "per_layer"],
        "in each of 64 planes",
    ),
    "page": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--page-bytes", "5000"], "multiple of 4096"),
    "real page": (
        lambda d: ["replay", write(d, PAIR + "1,2\n"), "--memory", "real", "--page-bytes", "5000", "--budget", "16m"],
        "multiple of 4096",
    ),
    "too much real memory": (
        lambda d: ["replay", write(d, PAIR + "1,2\n"), "--memory", "real", "--budget", "900t"],
        "study it with --memory accounted",
    ),
    "layout": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--layout", "diagonal"], "choose auto, per_head"),
    "model": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--model", "gpt-9"], "choose llama-3-8b"),
    "no arrivals": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--load", "recorded"], "--load full"),
    "back in time": (
        lambda d: ["frag", write(d, "arrival_s,prompt_tokens,output_tokens\n5,1,1\n4,1,1\n"), "--load", "recorded"],
        "arrivals that go back in time",
    ),
    "speed": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--speed", "nan"], "must be a positive number"),
    "json": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--json", d / "no" / "x.json"], "cannot be written"),
    "json name": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--json", d / "x.txt"], "must end with .json"),
    "plot": (lambda d: ["frag", write(d, PAIR + "1,2\n"), "--plot", d / "x.pdf"], "must end with .png"),
    "svg": (lambda d: ["frag", write(d, PAIR + "1,2\n"), "--svg", d / "x.png"], "must end with .svg"),
    "pipe": (lambda d: ["replay", "-"], "save it to a file first"),
    "device": (lambda d: ["frag", "/dev/null"], "save it to a file first"),
    "extra cells": (lambda d: ["replay", write(d, PAIR + "1,2\n1,234,5\n")], "line 3: has 3 cells"),
    "columns twice": (
        lambda d: ["frag", write(d, "prompt_tokens,output_tokens,prompt_tokens\n1,2,3\n")],
        "'prompt_tokens' in its header more than once",
    ),
    "patience without arrivals": (
        lambda d: ["replay", write(d, PAIR + "1,2\n"), "--patience", "5"],
        "leave --patience out",
    ),
    "patience under full load": (
        lambda d: ["frag", write(d, "arrival_s,prompt_tokens,output_tokens\n5,1,1\n"), "--patience", "5"],
        "--load recorded",
    ),
    "too many addresses": (
        lambda d: ["replay", write(d, PAIR + "90000000,2\n"), "--budget", "100t", "--max-batch", "65536"],
        "lower --max-batch",
    ),
    "frag, too many addresses": (
        lambda d: [
            *("frag", write(d, PAIR + "90000000,2\n"), "--budget", "100t", "--max-batch", "65536", "--scheme", "token"),
        ],
        "lower --max-batch",
    ),
    "nothing to share": (lambda d: ["replay", write(d, PAIR + "1,2\n"), "--share"], "It needs a column prefix_hashes"),
    "sharing real memory": (
        lambda d: ["replay", write(d, SHARED), "--share", "--memory", "real"],
        "leave --memory real out",
    ),
    "sharing nothing warm": (lambda d: ["replay", write(d, SHARED), "--share", "--no-warm"], "leave one of them out"),
    "policy of nothing": (
        lambda d: ["replay", write(d, SHARED), "--prefix-policy", "cost"],
        "do nothing without --share",
    ),
    "host of nothing": (lambda d: ["replay", write(d, SHARED), "--host-bytes", "1g"], "do nothing without --share"),
    "host size": (
        lambda d: ["replay", write(d, SHARED), "--share", "--host-bytes", "much"],
        "--host-bytes: 'much' is not a size",
    ),
    "planes of unlike rows": (
        lambda d: [
            *("replay", write(d, SHARED), "--share", "--model", "deepseek-v3", "--layout", "per_layer"),
            *("--budget", "80GiB"),
        ],
        "use token_major",
    ),
    "sharing, too many addresses": (
        lambda d: [
            *("replay", write(d, SHARED.replace("40,2", "90000000,2")), "--share", "--budget", "100t"),
            *("--max-batch", "65536", "--layout", "token_major"),
        ],
        "lower --max-batch",
    ),
    "sharing, below a page": (
        lambda d: ["replay", write(d, SHARED), "--share", "--budget", "64m", "--layout", "per_layer"],
        "raise it or lower --page-bytes",
    ),
    "scheme": (lambda d: ["frag", write(d, PAIR + "1,2\n"), "--scheme", "magic"], "no scheme has 'magic'"),
    "real, nothing fits": (
        lambda d: ["replay", write(d, PAIR + "100,5\n90,5\n"), "--memory", "real", "--budget", "1MiB"],
        "the shortest comes to 94 tokens, 11.75 MiB and what its last pages leave empty; raise it",
    ),
    "frag, nothing fits": (lambda d: ["frag", write(d, PAIR + "100,5\n"), "--budget", "4MiB"], "holds no request"),
    "nothing fits by its pages": (
        lambda d: [
            "replay",
            write(d, PAIR + "100,5\n"),
            "--budget",
            "14MiB",
            "--layout",
            "token_major",
            "--page-bytes",
            "8m",
        ],
        "holds no request",
    ),
    "arrivals by another name": (
        lambda d: ["frag", write(d, "arrival_ms,prompt_tokens,output_tokens\n5,1,1\n")],
        "has a column 'arrival_ms'",
    ),
    "layers": (
        lambda d: ["replay", write(d, PAIR + "1,2\n"), "--model", "100000x8x128:bf16"],
        "layers is 100000; it must lie between 1 and 9,999",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_an_error_is_one_line_that_names_the_remedy(tmp_path: Path, what: str) -> None:
    arguments, message = BAD[what]
    result = run(*arguments(tmp_path))
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("command", ["replay", "frag"])
def test_an_interruption_ends_with_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    grow, n_calls = AllocatorMemory.grow, 0

    def interrupted(memory: AllocatorMemory, lengths: Mapping[Key, int]) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 100:
            raise KeyboardInterrupt
        grow(memory, lengths)

    monkeypatch.setattr(AllocatorMemory, "grow", interrupted)
    out = tmp_path / "out.json"
    result = run(command, write(tmp_path, many()), *SMALL, "--json", out)
    assert result.exit_code == 130
    assert "Interrupted" in result.stdout
    assert result.stderr.endswith("error: interrupted\n")
    data = json.loads(out.read_text())
    last = data["rows"][-1] if command == "frag" else data
    assert not last["is_complete"]
    assert last["counts"]["n_steps"] >= 90


@pytest.mark.parametrize("options", [("--layout", "diagonal"), ("--budget", "1k"), ("--page-bytes", "5000")])
def test_no_driver_stays_open_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    opened: list[HostDriver] = []

    class Noted(HostDriver):
        def __init__(self) -> None:
            super().__init__()
            opened.append(self)

    monkeypatch.setattr(replay_command, "HostDriver", Noted)
    result = run("replay", write(tmp_path, PAIR + "1,2\n"), "--memory", "real", *options)
    assert result.exit_code == 1
    assert len(opened) == 1
    assert not opened[0]._close_fd.alive


def test_an_interruption_leaves_finished_rows_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = write(tmp_path, many()), tmp_path / "a.json"
    options = ("--model", "smollm2-135m", "--budget", "640MiB", "--scheme", "maximum", "--json", out)
    whole = run("frag", path, *options)
    assert whole.exit_code == 0, whole.output
    (finished,) = json.loads(out.read_text())["rows"]
    assert finished["averaged"] == "loaded"
    grow, n_calls = AllocatorMemory.grow, 0

    def interrupted(memory: AllocatorMemory, lengths: Mapping[Key, int]) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 40:
            raise KeyboardInterrupt
        grow(memory, lengths)

    monkeypatch.setattr(AllocatorMemory, "grow", interrupted)
    broken = run("frag", path, *options, "--scheme", "token-major, 2 MiB")
    assert broken.exit_code == 130
    first, last = json.loads(out.read_text())["rows"]
    # The second scheme has room for all at once, and nobody waits: alone, it would be averaged over all of its time.
    assert not last["is_complete"]
    assert 2 * last["loaded"]["seconds"] < last["whole"]["seconds"]
    assert {**first, "wall_s": 0} == {**finished, "wall_s": 0}


def test_rows_of_one_table_are_averaged_over_one_window(tmp_path: Path) -> None:
    path, out = write(tmp_path, many()), tmp_path / "a.json"
    options = (*SMALL, "--budget", "640MiB", "--json", out)
    found = {}
    for words in (("maximum",), ("OF 16",), ("maximum", "OF 16")):
        result = run("frag", path, *options, *(text for word in words for text in ("--scheme", word)))
        assert result.exit_code == 0, result.output
        found[words] = [row["averaged"] for row in json.loads(out.read_text())["rows"]]
    assert found == {("maximum",): ["loaded"], ("OF 16",): ["whole"], ("maximum", "OF 16"): ["whole", "whole"]}
    assert "in which anything ran, for all rows" in result.stdout
