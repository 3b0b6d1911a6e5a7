"""Sessions: sequences that are kept by name between two requests, and go down the tiers as time passes.

    retain ─▶ device ──device_s──▶ host ──host_s──▶ disk ──disk_s──▶ gone
                 └──────────────────┴── resume ──────┘
                                          ▼
                                       in use ─▶ retain again, or forget

On the device a session has its slot; below, its slot is retired and the rows are in host memory or on disk. While it is
in use, the slot is the caller's, and a host copy stays as a spare: retained again, only what was added is moved.

Guarantees
  * A session that cannot be kept where it should go, for want of room, goes further down; for want of any room it is
    gone. A cached sequence can always be computed again, and never stands in the way of a live one.
  * Sessions make room for another one only where that can fit at all, and never one that is asked for just now.
  * A failure leaves a session where it was; other sessions are still seen to, and the first error is raised at the end.
    One that the disk fails to take is gone, as if the disk were full: it would never go, nor anything behind it.
  * A name means nothing in another domain: a session of another domain is unknown.

What takes its time, a copy between device and host or a file, is under way as long as it takes, and a session has at
most one such thing: `copying` to host memory, `storing` on disk, or `loading` from there. `poll`, and with
`waits=False` `demote` and `push_down`, begin it and return; `settle` and `poll` finish what has passed. Until then the
session is where it was. One that is asked for meanwhile (`hold`) stays, and what is under way is let pass in vain, or
abandoned. All other calls wait. With the movers that are the default everything has passed at once.

Assumptions: one thread calls, and calls `poll` now and then: nothing happens by itself.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from vmem_kv.cache import KVCache
from vmem_kv.errors import (
    ConfigError,
    FileError,
    FileRefused,
    InvariantError,
    OutOfDiskSpace,
    OutOfHostMemory,
    SessionInUse,
    UnknownSession,
    UsageError,
    VmemError,
)
from vmem_kv.growth import SlotId
from vmem_kv.tiers import files
from vmem_kv.tiers.copies import HostCopy, token_ids
from vmem_kv.tiers.disk import DiskCopy, DiskTier, Loading, Storing
from vmem_kv.tiers.files import ModelIdentity
from vmem_kv.tiers.host import HostTier, Parking
from vmem_kv.tiers.moving import Passing, is_over

_LOG = logging.getLogger("vmem_kv")


class Level(Enum):
    """Where a session is."""

    IN_USE = "in use"  # resumed: its slot is the caller's
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Stay:
    """How long a session that nobody asks for stays at each level, in seconds; `math.inf` for ever.

    Raises:
        ConfigError: A time is negative.
    """

    device_s: float = 60.0
    host_s: float = 600.0
    disk_s: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("device_s", "host_s", "disk_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be zero or more seconds")


class Resumed(NamedTuple):
    """A session in use: its slot, which holds the rows of these tokens. The slot is the caller's."""

    slot_id: SlotId
    tokens: Sequence[int]


class SessionStats(NamedTuple):
    """How many sessions are where, and what has happened since the start."""

    n_in_use: int
    n_on_device: int
    n_on_host: int
    n_on_disk: int
    n_resumed: int
    n_moved_down: int
    n_gone: int  # by time, for want of room, or with the disk; those that were forgotten do not count


class _Session:
    """One session. `slot_id` at device level, `disk_copy` at disk level; `host_copy` is there always, maybe empty."""

    def __init__(self, key: tuple[str, str], host_copy: HostCopy) -> None:
        self.key = key
        self.host_copy = host_copy
        self.level = Level.IN_USE
        self.stay = Stay()
        self.due_s = math.inf
        self.tokens: array[int] = array("q")
        self.slot_id: SlotId | None = None
        self.disk_copy: DiskCopy | None = None
        self.copying: Parking | None = None  # on its way to host memory, and on the device still
        self.storing: Storing | None = None  # on its way to disk, and in host memory still
        self.loading: Loading | None = None  # on its way to host memory, and on disk still
        self.is_wanted = False  # it does not go down: it is on its way back, or about to be

    @property
    def under_way(self) -> Passing | None:
        """What is to pass before it is somewhere else."""
        return self.copying or self.storing or self.loading


class Sessions:
    """Keeps sequences of one cache by name. See this file's first lines.

    Args:
        cache: Whose slots they are.
        host: The second tier. It may serve others as well.
        disk: The third; without one, sessions end with their time on the host.
        clock: Returns seconds, and never goes back.
    """

    def __init__(
        self,
        cache: KVCache,
        host: HostTier,
        disk: DiskTier | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._host = host
        self._disk = disk
        self._clock = clock
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._unwanted: list[SlotId] = []
        self._going: dict[_Session, None] = {}
        """Those that were told to go down, and have not gone."""
        self._loading: dict[_Session, None] = {}
        self._n_resumed = self._n_moved_down = self._n_gone = 0

    def retain(
        self,
        session_id: str,
        slot_id: SlotId,
        tokens: Sequence[int],
        stay: Stay | None = None,
        *,
        domain: str = "",
    ) -> None:
        """Keep a sequence under a name. Its slot belongs to the sessions from now on: the caller does not retire it.

        Args:
            session_id: A name that is new in this domain, or that of a session in use.
            slot_id: An active slot. Nothing that was launched may still write to it but on this thread's stream.
            tokens: The ids of all its tokens.
            stay: How long it is kept, and where.
            domain: Whose session it is.

        Raises:
            UsageError: The name is kept already, or the slot is, or it is not active, or slid, or has another number
                of tokens. Nothing changed.
        """
        session = self._sessions.get((domain, session_id))
        if session is not None and session.level is not Level.IN_USE:
            raise UsageError(f"session {session_id!r} is kept already; resume or forget it first")
        if any(other.slot_id == slot_id for other in self._sessions.values()):
            raise UsageError(f"slot {slot_id} belongs to another session")
        ids = token_ids(tokens)
        if self._cache.n_tokens(slot_id) != len(ids):
            raise UsageError(f"{len(ids)} token ids for slot {slot_id} of {self._cache.n_tokens(slot_id)} tokens")
        if self._cache.first_token(slot_id):
            raise UsageError(
                f"slot {slot_id} slid to token {self._cache.first_token(slot_id)}; only whole sequences are kept"
            )
        session = session or _Session((domain, session_id), self._host.new_copy(self._cache.layout))
        session.slot_id, session.tokens, session.stay = slot_id, ids, stay or Stay()
        self._sessions[session.key] = session
        self._enter(session, Level.DEVICE)

    def resume(self, session_id: str, *, domain: str = "") -> Resumed:
        """Bring a session back to the device and hand its slot to the caller, who retains or forgets it in the end.

        Raises:
            UnknownSession: There is none of that name in this domain. Nothing changed.
            SessionInUse: It was resumed before. Nothing changed.
            CapacityError: There is no slot, no page or no host memory for it. It stays where it was.
            FileRefused: It was damaged on disk. It is gone.
            DriverError: Moving it failed. It stays where it was.
            FileError: Reading it failed. It stays where it was.
        """
        session = self._find(session_id, domain)
        if session.level is Level.IN_USE:
            raise SessionInUse(f"session {session_id!r} is in use by another request; wait for that one to end")
        if session.copying is not None:
            with contextlib.suppress(VmemError):  # then there is no copy; the rows are on the device
                self._finish_copying(session)
        slot_id = session.slot_id
        if slot_id is None:
            with _keeping(session):
                slot_id = self._bring_back(session)
        self._hand_out(session)
        return Resumed(slot_id, session.tokens)

    def fetch(self, session_id: str, *, domain: str = "") -> HostCopy | None:
        """Return the host copy of a session below the device, for a caller who restores it himself and then takes it.

        None while it comes from disk: ask again when that has passed. The caller holds the session meanwhile.

        Raises:
            UnknownSession: There is none of that name in this domain. Nothing changed.
            UsageError: It is on the device, or in use. Nothing changed.
            OutOfHostMemory: There is no host memory for it. It stays where it was.
            FileRefused: It was damaged on disk. It is gone.
            FileError: Reading it failed. It stays where it was.
        """
        session = self._find(session_id, domain)
        if session.level not in (Level.HOST, Level.DISK):
            raise UsageError(f"session {session_id!r} has a slot; resume it, or wait until it is retained again")
        self._stay(session)
        with _keeping(session):
            is_there = session.host_copy.n_tokens >= len(session.tokens) or self._read_back(session, waits=False)
        return session.host_copy if is_there else None

    def take(self, session_id: str, *, domain: str = "") -> None:
        """Note that the caller has restored a session, as far as he wants it: it is in use from now on, as if resumed.

        Raises:
            UnknownSession: There is none of that name in this domain. Nothing changed.
        """
        session = self._find(session_id, domain)
        session.host_copy.is_spare = True
        self._drop_disk_copy(session)
        self._hand_out(session)

    def forget(self, session_id: str, *, domain: str = "") -> None:
        """End a session wherever it is. One that is in use loses its name and its host copy; its slot is the caller's.

        Raises:
            UnknownSession: There is none of that name in this domain. Nothing changed.
            DriverError: No fence could be recorded behind its slot: nothing changed. Or it is gone, but something that
                had waited for a fence failed (`KVCache.retire`).
        """
        self._end(self._find(session_id, domain))

    def give_up(self, session_id: str, *, domain: str = "") -> None:
        """As `forget`, for want of room: the session counts as gone."""
        self._lose(self._find(session_id, domain))

    def save(self, session_id: str, path: str | Path, identity: ModelIdentity, *, domain: str = "") -> None:
        """Write a session to a file. It stays where it is.

        Raises:
            UnknownSession: There is none of that name in this domain. Nothing changed.
            SessionInUse: It is in use. Nothing changed.
            OutOfHostMemory: There is no host memory for its rows, which pass through it. Nothing changed.
            FileRefused: It was damaged on disk. It is gone.
            DriverError: Moving its rows failed. Nothing changed.
            OutOfDiskSpace, FileError: The file cannot be written. Nothing changed.
        """
        files.save(path, self._host, self.copy_of(session_id, domain=domain), identity)

    def copy_of(self, session_id: str, *, domain: str = "") -> HostCopy:
        """Bring a session's host copy up to date and return it: for a caller who reads it, and holds it meanwhile.

        Raises:
            UnknownSession, SessionInUse, OutOfHostMemory, FileRefused, DriverError: As `save`.
        """
        session = self._find(session_id, domain)
        if session.level is Level.IN_USE:
            raise SessionInUse(f"session {session_id!r} is in use by a request; save it when that one has ended")
        if session.slot_id is not None:
            self._begin_copying(session, session.slot_id, waits=True)
            self._finish_copying(session)
        elif session.host_copy.n_tokens < len(session.tokens):
            with _keeping(session):
                self._read_back(session, waits=True)
        return session.host_copy

    def load(
        self,
        session_id: str,
        path: str | Path,
        identity: ModelIdentity,
        stay: Stay | None = None,
        *,
        domain: str = "",
    ) -> None:
        """Begin a session with what `save` wrote; its rows are in host memory until it is resumed.

        Raises:
            UsageError: There is a session of that name in this domain. Nothing changed.
            FileRefused: The file is truncated, altered, foreign, too long, larger than all host memory or from a newer
                version. Nothing changed.
            FileError: It cannot be read. Nothing changed.
            OutOfHostMemory: There is no host memory for it, although sessions there were moved down. Else nothing
                changed.
        """
        self._require_new(session_id, domain)
        while True:
            try:
                copy = files.load(path, self._host, self._cache.layout, identity)
                break
            except OutOfHostMemory:
                if not self.push_down(Level.HOST):
                    raise
        self.adopt(session_id, copy, stay, domain=domain)

    def adopt(self, session_id: str, copy: HostCopy, stay: Stay | None = None, *, domain: str = "") -> None:
        """Keep what a host copy holds under a name, in host memory. The copy belongs to the sessions from now on.

        Args:
            session_id: A name that is new in this domain.
            copy: Rows of a cache like this one, in the same host tier. It holds tokens, and is not being written.
            stay: How long it is kept, and where.
            domain: Whose session it is.

        Raises:
            UsageError: There is a session of that name in this domain. Nothing changed.
        """
        self._require_new(session_id, domain)
        session = _Session((domain, session_id), copy)
        session.tokens, session.stay = copy.tokens, stay or Stay()
        copy.is_spare = False
        self._sessions[session.key] = session
        self._enter(session, Level.HOST)

    def poll(self, max_sessions: int | None = None) -> int:
        """Move sessions down whose time at their level is over; return how many moved or went.

        Args:
            max_sessions: At most so many, those first whose time was over first; for a caller who must not be away for
                long.

        Raises:
            VmemError: The first failure. That session is where it was, and its turn comes again at the next poll.
        """
        now_s = self._clock()
        there = (s for s in self._sessions.values() if s.due_s <= now_s and not s.is_wanted)
        due = sorted(there, key=lambda session: session.due_s)
        for session in due[:max_sessions]:
            self._going.setdefault(session)
        return self.settle()

    def settle(self) -> int:
        """Take note of what has passed meanwhile; return how many sessions moved or went. For every step.

        Raises:
            VmemError: The first failure. That session is where it was, and goes down no more unless told again; one
                that was damaged on disk is gone.
        """
        failure = self._retire_unwanted()
        if self._disk is not None:
            self._disk.poll()
        n_moved = 0
        n_before = -1
        while n_before < n_moved:  # one that has gone makes room for others
            n_before = n_moved
            for session in list(self._going):
                if session not in self._going:
                    continue  # it made room for another one meanwhile
                if session.is_wanted:
                    self._stay(session)
                    continue
                try:
                    n_moved += self._move_down(session, waits=False)
                except VmemError as error:
                    self._going.pop(session, None)
                    failure = failure or error
        for session in [s for s in self._loading if not s.is_wanted]:  # else whoever wants it takes it up
            try:
                self._read_back(session, waits=False)
            except VmemError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return n_moved

    def under_way(self) -> list[Passing]:
        """What is to pass before some session is elsewhere."""
        moving = [session.under_way for session in (*self._going, *self._loading)]
        return [what for what in moving if what is not None]

    def leaving_slots(self) -> set[SlotId]:
        """Slots of sessions that go to host memory now."""
        return {s.slot_id for s in self._going if s.slot_id is not None and not s.is_wanted}

    @property
    def is_going_down(self) -> bool:
        """Whether host memory may come free by itself: a session is on its way to disk, or to where it can go there."""
        return any(session.under_way is not None for session in self._going)

    def free_slots(self, n_pages: int) -> int:
        """Move sessions off the device, the next to expire first, until `n_pages` pages lie under retired slots.

        The pages are warm, and come to whoever needs them (`KVCache.ensure` reclaims by itself).

        Returns:
            How many pages that are; fewer if no session is left there.

        Raises:
            VmemError: As `poll`.
        """
        n_freed = 0
        for session in self._at(Level.DEVICE):
            if n_freed >= n_pages:
                break
            slot_id = session.slot_id
            n_freed += self._cache.slot_stats()[slot_id].n_mapped_pages if slot_id is not None else 0
            self._move_down(session)
        return n_freed

    def demote(self, session_id: str, *, domain: str = "", waits: bool = True) -> Level | None:
        """Move a session one level down before its time; return where it is then, None for nowhere.

        It goes further down for want of room, as by `poll`.

        Args:
            session_id: Its name.
            domain: Whose it is.
            waits: Whether to wait for what is copied. Else it goes once that has passed, at `settle`.

        Raises:
            UnknownSession: There is none of that name in this domain. Nothing changed.
            SessionInUse: It is in use. Nothing changed.
            VmemError: Moving it failed. It stays where it was.
        """
        session = self._find(session_id, domain)
        if session.level is Level.IN_USE:
            raise SessionInUse(f"session {session_id!r} is in use by a request; move it when that one has ended")
        self._going.setdefault(session)
        try:
            self._move_down(session, waits=waits)
        except BaseException:
            self._going.pop(session, None)
            raise
        return session.level if self._sessions.get(session.key) is session else None

    def push_down(self, level: Level, *, waits: bool = True) -> bool:
        """Move the next to expire of one level down; return whether there was one. See `demote`.

        Raises:
            VmemError: Moving it failed. It stays where it was.
        """
        there = self._at(level)
        if there:
            self.demote(there[0].key[1], domain=there[0].key[0], waits=waits)
        return bool(there)

    def tokens(self, session_id: str, *, domain: str = "") -> Sequence[int]:
        """The tokens of a session, wherever it is; of one that is in use, those that it had when it was resumed.

        Raises:
            UnknownSession: There is none of that name in this domain.
        """
        return self._find(session_id, domain).tokens

    def level(self, session_id: str, *, domain: str = "") -> Level:
        """Where a session is.

        Raises:
            UnknownSession: There is none of that name in this domain.
        """
        return self._find(session_id, domain).level

    @contextlib.contextmanager
    def wanted(self, session_id: str, *, domain: str = "") -> Iterator[None]:
        """Let a session stay where it is meanwhile, whatever makes room: for a caller who is about to resume it.

        `demote`, `forget` and `give_up` move it all the same.

        Raises:
            UnknownSession: There is none of that name in this domain. Nothing changed.
        """
        with _keeping(self._find(session_id, domain)):
            yield

    def hold(self, session_id: str, *, domain: str = "") -> None:
        """As `wanted`, until `let_go`: for a caller who resumes it, or fetches and takes it, when that has passed.

        On its way down it stops: it is where it was, once what is under way has passed.

        Raises:
            UnknownSession: There is none of that name in this domain. Nothing changed.
        """
        self._find(session_id, domain).is_wanted = True

    def let_go(self, session_id: str, *, domain: str = "") -> None:
        """Undo `hold`. In use it is held no more.

        Raises:
            UnknownSession: There is none of that name in this domain. Nothing changed.
        """
        self._find(session_id, domain).is_wanted = False

    def is_held(self, session_id: str, *, domain: str = "") -> bool:
        """Whether a session was asked for.

        Raises:
            UnknownSession: There is none of that name in this domain.
        """
        return self._find(session_id, domain).is_wanted

    def is_leaving(self, session_id: str, *, domain: str = "") -> bool:
        """Whether a session is on the device still, and being copied to host memory: it cannot be resumed at once.

        Raises:
            UnknownSession: There is none of that name in this domain.
        """
        copying = self._find(session_id, domain).copying
        return copying is not None and not is_over(copying)

    def waiting(self) -> list[tuple[str, str]]:
        """Domain and name of every session that waits: the lowest level first, and there the next to expire."""
        levels = (Level.DISK, Level.HOST, Level.DEVICE)
        return [session.key for level in levels for session in self._at(level)]

    def stats(self) -> SessionStats:
        """Return one snapshot."""
        counts = dict.fromkeys(Level, 0)
        for session in self._sessions.values():
            counts[session.level] += 1
        return SessionStats(
            n_in_use=counts[Level.IN_USE],
            n_on_device=counts[Level.DEVICE],
            n_on_host=counts[Level.HOST],
            n_on_disk=counts[Level.DISK],
            n_resumed=self._n_resumed,
            n_moved_down=self._n_moved_down,
            n_gone=self._n_gone,
        )

    def close(self) -> None:
        """Forget every session. Slots of sessions in use stay with their callers. Idempotent.

        Raises:
            DriverError: As `forget`, the first failure; all the others are forgotten.
        """
        failure = self._retire_unwanted()
        for session in list(self._sessions.values()):
            try:
                self._end(session)
            except VmemError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _require_new(self, session_id: str, domain: str) -> None:
        if (domain, session_id) in self._sessions:
            raise UsageError(f"session {session_id!r} exists; forget it first, or use another name")

    def _find(self, session_id: str, domain: str) -> _Session:
        try:
            return self._sessions[domain, session_id]
        except KeyError:
            raise UnknownSession(f"no session {session_id!r}; it expired, or never was") from None

    def _at(self, level: Level) -> list[_Session]:
        """The sessions of one level that may move down, the next to expire first."""
        there = (s for s in self._sessions.values() if s.level is level and not s.is_wanted)
        return sorted(there, key=lambda session: session.due_s)

    def _hand_out(self, session: _Session) -> None:
        session.slot_id = None
        session.is_wanted = False
        self._enter(session, Level.IN_USE)
        self._n_resumed += 1

    def _stay(self, session: _Session) -> None:
        """Let a session that was told to go down stay. A copy to host memory is let pass, and is a spare then."""
        self._going.pop(session, None)
        if session.storing is not None:
            storing, session.storing = session.storing, None
            storing.abandon()

    def _enter(self, session: _Session, level: Level) -> None:
        self._going.pop(session, None)
        session.level = level
        stay = session.stay
        seconds = {Level.DEVICE: stay.device_s, Level.HOST: stay.host_s, Level.DISK: stay.disk_s}
        session.due_s = self._clock() + seconds.get(level, math.inf)

    def _move_down(self, session: _Session, *, waits: bool = True) -> bool:
        """Move a session one level down, or further for want of room; return whether it has gone already.

        Raises, and it is where it was, on a failure.
        """
        if session.level is Level.DEVICE:
            return self._to_host(session, waits=waits)
        if session.level is Level.HOST and self._disk is not None:
            return self._to_disk(session, self._disk, waits=waits)
        self._lose(session)
        return True

    def _to_host(self, session: _Session, *, waits: bool) -> bool:
        slot_id = session.slot_id
        if slot_id is None:
            raise InvariantError(f"session {session.key[1]!r} is on the device without a slot")
        try:
            is_copying = self._begin_copying(session, slot_id, waits=waits)
        except OutOfHostMemory:
            self._lose(session)
            return True
        if not is_copying or not (waits or session.copying is None or is_over(session.copying)):
            return False
        self._finish_copying(session)
        fence = self._cache.fence()
        try:
            self._cache.retire(slot_id, fence)
        finally:  # what retire fails with, if anything, are older sequences' pages
            session.slot_id = None
            session.host_copy.is_spare = False
            self._enter(session, Level.HOST)
            self._n_moved_down += 1
        return True

    def _begin_copying(self, session: _Session, slot_id: SlotId, *, waits: bool) -> bool:
        """Begin to bring a session's host copy up to date, if need be in the place of others that go down.

        The rows are on the device. Where host memory is too small for what it holds of them and what it would hold,
        what it holds goes first. What is being read stays as it is: it will do where it holds all, else there will be
        another one. Returns whether it was begun, or need not be; it is not while others are on their way down.
        """
        frames = self._host.frames
        n_frames = frames.n_frames_for(len(session.tokens) * session.host_copy.layout.token_bytes)
        self._host.poll()
        if session.copying is None and session.host_copy.n_readers:  # a file, or a restore that failed
            if session.host_copy.tokens == session.tokens:
                return True
            self._drop_host_copy(session)
        while session.copying is None:
            try:
                session.copying = self._host.begin_copy(session.host_copy, self._cache, slot_id, session.tokens)
            except OutOfHostMemory:
                if n_frames > frames.max_frames:
                    raise
                if session.host_copy.n_tokens and len(session.host_copy.frames) + n_frames > frames.max_frames:
                    self._drop_host_copy(session)
                elif not waits and self.is_going_down:
                    return False
                elif not self.push_down(Level.HOST, waits=waits):
                    raise
        return True

    def _finish_copying(self, session: _Session) -> None:
        copying, session.copying = session.copying, None
        if copying is not None:
            copying.finish()

    def _drop_host_copy(self, session: _Session) -> None:
        self._host.drop_when_quiet(session.host_copy)
        session.host_copy = self._host.new_copy(session.host_copy.layout)

    def _to_disk(self, session: _Session, disk: DiskTier, *, waits: bool) -> bool:
        if disk.n_bytes_for(session.host_copy) > disk.max_bytes:
            self._lose(session)
            return True
        while True:
            try:
                if session.storing is None:
                    session.storing = disk.begin_store(self._host, session.host_copy)
                if not waits and not session.storing.passed():
                    return False
                storing, session.storing = session.storing, None
                session.disk_copy = storing.finish()
                break
            except OutOfDiskSpace:
                older = self._at(Level.DISK)
                if not older:
                    self._lose(session)
                    return True
                self._lose(older[0])
            except FileError as error:
                _LOG.warning("a session is lost, since it cannot go to disk: %s", error)
                self._lose(session)
                return True
        self._drop_host_copy(session)
        self._enter(session, Level.DISK)
        self._n_moved_down += 1
        return True

    def _bring_back(self, session: _Session) -> SlotId:
        """A new slot with the rows of a session that has none."""
        self._stay(session)
        slot_id = self._cache.acquire(expected_tokens=len(session.tokens), domain=session.key[0])
        try:
            if session.host_copy.n_tokens < len(session.tokens):
                self._read_back(session, waits=True)
            self._host.restore(session.host_copy, self._cache, slot_id)
        except BaseException:
            self._unwanted.append(slot_id)
            self._retire_unwanted()
            raise
        self._drop_disk_copy(session)
        return slot_id

    def _read_back(self, session: _Session, *, waits: bool) -> bool:
        """Bring a session's rows from disk to host memory, where they are a spare; return whether they are there."""
        if self._disk is None or session.disk_copy is None:
            raise InvariantError(f"session {session.key[1]!r} has lost its rows: somebody dropped its host copy")
        while True:
            try:
                if session.loading is None:
                    session.loading = self._disk.begin_load(session.disk_copy, self._host)
                    self._loading[session] = None
                if not waits and not session.loading.passed():
                    return False
                loading, session.loading = session.loading, None
                self._loading.pop(session)
                session.host_copy = loading.finish()
                session.host_copy.is_spare = True
                return True
            except OutOfHostMemory:
                if not waits and self.is_going_down:
                    return False
                if not self.push_down(Level.HOST, waits=waits):
                    raise
            except FileRefused:
                self._lose(session)
                raise

    def _drop_disk_copy(self, session: _Session) -> None:
        if session.disk_copy is not None and self._disk is not None:
            self._disk.drop(session.disk_copy)
            session.disk_copy = None

    def _retire_unwanted(self) -> VmemError | None:
        """Retire slots that were acquired in vain; return why one cannot be, for it to be tried again later."""
        while self._unwanted:
            try:
                fence = self._cache.fence()
                self._cache.retire(self._unwanted.pop(), fence)
            except VmemError as error:
                return error
        return None

    def _lose(self, session: _Session) -> None:
        self._end(session)
        self._n_gone += 1

    def _end(self, session: _Session) -> None:
        fence = self._cache.fence() if session.slot_id is not None else None
        if session.copying is not None:
            session.copying.cancel()
        self._stay(session)
        if session.loading is not None:
            del self._loading[session]
            session.loading.abandon()
        del self._sessions[session.key]
        self._host.drop_when_quiet(session.host_copy)
        self._drop_disk_copy(session)
        if session.slot_id is not None:
            self._cache.retire(session.slot_id, fence)


@contextlib.contextmanager
def _keeping(session: _Session) -> Iterator[None]:
    """Let a session stay where it is meanwhile. May be nested."""
    before, session.is_wanted = session.is_wanted, True
    try:
        yield
    finally:
        session.is_wanted = before
