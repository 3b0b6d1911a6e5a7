"""Pure planning of what sequences share: which pages are mapped once more, which are new, which bytes are copied.

A page may lie under several slots if it is *full*: every byte of it belongs to a token that all of them have behind
them. What is left behind the full pages of some tokens, less than a page in each plane, is their *tail*: everybody has
that for himself.

Guarantees: reads its arguments only, changes nothing. Assumptions: the lengths were checked; pages are those of the
moment at which the plan is carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vmem_kv.driver.base import Copy, Handle, Span
from vmem_kv.growth import SlotId
from vmem_kv.layout import Layout
from vmem_kv.units import ceil_div


class Row(NamedTuple):
    """The pages under one slot in one plane, in order."""

    first: int  # index of the first one; the pages before it were given up
    handles: Sequence[Handle]


class Rewiring(NamedTuple):
    """What shall lie under one slot in one plane from some page on, instead of what lies there now."""

    slot_id: SlotId
    plane_index: int
    first: int
    handles: Sequence[Handle | None]
    """Pages that the region maps already, in the same plane at the same index; None for a new page."""


def plan_fork(layout: Layout, source: Sequence[Row], target: SlotId, n_tokens: int) -> list[Rewiring]:
    """Plan that an empty slot has the first tokens of another: its full pages, and new ones for the tail."""
    changes = []
    for plane_index, (plane, (first, handles)) in enumerate(zip(layout.planes, source, strict=True)):
        n_bytes = n_tokens * plane.token_bytes
        n_full = max(n_bytes // layout.page_bytes - first, 0)
        n_pages = max(ceil_div(n_bytes, layout.page_bytes) - first, 0)
        shared: list[Handle | None] = [*handles[:n_full], *[None] * (n_pages - n_full)]
        changes.append(Rewiring(target, plane_index, first, shared))
    return changes


def plan_share(
    layout: Layout, source: Sequence[Row], target_id: SlotId, target: Sequence[Row], n_tokens: int
) -> list[Rewiring]:
    """Plan that a slot has the full pages of another, from the first one on that differs. Its tail stays as it is."""
    changes = []
    rows = zip(layout.planes, source, target, strict=True)
    for plane_index, (plane, (first, theirs), (own_first, own)) in enumerate(rows):
        end = n_tokens * plane.token_bytes // layout.page_bytes
        differing = (i for i in range(max(first, own_first), end) if theirs[i - first] != own[i - own_first])
        start = next(differing, None)
        if start is not None:
            handles = [*theirs[start - first : end - first], *own[end - own_first :]]
            changes.append(Rewiring(target_id, plane_index, start, handles))
    return changes


def plan_truncate(layout: Layout, shared_ends: Sequence[int], slot_id: SlotId, n_tokens: int) -> list[Rewiring]:
    """Plan that a slot shares nothing behind its new end: where it does, a new page for the tail, and no others.

    Args:
        layout: The region's geometry.
        shared_ends: Per plane, the page behind the last one that the slot shares.
        slot_id: The slot.
        n_tokens: Its new length.
    """
    changes = []
    for plane_index, (plane, shared_end) in enumerate(zip(layout.planes, shared_ends, strict=True)):
        n_full, n_tail_bytes = divmod(n_tokens * plane.token_bytes, layout.page_bytes)
        if shared_end > n_full:
            changes.append(Rewiring(slot_id, plane_index, n_full, [None] if n_tail_bytes else []))
    return changes


def tails_of(layout: Layout, base: int, slot_id: SlotId, n_tokens: int) -> list[Span]:
    """The bytes of a slot's first tokens behind their full pages, per plane; some are empty."""
    tails = []
    for plane, start in zip(layout.planes, layout.starts(base, slot_id), strict=True):
        n_bytes = n_tokens * plane.token_bytes
        n_tail_bytes = n_bytes % layout.page_bytes
        tails.append((start + n_bytes - n_tail_bytes, n_tail_bytes))
    return tails


def tail_copies(layout: Layout, base: int, source: SlotId, target: SlotId, n_tokens: int) -> list[Copy]:
    """The copies that give a slot another one's tail."""
    pairs = zip(tails_of(layout, base, source, n_tokens), tails_of(layout, base, target, n_tokens), strict=True)
    return [Copy(address, to, n_bytes) for (address, n_bytes), (to, _) in pairs if n_bytes]


def shared_tokens(layout: Layout, shared_ends: Sequence[int]) -> int:
    """Tokens of a slot of which any byte lies in a page that it shares."""
    ends = zip(layout.planes, shared_ends, strict=True)
    return max(ceil_div(end * layout.page_bytes, plane.token_bytes) for plane, end in ends)
