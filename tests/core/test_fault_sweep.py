"""Fail every driver call of a cache's whole life: once, from then on, and again while the first failure is undone.

The scenario below uses everything a cache can do. It runs once without faults to count the injection points; then
once per point and plan. After each failure: a typed error, books that add up, live sequences with all their bytes,
nothing changed where that is promised; then the same call again, which must work, and at the end nothing is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver, Fence
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.errors import CapacityError, DriverError, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.testing import (
    FaultyDriver,
    HostMemory,
    ManualFence,
    Plan,
    Point,
    driver_error,
    fail_any,
    fail_from,
    fail_once,
    interruption,
    natural_error,
    no_faults,
)

from ..held import Held
from .backends import open_backend, physical_bytes
from .bench import PAGE, Bench, books, make_layout

T = TypeVar("T")

N_SLOTS, MAX_TOKENS = 5, 36


def next_after(n: int, operation: str) -> Plan:
    """Fail the first point of `operation` behind point `n`."""
    hit: list[int] = []

    def plan(point: Point) -> BaseException | None:
        if point.n > n and point.operation == operation and not hit:
            hit.append(point.n)
            return driver_error()(point)
        return None

    return plan


PLANS: dict[str, Callable[[int], Plan]] = {
    "once": lambda n: fail_once(n, natural_error),
    "once with a driver error": lambda n: fail_once(n, driver_error()),
    "from then on": lambda n: fail_from(n, driver_error()),
    "interrupted": lambda n: fail_once(n, interruption),
    "interrupted, and the next unmap": lambda n: fail_any(fail_once(n, interruption), next_after(n, "unmap")),
    "and the next unmap": lambda n: fail_any(fail_once(n, driver_error()), next_after(n, "unmap")),
    "and the next release": lambda n: fail_any(fail_once(n, driver_error()), next_after(n, "release")),
}


class Life(Bench):
    """One cache from open to close. Each sequence has a byte of its own, and a domain of its own."""

    def __init__(self, device: Driver, kind: str, *, keep_freed: bool) -> None:
        self.device = device
        self.faulty = FaultyDriver(device)
        self.driver = CheckedDriver(self.faulty)
        self.layout = make_layout(kind, n_slots=N_SLOTS, max_tokens=MAX_TOKENS)
        self.keep_freed = keep_freed
        self.memory = HostMemory()
        self.fills: dict[SlotId, tuple[int, int]] = {}  # slot -> (byte, first token still there)
        self.is_open = False
        self.n_failed_calls = 0
        self.n_fills = 0

    def run(self, plan: Plan) -> None:
        """Live, with faults."""
        self.faulty.plan = plan
        self.pool = PagePool(self.driver, PAGE, 400, keep_freed=self.keep_freed)
        self.attempt(self.open)
        a = self.attempt(self.acquire)
        (a,) = self.grow_all({a: 12})
        b = self.attempt(self.acquire)
        a, b = self.grow_all({a: 14, b: 3})  # several slots, several planes, in one plan
        for n_tokens in (15, 24, MAX_TOKENS):
            (a,) = self.grow_all({a: n_tokens})
        self.attempt(lambda: self.cache.premap({b: 20}))
        if a in self.fills:
            self.slide(a, 20, fence := ManualFence())
            fence.pass_()
        self.attempt(lambda: self.cache.reclaim(0))
        self.retire([a], fence := ManualFence())
        fence.pass_()
        self.attempt(lambda: self.retire([b]))
        c, d = self.attempt(lambda: self.acquire_two())  # adopts what is warm: one was slid, one must be scrubbed
        c, d = self.grow_all({c: 10, d: 30})
        self.attempt(lambda: self.retire([c]))
        self.attempt(lambda: self.pool.trim())
        self.attempt(lambda: self.pool.resize(max(1, self.pool.n_owned)))
        e = self.attempt(lambda: self.acquire(expected_tokens=0))
        self.attempt(lambda: self.pool.resize(max(1, self.pool.n_owned)))
        e, d = self.grow_all({e: 5, d: 31})  # must reclaim what c left
        self.attempt(lambda: self.pool.resize(400))
        self.attempt(lambda: self.cache.reclaim(1000))
        self.attempt(lambda: self.retire([d, e]))
        self.attempt(lambda: self.pool.resize(max(1, self.pool.n_quarantined)))
        self.attempt(lambda: self.pool.resize(400))
        f = self.attempt(self.acquire)
        self.grow_all({f: 20})
        self.attempt(lambda: self.retire(self.cache.active_slots()))
        self.attempt(self.cache.close)
        self.is_open = False
        self.attempt(self.pool.trim)

    def open(self) -> None:
        self.cache = KVCache(self.pool, self.layout)
        self.is_open = True

    def acquire(self, expected_tokens: int | None = None) -> SlotId:
        slot_id = self.kept(lambda: self.cache.acquire(expected_tokens=expected_tokens, domain=str(self.n_fills)))
        self.new_fill(slot_id)
        return slot_id

    def acquire_two(self) -> tuple[SlotId, SlotId]:
        first, second = self.kept(lambda: self.cache.acquire_adjacent(2, domain=str(self.n_fills)))
        self.new_fill(first)
        self.new_fill(second)
        return first, second

    def new_fill(self, slot_id: SlotId) -> None:
        self.n_fills += 1
        self.fills[slot_id] = (self.n_fills, 0)

    def grow(self, lengths: dict[SlotId, int]) -> None:
        """Grow; every new token's bytes must be zero: they are somebody's first."""
        self.kept(lambda: self.cache.ensure(lengths))
        for slot_id, n_tokens in lengths.items():
            fill, first = self.fills[slot_id]
            for plane_index in range(len(self.layout.planes)):
                for token in range(first, n_tokens):
                    row = self.row(slot_id, plane_index, token)
                    assert set(row) <= {0, fill}, f"slot {slot_id} shows the bytes of sequence {max(row)}"
                    self.write_row(slot_id, plane_index, token, bytes([fill]))

    def grow_all(self, lengths: dict[SlotId, int]) -> list[SlotId]:
        """Grow; a sequence whose slot broke moves to another slot, as its owner would do. Returns the slots."""
        slots = list(lengths)

        def call() -> None:
            for i, slot_id in enumerate(slots):
                if slot_id in self.cache.region.broken or slot_id not in self.fills:
                    self.retire([slot_id])
                    slots[i] = self.acquire()
            try:
                self.grow(dict(zip(slots, lengths.values(), strict=True)))
            except CapacityError:
                if self.faulty.plan is not no_faults or not self.pool.n_quarantined:
                    raise
                # Lost pages count against the budget: make up for them, as an operator could.
                self.pool.resize(self.pool.max_pages + self.pool.n_quarantined)
                self.grow(dict(zip(slots, lengths.values(), strict=True)))

        self.attempt(call)
        return slots

    def slide(self, slot_id: SlotId, first_token: int, fence: Fence) -> None:
        self.fills[slot_id] = (self.fills[slot_id][0], first_token)
        self.cache.slide(slot_id, first_token, fence)

    def retire(self, slots: list[SlotId], fence: Fence | None = None) -> None:
        slots = [slot_id for slot_id in slots if slot_id in self.fills]
        try:
            self.cache.retire(slots, fence)
        finally:
            active = self.cache.active_slots()
            for slot_id in slots:
                if slot_id not in active:
                    del self.fills[slot_id]

    def attempt(self, call: Callable[[], T]) -> T:
        """Call; after a failure look at everything, stop the faults and call again."""
        try:
            return call()
        except (CapacityError, DriverError, KeyboardInterrupt):
            self.n_failed_calls += 1
            self.look()
            self.faulty.plan = no_faults
        result = call()
        self.look()
        return result

    def kept(self, call: Callable[[], T]) -> T:
        """Call; a failure must leave all sequences alone and, unless it gave memory back, everything else too."""
        before, active_before = books(self.cache), active_part(self.cache)
        n_faults = len(self.faulty.faults)
        try:
            return call()
        except (VmemError, KeyboardInterrupt):
            after = books(self.cache)
            assert active_part(self.cache) == active_before
            gave_back = {"unmap", "release"} & {point.operation for point in self.faulty.faults[n_faults:]}
            if not gave_back and after["warm"] == before["warm"]:
                assert after == before
            raise

    def look(self) -> None:
        """The books add up, by themselves and against the driver's, and every live token is there."""
        if not self.is_open:
            return
        self.check()
        for slot_id, (fill, first) in self.fills.items():
            for plane_index in range(len(self.layout.planes)):
                for token in range(first, self.cache.n_tokens(slot_id)):
                    assert set(self.row(slot_id, plane_index, token)) <= {fill, 0}
                if first < self.cache.n_tokens(slot_id):
                    assert set(self.row(slot_id, plane_index, first)) == {fill}


def active_part(cache: KVCache) -> dict[str, object]:
    """What no failing call may change: all about the slots that belong to sequences."""
    now = books(cache)
    active = sorted(now["lengths"])
    part = {
        name: {slot_id: now[name].get(slot_id) for slot_id in active}
        for name in ("lengths", "capacities", "first_tokens", "mapped", "handles", "domains")
    }
    return part | {"budget": now["budget"], "active": active}


def give_up_lost_pages(life: Life) -> None:
    """Release pages whose release failed, past the pool, so that the next life starts on a clean driver."""
    for handle in life.pool._quarantined:
        life.device.release(PAGE, [handle])


def sweep(
    kind: str, *, keep_freed: bool, plans: Iterable[str] = PLANS, backend: str = "native"
) -> tuple[Counter[str], int]:
    """Run a life per injection point and plan; return the points by operation, and how many faults were injected."""
    device = open_backend(backend)
    life = Life(device, kind, keep_freed=keep_freed)
    life.run(no_faults)
    assert life.n_failed_calls == 0
    points = list(life.faulty.points)
    baseline = Held.now()
    n_faults = 0
    for name in plans:
        for n in range(1, len(points) + 1):
            life = Life(device, kind, keep_freed=keep_freed)
            try:
                life.run(PLANS[name](n))
                assert life.faulty.faults, "the point was not reached"
                assert life.driver.n_live_mappings == life.driver.n_live_reservations == life.pool.n_mappings == 0
                assert life.driver.n_live_handles == life.pool.n_quarantined == life.pool.n_owned
                assert physical_bytes(device) == life.pool.n_quarantined * PAGE
            except BaseException as error:
                raise AssertionError(
                    f"{backend}, {name}, point {n}, {kind}, keep_freed={keep_freed}: {error!r}; failed were "
                    f"{life.faulty.faults}"
                ) from error
            n_faults += len(life.faulty.faults)
            give_up_lost_pages(life)
    assert physical_bytes(device) == 0
    assert not Held.now().beyond(baseline)
    device.close()
    return Counter(point.operation for point in points), n_faults


@pytest.mark.parametrize("keep_freed", [False, True], ids=["freed pages go", "freed pages stay"])
@pytest.mark.parametrize("kind", ["per_layer", "token_major", "group:2"])
@pytest.mark.parametrize("backend", ["native", "cuda"])
def test_any_driver_call_may_fail_at_any_time(
    backend: str, kind: str, keep_freed: bool, record_property: Callable[[str, object], None]
) -> None:
    points, n_faults = sweep(kind, keep_freed=keep_freed, backend=backend)
    assert set(points) == {
        *("reserve", "create", "map", "set_access"),
        *("scrub", "fence", "unmap", "release", "free_reservation"),
    }
    record_property(
        "figures",
        f"fault sweep, {backend}, {kind}, keep_freed={keep_freed}: {points.total()} injection points, "
        f"{len(PLANS)} plans each, {n_faults} faults injected",
    )


# The sweep itself is seen to fail: each of these plants one mistake that an allocator could make.


def loses_the_undo_of_a_map(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.region._ranges_of_plan", lambda plan, handles, n_mapped: [])


def forgets_a_page_of_a_failed_map(patch: pytest.MonkeyPatch) -> None:
    give = PagePool.give
    patch.setattr(PagePool, "give", lambda pool, handles: give(pool, handles[: len(handles) - (len(handles) == 3)]))


def forgets_what_create_made_before_it_failed(patch: pytest.MonkeyPatch) -> None:
    release = PagePool._release
    patch.setattr(
        PagePool,
        "_release",
        lambda pool, handles, raise_error=False: release(pool, handles, raise_error=True) if raise_error else None,
    )


def does_not_refund_mappings(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagePool, "refund_mappings", lambda pool, n_mappings: None)


def reuses_pages_whose_unmap_failed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagePool, "quarantine", lambda pool, handles: pool.give(list(handles)))


def commits_before_it_maps(patch: pytest.MonkeyPatch) -> None:
    ensure = KVCache.ensure

    def early(cache: KVCache, lengths: dict[SlotId, int]) -> None:
        cache._slots.require_active(lengths)
        cache._slots.n_tokens.update(lengths)
        ensure(cache, lengths)

    patch.setattr(KVCache, "ensure", early)


def does_not_scrub(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FaultyDriver, "scrub", lambda driver, spans: driver._point("scrub", 0))


def leaves_a_slot_busy(patch: pytest.MonkeyPatch) -> None:
    unbusy = KVCache._unbusy
    patch.setattr(KVCache, "_unbusy", lambda cache, slots: None if cache.region.broken else unbusy(cache, slots))


@pytest.mark.parametrize(
    "mistake",
    [
        loses_the_undo_of_a_map,
        forgets_a_page_of_a_failed_map,
        forgets_what_create_made_before_it_failed,
        does_not_refund_mappings,
        reuses_pages_whose_unmap_failed,
        commits_before_it_maps,
        does_not_scrub,
        leaves_a_slot_busy,
    ],
)
def test_the_sweep_finds_a_planted_mistake(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmem_kv.cache.STALL_TIMEOUT_S", 0.01)
    mistake(monkeypatch)
    with pytest.raises((AssertionError, VmemError)):
        sweep("group:2", keep_freed=mistake is does_not_scrub, plans=["once with a driver error", "from then on"])
