"""Fixtures of the core tests. The allocator runs on both ways of the host driver and on CUDA's emulated device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest

from vmem_kv.driver.host import HostDriver
from vmem_kv.testing.emulator import load_emulator

from .backends import BACKENDS, require_native
from .bench import PAGE, Bench, OpenBench


@pytest.fixture(params=["native", "python"])
def path(request: pytest.FixtureRequest) -> str:
    """Both ways of the host driver. A missing native part is a failure where it could have been built."""
    require_native(request.param)
    return str(request.param)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every driver that the allocator is tested on; on the emulated device no test may break one of its rules.

    What a test leaves there (a cache with spoilt books cannot be closed) goes before the next one begins.
    """
    yield str(request.param)
    if request.param == "cuda":
        device = load_emulator()
        violations = device.violations()
        device.reset(force=True)
        device.set_granularity(PAGE)
        assert violations == []


@pytest.fixture
def open_bench(backend: str) -> OpenBench:
    """Open benches on one backend."""
    return functools.partial(Bench, backend=backend)


@pytest.fixture
def open_host(path: str) -> Iterator[Callable[[], HostDriver]]:
    """Open host drivers on one path; all memory must be given back at the end."""
    opened: list[HostDriver] = []

    def open_one() -> HostDriver:
        opened.append(HostDriver(path))
        return opened[-1]

    yield open_one
    for driver in opened:
        driver.close()
