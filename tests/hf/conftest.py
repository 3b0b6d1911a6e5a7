"""Settings that every test in this folder needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

from vmem_kv import VmemCache
from vmem_kv.errors import UsageError

from .architectures import ARCHITECTURES, Architecture


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    # One thread: tiny models gain nothing from more, and on a busy machine more is many times slower.
    n_threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(n_threads)
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture
def new_cache() -> Iterator[Callable[..., VmemCache]]:
    """Make a `VmemCache` that is closed after the test, whatever the test did to it."""
    caches: list[VmemCache] = []

    def make(config: Any, **options: Any) -> VmemCache:
        caches.append(VmemCache(config, **options))
        return caches[-1]

    yield make
    for cache in caches:
        with contextlib.suppress(UsageError):  # the traceback of a failed test keeps views alive
            cache.close()
