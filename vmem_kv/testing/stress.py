"""Random operations for as long as wanted, with faults and threads, and what was found: the engine of a command.

With one thread every operation is held against the reference model (`operations.py`); one round in four has a host
tier, files and sessions as well (`tier_operations.py`). With more, every other round, beginning with the first, lets
threads work on one pool at a time: no model can say who comes first, so there each thread verifies the tags of its own
sequences, and at the end of a round everything must add up, the ledger too, and nothing may be left.

Guarantees: ends early when asked, with everything given back and the verdict so far. A finding of a single thread comes
with a program that repeats it, shortened; of several threads only the round can be named: what they choose repeats, the
order in which they come does not. An interruption (Ctrl-C) ends the threads of a round before it goes on its way.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import PASSED, Driver
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.errors import CapacityError, DriverError, UsageError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.testing.clock import Clock
from vmem_kv.testing.faults import FaultyDriver, Plan, Point, driver_error, no_faults
from vmem_kv.testing.memory import ManualFence
from vmem_kv.testing.operations import KINDS, MAX_TOKENS, ROWS, Found, Run, Totals, random_run
from vmem_kv.testing.shadow import ShadowTags, words_of
from vmem_kv.testing.shrink import shrink_run
from vmem_kv.testing.tier_operations import TieredRun

OPS_OF_ROUND = 300
"""Operations between two looks at the clock."""

TIERED_ROUNDS = 4
"""Of so many rounds, the last one parks sequences and brings them back as well."""

SWITCH_INTERVAL_S = 1e-6
"""How often threads are switched in rounds of several."""


@dataclass(frozen=True, slots=True)
class StressOptions:
    """What to do; see `run_stress`."""

    driver_name: str = "host"
    seed: int = 1
    n_ops: int | None = 100_000
    seconds: float | None = None
    fault_share: float = 0.15
    n_threads: int = 1
    first_round: int = 0
    """Where to begin; a round depends on its number and the seed alone, and on the operations left for it."""


@dataclass(slots=True)
class Finding:
    """Something is wrong.

    Attributes:
        what: In one line.
        seed: Of the round in which it showed.
        program: Python that repeats it; empty where threads found it.
        round: The number of that round.
        n_ops: Operations that were left for it.
    """

    what: str
    seed: int
    program: str = ""
    round: int = 0
    n_ops: int = 0


@dataclass(slots=True)
class Progress:
    """What was done so far, and what was found.

    Attributes:
        n_ops: Operations that were done, in all rounds.
        n_threaded_ops: Those of them in rounds of several threads.
    """

    n_ops: int = 0
    n_threaded_ops: int = 0
    n_faults: int = 0
    n_pages: int = 0
    n_checks: int = 0
    n_rounds: int = 0
    seconds: float = 0.0
    was_stopped: bool = False
    findings: list[Finding] = field(default_factory=list)


def run_stress(
    options: StressOptions,
    open_driver: Callable[[], Driver],
    *,
    on_progress: Callable[[Progress], bool] = lambda progress: True,
    clock: Clock = time.monotonic,
) -> Progress:
    """Work until the operations or the time are used up, something is found, or `on_progress` says False.

    Args:
        options: What to do.
        open_driver: Opens the driver to work on; closed in the end, unless something was found.
        on_progress: Called after each round.
        clock: Measures the time.
    """
    progress, begin = Progress(), clock()
    driver = open_driver()
    opener = f"open_driver({options.driver_name!r})"
    while not progress.findings:
        left = OPS_OF_ROUND if options.n_ops is None else min(OPS_OF_ROUND, options.n_ops - progress.n_ops)
        is_over = options.seconds is not None and progress.seconds >= options.seconds
        if left <= 0 or is_over:
            break
        number = options.first_round + progress.n_rounds
        seed = options.seed * 1_000_003 + number
        is_threaded = options.n_threads > 1 and number % 2 == 0
        try:
            if is_threaded:
                totals = _ThreadRound(driver, seed, left, options).run()
            else:
                run_type = TieredRun if number % TIERED_ROUNDS == TIERED_ROUNDS - 1 else Run
                totals = random_run(
                    seed, left, driver, fault_share=options.fault_share, run_type=run_type, opener=opener
                )
        except Found as found:
            progress.findings.append(_shortened(found, seed, number, left, open_driver, opener))
        except Exception as error:
            progress.findings.append(Finding(f"{type(error).__name__}: {error}", seed, round=number, n_ops=left))
        else:
            progress.n_ops += totals.n_ops
            progress.n_threaded_ops += totals.n_ops if is_threaded else 0
            progress.n_faults += totals.n_faults
            progress.n_pages += totals.n_pages
            progress.n_checks += totals.n_checks
        progress.n_rounds += 1
        progress.seconds = clock() - begin
        if not on_progress(progress):
            progress.was_stopped = True
            break
    if not progress.findings:
        driver.close()
    return progress


def _shortened(
    found: Found, seed: int, number: int, n_ops: int, open_driver: Callable[[], Driver], opener: str
) -> Finding:
    run = found.run
    run.history = shrink_run(open_driver, run.settings, run.history, type(run))
    return Finding(found.what, seed, run.program(opener), number, n_ops)


def _random_faults(seed: int, share: float) -> Plan:
    """Fail a share of all points. Which ones depends on seed and number alone, in whatever order threads come."""

    def plan(point: Point) -> BaseException | None:
        is_hit = random.Random(seed << 32 | point.n).random() < share
        return driver_error()(point) if is_hit else None

    return plan


class _ThreadRound:
    """Several threads on one cache and pool, for some operations each."""

    def __init__(self, driver: Driver, seed: int, n_ops: int, options: StressOptions) -> None:
        choose = random.Random(seed)
        # An operation is some points: a share of 15 % of all operations is far less of all points.
        self.faulty = FaultyDriver(driver, _random_faults(seed, options.fault_share / 20))
        self.driver = CheckedDriver(self.faulty)
        self._ledger_before = (driver.ledger.n_bytes, driver.ledger.n_mappings)
        page_bytes = driver.info.granularity_bytes
        self.pool = PagePool(self.driver, page_bytes, choose.randint(30, 90), keep_freed=choose.random() < 0.5)
        layout = ROWS[choose.choice(tuple(ROWS))](choose.choice(KINDS), page_bytes, n_slots=2 * options.n_threads)
        self.cache = KVCache(self.pool, layout)
        self.base = driver
        share = max(1, n_ops // options.n_threads)
        self.workers = [
            _Worker(self, ShadowTags(layout, words_of(driver, self.cache.region.reservation)), seed + i, share)
            for i in range(options.n_threads)
        ]

    def run(self) -> Totals:
        """Work, then give everything back.

        Raises:
            Exception: The first thing that went wrong, in whatever thread.
        """
        threads = [threading.Thread(target=worker, name=f"stress-{i}") for i, worker in enumerate(self.workers)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C: no thread may outlive it, or the process would wait for the round all the same
            for worker in self.workers:
                worker.must_stop = True
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        finally:
            sys.setswitchinterval(interval)
        for worker in self.workers:
            if worker.error is not None:
                raise worker.error
        self._finish()
        totals = Totals()
        totals.n_ops = sum(worker.n_done for worker in self.workers)
        totals.n_checks = sum(worker.tags.n_checks for worker in self.workers)
        totals.n_faults = len(self.faulty.faults)
        return totals

    def _finish(self) -> None:
        self.faulty.plan = no_faults
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


class _Worker:
    """One thread's sequences: grows them, tags their rows, verifies them, retires them."""

    def __init__(self, around: _ThreadRound, tags: ShadowTags, seed: int, n_ops: int) -> None:
        self.around, self.tags, self.n_ops = around, tags, n_ops
        self.n_done = 0
        self.must_stop = False
        self.error: Exception | None = None
        self._choose = random.Random(seed)
        self._lengths: dict[SlotId, int] = {}
        self._fences: list[ManualFence] = []
        self._number = seed & 0xFFFF

    def __call__(self) -> None:
        """Do all operations."""
        try:
            self.around.driver.bind_thread()
        except DriverError:
            return  # an injected fault; this thread has no device, and did nothing
        try:
            for _ in range(self.n_ops):
                if self.must_stop:
                    return
                self._step()
                self.n_done += 1
            for fence in self._fences:
                fence.pass_()
        except Exception as error:
            self.error = error

    def _step(self) -> None:
        choose, cache, kind = self._choose, self.around.cache, self._choose.random()
        try:
            if not self._lengths or kind < 0.15:
                slot_id = cache.acquire(expected_tokens=choose.choice((0, 10, 48)), domain=str(self._number))
                self._lengths[slot_id] = 0
            elif kind < 0.7:
                self._grow(choose.choice(list(self._lengths)))
            elif kind < 0.75:
                cache.premap(dict.fromkeys(self._lengths, choose.randint(1, MAX_TOKENS)))
            elif kind < 0.85:
                self._retire(choose.choice(list(self._lengths)))
            elif kind < 0.9:
                cache.reclaim(choose.randint(1, 10))
            elif kind < 0.93:
                self.around.pool.trim(choose.randint(1, 5))
            elif kind < 0.95:
                self.around.pool.resize(choose.randint(30, 90))
            else:
                cache.check()
        except (CapacityError, DriverError):
            while self._fences:
                self._fences.pop().pass_()

    def _grow(self, slot_id: SlotId) -> None:
        n_tokens = self._lengths[slot_id]
        longer = min(MAX_TOKENS, n_tokens + self._choose.randint(1, 12))
        try:
            self.around.cache.ensure({slot_id: longer})
        except UsageError:
            if slot_id not in self.around.cache.region.broken:
                raise
            self._retire(slot_id)
            return
        self._lengths[slot_id] = longer
        self.tags.write(slot_id, n_tokens, longer, self._number)
        self.tags.verify(slot_id, 0, longer)

    def _retire(self, slot_id: SlotId) -> None:
        self.tags.verify(slot_id, 0, self._lengths[slot_id])
        fence = ManualFence()
        del self._lengths[slot_id]
        if self._choose.random() < 0.5:
            fence.pass_()
        self._fences.append(fence)
        self.around.cache.retire(slot_id, fence)
