"""Several threads on one pool, switched as often as the interpreter can."""

from __future__ import annotations

import contextlib
import faulthandler
import random
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Handle
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import CapacityError, OutOfSlots
from vmem_kv.growth import SlotId
from vmem_kv.premap import Premapper
from vmem_kv.testing import ManualFence

from ..held import Held
from .bench import PAGE, Bench, OpenBench, make_layout

N_WORKERS = 4
N_ROUNDS = 120
WATCHDOG_S = 500


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    """Switch threads all the time; if they wait for each other for good, say where and die."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    sys.setswitchinterval(before)


def run_all(*targets: Callable[[], None]) -> None:
    """Run functions in a thread each; the first exception is raised here."""
    errors: list[BaseException] = []

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[target]) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class Owner:
    """Steps its own sequences: grows, writes its byte everywhere, looks whether it is still there, retires."""

    def __init__(self, bench: Bench, cache: KVCache, number: int, premapper: Premapper | None = None) -> None:
        self.bench, self.cache, self.premapper = bench, cache, premapper
        self.choose = random.Random(number)
        self.fill = number + 1
        self.fences: list[ManualFence] = []
        self.n_full = 0

    def __call__(self) -> None:
        for _ in range(N_ROUNDS):
            try:
                slot_id = self.cache.acquire(expected_tokens=self.choose.choice((0, 10, 48)), domain=str(self.fill))
            except OutOfSlots:
                self.n_full += 1
                self.pass_fences()
                continue
            self.live(slot_id)
            if self.choose.random() < 0.5:
                self.cache.retire(slot_id)
            else:
                self.fences.append(fence := ManualFence())
                self.cache.retire(slot_id, fence)
            if self.choose.random() < 0.5:
                self.pass_fences()
        self.pass_fences()

    def live(self, slot_id: SlotId) -> None:
        n_tokens = first = 0
        for _ in range(self.choose.randint(1, 5)):
            longer = min(48, n_tokens + self.choose.randint(1, 20))
            try:
                self.cache.ensure({slot_id: longer})
            except CapacityError:
                self.n_full += 1
                continue
            rows = self.rows(slot_id)
            for address, n_bytes in rows:
                for token in range(first, n_tokens):
                    seen = set(self.bench.memory.read(address + token * n_bytes, n_bytes))
                    assert seen == {self.fill}, f"{self.fill} shows {seen}"
                for token in range(n_tokens, longer):
                    seen = set(self.bench.memory.read(address + token * n_bytes, n_bytes))
                    assert seen <= {0, self.fill}, f"the domain {self.fill} sees the bytes of {seen}"
                    self.bench.memory.write(address + token * n_bytes, bytes([self.fill]) * n_bytes)
            n_tokens = longer
            if self.premapper is not None:
                self.premapper.request({slot_id: n_tokens})
            if self.choose.random() < 0.2 and n_tokens > first + 2:
                first += self.choose.randint(1, n_tokens - first - 1)
                self.fences.append(fence := ManualFence())
                self.cache.slide(slot_id, first, fence)

    def rows(self, slot_id: SlotId) -> list[tuple[int, int]]:
        base = self.cache.region.reservation.base
        planes = self.cache.layout.planes
        return [(base + p.base_bytes + slot_id * p.span_bytes, p.token_bytes) for p in planes]

    def pass_fences(self) -> None:
        for fence in self.fences:
            fence.pass_()
        self.fences.clear()


@pytest.mark.parametrize("keep_freed", [False, True])
def test_many_threads_share_a_pool_and_the_books_add_up(open_bench: OpenBench, keep_freed: bool) -> None:
    first = open_bench()  # the emulated device has a memory file from its first page on
    first.cache.retire(first.grown(1))
    first.close()
    baseline = Held.now()
    bench = open_bench(max_pages=70, keep_freed=keep_freed, n_slots=6)
    other = KVCache(bench.pool, make_layout("token_major", n_slots=4))
    done = threading.Event()

    def press() -> None:
        """Reclaim, trim and change the budget against everybody."""
        choose = random.Random(99)
        while not done.is_set():
            choose.choice((bench.cache, other)).reclaim(choose.randint(1, 10))
            bench.pool.trim(choose.randint(1, 5))
            with contextlib.suppress(CapacityError):
                bench.pool.resize(choose.randint(40, 90))
            bench.cache.check()
            other.check()
            stats = bench.cache.stats()
            assert stats.n_owned_pages <= stats.max_pages

    with Premapper(bench.cache, 16) as premapper:
        owners = [
            Owner(bench, cache, number, premapper if cache is bench.cache else None)
            for number, cache in enumerate([bench.cache, bench.cache, bench.cache, other])
        ]

        def work() -> None:
            try:
                run_all(*owners)
            finally:
                done.set()

        run_all(work, press)
        assert premapper.wait_idle()
        assert premapper.error is None
    bench.cache.reclaim(0)
    other.reclaim(0)
    bench.cache.check()
    other.check()
    assert bench.cache.stats().n_in_flight_pages == 0
    assert bench.pool.n_quarantined == 0
    other.close()
    bench.close()
    assert not Held.now().beyond(baseline)


def test_threads_that_reclaim_from_each_others_caches_do_not_wait_for_each_other(open_bench: OpenBench) -> None:
    bench = open_bench(max_pages=36, n_slots=3)
    other = KVCache(bench.pool, make_layout(n_slots=3))
    run_all(Owner(bench, bench.cache, 1), Owner(bench, other, 2), Owner(bench, bench.cache, 3), Owner(bench, other, 4))
    bench.cache.reclaim(0)
    other.reclaim(0)
    bench.cache.check()
    other.close()
    bench.close()


class Beam:
    """Forks a sequence that it shares with other threads, again and again: goes on, goes back within it, ends."""

    def __init__(self, bench: Bench, source: SlotId, number: int) -> None:
        self.bench, self.cache, self.source = bench, bench.cache, source
        self.choose = random.Random(number)
        self.fill = bytes([number + 1])

    def __call__(self) -> None:
        n_forks = 0
        while n_forks < N_FORKS:
            n_common = self.choose.randint(0, N_COMMON)
            try:
                fork = self.cache.fork(self.source, n_common)
            except OutOfSlots:
                continue  # others are just unmapping what ended
            n_forks += 1
            longer = self.choose.randint(n_common, 48)
            self.go_on(fork, n_common, longer)
            n_common = min(n_common, n_tokens := self.choose.randint(0, longer))
            self.cache.truncate(fork, n_tokens)
            self.go_on(fork, n_common, n_tokens)
            self.cache.retire(fork)

    def go_on(self, fork: SlotId, n_common: int, n_tokens: int) -> None:
        """Write what is this fork's own, and look at all of it."""
        self.cache.ensure({fork: n_tokens})
        for plane_index in range(len(self.bench.layout.planes)):
            for token in range(n_common, n_tokens):
                self.bench.write_row(fork, plane_index, token, self.fill)
            for token in range(n_tokens):
                seen, wanted = set(self.bench.row(fork, plane_index, token)), COMMON if token < n_common else self.fill
                assert seen == set(wanted), f"token {token} of a fork shows {seen}, not {set(wanted)}"


N_FORKS = 25
N_COMMON = 40
COMMON = b"\xc0"


@pytest.mark.parametrize("kind", ["token_major", "per_layer"])
def test_threads_fork_and_cut_one_sequence_and_it_stays_as_it_is(open_bench: OpenBench, kind: str) -> None:
    bench = open_bench(kind, max_pages=300, n_slots=1 + 4 * N_WORKERS)
    source = bench.grown(N_COMMON, COMMON)
    run_all(*(Beam(bench, source, number) for number in range(N_WORKERS)))
    bench.check()
    for plane_index in range(len(bench.layout.planes)):
        for token in range(N_COMMON):
            assert set(bench.row(source, plane_index, token)) == set(COMMON)
    assert bench.cache.stats().n_saved_pages == 0
    assert not bench.cache.region.table.shares
    bench.retire_all()
    bench.close()


@pytest.mark.parametrize("keep_freed", [False, True])
def test_an_owner_notices_the_bytes_of_another(
    open_bench: OpenBench, monkeypatch: pytest.MonkeyPatch, keep_freed: bool
) -> None:
    monkeypatch.setattr("vmem_kv.testing.FaultyDriver.scrub", lambda driver, spans: None)
    bench = open_bench(max_pages=40, n_slots=2, keep_freed=keep_freed)
    bench.cache.retire([bench.grown(30, b"\x07", domain="7"), bench.grown(30, b"\x07", domain="7")])
    if keep_freed:
        bench.cache.reclaim(1000)
    with pytest.raises(AssertionError, match="sees the bytes"):
        run_all(Owner(bench, bench.cache, 2))


def test_addresses_and_names_that_go_around_between_threads_are_no_breach(path: str) -> None:
    """What one thread has just given back, another one may get before the first one returns."""
    host = HostDriver(path)
    driver = CheckedDriver(host)

    def go_around() -> None:
        for _ in range(300):
            reservation = driver.reserve(4 * PAGE)
            handles: list[Handle] = []
            driver.create(PAGE, [reservation.base, reservation.base + PAGE], handles)
            driver.map(PAGE, [reservation.base, reservation.base + PAGE], handles)
            driver.set_access([(reservation.base, 2 * PAGE)])
            driver.unmap([(reservation.base, 2 * PAGE)])
            driver.release(PAGE, handles)
            driver.free_reservation(reservation)

    run_all(*[go_around] * N_WORKERS)
    assert (driver.n_live_handles, driver.n_live_mappings, driver.n_live_reservations) == (0, 0, 0)
    assert host.physical_bytes() == 0
    driver.close()
