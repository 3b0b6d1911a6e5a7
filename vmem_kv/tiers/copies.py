"""The rows of one sequence outside of its slot: which tokens they belong to, and where in host memory they lie.

A copy is a list of extents, each the rows of some consecutive tokens, plane after plane, as few contiguous ranges:

    byte of (extent, plane, token) = extent.first_byte + extent.n_tokens * Σ earlier planes' token_bytes
                                   + (token - extent.first_token) * plane.token_bytes

Later extents are what was added since; an extent holds good from its first token to that of the next one, so that a
sequence that was shortened and went on another way needs no byte to be moved. Between two extents there may be a gap,
where one was that went: while it was to be replaced, it had to stay as it was.

Guarantees: token ids stand beside the rows and are compared, so that rows are never taken for those of other tokens.
Assumptions: one thread. `HostTier` alone changes a copy.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vmem_kv.errors import UsageError
from vmem_kv.layout import Layout


class Extent(NamedTuple):
    """Rows `[first_token, first_token + n_tokens)` of every plane, from `first_byte` of the copy's memory on."""

    first_token: int
    n_tokens: int
    first_byte: int


class Piece(NamedTuple):
    """Rows of one plane that lie in a row."""

    plane_index: int
    first_token: int
    n_tokens: int
    first_byte: int


class HostCopy:
    """What a tier holds of one sequence. Made by `HostTier.new_copy`; empty at first, and again when dropped.

    Attributes:
        layout: The geometry of the rows; only its planes matter, not its slots or pages.
        is_spare: Whether the rows are somewhere else as well, so that the tier may drop them for room. The tier says
            so after a restore, and no longer after a park; whoever knows better may change it.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.is_spare = False
        self.tokens = array("q")
        self.extents: tuple[Extent, ...] = ()
        self.frames: list[int] = []
        self.is_written = False  # a transfer into it is under way
        self.n_readers = 0  # transfers out of it that are under way

    @property
    def n_tokens(self) -> int:
        """Tokens whose rows it holds; 0 for an empty copy."""
        return len(self.tokens)

    @property
    def end_byte(self) -> int:
        """Bytes of its memory in use, rows that no longer hold good included."""
        return end_of(self.extents, self.layout)

    def pieces(self, first_token: int, end_token: int) -> Iterator[Piece]:
        """Where the rows of these tokens lie, plane by plane, in the order of the tokens."""
        ends = [*(extent.first_token for extent in self.extents[1:]), self.n_tokens]
        plane_start = 0  # of a one-token extent
        for plane_index, plane in enumerate(self.layout.planes):
            for extent, end in zip(self.extents, ends, strict=False):  # an empty copy has none
                first, stop = max(first_token, extent.first_token), min(end_token, end)
                if first < stop:
                    skipped_bytes = (first - extent.first_token) * plane.token_bytes
                    start = extent.first_byte + extent.n_tokens * plane_start + skipped_bytes
                    yield Piece(plane_index, first, stop - first, start)
            plane_start += plane.token_bytes


def end_of(extents: Sequence[Extent], layout: Layout) -> int:
    """The first byte behind some extents."""
    return max((e.first_byte + e.n_tokens * layout.token_bytes for e in extents), default=0)


def token_ids(tokens: Sequence[int]) -> array[int]:
    """Token ids as they are kept and compared.

    Raises:
        UsageError: There are none, or one is no integer of 64 bits.
    """
    try:
        ids = array("q", tokens)
    except (TypeError, OverflowError) as error:
        raise UsageError(f"token ids must be integers of 64 bits: {error}") from error
    if not ids:
        raise UsageError("a sequence of no tokens has nothing to keep")
    return ids


def n_common(one: array[int], other: array[int]) -> int:
    """How many tokens two sequences have in common from the beginning on."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:  # equal before low; not equal before high
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def have_same_rows(one: Layout, other: Layout) -> bool:
    """Whether a row of each plane of one layout is a row of the same plane of the other."""
    return one is other or (one.layers == other.layers and _places(one) == _places(other))


def _places(layout: Layout) -> list[tuple[object, ...]]:
    """What stands where in a row: per tensor, its plane's row and its place in it, whatever slots and pages there are.

    A layer group of one is the per-layer layout under another name.
    """
    places: list[tuple[object, ...]] = []
    for strides in (*layout.keys, *layout.values):
        index = max(i for i, plane in enumerate(layout.planes) if plane.base_bytes <= strides.offset_bytes)
        plane = layout.planes[index]
        has_own_plane = strides.head_bytes != strides.spec.head_bytes
        places.append((index, strides.offset_bytes - plane.base_bytes, plane.token_bytes, has_own_plane))
    return places
