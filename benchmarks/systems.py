"""The systems under comparison, and one visit to one of them: fill its cache, decode, read off time and memory.

A system is a cache (`vmem`, `dynamic`, `static` of exactly the final length) with an attention function (`sdpa`,
transformers' own, or `vmem_kv`). `static_max` is a StaticCache of the model's longest context, shown beside them.

A visit writes the same random K and V into every layer through `cache.update`, so that a context costs a copy and
not a prefill; decode steps are whole forward passes of the model at that context. Only one cache exists at a time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

import vmem_kv.integrations.hf_attention
from benchmarks import process
from vmem_kv import models
from vmem_kv.integrations.hf import VmemCache
from vmem_kv.tensors import GrowingView

CACHES = ("vmem", "dynamic", "static")
ATTENTIONS = ("sdpa", "vmem_kv")
TINY = "tiny"
"""A random model of two layers, for trying the program out."""

N_WARM_STEPS = 2
N_LEAST_STEPS = 3


@dataclass(frozen=True, slots=True)
class Point:
    """One place of the comparison."""

    dtype: str
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.dtype} batch {self.batch} context {self.context}"


@dataclass(slots=True)
class Visit:
    """What one system did at one point in one round. Times in milliseconds, medians over the steps."""

    dtype: str
    batch: int
    context: int
    round: int
    cache: str
    attention: str
    n_steps: int
    step_ms: float
    decode_tokens_per_s: float
    """With a growth step's extra time spread over the tokens that it makes room for."""
    update_ms: float
    """Inside `cache.update`, all layers of one step."""
    copy_ms: float | None
    """Of that, inside the in-place copies of new K and V (vmem only)."""
    growth_update_ms: float | None
    """Inside `cache.update`, without the copies, in a step in which every sequence outgrows its pages."""
    growth_tokens: float | None
    """Steps from one such step to the next."""
    faults_per_step: float
    """For `dynamic` this depends on the process's past: glibc serves a block from its heap, without faults, if a
    block as large was freed before (up to 32 MiB), and else from fresh pages."""
    live_bytes: int
    """What `context` tokens of every sequence need."""
    peak_kv_bytes: int
    """The most memory that K and V took up to `context` tokens: mapped pages (vmem), or the tensors' own sizes,
    for `dynamic` with the one tensor that exists twice while it is concatenated."""
    peak_kv_bytes_after_growth: int | None
    """The same when every sequence has just outgrown its pages, the worst moment for page waste (vmem only)."""
    live_bytes_after_growth: int | None
    """What the tokens need at that moment."""
    peak_resident_bytes: int | None
    """The most that the process's resident memory grew, attention's temporaries included."""
    logits_difference: float
    """Greatest difference to the logits of the first system at this point with this attention function, which is
    vmem in round 0, at the first step. `dynamic` attends to the same tokens in the same order: no difference is
    right. `static` masks its unused rest, which rounds differently. Random K and V amplify that: in bfloat16, what
    is not equal to the bit can be far apart."""

    @property
    def bookkeeping_share(self) -> float | None:
        """The cache's own work as a share of a decode step: `update` without the copies, growth spread out."""
        if self.copy_ms is None:
            return None
        return (self.update_ms - self.copy_ms + self.growth_ms_per_step) / (self.step_ms + self.growth_ms_per_step)

    @property
    def growth_ms_per_step(self) -> float:
        """Extra time of a growth step, spread over the steps until the next."""
        if self.growth_update_ms is None or not self.growth_tokens or self.copy_ms is None:
            return 0.0
        return max(0.0, self.growth_update_ms - (self.update_ms - self.copy_ms)) / self.growth_tokens


@dataclass(slots=True)
class Prefill:
    """A real prefill of one sequence, from making the cache to the first token."""

    dtype: str
    context: int
    round: int
    cache: str
    attention: str
    first_token_ms: float


class _GrowthStep(NamedTuple):
    """A decode step in which every sequence outgrew its pages."""

    update_ms: float  # inside `cache.update`, without the copies
    n_tokens: float  # steps that the new pages serve
    live_bytes: int  # what the tokens needed then


@dataclass(slots=True)
class _Clock:
    """Seconds spent inside `update`, and inside the copies of vmem_kv's rows."""

    update_s: float = 0.0
    copy_s: float = 0.0

    def take(self) -> tuple[float, float]:
        """Return milliseconds since the last call."""
        taken = self.update_s * 1e3, self.copy_s * 1e3
        self.update_s = self.copy_s = 0.0
        return taken


@dataclass(slots=True)
class Bench:
    """A model with the K, V and tokens that all systems at one point get."""

    model: PreTrainedModel
    point: Point
    n_steps: int
    budget_s: float
    keys: torch.Tensor = field(init=False)
    values: torch.Tensor = field(init=False)
    tokens: torch.Tensor = field(init=False)
    reference_logits: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.model.config
        generator = torch.Generator().manual_seed(0)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (self.point.batch, config.num_key_value_heads, self.point.context, head_dim)
        self.keys, self.values = (torch.randn(shape, generator=generator).to(self.model.dtype) for _ in "kv")
        n_tokens = N_WARM_STEPS + self.n_steps + 1
        self.tokens = torch.randint(config.vocab_size, (self.point.batch, n_tokens), generator=generator)

    @property
    def live_bytes(self) -> int:
        """What the point's K and V need."""
        return (self.keys.nbytes + self.values.nbytes) * int(self.model.config.num_hidden_layers)

    def visit(self, round_index: int, cache_kind: str, attention: str) -> Visit:
        """Measure one system."""
        point, context = self.point, self.point.context
        n_filled = context - N_WARM_STEPS - self.n_steps
        self.model.set_attn_implementation(attention)
        process.settle()
        can_see_peak = process.reset_peak()
        resident_before = process.resident_bytes()
        cache = make_cache(cache_kind, self.model, context)
        with _timed(cache) as clock:
            self._fill(cache, 0, n_filled)
            first_logits = self._step(cache, 0)
            for i in range(1, N_WARM_STEPS):
                self._step(cache, i)
            clock.take()
            step_ms: list[float] = []
            update_ms: list[float] = []
            copy_ms: list[float] = []
            faults: list[int] = []
            began = time.perf_counter()
            while len(step_ms) < self.n_steps:
                faults_before, step_began = process.minor_faults(), time.perf_counter()
                self._step(cache, N_WARM_STEPS + len(step_ms))
                step_ms.append((time.perf_counter() - step_began) * 1e3)
                faults.append(process.minor_faults() - faults_before)
                in_update, in_copy = clock.take()
                update_ms.append(in_update)
                copy_ms.append(in_copy)
                if len(step_ms) >= N_LEAST_STEPS and time.perf_counter() - began > self.budget_s:
                    break
            self._fill(cache, n_filled + N_WARM_STEPS + len(step_ms), context)
            peak_kv_bytes = _peak_kv_bytes(cache)
            peak_resident = process.peak_resident_bytes() - resident_before if can_see_peak else None
            is_ours = isinstance(cache, VmemCache)
            growth = self._grow(cache, clock) if isinstance(cache, VmemCache) else None
            peak_after_growth = _peak_kv_bytes(cache) if is_ours else None
        reference_logits = self.reference_logits.setdefault(attention, first_logits)
        visit = Visit(
            **{name: getattr(point, name) for name in Point.__slots__},
            round=round_index,
            cache=cache_kind,
            attention=attention,
            n_steps=len(step_ms),
            step_ms=statistics.median(step_ms),
            decode_tokens_per_s=0.0,
            update_ms=statistics.median(update_ms),
            copy_ms=statistics.median(copy_ms) if is_ours else None,
            growth_update_ms=growth.update_ms if growth else None,
            growth_tokens=growth.n_tokens if growth else None,
            faults_per_step=statistics.median(faults),
            live_bytes=self.live_bytes,
            peak_kv_bytes=peak_kv_bytes,
            peak_kv_bytes_after_growth=peak_after_growth,
            live_bytes_after_growth=growth.live_bytes if growth else None,
            peak_resident_bytes=peak_resident,
            logits_difference=(first_logits - reference_logits).abs().max().item(),
        )
        visit.decode_tokens_per_s = point.batch * 1e3 / (visit.step_ms + visit.growth_ms_per_step)
        if isinstance(cache, VmemCache):
            cache.close()
        return visit

    def _fill(self, cache: Any, first: int, end: int) -> None:
        """Append tokens `[first, end)` of the random K and V to every layer."""
        if end > first:
            for layer in range(self.model.config.num_hidden_layers):
                cache.update(self.keys[:, :, first:end], self.values[:, :, first:end], layer)

    def _step(self, cache: Any, index: int) -> torch.Tensor:
        """Decode one token of every sequence, greedily; return the logits."""
        logits: torch.Tensor = self.model(self.tokens[:, index : index + 1], past_key_values=cache).logits[:, -1]
        logits.argmax(-1)
        return logits.float()

    def _grow(self, cache: VmemCache, clock: _Clock) -> _GrowthStep:
        """Fill the pages that are mapped, then take the step that outgrows them.

        A context that is no multiple of a page would else seem to grow for free.
        """
        before = cache.stats()
        # Every sequence and layer has the same shapes, so they run out of room together.
        n_tokens = self.point.context
        room = before.mapped_bytes * n_tokens // before.live_bytes - n_tokens
        while room > 0:
            n_more = min(room, self.point.context)
            self._fill(cache, 0, n_more)
            room -= n_more
        before = cache.stats()
        clock.take()
        self._step(cache, self.tokens.shape[1] - 1)
        in_update, in_copy = clock.take()
        after = cache.stats()
        if after.mapped_bytes == before.mapped_bytes:
            raise AssertionError(f"the step behind the last page mapped nothing: {before} {after}")
        bytes_per_step = after.live_bytes - before.live_bytes
        n_steps = (after.mapped_bytes - before.mapped_bytes) / bytes_per_step
        return _GrowthStep(in_update - in_copy, n_steps, after.live_bytes)


def measure_prefill(
    model: PreTrainedModel, dtype: str, context: int, round_index: int, cache_kind: str, attention: str
) -> Prefill:
    """Prefill one sequence of random tokens and choose the first new one; the cache is made inside the time."""
    tokens = torch.randint(model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation(attention)
    process.settle()
    began = time.perf_counter()
    cache = make_cache(cache_kind, model, context)
    model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
    first_token_ms = (time.perf_counter() - began) * 1e3
    if isinstance(cache, VmemCache):
        cache.close()
    return Prefill(dtype, context, round_index, cache_kind, attention, first_token_ms)


def load_model(name: str | None, dtype: str) -> PreTrainedModel:
    """Load a model as `vmem_kv.models` does, or make the tiny one."""
    if name != TINY:
        return models.load(name, dtype=dtype)[0]
    vmem_kv.integrations.hf_attention.register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return AutoModelForCausalLM.from_config(config, dtype=models.DTYPES[dtype]).eval()


def make_cache(kind: str, model: PreTrainedModel, n_tokens: int) -> Any:
    """Make an empty cache of one kind for `n_tokens` tokens."""
    if kind == "vmem":
        return VmemCache(model.config)
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    length = model.config.max_position_embeddings if kind == "static_max" else n_tokens
    return StaticCache(config=model.config, max_cache_len=length)


def _peak_kv_bytes(cache: Any) -> int:
    """See `Visit.peak_kv_bytes`."""
    if isinstance(cache, VmemCache):
        return cache.stats().peak_bytes
    n_bytes = sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)
    return n_bytes + (int(cache.layers[0].keys.nbytes) if isinstance(cache, DynamicCache) else 0)


@contextmanager
def _timed(cache: Any) -> Iterator[_Clock]:
    """Count the time inside this cache's `update`, and inside vmem_kv's in-place copies.

    Costs two readings of the clock per call, about a hundred calls of a tenth of a microsecond per step.
    """
    clock = _Clock()
    update, write = cache.update, GrowingView.write

    def timed_update(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        states = update(*args, **kwargs)
        clock.update_s += time.perf_counter() - began
        return states

    def timed_write(self: GrowingView, first_token: int, states: torch.Tensor) -> None:
        began = time.perf_counter()
        write(self, first_token, states)
        clock.copy_s += time.perf_counter() - began

    cache.update = timed_update
    GrowingView.write = timed_write  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        del cache.update
        GrowingView.write = write  # type: ignore[method-assign]
