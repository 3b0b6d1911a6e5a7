"""Pure planning: which pages must be mapped so that some slots can hold some lengths.

Guarantees: reads its arguments only, changes nothing, and lists runs in the order (slot, plane), each of them one
contiguous virtual range that ends where the slot's plane will end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, NewType

from vmem_kv.errors import OutOfAddressSpace
from vmem_kv.layout import Layout

SlotId = NewType("SlotId", int)
"""Index of a slot in its region."""


class PageRange(NamedTuple):
    """Pages `[first, end)` of one slot's share of one plane."""

    first: int
    end: int


class Run(NamedTuple):
    """Pages to map in one contiguous range: the next ones of one slot in one plane."""

    slot_id: SlotId
    plane_index: int
    address: int
    n_pages: int


@dataclass(frozen=True, slots=True)
class GrowthPlan:
    """What `plan_growth` found. `page_bytes` times `n_pages` is the memory it takes."""

    runs: tuple[Run, ...]
    places: list[int]  # the address of every page, in the order of the runs
    n_pages: int
    page_bytes: int


def plan_growth(
    layout: Layout, base: int, mapped: Mapping[SlotId, list[PageRange]], lengths: Mapping[SlotId, int]
) -> GrowthPlan:
    """Plan pages behind the mapped ones so that slot `s` can hold `lengths[s]` tokens, for every `s`.

    Args:
        layout: The region's geometry.
        base: The region's first address.
        mapped: For each slot, the mapped pages of every plane.
        lengths: Tokens wanted per slot; a slot that has enough adds nothing.

    Raises:
        OutOfAddressSpace: A length exceeds the slot's share of virtual memory.
    """
    runs: list[Run] = []
    places: list[int] = []
    page_bytes = layout.page_bytes
    for slot_id, n_tokens in lengths.items():
        if n_tokens > layout.max_tokens:
            raise OutOfAddressSpace(
                f"{n_tokens} tokens do not fit in a slot of {layout.max_tokens}; "
                "open the cache with a larger max_tokens"
            )
        for plane_index, (plane, (_, first)) in enumerate(zip(layout.planes, mapped[slot_id], strict=True)):
            end = -(-n_tokens * plane.token_bytes // page_bytes)
            if end > first:
                start = base + plane.base_bytes + slot_id * plane.span_bytes
                address = start + first * page_bytes
                runs.append(Run(slot_id, plane_index, address, end - first))
                places += range(address, start + end * page_bytes, page_bytes)
    return GrowthPlan(tuple(runs), places, len(places), page_bytes)
