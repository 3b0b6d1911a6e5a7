"""One worker thread that maps ahead, so that the next step finds its pages there.

Guarantees: started and stopped explicitly; at most one per cache is useful, since the driver serialises. It works
from a snapshot, never from the caller's data. If it dies, `error` says why, `is_alive` is False, and `ensure` maps
synchronously as if it had never been there: it is an optimisation and nothing depends on it.

Limit: pages mapped ahead belong to their sequence and are not taken back from it before it retires. In a tight budget
they can be what another sequence's `ensure` then lacks: at most `premap_tokens` and a page per plane for each sequence.
Where the budget is that tight, do not map ahead.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from types import TracebackType

from vmem_kv.cache import KVCache
from vmem_kv.errors import CapacityError, UsageError
from vmem_kv.growth import SlotId

_LOG = logging.getLogger("vmem_kv")


class Premapper:
    """Maps `premap_tokens` past the lengths it is told, in the background.

    Args:
        cache: Whose slots to map ahead for.
        premap_tokens: How far past the current length.
    """

    def __init__(self, cache: KVCache, premap_tokens: int) -> None:
        if premap_tokens < 1:
            raise UsageError(f"premap_tokens is {premap_tokens}; it must be at least 1")
        self.premap_tokens = premap_tokens
        self.n_pages = 0
        """Pages mapped ahead so far."""
        self.n_skipped = 0
        """Requests for which there was no room; `ensure` will reclaim or raise when it comes to it."""
        self.error: BaseException | None = None
        self._cache = cache
        self._wake = threading.Condition()
        self._request: dict[SlotId, int] | None = None
        self._stopping = False
        self._idle = True
        self._ended = False
        self._thread: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        """Whether requests are still being worked on."""
        return self._thread is not None and not self._ended

    def start(self) -> None:
        """Start the thread. Where the system has none left, `error` says so and mapping stays synchronous.

        Raises:
            UsageError: It was started before.
        """
        if self._thread is not None or self._ended:
            raise UsageError("a Premapper starts once; make a new one")
        thread = threading.Thread(target=self._run, name="vmem_kv-premap", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self.error, self._ended = error, True
            _LOG.warning("premapping did not start, mapping is synchronous: %s", error)
            return
        self._thread = thread

    def request(self, lengths: Mapping[SlotId, int]) -> None:
        """Ask for room behind these lengths. Returns at once; a newer request replaces one not begun yet."""
        with self._wake:
            self._request = {slot_id: n + self.premap_tokens for slot_id, n in lengths.items()}
            self._wake.notify_all()

    def wait_idle(self, timeout_s: float = 10.0) -> bool:
        """Wait until no request is open or the thread is dead; return whether that came true in time."""
        with self._wake:
            return self._wake.wait_for(lambda: (self._idle and self._request is None) or not self.is_alive, timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread and wait for it. Idempotent.

        Raises:
            UsageError: It is still inside a driver call after `timeout_s`; call again.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise UsageError(f"the premap thread did not stop in {timeout_s} s")

    def __enter__(self) -> Premapper:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            self._cache.pool.driver.bind_thread()
            while (lengths := self._next_request()) is not None:
                try:
                    self.n_pages += self._cache.premap(lengths)
                except CapacityError:
                    self.n_skipped += 1
        except BaseException as error:  # whatever ends the thread must be readable from outside
            self.error = error
            _LOG.warning("premapping ended, mapping is synchronous from now on: %s", error)
        finally:
            with self._wake:  # here and not when the thread is gone: nobody would wake those who wait for it
                self._idle = self._ended = True
                self._wake.notify_all()

    def _next_request(self) -> dict[SlotId, int] | None:
        with self._wake:
            self._idle = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: self._stopping or self._request is not None)
            if self._stopping:
                return None
            lengths, self._request = self._request, None
            self._idle = False
            return lengths
