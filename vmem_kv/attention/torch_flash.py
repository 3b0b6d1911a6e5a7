"""The FlashAttention-2 inside torch, called as one variable-length operator: `aten::_flash_attention_forward`.

One call for prefill and one for decode (vmem_kv/attention/parts.py says why). Starts go in as `cum_seq_k`, which need
not be monotone because the operator is told the lengths as `seqused_k`.

Guarantees: slack is 0 (loads are predicated by the length).
Assumes torch 2.11 or later. What later versions added to the operator (`block_table`, `num_splits`) is not passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vmem_kv.attention.base import Attend, AttentionSpec, Availability, Kernel
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.attention.cuda_devices import cuda_availability
from vmem_kv.attention.limits import ALIGNMENT_BYTES, NO_WINDOW, flash_lacks, flash_window
from vmem_kv.attention.parts import in_parts
from vmem_kv.tensors import SlotKV

Operator = Callable[..., Any]


class TorchFlash(Kernel):
    """torch's FlashAttention-2.

    Args:
        operator: What to call instead of torch's operator, with its signature; it then runs on any device.
    """

    name = "torch_flash"
    alignment_bytes = ALIGNMENT_BYTES

    def __init__(self, operator: Operator | None = None) -> None:
        self._operator = operator

    def availability(self, device: torch.device) -> Availability:
        if self._operator is not None:
            return Availability(True, "the operator was given")
        found = cuda_availability(device, least=(8, 0))
        if found.is_available and not torch.backends.cuda.is_flash_attention_available():
            return Availability(False, "this torch was built without FlashAttention")
        return found

    def lacks(self, spec: AttentionSpec) -> str:
        if spec.softcap is not None:
            return "soft capping"
        return flash_lacks(spec, (torch.bfloat16, torch.float16))

    def slack_tokens(self, spec: AttentionSpec) -> int:
        return 0

    def build(self, spec: AttentionSpec) -> Attend:
        operator = self._operator or torch.ops.aten._flash_attention_forward

        def attend(query: torch.Tensor, kv: SlotKV, batch: RaggedBatch, _: torch.Tensor | None) -> torch.Tensor:
            window = flash_window(spec, batch)
            output: torch.Tensor = operator(
                query,
                kv.keys,
                kv.values,
                batch.query_starts,
                batch.slot_starts,
                batch.max_query_tokens,
                batch.max_length,  # how the work is split follows from this, so not the capacity
                0.0,  # dropout
                spec.is_causal,
                False,  # no debug mask
                scale=spec.scale,
                window_size_left=None if window == NO_WINDOW else window[0],
                window_size_right=None if window == NO_WINDOW else window[1],
                seqused_k=batch.lengths,
            )[0]
            return output

        return in_parts(attend)
