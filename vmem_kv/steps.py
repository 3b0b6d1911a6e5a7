"""Which batches the CPU has begun to build and not yet launched, and fences that wait for those as well.

An event covers what was launched before it. A batch that is being built holds addresses of slots and is not launched
yet, and a captured graph can be launched again at any time: both are users that no event knows of. So whoever builds
batches apart from launching them opens a step around each, and retires slots behind a fence of this counter:

    with steps.step():            build, launch
        ...
    cache.retire(slot_id, steps.fence())

Guarantees: a fence passes only when every step that was open when it was made has ended, and an event recorded after
that has passed. It never blocks in `passed`. Any thread may call anything.

Source: the epoch of rule 3 in docs/design.md; kvcached (issue 463) met the failure that it prevents.
"""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vmem_kv.driver.base import Fence
from vmem_kv.errors import DriverError, UsageError

STEP_TIMEOUT_S = 60.0
"""How long `wait` waits for open steps to end before it gives up."""


class StepCounter:
    """Numbers steps and knows which of them are open.

    Args:
        record: Records a fence behind all that was launched so far on every stream that steps launch on, from
            whatever thread calls it; usually `driver.fence` with those streams.
    """

    def __init__(self, record: Callable[[], Fence]) -> None:
        self._record = record
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._open: set[int] = set()

    @property
    def n_open(self) -> int:
        """Steps begun and not ended."""
        return len(self._open)

    def begin(self) -> int:
        """Open a step and return its number; for users that end elsewhere, as a captured graph does."""
        with self._changed:
            step = next(self._numbers)
            self._open.add(step)
            return step

    def end(self, step: int) -> None:
        """Close a step: its batch was launched, or was dropped, or its graph will not be launched again.

        Raises:
            UsageError: The step is not open. Nothing changed.
        """
        with self._changed:
            if step not in self._open:
                raise UsageError(f"step {step} is not open; end each step once")
            self._open.remove(step)
            self._changed.notify_all()

    @contextmanager
    def step(self) -> Iterator[int]:
        """Hold a step open around building and launching a batch."""
        number = self.begin()
        try:
            yield number
        finally:
            self.end(number)

    def fence(self) -> Fence:
        """Return a fence behind everything launched so far and every step open now.

        Raises:
            DriverError: No step is open, and the device cannot record an event. Nothing changed.
        """
        with self._changed:
            steps = frozenset(self._open)
        return _StepFence(self, steps)  # without the lock: recording is a driver call

    def _is_launched(self, steps: frozenset[int]) -> bool:
        with self._changed:
            return not steps & self._open

    def _wait_launched(self, steps: frozenset[int]) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: not steps & self._open, STEP_TIMEOUT_S):
                left = sorted(steps & self._open)
                raise DriverError("wait", errno.ETIMEDOUT, "ETIMEDOUT", 0, f"steps {left} did not end")


class _StepFence:
    """Two gates, one behind the other: the CPU's steps, then an event recorded when those had ended."""

    def __init__(self, counter: StepCounter, steps: frozenset[int]) -> None:
        self._counter = counter
        self._steps = steps
        self._event: Fence | None = None if steps else counter._record()

    def passed(self) -> bool:
        """Whether both gates lie in the past."""
        if self._event is None:
            if not self._counter._is_launched(self._steps):
                return False
            self._event = self._counter._record()
        return self._event.passed()

    def wait(self) -> None:
        """Block until both have passed."""
        if self._event is None:
            self._counter._wait_launched(self._steps)
            self._event = self._counter._record()
        self._event.wait()
