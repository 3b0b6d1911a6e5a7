"""What a snapshot says in sum."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from vmem_kv.stats import CacheStats

STATES = {
    "n_free_pages": 1,
    "n_in_flight_pages": 2,
    "n_live_pages": 4,
    "n_warm_pages": 8,
    "n_pending_pages": 16,
    "n_elsewhere_pages": 32,
    "n_quarantined_pages": 64,
}
"""Every number of them is a different sum."""

STATS = replace(
    CacheStats.empty(),
    page_bytes=4096,
    n_saved_pages=1000,
    n_peak_owned_pages=500,
    **STATES,  # type: ignore[arg-type]
)


def test_every_owned_page_is_in_one_state() -> None:
    assert STATS.n_owned_pages == sum(STATES.values())
    assert STATS.owned_bytes == sum(STATES.values()) * 4096
    assert STATS.peak_bytes == 500 * 4096


def test_mapped_are_the_pages_under_slots_of_this_cache_whoever_has_the_slot() -> None:
    assert STATS.mapped_bytes == sum(STATES[f"n_{what}_pages"] for what in ("live", "warm", "pending")) * 4096


def test_a_snapshot_stays_as_it_was_taken() -> None:
    with pytest.raises(FrozenInstanceError):
        STATS.n_free_pages = 0  # type: ignore[misc]
    assert not hasattr(STATS, "__dict__")
