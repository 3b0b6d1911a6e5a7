"""What an engine says of itself: one snapshot, for metrics and people."""

from __future__ import annotations

from dataclasses import dataclass

from vmem_kv.engine.tier_stats import TierFigures
from vmem_kv.growth import SlotId
from vmem_kv.prefix.entry import PrefixStats
from vmem_kv.stats import CacheStats, SlotStats


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One snapshot, for metrics and people. Counts are since the engine was opened.

    Attributes:
        n_running: Sequences that have a slot.
        n_waiting: Sequences that have none.
        n_steps: Steps done.
        n_prompt_tokens: Tokens of prompts computed, repetitions after a preemption included.
        n_generated_tokens: Tokens sampled.
        n_requests: Requests taken on.
        n_finished: Answers that ended, by reason.
        n_preempted: Times that a sequence lost its slot.
        n_recomputed_tokens: Tokens that were computed again for that reason.
        max_model_len: The most tokens of a sequence.
        token_bytes: Bytes that a token takes over all layers.
        page_bytes: Bytes of a page.
        slots: Every slot, in the order of their addresses.
        cached_slots: Of the active ones, those of nobody who runs, kept for what they hold; by their number.
        prefixes: What is cached and was found; None where nothing is cached.
        tiers: What is in host memory, on disk and kept by name; None without host memory.
        cache: Pages by state.
        is_mapper_alive: Whether memory is mapped ahead in the background; None where nobody asked for that.
        last_step_s: When the last step ended, on `time.monotonic`'s clock.
    """

    n_running: int
    n_waiting: int
    n_steps: int
    n_prompt_tokens: int
    n_generated_tokens: int
    n_requests: int
    n_finished: dict[str, int]
    n_preempted: int
    n_recomputed_tokens: int
    max_model_len: int
    token_bytes: int
    page_bytes: int
    slots: list[SlotStats]
    cached_slots: frozenset[SlotId]
    prefixes: PrefixStats | None
    tiers: TierFigures | None
    cache: CacheStats
    is_mapper_alive: bool | None
    last_step_s: float

    @property
    def n_pages_by_state(self) -> dict[str, int]:
        """Pages by state, those that only cached prefixes keep beside the live ones."""
        states = ("live", "warm", "free", "pending", "in_flight", "elsewhere", "quarantined")
        n_pages = {state: int(getattr(self.cache, f"n_{state}_pages")) for state in states}
        # The two were counted one after the other.
        n_cached = 0 if self.prefixes is None else min(self.prefixes.n_held_pages, n_pages["live"])
        return {"live": n_pages.pop("live") - n_cached, "cached": n_cached, **n_pages}

    @property
    def live_bytes(self) -> int:
        """What the tokens of running sequences need: no cached ones, and where pages are shared, what these hold."""
        n_cached_tokens = sum(self.slots[slot_id].n_tokens for slot_id in self.cached_slots)
        n_bytes = max(0, self.cache.live_bytes - n_cached_tokens * self.token_bytes)
        return min(n_bytes, self.n_pages_by_state["live"] * self.page_bytes)

    @property
    def hit_share(self) -> float | None:
        """The part of the tokens of sequences that started which were cached; None where none were looked up."""
        prefixes = self.prefixes
        if prefixes is None or not prefixes.n_looked_up_tokens:
            return None
        return prefixes.n_hit_tokens / prefixes.n_looked_up_tokens
