"""Dao-AILab's `flash_attn` package, FlashAttention-2 from version 2.7 on.

Decode goes to `flash_attn_with_kvcache`, which takes slot numbers, and the rows before a slot's first token as left
padding. Everything else goes to the variable-length forward with `seqused_k`; a mixed batch is split for that
(vmem_kv/attention/parts.py says why). The package's public variable-length function does not take
`seqused_k`, so its inner one is called: the same operator, one wrapper less.

Guarantees: slack is 0 (loads are predicated by the length).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from vmem_kv.attention.base import Attend, AttentionSpec, Availability, Kernel
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.attention.cuda_devices import cuda_availability, is_installed
from vmem_kv.attention.limits import ALIGNMENT_BYTES, flash_lacks, flash_window
from vmem_kv.attention.parts import in_parts
from vmem_kv.attention.slots import slots_view
from vmem_kv.tensors import SlotKV

_MODULE = "flash_attn.flash_attn_interface"
_LEAST_VERSION = (2, 7)


class FlashAttnOperators(NamedTuple):
    """The two functions of the package that are called."""

    varlen_forward: Callable[..., Any]  # _flash_attn_varlen_forward
    with_kvcache: Callable[..., Any]  # flash_attn_with_kvcache


class FlashAttn(Kernel):
    """The package's FlashAttention-2.

    Args:
        operators: What to call instead of the package's functions, with their signatures, on any device.
    """

    name = "flash_attn"
    alignment_bytes = ALIGNMENT_BYTES

    def __init__(self, operators: FlashAttnOperators | None = None) -> None:
        self._operators = operators

    def availability(self, device: torch.device) -> Availability:
        if self._operators is not None:
            return Availability(True, "the operators were given")
        found = cuda_availability(device, least=(8, 0))
        if not found.is_available:
            return found
        if not is_installed("flash_attn"):
            return Availability(False, "the package flash-attn is not installed")
        try:
            installed = version("flash-attn")
            _load()
        except Exception as error:  # whatever an extension that does not fit this torch may raise
            return Availability(False, f"flash_attn cannot be imported: {type(error).__name__}: {error}")
        numbers = re.match(r"(\d+)(?:\.(\d+))?", installed)
        if numbers is None:
            return Availability(False, f"flash-attn says that its version is {installed!r}: install 2.7 or later")
        if (int(numbers[1]), int(numbers[2] or 0)) < _LEAST_VERSION:
            return Availability(False, f"flash-attn {installed} is too old: install 2.7 or later")
        return Availability(True, f"flash-attn {installed} on {found.why}")

    def lacks(self, spec: AttentionSpec) -> str:
        return flash_lacks(spec, (torch.bfloat16, torch.float16))

    def slack_tokens(self, spec: AttentionSpec) -> int:
        return 0

    def build(self, spec: AttentionSpec) -> Attend:
        return in_parts(_FlashAttn(spec, self._operators or _load()))


class _FlashAttn:
    """The kernel for one spec."""

    def __init__(self, spec: AttentionSpec, operators: FlashAttnOperators) -> None:
        self._spec, self._operators = spec, operators

    def __call__(self, query: torch.Tensor, kv: SlotKV, batch: RaggedBatch, sinks: torch.Tensor | None) -> torch.Tensor:
        if batch.max_query_tokens == 1:
            return self._decode(query, kv, batch)
        return self._varlen(query, kv, batch)

    def _decode(self, query: torch.Tensor, kv: SlotKV, batch: RaggedBatch) -> torch.Tensor:
        output: torch.Tensor = self._operators.with_kvcache(
            query.unsqueeze(1),
            slots_view(kv.keys, batch),
            slots_view(kv.values, batch),
            cache_seqlens=batch.slot_ends,  # counted from the slot's base, left padding included
            cache_batch_idx=batch.slot_indices,
            cache_leftpad=None if batch.starts_at_base else batch.slot_offsets,
            softmax_scale=self._spec.scale,
            causal=self._spec.is_causal,
            window_size=flash_window(self._spec, batch),
            softcap=self._spec.softcap or 0.0,
        )
        return output.squeeze(1)

    def _varlen(self, query: torch.Tensor, kv: SlotKV, batch: RaggedBatch) -> torch.Tensor:
        window = flash_window(self._spec, batch)
        output: torch.Tensor = self._operators.varlen_forward(
            query,
            kv.keys,
            kv.values,
            batch.query_starts,
            batch.slot_starts,
            batch.max_query_tokens,
            batch.max_length,
            dropout_p=0.0,
            softmax_scale=self._spec.scale,
            causal=self._spec.is_causal,
            window_size_left=window[0],
            window_size_right=window[1],
            softcap=self._spec.softcap or 0.0,
            seqused_k=batch.lengths,
        )[0]
        return output


def _load() -> FlashAttnOperators:
    module = importlib.import_module(_MODULE)
    return FlashAttnOperators(module._flash_attn_varlen_forward, module.flash_attn_with_kvcache)
