"""Movers that launch what a test lets go, when it lets it go."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from vmem_kv.driver.base import Driver, Fence
from vmem_kv.engine.moves import Carriers
from vmem_kv.tiers.moving import Job

T = TypeVar("T")


class ByHand:
    """See this file's first line. Nothing passes that is not let go, until `release`."""

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        self._is_held = True

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Within the block, what it is given passes at once."""
        before, self._is_held = self._is_held, False
        try:
            yield
        finally:
            self._is_held = before

    def start(self, job: Job, after: Fence) -> None:
        """Put it to what waits, or launch it."""
        if self._is_held:
            self.waiting.append(job)
        else:
            job.launch()

    def let_go(self) -> None:
        """Launch all that waits."""
        while self.waiting:
            with contextlib.suppress(Exception):  # whoever finishes it learns it
                self.waiting.popleft().launch()

    def fail(self, error: Exception) -> None:
        """Let what has waited longest fail."""
        self.waiting.popleft().fail(error)

    def stop(self) -> None:
        """Nothing waits any more."""
        assert not self.waiting

    def release(self) -> None:
        """Let everything go, also what comes."""
        self._is_held = False
        self.let_go()


class Hands:
    """The two movers of an engine: `engine_on(carriers=hands.open)`."""

    def __init__(self) -> None:
        self.copies = ByHand()
        self.files = ByHand()

    def open(self, driver: Driver) -> Carriers:
        """Return them."""
        return Carriers(self.copies, self.files)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Within the block everything passes at once."""
        with self.copies.passing(), self.files.passing():
            yield

    def let_go(self) -> None:
        """Launch all that waits."""
        self.copies.let_go()
        self.files.let_go()

    def release(self) -> None:
        """Let everything go, also what comes."""
        self.copies.release()
        self.files.release()

    def release_behind(self, do: Callable[[], T]) -> T:
        """Do something that waits for what is held, which is let go in another thread meanwhile."""
        thread = threading.Thread(target=self.release)
        thread.start()
        try:
            return do()
        finally:
            thread.join()
