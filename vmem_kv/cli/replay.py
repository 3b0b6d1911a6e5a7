"""`vmem-kv replay`: a request trace through the real allocator, with a simulated clock."""

from __future__ import annotations

import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import vmem_kv
from vmem_kv.cli.trace_options import (
    DEFAULT_BUDGET,
    Load,
    PolicyName,
    check_writable,
    describe_traffic,
    make_traffic,
    progress_bar,
    read_budget,
    show_number,
    show_share,
    write_json,
)
from vmem_kv.driver.base import Driver
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import ConfigError, OutOfAddressSpace
from vmem_kv.layout import Choice, Layout, choose_layout
from vmem_kv.pages import BUDGET_SHARE
from vmem_kv.replay.memory import AllocatorMemory
from vmem_kv.replay.statistics import Report, Times
from vmem_kv.replay.study import HOST_GRANULARITY_BYTES, Setting, Traffic, cuda_like, too_many_addresses
from vmem_kv.traces.shapes import find_shape
from vmem_kv.units import MIB, format_bytes, parse_bytes

REAL_SHARE = 0.25
"""Share of the free memory that real memory takes where no budget is given."""


class MemoryKind(StrEnum):
    """What is behind the pages."""

    REAL = "real"
    ACCOUNTED = "accounted"


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A request trace, gzipped or not.")],
    model: Annotated[
        str, typer.Option(help="Whose K and V: a name such as llama-3-70b, or LAYERSxHEADSxDIM:FORMAT.")
    ] = "llama-3-8b",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Physical memory for the cache, such as 40GiB.",
            show_default=f"{DEFAULT_BUDGET}; a quarter of what is free if real",
        ),
    ] = None,
    page_bytes: Annotated[
        str | None,
        typer.Option(help="Unit of physical memory, such as 64k.", show_default="2MiB; by the layout if real"),
    ] = None,
    layout: Annotated[str, typer.Option(help="auto, per_head, per_layer, group:N or token_major.")] = "auto",
    policy: Annotated[PolicyName, typer.Option(help="Who is admitted next.")] = PolicyName.FCFS,
    load: Annotated[
        Load, typer.Option(help="Requests at their recorded arrivals, or always some waiting (full).")
    ] = Load.AUTO,
    patience: Annotated[
        float | None, typer.Option(min=0.0, help="Reject who waits for more seconds.", show_default="never")
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm/--no-warm", help="Keep the pages of ended sequences mapped until they are needed.")
    ] = True,
    memory: Annotated[
        MemoryKind, typer.Option(help="Pages of this machine, or books without any memory.")
    ] = MemoryKind.ACCOUNTED,
    max_requests: Annotated[int | None, typer.Option(min=1, help="Stop reading after so many.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=65536, help="The most sequences at once.")] = 2048,
    speed: Annotated[float, typer.Option(help="2 for a device twice as fast.")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run a trace of requests through the real allocator.

    Requests are batched as an engine would, step by step; only the time of a step is simulated. TRACE is a CSV file
    with the columns prompt_tokens and output_tokens (and arrival_s), an Azure 2023 or BurstGPT CSV, a Mooncake JSONL
    or a ShareGPT JSON file. Ctrl-C ends it with what was found so far.

    Try one of these:

    - `vmem-kv replay azure.csv --layout token_major`

    - `vmem-kv replay mooncake.jsonl --model llama-3-70b --budget 141GiB --load full --no-warm`

    - `vmem-kv replay mine.csv --model smollm2-135m --memory real --budget 1GiB`
    """
    out, err = Console(), Console(file=sys.stderr)
    if json_file:
        check_writable("--json", json_file, (".json",))
    shape = find_shape(model)
    wanted_page = parse_bytes(page_bytes) if page_bytes else None
    traffic = make_traffic(trace, load, policy, max_requests=max_requests, patience_s=patience, speed=speed)
    driver, items, budget_bytes = _open_driver(memory, budget, wanted_page)
    try:
        setting = Setting.for_trace(shape, budget_bytes, traffic.summary.longest_tokens, max_batch)
        choice = _choose(driver, setting, traffic, layout, wanted_page)
        planned = Layout.build(
            choice.kind, shape.layers, n_slots=max_batch, max_tokens=setting.max_tokens, page_bytes=choice.page_bytes
        )
        try:
            cache = AllocatorMemory(
                "vmem_kv", driver, planned, budget_bytes, headroom=setting.headroom, keeps_warm=warm, items=items
            )
        except OutOfAddressSpace as error:
            raise too_many_addresses(planned) from error
    except BaseException:
        driver.close()
        raise
    interruption: KeyboardInterrupt | None = None
    try:
        with progress_bar(err) as start:
            run = traffic.replay(cache, setting, start("requests", traffic.summary.n_requests))
            try:
                run.run()
                cache.check()
            except KeyboardInterrupt as error:
                interruption = error
        report, batches, calls = run.report(), cache.batches, cache.driver_calls
    finally:
        cache.close()
    _print(out, report, setting, traffic, choice, memory, calls or batches)
    if json_file:
        facts: dict[str, Any] = {
            "vmem_kv": vmem_kv.__version__,
            "trace": str(trace),
            "model": shape.name,
            "token_bytes": shape.token_bytes,
            "budget_bytes": budget_bytes,
            "max_tokens": setting.max_tokens,
            "memory": memory.value,
            "layout": choice.kind,
            "page_bytes": choice.page_bytes,
            "keeps_warm": warm,
            "load": "recorded" if traffic.is_timed else "full",
            "policy": policy.value,
            "batches": batches,
            "driver_calls": calls,
            "averaged": report.window,
        }
        write_json(json_file, {**facts, **report.to_json()})
        err.print(f"Results are in {json_file}", highlight=False, markup=False, soft_wrap=True)
    if interruption:
        raise interruption


def _open_driver(
    kind: MemoryKind, budget: str | None, page_bytes: int | None
) -> tuple[Driver, Counter[str] | None, int]:
    """Open a driver with room for the budget; return it, where it counts calls per page, and the budget in bytes."""
    if kind is MemoryKind.ACCOUNTED:
        if page_bytes is not None and (page_bytes < 1 or page_bytes % HOST_GRANULARITY_BYTES):
            raise ConfigError(f"--page-bytes is {page_bytes}; it must be a multiple of {HOST_GRANULARITY_BYTES}")
        budget_bytes = read_budget(budget or DEFAULT_BUDGET)
        books = cuda_like(budget_bytes, page_bytes or 2 * MIB)
        return books, books.items, budget_bytes
    driver = HostDriver()
    available = driver.available_bytes()
    try:
        budget_bytes = read_budget(budget) if budget else int(available * REAL_SHARE)
        if budget_bytes > available * BUDGET_SHARE:
            raise ConfigError(
                f"--budget is {format_bytes(budget_bytes)}, but {format_bytes(available)} are free here, of which "
                f"{BUDGET_SHARE:.0%} may be taken; lower it, or study it with --memory accounted"
            )
    except ConfigError:
        driver.close()
        raise
    return driver, None, budget_bytes


def _choose(driver: Driver, setting: Setting, traffic: Traffic, layout: str, page_bytes: int | None) -> Choice:
    """Choose as a cache does; where that leaves no room for one usual sequence in the budget, the finest layout."""
    mean_tokens = min(traffic.summary.mean_tokens, setting.max_tokens)
    n_at_once = max(1, setting.budget_bytes // (mean_tokens * setting.shape.token_bytes))
    n_slots = min(setting.n_max_running, n_at_once)
    for kind in (layout, "token_major") if layout == "auto" else (layout,):
        choice = choose_layout(
            driver.info,
            setting.shape.layers,
            n_slots=n_slots,
            expected_tokens=mean_tokens,
            kind=kind,
            page_bytes=page_bytes,
        )
        planned = Layout.build(
            choice.kind, setting.shape.layers, n_slots=1, max_tokens=setting.max_tokens, page_bytes=choice.page_bytes
        )
        if planned.n_pages(mean_tokens) * choice.page_bytes <= setting.budget_bytes:
            return choice
    if planned.n_pages(1) * choice.page_bytes > setting.budget_bytes:
        raise ConfigError(
            f"--budget is {format_bytes(setting.budget_bytes)}, less than one page of "
            f"{format_bytes(choice.page_bytes)} in each of {len(planned.planes)} planes; raise it or lower --page-bytes"
        )
    return choice


def _print(
    out: Console,
    report: Report,
    setting: Setting,
    traffic: Traffic,
    choice: Choice,
    memory: MemoryKind,
    calls: dict[str, int],
) -> None:
    """Print what was found, each figure with what it counts."""
    counts, page = report.counts, choice.page_bytes
    averages = report.averages
    when = "while requests waited" if report.window == "loaded" else "while anything ran"
    title = (
        f"{setting.shape.name}, {setting.shape.token_bytes:,} bytes a token, {format_bytes(setting.budget_bytes)} "
        f"{memory.value}, {choice.kind}, pages of {format_bytes(page)}"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_column("meaning")
    rows: list[tuple[str, str, str]] = [
        ("requests done", f"{counts.n_done:,}", f"of {traffic.summary.n_requests:,}"),
        (
            "rejected",
            f"{counts.n_rejected:,}",
            _by_reason(counts.rejected) or "could not run alone, or waited too long",
        ),
        (
            "preempted",
            f"{counts.n_preemptions:,}",
            f"{_by_reason(counts.preempted, '; ')}{counts.n_recomputed_tokens:,} tokens computed again",
        ),
        ("sequences at once", f"{averages.n_running:,.1f}", f"time-averaged; at most {report.n_peak_running:,}"),
        ("live / active", show_share(averages.live_of_active), "waste: mapped, unused memory of running sequences"),
        ("live / mapped", show_share(averages.live_of_mapped), "waste: that, and pages kept warm for the next ones"),
        (
            "live / owned",
            show_share(averages.live_of_owned),
            f"waste: that, and free pages that are kept; {show_share(report.peak_live_of_owned)} at the peak",
        ),
        (
            "owned pages",
            f"{averages.owned_bytes // page:,}",
            f"time-averaged; at most {report.peak_owned_bytes // page:,}",
        ),
        ("mapped pages", f"{averages.mapped_bytes // page:,}", "time-averaged, active and warm"),
        ("mappings", f"{report.n_peak_mappings:,}", f"at most; the limit is {report.max_mappings or 0:,}"),
        (
            "batches",
            show_number(report.batches_per_1000_tokens),
            "per 1,000 output tokens; each for any number of pages",
        ),
        (
            "driver calls",
            show_number(report.driver_calls_per_1000_tokens),
            "per 1,000 output tokens, one for each page or span; in the second half "
            f"{show_number(report.late_driver_calls_per_1000_tokens)}"
            if report.n_driver_calls is not None
            else "counted for accounted memory only",
        ),
        ("allocator and driver", _show_times(report.step_times), "all steps, p50 / p99; the driver's time is in it"),
        ("allocator, quiet steps", _show_times(report.quiet_times), _quiet_meaning(report.quiet_times)),
        ("simulated time", f"{report.whole.seconds:,.1f} s", f"in {counts.n_steps:,} steps, idle time left out"),
    ]
    for row in rows:
        table.add_row(*row)
    out.print(describe_traffic(traffic), highlight=False, markup=False, soft_wrap=True)
    out.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    out.print(table)
    out.print(f"Averages: {when}. Layout: {choice.why}", highlight=False, markup=False, soft_wrap=True)
    listed = ", ".join(f"{name} {n:,}" for name, n in sorted(calls.items()))
    kind = "Driver calls" if report.n_driver_calls is not None else "Batches"
    out.print(f"{kind}: {listed}", highlight=False, markup=False, soft_wrap=True)
    if not report.is_complete:
        out.print("Interrupted: these are the figures of the part that was done.", highlight=False)


def _by_reason(counts: dict[str, int], end: str = "") -> str:
    return ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items())) + (end if counts else "")


def _show_times(times: Times | None) -> str:
    return f"{times.p50_us:,.1f} / {times.p99_us:,.1f} us" if times else "-"


def _quiet_meaning(times: Times | None) -> str:
    if times is None:
        return "steps in which nobody came, went or needed a page: none"
    return f"nobody came, went or needed a page: {times.n_steps:,} steps of {times.n_running:,.0f} sequences"
