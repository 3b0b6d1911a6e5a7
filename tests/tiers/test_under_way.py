"""Files and sessions on their way, let go by hand: what is given up meanwhile holds what it has to, and no longer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from vmem_kv.driver.base import PASSED
from vmem_kv.errors import (
    DriverError,
    FileError,
    FileRefused,
    OutOfDiskSpace,
    OutOfHostMemory,
    UnknownSession,
    UsageError,
)
from vmem_kv.testing import ManualClock, ManualFence
from vmem_kv.tiers.disk import DiskTier
from vmem_kv.tiers.moving import MoverThread, Task, is_over
from vmem_kv.tiers.sessions import Level, Sessions, Stay

from ..by_hand import ByHand
from .bench import TierBench
from .conftest import OpenTiers

TOKENS = [5 * i + 3 for i in range(48)]
STAY = Stay(device_s=10, host_s=100, disk_s=1000)
BROKEN = DriverError("copy", 5, "EIO")


class Desk:
    """A disk and sessions whose moves the test holds."""

    def __init__(self, open_tiers: OpenTiers, directory: Path | None, **options: int) -> None:
        self.copies, self.files = ByHand(), ByHand()
        self.bench: TierBench = open_tiers(mover=self.copies, **options)
        self.disk = DiskTier(directory, 1 << 20, self.files) if directory else None
        self.clock = ManualClock()
        self.sessions = Sessions(self.bench.cache, self.bench.host, self.disk, self.clock)

    def keep(self, name: str, tokens: list[int], n_levels: int = 0) -> None:
        self.sessions.retain(name, self.bench.begin(tokens), tokens, STAY)
        with self.copies.passing(), self.files.passing():
            for _ in range(n_levels):
                self.sessions.demote(name)

    def let_go(self) -> None:
        self.copies.let_go()
        self.files.let_go()

    def level(self, name: str) -> Level | None:
        try:
            return self.sessions.level(name)
        except UnknownSession:
            return None

    def end(self) -> None:
        self.bench.check()
        self.copies.release()
        self.files.release()
        self.sessions.close()
        assert self.sessions.under_way() == []
        if self.disk is not None:
            self.disk.poll()
            assert self.disk.n_bytes == 0
            self.disk.close()
        self.bench.host.poll()
        assert self.bench.frames.n_taken == 0


@pytest.fixture
def desk(open_tiers: OpenTiers, tmp_path: Path) -> Desk:
    return Desk(open_tiers, tmp_path)


# Tasks


def test_a_task_has_a_result_once_it_was_launched() -> None:
    task = Task(lambda: 5)
    assert not task.passed()
    assert not task.passes_within(0.001)
    thread = threading.Thread(target=task.launch)
    thread.start()
    assert task.result() == 5
    thread.join()
    assert task.passed()
    assert task.passes_within(10)


@pytest.mark.parametrize("is_launched", [True, False])
def test_a_task_that_failed_says_it_whenever_it_is_asked(is_launched: bool) -> None:
    def refuse() -> int:
        raise OSError(5, "broken")

    task = Task(refuse)
    if is_launched:
        with pytest.raises(OSError, match="broken"):
            task.launch()
    else:
        task.fail(OSError(5, "broken"))
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            task.result()
    task.wait()
    assert task.passed()


def test_a_thread_does_tasks_between_copies(open_tiers: OpenTiers) -> None:
    fence, order = ManualFence(), list[int]()
    tasks = [Task(lambda i=i: order.append(i)) for i in range(3)]
    with MoverThread(open_tiers().driver) as mover:
        mover.start(tasks[0], fence)
        for task in tasks[1:]:
            mover.start(task, PASSED)
        assert not tasks[2].passes_within(0.01)
        fence.pass_()
        tasks[2].result()
    assert order == [0, 1, 2]


def test_what_nobody_can_say_anything_about_is_over() -> None:
    class Mute:
        def passed(self) -> bool:
            raise BROKEN

        def passes_within(self, timeout_s: float) -> bool:
            return False

    assert is_over(Mute())


# The disk


def test_a_copy_on_its_way_to_disk_stays_as_it_is_and_can_be_read(desk: Desk) -> None:
    bench, disk = desk.bench, desk.disk
    assert disk is not None
    desk.keep("a", TOKENS[:20], 1)
    copy = desk.sessions._sessions["", "a"].host_copy
    storing = disk.begin_store(bench.host, copy)
    assert not storing.passed()
    assert disk.n_bytes > 0
    with pytest.raises(UsageError, match="under way"):
        bench.host.drop(copy)
    with pytest.raises(UsageError, match="close the disk"):
        bench.host.close()
    slot = bench.cache.acquire()
    with desk.copies.passing():
        bench.host.restore(copy, bench.cache, slot)
    assert bench.holds(slot, TOKENS[:20])
    desk.let_go()
    stored = storing.finish()
    with pytest.raises(UsageError, match="finished or abandoned"):
        storing.finish()
    loading = disk.begin_load(stored, bench.host)
    assert not loading.passed()
    desk.let_go()
    assert bench.copy_holds(loading.finish(), TOKENS[:20])
    disk.drop(stored)
    for held in list(bench.host._copies):
        if held is not copy:
            bench.host.drop(held)
    bench.cache.retire(slot)
    desk.end()


def test_room_on_disk_is_nobody_elses_while_an_abandoned_copy_is_written_there(desk: Desk) -> None:
    bench, disk = desk.bench, desk.disk
    assert disk is not None
    for name, tokens in (("a", TOKENS[:20]), ("b", TOKENS[20:40])):
        desk.keep(name, tokens, 1)
    one, two = (desk.sessions._sessions["", name].host_copy for name in "ab")
    abandoned = disk.begin_store(bench.host, one)
    abandoned.abandon()
    with pytest.raises(UsageError, match="finished or abandoned"):
        abandoned.finish()
    storing = disk.begin_store(bench.host, two)
    assert storing._stored.offset > 0
    desk.let_go()
    disk.poll()
    stored = storing.finish()
    assert disk.n_bytes == stored.n_bytes
    with desk.files.passing():
        again = disk.load(stored, bench.host)
        assert bench.copy_holds(again, TOKENS[20:40])
        bench.host.drop(again)
        assert disk.begin_store(bench.host, one)._stored.offset == 0  # which is free again
    desk.sessions.close()
    disk.close()
    assert disk.n_bytes == 0
    desk.disk = None
    desk.end()


@pytest.mark.parametrize(
    ("error", "expected"), [(OSError(28, "full"), OutOfDiskSpace), (OSError(5, "broken"), FileError)]
)
def test_a_write_that_fails_late_leaves_nothing(desk: Desk, error: OSError, expected: type[Exception]) -> None:
    disk = desk.disk
    assert disk is not None
    desk.keep("a", TOKENS[:20], 1)
    storing = disk.begin_store(desk.bench.host, desk.sessions._sessions["", "a"].host_copy)
    desk.files.fail(error)
    with pytest.raises(expected):
        storing.finish()
    assert disk.n_bytes == 0
    desk.end()


@pytest.mark.parametrize("then", ["fails", "is damaged", "is abandoned", "closes"])
def test_a_read_that_comes_to_nothing_leaves_nothing(desk: Desk, then: str) -> None:
    bench, disk = desk.bench, desk.disk
    assert disk is not None
    desk.keep("a", TOKENS[:20], 2)
    assert bench.frames.n_taken == 0
    stored = desk.sessions._sessions["", "a"].disk_copy
    assert stored is not None
    loading = disk.begin_load(stored, bench.host)
    assert bench.frames.n_taken > 0
    if then == "fails":
        desk.files.fail(OSError(5, "broken"))
        with pytest.raises(FileError):
            loading.finish()
    elif then == "is damaged":
        disk.drop(stored)  # as `Sessions` never does
        desk.sessions._sessions["", "a"].disk_copy = None
        desk.let_go()
        with pytest.raises(FileRefused):
            loading.finish()
    elif then == "is abandoned":
        loading.abandon()
        assert bench.frames.n_taken > 0
        desk.let_go()
        disk.poll()
    else:
        desk.sessions.close()
        desk.files.release()
        disk.close()
        desk.disk = None
    assert bench.frames.n_taken == 0
    desk.end()


def test_a_sequence_that_is_being_written_is_not_read(desk: Desk) -> None:
    disk = desk.disk
    assert disk is not None
    desk.keep("a", TOKENS[:20], 1)
    storing = disk.begin_store(desk.bench.host, desk.sessions._sessions["", "a"].host_copy)
    with pytest.raises(UsageError, match="being written"):
        disk.begin_load(storing._stored, desk.bench.host)
    storing.abandon()
    desk.let_go()
    desk.end()


# Sessions


def test_nobody_waits_for_a_session_on_its_way_down(desk: Desk) -> None:
    desk.keep("a", TOKENS[:20])
    slot = desk.bench.cache.active_slots()[0]
    assert desk.sessions.demote("a", waits=False) is Level.DEVICE
    assert desk.sessions.leaving_slots() == {slot}
    assert desk.sessions.is_leaving("a")
    assert desk.sessions.settle() == 0
    assert len(desk.sessions.under_way()) == 1
    desk.let_go()
    assert desk.sessions.settle() == 1
    assert desk.level("a") is Level.HOST
    assert desk.sessions.demote("a", waits=False) is Level.HOST
    assert desk.sessions.is_going_down
    assert desk.sessions.settle() == 0
    desk.let_go()
    assert desk.sessions.settle() == 1
    assert desk.level("a") is Level.DISK
    assert desk.bench.frames.n_taken == 0
    assert desk.sessions.under_way() == []
    desk.end()


@pytest.mark.parametrize("n_levels", [0, 1])
def test_who_is_held_on_its_way_down_stays(desk: Desk, n_levels: int) -> None:
    desk.keep("a", TOKENS[:20], n_levels)
    there = desk.sessions.level("a")
    desk.sessions.demote("a", waits=False)
    desk.sessions.hold("a")
    assert desk.sessions.is_held("a")
    desk.sessions.settle()
    desk.let_go()
    desk.sessions.settle()
    assert desk.level("a") is there
    assert desk.disk is not None
    assert desk.disk.n_bytes == 0
    desk.sessions.let_go("a")
    desk.clock.advance(1000)
    with desk.copies.passing(), desk.files.passing():
        desk.sessions.poll()
    assert desk.level("a") is [Level.HOST, Level.DISK][n_levels]
    desk.end()


def test_a_session_is_fetched_restored_and_taken(desk: Desk) -> None:
    bench = desk.bench
    desk.keep("a", TOKENS[:20], 2)
    desk.sessions.hold("a")
    assert desk.sessions.fetch("a") is None
    assert desk.sessions.fetch("a") is None
    assert len(desk.sessions.under_way()) == 1
    desk.let_go()
    desk.sessions.settle()
    copy = desk.sessions.fetch("a")
    assert copy is not None
    assert bench.copy_holds(copy, TOKENS[:20])
    slot = bench.cache.acquire()
    with desk.copies.passing():
        bench.host.restore(copy, bench.cache, slot, n_tokens=15)
    desk.sessions.take("a")
    assert desk.level("a") is Level.IN_USE
    assert not desk.sessions.is_held("a")
    assert desk.disk is not None
    assert desk.disk.n_bytes == 0
    assert copy.is_spare
    with pytest.raises(UsageError, match="has a slot"):
        desk.sessions.fetch("a")
    tokens = bench.append(slot, TOKENS[:15], [7, 8])
    desk.sessions.retain("a", slot, tokens, STAY)
    with desk.copies.passing():
        desk.sessions.demote("a")
        assert bench.holds(desk.sessions.resume("a").slot_id, tokens)
    desk.end()


def test_who_was_read_in_vain_is_a_spare(desk: Desk) -> None:
    desk.keep("a", TOKENS[:20], 2)
    desk.sessions.hold("a")
    assert desk.sessions.fetch("a") is None
    desk.sessions.let_go("a")
    desk.let_go()
    desk.sessions.settle()
    stats = desk.bench.host.stats()
    assert stats.spare_bytes == stats.taken_bytes > 0
    assert desk.level("a") is Level.DISK
    desk.end()


@pytest.mark.parametrize("n_levels", [0, 1, 2])
def test_who_is_forgotten_on_its_way_leaves_nothing(desk: Desk, n_levels: int) -> None:
    desk.keep("a", TOKENS[:20], n_levels)
    if n_levels == 2:
        desk.sessions.hold("a")
        assert desk.sessions.fetch("a") is None
    else:
        desk.sessions.demote("a", waits=False)
    if n_levels == 0:
        desk.copies.let_go()  # which is waited for
    desk.sessions.forget("a")
    desk.let_go()
    desk.sessions.settle()
    desk.bench.host.poll()
    assert desk.disk is not None
    assert (desk.bench.frames.n_taken, desk.disk.n_bytes) == (0, 0)
    assert desk.bench.cache.active_slots() == []
    desk.end()


def test_a_copy_that_fails_late_leaves_a_session_where_it_was(desk: Desk) -> None:
    desk.keep("a", TOKENS[:20])
    desk.sessions.demote("a", waits=False)
    desk.copies.fail(BROKEN)
    with pytest.raises(DriverError):
        desk.sessions.settle()
    assert desk.level("a") is Level.DEVICE
    assert desk.sessions.leaving_slots() == set()
    assert desk.sessions.settle() == 0
    assert not desk.copies.waiting  # it goes no more, unless it is told again
    with desk.copies.passing():
        assert desk.sessions.demote("a") is Level.HOST
    desk.end()


def test_who_needs_the_host_memory_of_one_that_goes_to_disk_goes_when_that_has_gone(
    open_tiers: OpenTiers, tmp_path: Path
) -> None:
    desk = Desk(open_tiers, tmp_path, n_frames=16)  # one sequence
    desk.keep("a", [1] * 40, 1)
    desk.keep("b", [2] * 40)
    desk.keep("c", [3] * 40)
    for name in "bc":
        assert desk.sessions.demote(name, waits=False) is Level.DEVICE
    assert (len(desk.files.waiting), len(desk.copies.waiting)) == (1, 0)
    assert len(desk.sessions.leaving_slots()) == 2
    there: list[tuple[Level | None, ...]] = []
    while desk.sessions.under_way():
        desk.let_go()
        desk.sessions.settle()
        there.append(tuple(desk.level(name) for name in "abc"))
    assert all(levels[0] is Level.DISK for levels in there)
    assert sorted(map(str, there[-1][1:])) == [str(Level.DISK), str(Level.HOST)]  # as if each had been waited for
    desk.sessions.hold("a")
    assert desk.sessions.fetch("a") is None  # another one makes room first
    assert (len(desk.files.waiting), desk.sessions.is_going_down) == (1, True)
    desk.let_go()
    desk.sessions.settle()
    assert desk.sessions.fetch("a") is None
    desk.let_go()
    copy = desk.sessions.fetch("a")
    assert copy is not None
    assert desk.bench.copy_holds(copy, [1] * 40)
    assert desk.level("b") is desk.level("c") is Level.DISK
    desk.end()


def test_without_host_memory_nothing_is_fetched(open_tiers: OpenTiers, tmp_path: Path) -> None:
    desk = Desk(open_tiers, tmp_path, n_frames=16)
    desk.keep("a", [1] * 40, 2)
    other = desk.bench.host.new_copy(desk.bench.layout)
    slot = desk.bench.begin([4] * 40)
    with desk.copies.passing():
        desk.bench.host.park(other, desk.bench.cache, slot, [4] * 40)
    with pytest.raises(OutOfHostMemory):
        desk.sessions.fetch("a")
    assert desk.level("a") is Level.DISK
    desk.bench.host.drop(other)
    desk.bench.cache.retire(slot)
    desk.end()


def test_a_restore_that_nobody_wants_leaves_the_copy_as_it_was(desk: Desk) -> None:
    bench = desk.bench
    desk.keep("a", TOKENS[:20], 1)
    copy = desk.sessions._sessions["", "a"].host_copy
    slot = bench.cache.acquire()
    restoring = bench.host.begin_restore(copy, bench.cache, slot)
    assert not restoring.passes_within(0.001)
    desk.let_go()
    assert restoring.passes_within(10)
    for _ in range(2):
        restoring.cancel()
    assert (copy.is_spare, copy.n_readers, bench.cache.n_tokens(slot)) == (False, 0, 0)
    with pytest.raises(UsageError, match="finished"):
        restoring.finish()
    bench.cache.retire(slot)
    desk.end()
