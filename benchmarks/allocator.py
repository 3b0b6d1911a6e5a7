"""What the allocator costs, without a model: `ensure`, growth per page, reclaim, warm slots.

    python -m benchmarks.allocator [--quick] [--json FILE]

Growth and reclaim are held against the same work without bookkeeping, in turns over the same addresses, with ratios
formed within a turn: "mapper" is the host driver's own mapper of the same path (fallocate, mmap with MAP_POPULATE
and madvise; mmap over it and PUNCH_HOLE on the way back), "C" is a loop in C of fallocate and mmap alone (`bare.c`,
where there is a compiler). The shapes are those of SmolLM2-135M (30 layers, 3 K/V heads of 64, float32) with a
plane for each layer's K and V, so 60 planes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.records import Spread, Target, describe_run, print_targets, warn_if_busy, write_json
from vmem_kv.cache import KVCache
from vmem_kv.driver.host import HostDriver
from vmem_kv.driver.host_mapper import Mapper, open_mapper
from vmem_kv.growth import SlotId, plan_growth
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.pages import PagePool
from vmem_kv.units import GIB, KIB, MIB, format_bytes

LAYERS = [LayerSpec.uniform(n_heads=3, head_dim=64, element_bytes=4)] * 30
PAGE_SIZES = (4 * KIB, 32 * KIB, 64 * KIB, 2 * MIB)
MAX_TOKENS = 32_768
MAX_BYTES_PER_GROWTH = GIB // 2
N_SEQUENCES = 256

BareGrow = Callable[[int, int, int, int], int]
"""(fd, address of places, their number, bytes at each) -> errno or 0"""


@dataclass(frozen=True, slots=True)
class Growth:
    """Pages mapped in one call of `ensure`, over so many slots."""

    name: str
    n_slots: int
    pages_per_plane: int


def growths(page_bytes: int) -> list[Growth]:
    """Decoding grows every plane of every sequence by a page; prefill grows one sequence's planes by many."""
    n_planes = 2 * len(LAYERS)
    n_affordable = max(1, MAX_BYTES_PER_GROWTH // (n_planes * page_bytes))
    return [Growth("decode", min(8, n_affordable), 1), Growth("prefill", 1, min(16, n_affordable))]


@dataclass(slots=True)
class PageCosts:
    """Microseconds per page, over the rounds."""

    path: str
    page_bytes: int
    growth: str
    n_pages: int
    ensure_us: Spread
    mapper_us: Spread
    ratio: Spread
    c_us: Spread | None
    ratio_to_c: Spread | None
    reclaim_us: Spread
    mapper_reclaim_us: Spread
    reclaim_ratio: Spread


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return its record."""
    options = parse(arguments)
    console = Console()
    warn_if_busy(console)
    run = describe_run()
    paths = available_paths()
    steady = {path: measure_ensure(path, options.rounds) for path in paths}
    warm = {path: measure_warm_slots(path, options.rounds) for path in paths}
    bare_grow = build_bare_calls()
    pages = [
        measure_pages(path, page_bytes, growth, options.rounds, bare_grow)
        for path in paths
        for page_bytes in options.page_sizes
        for growth in growths(page_bytes)
    ]
    run["load_average_at_end"] = os.getloadavg()[0]
    targets = [
        Target(
            f"ensure for {N_SEQUENCES} sequences when none grows, us",
            30,
            False,
            tuple((f"{path} path, {case}", spread) for path in paths for case, spread in steady[path].items()),
        )
    ] + [
        Target(
            f"us per page mapped / {bare}, {path} path",
            1.2,
            False,
            tuple(
                (f"{p.growth}, {format_bytes(p.page_bytes)}", r) for p in pages if p.path == path and (r := ratio(p))
            ),
        )
        for path in paths
        for bare, ratio in (("its mapper alone", _ratio), ("fallocate + mmap in C", _ratio_to_c))
    ]
    print_tables(console, steady, warm, pages)
    print_targets(console, targets)
    record = {
        "run": run,
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "targets": [target.to_json() for target in targets],
        "ensure_us": {path: {case: asdict(s) for case, s in cases.items()} for path, cases in steady.items()},
        "warm_slot_us": {path: asdict(spread) for path, spread in warm.items()},
        "pages": [asdict(costs) for costs in pages],
    }
    if options.json:
        write_json(options.json, "allocator", record)
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.allocator", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer rounds: 5 instead of 25")
    add("--rounds", type=int, metavar="N", help="turns of each measurement")
    add("--page-sizes", type=int, nargs="+", metavar="BYTES", default=list(PAGE_SIZES))
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 5 if options.quick else 25
    return options


def available_paths() -> list[str]:
    """The host driver's paths on this machine."""
    try:
        open_mapper("native")
    except OSError:
        return ["python"]
    return ["native", "python"]


def measure_ensure(path: str, n_rounds: int) -> dict[str, Spread]:
    """Microseconds per `ensure` that maps nothing: decode steps of all sequences, also when some have a window."""
    cases: dict[str, Spread] = {}
    with open_cache(path, 64 * KIB, N_SEQUENCES, kind="token_major") as cache:
        slots = cache.acquire_adjacent(N_SEQUENCES)
        cache.ensure(dict.fromkeys(slots, 2))
        steps = [dict.fromkeys(slots, n) for n in (1, 2)]  # back and forth between lengths that are mapped
        cases["lengths only"] = Spread.of(_per_call_us(cache.ensure, steps) for _ in range(n_rounds))
        cache.slide(slots[0], 1)
        cases["one sequence has a window"] = Spread.of(_per_call_us(cache.ensure, steps) for _ in range(n_rounds))
        cache.retire(slots)
    return cases


def measure_warm_slots(path: str, n_rounds: int) -> Spread:
    """Microseconds per acquire and retire of a sequence that fits a warm slot, among 64 warm ones."""
    with open_cache(path, 64 * KIB, 64, kind="token_major") as cache:
        slots = cache.acquire_adjacent(64)
        cache.ensure({slot: 1 + 4 * (slot % 4) for slot in slots})
        cache.retire(slots)

        def reuse(expected: int) -> None:
            slot = cache.acquire(expected_tokens=expected)
            cache.ensure({slot: 1})
            cache.retire(slot)

        calls_before = dict(cache.pool.driver.calls)
        times = Spread.of(_per_call_us(reuse, [1, 5, 9, 13]) for _ in range(n_rounds))
        if dict(cache.pool.driver.calls) != calls_before:
            raise AssertionError("a warm slot was not reused as it was")
    return times


def measure_pages(path: str, page_bytes: int, growth: Growth, n_rounds: int, bare_grow: BareGrow | None) -> PageCosts:
    """Microseconds per page mapped and reclaimed, ours and bare in turns over the same addresses.

    Before each measurement every plane holds one page already, as it does when a sequence grows.
    """
    n_more = growth.pages_per_plane
    ours: list[float] = []
    ours_back: list[float] = []
    alone: list[float] = []
    alone_back: list[float] = []
    in_c: list[float] = []
    with open_cache(path, page_bytes, growth.n_slots) as cache, _memfd() as fd:
        slots = [SlotId(index) for index in range(growth.n_slots)]
        token_bytes = cache.layout.planes[0].token_bytes
        first, last = (dict.fromkeys(slots, page_bytes * n // token_bytes) for n in (1, 1 + n_more))
        table = cache.region.table
        planes = [run.address for run in plan_growth(cache.layout, table.base, table.mapped, first).runs]
        n_pages = len(planes) * n_more
        bare = Bare(open_mapper(path), fd, planes, page_bytes)
        for _ in range(n_rounds):
            if bare_grow is not None:
                bare.map(1)
                in_c.append(bare.grow_in_c(bare_grow, n_more) / n_pages)
                bare.unmap(1 + n_more)
            bare.map(1)
            alone.append(bare.map(n_more, behind=1) / n_pages)
            alone_back.append(bare.unmap(1 + n_more) / (n_pages + len(planes)))

            cache.acquire_adjacent(growth.n_slots)
            cache.ensure(first)
            n_before = cache.stats().n_live_pages
            began = time.perf_counter()
            cache.ensure(last)
            ours.append((time.perf_counter() - began) * 1e6 / n_pages)
            if cache.stats().n_live_pages - n_before != n_pages:
                raise AssertionError("ensure mapped another number of pages than the bare calls")
            cache.retire(slots)
            began = time.perf_counter()
            n_back = cache.reclaim(1 << 60)
            ours_back.append((time.perf_counter() - began) * 1e6 / n_back)
    return PageCosts(
        path,
        page_bytes,
        growth.name,
        n_pages,
        ensure_us=Spread.of(ours),
        mapper_us=Spread.of(alone),
        ratio=Spread.of_ratios(ours, alone),
        c_us=Spread.of(in_c) if in_c else None,
        ratio_to_c=Spread.of_ratios(ours, in_c) if in_c else None,
        reclaim_us=Spread.of(ours_back),
        mapper_reclaim_us=Spread.of(alone_back),
        reclaim_ratio=Spread.of_ratios(ours_back, alone_back),
    )


class Bare:
    """The work without bookkeeping: pages of a file of its own over somebody's reserved planes.

    A page's offset is its address, as in the driver, so that both sides make the same mappings. Calls return
    microseconds; lists and arrays of addresses are made outside of the time.
    """

    def __init__(self, mapper: Mapper, fd: int, planes: list[int], page_bytes: int) -> None:
        self._mapper = mapper
        self._fd = fd
        self._planes = planes
        self._page_bytes = page_bytes

    def map(self, n_pages: int, behind: int = 0) -> float:
        """Create and map so many pages in every plane, behind so many that are there."""
        places = array("q", self._places(n_pages, behind))
        began = time.perf_counter()
        _must(self._mapper.create(self._fd, places, self._page_bytes)[0])
        _must(self._mapper.map(self._fd, places, places, self._page_bytes)[0])
        return (time.perf_counter() - began) * 1e6

    def grow_in_c(self, bare_grow: BareGrow, n_pages: int) -> float:
        """Do `map(n_pages, behind=1)` by a loop in C, a range per plane."""
        ranges = array("q", [plane + self._page_bytes for plane in self._planes])
        began = time.perf_counter()
        code = bare_grow(self._fd, ranges.buffer_info()[0], len(ranges), n_pages * self._page_bytes)
        took = time.perf_counter() - began
        _must(code)
        return took * 1e6

    def unmap(self, n_pages: int) -> float:
        """Unmap and release the first pages of every plane."""
        places, lengths = array("q", self._places(n_pages, 0)), [n_pages * self._page_bytes] * len(self._planes)
        began = time.perf_counter()
        _must(self._mapper.unmap(self._planes, lengths)[0])
        _must(self._mapper.release(self._fd, places, self._page_bytes)[0])
        return (time.perf_counter() - began) * 1e6

    def _places(self, n_pages: int, behind: int) -> list[int]:
        return [plane + self._page_bytes * (behind + i) for plane in self._planes for i in range(n_pages)]


def build_bare_calls() -> BareGrow | None:
    """Compile `bare.c`; None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bare.so"
        source = Path(__file__).with_name("bare.c")
        subprocess.run([compiler, "-std=c11", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        bare_grow = ctypes.CDLL(str(library)).bare_grow
    bare_grow.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
    return bare_grow


def print_tables(
    console: Console, steady: dict[str, dict[str, Spread]], warm: dict[str, Spread], pages: Sequence[PageCosts]
) -> None:
    """Print what was measured."""
    table = Table(title=f"Calls that map nothing, microseconds (median and range; {N_SEQUENCES} sequences)")
    for column in ("path", "call", "us"):
        table.add_column(column)
    for path, cases in steady.items():
        for case, spread in cases.items():
            table.add_row(path, f"ensure, {case}", spread.show(1))
        table.add_row(path, "acquire + ensure + retire of one warm slot of 64", warm[path].show(1))
    console.print(table)
    table = Table(title="Microseconds per page (median; ratios with their range over the rounds)")
    columns = ["path", "page", "growth", "pages", "ensure", "mapper", "ratio", "C", "ratio"]
    columns += ["reclaim", "mapper", "ratio"]
    for column in columns:
        table.add_column(column, justify="right")
    for p in pages:
        table.add_row(
            p.path,
            format_bytes(p.page_bytes),
            p.growth,
            str(p.n_pages),
            f"{p.ensure_us.median:.2f}",
            f"{p.mapper_us.median:.2f}",
            p.ratio.show(),
            f"{p.c_us.median:.2f}" if p.c_us else "",
            p.ratio_to_c.show() if p.ratio_to_c else "",
            f"{p.reclaim_us.median:.2f}",
            f"{p.mapper_reclaim_us.median:.2f}",
            p.reclaim_ratio.show(),
        )
    console.print(table)


@contextmanager
def open_cache(path: str, page_bytes: int, n_slots: int, kind: str = "per_layer") -> Iterator[KVCache]:
    """A cache over the model's shapes, closed at the end with whatever is warm in it."""
    driver = HostDriver(path)
    cache = None
    try:
        layout = Layout.build(kind, LAYERS, n_slots=n_slots, max_tokens=MAX_TOKENS, page_bytes=page_bytes)
        cache = KVCache(PagePool(driver, page_bytes), layout)
        yield cache
    finally:
        if cache is not None:
            cache.retire(cache.active_slots())
            cache.close()
        driver.close()


@contextmanager
def _memfd() -> Iterator[int]:
    """A sparse file for the bare calls."""
    fd = os.memfd_create("bare", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 1 << 48)
        yield fd
    finally:
        os.close(fd)


def _per_call_us(call: Callable[[Any], object], arguments: Sequence[Any], n_calls: int = 200) -> float:
    """The median time of a call, over calls with these arguments in turn."""
    times = []
    for i in range(n_calls):
        argument = arguments[i % len(arguments)]
        began = time.perf_counter()
        call(argument)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def _must(code: int) -> None:
    if code:
        raise OSError(code, f"the bare calls failed: {os.strerror(code)}")


def _ratio(costs: PageCosts) -> Spread | None:
    return costs.ratio


def _ratio_to_c(costs: PageCosts) -> Spread | None:
    return costs.ratio_to_c


if __name__ == "__main__":
    main()
