"""The packed route: one ragged `[1, n_tokens]` batch a step that mixes prompts and decoding, without padding.

The model runs as it is. Its attention layers call `packed_attention` by transformers' attention registry; what they
need to know about the step travels as the keyword argument `vmem_step`, through the model's own `**kwargs`. No mask is
built: the function is not registered with transformers' masks, which means that it needs none.

What each layer keeps (heads, sizes, window, soft cap, sinks) is not read from configurations, whose fields differ from
model to model: a probing pass of two tokens shows what every layer passes to its attention function.

Guarantees: K and V are written once, into their slots. A model that this route would compute wrongly is refused, with
the reason: layers of other kinds, additive position biases, sparse attention, attention that is not causal.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from vmem_kv.attention.base import AttentionSpec, BoundKernel
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.attention.choose import choose
from vmem_kv.devices import OpenDriver
from vmem_kv.engine.config import EngineConfig
from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.module_state import find_module_state
from vmem_kv.engine.request import Sequence
from vmem_kv.engine.scheduler import StepPlan
from vmem_kv.errors import ConfigError, UsageError
from vmem_kv.layout import LayerSpec, TensorSpec
from vmem_kv.tensors import SlotKV

NAME = "vmem_kv_packed"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_UNSUPPORTED = {
    "position_bias": "additive position biases",
    "indices": "sparse attention by index",
    "cache": "transformers' paged cache",
}


class AttendsOneLayer(Protocol):
    """What travels to the attention function as `vmem_step`."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Return the output, `[n_tokens, Hq, Dv]`."""


class AttentionCall(NamedTuple):
    """What one layer passes: the step's tokens one after another, and how it wants its scores made."""

    module: torch.nn.Module
    query: torch.Tensor  # [n_tokens, Hq, D]
    keys: torch.Tensor  # [n_tokens, Hkv, D]
    values: torch.Tensor  # [n_tokens, Hkv, Dv]
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    vmem_step: AttendsOneLayer | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention interface asks, for all sequences of a step.

    Raises:
        UsageError: The model was called by somebody else than the engine that it belongs to.
        ConfigError: The model asks for what this route lacks.
    """
    if vmem_step is None:
        raise UsageError("this model belongs to a vmem_kv engine; close that before calling the model yourself")
    for name, what in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ConfigError(f"the packed route has no {what}, which this model needs")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    call = AttentionCall(module, query, key, value, scale, sliding_window, softcap, s_aux)
    return vmem_step.attend(call).unsqueeze(0), None


AttentionInterface.register(NAME, packed_attention)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One attention layer, ready to run."""

    kv: SlotKV
    kernel: BoundKernel


class _Seen(NamedTuple):
    """What the probing pass saw of one layer."""

    layer: LayerSpec
    attention: AttentionSpec


class _Probe:
    """Stands in for a step, and notes what every layer passes."""

    def __init__(self) -> None:
        self.seen: dict[int, _Seen] = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        query, keys, values = call.query, call.keys, call.values
        layer_index = getattr(call.module, "layer_idx", None)
        if not isinstance(layer_index, int) or layer_index in self.seen:
            raise ConfigError(f"its attention layers have no numbers of their own ({layer_index!r} came twice)")
        if not getattr(call.module, "is_causal", True):
            raise ConfigError("its attention is not causal")
        if len(keys) != len(query):
            raise ConfigError(f"layer {layer_index} attends to keys that it did not make")
        attention = AttentionSpec(
            n_q_heads=query.shape[1],
            n_kv_heads=keys.shape[1],
            head_dim=keys.shape[2],
            value_dim=values.shape[2],
            dtype=keys.dtype,
            scale=call.scale,
            window=call.window,
            softcap=call.softcap,
            has_sinks=call.sinks is not None,
        )
        self.seen[layer_index] = _Seen(LayerSpec(_tensor_spec(keys), _tensor_spec(values)), attention)
        return query.new_zeros(*query.shape[:2], values.shape[2])


class PackedStep:
    """One step's numbers, the same for all layers whose slots span equally many rows."""

    def __init__(self, layers: SequenceOf[_Layer], batches: dict[int, RaggedBatch], rows: dict[int, torch.Tensor]):
        self._layers = layers
        self._batches = batches
        self._rows = rows

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Write this step's K and V of one layer in place, and attend to all that the sequences hold."""
        layer = self._layers[cast(int, call.module.layer_idx)]
        rows = (self._rows[layer.kv.span_tokens],)
        layer.kv.keys.index_put_(rows, call.keys)
        layer.kv.values.index_put_(rows, call.values)
        return layer.kernel(call.query, layer.kv, self._batches[layer.kv.span_tokens], call.sinks)


class PackedBatch(NamedTuple):
    """What one forward pass is given."""

    input_ids: torch.Tensor  # [1, n_tokens]
    position_ids: torch.Tensor  # [1, n_tokens]
    last_rows: torch.Tensor  # [n], the tokens whose logits are needed
    step: PackedStep


class PackedRoute:
    """A model that supports transformers' attention interface, and slots laid out for it.

    Args:
        model: In evaluation mode, on one device. Its attention function is ours until `close`.
        config: The engine's.
        max_tokens: The most tokens of a sequence.
        open_driver: Opens the driver for the model's device.

    Raises:
        ConfigError: The model cannot run this way; the message says why. The model is as before.
    """

    name = "packed"

    def __init__(self, model: PreTrainedModel, config: EngineConfig, max_tokens: int, open_driver: OpenDriver) -> None:
        why_not = _refusal(model)
        if why_not:
            raise ConfigError(f"{type(model).__name__} cannot take the packed route: {why_not}")
        self._model = model
        self._stock_attention = model.config._attn_implementation
        self._device = model.device
        model.set_attn_implementation(NAME)
        try:
            seen = self._probe()
            kernels = {spec: choose(config.kernel, spec, self._device) for spec in {s.attention for s in seen}}
            windows = [s.attention.window for s in seen if s.attention.window is not None]
            self.window_tokens = max(windows) if len(windows) == len(seen) else None
            self.can_share = self.window_tokens is None
            self.memory = SlotMemory(
                config.cache,
                [s.layer for s in seen],
                seen[0].attention.dtype,
                self._device,
                n_slots=config.max_num_seqs,
                n_spare_slots=config.n_prefix_slots if self.can_share else 0,
                max_tokens=max_tokens,
                slack_tokens=max(kernel.slack_tokens for kernel in kernels.values()),
                premap_tokens=config.premap_tokens,
                needs_rows=True,
                open_driver=open_driver,
            )
        except BaseException:
            model.set_attn_implementation(self._stock_attention)
            raise
        self._kernels = tuple(kernels[s.attention] for s in seen)
        self._layers = self._look()

    def prepare(self, plan: StepPlan) -> PackedBatch:
        """Bring a plan's numbers to the device."""
        tokens: list[int] = []
        positions: list[int] = []
        starts, last_rows = [0], []
        for sequence, _, first, n_tokens in plan.chunks:
            tokens += sequence.token_ids[first : first + n_tokens]
            positions += range(first, first + n_tokens)
            starts.append(starts[-1] + n_tokens)
            if first + n_tokens == len(sequence.token_ids):
                last_rows.append(starts[-1] - 1)
        numbers = torch.tensor([tokens, positions]).to(self._device)
        n_tokens_each = torch.tensor([chunk.n_tokens for chunk in plan.chunks])
        batches: dict[int, RaggedBatch] = {}
        rows: dict[int, torch.Tensor] = {}
        for layer in self._layers:
            span = layer.kv.span_tokens
            if span not in batches:
                slot_starts = [chunk.slot_id * span for chunk in plan.chunks]
                batches[span] = RaggedBatch.build(
                    starts,
                    slot_starts,
                    [chunk.end for chunk in plan.chunks],
                    span_tokens=span,
                    n_rows=layer.kv.keys.shape[0],
                    device=self._device,
                )
                rows[span] = numbers[1] + torch.tensor(slot_starts).repeat_interleave(n_tokens_each).to(self._device)
        step = PackedStep(self._layers, batches, rows)
        return PackedBatch(
            numbers[:1], numbers[1:], torch.tensor(last_rows, dtype=torch.long, device=self._device), step
        )

    def run(self, batch: PackedBatch) -> torch.Tensor:
        """Run the model once."""
        with torch.inference_mode():
            output = self._model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.last_rows,
                vmem_step=batch.step,
            )
            logits: torch.Tensor = output.logits[0]
        return logits

    def drop(self, sequence: Sequence) -> None:
        """Nothing is kept but K and V."""

    def close(self) -> None:
        if self._layers:
            self._layers = ()
            self._model.set_attn_implementation(self._stock_attention)
        self.memory.close()

    def _probe(self) -> list[_Seen]:
        probes: list[_Probe] = []
        positions = torch.arange(2, device=self._device).unsqueeze(0)

        def run(tokens: torch.Tensor) -> None:
            probes.append(_Probe())
            with torch.no_grad():
                self._model(
                    input_ids=tokens.to(self._device),
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=positions[0, -1:],
                    vmem_step=probes[-1],
                )

        try:
            states_in_modules = find_module_state(self._model, run)
        except ConfigError as error:
            raise ConfigError(f"{type(self._model).__name__} cannot take the packed route: {error}") from error
        except Exception as error:  # whatever a model raises that we know nothing about
            raise ConfigError(
                f"{type(self._model).__name__} cannot take the packed route: a pass without a cache raised "
                f"{type(error).__name__}: {error}"
            ) from error
        if states_in_modules:
            raise ConfigError(
                f"{type(self._model).__name__} cannot take the packed route: its modules keep what requests leave "
                f"({states_in_modules[0]})"
            )
        probe = probes[0]
        if sorted(probe.seen) != list(range(len(probe.seen))) or not probe.seen:
            raise ConfigError(
                f"{type(self._model).__name__} cannot take the packed route: layers {sorted(probe.seen)} attend"
            )
        return [probe.seen[index] for index in sorted(probe.seen)]

    def _look(self) -> tuple[_Layer, ...]:
        return tuple(_Layer(self.memory.layer(index), kernel) for index, kernel in enumerate(self._kernels))


def _refusal(model: PreTrainedModel) -> str:
    """Say why a model cannot take this route, as far as it says so itself; an empty text if nothing speaks against."""
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if not model._supports_attention_backend:
        return "it does not support transformers' attention interface"
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return "its forward has no logits_to_keep"
    layer_types, _ = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    others = sorted(set(layer_types) - _LAYER_TYPES)
    return f"it has layers of other kinds ({', '.join(others)})" if others else ""


def _tensor_spec(states: torch.Tensor) -> TensorSpec:
    return TensorSpec(states.shape[1], states.shape[2], states.element_size())
