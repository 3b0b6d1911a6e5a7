"""Which schemes are compared, how each is opened, and what a step of decoding costs the allocator.

Every scheme gets the same budget, the same requests in the same order and the same schedule. The longest sequence that
is served is what the trace's longest request holds when it ends, or the longest that the budget could hold alone,
whichever is shorter: it sizes the virtual slots of vmem_kv, which costs it nothing, and the reservation of "maximum
length", which is as small as it can be for this traffic. Admission leaves some room to running sequences, except where
they never take more than they began with.

The largest batch that fits is how many of the trace's requests, in order from the first, the budget holds side by side
at the lengths at which they end, with nothing left free: what is known ahead, and no schedule decides.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vmem_kv.cache import KVCache
from vmem_kv.driver.accounting import AccountingDriver
from vmem_kv.driver.base import Driver
from vmem_kv.driver.host import HEADROOM_MAPPINGS
from vmem_kv.driver.ledger import MAX_DEVICE_MAPPINGS
from vmem_kv.errors import ConfigError, OutOfAddressSpace
from vmem_kv.layout import Layout
from vmem_kv.pages import BUDGET_SHARE, PagePool
from vmem_kv.replay.memory import AllocatorMemory, Fit, Memory, StudiedMemory
from vmem_kv.replay.rivals import RivalMemory, Rule, blocks_of, maximum_length, power_of_two
from vmem_kv.replay.schedule import POLICIES, Replay, StepTime
from vmem_kv.replay.sharing import PREFIX_POLICIES, SharingMemory
from vmem_kv.replay.sharing_slots import BookSlots, CacheSlots, Slots
from vmem_kv.replay.statistics import Report, Times, Window
from vmem_kv.traces.formats import Request, TraceSummary, read_trace
from vmem_kv.traces.shapes import ModelShape
from vmem_kv.units import KIB, MIB, ceil_div, format_bytes, round_up

HOST_GRANULARITY_BYTES = 4 * KIB
HOST_MAX_MAPPINGS = 65_530 - HEADROOM_MAPPINGS
"""What Linux allows a process unless vm.max_map_count is raised, less what the host driver leaves alone."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all schemes of a study share."""

    shape: ModelShape
    budget_bytes: int
    max_tokens: int  # the longest sequence that is served
    n_max_running: int = 2048
    headroom: float = 0.01  # share of the budget that admission leaves to the running sequences

    @classmethod
    def for_trace(cls, shape: ModelShape, budget_bytes: int, longest_tokens: int, n_max_running: int = 2048) -> Setting:
        """Make a setting for requests of up to so many tokens.

        Raises:
            ConfigError: The budget does not hold one token.
        """
        n_affordable = budget_bytes // shape.token_bytes
        if n_affordable < 1:
            raise ConfigError(
                f"a budget of {format_bytes(budget_bytes)} does not hold one token of {shape.name}, "
                f"{format_bytes(shape.token_bytes)}; raise --budget"
            )
        return cls(shape, budget_bytes, min(longest_tokens, n_affordable), n_max_running)

    def layout(self, kind: str, page_bytes: int) -> Layout:
        """The geometry for as many sequences as may run.

        Raises:
            ConfigError: The kind is unknown.
        """
        return Layout.build(
            kind, self.shape.layers, n_slots=self.n_max_running, max_tokens=self.max_tokens, page_bytes=page_bytes
        )


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to hold sequences, and how to open it."""

    name: str
    waste: str  # what of its active memory is not live
    open: Callable[[Setting], StudiedMemory]
    grows: bool = True  # whether running sequences take more, so that admission leaves them room


def cuda_like(budget_bytes: int, page_bytes: int, max_mappings: int = MAX_DEVICE_MAPPINGS) -> AccountingDriver:
    """Books like those of a CUDA device with room for a budget: pages of 2 MiB or more, freed handles are kept."""
    granularity = min(2 * MIB, page_bytes & -page_bytes)
    return AccountingDriver(
        _memory_for(budget_bytes, page_bytes), granularity, max_mappings=max_mappings, zeroes_new_pages=False
    )


def host_like(budget_bytes: int, page_bytes: int) -> AccountingDriver:
    """Books like those of a host: OS pages, neighbours are one mapping, freed pages go back to the system."""
    return AccountingDriver(
        _memory_for(budget_bytes, page_bytes),
        HOST_GRANULARITY_BYTES,
        neighbours_merge=True,
        mappings_per_run=2,
        keeps_pay=False,
        max_mappings=HOST_MAX_MAPPINGS,
    )


def _memory_for(budget_bytes: int, page_bytes: int) -> int:
    """A pool promises a share of the memory only."""
    return round_up(int(budget_bytes / BUDGET_SHARE) + page_bytes, page_bytes)


def open_allocator(
    setting: Setting,
    *,
    name: str,
    kind: str,
    page_bytes: int,
    open_driver: Callable[[int, int], AccountingDriver] = cuda_like,
    keeps_warm: bool = True,
) -> AllocatorMemory:
    """Open the real allocator for a study.

    Raises:
        ConfigError: The driver cannot offer what was asked, or the slots need more addresses than there are.
    """
    if page_bytes > setting.budget_bytes:
        raise ConfigError(
            f"a budget of {format_bytes(setting.budget_bytes)} is less than one page of {format_bytes(page_bytes)}; "
            "raise --budget"
        )
    driver = open_driver(setting.budget_bytes, page_bytes)
    try:
        return allocator_over(
            driver,
            setting,
            name=name,
            layout=setting.layout(kind, page_bytes),
            keeps_warm=keeps_warm,
            items=driver.items,
        )
    except BaseException:
        driver.close()
        raise


def allocator_over(
    driver: Driver, setting: Setting, *, name: str, layout: Layout, keeps_warm: bool, items: Counter[str] | None
) -> AllocatorMemory:
    """Open the real allocator over a driver, which stays the caller's until this has returned.

    Raises:
        ConfigError: The slots need more addresses than there are.
    """
    try:
        return AllocatorMemory(
            name, driver, layout, setting.budget_bytes, headroom=setting.headroom, keeps_warm=keeps_warm, items=items
        )
    except OutOfAddressSpace as error:
        raise _too_many_addresses(layout) from error


MAX_CACHED = 16_384
"""The most slots of cached prompts. Each takes addresses for the longest sequence."""


def open_sharing(
    setting: Setting,
    *,
    name: str,
    kind: str,
    page_bytes: int,
    traffic: Traffic,
    policy: str,
    host_bytes: int = 0,
    is_real: bool = True,
    max_mappings: int | None = MAX_DEVICE_MAPPINGS,
) -> SharingMemory:
    """Open a memory in which sequences share prefixes.

    Args:
        setting: Shape, budget, longest sequence.
        name: What tables call it.
        kind: The layout.
        page_bytes: Its pages.
        traffic: Whose prefixes.
        policy: Which cached prompt goes first, one of `PREFIX_POLICIES`.
        host_bytes: The second tier.
        is_real: Whether the real cache maps pages, or its calls are counted by rules, which is much faster.
        max_mappings: Their limit; None for none.

    Raises:
        ConfigError: The budget holds no stripe, the planes differ, or the slots need more addresses than there are.
    """
    n_slots = setting.n_max_running + min(traffic.summary.n_requests, MAX_CACHED)
    layout = replace(setting, n_max_running=n_slots).layout(kind, page_bytes)
    if layout.n_pages(1) * page_bytes > setting.budget_bytes:
        raise ConfigError(
            f"a budget of {format_bytes(setting.budget_bytes)} is less than one page of {format_bytes(page_bytes)} in "
            f"each of {len(layout.planes)} planes; raise --budget"
        )
    slots: Slots = BookSlots(layout)
    if is_real:
        driver = cuda_like(setting.budget_bytes, page_bytes)
        try:
            slots = CacheSlots(driver, layout, setting.budget_bytes // page_bytes, driver.items)
        except OutOfAddressSpace as error:
            driver.close()
            raise _too_many_addresses(layout) from error
    try:
        return SharingMemory(
            name,
            layout,
            slots,
            setting.budget_bytes,
            traffic.summary.block_tokens,
            make_policy=PREFIX_POLICIES[policy],
            host_bytes=host_bytes,
            headroom=setting.headroom,
            max_mappings=max_mappings,
        )
    except ConfigError:
        slots.close()
        raise


def _too_many_addresses(layout: Layout) -> ConfigError:
    return ConfigError(
        f"{layout.n_slots:,} sequences of up to {layout.max_tokens:,} tokens need "
        f"{format_bytes(layout.virtual_bytes)} of addresses, more than there are; lower --max-batch"
    )


def _ours(
    name: str,
    kind: str,
    page_bytes: int,
    open_driver: Callable[[int, int], AccountingDriver] = cuda_like,
    *,
    keeps_warm: bool = False,
) -> Scheme:
    def open_(setting: Setting) -> StudiedMemory:
        return open_allocator(
            setting, name=name, kind=kind, page_bytes=page_bytes, open_driver=open_driver, keeps_warm=keeps_warm
        )

    waste = "the ends of the last page in every plane"
    if keeps_warm:
        waste += ", and what an adopted slot has mapped past its sequence"
    return Scheme(name, waste, open_)


def _rival(name: str, rule_for: Callable[[Setting], Rule], waste: str, *, grows: bool = True) -> Scheme:
    def open_(setting: Setting) -> StudiedMemory:
        return RivalMemory(
            name,
            rule_for(setting),
            setting.shape.token_bytes,
            setting.budget_bytes,
            max_tokens=setting.max_tokens,
            headroom=setting.headroom if grows else 0.0,
        )

    return Scheme(name, waste, open_, grows)


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        _rival("maximum length", lambda s: maximum_length(s.max_tokens), "all behind a sequence's end", grows=False),
        _rival("power of two", lambda s: power_of_two, "the buffer behind a sequence's end"),
        _rival("PagedAttention, blocks of 256", lambda s: blocks_of(256), "the end of the last block"),
        _rival("PagedAttention, blocks of 16", lambda s: blocks_of(16), "the end of the last block"),
        _ours("vmem_kv per layer, 2 MiB", "per_layer", 2 * MIB),
        _ours("vmem_kv groups of 8, 2 MiB", "group:8", 2 * MIB),
        _ours("vmem_kv token-major, 2 MiB", "token_major", 2 * MIB),
        _ours("vmem_kv token-major, 2 MiB, warm", "token_major", 2 * MIB, keeps_warm=True),
        _ours("vmem_kv per layer, 64 KiB host pages", "per_layer", 64 * KIB, host_like),
    )
}
"""All schemes of `vmem-kv frag`, by name."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """A trace, and how it is played."""

    summary: TraceSummary
    is_timed: bool  # requests come at their arrivals; else all of them wait from the start
    policy: str = "fcfs"
    max_requests: int | None = None
    patience_s: float | None = None
    step_time: StepTime = StepTime()  # noqa: RUF009 - frozen

    def requests(self) -> Iterator[Request]:
        """Read them."""
        return read_trace(self.summary.path, self.max_requests)

    def replay(self, memory: Memory, setting: Setting, watch: Callable[[int], None]) -> Replay:
        """Make a replay of it through `memory`."""
        return Replay(
            memory,
            self.requests(),
            n_max_running=setting.n_max_running,
            policy=POLICIES[self.policy],
            is_timed=self.is_timed,
            patience_s=self.patience_s,
            step_time=self.step_time,
            watch=watch,
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One scheme under one traffic."""

    trace: str
    n_requests: int
    setting: Setting
    traffic: Traffic
    scheme: str
    waste: str
    headroom: float  # share of the budget that admission left to running sequences
    fit: Fit  # the trace's requests, in their order, at their final lengths
    wall_s: float
    report: Report

    def to_json(self, window: Window) -> dict[str, Any]:
        """Everything as plain data; `window` is that of the table in which the row stands."""
        setting, traffic = self.setting, self.traffic
        return {
            "trace": self.trace,
            "n_requests": self.n_requests,
            "prompt_tokens": traffic.summary.prompt_tokens,
            "output_tokens": traffic.summary.output_tokens,
            "model": setting.shape.name,
            "token_bytes": setting.shape.token_bytes,
            "budget_bytes": setting.budget_bytes,
            "max_tokens": setting.max_tokens,
            "n_max_running": setting.n_max_running,
            "headroom": self.headroom,
            "n_fitting": self.fit.n_sequences,
            "is_full": self.fit.is_full,
            "load": "recorded" if traffic.is_timed else "full",
            "policy": traffic.policy,
            "patience_s": traffic.patience_s,
            "step_time": asdict(traffic.step_time),
            "scheme": self.scheme,
            "counted_as_waste": self.waste,
            "wall_s": round(self.wall_s, 2),
            "averaged": window,
            **self.report.to_json(),
        }


def window_of(rows: Sequence[Row]) -> Window:
    """The window over which all rows of one table are averaged: as for one row, if every row has that window.

    A row that was interrupted decides nothing unless it is alone: the others stay as they were.
    """
    deciding = [row for row in rows if row.report.is_complete] or rows
    return "loaded" if all(row.report.window == "loaded" for row in deciding) else "whole"


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as plain data, those of each traffic as one table."""
    return [row.to_json(window_of([other for other in rows if other.traffic is row.traffic])) for row in rows]


def trace_name(path: Path) -> str:
    """A file's name without what its form puts behind it."""
    return path.name.partition(".")[0] or path.name


def run_scheme(
    scheme: Scheme, setting: Setting, traffic: Traffic, watch: Callable[[int], None] = lambda n_through: None
) -> tuple[Row, BaseException | None]:
    """Play traffic through one scheme.

    Returns:
        What was found, and the interruption that ended it early, if one did.

    Raises:
        VmemError: As opening the scheme or reading the trace raises it.
    """
    interruption: KeyboardInterrupt | None = None
    began = time.perf_counter()
    memory = scheme.open(setting)
    try:
        replay = traffic.replay(memory, setting, watch)
        try:
            replay.run()
        except KeyboardInterrupt as error:
            interruption = error
        wall_s = time.perf_counter() - began
        row = Row(
            trace_name(traffic.summary.path),
            traffic.summary.n_requests,
            setting,
            traffic,
            scheme.name,
            scheme.waste,
            setting.headroom if scheme.grows else 0.0,
            memory.n_at_once(request.final_tokens for request in traffic.requests()),
            wall_s,
            replay.report(),
        )
    finally:
        memory.close()
    return row, interruption


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """What the allocator takes of a decode step, in microseconds of this machine; `growing` has the driver's books."""

    n_running: int
    budget_bytes: int
    quiet: Times | None  # no sequence needs a page: the same steps again, over what the first ones mapped
    growing: Times | None  # some do
    n_steps: int  # of which as many as `growing` says need pages
    n_pages_per_growing_step: float


def measure_decode(
    setting: Setting,
    requests: Iterable[Request],
    *,
    kind: str,
    page_bytes: int,
    n_running: int,
    n_steps: int = 512,
    max_mappings: int = MAX_DEVICE_MAPPINGS,
) -> DecodeCost:
    """Time `ensure` over decode steps of the first `n_running` requests, all of them running at once.

    The budget and the limit on mappings are raised to what that takes if they have to be: they do not change what a
    step costs.

    Raises:
        ConfigError: The trace has fewer requests.
    """
    prompts = [request.prompt_tokens for request, _ in zip(requests, range(n_running), strict=False)]
    if len(prompts) < n_running:
        raise ConfigError(f"the trace has {len(prompts)} requests; {n_running} are needed at once")
    max_tokens = max(prompts) + n_steps + 1
    layout = Layout.build(kind, setting.shape.layers, n_slots=n_running, max_tokens=max_tokens, page_bytes=page_bytes)
    needed = sum(layout.n_pages(n + n_steps + 1) for n in prompts) * page_bytes
    budget_bytes = max(setting.budget_bytes, needed)
    driver = cuda_like(budget_bytes, page_bytes, max(max_mappings, needed // page_bytes))
    cache = KVCache(PagePool(driver, page_bytes, ceil_div(budget_bytes, page_bytes)), layout)
    slots = cache.acquire_adjacent(n_running)
    cache.ensure(dict(zip(slots, prompts, strict=True)))
    quiet, growing = array("q"), array("q")
    n_pages_before = cache.pool.n_mapped
    for turn in (growing, quiet):
        for step in range(1, n_steps + 1):
            lengths = {slot: n + step for slot, n in zip(slots, prompts, strict=True)}
            n_maps = driver.calls["map"]
            began = time.perf_counter_ns()
            cache.ensure(lengths)
            took = time.perf_counter_ns() - began
            if turn is quiet or driver.calls["map"] != n_maps:
                turn.append(took)
    n_pages = cache.pool.n_mapped - n_pages_before
    cache.retire(slots)
    cache.close()
    cache.pool.trim()
    driver.close()
    return DecodeCost(
        n_running,
        budget_bytes,
        Times.of(quiet, n_running * len(quiet)),
        Times.of(growing, n_running * len(growing)),
        n_steps,
        n_pages / len(growing) if growing else 0.0,
    )


def count_steady_calls(setting: Setting, requests: Iterable[Request], *, kind: str, page_bytes: int) -> list[int]:
    """Run the same requests as one batch, three times over, with warm slots; return the driver calls of each time.

    A call for each page or span, as a device's own driver is called.
    Requests that do not fit beside those in front of them are left out.
    """
    ends = [(r.prompt_tokens, r.final_tokens) for r in requests]
    driver = cuda_like(setting.budget_bytes, page_bytes)
    layout = Layout.build(
        kind, setting.shape.layers, n_slots=len(ends), max_tokens=setting.max_tokens, page_bytes=page_bytes
    )
    cache = KVCache(PagePool(driver, page_bytes, setting.budget_bytes // page_bytes), layout)
    batch: list[tuple[int, int]] = []
    n_pages = 0
    for prompt, final in ends:
        n_more = layout.n_pages(final)
        if final <= setting.max_tokens and n_pages + n_more <= cache.pool.max_pages:
            batch.append((prompt, final))
            n_pages += n_more
    n_calls = []
    for _ in range(3):
        before = driver.items.total()
        slots = {cache.acquire(expected_tokens=final): (prompt, final) for prompt, final in batch}
        for n_more in range(max((final - prompt for prompt, final in batch), default=0) + 1):
            cache.ensure({slot: min(prompt + n_more, final) for slot, (prompt, final) in slots.items()})
        cache.retire(list(slots))
        n_calls.append(driver.items.total() - before)
    cache.close()
    cache.pool.trim()
    driver.close()
    return n_calls
