"""Pages change hands between sequences: forks, beams that go on from other beams, ends cut off within shared pages.

    claim the slots ─▶ plan (`sharing.py`) ─▶ wait for whoever reads ─▶ rewirer.begin ─▶ Exchange: commit or undo

Guarantees
  * After an exception sequences are as before. Where undoing fails as well, their slots are broken, and their lengths
    say how many tokens are left.
  * A page lies under two slots only if it is full of tokens that both have behind them: what is left of the tokens is
    copied, or lies in pages of one's own.
  * Slots stay claimed until the exchange has ended: other threads wait.

Assumptions: the cache is open, and whoever forks has polled before (`pending.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from vmem_kv.claims import Claims
from vmem_kv.driver.base import Copy, Driver
from vmem_kv.errors import UsageError
from vmem_kv.growth import SlotId
from vmem_kv.pages import PagePool
from vmem_kv.pending import Pending
from vmem_kv.region import Region
from vmem_kv.rewiring import Rewired
from vmem_kv.room import Room
from vmem_kv.sharing import Rewiring, plan_fork, plan_share, plan_truncate, tail_copies, tails_of
from vmem_kv.slots import SlotTable


class Exchange:
    """Sequences that were changed and can still be put back: `commit` or `undo` ends it, exactly one of them.

    Until then nobody may use these sequences, on the device neither; other threads wait for their slots.
    """

    def __init__(self, claim: ExitStack, keep: Callable[[], None], put_back: Callable[[], None]) -> None:
        self._claim = claim
        self._keep = keep
        self._put_back = put_back

    def commit(self) -> None:
        """Let go of what was replaced. A page that cannot be released is counted as lost."""
        with self._claim:
            self._keep()

    def undo(self) -> None:
        """Make the sequences what they were.

        Raises:
            DriverError: That failed: the slots are broken, and what is left in them may be wrong; retire them.
        """
        with self._claim:
            self._put_back()


class Exchanger:
    """Begins the exchanges of one cache. What its calls do for users says `KVCache`."""

    def __init__(
        self, pool: PagePool, region: Region, slots: SlotTable, claims: Claims, pending: Pending, room: Room
    ) -> None:
        self._pool = pool
        self._region = region
        self._table = region.table
        self._slots = slots
        self._claims = claims
        self._pending = pending
        self._room = room

    def fork(self, sources: Sequence[SlotId], n_tokens: int | None) -> Sequence[SlotId]:
        """Begin sequences in neighbouring slots with the first tokens of others. See `KVCache.fork`."""
        table, slots = self._table, self._slots
        layout, base = table.layout, table.base
        with self._claims.exclusive(sources):
            with self._pool.lock:
                lengths = self._forked_lengths(sources, n_tokens)
                targets = slots.choose(len(sources), 0)
                slots.busy.update(targets)
            try:
                for target in targets:
                    if target in slots.warm:
                        self._pending.unmap_warm(target)
                changes: list[Rewiring] = []
                copies: list[Copy] = []
                for source, target, length in zip(sources, targets, lengths, strict=True):
                    changes += plan_fork(layout, table.rows(source), target, length)
                    copies += tail_copies(layout, base, source, target, length)

                def commit() -> None:
                    for source, target, length in zip(sources, targets, lengths, strict=True):
                        slots.activate(target, table.token_capacity(target), slots.domain[source])
                        slots.n_tokens[target] = length
                        if source in slots.first_token:
                            slots.first_token[target] = slots.first_token[source]

                self._region.rewirer.keep(self._rewire(changes, lambda: self._pool.driver.copy(copies), commit))
            finally:
                with self._pool.lock:
                    slots.break_(self._region.broken.intersection(targets))
                self._claims.end(targets)
        return targets

    def begin_truncate(self, slot_ids: Sequence[SlotId], n_tokens: int, wait: Callable[[], None]) -> Exchange:
        """Cut sequences off behind `n_tokens`, also where they share pages. See `KVCache.truncate`.

        Args:
            slot_ids: The sequences.
            n_tokens: What is left of each of them.
            wait: Waits for all that may still read what is replaced; called only if something is.
        """
        table, slots = self._table, self._slots
        with ExitStack() as stack:
            stack.enter_context(self._claims.exclusive(slot_ids))
            with self._pool.lock:
                slots.require_active(slot_ids)
                self._region.require_whole(slot_ids)
                for slot_id in slot_ids:
                    if not slots.first_token.get(slot_id, 0) <= n_tokens <= slots.n_tokens[slot_id]:
                        raise UsageError(
                            f"truncate to {n_tokens} tokens of a sequence that has {slots.n_tokens[slot_id]} (from "
                            f"{slots.first_token.get(slot_id, 0)} on)"
                        )
                before = {slot_id: slots.n_tokens[slot_id] for slot_id in slot_ids}
                changes = [
                    change
                    for slot_id in before
                    for change in plan_truncate(table.layout, table.shared_ends(slot_id), slot_id, n_tokens)
                ]

                def commit() -> None:
                    for slot_id in before:
                        slots.n_tokens[slot_id] = n_tokens
                        slots.capacity[slot_id] = table.token_capacity(slot_id)

                if not changes:
                    commit()
                    return self._exchange(stack.pop_all(), None, before)
            wait()
            driver = self._pool.driver
            kept = self._read_tails(changes, n_tokens)
            rewired = self._rewire(changes, lambda: _write(driver, kept), commit)
            return self._exchange(stack.pop_all(), rewired, before)

    def begin_share(self, sources: Mapping[SlotId, SlotId], n_tokens: int, wait: Callable[[], None]) -> Exchange:
        """Let slots have the full pages of other slots. See `KVCache.share`, and `begin_truncate` for `wait`."""
        table, slots = self._table, self._slots
        with ExitStack() as stack:
            stack.enter_context(self._claims.exclusive([*sources, *sources.values()]))
            with self._pool.lock:
                self._forked_lengths([*sources, *sources.values()], n_tokens)
                for target, source in sources.items():
                    if slots.domain[target] != slots.domain[source]:
                        raise UsageError(f"slots {target} and {source} are of different domains; nothing is shared")
                    if slots.n_tokens[target] != n_tokens:
                        raise UsageError(
                            f"slot {target} has {slots.n_tokens[target]} tokens, not {n_tokens}; truncate it first"
                        )
                rows = table.rows
                changes = [
                    change
                    for target, source in sources.items()
                    for change in plan_share(table.layout, rows(source), target, rows(target), n_tokens)
                ]
            rewired = None
            if changes:
                wait()
                rewired = self._rewire(changes, lambda: None, lambda: None)
            return self._exchange(stack.pop_all(), rewired, dict.fromkeys(sources, n_tokens))

    def _forked_lengths(self, sources: Sequence[SlotId], n_tokens: int | None) -> list[int]:
        """What forks of these slots will hold. Raises UsageError if they cannot. The caller holds the lock."""
        slots = self._slots
        slots.require_active(sources)
        self._region.require_whole(sources)
        lengths = [slots.n_tokens[source] if n_tokens is None else n_tokens for source in sources]
        for source, length in zip(sources, lengths, strict=True):
            if not slots.first_token.get(source, 0) <= length <= slots.n_tokens[source]:
                raise UsageError(
                    f"{length} tokens of slot {source}, which has [{slots.first_token.get(source, 0)}, "
                    f"{slots.n_tokens[source]})"
                )
        return lengths

    def _read_tails(self, changes: Sequence[Rewiring], n_tokens: int) -> list[tuple[int, bytearray]]:
        """What new pages shall begin with, which lies in the pages that they replace: addresses and bytes."""
        layout, base = self._table.layout, self._table.base
        slot_ids = {change.slot_id for change in changes}
        tails = {slot_id: tails_of(layout, base, slot_id, n_tokens) for slot_id in slot_ids}
        replaced = [tails[change.slot_id][change.plane_index] for change in changes if change.handles]
        kept = [(address, bytearray(n_bytes)) for address, n_bytes in replaced]
        for address, kept_bytes in kept:
            self._pool.driver.copy_to_host(address, memoryview(kept_bytes)).wait()
        return kept

    def _rewire(self, changes: Sequence[Rewiring], fill: Callable[[], object], commit: Callable[[], object]) -> Rewired:
        """Exchange pages, reclaiming where some are missing. A sequence that could not be undone says what is left."""
        slot_ids = {change.slot_id for change in changes}
        n_new = sum(handle is None for change in changes for handle in change.handles)
        try:
            return self._room.having(lambda: self._region.rewirer.begin(changes, fill, commit), slot_ids, n_new)
        finally:
            self._cut_broken(slot_ids)

    def _exchange(self, claim: ExitStack, rewired: Rewired | None, lengths: Mapping[SlotId, int]) -> Exchange:
        """What is done up to here, with the lengths as they were."""
        return Exchange(claim, partial(self._keep, rewired), partial(self._put_back, rewired, lengths))

    def _keep(self, rewired: Rewired | None) -> None:
        if rewired is not None:
            self._region.rewirer.keep(rewired)

    def _put_back(self, rewired: Rewired | None, lengths: Mapping[SlotId, int]) -> None:
        try:
            if rewired is not None:
                self._region.rewirer.take_back(rewired)
        finally:
            with self._pool.lock:
                for slot_id, n_tokens in lengths.items():
                    self._slots.n_tokens[slot_id] = n_tokens
                    self._slots.capacity[slot_id] = self._table.token_capacity(slot_id)
            self._cut_broken(lengths)

    def _cut_broken(self, slot_ids: Iterable[SlotId]) -> None:
        """Record what broken slots have lost."""
        slots = self._slots
        with self._pool.lock:
            for slot_id in self._region.broken & slots.capacity.keys() & set(slot_ids):
                slots.capacity[slot_id] = self._table.token_capacity(slot_id)
                slots.n_tokens[slot_id] = min(slots.n_tokens[slot_id], slots.capacity[slot_id])


def _write(driver: Driver, rows: Sequence[tuple[int, bytearray]]) -> None:
    for address, row in rows:
        driver.copy_from_host(memoryview(row), address).wait()
