"""Bring small tables of numbers to a device without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Uploaded(NamedTuple):
    """A table on its device."""

    tensor: torch.Tensor
    pinned: torch.Tensor | None  # where it comes from; to be kept as long as the copy may be under way


def upload(numbers: torch.Tensor, device: torch.device | str) -> Uploaded:
    """Return `numbers`, which are on the host, on `device`.

    To CUDA they go from pinned memory, in order with what is launched on the current stream. A copy from ordinary
    memory would make the host wait until the device has come so far, once a step, and leave the device idle after it.
    """
    if torch.device(device).type != "cuda":
        return Uploaded(numbers.to(device), None)
    pinned = numbers.pin_memory()
    return Uploaded(pinned.to(device, non_blocking=True), pinned)
