"""A reference model of a host tier: which copy holds the rows of which tokens, and what that takes.

The model is told every call with its outcome; it shares no code with `vmem_kv.tiers` and knows host memory as a number
of frames. It predicts exactly, as long as no fault is injected: how many bytes a park moves, how many frames it needs,
when `OutOfHostMemory` is right, and which spare copies are dropped for room, in which order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vmem_kv.testing.model import ModelMismatch
from vmem_kv.tiers.host import TierStats


@dataclass(slots=True)
class ModelCopy:
    """What one copy holds.

    Attributes:
        rows: What determines each row, in the order of the tokens.
        parts: (first token, tokens, first byte) of each piece that was moved, the later ones behind the earlier in
            memory. A piece holds good up to where the next one begins; what it has beyond that is waste.
        is_spare: Whether a slot has the rows too, so that they may be dropped.
    """

    rows: list[int] = field(default_factory=list)
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    is_spare: bool = False


@dataclass(slots=True)
class TierModel:
    """See this file's first lines.

    Args:
        row_bytes: Bytes of a token in all planes together.
        frame_bytes: The size of a frame.
        max_frames: The budget.
    """

    row_bytes: int
    frame_bytes: int
    max_frames: int
    copies: dict[int, ModelCopy] = field(default_factory=dict)
    """Copies that hold rows, by number; the longest unused first."""
    out_bytes: int = 0
    in_bytes: int = 0
    n_dropped: int = 0

    def after_park(self, number: int, rows: Sequence[int]) -> tuple[ModelCopy, int, int]:
        """What a copy will be when these rows were parked in it, how many of them move, and how many frames it takes.

        Rows that it holds from the beginning on stay, unless more than half of what would stay were waste. New ones
        go behind all that it holds, also what is to go, so that a park that fails has changed nothing; but frames
        that hold only what is to go are not kept.
        """
        old = self.copies.get(number, ModelCopy())
        n_same = next((i for i, (a, b) in enumerate(zip(old.rows, rows, strict=False)) if a != b), None)
        n_same = min(len(old.rows), len(rows)) if n_same is None else n_same
        kept = [part for part in old.parts if part[0] < n_same]
        kept_bytes = self.end_byte(kept)
        if 2 * (kept_bytes - n_same * self.row_bytes) > kept_bytes:
            n_same, kept_bytes, kept = 0, 0, []
        n_kept = self.n_frames(kept_bytes)
        first_byte = min(self.end_byte(old.parts), n_kept * self.frame_bytes)
        n_moved = len(rows) - n_same
        new = ModelCopy(list(rows), [*kept, (n_same, n_moved, first_byte)] if n_moved else kept)
        return new, n_moved, self.n_frames_of(new) - n_kept

    def end_byte(self, parts: Sequence[tuple[int, int, int]]) -> int:
        """The first byte behind some parts."""
        return parts[-1][2] + parts[-1][1] * self.row_bytes if parts else 0

    def n_frames(self, n_bytes: int) -> int:
        """Frames for so many bytes."""
        return -(-n_bytes // self.frame_bytes)

    def n_frames_for(self, rows: Sequence[int]) -> int:
        """Frames for rows that lie one behind the other."""
        return self.n_frames(len(rows) * self.row_bytes)

    def n_frames_of(self, copy: ModelCopy) -> int:
        """Frames that a copy has."""
        return self.n_frames(self.end_byte(copy.parts))

    @property
    def n_taken(self) -> int:
        """Frames of all copies."""
        return sum(self.n_frames_of(copy) for copy in self.copies.values())

    def plan_room(self, n_frames: int, beside: int | None) -> tuple[bool, list[int]]:
        """Whether frames can be had, and which spare copies are dropped for them; none if all were too few."""
        n_short = n_frames - (self.max_frames - self.n_taken)
        victims: list[int] = []
        for number, copy in self.copies.items():
            if n_short > 0 and copy.is_spare and number != beside:
                victims.append(number)
                n_short -= self.n_frames_of(copy)
        return (True, victims) if n_short <= 0 else (False, [])

    def dropped_for_room(self, numbers: Sequence[int]) -> None:
        """Spare copies went."""
        for number in numbers:
            del self.copies[number]
            self.n_dropped += 1

    def holds(self, number: int, copy: ModelCopy) -> None:
        """A copy holds this now, and was used last."""
        self.copies.pop(number, None)
        self.copies[number] = copy

    def compare(self, stats: TierStats) -> None:
        """Hold a tier's snapshot against the model.

        Raises:
            ModelMismatch: They differ.
        """
        spare = sum(self.n_frames_of(copy) for copy in self.copies.values() if copy.is_spare)
        expected = {
            "max_bytes": self.max_frames * self.frame_bytes,
            "taken_bytes": self.n_taken * self.frame_bytes,
            "spare_bytes": spare * self.frame_bytes,
            "n_copies": len(self.copies),
            "out_bytes": self.out_bytes,
            "in_bytes": self.in_bytes,
            "n_dropped": self.n_dropped,
        }
        wrong = {name: (getattr(stats, name), n) for name, n in expected.items() if getattr(stats, name) != n}
        if wrong:
            raise ModelMismatch(f"of the host tier, (actual, expected) differ: {wrong}")
