"""A device with less memory than it has: `create` raises OutOfPages once `max_bytes` of pages are live.

Guarantees: counts whole calls before they are made, so that threads together never pass the limit; what a failed call
did not make is given back. As of any device that runs full in the middle of a batch, the pages that fit are made.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from vmem_kv.driver.base import Driver, Handle
from vmem_kv.errors import OutOfPages
from vmem_kv.testing.adaptor import Adaptor, Effect
from vmem_kv.units import format_bytes


class LimitingDriver(Adaptor):
    """Wrap `inner`; see this file's first lines.

    Args:
        inner: Does the work.
        max_bytes: Memory that all live pages may have together.
    """

    def __init__(self, inner: Driver, max_bytes: int) -> None:
        super().__init__(inner, replace(inner.info, memory_bytes=min(inner.info.memory_bytes, max_bytes)))
        self.max_bytes = max_bytes
        self.n_live_bytes = 0
        self._lock = threading.Lock()

    def available_bytes(self) -> int:
        """Return what is left of the limit, or of the device."""
        return min(self.inner.available_bytes(), max(0, self.max_bytes - self.n_live_bytes))

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        """See `Driver.create`. OutOfPages where the limit is met: what fits before it is created."""
        with self._lock:
            n_fit = min(len(places), max(0, self.max_bytes - self.n_live_bytes) // page_bytes)
            self.n_live_bytes += n_fit * page_bytes
        made: list[Handle] = []
        try:
            if n_fit:
                self.inner.create(page_bytes, places[:n_fit], made)
        finally:
            created += made
            with self._lock:
                self.n_live_bytes -= (n_fit - len(made)) * page_bytes
        if n_fit < len(places):
            raise OutOfPages(f"a limit of {format_bytes(self.max_bytes)} leaves no room for another page")

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        """See `Driver.release`."""
        effect = Effect(len(handles))
        try:
            with effect:
                self.inner.release(page_bytes, handles)
        finally:
            with self._lock:
                self.n_live_bytes -= effect.n_done * page_bytes
