"""Debug mode: whatever goes out of use is filled with NaN, so that whoever reads it still cannot fail to notice.

A byte of 0xFF everywhere is NaN in float16, bfloat16, float32 and float64, and -1 in integers. A page is poisoned when
its last mapping goes (before that, since afterwards nobody can write it), and, on a device that does not promise zeros,
when a new page becomes accessible for the first time. It stays poisoned until somebody scrubs or overwrites it.

It breaks one rule of the contract, on purpose: the bytes of a page do not outlive its last mapping.

Guarantees: changes no page that somebody may still use: an alias keeps its bytes until the last mapping goes.
Assumptions: the caller waited for its fences before it unmaps, as the contract demands.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from vmem_kv.driver.base import Driver, Handle, Span
from vmem_kv.errors import VmemError
from vmem_kv.testing.adaptor import Adaptor, Effect, LivePages

POISON = 0xFF


class PoisonDriver(Adaptor):
    """Wrap `inner`; see this file's first lines.

    Args:
        inner: Does the work.
        is_zeroing: Whether to let new pages be zero where `inner` makes them so. If not, they are poisoned as well,
            and `info.zeroes_new_pages` says that whoever maps them must scrub.
    """

    def __init__(self, inner: Driver, *, is_zeroing: bool = True) -> None:
        super().__init__(inner, replace(inner.info, zeroes_new_pages=inner.info.zeroes_new_pages and is_zeroing))
        self.n_poisoned = 0
        """Pages poisoned so far."""
        self._page_bytes: LivePages[int] = LivePages()
        self._mapped: dict[int, Handle] = {}  # by address
        self._accessible: set[int] = set()  # addresses of mappings
        self._n_mappings: Counter[Handle] = Counter()
        self._new: set[Handle] = set()  # created, and nobody has had access yet
        self._lock = threading.Lock()

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        """See `Driver.create`."""
        n_before = len(created)
        try:
            with self._page_bytes.creating(created, lambda handle: page_bytes):
                self.inner.create(page_bytes, places, created)
        finally:
            if not self.info.zeroes_new_pages:
                with self._lock:
                    self._new.update(created[n_before:])

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        """See `Driver.map`."""
        effect = Effect(len(handles))
        try:
            with effect:
                self.inner.map(page_bytes, addresses, handles)
        finally:
            n_done = effect.n_done
            with self._lock:
                self._mapped.update(zip(addresses[:n_done], handles[:n_done], strict=True))
                self._n_mappings.update(handles[:n_done])

    def set_access(self, spans: Sequence[Span]) -> None:
        """See `Driver.set_access`; new pages are poisoned where they are not zero."""
        effect = Effect(len(spans))
        try:
            with effect:
                self.inner.set_access(spans)
        finally:
            pages = self._pages_in(spans[: effect.n_done])
            with self._lock:
                self._accessible.update(address for address, _, _ in pages)
                new = [(a, n) for a, n, handle in pages if handle in self._new]
                self._new.difference_update(handle for _, _, handle in pages)
            self._poison(new)

    def unmap(self, spans: Sequence[Span]) -> None:
        """See `Driver.unmap`; pages that nobody else maps are poisoned first."""
        for n_done, span in enumerate(spans):
            pages = self._pages_in([span])
            with self._lock:
                last = [(a, n) for a, n, h in pages if self._n_mappings[h] == 1 and a in self._accessible]
            self._poison(last)
            try:
                self.inner.unmap([span])
            except VmemError as error:
                error.n_done += n_done
                raise
            with self._lock:
                for address, _, handle in pages:
                    del self._mapped[address]
                    self._accessible.discard(address)
                    self._n_mappings[handle] -= 1

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        """See `Driver.release`."""
        with self._page_bytes.releasing(handles):
            self.inner.release(page_bytes, handles)

    def _pages_in(self, spans: Sequence[Span]) -> list[tuple[int, int, Handle]]:
        """The mapped pages of some ranges, as (address, bytes, handle)."""
        pages = []
        with self._lock:
            for address, n_bytes in spans:
                at = address
                while at < address + n_bytes and at in self._mapped:
                    handle = self._mapped[at]
                    pages.append((at, self._page_bytes[handle], handle))
                    at += self._page_bytes[handle]
        return pages

    def _poison(self, spans: Sequence[Span]) -> None:
        for address, n_bytes in spans:
            self.inner.copy_from_host(memoryview(bytes([POISON]) * n_bytes), address).wait()
            self.n_poisoned += 1
