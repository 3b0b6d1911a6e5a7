"""Finds what a model keeps of a pass in its own modules, where no cache sees it.

Such state belongs to no sequence: the next request would go on in what the last one left. A model that has any cannot
be served to several sequences.

Guarantees: what is made at the first pass and says nothing of the tokens (frequencies of rotary embeddings, tables of
positions) is not taken for state. Tensors that no pass writes are neither copied nor read.
Assumes: state is held in tensors that are attributes or buffers of modules, and depends on the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

_FIRST_TOKENS = (0, 1)
_OTHER_TOKENS = (0, 0)


class _Mark(NamedTuple):
    """A tensor as it was seen. The tensor itself, so that none that is made later has its identity."""

    tensor: torch.Tensor
    version: int | None  # how often it was written; None where torch does not count

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Mark:
        return cls(tensor, None if tensor.is_inference() else tensor._version)

    def is_still(self, other: _Mark | None) -> bool:
        """Whether it is the same tensor, and nobody wrote to it."""
        return other is not None and self.tensor is other.tensor and self.version == other.version is not None


def find_module_state(model: torch.nn.Module, run: Callable[[torch.Tensor], None]) -> list[str]:
    """Return the names of tensors in a model's modules that hold something of the tokens of its last pass.

    Args:
        model: The model.
        run: Runs a pass of tokens `[1, 2]` that has nothing to do with any other one, not in inference mode, in which
            torch does not count who writes. It is called twice.
    """
    before = _held(model)
    run(torch.tensor([_FIRST_TOKENS]))
    first = _held(model)
    written = {name: mark.tensor.clone() for name, mark in first.items() if not mark.is_still(before.get(name))}
    run(torch.tensor([_OTHER_TOKENS]))
    return sorted(
        name
        for name, mark in _held(model).items()
        if (name in written and not _is_equal(mark.tensor, written[name]))
        or (name not in written and not mark.is_still(first.get(name)))
    )


def _held(model: torch.nn.Module) -> dict[str, _Mark]:
    return {
        f"{module_name}.{name}" if module_name else name: _Mark.of(tensor)
        for module_name, module in model.named_modules()
        for name, tensor in (*vars(module).items(), *module.named_buffers(recurse=False))
        if isinstance(tensor, torch.Tensor)
    }


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.device == other.device and torch.equal(one, other)
