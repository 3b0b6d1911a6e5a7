"""Mistakes that random operations cannot meet: each has a situation of its own in which it shows.

A kernel that runs on another stream than the one on which a sequence ends. A second Ctrl-C, behind an unmap that took
effect, while the first one is being cleaned up.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver, Span
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.driver.cuda import CudaDriver, NoRuntime
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import VmemError
from vmem_kv.pages import PagePool
from vmem_kv.testing import Adaptor
from vmem_kv.testing.operations import odd_layout

from ..core.backends import emulated_device
from .drivers import open_driver
from .mistakes import is_certain_after_a_second_interruption, waits_for_its_own_stream_only


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
