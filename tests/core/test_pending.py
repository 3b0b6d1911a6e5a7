"""What waits for a fence: what moves on when it has passed, and what is left alone."""

from __future__ import annotations

import pytest

from vmem_kv.errors import OutOfMappings
from vmem_kv.growth import SlotId
from vmem_kv.testing import Point, fail_any, fail_kind, no_faults

from .bench import OpenBench


def refused(point: Point) -> BaseException:
    return OutOfMappings(f"injected at point {point.n}")


def test_beside_what_failed_for_good_only_what_was_refused_is_tried_again(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(40)
    bench.cache.retire(slot_id)
    fails = fail_any(fail_kind("unmap", 1, refused), fail_kind("unmap", 2))
    with bench.faulty.failing(fails), pytest.raises(OutOfMappings):
        bench.cache.reclaim(1)
    refused_pages, lost_pages = (len(stuck.range[1]) for stuck in bench.cache.region.unmapper.stuck)
    assert bench.pool.n_quarantined == refused_pages + lost_pages
    n_calls = bench.driver.calls["unmap"]
    assert bench.cache.reclaim(0) == refused_pages
    assert bench.driver.calls["unmap"] == n_calls + 1
    assert bench.pool.n_quarantined == lost_pages
    assert bench.cache.region.broken == {slot_id}
    bench.check()
    bench.close()


def test_a_slot_that_is_being_reclaimed_is_nobody_elses(open_bench: OpenBench) -> None:
    bench = open_bench()
    slot_id = bench.grown(48)
    bench.cache.retire(slot_id)
    others: list[SlotId] = []

    def acquires(point: Point) -> None:
        if point.operation == "unmap" and not others:
            assert bench.cache.is_busy()
            assert bench.cache.n_warm_pages() == 0
            others.append(bench.cache.acquire())

    bench.faulty.plan = acquires
    assert bench.cache.reclaim(1) == bench.layout.n_pages(48)
    bench.faulty.plan = no_faults
    assert others
    assert slot_id not in others
    bench.check()
    bench.retire_all()
    bench.close()
