"""Frozen, validated configuration of a cache. The environment is read in one place, and only when asked.

Guarantees: an object of these classes is valid. Nothing here touches the machine: what a machine can hold is
checked where the memory is promised (`pages.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vmem_kv.errors import ConfigError
from vmem_kv.units import parse_bytes

_BYTE_FIELDS = ("page_bytes", "max_bytes")
_TOKEN_FIELDS = ("max_tokens", "expected_tokens")
_PREFIX = "VMEM_KV_"


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
        for name in (*_BYTE_FIELDS, *_TOKEN_FIELDS):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a positive number")
        if self.host_path not in ("auto", "native", "python"):
            raise ConfigError(f"host_path is {self.host_path!r}; choose auto, native or python")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> CacheConfig:
        """Read `VMEM_KV_MAX_TOKENS`, `VMEM_KV_PAGE_BYTES`, ... (one per attribute); `overrides` win over them.

        Raises:
            ConfigError: A variable has no attribute or its value does not fit.
        """
        environ = os.environ if environ is None else environ
        names = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for variable in (v for v in environ if v.startswith(_PREFIX)):
            name, text = variable.removeprefix(_PREFIX).lower(), environ[variable]
            if name not in names:
                raise ConfigError(f"{variable} is not a setting; there are {', '.join(sorted(names))}")
            if name in _BYTE_FIELDS:
                values[name] = parse_bytes(text)
            elif name in _TOKEN_FIELDS:
                if not text.isdigit():
                    raise ConfigError(f"{variable} is {text!r}; it must be a number of tokens")
                values[name] = int(text)
            elif name == "huge_pages":
                if text.lower() not in ("0", "1", "false", "true"):
                    raise ConfigError(f"{variable} is {text!r}; write 1 or 0")
                values[name] = text.lower() in ("1", "true")
            else:
                values[name] = text
        return cls(**{**values, **overrides})
