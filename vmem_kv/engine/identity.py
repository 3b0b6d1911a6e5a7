"""Whose rows a file holds: a name for a model, made from what it computes with.

The name stands in every file that the engine saves, and a file is used by an engine whose model has the same name only.
It is made of the model's class, its configuration, every weight, and the route, since that says what a row is.

Guarantees: where the model lies, and under which path or name it was found, does not matter. One weight that differs in
one bit gives another name.
Costs: every weight is read once. Measured on one core: 0.2 s for 540 MB.
Assumptions: it finds mistakes, not malice: weights are summed up and sampled, not hashed whole, since hashing takes ten
times as long, and of weights on a device more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from vmem_kv.engine.route import Route
from vmem_kv.tiers.files import ModelIdentity

_N_SAMPLES = 64
"""Elements of each weight that are hashed with their places: sums alone do not see an exchange of two rows."""

_CHUNK_ELEMENTS = 1 << 20
"""Summed up at a time: torch makes a copy of them in 8 bytes each."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_NOT_THE_MODEL = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})
"""Of a configuration, what says where it came from. The weights say their type themselves."""


def identify(model: PreTrainedModel, route: Route) -> ModelIdentity:
    """Name a model by what it computes with, and the type of its rows.

    Args:
        model: As the engine runs it.
        route: How.
    """
    configuration = _digest([json.dumps(_plain(model.config.to_dict()), sort_keys=True, default=str).encode()])
    weights = _digest(_facts(model))
    name = f"{type(model).__name__}, configuration {configuration}, weights {weights}, {route.name} route"
    return ModelIdentity(name, str(route.memory.dtype).removeprefix("torch."))


def _plain(value: Any) -> Any:
    """Leave out what does not change the model's computation, in parts of a configuration too."""
    if isinstance(value, dict):
        return {str(key): _plain(member) for key, member in value.items() if key not in _NOT_THE_MODEL}
    return value


def _facts(model: PreTrainedModel) -> Iterator[bytes]:
    """Every weight's name, shape, type, sum and samples."""
    for name, weight in sorted(model.state_dict().items()):
        if isinstance(weight, torch.Tensor):
            yield f"{name} {tuple(weight.shape)} {weight.dtype} {_sum(weight)} {_samples(weight)}\n".encode()


def _sum(weight: torch.Tensor) -> int:
    """The sum of the elements' bits, read as whole numbers: the same in any order and on any device."""
    numbers = _as_numbers(weight)
    starts = range(0, numbers.numel(), _CHUNK_ELEMENTS)
    return sum(int(numbers[start : start + _CHUNK_ELEMENTS].sum(dtype=torch.int64)) for start in starts)


def _samples(weight: torch.Tensor) -> list[int]:
    """The bits of some elements, evenly spread."""
    numbers = _as_numbers(weight)
    n_samples = min(_N_SAMPLES, numbers.numel())
    places = [i * numbers.numel() // n_samples for i in range(n_samples)]
    values: list[int] = numbers[torch.tensor(places, dtype=torch.int64, device=numbers.device)].tolist()
    return values


def _as_numbers(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().contiguous().reshape(-1)
    return flat.view(_BITS.get(flat.element_size(), torch.uint8))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
