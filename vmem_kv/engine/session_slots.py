"""Sessions in the engine: a sequence that ends under a name keeps its slot, and the next of that name goes on in it.

    begin    a session of that name, in that domain, whose tokens the new ones extend: its slot is taken over, or its
             rows are brought back from host memory or disk; only what is new is computed. Where the new tokens leave
             the session's, what is common is used, and the rest of the session is given up
    end      the slot is kept under the name; time moves it to host memory, to disk, and away (tiers/sessions.py)
    room     a session that waits blocks nobody: where pages or slots are short, it goes to host memory before its time

A name is claimed by the sequence that has begun with it, or waits to: its session is in use, wherever that is, and
also where there is none yet. Another one of that name runs meanwhile as if it had none;
whoever ends last, and nobody else has the name then, is what the session goes on with. Of several answers to a request
the first has the name.

Nobody waits for copies and files, but operators. `Sessions` has what is on its way down, or from disk, and is asked in
every step what of it has passed; `Arrivals` has what is on its way into a slot. A session that is asked for on its way
down stays where it was. Until a sequence has its session's rows it is in the queue, its name is claimed, and the
session is held; if it ends there, the session waits as before.

Guarantees: rows are taken for those of the tokens that they were computed for, since token ids are compared. A name
means nothing in another domain. Whatever fails here, the session is gone and the sequence is computed.
Assumptions: one thread, but for what `SlotSource` says. All that a sequence keeps is in its slot, from its first token
on.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from vmem_kv.engine.arrivals import Arrivals
from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.moves import Moves
from vmem_kv.engine.prefix_pages import CachedPages
from vmem_kv.engine.request import Sequence
from vmem_kv.engine.slot_source import SlotSource, Start
from vmem_kv.engine.slots_over import SlotsOver
from vmem_kv.errors import (
    CapacityError,
    DriverError,
    FileError,
    InvariantError,
    OutOfSlots,
    SessionInUse,
    UnknownSession,
    VmemError,
)
from vmem_kv.growth import SlotId
from vmem_kv.tiers.copies import HostCopy, n_common, token_ids
from vmem_kv.tiers.disk import DiskTier
from vmem_kv.tiers.files import ModelIdentity
from vmem_kv.tiers.host import HostTier
from vmem_kv.tiers.sessions import Level, Sessions, SessionStats, Stay

POLL_S = 0.1
"""How often time may move sessions. Looking takes time in proportion to them."""

_NOT_WAITING = (None, Level.IN_USE)

_LOG = logging.getLogger("vmem_kv")


class Name(NamedTuple):
    """What a session is found by."""

    domain: str
    session_id: str

    @property
    def owner(self) -> str:
        """Whose it is: a client's domains, one for each salt, differ behind a NUL (`Request.domain`)."""
        return self.domain.partition("\0")[0]


def stay_of(ttl_s: float) -> Stay:
    """How long a session stays where, by its time on the device: the cheaper the place, the longer."""
    return Stay(device_s=ttl_s, host_s=10 * ttl_s, disk_s=60 * ttl_s)


class SessionSlots(SlotsOver):
    """See this file's first lines.

    Args:
        inner: Where sequences without a session get their slots from.
        memory: Where the slots are.
        sessions: The books of sessions, on the same cache.
        host: The second tier, that of the sessions.
        disk: The third tier, or None; closed with this.
        moves: What is on its way, for the scheduler.
        stay: How long a session stays at each level whose request does not say it (`Request.session_ttl_s`), and below
            the device at least.
        max_pages: The most pages that only sessions on the device may hold.
        max_sessions: The most sessions. One more, and of whoever has most the one that is next to go goes.
        min_tokens: Shorter ones are computed again: that costs less than looking after them.
        clock: Seconds, the sessions' own.
    """

    def __init__(
        self,
        inner: SlotSource,
        memory: SlotMemory,
        sessions: Sessions,
        host: HostTier,
        disk: DiskTier | None,
        moves: Moves,
        *,
        stay: Stay,
        max_pages: int,
        max_sessions: int,
        min_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(inner)
        self._memory = memory
        self._sessions = sessions
        self._disk = disk
        self._moves = moves
        self._arrivals = Arrivals(self, memory, host, moves)
        self._stay = stay
        self._max_pages = max_pages
        self._max_sessions = max_sessions
        self._min_tokens = min_tokens
        self._clock = clock
        self._claims: dict[Name, Sequence] = {}
        self._kept: dict[SlotId, Name] = {}
        """Slots of sessions that are on the device, the longest unused first."""
        self._pages = CachedPages(memory.cache)
        self._leaving = set[SlotId]()
        """Of those, the ones that go once their rows are in host memory."""
        self._n_under_way = 0
        self._next_poll_s = clock()
        self._n_at_once: int | None = 1
        self.n_changes = 0
        """Grows with whatever changes the figures."""
        self.n_tokens_used = 0
        """Tokens that sequences began with, because a session had them."""

    # Beginning and ending

    def begin(self, sequence: Sequence, expected_tokens: int) -> Start | None:
        name = _name_of(sequence)
        if name is None or self._claims.setdefault(name, sequence) is not sequence:
            return self._begin_below(sequence, expected_tokens)
        n_same = self._n_usable(sequence, name)
        if n_same:
            try:
                start = self._resume(sequence, name, n_same, expected_tokens)
            except (CapacityError, DriverError, FileError, UnknownSession) as error:
                self._require_device(error)
                _LOG.warning("a session could not be resumed: %s", error)
                self._forget(name)
            else:
                if start is not None:
                    self.n_tokens_used += n_same
                    self._inner.go_on(sequence, *start)
                return start
        self._arrivals.drop(sequence)
        start = self._begin_below(sequence, expected_tokens)  # maybe with pages of the session's slot
        if start is not None and self._level(name) not in _NOT_WAITING:
            self._forget(name)
        return start

    def end(self, sequences: SequenceOf[Sequence], *, is_sound: bool = True) -> None:
        others: list[Sequence] = []
        try:
            for sequence in sequences:
                self._arrivals.drop(sequence)
                name = _name_of(sequence)
                holder = self._claims.get(name, sequence) if name is not None else None
                if name is None or holder is not sequence:
                    others.append(sequence)
                    continue
                if not (is_sound and self._retain(sequence, name)):
                    others.append(sequence)
                if self._claims.pop(name, None) is sequence:
                    self._let_be(sequence, name)
        finally:
            self._inner.end(others, is_sound=is_sound)
        self._fit()

    def adopt(self, sequence: Sequence, copy: HostCopy) -> bool:
        """Keep the host copy of a sequence that has lost its slot under its name; return whether that was done.

        For one that has ended. A later one that has the name by now, or has left a session, is not touched. What is
        kept is the sessions' from then on.
        """
        name = _name_of(sequence)
        if name is None or name in self._claims or self._level(name) is not None:
            return False
        if copy.n_tokens < self._min_tokens or not self._vacate(name):
            return False
        stay = self._stay_of(sequence.request.session_ttl_s)
        self._sessions.adopt(name.session_id, copy, stay, domain=name.domain)
        return True

    def go_on(self, sequence: Sequence, slot_id: SlotId, n_tokens: int) -> None:
        name = _name_of(sequence)
        if name is not None:
            self._claims.setdefault(name, sequence)
        self._inner.go_on(sequence, slot_id, n_tokens)

    def settle(self) -> None:
        self._take_up()
        now_s = self._clock()
        if now_s >= self._next_poll_s:
            self._next_poll_s = now_s + POLL_S
            self._pass_time()
        self._arrivals.settle()
        self._inner.settle()

    def is_coming(self, sequence: Sequence) -> bool:
        name = _name_of(sequence)
        has_session = name is not None and self._level(name) not in _NOT_WAITING
        return not has_session and self._inner.is_coming(sequence)

    def n_found_tokens(self, sequence: Sequence) -> int:
        name = _name_of(sequence)
        is_free = name is not None and self._claims.get(name, sequence) is sequence
        n_same = self._n_common(sequence, name)[0] if name is not None and is_free else 0
        return max(n_same, self._inner.n_found_tokens(sequence))

    def n_live_pages(self, sequence: Sequence, expected_tokens: int) -> int:
        return self._arrivals.n_pages(sequence) or self._inner.n_live_pages(sequence, expected_tokens)

    # Room

    def make_room(self, n_pages: int) -> bool:
        while not self._make_room(n_pages):
            if not self._arrivals.drop_one():
                return False
        return True

    def give_way(self, n_pages: int) -> bool:
        return self._inner.give_way(n_pages) or self._demote_next() or self._arrivals.drop_one()

    def make_host_room(self, *, waits: bool = False) -> bool:
        """Move a session from host memory to disk, or away; return whether there was one.

        Its room is there when this returns, or `is_making_host_room`; never the latter where this `waits`.

        Raises:
            VmemError: It could not be moved.
        """
        self.n_changes += 1
        is_one = self._sessions.push_down(Level.HOST, waits=waits)
        self._take_up()
        return is_one

    @property
    def is_making_host_room(self) -> bool:
        """Whether a session is on its way from host memory to disk, or to where it can go there."""
        return self._sessions.is_going_down

    # For operators

    def demote(self, session_id: str, domain: str) -> Level | None:
        """Move a session one level down before its time; return where it is then. See `Sessions.demote`.

        Raises:
            SessionInUse: A request of that name has begun, or waits to. Nothing changed.
        """
        self._require_unclaimed(Name(domain, session_id), "move")
        try:
            return self._sessions.demote(session_id, domain=domain)
        finally:
            self._reconcile()

    def copy_of(self, session_id: str, domain: str) -> HostCopy:
        """Return an up-to-date host copy of a session that waits, for it to be saved. See `Sessions.copy_of`.

        Raises:
            SessionInUse: A request of that name has begun, or waits to. Nothing changed.
        """
        self._require_unclaimed(Name(domain, session_id), "save")
        try:
            return self._sessions.copy_of(session_id, domain=domain)
        finally:
            self._reconcile()

    def load(
        self, session_id: str, domain: str, path: str | Path, identity: ModelIdentity, ttl_s: float | None = None
    ) -> None:
        """Begin a session with what a file holds. See `Sessions.load`.

        Raises:
            SessionInUse: A request of that name has begun, or waits to. Nothing changed.
            CapacityError: There are `max_sessions`, and none of them can be given up now. Nothing changed.
        """
        name = Name(domain, session_id)
        self._require_unclaimed(name, "load")
        try:
            self._sessions.load(session_id, path, identity, self._stay_of(ttl_s), domain=domain)
            if not self._make_place(name):
                self._sessions.forget(session_id, domain=domain)
                raise CapacityError(f"there are {self._max_sessions} sessions, and none can be given up; try again")
        finally:
            self._reconcile()

    def forget(self, session_id: str, domain: str) -> None:
        """End a session that waits, wherever it is. See `Sessions.forget`.

        Raises:
            SessionInUse: A request of that name has begun, or waits to. Nothing changed.
        """
        self._require_unclaimed(Name(domain, session_id), "forget")
        try:
            self._sessions.forget(session_id, domain=domain)
        finally:
            self._reconcile()

    def give_up_name(self, session_id: str, domain: str) -> None:
        """As `forget`, but where the session has a slot, that goes where those of sequences without a name go."""
        name = Name(domain, session_id)
        self._require_unclaimed(name, "forget")
        try:
            slot_id = None
            if self._level(name) is Level.DEVICE:
                slot_id = self._sessions.resume(session_id, domain=domain).slot_id
                del self._kept[slot_id]
            self._sessions.forget(session_id, domain=domain)
            if slot_id is not None:
                self._inner.give_back(slot_id)
        finally:
            self._reconcile()

    def look(self) -> SessionStats:
        """How many sessions are where."""
        return self._sessions.stats()

    @property
    def disk_bytes(self) -> tuple[int, int]:
        """Bytes on disk, and their bound."""
        return (self._disk.n_bytes, self._disk.max_bytes) if self._disk is not None else (0, 0)

    def check(self) -> None:
        self._inner.check()
        for slot_id, name in self._kept.items():
            if self._level(name) is not Level.DEVICE or slot_id not in self.cached_slots():
                raise InvariantError(f"slot {slot_id} is kept for a session that is not there")

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._inner.close)
            if self._disk is not None:
                stack.callback(self._disk.close)
            stack.callback(self._reconcile)
            stack.callback(self._close_sessions)
            stack.callback(self._arrivals.close)

    def _close_sessions(self) -> None:
        try:
            self._sessions.close()
        except DriverError as error:  # what is not retired goes with the cache
            self._require_device(error)
            _LOG.warning("closing sessions: %s", error)

    # Below: one session

    def _require_unclaimed(self, name: Name, what: str) -> None:
        """Raise SessionInUse where a sequence has the name. Its session may be anywhere then, or not be there yet."""
        if name in self._claims:
            raise SessionInUse(f"session {name.session_id!r} is in use by a request; {what} it when that one has ended")

    def _stay_of(self, ttl_s: float | None) -> Stay:
        """How long a session stays where of which that is said: below the device never shorter than usual."""
        if ttl_s is None:
            return self._stay
        usual, stay = self._stay, stay_of(ttl_s)
        return Stay(stay.device_s, max(stay.host_s, usual.host_s), max(stay.disk_s, usual.disk_s))

    def _begin_below(self, sequence: Sequence, expected_tokens: int) -> Start | None:
        memory, leaving = self._memory, self._moves.leaving
        if self._kept:  # whose pages are in no prefix's way, where one is to be forked
            n_pages = memory.n_pages(1)
            if self.make_room(n_pages) and memory.n_available_pages() < n_pages and leaving:
                return None
        while True:
            try:
                return self._inner.begin(sequence, expected_tokens)
            except OutOfSlots:
                if leaving:
                    return None
                if not (self._demote_next() or self._arrivals.drop_one()):
                    raise

    def _make_room(self, n_pages: int) -> bool:
        """`make_room` without what is on its way to sequences that wait."""
        memory, moves = self._memory, self._moves
        if moves.leaving and memory.n_available_pages() < n_pages:
            self._let_pass()  # or what only a kernel holds would count neither as there nor as coming
        if not self._inner.make_room(max(0, n_pages - moves.n_coming_pages())):
            return False
        while memory.n_available_pages() + moves.n_coming_pages() < n_pages:
            self._let_pass()
            if memory.n_available_pages() + moves.n_coming_pages() >= n_pages or not self._demote_next():
                break
        return memory.n_available_pages() + moves.n_coming_pages() >= n_pages

    def _n_common(self, sequence: Sequence, name: Name) -> tuple[int, int]:
        """How many tokens a sequence has in common with a session that waits, and how many that has."""
        if len(sequence.token_ids) < 2 or self._level(name) in _NOT_WAITING:
            return 0, 0
        known = token_ids(self._sessions.tokens(name.session_id, domain=name.domain))
        n_same = n_common(known, token_ids(sequence.token_ids[:-1]))
        return (n_same if n_same >= self._min_tokens else 0), len(known)

    def _n_usable(self, sequence: Sequence, name: Name) -> int:
        """How many of a sequence's tokens are to be taken over with a session's slot; 0 for not at all."""
        n_same, n_known = self._n_common(sequence, name)
        if sequence in self._arrivals:
            return n_same
        n_found = self._inner.n_found_tokens(sequence)
        if n_same == n_known:
            return n_same if n_found <= n_same else 0
        # What others can begin with as well leaves behind the pages that the session had for its own way.
        return n_same if n_found < n_same else 0

    def _resume(self, sequence: Sequence, name: Name, n_tokens: int, expected_tokens: int) -> Start | None:
        """Return a session's slot, or a new one, with its first tokens; None as long as these are on their way.

        Raises:
            VmemError: That cannot be, and there is no slot.
        """
        sessions, (domain, session_id) = self._sessions, name
        self.n_changes += 1
        sessions.hold(session_id, domain=domain)
        if self._level(name) is Level.DEVICE:
            self._note()
            return None if sessions.is_leaving(session_id, domain=domain) else self._take_slot(name, n_tokens)
        copy = sessions.fetch(session_id, domain=domain)
        self._note()
        start = None if copy is None else self._arrivals.bring(sequence, copy, n_tokens, expected_tokens)
        if start is not None:
            sessions.take(session_id, domain=domain)
        return start

    def _take_slot(self, name: Name, n_tokens: int) -> Start:
        """Take over the slot of a session on the device, with its first tokens."""
        slot_id = self._sessions.resume(name.session_id, domain=name.domain).slot_id
        del self._kept[slot_id]
        try:
            self._memory.cut(slot_id, n_tokens)
        except (CapacityError, DriverError):
            self._inner.let_go(slot_id)
            self._memory.retire([slot_id])
            raise
        return Start(slot_id, n_tokens)

    def _retain(self, sequence: Sequence, name: Name) -> bool:
        """Keep an ended sequence's slot under its name; return whether that was done."""
        slot_id, n_tokens = sequence.slot_id, sequence.n_computed
        if slot_id is None or n_tokens < self._min_tokens or not self._vacate(name):
            return False
        try:
            self._memory.cut(slot_id, n_tokens)
        except (CapacityError, DriverError) as error:
            self._require_device(error)
            _LOG.warning("a session could not be kept: %s", error)
            return False
        self._inner.keep(sequence)
        tokens, stay = sequence.token_ids[:n_tokens], self._stay_of(sequence.request.session_ttl_s)
        self._sessions.retain(name.session_id, slot_id, tokens, stay, domain=name.domain)
        self._kept[slot_id] = name
        return True

    def _vacate(self, name: Name) -> bool:
        """Let nothing wait under a name, and there be a place for what will; return whether that can be."""
        self.n_changes += 1
        return (self._level(name) in _NOT_WAITING or self._forget(name)) and self._make_place(name)

    def _make_place(self, newcomer: Name) -> bool:
        """Let one more session be kept, in place of one of whoever would have most; return whether that can be."""
        waiting = [name for name in (Name(*key) for key in self._sessions.waiting()) if name != newcomer]
        while len(waiting) >= self._max_sessions:
            n_owned = Counter(name.owner for name in [newcomer, *waiting])
            going = max(waiting, key=lambda name: n_owned[name.owner])  # of equal ones the next to go
            if not self._forget(going, self._sessions.give_up):
                return False
            waiting.remove(going)
        return True

    def _let_be(self, sequence: Sequence, name: Name) -> None:
        """Let a session be, whose sequence has ended: it waits, or is forgotten where that has taken its slot along."""
        level = self._level(name)
        if level is Level.IN_USE:
            self._forget(name)
        elif level is not None:
            self._sessions.let_go(name.session_id, domain=name.domain)

    def _fit(self) -> None:
        """Hold the bound on pages. What is cached beside sessions has gone before."""
        while self._n_held_pages() > self._max_pages and self._demote_next():
            pass

    def _n_held_pages(self) -> int:
        """Pages under sessions that stay, and nobody else."""
        self._pages.slot_ids = self._kept.keys() - self._leaving
        return self._pages.held()

    def _forget(self, name: Name, forget: Callable[..., None] | None = None) -> bool:
        """End a session, if it is there still; return whether none waits under its name then.

        Where its slot cannot be retired it stays, and its time will come.
        """
        try:
            (forget or self._sessions.forget)(name.session_id, domain=name.domain)
        except UnknownSession:
            pass
        except DriverError as error:
            self._require_device(error)
            _LOG.warning("a session could not be forgotten: %s", error)
        self._reconcile()
        return self._level(name) in _NOT_WAITING

    def _demote_next(self) -> bool:
        """Take the slot of the session that was longest unused, of those that go; return whether any does.

        Those that a waiting sequence has asked for go last: it cannot begin where pages or slots are that short.
        """
        there = [(slot_id, name) for slot_id, name in self._kept.items() if slot_id not in self._leaving]
        for slot_id, name in sorted(there, key=lambda kept: self._is_held(kept[1])):
            try:
                self._sessions.let_go(name.session_id, domain=name.domain)
                self._sessions.demote(name.session_id, domain=name.domain, waits=False)
            except (CapacityError, DriverError, FileError, UnknownSession) as error:
                self._require_device(error)
                _LOG.warning("a session could not be moved from the device: %s", error)
                self._forget(name)
            self._reconcile()
            if slot_id not in self._kept or slot_id in self._leaving:
                return True
        return False

    def _let_pass(self) -> None:
        """Wait for pages that were given up just now, and may be under a kernel still."""
        try:
            self._memory.settle()
        except DriverError as error:  # an unmap failed; its pages are quarantined
            self._require_device(error)
            _LOG.warning("pages could not be had back: %s", error)

    def _take_up(self) -> None:
        """Take note of what sessions have moved since. One whose rows could not be moved is gone."""
        try:
            n_moved = self._sessions.settle()
        except (CapacityError, DriverError, FileError) as error:
            self._require_device(error)
            _LOG.warning("sessions could not be moved: %s", error)
            n_moved = 1
            for slot_id in self._leaving - self._sessions.leaving_slots():
                if slot_id in self._kept and self._level(self._kept[slot_id]) is Level.DEVICE:
                    self._forget(self._kept[slot_id])
        self._note()
        if n_moved:
            self._reconcile()

    def _note(self) -> None:
        """Let the scheduler know what is on its way."""
        under_way = self._sessions.under_way()
        for what in under_way:
            self._moves.note(what)
        self.n_changes += len(under_way) != self._n_under_way
        self._n_under_way = len(under_way)
        self._moves.leaving.difference_update(self._leaving)
        self._leaving = self._sessions.leaving_slots()
        self._moves.leaving.update(self._leaving)

    def _pass_time(self) -> None:
        """Move sessions down whose time is over. One that cannot be moved does not keep the others from it."""
        try:
            n_moved = self._sessions.poll(self._n_at_once)
            self._n_at_once = 1
        except (CapacityError, DriverError, FileError) as error:
            self._require_device(error)
            _LOG.warning("sessions could not be moved down: %s", error)
            n_moved, self._n_at_once = 1, None
        self._note()
        if n_moved:
            self._reconcile()

    def _reconcile(self) -> None:
        """Let go of slots that sessions have left."""
        self.n_changes += 1
        self._note()
        for slot_id, name in list(self._kept.items()):
            if self._level(name) is not Level.DEVICE:
                del self._kept[slot_id]
                self._inner.let_go(slot_id)

    def _is_held(self, name: Name) -> bool:
        return self._sessions.is_held(name.session_id, domain=name.domain)

    def _level(self, name: Name) -> Level | None:
        try:
            return self._sessions.level(name.session_id, domain=name.domain)
        except UnknownSession:
            return None

    def _require_device(self, error: VmemError) -> None:
        if isinstance(error, DriverError) and error.is_fatal:
            raise error


def _name_of(sequence: Sequence) -> Name | None:
    session_id = sequence.request.session_id
    return None if session_id is None or sequence.index else Name(sequence.request.domain, session_id)
