"""`vmem-kv frag`: the same traffic under several ways to hold it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

import vmem_kv
from vmem_kv.cli import trace_options as shared
from vmem_kv.errors import ConfigError
from vmem_kv.replay.statistics import Window
from vmem_kv.replay.study import SCHEMES, Row, Scheme, Setting, rows_to_json, run_scheme, window_of
from vmem_kv.traces.shapes import find_shape
from vmem_kv.units import format_bytes


def frag(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE", help="One request trace or several, gzipped or not.")
    ],
    load: shared.LoadOption = shared.Load.FULL,
    policy: shared.PolicyOption = shared.PolicyName.FCFS,
    patience: shared.PatienceOption = None,
    max_requests: shared.MaxRequestsOption = None,
    model: shared.ModelOption = "llama-3-8b",
    budget: Annotated[
        str,
        typer.Option(
            metavar="BYTES", rich_help_panel=shared.MEMORY, help="Physical memory that each scheme gets, such as 40GiB."
        ),
    ] = shared.DEFAULT_BUDGET,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORD",
            rich_help_panel=shared.MEMORY,
            help="Only schemes with this word in their names, such as paged or token; may be given several times.",
            show_default="all",
        ),
    ] = None,
    max_batch: shared.MaxBatchOption = 2048,
    speed: shared.SpeedOption = 1.0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            rich_help_panel=shared.RESULTS,
            help="Draw utilisation over time, batches, rejections and driver calls.",
        ),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", rich_help_panel=shared.RESULTS, help="The same as SVG.")
    ] = None,
    json_file: shared.JsonOption = None,
    debug: shared.DebugOption = False,
) -> None:
    """Show how much of its memory each scheme puts to use, and how many sequences ran at once.

    The same requests run under reservation of the maximum length, growth by powers of two, PagedAttention with blocks
    of 16 and 256, and vmem_kv in several layouts. vmem_kv is the real allocator; the others are rules that favour their
    models. No memory is taken, only counted. Without --load recorded all requests wait from the start, so that each
    scheme runs as many at once as it can. Ctrl-C ends it with what was found so far.

    A TRACE is what `vmem-kv replay` reads; a CSV file with the columns prompt_tokens and output_tokens will do. One of
    10,000 requests takes minutes: try --max-requests 500 first.

    Try one of these:

    - `vmem-kv frag azure.csv mooncake.jsonl --plot frag.png`

    - `vmem-kv frag azure.csv --scheme token --scheme 16 --budget 8GiB --load recorded --patience 30`

    - `vmem-kv frag sharegpt.json --model llama-3-70b --budget 141GiB --json frag.json`
    """
    out, err = Console(), Console(file=sys.stderr)
    for option, path, suffix in (("--plot", plot, ".png"), ("--svg", svg, ".svg"), ("--json", json_file, ".json")):
        if path:
            shared.check_writable(option, path, (suffix,))
    shape, budget_bytes = find_shape(model), shared.read_size("--budget", budget)
    chosen = choose_schemes(scheme or [])
    # All traces are checked before the first one runs: a mistake in the last shows at once.
    traffics = [
        shared.make_traffic(path, load, policy, max_requests=max_requests, patience_s=patience, speed=speed)
        for path in traces
    ]
    settings = [
        Setting.for_trace(shape, budget_bytes, traffic.summary.longest_tokens, max_batch) for traffic in traffics
    ]
    for setting, traffic in zip(settings, traffics, strict=True):
        shared.check_room(setting, traffic)
    rows: list[Row] = []
    interruption: BaseException | None = None
    with shared.progress_bar(err) as start:
        for setting, traffic in zip(settings, traffics, strict=True):
            for each in chosen:
                watch = start(f"{traffic.summary.path.name}: {each.name}", traffic.summary.n_requests)
                row, interruption = run_scheme(each, setting, traffic, watch)
                rows.append(row)
                if interruption:
                    break
            if interruption:
                break
    for traffic in traffics:
        ours = [row for row in rows if row.traffic is traffic]
        if ours:
            shared.write(out, shared.describe_traffic(traffic))
            print_rows(out, ours)
    record = rows_to_json(rows)
    if json_file:
        shared.write_json(json_file, {"vmem_kv": vmem_kv.__version__, "rows": record})
    pictures = [path for path in (plot, svg) if path]
    if pictures and rows:
        from vmem_kv.cli.frag_plot import draw_rows

        for path in pictures:
            draw_rows(path, record)
    for path in (json_file, *pictures):
        if path:
            shared.write(err, f"Written: {path}")
    if interruption:
        shared.write(out, "Interrupted: the last row is of the part that was done.")
        raise interruption


def choose_schemes(words: Sequence[str]) -> list[Scheme]:
    """Return the schemes that have one of the words in their names; all of them where there are no words.

    Raises:
        ConfigError: A word is in none of the names.
    """
    for word in words:
        if not any(word.lower() in name.lower() for name in SCHEMES):
            raise ConfigError(f"no scheme has {word!r} in its name; there are: {'; '.join(SCHEMES)}")
    return [s for name, s in SCHEMES.items() if not words or any(word.lower() in name.lower() for word in words)]


def print_rows(out: Console, rows: Sequence[Row]) -> None:
    """Print the table of one trace, and under it what each row counts as waste."""
    setting = rows[0].setting
    title = (
        f"{setting.shape.name}, {setting.shape.token_bytes:,} bytes a token, "
        f"budget {format_bytes(setting.budget_bytes)}, longest sequence {setting.max_tokens:,} tokens"
    )
    kinds = list(dict.fromkeys(row.waste for row in rows))
    window = window_of(rows)
    cells = {
        row.scheme if row.report.is_complete else f"{row.scheme} (interrupted)": (
            *_figures(row, window),
            "abcdefgh"[kinds.index(row.waste)],
        )
        for row in rows
    }
    shared.write(out, title, style="bold")
    table = _make_table(cells)
    unbounded = out.options.update(width=1000)
    if Measurement.get(out, unbounded, table).minimum <= out.width:
        out.print(table)
    else:
        for scheme, figures in cells.items():
            shared.write(out, scheme, style="bold")
            for heading, figure in zip((*HEADINGS, "waste"), figures, strict=True):
                shared.write(out, f"  {heading:<14}{figure:>9}")
    lines = [f"Waste {'abcdefgh'[i]}, in live / active: {kind}." for i, kind in enumerate(kinds)]
    lines.append(
        "live: tokens in running sequences; active: memory set aside for them; owned: all memory that is held, by the "
        "rivals from the start, so that live / owned counts idle memory as waste, too. Averages over simulated time"
        f"{' in which requests waited' if window == 'loaded' else ' in which anything ran'}, for all rows. "
        "Fit: how many of the trace's requests, in order from the first, the budget holds side by side at the lengths "
        "at which they end; + where there were no more. "
        "Per 1,000 output tokens: batches of the allocator, and the calls of a CUDA driver that they come to, one for "
        "each page or span."
    )
    limited = [row for row in rows if row.report.max_mappings is not None]
    if limited:
        shown = (f"{row.scheme} {row.report.n_peak_mappings:,} of {row.report.max_mappings:,}" for row in limited)
        lines.append(f"Mappings at most: {'; '.join(shown)}.")
    for row in rows:
        counts = row.report.counts
        for what, by_reason in (("rejected", counts.rejected), ("preempted", counts.preempted)):
            if by_reason.keys() - {"OutOfPages"}:
                lines.append(f"{row.scheme}, {what}: {shared.show_reasons(by_reason)}.")
        if n_steps := counts.held_up.get("OutOfMappings"):
            lines.append(
                f"{row.scheme}: the limit on mappings held requests up in {n_steps:,} of {counts.n_steps:,} steps."
            )
    lines += shared.remarks(setting, rows[0].traffic)
    for line in lines:
        shared.write(out, line)
    out.print()


HEADINGS = (
    *("live / active", "live / owned", "mean batch", "most ran", "fit"),
    *("rejected", "preempted", "batches/1,000", "calls/1,000"),
)
"""What is shown of each row."""

_SHORT_HEADINGS = (
    *("live/\nactive", "live/\nowned", "mean\nbatch", "most\nran", "\nfit"),
    *("rejec-\nted", "preem-\npted", "batch/\n1,000", "calls/\n1,000"),
)
"""The same for columns of six."""


def _figures(row: Row, window: Window) -> tuple[str, ...]:
    report, averages = row.report, row.report.averages_of(window)
    return (
        shared.show_share(averages.live_of_active),
        shared.show_share(averages.live_of_owned),
        shared.show_number(averages.n_running),
        f"{report.n_peak_running:,}",
        f"{row.fit.n_sequences:,}{'' if row.fit.is_full else '+'}",
        f"{report.counts.n_rejected:,}",
        f"{report.counts.n_preemptions:,}",
        _show_rate(report.batches_per_1000_tokens),
        _show_rate(report.driver_calls_per_1000_tokens),
    )


def _make_table(cells: Mapping[str, Sequence[str]]) -> Table:
    """A row for each scheme: its figures, and the letter of what it counts as waste."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    table.add_column("scheme", min_width=len("PagedAttention,"))
    for heading, *column in zip((*_SHORT_HEADINGS, ""), *cells.values(), strict=True):
        width = max(map(len, (*heading.split("\n"), *column)))
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    for scheme, figures in cells.items():
        table.add_row(scheme, *figures)
    return table


def _show_rate(number: float | None) -> str:
    """Short enough for a column of six."""
    return shared.show_number(number, 0 if number is not None and number >= 100 else 1)
