"""Linear layers with their weights in the order in which oneDNN's loops read them. For CPUs.

torch multiplies float32 matrices with MKL, which rearranges a weight on every call and, on some makes of CPU, does not
use their widest instructions. oneDNN, which torch also carries, takes weights that were rearranged once. Measured on an
AMD EPYC, one thread, SmolLM2-135M's shapes: 2.3 to 4 times as fast in float32, 1.1 to 2 times in bfloat16.

Guarantees: same mathematics, another order of additions. The model's own code runs as it is; of its modules, those of
exactly `torch.nn.Linear` are exchanged for ones that share their parameters, until `undo`.
Costs: a second copy of the weights. Where the first one is mapped from a file, as `vmem_kv.models.load` leaves it, the
system can drop that. And up to 12 % more rows than there are: oneDNN makes and keeps a program for every number of rows
that it meets, so it meets few. (Measured for SmolLM2-135M's four shapes: 2.4 MiB a number of rows.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_DTYPES = (torch.float32, torch.bfloat16)
_TYPICAL_ROWS = 32
"""oneDNN chooses the order for so many rows; it is as good for all others but a single one's (measured)."""


class PackedLinear(torch.nn.Linear):
    """A `Linear` that computes with a rearranged copy of its weight. Made by `pack`."""

    _packed: torch.Tensor

    @classmethod
    def of(cls, linear: torch.nn.Linear) -> PackedLinear:
        """Return a twin that shares everything with `linear`."""
        twin = cls.__new__(cls)
        twin.__dict__.update(linear.__dict__)
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TYPICAL_ROWS)
        twin.__dict__["_packed"] = packed  # no buffer: nobody may move or save it
        return twin

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name that torch gave it
        n_rows = input.numel() // input.shape[-1]
        n_padded = _rounded_up(n_rows)
        if n_padded == n_rows:
            return self._multiply(input)
        rows = torch.nn.functional.pad(input.reshape(n_rows, -1), (0, 0, 0, n_padded - n_rows))
        return self._multiply(rows)[:n_rows].view(*input.shape[:-1], -1)

    def _multiply(self, states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, self._packed, self.bias, "none", [], "")
        return output


def is_available() -> bool:
    """Whether this torch has what is needed."""
    return bool(torch.backends.mkldnn.is_available()) and all(  # type: ignore[no-untyped-call]
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def pack(model: torch.nn.Module) -> Callable[[], None]:
    """Exchange the linear layers of a model on a CPU; return what puts the first ones back."""
    exchanged: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    twins: dict[int, PackedLinear] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves out the second place of one
            if type(child) is torch.nn.Linear and _can_be_packed(child):
                if id(child) not in twins:
                    twins[id(child)] = PackedLinear.of(child)
                exchanged.append((parent, name, child))
    for parent, name, child in exchanged:
        setattr(parent, name, twins[id(child)])

    def undo() -> None:
        while exchanged:
            parent, name, child = exchanged.pop()
            setattr(parent, name, child)

    return undo


def _rounded_up(n_rows: int) -> int:
    """Return the number of rows to compute: the same one up to 16, beyond it one of 8 in every doubling.

    Time grows with every row (measured: at 20 rows by 5 %), and copying costs as well; so small batches that only
    decode stay as they are.
    """
    if n_rows <= 16:
        return n_rows
    step = 1 << ((n_rows - 1).bit_length() - 4)
    return -(-n_rows // step) * step


def _can_be_packed(linear: torch.nn.Linear) -> bool:
    weight: Any = linear.weight
    hooks = (linear._forward_hooks, linear._forward_pre_hooks)
    return weight.device.type == "cpu" and weight.dtype in _DTYPES and not any(hooks)
