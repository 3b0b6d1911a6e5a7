"""`vmem-kv replay`: a request trace through the real allocator, with a simulated clock."""

from __future__ import annotations

import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import vmem_kv
from vmem_kv.cli import trace_options as shared
from vmem_kv.cli.replay_report import print_report, print_sharing
from vmem_kv.driver.base import Driver
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import ConfigError
from vmem_kv.layout import Choice, Layout, choose_layout
from vmem_kv.pages import BUDGET_SHARE
from vmem_kv.replay.memory import AllocatorMemory
from vmem_kv.replay.sharing import SharingMemory
from vmem_kv.replay.study import (
    HOST_GRANULARITY_BYTES,
    Setting,
    Traffic,
    allocator_over,
    cuda_like,
    open_sharing,
)
from vmem_kv.traces.formats import read_trace
from vmem_kv.traces.prefixes import unbounded_hits
from vmem_kv.traces.shapes import find_shape
from vmem_kv.units import MIB, format_bytes

REAL_SHARE = 0.25
"""Share of the free memory that real memory takes where no budget is given."""


SHARING = "Sharing prefixes"
"""A heading of the help."""


class MemoryKind(StrEnum):
    """What is behind the pages."""

    REAL = "real"
    ACCOUNTED = "accounted"


class PrefixPolicy(StrEnum):
    """Which cached prompt goes first."""

    LRU = "lru"
    COST = "cost"


def replay(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A request trace, gzipped or not.")],
    load: shared.LoadOption = shared.Load.AUTO,
    policy: shared.PolicyOption = shared.PolicyName.FCFS,
    patience: shared.PatienceOption = None,
    max_requests: shared.MaxRequestsOption = None,
    model: shared.ModelOption = "llama-3-8b",
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            rich_help_panel=shared.MEMORY,
            help="Physical memory for the cache, such as 40GiB.",
            show_default=f"{shared.DEFAULT_BUDGET}; a quarter of what is free if real",
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            rich_help_panel=shared.MEMORY,
            help="What lies side by side: auto, per_head, per_layer, group:N (of N layers) or token_major. The further "
            "to the right, the finer the growth and the longer the stride.",
        ),
    ] = "auto",
    page_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            rich_help_panel=shared.MEMORY,
            help="Unit of physical memory, such as 64k.",
            show_default="2MiB; by the layout if real",
        ),
    ] = None,
    memory: Annotated[
        MemoryKind,
        typer.Option(rich_help_panel=shared.MEMORY, help="Pages of this machine, or books without any memory."),
    ] = MemoryKind.ACCOUNTED,
    warm: Annotated[
        bool,
        typer.Option(
            "--warm/--no-warm",
            rich_help_panel=shared.MEMORY,
            help="Keep the pages of ended sequences mapped until they are needed, or unmap them at once.",
        ),
    ] = True,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            rich_help_panel=SHARING,
            help="Keep the prompts of ended sequences, and begin new ones with what they share with any prompt. The "
            "trace must say what that is (prefix_hashes, hash_ids).",
        ),
    ] = False,
    prefix_policy: Annotated[
        PrefixPolicy | None,
        typer.Option(
            rich_help_panel=SHARING,
            help="Which cached prompt goes first: the one that was used longest ago, or the one that is expected to "
            "spare the least work for each page.",
            show_default="lru",
        ),
    ] = None,
    host_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            rich_help_panel=SHARING,
            help="Host memory for prompts that the cache gives up, such as 256GiB.",
            show_default="none",
        ),
    ] = None,
    max_batch: shared.MaxBatchOption = 2048,
    speed: shared.SpeedOption = 1.0,
    json_file: shared.JsonOption = None,
    debug: shared.DebugOption = False,
) -> None:
    """Run a trace of requests through the real allocator, and say what it did.

    Requests are batched as an engine would, step by step; only the time of a step is simulated. Memory is accounted:
    the books of a device are kept, and no bytes, so that any model on any budget runs on any machine. --memory real
    maps pages of this one. Ctrl-C ends it with what was found so far.

    TRACE is one of these, gzipped or not:

    - CSV with the columns prompt_tokens and output_tokens, and arrival_s (in seconds) if there are arrivals. The least
      that will do is two lines: `prompt_tokens,output_tokens` and below it `100,50`

    - the Azure 2023 CSV (TIMESTAMP, ContextTokens, GeneratedTokens), or BurstGPT's (Timestamp, Request tokens, Response
      tokens)

    - Mooncake's JSON lines (timestamp in ms, input_length, output_length), or ShareGPT's JSON array of conversations,
      whose texts are counted as one token for every four characters

    Try one of these:

    - `vmem-kv replay azure.csv --layout token_major`

    - `vmem-kv replay mooncake.jsonl --model llama-3-70b --budget 141GiB --load full --no-warm`

    - `vmem-kv replay mine.csv --model smollm2-135m --memory real --budget 1GiB`

    - `vmem-kv replay mooncake.jsonl --share --budget 640GiB --host-bytes 2TiB --speed 8`
    """
    out, err = Console(), Console(file=sys.stderr)
    if json_file:
        shared.check_writable("--json", json_file, (".json",))
    shape = find_shape(model)
    wanted_page = shared.read_size("--page-bytes", page_bytes) if page_bytes else None
    traffic = shared.make_traffic(trace, load, policy, max_requests=max_requests, patience_s=patience, speed=speed)
    if share:
        _check_sharing(traffic, memory, keeps_warm=warm)
    elif prefix_policy is not None or host_bytes is not None:
        raise ConfigError("--prefix-policy and --host-bytes do nothing without --share; add it, or leave them out")
    driver, items, budget_bytes = _open_driver(memory, budget, wanted_page)
    try:
        setting = Setting.for_trace(shape, budget_bytes, traffic.summary.longest_tokens, max_batch)
        choice = _choose(driver, setting, traffic, layout, wanted_page)
        if share:
            cache: AllocatorMemory | SharingMemory = open_sharing(
                setting,
                name="vmem_kv",
                kind=choice.kind,
                page_bytes=choice.page_bytes,
                traffic=traffic,
                policy=(prefix_policy or PrefixPolicy.LRU).value,
                host_bytes=shared.read_size("--host-bytes", host_bytes) if host_bytes else 0,
            )
            driver.close()  # it told what a device offers; a memory that shares keeps books of its own
        else:
            cache = allocator_over(
                driver,
                setting,
                name="vmem_kv",
                layout=setting.layout(choice.kind, choice.page_bytes),
                keeps_warm=warm,
                items=items,
            )
    except BaseException:
        driver.close()
        raise
    interruption: KeyboardInterrupt | None = None
    try:
        if cache.obstacle(traffic.summary.shortest_tokens) is not None:
            raise shared.no_room(setting, traffic)
        with shared.progress_bar(err) as start:
            run = traffic.replay(cache, setting, start("requests", traffic.summary.n_requests))
            try:
                run.run()
                cache.check()
            except KeyboardInterrupt as error:
                interruption = error
        report, batches, calls = run.report(), cache.batches, cache.driver_calls
    finally:
        cache.close()
    print_report(out, report, setting, traffic, choice, memory.value, calls or batches)
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
    if isinstance(cache, SharingMemory):
        bound = find_bound(traffic)
        print_sharing(out, report, cache, traffic, bound, choice.page_bytes)
        facts["sharing"] = {**cache.counts.to_json(), "bound": bound}
    if json_file:
        shared.write_json(json_file, {**facts, **report.to_json()})
        shared.write(err, f"Written: {json_file}")
    if interruption:
        raise interruption


def find_bound(traffic: Traffic) -> float:
    """The hit rate of a cache that never forgets, over all requests of the traffic."""
    requests = read_trace(traffic.summary.path, traffic.max_requests)
    n_prompt_tokens, n_cached_tokens = unbounded_hits(requests, traffic.summary.block_tokens)
    return n_cached_tokens / n_prompt_tokens


def _check_sharing(traffic: Traffic, memory: MemoryKind, *, keeps_warm: bool) -> None:
    """Refuse what --share cannot be combined with."""
    if not traffic.summary.block_tokens:
        raise ConfigError(
            f"{traffic.summary.path} does not say what its prompts share, so --share has nothing to go by. It needs a "
            "column prefix_hashes and a line such as '# block_size: 16' (CSV), or hash_ids (Mooncake's form)"
        )
    if memory is MemoryKind.REAL:
        raise ConfigError("--share keeps books of pages and maps none; leave --memory real out")
    if not keeps_warm:
        raise ConfigError("--share keeps the slots of ended sequences, which --no-warm gives up; leave one of them out")


def _open_driver(
    kind: MemoryKind, budget: str | None, page_bytes: int | None
) -> tuple[Driver, Counter[str] | None, int]:
    """Open a driver with room for the budget; return it, where it counts calls per page, and the budget in bytes."""
    if kind is MemoryKind.ACCOUNTED:
        if page_bytes is not None and (page_bytes < 1 or page_bytes % HOST_GRANULARITY_BYTES):
            raise ConfigError(f"--page-bytes is {page_bytes}; it must be a multiple of {HOST_GRANULARITY_BYTES}")
        budget_bytes = shared.read_size("--budget", budget or shared.DEFAULT_BUDGET)
        books = cuda_like(budget_bytes, page_bytes or 2 * MIB)
        return books, books.items, budget_bytes
    driver = HostDriver()
    available = driver.available_bytes()
    try:
        budget_bytes = shared.read_size("--budget", budget) if budget else int(available * REAL_SHARE)
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
