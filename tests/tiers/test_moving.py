"""Transfers and the thread that launches them: what they say when things go wrong."""

from __future__ import annotations

import threading

import pytest

from vmem_kv.driver.base import PASSED, Fence
from vmem_kv.errors import DriverError, UsageError
from vmem_kv.testing import FaultyDriver, ManualFence, fail_kind, interruption, no_faults
from vmem_kv.tiers.moving import InlineMover, Move, MoverThread, Transfer

from ..core.backends import open_backend
from ..core.bench import PAGE


class Place:
    """A driver with a mapped page."""

    def __init__(self) -> None:
        self.driver = FaultyDriver(open_backend("native"))
        self.reservation = self.driver.reserve(PAGE)
        self.handles: list = []
        self.driver.create(PAGE, [self.reservation.base], self.handles)
        self.driver.map(PAGE, [self.reservation.base], self.handles)
        self.driver.set_access([(self.reservation.base, PAGE)])

    def transfer(self, n_moves: int = 3) -> Transfer:
        """Moves of a byte each."""
        moves = [Move(self.reservation.base + i, memoryview(bytearray(1))) for i in range(n_moves)]
        return Transfer(self.driver, moves, to_host=True)

    def close(self) -> None:
        self.driver.plan = no_faults
        self.driver.unmap([(self.reservation.base, PAGE)])
        self.driver.release(PAGE, self.handles)
        self.driver.free_reservation(self.reservation)
        self.driver.close()


@pytest.fixture
def place() -> Place:
    place = Place()
    yield place
    place.close()


def test_a_transfer_has_passed_when_it_was_launched_and_done(place: Place) -> None:
    transfer = place.transfer()
    assert not transfer.passed()
    assert transfer.n_bytes == 3
    InlineMover().start(transfer, PASSED)
    assert transfer.passed()
    transfer.wait()


def test_an_interruption_is_waited_for_and_raised_again(place: Place) -> None:
    place.driver.begin_count()
    place.driver.plan = fail_kind("copy_to_host", 2, interruption)
    transfer = place.transfer()
    with pytest.raises(KeyboardInterrupt):
        InlineMover().start(transfer, PASSED)
    assert place.driver.points[-1].operation == "fence"  # nobody says whether that copy was launched
    for ask in (transfer.passed, transfer.wait):
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert transfer.has_failed
    assert transfer.is_quiet()


def test_a_thread_waits_for_what_goes_before(place: Place) -> None:
    fence, transfer = ManualFence(), place.transfer()
    with MoverThread(place.driver) as mover:
        mover.start(transfer, fence)
        assert not transfer.passed()
        with pytest.raises(UsageError, match="did not stop"):
            mover.stop(timeout_s=0.01)
        fence.pass_()
        transfer.wait()
        assert transfer.passed()


def test_a_fence_that_fails_fails_the_transfer_and_no_other(place: Place) -> None:
    class Broken:
        def passed(self) -> bool:
            return False

        def wait(self) -> None:
            raise DriverError("wait", 5, "EIO")

    broken: Fence = Broken()
    one, two = place.transfer(), place.transfer()
    with MoverThread(place.driver) as mover:
        mover.start(one, broken)
        mover.start(two, PASSED)
        two.wait()
        with pytest.raises(DriverError, match="wait"):
            one.wait()
    assert one.is_quiet()


def test_a_thread_that_cannot_use_the_device_fails_what_it_was_given(place: Place) -> None:
    gate = threading.Event()

    def fail_when_told(point: object) -> DriverError | None:
        if point.operation == "bind_thread":
            gate.wait(10)
            return DriverError("bind_thread", 5, "EIO")
        return None

    place.driver.plan = fail_when_told
    transfer, later = place.transfer(), place.transfer()
    mover = MoverThread(place.driver)
    mover.begin()
    mover.start(transfer, PASSED)
    gate.set()
    with pytest.raises(DriverError, match="bind_thread"):
        transfer.wait()
    mover.stop()
    mover.start(later, PASSED)
    assert later.passed()


def test_a_system_without_threads_leaves_the_work_to_the_caller(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    mover, transfer = MoverThread(place.driver), place.transfer()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            mover.begin()
    assert not mover.is_alive
    mover.start(transfer, PASSED)
    assert transfer.passed()
    mover.stop()
