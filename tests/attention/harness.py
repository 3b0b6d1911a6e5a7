"""Batches over K and V that are NaN wherever nothing lives, and a reference that is written token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from vmem_kv.attention.base import AttentionSpec
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.tensors import SlotKV

SPAN = 640
N_SLOTS = 8
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Seq(NamedTuple):
    """One sequence of a test batch."""

    n_queries: int
    length: int
    slot: int
    offset: int = 0  # rows between the slot's base and the first token


MIXES = {
    "decode of long and short, any order": [Seq(1, 300, 5), Seq(1, 7, 2), Seq(1, 600, 0), Seq(1, 5, 7), Seq(1, 90, 3)],
    "decode of equal lengths": [Seq(1, 33, slot) for slot in range(8)],
    "decode of equal lengths, unevenly spaced": [Seq(1, 33, slot) for slot in (0, 1, 2, 4, 6, 7, 5, 3)],
    "decode off the base": [Seq(1, 40, 1, 3), Seq(1, 40, 2, 599), Seq(1, 600, 0, 40), Seq(1, 1, 6, 639)],
    "decode on both sides of a prefill": [Seq(1, 33, 0), Seq(5, 9, 1), Seq(1, 33, 2), Seq(2, 2, 7)],
    "length one": [Seq(1, 1, 3)],
    "prefill": [Seq(17, 17, 4), Seq(1, 1, 0), Seq(600, 600, 2), Seq(64, 64, 1)],
    "chunked prefill": [Seq(16, 48, 4), Seq(300, 640, 6), Seq(2, 640, 7)],
    "mixed": [Seq(1, 200, 6), Seq(40, 40, 1), Seq(1, 3, 0), Seq(100, 333, 3), Seq(5, 6, 2)],
    "mixed off the base, some idle": [
        *(Seq(0, 50, 5), Seq(1, 77, 6, 11), Seq(33, 100, 3, 540), Seq(0, 0, 1), Seq(1, 500, 2, 9), Seq(0, 9, 4)),
    ],
}


@dataclass
class Case:
    """What a kernel is called with."""

    query: torch.Tensor
    kv: SlotKV
    batch: RaggedBatch
    sequences: list[Seq]
    sinks: torch.Tensor | None = None
    arguments: tuple[torch.Tensor, SlotKV, RaggedBatch, torch.Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        self.arguments = (self.query, self.kv, self.batch, self.sinks)


def spec(
    n_q_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **options: object,
) -> AttentionSpec:
    """A spec with an unusual scale, so that forgetting it shows."""
    value_dim = head_dim if value_dim is None else value_dim
    return AttentionSpec(n_q_heads, n_kv_heads, head_dim, value_dim, dtype, scale=0.11, **options)  # type: ignore[arg-type]


def build_batch(sequences: list[Seq], *, span: int = SPAN, n_slots: int = N_SLOTS) -> RaggedBatch:
    """Make the batch of `sequences`."""
    query_starts = [0]
    for sequence in sequences:
        query_starts.append(query_starts[-1] + sequence.n_queries)
    return RaggedBatch.build(
        query_starts,
        [s.slot * span + s.offset for s in sequences],
        [s.length for s in sequences],
        span_tokens=span,
        n_rows=n_slots * span,
        device="cpu",
    )


def make_case(spec: AttentionSpec, sequences: list[Seq], *, layout: str = "per_layer", slack_tokens: int = 0) -> Case:
    """Fill live rows with random numbers, `slack_tokens` rows behind them with large ones, and all else with NaN.

    Slack ends with the slot.
    """
    generator = torch.Generator().manual_seed(sum(s.length * (i + 7) for i, s in enumerate(sequences)))
    batch = build_batch(sequences)
    n_rows = N_SLOTS * SPAN

    def rows(dim: int) -> torch.Tensor:
        n_heads = spec.n_kv_heads
        row, head = {
            "per_layer": (n_heads * dim, dim),
            "per_head": (dim, n_rows * dim),
            "token_major": (3 * n_heads * dim + 32, dim),  # other layers' tokens lie between
        }[layout]
        buffer = torch.full((n_rows * row + n_heads * head + 64,), float("nan"), dtype=spec.dtype)
        tensor = buffer.as_strided((n_rows, n_heads, dim), (row, head, 1), 64)
        for s in sequences:
            first = s.slot * SPAN + s.offset
            tensor[first + s.length : min(first + s.length + slack_tokens, (s.slot + 1) * SPAN)] = 1000.0
        for s in sequences:
            first = s.slot * SPAN + s.offset
            live = torch.randn(s.length, n_heads, dim, generator=generator, dtype=torch.float64)
            tensor[first : first + s.length] = live.to(spec.dtype)
        return tensor

    query = torch.randn(batch.n_tokens, spec.n_q_heads, spec.head_dim, generator=generator, dtype=torch.float64)
    sinks = torch.randn(spec.n_q_heads, generator=generator) if spec.has_sinks else None
    kv = SlotKV(rows(spec.head_dim), rows(spec.value_dim), SPAN)
    return Case((query * 3).to(spec.dtype), kv, batch, sequences, sinks)


def reference(spec: AttentionSpec, case: Case) -> torch.Tensor:
    """Attend in float64, one token and one head after the other as the definition says."""
    outputs = []
    query = case.query.double()
    row = 0
    for s in case.sequences:
        first = s.slot * SPAN + s.offset
        keys = case.kv.keys[first : first + s.length].double()
        values = case.kv.values[first : first + s.length].double()
        for i in range(s.n_queries):
            end = s.length - s.n_queries + i + 1 if spec.is_causal else s.length
            begin = 0 if spec.window is None else max(0, end - spec.window)
            heads = []
            for head in range(spec.n_q_heads):
                kv_head = head * spec.n_kv_heads // spec.n_q_heads
                scores = keys[begin:end, kv_head] @ query[row, head] * spec.scale
                if spec.softcap is not None:
                    scores = torch.tanh(scores / spec.softcap) * spec.softcap
                total = scores.exp().sum()
                if case.sinks is not None:
                    total = total + case.sinks[head].double().exp()
                heads.append((scores.exp() / total) @ values[begin:end, kv_head])
            outputs.append(torch.stack(heads))
            row += 1
    return torch.stack(outputs)


def assert_same(spec: AttentionSpec, output: torch.Tensor, expected: torch.Tensor) -> None:
    """Hold an output of the spec's dtype against a better one."""
    assert output.dtype == spec.dtype
    tolerance = TOLERANCE[spec.dtype]
    torch.testing.assert_close(output.double(), expected.double(), atol=tolerance, rtol=tolerance)
