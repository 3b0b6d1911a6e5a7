"""What sharing prefixes spares on recorded traffic: by memory, by policy, with a host tier, and by layout.

    python -m benchmarks.prefix_traces TRACES... [--shares 0.02 0.1 0.5] [--session-gap SECONDS] [--json FILE]
    python -m benchmarks.prefix_traces --redraw FILES.json... --plot FILE.png

Each trace says which blocks its prompts share. Its requests are batched as `vmem-kv replay --share` does it, at their
recorded arrivals, or, with --session-gap or --starts, each session at its own recorded pace from a start of its own.
Budgets are shares of the memory that all distinct prompt tokens of the trace take together, so that traces of unlike
sizes can be held against each other; the last one is without any bound. A hit rate is given as a share of the upper
bound: what a cache would spare that never forgets, and in which every prompt is there before the next request comes.
`prefix_tables` writes the tables of the results; --skip holds requests back that constants were chosen on.

Results are written from a clean checkout only; `--allow-dirty` waives that, and is recorded.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.frag import check_origin
from benchmarks.records import Spread, Target, describe_run, print_targets, warn_if_busy
from vmem_kv.cli.trace_options import Load, PolicyName, make_traffic, write_json
from vmem_kv.errors import ConfigError
from vmem_kv.replay.sharing import PREFIX_POLICIES
from vmem_kv.replay.study import Setting, Traffic, open_sharing, trace_name
from vmem_kv.traces.formats import read_trace
from vmem_kv.traces.lines import Place, open_trace
from vmem_kv.traces.prefixes import unbounded_hits
from vmem_kv.traces.shapes import find_shape
from vmem_kv.units import MIB, format_bytes

PAGE_BYTES = 2 * MIB
LAYOUTS = ("token_major", "group:8", "per_layer")
HOST_FACTOR = 4
"""The host tier is so many times the device's budget."""

MARGIN = 1.1
"""Budgets of less than so many times the longest request are left out: it could not run beside anything cached."""

CAVEATS = """\
The index, its policies and the schedule are real. Driver calls are counted by rules, without the allocator, for speed:
vmem-kv replay --share runs the same through the allocator, and tests hold the two together.
Traces say which blocks prompts share, not which tokens they hold: ids are made from the blocks. Outputs, and prompt
tokens behind the last block, are never shared, though a real conversation's next prompt holds them; their pages count.
Time is simulated, on a device as many times as fast as --speed says: it decides what is in flight when a request comes,
and how much memory running sequences take from the cached ones.
Hits are counted when a request begins for the first time, and not after a preemption.""".splitlines()


class Case(NamedTuple):
    """One run of one trace."""

    share: float | None  # of the memory that all distinct tokens take; None: no bound
    policy: str
    has_host: bool
    layout: str


class Subject(NamedTuple):
    """A trace, ready to be played."""

    name: str
    traffic: Traffic
    n_prompt_tokens: int
    n_bound_tokens: int  # of them, those that an unbounded cache would have

    @property
    def bound(self) -> float:
        """The hit rate of an unbounded cache."""
        return self.n_bound_tokens / self.n_prompt_tokens


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return its record."""
    options = parse(arguments)
    if options.redraw:
        records = [json.loads(path.read_text()) for path in options.redraw]
        draw(options.plot, [row for record in records for row in record["rows"]])
        return {"records": records}
    console = Console()
    warn_if_busy(console)
    run = describe_run()
    if options.json:
        check_origin(run, allow_dirty=options.allow_dirty)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for path in options.traces:
            subject = prepare(path, options, Path(folder))
            found = [row for case in cases(options) if (row := play(subject, case, options)) is not None]
            print_rows(console, subject, found)
            rows += found
    run["load_average_at_end"] = os.getloadavg()[0]
    targets = find_targets(rows)
    print_targets(console, targets)
    record = {
        "schema": 1,
        "program": "prefix_traces",
        "run": run,
        "seeds": "none: nothing here is random",
        "settings": {name: str(value) for name, value in vars(options).items() if name not in ("json", "redraw")},
        "caveats": CAVEATS,
        "targets": [target.to_json() for target in targets],
        "rows": rows,
    }
    if options.json:
        write_json(options.json, record)
    if options.plot:
        draw(options.plot, rows)
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix_traces", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("traces", type=Path, nargs="*", metavar="TRACES")
    add("--model", default="llama-3-8b")
    add("--shares", type=float, nargs="*", default=[0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0], metavar="SHARE")
    add("--speed", type=float, default=16.0, help="of the simulated device; see vmem-kv replay")
    add("--requests", type=int, metavar="N", help="take N of each trace, in the order of arrival")
    add("--skip", type=float, default=0.0, metavar="PART", help="leave out the first part of each trace, e.g. 0.5")
    add("--policies-only", action="store_true", help="leave out host tiers, other layouts and memory without a bound")
    add("--starts", type=Path, metavar="FILE", help="CSV of session_id,start_s: when sessions start")
    add("--session-gap", type=float, metavar="SECONDS", help="sessions start so far apart, in the trace's order")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--allow-dirty", action="store_true", help="write results of a checkout with uncommitted changes")
    add("--plot", type=Path, metavar="FILE", help="draw hit rates over budgets")
    add("--redraw", type=Path, nargs="+", metavar="FILE", help="draw the rows of these JSON files; nothing is run")
    options = parser.parse_args(arguments)
    if bool(options.traces) == bool(options.redraw) or (options.redraw and not options.plot):
        parser.error("name traces to run, or give --redraw FILES.json with --plot FILE.png")
    return options


def cases(options: argparse.Namespace) -> list[Case]:
    """All budgets under both policies, with and without a host tier; all layouts without a bound and at one budget."""
    bounded = [
        Case(share, policy, has_host, LAYOUTS[0])
        for share in options.shares
        for has_host in ((False,) if options.policies_only else (False, True))
        for policy in PREFIX_POLICIES
    ]
    if options.policies_only:
        return bounded
    middle = options.shares[len(options.shares) // 2]
    return [
        *bounded,
        Case(None, "lru", False, LAYOUTS[0]),
        *(Case(share, "lru", False, layout) for layout in LAYOUTS[1:] for share in (middle, None)),
    ]


def prepare(path: Path, options: argparse.Namespace, folder: Path) -> Subject:
    """Check a trace, put its sessions on one clock and cut it if that was asked for, and find its bound."""
    name = trace_name(path)
    if options.starts or options.session_gap is not None:
        path = with_starts(path, options, folder)
    if options.skip:
        path = without_first(path, options.skip, folder)
    traffic = make_traffic(
        path, Load.RECORDED, PolicyName.FCFS, max_requests=options.requests, patience_s=None, speed=options.speed
    )
    block_tokens = traffic.summary.block_tokens
    if not block_tokens:
        raise ConfigError(f"{path} does not say what its prompts share; take one with prefix_hashes or hash_ids")
    return Subject(name, traffic, *unbounded_hits(read_trace(path, options.requests), block_tokens))


def with_starts(path: Path, options: argparse.Namespace, folder: Path) -> Path:
    """Write a trace of the normalised form anew: each session at its own pace from a start of its own."""
    comments, header, rest = read_rows(path)
    at, session = header.index("arrival_s"), header.index("session_id")
    if options.starts:
        with options.starts.open(newline="") as file:
            rows = csv.DictReader(line for line in file if not line.startswith("#"))
            start_s = {row["session_id"]: float(row["start_s"]) for row in rows}
    else:
        start_s = {
            name: i * options.session_gap for i, name in enumerate(dict.fromkeys(cells[session] for cells in rest))
        }
    first_s: dict[str, float] = {}
    for cells in rest:
        first_s[cells[session]] = min(first_s.get(cells[session], math.inf), float(cells[at]))
    for cells in rest:
        name = cells[session]
        # A sub-agent is named behind its session, and keeps that one's clock.
        whole = name.partition("/")[0]
        start = start_s[name] if name in start_s else start_s[whole]
        cells[at] = repr(round(float(cells[at]) - first_s.get(whole, first_s[name]) + start, 3))
    rest.sort(key=lambda cells: float(cells[at]))
    return write_rows(folder / f"{trace_name(path)}.csv", comments, [header, *rest])


def without_first(path: Path, part: float, folder: Path) -> Path:
    """Write a trace of the normalised form anew, without the first part of its requests.

    Raises:
        ConfigError: The part is not from 0 to less than 1.
    """
    if not 0 <= part < 1:
        raise ConfigError(f"--skip {part} leaves nothing; give a part of the requests from 0 to less than 1")
    comments, header, rest = read_rows(path)
    return write_rows(folder / f"{trace_name(path)}.csv", comments, [header, *rest[int(part * len(rest)) :]])


def read_rows(path: Path) -> tuple[list[str], list[str], list[list[str]]]:
    """Return comments, header and rows of a trace of the normalised form."""
    with open_trace(Place(path)) as raw:
        lines = raw.read().decode().splitlines()
    header, *rest = csv.reader(line for line in lines if line and not line.startswith("#"))
    return [line for line in lines if line.startswith("#")], header, rest


def write_rows(path: Path, comments: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    """Write a trace of the normalised form; return where."""
    with path.open("w", newline="") as file:
        file.write("\n".join(comments) + "\n")
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def play(subject: Subject, case: Case, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run one case; None where the budget hardly holds the longest request alone."""
    shape = find_shape(options.model)
    summary = subject.traffic.summary
    distinct_bytes = (subject.n_prompt_tokens - subject.n_bound_tokens) * shape.token_bytes
    # Without a bound nothing is ever given up: there is room for every token of every request.
    all_bytes = 2 * (summary.prompt_tokens + summary.output_tokens) * shape.token_bytes + 1024 * PAGE_BYTES
    budget_bytes = all_bytes if case.share is None else int(case.share * distinct_bytes)
    host_bytes = HOST_FACTOR * budget_bytes if case.has_host else 0
    if budget_bytes < MARGIN * summary.longest_tokens * shape.token_bytes:
        return None
    row: dict[str, Any] = {
        "trace": subject.name,
        "n_requests": summary.n_requests,
        "prompt_tokens": subject.n_prompt_tokens,
        "bound": subject.bound,
        "model": shape.name,
        "speed": options.speed,
        **case._asdict(),
        "budget_bytes": None if case.share is None else budget_bytes,
        "host_bytes": host_bytes,
    }
    setting = Setting.for_trace(shape, budget_bytes, summary.longest_tokens)
    memory = open_sharing(
        setting,
        name="sharing",
        kind=case.layout,
        page_bytes=PAGE_BYTES,
        traffic=subject.traffic,
        policy=case.policy,
        host_bytes=host_bytes,
        is_real=False,
        max_mappings=None,
    )
    report = subject.traffic.replay(memory, setting, lambda n_through: None).run()
    memory.check()
    counts = memory.counts
    n_thousands = (counts.n_prompt_tokens + report.counts.n_output_tokens) / 1000
    calls = memory.n_driver_calls or 0
    return row | {
        "counts": counts.to_json(),
        "of_bound": (counts.hit_rate or 0.0) / subject.bound,
        "n_rejected": report.counts.n_rejected,
        "n_preemptions": report.counts.n_preemptions,
        "n_running": report.whole.n_running,
        "n_peak_running": report.n_peak_running,
        "n_peak_mappings": memory.n_peak_mappings,
        "driver_calls": memory.driver_calls,
        "driver_calls_per_1000_tokens": calls / n_thousands,
        "copies_per_1000_tokens": counts.n_copies / n_thousands,
        "copied_bytes_per_token": (counts.device_copy_bytes + counts.park_bytes + counts.restore_bytes)
        / (1000 * n_thousands),
    }


def find_targets(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """What was promised, and what came out."""
    unbounded = tuple(
        (f"{row['trace']}, {row['layout']}", Spread.of([row["of_bound"]])) for row in rows if row["share"] is None
    )
    targets = [Target("hit rate without a bound on memory / upper bound", 0.95, True, unbounded)]
    for what, figure in (("tokens", hit_percent), ("work", spared_percent)):
        ahead = tuple((trace, Spread.of([gain])) for trace, gain in gains(rows, figure).items())
        targets.append(
            Target(f"points by which cost-aware spares more {what} than LRU, mean over budgets", 0.0, True, ahead)
        )
    return targets


def hit_percent(row: Mapping[str, Any]) -> float:
    """Tokens that were spared, of the bound."""
    return 100 * float(row["of_bound"])


def spared_percent(row: Mapping[str, Any]) -> float:
    """Work that was spared, of the work of all prompts."""
    return 100 * float(row["counts"]["spared_share"] or 0.0)


def gains(rows: Iterable[Mapping[str, Any]], figure: Callable[[Mapping[str, Any]], float]) -> dict[str, float]:
    """By trace, by how many percentage points the cost-aware policy is ahead, mean over bounded budgets."""
    shares: dict[tuple[str, float], dict[str, float]] = {}
    for row in rows:
        if row["share"] is not None and not row["has_host"] and row["layout"] == LAYOUTS[0]:
            shares.setdefault((row["trace"], row["share"]), {})[row["policy"]] = figure(row)
    by_trace: dict[str, list[float]] = {}
    for (trace, _), found in shares.items():
        by_trace.setdefault(trace, []).append(found["cost"] - found["lru"])
    return {trace: sum(each) / len(each) for trace, each in by_trace.items()}


def print_rows(console: Console, subject: Subject, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print two tables of one trace: hits by budget and policy, and what each layout costs."""
    summary = subject.traffic.summary
    title = (
        f"{subject.name}: {summary.n_requests:,} requests, {subject.n_prompt_tokens:,} prompt tokens, "
        f"{subject.bound:.1%} of them shared at best"
    )
    hits = Table(title=f"{title}. Hits, % of the bound / work spared, % of all")
    for column in ("budget", "share", "running", "LRU", "cost-aware", "LRU, host", "cost-aware, host"):
        hits.add_column(column, justify="right")
    for share in dict.fromkeys(row["share"] for row in rows):
        found = [row for row in rows if row["share"] == share and row["layout"] == LAYOUTS[0]]
        by_case = {
            (row["policy"], row["has_host"]): f"{hit_percent(row):.1f} / {spared_percent(row):.1f}" for row in found
        }
        hits.add_row(
            show_budget(found[0]),
            "-" if share is None else f"{share:.0%}",
            f"{found[0]['n_running']:.1f}",
            *(by_case.get((policy, has_host), "-") for has_host in (False, True) for policy in PREFIX_POLICIES),
        )
    console.print(hits)
    costs = Table(title=f"{subject.name}: what it takes, LRU; calls and copies per 1,000 prompt and output tokens")
    for column in ("layout", "budget", "host", "hits, %", "adopted", "forked", "evicted", "calls", "copies"):
        costs.add_column(column, justify="left" if column == "layout" else "right")
    for column in ("copied bytes/token", "pages", "mappings"):
        costs.add_column(column, justify="right")
    for row in (row for row in rows if row["policy"] == "lru"):
        counts = row["counts"]
        costs.add_row(
            row["layout"],
            show_budget(row),
            format_bytes(row["host_bytes"]) if row["has_host"] else "-",
            f"{100 * row['of_bound']:.1f}",
            *(f"{counts[name]:,}" for name in ("n_adopted", "n_forked", "n_evicted")),
            f"{row['driver_calls_per_1000_tokens']:,.1f}",
            f"{row['copies_per_1000_tokens']:,.3f}",
            f"{row['copied_bytes_per_token']:,.0f}",
            f"{counts['n_peak_pages']:,}",
            f"{row['n_peak_mappings']:,}",
        )
    console.print(costs)


def show_budget(row: Mapping[str, Any]) -> str:
    """The device's memory in a table."""
    return "no bound" if row["share"] is None else format_bytes(row["budget_bytes"])


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw each trace's hit rates over its budgets."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from vmem_kv.cli.frag_plot import save

    traces = list(dict.fromkeys(row["trace"] for row in rows))
    n_columns = min(3, len(traces))
    n_lines = -(-len(traces) // n_columns)
    figure = Figure(figsize=(4.2 * n_columns, 0.9 + 3.1 * n_lines), layout="constrained")
    grid = figure.subplots(n_lines, n_columns, squeeze=False)
    styles = {
        ("lru", False): ("#8c8c8c", "--", "o", "LRU"),
        ("cost", False): ("#0072b2", "-", "o", "cost-aware"),
        ("lru", True): ("#e69f00", "--", "s", f"LRU, host memory {HOST_FACTOR} times the budget"),
        ("cost", True): ("#d55e00", "-", "s", f"cost-aware, host memory {HOST_FACTOR} times the budget"),
    }
    for index, trace in enumerate(traces):
        axes = grid[index // n_columns][index % n_columns]
        ours = [row for row in rows if row["trace"] == trace and row["layout"] == LAYOUTS[0]]
        for (policy, has_host), (colour, line, marker, label) in styles.items():
            points = sorted(
                (row["budget_bytes"] / (1 << 30), 100 * row["of_bound"])
                for row in ours
                if row["share"] is not None and (row["policy"], row["has_host"]) == (policy, has_host)
            )
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=colour,
                linestyle=line,
                marker=marker,
                label=label,
                markersize=4,
                linewidth=1.6,
            )
        for row in ours:
            if row["share"] is None:
                axes.axhline(
                    100 * row["of_bound"], color="black", linewidth=0.9, linestyle=":", label="no bound on memory"
                )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.5g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 105)
        axes.grid(alpha=0.25, which="both")
        axes.set_title(f"{trace}\nbound: {100 * ours[0]['bound']:.1f} % of prompt tokens", fontsize=10)
        axes.set_xlabel("device memory for the cache, GiB", fontsize=9)
        axes.tick_params(labelsize=9)
    for lines in grid:
        lines[0].set_ylabel("hits, % of the bound", fontsize=9)
    for axes in grid.flat[len(traces) :]:
        axes.set_visible(False)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    save(figure, path)


if __name__ == "__main__":
    main()
