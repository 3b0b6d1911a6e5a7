"""Mistakes that random operations cannot meet: each has a situation of its own in which it shows.

A kernel that runs on another stream than the one on which a sequence ends, forks, or gives up pages. A second Ctrl-C,
behind an unmap that took effect, while the first one is being cleaned up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver, Fence, Span
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.driver.cuda import CudaDriver, NoRuntime
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import VmemError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.testing import Adaptor
from vmem_kv.testing.emulator import Emulator
from vmem_kv.testing.operations import odd_layout

from ..core.backends import emulated_device
from .drivers import open_driver
from .mistakes import (
    Mistake,
    forgets_streams_of_forks,
    is_certain_after_a_second_interruption,
    shares_under_kernels,
    truncates_under_kernels,
    vacates_under_kernels,
    waits_for_its_own_stream_only,
)


class ChosenStream(NoRuntime):
    """A runtime whose current stream the test chooses."""

    stream = 0

    def current_stream(self) -> int:
        return self.stream


def end_beside_a_kernel() -> None:
    """A sequence ends on the default stream; a kernel that reads it still runs on the stream on which it grew."""
    from cuda.bindings import driver as cuda

    emulator, runtime = emulated_device(), ChosenStream()
    driver = CudaDriver(0, runtime, ledger=Ledger())
    page = driver.info.granularity_bytes
    with driver.in_context():
        stream = int(cuda.cuStreamCreate(1)[1])
    cache = KVCache(PagePool(driver, page, 60), odd_layout("token_major", page, n_slots=1))
    slot_id = cache.acquire()
    runtime.stream = stream
    cache.ensure({slot_id: 5})
    emulator.hold(stream)
    emulator.use(cache.region.reservation.base, 64, stream)  # the kernel
    runtime.stream = 0
    cache.retire(slot_id)
    cache.reclaim(0)  # moves on whatever may move on, and unmaps nothing
    state = cache.slot_stats()[slot_id].state
    emulator.let_go(stream)
    n_pages = cache.reclaim(1000)
    cache.close()
    cache.pool.trim()
    with driver.in_context():
        cuda.cuStreamDestroy(stream)
    driver.close()
    assert (state, n_pages) == ("retired", 2)


def test_nothing_is_unmapped_under_a_kernel_on_another_stream() -> None:
    end_beside_a_kernel()


def test_a_fence_that_forgets_the_other_streams_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    waits_for_its_own_stream_only(monkeypatch)
    with pytest.raises(AssertionError):
        end_beside_a_kernel()


class KernelOnAStream(Adaptor):
    """A stream is held, as if a kernel ran on it, until somebody waits for a fence behind it.

    Attributes:
        n_early: Unmaps before that. The kernel is ended first, so that nothing worse comes of it.
    """

    def __init__(self, inner: Driver, emulator: Emulator) -> None:
        super().__init__(inner)
        self.n_early = 0
        self._emulator = emulator
        self._held = 0

    def hold(self, stream: int) -> None:
        self._emulator.hold(stream)
        self._held = stream

    def end(self) -> None:
        if self._held:
            self._emulator.let_go(self._held)
            self._held = 0

    def fence(self, streams: Collection[int] = ()) -> Fence:
        return _EndsTheKernel(self, self.inner.fence(streams))

    def unmap(self, spans: Sequence[Span]) -> None:
        self.n_early += self._held != 0
        self.end()
        self.inner.unmap(spans)


class _EndsTheKernel:
    """A fence of the device; who waits for it outlives the kernel, if it is behind it."""

    def __init__(self, kernel: KernelOnAStream, fence: Fence) -> None:
        self._kernel = kernel
        self._fence = fence

    def passed(self) -> bool:
        return self._fence.passed()

    def wait(self) -> None:
        if not self._fence.passed():
            self._kernel.end()
        self._fence.wait()


def truncate(cache: KVCache, source: SlotId) -> None:
    """Give up tokens that are shared; some of what is left lies in the page that goes."""
    cache.truncate(source, 19)


def share(cache: KVCache, source: SlotId) -> None:
    """Go on from the tokens of another sequence."""
    cache.share({source: SlotId(1)}, 40)


def vacate(cache: KVCache, source: SlotId) -> None:
    cache.vacate(source)


def slide(cache: KVCache, source: SlotId) -> None:
    cache.slide(source, 30)
    cache.reclaim(1)


def retire(cache: KVCache, source: SlotId) -> None:
    cache.retire(source)
    cache.reclaim(1000)


Step = Callable[[KVCache, SlotId], object]


def give_up_beside_a_kernel(step: Step, *, forks: bool) -> tuple[int, int]:
    """Let a step on the default stream give up pages under a kernel on another one; return unmaps before and after it.

    Args:
        step: The step.
        forks: Whether the kernel is the copy of a tail, made by a fork on that stream, on which nobody ever grew. Else
            the sequence grew there, and slot 1 is another sequence.
    """
    from cuda.bindings import driver as cuda

    emulator, runtime = emulated_device(), ChosenStream()
    device = CudaDriver(0, runtime, ledger=Ledger())
    driver = KernelOnAStream(device, emulator)
    page = driver.info.granularity_bytes
    with device.in_context():
        stream = int(cuda.cuStreamCreate(1)[1])
    cache = KVCache(PagePool(driver, page, 90), odd_layout("token_major", page, n_slots=3))
    source, other = cache.acquire(), cache.acquire()
    cache.ensure({other: 40})
    if not forks:
        runtime.stream = stream
    cache.ensure({source: 40})
    driver.hold(stream)
    runtime.stream = stream
    if forks:
        cache.fork(source)
    else:
        emulator.use(cache.layout.starts(cache.region.reservation.base, source)[0], 40 * 1200, stream)
    runtime.stream = 0
    n_before = driver.calls["unmap"]
    step(cache, source)
    n_early = driver.n_early
    driver.end()
    cache.retire(cache.active_slots())
    cache.reclaim(1000)
    n_unmaps = driver.calls["unmap"] - n_before
    cache.check()
    cache.close()
    cache.pool.trim()
    with device.in_context():
        cuda.cuStreamDestroy(stream)
    device.close()
    return n_early, n_unmaps


@pytest.mark.parametrize("step", [share, vacate, slide, retire])
def test_nothing_goes_under_a_kernel_on_a_stream_on_which_a_sequence_grew(step: Step) -> None:
    n_early, n_unmaps = give_up_beside_a_kernel(step, forks=False)
    assert n_early == 0
    assert n_unmaps > 0


@pytest.mark.parametrize("step", [truncate, vacate, slide, retire])
def test_nothing_goes_under_the_copy_of_a_fork(step: Step) -> None:
    n_early, n_unmaps = give_up_beside_a_kernel(step, forks=True)
    assert n_early == 0
    assert n_unmaps > 0


@pytest.mark.parametrize(
    ("mistake", "step", "forks"),
    [
        (truncates_under_kernels, truncate, True),
        (shares_under_kernels, share, False),
        (vacates_under_kernels, vacate, False),
        *((forgets_streams_of_forks, step, True) for step in (truncate, vacate, slide, retire)),
        *((waits_for_its_own_stream_only, step, False) for step in (share, vacate, slide, retire)),
    ],
)
def test_pages_that_go_under_a_kernel_are_seen(
    mistake: Mistake, step: Step, forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    n_early, _ = give_up_beside_a_kernel(step, forks=forks)
    assert n_early > 0


class InterruptedUnmaps(Adaptor):
    """Is interrupted in unmaps, one after the other: "before" it takes effect, or "behind" that."""

    def __init__(self, inner: Driver, moments: Sequence[str]) -> None:
        super().__init__(inner)
        self.moments = list(moments)

    def unmap(self, spans: Sequence[Span]) -> None:
        moment = self.moments.pop(0) if self.moments else ""
        if moment != "before":
            self.inner.unmap(spans)
        if moment:
            interruption = KeyboardInterrupt(f"injected {moment} an unmap")
            interruption.n_done = len(spans) if moment == "behind" else 0  # type: ignore[attr-defined] # for checks only
            raise interruption


def interrupt_unmaps(device: Driver, moments: Sequence[str]) -> None:
    """Reclaim, be interrupted, and go on: in the end all pages are back and the driver has nothing mapped."""
    interrupted = InterruptedUnmaps(device, moments)
    driver = CheckedDriver(interrupted)
    page = driver.info.granularity_bytes
    cache = KVCache(PagePool(driver, page, 60), odd_layout("per_layer", page, n_slots=1))
    slot_id = cache.acquire()
    cache.ensure({slot_id: 40})
    cache.retire(slot_id)
    with pytest.raises(KeyboardInterrupt):
        cache.reclaim(1000)
    cache.check()
    assert interrupted.moments == []
    cache.reclaim(0)
    assert cache.pool.n_quarantined == 0
    assert driver.n_live_mappings == 0
    cache.check()
    cache.ensure({cache.acquire(): 40})  # in the same slot, which is whole again
    cache.retire(cache.active_slots())
    cache.close()
    cache.pool.trim()
    assert driver.n_live_handles == 0


@pytest.mark.parametrize("moments", [["behind"], ["before", "behind"], ["before", "before"]], ids=" ".join)
def test_interrupted_unmaps_lose_nothing(driver: Driver, moments: list[str]) -> None:
    interrupt_unmaps(driver, moments)


def test_ranges_taken_for_mapped_after_a_second_interruption_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    is_certain_after_a_second_interruption(monkeypatch)
    with pytest.raises((AssertionError, VmemError)):
        interrupt_unmaps(open_driver("native"), ["before", "behind"])
