"""Rules of the driver contract about where pages lie: what is reserved, created, mapped and unmapped.

Each function is one rule, its docstring says it; see `conformance.py`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from vmem_kv.driver.base import Reservation
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import OutOfAddressSpace, VmemError
from vmem_kv.testing.contract_bench import Bench, CountsMemory, Rule


def _info_is_plausible(bench: Bench) -> None:
    """info: sizes and limits are positive, and the granularity is a power of two"""
    info = bench.driver.info
    bench.require(info.granularity_bytes > 0, "granularity_bytes is not positive")
    bench.require(info.granularity_bytes & (info.granularity_bytes - 1) == 0, "granularity_bytes is no power of two")
    for name in ("max_mappings", "mappings_per_run", "memory_bytes", "max_reservation_bytes"):
        bench.require(getattr(info, name) > 0, f"{name} is not positive")
    bench.require(bool(info.name and info.device and info.path), "name, device or path is empty")


def _what_it_says_of_memory_has_the_right_types(bench: Bench) -> None:
    """ledger, calls, available_bytes: are there, a Ledger and counts that are not negative"""
    driver = bench.driver
    ledger, calls = getattr(driver, "ledger", None), getattr(driver, "calls", None)
    bench.require(isinstance(ledger, Ledger), f"ledger is {ledger!r}, not a vmem_kv.driver.ledger.Ledger")
    bench.require(isinstance(calls, Counter), f"calls is {calls!r}, not a collections.Counter")
    bench.available()
    if isinstance(driver, CountsMemory):
        n_bytes = driver.physical_bytes()
        bench.require(type(n_bytes) is int and n_bytes >= 0, f"physical_bytes() is {n_bytes!r}, no number of bytes")


def _reservations_are_aligned_exact_and_disjoint(bench: Bench) -> None:
    """reserve: ranges are aligned to the granularity, as long as asked, and never overlap"""
    ranges = [bench.reserve(n_pages) for n_pages in (1, 3, 8, 1, 64)]
    for reservation, n_pages in zip(ranges, (1, 3, 8, 1, 64), strict=True):
        bench.require(reservation.base > 0 and reservation.base % bench.page == 0, f"{reservation} is not aligned")
        bench.require(reservation.n_bytes == n_pages * bench.page, f"{reservation} is not {n_pages} pages long")
        bench.require(reservation.end == reservation.base + reservation.n_bytes, f"{reservation} ends elsewhere")
    _require_disjoint(bench, ranges)
    bench.free(ranges.pop(1))
    ranges += [bench.reserve(2), bench.reserve(5)]
    _require_disjoint(bench, ranges)
    for reservation in ranges:
        bench.free(reservation)


def _require_disjoint(bench: Bench, ranges: Sequence[Reservation]) -> None:
    ordered = sorted(ranges, key=lambda r: r.base)
    for before, behind in itertools.pairwise(ordered):
        bench.require(before.end <= behind.base, f"{before} and {behind} overlap")


def _an_impossible_reservation_is_a_capacity_error(bench: Bench) -> None:
    """reserve: a range that cannot exist raises OutOfAddressSpace and changes nothing"""
    bench.refuses(lambda: bench.driver.reserve(1 << 60), OutOfAddressSpace, "reserving 2^60 bytes did not fail so")
    bench.free(bench.reserve(1))


def _reservations_are_freed_exactly_once(bench: Bench) -> None:
    """free_reservation: takes back exactly what reserve returned, once"""
    reservation = bench.reserve(4)
    half = Reservation(reservation.base, 2 * bench.page)
    bench.refuses(lambda: bench.driver.free_reservation(half), VmemError, "half of a reservation was freed")
    handles = bench.create([reservation.base])
    bench.map([reservation.base], handles)  # the refusal left all of it in place
    bench.unmap([reservation.base])
    bench.driver.release(bench.page, handles)
    bench.free(reservation)
    bench.refuses(lambda: bench.driver.free_reservation(reservation), VmemError, "a reservation was freed twice")


def _create_appends_distinct_handles(bench: Bench) -> None:
    """create: appends one new handle per place, in order, behind what the list holds"""
    reservation = bench.reserve(8)
    places = [reservation.base + i * bench.page for i in range(8)]
    created = bench.create(places[:3])
    first = list(created)
    bench.driver.create(bench.page, places[3:], created)
    bench.require(len(created) == 8, f"{len(created)} handles for 8 places")
    bench.require(created[:3] == first, "create changed what the list held")
    bench.require(len(set(created)) == 8, "create returned a handle twice")
    bench.driver.release(bench.page, created)
    bench.free(reservation)


def _created_pages_are_zero(bench: Bench) -> None:
    """create: pages are filled with zeros if the driver says so, also where older pages were released"""
    says_so = bench.driver.info.zeroes_new_pages
    reservation = bench.reserve(4)
    places = [reservation.base + i * bench.page for i in range(4)]
    for _ in range(3):
        handles = bench.create(places)
        bench.map(places, handles)
        for i, place in enumerate(places):
            bench.require(bench.is_zero(place) or not says_so, f"page {i} is not zero")
            bench.memory.write(place, b"\xa5" * bench.page)
        bench.unmap(places)
        bench.driver.release(bench.page, handles)
    bench.free(reservation)


def _places_are_hints(bench: Bench) -> None:
    """create: a page may be mapped anywhere, also if its place is taken by another page"""
    reservation = bench.reserve(6)
    base, page = reservation.base, bench.page
    twice = [*bench.create([base, base + page]), *bench.create([base, base + page])]
    bench.require(len(set(twice)) == 4, "two pages created for one place have the same handle")
    addresses = [base + i * page for i in (5, 2, 0, 3)]
    bench.map(addresses, twice)
    for i, address in enumerate(addresses):
        bench.tag(address, f"page {i}")
    for i, address in enumerate(addresses):
        bench.require(bench.has_tag(address, f"page {i}"), f"page {i} shares memory with another page")
    bench.unmap(addresses)
    bench.driver.release(page, twice)
    bench.free(reservation)


def _places_of_a_freed_reservation_may_return(bench: Bench) -> None:
    """create: pages that outlive their reservation keep their bytes when the addresses are reserved and used again"""
    page = bench.page
    first = bench.reserve(16)
    kept = bench.create([first.base + i * 2 * page for i in range(4)], 2 * page)
    bench.free(first)
    second = bench.reserve(16)  # likely over the same addresses, with places between the old ones
    places = [second.base + i * page for i in range(8)]
    new = bench.create(places)
    spots = [second.base + 8 * page + i * 2 * page for i in range(4)]
    bench.driver.map(2 * page, spots, kept)
    bench.driver.set_access([(spots[0], 8 * page)])
    bench.map(places, new)
    bench.blank([(place, page) for place in places])
    for i, spot in enumerate(spots):
        bench.memory.write(spot, f"kept {i}".encode() * (2 * page // 6))
    for place in places:
        bench.require(bench.is_zero(place), "a new page shows the bytes of a page that outlived its reservation")
        bench.tag(place, "new")
    for i, spot in enumerate(spots):
        data = bench.memory.read(spot, 2 * page)
        bench.require(data.startswith(f"kept {i}".encode() * (2 * page // 6)), "a new page overwrote an older one")
    bench.driver.unmap([(spots[0], 8 * page)])
    bench.unmap(places)
    bench.driver.release(2 * page, kept)
    bench.driver.release(page, new)
    bench.free(second)


def _a_batch_maps_disjoint_runs(bench: Bench) -> None:
    """map: one batch may fill several runs in any order, and each address shows its own handle"""
    reservation = bench.reserve(16)
    order = [9, 10, 11, 2, 3, 15, 0, 6]
    addresses = [reservation.base + i * bench.page for i in order]
    handles = bench.create(addresses)
    bench.driver.map(bench.page, addresses, handles)
    runs = [(9, 3), (2, 2), (15, 1), (0, 1), (6, 1)]
    bench.driver.set_access([(reservation.base + i * bench.page, n * bench.page) for i, n in runs])
    for i, address in zip(order, addresses, strict=True):
        bench.tag(address, f"page {i}")
    for i, address in zip(order, addresses, strict=True):
        bench.require(bench.has_tag(address, f"page {i}"), f"page {i} holds the bytes of another one")
    bench.driver.unmap([(reservation.base + i * bench.page, n * bench.page) for i, n in runs])
    for i, handle in zip(order, handles, strict=True):
        bench.map([reservation.base], [handle])
        bench.require(bench.has_tag(reservation.base, f"page {i}"), f"the batch did not map handle {i} at address {i}")
        bench.unmap([reservation.base])
    bench.driver.release(bench.page, handles)
    bench.free(reservation)


def _larger_pages_work(bench: Bench) -> None:
    """map: a page may be any multiple of the granularity"""
    reservation = bench.reserve(12)
    page_bytes = 3 * bench.page
    places = [reservation.base + i * page_bytes for i in (0, 1, 3)]
    handles = bench.create(places, page_bytes)
    bench.driver.map(page_bytes, places, handles)
    bench.driver.set_access([(places[0], 2 * page_bytes), (places[2], page_bytes)])
    bench.blank([(place, page_bytes) for place in places])
    for place in places:
        bench.require(bench.is_zero(place, page_bytes), "a large page is not zero")
        bench.memory.write(place + page_bytes - 4, b"last")
    for place in places:
        bench.require(bench.memory.read(place + page_bytes - 4, 4) == b"last", "a large page lost its last bytes")
    bench.driver.unmap([(places[0], 2 * page_bytes), (places[2], page_bytes)])
    bench.driver.release(page_bytes, handles)
    bench.free(reservation)


def _aliases_share_memory(bench: Bench) -> None:
    """map: a handle mapped at several addresses is one memory, and survives the unmap of one alias"""
    reservation = bench.reserve(8)
    here, there = reservation.base, reservation.base + 5 * bench.page
    handles = bench.create([here])
    bench.map([here], handles)
    bench.tag(here, "first")
    bench.map([there], handles)
    bench.require(bench.has_tag(there, "first"), "an alias does not show what was written before")
    bench.tag(there, "second")
    bench.require(bench.has_tag(here, "second"), "a write through an alias is not seen at the other address")
    bench.unmap([here])
    bench.require(bench.has_tag(there, "second"), "unmapping one alias changed the other")
    bench.unmap([there])
    bench.driver.release(bench.page, handles)
    bench.free(reservation)


def _content_survives_unmapping(bench: Bench) -> None:
    """unmap: a page keeps its bytes until it is released, wherever it is mapped next"""
    reservation = bench.reserve(8)
    places = [reservation.base + i * bench.page for i in range(4)]
    handles = bench.create(places)
    bench.map(places, handles)
    for i, place in enumerate(places):
        bench.tag(place, f"page {i}")
    bench.driver.unmap([(places[0], 4 * bench.page)])
    moved = [reservation.base + i * bench.page for i in (7, 6, 5, 4)]
    bench.map(moved, handles)
    for i, address in enumerate(moved):
        bench.require(bench.has_tag(address, f"page {i}"), f"page {i} lost its bytes on the way")
    bench.unmap(moved)
    bench.map(places, handles)
    for i, place in enumerate(places):
        bench.require(bench.has_tag(place, f"page {i}"), f"page {i} lost its bytes on the way back")
    bench.unmap(places)
    bench.driver.release(bench.page, handles)
    bench.free(reservation)


def _unmap_leaves_the_rest(bench: Bench) -> None:
    """unmap: spans of whole pages go, in any order, their neighbours stay, and the gap can be mapped again"""
    reservation = bench.reserve(8)
    places = [reservation.base + i * bench.page for i in range(8)]
    handles = bench.create(places)
    bench.map(places, handles)
    for i, place in enumerate(places):
        bench.tag(place, f"page {i}")
    bench.driver.unmap([(places[5], 2 * bench.page), (places[1], bench.page)])
    for i in (0, 2, 3, 4, 7):
        bench.require(bench.has_tag(places[i], f"page {i}"), f"unmapping its neighbours changed page {i}")
    bench.map([places[1], places[5], places[6]], [handles[6], handles[1], handles[5]])
    for i, tag in ((1, "page 6"), (5, "page 1"), (6, "page 5"), (4, "page 4"), (7, "page 7")):
        bench.require(bench.has_tag(places[i], tag), f"address {i} does not show {tag} after remapping")
    bench.driver.unmap([(places[0], 8 * bench.page)])
    bench.driver.release(bench.page, handles)
    bench.free(reservation)


RULES: tuple[Rule, ...] = (
    _info_is_plausible,
    _what_it_says_of_memory_has_the_right_types,
    _reservations_are_aligned_exact_and_disjoint,
    _an_impossible_reservation_is_a_capacity_error,
    _reservations_are_freed_exactly_once,
    _create_appends_distinct_handles,
    _created_pages_are_zero,
    _places_are_hints,
    _places_of_a_freed_reservation_may_return,
    _aliases_share_memory,
    _a_batch_maps_disjoint_runs,
    _larger_pages_work,
    _content_survives_unmapping,
    _unmap_leaves_the_rest,
)
"""In the order of a page's life."""
