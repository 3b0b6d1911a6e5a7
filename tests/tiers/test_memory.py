"""Frames: the budget, who may refuse, and that a copy never crosses two buffers."""

from __future__ import annotations

import ctypes

import pytest

from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import ConfigError, DriverError, OutOfHostMemory, UsageError
from vmem_kv.machine import describe_machine
from vmem_kv.tiers.memory import FramePool, PinnedMemory, PlainMemory

from ..core.bench import PAGE


def open_pool(n_frames: int = 10, *, per_buffer: int = 4, memory: object = None, ledger: Ledger | None = None):
    return FramePool(
        n_frames * PAGE, memory, frame_bytes=PAGE, buffer_bytes=per_buffer * PAGE, ledger=ledger or Ledger()
    )


def test_views_are_contiguous_and_in_order() -> None:
    pool = open_pool()
    frames = pool.take(10)
    assert frames == list(range(10))
    assert [len(view) for view in pool.views(frames, 0, 10 * PAGE)] == [4 * PAGE, 4 * PAGE, 2 * PAGE]
    assert [len(view) for view in pool.views(frames, 100, 50)] == [50]
    assert [len(view) for view in pool.views(frames, PAGE - 1, PAGE + 2)] == [PAGE + 2]
    assert [len(view) for view in pool.views(frames, 4 * PAGE - 1, 2)] == [1, 1]  # of two buffers
    assert pool.views(frames, 5, 0) == []
    data = bytes(range(256)) * (10 * PAGE // 256)
    at = 0
    for view in pool.views(frames, 0, 10 * PAGE):
        view[:] = data[at : at + len(view)]
        at += len(view)
    scattered = [frames[i] for i in (3, 9, 0, 1, 5)]
    views = pool.views(scattered, 10, 5 * PAGE - 20)
    assert [len(view) for view in views] == [PAGE - 10, PAGE, 2 * PAGE, PAGE - 10]
    expected = b"".join(data[f * PAGE : (f + 1) * PAGE] for f in scattered)
    assert b"".join(views) == expected[10 : 5 * PAGE - 10]
    pool.give(frames)
    pool.close()


def test_the_lowest_free_frames_are_taken_first_and_whole_buffers_go_back() -> None:
    ledger = Ledger()
    pool = open_pool(ledger=ledger)
    one, two, three = pool.take(3), pool.take(4), pool.take(3)
    assert ledger.n_bytes == pool.n_bytes == 10 * PAGE
    with pytest.raises(OutOfHostMemory, match="0 of 10 are available"):
        pool.take(1)
    pool.give(one)
    assert pool.trim() == 0  # the fourth frame of its buffer is in use
    pool.give(two)
    assert pool.trim() == 4 * PAGE
    assert ledger.n_bytes == 6 * PAGE
    assert pool.take(7) == [0, 1, 2, 3, 4, 5, 6]
    pool.give([0, 1, 2, 3, 4, 5, 6])
    with pytest.raises(UsageError, match="3 frames"):
        pool.close()
    pool.give(three)
    pool.close()
    pool.close()
    assert ledger.n_bytes == pool.n_bytes == 0


def test_a_system_that_refuses_memory_changes_nothing() -> None:
    class Full:
        n_left = 1

        def allocate(self, n_bytes: int) -> object:
            if not self.n_left:
                raise OutOfHostMemory("none left")
            self.n_left -= 1
            return PlainMemory().allocate(n_bytes)

    ledger = Ledger()
    pool = open_pool(memory=Full(), ledger=ledger)
    with pytest.raises(OutOfHostMemory, match="none left"):
        pool.take(5)
    assert (pool.n_taken, pool.n_bytes, ledger.n_bytes) == (0, 4 * PAGE, 4 * PAGE)
    assert pool.take(4) == [0, 1, 2, 3]
    pool.give([0, 1, 2, 3])
    pool.close()
    assert ledger.n_bytes == 0


def test_the_ledger_is_shared_with_the_caches_of_this_machine() -> None:
    ledger = Ledger()
    pool = open_pool(ledger=ledger)
    assert ledger.charge_bytes(describe_machine().memory_total_bytes, 1 << 62)
    with pytest.raises(OutOfHostMemory, match="close other caches"):
        pool.take(1)
    assert pool.n_available == 10
    pool.close()


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"frame_bytes": 100}, "multiple of"),
        ({"frame_bytes": 0}, "multiple of"),
        ({"max_bytes": PAGE - 1, "frame_bytes": PAGE}, "at least a frame"),
        ({"max_bytes": 1 << 60}, "lower max_bytes"),
    ],
)
def test_sizes_that_cannot_work_are_refused(keywords: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        FramePool(**{"max_bytes": 1 << 22, **keywords})


def test_a_system_without_addresses_is_a_capacity_error() -> None:
    with pytest.raises(OutOfHostMemory, match="left"):
        PlainMemory().allocate(1 << 62)


def test_a_forked_child_closes_nothing() -> None:
    pool = open_pool()
    frames = pool.take(2)
    pid, pool._pid = pool._pid, pool._pid + 1
    pool.close()
    with pytest.raises(UsageError, match="forked child"):
        pool.take(1)
    pool._pid = pid
    assert pool.n_bytes == 4 * PAGE
    pool.give(frames)
    pool.close()


class Device:
    """Counts what is pinned, and refuses on demand."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.error: BaseException | None = None

    def pin(self, address: int, n_bytes: int) -> None:
        if self.error is not None and not isinstance(self.error, KeyboardInterrupt):
            raise self.error
        self.pinned[address] = n_bytes
        if self.error is not None:
            raise self.error

    def unpin(self, address: int) -> None:
        if isinstance(self.error, DriverError):
            raise self.error
        del self.pinned[address]


def driver_error(*, is_fatal: bool = False) -> DriverError:
    error = DriverError("pin or unpin", 999, "CUDA_ERROR_UNKNOWN")
    error.is_fatal = is_fatal
    return error


@pytest.mark.parametrize("error", [driver_error(), OutOfHostMemory("no more is kept in place"), KeyboardInterrupt()])
def test_a_buffer_that_cannot_be_pinned_is_no_buffer(error: BaseException) -> None:
    device, ledger = Device(), Ledger()
    pool = open_pool(memory=PinnedMemory(device), ledger=ledger)
    device.error = error
    with pytest.raises(type(error)):
        pool.take(1)
    assert (pool.n_taken, pool.n_bytes, ledger.n_bytes, device.pinned) == (0, 0, 0, {})
    device.error = None
    pool.give(pool.take(1))
    pool.close()
    assert device.pinned == {}


def test_pinned_buffers_are_pinned_as_long_as_they_are_there() -> None:
    device, ledger = Device(), Ledger()
    pool = open_pool(memory=PinnedMemory(device), ledger=ledger)
    frames = pool.take(5)
    assert sorted(device.pinned.values()) == [4 * PAGE, 4 * PAGE]
    for view in pool.views(frames, 0, 5 * PAGE):
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert any(start <= address and address + len(view) <= start + n for start, n in device.pinned.items())
    pool.give(frames)
    device.error = driver_error()
    with pytest.raises(DriverError, match="unpin"):
        pool.close()
    assert pool.n_bytes == ledger.n_bytes == 8 * PAGE
    assert len(device.pinned) == 2
    device.error = None
    pool.close()
    assert (pool.n_bytes, ledger.n_bytes, device.pinned) == (0, 0, {})


def test_a_lost_device_holds_no_memory_back() -> None:
    device, ledger = Device(), Ledger()
    pool = open_pool(memory=PinnedMemory(device), ledger=ledger)
    pool.give(pool.take(5))
    device.error = driver_error(is_fatal=True)
    pool.close()
    assert pool.n_bytes == ledger.n_bytes == 0
