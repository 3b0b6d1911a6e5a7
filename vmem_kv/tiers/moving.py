"""Copies between a device and host memory that run while the caller goes on, and who launches them.

A `Transfer` is a list of moves in one direction; a `Task` is anything else that takes its time, as a file does. A
*mover* launches either: `InlineMover` at once, on the calling thread's stream, behind what was launched there before
and before what is launched there next; `MoverThread` on a thread with a stream of its own, behind a fence, so that
neither the caller nor its stream waits for the copies.

Guarantees: a transfer whose `passed` or `wait` says so has moved everything; one that failed raises what it failed
with, and touches no memory any more where `is_quiet` says so.
Assumptions: the ranges on both sides stay as they are until then.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, NamedTuple, Protocol, TypeVar

from vmem_kv.driver.base import PASSED, Driver, Fence
from vmem_kv.errors import DriverError, UsageError, VmemError

_LOG = logging.getLogger("vmem_kv")
T = TypeVar("T")


class Passing(Protocol):
    """Something that is under way, until it has passed, or failed: whoever began it asks then, by `finish`."""

    def passed(self) -> bool:
        """Whether it is over, well or not.

        Raises:
            DriverError: The device cannot say; asking again is allowed.
        """

    def passes_within(self, timeout_s: float) -> bool:
        """Wait until it is over, at most so many seconds; return whether it is. Says nothing of what it failed with."""


def is_over(what: Passing) -> bool:
    """Whether something has passed, or the device cannot say: then whoever finishes it learns why."""
    try:
        return what.passed()
    except DriverError:
        return True


class Move(NamedTuple):
    """One copy between device memory and as many bytes of host memory."""

    address: int
    view: memoryview


class Transfer:
    """Moves in one direction. It is a fence, too.

    Args:
        driver: Whose memory the addresses name.
        moves: What to copy, in this order.
        to_host: The direction.
    """

    def __init__(self, driver: Driver, moves: Sequence[Move], *, to_host: bool) -> None:
        self.n_bytes = sum(len(move.view) for move in moves)
        self._driver = driver
        self._moves = moves
        self._to_host = to_host
        self._error: BaseException | None = None
        self._last: Fence = PASSED
        self._is_launched = threading.Event()

    @property
    def has_failed(self) -> bool:
        """Whether it ended with an error."""
        return self._error is not None

    def launch(self) -> None:
        """Begin every move; called once, by a mover.

        Raises:
            BaseException: What a driver call raised; `wait` raises it again.
        """
        try:
            for address, view in self._moves:
                if self._to_host:
                    self._last = self._driver.copy_to_host(address, view)
                else:
                    self._last = self._driver.copy_from_host(view, address)
        except BaseException as error:
            if not isinstance(error, VmemError):  # nobody says whether that copy was launched
                with contextlib.suppress(VmemError):
                    self._last = self._driver.fence()
            self.fail(error)
            raise
        finally:
            self._moves = ()
            self._is_launched.set()

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        self._error = error
        self._is_launched.set()

    def passed(self) -> bool:
        """Whether everything has been moved.

        Raises:
            BaseException: What launching it raised. Some of the targets are undefined.
            DriverError: The device cannot say; asking again is allowed.
        """
        if not self._is_launched.is_set():
            return False
        if self._error is not None:
            raise self._error
        return self._last.passed()

    def wait(self) -> None:
        """Block until everything has been moved; raises as `passed` does."""
        self._is_launched.wait()
        if self._error is not None:
            raise self._error
        self._last.wait()

    def passes_within(self, timeout_s: float) -> bool:
        """See `Passing`. What a device does is waited for; the bound is on the wait for a mover to launch it."""
        if not self._is_launched.wait(timeout_s):
            return False
        if self._error is None:
            with contextlib.suppress(DriverError):  # as whoever finishes it learns
                self._last.wait()
        return True

    def is_quiet(self) -> bool:
        """Whether nothing of it touches memory any more, moved or failed. Waits, where that can be waited for."""
        self._is_launched.wait()
        try:
            self._last.wait()  # the moves ran in this order
        except DriverError as error:
            return error.is_fatal
        return True


class Task(Generic[T]):
    """Work that is done when it was launched, and has a result.

    Args:
        do: The work.
    """

    def __init__(self, do: Callable[[], T]) -> None:
        self._do: Callable[[], T] | None = do
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._is_over = threading.Event()

    def launch(self) -> None:
        """Do it; called once, by a mover.

        Raises:
            BaseException: What it raised; `result` raises it again.
        """
        do, self._do = self._do, None  # with whatever it refers to
        try:
            if do is not None:
                self._results.append(do())
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._is_over.set()

    def fail(self, error: BaseException) -> None:
        """End it with an error, in place of `launch`."""
        self._do, self._error = None, error
        self._is_over.set()

    def passed(self) -> bool:
        """Whether it is over, well or not."""
        return self._is_over.is_set()

    def passes_within(self, timeout_s: float) -> bool:
        """Wait until it is over, at most so many seconds; return whether it is."""
        return self._is_over.wait(timeout_s)

    def wait(self) -> None:
        """Wait until it is over, well or not."""
        self._is_over.wait()

    def result(self) -> T:
        """Wait until it is over, and return what came of it.

        Raises:
            BaseException: What it raised.
        """
        self._is_over.wait()
        if self._error is not None:
            raise self._error
        return self._results[0]


class Job(Protocol):
    """What a mover launches: a `Transfer` or a `Task`."""

    def launch(self) -> None:
        """Begin it; once."""

    def fail(self, error: BaseException) -> None:
        """End it with an error, in place of `launch`."""


class Mover(Protocol):
    """Who launches transfers and tasks."""

    def start(self, job: Job, after: Fence) -> None:
        """Launch something when `after` has passed, or in stream order behind it.

        Raises:
            BaseException: What launching raised, where that is known at once.
        """

    def stop(self) -> None:
        """Finish what was handed over. Idempotent.

        Raises:
            UsageError: That takes too long; call again.
        """


class InlineMover:
    """Launches on the calling thread's current stream, which is the one that its slots are stepped on."""

    def start(self, job: Job, after: Fence) -> None:
        """Launch it at once: the stream keeps the order that `after` stands for."""
        job.launch()

    def stop(self) -> None:
        """Nothing was put off."""


class MoverThread:
    """Launches on a thread, one after the other.

    Started and stopped explicitly. If the thread dies, `error` says why, and transfers are launched by the caller as
    if there had never been one.

    Args:
        driver: The driver of the slots that will be moved.
    """

    def __init__(self, driver: Driver) -> None:
        self.error: BaseException | None = None
        self._driver = driver
        self._queue: queue.SimpleQueue[tuple[Job, Fence] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._takes_on = False
        self._thread: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        """Whether transfers are taken on by the thread."""
        return self._takes_on

    def begin(self) -> None:
        """Start the thread.

        Raises:
            UsageError: It was started before.
            RuntimeError: The system has no thread left. Transfers are launched by the caller.
        """
        if self._thread is not None:
            raise UsageError("a MoverThread begins once; make a new one")
        thread = threading.Thread(target=self._run, name="vmem_kv-mover", daemon=True)
        self._takes_on = True
        try:
            thread.start()
        except RuntimeError:
            self._takes_on = False
            raise
        self._thread = thread

    def start(self, job: Job, after: Fence) -> None:
        """Hand it to the thread, which waits for `after` first; without a thread, launch it here."""
        with self._lock:
            if self._takes_on:
                self._queue.put((job, after))
                return
        job.launch()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Finish what was handed over, end the thread and wait for it. Idempotent.

        Raises:
            UsageError: It is still inside a copy after `timeout_s`; call again.
        """
        with self._lock:
            if self._takes_on:
                self._takes_on = False
                self._queue.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise UsageError(f"the mover thread did not stop in {timeout_s} s")

    def __enter__(self) -> MoverThread:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            self._driver.bind_thread()
        except BaseException as error:  # whatever ends the thread must be readable from outside
            self.error = error
            _LOG.warning("the mover thread ended, copies are launched by their callers from now on: %s", error)
            with self._lock:
                self._takes_on = False
                self._queue.put(None)
        while (entry := self._queue.get()) is not None:
            job, after = entry
            try:
                if self.error is not None:
                    raise self.error
                after.wait()
            except BaseException as error:
                job.fail(error)
            else:
                with contextlib.suppress(BaseException):  # the job has it, for whoever waits
                    job.launch()
            del entry, job, after  # or the last one's memory would be held until the next one comes
