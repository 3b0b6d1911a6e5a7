"""Where a sequence gets its slot from, and what becomes of it: the contract, and the plain way.

    start = source.begin(sequence, n_tokens)   a slot, and how many of the sequence's tokens are in it already;
                                               or None, as long as they are on their way: ask again
    source.settle()                            once a step: what was computed meanwhile may be found by others
    source.pause(sequence)                     the slot goes back, and the sequence will begin again
    source.end(sequences, is_sound=...)        the slots go back for good

`FreshSlots` here begins every sequence from nothing, `PrefixSlots` (prefixes.py) with what others have computed. Over
either of them there may be `SessionSlots` (session_slots.py), which keeps slots by name between two requests, over that
`PromptSlots` (prompt_slots.py), which has what was loaded from files, and over that `ParkingSlots` (parking.py), which
keeps what paused sequences have computed in host memory. What there is is decided where the engine is built (tiers.py).

A slot is *kept* where a sequence has ended in it and somebody above goes on having it: `keep` it, and then `go_on` in
it, `let_go` of it, or `give_back` what nobody reads any more. Others may begin with what it holds meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.prefix_pages import CachedPages
from vmem_kv.engine.request import Sequence
from vmem_kv.engine.tier_stats import TierFigures
from vmem_kv.errors import InvariantError
from vmem_kv.growth import SlotId
from vmem_kv.prefix.entry import PrefixStats


class Start(NamedTuple):
    """How a sequence begins."""

    slot_id: SlotId
    n_tokens: int  # its first tokens whose K and V are in the slot; at least one of all is left to be computed


class SlotSource(Protocol):
    """Gives slots to sequences that start, and takes those of sequences that end."""

    def begin(self, sequence: Sequence, expected_tokens: int) -> Start | None:
        """Return a slot for a sequence without one. Maps nothing that was not mapped, but for a copied tail.

        None: what the sequence will begin with, or a slot or pages for it, are on their way, and nothing of it is the
        caller's. He asks again when they may have passed, or ends the sequence.

        Args:
            sequence: Which one. Its `slot_id` and `n_computed` are the caller's to set.
            expected_tokens: What it needs soon.

        Raises:
            OutOfSlots: More sequences run than the memory was opened for, or the driver does not let go of slots that
                nobody uses. Nothing is held for the sequence.
            DriverError: No slot could be prepared. Nothing is held for the sequence.
        """

    def settle(self) -> None:
        """Look at the running sequences: what they have computed since is cached from now on."""

    def pause(self, sequence: Sequence) -> None:
        """Take the slot of a running sequence, which will begin again. What it has computed is kept where that can be.

        Args:
            sequence: Which. Its `n_computed` says what its slot holds; its `slot_id` is the caller's to clear.

        Raises:
            DriverError: The device is lost.
        """

    def end(self, sequences: SequenceOf[Sequence], *, is_sound: bool = True) -> None:
        """Take the slots of sequences that ended, and forget what is kept of them for their return.

        Args:
            sequences: Which, with a slot or without. Their `n_computed` says what their slots hold; their `slot_id` is
                the caller's to clear.
            is_sound: Whether others may use what they computed.

        Raises:
            DriverError: The device is lost.
        """

    def keep(self, sequence: Sequence) -> None:
        """As `end` for one sound sequence, but its slot stays active, and the caller's."""

    def go_on(self, sequence: Sequence, slot_id: SlotId, n_tokens: int) -> None:
        """Let a sequence begin in a slot that the caller has: a kept one, or a new one that he filled.

        Args:
            sequence: Which one.
            slot_id: An active slot.
            n_tokens: The sequence's first tokens, all that the slot holds now.
        """

    def let_go(self, slot_id: SlotId) -> None:
        """Forget a kept slot, which the caller retires, or has retired just now."""

    def give_back(self, slot_id: SlotId) -> None:
        """Take a kept slot, as `end` would have.

        Raises:
            DriverError: The device is lost.
        """

    def n_found_tokens(self, sequence: Sequence) -> int:
        """How many of a waiting sequence's tokens `begin` would find."""

    def is_coming(self, sequence: Sequence) -> bool:
        """Whether a running sequence, of earlier rank, computes now what this one could then begin with."""

    def n_live_pages(self, sequence: Sequence, expected_tokens: int) -> int:
        """Pages that a waiting sequence would begin with and that running ones have anyway, or that wait for it.

        Less those that it would begin with and not need soon, which it would keep from others.
        """

    def n_available_pages(self) -> int:
        """Pages that growth could have now, or when what leaves has passed, with what is only cached and kept."""

    def make_room(self, n_pages: int) -> bool:
        """Let so many pages be available to growth, and give up for it what is only cached.

        Kept slots count as available; whoever keeps them gives them up. So do pages that come free when something has
        passed (`Moves`): `SlotMemory.n_available_pages` says how many are there already.

        Returns:
            False: they are in use, even if nothing were cached. Nothing changed.
        """

    def give_way(self, n_pages: int) -> bool:
        """Give up what is only cached until so many pages come free; return whether anything was given up."""

    def cached_slots(self) -> frozenset[SlotId]:
        """Slots of nobody who runs, kept for what they hold. May be called from any thread."""

    def stats(self) -> PrefixStats | None:
        """What was cached and found, as of the last `settle` or `end`; None without a cache. From any thread."""

    def tiers(self) -> TierFigures | None:
        """What is in host memory, on disk and kept by name; None where nothing is. From any thread."""

    def check(self) -> None:
        """Hold the books against each other and against the cache.

        Raises:
            InvariantError: They disagree.
        """

    def close(self) -> None:
        """Give back what is held beside slots. No sequence has a slot any more. Idempotent.

        Raises:
            DriverError: The device is lost. All of it was done all the same.
        """


class FreshSlots(SlotSource):
    """Every sequence computes all of its tokens."""

    def __init__(self, memory: SlotMemory) -> None:
        self._memory = memory
        self._kept = CachedPages(memory.cache)
        self._shown = frozenset[SlotId]()

    def begin(self, sequence: Sequence, expected_tokens: int) -> Start:
        return Start(self._memory.acquire(sequence.max_length, sequence.request.domain), 0)

    def settle(self) -> None:
        """Nothing is cached."""

    def pause(self, sequence: Sequence) -> None:
        self.end([sequence])

    def end(self, sequences: SequenceOf[Sequence], *, is_sound: bool = True) -> None:
        slot_ids = [s.slot_id for s in sequences if s.slot_id is not None]
        if slot_ids:
            self._memory.retire(slot_ids)

    def keep(self, sequence: Sequence) -> None:
        assert sequence.slot_id is not None
        self._kept.slot_ids.add(sequence.slot_id)
        self._show()

    def go_on(self, sequence: Sequence, slot_id: SlotId, n_tokens: int) -> None:
        self.let_go(slot_id)

    def let_go(self, slot_id: SlotId) -> None:
        self._kept.slot_ids.discard(slot_id)
        self._show()

    def give_back(self, slot_id: SlotId) -> None:
        self.let_go(slot_id)
        self._memory.retire([slot_id])

    def n_found_tokens(self, sequence: Sequence) -> int:
        return 0

    def is_coming(self, sequence: Sequence) -> bool:
        return False

    def n_live_pages(self, sequence: Sequence, expected_tokens: int) -> int:
        return 0

    def n_available_pages(self) -> int:
        return self._memory.n_available_pages() + self._kept.held()

    def make_room(self, n_pages: int) -> bool:
        return n_pages <= self.n_available_pages()

    def give_way(self, n_pages: int) -> bool:
        return False

    def cached_slots(self) -> frozenset[SlotId]:
        return self._shown

    def stats(self) -> None:
        return None

    def tiers(self) -> None:
        return None

    def check(self) -> None:
        stray = self._kept.slot_ids.difference(self._memory.cache.active_slots())
        if stray:
            raise InvariantError(f"slots {sorted(stray)} are kept, and belong to nobody")

    def close(self) -> None:
        """Nothing is held."""

    def _show(self) -> None:
        """Set out what other threads may read."""
        self._shown = frozenset(self._kept.slot_ids)
