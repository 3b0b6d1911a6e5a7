"""The same generation with several caches in turn, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from vmem_kv import VmemCache
from vmem_kv.cli.memory_trace import (
    CacheKind,
    StockKind,
    Trace,
    VmemKind,
    dynamic_kind,
    static_kind,
    trace_generation,
)
from vmem_kv.errors import ConfigError
from vmem_kv.integrations.hf import VmemLayerMixin
from vmem_kv.machine import describe_machine
from vmem_kv.units import format_bytes

_STATIC_SHARE = 0.5
"""Share of the usable memory up to which a StaticCache is tried: it takes all of its memory at once."""


@dataclass(frozen=True)
class Job:
    """What to generate, whichever cache is used."""

    model: PreTrainedModel
    inputs: Mapping[str, torch.Tensor]
    seed: int
    cache_options: Mapping[str, Any]  # of VmemCache
    generate_options: Mapping[str, Any]

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return int(self.inputs["input_ids"].shape[1])

    def check_model(self) -> None:
        """Raises ConfigError for a model that has nothing for a KV cache to hold."""
        with VmemCache(self.model.config) as cache:
            if not any(isinstance(layer, VmemLayerMixin) for layer in cache.layers):
                raise ConfigError(
                    f"a model of type {self.model.config.model_type} keeps no K and V that vmem_kv could hold; "
                    "name a model with attention layers"
                )

    def warm_up(self) -> None:
        """Run the model once, so that what torch does at its first call falls on no cache.

        Raises:
            ConfigError: The model needs what its attention function lacks.
        """
        with torch.inference_mode():
            first = self.inputs["input_ids"][:, :1]
            cache = DynamicCache(config=self.model.config)
            for _ in range(2):
                self.model(first, past_key_values=cache, use_cache=True)

    def run(self, kind: CacheKind, follower: BaseStreamer | None = None) -> Trace:
        """Generate with one kind of cache.

        Raises:
            VmemError: As the cache raises it.
        """
        return trace_generation(
            self.model, self.inputs, kind, seed=self.seed, follower=follower, **self.generate_options
        )

    def run_vmem(self, follower: BaseStreamer | None = None) -> Trace:
        """Generate with our cache. Raises as `run` does."""
        return self.run(VmemKind(self.model, dict(self.cache_options)), follower)

    def other_kinds(self, ours: Trace, skipped: list[str]) -> list[StockKind]:
        """Return the caches to compare with, and add to `skipped` why one is missing.

        The StaticCache is made for the model's whole context: that is what one has to reserve when nobody knows
        how long the text will be.
        """
        config = self.model.config.get_text_config(decoder=True)
        needed = self.n_prompt_tokens + int(self.generate_options["max_new_tokens"])
        max_tokens = max(needed, getattr(config, "max_position_embeddings", None) or 0)
        n_bytes = ours.memory[-1].live_bytes // (self.n_prompt_tokens + len(ours.token_ids)) * max_tokens
        usable = describe_machine().usable_memory_bytes
        kinds = [dynamic_kind(self.model)]
        if n_bytes <= _STATIC_SHARE * usable:
            kinds.append(static_kind(self.model, max_tokens))
        else:
            skipped.append(
                f"StaticCache({max_tokens}) was left out: it would take {format_bytes(n_bytes)} at once, "
                f"of {format_bytes(usable)} that are free."
            )
        return kinds


def n_common_tokens(one: Trace, other: Trace) -> int:
    """Count the new tokens before the first difference."""
    for index, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)):
        if a != b:
            return index
    return min(len(one.token_ids), len(other.token_ids))
