"""A memory in which sequences share prefixes: the index over token ids, and slots that alias each other's pages.

    begin   the longest prefix that is cached is found, exact to the token. A cached slot that the prompt extends is
            adopted whole: nothing is mapped or copied. Otherwise one is forked: the stripes that the prefix fills are
            aliased, and the rest of it is copied. What only the host has is copied back
    grow    new stripes; where there are none, the policy's victims are given up, and parked on the host if there is one
    end     the slot stays as it is, with its prompt in the index, until somebody needs its pages

A prompt can be found from the step behind the one that computes it. Outputs, and prompt tokens that no block of the
trace stands for, are not indexed, because nobody knows which tokens they were; they stay under their slot, as in an
engine.

The index and its policy are real. Slots are real or counted by rules (`sharing_slots.py`); which pages are shared is
known from books of stripes beside them, and `check` holds the two against each other. The host tier is in books only.

Guarantees: `grow` and `begin` either do all or raise a CapacityError and change no sequence.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vmem_kv.errors import (
    CapacityError,
    ConfigError,
    InvariantError,
    OutOfAddressSpace,
    OutOfMappings,
    OutOfPages,
    OutOfSlots,
)
from vmem_kv.layout import Layout
from vmem_kv.prefix import EvictionPolicy, PrefixIndex, RecomputeCost, Use, cost_aware, lru
from vmem_kv.replay.host_tier import HostTier
from vmem_kv.replay.memory import Key, Shortage
from vmem_kv.replay.sharing_slots import Slots
from vmem_kv.replay.stripes import StripeBooks
from vmem_kv.traces.formats import Request
from vmem_kv.traces.prefixes import known_tokens
from vmem_kv.units import ceil_div

MakePolicy = Callable[[], EvictionPolicy[int]]

PREFIX_POLICIES: Mapping[str, MakePolicy] = {"lru": lru, "cost": cost_aware}
"""Which cached prompt goes first, by name."""


@dataclass(slots=True)
class SharingCounts:
    """What sharing came to. Hits are counted when a request begins for the first time, not after a preemption."""

    n_prompt_tokens: int = 0  # of requests that began
    n_hit_tokens: int = 0  # of them, those that were cached, on the device or the host
    n_restored_tokens: int = 0  # of them, those that came back from the host
    prompt_work: float = 0.0  # of computing all prompts, in units of one token's work without attention
    spared_work: float = 0.0  # of it, that of the tokens that were cached
    n_adopted: int = 0  # sequences that went on in a cached slot
    n_forked: int = 0  # that began with another one's stripes
    n_fresh: int = 0  # that shared nothing
    n_evicted: int = 0  # cached prompts given up
    n_device_copies: int = 0
    device_copy_bytes: int = 0
    n_park_copies: int = 0
    park_bytes: int = 0
    n_restore_copies: int = 0
    restore_bytes: int = 0
    n_peak_pages: int = 0  # distinct ones, on the device
    n_peak_host_pages: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of prompt tokens that did not have to be computed."""
        return self.n_hit_tokens / self.n_prompt_tokens if self.n_prompt_tokens else None

    @property
    def spared_share(self) -> float | None:
        """Share of the prompts' work that was spared: late tokens cost more than early ones."""
        return self.spared_work / self.prompt_work if self.prompt_work else None

    @property
    def n_copies(self) -> int:
        """Copies of all kinds."""
        return self.n_device_copies + self.n_park_copies + self.n_restore_copies

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**asdict(self), "hit_rate": self.hit_rate, "spared_share": self.spared_share, "n_copies": self.n_copies}


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a sequence begins."""

    prompt: array[int]  # as far as it is known
    wanted: array[int]  # of it, what was looked up
    n_device_tokens: int  # found on the device
    n_host_tokens: int  # found on the host; 0 if that is no more
    source: int | None  # whose slot it begins with
    adopts: bool  # and goes on in


class SharingMemory:
    """Slots that share the stripes of their prefixes.

    Args:
        name: What tables call it.
        layout: The geometry; all planes have rows of the same size. Cached prompts have slots, too.
        slots: Who maps pages; closed with this object.
        budget_bytes: The most that may be owned.
        block_tokens: Tokens in a block of `Request.blocks`.
        make_policy: Makes the policy of each tier.
        host_bytes: Memory of the second tier; 0 for none.
        headroom: Share of the budget that admission leaves to the running sequences.
        max_mappings: The most mappings; each page of each slot is one. None for no limit.

    Raises:
        ConfigError: The planes differ.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        slots: Slots,
        budget_bytes: int,
        block_tokens: int,
        *,
        make_policy: MakePolicy = lru,
        host_bytes: int = 0,
        headroom: float = 0.01,
        max_mappings: int | None = None,
    ) -> None:
        rows = {plane.token_bytes for plane in layout.planes}
        if len(rows) != 1:
            raise ConfigError(
                f"{layout.kind} gives this model planes with rows of {sorted(rows)} bytes, and stripes are shared only "
                "where all have the same; use token_major"
            )
        (self._row_bytes,) = rows
        self.name = name
        self.layout = layout
        self.token_bytes = layout.token_bytes
        self.counts = SharingCounts()
        self.slots = slots
        self.n_cached_tokens = self.n_restored_tokens = 0
        self.n_peak_mappings = 0
        self.max_mappings = max_mappings
        self._planes = len(layout.planes)
        self._max_stripes = budget_bytes // layout.page_bytes // self._planes
        self._headroom_stripes = int(self._max_stripes * headroom)
        self._block_tokens = block_tokens
        self._work = RecomputeCost()
        self._n_begun = 0
        self.stripes = StripeBooks(self._planes)
        clock = lambda: float(self._n_begun)  # noqa: E731 - time in requests: the same at any load
        self.index: PrefixIndex[int] = PrefixIndex(self._max_stripes * self._planes, clock, make_policy(), self.stripes)
        self.host = (
            HostTier(
                host_bytes // layout.page_bytes,
                self._planes,
                n_stripes=self._n_stripes,
                n_full_stripes=self._n_full_stripes,
                clock=clock,
                policy=make_policy(),
            )
            if host_bytes
            else None
        )
        self._n_created_stripes = 0
        self._capacity: dict[int, int] = {}  # of running sequences, in tokens
        self._n_stripes_of: dict[int, int] = {}  # likewise, in stripes
        self._n_running_stripes = 0  # their sum
        self._request_of: dict[int, Request] = {}  # of all slots, the last one that ran there
        self._new: dict[int, array[int]] = {}  # prompts that this step computes: nobody finds them yet
        self._built_on: dict[int, Use] = {}  # what those of forks go on with
        self._looked_up: tuple[Request, array[int]] | None = None

    @property
    def active_bytes(self) -> int:
        """Distinct stripes under running sequences."""
        return self.stripes.n_live_stripes * self._planes * self.layout.page_bytes

    @property
    def mapped_bytes(self) -> int:
        """Distinct stripes under any slot."""
        return self.stripes.n_stripes * self._planes * self.layout.page_bytes

    @property
    def owned_bytes(self) -> int:
        """Pages that were ever created: the pool keeps them."""
        return self._n_created_stripes * self._planes * self.layout.page_bytes

    @property
    def n_batches(self) -> int:
        """Calls of our driver."""
        return self.slots.n_batches

    @property
    def n_driver_calls(self) -> int | None:
        """Calls of a device's driver, copies left out."""
        return self.slots.calls.total()

    @property
    def driver_calls(self) -> dict[str, int]:
        """The same by kind."""
        return dict(self.slots.calls)

    @property
    def batches(self) -> dict[str, int]:
        """Batches are not told apart here."""
        return {"all": self.n_batches}

    @property
    def allocator_ns(self) -> int | None:
        """Nanoseconds in the allocator and its driver; the index and its policy are not in it."""
        return self.slots.allocator_ns

    def obstacle(self, n_tokens: int) -> Shortage | None:
        if n_tokens > self.layout.max_tokens:
            return OutOfAddressSpace
        n_stripes = self._n_stripes(n_tokens)
        if n_stripes > self._max_stripes:
            return OutOfPages
        return OutOfMappings if self._passes_mappings(n_stripes) else None

    def lack(self, n_tokens: int, request: Request | None = None) -> Shortage | None:
        if len(self._capacity) >= self.layout.n_slots:
            return OutOfSlots
        n_stripes = self._n_stripes(n_tokens)
        if self._passes_mappings(self._n_running_stripes + n_stripes):
            return OutOfMappings
        headroom = self._headroom_stripes if self._capacity else 0
        n_free = self._max_stripes - self.stripes.n_live_stripes - headroom
        if n_stripes <= n_free or request is None:
            return None if n_stripes <= n_free else OutOfPages
        plan = self._plan(n_tokens, request)
        n_shared = self._n_full_stripes(plan.n_device_tokens)
        n_live = 0 if plan.source is None else self.stripes.n_live_of(plan.source, n_shared)
        return None if n_stripes - n_live <= n_free else OutOfPages

    def begin(self, n_tokens: int, expected_tokens: int, request: Request | None = None) -> Key:
        if request is None:
            raise ConfigError("a memory that shares prefixes needs each sequence's request")
        plan = self._plan(n_tokens, request)
        key, n_device = self._adopt(plan, n_tokens) if plan.adopts else self._fork(plan, n_tokens)
        n_cached = max(n_device, plan.n_host_tokens)
        self._n_begun += 1
        self.n_cached_tokens += n_cached
        if n_tokens == request.prompt_tokens:
            self.counts.n_prompt_tokens += n_tokens
            self.counts.n_hit_tokens += n_cached
            self.counts.prompt_work += self._work(0, n_tokens)
            self.counts.spared_work += self._work(0, n_cached)
        if plan.n_host_tokens:
            self._restore(plan, plan.n_host_tokens - n_device, is_first=n_tokens == request.prompt_tokens)
        self._request_of[key] = request
        self._new[key] = plan.prompt
        self._looked_up = None
        self._runs(key)
        return Key(key)

    def grow(self, lengths: Mapping[Key, int]) -> None:
        self._settle()
        capacity = self._capacity
        short = {key: n_tokens for key, n_tokens in lengths.items() if n_tokens > capacity[key]}
        if short:
            more = {key: self._n_stripes(n_tokens) - self.stripes.length(key) for key, n_tokens in short.items()}
            self._make_room(sum(more.values()))
            for key, n_stripes in more.items():
                self._grow_books(key, n_stripes)
                self._runs(key)
        self.slots.hold(lengths, short, self.n_pages)

    def end(self, keys: Sequence[Key]) -> None:
        self._settle()
        for key in keys:
            del self._capacity[key]
            n_stripes = self._n_stripes_of.pop(key)
            self._n_running_stripes -= n_stripes
            self.stripes.rest(key)
            if key in self.index:
                self.index.extend(key, array("I"), n_stripes * self._planes)
                self.index.unpin(key)
            else:
                self._unmap(key)

    def close(self) -> None:
        self.slots.close()

    def check(self) -> None:
        """Hold all books against each other.

        Raises:
            InvariantError: They disagree.
        """
        self.stripes.check()
        self.index.check()
        self.slots.check(self.n_pages)
        if self.host is not None:
            self.host.stripes.check()
            self.host.index.check()
        n_running = sum(self.stripes.length(key) for key in self._capacity)
        if (
            n_running != self._n_running_stripes
            or self.stripes.n_stripes > self._n_created_stripes <= self._max_stripes
        ):
            raise InvariantError(
                f"{n_running} stripes under running sequences, the books say {self._n_running_stripes}; "
                f"{self.stripes.n_stripes} of {self._n_created_stripes} in use"
            )

    # How many stripes and pages

    @property
    def n_pages(self) -> int:
        """Distinct pages that are mapped."""
        return self.stripes.n_stripes * self._planes

    def _n_stripes(self, n_tokens: int) -> int:
        return ceil_div(n_tokens * self._row_bytes, self.layout.page_bytes)

    def _n_full_stripes(self, n_tokens: int) -> int:
        return n_tokens * self._row_bytes // self.layout.page_bytes

    def _passes_mappings(self, n_stripes: int) -> bool:
        return self.max_mappings is not None and n_stripes * self._planes > self.max_mappings

    # How a sequence begins

    def _plan(self, n_tokens: int, request: Request) -> _Plan:
        """Look a prompt up. Its last token must be computed, unless more than the prompt is."""
        if self._looked_up is None or self._looked_up[0] is not request:
            self._looked_up = (request, known_tokens(request, self._block_tokens))
        prompt = self._looked_up[1]
        wanted = prompt[: n_tokens - 1]
        match = self.index.match("", wanted)
        n_host = self.host.find(wanted) if self.host is not None else 0
        adopts = match.whole is not None and match.whole.n_tokens == match.n_tokens
        source = match.whole if adopts else match.entry
        return _Plan(
            prompt,
            wanted,
            match.n_tokens,
            n_host if n_host > match.n_tokens else 0,
            None if source is None else source.key,
            adopts,
        )

    def _adopt(self, plan: _Plan, n_tokens: int) -> tuple[int, int]:
        """Go on in the source's slot; return it, and how many tokens it had."""
        key = plan.source
        if key is None:
            raise InvariantError("there is no slot to adopt")
        match = self.index.match("", plan.wanted)
        self.index.pin(key)
        self.stripes.wake(key)
        n_more = max(0, self._n_stripes(n_tokens) - self.stripes.length(key))
        try:
            self._make_room(n_more)
        except CapacityError:
            self.stripes.rest(key)
            self.index.unpin(key, was_used=False)
            raise
        self.index.record(match, self.index[key])
        self._grow_books(key, n_more)
        lengths = {Key(key): n_tokens}
        self.slots.hold(lengths, lengths if n_more else {}, self.n_pages)
        self.counts.n_adopted += 1
        return key, plan.n_device_tokens

    def _fork(self, plan: _Plan, n_tokens: int) -> tuple[int, int]:
        """Begin in a new slot, with what the source has of the prompt; return it, and how many tokens that are.

        Where there is no room beside the source, it is given up, and the sequence begins without it.
        """
        key, source = self._n_begun, plan.source
        n_shared = self._n_full_stripes(plan.n_device_tokens)
        match = self.index.match("", plan.wanted)
        if source is not None and self._has_room_beside(source, n_shared, self._n_stripes(n_tokens) - n_shared):
            self._built_on[key] = self.index.record(match, match.entry)
            self.stripes.begin(key)
            self.stripes.fork(source, key, n_shared)
            self.slots.fork(source, key, plan.n_device_tokens)
            n_copied_bytes = plan.n_device_tokens * self._row_bytes - n_shared * self.layout.page_bytes
            if n_copied_bytes:
                self.counts.n_device_copies += self._planes
                self.counts.device_copy_bytes += n_copied_bytes * self._planes
            self.counts.n_forked += 1
            n_device = plan.n_device_tokens
        else:
            self._make_room(self._n_stripes(n_tokens), n_slots=1)
            self.index.record(match, None)
            self.stripes.begin(key)
            self.slots.begin(key)
            self.counts.n_fresh += 1
            n_device = n_shared = 0
        self._grow_books(key, self._n_stripes(n_tokens) - n_shared)
        lengths = {Key(key): n_tokens}
        self.slots.hold(lengths, lengths, self.n_pages)
        return key, n_device

    def _has_room_beside(self, source: int, n_shared: int, n_stripes: int) -> bool:
        """Make room for a fork while its source stays; whether that went."""
        self.index.pin(source)
        try:
            self._make_room(n_stripes, n_aliased=n_shared, n_slots=1)
        except CapacityError:
            return False
        finally:
            self.index.unpin(source, was_used=False)
        return True

    def _restore(self, plan: _Plan, n_tokens: int, *, is_first: bool) -> None:
        """Count the copies that bring back what only the host has."""
        if self.host is not None:
            self.host.use(plan.wanted)
        self.n_restored_tokens += n_tokens
        self.counts.n_restored_tokens += n_tokens if is_first else 0
        self.counts.n_restore_copies += self._planes
        self.counts.restore_bytes += n_tokens * self.token_bytes

    def _settle(self) -> None:
        """Let the prompts be found that the step before has computed."""
        for key, prompt in self._new.items():
            n_pages = self.stripes.length(key) * self._planes
            if key in self.index:
                self.index.extend(key, prompt[self.index[key].n_tokens :], n_pages)
            elif prompt:
                use = self._built_on.get(key)
                self.index.insert("", prompt, key, n_pages, built_on=use, is_pinned=True)
        self._new.clear()
        self._built_on.clear()

    # Memory

    def _make_room(self, n_stripes: int, *, n_aliased: int = 0, n_slots: int = 0) -> None:
        """Give up cached prompts until there is room for so many more stripes, aliases of stripes, and slots.

        Raises:
            CapacityError: There is no room even without any that can go. They are gone.
        """
        stripes, n_more = self.stripes, n_stripes + n_aliased
        n_short = stripes.n_stripes + n_stripes - self._max_stripes
        if n_short > 0:
            self.index.evict(n_short * self._planes, self._give_up)
        while self._lacks_slots(n_slots) and self.index.victim() is not None:
            self.index.evict(1, self._give_up)
        while self._passes_mappings(stripes.n_mapped_stripes + n_more) and self.index.evict(1, self._give_up):
            pass
        if stripes.n_stripes + n_stripes > self._max_stripes:
            raise OutOfPages(
                f"{stripes.n_live_stripes} of {self._max_stripes} stripes are in use; {n_stripes} more are not free"
            )
        if self._lacks_slots(n_slots):
            raise OutOfSlots(f"all of {self.layout.n_slots} slots are in use")
        if self._passes_mappings(stripes.n_mapped_stripes + n_more):
            raise OutOfMappings(f"{n_more} more stripes would pass {self.max_mappings} mappings")

    def _lacks_slots(self, n_slots: int) -> bool:
        return len(self._request_of) + n_slots > self.layout.n_slots

    def _give_up(self, key: int) -> int:
        """Unmap a slot whose prompt has left the index, and park the prompt if there is a host tier."""
        if self.host is not None:
            n_copied = self.host.park(known_tokens(self._request_of[key], self._block_tokens))
            if n_copied:
                self.counts.n_park_copies += self._planes
                self.counts.park_bytes += n_copied * self._planes * self.layout.page_bytes
            self.counts.n_peak_host_pages = max(self.counts.n_peak_host_pages, self.host.n_pages)
        self.counts.n_evicted += 1
        return self._unmap(key)

    def _unmap(self, key: int) -> int:
        """Unmap a slot that does not run; return how many pages came free."""
        del self._request_of[key]
        self.slots.drop(key)
        return self.stripes.drop(key)

    def _grow_books(self, key: int, n_stripes: int) -> None:
        """Put new stripes under a sequence in the books."""
        self.stripes.grow(key, n_stripes)
        self._n_created_stripes = max(self._n_created_stripes, self.stripes.n_stripes)
        self.counts.n_peak_pages = max(self.counts.n_peak_pages, self.n_pages)
        self.n_peak_mappings = max(self.n_peak_mappings, self.stripes.n_mapped_stripes * self._planes)

    def _runs(self, key: int) -> None:
        """Take over what a running slot holds now."""
        n_stripes = self.stripes.length(key)
        self._n_running_stripes += n_stripes - self._n_stripes_of.get(key, 0)
        self._n_stripes_of[key] = n_stripes
        self._capacity[key] = n_stripes * self.layout.page_bytes // self._row_bytes
