"""The second tier: sequences parked in host memory.

    park      rows of a slot ─▶ host copy, then the slot's pages go back; the slot and its addresses stay
    restore   host copy ─▶ rows of an empty slot; the copy stays until it is dropped, or its room is needed
    park      again: only the rows that were added since are moved

Rows move in one copy per plane and contiguous range of host memory, not page by page.

Guarantees
  * After a failed park the slot is as it was and the copy holds what it held, byte for byte; or nothing, where the
    device cannot say that it writes there no more. After a failed restore the copy holds what it held and the slot is
    active with no tokens. (Pages that were mapped for it stay mapped: try again, or retire it.)
  * The rows of a copy are those of its token ids: what it is parked with is compared with what it holds, token by
    token, and rows behind the first difference are moved again.
  * The budget is never passed. Spare copies, whose rows a slot has as well, are dropped for room, the longest unused
    first; others never.
  * Host memory that a device may still write is not handed to anybody else.

States of a copy: empty ─▶ being written ─▶ held ⇄ being read (by any number of restores); `drop` makes it empty.

Assumptions: one thread calls the tier, but for `rows` of a copy that is held or filled. Between `begin_park` and
`finish` nobody steps the slot, and between `begin_restore` and `finish` nobody but what is launched later on the same
stream. Token ids determine the rows: where something else does too (an adapter, an image), the caller keeps such
sequences apart.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vmem_kv.cache import KVCache
from vmem_kv.errors import InvariantError, UsageError, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.layout import Layout
from vmem_kv.tiers.copies import Extent, HostCopy, Piece, end_of, have_same_rows, n_common, token_ids
from vmem_kv.tiers.memory import FramePool
from vmem_kv.tiers.moving import InlineMover, Move, Mover, Transfer

MAX_WASTE = 0.5
"""Share of a copy's memory that rows may take which no longer hold good. Beyond it, everything is moved again."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """One snapshot. Memory in bytes, of which `spare_bytes` can be had by dropping; the rest counts since the start."""

    max_bytes: int
    taken_bytes: int
    spare_bytes: int
    n_copies: int  # that hold tokens
    n_moves_out: int  # copies between device and host, each of one contiguous range
    n_moves_in: int
    out_bytes: int  # device to host
    in_bytes: int
    n_dropped: int  # spare copies that went for room


class HostTier:
    """Parks sequences in host memory and restores them. See this file's first lines.

    Args:
        frames: The memory and its budget. The tier closes it.
        mover: Who launches copies; by default the calling thread, on its stream.
    """

    def __init__(self, frames: FramePool, mover: Mover | None = None) -> None:
        self.frames = frames
        self._mover = mover or InlineMover()
        self._copies: dict[HostCopy, None] = {}
        """Every copy that holds tokens, the longest unused first."""
        self._writing: set[Parking] = set()
        self._reading: set[Restoring] = set()
        self._stuck: list[tuple[Transfer, list[int]]] = []
        """Frames that a device may still write, after a failure."""
        self._unwanted: list[HostCopy] = []
        """Copies that go when nothing reads them any more."""
        self._n_moves = {True: 0, False: 0}
        self._n_bytes = {True: 0, False: 0}
        self._n_dropped = 0

    def new_copy(self, layout: Layout) -> HostCopy:
        """Return an empty copy for a sequence of a cache with this layout. It takes no memory yet."""
        return HostCopy(layout)

    def copy_out(self, copy: HostCopy, cache: KVCache, slot_id: SlotId, tokens: Sequence[int]) -> None:
        """Bring a copy up to date with a slot, which stays as it is; see `begin_park` for arguments and errors."""
        self.begin_copy(copy, cache, slot_id, tokens).finish()

    def begin_copy(self, copy: HostCopy, cache: KVCache, slot_id: SlotId, tokens: Sequence[int]) -> Parking:
        """Begin to bring a copy up to date with a slot, which keeps its pages; see `begin_park`."""
        return self._begin(copy, cache, slot_id, tokens, then_vacate=False)

    def park(self, copy: HostCopy, cache: KVCache, slot_id: SlotId, tokens: Sequence[int]) -> None:
        """Move a slot's rows into a copy and give its pages back; returns when that is done. See `begin_park`."""
        self.begin_park(copy, cache, slot_id, tokens).finish()

    def begin_park(self, copy: HostCopy, cache: KVCache, slot_id: SlotId, tokens: Sequence[int]) -> Parking:
        """Begin to move what `copy` lacks of a slot's rows into it. The slot keeps its pages until `Parking.finish`.

        Args:
            copy: Where to. Rows of tokens that it holds already, from the beginning on, are not moved again.
            cache: Whose slot it is.
            slot_id: An active slot that did not slide.
            tokens: The ids of all its tokens.

        Raises:
            OutOfHostMemory: The budget or the system's memory is spent. Nothing changed but spare copies that went.
            UsageError: `tokens` are not as many as the slot has, or the slot slid, or the copy is under way elsewhere
                or has other rows. Nothing changed.
            DriverError: A copy could not be launched. Nothing changed; but the copy is empty where the device cannot
                say that what was launched before has ended.
        """
        return self._begin(copy, cache, slot_id, tokens, then_vacate=True)

    def restore(
        self, copy: HostCopy, cache: KVCache, slot_id: SlotId, *, first_token: int = 0, n_tokens: int | None = None
    ) -> None:
        """Give an empty slot the rows of a copy; returns when they are there. See `begin_restore`."""
        self.begin_restore(copy, cache, slot_id, first_token=first_token, n_tokens=n_tokens).finish()

    def begin_restore(
        self, copy: HostCopy, cache: KVCache, slot_id: SlotId, *, first_token: int = 0, n_tokens: int | None = None
    ) -> Restoring:
        """Map pages for an empty slot and begin to copy rows into them.

        With the default mover, work that the calling thread launches later on the same stream finds them there.

        Args:
            copy: Where from. It stays as it is.
            cache: Whose slot it is.
            slot_id: An active slot with no tokens.
            first_token: Rows before this one are mapped, but not copied: for a caller who computes the front again
                while the rest is copied.
            n_tokens: How long the slot will be; by default all that the copy has.

        Raises:
            CapacityError: The slot's pages cannot be had. Nothing changed but warm slots that went cold.
            UsageError: The copy is empty or under way, or has not these tokens or other rows, or the slot has tokens.
                Nothing changed.
            DriverError: A copy could not be launched. The slot is active with no tokens.
        """
        self.poll()
        n_tokens = copy.n_tokens if n_tokens is None else n_tokens
        self._require_same_rows(copy, cache)
        if copy.is_written:
            raise UsageError("the copy is being written; finish that first")
        if not copy.n_tokens:
            raise UsageError("the copy holds nothing: it was never parked, or it was dropped; compute the rows again")
        if not 0 <= first_token <= n_tokens <= copy.n_tokens or not n_tokens:
            raise UsageError(f"tokens [{first_token}, {n_tokens}) of a copy that holds {copy.n_tokens}")
        if cache.n_tokens(slot_id):
            raise UsageError(f"slot {slot_id} has {cache.n_tokens(slot_id)} tokens; restore into an empty slot")
        is_whole = first_token == 0 and n_tokens == copy.n_tokens
        cache.ensure({slot_id: n_tokens})
        try:
            moves = self._moves(copy, cache, slot_id, first_token, n_tokens)
            transfer = Transfer(cache.pool.driver, moves, to_host=False)
            restoring = Restoring(self, copy, cache, slot_id, transfer, makes_spare=is_whole)
            after = cache.fence()  # the pages may still be scrubbed
        except BaseException:
            cache.ensure({slot_id: 0})
            raise
        copy.n_readers += 1
        self._reading.add(restoring)
        self._touch(copy)
        try:
            self._mover.start(transfer, after)
        except BaseException:
            restoring._give_up()
            raise
        self._count(moves, to_host=False)
        return restoring

    def drop(self, copy: HostCopy) -> None:
        """Empty a copy. Its memory is free again.

        Raises:
            UsageError: It is being written or read. Nothing changed.
        """
        self.poll()
        if copy.is_written or copy.n_readers:
            raise UsageError("the copy is under way; finish its park or restore before it is dropped")
        self._empty(copy)

    def drop_when_quiet(self, copy: HostCopy) -> None:
        """Empty a copy now or, where a device may still read it, at the first poll that finds that it does not.

        The copy is the tier's from now on: for other rows the caller takes a new one.

        Raises:
            UsageError: It is being written. Nothing changed.
        """
        self.poll()
        if copy.is_written:
            raise UsageError("the copy is being written; finish or cancel its park before it is dropped")
        if not copy.n_readers:
            self._empty(copy)
        elif copy not in self._unwanted:
            self._unwanted.append(copy)

    @contextmanager
    def filling(self, layout: Layout, tokens: Sequence[int]) -> Iterator[HostCopy]:
        """A new copy with memory for these tokens, whose rows the block writes through `rows`; dropped if it raises.

        Raises:
            OutOfHostMemory: The budget or the system's memory is spent. Nothing changed but spare copies that went.
            UsageError: There are no tokens.
        """
        copy = self.begin_filling(layout, tokens)
        try:
            yield copy
        except BaseException:
            self.end_filling(copy, is_good=False)
            raise
        self.end_filling(copy)

    def begin_filling(self, layout: Layout, tokens: Sequence[int]) -> HostCopy:
        """A new copy with memory for these tokens, whose rows the caller writes, in any thread, until `end_filling`.

        Raises:
            OutOfHostMemory: The budget or the system's memory is spent. Nothing changed but spare copies that went.
            UsageError: There are no tokens.
        """
        ids = token_ids(tokens)
        copy = self.new_copy(layout)
        frames = self._take(self.frames.n_frames_for(len(ids) * layout.token_bytes), beside=copy)
        copy.tokens, copy.extents, copy.frames = ids, (Extent(0, len(ids), 0),), frames
        self._copies[copy] = None
        copy.is_written = True
        return copy

    def end_filling(self, copy: HostCopy, *, is_good: bool = True) -> None:
        """Say that nobody writes a copy any more, and whether its rows are good; else it is dropped."""
        copy.is_written = False
        if not is_good:
            self._empty(copy)

    def hold(self, copy: HostCopy) -> None:
        """Let a copy stay as it is while the caller reads its rows, in any thread, until `release`.

        Raises:
            UsageError: It is empty, or being written. Nothing changed.
        """
        if copy.is_written or not copy.n_tokens:
            raise UsageError("only a copy that holds tokens, and is not being written, can be read")
        copy.n_readers += 1

    def release(self, copy: HostCopy) -> None:
        """Undo `hold`."""
        copy.n_readers -= 1

    def rows(
        self, copy: HostCopy, first_token: int = 0, end_token: int | None = None
    ) -> Iterator[tuple[Piece, list[memoryview]]]:
        """The rows of these tokens where they lie, plane by plane and token by token."""
        self.frames.require_owner()
        end_token = copy.n_tokens if end_token is None else end_token
        planes, runs = copy.layout.planes, self.frames.runs(copy.frames)
        for piece in copy.pieces(first_token, end_token):
            yield piece, runs.views(piece.first_byte, piece.n_tokens * planes[piece.plane_index].token_bytes)

    def make_room(self, n_bytes: int) -> bool:
        """Drop spare copies until so much could be taken; return whether it can."""
        self.poll()
        return self._make_room(self.frames.n_frames_for(n_bytes), beside=None)

    def poll(self) -> None:
        """Note what has been moved meanwhile: copies that nobody reads any more may be dropped or written."""
        self.frames.require_owner()
        for restoring in list(self._reading):
            restoring._settle_if_quiet()
        for stuck in list(self._stuck):
            transfer, frames = stuck
            if transfer.is_quiet():
                self._stuck.remove(stuck)
                self.frames.give(frames)
        for copy in [copy for copy in self._unwanted if not copy.n_readers]:
            self._unwanted.remove(copy)
            self._empty(copy)

    def stats(self) -> TierStats:
        """Return one snapshot."""
        frame_bytes = self.frames.frame_bytes
        return TierStats(
            max_bytes=self.frames.max_frames * frame_bytes,
            taken_bytes=self.frames.n_taken * frame_bytes,
            spare_bytes=sum(len(copy.frames) for copy in self._copies if _is_droppable(copy)) * frame_bytes,
            n_copies=len(self._copies),
            n_moves_out=self._n_moves[True],
            n_moves_in=self._n_moves[False],
            out_bytes=self._n_bytes[True],
            in_bytes=self._n_bytes[False],
            n_dropped=self._n_dropped,
        )

    def check(self) -> None:
        """Verify that every taken frame belongs to exactly one copy or transfer.

        Raises:
            InvariantError: It does not.
        """
        held = [frame for copy in self._copies for frame in copy.frames]
        held += [frame for parking in self._writing for frame in parking.new_frames]
        held += [frame for _, frames in self._stuck for frame in frames]
        if len(set(held)) != len(held) or len(held) != self.frames.n_taken:
            raise InvariantError(f"{self.frames.n_taken} frames are taken, {sorted(held)} are held")
        for copy in self._copies:
            last = copy.extents[-1] if copy.extents else None
            if last is None or not last.first_token < copy.n_tokens <= last.first_token + last.n_tokens:
                raise InvariantError(f"a copy of {copy.n_tokens} tokens has the extents {copy.extents}")
            if copy.end_byte > len(copy.frames) * self.frames.frame_bytes:
                raise InvariantError(f"{copy.end_byte} bytes in {len(copy.frames)} frames")

    def close(self) -> None:
        """Drop every copy and give the memory back. Idempotent.

        Raises:
            UsageError: A park or a restore is under way; or one failed, and the device cannot say that it uses the
                memory no more; or a file is being written or read. Nothing changed: finish it, or close again.
        """
        self.poll()
        if self._writing or self._reading or self._stuck:
            raise UsageError(
                f"{len(self._writing) + len(self._stuck)} parks and {len(self._reading)} restores are under way, or "
                "failed and did not end; finish them, or close again when the device has come to rest"
            )
        n_in_files = sum(copy.is_written or copy.n_readers > 0 for copy in self._copies)
        if n_in_files:
            raise UsageError(f"{n_in_files} copies are being written to files or read from them; close the disk first")
        for copy in list(self._copies):
            self._empty(copy)
        self.frames.close()

    def _begin(
        self, copy: HostCopy, cache: KVCache, slot_id: SlotId, tokens: Sequence[int], *, then_vacate: bool
    ) -> Parking:
        self.poll()
        ids = token_ids(tokens)
        self._require_same_rows(copy, cache)
        if copy.is_written or copy.n_readers:
            raise UsageError("the copy is under way; finish its park or restore first")
        if cache.n_tokens(slot_id) != len(ids):
            raise UsageError(f"{len(ids)} token ids for slot {slot_id} of {cache.n_tokens(slot_id)} tokens")
        if cache.first_token(slot_id):
            raise UsageError(
                f"slot {slot_id} slid to token {cache.first_token(slot_id)}; only whole sequences are kept"
            )
        n_same, extents = self._what_stays(copy, ids)
        n_kept = self.frames.n_frames_for(end_of(extents, copy.layout))
        target = HostCopy(copy.layout)
        target.tokens = ids
        if n_same < len(ids):
            extents = (*extents, Extent(n_same, len(ids) - n_same, self._free_from(copy, extents)))
        target.extents = extents
        new_frames = self._take(self.frames.n_frames_for(target.end_byte) - n_kept, beside=copy)
        target.frames = copy.frames[:n_kept] + new_frames
        try:
            moves = self._moves(target, cache, slot_id, n_same, len(ids))
            after = cache.fence()
        except BaseException:
            self.frames.give(new_frames)
            raise
        transfer = Transfer(cache.pool.driver, moves, to_host=True)
        parking = Parking(self, copy, target, n_kept, cache, slot_id, transfer, then_vacate=then_vacate)
        copy.is_written = True
        self._writing.add(parking)
        try:
            self._mover.start(transfer, after)
        except BaseException:
            parking._give_up()
            raise
        self._count(moves, to_host=True)
        return parking

    def _what_stays(self, copy: HostCopy, ids: array[int]) -> tuple[int, tuple[Extent, ...]]:
        """How many of these tokens' rows the copy holds, and the extents that they lie in."""
        n_same = n_common(copy.tokens, ids)
        extents = tuple(extent for extent in copy.extents if extent.first_token < n_same)
        needed_bytes, kept_bytes = n_same * copy.layout.token_bytes, end_of(extents, copy.layout)
        if kept_bytes - needed_bytes > kept_bytes * MAX_WASTE:
            return 0, ()
        return n_same, extents

    def _free_from(self, copy: HostCopy, extents: tuple[Extent, ...]) -> int:
        """Where rows may go behind these extents of a copy: no byte of it is there, also none that is to go.

        That is behind all that it has, or in a frame that it has not.
        """
        n_kept = self.frames.n_frames_for(end_of(extents, copy.layout))
        return min(copy.end_byte, n_kept * self.frames.frame_bytes)

    def _moves(self, copy: HostCopy, cache: KVCache, slot_id: SlotId, first_token: int, end_token: int) -> list[Move]:
        """The copies between a slot and host memory for these tokens."""
        moves: list[Move] = []
        if first_token == end_token:
            return moves
        spans = cache.spans(slot_id, first_token, end_token)
        for piece, views in self.rows(copy, first_token, end_token):
            token_bytes = copy.layout.planes[piece.plane_index].token_bytes
            address = spans[piece.plane_index][0] + (piece.first_token - first_token) * token_bytes
            for view in views:
                moves.append(Move(address, view))
                address += len(view)
        return moves

    def _take(self, n_frames: int, *, beside: HostCopy) -> list[int]:
        self._make_room(n_frames, beside=beside)
        return self.frames.take(n_frames)

    def _make_room(self, n_frames: int, *, beside: HostCopy | None) -> bool:
        """Drop spare copies, but not the one `beside`, as long as frames are missing. None goes if all were too few."""
        spare = [copy for copy in self._copies if _is_droppable(copy) and copy is not beside]
        if self.frames.n_available + sum(len(copy.frames) for copy in spare) < n_frames:
            return False
        for copy in spare:
            if self.frames.n_available >= n_frames:
                break
            self._empty(copy)
            self._n_dropped += 1
        return True

    def _empty(self, copy: HostCopy) -> None:
        self.frames.give(self._strip(copy))

    def _strip(self, copy: HostCopy) -> list[int]:
        """Make a copy empty; return the frames that it had."""
        frames = copy.frames
        copy.tokens, copy.extents, copy.frames = array("q"), (), []
        self._copies.pop(copy, None)
        return frames

    def _touch(self, copy: HostCopy) -> None:
        self._copies.pop(copy, None)
        self._copies[copy] = None

    def _count(self, moves: Sequence[Move], *, to_host: bool) -> None:
        self._n_moves[to_host] += len(moves)
        self._n_bytes[to_host] += sum(len(move.view) for move in moves)

    def _require_same_rows(self, copy: HostCopy, cache: KVCache) -> None:
        if not have_same_rows(copy.layout, cache.layout):
            raise UsageError(
                f"the copy has rows of a {copy.layout.kind} layout of {len(copy.layout.layers)} layers, which are not "
                f"those of this cache ({cache.layout.kind}, {len(cache.layout.layers)} layers)"
            )


class Parking:
    """A park under way. It is a fence: whether the rows are in host memory."""

    def __init__(
        self,
        tier: HostTier,
        copy: HostCopy,
        target: HostCopy,
        n_kept: int,
        cache: KVCache,
        slot_id: SlotId,
        transfer: Transfer,
        *,
        then_vacate: bool,
    ) -> None:
        self._tier = tier
        self._copy = copy
        self._target = target  # what the copy will be
        self._n_kept = n_kept  # frames that both have
        self._cache = cache
        self._slot_id = slot_id
        self._transfer = transfer
        self._then_vacate = then_vacate
        self._is_open = True

    @property
    def new_frames(self) -> list[int]:
        """Frames that were taken for it."""
        return self._target.frames[self._n_kept :]

    def passed(self) -> bool:
        """Whether `finish` would not have to wait; it may raise what the copies failed with.

        Raises:
            DriverError: The device cannot say; asking again is allowed.
        """
        return self._transfer.has_failed or self._transfer.passed()

    def passes_within(self, timeout_s: float) -> bool:
        """See `Passing`."""
        return self._transfer.passes_within(timeout_s)

    def finish(self) -> None:
        """Wait for the copies, make them the copy's contents, and give the slot's pages back. Once.

        Raises:
            UsageError: It was finished or cancelled before, or the slot was stepped meanwhile: then nothing changed.
            DriverError: Moving the rows failed: nothing changed, but for the copy, which is empty where the device
                cannot say that it writes there no more. Or giving the pages back failed (`KVCache.vacate`): the copy
                holds everything, so that to try again moves nothing.
        """
        self._require_open()
        try:
            self._transfer.wait()
            if self._cache.n_tokens(self._slot_id) != self._target.n_tokens:
                raise UsageError(f"slot {self._slot_id} was stepped while it was being parked; park it again")
        except BaseException:
            self._give_up()
            raise
        self._commit()
        if not self._then_vacate:
            return
        self._copy.is_spare = False
        try:
            self._cache.vacate(self._slot_id)
        finally:
            self._copy.is_spare = bool(self._cache.n_tokens(self._slot_id))

    def cancel(self) -> None:
        """Leave everything as it was before `begin_park`. Idempotent; without effect after `finish`.

        The copy is empty where the device cannot say that it writes there no more.
        """
        if self._is_open:
            self._give_up()

    def _commit(self) -> None:
        copy, target = self._copy, self._target
        gone = copy.frames[self._n_kept :]
        copy.tokens, copy.extents, copy.frames = target.tokens, target.extents, target.frames
        self._close()
        self._tier.frames.give(gone)
        self._tier._touch(copy)
        copy.is_spare = True

    def _give_up(self) -> None:
        is_quiet = self._transfer.is_quiet()  # first: interrupted here, it can be cancelled still
        self._close()
        if is_quiet:
            self._tier.frames.give(self.new_frames)
        else:  # new rows begin in the last frame of the old ones; the slot has what is wanted of both
            self._tier._stuck.append((self._transfer, self._tier._strip(self._copy) + self.new_frames))

    def _close(self) -> None:
        self._is_open = False
        self._copy.is_written = False
        self._tier._writing.discard(self)

    def _require_open(self) -> None:
        if not self._is_open:
            raise UsageError("this park was finished or cancelled before")


class Restoring:
    """A restore under way. It is a fence: whether the rows are in the slot."""

    def __init__(
        self,
        tier: HostTier,
        copy: HostCopy,
        cache: KVCache,
        slot_id: SlotId,
        transfer: Transfer,
        *,
        makes_spare: bool,
    ) -> None:
        self._tier = tier
        self._copy = copy
        self._cache = cache
        self._slot_id = slot_id
        self._transfer = transfer
        self._makes_spare = makes_spare  # the slot will have all that the copy has
        self._is_reading = True
        self._is_open = True

    def passed(self) -> bool:
        """Whether `finish` would not have to wait; it may raise what the copies failed with.

        Raises:
            DriverError: The device cannot say; asking again is allowed.
        """
        return self._transfer.has_failed or self._transfer.passed()

    def passes_within(self, timeout_s: float) -> bool:
        """See `Passing`."""
        return self._transfer.passes_within(timeout_s)

    def finish(self) -> None:
        """Wait until the rows are in the slot. Once.

        Raises:
            DriverError: Moving the rows failed. The copy holds what it held, the slot is active with no tokens.
            UsageError: It was finished before. Nothing changed.
        """
        if not self._is_open:
            raise UsageError("this restore was finished before")
        try:
            self._transfer.wait()
        except BaseException:
            self._give_up()
            raise
        self._is_open = False
        self._settle()
        if self._makes_spare:
            self._copy.is_spare = True

    def cancel(self) -> None:
        """Wait until the copies are over, for a slot that nobody wants any more: it is active with no tokens.

        The copy is as it was. Idempotent; without effect after `finish`.
        """
        if self._is_open:
            self._transfer.is_quiet()
            self._give_up()

    def _give_up(self) -> None:
        self._is_open = False
        self._settle_if_quiet()
        self._cache.ensure({self._slot_id: 0})

    def _settle_if_quiet(self) -> None:
        if self._transfer.has_failed:
            is_done = self._transfer.is_quiet()
        else:
            try:
                is_done = self._transfer.passed()
            except VmemError:  # the device cannot say
                is_done = False
        if is_done:
            self._settle()

    def _settle(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._copy.n_readers -= 1
            self._tier._reading.discard(self)


def _is_droppable(copy: HostCopy) -> bool:
    return copy.is_spare and not copy.is_written and not copy.n_readers
