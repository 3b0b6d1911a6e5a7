"""Which cached sequence begins as a prompt does: an index over token ids, and what to evict from it.

Guarantees: answers questions only. Nothing here touches memory, imports torch, or knows the cache and its driver.
Read `tree`, `entry`, `index`, then `policy` and `value`.
"""

from vmem_kv.prefix.entry import Entry, History, Match, PageCounts, PrefixStats, TokenIds, Use
from vmem_kv.prefix.index import PrefixIndex
from vmem_kv.prefix.policy import EvictionPolicy, Segmented, cost_aware, lru
from vmem_kv.prefix.value import RecomputeCost, ReuseEstimate

__all__ = [
    "Entry",
    "EvictionPolicy",
    "History",
    "Match",
    "PageCounts",
    "PrefixIndex",
    "PrefixStats",
    "RecomputeCost",
    "ReuseEstimate",
    "Segmented",
    "TokenIds",
    "Use",
    "cost_aware",
    "lru",
]
