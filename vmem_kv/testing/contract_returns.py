"""Rules of the driver contract about what comes back: memory, addresses and files.

Each function is one rule, its docstring says it; see `conformance.py`.

Memory is looked at where its count is the driver's own: by `physical_bytes`, if the driver has such a method, else by
`available_bytes` of a device that is not the host. What the host has left is everybody's, and the kernel counts it
late: that proves nothing, and the report says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

from vmem_kv.driver.base import Driver, Handle
from vmem_kv.errors import OutOfAddressSpace, OutOfPages
from vmem_kv.testing.contract_bench import Bench, CountsMemory, Rule
from vmem_kv.units import KIB, MIB, round_up

N_CYCLES = 50
"""Cycles of create and release that are counted exactly."""
CYCLE_BYTES = 64 * KIB
"""What such a cycle creates, in two pages at least."""
ROUND_BYTES = 32 * MIB
"""What a round creates where others take and give memory meanwhile; less where that is more than a part in 32."""
ADDRESSES_BYTES = 1 << 49
"""Addresses that are reserved and freed in all: four times what 47 bits can hold at once."""
RESERVATION_BYTES = 1 << 40
"""How many of them at a time."""
MAX_PIECES = 1024
N_OPENED = 8
"""Drivers opened and closed before one counts as leaking files."""


class Round(NamedTuple):
    """What could be handed out before pages were created, while they lived, and after they were released, in bytes."""

    before: int
    held: int
    after: int


class Verdict(Enum):
    """What rounds of create and release come to."""

    OPEN = "more rounds are needed"
    BACK = "memory comes back"
    LOST = "memory does not come back"
    BLIND = "the count does not show pages"


def judge(rounds: Sequence[Round], n_bytes: int) -> Verdict:
    """Say whether memory came back, while others took and gave some in between.

    Rounds in which creating `n_bytes` did not show say nothing. Of the others, those in which it came back must
    outnumber those in which it did not by 3. The reverse must hold by 12, so that nobody is blamed for what others did.
    """
    shown = [r for r in rounds if r.before - r.held >= n_bytes // 2]
    score = sum(1 if r.after - r.held >= n_bytes // 2 else -1 for r in shown)
    if score >= 3:
        return Verdict.BACK
    if score <= -12:
        return Verdict.LOST
    return Verdict.BLIND if len(rounds) >= (64 if shown else 4) else Verdict.OPEN


def _a_page_too_large_for_the_device_is_out_of_pages(bench: Bench) -> None:
    """create: a page for which there is no memory raises OutOfPages, and makes nothing"""
    if bench.driver.info.device == "cpu":
        bench.cannot_see("what create raises when memory is full: to fill the host's would harm others")
        return
    most = max(bench.driver.info.memory_bytes, bench.available())
    reservation = bench.reserve(1)
    created: list[Handle] = []
    bench.refuses(
        lambda: bench.driver.create(round_up(4 * most, bench.page), [reservation.base], created),
        OutOfPages,
        f"a page of four times {most} bytes, which are all that there is, did not fail so",
    )
    bench.require(not created, "a create that failed returned a handle")
    bench.driver.release(bench.page, bench.create([reservation.base]))
    bench.free(reservation)


def _memory_comes_back(bench: Bench) -> None:
    """release: memory comes back, cycle after cycle"""
    if isinstance(bench.driver, CountsMemory):
        _require_exact_return(bench, bench.driver)
    elif bench.driver.info.device == "cpu":
        bench.cannot_see("whether memory comes back: the driver has no physical_bytes(), and the host's is everybody's")
    else:
        _require_return_by_rounds(bench)


def _require_exact_return(bench: Bench, counts: CountsMemory) -> None:
    n_pages = max(2, CYCLE_BYTES // bench.page)
    left = []
    for _ in range(N_CYCLES):
        held = _live_a_cycle(bench, bench.page, n_pages, counts.physical_bytes)
        bench.require(held >= n_pages * bench.page, f"{n_pages} live pages, but physical_bytes() is {held}")
        left.append(counts.physical_bytes())
    bench.available()
    grown = left[-1] - left[0]  # what the first left may be kept for the next
    bench.require(
        grown < n_pages * bench.page,
        f"{N_CYCLES} cycles of {n_pages} pages, all released, left {grown} bytes more behind than the first",
    )


def _require_return_by_rounds(bench: Bench) -> None:
    available = bench.available
    page_bytes = round_up(256 * KIB, bench.page)
    n_pages = max(1, min(ROUND_BYTES, available() // 32) // page_bytes)
    rounds: list[Round] = []
    while (verdict := judge(rounds, n_pages * page_bytes)) is Verdict.OPEN:
        before = available()
        held = _live_a_cycle(bench, page_bytes, n_pages, available)
        rounds.append(Round(before, held, available()))
    bench.require(
        verdict is not Verdict.LOST,
        f"in {len(rounds)} rounds of {n_pages * page_bytes} bytes, available_bytes() went down and not up again",
    )
    if verdict is Verdict.BLIND:
        bench.cannot_see(
            "whether memory comes back: available_bytes() does not show pages, physical_bytes() is missing"
        )


def _live_a_cycle(bench: Bench, page_bytes: int, n_pages: int, look: Callable[[], int]) -> int:
    """Create, map, unmap and release pages; return what `look` says while they live."""
    reservation = bench.reserve(n_pages * page_bytes // bench.page)
    places = range(reservation.base, reservation.end, page_bytes)
    handles = bench.create(places, page_bytes)
    bench.driver.map(page_bytes, places, handles)
    bench.driver.set_access([(reservation.base, reservation.n_bytes)])
    found = look()
    bench.driver.unmap([(reservation.base, reservation.n_bytes)])
    bench.driver.release(page_bytes, handles)
    bench.free(reservation)
    return found


def _reserved_addresses_hold_nothing(bench: Bench) -> None:
    """reserve: nothing can be touched in a range that is only reserved"""
    reservation = bench.reserve(64)
    for i in (0, 1, 31, 63):
        bench.require_unmapped(reservation.base + i * bench.page, "where nothing was mapped")
    if bench.memory.is_mapped(reservation.base) is None:
        bench.cannot_see(f"whether reserved addresses can be touched: nobody can say for {bench.driver.info.device}")
    bench.free(reservation)


def _addresses_come_back(bench: Bench) -> None:
    """free_reservation: addresses come back, so that many times what there is can be reserved, piece after piece"""
    page, limit = bench.page, bench.driver.info.max_reservation_bytes
    most = n_bytes = max(page, min(RESERVATION_BYTES, limit) // page * page)
    while not _can_reserve(bench, n_bytes) and n_bytes > page:
        n_bytes = n_bytes // 2 // page * page
    n_pieces = max(64, min(MAX_PIECES, ADDRESSES_BYTES // n_bytes))
    if n_bytes == most and n_pieces * n_bytes < ADDRESSES_BYTES // 4:
        bench.cannot_see(f"whether addresses come back: with max_reservation_bytes of {limit}, too few were tried")
    for i in range(n_pieces):
        bench.require(_can_reserve(bench, n_bytes), f"{n_bytes} bytes could be reserved and freed {i} times only")


def _can_reserve(bench: Bench, n_bytes: int) -> bool:
    """Reserve a range and free it again; return whether there was one."""
    try:
        reservation = bench.driver.reserve(n_bytes)
    except OutOfAddressSpace:
        return False
    bench.driver.free_reservation(reservation)
    return True


def _files_come_back(bench: Bench) -> None:
    """close: gives back the files that the driver opened, each time"""
    bench.driver.close()
    closed = []  # and kept: close is to give files back, not the garbage collector
    for _ in range(N_OPENED):  # other threads may open files meanwhile, but not each time
        before = _open_files()
        closed.append(driver := bench.open_driver())
        _use(driver)
        driver.close()
        after = _open_files()
        n_left = len(after - before) - len(before - after)  # a file that all drivers share may be opened anew
        if n_left <= 0:
            break
    bench.require(n_left <= 0, f"each of {N_OPENED} drivers left files open when it was closed, the last one {n_left}")


def _use(driver: Driver) -> None:
    """Let a page live on a driver."""
    page, created = driver.info.granularity_bytes, list[Handle]()
    reservation = driver.reserve(page)
    driver.create(page, [reservation.base], created)
    driver.map(page, [reservation.base], created)
    driver.set_access([(reservation.base, page)])
    driver.unmap([(reservation.base, page)])
    driver.release(page, created)
    driver.free_reservation(reservation)


def _open_files() -> set[tuple[int, int, int]]:
    """The files that this process has open: descriptor, device and inode."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing itself is closed by now
            status = os.stat(int(name))
            found.add((int(name), status.st_dev, status.st_ino))
    return found


RULES: tuple[Rule, ...] = (
    _a_page_too_large_for_the_device_is_out_of_pages,
    _reserved_addresses_hold_nothing,
    _addresses_come_back,
    _memory_comes_back,
    _files_come_back,
)
"""The last one closes its driver."""
