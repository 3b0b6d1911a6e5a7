"""One good case and one that hangs for ever, for the test that kills the runner itself."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.cases import Case
from benchmarks.gpu.plan import Plan
from tests.gpu_suite_plants import _good, _hang


def cases(plan: Plan) -> Sequence[Case]:
    return [Case("good", _good), Case("hang", _hang, timeout_s=600)]
