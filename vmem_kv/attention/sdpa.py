"""Attention by torch's `scaled_dot_product_attention`, on the CPU and on CUDA: the reference for all other kernels.

A call is a tile of at most `TILE_ROWS` query rows against exactly the keys that they see. The query heads that share
a K/V head become rows of one tile: `[m tokens, Hq] -> [Hkv, m * Hq / Hkv]`. K and V are then read once per K/V head,
and torch's CPU kernel is up to eight times faster in bf16 than when it does the grouping itself. Keys that no row of a
tile sees, behind the causal edge or before the window, are cut off; a mask remains for the edges only.

Decoding sequences of equal length and evenly spaced starts go in one call, in place. Short ones of unequal length are
first gathered, padded with rows of their own, because a call of torch costs more than copying them.

Guarantees: reads rows `[start, start + length)` and nothing else; slack is 0. Soft capping and sinks, which torch's
kernel lacks, are computed in plain torch, in float32.

On CUDA torch's kernels count the elements between heads and between rows in 32 bits: a layout in which they lie further
apart is refused.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from vmem_kv.attention.base import Attend, AttentionSpec, Availability, Kernel
from vmem_kv.attention.batch import RaggedBatch, SequenceRows
from vmem_kv.attention.cuda_devices import cuda_availability
from vmem_kv.attention.upload import upload
from vmem_kv.errors import UsageError
from vmem_kv.tensors import SlotKV

TILE_ROWS = 256
"""Query rows of one call (measured on the CPU: fewer or more are slower). It bounds what a call needs: one byte a row
and key for the mask, four for scores that are written out."""
GATHER_BYTES = 128 * 1024
"""Sequences whose keys take more are read in place: copying would cost more than a call (measured on the CPU)."""
MAX_STRIDE = 2**31 - 1
"""The most elements between neighbouring heads or rows that torch's CUDA kernels take."""
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Mask = torch.Tensor | None
Scores = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mask], torch.Tensor]
"""`[B, Hkv, R, D]` queries, `[B, Hkv, L, D]` keys and values, boolean mask or None, to `[B, Hkv, R, Dv]`."""


class Sdpa(Kernel):
    """torch's own attention."""

    name = "sdpa"

    def availability(self, device: torch.device) -> Availability:
        if device.type == "cpu":
            return Availability(True, "part of torch")
        found = cuda_availability(device, least=(0, 0))
        return Availability(True, f"part of torch, on {found.why}") if found.is_available else found

    def lacks(self, spec: AttentionSpec) -> str:
        return "" if spec.dtype in _DTYPES else f"{spec.dtype}; use float32, bfloat16 or float16"

    def slack_tokens(self, spec: AttentionSpec) -> int:
        return 0

    def build(self, spec: AttentionSpec) -> Attend:
        return _Sdpa(spec)


@dataclass(frozen=True, slots=True)
class _Strided:
    """Sequences of one tile of `n_tokens` each, read in place: sequence i begins at row `first_row + i * row_step`."""

    query_start: int
    n_seqs: int
    n_tokens: int
    first_row: int
    row_step: int
    n_keys: int
    mask: Mask = None


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Decoding sequences of unequal lengths, copied."""

    queries: torch.Tensor  # [B], rows of the packed queries
    rows: torch.Tensor  # [B * L], rows of K and V; a sequence's own last row stands for those that it does not have
    mask: torch.Tensor  # [B, 1, 1, L], False for the latter
    pinned: tuple[torch.Tensor | None, ...]  # what they were copied from: the copies may still be under way


class _Sdpa:
    """The kernel for one spec. Plans a batch once, not once a layer."""

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        has_extras = spec.softcap is not None or spec.has_sinks
        self._fused = None if has_extras else _fused(spec)
        # torch's kernel keeps no scores, the written-out one keeps those of all heads.
        self._tile_tokens = max(1, TILE_ROWS // (spec.n_q_heads if has_extras else spec.n_groups))
        self._plan = lru_cache(maxsize=4)(self._make_plan)

    def __call__(self, query: torch.Tensor, kv: SlotKV, batch: RaggedBatch, sinks: torch.Tensor | None) -> torch.Tensor:
        if query.device.type != "cpu":
            _check_strides(kv)
        attend = self._fused or _explicit(self._spec, sinks)
        output = query.new_empty(batch.n_tokens, self._spec.n_q_heads, self._spec.value_dim)
        strided, gathered = self._plan(batch)
        for call in strided:
            n_rows = call.n_seqs * call.n_tokens
            packed = self._packed(query.narrow(0, call.query_start, n_rows), call.n_seqs)
            keys, values = (_in_place(rows, call) for rows in (kv.keys, kv.values))
            output.narrow(0, call.query_start, n_rows).copy_(self._unpacked(attend(packed, keys, values, call.mask)))
        for copied in gathered:
            n_seqs = copied.queries.numel()
            packed = self._packed(query.index_select(0, copied.queries), n_seqs)
            keys, values = (
                rows.index_select(0, copied.rows).view(n_seqs, -1, *rows.shape[1:]).transpose(1, 2)
                for rows in (kv.keys, kv.values)
            )
            output.index_copy_(0, copied.queries, self._unpacked(attend(packed, keys, values, copied.mask)))
        return output

    def _packed(self, query: torch.Tensor, n_seqs: int) -> torch.Tensor:
        """`[B * m, Hq, D] -> [B, Hkv, m * Hq / Hkv, D]`, a view where m is 1."""
        heads = query.reshape(n_seqs, -1, self._spec.n_kv_heads, self._spec.n_groups, self._spec.head_dim)
        return heads.transpose(1, 2).flatten(2, 3)

    def _unpacked(self, output: torch.Tensor) -> torch.Tensor:
        """`[B, Hkv, m * Hq / Hkv, Dv] -> [B * m, Hq, Dv]`."""
        n_seqs, n_kv_heads, _, value_dim = output.shape
        heads = output.reshape(n_seqs, n_kv_heads, -1, self._spec.n_groups, value_dim).transpose(1, 2)
        return heads.reshape(-1, self._spec.n_q_heads, value_dim)

    @torch.inference_mode(False)
    def _make_plan(self, batch: RaggedBatch) -> tuple[tuple[_Strided, ...], tuple[_Gathered, ...]]:
        strided: list[_Strided] = []
        gathered: list[_Gathered] = []
        for bucket in self._buckets(_runs([self._seen(s) for s in batch.sequences if s.n_queries == 1])):
            if len(bucket) > 1:
                gathered.append(_gather(bucket, batch.device))
            else:
                strided += bucket
        if batch.max_query_tokens > 1:
            mask = self._edge_mask(batch)
            for sequence in batch.sequences:
                if sequence.n_queries > 1:
                    strided += self._tiles(sequence, mask)
        return tuple(strided), tuple(gathered)

    def _seen(self, sequence: SequenceRows) -> SequenceRows:
        """Cut a decoding sequence to what its one query sees."""
        length = min(sequence.length, self._spec.window or sequence.length)
        return sequence._replace(slot_start=sequence.slot_start + sequence.length - length, length=length)

    def _buckets(self, runs: Iterable[_Strided]) -> Iterator[list[_Strided]]:
        """Group single sequences short enough to be copied by length, within a factor of two; the others stay alone."""
        row_bytes = self._spec.n_kv_heads * self._spec.head_dim * self._spec.dtype.itemsize
        buckets: dict[int, list[_Strided]] = defaultdict(list)
        for call in runs:
            if call.n_seqs == 1 and call.n_keys * row_bytes <= GATHER_BYTES:
                buckets[call.n_keys.bit_length()].append(call)
            else:
                yield [call]
        yield from buckets.values()

    def _edge_mask(self, batch: RaggedBatch) -> torch.Tensor:
        """Return what the rows of a tile see of the keys at its end, `[1, tile rows, keys]`.

        Counted from the right end, where the tile's last token is, this is the same for all tiles: shorter ones use
        a corner of it.
        """
        n_tokens = min(self._tile_tokens, batch.max_query_tokens)
        n_keys = batch.max_length
        if self._spec.window is not None:
            n_keys = min(n_keys, self._spec.window + n_tokens - 1)
        token = torch.arange(n_tokens, device=batch.device).unsqueeze(1)
        behind = token + (n_keys - n_tokens) - torch.arange(n_keys, device=batch.device)
        is_seen = behind >= 0
        if self._spec.window is not None:
            is_seen &= behind < self._spec.window
        return is_seen.repeat_interleave(self._spec.n_groups, 0)

    def _tiles(self, sequence: SequenceRows, mask: torch.Tensor) -> Iterator[_Strided]:
        """Cut a sequence's new tokens into tiles, and its keys to what each tile sees."""
        spec = self._spec
        for start in range(0, sequence.n_queries, self._tile_tokens):
            n_tokens = min(self._tile_tokens, sequence.n_queries - start)
            end, first = sequence.length, 0
            if spec.is_causal:
                end -= sequence.n_queries - start - n_tokens
            if spec.window is not None:
                first = max(0, end - n_tokens - spec.window + 1)
            n_keys = end - first
            edge = mask[-n_tokens * spec.n_groups :, -n_keys:] if spec.is_causal else None
            yield _Strided(sequence.query_start + start, 1, n_tokens, sequence.slot_start + first, 0, n_keys, edge)


def _runs(sequences: list[SequenceRows]) -> Iterator[_Strided]:
    """Join neighbours in the batch whose lengths are equal and whose starts are evenly spaced, upwards."""
    begin = 0
    while begin < len(sequences):
        first, end, step = sequences[begin], begin + 1, 0
        while end < len(sequences):
            previous, this = sequences[end - 1], sequences[end]
            gap = this.slot_start - previous.slot_start
            is_next = this.query_start == previous.query_start + 1 and this.length == first.length and gap > 0
            if not is_next or (step and gap != step):
                break
            step, end = gap, end + 1
        yield _Strided(first.query_start, end - begin, 1, first.slot_start, step, first.length)
        begin = end


def _gather(bucket: list[_Strided], device: torch.device) -> _Gathered:
    longest = max(call.n_keys for call in bucket)
    starts = torch.tensor([[call.first_row] for call in bucket])
    last = torch.tensor([[call.n_keys - 1] for call in bucket])
    token = torch.arange(longest).unsqueeze(0)
    queries = upload(torch.tensor([call.query_start for call in bucket]), device)
    rows = upload((starts + token.minimum(last)).flatten(), device)
    mask = upload((token <= last)[:, None, None, :], device)
    return _Gathered(queries.tensor, rows.tensor, mask.tensor, (queries.pinned, rows.pinned, mask.pinned))


def _check_strides(kv: SlotKV) -> None:
    for name, rows in (("keys", kv.keys), ("values", kv.values)):
        row_stride, head_stride, _ = rows.stride()
        if max(row_stride, head_stride) > MAX_STRIDE:
            raise UsageError(
                f"{name} have rows {row_stride} and heads {head_stride} elements apart; torch's CUDA kernels take up to"
                f" {MAX_STRIDE}: use the layout per_layer, fewer slots, or another kernel"
            )


def _in_place(rows: torch.Tensor, call: _Strided) -> torch.Tensor:
    """View the call's rows as `[n_seqs, heads, n_keys, dim]`."""
    row_stride, head_stride, _ = rows.stride()
    return rows.as_strided(
        (call.n_seqs, rows.shape[1], call.n_keys, rows.shape[2]),
        (call.row_step * row_stride, head_stride, row_stride, 1),
        rows.storage_offset() + call.first_row * row_stride,
    )


def _fused(spec: AttentionSpec) -> Scores:
    """Return torch's kernel with the spec's scale."""

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=spec.scale)

    return attend


def _explicit(spec: AttentionSpec, sinks: torch.Tensor | None) -> Scores:
    """Return the same with soft capping and sinks, written out."""

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask) -> torch.Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(dtype) @ keys.to(dtype).transpose(2, 3) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        if sinks is not None:
            n_tokens = scores.shape[2] // spec.n_groups
            column = sinks.to(dtype).view(1, spec.n_kv_heads, spec.n_groups, 1).repeat(len(scores), 1, n_tokens, 1)
            scores = torch.cat([scores, column], 3)
        weights = torch.softmax(scores, 3)[..., : keys.shape[2]]
        return (weights @ values.to(dtype)).to(query.dtype)

    return attend
