"""Shorten a list of operations that goes wrong to one that still does, by leaving out more and more of it.

Guarantees: the result fails in the same way as the whole list did: with an error of the same type, raised in the same
place. No part of a tried size can be left out of it, unless the number of attempts ran out.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

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


class Symptom(NamedTuple):
    """How something goes wrong, told apart from other ways by type and place. What the message says may differ."""

    kind: type[BaseException]
    places: tuple[str, ...]
    """The two innermost `file:line`: where it was raised, often in a function that raises for many, and for whom."""

    @classmethod
    def of(cls, error: BaseException) -> Symptom:
        """Look at an error that was caught."""
        frames = traceback.extract_tb(error.__traceback__)[-2:]
        return cls(type(error), tuple(f"{frame.filename}:{frame.lineno}" for frame in frames))


def repeat(driver: Driver, settings: dict[str, Any], operations: Sequence[Operation], run_type: type[Run] = Run) -> Run:
    """Make a run of a list of operations, without those that do not make sense any more, and finish it.

    Raises:
        Exception: Whatever goes wrong.
    """
    run = run_type(driver, **settings)
    for operation in operations:
        if run.is_possible(operation):
            run.do(operation)
    run.finish()
    return run


def shrink_run(
    open_driver: Callable[[], Driver],
    settings: dict[str, Any],
    operations: Sequence[Operation],
    run_type: type[Run] = Run,
) -> list[Operation]:
    """Return a short list of operations that goes wrong as `operations` do, each attempt on a driver of its own.

    All of them are returned if they do not go wrong again: then what is wrong depends on what was there before.
    """

    def symptom_of(some: Sequence[Operation]) -> Symptom | None:
        driver = open_driver()
        try:
            repeat(driver, settings, some, run_type)
        except Exception as error:
            return Symptom.of(error)  # what it left behind goes with the process
        driver.close()
        return None

    symptom = symptom_of(operations)
    return list(operations) if symptom is None else shrink(operations, lambda some: symptom_of(some) == symptom)
