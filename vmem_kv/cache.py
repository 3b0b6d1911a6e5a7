"""The cache: one region, one table of slots, and the rules that keep them in step.

    acquire ─▶ ensure ─▶ ensure ─▶ ... ─▶ retire ─▶ (warm) ─▶ acquire again, or reclaim under pressure
                  └▶ fork ─▶ another sequence over the same pages

Guarantees
  * After any exception, KeyboardInterrupt included, sequences are as before the call: plan, take, map and commit come
    in this order, everything is undone on failure, and bookkeeping comes last and cannot fail. `check` holds then.
    (Interrupted when all is done but pages that came free are still being given back, they are as after it.)
  * Running out of pages or mappings first reclaims warm slots (of every cache on the pool), then raises.
  * The lock is the pool's; it is never held across a driver call, a fence or the caller's code. A slot under a
    driver call is *busy*: another thread that needs it waits, others pass.
  * Nothing is unmapped before its fence has passed.
  * A page that lies under two slots is full and behind both of their ends: nobody writes it. A sequence's next token
    always goes to a page of its own.

Assumptions: one thread steps a given sequence; any number of threads may work on different ones. Between two calls a
sequence's rows are written from its length before `ensure` to its length after it, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from vmem_kv.driver.base import PASSED, Copy, Driver, Fence, Handle, Span
from vmem_kv.errors import CapacityError, DriverError, InvariantError, OutOfAddressSpace, OutOfPages, UsageError
from vmem_kv.growth import SlotId, plan_growth
from vmem_kv.layout import Layout
from vmem_kv.pages import PagePool
from vmem_kv.region import Region, Rewired
from vmem_kv.sharing import Rewiring, plan_fork, plan_share, plan_truncate, shared_tokens, tail_copies, tails_of
from vmem_kv.slots import SlotState, SlotTable
from vmem_kv.stats import CacheStats, SlotStats

_Result = TypeVar("_Result")

STALL_TIMEOUT_S = 60.0
"""How long a call waits for another thread's driver call on the same slot before it gives up."""


class KVCache:
    """Slots of growing, contiguous KV memory on a pool of pages.

    Args:
        pool: Where pages come from; several caches may share one.
        layout: The geometry. Its page size is the pool's.

    Raises:
        OutOfAddressSpace: The region cannot be reserved.
        UsageError: Layout and pool disagree on the page size.
    """

    def __init__(self, pool: PagePool, layout: Layout) -> None:
        if layout.page_bytes != pool.page_bytes:
            raise UsageError(f"the layout has pages of {layout.page_bytes} bytes, the pool of {pool.page_bytes}")
        limit = pool.driver.info.max_reservation_bytes
        if layout.virtual_bytes > limit:
            raise OutOfAddressSpace(
                f"{layout.n_slots} slots of {layout.max_tokens} tokens at {layout.token_bytes} bytes need "
                f"{layout.virtual_bytes} bytes of addresses, more than {limit}; lower max_tokens or n_slots"
            )
        self.pool = pool
        self.layout = layout
        self.region = Region(pool, layout)
        self._slots = SlotTable(layout.n_slots)
        self._slides: list[tuple[SlotId, int, Fence]] = []
        self._streams: set[int] = set()
        """Streams that were current when somebody grew a sequence: those that its kernels run on."""
        self._closed = False
        self._viewers: list[Callable[[], bool]] = []
        pool.join(self, self.region)

    def add_viewer(self, is_looking: Callable[[], bool]) -> None:
        """Let `close` ask first whether somebody still looks into the region: then it is refused."""
        self._viewers.append(is_looking)

    def acquire(self, *, expected_tokens: int | None = None, domain: str = "") -> SlotId:
        """Return a slot for a new sequence: a warm one if it fits better than none, else a cold one. Maps nothing.

        Args:
            expected_tokens: How long the sequence may become; the best guess makes the best fit (`SlotTable.choose`).
                Without one, `max_tokens`: then every warm slot fits better than a cold one.
            domain: Whose sequence it is. A warm slot of another domain is scrubbed before it is handed out.

        Raises:
            OutOfSlots: Every slot belongs to a sequence (or still waits for a fence). Nothing changed.
            DriverError: Scrubbing or unmapping a warm slot failed. No slot was handed out; some of the chosen ones may
                have been scrubbed or unmapped, which nobody can tell from outside.
            UsageError: The cache is closed. Nothing changed.
        """
        return self.acquire_adjacent(1, expected_tokens=expected_tokens, domain=domain)[0]

    def acquire_adjacent(
        self, n_slots: int, *, expected_tokens: int | None = None, domain: str = ""
    ) -> Sequence[SlotId]:
        """Return `n_slots` neighbouring slots, so that one strided tensor covers them all. See `acquire`."""
        if n_slots < 1:
            raise UsageError(f"acquire of {n_slots} slots; ask for at least one")
        self._require_open()
        self._poll()
        slots = self._slots
        with self.pool.lock:
            self._require_open()  # again: another thread may close it meanwhile
            layout = self.layout
            wanted = layout.max_tokens if expected_tokens is None else layout.capacity_of(expected_tokens)
            chosen = slots.choose(n_slots, wanted)
            slots.busy.update(chosen)
        try:
            for slot_id in chosen:
                if slots.warm.get(slot_id) == 0:
                    self._unmap_slot(slot_id)  # its front is gone; a new sequence starts at the front
                elif slot_id in slots.warm and slots.domain[slot_id] != domain:
                    self.region.scrub(slot_id)
            with self.pool.lock:
                for slot_id in chosen:
                    slots.activate(slot_id, self.region.token_capacity(slot_id), domain)
        finally:
            self._unbusy(chosen)
        return chosen

    def ensure(self, lengths: Mapping[SlotId, int]) -> None:
        """Map what is missing so that each slot holds its length in tokens, then record the lengths.

        A length may shrink; its pages stay mapped for the sequence to grow again. Below tokens that it shares with
        another sequence only `truncate` takes it.

        Raises:
            OutOfPages: Pages are missing even after reclaiming. Nothing changed but warm slots that went cold.
            OutOfMappings: Likewise, for mappings.
            OutOfAddressSpace: A length exceeds the slot. Nothing changed.
            DriverError: A driver call failed and was undone. Nothing changed.
            UsageError: A slot is not active, or a length is negative, lies before what `slide` gave up or within
                shared pages, or the cache is closed. Nothing changed.
        """
        self.pool.require_owner()
        self._streams.add(self.pool.driver.current_stream())
        with self.pool.lock:
            if self._closed:
                self._require_open()
            slots = self._slots
            try:
                short = {s: n for s, n in lengths.items() if n > slots.capacity[s]}
            except KeyError:
                slots.require_active(lengths)
                raise  # pragma: no cover: the line above has raised; type checkers cannot know
            if slots.first_token or self.region.shares or min(lengths.values(), default=0) < 0:
                self._require_lengths(lengths)
            if not short:
                slots.n_tokens.update(lengths)
                return
        self._grow(short, lengths)

    def premap(self, lengths: Mapping[SlotId, int]) -> int:
        """Map ahead of need: like `ensure`, but lengths stay, nobody's warm slot is reclaimed, and slots that were
        retired meanwhile are passed over.

        Returns:
            How many pages were mapped.

        Raises:
            CapacityError: There is no room to map ahead. Nothing changed.
            DriverError: A driver call failed and was undone. Nothing changed.
        """
        self.pool.require_owner()
        with self.pool.lock:
            capacity, limit = self._slots.capacity, self.layout.max_tokens
            short = {s: min(n, limit) for s, n in lengths.items() if s in capacity and capacity[s] < min(n, limit)}
        return self._grow(short, {}, ahead=True) if short else 0

    def slide(self, slot_ids: SlotId | Sequence[SlotId], first_token: int, fence: Fence | None = None) -> None:
        """Give up the tokens before `first_token`: once `fence` has passed, the pages wholly before it are unmapped.

        Without a fence, one behind all that was launched so far on the calling thread's current stream and on every
        stream that was current in a call of `ensure`.

        Addresses stay: token i is where it always was. A slot cannot go back before `first_token`. Where no page
        comes free this only takes note, so that a windowed model may call it for all of its slots at every step.

        Raises:
            UsageError: A slot is not active, or `first_token` lies behind its length. Nothing changed.
            DriverError: An unmap failed; its pages are quarantined, and all slots did slide. OutOfMappings likewise,
                but that unmap is tried again later. Or no fence could be recorded: nothing changed.
        """
        self.pool.require_owner()
        wanted = [slot_ids] if isinstance(slot_ids, int) else slot_ids
        with self.pool.lock:
            comes_free = self._sliding(wanted, first_token)
        if comes_free and fence is None:
            fence = self.fence()
        with self.pool.lock:
            giving = self._sliding(wanted, first_token)  # again: a slot may have grown or retired meanwhile
            for slot_id in wanted:
                if first_token > self._slots.first_token.get(slot_id, 0):
                    self._slots.first_token[slot_id] = first_token
            if fence is not None:
                self._slides += [(slot_id, first_token, fence) for slot_id in giving]
        if giving:
            self._poll()

    def fork(self, slot_id: SlotId, n_tokens: int | None = None) -> SlotId:
        """Begin another sequence with the first `n_tokens` of this one (all of them by default), without copying them.

        Pages that are full of them lie under both slots from now on; the rest of them, less than a page in each plane,
        is copied in stream order. Both sequences go on as they like. The source must not slide meanwhile.

        Raises:
            OutOfSlots: No slot is free. Nothing changed.
            CapacityError: Pages or mappings are missing even after reclaiming. Nothing changed but warm slots that
                went cold.
            DriverError: A driver call failed and was undone; a warm slot may have gone cold.
            UsageError: The slot is not active or broken, or has not these tokens, or the cache is closed. Nothing
                changed.
        """
        return self.fork_adjacent([slot_id], n_tokens)[0]

    def fork_adjacent(self, sources: Sequence[SlotId], n_tokens: int | None = None) -> Sequence[SlotId]:
        """Fork sequences into neighbouring slots, all of them or none. A source may be named often. See `fork`."""
        self._require_open()
        self._poll()
        self._streams.add(self.pool.driver.current_stream())
        with self._exclusive(sources):
            with self.pool.lock:
                slots = self._slots
                lengths = self._forked_lengths(sources, n_tokens)
                targets = slots.choose(len(sources), 0)
                slots.busy.update(targets)
            try:
                for target in targets:
                    if target in slots.warm:
                        self._unmap_slot(target)
                changes: list[Rewiring] = []
                copies: list[Copy] = []
                for source, target, length in zip(sources, targets, lengths, strict=True):
                    changes += plan_fork(self.layout, self.region.rows(source), target, length)
                    copies += tail_copies(self.layout, self.region.reservation.base, source, target, length)

                def commit() -> None:
                    for source, target, length in zip(sources, targets, lengths, strict=True):
                        slots.activate(target, self.region.token_capacity(target), slots.domain[source])
                        slots.n_tokens[target] = length
                        if source in slots.first_token:
                            slots.first_token[target] = slots.first_token[source]

                self.region.keep(self._begin_rewire(changes, lambda: self.pool.driver.copy(copies), commit))
            finally:
                with self.pool.lock:
                    slots.break_(self.region.broken.intersection(targets))
                self._unbusy(targets)
        return targets

    def truncate(self, slot_id: SlotId, n_tokens: int, fence: Fence | None = None) -> None:
        """Give up the tokens from `n_tokens` on, also where they are shared with another sequence.

        Without shared pages behind the new end this only takes note, and the pages stay for the sequence to grow
        again. Else it waits for `fence` (without one: behind all launched so far, see `retire`), gives the slot a page
        of its own where the new end lies and copies what is left in it.

        Raises:
            CapacityError: Pages are missing even after reclaiming. Nothing changed but warm slots that went cold.
            DriverError: Undone. Where that failed as well the slot is broken and may have lost tokens: its length says
                how many are left; retire it.
            UsageError: The slot is not active or broken, or `n_tokens` is not between what slid and its length.
                Nothing changed.
        """
        self.begin_truncate([slot_id], n_tokens, fence).commit()

    def begin_truncate(self, slot_ids: Sequence[SlotId], n_tokens: int, fence: Fence | None = None) -> Exchange:
        """`truncate` for several sequences, so that it can be taken back. See `begin_share`."""
        self._require_open()
        with ExitStack() as stack:
            stack.enter_context(self._exclusive(slot_ids))
            with self.pool.lock:
                slots = self._slots
                slots.require_active(slot_ids)
                self._require_whole(slot_ids)
                for slot_id in slot_ids:
                    if not slots.first_token.get(slot_id, 0) <= n_tokens <= slots.n_tokens[slot_id]:
                        raise UsageError(
                            f"truncate to {n_tokens} tokens of a sequence that has {slots.n_tokens[slot_id]} (from "
                            f"{slots.first_token.get(slot_id, 0)} on)"
                        )
                before = {slot_id: slots.n_tokens[slot_id] for slot_id in slot_ids}
                changes = [
                    change
                    for slot_id in before
                    for change in plan_truncate(self.layout, self.region.shared_ends(slot_id), slot_id, n_tokens)
                ]

                def commit() -> None:
                    for slot_id in before:
                        slots.n_tokens[slot_id] = n_tokens
                        slots.capacity[slot_id] = self.region.token_capacity(slot_id)

                if not changes:
                    commit()
                    return Exchange(self, stack.pop_all(), None, before)
            (fence or self.fence()).wait()
            driver, base = self.pool.driver, self.region.reservation.base
            tails = {slot_id: tails_of(self.layout, base, slot_id, n_tokens) for slot_id in before}
            replaced = [tails[change.slot_id][change.plane_index] for change in changes if change.handles]
            kept = [(address, bytearray(n_bytes)) for address, n_bytes in replaced]
            for address, kept_bytes in kept:
                driver.copy_to_host(address, memoryview(kept_bytes)).wait()
            rewired = self._begin_rewire(changes, lambda: _write(driver, kept), commit)
            return Exchange(self, stack.pop_all(), rewired, before)

    def share(self, sources: Mapping[SlotId, SlotId], n_tokens: int, fence: Fence | None = None) -> None:
        """Let slots have the first `n_tokens` of other slots, by the same pages: beams that go on from other beams.

        Only pages full of these tokens are exchanged, and only where they differ, after waiting for `fence` (without
        one: behind all launched so far). What is left behind the full pages (`sharing.tails_of`; a
        token may lie on both sides) the caller copies in the slots' own pages.

        Args:
            sources: For each slot the one whose tokens it shall have; at least `n_tokens` long, both.
            n_tokens: How many tokens.
            fence: Behind all that may still read what is exchanged.

        Raises:
            CapacityError: Nothing changed but warm slots that went cold.
            DriverError: Undone; see `truncate`.
            UsageError: A slot is not active or broken, or shorter than `n_tokens`, or of another domain. Nothing
                changed.
        """
        self.begin_share(sources, n_tokens, fence).commit()

    def begin_share(self, sources: Mapping[SlotId, SlotId], n_tokens: int, fence: Fence | None = None) -> Exchange:
        """`share`, so that it can be taken back: where several caches change together or not at all."""
        self._require_open()
        with ExitStack() as stack:
            stack.enter_context(self._exclusive([*sources, *sources.values()]))
            with self.pool.lock:
                slots = self._slots
                self._forked_lengths([*sources, *sources.values()], n_tokens)
                for target, source in sources.items():
                    if slots.domain[target] != slots.domain[source]:
                        raise UsageError(f"slots {target} and {source} are of different domains; nothing is shared")
                    if slots.n_tokens[target] != n_tokens:
                        raise UsageError(
                            f"slot {target} has {slots.n_tokens[target]} tokens, not {n_tokens}; truncate it first"
                        )
                rows = self.region.rows
                changes = [
                    change
                    for target, source in sources.items()
                    for change in plan_share(self.layout, rows(source), target, rows(target), n_tokens)
                ]
            rewired = None
            if changes:
                (fence or self.fence()).wait()
                rewired = self._begin_rewire(changes, lambda: None, lambda: None)
            return Exchange(self, stack.pop_all(), rewired, dict.fromkeys(sources, n_tokens))

    def vacate(self, slot_id: SlotId, fence: Fence | None = None) -> int:
        """Give back all pages of a sequence, whose owner has its tokens elsewhere; the slot stays his, with no tokens.

        Waits for `fence` (without one: behind all launched so far). Addresses stay: `ensure` maps again.

        Returns:
            How many pages went back to the pool.

        Raises:
            DriverError: An unmap failed: the sequence has no tokens, and the slot is broken; retire it.
            UsageError: The slot is not active. Nothing changed.
        """
        self._require_open()
        with self.pool.lock:
            self._slots.require_active([slot_id])
        (fence or self.fence()).wait()
        with self._exclusive([slot_id]):
            with self.pool.lock:
                slots = self._slots
                slots.require_active([slot_id])
                self._slides = [slide for slide in self._slides if slide[0] != slot_id]
                slots.n_tokens[slot_id] = slots.capacity[slot_id] = 0
                slots.first_token.pop(slot_id, None)
            return self.region.unmap(slot_id)

    def spans(self, slot_id: SlotId, first_token: int, end_token: int) -> list[Span]:
        """The bytes of tokens `[first_token, end_token)` of a sequence: one contiguous range in each plane.

        Raises:
            UsageError: The slot is not active, or has not these tokens.
        """
        self.pool.require_owner()
        with self.pool.lock:
            slots = self._slots
            slots.require_active([slot_id])
            if not slots.first_token.get(slot_id, 0) <= first_token <= end_token <= slots.n_tokens[slot_id]:
                raise UsageError(
                    f"tokens [{first_token}, {end_token}) of a sequence that has [{slots.first_token.get(slot_id, 0)}, "
                    f"{slots.n_tokens[slot_id]})"
                )
            return [
                (start + first_token * plane.token_bytes, (end_token - first_token) * plane.token_bytes)
                for plane, start in zip(
                    self.layout.planes, self.layout.starts(self.region.reservation.base, slot_id), strict=True
                )
            ]

    def shared_tokens(self, slot_id: SlotId) -> int:
        """Tokens of a sequence that lie, wholly or in part, in pages that another slot has too: not to be written.

        Raises:
            UsageError: The slot is not active.
        """
        self.pool.require_owner()
        with self.pool.lock:
            self._slots.require_active([slot_id])
            return self._n_shared_tokens(slot_id)

    def retire(self, slot_ids: SlotId | Sequence[SlotId], fence: Fence | None = None) -> None:
        """End sequences. Their pages stay mapped; behind `fence` the slots are warm and can be adopted as they are.

        Without a fence, one behind all that was launched so far on the calling thread's current stream and on every
        stream that was current in a call of `ensure`. Whoever used other streams, or has built batches that are not
        launched yet, gives one that covers them (`steps.py`).

        Raises:
            UsageError: A slot is not active (retired twice?). Nothing changed.
            DriverError: No fence could be recorded. Nothing changed.
            DriverError: The sequences ended, but an unmap that had waited for a fence failed; its pages are
                quarantined.
        """
        self.pool.require_owner()
        fence = fence or self.fence()
        with self.pool.lock:
            self._slots.retire([slot_ids] if isinstance(slot_ids, int) else slot_ids, fence)
        self._poll()

    def fence(self) -> Fence:
        """Return a fence behind all launched so far, on this thread's stream and on those of `ensure`'s callers.

        Raises:
            DriverError: None could be recorded. Nothing changed.
            UsageError: A graph is being captured on one of those streams. Nothing changed.
        """
        try:
            return self.pool.driver.fence(self._streams)
        except DriverError as error:
            if error.is_fatal:
                return PASSED  # a lost device runs nothing
            raise

    def settle(self) -> bool:
        """Block until everything that waits for a fence has moved on; return whether anything did.

        For beginnings and ends, and for a step that would fail otherwise.

        Raises:
            DriverError: The device cannot say, or an unmap failed. What has moved on so far stays so.
        """
        self.pool.require_owner()
        with self.pool.lock:
            fences = [*self._slots.retired.values(), *(fence for _, _, fence in self._slides)]
        for fence in fences:
            fence.wait()
        self._poll()
        return bool(fences)

    def reclaim(self, n_pages: int) -> int:
        """Unmap warm slots, longest retired first, until `n_pages` pages went back to the pool; return how many did.

        Raises:
            DriverError: An unmap or release failed; those pages are quarantined, the others went back.
        """
        self.pool.require_owner()
        n_freed = self._poll()
        while n_freed < n_pages:
            with self.pool.lock:
                victim = next((s for s in self._slots.warm if s not in self._slots.busy), None)
                if victim is None:
                    break
                self._slots.busy.add(victim)
            try:
                n_freed += self._unmap_slot(victim)
            finally:
                self._unbusy([victim])
        return n_freed

    def active_slots(self) -> list[SlotId]:
        """The slots that belong to sequences now."""
        self.pool.require_owner()
        with self.pool.lock:
            return list(self._slots.capacity)

    def n_warm_pages(self) -> int:
        """Pages that `reclaim` could give back now. The caller holds the pool's lock."""
        return sum(self.region.n_givable_pages(s) for s in self._slots.warm if s not in self._slots.busy)

    def is_busy(self) -> bool:
        """Whether a driver call of this cache is under way. The caller holds the pool's lock."""
        return bool(self._slots.busy)

    def n_tokens(self, slot_id: SlotId) -> int:
        """Tokens in a sequence.

        Raises:
            UsageError: The slot is not active.
        """
        self.pool.require_owner()
        with self.pool.lock:
            self._slots.require_active([slot_id])
            return self._slots.n_tokens[slot_id]

    def first_token(self, slot_id: SlotId) -> int:
        """The first token that `slide` has left of a sequence."""
        with self.pool.lock:
            return self._slots.first_token.get(slot_id, 0)

    def token_capacity(self, slot_id: SlotId) -> int:
        """Tokens that a sequence can hold without another driver call.

        Raises:
            UsageError: The slot is not active.
        """
        self.pool.require_owner()
        with self.pool.lock:
            self._slots.require_active([slot_id])
            return self._slots.capacity[slot_id]

    def n_missing_pages(self, lengths: Mapping[SlotId, int]) -> int:
        """Return how many pages `ensure` would map for these lengths. Changes nothing.

        Raises:
            UsageError: A slot is not active.
            OutOfAddressSpace: A length exceeds the slot.
        """
        self.pool.require_owner()
        with self.pool.lock:
            self._slots.require_active(lengths)
            short = {s: n for s, n in lengths.items() if n > self._slots.capacity[s]}
            return plan_growth(self.layout, self.region.reservation.base, self.region.mapped, short).n_pages

    def slot_stats(self) -> list[SlotStats]:
        """Return every slot's state, in the order of their addresses: one consistent snapshot."""
        self.pool.require_owner()
        with self.pool.lock:
            slots = self._slots
            return [
                SlotStats(state.value, self.region.n_pages(slot_id), slots.n_tokens.get(slot_id, 0))
                for slot_id, state in ((SlotId(index), state) for index, state in enumerate(slots.state))
            ]

    def stats(self) -> CacheStats:
        """Return one consistent snapshot."""
        self.pool.require_owner()
        with self.pool.lock:
            pool, slots, layout = self.pool, self._slots, self.layout
            by_state = dict.fromkeys(SlotState, 0)
            for index, state in enumerate(slots.state):
                by_state[state] += self.region.n_pages(SlotId(index))
            n_shared = sum(by_state.values())
            if self.region.shares:
                by_state = self._distinct_by_state()
            n_shared -= sum(by_state.values())
            n_live_tokens = sum(n - slots.first_token.get(s, 0) for s, n in slots.n_tokens.items())
            return CacheStats(
                page_bytes=pool.page_bytes,
                max_pages=pool.max_pages,
                n_free_pages=pool.n_free,
                n_in_flight_pages=pool.n_in_flight,
                n_live_pages=by_state[SlotState.ACTIVE],
                n_warm_pages=by_state[SlotState.WARM],
                n_pending_pages=by_state[SlotState.RETIRED],
                n_saved_pages=n_shared,
                n_elsewhere_pages=pool.n_mapped - sum(by_state.values()),
                n_quarantined_pages=pool.n_quarantined,
                n_peak_owned_pages=pool.n_peak_owned,
                n_mappings=pool.n_mappings,
                max_mappings=pool.driver.info.max_mappings,
                virtual_bytes=layout.virtual_bytes,
                live_bytes=n_live_tokens * layout.token_bytes,
                driver_calls=dict(pool.driver.calls),
            )

    def check(self) -> None:
        """Verify every invariant that can be read off the books.

        Raises:
            InvariantError: One does not hold; the message says which and dumps the state.
        """
        self.pool.require_owner()
        with self.pool.lock:
            self.pool.check()
            self.region.check()
            slots = self._slots
            if slots.n_tokens.keys() != slots.capacity.keys():
                raise InvariantError(f"lengths of {set(slots.n_tokens)}, capacities of {set(slots.capacity)}")
            for index, state in enumerate(slots.state):
                slot_id = SlotId(index)
                n_pages = self.region.n_pages(slot_id)
                idle = state in (SlotState.COLD, SlotState.BROKEN)
                if idle and n_pages and slot_id not in slots.busy:
                    raise InvariantError(f"slot {slot_id} is {state.value} with {n_pages} pages mapped")
                homes = [slot_id in slots.capacity, slot_id in slots.retired, slot_id in slots.warm]
                expected = [state is s for s in (SlotState.ACTIVE, SlotState.RETIRED, SlotState.WARM)]
                if homes != expected:
                    raise InvariantError(f"slot {slot_id} is {state.value}, but stands in {homes}")
                if state is SlotState.ACTIVE and slot_id not in slots.busy:
                    capacity = self.region.token_capacity(slot_id)
                    if slots.capacity[slot_id] != capacity or slots.n_tokens[slot_id] > capacity:
                        raise InvariantError(
                            f"slot {slot_id}: {slots.n_tokens[slot_id]} tokens, capacity {slots.capacity[slot_id]} "
                            f"in the books, {capacity} mapped"
                        )
                if self.region.shares and slot_id not in slots.busy | self.region.broken:
                    self._check_shared(slot_id)

    def close(self) -> None:
        """Unmap everything and free the region. Idempotent. All sequences must be retired and behind their fences.

        Raises:
            UsageError: Sequences are still active, fences have not passed, or tensors over the region are alive.
                Nothing changed.
            DriverError: Some pages could not be unmapped; the rest was. Calling again tries again. A fatal error is
                not raised: what the device took is forgotten.
        """
        if self._closed:
            return
        self.pool.require_owner()
        self._poll()
        if any([is_looking() for is_looking in self._viewers]):  # noqa: C419 - all of them are to let go
            raise UsageError("tensors that look into the cache are still alive; clone what you need and drop them")
        with self.pool.lock:
            if self._closed:
                return
            slots = self._slots
            if slots.capacity or slots.retired or slots.busy or self._slides:
                raise UsageError(
                    f"{len(slots.capacity)} sequences are active and {len(slots.retired)} wait for a fence; "
                    "retire them before closing"
                )
            everything = list(self.region.mapped)
            slots.busy.update(everything)
            self._closed = True  # from here on nobody gets in
        try:
            self.region.close()
        except BaseException:
            self._closed = False
            raise
        else:
            self.pool.leave(self, self.region)
        finally:
            with self.pool.lock:
                for slot_id in list(slots.warm):
                    if not self.region.n_pages(slot_id):  # an interruption leaves the later ones as they were
                        slots.cool(slot_id)
                slots.break_(self.region.broken)
            self._unbusy(everything)

    def _grow(self, short: Mapping[SlotId, int], lengths: Mapping[SlotId, int], *, ahead: bool = False) -> int:
        """Map what `short` lacks, all of it or nothing, then commit `lengths`; return how many pages were mapped."""
        self._require_open()
        if not ahead:
            self._poll()  # what our own windows gave up may be what we need
        with self._exclusive({**short, **lengths}):
            with self.pool.lock:
                self._require_open()
                if ahead:  # nobody waits for us: what was retired or broke meanwhile is passed over
                    usable = self._slots.capacity.keys() - self.region.broken
                    short = {slot_id: n_tokens for slot_id, n_tokens in short.items() if slot_id in usable}
                self._slots.require_active({**short, **lengths})
                self._require_whole(short)
                plan = plan_growth(self.layout, self.region.reservation.base, self.region.mapped, short)
            if plan.runs:
                slot_ids = {run.slot_id for run in plan.runs}
                self._reclaiming(lambda: self.region.map(plan), slot_ids, plan.n_pages, may_reclaim=not ahead)
            with self.pool.lock:  # slots that were retired meanwhile have neither a capacity nor a length
                for slot_id in short.keys() & self._slots.capacity.keys():
                    self._slots.capacity[slot_id] = self.region.token_capacity(slot_id)
                for slot_id in lengths.keys() & self._slots.capacity.keys():
                    self._slots.n_tokens[slot_id] = lengths[slot_id]
        return plan.n_pages

    def _begin_rewire(
        self, changes: Sequence[Rewiring], fill: Callable[[], object], commit: Callable[[], object]
    ) -> Rewired:
        """Exchange pages, reclaiming where some are missing. A sequence that could not be undone says what is left."""
        slot_ids = {change.slot_id for change in changes}
        n_new = sum(handle is None for change in changes for handle in change.handles)
        try:
            return self._reclaiming(lambda: self.region.begin_rewire(changes, fill, commit), slot_ids, n_new)
        finally:
            self._cut_broken(slot_ids)

    def _cut_broken(self, slot_ids: Iterable[SlotId]) -> None:
        """Record what broken slots have lost."""
        slots = self._slots
        with self.pool.lock:
            for slot_id in self.region.broken & slots.capacity.keys() & set(slot_ids):
                slots.capacity[slot_id] = self.region.token_capacity(slot_id)
                slots.n_tokens[slot_id] = min(slots.n_tokens[slot_id], slots.capacity[slot_id])

    def _reclaiming(
        self, call: Callable[[], _Result], slot_ids: set[SlotId], n_pages: int, *, may_reclaim: bool = True
    ) -> _Result:
        """Make a call that takes pages for slots; on a shortage reclaim warm slots and try again, while that helps."""
        while True:
            try:
                return call()
            except CapacityError as error:
                if not may_reclaim or slot_ids & self.region.broken:  # broken by undoing just now
                    raise
                # Mappings come free with pages, nobody knows how many: as many pages as are mapped will do.
                n_short = n_pages - self.pool.n_available if isinstance(error, OutOfPages) else n_pages
                if not self.pool.make_room(max(1, n_short), first=self):
                    raise

    def _forked_lengths(self, sources: Sequence[SlotId], n_tokens: int | None) -> list[int]:
        """What forks of these slots will hold. Raises UsageError if they cannot. The caller holds the lock."""
        slots = self._slots
        slots.require_active(sources)
        self._require_whole(sources)
        lengths = [slots.n_tokens[source] if n_tokens is None else n_tokens for source in sources]
        for source, length in zip(sources, lengths, strict=True):
            if not slots.first_token.get(source, 0) <= length <= slots.n_tokens[source]:
                raise UsageError(
                    f"{length} tokens of slot {source}, which has [{slots.first_token.get(source, 0)}, "
                    f"{slots.n_tokens[source]})"
                )
        return lengths

    def _distinct_by_state(self) -> dict[SlotState, int]:
        """Pages by their slots' state; a shared one in the state that keeps it longest. The caller holds the lock."""
        counts = dict.fromkeys(SlotState, 0)
        seen: set[Handle] = set()
        for state in (SlotState.ACTIVE, SlotState.RETIRED, SlotState.WARM, SlotState.COLD, SlotState.BROKEN):
            slot_ids = (SlotId(index) for index, found in enumerate(self._slots.state) if found is state)
            pages = self.region.distinct_pages(slot_ids) - seen
            counts[state] = len(pages)
            seen |= pages
        return counts

    def _poll(self) -> int:
        """Move on whatever waited for a fence that has passed meanwhile; return how many pages that gave back."""
        n_freed = self._mend() if self.region.may_mend else 0
        with self.pool.lock:
            if not self._slots.retired and not self._slides:
                return n_freed
            retired = list(self._slots.retired.items())
            slides = list(self._slides)
        passed = [(slot_id, fence) for slot_id, fence in retired if fence.passed()]
        n_freed += sum(self._finish_slide(slide) for slide in slides if slide[2].passed())
        with self.pool.lock:
            waiting = {slot_id for slot_id, _, _ in self._slides}
            for slot_id, fence in passed:
                if self._slots.retired.get(slot_id) is fence and slot_id not in waiting | self._slots.busy:
                    n_pages = self.region.n_pages(slot_id)
                    if not n_pages:
                        self.region.reset(slot_id)
                    capacity = self.region.token_capacity(slot_id) if self.region.has_front(slot_id) else 0
                    self._slots.settle(slot_id, capacity if n_pages else -1)
            self._slots.break_(self.region.broken)
            # A slot that shares pages cannot be adopted: its next owner would write them.
            warm = [s for s in self._slots.warm if s not in self._slots.busy] if self.region.shares else ()
            sharing = {s for s in warm if self.region.is_shared(s)}
            unusable = [s for s in self.region.broken | sharing if s in self._slots.warm and s not in self._slots.busy]
            self._slots.busy.update(unusable)
        failure: BaseException | None = None
        try:
            for slot_id in unusable:  # all of them, even if one fails: what is left warm can be adopted
                try:
                    n_freed += self._unmap_slot(slot_id)
                except BaseException as error:
                    failure = failure or error
        finally:
            self._unbusy(unusable)
        if failure is not None:
            raise failure
        return n_freed

    def _mend(self) -> int:
        """Try again to unmap what was refused for a reason that passes; return how many pages went back."""
        with self.pool.lock:
            mending = self.region.may_mend - self._slots.busy
            self._slots.busy |= mending
        try:
            return self.region.retry(lambda stuck: stuck.may_pass and stuck.slot_id in mending)
        except CapacityError:
            return 0  # still refused, and stuck as before
        finally:
            with self.pool.lock:
                self._slots.mend(mending - self.region.broken)
            self._unbusy(mending)

    def _finish_slide(self, slide: tuple[SlotId, int, Fence]) -> int:
        """Unmap the pages in front of a window whose fence has passed; return how many.

        A busy slot's turn comes at a later poll: to wait here could be to wait for ourselves, in the middle of
        growing that slot.
        """
        slot_id, first_token, _ = slide
        with self.pool.lock:
            if slide not in self._slides or slot_id in self._slots.busy:
                return 0
            self._slides.remove(slide)
            self._slots.busy.add(slot_id)
        try:
            return self.region.unmap(slot_id, self._first_kept_pages(first_token))
        finally:
            self._unbusy([slot_id])

    def _sliding(self, slot_ids: Sequence[SlotId], first_token: int) -> list[SlotId]:
        """The slots of which pages come free if they slide; raises as `slide` does. The caller holds the lock."""
        slots = self._slots
        slots.require_active(slot_ids)
        shortest = min((slots.n_tokens[slot_id] for slot_id in slot_ids), default=first_token)
        if not 0 <= first_token <= shortest:
            raise UsageError(f"slide to token {first_token} in a sequence of {shortest} tokens")
        kept = self._first_kept_pages(first_token)
        return [
            slot_id
            for slot_id in slot_ids
            if first_token > slots.first_token.get(slot_id, 0)
            and any(first < min(cut, end) for cut, (first, end) in zip(kept, self.region.mapped[slot_id], strict=True))
        ]

    def _first_kept_pages(self, first_token: int) -> list[int]:
        """Per plane, the page in which a window begins."""
        return [first_token * plane.token_bytes // self.layout.page_bytes for plane in self.layout.planes]

    def _unmap_slot(self, slot_id: SlotId) -> int:
        """Turn a busy warm slot cold. Whatever fails, the books say what is mapped."""
        try:
            return self.region.unmap(slot_id)
        finally:
            with self.pool.lock:
                self._slots.cool(slot_id)
                self._slots.break_(self.region.broken & {slot_id})

    @contextmanager
    def _exclusive(self, slot_ids: Mapping[SlotId, int] | Sequence[SlotId]) -> Iterator[None]:
        """Keep other threads off these slots while the driver works on them."""
        wanted = set(slot_ids)
        with self.pool.lock:
            if not self.pool.lock.wait_for(lambda: not wanted & self._slots.busy, STALL_TIMEOUT_S):
                raise DriverError("wait", 110, "ETIMEDOUT", 0, f"slots {sorted(wanted)} stayed busy")
            self._slots.busy |= wanted
        try:
            yield
        finally:
            self._unbusy(wanted)

    def _unbusy(self, slot_ids: Sequence[SlotId] | set[SlotId]) -> None:
        with self.pool.lock:
            self._slots.busy.difference_update(slot_ids)
            self.pool.lock.notify_all()

    def _require_open(self) -> None:
        self.pool.require_owner()
        if self._closed:
            raise UsageError("the cache is closed; open a new one")

    def _require_whole(self, slot_ids: Iterable[SlotId]) -> None:
        broken = self.region.broken.intersection(slot_ids)
        if broken:
            raise UsageError(f"an unmap failed under slots {sorted(broken)}; retire them, they cannot grow any more")

    def _n_shared_tokens(self, slot_id: SlotId) -> int:
        return shared_tokens(self.layout, self.region.shared_ends(slot_id)) if self.region.shares else 0

    def _check_shared(self, slot_id: SlotId) -> None:
        """Verify that nobody will write what is shared. The caller holds the lock."""
        state, n_tokens = self._slots.state[slot_id], self._slots.n_tokens.get(slot_id, 0)
        if state is SlotState.ACTIVE and self._n_shared_tokens(slot_id) > n_tokens:
            raise InvariantError(f"slot {slot_id} of {n_tokens} tokens shares {self._n_shared_tokens(slot_id)}")
        if state is SlotState.WARM and self.region.is_shared(slot_id):
            raise InvariantError(f"slot {slot_id} is to be adopted, and shares pages")

    def _require_lengths(self, lengths: Mapping[SlotId, int]) -> None:
        for slot_id, n_tokens in lengths.items():
            if n_tokens < self._slots.first_token.get(slot_id, 0):
                raise UsageError(
                    f"slot {slot_id}: length {n_tokens} is negative or lies before the tokens that slide gave up"
                )
            if n_tokens < self._slots.n_tokens[slot_id] and n_tokens < shared_tokens(
                self.layout, self.region.shared_ends(slot_id)
            ):
                raise UsageError(
                    f"slot {slot_id}: length {n_tokens} lies within pages that another sequence has too; truncate it"
                )


def _write(driver: Driver, rows: Sequence[tuple[int, bytearray]]) -> None:
    for address, row in rows:
        driver.copy_from_host(memoryview(row), address).wait()


class Exchange:
    """Sequences that were changed and can still be put back: `commit` or `undo` ends it, exactly one of them.

    Until then nobody may use these sequences, on the device neither; other threads wait for their slots.
    """

    def __init__(
        self, cache: KVCache, claim: ExitStack, rewired: Rewired | None, lengths: Mapping[SlotId, int]
    ) -> None:
        self._cache = cache
        self._claim = claim
        self._rewired = rewired
        self._lengths = lengths  # as they were

    def commit(self) -> None:
        """Let go of what was replaced. A page that cannot be released is counted as lost."""
        with self._claim:
            if self._rewired is not None:
                self._cache.region.keep(self._rewired)

    def undo(self) -> None:
        """Make the sequences what they were.

        Raises:
            DriverError: That failed: the slots are broken, and what is left in them may be wrong; retire them.
        """
        cache, slots = self._cache, self._cache._slots
        with self._claim:
            try:
                if self._rewired is not None:
                    cache.region.take_back(self._rewired)
            finally:
                with cache.pool.lock:
                    for slot_id, n_tokens in self._lengths.items():
                        slots.n_tokens[slot_id] = n_tokens
                        slots.capacity[slot_id] = cache.region.token_capacity(slot_id)
                cache._cut_broken(self._lengths)
