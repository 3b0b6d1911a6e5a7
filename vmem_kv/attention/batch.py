"""Which tokens one step attends from and to: any mix of prefill, chunked prefill and decode, without padding.

Sequence s brings `query_starts[s + 1] - query_starts[s]` new tokens. Its K and V are rows
`[slot_starts[s], slot_starts[s] + lengths[s])`, the new tokens the last of them. Of m new tokens in a sequence of
length n, token i sees keys `0 .. n - m + i`: causality is aligned at the bottom right.

Guarantees: every number is checked on the host before a kernel sees it, and goes to the device once a step, not once a
layer. Sequences that bring no token are left out, for they have no output: kernels see at least one token of each.

To build one never waits for the device: its numbers travel from pinned memory, in order with the kernels behind them.

A slot's first token need not lie at the slot's base. Layers whose slots span different numbers of tokens need a batch
each.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch

from vmem_kv.attention.upload import upload
from vmem_kv.errors import UsageError

_INT32_MAX = 2**31 - 1


class SequenceRows(NamedTuple):
    """One sequence of a batch, on the host."""

    query_start: int  # its first row in the packed queries
    n_queries: int  # at least 1
    slot_start: int  # its first row in K and V
    length: int  # tokens in K and V, those of this step included; at least n_queries


class BatchPart(NamedTuple):
    """Some sequences of a batch, as a batch of their own."""

    batch: RaggedBatch  # its queries are packed anew
    first_row: int | None  # of the whole batch's queries, where the part's follow each other there
    rows: torch.Tensor | None  # `[n_tokens]`, which of the whole batch's queries these are, where they do not
    pinned: torch.Tensor | None  # what `rows` was copied from


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """One step's sequences, on the host and on the device. Make it with `RaggedBatch.build`.

    All tensors are int32, contiguous, on one device.
    """

    sequences: tuple[SequenceRows, ...]  # those that bring tokens
    n_tokens: int  # in the packed queries
    n_rows: int  # of K and V
    span_tokens: int  # rows of one slot
    max_query_tokens: int  # of one sequence; 0 for an empty batch
    max_length: int  # tokens of the longest sequence; 0 for an empty batch
    max_slot_end: int  # the largest of slot_ends; 0 for an empty batch
    query_starts: torch.Tensor  # [n_seqs + 1], cumulative
    slot_starts: torch.Tensor  # [n_seqs + 1], rows; operators want the shape of sums, and never use the last entry: 0
    lengths: torch.Tensor  # [n_seqs]
    slot_indices: torch.Tensor  # [n_seqs], which slot
    slot_offsets: torch.Tensor  # [n_seqs], rows between the slot's base and the first token
    slot_ends: torch.Tensor  # [n_seqs], rows between the slot's base and the end of the last token
    pinned: torch.Tensor | None = None  # what the tensors were copied from: the copy may still be under way

    @property
    def n_seqs(self) -> int:
        """Return how many sequences bring tokens."""
        return len(self.sequences)

    @property
    def device(self) -> torch.device:
        """Return where the tensors are."""
        return self.query_starts.device

    @cached_property
    def starts_at_base(self) -> bool:
        """Return whether every sequence's first token lies at its slot's base."""
        return all(s.slot_start % self.span_tokens == 0 for s in self.sequences)

    @cached_property
    def parts(self) -> tuple[BatchPart, ...]:
        """Return the sequences that bring several tokens, and those that bring one, each as a batch of its own.

        Empty where there is only one of the two. Made at the first use, for kernels that want it.
        """
        if self.n_tokens == self.n_seqs or all(s.n_queries > 1 for s in self.sequences):
            return ()
        prefill = tuple(s for s in self.sequences if s.n_queries > 1)
        decode = tuple(s for s in self.sequences if s.n_queries == 1)
        return self._part(prefill), self._part(decode)

    def _part(self, sequences: tuple[SequenceRows, ...]) -> BatchPart:
        rows = [row for s in sequences for row in range(s.query_start, s.query_start + s.n_queries)]
        first, n_tokens = 0, len(rows)
        moved = []
        for s in sequences:
            moved.append(s._replace(query_start=first))
            first += s.n_queries
        batch = RaggedBatch._of(tuple(moved), n_tokens, self.span_tokens, self.n_rows, self.device)
        if rows[-1] - rows[0] + 1 == n_tokens:
            return BatchPart(batch, rows[0], None, None)
        return BatchPart(batch, None, *upload(torch.tensor(rows), self.device))

    @classmethod
    def build(
        cls,
        query_starts: Sequence[int],
        slot_starts: Sequence[int],
        lengths: Sequence[int],
        *,
        span_tokens: int,
        n_rows: int,
        device: torch.device | str,
    ) -> RaggedBatch:
        """Check one step's numbers and bring them to the device.

        Args:
            query_starts: n_seqs + 1 rows in the packed queries, from 0 on, not falling; the last is their number.
            slot_starts: For each sequence the row of its first token in K and V.
            lengths: For each sequence its tokens in K and V, those of this step included.
            span_tokens: Rows of one slot.
            n_rows: Rows of K and V.
            device: Where the queries are.

        Raises:
            UsageError: The numbers contradict each other, and the message names the sequence; or they are no integers.
        """
        query_starts, slot_starts, lengths = (
            _integers(name, numbers)
            for name, numbers in (("query starts", query_starts), ("slot starts", slot_starts), ("lengths", lengths))
        )
        span_tokens, n_rows = _integers("span_tokens and n_rows", (span_tokens, n_rows))
        _check_shape(query_starts, slot_starts, lengths, span_tokens, n_rows)
        sequences = tuple(
            SequenceRows(start, end - start, slot_start, length)
            for (start, end), slot_start, length in zip(pairwise(query_starts), slot_starts, lengths, strict=True)
        )
        for index, sequence in enumerate(sequences):
            _check_sequence(index, sequence, span_tokens, n_rows)
        return cls._of(tuple(s for s in sequences if s.n_queries), query_starts[-1], span_tokens, n_rows, device)

    @classmethod
    def _of(
        cls,
        sequences: tuple[SequenceRows, ...],
        n_tokens: int,
        span_tokens: int,
        n_rows: int,
        device: torch.device | str,
    ) -> RaggedBatch:
        n_seqs = len(sequences)
        offsets = [s.slot_start % span_tokens for s in sequences]
        ends = [offset + s.length for offset, s in zip(offsets, sequences, strict=True)]
        numbers = torch.tensor(
            [
                [*(s.query_start for s in sequences), n_tokens],
                [*(s.slot_start for s in sequences), 0],
                [*(s.length for s in sequences), 0],
                [*(s.slot_start // span_tokens for s in sequences), 0],
                [*offsets, 0],
                [*ends, 0],
            ],
            dtype=torch.int32,
        )
        table, pinned = upload(numbers, device)
        return cls(
            sequences=sequences,
            n_tokens=n_tokens,
            n_rows=n_rows,
            span_tokens=span_tokens,
            max_query_tokens=max((s.n_queries for s in sequences), default=0),
            max_length=max((s.length for s in sequences), default=0),
            max_slot_end=max(ends, default=0),
            query_starts=table[0],
            slot_starts=table[1],
            lengths=table[2, :n_seqs],
            slot_indices=table[3, :n_seqs],
            slot_offsets=table[4, :n_seqs],
            slot_ends=table[5, :n_seqs],
            pinned=pinned,
        )


def _integers(name: str, numbers: Sequence[int]) -> list[int]:
    """Return whatever counts as an integer as such. A float does not, for it may have been rounded."""
    try:
        return [int(operator.index(number)) for number in numbers]
    except TypeError as error:
        raise UsageError(f"{name} must be integers: {error}") from None


def _check_shape(
    query_starts: Sequence[int], slot_starts: Sequence[int], lengths: Sequence[int], span_tokens: int, n_rows: int
) -> None:
    n_seqs = len(slot_starts)
    if len(lengths) != n_seqs or len(query_starts) != n_seqs + 1:
        raise UsageError(
            f"{n_seqs} slot starts need {n_seqs} lengths and {n_seqs + 1} query starts;"
            f" got {len(lengths)} and {len(query_starts)}"
        )
    if query_starts[0] != 0:
        raise UsageError(f"query starts begin at {query_starts[0]}; they must begin at 0")
    if not 0 < n_rows <= _INT32_MAX or query_starts[-1] > _INT32_MAX:
        raise UsageError(
            f"{n_rows} rows of K and V and {query_starts[-1]} of queries; kernels count up to {_INT32_MAX}"
        )
    if span_tokens < 1 or n_rows % span_tokens:
        raise UsageError(f"{n_rows} rows are not a whole number of slots of {span_tokens} tokens")


def _check_sequence(index: int, sequence: SequenceRows, span_tokens: int, n_rows: int) -> None:
    _, n_queries, slot_start, length = sequence
    if n_queries < 0:
        raise UsageError(f"query starts fall by {-n_queries} after sequence {index}")
    if length < n_queries:
        raise UsageError(f"sequence {index} has {n_queries} new tokens but only {length} in all")
    if not 0 <= slot_start < n_rows:
        raise UsageError(f"sequence {index} starts at row {slot_start}, outside of the {n_rows} rows of K and V")
    if slot_start % span_tokens + length > span_tokens:
        raise UsageError(
            f"sequence {index}, {length} tokens from row {slot_start} on, leaves its slot of {span_tokens} tokens"
        )
