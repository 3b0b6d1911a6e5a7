"""What the engine says of the tiers below the device, and of sessions."""

from __future__ import annotations

from dataclasses import dataclass

from vmem_kv.tiers.host import TierStats
from vmem_kv.tiers.sessions import SessionStats


@dataclass(frozen=True, slots=True)
class TierFigures:
    """One snapshot. Counts are since the engine was opened.

    Attributes:
        host: Host memory, and what was moved to it and back.
        disk_bytes: On disk.
        max_disk_bytes: Its budget; 0 without a tier on disk.
        sessions: How many are where.
        n_session_tokens: Prompt tokens that were not computed, because a session had them.
        n_parked: Times that a running sequence's tokens went to host memory, for want of pages.
        n_restored: Times that one came back from there.
        n_refused: Times that one was to be parked or restored and had to be computed again: for want of host memory,
            or because a copy failed.
        n_moving: What is on its way now: copies between the device and host memory, each of one sequence, and files
            that are written or read.
    """

    host: TierStats
    disk_bytes: int
    max_disk_bytes: int
    sessions: SessionStats
    n_session_tokens: int
    n_parked: int
    n_restored: int
    n_refused: int
    n_moving: int

    @property
    def n_sessions_by_tier(self) -> dict[str, int]:
        """Sessions by where they are; those that a request has now are in use."""
        sessions = self.sessions
        return {
            "in_use": sessions.n_in_use,
            "device": sessions.n_on_device,
            "host": sessions.n_on_host,
            "disk": sessions.n_on_disk,
        }
