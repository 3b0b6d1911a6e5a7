"""A driver that keeps strict books and no memory: to study any model on any budget, on any machine.

Guarantees
  * Every rule of `driver/base.py` holds, and what the contract only assumes of its callers is enforced: a call that
    breaks it raises UsageError and changes nothing.
  * Memory costs nothing here until bytes are copied into it; then only those pieces of `_PIECE_BYTES` that were
    written are kept, so that a test can look at them. Addresses are numbers: nobody may follow them.
  * The books are exact. A driver of 141 GB runs out of pages where a device of that size would.
  * `calls` counts batches, as every driver does; `items` counts what a device's own driver is called for: once for
    each page that is created, mapped or released, once for each span that is made accessible, unmapped or scrubbed,
    once for each copy and reservation. Only what took effect is counted.
  * Where neighbours merge, a page is named by the place where it is mapped first, so that a row of them counts as one
    mapping; as on the host.

Assumptions: what a device does beside that (time per call, fragmentation of its own) is not modelled.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from vmem_kv.driver.base import PASSED, Copy, Driver, DriverInfo, Fence, Handle, Reservation, Span
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import ConfigError, OutOfAddressSpace, OutOfMappings, OutOfPages, UsageError
from vmem_kv.units import GIB, MIB, format_bytes, is_power_of_two, round_up

_FIRST_ADDRESS = 1 << 40
_END_OF_ADDRESSES = 1 << 60
_MAX_RESERVATION_BYTES = 1 << 52
_PIECE_BYTES = 4096


@dataclass(slots=True)
class _Range:
    """A reservation and what is mapped in it."""

    reservation: Reservation
    mapped: dict[int, Handle] = field(default_factory=dict)  # by address
    accessible: set[int] = field(default_factory=set)  # addresses of mappings
    step_bytes: int = 0  # size of all pages that were ever mapped here, if they all stand on one grid; else -1


class AccountingDriver(Driver):
    """The driver contract over nothing but books.

    Args:
        memory_bytes: Physical memory that there is to hand out.
        granularity_bytes: The smallest mappable size, a power of two: 2 MiB as on CUDA, or 4 KiB as on a host.
        neighbours_merge: Whether neighbouring pages count as one mapping, as they do on the host.
        mappings_per_run: What a mapping costs of `max_mappings`.
        keeps_pay: Whether pools keep freed handles, as they do on CUDA.
        max_mappings: The limit on live mappings.
        zeroes_new_pages: Whether it promises zeros in new pages. They are zero anyway, but if not promised, callers
            scrub, and that is counted.
        ledger: Where pools count what they own; by default one of this driver's own.

    Raises:
        ConfigError: A number makes no sense.
    """

    def __init__(
        self,
        memory_bytes: int = 80 * GIB,
        granularity_bytes: int = 2 * MIB,
        *,
        neighbours_merge: bool = False,
        mappings_per_run: int = 1,
        keeps_pay: bool = True,
        max_mappings: int = 1 << 30,
        zeroes_new_pages: bool = True,
        ledger: Ledger | None = None,
    ) -> None:
        if not is_power_of_two(granularity_bytes):
            raise ConfigError(f"granularity_bytes is {granularity_bytes}; it must be a power of two such as {2 * MIB}")
        if memory_bytes < granularity_bytes:
            raise ConfigError(f"memory_bytes is {memory_bytes}; it must hold {granularity_bytes} bytes at least")
        if min(mappings_per_run, max_mappings) < 1:
            raise ConfigError(f"mappings_per_run is {mappings_per_run}, max_mappings {max_mappings}; at least 1")
        self.info = DriverInfo(
            name="accounting",
            device="meta",
            granularity_bytes=granularity_bytes,
            max_mappings=max_mappings,
            neighbours_merge=neighbours_merge,
            mappings_per_run=mappings_per_run,
            keeps_pay=keeps_pay,
            memory_bytes=memory_bytes,
            max_reservation_bytes=_MAX_RESERVATION_BYTES,
            path="books",
            zeroes_new_pages=zeroes_new_pages,
        )
        self.calls = Counter()
        self.items: Counter[str] = Counter()
        """Calls of a device's own driver that the batches come to, by operation."""
        self.ledger = ledger or Ledger()
        self.n_created_bytes = 0
        """Physical memory of all live pages."""
        self._lock = threading.RLock()
        self._bases: list[int] = []  # of live reservations, ascending
        self._ranges: dict[int, _Range] = {}  # by base
        self._pages: dict[Handle, int] = {}  # live ones, and their sizes
        self._mapped_handles: set[Handle] = set()
        self._aliases: Counter[Handle] = Counter()  # mappings of a page past its first one
        self._pieces: dict[Handle, dict[int, bytearray]] = {}  # what was written, by index
        self._next_address = round_up(_FIRST_ADDRESS, granularity_bytes)
        self._next_handle = 1  # above all places where pages are named by them
        if neighbours_merge:
            self._next_handle = _END_OF_ADDRESSES + 1
        self._n_mapped = 0
        self._is_closed = False

    def available_bytes(self) -> int:
        return self.info.memory_bytes - self.n_created_bytes

    @property
    def n_live_handles(self) -> int:
        """Pages created and not released."""
        return len(self._pages)

    @property
    def n_live_mappings(self) -> int:
        """Pages mapped now; an alias counts as often as it is mapped."""
        return self._n_mapped

    @property
    def n_live_reservations(self) -> int:
        """Ranges reserved now."""
        return len(self._ranges)

    def reserve(self, n_bytes: int) -> Reservation:
        with self._lock:
            self._enter("reserve")
            self._require_multiple("reserve", n_bytes)
            end = self._next_address + n_bytes
            if n_bytes > _MAX_RESERVATION_BYTES or end > _END_OF_ADDRESSES:
                raise OutOfAddressSpace(
                    f"cannot reserve {format_bytes(n_bytes)} of addresses, at most "
                    f"{format_bytes(_MAX_RESERVATION_BYTES)}; lower max_tokens or the number of slots"
                )
            reservation = Reservation(self._next_address, n_bytes)
            self._next_address = end + self.info.granularity_bytes  # a gap: what runs over an end hits nothing
            self._bases.append(reservation.base)
            self._ranges[reservation.base] = _Range(reservation)
            self.items["reserve"] += 1
            return reservation

    def free_reservation(self, reservation: Reservation) -> None:
        with self._lock:
            self._enter("free_reservation")
            found = self._ranges.get(reservation.base)
            if found is None or found.reservation != reservation:
                raise UsageError(f"{reservation} is not a live reservation of this driver")
            if found.mapped:
                raise UsageError(f"free_reservation of {reservation} with {len(found.mapped)} pages mapped in it")
            del self._ranges[reservation.base]
            self._bases.remove(reservation.base)
            self.items["free_reservation"] += 1

    def create(self, page_bytes: int, places: Sequence[int], created: list[Handle]) -> None:
        with self._lock:
            self._enter("create")
            self._require_multiple("create", page_bytes)
            n_affordable = min(len(places), self.available_bytes() // page_bytes)
            handles = self._names(places[:n_affordable])
            self._pages.update(dict.fromkeys(handles, page_bytes))
            self.n_created_bytes += n_affordable * page_bytes
            self.items["create"] += n_affordable
            created += handles
            if n_affordable < len(places):
                error = OutOfPages(
                    f"{format_bytes(self.info.memory_bytes)} have no room for another page of "
                    f"{format_bytes(page_bytes)}; {format_bytes(self.n_created_bytes)} are taken"
                )
                error.n_done = n_affordable
                raise error

    def map(self, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        with self._lock:
            self._enter("map")
            if len(addresses) != len(handles):
                raise UsageError(f"map of {len(handles)} handles at {len(addresses)} addresses")
            self._require_live("map", page_bytes, handles)
            parts = self._parts("map", page_bytes, addresses, handles)
            if self._n_mapped + len(handles) > self.info.max_mappings and not self.info.neighbours_merge:
                raise OutOfMappings(
                    f"{len(handles)} more mappings would pass {self.info.max_mappings}; use larger pages"
                )
            for found, new in parts:
                found.mapped.update(new)
            if len(set(handles)) == len(handles) and self._mapped_handles.isdisjoint(handles):
                self._mapped_handles.update(handles)
            else:
                for handle in handles:
                    self._aliases[handle] += handle in self._mapped_handles
                    self._mapped_handles.add(handle)
            self._n_mapped += len(handles)
            self.items["map"] += len(handles)

    def set_access(self, spans: Sequence[Span]) -> None:
        with self._lock:
            self._enter("set_access")
            for found, places in self._whole_mappings("set_access", spans):
                found.accessible.update(places)
            self.items["set_access"] += len(spans)

    def unmap(self, spans: Sequence[Span]) -> None:
        with self._lock:
            self._enter("unmap")
            parts = self._whole_mappings("unmap", spans)
            if any(len(set(places)) != len(places) for _, places in parts):
                raise UsageError("unmap of one page twice")
            for found, places in parts:
                handles = [found.mapped.pop(place) for place in places]
                found.accessible.difference_update(places)
                self._n_mapped -= len(places)
                for handle in handles if self._aliases else ():
                    if self._aliases[handle] > 0:
                        self._aliases[handle] -= 1
                    else:
                        self._mapped_handles.discard(handle)
                if not self._aliases:
                    self._mapped_handles.difference_update(handles)
                self._aliases = +self._aliases
            self.items["unmap"] += len(spans)

    def release(self, page_bytes: int, handles: Sequence[Handle]) -> None:
        with self._lock:
            self._enter("release")
            self._require_live("release", page_bytes, handles)
            if len(set(handles)) != len(handles):
                raise UsageError("release of one handle twice")
            if not self._mapped_handles.isdisjoint(handles):
                raise UsageError("release of a handle that is mapped")
            for handle in handles:
                del self._pages[handle]
            for handle in self._pieces.keys() & handles:
                del self._pieces[handle]
            self.n_created_bytes -= len(handles) * page_bytes
            self.items["release"] += len(handles)

    def scrub(self, spans: Sequence[Span]) -> None:
        with self._lock:
            self._enter("scrub")
            for found, places in self._whole_mappings("scrub", spans):
                if not found.accessible.issuperset(places):
                    raise UsageError(f"scrub from {places[0]:#x} on before set_access")
                for place in places if self._pieces else ():
                    self._pieces.pop(found.mapped[place], None)
            self.items["scrub"] += len(spans)

    def copy(self, copies: Sequence[Copy]) -> None:
        with self._lock:
            self._enter("copy")
            for source, target, n_bytes in copies:
                if source < target + n_bytes and target < source + n_bytes:
                    raise UsageError(f"copy of {n_bytes} bytes from {source:#x} to {target:#x}: the ranges overlap")
                self._cuts("copy from", source, n_bytes)
                self._cuts("copy to", target, n_bytes)
            for source, target, n_bytes in copies:
                self._write("copy to", target, self._read("copy from", source, n_bytes))
            self.items["copy"] += len(copies)

    def copy_to_host(self, address: int, buffer: memoryview) -> Fence:
        with self._lock:
            self._enter("copy_to_host")
            if buffer.readonly:
                raise UsageError("copy_to_host into a buffer that is read-only")
            buffer.cast("B")[:] = self._read("copy_to_host", address, buffer.nbytes)
            self.items["copy_to_host"] += 1
            return PASSED

    def copy_from_host(self, buffer: memoryview, address: int) -> Fence:
        with self._lock:
            self._enter("copy_from_host")
            self._write("copy_from_host", address, bytes(buffer))
            self.items["copy_from_host"] += 1
            return PASSED

    def pin(self, address: int, n_bytes: int) -> None:
        with self._lock:
            self._enter("pin")  # the processor copies; there is no device that could not reach something

    def unpin(self, address: int) -> None:
        with self._lock:
            self._enter("unpin")

    def fence(self, streams: Collection[int] = ()) -> Fence:
        return PASSED

    def close(self) -> None:
        with self._lock:
            if self._ranges:
                raise UsageError(f"{len(self._ranges)} reservations are still open; close their caches first")
            self._pages.clear()
            self._pieces.clear()
            self.n_created_bytes = 0
            self._is_closed = True

    def _names(self, places: Sequence[int]) -> list[Handle]:
        """Name new pages: by their places where neighbours merge and the place's name is free, else by number."""
        if not self.info.neighbours_merge:
            first, self._next_handle = self._next_handle, self._next_handle + len(places)
            return [Handle(n) for n in range(first, self._next_handle)]
        names: dict[Handle, None] = {}
        for place in places:
            name = Handle(place)
            if name in names or name in self._pages:
                name, self._next_handle = Handle(self._next_handle), self._next_handle + 2
            names[name] = None
        return list(names)

    def _enter(self, operation: str) -> None:
        if self._is_closed:
            raise UsageError(f"{operation} on a closed driver")
        self.calls[operation] += 1

    def _require_multiple(self, operation: str, value: int) -> None:
        if value <= 0 or value % self.info.granularity_bytes:
            raise UsageError(f"{operation}: {value:#x} is not a positive multiple of {self.info.granularity_bytes}")

    def _require_live(self, operation: str, page_bytes: int, handles: Sequence[Handle]) -> None:
        pages = self._pages
        for handle in handles:
            if pages.get(handle) != page_bytes:
                raise UsageError(f"{operation} of handle {handle}, which is no live page of {page_bytes} bytes")

    def _range_around(self, operation: str, address: int, n_bytes: int) -> _Range:
        index = bisect.bisect_right(self._bases, address) - 1
        if index >= 0:
            found = self._ranges[self._bases[index]]
            if address + n_bytes <= found.reservation.end:
                return found
        raise UsageError(f"{operation} at {address:#x}, which is not reserved")

    def _parts(
        self, operation: str, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]
    ) -> list[tuple[_Range, dict[int, Handle]]]:
        """Split a batch by reservation, and refuse what is not free."""
        if not addresses:
            return []
        low, high = min(addresses), max(addresses)
        found = self._range_around(operation, low, page_bytes)
        new = dict(zip(addresses, handles, strict=True))
        if len(new) != len(addresses):
            raise UsageError(f"{operation} to one address twice")
        if high + page_bytes <= found.reservation.end:
            parts = [(found, new)]
        else:
            by_base: dict[int, dict[int, Handle]] = {}
            for address, handle in new.items():
                base = self._range_around(operation, address, page_bytes).reservation.base
                by_base.setdefault(base, {})[address] = handle
            parts = [(self._ranges[base], part) for base, part in by_base.items()]
        for found, part in parts:
            self._require_free(operation, found, page_bytes, part)
        return parts

    def _require_free(self, operation: str, found: _Range, page_bytes: int, new: dict[int, Handle]) -> None:
        base = found.reservation.base
        step = page_bytes
        if any((address - base) % step for address in new):
            for address in new:
                self._require_multiple(operation, address)
            step = -1
        if found.step_bytes not in (0, step):
            step = -1
        if step > 0:
            if not found.mapped.keys().isdisjoint(new):
                raise UsageError(f"{operation} to an address where something is mapped")
        else:  # pages of several sizes, or off the grid: look at whole extents
            extents = [(place, self._pages[handle]) for place, handle in found.mapped.items()]
            extents += [(place, page_bytes) for place in new]
            extents.sort()
            if any(a + n > b for (a, n), (b, _) in pairwise(extents)):
                raise UsageError(f"{operation} to an address where something is mapped")
        found.step_bytes = step

    def _whole_mappings(self, operation: str, spans: Sequence[Span]) -> list[tuple[_Range, list[int]]]:
        """By reservation, the addresses of the mappings that fill the spans exactly. A span lies in one of them."""
        parts: dict[int, tuple[_Range, list[int]]] = {}
        for address, n_bytes in spans:
            found = self._range_around(operation, address, n_bytes)
            _, places = parts.setdefault(found.reservation.base, (found, []))
            step = found.step_bytes
            if n_bytes <= 0 or step <= 0 or n_bytes % step:
                places += self._walk(operation, found, address, n_bytes)
            else:
                places += range(address, address + n_bytes, step)
        for found, places in parts.values():
            if not found.mapped.keys() >= set(places):
                hole = next(place for place in places if place not in found.mapped)
                raise UsageError(f"{operation} where no mapping begins, at {hole:#x}")
        return list(parts.values())

    def _walk(self, operation: str, found: _Range, start: int, n_bytes: int) -> list[int]:
        """The same for one span over pages of any sizes."""
        places: list[int] = []
        at, end = start, start + n_bytes
        while at < end:
            handle = found.mapped.get(at)
            if handle is None:
                raise UsageError(f"{operation} of [{start:#x}, {end:#x}): no mapping begins at {at:#x}")
            places.append(at)
            at += self._pages[handle]
        if at != end or not places:
            raise UsageError(f"{operation} of [{start:#x}, {end:#x}) cuts a mapping or is empty")
        return places

    def _cuts(self, operation: str, address: int, n_bytes: int) -> list[tuple[Handle, int, int, int]]:
        """Check that a range may be touched; return its parts as (page, piece, first byte in it, bytes)."""
        cuts: list[tuple[Handle, int, int, int]] = []
        found = self._range_around(operation, address, n_bytes)
        places = sorted(found.accessible)
        at, end = address, address + n_bytes
        while at < end:
            index = bisect.bisect_right(places, at) - 1
            page_end = places[index] + self._pages[found.mapped[places[index]]] if index >= 0 else 0
            if page_end <= at:
                raise UsageError(f"{operation} [{address:#x}, {end:#x}): {at:#x} is not mapped and accessible")
            piece, first = divmod(at - places[index], _PIECE_BYTES)
            n_here = min(_PIECE_BYTES - first, end - at, page_end - at)
            cuts.append((found.mapped[places[index]], piece, first, n_here))
            at += n_here
        return cuts

    def _read(self, operation: str, address: int, n_bytes: int) -> bytes:
        data = bytearray()
        for handle, piece, first, n_here in self._cuts(operation, address, n_bytes):
            stored = self._pieces.get(handle, {}).get(piece)
            data += stored[first : first + n_here] if stored else bytes(n_here)
        return bytes(data)

    def _write(self, operation: str, address: int, data: bytes) -> None:
        at = 0
        for handle, piece, first, n_here in self._cuts(operation, address, len(data)):
            stored = self._pieces.setdefault(handle, {}).setdefault(piece, bytearray(_PIECE_BYTES))
            stored[first : first + n_here] = data[at : at + n_here]
            at += n_here
