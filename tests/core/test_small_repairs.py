"""Repairs too small for a file of their own: sliding, warm slots, limits of the machine, forks, missing threads."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from vmem_kv.driver.base import Handle
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import DriverError, OutOfAddressSpace, UsageError
from vmem_kv.machine import describe_machine
from vmem_kv.premap import Premapper
from vmem_kv.testing import ManualFence, Point, fail_kind

from .bench import PAGE, OpenBench, books

GIB = 1 << 30


def test_sliding_within_a_page_makes_no_driver_call_and_waits_for_nothing(open_bench: OpenBench) -> None:
    bench = open_bench()
    slots = [bench.grown(30), bench.grown(30)]
    calls = dict(bench.driver.calls)
    bench.cache.slide(slots, 1, ManualFence())
    assert not bench.cache._pending.slides
    bench.cache.slide(slots, 2)
    assert dict(bench.driver.calls) == calls
    bench.cache.slide(slots, 29)
    assert bench.driver.calls["unmap"] > calls.get("unmap", 0)
    bench.check()
    before = books(bench.cache)
    with pytest.raises(UsageError):
        bench.cache.slide(slots, 31)
    assert books(bench.cache) == before
    bench.retire_all()
    bench.close()


def test_a_slot_that_slid_but_kept_its_front_is_adopted_warm(open_bench: OpenBench) -> None:
    bench = open_bench(n_slots=1)
    slot_id = bench.grown(20, domain="a")
    bench.cache.slide(slot_id, 1)
    bench.cache.retire(slot_id)
    calls = dict(bench.driver.calls)
    assert bench.cache.acquire(domain="a") == slot_id
    bench.cache.ensure({slot_id: 20})
    assert dict(bench.driver.calls) == calls
    bench.check()
    bench.retire_all()
    bench.close()


def test_only_what_is_missing_is_reclaimed(open_bench: OpenBench) -> None:
    bench = open_bench(n_slots=10)
    bench.cache.retire([bench.grown(1) for _ in range(8)])  # of four pages each
    bench.pool.resize(32 + bench.layout.n_pages(48) - 1)
    bench.cache.ensure({bench.cache.acquire(expected_tokens=0): 48})
    assert bench.cache.stats().n_warm_pages >= 6 * 4
    bench.retire_all()
    bench.close()


def test_a_negative_trim_is_refused(open_bench: OpenBench) -> None:
    bench = open_bench()
    with pytest.raises(UsageError):
        bench.pool.trim(-1)
    bench.close()


def test_a_fatal_error_makes_a_cache_forget(open_bench: OpenBench) -> None:
    bench = open_bench()
    bench.grown(20)
    bench.retire_all()

    def lost(point: Point) -> BaseException:
        error = DriverError(point.operation, 700, "ILLEGAL_ADDRESS")
        error.is_fatal = True
        return error

    with bench.faulty.failing(lost):
        bench.cache.close()
    assert bench.pool.n_owned == bench.pool.n_mappings == bench.pool.driver.ledger.n_bytes == 0


def test_the_cgroup_with_the_least_left_counts(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 99999999 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/box/inner\n")
    inner = tmp_path / "sys/fs/cgroup/box/inner"
    inner.mkdir(parents=True)
    for folder, limit, used in ((inner, 8, 0), (inner.parent, 10, 9)):
        (folder / "memory.max").write_text(f"{limit * GIB}\n")
        (folder / "memory.current").write_text(f"{used * GIB}\n")
    assert describe_machine(tmp_path).usable_memory_bytes == GIB
    (inner.parent / "memory.stat").write_text(f"anon 5\ninactive_file {2 * GIB}\n")
    assert describe_machine(tmp_path).usable_memory_bytes == 3 * GIB


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # other tests may have left threads
def test_a_forked_child_does_not_keep_the_parents_memory() -> None:
    driver = HostDriver("python")
    child = os.fork()
    if child == 0:
        try:
            os.fstat(driver._fd)
        except OSError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.fstat(driver._fd)
    driver.close()


def test_premapping_that_gets_no_thread_says_so(
    open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    bench = open_bench()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Premapper(bench.cache, 10) as premapper:
        assert isinstance(premapper.error, RuntimeError)
        assert "mapping is synchronous: can't start new thread" in caplog.text
        assert not premapper.is_alive
        assert premapper.wait_idle()
        with pytest.raises(UsageError, match="starts once"):
            premapper.start()
    bench.close()


def test_pages_for_one_place_in_one_batch_are_different_pages(path: str) -> None:
    driver = HostDriver(path)
    handles: list[Handle] = []
    driver.create(PAGE, [PAGE, PAGE, PAGE], handles)
    assert len(set(handles)) == 3
    assert driver.physical_bytes() == 3 * PAGE
    driver.release(PAGE, handles)
    driver.close()


def test_a_reservation_above_the_limit_is_refused_as_such(path: str) -> None:
    driver = HostDriver(path)
    with pytest.raises(OutOfAddressSpace, match="more than"):
        driver.reserve(driver.info.max_reservation_bytes + PAGE)
    driver.close()


def test_spans_made_accessible_before_a_failure_count_as_accessible(open_bench: OpenBench) -> None:
    bench = open_bench()
    reservation = bench.driver.reserve(4 * PAGE)
    places = [reservation.base, reservation.base + 2 * PAGE]
    handles: list[Handle] = []
    bench.driver.create(PAGE, places, handles)
    bench.driver.map(PAGE, places, handles)
    with bench.faulty.failing(fail_kind("set_access", 2)), pytest.raises(Exception, match="injected"):
        bench.driver.set_access([(place, PAGE) for place in places])
    bench.driver.scrub([(places[0], PAGE)])
    with pytest.raises(UsageError):
        bench.driver.scrub([(places[1], PAGE)])
