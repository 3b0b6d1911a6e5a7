"""One consistent look at a cache's books: what they say, and whether they agree with each other.

Guarantees: reads only. Assumptions: the caller holds the pool's lock for every call, so that nothing moves meanwhile.
"""

from __future__ import annotations

from vmem_kv.driver.base import Handle
from vmem_kv.errors import InvariantError
from vmem_kv.growth import SlotId
from vmem_kv.page_table import PageTable
from vmem_kv.pages import PagePool
from vmem_kv.region import Region
from vmem_kv.slots import SlotState, SlotTable
from vmem_kv.stats import CacheStats, SlotStats


def slot_stats(table: PageTable, slots: SlotTable) -> list[SlotStats]:
    """Every slot's state, in the order of their addresses."""
    return [
        SlotStats(state.value, table.n_pages(slot_id), slots.n_tokens.get(slot_id, 0))
        for slot_id, state in ((SlotId(index), state) for index, state in enumerate(slots.state))
    ]


def cache_stats(pool: PagePool, table: PageTable, slots: SlotTable) -> CacheStats:
    """One snapshot of a cache and its pool."""
    by_state = dict.fromkeys(SlotState, 0)
    for index, state in enumerate(slots.state):
        by_state[state] += table.n_pages(SlotId(index))
    n_shared = sum(by_state.values())
    if table.shares:
        by_state = _distinct_by_state(table, slots)
    n_shared -= sum(by_state.values())
    n_live_tokens = sum(n - slots.first_token.get(s, 0) for s, n in slots.n_tokens.items())
    return CacheStats(
        page_bytes=pool.page_bytes,
        max_pages=pool.max_pages,
        n_free_pages=pool.n_free,
        n_in_flight_pages=pool.n_in_flight,
        n_live_pages=by_state[SlotState.ACTIVE],
        n_warm_pages=by_state[SlotState.WARM],
        n_pending_pages=by_state[SlotState.RETIRED],
        n_saved_pages=n_shared,
        n_elsewhere_pages=pool.n_mapped - sum(by_state.values()),
        n_quarantined_pages=pool.n_quarantined,
        n_peak_owned_pages=pool.n_peak_owned,
        n_mappings=pool.n_mappings,
        max_mappings=pool.driver.info.max_mappings,
        virtual_bytes=table.layout.virtual_bytes,
        live_bytes=n_live_tokens * table.layout.token_bytes,
        driver_calls=dict(pool.driver.calls),
    )


def check_books(pool: PagePool, region: Region, slots: SlotTable) -> None:
    """Verify every invariant that can be read off the books.

    Raises:
        InvariantError: One does not hold; the message says which and dumps the state.
    """
    table = region.table
    pool.check()
    table.check()
    if slots.n_tokens.keys() != slots.capacity.keys():
        raise InvariantError(f"lengths of {set(slots.n_tokens)}, capacities of {set(slots.capacity)}")
    for index, state in enumerate(slots.state):
        slot_id = SlotId(index)
        n_pages = table.n_pages(slot_id)
        idle = state in (SlotState.COLD, SlotState.BROKEN)
        if idle and n_pages and slot_id not in slots.busy:
            raise InvariantError(f"slot {slot_id} is {state.value} with {n_pages} pages mapped")
        homes = [slot_id in slots.capacity, slot_id in slots.retired, slot_id in slots.warm]
        expected = [state is s for s in (SlotState.ACTIVE, SlotState.RETIRED, SlotState.WARM)]
        if homes != expected:
            raise InvariantError(f"slot {slot_id} is {state.value}, but stands in {homes}")
        if state is SlotState.ACTIVE and slot_id not in slots.busy:
            capacity = table.token_capacity(slot_id)
            if slots.capacity[slot_id] != capacity or slots.n_tokens[slot_id] > capacity:
                raise InvariantError(
                    f"slot {slot_id}: {slots.n_tokens[slot_id]} tokens, capacity {slots.capacity[slot_id]} "
                    f"in the books, {capacity} mapped"
                )
        if table.shares and slot_id not in slots.busy | region.broken:
            _check_shared(table, slots, slot_id)


def _distinct_by_state(table: PageTable, slots: SlotTable) -> dict[SlotState, int]:
    """Pages by their slots' state; a shared one in the state that keeps it longest."""
    counts: dict[SlotState, int] = {}
    seen: set[Handle] = set()
    for state in (SlotState.ACTIVE, SlotState.RETIRED, SlotState.WARM, SlotState.COLD, SlotState.BROKEN):
        slot_ids = (SlotId(index) for index, found in enumerate(slots.state) if found is state)
        pages = table.distinct_pages(slot_ids) - seen
        counts[state] = len(pages)
        seen |= pages
    return counts


def _check_shared(table: PageTable, slots: SlotTable, slot_id: SlotId) -> None:
    """Verify that nobody will write what is shared."""
    state = slots.state[slot_id]
    if state is SlotState.ACTIVE and table.n_shared_tokens(slot_id) > slots.n_tokens[slot_id]:
        n_tokens = slots.n_tokens[slot_id]
        raise InvariantError(f"slot {slot_id} of {n_tokens} tokens shares {table.n_shared_tokens(slot_id)}")
    if state is SlotState.WARM and table.is_shared(slot_id):
        raise InvariantError(f"slot {slot_id} is to be adopted, and shares pages")
