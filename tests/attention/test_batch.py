"""One step's sequences: what is refused, and what reaches the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.errors import UsageError

from .harness import Seq, build_batch

GOOD: dict[str, Any] = {
    "query_starts": [0, 1, 6],
    "slot_starts": [20, 3],
    "lengths": [9, 5],
    "span_tokens": 10,
    "n_rows": 30,
    "device": "cpu",
}


def test_what_kernels_read_of_a_batch() -> None:
    batch = RaggedBatch.build(**GOOD)
    assert batch.query_starts.tolist() == [0, 1, 6]
    assert batch.slot_starts.tolist() == [20, 3, 0]
    assert batch.lengths.tolist() == [9, 5]
    assert batch.slot_indices.tolist() == [2, 0]
    assert batch.slot_offsets.tolist() == [0, 3]
    assert batch.slot_ends.tolist() == [9, 8]
    assert (batch.n_seqs, batch.n_tokens, batch.max_query_tokens, batch.max_length, batch.max_slot_end) == (
        2,
        6,
        5,
        9,
        9,
    )
    assert not batch.starts_at_base
    tensors = (batch.query_starts, batch.slot_starts, batch.lengths, batch.slot_indices, batch.slot_offsets)
    for tensor in (*tensors, batch.slot_ends):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
        assert tensor.device == batch.device == torch.device("cpu")


def test_sequences_without_new_tokens_are_left_out() -> None:
    batch = build_batch([Seq(0, 0, 0), Seq(2, 5, 4), Seq(0, 7, 1), Seq(1, 3, 2)])
    assert batch.n_seqs == 2
    assert batch.query_starts.tolist() == [0, 2, 3]
    assert batch.slot_indices.tolist() == [4, 2]
    assert batch.lengths.tolist() == [5, 3]


@pytest.mark.parametrize("sequences", [[], [Seq(0, 0, 0)], [Seq(0, 9, 1), Seq(0, 3, 0)]])
def test_a_batch_may_be_empty(sequences: list[Seq]) -> None:
    batch = build_batch(sequences)
    assert (batch.n_seqs, batch.n_tokens, batch.max_query_tokens, batch.max_length) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_starts": [0, 6]}, "need 2 lengths and 3 query starts; got 2 and 2"),
        ({"lengths": [9]}, "got 1 and 3"),
        ({"query_starts": [1, 2, 6]}, "begin at 0"),
        ({"query_starts": [0, 7, 6]}, "sequence 0 has 7 new tokens but only 9|fall by 1 after sequence 1"),
        ({"query_starts": [0, 1, 7]}, "sequence 1 has 6 new tokens but only 5"),
        ({"lengths": [0, 5]}, "sequence 0 has 1 new tokens but only 0"),
        ({"slot_starts": [30, 3]}, "row 30, outside of the 30 rows"),
        ({"slot_starts": [-1, 3]}, "row -1, outside"),
        ({"slot_starts": [22, 3]}, "9 tokens from row 22 on, leaves its slot of 10"),
        ({"lengths": [9, 8]}, "8 tokens from row 3 on, leaves its slot of 10"),
        ({"n_rows": 31}, "not a whole number of slots"),
        ({"span_tokens": 0}, "not a whole number of slots"),
        ({"n_rows": 2**31, "span_tokens": 2**20}, "kernels count up to 2147483647"),
        ({"query_starts": [0, 1, 2**31]}, "kernels count up to"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RaggedBatch.build(**(GOOD | change))


def test_the_largest_numbers_that_kernels_count_to_are_taken() -> None:
    span = 2**31 - 2**20
    batch = RaggedBatch.build([0, 1], [0], [span], span_tokens=span, n_rows=span, device="cpu")
    assert batch.lengths.tolist() == [span]
