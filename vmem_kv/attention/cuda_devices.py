"""Whether CUDA kernels can run on a device, in words for the user."""

from __future__ import annotations

import importlib.util
import sys

import torch

from vmem_kv.attention.base import Availability


def cuda_availability(
    device: torch.device, least: tuple[int, int], below: tuple[int, int] | None = None
) -> Availability:
    """Say whether `device` is a CUDA device of a compute capability from `least` up to, not including, `below`.

    Raises nothing: a device that torch cannot use is not available, and torch's own words say why.
    """
    if device.type != "cuda":
        return Availability(False, f"it needs a CUDA device, not {device}")
    if torch.version.cuda is None:
        return Availability(False, "this torch was built without CUDA: install a CUDA build of torch")
    if not torch.cuda.is_available():
        return Availability(False, "torch finds no CUDA device: check the driver with nvidia-smi")
    try:
        capability = torch.cuda.get_device_capability(device)
        name, version = torch.cuda.get_device_name(device), "{}.{}".format(*capability)
    except Exception as error:  # no such number, or a driver that fails when torch starts it
        return Availability(False, f"torch cannot use {device}: {error}")
    if capability < least or (below is not None and capability >= below):
        upper = "" if below is None else " and below {}.{}".format(*below)
        return Availability(
            False, f"{name} has compute capability {version}; it needs at least {'{}.{}'.format(*least)}{upper}"
        )
    return Availability(True, f"{name}, compute capability {version}")


def is_installed(module: str) -> bool:
    """Return whether a module of that name can be found, without importing it. Raises nothing."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # a ValueError for a module that somebody put in place by hand; and whatever other finders raise
        return module in sys.modules
