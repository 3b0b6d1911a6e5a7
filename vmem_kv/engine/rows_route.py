"""The rows route: any decoder of transformers, through its Cache interface alone.

For models that do not support the attention interface: latent attention, layers with recurrent state, attention in
chunks, K/V shared between layers, and whatever comes next. Decoding sequences go in one batch, a row each, padded on
the left as `generate` pads; prompts go one by one. What a layer keeps is seen in a probing pass.

Guarantees: one forward pass for all decoding sequences. Where recurrent state makes chunks of a prompt impossible, a
prompt is computed whole, in the step in which its last chunk is due. A step that failed can be run again: sequences
with recurrent state are then computed anew from their first token.
Costs: K and V are copied for a batch of several sequences, once a layer and step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from vmem_kv.devices import OpenDriver
from vmem_kv.engine.config import EngineConfig
from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.module_state import find_module_state
from vmem_kv.engine.request import Sequence
from vmem_kv.engine.scheduler import Chunk, StepPlan
from vmem_kv.engine.slot_cache import SLOT_LAYERS, STATE_TYPES, STOCK_TYPES, Columns, SlotCache, States
from vmem_kv.errors import ConfigError
from vmem_kv.layout import LayerSpec, TensorSpec
from vmem_kv.tensors import SlotKV

_BOTH_WAYS = (True, "all")
"""Values of `use_bidirectional_attention` with which a token sees later ones, which a chunk of a prompt has not."""


class RowsPass(NamedTuple):
    """One forward pass: tokens `[first, end)` of every sequence, equally many."""

    chunks: tuple[Chunk, ...]
    n_new: int


class RowsRoute:
    """A decoder and slots laid out for it. See `PackedRoute` for the arguments.

    Raises:
        ConfigError: The model cannot run this way; the message says why.
    """

    name = "rows"

    def __init__(self, model: PreTrainedModel, config: EngineConfig, max_tokens: int, open_driver: OpenDriver) -> None:
        self._model = model
        self._device = model.device
        decoder_config = model.config.get_text_config(decoder=True)
        self._types, self._kwargs = get_layer_types_and_kwargs(decoder_config)
        self._require_servable()
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        self._has_states = bool(STATE_TYPES & set(self._types))
        self.can_share = not self._has_states
        layers, dtype = self._probe()
        self.memory = SlotMemory(
            config.cache,
            list(layers.values()),
            dtype,
            self._device,
            n_slots=config.max_num_seqs,
            n_spare_slots=config.n_prefix_slots if self.can_share else 0,
            max_tokens=max_tokens,
            slack_tokens=0,
            premap_tokens=config.premap_tokens,
            needs_rows=True,
            open_driver=open_driver,
        )
        self.window_tokens: int | None = None
        self._kv: dict[int, SlotKV] = {index: self.memory.layer(i) for i, index in enumerate(layers)}
        self._states: dict[Sequence, States] = {}

    def prepare(self, plan: StepPlan) -> list[Chunk]:
        """Nothing is to be prepared for the step as a whole."""
        return list(plan.chunks)

    def run(self, batch: list[Chunk]) -> torch.Tensor:
        """Run one pass for all that decode, and one for each prompt."""
        logits: dict[Chunk, torch.Tensor] = {}
        try:
            with torch.inference_mode():
                for one_pass in self._passes(batch):
                    logits |= zip(one_pass.chunks, self._forward(one_pass), strict=True)
        except BaseException:
            for chunk in batch:  # some states have moved on and some have not
                self.drop(chunk.sequence)
            raise
        rows = [logits[chunk] for chunk in batch if chunk.gives_token]
        return torch.stack(rows) if rows else torch.empty(0, 1, device=self._device)

    def drop(self, sequence: Sequence) -> None:
        self._states.pop(sequence, None)

    def close(self) -> None:
        self._kv = {}
        self._states = {}
        self.memory.close()

    def _passes(self, chunks: list[Chunk]) -> Iterator[RowsPass]:
        together: list[Chunk] = []
        for chunk in chunks:
            if self._has_states and chunk.sequence not in self._states:
                if chunk.gives_token:  # the whole of it, in one pass
                    yield RowsPass((chunk,), chunk.end)
            elif chunk.n_tokens == 1:
                together.append(chunk)
            else:
                yield RowsPass((chunk,), chunk.n_tokens)
        if self._takes_positions:
            groups = [together] if together else []
        else:  # such a model counts columns, so rows must not be padded
            by_length: dict[int, list[Chunk]] = {}
            for chunk in together:
                by_length.setdefault(chunk.end, []).append(chunk)
            groups = list(by_length.values())
        for group in groups:
            yield RowsPass(tuple(group), 1)

    def _forward(self, one_pass: RowsPass) -> torch.Tensor:
        """Return the logits of every sequence's last token, `[n_seqs, vocabulary]`."""
        chunks, n_new = one_pass
        columns = Columns.of([c.slot_id for c in chunks], [c.end for c in chunks], n_new, self._device)
        cache = self._make_cache(columns, [c.sequence for c in chunks])
        tokens = [chunk.sequence.token_ids[chunk.end - n_new : chunk.end] for chunk in chunks]
        arguments: dict[str, Any] = {"attention_mask": columns.is_token}
        if self._takes_positions:
            arguments["position_ids"] = columns.positions
        if self._takes_logits_to_keep:
            arguments["logits_to_keep"] = 1
        output = self._model(
            input_ids=torch.tensor(tokens, device=self._device), past_key_values=cache, use_cache=True, **arguments
        )
        if self._has_states:
            layers = self._state_layers(cache)
            for row, chunk in enumerate(chunks):
                self._states[chunk.sequence] = States(layers, row)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _make_cache(self, columns: Columns, sequences: list[Sequence]) -> SlotCache:
        rows: dict[int, torch.Tensor] = {}
        layers: list[Any] = []
        for index, (name, kwargs) in enumerate(zip(self._types, self._kwargs, strict=True)):
            if name in SLOT_LAYERS:
                kv = self._kv[index]
                if kv.span_tokens not in rows:
                    rows[kv.span_tokens] = columns.rows(kv.span_tokens)
                layer = SLOT_LAYERS[name](**kwargs)
                layer.bind(kv, columns, rows[kv.span_tokens])
                layers.append(layer)
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[name](**kwargs))
        cache = SlotCache(layers)
        known = [self._states[s] for s in sequences if s in self._states]
        if known:
            States.put(known, self._state_layers(cache))
        return cache

    def _state_layers(self, cache: DynamicCache) -> dict[int, Any]:
        return {i: layer for i, layer in enumerate(cache.layers) if self._types[i] in STATE_TYPES}

    def _require_servable(self) -> None:
        name = type(self._model).__name__
        if self._model.config.is_encoder_decoder:
            raise ConfigError(f"{name} cannot be served: it has an encoder")
        if "past_key_values" not in inspect.signature(self._model.forward).parameters:
            raise ConfigError(f"{name} cannot be served: its forward takes no past_key_values")
        unknown = sorted(set(self._types) - set(SLOT_LAYERS) - STOCK_TYPES)
        if unknown:
            raise ConfigError(f"{name} cannot be served: nothing is known of its layers {', '.join(unknown)}")
        if not set(self._types) & set(SLOT_LAYERS):
            raise ConfigError(f"{name} cannot be served: none of its layers keeps keys and values")
        if getattr(self._model.config.get_text_config(decoder=True), "use_bidirectional_attention", None) in _BOTH_WAYS:
            raise ConfigError(f"{name} cannot be served: its attention is not causal (use_bidirectional_attention)")

    def _probe(self) -> tuple[dict[int, LayerSpec], torch.dtype]:
        """Return what each layer keeps of a token, and its dtype."""
        name = type(self._model).__name__
        caches: list[DynamicCache] = []

        def run(tokens: torch.Tensor) -> None:
            caches.append(DynamicCache(config=self._model.config.get_text_config(decoder=True)))
            with torch.no_grad():
                self._model(input_ids=tokens.to(self._device), past_key_values=caches[-1], use_cache=True)

        try:
            states_in_modules = find_module_state(self._model, run)
        except Exception as error:  # whatever a model raises that we know nothing about
            raise ConfigError(f"{name} cannot be served: a pass raised {type(error).__name__}: {error}") from error
        if states_in_modules:
            raise ConfigError(
                f"{name} cannot be served: its modules keep what requests leave ({states_in_modules[0]}), "
                "which the next one would go on with"
            )
        layers: dict[int, LayerSpec] = {}
        dtypes: set[torch.dtype] = set()
        for index, layer in enumerate(caches[0].layers):
            if self._types[index] not in SLOT_LAYERS:
                continue
            if not layer.is_initialized:
                raise ConfigError(f"{name} cannot be served: its layer {index} does not use the cache it is given")
            states = (layer.keys, layer.values)
            layers[index] = LayerSpec(*(TensorSpec(t.shape[1], t.shape[3], t.element_size()) for t in states))
            dtypes |= {t.dtype for t in states}
        if len(dtypes) != 1:
            raise ConfigError(f"{name} cannot be served: its layers keep {sorted(map(str, dtypes))}, not one type")
        return layers, dtypes.pop()
