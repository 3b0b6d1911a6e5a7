"""One generation with one cache, timed token by token, with the cache's memory sampled after each.

What sampling and printing cost is kept out of the times. Memory is that of the KV tensors alone: what transformers'
caches hold is the storage behind their tensors, what ours holds it says itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from vmem_kv import VmemCache


class Memory(NamedTuple):
    """A cache's memory at one moment, in bytes."""

    virtual_bytes: int  # addresses that it holds
    physical_bytes: int  # memory that it holds
    live_bytes: int  # what the tokens in it need


@dataclass(slots=True)
class Trace:
    """What one generation did."""

    cache_name: str
    token_ids: list[int] = field(default_factory=list)  # new tokens only
    first_token_s: float = 0.0
    decode_s: float = 0.0  # of all steps behind the first token
    memory: list[Memory] = field(default_factory=list)  # one sample per new token
    peak_bytes: int = 0
    explanation: str = ""

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Speed behind the first token; None where there was only one."""
        return (len(self.token_ids) - 1) / self.decode_s if self.decode_s else None


class CacheKind(Protocol):
    """A kind of cache that can be compared."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    def open(self) -> Cache:
        """Make an empty cache."""

    def sample(self, cache: Cache) -> Memory:
        """Measure it now."""

    def close(self, cache: Cache, trace: Trace) -> None:
        """Complete the trace and give the cache's memory back."""


@dataclass(frozen=True)
class VmemKind:
    """Our cache; `options` are those of `VmemCache`."""

    model: PreTrainedModel
    options: dict[str, Any]
    name: str = "vmem_kv"

    def open(self) -> Cache:
        return VmemCache(self.model.config, **self.options)

    def sample(self, cache: Cache) -> Memory:
        assert isinstance(cache, VmemCache)
        stats = cache.stats()
        return Memory(stats.virtual_bytes, stats.owned_bytes, stats.live_bytes)

    def close(self, cache: Cache, trace: Trace) -> None:
        assert isinstance(cache, VmemCache)
        trace.peak_bytes = cache.stats().peak_bytes
        trace.explanation = cache.explain()
        cache.close()


@dataclass(frozen=True)
class StockKind:
    """One of transformers' own caches."""

    name: str
    make: Callable[[], Cache]

    def open(self) -> Cache:
        return self.make()

    def sample(self, cache: Cache) -> Memory:
        held = live = 0
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or not keys.numel():
                continue
            n_tokens = int(layer.get_seq_length())
            for tensor in (keys, values):
                held += tensor.untyped_storage().nbytes()
                live += tensor.nbytes * min(n_tokens, tensor.shape[-2]) // tensor.shape[-2]
        return Memory(held, held, live)

    def close(self, cache: Cache, trace: Trace) -> None:
        trace.peak_bytes = max((m.physical_bytes for m in trace.memory), default=0)


def dynamic_kind(model: PreTrainedModel) -> StockKind:
    """The default of transformers, which copies all K and V at every token."""
    return StockKind("DynamicCache", lambda: DynamicCache(config=model.config))


def static_kind(model: PreTrainedModel, max_tokens: int) -> StockKind:
    """The preallocated cache of transformers, made for `max_tokens`."""
    return StockKind(f"StaticCache({max_tokens})", lambda: StaticCache(config=model.config, max_cache_len=max_tokens))


class _Recorder(BaseStreamer):  # type: ignore[misc]  # its base is not annotated
    """Called by `generate` with the prompt and then with every new token; passes both on to `follower`."""

    def __init__(self, trace: Trace, sample: Callable[[], Memory], follower: BaseStreamer | None) -> None:
        self._trace, self._sample, self._follower = trace, sample, follower
        self._has_prompt = False
        self._resumed_s = time.perf_counter()  # when generate went on after the last call

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (the first call) or a new token."""
        step_s = time.perf_counter() - self._resumed_s
        trace = self._trace
        if not self._has_prompt:
            self._has_prompt = True
            trace.first_token_s = step_s
        else:
            if trace.token_ids:
                trace.decode_s += step_s
            else:
                trace.first_token_s += step_s
            trace.token_ids += value.flatten().tolist()
            trace.memory.append(self._sample())
        if self._follower:
            self._follower.put(value)
        self._resumed_s = time.perf_counter()

    def end(self) -> None:
        """Flush what the follower holds back."""
        if self._follower:
            self._follower.end()


def trace_generation(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    kind: CacheKind,
    *,
    seed: int,
    follower: BaseStreamer | None = None,
    **generate_options: Any,
) -> Trace:
    """Generate one continuation with a fresh cache of one kind, and hand every token on to `follower`.

    Raises:
        VmemError: As the cache raises it; its memory is freed with the last reference to it.
    """
    trace = Trace(kind.name)
    cache = kind.open()
    torch.manual_seed(seed)
    recorder = _Recorder(trace, lambda: kind.sample(cache), follower)
    model.generate(**inputs, past_key_values=cache, streamer=recorder, **generate_options)
    kind.close(cache, trace)
    return trace
