"""Room: how much is reclaimed where somebody runs out."""

from __future__ import annotations

from vmem_kv.cache import KVCache
from vmem_kv.layout import LayerSpec, Layout, TensorSpec

from .bench import PAGE, OpenBench


def test_where_the_machine_is_short_and_not_the_budget_one_warm_slot_goes_at_a_time(open_bench: OpenBench) -> None:
    bench = open_bench(n_slots=1)
    layer = LayerSpec(TensorSpec(1, PAGE // 4, 2), TensorSpec(1, PAGE // 4, 2))  # a page per token
    cache = KVCache(bench.pool, Layout.build("token_major", (layer,), n_slots=4, max_tokens=4, page_bytes=PAGE))
    slots = cache.acquire_adjacent(4)
    cache.ensure(dict.fromkeys(slots, 1))
    cache.retire(slots[1:])
    bench.pool._limit_bytes = bench.driver.ledger.n_bytes  # of the memory all is spent, of the budget little
    cache.ensure({slots[0]: 2})
    assert cache.stats().n_warm_pages == 2
    cache.retire(slots[0])
    cache.close()
    bench.close()
