"""Attend to a mixed batch in two calls: sequences that bring several tokens, and those that bring one.

FlashAttention-2 chooses its way of working once a call, by the longest sequence of queries. Only where all bring one
token does it split long keys over the device and pack the query heads that share a K/V head. In a mixed call every
decode would take a whole tile of query rows for its one, and read all its keys with one group of threads a head.

Guarantees: the output's rows are in the order of the queries. Rows that follow each other are not copied on their way
in; the others are gathered and scattered, some kilobytes a sequence.
"""

from __future__ import annotations

import torch

from vmem_kv.attention.base import Attend
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.tensors import SlotKV


def in_parts(attend: Attend) -> Attend:
    """Return the same as `attend`, which then sees batches of prefill alone and of decode alone."""

    def attend_in_parts(
        query: torch.Tensor, kv: SlotKV, batch: RaggedBatch, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        if not batch.parts:
            return attend(query, kv, batch, sinks)
        output = torch.empty_like(query)
        for part, first_row, rows, _ in batch.parts:
            if rows is None:
                assert first_row is not None
                packed = query.narrow(0, first_row, part.n_tokens)
                output.narrow(0, first_row, part.n_tokens).copy_(attend(packed, kv, part, sinks))
            else:
                output.index_copy_(0, rows, attend(query.index_select(0, rows), kv, part, sinks))
        return output

    return attend_in_parts
