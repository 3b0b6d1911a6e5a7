"""Pages that are mapped more than once: who holds each of them, and when the last one has let go.

A page is held by *tables* (slots under which it is mapped), *elsewhere* (mappings that are being made or undone just
now) and *stuck* mappings (of which the unmap failed). It is mapped while a table holds it, in flight while something
else does, quarantined while only stuck mappings do, and free when nothing does. A page that is mapped once needs no
entry: every method takes pages with and without one.

Guarantees: bookkeeping only; no driver call. Assumptions: the caller holds the pool's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vmem_kv.driver.base import Handle


@dataclass(slots=True)
class _Holders:
    """How many mappings of a page there are, by what they are in."""

    n_tables: int
    n_elsewhere: int = 0
    n_stuck: int = 0


class Gone(NamedTuple):
    """Pages that lost their last working mapping."""

    free: list[Handle]
    lost: list[Handle]  # a stuck mapping is left of them


class Shares:
    """The pages of one region that are mapped more than once."""

    def __init__(self) -> None:
        self._holders: dict[Handle, _Holders] = {}

    def __bool__(self) -> bool:
        return bool(self._holders)

    def n_tables(self, handle: Handle) -> int:
        """Under how many slots a page of the table is mapped."""
        holders = self._holders.get(handle)
        return 1 if holders is None else holders.n_tables

    def is_shared(self, handle: Handle) -> bool:
        """Whether anybody but one slot may read a page of the table."""
        holders = self._holders.get(handle)
        return holders is not None and holders.n_tables + holders.n_elsewhere > 1

    def is_doomed(self, handle: Handle) -> bool:
        """Whether a page of the table will be lost with its last place there: a stuck mapping is left of it."""
        holders = self._holders.get(handle)
        return holders is not None and holders.n_stuck > 0

    def alias(self, handles: Iterable[Handle]) -> None:
        """Pages of the table are about to be mapped once more."""
        for handle in handles:
            self._holders.setdefault(handle, _Holders(1)).n_elsewhere += 1

    def enter(self, handles: Sequence[Handle]) -> int:
        """Mappings that were made go into a table; return how many pages no table held before."""
        n_entered = len(handles)
        for handle in handles:
            holders = self._holders.get(handle)
            if holders is not None:
                n_entered -= holders.n_tables > 0
                holders.n_tables += 1
                holders.n_elsewhere -= 1
                self._tidy(handle, holders)
        return n_entered

    def leave(self, handles: Sequence[Handle]) -> int:
        """Mappings leave a table, to be undone; return how many pages no table holds now."""
        n_left = len(handles)
        for handle in handles:
            holders = self._holders.get(handle)
            if holders is not None:
                holders.n_tables -= 1
                holders.n_elsewhere += 1
                n_left -= holders.n_tables > 0
        return n_left

    def drop(self, handles: Iterable[Handle]) -> Gone:
        """Mappings that were in no table are undone, or were never made; return the pages that nobody holds now."""
        gone = Gone([], [])
        for handle in handles:
            holders = self._holders.get(handle)
            if holders is None:
                gone.free.append(handle)
                continue
            holders.n_elsewhere -= 1
            if holders.n_tables + holders.n_elsewhere == 0:
                (gone.lost if holders.n_stuck else gone.free).append(handle)
            self._tidy(handle, holders)
        return gone

    def get_stuck(self, handles: Iterable[Handle]) -> list[Handle]:
        """Mappings that were in no table cannot be undone; return the pages of which only such ones are left."""
        lost = []
        for handle in handles:
            holders = self._holders.get(handle)
            if holders is not None:
                holders.n_elsewhere -= 1
                holders.n_stuck += 1
            if holders is None or holders.n_tables + holders.n_elsewhere == 0:
                lost.append(handle)
        return lost

    def retry(self, handles: Iterable[Handle]) -> list[Handle]:
        """Stuck mappings are about to be undone after all; return the pages that had no others."""
        back = []
        for handle in handles:
            holders = self._holders.get(handle)
            if holders is None or holders.n_tables + holders.n_elsewhere == 0:
                back.append(handle)
            if holders is not None:
                holders.n_stuck -= 1
                holders.n_elsewhere += 1
        return back

    def _tidy(self, handle: Handle, holders: _Holders) -> None:
        if holders.n_tables <= 1 and holders.n_elsewhere == holders.n_stuck == 0:
            del self._holders[handle]
