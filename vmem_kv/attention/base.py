"""The contract of attention over slots: what is asked for, who can do it here, and how it is called.

    kernel = choose("auto", spec, device)                      once: a Kernel bound to an AttentionSpec
    batch = RaggedBatch.build(...)                             once a step, see vmem_kv/attention/batch.py
    output = kernel(query, kv, batch)                          once a layer

Guarantees
  * Binding refuses what a kernel lacks, with a ConfigError that names it. A bound kernel never leaves anything out.
  * A kernel loads only rows `[start, start + length)` of each sequence, and up to `slack_tokens` rows behind them.

Assumes: the K and V of this step's tokens are written before the call. Where `slack_tokens` is not 0, the caller maps
`tokens_to_map(n_tokens, span_tokens)` tokens of each slot instead of `n_tokens`, and makes the rows behind the last
token finite before the first call (new pages hold anything, and zero times NaN is NaN). `choose` takes such a kernel
only where it is told how much slack there will be.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.errors import ConfigError, UsageError
from vmem_kv.tensors import SlotKV

Attend = Callable[[torch.Tensor, SlotKV, RaggedBatch, torch.Tensor | None], torch.Tensor]
"""What a kernel does with a call that is known to fit its spec: (query, kv, batch, sinks) to the output."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one kind of attention layer asks for.

    Raises:
        ConfigError: The numbers contradict each other.
    """

    n_q_heads: int
    n_kv_heads: int  # divides n_q_heads; query heads h * n_q_heads / n_kv_heads and on share K/V head h
    head_dim: int  # of queries and keys
    value_dim: int
    dtype: torch.dtype  # of queries, keys, values and output
    scale: float  # factor on the scores; finite, above 0
    window: int | None = None  # how many keys a query sees, its own included; None: all up to its own
    softcap: float | None = None  # scores become softcap * tanh(score / softcap); finite, above 0
    has_sinks: bool = False  # each query head has one more score, which takes weight and gives no value
    is_causal: bool = True  # False: every query sees all keys of its sequence

    def __post_init__(self) -> None:
        for name in ("n_q_heads", "n_kv_heads", "head_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_q_heads % self.n_kv_heads:
            raise ConfigError(f"{self.n_q_heads} query heads cannot be shared out among {self.n_kv_heads} K/V heads")
        if self.window is not None and (self.window < 1 or not self.is_causal):
            raise ConfigError(f"a window is at least 1 token and causal; got {self.window}, is_causal={self.is_causal}")
        if not 0 < self.scale < math.inf:
            raise ConfigError(f"scale is {self.scale}; it must be finite and above 0")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ConfigError(f"softcap is {self.softcap}; it must be finite and above 0, or None for no soft capping")

    @property
    def n_groups(self) -> int:
        """Return how many query heads share a K/V head."""
        return self.n_q_heads // self.n_kv_heads


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a kernel can run on a device, and why, in words for the user."""

    is_available: bool
    why: str


class BoundKernel:
    """A kernel for one spec on one device. Made by `Kernel.bind`.

    Attributes:
        name: The kernel's name.
        spec: What it was bound to.
        device: Where its tensors live.
        slack_tokens: How many rows behind a sequence's last one it may load. They must be mapped and finite. It never
            loads rows of another slot, so less is needed where a sequence ends near the end of its slot.
        alignment_bytes: What K's, V's and the queries' addresses and strides are multiples of.
    """

    def __init__(
        self,
        name: str,
        spec: AttentionSpec,
        device: torch.device,
        attend: Attend,
        *,
        slack_tokens: int = 0,
        alignment_bytes: int = 1,
    ) -> None:
        self.name, self.spec, self.device = name, spec, device
        self.slack_tokens, self.alignment_bytes = slack_tokens, alignment_bytes
        self._attend = attend

    def tokens_to_map(self, n_tokens: int, span_tokens: int) -> int:
        """Return how many tokens of a slot to map, so that all that the kernel loads of a sequence is mapped.

        Mapping is half of it: the rows behind the sequence must be finite too, so fill them before the first call,
        with zeros for example.

        Args:
            n_tokens: From the slot's base to the end of the sequence, this step's tokens included. 0 needs nothing.
            span_tokens: Rows of one slot.

        Raises:
            UsageError: That many tokens do not fit into a slot.
        """
        if not 0 <= n_tokens <= span_tokens:
            raise UsageError(f"{n_tokens} tokens do not fit into a slot of {span_tokens}")
        return min(n_tokens + self.slack_tokens, span_tokens) if n_tokens else 0

    def __call__(
        self, query: torch.Tensor, kv: SlotKV, batch: RaggedBatch, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from the new tokens of every sequence to all its tokens.

        Args:
            query: `[n_tokens, n_q_heads, head_dim]`, the sequences' new tokens one after another; last stride 1.
            kv: One layer's K and V over all slots.
            batch: Where the sequences are.
            sinks: `[n_q_heads]`, the sinks' scores; given exactly where the spec has sinks.

        Returns:
            `[n_tokens, n_q_heads, value_dim]`.

        Raises:
            UsageError: An argument does not fit the spec, the batch or the device, or it is not aligned as the kernel
                needs it. Nothing was launched.
        """
        self._check(query, kv, batch, sinks)
        if not batch.n_seqs:
            return query.new_empty(0, self.spec.n_q_heads, self.spec.value_dim)
        return self._attend(query, kv, batch, sinks)

    def __repr__(self) -> str:
        return f"BoundKernel({self.name!r}, {self.spec}, device={str(self.device)!r}, slack_tokens={self.slack_tokens})"

    def _check(self, query: torch.Tensor, kv: SlotKV, batch: RaggedBatch, sinks: torch.Tensor | None) -> None:
        spec = self.spec
        _check_tensor("query", query, (batch.n_tokens, spec.n_q_heads, spec.head_dim), spec.dtype, self.device)
        _check_tensor("keys", kv.keys, (batch.n_rows, spec.n_kv_heads, spec.head_dim), spec.dtype, self.device)
        _check_tensor("values", kv.values, (batch.n_rows, spec.n_kv_heads, spec.value_dim), spec.dtype, self.device)
        if self.alignment_bytes > 1:
            for name, tensor in (("query", query), ("keys", kv.keys), ("values", kv.values)):
                _check_alignment(name, tensor, self.alignment_bytes)
        if kv.span_tokens != batch.span_tokens:
            raise UsageError(f"K/V slots span {kv.span_tokens} tokens, the batch was built for {batch.span_tokens}")
        if batch.device != self.device:
            raise UsageError(f"the batch is on {batch.device}, the kernel was bound to {self.device}")
        if (sinks is not None) != spec.has_sinks:
            raise UsageError(f"sinks were {'not ' if sinks is None else ''}given; the spec says {spec.has_sinks=}")
        if sinks is not None and (tuple(sinks.shape) != (spec.n_q_heads,) or sinks.device != self.device):
            raise UsageError(
                f"sinks are {tuple(sinks.shape)} on {sinks.device}; expected ({spec.n_q_heads},) on {self.device}"
            )


class Kernel(ABC):
    """One way to attend, before it is known to what. Stateless but for the operators it was given."""

    name: ClassVar[str]
    has_slack: ClassVar[bool] = False  # whether there are specs for which slack_tokens is not 0
    alignment_bytes: ClassVar[int] = 1  # what addresses and strides must be multiples of

    @abstractmethod
    def availability(self, device: torch.device) -> Availability:
        """Say whether this kernel can run on `device`, and why. Raises nothing."""

    @abstractmethod
    def lacks(self, spec: AttentionSpec) -> str:
        """Say what of `spec` this kernel cannot do, or return an empty text."""

    @abstractmethod
    def slack_tokens(self, spec: AttentionSpec) -> int:
        """Return how many rows behind a sequence's last one the kernel may load: to be mapped and made finite."""

    @abstractmethod
    def build(self, spec: AttentionSpec) -> Attend:
        """Return what does the work, for a spec of which nothing is lacking, on a device that will do."""

    def bind(self, spec: AttentionSpec, device: torch.device | str) -> BoundKernel:
        """Return this kernel for `spec` on `device`.

        Raises:
            ConfigError: It cannot run there, or it lacks something that the spec asks for. The message says what.
        """
        where = resolve_device(device)
        availability = self.availability(where)
        if not availability.is_available:
            raise ConfigError(f"attention kernel {self.name!r} cannot run on {where}: {availability.why}")
        lack = self.lacks(spec)
        if lack:
            raise ConfigError(f"attention kernel {self.name!r} has no {lack}")
        return BoundKernel(
            self.name,
            spec,
            where,
            self.build(spec),
            slack_tokens=self.slack_tokens(spec),
            alignment_bytes=self.alignment_bytes,
        )


def resolve_device(device: torch.device | str) -> torch.device:
    """Return `device` with its number, as tensors carry it."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape:
        raise UsageError(f"{name} are {tuple(tensor.shape)}; spec and batch say {shape}")
    if tensor.dtype != dtype or tensor.device != device:
        raise UsageError(f"{name} are {tensor.dtype} on {tensor.device}; the kernel was bound to {dtype} on {device}")
    if tensor.stride(-1) != 1:
        raise UsageError(f"{name} have last stride {tensor.stride(-1)}; it must be 1")


def _check_alignment(name: str, tensor: torch.Tensor, n_bytes: int) -> None:
    """Refuse what on hardware would end in an error that no later call recovers from."""
    if tensor.data_ptr() % n_bytes or any(s * tensor.itemsize % n_bytes for s in tensor.stride()[:-1]):
        raise UsageError(
            f"{name} lie at {tensor.data_ptr():#x} with strides of {[s * tensor.itemsize for s in tensor.stride()]}"
            f" bytes; address and strides but the last must be multiples of {n_bytes} bytes"
        )
