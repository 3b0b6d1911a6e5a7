"""FlashAttention-3 for Hopper: the package flash-attn-3, or the forward-only wheel fa3-fwd.

One function serves everything: `flash_attn_with_kvcache` with packed queries, slot numbers, and the rows before a
slot's first token as left padding. K and V are seen slot by slot and cut to the longest one of the batch.

Guarantees: loads stay inside the slot, and before the end of the batch's longest sequence as counted from its slot's
base. It splits its work by each sequence's own numbers, so a mixed batch is one call.
Assumes slack: the kernel loads whole tiles of keys and multiplies what lies behind the length by zero. Those rows must
be mapped, and finite, because zero times NaN is NaN.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vmem_kv.attention.base import Attend, AttentionSpec, Availability, Kernel
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.attention.cuda_devices import cuda_availability, is_installed
from vmem_kv.attention.limits import ALIGNMENT_BYTES, flash_lacks, flash_window
from vmem_kv.attention.slots import slots_view
from vmem_kv.tensors import SlotKV

_TILE_TOKENS = ((64, 192), (96, 144), (128, 176), (192, 128), (256, 80))
"""Largest head size, and the most keys that one tile of it has over all settings (causal, windowed, plain) in 16 bits.

A decode of one token is never run as causal, so the larger tile is the one to count on. A build without kernels for
some size runs the next larger one's, so the tiles of all larger sizes count too.
"""


@dataclass(frozen=True, slots=True)
class Fa3Build:
    """One way in which FlashAttention-3 is distributed, and what it was built with."""

    package: str
    module: str
    config_module: str  # may say in CONFIG what was built
    dtypes: tuple[torch.dtype, ...]
    has_window: bool
    has_softcap: bool = True
    max_head_dim: int = 256


BUILDS = (
    Fa3Build(
        *("flash-attn-3", "flash_attn_interface", "flash_attn_config"), (torch.bfloat16, torch.float16), has_window=True
    ),
    Fa3Build(*("fa3-fwd", "fa3_fwd_interface", "fa3_fwd_config"), (torch.bfloat16,), has_window=False),
)
"""The more complete first; what they usually hold, for builds that do not say."""


class Fa3(Kernel):
    """FlashAttention-3.

    Args:
        operator: What to call instead of `flash_attn_with_kvcache`, with its signature, on any device.
        build: Which build the operator is of; default: the first that is installed, or the less complete one.
    """

    name = "fa3"
    has_slack = True
    alignment_bytes = ALIGNMENT_BYTES

    def __init__(self, operator: Callable[..., Any] | None = None, build: Fa3Build | None = None) -> None:
        self._operator = operator
        installed = next((b for b in BUILDS if is_installed(b.module)), None)
        self._build = build or (_as_configured(installed) if installed else BUILDS[-1])

    def availability(self, device: torch.device) -> Availability:
        if self._operator is not None:
            return Availability(True, "the operator was given")
        found = cuda_availability(device, least=(9, 0), below=(10, 0))
        if not found.is_available:
            return found
        if not is_installed(self._build.module):
            return Availability(False, f"neither {' nor '.join(b.package for b in BUILDS)} is installed")
        try:
            self._load()
        except Exception as error:  # whatever an extension that does not fit this torch may raise
            return Availability(False, f"{self._build.package} cannot be imported: {type(error).__name__}: {error}")
        return Availability(True, f"{self._build.package} on {found.why}")

    def lacks(self, spec: AttentionSpec) -> str:
        if spec.window is not None and not self._build.has_window:
            return f"sliding window in {self._build.package}"
        if spec.softcap is not None and not self._build.has_softcap:
            return f"soft capping in {self._build.package}"
        if spec.head_dim > self._build.max_head_dim:
            return f"head size {spec.head_dim} in {self._build.package}; it takes up to {self._build.max_head_dim}"
        return flash_lacks(spec, self._build.dtypes)

    def slack_tokens(self, spec: AttentionSpec) -> int:
        return max(n_tokens for head_dim, n_tokens in _TILE_TOKENS if spec.head_dim <= head_dim) - 1

    def build(self, spec: AttentionSpec) -> Attend:
        operator = self._operator or self._load()

        def attend(query: torch.Tensor, kv: SlotKV, batch: RaggedBatch, _: torch.Tensor | None) -> torch.Tensor:
            output: torch.Tensor = operator(
                query,
                slots_view(kv.keys, batch),
                slots_view(kv.values, batch),
                cache_seqlens=batch.slot_ends,  # counted from the slot's base, left padding included
                cache_batch_idx=batch.slot_indices,
                cache_leftpad=None if batch.starts_at_base else batch.slot_offsets,
                cu_seqlens_q=batch.query_starts,
                max_seqlen_q=batch.max_query_tokens,
                softmax_scale=spec.scale,
                causal=spec.is_causal,
                window_size=flash_window(spec, batch),
                softcap=spec.softcap or 0.0,
            )
            return output

        return attend

    def _load(self) -> Callable[..., Any]:
        function: Callable[..., Any] = importlib.import_module(self._build.module).flash_attn_with_kvcache
        return function


def _as_configured(build: Fa3Build) -> Fa3Build:
    """Return `build` with what an installed one says that it was built with, or as it is where it does not say."""
    try:
        flags = importlib.import_module(build.config_module).CONFIG["build_flags"]
        lacks = {name.removeprefix("FLASHATTENTION_DISABLE_") for name, is_set in flags.items() if is_set is True}
    except Exception:  # older builds say nothing, and newer ones may say it in another way
        return build
    return replace(
        build,
        dtypes=(torch.bfloat16,) if "FP16" in lacks else (torch.bfloat16, torch.float16),
        has_window="LOCAL" not in lacks,
        has_softcap="SOFTCAP" not in lacks,
        max_head_dim=max((size for size in (64, 96, 128, 192, 256) if f"HDIM{size}" not in lacks), default=0),
    )
