"""Limits that are not one pool's: mappings and memory of the process, and what happens at the kernel's own limit."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver import host_mapper
from vmem_kv.driver.base import Handle
from vmem_kv.driver.host import HostDriver
from vmem_kv.driver.ledger import PROCESS, Ledger
from vmem_kv.errors import DriverError, OutOfMappings, OutOfPages, VmemError
from vmem_kv.pages import PagePool
from vmem_kv.testing import Point, fail_kind, natural_error

from .bench import PAGE, Bench, OpenBench, books, make_layout


class StubbornLibc:
    """The C library, but that the next so many calls of one function fail."""

    def __init__(self, function: str, code: int, n_failures: int = 1) -> None:
        self.real, self.function, self.code, self.n_failures = host_mapper.libc, function, code, n_failures

    def __getattr__(self, name: str) -> Callable[..., int]:
        def failing(*arguments: object) -> int:
            if self.n_failures:
                self.n_failures -= 1
                ctypes.set_errno(self.code)
                return host_mapper.MAP_FAILED if name == "mmap" else -1  # type: ignore[return-value]
            return int(getattr(self.real, name)(*arguments) or 0)

        return failing if name == self.function else getattr(self.real, name)  # type: ignore[no-any-return]


def test_an_advice_that_fails_undoes_its_run_and_is_a_lack_of_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    slot_id = bench.grown(5)
    before = books(bench.cache)
    monkeypatch.setattr(host_mapper, "libc", StubbornLibc("madvise", errno.EAGAIN))
    with pytest.raises(OutOfMappings):
        bench.cache.ensure({slot_id: 48})
    assert books(bench.cache) == before
    bench.check()
    bench.retire_all()
    bench.close()


def test_an_advice_that_fails_does_not_matter_to_an_unmap(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = HostDriver("python", ledger=Ledger())
    reservation = driver.reserve(12 * PAGE)
    places = [reservation.base + i * 4 * PAGE for i in range(3)]
    handles: list[Handle] = []
    driver.create(PAGE, places, handles)
    driver.map(PAGE, places, handles)
    monkeypatch.setattr(host_mapper, "libc", StubbornLibc("madvise", errno.EAGAIN))
    driver.unmap([(place, PAGE) for place in places])
    driver.release(PAGE, handles)
    driver.free_reservation(reservation)
    driver.close()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EAGAIN])
def test_an_unmap_refused_for_lack_of_mappings_is_tried_again(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    bench = Bench(n_slots=1)
    slot_id = bench.grown(40)
    bench.cache.retire(slot_id)
    with monkeypatch.context() as patch:
        patch.setattr(host_mapper, "libc", StubbornLibc("mmap", code))
        with pytest.raises(OutOfMappings):
            bench.cache.reclaim(1000)
    assert bench.pool.n_quarantined > 0
    assert bench.cache.region.broken == {slot_id}
    bench.check()
    assert bench.grown(48) == slot_id  # mended by itself
    assert bench.pool.n_quarantined == 0
    assert not bench.cache.region.broken
    bench.check()
    bench.retire_all()
    bench.close()


def test_an_unmap_that_failed_for_good_is_not_tried_again_before_the_end(open_bench: OpenBench) -> None:
    bench = open_bench()
    bench.cache.retire(bench.grown(40))
    with bench.faulty.failing(fail_kind("unmap", 1)), pytest.raises(DriverError):
        bench.cache.reclaim(1000)
    n_calls = bench.driver.calls["unmap"]
    bench.cache.reclaim(0)
    assert bench.driver.calls["unmap"] == n_calls
    bench.close()


def test_a_slot_that_broke_while_growing_is_not_grown_again_in_the_same_call(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=60)
    warm, slot_id = bench.grown(20), bench.grown(5)
    bench.cache.retire(warm)

    def plan(point: Point) -> BaseException | None:
        return fail_kind("set_access", 1)(point) or fail_kind("unmap", 1, natural_error)(point)

    with bench.faulty.failing(plan), pytest.raises(VmemError):
        bench.cache.ensure({slot_id: 40})
    bench.check()
    bench.retire_all()
    bench.close()


def test_the_lack_of_mappings_is_known_before_the_first_driver_call() -> None:
    bench = Bench()
    slot_id = bench.grown(5)
    object.__setattr__(bench.driver.info, "max_mappings", bench.pool.n_mappings + 1)
    other = bench.cache.acquire()
    before, calls = books(bench.cache), dict(bench.driver.calls)
    with pytest.raises(OutOfMappings):
        bench.cache.ensure({other: 1})
    assert (books(bench.cache), dict(bench.driver.calls)) == (before, calls)
    bench.cache.ensure({slot_id: 48})  # goes on where it ended: no new mapping
    bench.retire_all()
    bench.close()


def test_pools_on_different_drivers_share_the_mappings() -> None:
    ledger = Ledger()
    drivers = [HostDriver("python", ledger=ledger) for _ in range(2)]
    layout = make_layout("per_layer")
    caches = [KVCache(PagePool(driver, PAGE, 64), layout) for driver in drivers]
    for driver in drivers:
        object.__setattr__(driver.info, "max_mappings", 2 * len(layout.planes))
    first, second = (cache.acquire() for cache in caches)
    caches[0].ensure({first: 5})
    with pytest.raises(OutOfMappings):
        caches[1].ensure({second: 5})
    caches[0].retire(first)
    caches[0].reclaim(1000)
    caches[1].ensure({second: 5})
    caches[1].retire(second)
    for cache in caches:
        cache.check()
        cache.close()
    assert (ledger.n_mappings, ledger.n_bytes) == (0, 0)
    for driver in drivers:
        driver.close()


@pytest.mark.parametrize("max_pages", [None, 50])
def test_pools_together_do_not_own_more_than_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, max_pages: int | None
) -> None:
    monkeypatch.setattr(HostDriver, "available_bytes", lambda driver: 60 * PAGE)
    ledger = Ledger()
    drivers = [HostDriver("python", ledger=ledger) for _ in range(2)]
    pools = [PagePool(driver, PAGE, max_pages) for driver in drivers]  # both open: a budget is no memory yet
    first, _ = pools[0].take([PAGE * i for i in range(1, 41)])
    with pytest.raises(OutOfPages, match="all pools"):
        pools[1].take([PAGE * i for i in range(1, 21)])
    second, _ = pools[1].take([PAGE * i for i in range(1, 11)])
    pools[0].give(first)
    pools[0].trim()
    more, _ = pools[1].take([PAGE * i for i in range(11, 41)])
    pools[1].give([*second, *more])
    assert ledger.n_bytes == 0
    for driver in drivers:
        driver.close()


def test_host_drivers_share_the_ledger_of_the_process() -> None:
    assert HostDriver("python").ledger is HostDriver("python").ledger is PROCESS


def test_caches_opened_and_closed_many_times_leave_no_trace_in_the_ledger() -> None:
    ledger = Ledger()
    for _ in range(20):
        driver = HostDriver("python", ledger=ledger)
        cache = KVCache(PagePool(driver, PAGE), make_layout())
        cache.ensure({cache.acquire(): 20})
        cache.retire(cache.active_slots())
        cache.close()
        driver.close()
    assert (ledger.n_mappings, ledger.n_bytes) == (0, 0)


def test_other_mappings_are_not_counted_less_because_ours_are_counted_at_worst_case() -> None:
    ledger = Ledger()
    assert ledger.other_mappings(500) == 500
    ledger.charge_mappings(2000, 10_000)
    assert ledger.other_mappings(1500) == 500
    assert ledger.other_mappings(3000) == 1000
    ledger.refund_mappings(2000)
    assert ledger.other_mappings(300) == 300


def test_pages_that_the_driver_did_not_zero_are_scrubbed(open_bench: OpenBench) -> None:
    bench = open_bench()
    object.__setattr__(bench.driver.info, "zeroes_new_pages", False)
    slot_id = bench.cache.acquire()
    bench.cache.ensure({slot_id: 20})
    assert bench.driver.calls["scrub"] == 1
    bench.retire_all()
    bench.close()
