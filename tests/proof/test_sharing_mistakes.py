"""Mistakes in sharing are found by the random operations: by the model, the tags, or the cache's own check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vmem_kv.driver.base import Copy, Span
from vmem_kv.growth import SlotId
from vmem_kv.layout import Layout
from vmem_kv.page_table import PageTable
from vmem_kv.shares import Gone, Shares
from vmem_kv.sharing import Rewiring, Row, tail_copies, tails_of
from vmem_kv.testing.operations import Found, random_run

from .drivers import open_driver

Mistake = Callable[[pytest.MonkeyPatch], None]


def aliases_the_tail(patch: pytest.MonkeyPatch) -> None:
    """A fork has its source's last page as well, instead of a copy: the next token of one is seen by the other."""

    def plan(layout: Layout, source: list[Row], target: SlotId, n_tokens: int) -> list[Rewiring]:
        n_pages = [-(-n_tokens * plane.token_bytes // layout.page_bytes) for plane in layout.planes]
        rows = zip(source, n_pages, strict=True)
        return [Rewiring(target, i, row.first, list(row.handles[: n - row.first])) for i, (row, n) in enumerate(rows)]

    patch.setattr("vmem_kv.exchange.plan_fork", plan)
    patch.setattr("vmem_kv.exchange.tail_copies", lambda *_: [])


def copies_no_tail(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.exchange.tail_copies", lambda *_: [])


def copies_tails_a_byte_short(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.exchange.tail_copies", shorter_by(1))


def copies_long_tails_a_word_short(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.exchange.tail_copies", shorter_by(8, of_at_least=3000))


def shorter_by(n_bytes: int, *, of_at_least: int = 0) -> Callable[..., list[Copy]]:
    def copies(*arguments: Any) -> list[Copy]:
        found = tail_copies(*arguments)
        return [c._replace(n_bytes=c.n_bytes - n_bytes) if c.n_bytes > max(of_at_least, 1) else c for c in found]

    return copies


def truncates_tails_a_byte_short(patch: pytest.MonkeyPatch) -> None:
    """What is left in the page of the new end is kept but for its last byte."""

    def tails(*arguments: Any) -> list[Span]:
        return [(address, max(n_bytes - 1, 0)) for address, n_bytes in tails_of(*arguments)]

    patch.setattr("vmem_kv.exchange.tails_of", tails)


def lets_shared_slots_be_adopted(patch: pytest.MonkeyPatch) -> None:
    """The next owner of the slot writes what somebody else still reads."""
    patch.setattr(PageTable, "is_shared", lambda *_: False)


def truncates_into_shared_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.exchange.plan_truncate", lambda *_: [])


def lets_a_length_shrink_into_shared_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.page_table.shared_tokens", lambda *_: 0)


def gives_pages_that_others_have(patch: pytest.MonkeyPatch) -> None:
    original = Shares.drop

    def drop(self: Shares, handles: list[int]) -> Gone:
        wanted = list(handles)
        original(self, wanted)  # type: ignore[arg-type]
        return Gone(wanted, [])  # type: ignore[arg-type]

    patch.setattr(Shares, "drop", drop)


def forgets_a_holder(patch: pytest.MonkeyPatch) -> None:
    """An alias is not counted: its source takes the page with it."""
    patch.setattr(Shares, "alias", lambda *_: None)


def keeps_a_page_nobody_has(patch: pytest.MonkeyPatch) -> None:
    original = Shares.drop

    def drop(self: Shares, handles: list[int]) -> Gone:
        return Gone(original(self, handles).free[1:], [])  # type: ignore[arg-type]

    patch.setattr(Shares, "drop", drop)


MISTAKES = (
    aliases_the_tail,
    copies_no_tail,
    copies_tails_a_byte_short,
    copies_long_tails_a_word_short,
    truncates_tails_a_byte_short,
    lets_shared_slots_be_adopted,
    truncates_into_shared_pages,
    lets_a_length_shrink_into_shared_pages,
    gives_pages_that_others_have,
    forgets_a_holder,
    keeps_a_page_nobody_has,
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_random_operations_find_a_mistake_in_sharing(mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    with pytest.raises(Found):
        random_run(7, 20_000, open_driver("native"), fault_share=0.0)
