"""Slot states: who owns which share of the region, and which share is worth adopting.

    cold ──acquire──▶ active ──retire──▶ retired ──fence──▶ warm ──acquire──▶ active
      ▲                                                       │
      └───────────────────────reclaim─────────────────────────┘            broken: not used again

Guarantees: bookkeeping only; no driver call, no waiting. A method that raises changed nothing.
Assumptions: the caller holds the pool's lock for every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum

from vmem_kv.driver.base import Fence
from vmem_kv.errors import OutOfSlots, UsageError
from vmem_kv.growth import SlotId


class SlotState(Enum):
    """Where a slot is in its life."""

    COLD = "cold"  # nothing mapped, nobody's
    ACTIVE = "active"  # owned by a sequence
    RETIRED = "retired"  # the owner is done; kernels may still read
    WARM = "warm"  # nobody's, pages still mapped
    BROKEN = "broken"  # an unmap failed under it


class SlotTable:
    """States, lengths and capacities of `n_slots` slots."""

    def __init__(self, n_slots: int) -> None:
        self.state = [SlotState.COLD] * n_slots
        self.n_tokens: dict[SlotId, int] = {}
        """Tokens written, per active slot."""
        self.capacity: dict[SlotId, int] = {}
        """Tokens that the mapped pages can hold, per active slot; the hot path compares against it alone."""
        self.first_token: dict[SlotId, int] = {}
        """Per slot that slid: tokens before this one are gone."""
        self.warm: dict[SlotId, int] = {}
        """Capacity of each warm slot from its start (0 if its front is unmapped); longest retired first."""
        self.retired: dict[SlotId, Fence] = {}
        self.busy: set[SlotId] = set()
        """Slots under a driver call: nobody else may map, unmap or adopt them."""
        self.domain: dict[SlotId, str] = {}
        """Whose bytes lie in a mapped slot."""

    def choose(self, n_slots: int, wanted_tokens: int) -> Sequence[SlotId]:
        """Return the best run of `n_slots` neighbouring slots that nobody owns.

        Best is best fit: the run whose capacities are off the wanted one by the fewest tokens, added up. What a slot
        lacks must be mapped, and what it has beyond lies idle until the end: a token costs the same either way. A cold
        slot lacks everything, so that a warm one of more than twice the size is left to somebody who needs it. Of
        equals, the run that reuses more, then the one nearer to the front. A warm slot whose front is unmapped is the
        last resort.

        Args:
            n_slots: How many.
            wanted_tokens: The capacity that each of them will need, in whole pages: then a slot that had a sequence of
                that many pages fits exactly.

        Raises:
            OutOfSlots: There is no such run.
        """
        best: tuple[int, int, int] | None = None
        n_in_a_row = n_off = n_reused = 0
        for index, state in enumerate(self.state):
            if state not in (SlotState.COLD, SlotState.WARM) or index in self.busy:
                n_in_a_row = n_off = n_reused = 0
                continue
            n_in_a_row += 1
            n_off += self._off(index, wanted_tokens)
            n_reused += self._reused(index, wanted_tokens)
            if n_in_a_row > n_slots:
                n_off -= self._off(index - n_slots, wanted_tokens)
                n_reused -= self._reused(index - n_slots, wanted_tokens)
            if n_in_a_row >= n_slots:
                found = (n_off, -n_reused, index - n_slots + 1)
                best = found if best is None else min(best, found)
        if best is None:
            raise OutOfSlots(
                f"no {n_slots} neighbouring slots are free of {len(self.state)}; retire sequences, or open the cache "
                "with more slots"
            )
        return [SlotId(index) for index in range(best[2], best[2] + n_slots)]

    def activate(self, slot_id: SlotId, capacity: int, domain: str) -> None:
        """Hand a slot to a sequence of no tokens yet."""
        self.warm.pop(slot_id, None)
        self.state[slot_id] = SlotState.ACTIVE
        self.n_tokens[slot_id] = 0
        self.capacity[slot_id] = capacity
        self.domain[slot_id] = domain

    def retire(self, slot_ids: Sequence[SlotId], fence: Fence) -> None:
        """Take slots from their sequences; they are warm once the fence has passed.

        Raises:
            UsageError: One of them is not active, or named twice (a double retire).
        """
        self.require_active(slot_ids)
        if len(set(slot_ids)) != len(slot_ids):
            raise UsageError(f"retire of {list(slot_ids)} names a slot twice; retire it once")
        for slot_id in slot_ids:
            del self.n_tokens[slot_id], self.capacity[slot_id]
            self.state[slot_id] = SlotState.RETIRED
            self.retired[slot_id] = fence

    def settle(self, slot_id: SlotId, capacity: int) -> None:
        """Make a retired slot warm (capacity 0 if its front is unmapped), or cold if nothing is mapped (-1)."""
        del self.retired[slot_id]
        self.first_token.pop(slot_id, None)
        if capacity < 0:
            self.cool(slot_id)
        else:
            self.state[slot_id] = SlotState.WARM
            self.warm[slot_id] = capacity

    def cool(self, slot_id: SlotId) -> None:
        """Record that nothing is mapped under an unowned slot any more."""
        self.warm.pop(slot_id, None)
        self.domain.pop(slot_id, None)
        self.state[slot_id] = SlotState.COLD

    def break_(self, slot_ids: Iterable[SlotId]) -> None:
        """Take slots out of use until they are mended, once they have no owner and nothing is mapped under them."""
        for slot_id in slot_ids:
            if self.state[slot_id] is SlotState.COLD:
                self.state[slot_id] = SlotState.BROKEN

    def mend(self, slot_ids: Iterable[SlotId]) -> None:
        """Take slots back into use whose unmap succeeded after all."""
        for slot_id in slot_ids:
            if self.state[slot_id] is SlotState.BROKEN:
                self.state[slot_id] = SlotState.COLD

    def require_active(self, slot_ids: Iterable[SlotId]) -> None:
        """Raise UsageError unless every slot belongs to a sequence."""
        for slot_id in slot_ids:
            if slot_id not in self.capacity:
                in_range = isinstance(slot_id, int) and 0 <= slot_id < len(self.state)
                what = f"is {self.state[slot_id].value}" if in_range else "does not exist"
                raise UsageError(f"slot {slot_id} {what}; acquire a slot before using it, and retire it once")

    def _off(self, index: int, wanted_tokens: int) -> int:
        """Tokens between what is mapped and what is wanted; more than any sum of them if the front is gone."""
        capacity = self.warm.get(SlotId(index), 0)
        if capacity == 0 and self.state[index] is SlotState.WARM:
            return 1 << 62
        return abs(capacity - wanted_tokens)

    def _reused(self, index: int, wanted_tokens: int) -> int:
        return min(self.warm.get(SlotId(index), 0), wanted_tokens)
