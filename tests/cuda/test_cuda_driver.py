"""The CUDA driver by itself: what it says when CUDA fails, whose context and streams it uses, what it leaves behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from tests.core.subprocesses import output_of, run_python
from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Copy, Handle
from vmem_kv.driver.cuda import CudaDriver, NoRuntime, describe_cuda
from vmem_kv.driver.cuda_errors import LOST_CODES
from vmem_kv.driver.ledger import Ledger, ledger_of_device
from vmem_kv.errors import ConfigError, DriverError, OutOfAddressSpace, OutOfMappings, OutOfPages, UsageError
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.pages import PagePool
from vmem_kv.testing import DriverMemory, HostMemory
from vmem_kv.testing.emulator import NOTHING, Emulator, load_emulator

T = TypeVar("T")
PAGE = 2 << 20
INVALID_VALUE, OUT_OF_MEMORY, DEINITIALIZED, ILLEGAL_ADDRESS, NOT_READY, LAUNCH_FAILED = 1, 2, 4, 700, 600, 719


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """A new device. Afterwards nothing may be live, and no rule broken."""
    emulator = load_emulator()
    emulator.reset()
    yield emulator
    live, violations = emulator.live(), emulator.violations()
    emulator.reset(force=True)
    emulator.set_granularity(4096)  # as the allocator's tests want it
    assert live == NOTHING
    assert violations == []


@pytest.fixture
def driver(emulator: Emulator) -> Iterator[CudaDriver]:
    driver = CudaDriver(0, NoRuntime(), ledger=Ledger())
    yield driver
    driver.close()


class Pages:
    """Some mapped pages and how to be rid of them."""

    def __init__(self, driver: CudaDriver, n_pages: int) -> None:
        self.driver = driver
        self.reservation = driver.reserve(n_pages * PAGE)
        self.places = [self.reservation.base + i * PAGE for i in range(n_pages)]
        self.handles: list[Handle] = []
        driver.create(PAGE, self.places, self.handles)
        driver.map(PAGE, self.places, self.handles)
        driver.set_access([(self.reservation.base, n_pages * PAGE)])

    def free(self) -> None:
        self.driver.unmap([(self.reservation.base, len(self.places) * PAGE)])
        self.driver.release(PAGE, self.handles)
        self.driver.free_reservation(self.reservation)


# One call for each run


def test_a_run_costs_one_access_call_and_one_unmap_call(emulator: Emulator, driver: CudaDriver) -> None:
    pages = Pages(driver, 8)
    calls = emulator.calls()
    assert (calls["cuMemCreate"], calls["cuMemMap"], calls["cuMemSetAccess"]) == (8, 8, 1)
    pages.free()
    assert emulator.calls()["cuMemUnmap"] == 1


# Errors


def test_a_failed_call_names_operation_code_range_and_device(emulator: Emulator, driver: CudaDriver) -> None:
    pages = Pages(driver, 2)
    emulator.fail("cuMemUnmap", INVALID_VALUE, nth=2)
    with pytest.raises(DriverError) as caught:
        driver.unmap([(place, PAGE) for place in pages.places])
    error = caught.value
    assert (error.operation, error.code, error.name, error.n_done) == ("unmap", 1, "CUDA_ERROR_INVALID_VALUE", 1)
    assert f"[{pages.places[1]:#x}, {pages.places[1] + PAGE:#x})" in str(error)
    assert "cuda:0" in str(error)
    assert not error.is_fatal
    driver.unmap([(pages.places[1], PAGE)])
    driver.release(PAGE, pages.handles)
    driver.free_reservation(pages.reservation)


@pytest.mark.parametrize(
    ("call", "operation"), [("cuMemMap", "map"), ("cuMemSetAccess", "set_access"), ("cuMemUnmap", "unmap")]
)
def test_a_batch_that_breaks_off_says_how_far_it_came(
    emulator: Emulator, driver: CudaDriver, call: str, operation: str
) -> None:
    reservation = driver.reserve(4 * PAGE)
    places = [reservation.base + i * PAGE for i in range(4)]
    handles: list[Handle] = []
    driver.create(PAGE, places, handles)
    spans = [(place, PAGE) for place in places]
    steps = {
        "map": lambda first: driver.map(PAGE, places[first:], handles[first:]),
        "set_access": lambda first: driver.set_access(spans[first:]),
        "unmap": lambda first: driver.unmap(spans[first:]),
    }
    for name, step in steps.items():
        if name == operation:
            emulator.fail(call, INVALID_VALUE, nth=3)
            with pytest.raises(DriverError) as caught:
                step(0)
            assert caught.value.n_done == 2
        step(2 if name == operation else 0)
    driver.release(PAGE, handles)
    driver.free_reservation(reservation)


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess"])
def test_memory_that_runs_out_while_mapping_is_a_lack_of_mappings(
    emulator: Emulator, driver: CudaDriver, call: str
) -> None:
    reservation = driver.reserve(2 * PAGE)
    places = [reservation.base, reservation.base + PAGE]
    handles: list[Handle] = []
    driver.create(PAGE, places, handles)
    emulator.fail(call, OUT_OF_MEMORY, nth=2, and_on=True)

    def map_both() -> None:
        driver.map(PAGE, places, handles)
        driver.set_access([(place, PAGE) for place in places])

    with pytest.raises(OutOfMappings, match="larger pages") as caught:
        map_both()
    assert caught.value.n_done == 1
    driver.unmap([(place, PAGE) for place in places[: 1 if call == "cuMemMap" else 2]])
    driver.release(PAGE, handles)
    driver.free_reservation(reservation)


@pytest.mark.parametrize("operation", ["scrub", "copy", "release"])
def test_n_done_counts_what_took_effect(emulator: Emulator, driver: CudaDriver, operation: str) -> None:
    pages = Pages(driver, 4)
    call = {"scrub": "cuMemsetD8Async", "copy": "cuMemcpyDtoDAsync", "release": "cuMemRelease"}[operation]
    if operation == "release":
        driver.unmap([(pages.reservation.base, 4 * PAGE)])
    emulator.fail(call, INVALID_VALUE, nth=3)
    with pytest.raises(DriverError) as caught:
        {
            "scrub": lambda: driver.scrub([(place, PAGE) for place in pages.places]),
            "copy": lambda: driver.copy([Copy(p, p + 64, 64) for p in pages.places]),
            "release": lambda: driver.release(PAGE, pages.handles),
        }[operation]()
    assert caught.value.n_done == 2
    if operation == "release":
        driver.release(PAGE, pages.handles[2:])
        driver.free_reservation(pages.reservation)
    else:
        pages.free()


def test_a_result_that_cuda_python_does_not_know_is_a_driver_error(emulator: Emulator, driver: CudaDriver) -> None:
    emulator.fail("cuMemCreate", 12345)
    with pytest.raises(DriverError, match=r"create failed with CUDA_ERROR_12345 \(12345\)"):
        driver.create(PAGE, [0], [])


def test_the_codes_that_end_a_context_are_those_that_cuda_python_describes_so() -> None:
    from cuda.bindings import driver as cuda

    described = {
        int(code)
        for code in cuda.CUresult
        if "must be terminated" in (code.__doc__ or "") or "process must be terminated" in (code.__doc__ or "")
    }
    assert described <= LOST_CODES


def test_a_batch_that_runs_out_of_memory_keeps_what_it_created(emulator: Emulator, driver: CudaDriver) -> None:
    emulator.cap_memory(3 * PAGE)
    reservation = driver.reserve(4 * PAGE)
    handles: list[Handle] = []
    with pytest.raises(OutOfPages, match=r"no memory for another page of 2\.00 MiB"):
        driver.create(PAGE, [reservation.base + i * PAGE for i in range(4)], handles)
    assert len(handles) == 3
    driver.release(PAGE, handles)
    driver.free_reservation(reservation)


class Hoarder(NoRuntime):
    """Keeps memory of the device for later, as torch does."""

    def __init__(self) -> None:
        self.n_asked = 0
        self.driver: CudaDriver | None = None
        self.kept: list[Handle] = []

    def spare_bytes(self) -> int:
        return len(self.kept) * PAGE

    def free_cached_memory(self) -> None:
        self.n_asked += 1
        if self.kept and self.driver is not None:
            self.driver.release(PAGE, [self.kept.pop()])


def test_what_torch_keeps_is_asked_for_once_before_memory_has_run_out(emulator: Emulator) -> None:
    hoarder = Hoarder()
    driver = hoarder.driver = CudaDriver(0, hoarder, ledger=Ledger())
    emulator.cap_memory(2 * PAGE)
    driver.create(PAGE, [0], hoarder.kept)
    handles: list[Handle] = []
    assert driver.available_bytes() == 2 * PAGE  # one that nobody has, one that can be asked for
    driver.create(PAGE, [0, PAGE], handles)
    assert hoarder.n_asked == 1
    with pytest.raises(OutOfPages):
        driver.create(PAGE, [0, PAGE], [])
    assert hoarder.n_asked == 2
    driver.release(PAGE, handles)
    driver.close()


def test_who_cannot_give_memory_just_now_is_not_in_the_way(emulator: Emulator) -> None:
    class Capturing(NoRuntime):
        def free_cached_memory(self) -> None:
            raise RuntimeError("not while a graph is being captured")

    driver = CudaDriver(0, Capturing(), ledger=Ledger())
    emulator.cap_memory(PAGE)
    with pytest.raises(OutOfPages):
        driver.create(PAGE, [0, PAGE], [])
    driver.close()


def test_addresses_that_run_out_are_named_so(emulator: Emulator, driver: CudaDriver) -> None:
    emulator.fail("cuMemAddressReserve", OUT_OF_MEMORY, and_on=True)
    with pytest.raises(OutOfAddressSpace, match="lower max_tokens"):
        driver.reserve(PAGE)


def test_not_ready_is_waited_for_and_asked_again(emulator: Emulator, driver: CudaDriver) -> None:
    emulator.fail("cuMemSetAccess", NOT_READY)
    pages = Pages(driver, 1)
    assert emulator.calls()["cuMemSetAccess"] == 2
    assert emulator.calls()["cuCtxSynchronize"] == 1
    pages.free()


def test_an_error_of_earlier_work_is_told_beside_the_failed_call(emulator: Emulator, driver: CudaDriver) -> None:
    emulator.fail("cuMemCreate", INVALID_VALUE)
    emulator.fail("cuCtxSynchronize", LAUNCH_FAILED)
    with pytest.raises(DriverError, match=r"the device reports CUDA_ERROR_LAUNCH_FAILED \(719\)") as caught:
        driver.create(PAGE, [0], [])
    assert caught.value.is_fatal
    driver.close()  # gives nothing back: the context is broken
    assert emulator.live().contexts == 1
    emulator.reset(force=True)


@pytest.mark.parametrize("code", [ILLEGAL_ADDRESS, LAUNCH_FAILED, DEINITIALIZED])
def test_after_a_sticky_error_cuda_is_not_called_any_more(emulator: Emulator, driver: CudaDriver, code: int) -> None:
    pages = Pages(driver, 1)
    fence = driver.fence()
    emulator.make_sticky(code)
    with pytest.raises(DriverError) as caught:
        driver.unmap([(pages.places[0], PAGE)])
    assert caught.value.is_fatal
    calls = emulator.calls()
    for call in (
        lambda: driver.reserve(PAGE),
        lambda: driver.create(PAGE, [0], []),
        lambda: driver.map(PAGE, pages.places, pages.handles),
        lambda: driver.set_access([(pages.places[0], PAGE)]),
        lambda: driver.unmap([(pages.places[0], PAGE)]),
        lambda: driver.release(PAGE, pages.handles),
        lambda: driver.scrub([(pages.places[0], PAGE)]),
        lambda: driver.copy([Copy(pages.places[0], pages.places[0] + 64, 64)]),
        lambda: driver.fence(),
        lambda: driver.free_reservation(pages.reservation),
    ):
        with pytest.raises(DriverError, match="not tried: the device was lost"):
            call()
    assert fence.passed()  # a lost device runs nothing
    driver.close()
    assert emulator.calls() == calls
    emulator.make_sticky(0)
    emulator.reset(force=True)


# Handles


def test_a_double_release_does_not_reach_cuda(emulator: Emulator, driver: CudaDriver) -> None:
    handles: list[Handle] = []
    driver.create(PAGE, [0, PAGE], handles)
    driver.release(PAGE, handles[:1])
    n_releases = emulator.calls()["cuMemRelease"]
    for again in (handles[:1], [handles[1], handles[1]], [Handle(12345)], handles):
        with pytest.raises(UsageError, match="not a live page"):
            driver.release(PAGE, again)
    with pytest.raises(UsageError, match="not a live page"):
        driver.release(2 * PAGE, handles[1:])
    assert emulator.calls()["cuMemRelease"] == n_releases
    driver.release(PAGE, handles[1:])


def test_pages_that_nobody_released_go_with_the_driver(emulator: Emulator) -> None:
    driver = CudaDriver(0, NoRuntime(), ledger=Ledger())
    driver.create(PAGE, [0, PAGE], [])
    driver.close()
    assert emulator.live() == NOTHING


def test_a_planted_leak_is_seen(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector of these tests: a driver that forgets a page is found out by the device's own count."""
    monkeypatch.setattr(CudaDriver, "release", lambda driver, page_bytes, handles: driver._pages.clear())
    driver = CudaDriver(0, NoRuntime(), ledger=Ledger())
    Pages(driver, 2).free()
    driver.close()
    assert emulator.live() != NOTHING
    emulator.reset(force=True)


# Contexts and threads


def test_the_primary_context_is_current_in_every_call_and_in_our_own_threads(
    emulator: Emulator, driver: CudaDriver
) -> None:
    from cuda.bindings import driver as cuda

    seen: list[int] = []

    def work() -> None:
        Pages(driver, 1).free()
        seen.append(int(cuda.cuCtxGetCurrent()[1]))  # torch would take its device from it
        driver.bind_thread()
        seen.append(int(cuda.cuCtxGetCurrent()[1]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0, int(driver._context.handle)]


def test_the_context_of_another_device_is_left_as_it_was_found(emulator: Emulator) -> None:
    from cuda.bindings import driver as cuda

    emulator.set_n_devices(2)
    first, second = CudaDriver(0, NoRuntime(), ledger=Ledger()), CudaDriver(1, NoRuntime(), ledger=Ledger())
    cuda.cuCtxSetCurrent(second._context.handle)
    pages = Pages(first, 2)
    first.scrub([(pages.places[0], PAGE)])
    assert first.fence().passed()
    pages.free()
    with pytest.raises(UsageError, match="not a live page"):
        first.release(PAGE, pages.handles)
    assert int(cuda.cuCtxGetCurrent()[1]) == int(second._context.handle)
    first.close()
    assert int(cuda.cuCtxGetCurrent()[1]) == int(second._context.handle)
    second.close()


def test_a_worker_thread_disturbs_nobody(emulator: Emulator, driver: CudaDriver) -> None:
    """A page is scrubbed at once in a mapper's thread, however long the streams of others are busy."""
    pages = Pages(driver, 1)
    emulator.hold(0)
    HostMemory().write(pages.places[0], b"old")

    def work() -> None:
        driver.bind_thread()
        driver.bind_thread()
        driver.scrub([(pages.places[0], PAGE)])

    for _ in range(3):  # threads come and go
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    del thread
    gc.collect()
    assert HostMemory().read(pages.places[0], 3) == b"\0\0\0"
    assert emulator.live().streams <= 2  # a thread's stream is used again
    emulator.let_go(0)
    pages.free()


def test_a_worker_thread_waits_for_its_own_work(emulator: Emulator, driver: CudaDriver) -> None:
    pages = Pages(driver, 1)
    is_bound, may_scrub, is_done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        driver.bind_thread()
        is_bound.set()
        may_scrub.wait()
        driver.scrub([(pages.places[0], PAGE)])
        is_done.set()

    thread = threading.Thread(target=work)
    thread.start()
    is_bound.wait()
    (stream,) = emulator.streams()
    emulator.hold(stream)
    may_scrub.set()
    assert not is_done.wait(0.1)
    emulator.let_go(stream)
    thread.join()
    assert is_done.is_set()
    pages.free()


# Streams and fences


def test_scrubs_and_copies_are_queued_and_ordered(emulator: Emulator, driver: CudaDriver) -> None:
    pages = Pages(driver, 2)
    first, second = pages.places
    memory = HostMemory()
    memory.write(first, b"first")
    memory.write(second, b"second")
    emulator.hold(0)
    driver.copy([Copy(first, second, 5)])
    driver.scrub([(first, PAGE)])
    fence = driver.fence()
    assert not fence.passed()
    assert memory.read(second, 6) == b"second"
    emulator.let_go(0)
    fence.wait()
    assert fence.passed()
    assert memory.read(second, 6) == b"firstd"
    assert memory.read(first, 5) == bytes(5)
    pages.free()


def test_work_goes_to_the_stream_of_whoever_launches(emulator: Emulator) -> None:
    from cuda.bindings import driver as cuda

    class OnAStream(NoRuntime):
        stream = 0

        def current_stream(self) -> int:
            return self.stream

    runtime = OnAStream()
    driver = CudaDriver(0, runtime, ledger=Ledger())
    pages = Pages(driver, 1)
    with driver.in_context():
        stream = cuda.cuStreamCreate(1)[1]
    runtime.stream = int(stream)
    emulator.hold(int(stream))
    driver.scrub([(pages.places[0], PAGE)])
    runtime.stream = 0
    here, there = driver.fence(), driver.fence([int(stream)])
    assert here.passed()
    assert not there.passed()
    emulator.let_go(int(stream))
    assert there.passed()
    pages.free()
    with driver.in_context():
        cuda.cuStreamDestroy(stream)
    driver.close()


def test_a_cache_waits_for_every_stream_that_grew_its_sequences(emulator: Emulator) -> None:
    from cuda.bindings import driver as cuda

    class OnAStream(NoRuntime):
        stream = 0

        def current_stream(self) -> int:
            return self.stream

    runtime = OnAStream()
    driver = CudaDriver(0, runtime, ledger=Ledger())
    with driver.in_context():
        stream = cuda.cuStreamCreate(1)[1]
    pool = PagePool(driver, PAGE, 16)
    layout = Layout.build("token_major", [LayerSpec.uniform(2, 64, 2)], n_slots=1, max_tokens=64, page_bytes=PAGE)
    cache = KVCache(pool, layout)
    slot_id = cache.acquire()
    runtime.stream = int(stream)
    cache.ensure({slot_id: 5})
    emulator.hold(int(stream))
    emulator.use(cache.region.reservation.base, 64, int(stream))  # a kernel
    runtime.stream = 0
    cache.retire(slot_id)
    assert cache.reclaim(1) == 0
    emulator.let_go(int(stream))
    assert cache.reclaim(1) == 1
    cache.close()
    pool.trim()
    with driver.in_context():
        cuda.cuStreamDestroy(stream)
    driver.close()


def test_a_garbage_collection_in_the_middle_of_a_call_may_close_a_cache(emulator: Emulator, driver: CudaDriver) -> None:
    """It runs in the same thread, wherever that is; a lock that is not reentrant would wait for itself."""
    reservation = driver.reserve(PAGE)
    with driver._lock, driver.ledger._lock:
        driver.fence()
        handles: list[Handle] = []
        driver.create(PAGE, [reservation.base], handles)
        driver.ledger.charge_bytes(1, 2)
        driver.ledger.refund_bytes(1)
        driver.release(PAGE, handles)
        driver.free_reservation(reservation)


def test_what_failed_is_not_running_any_more(emulator: Emulator, driver: CudaDriver) -> None:
    """Whoever undoes a failed scrub may unmap at once."""
    pages = Pages(driver, 2)
    emulator.fail("cuMemsetD8Async", INVALID_VALUE, nth=2)
    with pytest.raises(DriverError) as caught:
        driver.scrub([(place, PAGE) for place in pages.places])
    assert caught.value.n_done == 1
    assert emulator.calls()["cuStreamSynchronize"] == 1
    pages.free()


def test_events_are_used_again(emulator: Emulator, driver: CudaDriver) -> None:
    for _ in range(20):
        assert driver.fence().passed()
    assert emulator.live().events == 1


def test_host_copies_wait_for_their_fence(emulator: Emulator, driver: CudaDriver) -> None:
    pages = Pages(driver, 1)
    emulator.hold(0)
    source, target = bytearray(b"from the host"), bytearray(13)
    up = driver.copy_from_host(memoryview(source), pages.places[0] + 100)
    down = driver.copy_to_host(pages.places[0] + 100, memoryview(target))
    assert not up.passed()
    assert not down.passed()
    emulator.let_go(0)
    down.wait()
    assert target == source
    DriverMemory(driver).write(pages.places[0], b"read-only")  # memory of which ctypes takes no address
    assert HostMemory().read(pages.places[0], 9) == b"read-only"
    pages.free()


def test_a_fence_that_nobody_holds_leaves_no_event_behind(emulator: Emulator, driver: CudaDriver) -> None:
    emulator.hold(0)
    for _ in range(10):
        driver.fence()
    emulator.let_go(0)
    assert emulator.live().events <= 2


def test_a_stream_that_is_gone_is_waited_for_with_everything_else(emulator: Emulator, driver: CudaDriver) -> None:
    from cuda.bindings import driver as cuda

    pages = Pages(driver, 1)
    with driver.in_context():
        stream = cuda.cuStreamCreate(1)[1]
        cuda.cuStreamDestroy(stream)
    fence = driver.fence([int(stream)])
    assert emulator.calls()["cuCtxSynchronize"] == 1
    assert fence.passed()
    emulator.forget_violations()  # to ask for it is what the emulator objects to
    pages.free()


def test_a_stream_that_is_captured_gives_no_fence(emulator: Emulator, driver: CudaDriver) -> None:
    emulator.capture(0, True)
    with pytest.raises(UsageError, match="a CUDA graph is being captured on this stream"):
        driver.fence()
    emulator.capture(0, False)
    assert driver.fence().passed()


# Interruptions: a signal's handler runs between two steps of the interpreter, when the call that it met has returned

CALLS = {
    "cuMemAddressReserve": 1,
    "cuMemCreate": 3,
    "cuMemMap": 3,
    "cuMemSetAccess": 1,
    "cuMemsetD8Async": 1,
    "cuEventRecord": 1,
    "cuMemUnmap": 1,
    "cuMemRelease": 3,
    "cuMemAddressFree": 1,
}


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_in_a_call_loses_nothing(emulator: Emulator, call: str) -> None:
    """No checked driver in between: the CUDA driver's own books must be right."""
    driver = CudaDriver(0, NoRuntime(), ledger=Ledger())
    spec = LayerSpec.uniform(2, 64, 4)
    emulator.slow(call, 300_000)  # long enough for a shot to come while it is under way
    interrupted = 0

    def attempt(step: Callable[[], T]) -> T:
        """Do it under fire, until that has hit once; then in peace."""
        nonlocal interrupted
        if interrupted:
            return step()
        n_calls = emulator.calls()[call]
        done = threading.Event()

        def shoot() -> None:
            while not done.is_set() and emulator.calls()[call] < n_calls + CALLS[call]:
                time.sleep(0.001)
            if not done.is_set():
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        shooter = threading.Thread(target=shoot)
        shooter.start()
        results: list[T] = []
        try:
            try:
                results.append(step())
            finally:
                done.set()
                shooter.join()
        except KeyboardInterrupt:
            done.set()
            shooter.join()
            assert not results, "the shot came when all was done"
            interrupted += 1
        if results:
            return results[0]
        emulator.slow(call, 0)
        return step()

    pool = PagePool(driver, PAGE, 64)
    layout = Layout.build("per_layer", [spec] * 2, n_slots=2, max_tokens=8192, page_bytes=PAGE)
    cache = attempt(lambda: KVCache(pool, layout))
    slot_id = cache.acquire()
    attempt(lambda: cache.ensure({slot_id: 5000}))
    cache.check()
    attempt(lambda: cache.retire(slot_id) if slot_id in cache.active_slots() else None)
    attempt(lambda: cache.reclaim(4))
    cache.check()
    slot_id = cache.acquire()
    cache.ensure({slot_id: 3000})
    cache.retire(slot_id)
    attempt(cache.close)
    attempt(pool.trim)
    assert interrupted == 1
    assert pool.n_owned == pool.n_quarantined == 0
    driver.close()
    # The device is asked where an answer was lost; the emulator objects to questions about nothing.
    assert [v for v in emulator.violations() if "cuMemRetainAllocationHandle: nothing is mapped" not in v] == []
    emulator.forget_violations()


# Opening and closing


def test_close_refuses_while_reservations_are_left(driver: CudaDriver) -> None:
    reservation = driver.reserve(PAGE)
    with pytest.raises(UsageError, match="1 reservations are still open"):
        driver.close()
    driver.free_reservation(reservation)


def test_drivers_of_one_device_share_a_ledger(emulator: Emulator) -> None:
    emulator.set_n_devices(2)
    drivers = [CudaDriver(index, NoRuntime()) for index in (0, 0, 1)]
    assert drivers[0].ledger is drivers[1].ledger is ledger_of_device(drivers[0].uuid)
    assert drivers[2].ledger is not drivers[0].ledger
    for driver in drivers:
        driver.close()


def test_a_device_that_cannot_be_used_is_refused_with_the_reason(emulator: Emulator) -> None:
    with pytest.raises(ConfigError, match="there is no device cuda:3: the NVIDIA driver sees 1"):
        CudaDriver(3, NoRuntime())
    emulator.support_virtual_memory(False)
    with pytest.raises(ConfigError, match="no virtual memory management"):
        CudaDriver(0, NoRuntime())
    assert not describe_cuda().devices[0].has_virtual_memory
    emulator.support_virtual_memory(True)
    emulator.fail("cuMemGetAllocationGranularity", 801)
    with pytest.raises(ConfigError, match=r"CUDA_ERROR_NOT_SUPPORTED.* use another GPU or a newer driver"):
        CudaDriver(0, NoRuntime())
    emulator.fail("cuDevicePrimaryCtxRetain", 46)
    with pytest.raises(ConfigError, match="another process has it for itself"):
        CudaDriver(0, NoRuntime())


def test_a_machine_without_a_device_is_refused_with_the_reason(emulator: Emulator) -> None:
    emulator.set_n_devices(0)
    with pytest.raises(ConfigError, match="sees no device; check nvidia-smi"):
        CudaDriver(0, NoRuntime())


def test_without_a_driver_everything_else_works_and_cuda_says_what_is_missing() -> None:
    output = output_of(
        """
        from vmem_kv.errors import ConfigError
        from vmem_kv.driver.cuda import CudaDriver, NoRuntime, describe_cuda
        for call in (lambda: CudaDriver(0, NoRuntime()), describe_cuda):
            try:
                call()
            except ConfigError as error:
                print(error)
        """
    )
    assert output.count("libcuda.so.1 was not found; install the driver") == 2


def test_without_cuda_python_the_error_says_what_to_install() -> None:
    output = output_of(
        """
        import sys
        sys.modules["cuda.bindings"] = None
        from vmem_kv.errors import ConfigError
        from vmem_kv.driver.cuda import CudaDriver, NoRuntime
        try:
            CudaDriver(0, NoRuntime())
        except ConfigError as error:
            print(error)
        """
    )
    assert "pip install cuda-bindings" in output


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # other tests may have left threads
def test_a_forked_child_is_refused_and_harms_nobody(emulator: Emulator, driver: CudaDriver) -> None:
    pages = Pages(driver, 1)
    pid = os.fork()
    if pid == 0:
        n_refused = 0
        for call in (lambda: driver.reserve(PAGE), lambda: driver.fence(), lambda: driver.unmap([])):
            try:
                call()
            except UsageError as error:
                n_refused += "spawn the process instead" in str(error)
        driver.close()
        os._exit(n_refused)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    pages.free()


@pytest.mark.parametrize("ending", ["", "import sys; sys.exit(3)", "raise KeyboardInterrupt"])
def test_a_process_that_ends_with_live_tensors_is_silent(ending: str) -> None:
    done = run_python(
        f"""
        import torch
        from vmem_kv.config import CacheConfig
        from vmem_kv.driver.cuda import CudaDriver, NoRuntime
        from vmem_kv.layout import LayerSpec
        from vmem_kv.rows import RowStore
        from vmem_kv.testing.emulator import load_emulator
        load_emulator()
        store = RowStore(CacheConfig(), 1, lambda device, config: CudaDriver(0, NoRuntime(), tensor_device="cpu"))
        rows = store.open_rows(LayerSpec.uniform(2, 64, 4), torch.float32, 2, torch.device("cpu"))
        rows.append(torch.ones(2, 2, 3, 64), torch.ones(2, 2, 3, 64))
        keys, values = rows.views()
        fence = store._pool.driver.fence()
        print(float(keys.sum() + values.sum()))
        {ending}
        """
    )
    assert done.stdout.strip() == "1536.0"
    assert done.returncode == {"": 0, "import sys; sys.exit(3)": 3, "raise KeyboardInterrupt": -2}[ending]
    assert "KeyboardInterrupt" in done.stderr if "Keyboard" in ending else done.stderr == ""
