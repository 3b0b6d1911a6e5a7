"""Rules of the driver contract about what is done with pages: filled, copied, given back; by whom, and until when.

Each function is one rule, its docstring says it; see `conformance.py`.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable

from vmem_kv.driver.base import Copy, Handle, Reservation
from vmem_kv.errors import UsageError, VmemError
from vmem_kv.testing.contract_bench import Bench, Rule

FENCE_TIMEOUT_S = 10.0
"""How long an idle device may take until a fence behind nothing has passed."""


def _scrub_zeroes_its_spans_only(bench: Bench) -> None:
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


def _copies_move_exactly_their_bytes(bench: Bench) -> None:
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


def _host_copies_arrive(bench: Bench) -> None:
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


def _pinned_host_memory_is_copied_like_any_other(bench: Bench) -> None:
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


def _a_failed_release_says_how_far_it_came(bench: Bench) -> None:
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


def _calls_are_counted(bench: Bench) -> None:
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


def _fences_pass(bench: Bench) -> None:
    """fence: passes on an idle device, answers at once, and stays passed"""
    fence = bench.driver.fence()
    deadline = time.monotonic() + FENCE_TIMEOUT_S
    while not fence.passed():
        bench.require(time.monotonic() < deadline, f"a fence behind nothing did not pass in {FENCE_TIMEOUT_S} s")
    bench.require(fence.passed(), "a fence went back")


def _any_thread_may_call(bench: Bench) -> None:
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


def _close_refuses_while_reservations_are_left(bench: Bench) -> None:
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


def _close_is_idempotent_and_final(bench: Bench) -> None:
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


RULES: tuple[Rule, ...] = (
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
"""The last one closes its driver."""
