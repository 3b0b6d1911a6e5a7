"""Random operations against the reference model, the same under hypothesis, and mistakes that both must find.

`VMEM_KV_RANDOM_OPS=10000000 pytest tests/core/test_random_ops.py` does more of them; `VMEM_KV_RANDOM_SEED=7` others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Handle
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import VmemError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.region import Region
from vmem_kv.slots import SlotTable

from .backends import BACKENDS, open_backend
from .bench import PAGE
from .random_ops import MAX_TOKENS, Run, random_run

N_OPS = int(os.environ.get("VMEM_KV_RANDOM_OPS", "120000"))
FIRST_SEED = int(os.environ.get("VMEM_KV_RANDOM_SEED", "1"))
N_SEEDS = 6


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + N_SEEDS))
def test_random_operations_agree_with_the_model(seed: int, record_property: Callable[[str, object], None]) -> None:
    backend = BACKENDS[seed % len(BACKENDS)]
    n_ops, n_faults = random_run(seed, -(-N_OPS // N_SEEDS), backend)
    record_property(
        "figures", f"random operations, {backend}, seed {seed}: {n_ops:,} operations, {n_faults:,} faults injected"
    )


def test_a_failure_prints_a_program_that_repeats_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Region, "scrub", lambda region, slot_id: None)
    with pytest.raises(AssertionError, match="To repeat it") as caught:
        random_run(1, 20_000)
    program = str(caught.value).partition("To repeat it:\n\n")[2]
    assert program.startswith("from tests.core.random_ops import Run")
    with pytest.raises(AssertionError, match="old bytes"):
        exec(program, {})
    monkeypatch.undo()
    exec(program + "\nrun.finish()\nrun.device.close()\n", {})


def shows_stale_pages(patch: pytest.MonkeyPatch) -> None:
    take = PagePool.take
    patch.setattr(PagePool, "take", lambda pool, places: (take(pool, places)[0], 0))


def shows_stale_warm_slots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Region, "scrub", lambda region, slot_id: None)


def maps_one_page_twice(patch: pytest.MonkeyPatch) -> None:
    original = HostDriver.map

    def alias(driver: HostDriver, page_bytes: int, addresses: Sequence[int], handles: Sequence[Handle]) -> None:
        first = min(driver._pages)
        original(driver, page_bytes, addresses, [first if h % (PAGE * 7) == 0 else h for h in handles])

    patch.setattr(HostDriver, "map", alias)


def leaks_a_page_now_and_then(patch: pytest.MonkeyPatch) -> None:
    original = PagePool.give
    patch.setattr(PagePool, "give", lambda pool, handles: original(pool, handles[: len(handles) - (len(handles) == 5)]))


def miscounts_mappings(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Region, "_count_mappings", lambda region, handles: len(handles) // 3)


def unmaps_a_page_too_many(patch: pytest.MonkeyPatch) -> None:
    original = Region.unmap

    def eager(region: Region, slot_id: SlotId, keep_from: Sequence[int] | None = None) -> int:
        return original(region, slot_id, keep_from if keep_from is None else [n + 1 for n in keep_from])

    patch.setattr(Region, "unmap", eager)


def maps_a_page_too_few(patch: pytest.MonkeyPatch) -> None:
    original = KVCache.ensure

    def stingy(cache: KVCache, lengths: dict[SlotId, int]) -> None:
        original(cache, {slot_id: min(n, 40) for slot_id, n in lengths.items()})

    patch.setattr(KVCache, "ensure", stingy)


def adopts_the_first_warm_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotTable, "_off", lambda table, index, wanted_tokens: -(SlotId(index) in table.warm))
    patch.setattr(SlotTable, "_reused", lambda table, index, wanted_tokens: 0)


def reclaims_the_newest_first(patch: pytest.MonkeyPatch) -> None:
    original = SlotTable.settle

    def settle(table: SlotTable, slot_id: SlotId, capacity: int) -> None:
        original(table, slot_id, capacity)
        table.warm = dict(sorted(table.warm.items(), key=lambda item: item[0] != slot_id))

    patch.setattr(SlotTable, "settle", settle)


def ignores_fences(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.testing.ManualFence.passed", lambda fence: True)


def exceeds_the_budget(patch: pytest.MonkeyPatch) -> None:
    original = PagePool.take

    def generous(pool: PagePool, places: Sequence[int]) -> tuple[list[Handle], int]:
        budget, pool.max_pages = pool.max_pages, 1000
        try:
            return original(pool, places)
        finally:
            pool.max_pages = budget

    patch.setattr(PagePool, "take", generous)


@pytest.mark.parametrize(
    "mistake",
    [
        shows_stale_pages,
        shows_stale_warm_slots,
        maps_one_page_twice,
        leaks_a_page_now_and_then,
        miscounts_mappings,
        unmaps_a_page_too_many,
        maps_a_page_too_few,
        adopts_the_first_warm_slot,
        reclaims_the_newest_first,
        ignores_fences,
        exceeds_the_budget,
    ],
)
def test_random_operations_find_a_planted_mistake(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    with pytest.raises((AssertionError, VmemError)):
        random_run(1, 20_000)


class CacheMachine(RuleBasedStateMachine):
    """The same operations, chosen and shrunk by hypothesis."""

    device = open_backend("native")

    def __init__(self) -> None:
        super().__init__()
        self.run = Run(n_slots=3, max_pages=24, keep_freed=True, device=self.device)

    faults = st.none() | st.tuples(st.booleans(), st.integers(1, 6))

    @rule(expected=st.integers(0, MAX_TOKENS), domain=st.sampled_from("ab"), fault=faults)
    def acquire(self, expected: int, domain: str, fault: tuple[bool, int] | None) -> None:
        self.run.acquire(expected, domain, fault)

    @precondition(lambda self: self.run.live())
    @rule(data=st.data(), fault=faults)
    def ensure(self, data: st.DataObject, fault: tuple[bool, int] | None) -> None:
        slots = data.draw(st.lists(st.sampled_from(self.run.live()), min_size=1, unique=True))
        slots_of = self.run.model.slots
        self.run.ensure({s: data.draw(st.integers(slots_of[s].first_token, MAX_TOKENS)) for s in slots}, fault)

    @precondition(lambda self: self.run.live())
    @rule(data=st.data(), fault=faults)
    def slide(self, data: st.DataObject, fault: tuple[bool, int] | None) -> None:
        slot = data.draw(st.sampled_from(self.run.live()))
        state = self.run.model.slots[slot]
        if state.first_token < state.n_tokens:
            fence = data.draw(st.sampled_from([None, self.run.n_ops]))
            self.run.slide(slot, data.draw(st.integers(state.first_token + 1, state.n_tokens)), fence, fault)

    @precondition(lambda self: self.run.live())
    @rule(data=st.data(), fault=faults)
    def retire(self, data: st.DataObject, fault: tuple[bool, int] | None) -> None:
        slot = data.draw(st.sampled_from(self.run.live()))
        self.run.retire(slot, data.draw(st.sampled_from([None, self.run.n_ops])), fault)

    @precondition(lambda self: self.run.fences)
    @rule(data=st.data(), fault=faults)
    def pass_fence(self, data: st.DataObject, fault: tuple[bool, int] | None) -> None:
        self.run.pass_fence(data.draw(st.sampled_from(sorted(self.run.fences))), fault)

    @rule(n_pages=st.integers(1, 20), fault=faults)
    def reclaim(self, n_pages: int, fault: tuple[bool, int] | None) -> None:
        self.run.reclaim(n_pages, fault)

    @rule(n_pages=st.integers(1, 20), fault=faults)
    def trim(self, n_pages: int, fault: tuple[bool, int] | None) -> None:
        self.run.trim(n_pages, fault)

    @rule(max_pages=st.integers(8, 40), fault=faults)
    def resize(self, max_pages: int, fault: tuple[bool, int] | None) -> None:
        self.run.resize(max_pages, fault)

    def teardown(self) -> None:
        self.run.finish()


CacheMachine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
test_hypothesis_finds_no_sequence_of_operations_that_breaks_the_model = CacheMachine.TestCase
