"""The pool: physical pages that we own, their budget, and the books that every cache on it shares.

    n_free + n_in_flight + n_mapped + n_quarantined == n_owned <= max_pages

A page is *in flight* between `take` and the moment it is mapped (or unmapped and given back). A page whose unmap
or release failed is *quarantined*: counted, never reused, unless its unmap succeeds later.

Guarantees: after an exception nothing has changed, but for pages that had to be quarantined. The pool carries the
one lock of all caches on it, and holds it for bookkeeping only, never across a driver call.

Two limits are not the pool's alone and are charged to the driver's ledger: mappings, and memory. A pool is refused at
the start if its budget exceeds what is available then; budgets of several pools may add up to more than that, and
whoever would pass `BUDGET_SHARE` of what the pool found (with what all pools owned already) gets OutOfPages.

Assumptions: nobody else creates pages of this size on this driver.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

from vmem_kv.driver.base import Driver, Handle
from vmem_kv.errors import ConfigError, InvariantError, OutOfMappings, OutOfPages, UsageError, VmemError
from vmem_kv.units import format_bytes

BUDGET_SHARE = 0.9
"""Share of the memory that is available at the start which a pool may promise; the rest is the system's."""


class Reclaimer(Protocol):
    """A cache on the pool, seen as somebody who may have warm pages to give."""

    def reclaim(self, n_pages: int) -> int:
        """Unmap warm slots until `n_pages` pages went back to the pool; return how many did."""

    def n_warm_pages(self) -> int:
        """Pages that `reclaim` could give back now. The caller holds the pool's lock."""

    def is_busy(self) -> bool:
        """Whether a driver call of this member is under way. The caller holds the pool's lock."""


class MappedPages(Protocol):
    """A region on the pool. It outlives a cache that was dropped without closing it, as its mappings do."""

    def mapped_handles(self) -> list[Handle]:
        """Every page mapped here. The caller holds the pool's lock."""

    def n_mappings(self) -> int:
        """What these pages cost of the driver's mappings. The caller holds the pool's lock."""


class PagePool:
    """Pages of one size on one driver.

    Args:
        driver: Who creates and releases them. The pool does not close it.
        page_bytes: A multiple of the driver's granularity.
        max_pages: The budget; None for as many as `BUDGET_SHARE` of the available memory holds.
        keep_freed: Keep handles that come back for reuse; None for what pays on this driver.

    Raises:
        ConfigError: The page size does not fit the driver, or the machine (or its cgroup) cannot hold the budget.
    """

    def __init__(
        self, driver: Driver, page_bytes: int, max_pages: int | None = None, *, keep_freed: bool | None = None
    ) -> None:
        granularity = driver.info.granularity_bytes
        if page_bytes < granularity or page_bytes % granularity:
            raise ConfigError(f"page_bytes is {page_bytes}; it must be a multiple of {granularity}")
        self.driver = driver
        self.page_bytes = page_bytes
        self._available_bytes = driver.available_bytes()
        self._limit_bytes = int((self._available_bytes + driver.ledger.n_bytes) * BUDGET_SHARE)
        self.max_pages = self._checked_budget(max_pages)
        self.lock = threading.Condition(threading.Lock())
        self.n_owned = 0
        self.n_peak_owned = 0
        self.n_in_flight = 0
        self.n_mapped = 0
        self.n_mappings = 0
        self._free: list[Handle] = []
        self._quarantined: list[Handle] = []
        self._keep_freed = driver.info.keeps_pay if keep_freed is None else keep_freed
        self._members: weakref.WeakSet[Reclaimer] = weakref.WeakSet()
        self._regions: list[MappedPages] = []
        self._n_trims = 0  # under way just now
        self._pid = os.getpid()

    @property
    def n_free(self) -> int:
        """Pages that are owned and mapped nowhere, ready to be taken."""
        return len(self._free)

    @property
    def n_quarantined(self) -> int:
        """Pages that are lost until the driver is closed."""
        return len(self._quarantined)

    @property
    def n_available(self) -> int:
        """Pages that `take` could hand out now."""
        return self.n_free + self.max_pages - self.n_owned

    def join(self, member: Reclaimer, region: MappedPages) -> None:
        """Make a cache's warm pages reachable for the others on this pool, and its mapped ones for `check`."""
        with self.lock:
            self._members.add(member)
            self._regions.append(region)

    def leave(self, member: Reclaimer, region: MappedPages) -> None:
        """Forget a cache that was closed."""
        with self.lock:
            self._members.discard(member)
            self._regions.remove(region)

    def require_owner(self) -> None:
        """Raise UsageError in a forked child, before it touches a lock that nobody there will ever release."""
        if os.getpid() != self._pid:
            raise UsageError(f"this cache belongs to process {self._pid}; a forked child must open its own")

    def take(self, places: Sequence[int]) -> tuple[list[Handle], int]:
        """Return a handle per place, free ones first, and how many of them (the first ones) hold old bytes.

        Old bytes are a former owner's, or the system's where the driver does not zero new pages: scrub them before
        anybody may read them.

        Raises:
            OutOfPages: The budget or the device's memory is spent. Nothing changed.
            DriverError: Creating a page failed. Nothing changed.
        """
        n_pages = len(places)
        with self.lock:
            n_new = max(0, n_pages - self.n_free)
            if self.n_owned + n_new > self.max_pages:
                raise OutOfPages(
                    f"{n_pages} pages of {format_bytes(self.page_bytes)} are needed, {self.n_available} of "
                    f"{self.max_pages} are available; retire sequences, shorten them or raise the budget (max_bytes)"
                )
            if not self.driver.ledger.charge_bytes(n_new * self.page_bytes, self._limit_bytes):
                raise OutOfPages(
                    f"{format_bytes(n_new * self.page_bytes)} more would pass {format_bytes(self._limit_bytes)}, "
                    f"{BUDGET_SHARE:.0%} of the memory on {self.driver.info.device}, of which all pools own "
                    f"{format_bytes(self.driver.ledger.n_bytes)}; retire sequences or close other caches"
                )
            n_used = n_pages - n_new
            handles = self._free[len(self._free) - n_used :]
            del self._free[len(self._free) - n_used :]
            self.n_owned += n_new
            self.n_in_flight += n_pages
        if n_new:
            created: list[Handle] = []
            try:
                self.driver.create(self.page_bytes, places[n_used:], created)
            except BaseException:
                with self.lock:
                    self._disown(n_new - len(created))
                    self.n_in_flight -= n_pages - len(created)
                    self._free += handles
                    self.lock.notify_all()
                self._release(created)
                raise
            handles += created
            with self.lock:
                self.n_peak_owned = max(self.n_peak_owned, self.n_owned)
        return handles, n_used if self.driver.info.zeroes_new_pages else n_pages

    def give(self, handles: Sequence[Handle]) -> None:
        """Take back pages that are mapped nowhere; keep them for reuse, or release them where keeping is not worth it.

        Raises:
            DriverError: A release failed; those pages are quarantined, the others are released.
        """
        if not self._keep_freed:
            self._release(handles, raise_error=True)
            return
        with self.lock:
            self.n_in_flight -= len(handles)
            self._free += handles
            self.lock.notify_all()

    def trim(self, n_pages: int | None = None) -> int:
        """Release up to `n_pages` free handles (all of them by default) to the driver; return how many.

        Raises:
            UsageError: `n_pages` is negative. Nothing changed.
            DriverError: A release failed; those pages are quarantined, the others are released.
        """
        self.require_owner()
        if n_pages is not None and n_pages < 0:
            raise UsageError(f"trim of {n_pages} pages; ask for none or more")
        with self.lock:
            self._n_trims += 1
            n_trimmed = self.n_free if n_pages is None else min(n_pages, self.n_free)
            handles = self._free[:n_trimmed]
            del self._free[:n_trimmed]
            self.n_in_flight += n_trimmed
        try:
            self._release(handles, raise_error=True)
        finally:
            with self.lock:
                self._n_trims -= 1
        return n_trimmed

    def resize(self, max_pages: int) -> None:
        """Change the budget while running: trim and reclaim warm slots where the new one is below what is owned.

        Raises:
            ConfigError: The new budget is below one page, or exceeds what was available when the pool was opened.
                Nothing changed.
            OutOfPages: Live pages alone exceed the new budget: nothing changed. Or other threads took pages
                meanwhile: the budget is unchanged, warm slots went cold and free pages were released.
            DriverError: Giving pages back failed; the budget is unchanged, and some warm slots went cold.
        """
        self.require_owner()
        self._checked_budget(max_pages)
        members = list(self._members)
        for member in members:
            member.reclaim(0)  # nothing yet, but slots whose fences have passed become warm
        with self.lock:
            n_excess = self.n_owned - max_pages
            n_givable = self.n_free + sum(member.n_warm_pages() for member in members)
        if n_excess > n_givable:
            raise OutOfPages(
                f"a budget of {max_pages} pages is below the {self.n_owned - n_givable} pages in use; "
                "retire sequences first"
            )
        while True:
            with self.lock:  # in one step, or another thread could take pages in between
                n_excess = self.n_owned - max_pages
                if n_excess <= 0:
                    self.max_pages = max_pages
                    return
            if not self.trim(n_excess) and not self.make_room(n_excess):
                raise OutOfPages(f"{n_excess} pages are still in use; wait for their fences and resize again")

    def make_room(self, n_pages: int, first: Reclaimer | None = None) -> int:
        """Reclaim warm slots, of `first` before the others, until `n_pages` pages came back; return how many did.

        Raises:
            DriverError: An unmap or release failed; what could be given back was.
        """
        n_freed = 0
        members = [member for member in list(self._members) if member is not first]
        for member in ([first] if first is not None else []) + members:
            if n_freed < n_pages:
                n_freed += member.reclaim(n_pages - n_freed)
        return n_freed

    def quarantine(self, handles: Iterable[Handle]) -> None:
        """Set pages aside whose unmap or release failed. They count as in flight before the call."""
        lost = list(handles)
        with self.lock:
            self.n_in_flight -= len(lost)
            self._quarantined += lost

    def unquarantine(self, handles: Iterable[Handle]) -> None:
        """Take pages whose unmap is tried again out of quarantine: they are in flight. The caller holds the lock."""
        for handle in handles:
            self._quarantined.remove(handle)
            self.n_in_flight += 1

    def forget(self, handles: Sequence[Handle]) -> None:
        """Count quarantined pages as gone: the device is lost, and they with it. The caller holds the lock."""
        self.unquarantine(handles)
        self.n_in_flight -= len(handles)
        self._disown(len(handles))

    def charge_mappings(self, n_mappings: int) -> None:
        """Count mappings before they are made.

        Raises:
            OutOfMappings: The driver's limit would be passed. Nothing changed.
        """
        with self.lock:
            limit, ledger = self.driver.info.max_mappings, self.driver.ledger
            if not ledger.charge_mappings(n_mappings, limit):
                raise OutOfMappings(
                    f"{n_mappings} more mappings are needed, {ledger.n_mappings} of {limit} are used; use larger "
                    f"pages, a layout with fewer planes, or {self.driver.info.mappings_advice}"
                )
            self.n_mappings += n_mappings

    def refund_mappings(self, n_mappings: int) -> None:
        """Count mappings that are gone, or were charged and not made."""
        with self.lock:
            self.forget_mappings(n_mappings)

    def forget_mappings(self, n_mappings: int) -> None:
        """`refund_mappings` for a caller that holds the lock."""
        self.n_mappings -= n_mappings
        self.driver.ledger.refund_mappings(n_mappings)

    def check(self) -> None:
        """Verify the equation of this file's first lines. The caller holds the lock.

        Raises:
            InvariantError: It does not hold.
        """
        n_known = self.n_free + self.n_in_flight + self.n_mapped + self.n_quarantined
        counts = (self.n_free, self.n_in_flight, self.n_mapped, self.n_quarantined, self.n_mappings)
        if n_known != self.n_owned or self.n_owned > self.max_pages or min(counts) < 0:
            raise InvariantError(f"the pool's books do not add up: {self._dump()}")
        mapped = [handle for region in self._regions for handle in region.mapped_handles()]
        if len(mapped) != self.n_mapped:
            raise InvariantError(f"the regions hold {len(mapped)} mapped pages: {self._dump()}")
        if len({*self._free, *self._quarantined, *mapped}) != self.n_free + self.n_quarantined + len(mapped):
            raise InvariantError(f"a page is in two places at once: {self._dump()}")
        if self._n_trims or any(member.is_busy() for member in list(self._members)):
            return  # pages and mappings that somebody holds just now
        if self.n_in_flight:
            raise InvariantError(f"pages are in flight and nobody holds them: {self._dump()}")
        n_mappings = sum(region.n_mappings() for region in self._regions)
        if n_mappings != self.n_mappings:
            raise InvariantError(f"the regions cost {n_mappings} mappings: {self._dump()}")

    def _release(self, handles: Sequence[Handle], *, raise_error: bool = False) -> None:
        """Release in-flight pages; quarantine those that the driver does not take.

        After an interruption, which does not say how far the driver came, the rest goes one by one, and a driver that
        answers that a page is gone is believed; after a second one the rest is quarantined.
        """
        failure: BaseException | None = None
        rest, was_interrupted = list(handles), False
        while rest:
            batch = rest[:1] if was_interrupted else rest
            n_done, n_lost = len(batch), 0
            try:
                self.driver.release(self.page_bytes, batch)
            except VmemError as error:
                # A lost device took its memory back; and after an interruption, a page that is gone was released.
                is_gone = getattr(error, "is_fatal", False) or (was_interrupted and isinstance(error, UsageError))
                if not is_gone:
                    failure, n_done, n_lost = failure or error, error.n_done, 1
            except BaseException as error:
                n_done, n_lost = 0, len(rest) if was_interrupted else 0
                failure, was_interrupted = error, True
            self.quarantine(rest[n_done : n_done + n_lost])
            with self.lock:
                self._disown(n_done)
                self.n_in_flight -= n_done
                self.lock.notify_all()
            rest = rest[n_done + n_lost :]
        if failure is not None and (raise_error or was_interrupted):
            raise failure

    def _disown(self, n_pages: int) -> None:
        """Count pages that the system has again, or never gave. The caller holds the lock."""
        self.n_owned -= n_pages
        self.driver.ledger.refund_bytes(n_pages * self.page_bytes)

    def _checked_budget(self, max_pages: int | None) -> int:
        memory_bytes = self._available_bytes
        n_affordable = int(memory_bytes * BUDGET_SHARE) // self.page_bytes
        if max_pages is None:
            max_pages = n_affordable
        if max_pages < 1:
            raise ConfigError(f"max_pages is {max_pages}; a pool needs at least one page")
        if max_pages > n_affordable:
            raise ConfigError(
                f"a pool of {format_bytes(max_pages * self.page_bytes)} does not fit: {format_bytes(memory_bytes)} are "
                f"available on {self.driver.info.device}, of which {BUDGET_SHARE:.0%} may be promised; "
                f"lower max_bytes to {format_bytes(n_affordable * self.page_bytes)} or less"
            )
        return max_pages

    def _dump(self) -> str:
        return (
            f"free={self.n_free} in_flight={self.n_in_flight} mapped={self.n_mapped} "
            f"quarantined={self.n_quarantined} owned={self.n_owned} budget={self.max_pages} mappings={self.n_mappings}"
        )
