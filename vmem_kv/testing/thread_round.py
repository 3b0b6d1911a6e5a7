"""One round of several threads on one cache and pool: what no model can predict, held against tags and books.

Each thread steps sequences of its own: grows, forks, truncates, slides and ends them, and lets them go on from each
other. Forks are handed on to other threads, so that pages lie under sequences of several; fences pass when anybody lets
them; anybody maps ahead for anybody. So calls meet in the middle of each other wherever they may.

Guarantees
  * Before a sequence writes a row, the row must be zero, or what its own domain left in this slot; after whatever
    was done to it, its rows must carry their tags.
  * At the end of a round the books, the driver's own count and the ledger must agree, and nothing may be left.
  * What the threads choose is a function of the seed; the order in which they come is not.
  * An interruption (Ctrl-C) ends all threads before it goes on its way.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import PASSED, Driver
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.errors import CapacityError, DriverError, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.sharing import tail_copies
from vmem_kv.testing.faults import FaultyDriver, Plan, Point, driver_error, no_faults
from vmem_kv.testing.memory import KernelFence, ManualFence
from vmem_kv.testing.operations import KINDS, MAX_TOKENS, ROWS, Totals
from vmem_kv.testing.shadow import ShadowTags, words_of

SWITCH_INTERVAL_S = 1e-6
"""How often threads are switched."""


class ThreadRound:
    """Several threads on one cache and pool, for some operations each.

    Args:
        driver: What to work on; it is not closed.
        seed: All that is chosen depends on it.
        n_ops: How many operations, of all threads together.
        n_threads: How many threads.
        fault_share: As in `StressOptions`.
    """

    def __init__(self, driver: Driver, seed: int, n_ops: int, n_threads: int, fault_share: float) -> None:
        choose = random.Random(seed)
        self.faulty = FaultyDriver(driver)
        # An operation is some points: a share of 15 % of all operations is far less of all points.
        self._faults = _random_faults(seed, fault_share / 20)
        self.driver = CheckedDriver(self.faulty)
        self._ledger_before = (driver.ledger.n_bytes, driver.ledger.n_mappings)
        page_bytes = driver.info.granularity_bytes
        self.pool = PagePool(self.driver, page_bytes, choose.randint(30, 90), keep_freed=choose.random() < 0.5)
        layout = ROWS[choose.choice(tuple(ROWS))](choose.choice(KINDS), page_bytes, n_slots=4 * n_threads)
        self.cache = KVCache(self.pool, layout)
        self.base = driver
        self.tags = ShadowTags(layout, words_of(driver, self.cache.region.reservation))
        self.fences: deque[ManualFence] = deque()
        self.offered: deque[_Sequence] = deque()
        """Forks that any thread may take over."""
        self.must_stop = False
        share = max(1, n_ops // n_threads)
        self.workers = [_Worker(self, i, seed + i, share) for i in range(n_threads)]

    def run(self, totals: Totals) -> None:
        """Work, then give everything back.

        Args:
            totals: What was done is added here, whatever comes of it.

        Raises:
            Exception: The first thing that went wrong, in whatever thread.
        """
        threads = [threading.Thread(target=worker, name=f"stress-{i}") for i, worker in enumerate(self.workers)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self.faulty.plan = self._faults
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C: no thread may outlive it, or the process would wait for the round all the same
            self.must_stop = True
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        finally:
            sys.setswitchinterval(interval)
            totals.n_ops += sum(worker.n_done for worker in self.workers)
            totals.n_checks += self.tags.n_checks
            totals.n_faults += len(self.faulty.faults)
        for worker in self.workers:
            if worker.error is not None:
                raise worker.error
        self._finish()

    def pass_fence(self) -> bool:
        """Let the fence pass that waits longest; return whether there was one."""
        try:
            self.fences.popleft().pass_()
        except IndexError:
            return False
        return True

    def _finish(self) -> None:
        self.faulty.plan = no_faults
        for worker in self.workers:
            worker.verify_all()
        for sequence in self.offered:
            self.tags.verify(sequence.slot_id, sequence.first_token, sequence.n_tokens)
        while self.pass_fence():
            pass
        self.cache.retire(self.cache.active_slots(), PASSED)
        self.cache.check()
        self.cache.close()
        self.pool.trim()
        lost = list(self.pool._quarantined)
        left = (self.driver.n_live_mappings, self.driver.n_live_reservations, self.pool.n_mappings)
        if left != (0, 0, 0) or not self.driver.n_live_handles == len(lost) == self.pool.n_owned:
            raise AssertionError(f"left are {left} and {self.driver.n_live_handles} pages, {len(lost)} of them known")
        ledger, (n_bytes, n_mappings) = self.base.ledger, self._ledger_before
        counted, held = ledger.n_bytes - n_bytes, self.pool.n_owned * self.pool.page_bytes
        if (counted, ledger.n_mappings) != (held, n_mappings):
            raise AssertionError(
                f"the ledger counts {counted} bytes and {ledger.n_mappings - n_mappings} mappings, "
                f"the pool holds {held} bytes and none"
            )
        for handle in lost:
            self.base.release(self.pool.page_bytes, [handle])
        ledger.refund_bytes(held)


def _random_faults(seed: int, share: float) -> Plan:
    """Fail a share of all points. Which ones depends on seed and number alone, in whatever order threads come."""

    def plan(point: Point) -> BaseException | None:
        is_hit = random.Random(seed << 32 | point.n).random() < share
        return driver_error()(point) if is_hit else None

    return plan


@dataclass(slots=True, eq=False)
class _Sequence:
    """A sequence, and who writes it: one thread at a time."""

    slot_id: SlotId
    domain: str
    n_tokens: int = 0
    first_token: int = 0


class _Worker:
    """One thread."""

    def __init__(self, around: ThreadRound, index: int, seed: int, n_ops: int) -> None:
        self.around, self.tags, self.cache, self.n_ops = around, around.tags, around.cache, n_ops
        self.n_done = 0
        self.error: Exception | None = None
        self._choose = random.Random(seed)
        self._domain = str(index)
        self._sequences: list[_Sequence] = []
        self._numbers = count(index << 20 | 1)
        """A number for each row that is written: no two of them are alike, in whatever slots they lie."""

    def __call__(self) -> None:
        """Do all operations."""
        try:
            self.around.driver.bind_thread()
        except DriverError:
            return  # an injected fault; this thread has no device, and did nothing
        try:
            while self.n_done < self.n_ops and not self.around.must_stop:
                self._step()
                self.n_done += 1
        except Exception as error:
            self.error = error
            self.around.must_stop = True  # what goes on now may end the process before this is told

    def verify_all(self) -> None:
        """Look at all rows of this thread's sequences."""
        for sequence in self._sequences:
            self._verify(sequence)

    def _step(self) -> None:
        kind = self._choose.random()
        try:
            if not self._sequences or kind < 0.1:
                self._begin()
            elif kind < 0.2:
                self._step_of_all(kind)
            else:
                sequence = self._choose.choice(self._sequences)
                self._on(sequence, next(step for end, step in self._steps() if kind < end))
        except (CapacityError, DriverError) as error:
            if isinstance(error, DriverError) and (error.name == "ETIMEDOUT" or not self.around.faulty.faults):
                raise  # it waited for another thread in vain, or nobody made it fail
            while self.around.pass_fence():
                pass

    def _steps(self) -> tuple[tuple[float, Callable[[_Sequence], object]], ...]:
        """What is done to one sequence, and up to which number of those between 0.2 and 1."""
        return (
            (0.5, self._grow),
            (0.64, self._fork),
            (0.72, self._truncate),
            (0.76, self._share),
            (0.84, self._slide),
            (0.86, self._vacate),
            (0.9, self._offer),
            (1.0, self._retire),
        )

    def _step_of_all(self, kind: float) -> None:
        """Do something that is nobody's own, `kind` from 0.1 to 0.2."""
        choose, around = self._choose, self.around
        if kind < 0.13:
            n_slots = self.cache.layout.n_slots
            slots = choose.sample(range(n_slots), 4)  # whoever's they are, as a mapper does
            self.cache.premap(dict.fromkeys(map(SlotId, slots), choose.randint(1, MAX_TOKENS)))
        elif kind < 0.15:
            around.pass_fence()
        elif kind < 0.17:
            self.cache.reclaim(choose.randint(1, 10))
        elif kind < 0.18:
            around.pool.trim(choose.randint(1, 5))
        elif kind < 0.19:
            around.pool.resize(choose.randint(30, 90))
        else:
            self.cache.check()

    def _begin(self) -> None:
        """Take over what somebody offers, or begin anew."""
        try:
            self._sequences.append(self.around.offered.popleft())
        except IndexError:
            expected_tokens = self._choose.choice((0, 10, 48))
            slot_id = self.cache.acquire(expected_tokens=expected_tokens, domain=self._domain)
            self.tags.adopt(slot_id, self._domain)
            self._sequences.append(_Sequence(slot_id, self._domain))

    def _on(self, sequence: _Sequence, step: Callable[[_Sequence], object]) -> None:
        """Make a step with a sequence. If it broke, now or when somebody mapped ahead for it, it ends."""
        try:
            step(sequence)
        except (UsageError, DriverError) as error:
            if sequence.slot_id not in self.cache.region.broken:
                raise
            if sequence in self._sequences:
                self._cut(sequence)
                self._retire(sequence)
            if isinstance(error, DriverError):
                raise

    def _cut(self, sequence: _Sequence) -> None:
        """Note what a broken sequence has lost."""
        sequence.n_tokens = min(sequence.n_tokens, self.cache.n_tokens(sequence.slot_id))
        sequence.first_token = min(sequence.first_token, sequence.n_tokens)

    def _grow(self, sequence: _Sequence) -> None:
        slot_id, n_tokens = sequence.slot_id, sequence.n_tokens
        longer = min(MAX_TOKENS, n_tokens + self._choose.randint(1, 12))
        self.cache.ensure({slot_id: longer})
        sequence.n_tokens = longer
        self.tags.require_clean(slot_id, n_tokens, longer)
        self.tags.write(slot_id, n_tokens, longer, next(self._numbers))
        self._verify(sequence)

    def _fork(self, sequence: _Sequence) -> None:
        n_tokens = self._length(sequence)
        target = self.cache.fork(sequence.slot_id, n_tokens)
        self.tags.forget(target)  # a fork has nothing that lay there
        self.tags.adopt(target, sequence.domain)
        self.tags.fork(sequence.slot_id, target, n_tokens)
        fork = _Sequence(target, sequence.domain, n_tokens, sequence.first_token)
        self._verify(sequence)
        self._verify(fork)
        (self._sequences if self._choose.random() < 0.5 else self.around.offered).append(fork)

    def _truncate(self, sequence: _Sequence) -> None:
        n_tokens = self._length(sequence)
        self.cache.truncate(sequence.slot_id, n_tokens, _kernel())
        sequence.n_tokens = n_tokens
        self._verify(sequence)

    def _share(self, target: _Sequence) -> None:
        """Let a sequence go on from another one of its domain, if there is one."""
        sources = [s for s in self._sequences if s is not target and self._can_share(s, target)]
        if not sources:
            return
        source, n_tokens = self._choose.choice(sources), target.n_tokens
        self._on(source, lambda source: self._share_with(source, target, n_tokens))

    def _share_with(self, source: _Sequence, target: _Sequence, n_tokens: int) -> None:
        self.cache.share({target.slot_id: source.slot_id}, n_tokens, _kernel())
        base = self.cache.region.reservation.base
        self.around.base.copy(tail_copies(self.cache.layout, base, source.slot_id, target.slot_id, n_tokens))
        self.tags.fork(source.slot_id, target.slot_id, n_tokens)
        self._verify(source)
        self._verify(target)

    def _can_share(self, source: _Sequence, target: _Sequence) -> bool:
        return (
            source.domain == target.domain
            and source.n_tokens >= target.n_tokens
            and source.first_token == target.first_token == 0
        )

    def _slide(self, sequence: _Sequence) -> None:
        if sequence.n_tokens > sequence.first_token:
            first_token = self._choose.randint(sequence.first_token + 1, sequence.n_tokens)
            sequence.first_token = first_token
            self.cache.slide(sequence.slot_id, first_token, self._fence())
            self._verify(sequence)

    def _vacate(self, sequence: _Sequence) -> None:
        sequence.n_tokens = sequence.first_token = 0
        self.cache.vacate(sequence.slot_id, _kernel())
        self.tags.forget(sequence.slot_id)

    def _offer(self, sequence: _Sequence) -> None:
        self._sequences.remove(sequence)
        self.around.offered.append(sequence)

    def _retire(self, sequence: _Sequence) -> None:
        self._verify(sequence)
        self._sequences.remove(sequence)
        self.cache.retire(sequence.slot_id, self._fence())

    def _fence(self) -> ManualFence:
        """A fence that has passed, or that anybody will let pass."""
        fence = ManualFence()
        if self._choose.random() < 0.5:
            fence.pass_()
        self.around.fences.append(fence)
        return fence

    def _length(self, sequence: _Sequence) -> int:
        if self._choose.random() < 0.5:
            return sequence.n_tokens
        return self._choose.randint(sequence.first_token, sequence.n_tokens)

    def _verify(self, sequence: _Sequence) -> None:
        self.tags.verify(sequence.slot_id, sequence.first_token, sequence.n_tokens)


def _kernel() -> KernelFence:
    """A kernel that ends when it is waited for, after the others had their turn."""
    return KernelFence(lambda: time.sleep(0))
