"""Parking, restoring, saving, loading and expiring under random operations and in every order, and mistakes found."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver, Handle
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import CapacityError, UsageError, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.testing.explorer import CallHook, Explored, explore
from vmem_kv.testing.late import LateDriver
from vmem_kv.testing.operations import MAX_TOKENS, Fault, Found, odd_layout, random_run
from vmem_kv.testing.shadow import ShadowTags, words_of
from vmem_kv.testing.shrink import shrink_run
from vmem_kv.testing.tier_operations import STAY_S, TieredRun
from vmem_kv.tiers.copies import HostCopy, end_of
from vmem_kv.tiers.host import HostTier, Parking, Restoring
from vmem_kv.tiers.memory import FramePool, PinnedMemory
from vmem_kv.tiers.moving import Move, Transfer
from vmem_kv.tiers.sessions import Sessions

from .conftest import Record
from .drivers import OPENERS, open_driver

Mistake = Callable[[pytest.MonkeyPatch], None]

N_OPS = {"native": 20_000, "cuda": 15_000}
SYNC_DEPTHS = {"native": 5, "cuda": 4}
HALVES_DEPTH = 6
SESSION_DEPTH = 6
STEP = 16


def test_random_operations_on_tiers_agree_with_the_models(
    driver: Driver, driver_name: str, is_long: bool, record: Record
) -> None:
    n_ops = N_OPS[driver_name] * (100 if is_long else 1)
    totals = random_run(7, n_ops, driver, run_type=TieredRun, opener=OPENERS[driver_name])
    assert totals.n_ops == n_ops
    record(
        "random operations on tiers against the models",
        driver_name,
        operations=totals.n_ops,
        faults=totals.n_faults,
        differences=0,
        tags_verified=totals.n_checks,
    )


class WithoutSessions(TieredRun):
    """Whose model says when sessions move, which depends on when copies have run."""

    def retain(self, slot: int, session: int, fault: Fault = None) -> None:
        pass


def test_copies_that_run_late_change_nothing(driver: Driver) -> None:
    totals = random_run(8, 5000, LateDriver(driver), run_type=WithoutSessions)
    assert totals.n_ops == 5000


# Mistakes that a tier could make.


def restores_a_stale_copy(patch: pytest.MonkeyPatch) -> None:
    """A park that takes what the copy holds for what the slot holds, without comparing tokens."""
    patch.setattr("vmem_kv.tiers.host.n_common", lambda one, other: min(len(one), len(other)))


def forgets_the_tail(patch: pytest.MonkeyPatch) -> None:
    """A restore that leaves out the last row."""
    moves = HostTier._moves

    def planted(tier: HostTier, copy: object, cache: object, slot: object, first: int, end: int) -> list[Move]:
        found = moves(tier, copy, cache, slot, first, end)  # type: ignore[arg-type]
        return [*found[:-1], Move(found[-1].address, found[-1].view[:-32])] if found else []

    patch.setattr(HostTier, "_moves", planted)


def loads_without_a_checksum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.tiers.streams.zlib", SimpleNamespace(crc32=lambda *_: 0))


def drops_what_nobody_else_has(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.tiers.host._is_droppable", lambda copy: not copy.is_written and not copy.n_readers)


def uses_frames_of_a_copy_that_stays(patch: pytest.MonkeyPatch) -> None:
    """A park that gives back one frame too many of those that the copy keeps."""
    commit = Parking._commit

    def planted(parking: Parking) -> None:
        commit(parking)
        if len(parking._copy.frames) > 3:
            parking._tier.frames.give(parking._copy.frames[-1:])

    patch.setattr(Parking, "_commit", planted)


def leaves_the_length_of_a_failed_restore(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Restoring, "_give_up", Restoring._settle_if_quiet)


def writes_over_what_is_to_go(patch: pytest.MonkeyPatch) -> None:
    """A park that writes where rows are that the copy has to keep if it fails."""
    patch.setattr(HostTier, "_free_from", lambda tier, copy, extents: end_of(extents, copy.layout))


def moves_everything_again(patch: pytest.MonkeyPatch) -> None:
    """A park that is right and slow: what the copy holds already is moved as well."""
    patch.setattr("vmem_kv.tiers.host.n_common", lambda one, other: 0)


def lets_sessions_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sessions, "poll", lambda sessions, max_sessions=None: 0)


def reads_another_session_from_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.tiers.disk.DiskTier._find_gap", lambda disk, n_bytes: (len(disk._copies), 0))
    loads_without_a_checksum(patch)


MISTAKES = [
    restores_a_stale_copy,
    forgets_the_tail,
    loads_without_a_checksum,
    drops_what_nobody_else_has,
    uses_frames_of_a_copy_that_stays,
    leaves_the_length_of_a_failed_restore,
    writes_over_what_is_to_go,
    moves_everything_again,
    lets_sessions_stay,
    reads_another_session_from_disk,
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_random_operations_find_a_mistake_of_the_tiers(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises(Found):
        random_run(1, 30_000, open_driver("native"), run_type=TieredRun)


@pytest.mark.parametrize("is_planted", [False, True])
def test_a_park_that_fails_is_held_to_every_byte_of_the_copy(is_planted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if is_planted:
        writes_over_what_is_to_go(monkeypatch)
    run = TieredRun(open_driver("native"), "per_layer")
    slot = run.acquire(MAX_TOKENS, "a")
    assert slot is not None
    for n_kept, n_tokens in ((0, 20), (20, 32)):
        run.truncate(slot, n_kept)
        run.ensure({slot: n_tokens})
        run.copy_out(slot, 0)
    run.retire(slot, None)
    fork = run.acquire(MAX_TOKENS, "a")  # goes another way behind 20 tokens
    assert fork is not None
    run.restore(0, fork, 0, 20)
    run.ensure({fork: 34})
    with pytest.raises(AssertionError, match="has changed copy 0") if is_planted else nullcontext():
        run.copy_out(fork, 0, (False, 5))  # behind a pin, a fence and two copies
    if not is_planted:
        run.finish()


def test_a_finding_in_the_tiers_is_a_program_and_can_be_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    restores_a_stale_copy(monkeypatch)
    with pytest.raises(Found) as caught:
        random_run(1, 30_000, open_driver("native"), run_type=TieredRun)
    run = caught.value.run
    with pytest.raises(AssertionError):
        exec(caught.value.program, {})
    n_whole = len(run.history)
    run.history = shrink_run(lambda: open_driver("native"), run.settings, run.history, TieredRun)
    assert len(run.history) < n_whole
    with pytest.raises(AssertionError):
        exec(run.program(), {})
    monkeypatch.undo()
    exec(run.program(), {})


# Every order of whole moves, held against the models.


class Lab:
    """A sequence that is parked and comes back, its fork, and another one that wants its pages."""

    def __init__(self, driver: Driver) -> None:
        self.run = TieredRun(driver, "token_major", n_slots=3, max_pages=20, keep_freed=True, n_frames=12)
        self.one = self.run.acquire(0, "a")
        self.other = self.run.acquire(0, "b")

    def n_tokens(self, slot: int | None) -> int:
        return 0 if slot is None else self.run.model.slots[slot].n_tokens

    def grow(self, slot: int | None) -> bool:
        if slot is None or self.n_tokens(slot) + STEP > MAX_TOKENS:
            return False
        self.run.ensure({slot: self.n_tokens(slot) + STEP})
        return True

    def cut(self) -> bool:
        if self.one is None or self.n_tokens(self.one) <= 5:
            return False
        self.run.truncate(self.one, self.n_tokens(self.one) - 5)
        return True

    def park(self, slot: int | None, copy: int) -> bool:
        if slot not in self.run.parkable():
            return False
        self.run.park(slot, copy)
        return True

    def copy_out(self) -> bool:
        if self.one not in self.run.parkable():
            return False
        self.run.copy_out(self.one, 0)
        return True

    def restore(self, slot: int | None, copy: int) -> bool:
        if slot not in self.run.empty() or copy not in self.run.tier.copies:
            return False
        self.run.restore(copy, slot, 0, len(self.run.tier.copies[copy].rows))
        return True

    def fork(self) -> bool:
        if not self.n_tokens(self.one) or len(self.run.live()) == 3:
            return False
        self.run.fork(self.one, self.n_tokens(self.one))  # type: ignore[arg-type]
        return True

    def retire(self) -> bool:
        """The sequence ends; another one takes up its copy."""
        if self.one is None:
            return False
        self.run.retire(self.one, None)
        self.one = self.run.acquire(0, "a")
        return True

    def retain(self) -> bool:
        """The sequence becomes a session, and another one begins."""
        if self.one not in self.run.parkable() or self.run.kept:
            return False
        self.run.retain(self.one, 0)
        self.one = self.run.acquire(0, "a")
        return True

    def expire(self) -> bool:
        if not self.run.kept:
            return False
        self.run.expire(STAY_S)
        return True

    def resume(self) -> bool:
        """The session comes back in the place of the sequence that began behind it."""
        if not self.run.kept:
            return False
        before = set(self.run.live())
        self.run.resume(0)
        for slot in set(self.run.live()) - before:
            if self.one is not None:
                self.run.retire(self.one, None)
            self.one = slot
        return True

    def fingerprint(self) -> Hashable:
        model, tier = self.run.model, self.run.tier
        first_home = {frame: page for page, frame in sorted(model.pages.items(), reverse=True)}
        shared = tuple(sorted((p, first_home[f]) for p, f in model.pages.items() if p != first_home[f]))
        slots = tuple((s.state, s.n_tokens, tuple(s.ends), s.domain if any(s.ends) else "") for s in model.slots)
        # Which rows are the same matters, not whose they are.
        rows = [self.run._rows(slot) for slot in self.run.live()] + [kept.rows for kept in self.run.kept.values()]
        where = tuple((kept.level, kept.slot, kept.due_s - self.run.clock()) for kept in self.run.kept.values())
        names: dict[int, int] = {}
        for row in (row for each in (*rows, *(copy.rows for copy in tier.copies.values())) for row in each):
            names.setdefault(row, len(names))
        copies = tuple(
            (n, tuple(c.parts), c.is_spare, tuple(names[row] for row in c.rows)) for n, c in tier.copies.items()
        )
        named = tuple(tuple(names[row] for row in each) for each in rows)
        order = tuple(model.reclaim_order())
        return slots, shared, copies, named, where, order, model.n_free, self.one, self.other


MOVES: dict[str, Callable[[Lab], bool]] = {
    "grow": lambda lab: lab.grow(lab.one),
    "cut": Lab.cut,
    "park": lambda lab: lab.park(lab.one, 0),
    "restore": lambda lab: lab.restore(lab.one, 0),
    "copy out": Lab.copy_out,
    "fork": Lab.fork,
    "retire": Lab.retire,
    "grow the other": lambda lab: lab.grow(lab.other),
    "park the other": lambda lab: lab.park(lab.other, 1),
    "restore the other": lambda lab: lab.restore(lab.other, 1),
}


SESSION_MOVES: dict[str, Callable[[Lab], bool]] = {
    "grow": lambda lab: lab.grow(lab.one),
    "retain": Lab.retain,
    "let time pass": Lab.expire,
    "resume": Lab.resume,
    "grow the other": lambda lab: lab.grow(lab.other),
    "park the other": lambda lab: lab.park(lab.other, 1),
    "restore the other": lambda lab: lab.restore(lab.other, 1),
}


def explore_moves(driver: Driver, depth: int, moves: dict[str, Callable[[Lab], bool]] = MOVES) -> Explored:
    return explore(lambda: Lab(driver), moves, Lab.fingerprint, lambda lab: lab.run.finish(), depth)


def test_every_sequence_of_session_moves_agrees_with_the_models(
    driver: Driver, driver_name: str, record: Record
) -> None:
    explored = explore_moves(driver, SESSION_DEPTH, SESSION_MOVES)
    assert explored.n_schedules > 200
    record(
        f"every sequence of {SESSION_DEPTH} moves with sessions that expire and come back",
        driver_name,
        schedules=explored.n_schedules,
        states=len(explored.states),
        runs=explored.n_runs,
    )


def test_every_sequence_of_parking_moves_agrees_with_the_models(
    driver: Driver, driver_name: str, record: Record
) -> None:
    depth = SYNC_DEPTHS[driver_name]
    explored = explore_moves(driver, depth)
    assert explored.n_schedules > 400
    record(
        f"every sequence of {depth} moves with parks and restores",
        driver_name,
        schedules=explored.n_schedules,
        states=len(explored.states),
        runs=explored.n_runs,
    )


@pytest.mark.parametrize("mistake", [restores_a_stale_copy, forgets_the_tail])
def test_the_explorer_finds_a_mistake_of_the_tiers(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match="->"):
        explore_moves(open_driver("native"), SYNC_DEPTHS["native"])


def test_the_explorer_finds_sessions_that_do_not_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    lets_sessions_stay(monkeypatch)
    with pytest.raises(AssertionError, match="retain"):
        explore_moves(open_driver("native"), SESSION_DEPTH, SESSION_MOVES)


# Calls of the cache in the middle of a park or a restore, as another thread could make them: at every moment before and
# behind every driver call. No model knows half calls: the books, the tags and the rows must be right.


class Middle:
    """A lab of which one sequence is moved while something happens to the other one."""

    def __init__(self, hook: CallHook, *, is_away: bool, other_is_warm: bool) -> None:
        self.lab = lab = Lab(hook)
        self.run, self.cache, self.host = lab.run, lab.run.cache, lab.run.host
        assert lab.one is not None
        assert lab.other is not None
        self.one, self.other = SlotId(lab.one), SlotId(lab.other)
        lab.grow(lab.one)
        lab.grow(lab.other)
        lab.copy_out()
        lab.grow(lab.one)
        self.rows = self.run._rows(lab.one)
        if is_away:
            lab.park(lab.one, 0)
        self.n_other: int | None = STEP
        if other_is_warm:
            self.run.retire(lab.other, None)
            self.n_other = None

    def park(self) -> None:
        self.host.park(self.run.copies[0], self.cache, self.one, self.rows)

    def restore(self) -> None:
        self.host.restore(self.run.copies[0], self.cache, self.one)

    def grow(self) -> None:
        if self.n_other is not None:
            self.cache.ensure({self.other: self.n_other + STEP})
            self.run.tags.write(self.other, self.n_other, self.n_other + STEP, 99)
            self.n_other += STEP

    def retire(self) -> None:
        if self.n_other is not None:
            self.n_other = None
            self.cache.retire(self.other)

    def reclaim(self) -> None:
        self.cache.reclaim(3)

    def acquire(self) -> None:
        self.cache.ensure({self.cache.acquire(expected_tokens=STEP, domain="c"): STEP})

    def verify(self) -> None:
        self.cache.check()
        self.host.check()
        if not self.cache.n_tokens(self.one):
            with suppress(CapacityError):
                self.host.restore(self.run.copies[0], self.cache, self.one)
        if self.cache.n_tokens(self.one):
            self.run.tags.expect(self.one, 0, self.rows)
            self.run.tags.verify(self.one, 0, len(self.rows))
        else:
            assert list(self.run.copies[0].tokens) == self.rows
        if self.n_other is not None:
            self.run.tags.verify(self.other, 0, self.n_other)
        self.host.close()
        self.cache.retire(self.cache.active_slots())
        self.cache.settle()
        self.cache.close()
        self.run.pool.trim()
        driver = self.run.driver
        left = (driver.n_live_mappings, driver.n_live_reservations, driver.n_live_handles, driver.n_pinned)
        assert left == (0, 0, 0, 0)


INNER: dict[str, Callable[[Middle], None]] = {
    "grow the other": Middle.grow,
    "retire the other": Middle.retire,
    "reclaim": Middle.reclaim,
    "acquire": Middle.acquire,
}


def overlap(driver: Driver) -> int:
    """Try each call at every moment of a park and of a restore; return how many overlaps."""
    hook, n_overlaps = CallHook(driver), 0
    for is_away in (False, True):
        for other_is_warm in (False, True):
            for name, inner in INNER.items():
                at = 1
                while True:
                    middle = Middle(hook, is_away=is_away, other_is_warm=other_is_warm)

                    def tolerant(call: Callable[[Middle], None], middle: Middle = middle) -> None:
                        with suppress(CapacityError):  # then nothing has changed
                            call(middle)

                    hook.arm(at, lambda inner=inner, tolerant=tolerant: tolerant(inner))  # type: ignore[misc]
                    tolerant(Middle.restore if is_away else Middle.park)
                    has_overlapped = hook.n_moments >= at
                    hook.arm(0, lambda: None)
                    try:
                        middle.verify()
                    except (AssertionError, VmemError) as error:
                        outer = "a restore" if is_away else "a park"
                        raise AssertionError(f"{name!r} at moment {at} of {outer}: {error!r}") from error
                    if not has_overlapped:
                        break
                    n_overlaps += 1
                    at += 1
    return n_overlaps


def test_the_cache_may_be_used_in_the_middle_of_a_park_or_restore(
    driver: Driver, driver_name: str, record: Record
) -> None:
    n_overlaps = overlap(driver)
    assert n_overlaps > 100
    record("cache calls at each moment of parks and restores", driver_name, overlaps=n_overlaps)


def vacates_before_it_has_read(patch: pytest.MonkeyPatch) -> None:
    """A park that gives the pages back first: whoever comes in between has them."""

    def planted(tier: HostTier, copy: HostCopy, cache: KVCache, slot_id: SlotId, tokens: list[int]) -> None:
        moves = tier._begin(copy, cache, slot_id, tokens, then_vacate=False)
        cache.vacate(slot_id)
        cache.ensure({slot_id: len(tokens)})
        moves.cancel()
        tier.copy_out(copy, cache, slot_id, tokens)
        cache.vacate(slot_id)

    patch.setattr(HostTier, "park", planted)


def test_an_overlap_finds_a_park_that_vacates_first(monkeypatch: pytest.MonkeyPatch) -> None:
    vacates_before_it_has_read(monkeypatch)
    with pytest.raises(AssertionError, match="of a park"):
        overlap(open_driver("native"))


# Parks and restores that are begun and finished in different moves, on a device whose copies run as late as they may.


class Halves:
    """Two sequences, of which one goes out and comes back by halves."""

    def __init__(self, driver: Driver) -> None:
        self.late = LateDriver(driver)
        self.driver = CheckedDriver(self.late)
        page_bytes = driver.info.granularity_bytes
        self.pool = PagePool(self.driver, page_bytes, 22, keep_freed=True)
        self.layout = odd_layout("token_major", page_bytes, n_slots=2)
        self.cache = KVCache(self.pool, self.layout)
        memory = PinnedMemory(self.driver)
        self.host = HostTier(
            FramePool(12 * page_bytes, memory, frame_bytes=page_bytes, buffer_bytes=4 * page_bytes, ledger=Ledger())
        )
        self.tags = ShadowTags(self.layout, words_of(driver, self.cache.region.reservation))
        self.slots = [self.cache.acquire(expected_tokens=0, domain=name) for name in "ab"]
        self.copies = [self.host.new_copy(self.layout) for _ in self.slots]
        self.lengths = [0, 0]
        self.half: Parking | Restoring | None = None

    def grow(self, index: int) -> bool:
        n_tokens = self.lengths[index] + STEP
        is_away = self.lengths[index] and not self.cache.n_tokens(self.slots[index])
        if is_away or (index == 0 and self.half) or n_tokens > MAX_TOKENS:
            return False
        try:
            self.cache.ensure({self.slots[index]: n_tokens})
        except CapacityError:
            return True
        self.late.catch_up()
        self.tags.write(self.slots[index], self.lengths[index], n_tokens, index + 1)
        self.lengths[index] = n_tokens
        return True

    def begin_park(self) -> bool:
        if self.half or not self.cache.n_tokens(self.slots[0]):
            return False
        try:
            self.half = self.host.begin_park(self.copies[0], self.cache, self.slots[0], self.tokens(0))
        except CapacityError:
            return False
        return True

    def begin_restore(self) -> bool:
        if self.half or self.cache.n_tokens(self.slots[0]) or not self.lengths[0]:
            return False
        try:
            self.half = self.host.begin_restore(self.copies[0], self.cache, self.slots[0])
        except CapacityError:
            return True  # warm slots may have gone cold
        return True

    def finish(self) -> bool:
        if self.half is None:
            return False
        self.half.finish()
        self.half = None
        return True

    def cancel(self) -> bool:
        if not isinstance(self.half, Parking):
            return False
        self.half.cancel()
        self.half = None
        return True

    def ask(self) -> bool:
        if self.half is None:
            return False
        self.half.passed()
        return True

    def park_other(self) -> bool:
        if not self.cache.n_tokens(self.slots[1]):
            return False
        try:
            self.host.park(self.copies[1], self.cache, self.slots[1], self.tokens(1))
        except CapacityError:
            return False
        return True

    def restore_other(self) -> bool:
        if self.cache.n_tokens(self.slots[1]) or not self.lengths[1]:
            return False
        try:
            self.host.restore(self.copies[1], self.cache, self.slots[1])
        except CapacityError:
            return True
        return True

    def drop(self) -> bool:
        """What is under way is not dropped; what nobody needs is, also what a restore has read already."""
        if isinstance(self.half, Parking):
            with pytest.raises(UsageError, match="under way"):
                self.host.drop(self.copies[0])
        elif isinstance(self.half, Restoring):
            with suppress(UsageError):
                self.host.drop(self.copies[0])
                assert not self.late.n_pending
        elif self.cache.n_tokens(self.slots[0]) and self.copies[0].n_tokens:
            self.host.drop(self.copies[0])
        else:
            return False
        return True

    def tokens(self, index: int) -> list[int]:
        return self.tags.identities(self.slots[index], self.lengths[index])

    def check(self) -> None:
        self.cache.check()
        self.host.check()
        for index, slot in enumerate(self.slots):
            if index == 1 or self.half is None:
                n_tokens = self.cache.n_tokens(slot)
                assert n_tokens in (0, self.lengths[index])
                self.tags.verify(slot, 0, n_tokens)

    def fingerprint(self) -> Hashable:
        where = tuple(self.cache.n_tokens(slot) for slot in self.slots)
        held = tuple(
            (copy.n_tokens, copy.extents, tuple(copy.frames), copy.is_spare, copy.n_readers) for copy in self.copies
        )
        half = type(self.half).__name__ if self.half is not None else ""
        mapped = tuple(self.cache.token_capacity(slot) for slot in self.slots)
        return tuple(self.lengths), where, held, half, mapped, self.late.n_pending, self.pool.n_free

    def end(self) -> None:
        self.check()
        self.finish()
        self.check()
        away = [i for i, slot in enumerate(self.slots) if self.lengths[i] and not self.cache.n_tokens(slot)]
        for index in away:
            for slot in self.slots:  # room; what was here was verified
                self.cache.vacate(slot)
            self.host.restore(self.copies[index], self.cache, self.slots[index])
            self.tags.verify(self.slots[index], 0, self.lengths[index])
        self.host.close()
        self.cache.retire(self.cache.active_slots())
        self.cache.settle()
        self.cache.close()
        self.pool.trim()
        driver = self.driver
        left = (driver.n_live_mappings, driver.n_live_reservations, driver.n_live_handles, driver.n_pinned)
        assert left == (0, 0, 0, 0)


HALVES: dict[str, Callable[[Halves], bool]] = {
    "grow": lambda halves: halves.grow(0),
    "begin to park": Halves.begin_park,
    "begin to restore": Halves.begin_restore,
    "finish": Halves.finish,
    "cancel": Halves.cancel,
    "ask": Halves.ask,
    "drop": Halves.drop,
    "grow the other": lambda halves: halves.grow(1),
    "park the other": Halves.park_other,
    "restore the other": Halves.restore_other,
}


def explore_halves(driver: Driver, depth: int) -> Explored:
    def checked(move: Callable[[Halves], bool]) -> Callable[[Halves], bool]:
        def make(halves: Halves) -> bool:
            is_possible = move(halves)
            halves.check()
            return is_possible

        return make

    moves = {name: checked(move) for name, move in HALVES.items()}
    return explore(lambda: Halves(driver), moves, Halves.fingerprint, Halves.end, depth)


def test_every_order_of_half_parks_and_half_restores(driver: Driver, driver_name: str, record: Record) -> None:
    explored = explore_halves(driver, HALVES_DEPTH)
    assert explored.n_schedules > 800
    record(
        f"every sequence of {HALVES_DEPTH} halves of parks and restores",
        driver_name,
        schedules=explored.n_schedules,
        states=len(explored.states),
        runs=explored.n_runs,
    )


def does_not_wait(patch: pytest.MonkeyPatch) -> None:
    """A park that gives pages back, and calls rows its own, before the copies have run."""
    patch.setattr(Transfer, "wait", lambda transfer: None)


def cancels_without_waiting(patch: pytest.MonkeyPatch) -> None:
    """A park that gives frames back which a copy may still write."""
    patch.setattr(Transfer, "is_quiet", lambda transfer: True)


def restores_behind_its_back(patch: pytest.MonkeyPatch) -> None:
    """A restore whose copy may be written again at once."""
    patch.setattr(Restoring, "_settle", lambda restoring: None)
    original = HostTier.begin_restore

    def planted(tier: HostTier, *arguments: object, **keywords: object) -> Restoring:
        restoring = original(tier, *arguments, **keywords)  # type: ignore[arg-type]
        restoring._copy.n_readers -= 1
        return restoring

    patch.setattr(HostTier, "begin_restore", planted)


@pytest.mark.parametrize("mistake", [does_not_wait, cancels_without_waiting, restores_behind_its_back])
def test_halves_find_who_does_not_wait(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match="begin to"):
        explore_halves(open_driver("native"), HALVES_DEPTH)


def test_a_late_device_says_who_uses_what_a_copy_still_needs() -> None:
    driver = open_driver("native")
    late = LateDriver(driver)
    page = driver.info.granularity_bytes
    reservation = late.reserve(page)
    handles: list[Handle] = []
    late.create(page, [reservation.base], handles)
    late.map(page, [reservation.base], handles)
    late.set_access([(reservation.base, page)])
    buffer = bytearray(b"rows")
    fence = late.copy_from_host(memoryview(buffer), reservation.base)
    assert not fence.passed()
    with pytest.raises(UsageError, match="unmap at"):
        late.unmap([(reservation.base, page)])
    buffer[:] = b"late"  # before it was read
    assert fence.passed()
    found = bytearray(4)
    late.copy_to_host(reservation.base, memoryview(found))
    assert late.n_pending == 1
    late.scrub([(reservation.base, page)])  # behind it
    assert found == b"late"
    late.unmap([(reservation.base, page)])
    late.release(page, handles)
    late.free_reservation(reservation)
    late.close()
