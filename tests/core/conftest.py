"""Fixtures of the core tests. Everything runs on the native and on the Python path of the host driver."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from vmem_kv.driver.host import HostDriver
from vmem_kv.driver.host_mapper import find_native_library


@pytest.fixture(params=["native", "python"])
def path(request: pytest.FixtureRequest) -> str:
    """Both ways of the host driver. A missing native part is a failure where it could have been built."""
    if request.param == "native":
        try:
            find_native_library()
        except OSError as error:
            if any(shutil.which(name) for name in ("cc", "gcc", "clang")):
                pytest.fail(f"{error}, but a C compiler is here: build it (pip install -e .)")
            pytest.skip("no C compiler: the native part cannot be built here")
    return str(request.param)


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures that tests recorded: how many injection points, how many operations."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "figures":
                terminalreporter.write_line(str(value))
