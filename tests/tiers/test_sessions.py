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
from vmem_kv.growth import SlotId
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
    assert desk.pass_time(100) == 2
    assert desk.level("a") is desk.level("b") is Level.DISK

    def refuse(*arguments: object) -> None:
        raise OSError(5, "broken disk")

    with monkeypatch.context() as patch:
        patch.setattr(streams.os, "preadv", refuse)
        with pytest.raises(FileError):
            desk.sessions.resume("a")
    assert desk.level("a") is Level.DISK
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


def test_a_disk_that_fails_keeps_no_session_for_ever(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    n_tries = 0

    def refuse(*arguments: object) -> None:
        nonlocal n_tries
        n_tries += 1
        raise OSError(5, "broken disk")

    for name in "abc":
        desk.keep(name, TOKENS[:20])
    desk.keep("d", TOKENS[:20], Stay(10, math.inf, math.inf))
    desk.pass_time(10)
    with monkeypatch.context() as patch:
        patch.setattr(streams.os, "pwrite", refuse)
        assert desk.pass_time(100) == 3
        for _ in range(9):
            assert desk.sessions.poll() == 0
    assert n_tries == 3
    assert [record.message.count("broken disk") for record in caplog.records] == [1, 1, 1]
    assert [desk.level(name) for name in "abcd"] == [None, None, None, Level.HOST]
    assert desk.sessions.stats().n_gone == 3
    assert desk.sessions.demote("d") is Level.DISK
    desk.bench.check()
    desk.end()


def test_a_session_that_can_never_fit_goes_alone(open_tiers: OpenTiers, tmp_path: Path) -> None:
    small = Desk(open_tiers(n_frames=8), None)
    small.keep("a", TOKENS[:5], Stay(10, math.inf))
    small.keep("b", TOKENS[:6], Stay(10, math.inf))
    small.pass_time(10)
    small.keep("large", TOKENS)
    small.pass_time(10)
    assert [small.level(name) for name in ("a", "b", "large")] == [Level.HOST, Level.HOST, None]
    small.end()
    small.bench.end()
    bench = open_tiers()
    narrow = Desk(bench, tmp_path, max_disk_bytes=8 * bench.frames.frame_bytes)
    for name in "ab":
        narrow.keep(name, TOKENS[:5])
        assert [narrow.sessions.demote(name) for _ in range(2)] == [Level.HOST, Level.DISK]
    narrow.keep("large", TOKENS)
    assert [narrow.sessions.demote("large") for _ in range(2)] == [Level.HOST, None]
    assert [narrow.level(name) for name in "ab"] == [Level.DISK, Level.DISK]
    assert narrow.sessions.stats().n_gone == 1
    narrow.end()


def test_a_file_that_can_never_fit_moves_no_session(open_tiers: OpenTiers, tmp_path: Path) -> None:
    identity, path = ModelIdentity("tiny", "float32"), tmp_path / "session"
    large = Desk(open_tiers(), None)
    large.keep("one", TOKENS)
    large.sessions.save("one", path, identity)
    large.end()
    large.bench.end()
    small = Desk(open_tiers(n_frames=8), None)
    small.keep("a", TOKENS[:5])
    small.pass_time(10)
    with pytest.raises(FileRefused, match="8 in all"):
        small.sessions.load("one", path, identity)
    assert small.level("a") is Level.HOST
    small.end()


def test_what_a_session_holds_of_its_own_goes_before_it_is_lost(open_tiers: OpenTiers) -> None:
    """Host memory holds all of it, but not what it held before as well."""
    desk = Desk(open_tiers(n_frames=8), None)
    desk.keep("a", TOKENS[:20])
    desk.pass_time(10)
    slot, _ = desk.sessions.resume("a")
    desk.bench.cache.truncate(slot, 5)
    tokens = desk.bench.append(slot, TOKENS[:5], range(17))  # three quarters of the copy are of no use
    desk.sessions.retain("a", slot, tokens)
    assert desk.sessions.demote("a") is Level.HOST
    slot, _ = desk.sessions.resume("a")
    assert desk.bench.holds(slot, tokens)
    desk.bench.check()
    desk.end()


def test_a_copy_that_is_read_for_a_file_will_do_where_it_holds_everything(
    open_tiers: OpenTiers, tmp_path: Path
) -> None:
    """Host memory holds both sessions, and no third copy."""
    bench = open_tiers(n_frames=30)
    desk = Desk(bench, tmp_path)
    desk.keep("other", TOKENS[:40])
    assert desk.sessions.demote("other") is Level.HOST
    desk.keep("mine", [7] * 40)
    copy = desk.sessions.copy_of("mine")
    bench.host.hold(copy)
    n_taken, n_moved = bench.frames.n_taken, bench.host.stats().out_bytes
    assert desk.sessions.copy_of("mine") is copy
    assert desk.sessions.demote("mine") is Level.HOST
    assert (desk.level("other"), bench.frames.n_taken, bench.host.stats().out_bytes) == (Level.HOST, n_taken, n_moved)
    assert bench.host.stats().spare_bytes == 0  # the slot has gone
    bench.host.release(copy)
    slot, _ = desk.sessions.resume("mine")
    assert bench.holds(slot, [7] * 40)
    desk.sessions.forget("mine")
    bench.cache.retire(slot, bench.cache.fence())
    bench.check()
    desk.end()


@pytest.mark.parametrize("seconds", [(10,), (10, 100)], ids=["host", "disk"])
def test_a_session_that_is_asked_for_does_not_make_room(
    open_tiers: OpenTiers, tmp_path: Path, seconds: tuple[float, ...]
) -> None:
    bench = open_tiers(n_frames=15)  # one of the two
    desk = Desk(bench, tmp_path, max_disk_bytes=15 * bench.frames.frame_bytes)
    desk.keep("asked for", TOKENS[:40])
    for n_seconds in seconds:
        desk.pass_time(n_seconds)
    level = desk.sessions.level("asked for")
    desk.keep("idle", [7] * 40)
    with desk.sessions.wanted("asked for"):
        with desk.sessions.wanted("asked for"):
            pass
        assert desk.sessions.demote("idle") is (None if level is Level.HOST else Level.HOST)
        assert not desk.sessions.push_down(level)
        desk.pass_time(10_000)
        assert desk.level("asked for") is level
        desk.keep("last", [8] * 40, Stay(math.inf))
        assert desk.sessions.free_slots(1) == bench.layout.n_pages(40)
        assert desk.level("asked for") is level
        slot, _ = desk.sessions.resume("asked for")
    assert bench.holds(slot, TOKENS[:40])
    desk.sessions.retain("asked for", slot, TOKENS[:40], STAY)
    assert desk.pass_time(10) == 1  # as any other
    with pytest.raises(UnknownSession), desk.sessions.wanted("nobody"):
        pass
    desk.end()


def test_a_session_is_not_pushed_down_while_it_comes_back(
    open_tiers: OpenTiers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever makes room for it, in the middle of it."""
    desk = Desk(open_tiers(), tmp_path)
    desk.keep("a", TOKENS[:20])
    desk.pass_time(10)
    acquire, n_pushed = desk.bench.cache.acquire, []

    def push(**keywords: object) -> SlotId:
        n_pushed.append(desk.sessions.push_down(Level.HOST))
        return acquire(**keywords)

    monkeypatch.setattr(desk.bench.cache, "acquire", push)
    slot, _ = desk.sessions.resume("a")
    assert desk.bench.holds(slot, TOKENS[:20])
    assert n_pushed == [False]
    desk.end()


class Mute(ManualFence):
    """A fence that cannot be asked, until the test says so."""

    is_mute = True

    def passed(self) -> bool:
        if self.is_mute:
            raise DriverError("fence", 5, "EIO")
        return True

    def wait(self) -> None:
        self.passed()


@pytest.mark.parametrize("then", ["forget", "close", "go to disk", "go on", "save"])
@pytest.mark.parametrize("seconds", [(10,), (10, 100)], ids=["host", "disk"])
def test_a_restore_that_nobody_can_wait_for_keeps_its_memory_and_nothing_else(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: tuple[float, ...], then: str
) -> None:
    bench, mute, identity = desk.bench, Mute(), ModelIdentity("tiny", "float32")
    desk.keep("a", TOKENS[:20])
    for n_seconds in seconds:
        desk.pass_time(n_seconds)
    launch = bench.driver.copy_from_host

    def copy(buffer: memoryview, address: int) -> ManualFence:
        launch(buffer, address).wait()
        return mute

    with monkeypatch.context() as patch:
        patch.setattr(bench.driver, "copy_from_host", copy)
        with pytest.raises(DriverError):
            desk.sessions.resume("a")
    assert bench.cache.active_slots() == []
    n_read = bench.frames.n_taken  # what the device may still read is nobody else's
    assert n_read > 0
    tokens = TOKENS[:20]
    if then == "forget":
        desk.sessions.forget("a")
        assert desk.level("a") is None
    elif then == "close":
        desk.sessions.close()
    elif then == "save":
        desk.sessions.save("a", tmp_path / "file", identity)
    else:
        if then == "go to disk":
            desk.pass_time(1000)
            assert desk.level("a") is (Level.DISK if len(seconds) == 1 else None)
        if desk.level("a") is not None:
            slot, _ = desk.sessions.resume("a")
            assert bench.holds(slot, tokens)
            tokens = bench.append(slot, tokens, [1, 2])
            desk.sessions.retain("a", slot, tokens, STAY)
            assert desk.pass_time(10) == 1  # to another copy
            assert bench.frames.n_taken > n_read
    if desk.disk is not None and then in ("forget", "close"):
        assert desk.disk.n_bytes == 0
    assert bench.frames.n_taken >= n_read
    bench.check()
    desk.sessions.close()
    assert bench.frames.n_taken == n_read
    with pytest.raises(UsageError, match="come to rest"):
        bench.host.close()
    mute.is_mute = False
    bench.host.poll()
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
