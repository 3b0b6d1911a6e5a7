"""Calls that meet a close, a retire or an interruption of another thread, and locks held across driver calls."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import PassedFence
from vmem_kv.errors import DriverError, InvariantError, UsageError
from vmem_kv.testing import ManualFence, fail_kind

from .bench import OpenBench, make_layout


def in_another_thread(call: Callable[[], Any]) -> list[BaseException]:
    """Run `call` in a thread and wait; return what it raised."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    return errors


def test_nobody_gets_a_slot_of_a_cache_that_is_closing(open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = open_bench()
    bench.cache.retire(bench.grown(5))
    errors: list[BaseException] = []
    free = bench.device.free_reservation

    def slow(*arguments: Any) -> None:
        errors.extend(in_another_thread(lambda: bench.cache.acquire(expected_tokens=0)))
        free(*arguments)

    monkeypatch.setattr(bench.device, "free_reservation", slow)
    bench.cache.close()
    assert [type(error) for error in errors] == [UsageError]
    assert bench.pool.n_owned == 0
    with pytest.raises(UsageError, match="closed"):
        bench.cache.ensure({})
    bench.close()


class ClosingFence(ManualFence):
    """While somebody asks whether it has passed, another thread closes the cache."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache
        self.closes = False

    def passed(self) -> bool:
        if self.closes and not super().passed():
            self.pass_()
            self.cache.close()
        return super().passed()


def test_nobody_gets_a_slot_of_a_cache_that_was_closed_while_he_asked_for_one(open_bench: OpenBench) -> None:
    bench = open_bench()
    fence = ClosingFence(bench.cache)
    bench.cache.retire(bench.grown(5), fence)
    fence.closes = True
    with pytest.raises(UsageError, match="closed"):
        bench.cache.acquire()
    assert bench.pool.n_owned == 0
    assert bench.cache.active_slots() == []
    bench.close()


def test_a_cache_that_failed_to_close_works_and_can_be_closed_again(open_bench: OpenBench) -> None:
    bench = open_bench()
    with bench.faulty.failing(fail_kind("free_reservation")), pytest.raises(DriverError):
        bench.cache.close()
    bench.grown(5)
    bench.retire_all()
    bench.check()
    bench.close()


def test_a_slot_retired_while_it_grows_has_no_length(open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = open_bench()
    slot_id = bench.grown(5)
    real = bench.device.map

    def slow(*arguments: Any) -> None:
        if slot_id in bench.cache.active_slots():
            assert not in_another_thread(lambda: bench.cache.retire(slot_id))
        real(*arguments)

    monkeypatch.setattr(bench.device, "map", slow)
    bench.cache.ensure({slot_id: 40})
    assert bench.cache._slots.n_tokens == {}
    bench.check()
    bench.close()


def test_check_finds_a_length_without_a_slot_and_pages_that_nobody_holds(open_bench: OpenBench) -> None:
    bench = open_bench()
    bench.cache._slots.n_tokens[bench.cache.acquire()] = 0
    bench.cache._slots.n_tokens[make_slot_id(3)] = 0
    with pytest.raises(InvariantError, match="lengths"):
        bench.cache.check()
    bench = open_bench()
    bench.pool.take([bench.cache.region.reservation.base])
    with pytest.raises(InvariantError, match="in flight"):
        bench.cache.check()
    bench = open_bench()
    bench.grown(5)
    bench.pool.charge_mappings(1)
    with pytest.raises(InvariantError, match="mappings"):
        bench.cache.check()


def make_slot_id(index: int) -> Any:
    return index


def test_a_cache_dropped_without_closing_does_not_disturb_the_others(open_bench: OpenBench) -> None:
    bench = open_bench()
    other = KVCache(bench.pool, make_layout())
    other.ensure({other.acquire(): 20})
    n_pages = other.stats().n_live_pages
    del other
    gc.collect()
    bench.cache.check()
    assert bench.cache.stats().n_elsewhere_pages == n_pages  # mapped still, and counted
    bench.cache.close()


def test_the_lock_is_never_held_across_a_driver_call_or_a_fence(
    open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench(keep_freed=True, max_pages=40)
    seen = set()

    def require_free(name: str) -> None:
        assert bench.pool.lock.acquire(blocking=False), f"the lock is held across {name}"
        bench.pool.lock.release()
        seen.add(name)

    def watched(name: str) -> Callable[..., object]:
        real = getattr(bench.device, name)

        def call(*arguments: object) -> object:
            require_free(name)
            return real(*arguments)

        return call

    class WatchedFence(PassedFence):
        def passed(self) -> bool:
            require_free("passed")
            return True

    names = {"create", "map", "set_access", "scrub", "unmap", "release", "free_reservation"}
    for name in names:
        monkeypatch.setattr(bench.device, name, watched(name))
    slot_id = bench.grown(30)
    bench.cache.slide(slot_id, 20, WatchedFence())
    bench.cache.retire(slot_id, WatchedFence())
    bench.grown(30, domain="other")
    bench.retire_all()
    bench.grown(30, domain="third")
    bench.retire_all()
    bench.cache.reclaim(1000)
    bench.pool.resize(1)
    bench.close()
    assert seen == names | {"passed"}
