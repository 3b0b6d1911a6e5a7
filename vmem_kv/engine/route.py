"""The contract of a route: how a plan of tokens goes through a model of transformers, unmodified.

    batch = route.prepare(plan)       pages mapped, numbers on the device
    logits = route.run(batch)         one or more forward passes
    route.drop(sequences)             whatever else it kept of ended or preempted sequences

There are two: packed.py, for models that support transformers' attention interface, and rows_route.py for others.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from vmem_kv.engine.memory import SlotMemory
from vmem_kv.engine.request import Sequence
from vmem_kv.engine.scheduler import StepPlan


class Route(Protocol):
    """One way through a model.

    Attributes:
        name: "packed" or "rows".
        memory: The slots, laid out for the model.
        window_tokens: How many of a sequence's last tokens any layer may read; None: all.
        can_share: Whether all that is kept of a sequence is in its slot, from its first token on: then others can begin
            with it.
    """

    name: str
    memory: SlotMemory
    window_tokens: int | None
    can_share: bool

    def prepare(self, plan: StepPlan) -> Any:
        """Build a step's inputs. The plan's pages are mapped."""

    def run(self, batch: Any) -> torch.Tensor:
        """Compute, and return logits `[n, vocabulary]` for the plan's chunks that give a token, in their order.

        Running the same batch twice gives the same result: what was written is written again.
        """

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence that ended or was preempted."""

    def close(self) -> None:
        """Leave the model as it was found, and give the memory back. Idempotent.

        Raises:
            DriverError: As `SlotMemory.close`: calling again tries again.
        """
