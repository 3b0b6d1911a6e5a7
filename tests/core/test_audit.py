"""What a look at the books says of each slot."""

from __future__ import annotations

from vmem_kv.stats import SlotStats
from vmem_kv.testing import ManualFence

from .bench import OpenBench


def test_every_slot_says_its_state_its_pages_and_its_sequences_tokens(open_bench: OpenBench) -> None:
    bench = open_bench()
    layout, cache = bench.layout, bench.cache
    active, retired, warm = cache.acquire_adjacent(3)
    cache.ensure({active: 40, retired: 30, warm: 20})
    fence = ManualFence()
    cache.retire(retired, fence)
    cache.retire(warm)
    assert cache.slot_stats() == [
        SlotStats("active", layout.n_pages(40), 40),
        SlotStats("retired", layout.n_pages(30), 0),
        SlotStats("warm", layout.n_pages(20), 0),
        SlotStats("cold", 0, 0),
    ]
    fence.pass_()
    bench.retire_all()
    bench.close()
