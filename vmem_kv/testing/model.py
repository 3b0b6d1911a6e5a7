"""A reference model of one cache: what must be mapped, said as simply as possible.

The model is told every call with its outcome and keeps plain dictionaries; it shares no code with the allocator and
knows a layout only as rows of so many bytes. `compare` holds a cache's statistics and the driver's own table of
mapped addresses against it.

    page table    {(slot, plane, page index): page}   found by walking over the bytes of every token, not by dividing
                  a shared page stands in it more than once: how often is its reference count
    slots         cold | active | retired | warm | broken, with lengths, windows and domains
    the pool      owned, quarantined and free pages, and the budget

Rules that it predicts exactly, as long as no fault is injected: which pages a growth maps, which slot best fit
chooses, whose pages are reclaimed and in which order, and when `OutOfPages` and `OutOfSlots` are right. After a call
that broke off by an injected fault it accepts what the contract allows, no more: sequences are as they were, and
every slot without an owner has all of its pages or none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from vmem_kv.stats import CacheStats

_STATES = ("active", "retired", "warm", "cold", "broken")

Page = tuple[int, int, int]
"""(slot, plane, page index inside the slot's share of the plane)."""


class ModelMismatch(AssertionError):
    """The cache is not what the calls made so far should have made of it."""


@lru_cache(maxsize=64)  # many models of one layout are made
def _fronts(row_bytes: tuple[int, ...], page_bytes: int, max_tokens: int) -> tuple[frozenset[tuple[int, int]], ...]:
    """For every number of tokens, the (plane, page index) that hold any byte of so many tokens of a slot."""
    found: set[tuple[int, int]] = set()
    fronts = [frozenset(found)]
    for token in range(max_tokens):
        for plane, row in enumerate(row_bytes):
            first_byte, last_byte = token * row, token * row + row - 1
            pages = range(first_byte // page_bytes, last_byte // page_bytes + 1)
            found.update((plane, index) for index in pages)
        fronts.append(frozenset(found))
    return tuple(fronts)


@dataclass(slots=True)
class ModelSlot:
    """One slot, as its owner sees it."""

    state: str = "cold"
    n_tokens: int = 0
    first_token: int = 0
    ends: list[int] = field(default_factory=list)  # per plane, the page behind the last one that was mapped
    domain: str = ""
    retired_at: int = 0
    is_broken: bool = False  # an unmap failed under it: it ends with its sequence
    is_damaged: bool = False  # it lost pages of its sequence, which cannot grow any more


@dataclass(slots=True)
class ReferenceModel:
    """See this file's first lines.

    Args:
        row_bytes: Bytes of one token in each plane.
        page_bytes: The size of a page.
        n_slots: How many slots there are.
        max_tokens: Tokens that a slot has room for.
        max_pages: The budget.
        keep_freed: Whether the pool keeps pages that come back.
    """

    row_bytes: Sequence[int]
    page_bytes: int
    n_slots: int
    max_tokens: int
    max_pages: int
    keep_freed: bool = False
    slots: list[ModelSlot] = field(default_factory=list)
    pages: dict[Page, int] = field(default_factory=dict)
    """Which page of physical memory lies where, by a number of our own."""
    n_free: int = 0
    n_quarantined: int = 0
    clock: int = 0
    doomed: set[int] = field(default_factory=set)
    _n_frames: int = 0
    _fronts: Sequence[frozenset[tuple[int, int]]] = ()
    _capacities: dict[int, int] = field(default_factory=dict)
    _capacities_of_ends: dict[tuple[int, ...], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots = [ModelSlot(ends=[0] * len(self.row_bytes)) for _ in range(self.n_slots)]
        self._fronts = _fronts(tuple(self.row_bytes), self.page_bytes, self.max_tokens)

    # What should happen

    def front(self, n_tokens: int) -> frozenset[tuple[int, int]]:
        """The (plane, page index) that hold any byte of the first `n_tokens` tokens of a slot."""
        return self._fronts[n_tokens]

    def capacity(self, slot: int) -> int:
        """Tokens from the slot's front (mapped or given up) that end inside of its mapped pages."""
        ends = self.slots[slot].ends
        known = self._capacities_of_ends.get(tuple(ends))
        if known is None:
            fitting = (n for n in range(self.max_tokens + 1) if all(i < ends[plane] for plane, i in self.front(n)))
            known = self._capacities_of_ends[tuple(ends)] = max(fitting)
        return known

    def capacity_of(self, n_tokens: int) -> int:
        """The most tokens for which the pages of the first `n_tokens` are enough."""
        if n_tokens not in self._capacities:
            front = self.front(n_tokens)
            longer = range(n_tokens, self.max_tokens + 1)
            self._capacities[n_tokens] = max(n for n in longer if self.front(n) == front)
        return self._capacities[n_tokens]

    def before_window(self, slot: int, first_token: int) -> set[Page]:
        """The mapped pages wholly before a window; without any, sliding does nothing that a fence must guard."""
        return {
            (owner, plane, index)
            for (owner, plane, index) in self.pages
            if owner == slot and (index + 1) * self.page_bytes <= first_token * self.row_bytes[plane]
        }

    def missing(self, lengths: dict[int, int]) -> set[Page]:
        """The pages that a growth to `lengths` maps."""
        return {
            (slot, plane, index)
            for slot, n_tokens in lengths.items()
            for plane, index in self.front(n_tokens)
            if index >= self.slots[slot].ends[plane]
        }

    def n_shared_tokens(self, slot: int) -> int:
        """Tokens of which any byte lies in a page that another slot has too."""
        shared = self._shared(slot)
        rows = range(self.max_tokens)
        touching = (
            token + 1
            for _, plane, index in shared
            for token in rows
            if token * self.row_bytes[plane] < (index + 1) * self.page_bytes
        )
        return max(touching, default=0)

    def reclaim_order(self) -> list[int]:
        """Warm slots, longest retired first."""
        warm = [slot for slot, state in enumerate(self.slots) if state.state == "warm"]
        return sorted(warm, key=lambda slot: self.slots[slot].retired_at)

    def best_slots(self, n_slots: int, expected_tokens: int) -> list[int]:
        """The neighbours that best fit must choose: least off what is wanted, then most of it there, then the first.

        Off and there are added up over the neighbours. None where no `n_slots` of them are nobody's.

        Wanted is the capacity that a fresh slot would have at the expected length. What is cold has none; a warm slot
        without its front must be unmapped first: the last resort.
        """
        wanted = self.capacity_of(expected_tokens)
        scores: dict[int, tuple[int, int]] = {}
        for slot, state in enumerate(self.slots):
            if state.state == "warm" and not self.has_front(slot):
                scores[slot] = (1 << 62, 0)
            elif state.state in ("cold", "warm"):
                capacity = self.capacity(slot) if state.state == "warm" else 0
                scores[slot] = (abs(capacity - wanted), -min(capacity, wanted))
        runs = []
        for first in range(self.n_slots - n_slots + 1):
            run = range(first, first + n_slots)
            if all(slot in scores for slot in run):
                runs.append((sum(scores[s][0] for s in run), sum(scores[s][1] for s in run), first))
        return list(range(min(runs)[2], min(runs)[2] + n_slots)) if runs else []

    def has_front(self, slot: int) -> bool:
        """Whether every page that was ever mapped under the slot's sequence is mapped still."""
        return self._n_pages(slot) == sum(self.slots[slot].ends)

    @property
    def n_owned(self) -> int:
        """Pages that the pool must own."""
        return self.n_mapped + self.n_free + self.n_quarantined

    @property
    def n_mapped(self) -> int:
        """Pages of physical memory that lie anywhere."""
        return len(set(self.pages.values()))

    @property
    def n_available(self) -> int:
        """Pages that can be had without reclaiming."""
        return self.max_pages - self.n_mapped - self.n_quarantined

    def n_givable(self, slot: int) -> int:
        """Pages that come back when a slot's are unmapped."""
        pages = {frame for page, frame in self.pages.items() if page[0] == slot} - self.doomed
        return len(pages - {frame for page, frame in self.pages.items() if page[0] != slot})

    def plan_ensure(self, lengths: dict[int, int]) -> tuple[bool, list[int]]:
        """Whether a growth must succeed, and which warm slots it must reclaim on the way (also if it fails)."""
        return self._plan_pages(len(self.missing(lengths)), [])

    def plan_resize(self, max_pages: int) -> tuple[bool, list[int]]:
        """Whether a new budget must be accepted, and which warm slots are reclaimed for it."""
        n_excess = self.n_owned - max_pages - self.n_free
        left = self.reclaim_order()
        victims: list[int] = []
        if n_excess > sum(self.n_givable(slot) for slot in left):
            return False, []
        while n_excess > 0:
            victims.append(left.pop(0))
            n_excess -= self.n_givable(victims[-1])
        return True, victims

    # What did happen

    def acquired(self, slot: int, domain: str) -> None:
        """A sequence owns `slot` now."""
        state = self.slots[slot]
        if state.state not in ("cold", "warm"):
            raise ModelMismatch(f"slot {slot} was handed out while it is {state.state}")
        if not self.has_front(slot):
            self._free(slot)
        state.state, state.n_tokens, state.domain, state.first_token = "active", 0, domain, 0

    def ensured(self, lengths: dict[int, int]) -> None:
        """Sequences have these lengths now, and the pages for them."""
        self.premapped(lengths)
        for slot, n_tokens in lengths.items():
            self.slots[slot].n_tokens = n_tokens

    def premapped(self, lengths: dict[int, int]) -> None:
        """Sequences have the pages for these lengths now."""
        self._map_new(self.missing(lengths))

    def reclaimed(self, slots: Iterable[int]) -> None:
        """Warm slots were unmapped."""
        for slot in slots:
            self._free(slot)
            self.slots[slot].state = "cold"

    def plan_fork(self, source: int, n_tokens: int) -> tuple[int | None, bool, list[int]]:
        """Which slot a fork must take, whether it must succeed, and which warm slots it reclaims on the way."""
        target = next(iter(self.best_slots(1, 0)), None)
        if target is None:
            return None, False, []
        n_freed = self.n_givable(target)
        fits, victims = self._plan_pages(len(self._copied(source, n_tokens)) - n_freed, [target])
        return target, fits, victims

    def forked(self, source: int, target: int, n_tokens: int) -> set[Page]:
        """A sequence has the first tokens of another one; return its new pages."""
        self._free(target)
        copied = self._copied(source, n_tokens)
        new = {(target, plane, index) for plane, index in copied}
        state, origin = self.slots[target], self.slots[source]
        state.state, state.n_tokens, state.domain, state.first_token = (
            "active",
            n_tokens,
            origin.domain,
            origin.first_token,
        )
        state.ends = [
            max([0, *(i + 1 for p, i in self.front(n_tokens) if p == plane)]) for plane in range(len(self.row_bytes))
        ]
        for plane, index in self.front(n_tokens) - copied:
            if (source, plane, index) in self.pages:
                self.pages[target, plane, index] = self.pages[source, plane, index]
        self._map_new(new)
        return new

    def plan_truncate(self, slot: int, n_tokens: int) -> tuple[bool, list[int]]:
        """Whether a truncation must succeed, and which warm slots it reclaims."""
        return self._plan_pages(len(self._replaced(slot, n_tokens)[1]), [])

    def truncated(self, slot: int, n_tokens: int) -> None:
        """A sequence is shorter, and has no shared page behind its end."""
        gone, new = self._replaced(slot, n_tokens)
        n_free = self.n_free
        self._drop(gone)
        for _, plane, index in gone:
            self.slots[slot].ends[plane] = min(self.slots[slot].ends[plane], index)
        n_freed, self.n_free = self.n_free - n_free, n_free  # new pages are taken before the old ones come free
        self._map_new(new)
        self.n_free += n_freed
        self.slots[slot].n_tokens = n_tokens

    def shared(self, target: int, source: int) -> None:
        """A sequence has the full pages of another one instead of its own."""
        n_tokens = self.slots[target].n_tokens
        full = self.front(n_tokens) - self._copied(target, n_tokens)
        both = [(p, i) for p, i in full if (target, p, i) in self.pages and (source, p, i) in self.pages]
        for plane in range(len(self.row_bytes)):
            # From the first one on that differs, as far as both of them have pages.
            for index in sorted(i for p, i in both if p == plane):
                if self.pages[target, plane, index] != self.pages[source, plane, index]:
                    frame = self.pages[source, plane, index]
                    self._drop({(target, plane, index)})
                    self.pages[target, plane, index] = frame

    def vacated(self, slot: int) -> None:
        """A sequence has no tokens and no pages any more, and its slot still."""
        self._free(slot)
        self.slots[slot].n_tokens = 0

    def trimmed(self, n_pages: int) -> None:
        """Free pages were released."""
        self.n_free -= min(n_pages, self.n_free)

    def resized(self, max_pages: int) -> None:
        """The budget changed, and free pages beyond it were released."""
        self.trimmed(max(0, self.n_owned - max_pages))
        self.max_pages = max_pages

    def slid(self, slot: int, first_token: int) -> None:
        """A window moved; the tokens before it are nobody's any more."""
        self.slots[slot].first_token = max(self.slots[slot].first_token, first_token)

    def slide_fence_passed(self, slot: int, first_token: int) -> None:
        """The pages wholly before the window were unmapped."""
        self._drop(self.before_window(slot, first_token))

    def retired(self, slot: int) -> None:
        """A sequence ended; its fences have not passed yet."""
        self.slots[slot].state = "retired"

    def fence_passed(self, slot: int) -> None:
        """Nothing can touch a retired slot any more."""
        self.clock += 1
        state = self.slots[slot]
        state.retired_at = self.clock
        state.state = "warm" if self._n_pages(slot) else "cold"
        if state.state == "cold" or state.is_broken or state.is_damaged or self._shared(slot):
            self._free(slot)
            state.state = "broken" if state.is_broken else "cold"

    def broke_off(
        self,
        mapped: Collection[Page],
        stuck: Iterable[int],
        n_free: int,
        n_quarantined: int,
        damaged: Collection[int] = (),
        doomed: Collection[Page] = (),
    ) -> None:
        """A call failed by an injected fault: take over what the contract leaves open, after checking it.

        Args:
            mapped: The pages that the driver has mapped and that are not stuck in quarantine.
            stuck: Slots under which an unmap failed.
            n_free: Free pages in the pool.
            n_quarantined: Pages in quarantine.
            doomed: Pages that also lie in a place where an unmap failed: with their last other place they are lost.
            damaged: Slots that may lack pages at their end: those were being exchanged, and undoing it failed too.

        Raises:
            ModelMismatch: A sequence lost or gained a page, or a slot without an owner kept some of its pages only.
        """
        if n_quarantined < self.n_quarantined:
            raise ModelMismatch(f"quarantine shrank from {self.n_quarantined} to {n_quarantined} pages")
        for slot, state in enumerate(self.slots):
            before = {page for page in self.pages if page[0] == slot}
            after = {page for page in mapped if page[0] == slot}
            if after == before:
                pass
            elif slot in damaged and after < before:
                state.is_damaged = True
                for page in before - after:
                    del self.pages[page]
                    state.ends[page[1]] = min(state.ends[page[1]], page[2])
                state.n_tokens = min(state.n_tokens, self.capacity(slot))
            elif state.state in ("active", "retired"):
                raise ModelMismatch(f"slot {slot} is {state.state}, had pages {sorted(before)}, has {sorted(after)}")
            elif after:
                raise ModelMismatch(f"slot {slot} is {state.state} and kept {sorted(after)} of {sorted(before)}")
            else:
                self._unmap(slot)
                state.state = "cold"
        self.n_free, self.n_quarantined = n_free, n_quarantined
        self.doomed = {self.pages[page] for page in doomed}
        for slot in stuck:
            self.slots[slot].is_broken = True
            if self.slots[slot].state == "cold":
                self.slots[slot].state = "broken"

    def compare(self, stats: CacheStats, mapped: Mapping[Page, int]) -> None:
        """Hold a cache against the model.

        Args:
            stats: The cache's snapshot; its cache is the only one on its pool.
            mapped: The handle of every page that the driver has mapped and that is not stuck in quarantine.

        Raises:
            ModelMismatch: They differ.
        """
        if mapped.keys() != self.pages.keys():
            raise ModelMismatch(
                f"mapped but should not be: {sorted(mapped.keys() - self.pages.keys())}; "
                f"should be mapped: {sorted(self.pages.keys() - mapped.keys())}"
            )
        pairs = {(frame, mapped[page]) for page, frame in self.pages.items()}
        if not len(pairs) == len({frame for frame, _ in pairs}) == len({handle for _, handle in pairs}):
            raise ModelMismatch(f"what is shared differs: (page of the model, handle) {sorted(pairs)}")
        by_state = dict.fromkeys(_STATES, 0)
        ranks = [_STATES.index(slot.state) for slot in self.slots]
        best: dict[int, int] = {}  # what lies in several places counts where it is needed most
        for (slot, _, _), frame in self.pages.items():
            best[frame] = min(best.get(frame, len(_STATES)), ranks[slot])
        for rank in best.values():
            by_state[_STATES[rank]] += 1
        expected = {
            "n_live_pages": by_state["active"],
            "n_warm_pages": by_state["warm"],
            "n_pending_pages": by_state["retired"],
            "n_free_pages": self.n_free,
            "n_quarantined_pages": self.n_quarantined,
            "n_owned_pages": self.n_owned,
            "n_in_flight_pages": 0,
            "n_elsewhere_pages": 0,
            "n_saved_pages": len(self.pages) - self.n_mapped,
            "max_pages": self.max_pages,
            "live_bytes": sum(self.row_bytes)
            * sum(state.n_tokens - state.first_token for state in self.slots if state.state == "active"),
        }
        actual = {name: getattr(stats, name) for name in expected}
        if actual != expected or by_state["cold"] or by_state["broken"]:
            wrong = {name: (actual[name], expected[name]) for name in expected if actual[name] != expected[name]}
            raise ModelMismatch(f"(actual, expected) differ: {wrong}; pages by state: {by_state}")

    def _n_pages(self, slot: int) -> int:
        return sum(page[0] == slot for page in self.pages)

    def _own(self, slot: int) -> list[tuple[int, int]]:
        return [(plane, index) for owner, plane, index in self.pages if owner == slot]

    def _shared(self, slot: int) -> set[Page]:
        """The pages of a slot that another has too."""
        n_homes = Counter(self.pages.values())
        return {page for page, frame in self.pages.items() if page[0] == slot and n_homes[frame] > 1}

    def _copied(self, source: int, n_tokens: int) -> set[tuple[int, int]]:
        """The pages that the first tokens fill in part: a fork has its own there."""
        return {
            (plane, index)
            for plane, index in self.front(n_tokens)
            if (index + 1) * self.page_bytes > n_tokens * self.row_bytes[plane]
        }

    def _replaced(self, slot: int, n_tokens: int) -> tuple[set[Page], set[Page]]:
        """What goes and what is new where shared pages lie behind a new end."""
        gone: set[Page] = set()
        shared, kept, partial = self._shared(slot), self.front(n_tokens), self._copied(slot, n_tokens)
        for plane in range(len(self.row_bytes)):
            own = {(slot, p, i) for p, i in self._own(slot) if p == plane}
            behind = {page for page in own if page[1:] not in kept or page[1:] in partial}
            if behind & shared:
                gone |= behind
        return gone, {(slot, p, i) for p, i in partial if (slot, p, i) in gone}

    def _plan_pages(self, need: int, taken: list[int]) -> tuple[bool, list[int]]:
        """Whether so many pages can be had, and which warm slots are reclaimed for it; `taken` ones are no more."""
        available = self.n_available
        left = [slot for slot in self.reclaim_order() if slot not in taken]
        victims: list[int] = []
        while need > available:
            if not left:
                return False, victims
            n_freed, n_short = 0, need - available
            while left and n_freed < n_short:
                victims.append(left.pop(0))
                n_freed += self.n_givable(victims[-1])
            available += n_freed
        return True, victims

    def _map_new(self, pages: Iterable[Page]) -> None:
        for slot, plane, index in pages:
            self._n_frames += 1
            self.pages[slot, plane, index] = self._n_frames
            self.slots[slot].ends[plane] = max(self.slots[slot].ends[plane], index + 1)
            self.n_free = max(0, self.n_free - 1)

    def _drop(self, pages: Iterable[Page]) -> None:
        """Take pages from under slots; what lies nowhere any more is free."""
        gone = {self.pages.pop(page) for page in list(pages)} - set(self.pages.values())
        self.n_quarantined += len(gone & self.doomed)
        self.n_free += len(gone - self.doomed) if self.keep_freed else 0

    def _free(self, slot: int) -> None:
        self._drop([page for page in self.pages if page[0] == slot])
        self._unmap(slot)

    def _unmap(self, slot: int) -> None:
        self.pages = {page: frame for page, frame in self.pages.items() if page[0] != slot}
        state = self.slots[slot]
        state.first_token, state.ends, state.is_damaged = 0, [0] * len(self.row_bytes), False
