"""A small cache with a host tier behind it, and rows whose every byte says whose they are."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from vmem_kv.driver.base import Fence
from vmem_kv.driver.ledger import Ledger
from vmem_kv.growth import SlotId
from vmem_kv.tiers.copies import HostCopy
from vmem_kv.tiers.host import HostTier
from vmem_kv.tiers.memory import FramePool, HostMemory, PinnedMemory
from vmem_kv.tiers.moving import Mover

from ..core.backends import physical_bytes
from ..core.bench import PAGE, Bench


@functools.cache
def row_bytes(token: int, position: int, plane_index: int, n_bytes: int) -> bytes:
    """The row that a token has in a plane. Two different tokens, positions or planes differ in every few bytes."""
    return hashlib.shake_128(f"{token} {position} {plane_index}".encode()).digest(n_bytes)


class TierBench(Bench):
    """See this file's first lines.

    Args:
        kind: The layout.
        n_frames: The host tier's budget.
        frames_per_buffer: How many frames it asks of the system at a time.
        memory: Where its buffers come from; by default they are pinned.
        mover: Who launches its copies.
        keywords: Of `Bench`.
    """

    def __init__(
        self,
        kind: str = "per_layer",
        *,
        n_frames: int = 64,
        frames_per_buffer: int = 8,
        memory: HostMemory | None = None,
        mover: Mover | None = None,
        **keywords: object,
    ) -> None:
        super().__init__(kind, **{"max_pages": 128, **keywords})
        self.host_ledger = Ledger()
        self.frames = FramePool(
            n_frames * PAGE,
            memory or PinnedMemory(self.driver),
            frame_bytes=PAGE,
            buffer_bytes=frames_per_buffer * PAGE,
            ledger=self.host_ledger,
        )
        self.host = HostTier(self.frames, mover)
        self.n_bytes_out = self.n_bytes_in = 0
        """What the driver was asked to copy, by its own arguments."""
        self._count_copies()

    def _count_copies(self) -> None:
        copy_out, copy_in = self.driver.copy_to_host, self.driver.copy_from_host

        def out(address: int, buffer: memoryview) -> Fence:
            self.n_bytes_out += len(buffer)
            return copy_out(address, buffer)

        def inward(buffer: memoryview, address: int) -> Fence:
            self.n_bytes_in += len(buffer)
            return copy_in(buffer, address)

        self.driver.copy_to_host, self.driver.copy_from_host = out, inward  # type: ignore[method-assign]

    def begin(self, tokens: Sequence[int] = (), **keywords: object) -> SlotId:
        """A new sequence of these tokens."""
        slot_id = self.cache.acquire(**keywords)
        self.append(slot_id, [], tokens)
        return slot_id

    def append(self, slot_id: SlotId, before: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """Grow a sequence that has the tokens `before`, and write the new rows; return all of its tokens."""
        n_before = len(before)
        self.cache.ensure({slot_id: n_before + len(tokens)})
        for plane_index, plane in enumerate(self.layout.planes):
            data = [row_bytes(t, n_before + i, plane_index, plane.token_bytes) for i, t in enumerate(tokens)]
            self.memory.write(self.address(slot_id, plane_index, n_before), b"".join(data))
        return [*before, *tokens]

    def holds(self, slot_id: SlotId, tokens: Sequence[int], first_token: int = 0) -> bool:
        """Whether a slot has exactly the rows of these tokens, from `first_token` on."""
        if self.cache.n_tokens(slot_id) != len(tokens):
            return False
        for plane_index, plane in enumerate(self.layout.planes):
            expected = [row_bytes(t, i, plane_index, plane.token_bytes) for i, t in enumerate(tokens)]
            n_bytes = (len(tokens) - first_token) * plane.token_bytes
            found = self.memory.read(self.address(slot_id, plane_index, first_token), n_bytes)
            if found != b"".join(expected[first_token:]):
                return False
        return True

    def copy_holds(self, copy: HostCopy, tokens: Sequence[int]) -> bool:
        """Whether a host copy has exactly the rows of these tokens."""
        if list(copy.tokens) != list(tokens):
            return False
        found = [bytearray() for _ in self.layout.planes]
        for piece, views in self.host.rows(copy):
            for view in views:
                found[piece.plane_index] += view
        return all(
            bytes(rows) == b"".join(row_bytes(t, i, index, plane.token_bytes) for i, t in enumerate(tokens))
            for index, (rows, plane) in enumerate(zip(found, self.layout.planes, strict=True))
        )

    def check(self) -> None:
        """Every book adds up."""
        self.cache.check()
        self.host.check()

    def end(self) -> None:
        """Close everything; nothing may be left."""
        if self.cache._closed:
            return
        self.faulty.plan = lambda point: None
        self.check()
        self.host.close()
        assert self.frames.n_bytes == self.host_ledger.n_bytes == 0
        slots = self.cache.active_slots()
        if slots:
            self.cache.retire(slots)
        self.cache.settle()
        self.cache.close()
        self.pool.trim()
        assert self.driver.n_pinned == 0
        assert physical_bytes(self.device) == self.pool.n_quarantined * PAGE
        self.device.close()
