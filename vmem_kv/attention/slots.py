"""K and V rows seen slot by slot, for operators that take slot numbers."""

from __future__ import annotations

import torch

from vmem_kv.attention.batch import RaggedBatch


def slots_view(rows: torch.Tensor, batch: RaggedBatch) -> torch.Tensor:
    """View `[n_rows, heads, dim]` as `[n_slots, n, heads, dim]`, cut to what the batch's longest slot holds.

    Kernels split their work by the second size, and some load up to it, so it must not be the whole span.
    """
    _, n_heads, head_dim = rows.shape
    return rows.view(-1, batch.span_tokens, n_heads, head_dim).narrow(1, 0, batch.max_slot_end)
