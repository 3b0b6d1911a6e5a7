"""Which steps a fence waits for: those open when it was made, and then an event recorded behind them."""

from __future__ import annotations

import errno

import pytest

from vmem_kv.driver.base import PASSED, Fence
from vmem_kv.errors import DriverError, UsageError
from vmem_kv.steps import StepCounter
from vmem_kv.testing import ManualFence


class NotedFence(ManualFence):
    """Passes as soon as somebody waits for it, and notes that."""

    def __init__(self, waited: list[ManualFence]) -> None:
        super().__init__()
        self._waited = waited

    def wait(self) -> None:
        self._waited.append(self)
        self.pass_()


class Device:
    """Knows the fences that were recorded, and those that somebody waited for."""

    def __init__(self) -> None:
        self.recorded: list[ManualFence] = []
        self.waited: list[ManualFence] = []

    def record(self) -> ManualFence:
        """A fence of this device."""
        self.recorded.append(NotedFence(self.waited))
        return self.recorded[-1]


def test_every_open_step_has_a_number_of_its_own() -> None:
    steps = StepCounter(lambda: PASSED)
    numbers = [steps.begin() for _ in range(3)]
    assert (len(set(numbers)), steps.n_open) == (3, 3)
    steps.end(numbers[1])
    numbers.append(steps.begin())
    assert (len(set(numbers)), steps.n_open) == (4, 3)
    with pytest.raises(UsageError, match=f"step {numbers[1]} is not open"):
        steps.end(numbers[1])
    assert steps.n_open == 3


def test_a_step_ends_with_its_block_even_if_that_raises() -> None:
    steps = StepCounter(lambda: PASSED)
    fences: list[Fence] = []

    def build() -> None:
        with steps.step():
            fences.append(steps.fence())
            assert (steps.n_open, fences[0].passed()) == (1, False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build()
    assert (steps.n_open, fences[0].passed()) == (0, True)


def test_steps_that_begin_later_hold_no_fence_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmem_kv.steps.STEP_TIMEOUT_S", 0)
    steps = StepCounter(lambda: PASSED)
    first = steps.begin()
    asked, waited = steps.fence(), steps.fence()
    steps.begin()
    assert not asked.passed()
    steps.end(first)
    assert asked.passed()
    waited.wait()
    assert steps.n_open == 1


def test_whoever_gave_up_is_told_which_of_its_steps_did_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmem_kv.steps.STEP_TIMEOUT_S", 0)
    device = Device()
    steps = StepCounter(device.record)
    first, second, third = steps.begin(), steps.begin(), steps.begin()
    fence = steps.fence()
    steps.begin()  # not the fence's
    steps.end(second)
    with pytest.raises(DriverError) as caught:
        fence.wait()
    error = caught.value
    assert (error.operation, error.code, error.name, error.n_done) == ("wait", errno.ETIMEDOUT, "ETIMEDOUT", 0)
    assert f"steps {[first, third]} did not end" in str(error)
    assert device.recorded == []
    steps.end(first)
    steps.end(third)
    fence.wait()  # can be tried again
    assert device.waited == device.recorded


def test_without_an_open_step_the_event_is_recorded_at_once_and_waited_for() -> None:
    device = Device()
    fence = StepCounter(device.record).fence()
    assert (len(device.recorded), device.waited) == (1, [])
    assert not fence.passed()
    fence.wait()
    assert device.waited == device.recorded
    assert fence.passed()
    assert len(device.recorded) == 1


def test_behind_steps_the_event_is_recorded_once_when_they_have_ended_and_waited_for() -> None:
    device = Device()
    steps = StepCounter(device.record)
    with steps.step():
        asked, waited = steps.fence(), steps.fence()
        assert not asked.passed()
        assert device.recorded == []  # it would not cover what this step launches
    waited.wait()
    assert len(device.recorded) == 1
    assert device.waited == device.recorded
    assert waited.passed()
    assert not asked.passed()
    asked.wait()
    assert asked.passed()
    assert len(device.recorded) == 2
    assert device.waited == device.recorded
