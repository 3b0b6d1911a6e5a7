"""Sequences that lose their slot for want of pages: what they have computed waits in host memory.

    pause    the rows go to host memory, then the slot goes back
    begin    again: the rows come back from there, and nothing is computed twice
    end      the host copy goes

The host copy stays while the sequence runs, as a spare: paused again, only what was added since is moved. Where host
memory is spent, sessions that wait there go to disk; where that does not suffice, or a copy fails, the sequence is
computed again, which gives the same tokens.

Guarantees: rows are restored for the tokens that they were computed for. After any failure but a lost device the
sequence has a slot, or waits, as if it had never been parked.
Assumptions: one thread, but for `tiers`. All that a sequence keeps is in its slot, from its first token on. Copies are
waited for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack

from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.request import Sequence
from vmem_kv.engine.session_slots import SessionSlots
from vmem_kv.engine.slot_source import Start
from vmem_kv.engine.slots_over import SlotsOver
from vmem_kv.engine.tier_stats import TierFigures
from vmem_kv.errors import CapacityError, DriverError, FileError, OutOfHostMemory, OutOfSlots, UsageError, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.tiers.copies import HostCopy
from vmem_kv.tiers.host import HostTier

_LOG = logging.getLogger("vmem_kv")


class ParkingSlots(SlotsOver):
    """See this file's first lines.

    Args:
        inner: The source below.
        memory: Where the slots are.
        host: Host memory, which sessions use as well; closed with this.
        min_tokens: Fewer are computed again: that costs less than moving them.
    """

    def __init__(self, inner: SessionSlots, memory: SlotMemory, host: HostTier, *, min_tokens: int) -> None:
        super().__init__(inner)
        self._sessions = inner
        self._memory = memory
        self._host = host
        self._min_tokens = min_tokens
        self._copies: dict[Sequence, HostCopy] = {}
        self._n_parked = self._n_restored = self._n_refused = 0
        self._n_changes_shown = inner.n_changes
        self._shown = self._look()

    def begin(self, sequence: Sequence, expected_tokens: int) -> Start:
        start = self._restore(sequence, expected_tokens) or self._inner.begin(sequence, expected_tokens)
        self._show()
        return start

    def pause(self, sequence: Sequence) -> None:
        try:
            self._park(sequence)
        finally:
            self._inner.pause(sequence)
            self._show()

    def end(self, sequences: SequenceOf[Sequence], *, is_sound: bool = True) -> None:
        try:
            self._inner.end(sequences, is_sound=is_sound)
        finally:
            for sequence in sequences:
                self._drop(sequence)
            self._show()

    def settle(self) -> None:
        self._inner.settle()
        self._host.poll()
        if self._sessions.n_changes != self._n_changes_shown:
            self._show()

    def tiers(self) -> TierFigures:
        return self._shown

    def check(self) -> None:
        self._inner.check()
        self._host.check()

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._close_host)
            stack.callback(self._inner.close)
            for sequence in list(self._copies):
                self._drop(sequence)

    # Below: one sequence

    def _park(self, sequence: Sequence) -> None:
        """Bring the host copy up to date with a running sequence, if that can be."""
        slot_id, n_tokens = sequence.slot_id, sequence.n_computed
        if slot_id is None or n_tokens < self._min_tokens:
            return
        copy = self._copies.setdefault(sequence, self._host.new_copy(self._memory.cache.layout))
        tokens = sequence.token_ids[:n_tokens]
        try:
            self._memory.cut(slot_id, n_tokens)
            self._copy_out(copy, slot_id, tokens)
        except (CapacityError, DriverError, FileError) as error:
            _require_device(error)
            self._n_refused += 1
            _LOG.info("%r is not parked: %s", sequence, error)
            return
        copy.is_spare = False  # its slot goes
        self._n_parked += 1

    def _copy_out(self, copy: HostCopy, slot_id: SlotId, tokens: list[int]) -> None:
        host, layout = self._host, self._memory.cache.layout
        is_hopeless = host.frames.n_frames_for(len(tokens) * layout.token_bytes) > host.frames.max_frames
        while True:
            try:
                host.copy_out(copy, self._memory.cache, slot_id, tokens)
                return
            except OutOfHostMemory:
                if is_hopeless or not self._sessions.make_host_room():
                    raise

    def _restore(self, sequence: Sequence, expected_tokens: int) -> Start | None:
        """Begin a sequence with its host copy; None where there is none, others have as much, or it fails."""
        copy = self._copies.get(sequence)
        if copy is None or not copy.n_tokens:
            return None
        if self._inner.n_found_tokens(sequence) >= copy.n_tokens:
            copy.is_spare = True
            return None
        try:
            slot_id = self._fill(copy, sequence, expected_tokens)
        except (CapacityError, DriverError) as error:
            _require_device(error)
            self._n_refused += 1
            _LOG.info("%r is not restored: %s", sequence, error)
            self._drop(sequence)
            return None
        self._n_restored += 1
        self._inner.go_on(sequence, slot_id, copy.n_tokens)
        return Start(slot_id, copy.n_tokens)

    def _fill(self, copy: HostCopy, sequence: Sequence, expected_tokens: int) -> SlotId:
        """Return a new slot with a copy's rows."""
        memory = self._memory
        slot_id = self._acquire(max(expected_tokens, copy.n_tokens), sequence.request.domain)
        try:
            lengths = {slot_id: copy.n_tokens}
            self.make_room(memory.n_missing_pages(lengths))
            memory.grow(lengths)
            memory.cut(slot_id, 0)  # mapped, and without tokens
            self._host.restore(copy, memory.cache, slot_id)
        except BaseException:
            memory.retire([slot_id])
            raise
        return slot_id

    def _acquire(self, expected_tokens: int, domain: str) -> SlotId:
        while True:
            try:
                return self._memory.acquire(expected_tokens, domain)
            except OutOfSlots:
                if not self.give_way(1):
                    raise

    def _drop(self, sequence: Sequence) -> None:
        copy = self._copies.pop(sequence, None)
        if copy is not None:
            self._host.drop_when_quiet(copy)

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
        )


def _require_device(error: VmemError) -> None:
    """Raise again what says that the device is lost."""
    if isinstance(error, DriverError) and error.is_fatal:
        raise error
