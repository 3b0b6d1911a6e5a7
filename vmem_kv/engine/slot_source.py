"""Where a sequence gets its slot from, and what becomes of it: the contract, and the plain way.

    start = source.begin(sequence, n_tokens)   a slot, and how many of the sequence's tokens are in it already
    source.settle()                            once a step: what was computed meanwhile may be found by others
    source.end(sequences, is_sound=...)        the slots go back

There are two: `FreshSlots` here, which begins every sequence from nothing, and `PrefixSlots` (prefixes.py), which
begins it with what others have computed. Which one is decided where the engine is built.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.request import Sequence
from vmem_kv.growth import SlotId
from vmem_kv.prefix.entry import PrefixStats


class Start(NamedTuple):
    """How a sequence begins."""

    slot_id: SlotId
    n_tokens: int  # its first tokens whose K and V are in the slot; at least one of all is left to be computed


class SlotSource(Protocol):
    """Gives slots to sequences that start, and takes those of sequences that end."""

    def begin(self, sequence: Sequence, expected_tokens: int) -> Start:
        """Return a slot for a sequence without one. Maps nothing that was not mapped, but for a copied tail.

        Args:
            sequence: Which one. Its `slot_id` and `n_computed` are the caller's to set.
            expected_tokens: What it needs soon.

        Raises:
            OutOfSlots: More sequences run than the memory was opened for.
            DriverError: No slot could be prepared. Nothing is held for the sequence.
        """

    def settle(self) -> None:
        """Look at the running sequences: what they have computed since is cached from now on."""

    def end(self, sequences: SequenceOf[Sequence], *, is_sound: bool = True) -> None:
        """Take the slots of sequences that have one: they ended, or were preempted.

        Args:
            sequences: Which. Their `n_computed` says what their slots hold; their `slot_id` is the caller's to clear.
            is_sound: Whether others may use what they computed.

        Raises:
            DriverError: The device is lost.
        """

    def is_coming(self, sequence: Sequence) -> bool:
        """Whether a running sequence, of earlier rank, computes now what this one could then begin with."""

    def n_live_pages(self, sequence: Sequence, expected_tokens: int) -> int:
        """Pages that a waiting sequence would begin with and that running ones have anyway.

        Less those that it would begin with and not need soon, which it would keep from others.
        """

    def n_available_pages(self) -> int:
        """Pages that growth could have now, with what is only cached."""

    def make_room(self, n_pages: int) -> bool:
        """Let so many pages be available to growth, and give up for it what is only cached.

        Returns:
            False: they are in use, even if nothing were cached. Nothing changed.
        """

    def give_way(self, n_pages: int) -> bool:
        """Give up what is only cached until so many pages came free; return whether anything was given up."""

    def cached_slots(self) -> frozenset[SlotId]:
        """Slots of nobody who runs, kept for what they hold. May be called from any thread."""

    def stats(self) -> PrefixStats | None:
        """What was cached and found, as of the last `settle` or `end`; None without a cache. From any thread."""

    def check(self) -> None:
        """Hold the books against each other and against the cache.

        Raises:
            InvariantError: They disagree.
        """


class FreshSlots(SlotSource):
    """Every sequence computes all of its tokens."""

    def __init__(self, memory: SlotMemory) -> None:
        self._memory = memory

    def begin(self, sequence: Sequence, expected_tokens: int) -> Start:
        return Start(self._memory.acquire(sequence.max_length, sequence.request.domain), 0)

    def settle(self) -> None:
        """Nothing is cached."""

    def end(self, sequences: SequenceOf[Sequence], *, is_sound: bool = True) -> None:
        slot_ids = [s.slot_id for s in sequences if s.slot_id is not None]
        if slot_ids:
            self._memory.retire(slot_ids)

    def is_coming(self, sequence: Sequence) -> bool:
        return False

    def n_live_pages(self, sequence: Sequence, expected_tokens: int) -> int:
        return 0

    def n_available_pages(self) -> int:
        return self._memory.n_available_pages()

    def make_room(self, n_pages: int) -> bool:
        return n_pages <= self._memory.n_available_pages()

    def give_way(self, n_pages: int) -> bool:
        return False

    def cached_slots(self) -> frozenset[SlotId]:
        return frozenset()

    def stats(self) -> None:
        return None

    def check(self) -> None:
        """There are no books."""
