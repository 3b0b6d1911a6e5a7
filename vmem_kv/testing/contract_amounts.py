"""Rules of the driver contract about amounts: batches of hundreds, copies of a megabyte, sizes that are odd.

A driver that works for eight pages and a few bytes may cut off what is larger. Each function is one rule, its docstring
says it; see `conformance.py`. How many items a large batch has is `Bench.many`: 300, or fewer where the smallest pages
are large and memory is scarce.
"""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Sequence
from dataclasses import dataclass

from vmem_kv.driver.base import Copy, Handle, Reservation
from vmem_kv.errors import VmemError
from vmem_kv.testing.contract_bench import FEW, MANY, Bench, Rule
from vmem_kv.units import MIB, ceil_div

ODD_SIZES = (1, 4095, 4097, 65_535, 65_537, MIB + 13)
"""Bytes of copies: around the sizes at which drivers split, and past a megabyte."""
REGION_BYTES = 2 * MIB
"""What the large copies lie in, at least: so much that all of them fit behind any page's edge."""


def _a_page_may_be_mapped_over_and_over(bench: Bench) -> None:
    """map: a page that is mapped, unmapped and mapped again, hundreds of times, stays the same page"""
    reservation = bench.reserve(2)
    places = [reservation.base, reservation.base + bench.page]
    handles = bench.create([*places, places[0]])
    for number, handle in enumerate(handles):
        bench.map(places[:1], [handle])
        bench.mark(places[0], number + 1)
        bench.unmap(places[:1])
    for i in range(MANY):
        place, number = places[i % 2], i % 3
        bench.map([place], [handles[number]])
        found = bench.marks(place)
        bench.require(found == (number + 1, number + 1), f"another page's memory shows after {i} mappings")
        bench.unmap([place])
    bench.driver.release(bench.page, handles)
    bench.free(reservation)


def _a_large_batch_creates_every_page(bench: Bench) -> None:
    """create: a batch of hundreds makes every page, each with memory of its own, zero if the driver says so"""
    n, page = bench.many(), bench.page
    reservation = bench.reserve(n)
    places = [reservation.base + i * page for i in range(n)]
    handles = bench.create(places)
    bench.require(len(handles) == n, f"{len(handles)} handles for {n} places, and no error")
    bench.require(len(set(handles)) == n, "create returned a handle twice")
    _map_by_few(bench, places, handles)
    for number, place in enumerate(places):
        is_blank = bench.marks(place) == (0, 0) or not bench.driver.info.zeroes_new_pages
        bench.require(is_blank, f"page {number} of {n} is not zero")
        bench.mark(place, number + 1)
    _require_marks(bench, places, [i + 1 for i in range(n)], f"of a batch of {n} shares memory with another")
    for i in range(0, n, FEW):
        bench.driver.unmap([(places[i], len(places[i : i + FEW]) * page)])
    bench.driver.release(page, handles)
    bench.free(reservation)


def _a_large_batch_maps_every_page(bench: Bench) -> None:
    """map, set_access: a batch of hundreds shows every page at its own address"""
    n, page = bench.many(), bench.page
    reservation = bench.reserve(2 * n)
    apart = [reservation.base + 2 * i * page for i in reversed(range(n))]
    handles = bench.create(apart)
    bench.map(apart, handles)
    for number, address in enumerate(apart):
        bench.require_mapped(address, f"where item {number} of a batch of {n} was mapped")
        bench.mark(address, number + 1)
    numbers = [i + 1 for i in range(n)]
    _require_marks(bench, apart, numbers, f"of a batch of {n} shows another one's memory")
    for address in apart:
        bench.unmap([address])
    row = [reservation.base + i * page for i in range(n)]
    _map_by_few(bench, row, handles)
    _require_marks(bench, row, numbers, f"of a batch of {n} was mapped at another one's address")
    bench.driver.unmap([(row[0], n * page)])
    bench.driver.release(page, handles)
    bench.free(reservation)


def _an_unmap_reaches_every_span(bench: Bench) -> None:
    """unmap: every span of a call goes, of one, a dozen and hundreds, and nothing can be touched there any more"""
    n, page = bench.many(), bench.page
    reservation = bench.reserve(2 * n)
    apart = [reservation.base + 2 * i * page for i in range(n)]
    kept = apart[:: FEW // 2]
    going = [address for address in apart if address not in set(kept)]
    handles = bench.create(apart[:FEW])
    pages = {address: handles[i % FEW] for i, address in enumerate(apart)}
    numbers = {handle: i + 1 for i, handle in enumerate(handles)}
    _map_by_few(bench, apart, list(pages.values()))
    for address in apart[:FEW]:
        bench.mark(address, numbers[pages[address]])
    for address in apart:
        bench.require_mapped(address, "where a page was mapped")
    for gone in (going[:1], going[1:13], going[13:]):
        bench.unmap(gone)
        for address in gone:
            bench.require_unmapped(address, f"which an unmap of {len(gone)} spans included")
    if bench.memory.is_mapped(kept[0]) is None:
        bench.cannot_see(f"whether addresses can be touched after unmap: nobody can say for {bench.driver.info.device}")
    _require_marks(bench, kept, [numbers[pages[address]] for address in kept], "beside unmapped ones changed")
    others = [pages[address] for address in reversed(going)]
    _map_by_few(bench, going, others)
    _require_marks(bench, going, [numbers[handle] for handle in others], "does not show after an unmap of many spans")
    for address in apart:
        bench.unmap([address])
    bench.driver.release(page, handles)
    bench.free(reservation)


def _a_large_batch_releases_every_page(bench: Bench) -> None:
    """release: a batch of hundreds releases every page"""
    n = bench.many()
    reservation = bench.reserve(n)
    handles = bench.create([reservation.base + i * bench.page for i in range(n)])
    bench.driver.release(bench.page, handles)
    for i, handle in enumerate(handles):
        bench.refuses(
            lambda handle=handle: bench.driver.release(bench.page, [handle]),  # type: ignore[misc]
            VmemError,
            f"item {i} of a batch of {n} could be released again",
        )
    bench.free(reservation)


def _large_host_copies_arrive(bench: Bench) -> None:
    """copy_from_host, copy_to_host: a megabyte arrives, and so do odd sizes, from and to any address, pinned or not"""
    region = _Region.open(bench)
    region.write(bytes(region.n_bytes))
    host = memoryview(mmap.mmap(-1, 2 * MIB))  # goes with the last view of it
    start = ctypes.addressof(ctypes.c_char.from_buffer(host))
    bench.driver.pin(start, 2 * MIB)
    source = random.Random(1)
    for n_bytes in ODD_SIZES:  # ascending: what is behind a copy's target was not written before
        for buffer in (host[5 : 5 + n_bytes + 2], memoryview(bytearray(n_bytes + 2))):
            data = source.randbytes(n_bytes)
            buffer[:] = b"#" + data + b"#"
            bench.driver.copy_from_host(buffer[1:-1], region.odd).wait()
            found = bench.memory.read(region.odd - 1, n_bytes + 2)
            bench.require(found == b"\0" + data + b"\0", f"copy_from_host of {n_bytes} bytes did something else")
            buffer[:] = b"#" * len(buffer)
            bench.driver.copy_to_host(region.odd, buffer[1:-1]).wait()
            bench.require(bytes(buffer) == b"#" + data + b"#", f"copy_to_host of {n_bytes} bytes did something else")
    bench.driver.unpin(start)
    region.close()


def _large_scrubs_reach_the_end(bench: Bench) -> None:
    """scrub: spans of more than a megabyte are zeroed to their ends, and so is each of many"""
    region, page = _Region.open(bench, 6), bench.page
    dirt = b"\xa5" * region.n_bytes
    region.write(dirt)
    inner = region.n_bytes - 2 * page
    bench.driver.scrub([(region.base + page, inner)])
    expected = bytearray(dirt)
    expected[page:-page] = bytes(inner)
    bench.require(region.read() == expected, f"scrub of one span of {inner} bytes did something else")
    region.write(dirt)
    firsts = range(page, region.n_bytes, 2 * page)
    bench.driver.scrub([(region.base + first, page) for first in firsts])
    expected = bytearray(dirt)
    for first in firsts:
        expected[first : first + page] = bytes(page)
    bench.require(region.read() == expected, f"scrub of {len(firsts)} spans did something else")
    region.close()


def _large_copies_reach_their_end(bench: Bench) -> None:
    """copy: hundreds in one call, a megabyte and odd sizes arrive whole, and nothing beside them changes"""
    source, target = _Region.open(bench), _Region.open(bench)
    data, expected = random.Random(2).randbytes(source.n_bytes), bytearray(target.n_bytes)
    source.write(data)
    target.write(bytes(expected))
    copies, at = [], source.odd - source.base
    for n_bytes in (*range(1, MANY + 1), *ODD_SIZES):
        to = at + 5
        copies.append(Copy(source.base + at, target.base + to, n_bytes))
        expected[to : to + n_bytes] = data[at : at + n_bytes]
        at += n_bytes + 1
    bench.driver.copy(copies)
    bench.driver.fence().wait()
    found = target.read()
    for copy in copies:
        first = copy.target - target.base
        part = slice(first, first + copy.n_bytes)
        bench.require(found[part] == expected[part], f"a copy of {copy.n_bytes} bytes, one of {len(copies)} in a call")
    bench.require(found == expected, "copies wrote beside their targets")
    bench.require(source.read() == data, "copies changed their source")
    target.close()
    source.close()


@dataclass(frozen=True, slots=True)
class _Region:
    """Mapped pages in a row: as many as asked, and `REGION_BYTES` at least."""

    bench: Bench
    reservation: Reservation
    handles: Sequence[Handle]

    @classmethod
    def open(cls, bench: Bench, n_pages: int = 3) -> _Region:
        n = max(n_pages, ceil_div(REGION_BYTES, bench.page))
        reservation = bench.reserve(n)
        places = range(reservation.base, reservation.end, bench.page)
        handles = bench.create(places)
        _map_by_few(bench, places, handles)
        return cls(bench, reservation, handles)

    @property
    def base(self) -> int:
        return self.reservation.base

    @property
    def n_bytes(self) -> int:
        return self.reservation.n_bytes

    @property
    def odd(self) -> int:
        """An odd address just in front of a page's edge."""
        return self.base + self.bench.page - 333

    def read(self) -> bytes:
        return self.bench.memory.read(self.base, self.n_bytes)

    def write(self, data: bytes) -> None:
        self.bench.memory.write(self.base, data)

    def close(self) -> None:
        self.bench.driver.unmap([(self.base, self.n_bytes)])
        self.bench.driver.release(self.bench.page, self.handles)
        self.bench.free(self.reservation)


def _map_by_few(bench: Bench, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
    """Map pages in batches that are small enough for any driver."""
    for i in range(0, len(addresses), FEW):
        bench.map(addresses[i : i + FEW], handles[i : i + FEW])


def _require_marks(bench: Bench, addresses: Sequence[int], numbers: Sequence[int], what: str) -> None:
    for i, (address, number) in enumerate(zip(addresses, numbers, strict=True)):
        bench.require(bench.marks(address) == (number, number), f"page {i} {what}")


RULES: tuple[Rule, ...] = (
    _a_page_may_be_mapped_over_and_over,
    _a_large_batch_creates_every_page,
    _a_large_batch_maps_every_page,
    _an_unmap_reaches_every_span,
    _a_large_batch_releases_every_page,
    _large_host_copies_arrive,
    _large_scrubs_reach_the_end,
    _large_copies_reach_their_end,
)
"""Each leans on those before it: hundreds of pages are created where one was mapped hundreds of times, and mapped by
few; what scrub and copy did may be read through copies to the host."""
