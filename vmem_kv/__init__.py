"""KV caches that are contiguous in virtual memory, with physical pages mapped as the tokens arrive.

Importing this package loads none of torch, cuda or transformers: the names below are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmem_kv.cache import KVCache as KVCache
    from vmem_kv.devices import open_driver as open_driver
    from vmem_kv.driver.host import HostDriver as HostDriver
    from vmem_kv.engine.beams import BeamParams as BeamParams
    from vmem_kv.engine.llm import LLM as LLM
    from vmem_kv.engine.sampling_params import SamplingParams as SamplingParams
    from vmem_kv.integrations.hf import VmemCache as VmemCache
    from vmem_kv.layout import LayerSpec as LayerSpec
    from vmem_kv.layout import Layout as Layout
    from vmem_kv.pages import PagePool as PagePool

__version__ = "0.1.0"

_HOMES = {
    "BeamParams": "vmem_kv.engine.beams",
    "HostDriver": "vmem_kv.driver.host",
    "KVCache": "vmem_kv.cache",
    "LLM": "vmem_kv.engine.llm",
    "LayerSpec": "vmem_kv.layout",
    "Layout": "vmem_kv.layout",
    "PagePool": "vmem_kv.pages",
    "SamplingParams": "vmem_kv.engine.sampling_params",
    "VmemCache": "vmem_kv.integrations.hf",
    "open_driver": "vmem_kv.devices",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vmem_kv' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
