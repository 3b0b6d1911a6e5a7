"""How much of its memory each scheme puts to use on real traffic, and what the allocator takes of a decode step.

    python -m benchmarks.frag TRACES... [--budget 40GiB] [--load full|recorded] [--json FILE] [--plot FILE.png]
    python -m benchmarks.frag --redraw FILE.json --plot FILE.png

For each trace: every scheme of `vmem-kv frag` under the same requests, at the shape of Llama-3-8B; the time of
`ensure` over decode steps of the trace's first 256 requests, all at once; and the driver calls of a batch that comes
three times, with warm slots. Of long traces the first requests are taken, as many as `--tokens` allows; these 256 are
timed in any case.

Results are written from a clean checkout only, so that their commit says what made them; `--allow-dirty` waives that,
and is recorded.

Memory is accounted, not taken: times are those of the allocator with a driver that only keeps books.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.records import Spread, Target, describe_run, print_targets, warn_if_busy
from vmem_kv.cli.frag import choose_schemes, print_rows
from vmem_kv.cli.trace_options import Load, PolicyName, describe_traffic, make_traffic, write_json
from vmem_kv.errors import ConfigError
from vmem_kv.replay.statistics import Averages
from vmem_kv.replay.study import (
    DecodeCost,
    Row,
    Setting,
    count_steady_calls,
    measure_decode,
    rows_to_json,
    run_scheme,
    trace_name,
    window_of,
)
from vmem_kv.traces.formats import read_trace, scan_trace
from vmem_kv.traces.shapes import find_shape
from vmem_kv.units import MIB, parse_bytes

N_SEQUENCES = 256
LAYOUTS = ("per_layer", "token_major")
PAGE_BYTES = 2 * MIB
SERVED = ("sharegpt", "azure", "mooncake")
"""Traces whose names begin so, or with "len_" in front, are those of the target."""

CAVEATS = """\
live / active is the figure to hold against PagedAttention's 96.3 %: the share of memory set aside for sequences that
tokens fill. live / owned counts idle memory as waste, too: what is free, or waits for a request that does not fit.
Only the first requests of long traces were used; n_requests says how many.
n_fitting is how many of these requests, in order from the first, the budget holds side by side at the lengths at which
they end, with nothing left free; is_full says whether there were more.
Prefixes that requests share are shared by no scheme. Prompts are computed in one step.
The rivals are rules that favour their models: no tables, no copies, no fragmentation between buffers, and the longest
request known ahead.
A row's wall time is that of this program, and allocator times are those of this machine with a driver that only keeps
books: they say nothing about a device. Where somebody grows, the time that these books take is in them.
Driver calls are those of a CUDA driver: one for each page or span; batches are those of the allocator.""".splitlines()


@dataclass(frozen=True, slots=True)
class Steps:
    """Decode steps of one trace in one layout."""

    trace: str
    layout: str
    decode: DecodeCost
    steady_calls: list[int]  # driver calls of the same batch, run three times over with warm slots


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return its record."""
    options = parse(arguments)
    if options.redraw:
        record: dict[str, Any] = json.loads(options.redraw.read_text())
        draw(options, record["rows"])
        return record
    console = Console()
    warn_if_busy(console)
    run = describe_run()
    if options.json or options.plot:
        check_origin(run, allow_dirty=options.allow_dirty)
    rows: list[Row] = []
    steps: list[Steps] = []
    for path in options.traces:
        found, costs = study(console, path, options)
        rows += found
        steps += costs
    run["load_average_at_end"] = os.getloadavg()[0]
    targets = find_targets(rows, steps)
    print_steps(console, steps)
    print_targets(console, targets)
    found_rows = rows_to_json(rows)
    record = {
        "schema": 2,
        "program": "frag",
        "run": run,
        "seeds": "none: nothing here is random",
        "settings": {
            name: str(value) for name, value in vars(options).items() if name not in ("json", "traces", "redraw")
        },
        "caveats": CAVEATS,
        "targets": [target.to_json() for target in targets],
        "steps": [asdict(each) for each in steps],
        "rows": [
            {name: value for name, value in row.items() if options.series or name != "series"} for row in found_rows
        ],
    }
    if options.json:
        write_json(options.json, record)
    draw(options, found_rows)
    return record


def draw(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the rows of the wanted traces, if a picture was asked for."""
    if options.plot:
        from vmem_kv.cli.frag_plot import draw_rows

        draw_rows(options.plot, [row for row in rows if row["trace"] in (options.plot_traces or [row["trace"]])])


def check_origin(run: Mapping[str, Any], *, allow_dirty: bool) -> None:
    """Refuse to write results of which no commit says what made them.

    Raises:
        ConfigError: The commit is unknown, or the checkout differs from it, and that is not allowed.
    """
    if allow_dirty:
        return
    if not run["commit"]:
        raise ConfigError("no commit is known here; run it in a git checkout, or allow it with --allow-dirty")
    if run["has_uncommitted_changes"]:
        raise ConfigError(
            f"the checkout differs from its commit {run['commit'][:12]}; commit them or run it in a clean clone, "
            "or allow it with --allow-dirty"
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.frag", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("traces", type=Path, nargs="*", metavar="TRACES")
    add("--model", default="llama-3-8b")
    add("--budget", default="40GiB")
    add("--load", type=Load, default=Load.FULL, choices=list(Load))
    add("--policy", type=PolicyName, default=PolicyName.FCFS, choices=list(PolicyName))
    add("--patience", type=float, metavar="SECONDS")
    add("--schemes", nargs="*", default=[], metavar="WORD", help="only those with one of these words in their names")
    add("--tokens", type=float, default=16e6, metavar="N", help="prompt and output tokens to take of each trace")
    add("--decode-steps", type=int, default=512, metavar="N", help="steps to time; 0 for none")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--no-series", dest="series", action="store_false", help="leave what happened over time out of the JSON")
    add("--allow-dirty", action="store_true", help="write results of a checkout with uncommitted changes")
    add("--plot", type=Path, metavar="FILE", help="draw the schemes")
    add("--plot-traces", nargs="*", default=[], metavar="NAME", help="only these in the picture")
    add("--redraw", type=Path, metavar="FILE", help="draw the rows of this JSON again; nothing is run")
    options = parser.parse_args(arguments)
    if bool(options.traces) == bool(options.redraw) or (options.redraw and not options.plot):
        parser.error("name traces to run, or give --redraw FILE.json with --plot FILE.png")
    return options


def study(console: Console, path: Path, options: argparse.Namespace) -> tuple[list[Row], list[Steps]]:
    """Run all schemes on one trace, and time its decode steps."""
    n_requests = count_requests(path, options.tokens)
    traffic = make_traffic(
        path, options.load, options.policy, max_requests=n_requests, patience_s=options.patience, speed=1.0
    )
    setting = Setting.for_trace(find_shape(options.model), parse_bytes(options.budget), traffic.summary.longest_tokens)
    rows = []
    for scheme in choose_schemes(options.schemes):
        row, interruption = run_scheme(scheme, setting, traffic)
        if interruption:
            raise interruption
        rows.append(row)
    console.print(describe_traffic(traffic), highlight=False, markup=False)
    print_rows(console, rows)
    steps = []
    first = scan_trace(path, N_SEQUENCES)
    if options.decode_steps and first.n_requests == N_SEQUENCES:
        setting = Setting.for_trace(find_shape(options.model), parse_bytes(options.budget), first.longest_tokens)
        steps = [
            Steps(
                trace_name(path),
                kind,
                measure_decode(
                    setting,
                    read_trace(path),
                    kind=kind,
                    page_bytes=PAGE_BYTES,
                    n_running=N_SEQUENCES,
                    n_steps=options.decode_steps,
                ),
                count_steady_calls(setting, read_trace(path, N_SEQUENCES), kind=kind, page_bytes=PAGE_BYTES),
            )
            for kind in LAYOUTS
        ]
    return rows, steps


def count_requests(path: Path, max_tokens: float) -> int:
    """How many requests from the front have no more than so many tokens together; at least one."""
    n_requests, n_tokens = 0, 0
    for request in read_trace(path):
        n_tokens += request.prompt_tokens + request.output_tokens
        if n_tokens > max_tokens and n_requests:
            break
        n_requests += 1
    return n_requests


def find_targets(rows: Sequence[Row], steps: Sequence[Steps]) -> list[Target]:
    """What was promised, and what came out. Utilisation is promised for full load."""
    targets = []
    shares: tuple[tuple[str, str, Callable[[Averages], float | None]], ...] = (
        ("live / active of the best layout", "", lambda averages: averages.live_of_active),
        ("live / owned of the best layout, host pages included", "", lambda averages: averages.live_of_owned),
        ("live / owned of the best layout, pages of 2 MiB", "2 MiB", lambda averages: averages.live_of_owned),
    )
    for what, word, share in shares:
        best: dict[str, tuple[float, str]] = {}
        for row in (row for row in rows if not row.traffic.is_timed and word in row.scheme):
            if row.scheme.startswith("vmem_kv") and row.trace.removeprefix("len_").startswith(SERVED):
                averages = row.report.averages_of(window_of([r for r in rows if r.traffic is row.traffic]))
                best[row.trace] = max(best.get(row.trace, (0.0, "")), (share(averages) or 0.0, row.scheme))
        points = tuple((f"{trace}: {name}", Spread.of([value])) for trace, (value, name) in best.items())
        targets.append(Target(what, 0.963, True, points))
    quiet = tuple(
        (f"{s.trace}, {s.layout}", Spread.of([s.decode.quiet.p50_us])) for s in steps if s.decode.quiet is not None
    )
    targets.append(Target(f"us of ensure, {N_SEQUENCES} sequences, nobody grows", 30, False, quiet))
    steady = tuple((f"{s.trace}, {s.layout}", Spread.of([float(s.steady_calls[-1])])) for s in steps)
    targets.append(Target("driver calls of a batch that comes again, warm slots", 0, False, steady))
    return targets


def print_steps(console: Console, steps: Sequence[Steps]) -> None:
    """Print what decode steps cost."""
    title = f"Allocator time of a decode step, {N_SEQUENCES} sequences, microseconds (p50 / p99)"
    table = Table(title=f"{title}; where somebody grows, the accounting driver's own time is in it")
    for column in ("trace", "layout", "nobody grows", "somebody grows", "pages then", "steps growing", "driver calls"):
        table.add_column(column)
    for s in steps:
        quiet, growing = s.decode.quiet, s.decode.growing
        n_growing = growing.n_steps if growing else 0
        table.add_row(
            s.trace,
            s.layout,
            f"{quiet.p50_us:.1f} / {quiet.p99_us:.1f}" if quiet else "-",
            f"{growing.p50_us:.0f} / {growing.p99_us:.0f}" if growing else "-",
            f"{s.decode.n_pages_per_growing_step:.1f}",
            f"{n_growing} of {s.decode.n_steps}",
            ", ".join(map(str, s.steady_calls)),
        )
    console.print(table)


if __name__ == "__main__":
    main()
