"""Frozen, validated configuration of a cache.

Guarantees: an object of these classes is valid. Nothing here touches the machine: what a machine can hold is
checked where the memory is promised (`pages.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmem_kv.errors import ConfigError

_COUNTS = ("max_tokens", "page_bytes", "max_bytes", "expected_tokens")
_LAYOUT = re.compile(r"auto|per_head|per_layer|token_major|group:[1-9][0-9]*")


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """How a cache uses memory. None stands for: choose for me.

    Attributes:
        max_tokens: Virtual length of one sequence; addresses only, so generous is free.
        page_bytes: Physical memory is mapped in units of this; a multiple of the driver's granularity.
        layout: "auto", or a kind of `vmem_kv.layout`.
        max_bytes: The budget of physical memory.
        expected_tokens: The usual final length; `auto` chooses page size and layout for it.
        host_path: "auto", "native" or "python": how the host driver makes its calls.
        huge_pages: Take host memory from hugetlbfs.

    Raises:
        ConfigError: A value makes no sense; the message names it.
    """

    max_tokens: int | None = None
    page_bytes: int | None = None
    layout: str = "auto"
    max_bytes: int | None = None
    expected_tokens: int | None = None
    host_path: str = "auto"
    huge_pages: bool = False

    def __post_init__(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a positive number")
        if not isinstance(self.layout, str) or not _LAYOUT.fullmatch(self.layout):
            raise ConfigError(f"layout is {self.layout!r}; choose auto, per_head, per_layer, group:N or token_major")
        if self.host_path not in ("auto", "native", "python"):
            raise ConfigError(f"host_path is {self.host_path!r}; choose auto, native or python")
