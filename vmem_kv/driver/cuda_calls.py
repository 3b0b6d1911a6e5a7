"""How CUDA is called: every answer is kept, whatever happens next. Imports nothing of CUDA.

Functions of cuda-python return a tuple, the result code first, and raise nothing of their own but for a code that they
do not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import starmap
from typing import Any

from vmem_kv.driver.cuda_errors import NOT_READY, OUT_OF_MEMORY, SUCCESS


class Batch:
    """The calls of one operation, and what came of them, whatever breaks it off.

    An answer is kept in the same step of the interpreter in which it arrives: Python raises KeyboardInterrupt between
    steps, so `n_done` and `values` are right even then. But cuda-python takes steps of its own between a call that
    returns no value and its answer; if an interruption meets those, `is_unsure` says that the last call, the one behind
    the `n_done` first, took effect or did not.

    Args:
        wait: Waits for the device.
        free_memory: Asks others for their spare memory, once in the life of a batch; returns whether it is worth
            trying again.
    """

    def __init__(self, wait: Callable[[], object], free_memory: Callable[[], bool]) -> None:
        self._wait = wait
        self._free_memory = free_memory
        self._answers: list[Any] = []
        self._n_begun = 0
        self._may_ask_for_memory = True

    @property
    def n_done(self) -> int:
        """Calls that succeeded."""
        return sum(answer[0] == SUCCESS for answer in self._answers)

    @property
    def is_unsure(self) -> bool:
        """Whether the last call's answer was lost."""
        return self._n_begun > len(self._answers)

    @property
    def values(self) -> list[Any]:
        """What the calls that succeeded returned, of those that return one value."""
        return [answer[1] for answer in self._answers if answer[0] == SUCCESS]

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call, and once more where waiting or somebody's spare memory can help; return the result code."""
        code = self._call(function, *arguments)
        if code == NOT_READY:  # some systems answer so while the device works
            self._wait()
            code = self._call(function, *arguments)
        if code == OUT_OF_MEMORY and self._may_ask_for_memory:
            self._may_ask_for_memory = False
            if self._free_memory():
                code = self._call(function, *arguments)
        return code

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._n_begun += 1
        try:
            self._answers.extend(starmap(function, (arguments,)))
        except ValueError as error:  # from cuda-python, of a code newer than itself
            self._answers.append((UnknownResult(str(error)),))
        return self._answers[-1][0]


class UnknownResult(int):
    """A result code that this cuda-python has no name for."""

    def __new__(cls, text: str) -> UnknownResult:
        """Read the number off cuda-python's complaint."""
        number = re.search(r"\d+", text)
        return super().__new__(cls, number[0] if number else -1)

    @property
    def name(self) -> str:
        """What it is called for want of a name."""
        return f"CUDA_ERROR_{int(self)}"
