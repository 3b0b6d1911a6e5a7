"""The driver contract, executed: one function that any driver must pass.

Every rule of `driver/base.py` that can be observed from outside is one function below, its docstring is the rule,
and it works on a driver of its own. `check_driver` runs all of them and raises `ContractBreach` at the first that
does not hold, with the rule in the message:

    check_driver(HostDriver)

Assumptions: the device has memory for 16 pages of twice the granularity; nobody else uses the driver meanwhile.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vmem_kv.driver.base import Copy, Driver, Handle, Reservation, Span
from vmem_kv.errors import OutOfAddressSpace, UsageError, VmemError
from vmem_kv.testing.memory import DriverMemory, Memory

FENCE_TIMEOUT_S = 10.0
"""How long an idle device may take until a fence behind nothing has passed."""


class ContractBreach(AssertionError):
    """A driver does not do what the contract says."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `check_driver` looked at."""

    driver: str
    rules: tuple[str, ...]
    n_checks: int


@dataclass(slots=True)
class _Bench:
    """A driver under test with what every rule needs."""

    driver: Driver
    memory: Memory
    n_checks: int = 0
    reservations: list[Reservation] = field(default_factory=list)

    @property
    def page(self) -> int:
        return self.driver.info.granularity_bytes

    def require(self, condition: bool, what: str) -> None:
        self.n_checks += 1
        if not condition:
            raise ContractBreach(what)

    def refuses(self, call: Callable[[], object], kinds: type[VmemError], what: str) -> VmemError:
        """Require that a call raises the given error; return it."""
        self.n_checks += 1
        try:
            call()
        except kinds as error:
            return error
        raise ContractBreach(what)

    def reserve(self, n_pages: int) -> Reservation:
        reservation = self.driver.reserve(n_pages * self.page)
        self.reservations.append(reservation)
        return reservation

    def free(self, reservation: Reservation) -> None:
        self.driver.free_reservation(reservation)
        self.reservations.remove(reservation)

    def create(self, places: Sequence[int], page_bytes: int | None = None) -> list[Handle]:
        handles: list[Handle] = []
        self.driver.create(page_bytes or self.page, places, handles)
        return handles

    def map(self, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        self.driver.map(self.page, addresses, handles)
        self.driver.set_access([(address, self.page) for address in addresses])

    def blank(self, spans: Sequence[Span]) -> None:
        """Zero new pages, if the driver does not."""
        if not self.driver.info.zeroes_new_pages:
            self.driver.scrub(spans)

    def unmap(self, addresses: Sequence[int]) -> None:
        self.driver.unmap([(address, self.page) for address in addresses])

    def tag(self, address: int, text: str) -> None:
        """Write a text at the first and the last bytes of a page."""
        self.memory.write(address, text.encode())
        self.memory.write(address + self.page - len(text), text.encode())

    def has_tag(self, address: int, text: str) -> bool:
        data = self.memory.read(address, self.page)
        return data.startswith(text.encode()) and data.endswith(text.encode())

    def is_zero(self, address: int, n_bytes: int | None = None) -> bool:
        return not any(self.memory.read(address, n_bytes or self.page))


def _info_is_plausible(bench: _Bench) -> None:
    """info: sizes and limits are positive, and the granularity is a power of two"""
    info = bench.driver.info
    bench.require(info.granularity_bytes > 0, "granularity_bytes is not positive")
    bench.require(info.granularity_bytes & (info.granularity_bytes - 1) == 0, "granularity_bytes is no power of two")
    for name in ("max_mappings", "mappings_per_run", "memory_bytes", "max_reservation_bytes"):
        bench.require(getattr(info, name) > 0, f"{name} is not positive")
    bench.require(bool(info.name and info.device and info.path), "name, device or path is empty")


def _reservations_are_aligned_exact_and_disjoint(bench: _Bench) -> None:
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


def _require_disjoint(bench: _Bench, ranges: Sequence[Reservation]) -> None:
    ordered = sorted(ranges, key=lambda r: r.base)
    for before, behind in itertools.pairwise(ordered):
        bench.require(before.end <= behind.base, f"{before} and {behind} overlap")


def _an_impossible_reservation_is_a_capacity_error(bench: _Bench) -> None:
    """reserve: a range that cannot exist raises OutOfAddressSpace and changes nothing"""
    bench.refuses(lambda: bench.driver.reserve(1 << 60), OutOfAddressSpace, "reserving 2^60 bytes did not fail so")
    bench.free(bench.reserve(1))


def _reservations_are_freed_exactly_once(bench: _Bench) -> None:
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


def _create_appends_distinct_handles(bench: _Bench) -> None:
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


def _created_pages_are_zero(bench: _Bench) -> None:
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


def _places_are_hints(bench: _Bench) -> None:
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


def _places_of_a_freed_reservation_may_return(bench: _Bench) -> None:
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


def _a_batch_maps_disjoint_runs(bench: _Bench) -> None:
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


def _larger_pages_work(bench: _Bench) -> None:
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


def _aliases_share_memory(bench: _Bench) -> None:
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


def _content_survives_unmapping(bench: _Bench) -> None:
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


def _unmap_leaves_the_rest(bench: _Bench) -> None:
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


def _scrub_zeroes_its_spans_only(bench: _Bench) -> None:
    """scrub: fills its spans with zeros and nothing else"""
    reservation = bench.reserve(6)
    places = [reservation.base + i * bench.page for i in range(6)]
    handles = bench.create(places)
    bench.map(places, handles)
    for place in places:
        bench.memory.write(place, b"\xa5" * bench.page)
    bench.driver.scrub([(places[1], 2 * bench.page), (places[4], bench.page)])
    for i in (1, 2, 4):
        bench.require(bench.is_zero(places[i]), f"page {i} was not scrubbed")
    for i in (0, 3, 5):
        data = bench.memory.read(places[i], bench.page)
        bench.require(data == b"\xa5" * bench.page, f"scrubbing others changed page {i}")
    bench.driver.unmap([(places[0], 6 * bench.page)])
    bench.driver.release(bench.page, handles)
    bench.free(reservation)


def _copies_move_exactly_their_bytes(bench: _Bench) -> None:
    """copy: moves bytes between any accessible ranges, also across pages and runs, and nothing beside them"""
    reservation = bench.reserve(8)
    page = bench.page
    places = [reservation.base + i * page for i in (0, 1, 4, 5)]
    handles = bench.create(places)
    bench.map(places, handles)
    bench.driver.scrub([(place, page) for place in places])
    data = bytes(range(1, 200))
    source, target = places[1] - 100, places[3] - 50  # both over a page's edge
    bench.memory.write(source, data)
    bench.driver.copy([Copy(source, target, len(data)), Copy(source + 1, places[2], 1)])
    bench.driver.fence().wait()
    bench.require(bench.memory.read(target, len(data)) == data, "copied bytes differ")
    bench.require(bench.memory.read(places[2], 2) == data[1:2] + b"\0", "the second copy is wrong or too long")
    around = bench.memory.read(target - 1, 1) + bench.memory.read(target + len(data), 1)
    bench.require(around == b"\0\0", "a copy wrote beside its target")
    bench.require(bench.memory.read(source, len(data)) == data, "a copy changed its source")
    bench.unmap(places)
    bench.driver.release(page, handles)
    bench.free(reservation)


def _host_copies_arrive(bench: _Bench) -> None:
    """copy_from_host, copy_to_host: bytes have arrived when the fence has passed, and nothing beside them changed"""
    reservation = bench.reserve(2)
    page = bench.page
    places = [reservation.base, reservation.base + page]
    handles = bench.create(places)
    bench.map(places, handles)
    bench.driver.scrub([(reservation.base, 2 * page)])
    data, target = bytes(range(256)), places[1] - 100
    bench.driver.copy_from_host(memoryview(data), target).wait()
    bench.require(bench.memory.read(target, 256) == data, "copy_from_host wrote something else")
    bench.require(not any(bench.memory.read(target - 8, 8)), "copy_from_host wrote in front of its target")
    buffer = bytearray(b"#" * 300)
    bench.driver.copy_to_host(target, memoryview(buffer)[20:276]).wait()
    bench.require(bytes(buffer) == b"#" * 20 + data + b"#" * 24, "copy_to_host read something else, or wrote too much")
    bench.unmap(places)
    bench.driver.release(page, handles)
    bench.free(reservation)


def _pinned_host_memory_is_copied_like_any_other(bench: _Bench) -> None:
    """pin, unpin: copies to and from pinned host memory arrive, also beside it, and it may be pinned anew"""
    reservation = bench.reserve(1)
    handles = bench.create([reservation.base])
    bench.map([reservation.base], handles)
    host = memoryview(mmap.mmap(-1, 4 * mmap.PAGESIZE))  # goes with the last view of it
    start = ctypes.addressof(ctypes.c_char.from_buffer(host))
    inside, outside = host[mmap.PAGESIZE + 7 :][:100], host[3 * mmap.PAGESIZE :][:100]
    for round_number in range(2):
        bench.driver.pin(start + mmap.PAGESIZE, 2 * mmap.PAGESIZE)
        for part in (inside, outside):
            data = bytes([round_number + 1]) * len(part)
            bench.memory.write(reservation.base, data)
            bench.driver.copy_to_host(reservation.base, part).wait()
            bench.require(bytes(part) == data, "copy_to_host into a pinned range, or beside one")
            part[:] = bytes(reversed(range(100)))
            bench.driver.copy_from_host(part, reservation.base).wait()
            found = bench.memory.read(reservation.base, len(part))
            bench.require(found == bytes(part), "copy_from_host out of a pinned range, or beside one")
        bench.driver.unpin(start + mmap.PAGESIZE)
    bench.unmap([reservation.base])
    bench.driver.release(bench.page, handles)
    bench.free(reservation)


def _a_failed_release_says_how_far_it_came(bench: _Bench) -> None:
    """release: after a failure n_done handles are gone and the others can still be released"""
    reservation = bench.reserve(4)
    gone, first, second = bench.create([reservation.base + i * bench.page for i in range(3)])
    bench.driver.release(bench.page, [gone])
    error = bench.refuses(
        lambda: bench.driver.release(bench.page, [first, gone, second]), VmemError, "a handle was released twice"
    )
    bench.require(error.n_done in (0, 1), f"n_done is {error.n_done}, but item 1 is the bad one")
    left = [first, second][error.n_done :]
    bench.driver.release(bench.page, left)
    for handle in (first, second):
        bench.refuses(
            lambda handle=handle: bench.driver.release(bench.page, [handle]),  # type: ignore[misc]
            VmemError,
            "n_done of a failed release was wrong",
        )
    bench.free(reservation)


def _calls_are_counted(bench: _Bench) -> None:
    """calls: every operation counts once per call, however many items it has"""
    before = dict(bench.driver.calls)
    reservation = bench.reserve(4)
    places = [reservation.base + i * bench.page for i in range(4)]
    handles = bench.create(places)
    bench.driver.map(bench.page, places, handles)
    bench.driver.set_access([(places[0], 4 * bench.page)])
    bench.driver.scrub([(places[0], 2 * bench.page), (places[3], bench.page)])
    bench.driver.unmap([(places[0], bench.page), (places[1], 3 * bench.page)])
    bench.driver.release(bench.page, handles)
    bench.free(reservation)
    for name in ("reserve", "create", "map", "set_access", "scrub", "unmap", "release", "free_reservation"):
        n_calls = bench.driver.calls[name] - before.get(name, 0)
        bench.require(n_calls == 1, f"one call of {name} counted as {n_calls}")


def _fences_pass(bench: _Bench) -> None:
    """fence: passes on an idle device, answers at once, and stays passed"""
    fence = bench.driver.fence()
    deadline = time.monotonic() + FENCE_TIMEOUT_S
    while not fence.passed():
        bench.require(time.monotonic() < deadline, f"a fence behind nothing did not pass in {FENCE_TIMEOUT_S} s")
    bench.require(fence.passed(), "a fence went back")


def _any_thread_may_call(bench: _Bench) -> None:
    """threads: another thread that called bind_thread may do everything, and both see the same memory"""
    reservation = bench.reserve(2)
    errors: list[BaseException] = []
    handles: list[Handle] = []

    def work() -> None:
        try:
            bench.driver.bind_thread()
            handles.extend(bench.create([reservation.base]))
            bench.map([reservation.base], handles)
            bench.tag(reservation.base, "other thread")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    bench.require(not errors, f"calls from another thread failed: {errors}")
    bench.require(bench.has_tag(reservation.base, "other thread"), "another thread's write is not seen")
    bench.unmap([reservation.base])
    bench.driver.release(bench.page, handles)
    bench.free(reservation)


def _close_refuses_while_reservations_are_left(bench: _Bench) -> None:
    """close: refuses with UsageError while reservations are left, and changes nothing then"""
    reservation = bench.reserve(2)
    bench.refuses(bench.driver.close, UsageError, "close did not refuse with a reservation left")
    handles = bench.create([reservation.base])
    bench.map([reservation.base], handles)
    bench.tag(reservation.base, "alive")
    bench.require(bench.has_tag(reservation.base, "alive"), "the refused close broke the driver")
    bench.unmap([reservation.base])
    bench.driver.release(bench.page, handles)
    bench.free(reservation)


def _close_is_idempotent_and_final(bench: _Bench) -> None:
    """close: may be called twice; nothing else works after it"""
    bench.driver.close()
    bench.driver.close()
    driver, page = bench.driver, bench.page
    calls: dict[str, Callable[[], object]] = {
        "reserve": lambda: driver.reserve(page),
        "free_reservation": lambda: driver.free_reservation(Reservation(page, page)),
        "create": lambda: driver.create(page, [page], []),
        "map": lambda: driver.map(page, [page], [Handle(page)]),
        "set_access": lambda: driver.set_access([(page, page)]),
        "scrub": lambda: driver.scrub([(page, page)]),
        "unmap": lambda: driver.unmap([(page, page)]),
        "release": lambda: driver.release(page, [Handle(page)]),
        "copy": lambda: driver.copy([Copy(page, 2 * page, 1)]),
        "copy_to_host": lambda: driver.copy_to_host(page, memoryview(bytearray(1))),
        "copy_from_host": lambda: driver.copy_from_host(memoryview(b"a"), page),
        "pin": lambda: driver.pin(page, page),
        "unpin": lambda: driver.unpin(page),
    }
    for name, call in calls.items():
        bench.refuses(call, VmemError, f"{name} worked on a closed driver")


_RULES: tuple[Callable[[_Bench], None], ...] = (
    _info_is_plausible,
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
    _scrub_zeroes_its_spans_only,
    _copies_move_exactly_their_bytes,
    _host_copies_arrive,
    _pinned_host_memory_is_copied_like_any_other,
    _a_failed_release_says_how_far_it_came,
    _calls_are_counted,
    _fences_pass,
    _any_thread_may_call,
    _close_refuses_while_reservations_are_left,
    _close_is_idempotent_and_final,
)


def check_driver(open_driver: Callable[[], Driver], open_memory: Callable[[Driver], Memory] = DriverMemory) -> Report:
    """Hold a driver against every rule of the contract.

    Args:
        open_driver: Opens a new driver; called once per rule.
        open_memory: Returns what reads and writes a driver's memory; by default the driver's own copies to and from
            the host.

    Returns:
        What was checked.

    Raises:
        ContractBreach: A rule does not hold; the message begins with the rule. Drivers opened so far may be left open.
    """
    n_checks, name = 0, ""
    for rule in _RULES:
        text = _text(rule)
        driver = open_driver()
        bench = _Bench(driver, open_memory(driver))
        name = f"{type(driver).__name__} ({driver.info.name}, {driver.info.path})"
        try:
            rule(bench)
            driver.close()
        except ContractBreach as breach:
            raise ContractBreach(f"{name} breaks a rule. {text}: {breach}") from None
        except VmemError as error:
            raise ContractBreach(f"{name} breaks a rule. {text}: unexpected {type(error).__name__}: {error}") from error
        n_checks += bench.n_checks
    return Report(name, tuple(map(_text, _RULES)), n_checks)


def _text(rule: Callable[[_Bench], None]) -> str:
    return (rule.__doc__ or rule.__name__).strip().rstrip(".")
