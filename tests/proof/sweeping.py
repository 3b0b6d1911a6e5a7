"""Scenarios that are lived again for every driver call in them, with that call failing.

A `Story` is one pool with a cache, and sequences that write every byte of their rows. A scenario is a list of calls.
It is lived once without faults, which counts the injection points and notes what the sequences hold at every
checkpoint; then once per point and plan. Whenever a call breaks off: the error is typed, the books are as before but
for memory that went back, everything adds up, all sequences have all their bytes; then the same call is made again and
must succeed. At every checkpoint the sequences hold, byte for byte, what they held without faults; in the end nothing
is left.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as TypingSequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver, Handle
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.errors import CapacityError, DriverError, OutOfSlots, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.sharing import plan_share, tail_copies
from vmem_kv.testing import (
    FaultyDriver,
    ManualFence,
    Plan,
    driver_error,
    fail_any,
    fail_from,
    fail_next,
    fail_once,
    interruption,
    natural_error,
    no_faults,
)
from vmem_kv.testing.operations import ROWS

from ..core.bench import books
from ..held import Held
from .drivers import physical_bytes

T = TypeVar("T")

MAX_TOKENS = 40


@lru_cache(maxsize=4096)
def _pattern(seed: int, row_bytes: int) -> Any:
    """The bytes of a whole sequence, as `[token, byte]`."""
    pattern = (seed + np.arange(MAX_TOKENS)[:, None] * 31 + np.arange(row_bytes) % 251).astype(np.uint8)
    pattern.flags.writeable = False
    return pattern


@dataclass(eq=False)
class Sequence:
    """What a sequence is to its owner."""

    number: int
    domain: str
    slot: SlotId
    n_tokens: int = 0
    first_token: int = 0
    n_written: int = 0  # rows before this one may hold its own bytes; those behind are nobody's
    is_adopted: bool = False  # its slot may hold bytes of its own domain
    past: list[tuple[int, int]] = field(default_factory=list)
    """Rows before each end that are those of the sequence with this number: what it was forked from."""
    n_due: int = 0  # tokens that it should have, where it lost some

    def cut(self, n_tokens: int) -> None:
        """Have so many tokens at most."""
        self.n_tokens = min(self.n_tokens, n_tokens)
        self.past = [(min(end, n_tokens), number) for end, number in self.past]


class WatchedPool(PagePool):
    """A pool that is caught handing out a page of the quarantine, whatever its books say."""

    def __init__(self, driver: Driver, page_bytes: int, max_pages: int, *, keep_freed: bool) -> None:
        super().__init__(driver, page_bytes, max_pages, keep_freed=keep_freed)
        self.n_reused = 0
        self._lost: set[Handle] = set()

    def quarantine(self, handles: Iterable[Handle]) -> None:
        lost = list(handles)
        super().quarantine(lost)
        self._lost |= set(lost)

    def unquarantine(self, handles: Iterable[Handle]) -> None:
        back = list(handles)
        super().unquarantine(back)
        self._lost -= set(back)

    def take(self, places: TypingSequence[int]) -> tuple[list[Handle], int]:
        handles, n_used = super().take(places)
        self.n_reused += len(self._lost.intersection(handles))
        return handles, n_used


class Story:
    """See this file's first lines."""

    def __init__(self, device: Driver, plan: Plan, kind: str, *, rows: str, keep_freed: bool, max_pages: int) -> None:
        self.device = device
        self.faulty = FaultyDriver(device, plan)
        self.driver = CheckedDriver(self.faulty)
        self.page_bytes = device.info.granularity_bytes
        self.kind = kind
        self.rows = rows
        self.pool = WatchedPool(self.driver, self.page_bytes, max_pages, keep_freed=keep_freed)
        self.caches: list[KVCache] = []
        self.sequences: list[Sequence] = []
        self.held: list[str] = []
        self.n_failed_calls = 0
        self._n_sequences = 0
        self._spares: list[SlotId] = []
        self._adopted: set[SlotId] = set()  # of the last cache's slots, those taken over from their own domain
        self._numbers: dict[str, list[int]] = {}  # the sequences that a domain ever had
        self._ledger_before = (device.ledger.n_bytes, device.ledger.n_mappings)

    # What a scenario is made of. The cache is the one opened last.

    @property
    def cache(self) -> KVCache:
        return self.caches[-1]

    def open(self, n_slots: int = 8) -> None:
        layout = ROWS[self.rows](self.kind, self.page_bytes, n_slots=n_slots, max_tokens=MAX_TOKENS)
        self.attempt(lambda: self.caches.append(KVCache(self.pool, layout)))
        self._adopted = set()

    def begin(self, domain: str | None = None, expected_tokens: int | None = None) -> Sequence:
        return self.attempt(lambda: self._begin(domain, expected_tokens))

    def keep_a_spare(self) -> None:
        """Hold a slot back, for the case that another one breaks where all are needed."""
        self._spares.append(self.attempt(lambda: self.cache.acquire(expected_tokens=0, domain="spare")))

    def begin_two(self) -> list[Sequence]:
        slots = self.attempt(lambda: self._acquire("two", None, 2))
        return [self._sequence(slot_id, "two") for slot_id in slots]

    def grow(self, lengths: dict[int, int]) -> None:
        """Sequences, by their place in the list, get these lengths."""
        self.attempt(lambda: self._grow({self.sequences[i]: n for i, n in lengths.items()}))

    def fork(self, index: int, n_tokens: int) -> None:
        self.sequences.append(self.attempt(lambda: self._fork(self.sequences[index], n_tokens)))

    def truncate(self, index: int, n_tokens: int) -> None:
        self.attempt(lambda: self._truncate(self.sequences[index], n_tokens))

    def share(self, target: int, source: int) -> None:
        """One sequence goes on from another one's tokens."""
        self.attempt(lambda: self._share(self.sequences[target], self.sequences[source]))

    def vacate(self, index: int) -> None:
        """A sequence gives its memory back and writes all of its tokens again."""
        n_tokens = self.sequences[index].n_tokens
        self.attempt(lambda: self._vacate(self.sequences[index]))
        self.grow({index: n_tokens})

    def premap(self, lengths: dict[int, int]) -> None:
        self.attempt(
            lambda: self.kept(
                lambda: self.cache.premap({self.sequences[i].slot: n for i, n in lengths.items() if self.is_whole(i)})
            )
        )

    def slide(self, index: int, first_token: int, *, waits: bool) -> None:
        sequence, fence = self.sequences[index], ManualFence()
        sequence.first_token = first_token  # before the call: the pages may go although it fails
        self.attempt(lambda: self.cache.slide(sequence.slot, first_token, fence if waits else None))
        self.check()
        fence.pass_()
        self.attempt(lambda: self.cache.reclaim(0))

    def retire(self, *indices: int, waits: bool = False) -> None:
        gone = [self.sequences[i] for i in indices]
        fence = ManualFence() if waits else None
        self.attempt(lambda: self._retire(gone, fence))
        if fence is not None:
            self.check()
            fence.pass_()
            self.attempt(lambda: self.cache.reclaim(0))

    def reclaim(self, n_pages: int = 1000) -> None:
        self.attempt(lambda: self.cache.reclaim(n_pages))

    def trim(self) -> None:
        self.attempt(lambda: self.pool.trim())

    def resize(self, surplus: int) -> None:
        """Give the pool a budget of what is alive now and `surplus` pages."""
        n_live = sum(cache.stats().n_live_pages for cache in self.caches)
        self.attempt(lambda: self.pool.resize(n_live + surplus + self.pool.n_quarantined))

    def let_it_own_no_more(self) -> None:
        """Give the pool a budget of what it owns now, warm pages included."""
        self.attempt(lambda: self.pool.resize(self.pool.n_owned))

    def settle(self) -> None:
        self.attempt(self.cache.settle)

    def checkpoint(self) -> None:
        """Note every byte of every live row."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            for rows, _ in self._rows(sequence, sequence.first_token, sequence.n_tokens):
                digest.update(rows.tobytes())
        self.held.append(digest.hexdigest())

    def close(self) -> None:
        for cache in self.caches:
            gone = [s for s in self.sequences if s.slot in cache.active_slots() and cache is self.cache]
            self.attempt(lambda gone=gone: self._retire(gone, None))  # type: ignore[misc]
            left = cache.active_slots()
            self.attempt(lambda cache=cache, left=left: cache.retire(left) if cache.active_slots() else None)  # type: ignore[misc]
            self.attempt(cache.close)
        self.caches = []
        self.trim()

    # Inside

    def is_whole(self, index: int) -> bool:
        return self.sequences[index].slot not in self.cache.region.broken

    def _begin(self, domain: str | None, expected_tokens: int | None) -> Sequence:
        name = domain or f"alone {self._n_sequences}"
        (slot,) = self._acquire(name, expected_tokens, 1)
        return self._sequence(slot, name)

    def _acquire(self, domain: str, expected_tokens: int | None, n_slots: int) -> list[SlotId]:
        def call() -> list[SlotId]:
            cache, past = self.cache, dict(self.cache._slots.domain)
            if n_slots == 1:
                slots = [cache.acquire(expected_tokens=expected_tokens, domain=domain)]
            else:
                slots = list(cache.acquire_adjacent(n_slots, expected_tokens=expected_tokens, domain=domain))
            self._adopted |= {slot for slot in slots if past.get(slot) == domain}
            self._adopted -= {slot for slot in slots if past.get(slot) != domain}
            return slots

        try:
            return self.kept(call)
        except OutOfSlots:
            if not self._spares or not self.cache.region.broken:
                raise
            self.cache.retire(self._spares.pop())
            return call()

    def _sequence(self, slot: SlotId, domain: str) -> Sequence:
        self._n_sequences += 1
        self._numbers.setdefault(domain, []).append(self._n_sequences)
        self.sequences.append(Sequence(self._n_sequences, domain, slot, is_adopted=slot in self._adopted))
        return self.sequences[-1]

    def _grow(self, lengths: dict[Any, int]) -> None:
        for sequence in lengths:
            if sequence.slot in self.cache.region.broken:
                self._move(sequence)
        wanted = {sequence.slot: n for sequence, n in lengths.items()}
        try:
            self.kept(lambda: self.cache.ensure(wanted))
        except CapacityError:
            if self.faulty.plan is not no_faults or not self.pool.n_quarantined:
                raise
            # Lost pages count against the budget: make up for them, as an operator could.
            self.pool.resize(self.pool.max_pages + self.pool.n_quarantined)
            self.cache.ensure(wanted)
        for sequence, n_tokens in lengths.items():
            self._write(sequence, n_tokens)

    def _fork(self, source: Sequence, n_tokens: int) -> Sequence:
        if source.slot in self.cache.region.broken:
            self._move(source)
        try:
            slot = self.kept(lambda: self.cache.fork(source.slot, n_tokens))
        except OutOfSlots:
            if not self._spares or not self.cache.region.broken:
                raise
            self.cache.retire(self._spares.pop())
            slot = self.cache.fork(source.slot, n_tokens)
        self._n_sequences += 1
        self._numbers.setdefault(source.domain, []).append(self._n_sequences)
        fork = Sequence(self._n_sequences, source.domain, slot, n_tokens, source.first_token, n_tokens)
        fork.past = [*((min(end, n_tokens), number) for end, number in source.past), (n_tokens, source.number)]
        return fork

    def _truncate(self, sequence: Sequence, n_tokens: int) -> None:
        self._exchange(
            [sequence],
            lambda: self.cache.truncate(sequence.slot, n_tokens),
            lambda: self.cache.n_tokens(sequence.slot) == n_tokens,
        )
        sequence.cut(n_tokens)

    def _share(self, target: Sequence, source: Sequence) -> None:
        n_tokens, rows = target.n_due or target.n_tokens, self.cache.region.table.rows
        self._exchange(
            [source, target],
            lambda: self.cache.share({target.slot: source.slot}, n_tokens),
            lambda: (
                self.cache.n_tokens(target.slot) == n_tokens
                and not plan_share(self.cache.layout, rows(source.slot), target.slot, rows(target.slot), n_tokens)
            ),
        )
        base = self.cache.region.reservation.base
        self.device.copy(tail_copies(self.cache.layout, base, source.slot, target.slot, n_tokens))
        target.past = [*((min(end, n_tokens), number) for end, number in source.past), (n_tokens, source.number)]

    def _exchange(self, sequences: list[Sequence], call: Callable[[], None], is_done: Callable[[], bool]) -> None:
        """Make a call that exchanges pages of sequences. Where undoing it fails too, they may lose tokens.

        An interruption may come when it is done, and pages that came free are given back.
        """

        def make() -> None:
            try:
                call()
            except KeyboardInterrupt:
                if not is_done():
                    raise

        for sequence in sequences:
            if sequence.slot in self.cache.region.broken:
                self._move(sequence)
        try:
            self.kept(make, {sequence.slot for sequence in sequences})
        except (VmemError, KeyboardInterrupt):
            for sequence in sequences:
                n_left = self.cache.n_tokens(sequence.slot)
                assert n_left == sequence.n_tokens or sequence.slot in self.cache.region.unmapper.damaged
                if n_left < sequence.n_tokens:
                    sequence.n_due, sequence.n_tokens = sequence.n_tokens, n_left
            raise

    def _vacate(self, sequence: Sequence) -> None:
        sequence.n_tokens = sequence.n_written = 0
        sequence.past, sequence.is_adopted = [], False
        self.cache.vacate(sequence.slot)

    def _move(self, sequence: Sequence) -> None:
        """An unmap failed under a sequence: it begins again in another slot, as its owner would let it."""
        n_tokens, first_token = sequence.n_due or sequence.n_tokens, sequence.first_token
        sequence.n_due = 0
        self.cache.retire(sequence.slot)
        (sequence.slot,) = self._acquire(sequence.domain, None, 1)
        sequence.is_adopted = sequence.slot in self._adopted
        sequence.n_tokens = sequence.first_token = sequence.n_written = 0
        self.cache.ensure({sequence.slot: n_tokens})
        self._write(sequence, n_tokens)
        sequence.first_token = first_token
        self.cache.slide(sequence.slot, first_token)

    def _write(self, sequence: Sequence, n_tokens: int) -> None:
        self._require_mapped(sequence, min(sequence.n_written, sequence.n_tokens), n_tokens)
        for plane_index, (rows, _) in enumerate(self._rows(sequence, sequence.n_written, n_tokens)):
            may_show = rows == 0
            if sequence.is_adopted:
                for number in self._numbers[sequence.domain]:
                    may_show |= rows == self._pattern(number, plane_index, sequence.n_written, n_tokens)
            assert may_show.all(), f"plane {plane_index} shows old bytes"
        sequence.n_written = max(n_tokens, sequence.n_written)
        for rows, expected in self._rows(sequence, min(sequence.n_tokens, n_tokens), n_tokens):
            rows[:] = expected
        sequence.n_tokens = n_tokens

    def _require_mapped(self, sequence: Sequence, first: int, end: int) -> None:
        """The driver, by its own books, has mapped every row in `[first, end)`: to touch another would be the end."""
        step = self.page_bytes
        for plane in self.cache.layout.planes:
            start = plane.base_bytes + sequence.slot * plane.span_bytes
            pages = range((start + first * plane.token_bytes) // step, -(-(start + end * plane.token_bytes) // step))
            base = self.cache.region.reservation.base
            assert first >= end or all(base + page * step in self.driver._mapped for page in pages), "not mapped"

    def _rows(self, sequence: Sequence, first: int, end: int) -> Iterable[tuple[Any, Any]]:
        """Per plane, the bytes `[first, end)` of a sequence and what they should be; views of `[token, byte]`."""
        if first >= end:
            return
        for plane_index, plane in enumerate(self.cache.layout.planes):
            base = self.cache.region.reservation.base + plane.base_bytes + sequence.slot * plane.span_bytes
            memory = (ctypes.c_char * ((end - first) * plane.token_bytes)).from_address(
                base + first * plane.token_bytes
            )
            rows = np.frombuffer(memory, np.uint8).reshape(end - first, plane.token_bytes)
            yield rows, self._expected(sequence, plane_index, first, end)

    def _expected(self, sequence: Sequence, plane_index: int, first: int, end: int) -> Any:
        """The bytes of a sequence's rows `[first, end)` in a plane."""
        expected = self._pattern(sequence.number, plane_index, first, end)
        if sequence.past:
            expected = expected.copy()
        for past_end, number in reversed(sequence.past):
            if past_end > first:
                part = self._pattern(number, plane_index, first, min(past_end, end))
                expected[: len(part)] = part
        return expected

    def _pattern(self, number: int, plane_index: int, first: int, end: int) -> Any:
        """The bytes that a sequence of this number writes to its rows `[first, end)` of a plane; not to be changed."""
        return _pattern(number * 101 + plane_index * 57 + 1, self.cache.layout.planes[plane_index].token_bytes)[
            first:end
        ]

    def _retire(self, gone: list[Sequence], fence: ManualFence | None) -> None:
        still = [s for s in gone if s in self.sequences]
        try:
            self.cache.retire([s.slot for s in still], fence)
        finally:
            active = self.cache.active_slots()
            self.sequences = [s for s in self.sequences if s not in still or s.slot in active]

    def attempt(self, call: Callable[[], T]) -> T:
        """Call; after a failure look at everything, stop the faults and call again."""
        try:
            return call()
        except (CapacityError, DriverError, KeyboardInterrupt):
            self.n_failed_calls += 1
            self.check()
            self.faulty.plan = no_faults
        result = call()
        self.check()
        return result

    def kept(self, call: Callable[[], T], exchanging: Collection[SlotId] = ()) -> T:
        """Call; a failure must leave all sequences alone and, unless it gave memory back, everything else too.

        But for those whose pages are being exchanged, if undoing it failed as well.
        """
        before, active_before, warm_before = books(self.cache), active_part(self.cache), self._warm()
        n_faults = len(self.faulty.faults)
        try:
            return call()
        except (VmemError, KeyboardInterrupt):
            after = books(self.cache)
            damaged = self.cache.region.unmapper.damaged.intersection(exchanging)
            assert active_part(self.cache, damaged) == (active_part_of(before, damaged) if damaged else active_before)
            gave_back = {"unmap", "release", "fence"} & {point.operation for point in self.faulty.faults[n_faults:]}
            if not damaged and not gave_back and self._warm() == warm_before:
                assert after == before
            raise

    def _warm(self) -> list[object]:
        return [list(cache._slots.warm.items()) for cache in self.caches]

    def check(self) -> None:
        """The books add up, by themselves and against the driver's, and every live row is there."""
        for cache in self.caches:
            cache.check()
        n_stuck = sum(self._n_mapped(stuck) for cache in self.caches for stuck in cache.region.unmapper.stuck)
        n_places = sum(cache.region.table.n_pages(slot) for cache in self.caches for slot in cache.region.table.mapped)
        assert n_places + n_stuck == self.driver.n_live_mappings
        assert self.pool.n_owned == self.driver.n_live_handles
        assert self.pool.n_in_flight == 0
        assert self.pool.n_reused == 0, "pages of the quarantine were handed out"
        assert physical_bytes(self.device) == self.pool.n_owned * self.page_bytes
        self._check_ledger()
        for sequence in self.sequences:
            for rows, expected in self._rows(sequence, sequence.first_token, sequence.n_tokens):
                assert np.array_equal(rows, expected), f"sequence {sequence.number} lost bytes"

    def _n_mapped(self, stuck: Any) -> int:
        """Pages of a stuck range that are mapped; where the region does not know, only the driver does."""
        (address, n_bytes), handles = stuck.range
        places = range(address, address + n_bytes, self.page_bytes)
        return len(handles) if stuck.is_certain else sum(place in self.driver._mapped for place in places)

    def _check_ledger(self) -> None:
        """The ledger, which nobody else charges meanwhile, counts what the pool holds."""
        ledger, (n_bytes, n_mappings) = self.device.ledger, self._ledger_before
        assert ledger.n_bytes - n_bytes == self.pool.n_owned * self.page_bytes
        assert ledger.n_mappings - n_mappings == self.pool.n_mappings

    def end(self) -> None:
        """After `close`: nothing is left but pages whose release failed, and those are counted."""
        n_lost = self.pool.n_quarantined
        left = (self.driver.n_live_mappings, self.driver.n_live_reservations, self.pool.n_mappings)
        assert left == (0, 0, 0), left
        assert self.driver.n_live_handles == n_lost == self.pool.n_owned
        assert physical_bytes(self.device) == n_lost * self.page_bytes
        self._check_ledger()
        for handle in self.pool._quarantined:
            self.device.release(self.page_bytes, [handle])
        self.device.ledger.refund_bytes(n_lost * self.page_bytes)


def active_part(cache: KVCache, but: Collection[SlotId] = ()) -> dict[str, object]:
    """What no failing call may change: all about the slots that belong to sequences."""
    return active_part_of(books(cache), but)


def active_part_of(now: dict[str, Any], but: Collection[SlotId] = ()) -> dict[str, object]:
    """See `active_part`; of these books."""
    active = sorted(now["lengths"].keys() - but)
    part = {
        name: {slot_id: now[name].get(slot_id) for slot_id in active}
        for name in ("lengths", "capacities", "first_tokens", "mapped", "handles", "domains")
    }
    return part | {"budget": now["budget"], "active": active}


def opens_and_closes(story: Story) -> None:
    story.open()
    story.checkpoint()


def prefills(story: Story) -> None:
    story.open()
    story.begin()
    story.grow({0: 37})
    story.checkpoint()


def decodes(story: Story) -> None:
    story.open()
    story.begin()
    story.grow({0: 5})
    for n_tokens in range(6, MAX_TOKENS + 1):
        story.grow({0: n_tokens})
    story.checkpoint()


def grows_several_across_planes(story: Story) -> None:
    story.open()
    for _ in range(3):
        story.begin()
    story.grow({0: 14, 1: 3, 2: 25})
    story.grow({0: 30, 1: 12, 2: 26})
    story.grow({0: 31, 1: MAX_TOKENS, 2: MAX_TOKENS})
    story.checkpoint()


def truncates(story: Story) -> None:
    story.open()
    story.begin()
    story.grow({0: 25})
    story.grow({0: 4})
    story.checkpoint()
    story.grow({0: 20})
    story.grow({0: 38})
    story.checkpoint()


def forks(story: Story) -> None:
    story.open()
    story.begin("same")
    story.grow({0: 33})
    story.fork(0, 33)
    story.fork(1, 20)
    story.checkpoint()
    story.grow({0: 40, 1: 36, 2: 30})
    story.retire(0, waits=True)
    story.checkpoint()
    story.fork(1, 15)
    story.grow({0: 38, 2: 31})
    story.retire(0)
    story.begin("other")
    story.grow({2: 25})
    story.checkpoint()


def forks_and_truncates(story: Story) -> None:
    story.open()
    story.begin()
    story.grow({0: 37})
    story.fork(0, 37)
    story.truncate(1, 21)
    story.grow({1: 30})
    story.checkpoint()
    story.truncate(0, 5)
    story.grow({0: 40})
    story.fork(1, 0)
    story.grow({2: 12})
    story.checkpoint()


def beams_change_places(story: Story) -> None:
    story.open()
    story.begin("same")
    story.grow({0: 34})
    story.fork(0, 10)
    story.grow({1: 34})
    story.share(1, 0)
    story.checkpoint()
    story.grow({0: 38, 1: 38})
    story.share(0, 1)
    story.grow({0: 40, 1: 40})
    story.checkpoint()


def parks(story: Story) -> None:
    story.open()
    story.begin()
    story.grow({0: 34})
    story.fork(0, 30)
    story.vacate(1)
    story.checkpoint()
    story.vacate(0)
    story.checkpoint()


def slides(story: Story) -> None:
    story.open()
    story.begin()
    story.grow({0: 30})
    story.slide(0, 20, waits=True)
    story.checkpoint()
    story.grow({0: 38})
    story.slide(0, 37, waits=False)
    story.grow({0: MAX_TOKENS})
    story.checkpoint()


def retires_and_adopts(story: Story) -> None:
    story.open()
    story.begin("same")
    story.begin()
    story.grow({0: 30, 1: 20})
    story.retire(0, 1, waits=True)
    story.begin("same", 30)  # as it is
    story.begin(None, 20)  # scrubbed
    story.grow({0: 35, 1: 25})
    story.checkpoint()
    story.retire(0)
    story.begin_two()
    story.grow({1: 10, 2: 20})
    story.checkpoint()


def adopts_neighbours(story: Story) -> None:
    story.open()
    story.begin("two")
    story.begin("other")
    story.grow({0: 30, 1: 20})
    story.retire(0, 1)
    story.begin_two()  # one as it is, the other scrubbed
    story.grow({0: 35, 1: 25})
    story.checkpoint()
    story.retire(0, 1)
    story.begin("two", 35)
    story.begin("two", 25)
    story.grow({0: 30, 1: 36})
    story.checkpoint()


def slides_and_adopts(story: Story) -> None:
    story.open(4)
    for _ in range(2):
        story.begin()
    for _ in range(2):
        story.keep_a_spare()
    story.grow({0: 30, 1: 10})
    story.slide(0, 20, waits=False)
    story.retire(0)
    story.begin(None, 0)  # its front is gone: unmapped first
    story.grow({1: 33})
    story.checkpoint()


def reclaims_under_pressure(story: Story) -> None:
    story.open()
    for _ in range(2):
        story.begin()
    story.grow({0: 30, 1: 20})
    story.retire(0)
    story.resize(12)  # warm pages are in the way
    story.begin(None, 0)
    story.grow({1: 20})
    story.checkpoint()
    story.reclaim()
    story.trim()
    story.resize(60)
    story.grow({1: 36})
    story.checkpoint()


def resizes(story: Story) -> None:
    story.open()
    for _ in range(2):
        story.begin()
    story.grow({0: 30, 1: 20})
    story.retire(1)
    story.resize(0)
    story.checkpoint()
    story.resize(100)
    story.begin()
    story.grow({0: 35, 1: 35})
    story.checkpoint()


def premaps(story: Story) -> None:
    story.open()
    for _ in range(2):
        story.begin()
    story.grow({0: 2, 1: 2})
    story.premap({0: 20, 1: 30})
    story.grow({0: 19, 1: 29})
    story.premap({0: MAX_TOKENS})
    story.checkpoint()


def settles(story: Story) -> None:
    story.open()
    for _ in range(2):
        story.begin()
    story.grow({0: 30, 1: 20})
    story.slide(0, 10, waits=False)
    story.retire(1)
    story.settle()
    story.reclaim(3)
    story.checkpoint()


def shares_a_pool(story: Story) -> None:
    story.open(2)
    story.begin()
    story.grow({0: 30})
    story.retire(0)
    story.resize(14)
    story.open(2)
    story.begin()
    story.grow({0: 36})  # reclaims what the other cache left
    story.checkpoint()


def lives_long(story: Story) -> None:
    """Everything a cache can do, on what all of it before has left."""
    story.open()
    story.begin()
    story.grow({0: 12})
    story.begin()
    story.grow({0: 14, 1: 3})
    for n_tokens in (15, 24, MAX_TOKENS):
        story.grow({0: n_tokens})
    story.premap({1: 20})
    story.slide(0, 20, waits=True)
    story.retire(0, waits=True)
    story.retire(0)
    story.begin_two()  # what is warm: of one the front is gone, the other must be scrubbed
    story.grow({0: 10, 1: 30})
    story.checkpoint()
    story.retire(0)
    story.trim()
    story.let_it_own_no_more()
    story.begin(None, 0)
    story.grow({0: 31, 1: 5})  # reclaims what the other one left
    story.checkpoint()
    story.resize(100)
    story.reclaim()
    story.retire(0, 1)
    story.resize(1)
    story.resize(100)
    story.begin()
    story.grow({0: 20})
    story.checkpoint()


SCENARIOS: tuple[Callable[[Story], None], ...] = (
    opens_and_closes,
    prefills,
    decodes,
    grows_several_across_planes,
    truncates,
    forks,
    forks_and_truncates,
    beams_change_places,
    parks,
    slides,
    retires_and_adopts,
    adopts_neighbours,
    slides_and_adopts,
    reclaims_under_pressure,
    resizes,
    premaps,
    settles,
    shares_a_pool,
    lives_long,
)


PLANS: dict[str, Callable[[int], Plan]] = {
    "once": lambda n: fail_once(n, natural_error),
    "from then on": lambda n: fail_from(n, driver_error()),
}

OTHER_PLANS: dict[str, Callable[[int], Plan]] = {
    "once with a driver error": lambda n: fail_once(n, driver_error()),
    "interrupted": lambda n: fail_once(n, interruption),
}

COMPOUND_PLANS: dict[str, Callable[[int], Plan]] = {
    "and the next unmap": lambda n: fail_any(fail_once(n, driver_error()), fail_next("unmap", n, driver_error())),
    "and the next release": lambda n: fail_any(fail_once(n, driver_error()), fail_next("release", n, driver_error())),
    "interrupted, and the next unmap": lambda n: fail_any(
        fail_once(n, interruption), fail_next("unmap", n, driver_error())
    ),
    "interrupted three times": lambda n: fail_any(*(fail_once(n + i, interruption) for i in range(3))),
}


def live(
    device: Driver, plan: Plan, scenario: Callable[[Story], None], kind: str, *, rows: str, keep_freed: bool
) -> Story:
    """Live one scenario from the beginning to the end."""
    story = Story(device, plan, kind, rows=rows, keep_freed=keep_freed, max_pages=200)
    scenario(story)
    story.check()
    story.close()
    story.end()
    return story


def sweep(
    device: Driver,
    kind: str,
    *,
    keep_freed: bool,
    plans: Iterable[str],
    rows: str = "odd",
    scenarios: Iterable[Callable[[Story], None]] = SCENARIOS,
    only: Callable[[Story, str, int], bool] = lambda story, plan, n: True,
) -> Counter[str]:
    """Live every scenario once per injection point and plan; return the number of points per plan, and of faults.

    Args:
        device: What to run on.
        kind: The layout.
        keep_freed: Whether the pool keeps freed pages.
        plans: Names in `PLANS`, `OTHER_PLANS` or `COMPOUND_PLANS`.
        rows: How the rows of a plane lie on its pages, a name in `ROWS`.
        scenarios: What to live.
        only: Whether a point is worth it, given the story lived without faults, the plan and the point's number.
    """
    makers = PLANS | OTHER_PLANS | COMPOUND_PLANS
    counts: Counter[str] = Counter()
    for scenario in scenarios:
        calm = live(device, no_faults, scenario, kind, rows=rows, keep_freed=keep_freed)
        assert calm.n_failed_calls == 0
        baseline = Held.now()
        for name in plans:
            for n in range(1, calm.faulty.n_points + 1):
                if not only(calm, name, n):
                    continue
                try:
                    story = live(device, makers[name](n), scenario, kind, rows=rows, keep_freed=keep_freed)
                    assert story.faulty.faults, "the point was not reached"
                    assert story.held == calm.held, "what the sequences hold differs from a life without faults"
                    assert not Held.now().beyond(baseline)
                except BaseException as error:
                    where = f"{scenario.__name__}, {kind}, {rows} rows, keep_freed={keep_freed}, {name}, point {n}"
                    raise AssertionError(f"{where}: {error!r}") from error
                counts[name] += 1
                counts["faults"] += len(story.faulty.faults)
                counts["compound"] += len(story.faulty.faults) > 1
                counts["quarantined"] += story.pool.n_quarantined
                counts["reused"] += story.pool.n_reused
        counts["points"] += calm.faulty.n_points
    assert physical_bytes(device) == 0
    return counts
