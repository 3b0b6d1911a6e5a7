"""Where sequences get their slots from, for a model and a configuration: what lies over what is decided here.

                      ParkingSlots    where there is host memory
                      SessionSlots    likewise
    FreshSlots, or    PrefixSlots     where prefixes are cached

Models that keep more of a sequence than what is in its slot (`Route.can_share`) have `FreshSlots` alone: what they lose
is computed again, and a session's name means nothing to them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from vmem_kv.driver.base import Driver
from vmem_kv.engine.config import EngineConfig
from vmem_kv.engine.parking import ParkingSlots
from vmem_kv.engine.prefixes import POLICIES, PrefixSlots
from vmem_kv.engine.route import Route
from vmem_kv.engine.session_slots import SessionSlots
from vmem_kv.engine.slot_source import FreshSlots, SlotSource
from vmem_kv.errors import ConfigError
from vmem_kv.tiers.disk import DiskTier
from vmem_kv.tiers.host import HostTier
from vmem_kv.tiers.memory import FramePool, PinnedMemory
from vmem_kv.tiers.sessions import Sessions, Stay

_LOG = logging.getLogger("vmem_kv")


class Slots(NamedTuple):
    """Where slots come from."""

    source: SlotSource
    sessions: SessionSlots | None  # part of it, for operators; None where no sessions are kept


def open_slots(route: Route, config: EngineConfig, clock: Callable[[], float]) -> Slots:
    """Return the source of slots for a route.

    Args:
        route: The model's.
        config: The engine's.
        clock: Seconds that never go back, for sessions.

    Raises:
        ConfigError: The machine cannot hold the tiers, or there can be no file in the folder. Nothing was left behind.
    """
    memory = route.memory
    if not route.can_share:
        if config.host_bytes:
            _LOG.warning("host_bytes is not used: this model keeps more of a sequence than what is in its slot")
        return Slots(FreshSlots(memory), None)
    slots = _prefix_slots(route, config) if config.prefix_caching else FreshSlots(memory)
    if not config.host_bytes:
        return Slots(slots, None)
    host = HostTier(_frames(config.host_bytes, memory.pool.driver))
    disk = DiskTier(config.disk_folder, config.disk_bytes) if config.disk_folder and config.disk_bytes else None
    sessions = SessionSlots(
        slots,
        memory,
        Sessions(memory.cache, host, disk, clock),
        disk,
        stay=stay(config.session_ttl_s),
        max_pages=_max_cached_pages(route, config),
        max_sessions=config.max_sessions,
        min_tokens=config.prefix_min_tokens,
        clock=clock,
    )
    return Slots(ParkingSlots(sessions, memory, host, min_tokens=config.prefix_min_tokens), sessions)


def stay(ttl_s: float) -> Stay:
    """How long a session stays where: the cheaper the place, the longer."""
    return Stay(device_s=ttl_s, host_s=10 * ttl_s, disk_s=60 * ttl_s)


def _frames(max_bytes: int, driver: Driver) -> FramePool:
    try:
        return FramePool(max_bytes, PinnedMemory(driver))
    except ConfigError as error:
        raise ConfigError(str(error).replace("max_bytes", "host_bytes")) from error


def _max_cached_pages(route: Route, config: EngineConfig) -> int:
    return int(route.memory.pool.max_pages * config.prefix_share)


def _prefix_slots(route: Route, config: EngineConfig) -> SlotSource:
    return PrefixSlots(
        route.memory,
        POLICIES[config.prefix_policy](),
        max_pages=_max_cached_pages(route, config),
        min_tokens=config.prefix_min_tokens,
    )
