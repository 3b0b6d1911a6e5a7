"""What the table says of a slot, where no cache asks."""

from __future__ import annotations

import pytest

from vmem_kv.errors import InvariantError

from .bench import PAGE, OpenBench


def test_planes_without_pages_have_no_addresses(open_bench: OpenBench) -> None:
    bench = open_bench()
    table = bench.cache.region.table
    cold, slot_id = bench.cache.acquire_adjacent(2)
    bench.cache.ensure({slot_id: 48})
    assert table.spans(cold) == []
    planes = range(len(bench.layout.planes))
    expected = [(bench.address(slot_id, i, 0), PAGE * len(table.handles[slot_id][i])) for i in planes]
    assert table.spans(slot_id) == expected
    bench.check()
    bench.retire_all()
    bench.close()


def test_check_says_how_many_pages_of_a_window_have_no_handle(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(48)
    bench.cache.slide(slot_id, 40)
    table = bench.cache.region.table
    first, end = table.mapped[slot_id][0]
    assert 0 < first < end
    kept, table.handles[slot_id][0] = table.handles[slot_id][0], []
    with pytest.raises(InvariantError, match=rf"slot {slot_id}: {end - first} pages, handles \[\]"):
        table.check()
    table.handles[slot_id][0] = kept
    bench.check()
    bench.retire_all()
    bench.close()
