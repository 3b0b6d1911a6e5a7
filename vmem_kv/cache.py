"""The cache: one region, one table of slots, and the rules that keep them in step.

    acquire ─▶ ensure ─▶ ensure ─▶ ... ─▶ retire ─▶ (warm) ─▶ acquire again, or reclaim under pressure
                  └▶ fork ─▶ another sequence over the same pages

This file says what each call does for its caller, and how sequences grow. The other ways of pages have a file each:
`exchange.py` between sequences, `pending.py` back behind fences. `audit.py` reads the books.

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

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from vmem_kv.audit import cache_stats, check_books, slot_stats
from vmem_kv.claims import Claims
from vmem_kv.driver.base import PASSED, Fence, Span
from vmem_kv.errors import DriverError, OutOfAddressSpace, UsageError
from vmem_kv.exchange import Exchange as Exchange
from vmem_kv.exchange import Exchanger
from vmem_kv.growth import SlotId, plan_growth
from vmem_kv.layout import Layout
from vmem_kv.pages import PagePool
from vmem_kv.pending import Pending
from vmem_kv.region import Region
from vmem_kv.room import Room
from vmem_kv.slots import SlotTable
from vmem_kv.stats import CacheStats, SlotStats


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
        self._claims = Claims(pool.lock, self._slots)
        self._pending = Pending(pool, self.region, self._slots, self._claims)
        self._room = Room(pool, self.region, self._pending)
        self._exchanger = Exchanger(pool, self.region, self._slots, self._claims, self._pending, self._room)
        self._streams: set[int] = set()
        """Streams that were current when somebody grew a sequence: those that its kernels run on."""
        self._closed = False
        self._viewers: list[Callable[[], bool]] = []
        pool.join(self._pending, self.region)

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
        self._pending.poll()
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
                    self._pending.unmap_warm(slot_id)  # its front is gone; a new sequence starts at the front
                elif slot_id in slots.warm and slots.domain[slot_id] != domain:
                    self.region.scrub(slot_id)
            with self.pool.lock:
                for slot_id in chosen:
                    slots.activate(slot_id, self.region.table.token_capacity(slot_id), domain)
        finally:
            self._claims.end(chosen)
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
            if slots.first_token or self.region.table.shares or min(lengths.values(), default=0) < 0:
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

    def _require_lengths(self, lengths: Mapping[SlotId, int]) -> None:
        """Raise UsageError where a length lies before what can be given up. The caller holds the lock."""
        for slot_id, n_tokens in lengths.items():
            if n_tokens < self._slots.first_token.get(slot_id, 0):
                raise UsageError(
                    f"slot {slot_id}: length {n_tokens} is negative or lies before the tokens that slide gave up"
                )
            if n_tokens < self._slots.n_tokens[slot_id] and n_tokens < self.region.table.n_shared_tokens(slot_id):
                raise UsageError(
                    f"slot {slot_id}: length {n_tokens} lies within pages that another sequence has too; truncate it"
                )

    def _grow(self, short: Mapping[SlotId, int], lengths: Mapping[SlotId, int], *, ahead: bool = False) -> int:
        """Map what `short` lacks, all of it or nothing, then commit `lengths`; return how many pages were mapped."""
        self._require_open()
        if not ahead:
            self._pending.poll()  # what our own windows gave up may be what we need
        with self._claims.exclusive({**short, **lengths}):
            with self.pool.lock:
                self._require_open()
                if ahead:  # nobody waits for us: what was retired or broke meanwhile is passed over
                    usable = self._slots.capacity.keys() - self.region.broken
                    short = {slot_id: n_tokens for slot_id, n_tokens in short.items() if slot_id in usable}
                self._slots.require_active({**short, **lengths})
                self.region.require_whole(short)
                plan = plan_growth(self.layout, self.region.reservation.base, self.region.table.mapped, short)
            if plan.runs:
                if ahead:
                    self.region.map(plan)
                else:
                    slot_ids = {run.slot_id for run in plan.runs}
                    self._room.having(lambda: self.region.map(plan), slot_ids, plan.n_pages)
            with self.pool.lock:  # slots that were retired meanwhile have neither a capacity nor a length
                for slot_id in short.keys() & self._slots.capacity.keys():
                    self._slots.capacity[slot_id] = self.region.table.token_capacity(slot_id)
                for slot_id in lengths.keys() & self._slots.capacity.keys():
                    self._slots.n_tokens[slot_id] = lengths[slot_id]
        return plan.n_pages

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
            comes_free = self._pending.comes_free(wanted, first_token)
        if comes_free and fence is None:
            fence = self.fence()
        if self._pending.slide(wanted, first_token, fence):  # asks again: a slot may have grown or retired meanwhile
            self._pending.poll()

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
        self._pending.poll()
        self._streams.add(self.pool.driver.current_stream())
        return self._exchanger.fork(sources, n_tokens)

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
        return self._exchanger.begin_truncate(slot_ids, n_tokens, partial(self._wait_for, fence))

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
        return self._exchanger.begin_share(sources, n_tokens, partial(self._wait_for, fence))

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
        self._wait_for(fence)
        with self._claims.exclusive([slot_id]):
            with self.pool.lock:
                slots = self._slots
                slots.require_active([slot_id])
                self._pending.forget(slot_id)
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
            return self.region.table.n_shared_tokens(slot_id)

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
        self._pending.poll()

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
        fences = self._pending.fences()
        for fence in fences:
            fence.wait()
        self._pending.poll()
        return bool(fences)

    def reclaim(self, n_pages: int) -> int:
        """Unmap warm slots, longest retired first, until `n_pages` pages went back to the pool; return how many did.

        Raises:
            DriverError: An unmap or release failed; those pages are quarantined, the others went back.
        """
        return self._pending.reclaim(n_pages)

    def active_slots(self) -> list[SlotId]:
        """The slots that belong to sequences now."""
        self.pool.require_owner()
        with self.pool.lock:
            return list(self._slots.capacity)

    def n_warm_pages(self) -> int:
        """Pages that `reclaim` could give back now. The caller holds the pool's lock."""
        return self._pending.n_warm_pages()

    def is_busy(self) -> bool:
        """Whether a driver call of this cache is under way. The caller holds the pool's lock."""
        return self._pending.is_busy()

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
        self.pool.require_owner()
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
            return plan_growth(self.layout, self.region.reservation.base, self.region.table.mapped, short).n_pages

    def slot_stats(self) -> list[SlotStats]:
        """Return every slot's state, in the order of their addresses: one consistent snapshot."""
        self.pool.require_owner()
        with self.pool.lock:
            return slot_stats(self.region.table, self._slots)

    def stats(self) -> CacheStats:
        """Return one consistent snapshot."""
        self.pool.require_owner()
        with self.pool.lock:
            return cache_stats(self.pool, self.region.table, self._slots)

    def check(self) -> None:
        """Verify every invariant that can be read off the books.

        Raises:
            InvariantError: One does not hold; the message says which and dumps the state.
        """
        self.pool.require_owner()
        with self.pool.lock:
            check_books(self.pool, self.region, self._slots)

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
        self._pending.poll()
        if any([is_looking() for is_looking in self._viewers]):  # noqa: C419 - all of them are to let go
            raise UsageError("tensors that look into the cache are still alive; clone what you need and drop them")
        with self.pool.lock:
            if self._closed:
                return
            slots = self._slots
            if slots.capacity or slots.retired or slots.busy or self._pending.slides:
                raise UsageError(
                    f"{len(slots.capacity)} sequences are active and {len(slots.retired)} wait for a fence; "
                    "retire them before closing"
                )
            everything = list(self.region.table.mapped)
            slots.busy.update(everything)
            self._closed = True  # from here on nobody gets in
        try:
            self.region.close()
        except BaseException:
            self._closed = False
            raise
        else:
            self.pool.leave(self._pending, self.region)
        finally:
            with self.pool.lock:
                for slot_id in list(slots.warm):
                    if not self.region.table.n_pages(slot_id):  # an interruption leaves the later ones as they were
                        slots.cool(slot_id)
                slots.break_(self.region.broken)
            self._claims.end(everything)

    def _wait_for(self, fence: Fence | None) -> None:
        (fence or self.fence()).wait()

    def _require_open(self) -> None:
        self.pool.require_owner()
        if self._closed:
            raise UsageError("the cache is closed; open a new one")
