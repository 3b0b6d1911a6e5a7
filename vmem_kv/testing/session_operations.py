"""Random operations on a cache with tiers and sessions: retain, expire, resume, forget, save, load.

`SessionRun` is a `TieredRun` with more operations, and a model of where every session is. Without a fault it predicts
exactly: which sessions go down a level and which further for want of room, which slot one comes back to, what moves.

After a call that met a fault it takes over what the contract leaves open, and no more: a session stays where it was or
goes down, but not without its time being over or room being needed; it never loses a row; its copy may be dropped for
room only while the rows are elsewhere too; its slot is retired when it has left the device, and not before. What was
left to a later call is done at once, without faults.

Guarantees and assumptions are those of `operations.py`.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Unpack

from vmem_kv.driver.base import Driver
from vmem_kv.errors import (
    DriverError,
    FileRefused,
    OutOfHostMemory,
    OutOfPages,
    OutOfSlots,
    UnknownSession,
    VmemError,
)
from vmem_kv.growth import SlotId
from vmem_kv.testing.clock import ManualClock
from vmem_kv.testing.faults import no_faults
from vmem_kv.testing.model import Page
from vmem_kv.testing.operations import Fault, Operation, RunOptions, require
from vmem_kv.testing.tier_model import ModelCopy
from vmem_kv.testing.tier_operations import IDENTITY, N_COPIES, N_FILES, TieredRun
from vmem_kv.tiers.copies import HostCopy
from vmem_kv.tiers.disk import DiskTier
from vmem_kv.tiers.sessions import Level, Sessions, Stay

N_SESSIONS = 3
STAY_S = 10.0
SESSION_SHARE = 0.08
"""How many of the random operations are those of sessions."""

_DOMAIN = "a"
"""Whose a session is that comes from a file."""

_DEPTH: dict[Level | None, int] = {Level.IN_USE: 0, Level.DEVICE: 0, Level.HOST: 1, Level.DISK: 2, None: 3}
"""How far down a session is; None for one that is gone."""


@dataclass(slots=True)
class _Kept:
    """A session as its owner remembers it."""

    rows: list[int]
    domain: str
    slot: int | None  # while it is on the device
    due_s: float
    level: Level


class SessionRun(TieredRun):
    """A run with a host tier, files and sessions; see this file's first lines.

    Args:
        driver: As of `TieredRun`.
        kind: Likewise.
        n_frames: Likewise.
        options: Likewise.
    """

    def __init__(
        self, driver: Driver, kind: str = "per_layer", *, n_frames: int = 40, **options: Unpack[RunOptions]
    ) -> None:
        super().__init__(driver, kind, n_frames=n_frames, **options)
        self.clock = ManualClock()
        self.kept: dict[int, _Kept] = {}

    @cached_property
    def sessions(self) -> Sessions:
        """The sessions, on a third tier that is never full."""
        disk = DiskTier(self.directory, 1 << 40)
        weakref.finalize(self, disk.close)
        return Sessions(self.cache, self.host, disk, self.clock)

    # One method per operation.

    def retain(self, slot: int, session: int, fault: Fault = None) -> None:
        """Keep a sequence as a session, whose slot is nobody else's any more."""
        self._begin("retain", (slot, session), fault)
        rows, domain = self._rows(slot), self.model.slots[slot].domain
        stay = Stay(STAY_S, STAY_S, STAY_S)
        self.sessions.retain(str(session), SlotId(slot), rows, stay, domain=domain)
        self.kept[session] = _Kept(rows, domain, slot, self.clock() + STAY_S, Level.DEVICE)
        self._end()

    def expire(self, seconds: float, fault: Fault = None) -> None:
        """Let time pass; sessions whose time is over go down a level."""
        self._begin("expire", (seconds,), fault)
        self.clock.advance(seconds)
        now_s = self.clock()
        due = [session for session, kept in self.kept.items() if kept.due_s <= now_s]
        self._may_break_off(self.sessions.poll)
        if self.is_faulted:
            self._take_over(due)
        else:
            for session in sorted(due, key=lambda session: self.kept[session].due_s):
                if session in self.kept and self.kept[session].due_s <= now_s:
                    self._sink(session)
        self._end()

    def resume(self, session: int, fault: Fault = None) -> None:
        """Bring a session back, whose owner forgets that it was one."""
        self._begin("resume", (session,), fault)
        kept = self.kept[session]
        if kept.slot is None:
            self._bring_back(session, kept)
        else:
            slot, rows = self.sessions.resume(str(session), domain=kept.domain)
            require((slot, list(rows)) == (kept.slot, kept.rows), f"slot {slot} came back instead of {kept.slot}")
            self._forget(session)
        self._end()

    def forget(self, session: int, fault: Fault = None) -> None:
        """End a session wherever it is."""
        self._begin("forget", (session,), fault)
        kept = self.kept[session]
        self._may_break_off(lambda: self.sessions.forget(str(session), domain=kept.domain))
        if self.is_faulted:
            self._take_over(may_end=session)
        else:
            self._retired([kept.slot])
            self._lost(session)
        self._end()

    def save_session(self, session: int, file: int, fault: Fault = None) -> None:
        """Write a session to a file; it stays where it is."""
        self._begin("save_session", (session, file), fault)
        kept = self.kept[session]
        try:
            self.sessions.save(str(session), self._path(file), IDENTITY, domain=kept.domain)
        except (DriverError, OutOfHostMemory) as error:
            failure: VmemError | None = error
        else:
            failure = None
            self.files[file] = list(kept.rows)
        if self.is_faulted:
            self._take_over()
        else:
            has_room = self._copied(session) if kept.slot is not None else self._is_in_memory(session)
            require(has_room == (failure is None), f"there {'was' if has_room else 'was no'} room: {failure!r}")
        self._end()

    def load_session(self, file: int, session: int, fault: Fault = None) -> None:
        """Begin a session with what is in a file."""
        self._begin("load_session", (file, session), fault)
        rows = self.files[file]
        can_fit = self.tier.n_frames_for(rows) <= self.tier.max_frames
        stay = Stay(STAY_S, STAY_S, STAY_S)
        try:
            self.sessions.load(str(session), self._path(file), IDENTITY, stay, domain=_DOMAIN)
        except FileRefused as error:
            require(not rows or not can_fit, "a whole file was refused")
            failure: VmemError | None = error
        except (DriverError, OutOfHostMemory) as error:
            failure = error
        else:
            require(bool(rows), "a file that was spoilt was loaded")
            failure = None
        if self.is_faulted or not rows:  # nobody knows how far one that was spoilt could be read
            if failure is None:
                self.kept[session] = _Kept(rows, _DOMAIN, None, self.clock() + STAY_S, Level.HOST)
            self._take_over()
        elif can_fit:
            has_room = self._is_in_memory(session, rows)
            require(has_room == (failure is None), f"there {'was' if has_room else 'was no'} room: {failure!r}")
            if has_room:
                self.kept[session] = _Kept(rows, _DOMAIN, None, self.clock() + STAY_S, Level.HOST)
        self._end()

    # What `Run` asks

    def random_step(self, choose: random.Random, fault_share: float) -> None:
        """Do one random operation."""
        if choose.random() < SESSION_SHARE:
            session_step(self, choose, fault_share)
        else:
            super().random_step(choose, fault_share)

    def live(self) -> list[int]:
        """Slots that belong to sequences, those of sessions not included."""
        theirs = {kept.slot for kept in self.kept.values()}
        return [slot for slot in super().live() if slot not in theirs]

    def is_possible(self, operation: Operation) -> bool:
        """Whether an operation makes sense now."""
        name, arguments = operation.name, operation.arguments
        if name == "retain":
            return arguments[0] in self.parkable() and arguments[1] not in self.kept
        if name in ("resume", "forget", "save_session"):
            return arguments[0] in self.kept
        if name == "load_session":
            return arguments[0] in self.files and arguments[1] not in self.kept
        return name == "expire" or super().is_possible(operation)

    def finish(self) -> None:
        """End everything and look for what is left; see `Run.finish`."""
        if self.kept:
            self.sessions.close()
        super().finish()

    # Inside: what must happen without a fault

    def _end(self, fresh: Iterable[Page] = ()) -> None:
        super()._end(fresh)
        for session, kept in self.kept.items():
            level = self.sessions.level(str(session), domain=kept.domain)
            require(level is kept.level, f"session {session} is at level {level}, not {kept.level}")

    def _sink(self, session: int) -> None:
        """A session went down a level, or further for want of room."""
        kept = self.kept[session]
        if kept.level is Level.DISK:
            self._lost(session)
            return
        slot, kept.slot = kept.slot, None
        if kept.level is Level.HOST:
            del self.tier.copies[self._number(session)]
            kept.level = Level.DISK
        elif self._copied(session):
            self.tier.copies[self._number(session)].is_spare = False
            kept.level = Level.HOST
        else:
            self._lost(session)
        kept.due_s = self.clock() + STAY_S
        self._retired([slot])

    def _copied(self, session: int) -> bool:
        """A session's copy was brought up to date from its slot; return whether there was room."""
        number, rows = self._number(session), self.kept[session].rows
        new, n_moved, n_frames = self.tier.after_park(number, rows)
        new.is_spare = True
        can_fit = self.tier.n_frames_for(rows) <= self.tier.max_frames
        while not (room := self.tier.plan_room(n_frames, number))[0] and can_fit and self._make_host_room():
            pass
        if room[0]:
            self.tier.dropped_for_room(room[1])
            self.tier.holds(number, new)
            self.tier.out_bytes += n_moved * self.tier.row_bytes
        return room[0]

    def _is_in_memory(self, session: int, rows: Sequence[int] | None = None) -> bool:
        """A session's rows are in host memory, or were brought there from disk or a file; return whether they fit."""
        number = self._number(session)
        if number in self.tier.copies:
            return True
        wanted = self.kept[session].rows if rows is None else list(rows)
        while True:
            fits, victims = self.tier.plan_room(self.tier.n_frames_for(wanted), None)
            if fits:
                self.tier.dropped_for_room(victims)
                self.tier.holds(number, ModelCopy(wanted, [(0, len(wanted), 0)], is_spare=rows is None))
                return True
            if not self._make_host_room():
                return False

    def _make_host_room(self) -> bool:
        """The session in host memory that is the next to expire went to disk."""
        there = [session for session, kept in self.kept.items() if kept.level is Level.HOST]
        if there:
            self._sink(min(there, key=lambda session: self.kept[session].due_s))
        return bool(there)

    def _retired(self, slots: Sequence[int | None]) -> None:
        """These slots are nobody's any more, in this order."""
        for slot in slots:
            if slot is not None:
                self.model.retired(slot)
                self.model.fence_passed(slot)

    def _lost(self, session: int) -> None:
        self.tier.copies.pop(self._number(session), None)
        del self.kept[session]

    def _forget(self, session: int) -> None:
        self.sessions.forget(str(session), domain=self.kept[session].domain)
        self._lost(session)

    def _bring_back(self, session: int, kept: _Kept) -> None:
        """Resume a session that has no slot, which takes one, pages, and maybe host memory."""
        slot = next(iter(self.model.best_slots(1, len(kept.rows))), None)
        try:
            resumed = self.sessions.resume(str(session), domain=kept.domain)
        except OutOfSlots:
            require(slot is None or self.is_faulted, f"slot {slot} is free")
            failure: VmemError | None = OutOfSlots("none")
        except (OutOfPages, OutOfHostMemory, DriverError) as error:
            require(slot is not None or self.is_faulted, "there was no slot")
            failure = error
        else:
            require(resumed.slot_id == slot, f"slot {resumed.slot_id} was taken, not {slot}")
            failure = None
        if self.is_faulted:
            self._took_back(session, slot, failure)
        elif slot is not None:
            self._must_have_brought_back(session, slot, failure)

    def _must_have_brought_back(self, session: int, slot: int, failure: VmemError | None) -> None:
        kept = self.kept[session]
        n_tokens = len(kept.rows)
        fresh = self._acquired(slot, kept.domain)
        is_there = self._is_in_memory(session)
        require(is_there or isinstance(failure, OutOfHostMemory), "there was not so much host memory")
        if is_there:
            fresh |= self.model.missing({slot: n_tokens})
            fits, victims = self.model.plan_ensure({slot: n_tokens})
            require(fits == (failure is None), f"the pages {'were' if fits else 'were not'} there: {failure!r}")
            self.model.reclaimed(victims)
        if failure is not None:
            self._retired([slot])
            return
        self._came_back(slot, kept.rows, 0, n_tokens, fresh)
        self._forget(session)

    def _acquired(self, slot: int, domain: str) -> set[Page]:
        """A slot was taken for a session; return the pages that were scrubbed for it."""
        state = self.model.slots[slot]
        is_foreign = state.state == "warm" and state.domain != domain
        self.model.acquired(slot, domain)
        self.n_sequences += 1
        self._sequences[slot] = self.n_sequences
        return {page for page in self.model.pages if page[0] == slot} if is_foreign else set()

    # Inside: what may have happened in a call that met a fault

    def _take_over(self, may_go: Sequence[int] = (), *, may_end: int | None = None) -> None:
        """See where everything is after a call that broke off, and that it may be there.

        Args:
            may_go: The sessions that were to go down.
            may_end: The session that was to end.
        """
        self._finish_what_was_left()
        left: list[int] = []  # slots
        n_rows_out, n_droppable = {0}, 0
        for session, kept in list(self.kept.items()):
            level, number, slot = self._level(session), self._number(session), kept.slot
            require(_DEPTH[level] >= _DEPTH[kept.level], f"session {session} went up to {level}")
            require(
                level is kept.level or self._may_go_to(level, session, is_due=session in may_go) or session == may_end,
                f"session {session} went to {level}",
            )
            before, n_more = self.tier.copies.get(number), self._n_rows_to_move(number, kept)
            if level is not kept.level:
                left += [slot] if slot is not None else []
                kept.slot, kept.due_s = None, self.clock() + STAY_S
            if level is None:
                self._lost(session)
            else:
                kept.level = level
                self._take_over_copy(number, kept)
            if slot is not None and level is not None:
                if number in self.tier.copies:
                    n_more = {self._n_rows_beyond(before, self.tier.copies[number])}
                elif level is Level.DEVICE:
                    n_more.add(0)  # or it was copied, and that was dropped
                n_rows_out = {n + more for n in n_rows_out for more in n_more}
            may_drop = slot is not None or (before is not None and before.is_spare)
            n_droppable += may_drop and number not in self.tier.copies
        order = list(self.cache._slots.warm)
        self._retired(sorted(left, key=lambda slot: order.index(SlotId(slot)) if slot in order else -1))
        self._take_over_counts(n_rows_out, n_droppable)

    def _may_go_to(self, level: Level | None, session: int, *, is_due: bool) -> bool:
        """Whether a session may have gone down so far: as its time wants it, or for room; or away for want of room."""
        kept = self.kept[session]
        if kept.level is Level.HOST:
            return level is Level.DISK  # maybe for another one
        if kept.level is Level.DEVICE and level is None:
            _, _, n_frames = self.tier.after_park(self._number(session), kept.rows)
            is_short = any(point.operation == "pin" for point in self.faulty.faults)
            return is_due and (is_short or not self.tier.plan_room(n_frames, self._number(session))[0])
        return is_due

    def _finish_what_was_left(self) -> None:
        """What a call that broke off leaves to a later one is done now, without faults."""
        self.faulty.plan = no_faults
        self.sessions.poll(0)
        self.cache.reclaim(0)

    def _level(self, session: int) -> Level | None:
        try:
            return self.sessions.level(str(session), domain=self.kept[session].domain)
        except UnknownSession:
            return None

    def _take_over_copy(self, number: int, kept: _Kept) -> None:
        """A session's copy is as before, or brought up to date, or dropped."""
        copy, before = self._copy(number), self.tier.copies.get(number, ModelCopy())
        if not copy.n_tokens:
            self.tier.copies.pop(number, None)
            return
        rows, parts = list(copy.tokens), [(e.first_token, e.n_tokens, e.first_byte) for e in copy.extents]
        if (rows, parts) != (before.rows, before.parts):
            require(rows == kept.rows, f"copy {number} holds other rows")
            self.tier.holds(number, ModelCopy(rows, parts))
        require(copy.is_spare == (kept.level is not Level.HOST), f"copy {number} may be dropped at {kept.level}")
        self.tier.copies[number].is_spare = copy.is_spare

    def _n_rows_to_move(self, number: int, kept: _Kept) -> set[int]:
        """How many rows of a session may have to be moved out: those that its copy lacks, or all where it had to go."""
        return {self.tier.after_park(number, kept.rows)[1], len(kept.rows)}

    def _n_rows_beyond(self, before: ModelCopy | None, copy: ModelCopy) -> int:
        """Rows that were moved to a copy since."""
        parts = [] if before is None else before.parts
        return sum(part[1] for part in copy.parts if part not in parts)

    def _take_over_counts(self, n_rows_out: Collection[int], n_droppable: int) -> None:
        """Rows were moved out, so many of those that sessions may have moved; and copies were dropped for room."""
        self._take_over_drops()
        stats = self.host.stats()
        n_dropped, out_bytes = stats.n_dropped - self.tier.n_dropped, stats.out_bytes - self.tier.out_bytes
        require(0 <= n_dropped <= n_droppable, f"{n_dropped} copies were dropped, of which {n_droppable} could be")
        require(out_bytes in {n * self.tier.row_bytes for n in n_rows_out}, f"{out_bytes} bytes moved, for nobody")
        self.tier.n_dropped += n_dropped
        self.tier.out_bytes += out_bytes

    def _took_back(self, session: int, slot: int | None, failure: VmemError | None) -> None:
        """A resume of a session without a slot met a fault."""
        kept, number = self.kept[session], self._number(session)
        if failure is None and slot is not None:
            self.faulty.plan = no_faults
            self._forget(session)
            self._take_over()
            fresh = self._acquired(slot, kept.domain) | self.model.missing({slot: len(kept.rows)})
            self._take_over_reclaimed()
            self._came_back(slot, kept.rows, 0, len(kept.rows), fresh)
            return
        self._take_over()
        if slot is None or not self._was_acquired(slot, kept.domain):
            return
        fresh, missing = self._acquired(slot, kept.domain), self.model.missing({slot: len(kept.rows)})
        self._take_over_reclaimed()
        if missing <= self._mapped_pages().keys():  # they stay mapped
            self.model.premapped({slot: len(kept.rows)})
            fresh |= missing
        self._require_nothing_old(slot, number, fresh)
        self._retired([slot])

    def _was_acquired(self, slot: int, domain: str) -> bool:
        """Whether a slot was taken in vain, as far as anybody can see: then it was retired last, with pages."""
        slots = self.cache._slots
        if not slots.warm or list(slots.warm)[-1] != slot or slots.domain[SlotId(slot)] != domain:
            return False
        pages = {page for page in self._mapped_pages() if page[0] == slot}
        return self.model.has_front(slot) or not pages <= self.model.pages.keys()

    def _take_over_reclaimed(self) -> None:
        self.model.reclaimed(s for s in self.model.reclaim_order() if not self._is_warm(s))

    def _number(self, session: int) -> int:
        """By which the model knows a session's copy."""
        return N_COPIES + session

    def _copy(self, number: int) -> HostCopy:
        if number < N_COPIES:
            return super()._copy(number)
        session = number - N_COPIES
        return self.sessions._find(str(session), self.kept[session].domain).host_copy


def session_step(run: SessionRun, choose: random.Random, fault_share: float = 0.15) -> None:
    """Do one random operation of a session; faults are planned more often, since few of them call the driver."""
    is_faulty = choose.random() < 3 * fault_share
    fault = (choose.random() < 0.5, choose.choice((1, 1, 1, 2, 2, 3, 4, 6))) if is_faulty else None
    kind, parkable, kept = choose.random(), run.parkable(), list(run.kept)
    new = [session for session in range(N_SESSIONS) if session not in run.kept]
    if kind < 0.3:
        if parkable and new:
            run.retain(choose.choice(parkable), choose.choice(new), fault)
    elif kind < 0.6:
        run.expire(choose.choice((1.0, STAY_S / 2, STAY_S)), fault)
    elif kind < 0.65:
        if run.files and new:
            run.load_session(choose.choice(list(run.files)), choose.choice(new), fault)
    elif kept:
        session = choose.choice(kept)
        if kind < 0.85:
            run.resume(session, fault)
        elif kind < 0.95:
            run.save_session(session, choose.randrange(N_FILES), fault)
        else:
            run.forget(session, fault)
