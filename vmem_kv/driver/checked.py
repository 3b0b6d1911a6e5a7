"""A driver around a driver that keeps shadow state and rejects every breach of the contract.

Guarantees: a call that breaks a rule of `driver/base.py` raises UsageError before the inner driver sees it; all
other calls go through unchanged. It shares no code with the allocator: it derives everything from the calls alone.
On in the tests, optional for users (it costs a dictionary operation per page).
"""

from __future__ import annotations

import mmap
import threading
from collections import Counter
from collections.abc import Sequence

from vmem_kv.driver.adaptor import Adaptor
from vmem_kv.driver.base import Copy, Driver, Fence, Handle, Reservation, Span
from vmem_kv.errors import UsageError, VmemError


class CheckedDriver(Adaptor):
    """Wrap `inner`; see this file's first lines."""

    def __init__(self, inner: Driver) -> None:
        super().__init__(inner)
        self._lock = threading.Lock()
        self._reservations: set[Reservation] = set()
        self._page_bytes: dict[Handle, int] = {}  # live handles
        self._n_mappings: Counter[Handle] = Counter()
        self._mapped: dict[int, Handle] = {}  # by address
        self._accessible: set[int] = set()  # addresses of mappings
        self._pinned: dict[int, int] = {}  # bytes of host memory, by address

    @property
    def n_live_handles(self) -> int:
        """Handles created and not released."""
        return len(self._page_bytes)

    @property
    def n_live_mappings(self) -> int:
        """Pages mapped now."""
        return len(self._mapped)

    @property
    def n_live_reservations(self) -> int:
        """Ranges reserved now."""
        return len(self._reservations)

    @property
    def n_pinned(self) -> int:
        """Ranges of host memory pinned now."""
        return len(self._pinned)

    def reserve(self, n_bytes: int) -> Reservation:
        self._require_multiple("reserve", n_bytes)
        reservation = self.inner.reserve(n_bytes)
        with self._lock:
            self._require_multiple("reserve's result", reservation.base, allow_zero=False)
            if reservation.n_bytes != n_bytes:
                raise UsageError(f"reserve({n_bytes}) returned {reservation}")
            if any(r.base < reservation.end and reservation.base < r.end for r in self._reservations):
                raise UsageError(f"reserve returned {reservation}, which overlaps another one")
            self._reservations.add(reservation)
        return reservation

    def free_reservation(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation not in self._reservations:
                raise UsageError(f"free_reservation of {reservation}, which is not reserved")
            if any(reservation.base <= address < reservation.end for address in self._mapped):
                raise UsageError(f"free_reservation of {reservation} with pages mapped in it")
            self._reservations.remove(reservation)  # before the call: its addresses may be given to another thread
        try:
            self.inner.free_reservation(reservation)
        except BaseException:
            with self._lock:
                self._reservations.add(reservation)
            raise

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        self._require_multiple("create", page_bytes)
        for place in places:
            self._require_multiple("create at", place)
        n_before = len(created)
        try:
            self.inner.create(page_bytes, places, created)
        finally:
            with self._lock:
                new = created[n_before:]
                if len(set(new)) != len(new) or any(handle in self._page_bytes for handle in new):
                    raise UsageError(f"create returned a handle twice: {new}")
                self._page_bytes.update(dict.fromkeys(new, page_bytes))
        if len(new) != len(places):
            raise UsageError(f"create made {len(new)} of {len(places)} pages and raised nothing")

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        with self._lock:
            if len(addresses) != len(handles):
                raise UsageError(f"map of {len(handles)} handles at {len(addresses)} addresses")
            if len(set(addresses)) != len(addresses):
                raise UsageError("map to one address twice")
            for address, handle in zip(addresses, handles, strict=True):
                self._require_multiple("map", address)
                if self._page_bytes.get(handle) != page_bytes:
                    raise UsageError(f"map of handle {handle}, which is no live page of {page_bytes} bytes")
                if not any(r.base <= address and address + page_bytes <= r.end for r in self._reservations):
                    raise UsageError(f"map to {address:#x}, which is not reserved")
                if self._covering(address, page_bytes):
                    raise UsageError(f"map to {address:#x}, where something is mapped")
        n_done = len(handles)
        try:
            self.inner.map(page_bytes, addresses, handles)
        except BaseException as error:  # one that does not say how far it came may have mapped all of it
            n_done = getattr(error, "n_done", n_done)
            raise
        finally:
            with self._lock:
                self._mapped.update(zip(addresses[:n_done], handles[:n_done], strict=True))
                self._n_mappings.update(handles[:n_done])

    def set_access(self, spans: Sequence[Span]) -> None:
        with self._lock:
            pages_of_spans = [self._whole_mappings("set_access", span) for span in spans]
        n_done = len(spans)
        try:
            self.inner.set_access(spans)
        except BaseException as error:
            n_done = getattr(error, "n_done", 0)
            raise
        finally:
            with self._lock:
                self._accessible.update(page for pages in pages_of_spans[:n_done] for page in pages)

    def unmap(self, spans: Sequence[Span]) -> None:
        with self._lock:
            pages_of_spans = [self._whole_mappings("unmap", span) for span in spans]
            if len({p for pages in pages_of_spans for p in pages}) != sum(map(len, pages_of_spans)):
                raise UsageError("unmap of one page twice")
        n_done = 0
        try:
            self.inner.unmap(spans)
            n_done = len(spans)
        except BaseException as error:
            n_done = getattr(error, "n_done", 0)
            raise
        finally:
            with self._lock:
                for pages in pages_of_spans[:n_done]:
                    for address in pages:
                        self._n_mappings[self._mapped.pop(address)] -= 1
                        self._accessible.discard(address)

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        with self._lock:
            if len(set(handles)) != len(handles):
                raise UsageError("release of one handle twice")
            for handle in handles:
                if self._page_bytes.get(handle) != page_bytes:
                    raise UsageError(f"release of handle {handle}, which is no live page of {page_bytes} bytes")
                if self._n_mappings[handle]:
                    raise UsageError(f"release of handle {handle}, which is mapped")
            for handle in handles:  # before the call: their names may be given to another thread's pages
                del self._page_bytes[handle], self._n_mappings[handle]
        n_done = 0
        try:
            self.inner.release(page_bytes, handles)
            n_done = len(handles)
        except BaseException as error:
            n_done = getattr(error, "n_done", 0)
            raise
        finally:
            with self._lock:
                self._page_bytes.update(dict.fromkeys(handles[n_done:], page_bytes))

    def scrub(self, spans: Sequence[Span]) -> None:
        with self._lock:
            for span in spans:
                pages = self._whole_mappings("scrub", span)
                if not self._accessible.issuperset(pages):
                    raise UsageError(f"scrub at {span[0]:#x} before set_access")
        self.inner.scrub(spans)

    def copy(self, copies: Sequence[Copy]) -> None:
        with self._lock:
            for source, target, n_bytes in copies:
                if source < target + n_bytes and target < source + n_bytes:
                    raise UsageError(f"copy of {n_bytes} bytes from {source:#x} to {target:#x}: the ranges overlap")
                self._require_accessible("copy from", source, n_bytes)
                self._require_accessible("copy to", target, n_bytes)
        self.inner.copy(copies)

    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        with self._lock:
            if buffer.readonly:
                raise UsageError("copy_to_host into a buffer that is read-only")
            self._require_accessible("copy_to_host from", address, buffer.nbytes)
        return self.inner.copy_to_host(address, buffer)

    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        with self._lock:
            self._require_accessible("copy_from_host to", address, buffer.nbytes)
        return self.inner.copy_from_host(buffer, address)

    def pin(self, address: int, n_bytes: int) -> None:
        with self._lock:
            if n_bytes <= 0 or address % mmap.PAGESIZE or n_bytes % mmap.PAGESIZE:
                raise UsageError(f"pin of {n_bytes} bytes at {address:#x}, which are no whole OS pages")
            if any(a < address + n_bytes and address < a + n for a, n in self._pinned.items()):
                raise UsageError(f"pin of {n_bytes} bytes at {address:#x}, of which some are pinned")
            self._pinned[address] = n_bytes
        try:
            self.inner.pin(address, n_bytes)
        except VmemError:  # of another exception, nobody knows: it may be unpinned, and need not
            with self._lock:
                del self._pinned[address]
            raise

    def unpin(self, address: int) -> None:
        with self._lock:
            if address not in self._pinned:
                raise UsageError(f"unpin at {address:#x}, where no pinned range begins")
            n_bytes = self._pinned.pop(address)  # before the call: another thread may pin what is freed behind it
        try:
            self.inner.unpin(address)
        except UsageError:  # nothing is pinned there: its pin was interrupted before it took effect
            raise
        except BaseException:
            with self._lock:
                self._pinned[address] = n_bytes
            raise

    def close(self) -> None:
        with self._lock:
            if self._reservations or self._page_bytes or self._pinned:
                raise UsageError(
                    f"close with {len(self._reservations)} reservations, {len(self._page_bytes)} pages and "
                    f"{len(self._pinned)} pinned ranges left"
                )
        self.inner.close()

    def _require_multiple(self, operation: str, value: int, *, allow_zero: bool = False) -> None:
        granularity = self.info.granularity_bytes
        if value % granularity or value < 0 or (value == 0 and not allow_zero):
            raise UsageError(f"{operation}: {value:#x} is not a positive multiple of {granularity}")

    def _covering(self, address: int, page_bytes: int) -> bool:
        """Whether something is mapped in `[address, address + page_bytes)`."""
        step = self.info.granularity_bytes
        if any(a in self._mapped for a in range(address, address + page_bytes, step)):
            return True
        sizes = set(self._page_bytes.values())
        before = (a for size in sizes for a in range(address - size + step, address, step))
        return any(a in self._mapped and a + self._page_bytes[self._mapped[a]] > address for a in before)

    def _require_accessible(self, operation: str, address: int, n_bytes: int) -> None:
        """A range of any bytes whose pages may all be read and written."""
        at, end = address, address + n_bytes
        while at < end:
            page = self._page_around(at)
            if page not in self._accessible:
                raise UsageError(f"{operation} [{address:#x}, {end:#x}): {at:#x} is not mapped and accessible")
            at = page + self._page_bytes[self._mapped[page]]

    def _page_around(self, address: int) -> int:
        """Where the mapping begins that holds `address`; -1 if there is none."""
        step = self.info.granularity_bytes
        largest = max(self._page_bytes.values(), default=0)
        for page in range(address - address % step, address - largest, -step):
            if page in self._mapped and page + self._page_bytes[self._mapped[page]] > address:
                return page
        return -1

    def _whole_mappings(self, operation: str, span: Span) -> list[int]:
        """The addresses of the mappings that fill `span` exactly."""
        address, n_bytes = span
        end, pages = address + n_bytes, []
        while address < end:
            handle = self._mapped.get(address)
            if handle is None:
                raise UsageError(f"{operation} of [{span[0]:#x}, {end:#x}): no mapping begins at {address:#x}")
            pages.append(address)
            address += self._page_bytes[handle]
        if address != end or not pages:
            raise UsageError(f"{operation} of [{span[0]:#x}, {end:#x}) cuts a mapping or is empty")
        return pages
