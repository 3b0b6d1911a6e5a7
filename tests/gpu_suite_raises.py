"""Nothing but the same error: a part that is given up."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.cases import Case
from benchmarks.gpu.plan import Plan
from tests.gpu_suite_plants import _raise


def cases(plan: Plan) -> Sequence[Case]:
    return [Case(f"raise {index}", _raise, table="bad") for index in range(8)]
