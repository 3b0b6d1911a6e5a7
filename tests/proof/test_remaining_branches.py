"""Branches of the allocator's core that no other test takes, each for what it promises."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from dataclasses import FrozenInstanceError, fields
from types import SimpleNamespace

import pytest
import torch

from vmem_kv.cache import KVCache
from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import PASSED, Handle, Reservation
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.errors import ConfigError, DriverError, InvariantError, OutOfMappings, UsageError
from vmem_kv.growth import PageRange
from vmem_kv.pages import PagePool
from vmem_kv.stats import CacheStats
from vmem_kv.steps import StepCounter
from vmem_kv.storage import open_storage
from vmem_kv.testing import FaultyDriver, ManualFence, Point, fail_kind, interruption, no_faults
from vmem_kv.testing.explorer import CallHook
from vmem_kv.testing.operations import odd_layout
from vmem_kv.units import count

from .drivers import open_driver


class Lab:
    """A cache of three slots on a host driver that may fail."""

    def __init__(self) -> None:
        self.faulty = FaultyDriver(open_driver("native"))
        self.driver = CheckedDriver(self.faulty)
        self.pool = PagePool(self.driver, 4096, 200)
        self.cache = KVCache(self.pool, odd_layout("per_layer", 4096, n_slots=3))

    def close(self) -> None:
        self.faulty.plan = no_faults
        self.cache.retire(self.cache.active_slots(), PASSED)
        self.cache.close()
        self.pool.trim()
        assert (self.driver.n_live_mappings, self.driver.n_live_handles, self.pool.n_quarantined) == (0, 0, 0)


def test_slots_slide_together_and_none_goes_back() -> None:
    lab = Lab()
    first, second = lab.cache.acquire_adjacent(2)
    lab.cache.ensure({first: 40, second: 40})
    lab.cache.slide([first, second], 0)
    lab.cache.slide(first, 30)
    lab.cache.slide([first, second], 20)
    with pytest.raises(UsageError, match="slide gave up"):
        lab.cache.ensure({first: 29})
    lab.cache.ensure({second: 20})
    lab.cache.check()
    lab.close()


class ClosingFence:
    """While somebody asks whether it has passed, another thread closes the cache."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.was_asked = False

    def passed(self) -> bool:
        if not self.was_asked:
            self.was_asked = True
            self.cache.close()
        return True

    def wait(self) -> None:
        raise AssertionError("nobody needs to wait")


def test_closing_meets_another_close() -> None:
    lab = Lab()
    slot_id = lab.cache.acquire()
    lab.cache.ensure({slot_id: 10})
    waiting = ManualFence()
    lab.cache.retire(slot_id, waiting)
    fence = ClosingFence(lab.cache)
    lab.cache._slots.retired[slot_id] = fence
    lab.cache.close()
    assert fence.was_asked
    lab.cache.close()
    assert lab.driver.n_live_reservations == 0
    lab.pool.trim()


def test_an_unmap_that_stays_refused_is_tried_until_it_works() -> None:
    lab = Lab()
    slot_id = lab.cache.acquire()
    lab.cache.ensure({slot_id: 30})
    lab.cache.retire(slot_id)

    def full(point: Point) -> BaseException:
        return OutOfMappings(f"injected at point {point.n}")

    lab.faulty.plan = fail_kind("unmap", None, full)
    with pytest.raises(OutOfMappings):
        lab.cache.reclaim(1000)
    n_lost = lab.pool.n_quarantined
    assert n_lost > 0
    assert lab.cache.reclaim(0) == 0  # still refused, nothing lost, nothing gained
    assert lab.pool.n_quarantined == n_lost
    lab.cache.check()
    lab.faulty.plan = no_faults
    assert lab.cache.reclaim(0) == n_lost
    lab.close()


def test_a_sequence_under_which_an_unmap_was_refused_grows_again_once_it_is_mended() -> None:
    lab = Lab()
    slot_id = lab.cache.acquire()
    lab.cache.ensure({slot_id: 30})
    lab.faulty.plan = fail_kind("unmap", None, lambda point: OutOfMappings(f"injected at point {point.n}"))
    with pytest.raises(OutOfMappings):
        lab.cache.slide(slot_id, 28)
    with pytest.raises(UsageError, match="an unmap failed"):
        lab.cache.ensure({slot_id: 48})
    lab.faulty.plan = no_faults
    lab.cache.reclaim(0)
    lab.cache.ensure({slot_id: 48})
    assert lab.cache.active_slots() == [slot_id]
    lab.cache.check()
    lab.close()


def test_on_a_lost_device_sequences_end_without_a_fence() -> None:
    lab = Lab()
    slot_id = lab.cache.acquire()
    lab.cache.ensure({slot_id: 10})

    def lost(point: Point) -> BaseException:
        error = DriverError(point.operation, 700, "ILLEGAL_ADDRESS")
        error.is_fatal = True
        return error

    lab.faulty.plan = lost
    lab.cache.retire(slot_id)
    assert lab.cache.active_slots() == []
    lab.cache.close()
    assert (lab.pool.n_owned, lab.pool.n_quarantined, lab.pool.n_mappings, lab.pool.n_in_flight) == (0, 0, 0, 0)


def test_a_fence_that_cannot_be_recorded_ends_nothing() -> None:
    lab = Lab()
    slot_id = lab.cache.acquire()
    lab.cache.ensure({slot_id: 40})
    with lab.faulty.failing(fail_kind("fence")):
        with pytest.raises(DriverError):
            lab.cache.retire(slot_id)
        with pytest.raises(DriverError):
            lab.cache.slide(slot_id, 30)
    assert lab.cache.active_slots() == [slot_id]
    lab.cache.ensure({slot_id: 0})
    lab.close()


def test_another_process_is_refused() -> None:
    lab = Lab()
    pid, lab.pool._pid = lab.pool._pid, -1
    with pytest.raises(UsageError, match="belongs to process -1"):
        lab.cache.acquire()
    for call in (lambda: lab.pool.resize(10), lab.pool.trim, lab.cache.check, lab.cache.close):
        with pytest.raises(UsageError, match="belongs to process -1"):
            call()
    lab.pool._pid = pid
    lab.close()


def test_steps_hold_a_fence_back_until_they_have_ended() -> None:
    recorded: list[ManualFence] = []

    def record() -> ManualFence:
        recorded.append(ManualFence())
        return recorded[-1]

    steps = StepCounter(record)
    at_once = steps.fence()
    assert len(recorded) == 1
    assert not at_once.passed()
    with steps.step() as number:
        fence, waited = steps.fence(), steps.fence()
        assert (steps.n_open, len(recorded)) == (1, 1)
        assert not fence.passed()
    with pytest.raises(UsageError, match=f"step {number} is not open"):
        steps.end(number)
    assert not fence.passed()  # its event was recorded just now
    recorded[-1].pass_()
    assert fence.passed()
    assert not waited.passed()
    recorded[-1].pass_()
    waited.wait()
    fence.wait()
    later = steps.begin()
    blocked = steps.fence()
    steps.end(later)
    for manual in recorded:
        manual.pass_()
    recorder, steps._record = steps._record, lambda: PASSED  # type: ignore[assignment]
    blocked.wait()
    assert blocked.passed()
    steps._record = recorder


def test_steps_that_are_open_together_end_one_by_one() -> None:
    steps = StepCounter(lambda: PASSED)
    first, second = steps.begin(), steps.begin()
    fence = steps.fence()
    for n_open, number in ((1, second), (0, first)):
        assert not fence.passed()
        steps.end(number)
        assert steps.n_open == n_open
    assert fence.passed()


def test_whoever_waits_for_a_step_is_woken_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmem_kv.steps.STEP_TIMEOUT_S", 1e6)  # who is not woken never looks again
    steps = StepCounter(lambda: PASSED)
    number = steps.begin()
    thread = threading.Thread(target=steps.fence().wait, daemon=True)
    thread.start()
    while not steps._changed._waiters:  # type: ignore[attr-defined]
        time.sleep(0.001)
    steps.end(number)
    thread.join(60)
    assert not thread.is_alive()


def test_a_step_that_never_ends_is_an_error_for_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmem_kv.steps.STEP_TIMEOUT_S", 0.01)
    steps = StepCounter(lambda: PASSED)
    steps.begin()
    with pytest.raises(DriverError, match="did not end"):
        steps.fence().wait()


def test_an_empty_snapshot_is_all_zeros() -> None:
    stats = CacheStats.empty()
    assert (stats.n_owned_pages, stats.mapped_bytes, stats.owned_bytes, stats.peak_bytes) == (0, 0, 0, 0)
    assert all(not getattr(stats, f.name) for f in fields(stats))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("page_bytes", True),
        ("max_bytes", 1.5),
        ("layout", "round"),
        ("layout", 3),
        ("host_path", "x"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        CacheConfig(**{name: value})  # type: ignore[arg-type]
    config = CacheConfig(max_tokens=5, layout="group:3")
    with pytest.raises(FrozenInstanceError):
        config.max_tokens = 6  # type: ignore[misc]


def test_a_page_in_two_places_is_an_invariant_error() -> None:
    lab = Lab()
    slot_id = lab.cache.acquire()
    lab.cache.ensure({slot_id: 10})
    handles = lab.cache.region.table.handles[slot_id]
    kept, handles[1][0] = handles[1][0], handles[0][0]
    with pytest.raises(InvariantError, match="mapped pages"):
        lab.cache.check()
    handles[1][0] = kept
    lab.pool._free.append(kept)  # free, while it is mapped
    lab.pool.n_owned += 1
    with pytest.raises(InvariantError, match="two places"):
        lab.cache.check()
    lab.pool._free.remove(kept)
    lab.pool.n_owned -= 1
    lab.close()


def test_mappings_that_turn_out_to_be_too_few_give_the_pages_back() -> None:
    """Pages created apart from their places merge with nothing: more mappings than were charged before."""
    lab = Lab()
    slot_id = lab.cache.acquire()
    create, shift = lab.faulty.inner.create, itertools.count(1000, 3)

    def elsewhere(page_bytes: int, places: list[int], created: list[Handle]) -> None:
        create(page_bytes, [place + next(shift) * page_bytes for place in places], created)

    lab.faulty.inner.create = elsewhere  # type: ignore[method-assign, assignment]
    object.__setattr__(lab.driver.info, "max_mappings", 8)  # four planes in a run each, and not one more
    with pytest.raises(OutOfMappings):
        lab.cache.ensure({slot_id: 40})
    assert (lab.pool.n_mappings, lab.pool.n_in_flight, lab.pool.n_owned) == (0, 0, 0)
    lab.cache.check()
    lab.close()


def test_interrupted_twice_while_unmapping_the_rest_is_tried_again() -> None:
    lab = Lab()
    slot_id = lab.cache.acquire()
    lab.cache.ensure({slot_id: 40})
    lab.cache.retire(slot_id)
    lab.faulty.plan = fail_kind("unmap", None, interruption)
    with pytest.raises(KeyboardInterrupt):
        lab.cache.reclaim(1000)
    assert lab.pool.n_quarantined > 0
    lab.faulty.plan = no_faults
    lab.cache.reclaim(0)
    assert lab.pool.n_quarantined == 0
    lab.cache.check()
    lab.close()


def test_interrupted_while_the_reservation_is_freed_close_can_be_called_again() -> None:
    for happens_before in (True, False):
        lab = Lab()
        free = lab.faulty.inner.free_reservation

        def interrupted(reservation: Reservation, free: object = free, before: bool = happens_before) -> None:
            if not before:
                free(reservation)  # type: ignore[operator]
            raise KeyboardInterrupt

        lab.faulty.inner.free_reservation = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            lab.cache.close()
        lab.faulty.inner.free_reservation = free  # type: ignore[method-assign]
        lab.driver.inner.free_reservation = free  # type: ignore[method-assign]
        lab.pool.driver = lab.faulty.inner  # past the checking driver, which cannot know either
        lab.cache.close()


def test_a_settled_cache_says_whether_anything_moved_on() -> None:
    lab = Lab()
    assert not lab.cache.settle()
    slot_id = lab.cache.acquire()
    lab.cache.ensure({slot_id: 10})
    fence = ManualFence()
    lab.cache.retire(slot_id, fence)
    fence.pass_()
    assert lab.cache.settle()
    assert lab.cache.stats().n_warm_pages > 0
    lab.close()


def test_the_books_may_be_checked_in_the_middle_of_a_call() -> None:
    hook = CallHook(open_driver("native"))
    cache = KVCache(PagePool(hook, 4096, 100), odd_layout("per_layer", 4096, n_slots=2))
    slot_id = cache.acquire()
    seen: list[int] = []

    def check() -> None:
        cache.check()
        seen.append(cache.stats().n_in_flight_pages)

    hook.arm(2, check)
    cache.ensure({slot_id: 20})
    assert seen[0] > 0
    assert cache.first_token(slot_id) == 0
    cache.retire(slot_id)
    cache.close()


def test_interrupted_while_old_bytes_are_scrubbed_nothing_is_left_mapped() -> None:
    lab = Lab()
    lab.pool._keep_freed = True
    slot_id = lab.cache.acquire()
    lab.cache.ensure({slot_id: 20})
    lab.cache.retire(slot_id)
    lab.cache.reclaim(1000)
    slot_id = lab.cache.acquire()
    with lab.faulty.failing(fail_kind("scrub", 1, interruption)), pytest.raises(KeyboardInterrupt):
        lab.cache.ensure({slot_id: 20})
    assert (lab.driver.n_live_mappings, lab.pool.n_quarantined) == (0, 0)
    lab.cache.check()
    lab.close()


def test_a_reservation_that_the_driver_does_not_know_is_not_taken_for_freed() -> None:
    lab = Lab()
    unknown = fail_kind("free_reservation", 1, lambda point: UsageError("not reserved here"))
    with lab.faulty.failing(unknown), pytest.raises(UsageError, match="not reserved here"):
        lab.cache.close()
    lab.close()


def test_a_page_outside_of_its_plane_is_an_invariant_error() -> None:
    lab = Lab()
    slot_id = lab.cache.acquire()
    kept, lab.cache.region.table.mapped[slot_id][0] = lab.cache.region.table.mapped[slot_id][0], PageRange(999, 999)
    with pytest.raises(InvariantError, match="outside of its plane"):
        lab.cache.check()
    lab.cache.region.table.mapped[slot_id][0] = kept
    lab.close()


def test_where_torch_has_lost_a_private_name_dlpack_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = ctypes.create_string_buffer(b"12345678")
    monkeypatch.delattr(torch._C, "_construct_storage_from_data_pointer")
    storage = open_storage(ctypes.addressof(memory), 8, torch.device("cpu"))
    assert (storage.data_ptr(), bytes(storage)) == (ctypes.addressof(memory), b"12345678")
    monkeypatch.setattr("vmem_kv.storage._libc", SimpleNamespace(malloc=lambda n_bytes: None))
    with pytest.raises(MemoryError, match="DLPack"):
        open_storage(ctypes.addressof(memory), 8, torch.device("cpu"))


def test_numbers_of_things_are_written_as_people_say_them() -> None:
    assert [count(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
