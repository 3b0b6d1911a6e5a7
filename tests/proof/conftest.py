"""What the proofs share: the drivers, and `--long` for the forms that take hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from vmem_kv.driver.base import Driver

from .drivers import DRIVERS, open_driver, physical_bytes

Record = Callable[[str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long forms of the proofs (hours)")


@pytest.fixture
def is_long(request: pytest.FixtureRequest) -> bool:
    """Whether the long forms were asked for."""
    return bool(request.config.getoption("--long", default=False))


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
def record(record_property: Callable[[str, object], None]) -> Record:
    """Report a figure; the summary shows it."""
    return lambda text: record_property("shown", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was shown, how often."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "shown":
                terminalreporter.write_line(str(value))
