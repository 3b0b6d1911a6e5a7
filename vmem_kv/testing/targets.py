"""Drivers by name, for commands and for programs that repeat a run."""

from __future__ import annotations

import re

from vmem_kv.driver.base import Driver
from vmem_kv.driver.host import HostDriver
from vmem_kv.errors import ConfigError


def open_driver(name: str = "host") -> Driver:
    """Open the driver called `name`: "host" ("host:native", "host:python", "host:huge" for memory from hugetlbfs), or
    "cuda:0" for a device's number.

    Raises:
        ConfigError: There is no such driver, or it cannot be used here; the message says what is missing.
    """
    match = re.fullmatch(r"(host)(?::(native|python|huge))?|cuda:([0-9]{1,3})", name)
    if match is None:
        raise ConfigError(f"there is no driver {name!r}; choose host, host:native, host:python, host:huge or cuda:N")
    if match[2] == "huge":
        return HostDriver(huge_pages=True)
    if match[1]:
        return HostDriver(match[2] or "auto")
    from vmem_kv.driver.cuda import CudaDriver, NoRuntime  # only where it is wanted

    return CudaDriver(int(match[3]), NoRuntime())
