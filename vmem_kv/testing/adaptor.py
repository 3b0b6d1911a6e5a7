"""What the adaptors of this package share: their base, how far a batch came, and what is known of live pages.

The base lies with the drivers (`driver/adaptor.py`): `CheckedDriver` is an adaptor too, and no driver imports tests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Generic, TypeVar

from vmem_kv.driver.adaptor import Adaptor
from vmem_kv.driver.base import Handle
from vmem_kv.errors import VmemError

__all__ = ["Adaptor", "Effect", "LivePages"]

T = TypeVar("T")


class Effect:
    """How many items of a batch took effect, known behind the block, whether the call in it failed or not.

        with (effect := Effect(len(handles))):
            self.inner.release(page_bytes, handles)

    Of an exception that does not say how far the call came, none is assumed.

    Attributes:
        n_done: Items that took effect.
    """

    def __init__(self, n_items: int) -> None:
        self.n_done = 0
        self._n_items = n_items

    def __enter__(self) -> Effect:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.n_done = self._n_items if error is None else error.n_done if isinstance(error, VmemError) else 0


class LivePages(Generic[T]):
    """Something about every live page, in step with `create` and `release` from any threads.

    Guarantees: what a failed call did make is noted, and what it did not release stays.
    """

    def __init__(self) -> None:
        self._notes: dict[Handle, T] = {}
        self._lock = threading.Lock()

    def __getitem__(self, handle: Handle) -> T:
        return self._notes[handle]

    def notes(self) -> list[T]:
        """Return what is noted, in the order in which the pages were made."""
        with self._lock:
            return list(self._notes.values())

    @contextmanager
    def creating(self, created: list[Handle], note: Callable[[Handle], T]) -> Iterator[None]:
        """Around a call of `create`: note something of every page that it appends."""
        n_before = len(created)
        try:
            yield
        finally:
            with self._lock:
                self._notes.update((handle, note(handle)) for handle in created[n_before:])

    @contextmanager
    def releasing(self, handles: Sequence[Handle]) -> Iterator[None]:
        """Around a call of `release`: forget the pages that it releases."""
        with self._lock:  # before the call: the names may be another thread's before it returns
            taken = {handle: self._notes.pop(handle) for handle in handles if handle in self._notes}
        effect = Effect(len(handles))
        try:
            with effect:
                yield
        finally:
            with self._lock:
                self._notes.update((handle, taken[handle]) for handle in handles[effect.n_done :] if handle in taken)
