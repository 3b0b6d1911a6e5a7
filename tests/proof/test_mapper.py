"""The mapper thread: switched as often as possible, killed at each of its steps, and watched for deadlocks."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.errors import OutOfPages, OutOfSlots
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.premap import Premapper
from vmem_kv.testing import FaultyDriver, Plan, Point, driver_error, no_faults
from vmem_kv.testing.operations import MAX_TOKENS, odd_layout
from vmem_kv.testing.shadow import HostWords, ShadowTags
from vmem_kv.testing.stress import StressOptions, run_stress

from ..core.subprocesses import TIMEOUT_S, run_python
from .conftest import Record
from .drivers import open_driver, physical_bytes

pytestmark = pytest.mark.timeout(900)  # of a busy machine

N_STEPS = 1500


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Killed(BaseException):
    """What kills the mapper where it stands: not an Exception, so that nothing can mistake it for one of ours."""


class Decoding:
    """A batch that decodes with a mapper beside it, every row tagged and verified at every step."""

    def __init__(self, device: Driver, plan: Plan = no_faults, *, max_pages: int = 90) -> None:
        self.faulty = FaultyDriver(device, plan)
        self.driver = CheckedDriver(self.faulty)
        page = device.info.granularity_bytes
        layout = odd_layout("per_layer", page, n_slots=4)
        self.cache = KVCache(PagePool(self.driver, page, max_pages, keep_freed=True), layout)
        self.tags = ShadowTags(layout, HostWords(self.cache.region.reservation))
        self.lengths: dict[SlotId, int] = {}
        self.n_sequences = 0
        self.choose = random.Random(3)

    def step(self, premapper: Premapper, *, in_turns: bool = False) -> None:
        cache, lengths = self.cache, self.lengths
        while len(lengths) < 3:
            self.n_sequences += 1
            lengths[self._acquire(premapper, str(self.n_sequences % 2))] = 0
        wanted = {s: min(MAX_TOKENS, n + self.choose.randint(1, 3)) for s, n in lengths.items()}
        cache.ensure(wanted)
        for slot_id, n_tokens in wanted.items():
            self.tags.write(slot_id, lengths[slot_id], n_tokens, slot_id + 1)
            self.tags.verify(slot_id, 0, n_tokens)
        lengths.update(wanted)
        premapper.request(wanted)
        if in_turns:
            assert premapper.wait_idle(TIMEOUT_S)
        for slot_id in [s for s, n in wanted.items() if n == MAX_TOKENS]:
            del lengths[slot_id]
            cache.retire(slot_id)  # perhaps while the mapper maps for it
            cache.reclaim(1000)  # or there would soon be nothing left to map

    def _acquire(self, premapper: Premapper, domain: str) -> SlotId:
        """As an engine does: the one slot that nobody has may be the mapper's, or a kernel's, for another moment."""
        try:
            return self.cache.acquire(expected_tokens=40, domain=domain)
        except OutOfSlots:
            assert premapper.wait_idle(TIMEOUT_S)
            self.cache.settle()
            return self.cache.acquire(expected_tokens=40, domain=domain)

    def close(self) -> None:
        self.faulty.plan = no_faults
        self.cache.retire(self.cache.active_slots())
        self.cache.check()
        self.cache.close()
        self.cache.pool.trim()
        driver = self.driver
        assert (driver.n_live_mappings, driver.n_live_reservations, driver.n_live_handles) == (0, 0, 0)


def decode_with_the_mapper(driver: Driver, driver_name: str, n_steps: int, record: Record) -> None:
    """Decode a batch for so many steps with the mapper at its heels."""
    decoding = Decoding(driver)
    with Premapper(decoding.cache, 6) as premapper:
        for _ in range(n_steps):
            decoding.step(premapper)
        assert premapper.wait_idle(TIMEOUT_S)
        assert premapper.error is None
    decoding.close()
    assert premapper.n_pages > 100
    record(
        "mapper thread beside a decoding batch",
        driver_name,
        steps=n_steps,
        sequences=decoding.n_sequences,
        pages_mapped_ahead=premapper.n_pages,
        tags_verified=decoding.tags.n_checks,
    )


def test_a_batch_decodes_with_the_mapper_at_its_heels(driver: Driver, driver_name: str, record: Record) -> None:
    decode_with_the_mapper(driver, driver_name, N_STEPS, record)


def decode_in_lockstep(device: Driver, plan: Plan) -> tuple[Decoding, Premapper]:
    """Steps and the mapper take turns, so that its steps have numbers."""
    decoding = Decoding(device, plan)
    premapper = Premapper(decoding.cache, 6)
    premapper.start()
    for _ in range(25):
        decoding.step(premapper, in_turns=True)
    premapper.stop()
    return decoding, premapper


def test_the_mapper_may_be_killed_at_each_of_its_steps(driver: Driver, driver_name: str, record: Record) -> None:
    n_steps = 0

    def count(point: Point) -> None:
        nonlocal n_steps
        n_steps += threading.current_thread().name == "vmem_kv-premap"

    calm, _ = decode_in_lockstep(driver, count)
    lengths = dict(calm.lengths)
    calm.close()
    assert n_steps > 50
    for make_error in (lambda point: Killed(), driver_error()):
        for n in range(1, n_steps + 1):
            seen = 0

            def kill(point: Point, n: int = n, make_error: object = make_error) -> BaseException | None:
                nonlocal seen
                seen += threading.current_thread().name == "vmem_kv-premap"
                is_here = seen == n and threading.current_thread().name == "vmem_kv-premap"
                return make_error(point) if is_here else None  # type: ignore[operator]

            decoding, premapper = decode_in_lockstep(driver, kill)
            assert premapper.error is not None, f"step {n}"
            assert not premapper.is_alive
            assert decoding.lengths == lengths, f"step {n}"
            decoding.close()
    assert physical_bytes(driver) == 0
    record("mapper killed, by an exception and by a driver error", driver_name, steps=n_steps, times_killed=2 * n_steps)


def work_in_threads(
    driver_name: str, fault_share: float, seed: int, n_ops: int, n_threads: int, record: Record
) -> None:
    """Do so many operations, every other round of them by several threads at a time."""
    options = StressOptions(driver_name, seed, n_ops, None, fault_share, n_threads=n_threads)
    progress = run_stress(options, lambda: open_driver(driver_name))
    assert progress.findings == []
    assert n_ops <= progress.n_ops < n_ops + 10  # a step that parks does more than one
    record(
        f"{n_threads} threads on one pool",
        driver_name,
        operations=progress.n_ops,
        faults=progress.n_faults,
        tags_verified=progress.n_checks,
        findings=len(progress.findings),
    )


@pytest.mark.parametrize("fault_share", [0.0, 0.3])
def test_threads_on_one_pool_lose_nothing(driver_name: str, fault_share: float, record: Record) -> None:
    work_in_threads(driver_name, fault_share, 1, 20_000, 4, record)


def test_threads_find_a_planted_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that looks at its free pages, lets others in, and takes them then."""
    take = PagePool.take

    def racy(pool: PagePool, places: list[int]) -> object:
        if pool.n_free >= len(places) > 0:
            handles = pool._free[-len(places) :]
            threading.Event().wait(1e-4)
            pool._free = [handle for handle in pool._free if handle not in handles]
            pool.n_in_flight += len(places)
            return handles, len(places)
        return take(pool, places)

    monkeypatch.setattr(PagePool, "take", racy)
    options = StressOptions("native", 1, 20_000, None, 0.0, n_threads=4)
    assert run_stress(options, lambda: open_driver("native")).findings


WATCHED = """
import faulthandler, threading
faulthandler.dump_traceback_later({limit}, exit=True)
from tests.proof.drivers import open_driver
from vmem_kv.pages import PagePool
from vmem_kv.testing.stress import StressOptions, run_stress
{planted}
options = StressOptions("native", 5, 6_000, None, 0.1, n_threads=6)
progress = run_stress(options, lambda: open_driver("native"))
assert not progress.findings, progress.findings
print("ended", progress.n_ops)
"""


def test_nothing_waits_for_ever() -> None:
    done = run_python(WATCHED.format(limit=400, planted=""))
    assert (done.returncode, done.stdout) == (0, "ended 6000\n"), done.stderr


def test_the_watchdog_sees_a_planted_deadlock() -> None:
    planted = """
trim = PagePool.trim
def stuck(pool, n_pages=None):
    faulthandler.dump_traceback_later(4, exit=True)  # from here on, however long the machine took to come here
    with pool.lock:
        return trim(pool, n_pages)
PagePool.trim = stuck
"""
    done = run_python(WATCHED.format(limit=400, planted=planted))
    assert done.returncode != 0
    assert "Timeout" in done.stderr
    assert "in trim" in done.stderr


def test_a_mapper_without_room_skips_and_the_step_raises() -> None:
    decoding = Decoding(open_driver("native"), max_pages=14)

    def decode(premapper: Premapper) -> None:
        for _ in range(40):
            decoding.step(premapper, in_turns=True)

    with Premapper(decoding.cache, 30) as premapper:
        with pytest.raises(OutOfPages):
            decode(premapper)
        assert premapper.n_skipped > 0
    decoding.close()
