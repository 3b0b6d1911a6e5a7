"""Rows on their way from host memory into slots, for sequences that wait for them.

    bring    a slot is taken, its pages are mapped, and the copies begin; asked again: the slot, once they have passed
    drop     nobody wants the slot any more: it goes back once they have passed

A sequence whose rows are on their way is neither running nor without a slot: it stays in the queue, and the slot is
here until it is handed out. Where pages are short for those that run, `drop_one` takes one back: the host copy is as it
was, and the sequence's turn comes again.

Guarantees: nobody gets a slot before its rows are there, nor its pages while they are written. After any failure the
slot has gone back.
Assumptions: one thread. The host copy stays until the rows have passed (`HostTier` sees to it).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.moves import Moves
from vmem_kv.engine.request import Sequence
from vmem_kv.engine.slot_source import SlotSource, Start
from vmem_kv.errors import OutOfSlots
from vmem_kv.growth import SlotId
from vmem_kv.tiers.copies import HostCopy
from vmem_kv.tiers.host import HostTier, Restoring
from vmem_kv.tiers.moving import is_over


class _Arrival(NamedTuple):
    """Rows on their way."""

    slot_id: SlotId
    n_tokens: int
    restoring: Restoring


class Arrivals:
    """See this file's first lines.

    Args:
        room: The source that makes room for slots and pages; whose arrivals these are, or above it.
        memory: Where the slots are.
        host: Where the rows come from.
        moves: What the scheduler knows of it.
    """

    def __init__(self, room: SlotSource, memory: SlotMemory, host: HostTier, moves: Moves) -> None:
        self._room = room
        self._memory = memory
        self._host = host
        self._moves = moves
        self._arriving: dict[Sequence, _Arrival] = {}
        self._unwanted: list[_Arrival] = []

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._arriving

    def n_pages(self, sequence: Sequence) -> int:
        """Pages of the slot that waits for a sequence; 0 for none."""
        arrival = self._arriving.get(sequence)
        return 0 if arrival is None else self._memory.n_mapped_pages(arrival.slot_id)

    def bring(self, sequence: Sequence, copy: HostCopy, n_tokens: int, expected_tokens: int) -> Start | None:
        """Return a slot with the first tokens of a host copy; None as long as they, or the room for them, are coming.

        Args:
            sequence: Whose they will be. Asked again, it goes on with what was begun.
            copy: Where they are.
            n_tokens: How many.
            expected_tokens: What the sequence needs soon.

        Raises:
            CapacityError: There is no room for them, and none is coming. Nothing is held.
            DriverError: They could not be moved. Nothing is held.
        """
        if sequence not in self._arriving:
            self._host.hold(copy)  # whatever makes room
            try:
                arrival = self._begin(sequence, copy, n_tokens, expected_tokens)
            finally:
                self._host.release(copy)
            if arrival is None:
                return None
            self._arriving[sequence] = arrival
            self._moves.note(arrival.restoring)
        arrival = self._arriving[sequence]
        if not is_over(arrival.restoring):
            return None
        del self._arriving[sequence]
        try:
            arrival.restoring.finish()
        except BaseException:
            self._memory.retire([arrival.slot_id])
            raise
        return Start(arrival.slot_id, arrival.n_tokens)

    def begin_below(self, inner: SlotSource, sequence: Sequence, expected_tokens: int) -> Start | None:
        """Begin a sequence with the source below. For want of a slot, those that wait for others are given up."""
        while True:
            try:
                return inner.begin(sequence, expected_tokens)
            except OutOfSlots:
                if not self.drop_one():
                    raise

    def make_room_over(self, inner: SlotSource, n_pages: int) -> bool:
        """Make room by the source below and, where that is not enough, by what is on its way; see `make_room` there."""
        while not inner.make_room(n_pages):
            if not self.drop_one():
                return False
        return True

    def drop(self, sequence: Sequence) -> None:
        """Give up what was begun for a sequence, if anything was."""
        arrival = self._arriving.pop(sequence, None)
        if arrival is not None:
            self._unwanted.append(arrival)
            self._moves.leaving.add(arrival.slot_id)
            self.settle()

    def drop_one(self) -> bool:
        """Give up what was begun for the last of the order, for its pages; return whether there was anything."""
        last = max(self._arriving, key=lambda sequence: sequence.rank, default=None)
        if last is not None:
            self.drop(last)
        return last is not None

    def settle(self) -> None:
        """Give slots back that nobody wants, and nobody writes to any more.

        Raises:
            DriverError: The device is lost.
        """
        for arrival in [arrival for arrival in self._unwanted if is_over(arrival.restoring)]:
            self._give_back(arrival)

    def close(self) -> None:
        """Give up everything. What is on its way is waited for.

        Raises:
            DriverError: The device is lost.
        """
        with ExitStack() as stack:
            for arrival in [*self._unwanted, *self._arriving.values()]:
                stack.callback(self._give_back, arrival)
            self._unwanted += self._arriving.values()
            self._arriving.clear()

    def _prepare(self, sequence: Sequence, n_tokens: int, expected_tokens: int) -> SlotId | None:
        """Return an empty slot, with room for what it will hold; None where either is coming."""
        n_pages = self._memory.n_pages(n_tokens)
        if self._room.make_room(n_pages) and self._memory.n_available_pages() < n_pages and self._moves.leaving:
            return None
        while True:
            try:
                return self._memory.acquire(max(expected_tokens, n_tokens), sequence.request.domain)
            except OutOfSlots:
                if self._moves.leaving:
                    return None
                if not self._room.give_way(1):
                    raise

    def _begin(self, sequence: Sequence, copy: HostCopy, n_tokens: int, expected_tokens: int) -> _Arrival | None:
        """Begin to copy; None as long as the room for it is coming."""
        memory = self._memory
        slot_id = self._prepare(sequence, n_tokens, expected_tokens)
        if slot_id is None:
            return None
        try:
            lengths = {slot_id: n_tokens}
            memory.grow(lengths)
            memory.cut(slot_id, 0)  # mapped, and without tokens
            restoring = self._host.begin_restore(copy, memory.cache, slot_id, n_tokens=n_tokens)
            return _Arrival(slot_id, n_tokens, restoring)
        except BaseException:
            memory.retire([slot_id])
            raise

    def _give_back(self, arrival: _Arrival) -> None:
        self._unwanted.remove(arrival)
        self._moves.leaving.discard(arrival.slot_id)
        try:
            arrival.restoring.cancel()
        finally:
            self._memory.retire([arrival.slot_id])
