"""Sessions by name: time moves them down, a request brings them back, and domains do not see each other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from vmem_kv.errors import (
    ConfigError,
    DriverError,
    FileError,
    FileRefused,
    InvariantError,
    OutOfHostMemory,
    OutOfSlots,
    SessionInUse,
    UnknownSession,
    UsageError,
)
from vmem_kv.testing import ManualClock, ManualFence, driver_error, fail_kind, no_faults
from vmem_kv.tiers import streams
from vmem_kv.tiers.disk import DiskTier
from vmem_kv.tiers.files import ModelIdentity
from vmem_kv.tiers.sessions import Level, Sessions, Stay

from .bench import TierBench
from .conftest import OpenTiers

TOKENS = [5 * i + 3 for i in range(48)]
STAY = Stay(device_s=10, host_s=100, disk_s=1000)


class Desk:
    """Sessions with everything around them."""

    def __init__(self, bench: TierBench, directory: Path | None, max_disk_bytes: int = 1 << 20) -> None:
        self.bench = bench
        self.clock = ManualClock()
        self.disk = DiskTier(directory, max_disk_bytes) if directory else None
        self.sessions = Sessions(bench.cache, bench.host, self.disk, self.clock)

    def keep(self, name: str, tokens: list[int], stay: Stay = STAY, domain: str = "") -> None:
        self.sessions.retain(name, self.bench.begin(tokens), tokens, stay, domain=domain)

    def pass_time(self, seconds: float) -> int:
        self.clock.advance(seconds)
        return self.sessions.poll()

    def level(self, name: str) -> Level | None:
        try:
            return self.sessions.level(name)
        except UnknownSession:
            return None

    def end(self) -> None:
        self.sessions.close()
        self.sessions.close()
        assert self.bench.frames.n_taken == 0
        if self.disk:
            assert self.disk.n_bytes == 0
            self.disk.close()


@pytest.fixture
def desk(open_tiers: OpenTiers, tmp_path: Path) -> Desk:
    return Desk(open_tiers(), tmp_path)


def test_a_session_goes_down_the_tiers_and_is_gone(desk: Desk) -> None:
    desk.keep("one", TOKENS[:30])
    slot = desk.bench.cache.active_slots()[0]
    assert desk.pass_time(9.9) == 0
    assert desk.level("one") is Level.DEVICE
    assert desk.pass_time(0.1) == 1
    assert desk.level("one") is Level.HOST
    assert desk.bench.cache.active_slots() == []
    assert desk.bench.cache.slot_stats()[slot].state == "warm"
    assert desk.pass_time(100) == 1
    assert desk.level("one") is Level.DISK
    assert desk.bench.frames.n_taken == 0
    assert desk.disk is not None
    assert desk.disk.n_bytes > 0
    assert desk.pass_time(1000) == 1
    assert desk.level("one") is None
    stats = desk.sessions.stats()
    assert (stats.n_moved_down, stats.n_gone) == (2, 1)
    with pytest.raises(UnknownSession):
        desk.sessions.resume("one")
    desk.end()


@pytest.mark.parametrize("seconds", [(), (10,), (10, 100)], ids=["device", "host", "disk"])
def test_from_every_level_it_comes_back_as_it_was(desk: Desk, seconds: tuple[float, ...]) -> None:
    tokens = TOKENS[:20]
    desk.keep("one", tokens)
    for n_more in (7, 1, 5):
        for n_seconds in seconds:
            assert desk.pass_time(n_seconds) == 1
        slot, found = desk.sessions.resume("one")
        assert list(found) == tokens
        assert desk.bench.holds(slot, tokens)
        assert desk.level("one") is Level.IN_USE
        with pytest.raises(SessionInUse):
            desk.sessions.resume("one")
        tokens = desk.bench.append(slot, tokens, range(n_more))
        desk.sessions.retain("one", slot, tokens, STAY)
        desk.bench.check()
    desk.end()


def test_between_turns_only_what_was_added_moves(desk: Desk) -> None:
    tokens = TOKENS[:20]
    desk.keep("one", tokens)
    desk.pass_time(10)
    slot, _ = desk.sessions.resume("one")
    tokens = desk.bench.append(slot, tokens, [1, 2, 3])
    desk.sessions.retain("one", slot, tokens, STAY)
    before = desk.bench.host.stats().out_bytes
    desk.pass_time(10)
    assert desk.bench.host.stats().out_bytes - before == 3 * desk.bench.layout.token_bytes
    slot, _ = desk.sessions.resume("one")
    assert desk.bench.holds(slot, tokens)
    desk.sessions.forget("one")
    assert desk.bench.holds(slot, tokens)  # the slot is the caller's
    desk.end()


def test_a_sequence_that_slid_is_not_kept(desk: Desk) -> None:
    slot = desk.bench.begin(TOKENS[:20])
    desk.bench.cache.slide(slot, 5)
    with pytest.raises(UsageError, match="slid to token 5"):
        desk.sessions.retain("one", slot, TOKENS[:20], STAY)
    assert desk.level("one") is None
    desk.end()


def test_another_domain_knows_nothing(desk: Desk) -> None:
    desk.keep("one", TOKENS[:10], domain="alice")
    desk.keep("one", TOKENS[10:20], domain="bob")
    for call in (desk.sessions.resume, desk.sessions.forget, desk.sessions.level):
        for domain in ("", "carol"):
            with pytest.raises(UnknownSession) as there:
                call("one", domain=domain)
            with pytest.raises(UnknownSession) as nowhere:
                call("two", domain=domain)
            assert str(there.value).replace("one", "two") == str(nowhere.value)
    desk.pass_time(10)
    slot, tokens = desk.sessions.resume("one", domain="bob")
    assert list(tokens) == TOKENS[10:20]
    assert desk.bench.holds(slot, TOKENS[10:20])
    assert desk.bench.cache._slots.domain[slot] == "bob"
    desk.end()


def test_without_room_on_the_host_the_oldest_there_goes_to_disk(open_tiers: OpenTiers, tmp_path: Path) -> None:
    desk = Desk(open_tiers(n_frames=32), tmp_path)  # two sequences of 48 tokens
    for name in "abc":
        desk.keep(name, [ord(name)] * 48)
        desk.pass_time(10)
    assert [desk.level(name) for name in "abc"] == [Level.DISK, Level.HOST, Level.HOST]
    desk.bench.check()
    slot, _ = desk.sessions.resume("a")  # whose rows pass through host memory
    assert desk.bench.holds(slot, [ord("a")] * 48)
    assert [desk.level(name) for name in "abc"] == [Level.IN_USE, Level.DISK, Level.HOST]
    desk.end()


def test_without_room_on_disk_the_oldest_there_is_gone(open_tiers: OpenTiers, tmp_path: Path) -> None:
    bench = open_tiers()
    desk = Desk(bench, tmp_path, max_disk_bytes=2 * 16 * bench.frames.frame_bytes)
    for name in "abc":
        desk.keep(name, [ord(name)] * 48, Stay(0, 0, 1000))
        desk.pass_time(1)
        desk.pass_time(1)
    assert [desk.level(name) for name in "abc"] == [None, Level.DISK, Level.DISK]
    assert desk.sessions.stats().n_gone == 1
    desk.end()
    tiny = Desk(bench, tmp_path, max_disk_bytes=4096)
    tiny.keep("a", TOKENS, Stay(0, 0, 0))
    tiny.pass_time(0)
    tiny.pass_time(0)
    assert tiny.level("a") is None
    tiny.end()


def test_without_a_disk_it_ends_on_the_host(open_tiers: OpenTiers) -> None:
    desk = Desk(open_tiers(n_frames=16), None)
    desk.keep("a", [1] * 40)
    desk.pass_time(10)
    desk.keep("b", [2] * 40)
    desk.pass_time(10)
    assert [desk.level(name) for name in "ab"] == [None, Level.HOST]
    desk.pass_time(100)
    assert desk.level("b") is None
    desk.end()


def test_without_room_on_the_host_either_it_ends_on_the_device(open_tiers: OpenTiers) -> None:
    small = Desk(open_tiers(n_frames=2), None)
    small.keep("a", TOKENS)
    small.pass_time(10)
    assert small.level("a") is None
    assert small.bench.cache.active_slots() == []
    small.end()


def test_sessions_stay_as_long_as_they_are_told(desk: Desk) -> None:
    desk.keep("ever", TOKENS[:8], Stay(math.inf, math.inf, math.inf))
    desk.keep("never", TOKENS[:9], Stay(0, 0, 0))
    assert desk.pass_time(1e9) == 1
    assert desk.level("never") is Level.HOST
    assert desk.pass_time(0) == 1
    assert desk.level("never") is Level.DISK
    assert desk.pass_time(0) == 1
    assert desk.level("never") is None
    assert desk.level("ever") is Level.DEVICE
    with pytest.raises(ConfigError, match="host_s"):
        Stay(host_s=-1)
    with pytest.raises(ConfigError, match="device_s"):
        Stay(device_s=math.nan)
    desk.end()


def test_pressure_moves_those_that_expire_first_off_the_device(desk: Desk) -> None:
    desk.keep("late", TOKENS[:40], Stay(50, 100, 100))
    desk.keep("soon", TOKENS[:40], Stay(5, 100, 100))
    n_pages = desk.bench.layout.n_pages(40)
    assert desk.sessions.free_slots(1) == n_pages
    assert (desk.level("soon"), desk.level("late")) == (Level.HOST, Level.DEVICE)
    assert desk.sessions.free_slots(10**6) == n_pages
    assert desk.level("late") is Level.HOST
    assert desk.bench.cache.reclaim(10**6) == 2 * n_pages
    desk.end()


def test_a_failure_leaves_a_session_where_it_was_and_the_others_are_seen_to(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = desk.bench
    desk.keep("a", TOKENS[:20])
    desk.keep("b", TOKENS[:25])
    bench.faulty.begin_count()
    bench.faulty.plan = fail_kind("copy_to_host", 1, driver_error())
    with pytest.raises(DriverError):
        desk.pass_time(10)
    assert sorted((desk.level("a"), desk.level("b")), key=str) == [Level.DEVICE, Level.HOST]
    assert desk.sessions.poll() == 1
    assert desk.level("a") is desk.level("b") is Level.HOST

    def refuse(*arguments: object) -> None:
        raise OSError(5, "broken disk")

    with monkeypatch.context() as patch:
        patch.setattr(streams.os, "pwrite", refuse)
        with pytest.raises(FileError):
            desk.pass_time(100)
    assert desk.level("a") is desk.level("b") is Level.HOST
    assert desk.sessions.poll() == 2
    for n_more in (1, 2):  # once, then also when the slot is given back
        bench.faulty.plan = fail_kind("copy_from_host", make_error=driver_error())
        with pytest.raises(DriverError):
            desk.sessions.resume("a")
        assert desk.level("a") is Level.DISK, n_more
    bench.faulty.plan = lambda point: driver_error()(point) if point.operation in ("copy_from_host", "fence") else None
    with pytest.raises(DriverError):
        desk.sessions.resume("a")
    bench.faulty.plan = no_faults
    desk.sessions.poll()  # retires the slot that could not be retired then
    assert bench.cache.active_slots() == []
    slot, _ = desk.sessions.resume("a")
    assert bench.holds(slot, TOKENS[:20])
    bench.check()
    desk.end()


def test_closing_goes_on_behind_a_failure(desk: Desk) -> None:
    desk.keep("a", TOKENS[:20])
    desk.keep("b", TOKENS[:20])
    desk.bench.faulty.begin_count()
    desk.bench.faulty.plan = fail_kind("fence", 1, driver_error())
    with pytest.raises(DriverError):
        desk.sessions.close()
    assert desk.sessions.stats().n_on_device == 1
    desk.bench.faulty.plan = no_faults
    desk.end()
    assert desk.bench.cache.active_slots() == []


def test_a_host_copy_that_somebody_dropped_is_a_bug_of_theirs(desk: Desk) -> None:
    desk.keep("a", TOKENS[:20])
    desk.pass_time(10)
    desk.bench.host.drop(desk.sessions._sessions["", "a"].host_copy)
    with pytest.raises(InvariantError, match="dropped its host copy"):
        desk.sessions.resume("a")
    assert desk.bench.cache.active_slots() == []
    desk.end()


def test_damage_on_disk_ends_the_session(desk: Desk) -> None:
    desk.keep("a", TOKENS[:20], Stay(0, 0, 100))
    desk.pass_time(0)
    desk.pass_time(0)
    assert desk.disk is not None
    streams.os.pwrite(desk.disk._fd, b"\xff" * 64, 100)
    with pytest.raises(FileRefused):
        desk.sessions.resume("a")
    assert desk.level("a") is None
    assert desk.bench.cache.active_slots() == []
    desk.end()


def test_no_slot_is_a_refusal(desk: Desk) -> None:
    desk.keep("a", TOKENS[:20])
    desk.pass_time(10)
    others = [desk.bench.begin([1]) for _ in range(4)]
    with pytest.raises(OutOfSlots):
        desk.sessions.resume("a")
    assert desk.level("a") is Level.HOST
    desk.bench.cache.retire(others[0])
    assert desk.bench.holds(desk.sessions.resume("a").slot_id, TOKENS[:20])
    desk.end()


@pytest.mark.parametrize("seconds", [(), (10,), (10, 100)], ids=["device", "host", "disk"])
def test_a_session_is_saved_from_every_level_and_loaded_by_another_process(
    desk: Desk, tmp_path: Path, seconds: tuple[float, ...]
) -> None:
    identity, path = ModelIdentity("tiny", "float32"), tmp_path / "session"
    desk.keep("one", TOKENS[:20], domain="alice")
    for n_seconds in seconds:
        desk.pass_time(n_seconds)
    level = desk.sessions.level("one", domain="alice")
    with pytest.raises(UnknownSession):
        desk.sessions.save("one", path, identity)
    desk.sessions.save("one", path, identity, domain="alice")
    assert desk.sessions.level("one", domain="alice") is level
    with pytest.raises(UsageError, match="exists"):
        desk.sessions.load("one", path, identity, domain="alice")
    desk.sessions.load("one", path, identity, STAY, domain="bob")
    with pytest.raises(FileRefused):
        desk.sessions.load("two", path, ModelIdentity("other", "float32"))
    for domain in ("alice", "bob"):
        slot, tokens = desk.sessions.resume("one", domain=domain)
        assert list(tokens) == TOKENS[:20]
        assert desk.bench.holds(slot, TOKENS[:20])
        with pytest.raises(SessionInUse):
            desk.sessions.save("one", path, identity, domain=domain)
    desk.end()


def test_a_loaded_session_makes_room_for_itself(open_tiers: OpenTiers, tmp_path: Path) -> None:
    desk = Desk(open_tiers(n_frames=16), tmp_path)  # one sequence
    identity, path = ModelIdentity("tiny", "float32"), tmp_path / "session"
    desk.keep("a", [1] * 40)
    desk.sessions.save("a", path, identity)
    desk.pass_time(10)
    desk.sessions.load("b", path, identity)
    assert (desk.level("a"), desk.level("b")) == (Level.DISK, Level.HOST)
    small = Desk(desk.bench, None)
    with pytest.raises(OutOfHostMemory):
        small.sessions.load("c", path, identity)  # b is not its own to move
    desk.end()


class Slow:
    """A driver whose copies to the host are made when the test says so."""

    def __init__(self, bench: TierBench) -> None:
        self.fence = ManualFence()
        self._launch = bench.driver.copy_to_host
        bench.driver.copy_to_host = self._copy  # type: ignore[method-assign]

    def _copy(self, address: int, view: memoryview) -> ManualFence:
        self._launch(address, view).wait()
        return self.fence


def test_a_poll_does_not_wait_for_copies(desk: Desk) -> None:
    bench, slow = desk.bench, Slow(desk.bench)
    desk.keep("a", TOKENS[:20])
    assert desk.pass_time(10) == desk.sessions.poll() == 0
    assert desk.level("a") is Level.DEVICE
    slow.fence.pass_()
    assert desk.sessions.poll() == 1
    assert desk.level("a") is Level.HOST
    slot, _ = desk.sessions.resume("a")
    tokens = bench.append(slot, TOKENS[:20], [1])

    slow.fence = ManualFence()
    desk.sessions.retain("a", slot, tokens, STAY)
    assert desk.pass_time(10) == 0
    slow.fence.pass_()
    slot, _ = desk.sessions.resume("a")  # in the middle: the slot is as it was, and the copy up to date
    assert bench.holds(slot, tokens)
    before = bench.host.stats().out_bytes
    desk.sessions.retain("a", slot, tokens, STAY)
    assert desk.pass_time(10) == 1
    assert bench.host.stats().out_bytes == before
    slot, _ = desk.sessions.resume("a")

    slow.fence = ManualFence()
    tokens = bench.append(slot, tokens, [2])
    desk.sessions.retain("a", slot, tokens, STAY)
    assert desk.pass_time(10) == 0
    slow.fence.pass_()
    desk.sessions.forget("a")  # in the middle
    assert bench.cache.active_slots() == []
    bench.check()
    desk.end()


def test_a_poll_may_be_short(desk: Desk) -> None:
    for name in "abc":
        desk.keep(name, TOKENS[:9])
        desk.clock.advance(1)
    desk.clock.advance(10)
    assert [desk.sessions.poll(1), desk.sessions.poll(1)] == [1, 1]
    assert [desk.level(name) for name in "abc"] == [Level.HOST, Level.HOST, Level.DEVICE]
    desk.end()


def test_misuse_is_refused(desk: Desk) -> None:
    desk.keep("a", TOKENS[:20])
    slot = desk.bench.cache.active_slots()[0]
    other = desk.bench.begin(TOKENS[:3])
    with pytest.raises(UsageError, match="kept already"):
        desk.sessions.retain("a", other, TOKENS[:3])
    with pytest.raises(UsageError, match="belongs to another session"):
        desk.sessions.retain("b", slot, TOKENS[:20])
    with pytest.raises(UsageError, match="2 token ids"):
        desk.sessions.retain("b", other, TOKENS[:2])
    with pytest.raises(UsageError, match="no tokens"):
        desk.sessions.retain("b", other, [])
    assert desk.sessions.stats().n_on_device == 1
    desk.end()
