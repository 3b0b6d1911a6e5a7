"""Who took what: every live page and reservation with the stack of the call that made it.

    driver = TrackingDriver(HostDriver())
    ...
    for taken in driver.outstanding():
        print(taken)

Guarantees: what was given back is forgotten, what a failed call did take is remembered. Costs a stack per call.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from vmem_kv.driver.base import Driver, Handle, Reservation
from vmem_kv.testing.adaptor import Adaptor, LivePages


@dataclass(frozen=True, slots=True)
class Taken:
    """Something that was not given back yet.

    Attributes:
        what: "page" or "reservation".
        name: The handle, or the first address.
        n_bytes: Its size.
        thread: The name of the thread that took it.
        stack: The calls that led to it, outermost first, `file:line in function`.
    """

    what: str
    name: int
    n_bytes: int
    thread: str
    stack: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.what} {self.name:#x} of {self.n_bytes} bytes, taken by {self.thread}"]
        return "\n    ".join([*lines, *self.stack])


class TrackingDriver(Adaptor):
    """Wrap `inner`; see this file's first lines.

    Args:
        inner: Does the work.
        max_frames: How many calls of a stack to keep, the innermost ones.
    """

    def __init__(self, inner: Driver, max_frames: int = 12) -> None:
        super().__init__(inner)
        self._max_frames = max_frames
        self._pages: LivePages[Taken] = LivePages()
        self._reservations: dict[Reservation, Taken] = {}
        self._lock = threading.Lock()

    def outstanding(self) -> list[Taken]:
        """Return all that was taken and not given back, reservations first, in the order in which it was taken."""
        with self._lock:
            reservations = list(self._reservations.values())
        return reservations + self._pages.notes()

    def reserve(self, n_bytes: int) -> Reservation:
        reservation = self.inner.reserve(n_bytes)
        with self._lock:
            self._reservations[reservation] = self._taken("reservation", reservation.base, n_bytes, self._stack())
        return reservation

    def free_reservation(self, reservation: Reservation) -> None:
        with self._lock:  # before the call: the same addresses may be another thread's before it returns
            taken = self._reservations.pop(reservation, None)
        try:
            self.inner.free_reservation(reservation)
        except BaseException:
            if taken is not None:
                with self._lock:
                    self._reservations[reservation] = taken
            raise

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        stack = self._stack()
        with self._pages.creating(created, lambda handle: self._taken("page", handle, page_bytes, stack)):
            self.inner.create(page_bytes, places, created)

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        with self._pages.releasing(handles):
            self.inner.release(page_bytes, handles)

    def _stack(self) -> tuple[str, ...]:
        frames = traceback.extract_stack(limit=self._max_frames + 2)[:-2]
        return tuple(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)

    @staticmethod
    def _taken(what: str, name: int, n_bytes: int, stack: tuple[str, ...]) -> Taken:
        return Taken(what, name, n_bytes, threading.current_thread().name, stack)
