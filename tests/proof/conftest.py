"""What the proofs share: the drivers, and `record` for their figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from vmem_kv.driver.base import Driver

from ..figures import Record, recorder
from .drivers import DRIVERS, empty_device, open_driver, physical_bytes

__all__ = ["Record"]


@pytest.fixture(autouse=True)
def _emptied_device() -> Iterator[None]:
    """What a test leaves on the emulated device (a spoilt cache cannot be closed) goes before the next one begins."""
    yield
    assert empty_device() == [], "rules of the device were broken"


@pytest.fixture(params=DRIVERS)
def driver_name(request: pytest.FixtureRequest) -> str:
    """Every driver."""
    return str(request.param)


@pytest.fixture
def driver(driver_name: str) -> Iterator[Driver]:
    """An open driver; all memory must be given back at the end."""
    opened = open_driver(driver_name)
    yield opened
    assert physical_bytes(opened) == 0
    opened.close()


@pytest.fixture
def never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one thread nobody can end what a call waits for: it gives up at once, and nothing may have changed."""
    monkeypatch.setattr("vmem_kv.claims.STALL_TIMEOUT_S", 0)


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Report a figure: its name, the driver, and counts (see tests/figures.py)."""
    return recorder(record_property)
