"""The signatures that the adapters are tested against, held against the packages where these are installed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from tests.attention import signatures

REAL = [
    ("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward", signatures.flash_attn_varlen_forward),
    ("flash_attn.flash_attn_interface", "flash_attn_with_kvcache", signatures.flash_attn_with_kvcache),
    ("fa3_fwd_interface", "flash_attn_with_kvcache", signatures.fa3_with_kvcache),
    ("flash_attn_interface", "flash_attn_with_kvcache", signatures.fa3_with_kvcache),
]


@pytest.mark.parametrize(("module", "name", "ours"), REAL)
def test_a_package_takes_what_the_signature_says(module: str, name: str, ours: Callable[..., Any]) -> None:
    """Later versions may append parameters that have defaults; nothing else may differ."""
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError as error:
        pytest.skip(f"{module} is not installed, or needs a GPU to be imported: {error}")
    real = list(inspect.signature(inspect.unwrap(function)).parameters.values())
    written = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.kind, p.default) for p in real[: len(written)]] == [(p.name, p.kind, p.default) for p in written]
    assert all(p.default is not inspect.Parameter.empty for p in real[len(written) :])
