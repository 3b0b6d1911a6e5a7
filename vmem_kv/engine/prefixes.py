"""Automatic prefix caching: a sequence begins with whatever others of its domain have computed of its tokens.

    begin    the longest cached prefix is found, exact to the token.
               adopt   an unused entry that the tokens extend: its slot is taken over whole; nothing is mapped or copied
               fork    any other: full pages lie under both slots from now on, less than a page in each plane is copied
               fresh   too little is cached
    settle   once its tokens are computed, a running sequence can be forked
    end      the slot stays as it is, cached, until somebody goes on in it or its pages or its slot are needed
    keep     likewise, but somebody has it by name: it can be forked, and is neither adopted nor given up

A running sequence's entry is pinned: it can be forked, and neither adopted nor given up. What is only cached is given
up for any live request: for its pages, for its slot, for mappings.

Guarantees: the last token is always left to be computed, since its logits are needed. Nothing is shared across domains.
Whoever begins by adoption or fork next writes behind all pages that others have (`KVCache`).
Assumptions: one thread, but for `cached_slots` and `stats`. All that a sequence keeps is in its slot, from its first
token on: no recurrent state beside it, no window that slid.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.prefix_pages import CachedPages
from vmem_kv.engine.request import Sequence
from vmem_kv.engine.slot_source import SlotSource, Start
from vmem_kv.errors import CapacityError, DriverError, InvariantError, OutOfSlots
from vmem_kv.growth import SlotId
from vmem_kv.prefix import Entry, EvictionPolicy, Match, PrefixIndex, PrefixStats, Use, cost_aware, lru

POLICIES: Mapping[str, Callable[[], EvictionPolicy[SlotId]]] = {"lru": lru, "cost": cost_aware}
"""Which cached prefix goes first, by name."""

_N_ANSWERS = 8
"""So many answers are remembered, more or less: the next ones are taken to be as long."""

_LOG = logging.getLogger("vmem_kv")


class _User(NamedTuple):
    """A running sequence."""

    sequence: Sequence
    use: Use  # what it was built on
    n_tokens: int  # that it had when it began: computed up to there, it can be forked


class _Found(NamedTuple):
    """What is cached of a sequence's tokens."""

    match: Match[SlotId]
    entry: Entry[SlotId] | None  # to begin with; None for too little
    is_whole: bool  # whether its slot is taken over


class PrefixSlots(SlotSource):
    """Slots that begin with cached prefixes.

    Args:
        memory: Where the slots are.
        policy: Which unused prefix is given up first.
        max_pages: The most pages that unused prefixes may hold.
        min_tokens: Shorter prefixes are neither kept nor looked for: computing them costs less than their slot.
    """

    def __init__(self, memory: SlotMemory, policy: EvictionPolicy[SlotId], *, max_pages: int, min_tokens: int) -> None:
        self._memory = memory
        self._min_tokens = min_tokens
        self._pages = CachedPages(memory.cache)
        self._n_begun = 0
        self._index = PrefixIndex[SlotId](max_pages, self._now, policy, self._pages)
        self._coming = PrefixIndex[SlotId](0, self._now)
        """Tokens that running sequences compute just now: all of its entries are pinned."""
        self._users: dict[SlotId, _User] = {}
        self._unsettled: set[SlotId] = set()
        self._answer_tokens = 0.0  # of the last answers, on average
        self._cached = frozenset[SlotId]()
        self._stats = self._index.stats()

    # Beginning

    def begin(self, sequence: Sequence, expected_tokens: int) -> Start:
        self._n_begun += 1
        found = self._find(sequence, expected_tokens)
        slot_id = self._share(found)
        used = None if slot_id is None else found.entry
        if slot_id is None:
            slot_id = self._acquire(self._wanted_tokens(sequence, expected_tokens), sequence.request.domain)
        use = self._index.record(found.match, used)
        if slot_id in self._index:
            self._index.pin(slot_id)
        self._enter(sequence, slot_id, use)
        return Start(slot_id, use.n_tokens)

    def go_on(self, sequence: Sequence, slot_id: SlotId, n_tokens: int) -> None:
        self._n_begun += 1
        n_pages = self._memory.n_mapped_pages(slot_id)
        if slot_id not in self._index and n_tokens >= self._min_tokens:  # which others can begin with at once
            known = sequence.token_ids[:n_tokens]
            self._index.insert(sequence.request.domain, known, slot_id, n_pages, is_pinned=True)
        elif slot_id in self._index and n_tokens < self._index[slot_id].n_tokens:
            self._index.truncate(slot_id, n_tokens, n_pages)
        self._enter(sequence, slot_id, Use(n_tokens, 0))

    def n_found_tokens(self, sequence: Sequence) -> int:
        match = self._index.match(sequence.request.domain, sequence.token_ids[:-1])
        return match.n_tokens if match.n_tokens >= self._min_tokens else 0

    def is_coming(self, sequence: Sequence) -> bool:
        if not len(self._coming):
            return False
        domain, wanted = sequence.request.domain, sequence.token_ids[:-1]
        coming = self._coming.match(domain, wanted)
        if coming.entry is None or self._users[coming.entry.key].sequence.rank > sequence.rank:
            return False
        return coming.n_tokens - self._index.match(domain, wanted).n_tokens >= self._min_tokens

    def n_live_pages(self, sequence: Sequence, expected_tokens: int) -> int:
        found = self._find(sequence, expected_tokens)
        if found.entry is None:
            return 0
        n_live = self._pages.n_live(found.entry.key, found.match.n_tokens)
        if not found.is_whole:
            return n_live
        n_mapped = self._memory.n_mapped_pages(found.entry.key)
        return n_live - max(0, n_mapped - self._memory.n_pages(expected_tokens))

    # Running and ending

    def settle(self) -> None:
        if not self._unsettled:
            return
        for slot_id in list(self._unsettled):
            if self._users[slot_id].sequence.n_computed >= self._users[slot_id].n_tokens:
                self._publish(slot_id)
                self._unsettled.remove(slot_id)
        self._show()

    def pause(self, sequence: Sequence) -> None:
        self.end([sequence])

    def end(self, sequences: SequenceOf[Sequence], *, is_sound: bool = True) -> None:
        retiring: list[SlotId] = []
        for slot_id in [s.slot_id for s in sequences if s.slot_id is not None]:
            self._leave(slot_id, is_sound=is_sound)
            if is_sound and self._leave_cached(slot_id):
                continue
            self._forget(slot_id)
            retiring.append(slot_id)
        if retiring:
            self._memory.retire(retiring)
        self._index.fit(self._give_up)
        self._show()

    def keep(self, sequence: Sequence) -> None:
        assert sequence.slot_id is not None
        self._leave(sequence.slot_id, is_sound=True)
        self._pages.slot_ids.add(sequence.slot_id)  # its entry, if it has one, stays pinned
        self._show()

    def let_go(self, slot_id: SlotId) -> None:
        self._forget(slot_id)
        self._show()

    def give_back(self, slot_id: SlotId) -> None:
        if not self._leave_cached(slot_id):
            self._forget(slot_id)
            self._memory.retire([slot_id])
        self._index.fit(self._give_up)
        self._show()

    # Room

    def n_available_pages(self) -> int:
        return self._memory.n_available_pages() + self._pages.held()

    def make_room(self, n_pages: int) -> bool:
        n_short = n_pages - self._memory.n_available_pages()
        if n_short > 0:
            if n_short > self._pages.held():
                return False
            self._index.evict(n_short, self._give_up)
        return True

    def give_way(self, n_pages: int) -> bool:
        n_before = len(self._index)
        self._index.evict(n_pages, self._give_up)
        return len(self._index) < n_before

    def cached_slots(self) -> frozenset[SlotId]:
        return self._cached

    def stats(self) -> PrefixStats:
        return self._stats

    def tiers(self) -> None:
        return None

    def check(self) -> None:
        self._index.check()
        self._coming.check()
        slots = {*self._users, *self._pages.slot_ids}
        active = set(self._memory.cache.active_slots())
        if not slots <= active:
            raise InvariantError(f"slots {sorted(slots - active)} are cached or used, and belong to nobody")
        if self._pages.slot_ids & self._users.keys() or len(self._coming) > len(self._unsettled):
            raise InvariantError(f"slots {sorted(self._pages.slot_ids & self._users.keys())} are cached and used")
        for slot_id in slots:
            n_cached = self._index[slot_id].n_tokens if slot_id in self._index else 0
            if n_cached > self._memory.cache.n_tokens(slot_id):
                raise InvariantError(f"slot {slot_id} is said to hold {n_cached} tokens, and does not")

    def close(self) -> None:
        """Nothing is held but slots."""

    # Below: how a sequence begins, and what is kept of it

    def _find(self, sequence: Sequence, expected_tokens: int) -> _Found:
        match = self._index.match(sequence.request.domain, sequence.token_ids[:-1])
        if match.n_tokens < self._min_tokens:
            return _Found(match, None, is_whole=False)
        whole = match.whole
        if (
            whole is not None
            and whole.n_tokens == match.n_tokens
            # A slot with more pages than the sequence will need would keep them from others: it is forked.
            and self._memory.n_mapped_pages(whole.key)
            <= self._memory.n_pages(self._wanted_tokens(sequence, expected_tokens))
        ):
            return _Found(match, whole, is_whole=True)
        return _Found(match, match.entry, is_whole=False)

    def _wanted_tokens(self, sequence: Sequence, expected_tokens: int) -> int:
        """The best guess at what a sequence will come to."""
        guess = len(sequence.token_ids) + round(self._answer_tokens)
        return min(sequence.max_length, max(expected_tokens, guess))

    def _share(self, found: _Found) -> SlotId | None:
        """Return a slot that holds the match, or None where nothing is found or no room is beside its source."""
        if found.entry is None:
            return None
        if found.is_whole:
            return found.entry.key
        source = found.entry.key
        self._index.pin(source)
        try:
            while True:
                try:
                    return self._memory.fork(source, found.match.n_tokens)
                except CapacityError:
                    if not self.give_way(1):
                        return None
                except DriverError as error:
                    if error.is_fatal:
                        raise
                    _LOG.warning("forking slot %d: %s", source, error)
                    return None
        finally:
            self._index.unpin(source, was_used=False)  # what is recorded next finds its age

    def _acquire(self, expected_tokens: int, domain: str) -> SlotId:
        while True:
            try:
                return self._memory.acquire(expected_tokens, domain)
            except OutOfSlots:
                if not self.give_way(1):
                    raise

    def _enter(self, sequence: Sequence, slot_id: SlotId, use: Use) -> None:
        """Note that a sequence runs in a slot from now on."""
        self._pages.slot_ids.discard(slot_id)
        tokens = sequence.token_ids
        self._users[slot_id] = _User(sequence, use, len(tokens))
        self._unsettled.add(slot_id)
        if len(tokens) - use.n_tokens >= self._min_tokens:
            self._coming.insert(sequence.request.domain, tokens, slot_id, 0, is_pinned=True)

    def _leave(self, slot_id: SlotId, *, is_sound: bool) -> None:
        """Note that nobody runs in a slot any more."""
        if is_sound:
            self._publish(slot_id)
        elif slot_id in self._coming:
            self._coming.remove(slot_id)
        self._unsettled.discard(slot_id)
        sequence = self._users.pop(slot_id).sequence
        self._answer_tokens += (sequence.n_generated - self._answer_tokens) / _N_ANSWERS

    def _publish(self, slot_id: SlotId) -> None:
        """Let a running sequence's computed tokens be found. Nobody else computes them for it any more."""
        if slot_id in self._coming:
            self._coming.remove(slot_id)
        sequence, use, _ = self._users[slot_id]
        n_pages = self._memory.n_mapped_pages(slot_id)
        computed = sequence.token_ids[: sequence.n_computed]
        if slot_id in self._index:
            self._index.extend(slot_id, computed[self._index[slot_id].n_tokens :], n_pages)
        elif len(computed) >= self._min_tokens:
            domain = sequence.request.domain
            self._index.insert(domain, computed, slot_id, n_pages, built_on=use, is_pinned=True)

    def _leave_cached(self, slot_id: SlotId) -> bool:
        """Leave a slot that nobody has any more to the cache, where it is worth it; return whether it was."""
        if slot_id not in self._index or self._is_redundant(slot_id):
            return False
        self._pages.slot_ids.add(slot_id)
        self._index.unpin(slot_id)
        return True

    def _forget(self, slot_id: SlotId) -> None:
        self._pages.slot_ids.discard(slot_id)
        if slot_id in self._index:
            self._index.remove(slot_id)

    def _is_redundant(self, slot_id: SlotId) -> bool:
        """Whether other entries have all of an entry's tokens."""
        entry = self._index[slot_id]
        return entry.n_covered_tokens == entry.n_tokens

    def _give_up(self, slot_id: SlotId) -> int:
        """Give back a cached slot that has left the index; return how many pages that frees."""
        n_freed = self._pages.freed_by(slot_id)
        self._pages.slot_ids.remove(slot_id)
        self._memory.retire([slot_id])
        return n_freed

    def _show(self) -> None:
        """Set out what other threads may read."""
        self._cached = frozenset(self._pages.slot_ids)
        self._stats = self._index.stats()

    def _now(self) -> float:
        """Time in sequences: the same at any load."""
        return float(self._n_begun)
