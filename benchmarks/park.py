"""What parking costs: bandwidth against memcpy, copies per GiB, restoring against computing again, many turns.

    python -m benchmarks.park [--quick] [--huge-pages] [--json FILE]

The shapes are those of SmolLM2-135M (30 layers, 3 K/V heads of 64, float32: 46,080 bytes per token). Moving rows is
held against one plain memcpy of as many bytes between two buffers that are in memory already, in turns, with ratios
formed within a turn. Four things are timed:

    out          rows of a slot into a host copy whose memory was used before; the slot keeps its pages
    in           rows of a host copy into a slot whose pages are mapped
    park         out, and the slot's pages back to where they came from
    restore      pages from there, and in

Pages come from a pool that keeps them, as it does on a GPU, or from the system, as the host driver's pool does by
itself: the system fills every page with zeros before it hands it out, at a fraction of the speed of memcpy. With pages
of 4 KiB the system's work for each page outweighs the copies; with --huge-pages (hugetlbfs: set vm.nr_hugepages to 640
first, for the default lengths) it has 512 times fewer of them.

Times are the calling thread's processor time, for nothing here waits: on an idle machine it is the time that passes.

A recompute is a prefill: measured at one length, and from there by the floating-point operations that longer ones take.
Its time is the processor time of all threads over their number, the best that as many processors could do.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.records import Spread, Target, describe_run, print_targets, warn_if_busy, write_json
from vmem_kv.cache import KVCache
from vmem_kv.driver.base import DriverInfo
from vmem_kv.driver.host import HostDriver
from vmem_kv.growth import SlotId
from vmem_kv.layout import LayerSpec, Layout, choose_layout
from vmem_kv.pages import PagePool
from vmem_kv.tiers.host import HostTier
from vmem_kv.tiers.memory import FRAME_BYTES, FramePool, PlainMemory
from vmem_kv.units import GIB, MIB, ceil_div, round_up

N_LAYERS, N_HEADS, HEAD_DIM, ELEMENT_BYTES = 30, 3, 64, 4
LAYERS = [LayerSpec.uniform(N_HEADS, HEAD_DIM, ELEMENT_BYTES)] * N_LAYERS
POOLS = ("pool", "system")
KINDS = ("per_head", "per_layer", "token_major")
LENGTHS = (1024, 4096, 8192)
BLOCK_TOKENS = 16
"""PagedAttention's block: the unit that a block table scatters."""
LEAST_SHARE = 0.8
COLUMNS = ("layout", "pages", "tokens", "memcpy GB/s", "out", "in", "park", "restore", "copies/GiB", "of blocks")


@dataclass(frozen=True, slots=True)
class Moved:
    """One layout at one length. Times in milliseconds, ratios are shares of memcpy's bandwidth."""

    kind: str
    pages_from: str  # "pool" or "system"
    n_tokens: int
    n_bytes: int
    memcpy_ms: Spread
    out_ms: Spread
    in_ms: Spread
    park_ms: Spread
    restore_ms: Spread
    out_share: Spread
    in_share: Spread
    park_share: Spread
    restore_share: Spread
    n_copies_per_gib: float
    n_block_copies_per_gib: float  # of blocks of 16 tokens, one copy for each layer's K and V

    def __str__(self) -> str:
        return f"{self.kind}, {self.n_tokens} tokens, pages from the {self.pages_from}"


@dataclass(frozen=True, slots=True)
class Recomputed:
    """A restore against the prefill that would make the same rows. Seconds."""

    n_tokens: int
    prefill_s: float
    is_measured: bool  # else from the measured one, by floating-point operations
    restore_s: float
    speedup: float


@dataclass(frozen=True, slots=True)
class Turns:
    """A conversation that is copied out after every turn."""

    n_turns: int
    turn_tokens: int
    kept_bytes: int  # moved out if host copies are kept between turns
    dropped_bytes: int  # if they are not
    kept_ms: float
    dropped_ms: float

    def moved(self) -> list[tuple[int, float]]:
        """Bytes and milliseconds, with and without keeping copies."""
        return [(self.kept_bytes, self.kept_ms), (self.dropped_bytes, self.dropped_ms)]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the program; return its record."""
    options = parse(arguments)
    console = Console()
    warn_if_busy(console)
    run = describe_run()
    moved = [
        measure(kind, pages_from, n_tokens, options.rounds, options.huge_pages)
        for kind in options.kinds
        for pages_from in POOLS
        for n_tokens in options.lengths
    ]
    turns = measure_turns(options.kinds[0], options.turns, options.turn_tokens, options.huge_pages)
    plainest = {m.n_tokens: m for m in moved if (m.kind, m.pages_from) == (options.kinds[0], "system")}
    recomputed = measure_recompute(options.model, options.prefill_tokens, options.threads, plainest)
    run["load_average_at_end"] = os.getloadavg()[0]
    targets = [
        *(
            Target(
                f"bandwidth of {name}, pages from the {pages_from} / memcpy",
                LEAST_SHARE,
                True,
                tuple((str(m), getattr(m, f"{name}_share")) for m in moved if m.pages_from == pages_from),
            )
            for name in ("out", "in", "park", "restore")
            for pages_from in POOLS
        ),
        Target(
            "a prefill / a restore of the same rows",
            1.0,
            True,
            tuple((f"{r.n_tokens} tokens", Spread.of([r.speedup])) for r in recomputed),
        ),
    ]
    print_tables(console, moved, recomputed, turns)
    print_targets(console, targets)
    record = {
        "run": run,
        "settings": {name: value for name, value in vars(options).items() if name != "json"},
        "targets": [target.to_json() for target in targets],
        "moved": [asdict(one) for one in moved],
        "recomputed": [asdict(one) for one in recomputed],
        "turns": asdict(turns),
    }
    if options.json:
        write_json(options.json, "park", record)
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.park", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="3 rounds instead of 11")
    add("--huge-pages", action="store_true", help="take the device's memory from hugetlbfs")
    add("--rounds", type=int, metavar="N", help="turns of each measurement")
    add("--lengths", type=int, nargs="+", metavar="TOKENS", default=list(LENGTHS))
    add("--kinds", nargs="+", metavar="LAYOUT", default=list(KINDS))
    add("--turns", type=int, metavar="N", default=10, help="of the conversation")
    add("--turn-tokens", type=int, metavar="TOKENS", default=300, help="that each turn adds")
    add("--model", metavar="NAME", help="to compute again with; by default SmolLM2-135M, `tiny` for a random one")
    add("--prefill-tokens", type=int, metavar="TOKENS", default=1024, help="how long a prefill to measure")
    add("--threads", type=int, metavar="N", help="torch's threads for the prefill")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(arguments)
    if options.rounds is None:
        options.rounds = 3 if options.quick else 11
    return options


def measure(kind: str, pages_from: str, n_tokens: int, n_rounds: int, huge_pages: bool) -> Moved:
    """Park and restore one sequence, in turns with memcpy."""
    memcpy, out, inward, park, restore = ([] for _ in range(5))
    tokens = list(range(n_tokens))
    with open_tier(kind, n_tokens, huge_pages, keep_freed=pages_from == "pool") as (cache, host):
        slot, copy = filled_slot(cache, n_tokens), host.new_copy(cache.layout)
        n_bytes = n_tokens * cache.layout.token_bytes
        copy_plainly = plain_memcpy(n_bytes)
        host.copy_out(copy, cache, slot, tokens)  # its frames are in memory from here on
        n_copies = host.stats().n_moves_out
        for _ in range(n_rounds):
            memcpy.append(_ms(copy_plainly))
            host.drop(copy)
            out.append(_ms(lambda: host.copy_out(copy, cache, slot, tokens)))
            cache.ensure({slot: 0})
            inward.append(_ms(lambda: host.restore(copy, cache, slot)))
            host.drop(copy)
            park.append(_ms(lambda: host.park(copy, cache, slot, tokens)))
            restore.append(_ms(lambda: host.restore(copy, cache, slot)))
        cache.retire(slot)
        host.drop(copy)
    return Moved(
        kind,
        pages_from,
        n_tokens,
        n_bytes,
        *(Spread.of(times) for times in (memcpy, out, inward, park, restore)),
        *(Spread.of_ratios(memcpy, times) for times in (out, inward, park, restore)),
        n_copies_per_gib=n_copies * GIB / n_bytes,
        n_block_copies_per_gib=2 * N_LAYERS * ceil_div(n_tokens, BLOCK_TOKENS) * GIB / n_bytes,
    )


def measure_turns(kind: str, n_turns: int, turn_tokens: int, huge_pages: bool) -> Turns:
    """A conversation that grows turn by turn, copied out after each, with and without keeping the copy."""
    n_bytes, ms = {}, {}
    n_tokens = n_turns * turn_tokens
    for keeps in (True, False):
        with open_tier(kind, n_tokens, huge_pages) as (cache, host):
            slot, copy = cache.acquire(), host.new_copy(cache.layout)
            ms[keeps] = 0.0
            for turn in range(1, n_turns + 1):
                tokens = list(range(turn * turn_tokens))
                cache.ensure({slot: len(tokens)})
                if not keeps:
                    host.drop(copy)
                ms[keeps] += _ms(partial(host.copy_out, copy, cache, slot, tokens))
            n_bytes[keeps] = host.stats().out_bytes
            cache.retire(slot)
            host.drop(copy)
    return Turns(n_turns, turn_tokens, n_bytes[True], n_bytes[False], ms[True], ms[False])


def measure_recompute(
    model_name: str | None, prefill_tokens: int, n_threads: int | None, moved: dict[int, Moved]
) -> list[Recomputed]:
    """Time one prefill, and set the restores against those of their lengths."""
    import torch

    from benchmarks.systems import load_model

    if n_threads:
        torch.set_num_threads(n_threads)
    model = load_model(model_name, "float32")
    config = model.config
    ids = torch.randint(0, config.vocab_size, (1, prefill_tokens))
    with torch.inference_mode():
        model(ids[:, :16], logits_to_keep=1)
        began = time.process_time()
        model(ids, logits_to_keep=1)
        measured_s = (time.process_time() - began) / torch.get_num_threads()
    n_weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)

    def n_operations(n_tokens: int) -> float:
        """Of the weights, and of causal attention's two products."""
        return 2 * n_weights * n_tokens + 2 * config.num_hidden_layers * config.hidden_size * n_tokens**2

    found = []
    for n_tokens, one in sorted(moved.items()):
        prefill_s = measured_s * n_operations(n_tokens) / n_operations(prefill_tokens)
        restore_s = one.restore_ms.median / 1e3
        found.append(Recomputed(n_tokens, prefill_s, n_tokens == prefill_tokens, restore_s, prefill_s / restore_s))
    return found


@contextmanager
def open_tier(
    kind: str, n_tokens: int, huge_pages: bool, *, keep_freed: bool = False
) -> Iterator[tuple[KVCache, HostTier]]:
    """A cache of one slot, and a host tier with room for it twice."""
    driver = HostDriver(huge_pages=huge_pages)
    page_bytes = _page_bytes(driver.info, kind, n_tokens)
    layout = Layout.build(kind, LAYERS, n_slots=1, max_tokens=n_tokens, page_bytes=page_bytes)
    cache = KVCache(PagePool(driver, page_bytes, layout.n_pages(n_tokens), keep_freed=keep_freed), layout)
    host = HostTier(FramePool(2 * round_up(n_tokens * layout.token_bytes, FRAME_BYTES) + 2 * FRAME_BYTES))
    yield cache, host
    host.close()
    cache.settle()
    cache.close()
    cache.pool.trim()
    driver.close()


def filled_slot(cache: KVCache, n_tokens: int) -> SlotId:
    """A sequence whose rows hold something."""
    slot = cache.acquire()
    cache.ensure({slot: n_tokens})
    for i, (address, n_bytes) in enumerate(cache.spans(slot, 0, n_tokens)):
        ctypes.memset(address, i % 255 + 1, n_bytes)
    return slot


def plain_memcpy(n_bytes: int) -> Callable[[], None]:
    """One memcpy between two ordinary buffers that are in memory."""
    views = [PlainMemory().allocate(n_bytes).view for _ in range(2)]
    arrays = [(ctypes.c_char * n_bytes).from_buffer(view) for view in views]
    for array in arrays:
        ctypes.memset(array, 1, n_bytes)

    def copy() -> None:
        ctypes.memmove(arrays[1], arrays[0], n_bytes)

    return copy


def print_tables(console: Console, moved: Sequence[Moved], recomputed: Sequence[Recomputed], turns: Turns) -> None:
    """Print what was measured."""
    table = Table(title="Share of memcpy's bandwidth (median over the rounds)")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for m in moved:
        table.add_row(
            m.kind,
            m.pages_from,
            f"{m.n_tokens:,}",
            f"{m.n_bytes / m.memcpy_ms.median / 1e6:.1f}",
            *(f"{share.median:.2f}" for share in (m.out_share, m.in_share, m.park_share, m.restore_share)),
            f"{m.n_copies_per_gib:,.0f}",
            f"{m.n_block_copies_per_gib:,.0f}",
        )
    console.print(table)
    table = Table(title="Restoring against computing again")
    for column in ("tokens", "prefill s", "", "restore s", "times faster"):
        table.add_column(column, justify="right")
    for r in recomputed:
        how = "measured" if r.is_measured else "estimated"
        table.add_row(f"{r.n_tokens:,}", f"{r.prefill_s:.2f}", how, f"{r.restore_s:.3f}", f"{r.speedup:.0f}")
    console.print(table)
    kept, dropped = (f"{n / MIB:.0f} MiB in {ms:.0f} ms" for n, ms in turns.moved())
    console.print(
        f"{turns.n_turns} turns of {turns.turn_tokens} tokens, copied out after each: {kept} with host copies kept, "
        f"{dropped} without"
    )


def _page_bytes(info: DriverInfo, kind: str, n_tokens: int) -> int:
    return choose_layout(info, LAYERS, n_slots=1, expected_tokens=n_tokens, kind=kind).page_bytes


def _ms(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return (time.thread_time() - began) * 1e3


if __name__ == "__main__":
    main()
