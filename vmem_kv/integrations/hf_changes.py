"""Changes of a batch that happen in all layers or in none: each layer begins its own, then all commit or all undo.

Guarantees: what can fail comes first; a change that was begun is undone where a later one cannot begin.
Assumptions: exactly one of a change's two ends is called, once, and nobody uses the layer in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch

from vmem_kv.errors import VmemError

RowsOf = Callable[[int], torch.Tensor]
"""Told how many rows there are; returns, for every row that there shall be, which one it copies."""


def _nothing() -> None:
    """What is to be done where nothing changes."""


class Change(NamedTuple):
    """A change of one layer of which the part that can fail is done. Exactly one of the two ends it."""

    commit: Callable[[], None] = _nothing
    undo: Callable[[], None] = _nothing


def all_or_none(beginnings: Iterable[Callable[[], Change]]) -> None:
    """Change all layers or, where one cannot, none of them."""
    changes: list[Change] = []
    try:
        for begin in beginnings:
            changes.append(begin())  # noqa: PERF401 - what was begun must be known on failure
    except BaseException:
        for change in reversed(changes):
            with suppress(VmemError):  # rows that cannot be put back refuse to grow; the first error is the one to tell
                change.undo()
        raise
    with ExitStack() as stack:  # every one of them, whatever another says
        for change in changes:
            stack.callback(change.commit)


def repeated(repeats: int) -> RowsOf:
    """Every row so many times, one behind the other."""
    return lambda n_rows: torch.arange(n_rows).repeat_interleave(repeats)


def selected(indices: Any) -> RowsOf:
    """The rows that stock layers would select: by tensors, lists, tuples, masks, negative numbers."""
    where = indices.to("cpu") if isinstance(indices, torch.Tensor) else indices
    return lambda n_rows: torch.arange(n_rows)[where, ...]
