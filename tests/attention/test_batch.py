"""One step's sequences: what is refused, and what reaches the device."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from vmem_kv.attention import sdpa
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.errors import UsageError

from .harness import MIXES, Seq, build_batch, spec

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [9, 5.0]}, "lengths must be integers: 'float' object"),
        ({"query_starts": [0, 1, np.float64(6)]}, "query starts must be integers: 'numpy.float64'"),
        ({"slot_starts": ["20", 3]}, "slot starts must be integers: 'str'"),
        ({"span_tokens": 10.0}, "span_tokens and n_rows must be integers"),
    ],
)
def test_what_is_no_integer_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RaggedBatch.build(**(GOOD | change))


def test_whatever_counts_as_an_integer_is_taken_as_one() -> None:
    batch = RaggedBatch.build(
        **(GOOD | {"query_starts": np.array([0, 1, 6]), "lengths": torch.tensor([9, 5]), "n_rows": np.int32(30)})
    )
    assert {type(number) for sequence in batch.sequences for number in sequence} == {int}
    assert batch.lengths.tolist() == [9, 5]


def test_the_parts_of_a_mixed_batch() -> None:
    batch = build_batch([Seq(1, 33, 0), Seq(5, 9, 1, 2), Seq(3, 30, 4), Seq(0, 5, 6), Seq(1, 7, 2)])
    prefill, decode = batch.parts
    assert (prefill.first_row, prefill.rows) == (1, None)
    assert prefill.batch.query_starts.tolist() == [0, 5, 8]
    assert prefill.batch.lengths.tolist() == [9, 30]
    assert prefill.batch.slot_offsets.tolist() == [2, 0]
    assert decode.first_row is None
    assert decode.rows is not None
    assert decode.rows.tolist() == [0, 9]
    assert decode.batch.query_starts.tolist() == [0, 1, 2]
    assert decode.batch.slot_indices.tolist() == [0, 2]
    assert (decode.batch.max_query_tokens, decode.batch.max_length, decode.batch.max_slot_end) == (1, 33, 33)
    assert batch.parts is batch.parts, "made once a batch, not once a layer"


def test_whether_all_start_at_the_base_is_found_out_once() -> None:
    batch = build_batch([Seq(1, 5, 0), Seq(1, 7, 1)])
    assert batch.starts_at_base
    assert vars(batch)["starts_at_base"] is True, "kept for the layers behind the first"


@pytest.mark.parametrize("sequences", [[], [Seq(1, 5, 0), Seq(1, 7, 1)], [Seq(2, 5, 0), Seq(7, 7, 1)]])
def test_a_batch_of_one_kind_has_no_parts(sequences: list[Seq]) -> None:
    assert build_batch(sequences).parts == ()


class Copies:
    """Stands in for torch's copies to a CUDA device: says which went from pinned memory without waiting."""

    def __init__(self) -> None:
        self.pinned: list[torch.Tensor] = []
        self.modes: list[tuple[bool, bool]] = []  # (from pinned memory, without waiting)

    def pin_memory(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def to(self, tensor: torch.Tensor, device: torch.device | str, non_blocking: bool = False) -> torch.Tensor:
        assert torch.device(device).type == "cuda"
        self.modes.append((any(tensor is pinned for pinned in self.pinned), non_blocking))
        return tensor


def test_numbers_travel_to_cuda_without_waiting_for_it() -> None:
    copies = Copies()
    batch = build_batch(MIXES["decode on both sides of a prefill"])
    bucket = [run for run in sdpa._runs([s for s in batch.sequences if s.n_queries == 1]) if run.n_seqs == 1]
    with (
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: copies.pin_memory(tensor)),
        mock.patch.object(torch.Tensor, "to", lambda tensor, *where, **how: copies.to(tensor, *where, **how)),
    ):
        on_cuda = RaggedBatch.build(**(GOOD | {"device": "cuda:0"}))
        gathered = sdpa._gather(bucket, torch.device("cuda:0"))
    assert copies.modes == [(True, True)] * 4
    # Whoever holds the batch or the plan holds what is still being copied.
    assert all(a is b for a, b in zip([on_cuda.pinned, *gathered.pinned], copies.pinned, strict=True))


def test_on_the_cpu_nothing_is_pinned() -> None:
    with mock.patch.object(torch.Tensor, "pin_memory", side_effect=AssertionError):
        batch = build_batch(MIXES["decode on both sides of a prefill"])
        assert batch.pinned is None
        assert all(part.pinned is None and part.batch.pinned is None for part in batch.parts)
        _, gathered = sdpa._Sdpa(spec())._plan(build_batch(MIXES["decode of long and short, any order"]))
        assert {pinned for call in gathered for pinned in call.pinned} == {None}


def test_the_largest_numbers_that_kernels_count_to_are_taken() -> None:
    span = 2**31 - 2**20
    batch = RaggedBatch.build([0, 1], [0], [span], span_tokens=span, n_rows=span, device="cpu")
    assert batch.lengths.tolist() == [span]
