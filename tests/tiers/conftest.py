"""Fixtures of the tests of the tiers: they run on the host driver's native way and on CUDA's emulated device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from vmem_kv.testing.emulator import load_emulator

from ..core.bench import PAGE
from .bench import TierBench

OpenTiers = Callable[..., TierBench]


@pytest.fixture(params=["native", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every driver; on the emulated device no test may break one of its rules."""
    yield str(request.param)
    if request.param == "cuda":
        device = load_emulator()
        violations = device.violations()
        device.reset(force=True)
        device.set_granularity(PAGE)
        assert violations == []


@pytest.fixture
def open_tiers(backend: str) -> Iterator[OpenTiers]:
    """Open benches on one backend; what they hold must go at the end."""
    opened: list[TierBench] = []

    def open_one(kind: str = "per_layer", **keywords: object) -> TierBench:
        opened.append(TierBench(kind, backend=backend, **keywords))
        return opened[-1]

    yield open_one
    for bench in opened:
        bench.end()
