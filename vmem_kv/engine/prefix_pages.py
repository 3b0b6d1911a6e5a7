"""Which pages lie under cached slots only, where slots share pages: what giving some of them up would free.

Read from the region's own tables at the moment of the question, so that there are no second books that could be wrong.
Planes whose tokens take equally many bytes have the same number of pages at the same places, shared by the same slots:
one of each kind is looked at.

Guarantees: bookkeeping only; no driver call.
Assumptions: slots grow at their ends and share by `KVCache.fork` alone.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Handle
from vmem_kv.growth import SlotId
from vmem_kv.prefix.entry import PageCounts


class _Kind(NamedTuple):
    """Planes that are alike."""

    plane_index: int  # of one of them
    n_planes: int
    token_bytes: int


class CachedPages(PageCounts[SlotId]):
    """Pages under the slots that are only cached.

    Attributes:
        slot_ids: Those slots. They are active, and nobody who runs has them. The owner of this object keeps it.
    """

    def __init__(self, cache: KVCache) -> None:
        self.slot_ids: set[SlotId] = set()
        self._table = cache.region.table
        self._lock = cache.pool.lock
        planes = cache.layout.planes
        n_alike = Counter(plane.token_bytes for plane in planes)
        first = {plane.token_bytes: index for index, plane in reversed(list(enumerate(planes)))}
        self._kinds = [_Kind(first[token_bytes], n, token_bytes) for token_bytes, n in n_alike.items()]
        self._page_bytes = cache.layout.page_bytes

    def held(self) -> int:
        """Distinct pages that lie under cached slots and nowhere else: what giving up all of them frees."""
        with self._lock:
            if not self._table.shares:
                return sum(self._n_mapped(slot_id) for slot_id in self.slot_ids)
            return sum(
                kind.n_planes * sum(n >= self._table.shares.n_tables(handle) for handle, n in self._uses(kind).items())
                for kind in self._kinds
            )

    def freed_by(self, key: SlotId) -> int:
        """Pages that lie under this slot and no other."""
        with self._lock:
            if not self._table.shares:
                return self._n_mapped(key)
            return sum(
                kind.n_planes * sum(self._table.shares.n_tables(handle) == 1 for handle in self._handles(key, kind))
                for kind in self._kinds
            )

    def n_live(self, slot_id: SlotId, n_tokens: int) -> int:
        """Of the pages that a fork at `n_tokens` would share, those that do not lie under cached slots alone."""
        with self._lock:
            n_live = 0
            for kind in self._kinds:
                n_full = n_tokens * kind.token_bytes // self._page_bytes
                if slot_id not in self.slot_ids:
                    n_live += kind.n_planes * n_full
                elif self._table.shares:
                    uses = self._uses(kind)
                    shared = self._handles(slot_id, kind)[:n_full]
                    n_live += kind.n_planes * sum(uses[h] < self._table.shares.n_tables(h) for h in shared)
            return n_live

    def _n_mapped(self, slot_id: SlotId) -> int:
        ranges = self._table.mapped[slot_id]
        return sum(
            kind.n_planes * (ranges[kind.plane_index].end - ranges[kind.plane_index].first) for kind in self._kinds
        )

    def _uses(self, kind: _Kind) -> Counter[Handle]:
        """Under how many cached slots each page lies, in one plane of a kind."""
        return Counter(handle for slot_id in self.slot_ids for handle in self._handles(slot_id, kind))

    def _handles(self, slot_id: SlotId, kind: _Kind) -> list[Handle]:
        return self._table.handles[slot_id][kind.plane_index]
