"""Byte and page arithmetic, in integers only. Pure; knows nothing of the rest of the package."""

from __future__ import annotations

import re

from vmem_kv.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SUFFIXES = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}
_PREFIXES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def ceil_div(numerator: int, denominator: int) -> int:
    """Return the quotient of two non-negative integers, rounded up."""
    return -(-numerator // denominator)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not below ``value``."""
    return ceil_div(value, multiple) * multiple


def is_power_of_two(value: int) -> bool:
    """Whether ``value`` is 1, 2, 4, ..."""
    return value > 0 and value & (value - 1) == 0


def parse_bytes(text: str | int) -> int:
    """Read a number of bytes such as ``4096``, ``"64k"``, ``"1.5GiB"`` (powers of 1024).

    Raises:
        ConfigError: ``text`` is not a non-negative number with an optional unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?\s*", str(text).lower(), re.ASCII)
    if match is None:
        raise ConfigError(f"{text!r} is not a size in bytes; write for example 65536, 64k, 512MiB or 2g")
    whole, _, fraction = match[1].partition(".")
    unit = _SUFFIXES[match[2]]
    return int(whole) * unit + int(int(fraction or 0) * unit // 10 ** len(fraction))


def count(n: int, thing: str) -> str:
    """Return a number of things for a reader, e.g. ``"1 token"``, ``"2 tokens"``."""
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def format_bytes(n_bytes: int) -> str:
    """Return ``n_bytes`` for a reader, e.g. ``"1.50 MiB"``."""
    value = float(n_bytes)
    for prefix in _PREFIXES[:-1]:
        if value < 1024:
            return f"{value:.0f} {prefix}" if prefix == "B" else f"{value:.2f} {prefix}"
        value /= 1024
    return f"{value:.2f} {_PREFIXES[-1]}"
