from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import Running, serving


@pytest.fixture(scope="package")
def running(tiny_model_folder: Path) -> Iterator[Running]:
    """One server for all tests that leave it as they found it."""
    with serving(tiny_model_folder) as server:
        yield server


@pytest.fixture(autouse=True)
def leaves_no_page_in_use(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "running" in request.fixturenames:
        request.getfixturevalue("running").check_idle()
