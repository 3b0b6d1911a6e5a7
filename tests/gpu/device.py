"""What the tests in this folder need, and why they are skipped where it is missing."""

from __future__ import annotations

import importlib.util

import pytest
import torch


def _has_bindings() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ImportError:  # there is no package `cuda` to look into
        return False


def _missing() -> str | None:
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if not _has_bindings():
        return "cuda-python's bindings are not installed"
    return None


_REASON = _missing()
NEEDS_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
    # Elsewhere a warning is an error. Here it may come from a build of torch that nobody has seen.
    pytest.mark.filterwarnings("default"),
]
"""For `pytestmark`."""
