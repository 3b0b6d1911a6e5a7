"""One snapshot of a cache and its pool. States are disjoint: every owned page is counted in exactly one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple


class SlotStats(NamedTuple):
    """One slot. Its virtual span is the same for all: `layout.max_tokens` tokens."""

    state: str  # a value of `SlotState`
    n_mapped_pages: int
    n_tokens: int  # live; 0 for a slot that belongs to no sequence


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Pages by state, and the three kinds of bytes that must not be confused.

        n_owned_pages == n_free + n_in_flight + n_live + n_warm + n_pending + n_elsewhere + n_quarantined

    `virtual_bytes` are addresses and cost nothing; `mapped_bytes` is memory under this cache; `live_bytes` is what
    the tokens in it need.
    """

    page_bytes: int
    max_pages: int  # the pool's budget
    n_free_pages: int  # in the pool, mapped nowhere
    n_in_flight_pages: int  # being mapped or given back just now
    n_live_pages: int  # under slots that belong to sequences
    n_warm_pages: int  # under slots that belong to nobody, ready to be adopted
    n_pending_pages: int  # under retired slots, waiting for a fence
    n_saved_pages: int  # what sharing saves: places under this cache's slots beyond the first of a page
    n_elsewhere_pages: int  # mapped by other caches on the same pool
    n_quarantined_pages: int  # lost: an unmap or release failed
    n_peak_owned_pages: int  # the most that the pool ever owned
    n_mappings: int  # of the pool, in the driver's own measure
    max_mappings: int
    virtual_bytes: int
    live_bytes: int
    driver_calls: Mapping[str, int] = field(default_factory=dict)  # since the driver was opened

    @classmethod
    def empty(cls) -> CacheStats:
        """The snapshot of a cache that has not opened its pool yet."""
        zeros: dict[str, Any] = dict.fromkeys((f.name for f in fields(cls) if f.name != "driver_calls"), 0)
        return cls(**zeros)

    @property
    def n_owned_pages(self) -> int:
        """All pages that the pool owns."""
        return (
            self.n_free_pages
            + self.n_in_flight_pages
            + self.n_live_pages
            + self.n_warm_pages
            + self.n_pending_pages
            + self.n_elsewhere_pages
            + self.n_quarantined_pages
        )

    @property
    def mapped_bytes(self) -> int:
        """Physical memory mapped under this cache now."""
        return (self.n_live_pages + self.n_warm_pages + self.n_pending_pages) * self.page_bytes

    @property
    def owned_bytes(self) -> int:
        """Physical memory that the pool holds now."""
        return self.n_owned_pages * self.page_bytes

    @property
    def peak_bytes(self) -> int:
        """The most physical memory that the pool ever held."""
        return self.n_peak_owned_pages * self.page_bytes
