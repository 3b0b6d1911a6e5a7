"""Whether new requests are taken on and computed, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmem_kv.engine.async_engine import AsyncEngine


@dataclass(frozen=True, slots=True)
class Readiness:
    """An answer to /ready.

    Attributes:
        reasons: Why not; empty where it is ready.
        mapper: "alive", "degraded" (memory is mapped synchronously, which is slower), or "off".
    """

    reasons: tuple[str, ...]
    mapper: str

    @property
    def is_ready(self) -> bool:
        """Whether there is nothing against it."""
        return not self.reasons

    def as_data(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "status": "ready" if self.is_ready else "not_ready",
            "reasons": list(self.reasons),
            "mapper": self.mapper,
        }


def readiness(engine: AsyncEngine, silent_s: float) -> Readiness:
    """Ask the engine, without any lock that a step holds.

    Args:
        engine: Whose.
        silent_s: For how long it may show no life.
    """
    health = engine.health()
    reasons = []
    if not health.is_alive:
        reasons.append("the engine has ended")
    elif health.silent_s > silent_s:
        reasons.append("the engine shows no life: a step takes too long")
    if health.is_draining:
        reasons.append("the server is shutting down")
    if engine.engine.memory.n_usable_pages() <= 0:
        reasons.append("no page can be used")
    mapper = {None: "off", True: "alive", False: "degraded"}[health.is_mapper_alive]
    return Readiness(tuple(reasons), mapper)
