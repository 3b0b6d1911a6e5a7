"""Shorten a list of operations that goes wrong to one that still does, by leaving out more and more of it.

Guarantees: the result fails, as the whole list did. No part of a tried size can be left out of it, unless the number of
attempts ran out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vmem_kv.driver.base import Driver
from vmem_kv.testing.operations import Operation, Run

T = TypeVar("T")


def shrink(items: Sequence[T], fails: Callable[[Sequence[T]], bool], max_attempts: int = 500) -> list[T]:
    """Return a short list that fails.

    Args:
        items: A list that fails.
        fails: Tries a list; whether it goes wrong. It must not depend on what was tried before.
        max_attempts: How often to try.
    """
    best, n_attempts = list(items), 0
    n_out = len(best)
    while n_out >= 1:
        first, has_shrunk = 0, False
        while first < len(best) and n_attempts < max_attempts:
            shorter = best[:first] + best[first + n_out :]
            n_attempts += 1
            if fails(shorter):
                best, has_shrunk = shorter, True
            else:
                first += n_out
        if not (has_shrunk and n_out == 1):
            n_out //= 2
    return best


def repeat(driver: Driver, settings: dict[str, Any], operations: Sequence[Operation]) -> Run:
    """Make a run of a list of operations, without those that do not make sense any more, and finish it.

    Raises:
        Exception: Whatever goes wrong.
    """
    run = Run(driver, **settings)
    for operation in operations:
        if run.is_possible(operation):
            run.do(operation)
    run.finish()
    return run


def shrink_run(
    open_driver: Callable[[], Driver], settings: dict[str, Any], operations: Sequence[Operation]
) -> list[Operation]:
    """Return a short list of operations that goes wrong as `operations` do, each attempt on a driver of its own."""

    def fails(some: Sequence[Operation]) -> bool:
        driver = open_driver()
        try:
            repeat(driver, settings, some)
        except Exception:
            return True  # what it left behind goes with the process
        driver.close()
        return False

    return shrink(operations, fails)
