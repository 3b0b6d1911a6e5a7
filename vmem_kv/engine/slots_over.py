"""A slot source over another one, which does everything but what is overridden.

Assumes: whoever derives from it hands on what he does not handle, so that every source below sees every sequence begin
and leave.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from vmem_kv.engine.request import Sequence
from vmem_kv.engine.slot_source import SlotSource, Start
from vmem_kv.engine.tier_stats import TierFigures
from vmem_kv.growth import SlotId
from vmem_kv.prefix.entry import PrefixStats


class SlotsOver(SlotSource):
    """Hands everything on.

    Args:
        inner: The source below.
    """

    def __init__(self, inner: SlotSource) -> None:
        self._inner = inner

    def begin(self, sequence: Sequence, expected_tokens: int) -> Start | None:
        return self._inner.begin(sequence, expected_tokens)

    def settle(self) -> None:
        self._inner.settle()

    def pause(self, sequence: Sequence) -> None:
        self._inner.pause(sequence)

    def end(self, sequences: SequenceOf[Sequence], *, is_sound: bool = True) -> None:
        self._inner.end(sequences, is_sound=is_sound)

    def keep(self, sequence: Sequence) -> None:
        self._inner.keep(sequence)

    def go_on(self, sequence: Sequence, slot_id: SlotId, n_tokens: int) -> None:
        self._inner.go_on(sequence, slot_id, n_tokens)

    def let_go(self, slot_id: SlotId) -> None:
        self._inner.let_go(slot_id)

    def give_back(self, slot_id: SlotId) -> None:
        self._inner.give_back(slot_id)

    def n_found_tokens(self, sequence: Sequence) -> int:
        return self._inner.n_found_tokens(sequence)

    def is_coming(self, sequence: Sequence) -> bool:
        return self._inner.is_coming(sequence)

    def n_live_pages(self, sequence: Sequence, expected_tokens: int) -> int:
        return self._inner.n_live_pages(sequence, expected_tokens)

    def n_available_pages(self) -> int:
        return self._inner.n_available_pages()

    def make_room(self, n_pages: int) -> bool:
        return self._inner.make_room(n_pages)

    def give_way(self, n_pages: int) -> bool:
        return self._inner.give_way(n_pages)

    def cached_slots(self) -> frozenset[SlotId]:
        return self._inner.cached_slots()

    def stats(self) -> PrefixStats | None:
        return self._inner.stats()

    def tiers(self) -> TierFigures | None:
        return self._inner.tiers()

    def check(self) -> None:
        self._inner.check()

    def close(self) -> None:
        self._inner.close()
