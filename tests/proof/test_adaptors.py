"""The adaptors: each does what it says, hides nothing, and passes the driver contract around any driver."""

from __future__ import annotations

import threading

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Copy, Driver, Handle, Reservation
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.errors import DriverError, OutOfAddressSpace, OutOfMappings, OutOfPages, UsageError
from vmem_kv.pages import PagePool
from vmem_kv.testing import DriverMemory, FaultyDriver, HostMemory, check_driver, fail_kind, interruption
from vmem_kv.testing.adaptor import Adaptor
from vmem_kv.testing.clock import ManualClock
from vmem_kv.testing.limiting import LimitingDriver
from vmem_kv.testing.operations import odd_layout
from vmem_kv.testing.poison import POISON, PoisonDriver
from vmem_kv.testing.statistics import StatisticsDriver
from vmem_kv.testing.targets import open_driver as open_by_name
from vmem_kv.testing.trace import UNKNOWN, Call, LoggingDriver, replay
from vmem_kv.testing.tracking import TrackingDriver

from .drivers import open_driver

# PoisonDriver is not among them: that bytes do not outlive the last mapping is its purpose.
ADAPTORS = {
    "none": Adaptor,
    "limiting": lambda inner: LimitingDriver(inner, inner.info.memory_bytes),
    "statistics": StatisticsDriver,
    "tracking": TrackingDriver,
    "logging": lambda inner: LoggingDriver(inner, []),
    "all": lambda inner: LoggingDriver(TrackingDriver(StatisticsDriver(LimitingDriver(inner, 1 << 30))), []),
}


@pytest.mark.parametrize("name", ADAPTORS)
def test_a_driver_in_an_adaptor_passes_the_contract(driver_name: str, name: str) -> None:
    report = check_driver(lambda: ADAPTORS[name](open_driver(driver_name)), DriverMemory)
    assert report.n_checks > 50


def use(driver: Driver, *, domain: str = "a") -> KVCache:
    """Let a cache grow, give back and grow again."""
    page_bytes = driver.info.granularity_bytes
    cache = KVCache(PagePool(driver, page_bytes, 60, keep_freed=True), odd_layout("per_layer", page_bytes, n_slots=3))
    first = cache.acquire(domain=domain)
    cache.ensure({first: 30})
    cache.retire(first)
    second = cache.acquire(domain=f"not {domain}")
    cache.ensure({second: 40})
    return cache


def close(cache: KVCache) -> None:
    cache.retire(cache.active_slots())
    cache.close()
    cache.pool.trim()


def pages(driver: Driver, n_pages: int) -> tuple[int, list[Handle]]:
    """Reserve and create so many pages of the granularity."""
    page_bytes = driver.info.granularity_bytes
    base = driver.reserve(n_pages * page_bytes).base
    handles: list[Handle] = []
    driver.create(page_bytes, [base + i * page_bytes for i in range(n_pages)], handles)
    return base, handles


def test_the_limit_holds_and_what_fits_is_made(driver: Driver) -> None:
    page = driver.info.granularity_bytes
    limited = LimitingDriver(driver, 5 * page)
    assert (limited.info.memory_bytes, limited.available_bytes()) == (5 * page, 5 * page)
    created: list[Handle] = []
    base = limited.reserve(8 * page)
    with pytest.raises(OutOfPages, match="limit"):
        limited.create(page, [base.base + i * page for i in range(8)], created)
    assert len(created) == 5
    assert (limited.n_live_bytes, limited.available_bytes()) == (5 * page, 0)
    limited.release(page, created[:2])
    assert limited.available_bytes() == 2 * page
    with pytest.raises(UsageError):
        limited.release(page, created[:1])
    assert limited.n_live_bytes == 3 * page
    limited.release(page, created[2:])
    limited.free_reservation(base)


def test_a_limit_counts_what_a_failed_create_made() -> None:
    faulty = FaultyDriver(open_driver("native"), fail_kind("create", 3))
    limited = LimitingDriver(faulty, 1 << 20)
    with pytest.raises(OutOfPages, match="injected"):
        pages(limited, 5)
    assert limited.n_live_bytes == 2 * limited.info.granularity_bytes


def test_statistics_count_calls_items_failures_and_time() -> None:
    clock = ManualClock()
    faulty = FaultyDriver(open_driver("native"), lambda point: clock.advance(0.5))
    driver = StatisticsDriver(faulty, clock)
    page = driver.info.granularity_bytes
    base, handles = pages(driver, 4)
    driver.map(page, [base, base + page], handles[:2])
    faulty.plan = fail_kind("release", 3)
    driver.unmap([(base, page), (base + page, page)])
    with pytest.raises(DriverError):
        driver.release(page, handles)
    operations = driver.operations()
    assert (operations["create"].n_calls, operations["create"].n_items, operations["create"].seconds) == (1, 4, 2.0)
    assert (operations["map"].n_items, operations["map"].seconds) == (2, 1.0)
    assert (operations["release"].n_calls, operations["release"].n_items, operations["release"].n_failed) == (1, 2, 1)
    assert (driver.n_live_bytes, driver.n_peak_bytes) == (2 * page, 4 * page)
    assert driver.n_live_reserved_bytes == 4 * page
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance(-1)


def test_tracking_says_who_took_what_is_left(driver: Driver) -> None:
    tracked = TrackingDriver(driver)
    cache = use(tracked)
    close(cache)
    assert tracked.outstanding() == []
    base, handles = pages(tracked, 2)
    reservation, first, second = tracked.outstanding()
    assert (reservation.what, reservation.name) == ("reservation", base)
    assert [first.name, second.name] == handles
    assert "test_tracking_says_who_took_what_is_left" in first.stack[-2]
    assert "in pages" in str(first).splitlines()[-1]
    assert first.thread == threading.current_thread().name
    with pytest.raises(UsageError):
        tracked.release(tracked.info.granularity_bytes, [Handle(12345)])
    tracked.release(tracked.info.granularity_bytes, handles)
    assert tracked.outstanding() == [reservation]
    tracked.free_reservation(Reservation(base, reservation.n_bytes))


def test_tracking_finds_a_leaked_page(monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = TrackingDriver(open_driver("native"))
    give = PagePool.give
    monkeypatch.setattr(PagePool, "give", lambda pool, handles: give(pool, handles[1:]))
    close(use(tracked))
    assert any("in ensure" in frame for taken in tracked.outstanding() for frame in taken.stack)


def test_a_trace_replays_on_another_driver_and_leaves_the_same() -> None:
    calls: list[Call] = []
    cache = use(LoggingDriver(open_driver("native"), calls))
    n_live = sum(len(planes) for slot in cache.region.table.handles.values() for planes in slot)
    lines = [call.to_json() for call in calls]
    for name in ("native", "cuda"):
        checked = CheckedDriver(open_driver(name))
        assert replay(map(Call.from_json, lines), checked) == len(calls)
        assert checked.n_live_mappings == n_live
        assert checked.n_live_handles == cache.pool.n_owned
        assert checked.n_live_reservations == 1
    close(cache)
    cache.pool.driver.close()
    done = CheckedDriver(open_driver("native"))
    replay(calls, done)
    assert (done.n_live_handles, done.n_live_mappings, done.n_live_reservations) == (0, 0, 0)


def test_a_failed_call_is_replayed_as_far_as_it_came() -> None:
    calls: list[Call] = []
    faulty = FaultyDriver(open_driver("native"), fail_kind("map", 3))
    driver = LoggingDriver(faulty, calls)
    page = driver.info.granularity_bytes
    base, handles = pages(driver, 4)
    addresses = [base + i * page for i in range(4)]
    with pytest.raises(OutOfMappings, match="injected"):
        driver.map(page, addresses, handles)
    driver.set_access([(base, 2 * page)])
    driver.scrub([(base, page)])
    driver.copy([Copy(base, base + page, 64)])
    driver.copy_from_host(memoryview(b"x" * 10), base)
    driver.copy_to_host(base, memoryview(bytearray(10)))
    assert [call.error for call in calls][:3] == ["", "", "OutOfMappings"]
    checked = CheckedDriver(open_driver("cuda"))
    assert replay(calls, checked) == len(calls)
    assert checked.n_live_mappings == 2


def test_what_cannot_be_replayed_is_refused() -> None:
    calls: list[Call] = []
    faulty = FaultyDriver(open_driver("native"))
    driver = LoggingDriver(faulty, calls)
    base, handles = pages(driver, 1)
    faulty.plan = fail_kind("map", None, interruption)
    with pytest.raises(KeyboardInterrupt):
        driver.map(driver.info.granularity_bytes, [base], handles)
    faulty.plan = fail_kind("reserve")
    with pytest.raises(OutOfAddressSpace, match="injected"):
        driver.reserve(driver.info.granularity_bytes)
    assert (calls[-2].n_done, calls[-1].n_done) == (UNKNOWN, 0)  # an interruption says to nobody how far it came
    with pytest.raises(UsageError, match="interrupted"):
        replay([Call("map", (4096, 0, 0), n_done=UNKNOWN)], open_driver("native"))
    with pytest.raises(UsageError, match="nothing that the trace reserved"):
        replay([Call("unmap", (4096, 4096), n_done=1)], open_driver("native"))
    with pytest.raises(UsageError, match="cannot hold"):
        replay([Call("dance", (), n_done=1)], open_driver("native"))
    for line in ("", "[]", '{"operation": 3}', "{"):
        with pytest.raises(UsageError, match="no recorded driver call"):
            Call.from_json(line)


def test_pages_out_of_use_are_poisoned_and_aliases_are_not(driver: Driver) -> None:
    poison = PoisonDriver(driver)
    memory, page = DriverMemory(poison), driver.info.granularity_bytes
    base, handles = pages(poison, 2)
    poison.map(page, [base, base + page], [handles[0], handles[0]])
    poison.set_access([(base, 2 * page)])
    memory.write(base, b"\x05" * page)
    poison.unmap([(base, page)])
    assert memory.read(base + page, page) == b"\x05" * page  # somebody else still uses it
    poison.unmap([(base + page, page)])
    assert poison.n_poisoned >= 1
    poison.map(page, [base], handles[:1])
    poison.set_access([(base, page)])
    assert memory.read(base, page) == bytes([POISON]) * page
    poison.unmap([(base, page)])
    poison.release(page, handles)
    with pytest.raises(UsageError):
        poison.release(page, handles[:1])
    poison.free_reservation(Reservation(base, 2 * page))


def test_a_cache_never_shows_poison_and_a_missed_scrub_does(driver_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In debug mode every page is poisoned whenever it is out of use, new ones too: nothing of it reaches an owner."""
    assert POISON not in bytes_seen(PoisonDriver(open_driver(driver_name), is_zeroing=False))
    monkeypatch.setattr(PoisonDriver, "scrub", lambda driver, spans: None)
    assert POISON in bytes_seen(PoisonDriver(open_driver(driver_name), is_zeroing=False))


def bytes_seen(driver: PoisonDriver) -> set[int]:
    cache = use(driver)
    cache.retire(cache.active_slots())
    cache.reclaim(1000)
    slot_id = cache.acquire(domain="third")
    cache.ensure({slot_id: 40})
    base, seen = cache.region.reservation.base, set[int]()
    for plane in cache.layout.planes:
        seen |= set(HostMemory().read(base + plane.base_bytes + slot_id * plane.span_bytes, 40 * plane.token_bytes))
    assert driver.n_poisoned > 20
    close(cache)
    return seen


def test_drivers_open_by_name() -> None:
    for name, path in (("host:native", "native"), ("host:python", "python")):
        driver = open_by_name(name)
        assert driver.info.path == path
        driver.close()
