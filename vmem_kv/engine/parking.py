"""Sequences that lose their slot for want of pages: what they have computed waits in host memory.

    pause    the rows go to host memory, then the slot goes back
    begin    again: the rows come back from there, and nothing is computed twice
    end      the host copy goes, to its session where it has one

Nobody waits for copies; in every step what has passed is taken up:

    running ──pause──▶ leaving ──passed──▶ parked ──begin──▶ arriving ──passed──▶ running
                       the slot is kept,   a host copy       a slot, in `Arrivals`
                       its pages come

A sequence that leaves or arrives is in the scheduler's queue, without a slot of its own. While it leaves it does not
begin. Where it ends on the way, what is on its way passes all the same, and then everything goes back.

The host copy stays while the sequence runs, as a spare: paused again, only what was added since is moved. Where host
memory is spent, sessions that wait there go to disk, and the sequence leaves when they have gone; where that does not
suffice, or a copy fails, the sequence is computed again, which gives the same tokens.

Guarantees: rows are restored for the tokens that they were computed for. No page of a slot comes free before its rows
have been read. After any failure but a lost device the sequence has a slot, or waits, as if it had never been parked.
Assumptions: one thread, but for `tiers`. All that a sequence keeps is in its slot, from its first token on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack
from dataclasses import dataclass

from vmem_kv.engine.arrivals import Arrivals
from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.moves import Carriers, Moves
from vmem_kv.engine.request import Sequence
from vmem_kv.engine.session_slots import SessionSlots
from vmem_kv.engine.slot_source import SlotSource, Start
from vmem_kv.engine.slots_over import SlotsOver
from vmem_kv.engine.tier_stats import TierFigures
from vmem_kv.errors import (
    CapacityError,
    DriverError,
    FileError,
    InvariantError,
    OutOfHostMemory,
    UsageError,
    VmemError,
)
from vmem_kv.growth import SlotId
from vmem_kv.tiers.copies import HostCopy
from vmem_kv.tiers.host import HostTier, Parking
from vmem_kv.tiers.moving import is_over

_LOG = logging.getLogger("vmem_kv")


@dataclass(slots=True)
class _Leaving:
    """A sequence that has lost its slot, which is kept until its rows are in host memory."""

    copy: HostCopy
    slot_id: SlotId
    tokens: list[int]
    parking: Parking | None = None  # None: host memory for it comes when sessions have gone to disk
    is_wanted: bool = True  # not since the sequence has ended
    is_sound: bool = True  # whether its session may go on with it then


class ParkingSlots(SlotsOver):
    """See this file's first lines.

    Args:
        inner: The source below.
        sessions: The part of it that keeps sessions, which give way in host memory.
        memory: Where the slots are.
        host: Host memory, which sessions use as well; closed with this.
        moves: What is on its way, for the scheduler.
        carriers: Who makes copies; closed with this.
        min_tokens: Fewer are computed again: that costs less than moving them.
    """

    def __init__(
        self,
        inner: SlotSource,
        sessions: SessionSlots,
        memory: SlotMemory,
        host: HostTier,
        moves: Moves,
        carriers: Carriers,
        *,
        min_tokens: int,
    ) -> None:
        super().__init__(inner)
        self._sessions = sessions
        self._memory = memory
        self._host = host
        self._moves = moves
        self._carriers = carriers
        self._min_tokens = min_tokens
        self._copies: dict[Sequence, HostCopy] = {}
        self._leaving: dict[Sequence, _Leaving] = {}
        self._arrivals = Arrivals(self, memory, host, moves)
        self._n_parked = self._n_restored = self._n_refused = 0
        self._n_changes_shown = sessions.n_changes
        self._shown = self._look()

    def begin(self, sequence: Sequence, expected_tokens: int) -> Start | None:
        if sequence in self._leaving:
            return None
        copy = self._copies.get(sequence)
        if copy is None or not self._is_best(copy, sequence):
            start = self._arrivals.begin_below(self._inner, sequence, expected_tokens)
        else:
            start = self._restore(copy, sequence, expected_tokens)
        self._show()
        return start

    def pause(self, sequence: Sequence) -> None:
        leaving = None
        try:
            leaving = self._leave(sequence)
        finally:
            if leaving is None:
                self._inner.pause(sequence)
            else:
                self._inner.keep(sequence)
                self._leaving[sequence] = leaving
                self._moves.leaving.add(leaving.slot_id)
            self._settle()
            self._show()

    def end(self, sequences: SequenceOf[Sequence], *, is_sound: bool = True) -> None:
        try:
            self._inner.end(sequences, is_sound=is_sound)
        finally:
            for sequence in sequences:
                self._arrivals.drop(sequence)
                if sequence in self._leaving:
                    self._leaving[sequence].is_wanted = False
                    self._leaving[sequence].is_sound = is_sound
                else:
                    self._leave_behind(sequence, is_sound=is_sound)
            self._settle()
            self._show()

    def settle(self) -> None:
        self._inner.settle()
        self._host.poll()
        self._settle()
        if self._sessions.n_changes != self._n_changes_shown or self._shown.n_moving != len(self._moves):
            self._show()

    def is_coming(self, sequence: Sequence) -> bool:
        return sequence not in self._arrivals and self._inner.is_coming(sequence)

    def n_live_pages(self, sequence: Sequence, expected_tokens: int) -> int:
        return self._arrivals.n_pages(sequence) or self._inner.n_live_pages(sequence, expected_tokens)

    def make_room(self, n_pages: int) -> bool:
        return self._arrivals.make_room_over(self._inner, n_pages)

    def give_way(self, n_pages: int) -> bool:
        return self._inner.give_way(n_pages) or self._arrivals.drop_one()

    def tiers(self) -> TierFigures:
        return self._shown

    def check(self) -> None:
        self._inner.check()
        self._host.check()
        stray = self._moves.leaving.difference(self._memory.cache.active_slots())
        kept = {leaving.slot_id for leaving in self._leaving.values()}
        if stray or not kept <= self._moves.leaving & self.cached_slots():
            raise InvariantError(f"slots {sorted(stray)} leave, and belong to nobody; {sorted(kept)} are kept")

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._carriers.close)
            stack.callback(self._close_host)
            stack.callback(self._inner.close)
            for sequence in list(self._copies):
                stack.callback(self._drop, sequence)
            stack.callback(self._arrivals.close)
            for sequence in list(self._leaving):
                stack.callback(self._arrive_below, sequence)

    # Below: a sequence that leaves

    def _leave(self, sequence: Sequence) -> _Leaving | None:
        """Begin to bring the host copy up to date with a running sequence; None where that cannot be."""
        slot_id, n_tokens = sequence.slot_id, sequence.n_computed
        if slot_id is None or n_tokens < self._min_tokens:
            return None
        copy = self._copy_of(sequence)
        leaving = _Leaving(copy, slot_id, sequence.token_ids[:n_tokens])
        try:
            self._memory.cut(slot_id, n_tokens)
            self._launch(leaving)
        except (CapacityError, DriverError, FileError) as error:
            self._refuse(sequence, "parked", error)
            return None
        return leaving

    def _copy_of(self, sequence: Sequence) -> HostCopy:
        """A sequence's host copy, or a new one where what it had is still being read in vain."""
        self._host.poll()
        if sequence in self._copies and self._copies[sequence].n_readers:
            self._drop(sequence)
        return self._copies.setdefault(sequence, self._host.new_copy(self._memory.cache.layout))

    def _launch(self, leaving: _Leaving) -> None:
        """Begin to copy, or to make room for it in host memory: then it is tried again."""
        host, layout = self._host, self._memory.cache.layout
        is_hopeless = host.frames.n_frames_for(len(leaving.tokens) * layout.token_bytes) > host.frames.max_frames
        while leaving.parking is None:
            try:
                leaving.parking = host.begin_copy(leaving.copy, self._memory.cache, leaving.slot_id, leaving.tokens)
                self._moves.note(leaving.parking)
            except OutOfHostMemory:
                if is_hopeless or not (self._sessions.is_making_host_room or self._sessions.make_host_room()):
                    raise
                if self._sessions.is_making_host_room:
                    return

    def _settle(self) -> None:
        """Take up what has passed.

        Raises:
            DriverError: The device is lost.
        """
        self._arrivals.settle()
        for sequence, leaving in list(self._leaving.items()):
            is_waiting = leaving.parking is None and leaving.is_wanted  # for host memory
            if is_waiting:
                try:
                    self._launch(leaving)
                    is_waiting = leaving.parking is None
                except (CapacityError, DriverError, FileError) as error:
                    self._refuse(sequence, "parked", error)
                    is_waiting = False
            if not is_waiting and (leaving.parking is None or is_over(leaving.parking)):
                self._arrive_below(sequence)
        self._moves.poll()

    def _arrive_below(self, sequence: Sequence) -> None:
        """Give a slot back whose rows are in host memory, or are not wanted there. What is on its way is waited for."""
        leaving = self._leaving.pop(sequence)
        try:
            if leaving.parking is not None:
                leaving.parking.finish()
                leaving.copy.is_spare = False  # its slot goes
                self._n_parked += 1
        except DriverError as error:
            self._refuse(sequence, "parked", error)
        finally:
            self._moves.leaving.discard(leaving.slot_id)
            self._inner.give_back(leaving.slot_id)
            if not leaving.is_wanted:
                self._leave_behind(sequence, is_sound=leaving.is_sound)

    def _leave_behind(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Let the session of a sequence that has ended go on with its host copy where it has no slot, or drop that."""
        copy = self._copies.get(sequence)
        if copy is not None and is_sound and self._sessions.adopt(sequence, copy):
            del self._copies[sequence]
        self._drop(sequence)

    # One that comes back

    def _is_best(self, copy: HostCopy, sequence: Sequence) -> bool:
        """Whether a sequence is to begin with its host copy: others have less of it."""
        if sequence in self._arrivals:
            return True
        copy.is_spare = self._inner.n_found_tokens(sequence) >= copy.n_tokens
        return not copy.is_spare

    def _restore(self, copy: HostCopy, sequence: Sequence, expected_tokens: int) -> Start | None:
        """Begin a sequence with its host copy, or anew where that fails; None where either is coming."""
        try:
            start = self._arrivals.bring(sequence, copy, copy.n_tokens, expected_tokens)
        except (CapacityError, DriverError) as error:
            self._refuse(sequence, "restored", error)
            self._drop(sequence)
            return self._arrivals.begin_below(self._inner, sequence, expected_tokens)
        if start is not None:
            self._n_restored += 1
            self._inner.go_on(sequence, *start)
        return start

    def _drop(self, sequence: Sequence) -> None:
        copy = self._copies.pop(sequence, None)
        if copy is not None:
            self._host.drop_when_quiet(copy)

    def _refuse(self, sequence: Sequence, what: str, error: VmemError) -> None:
        _require_device(error)
        self._n_refused += 1
        _LOG.info("%r is not %s: %s", sequence, what, error)

    def _close_host(self) -> None:
        try:
            self._host.close()
        except UsageError as error:  # a device may still use it, after a failure: it stays until the process ends
            _LOG.warning("host memory is not given back: %s", error)

    def _show(self) -> None:
        """Set out what other threads may read."""
        self._n_changes_shown = self._sessions.n_changes
        self._shown = self._look()

    def _look(self) -> TierFigures:
        n_disk_bytes, max_disk_bytes = self._sessions.disk_bytes
        return TierFigures(
            host=self._host.stats(),
            disk_bytes=n_disk_bytes,
            max_disk_bytes=max_disk_bytes,
            sessions=self._sessions.look(),
            n_session_tokens=self._sessions.n_tokens_used,
            n_parked=self._n_parked,
            n_restored=self._n_restored,
            n_refused=self._n_refused,
            n_moving=len(self._moves),
        )


def _require_device(error: VmemError) -> None:
    """Raise again what says that the device is lost."""
    if isinstance(error, DriverError) and error.is_fatal:
        raise error
