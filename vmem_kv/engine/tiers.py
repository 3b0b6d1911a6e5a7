"""Where sequences get their slots from, for a model and a configuration: what lies over what is decided here.

                      ParkingSlots    where there is host memory
                      PromptSlots     likewise
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
from vmem_kv.engine.moves import Carriers, Moves
from vmem_kv.engine.parking import ParkingSlots
from vmem_kv.engine.prefixes import POLICIES, PrefixSlots
from vmem_kv.engine.prompt_slots import PromptSlots
from vmem_kv.engine.route import Route
from vmem_kv.engine.session_slots import SessionSlots, stay_of
from vmem_kv.engine.slot_source import FreshSlots, SlotSource
from vmem_kv.errors import ConfigError
from vmem_kv.tiers.disk import DiskTier
from vmem_kv.tiers.host import HostTier
from vmem_kv.tiers.memory import FramePool, PinnedMemory
from vmem_kv.tiers.sessions import Sessions

_LOG = logging.getLogger("vmem_kv")


class Slots(NamedTuple):
    """Where slots come from."""

    source: SlotSource
    sessions: SessionSlots | None  # part of it, for operators; None where no sessions are kept
    prompts: PromptSlots | None  # likewise
    host: HostTier | None  # theirs
    carriers: Carriers | None  # likewise
    moves: Moves  # what is on its way between the tiers


def open_slots(
    route: Route, config: EngineConfig, clock: Callable[[], float], open_carriers: Callable[[Driver], Carriers]
) -> Slots:
    """Return the source of slots for a route.

    Args:
        route: The model's.
        config: The engine's.
        clock: Seconds that never go back, for sessions.
        open_carriers: Begins who makes copies and reads and writes files, where there are tiers.

    Raises:
        ConfigError: The machine cannot hold the tiers, or there can be no file in the folder. Nothing was left behind.
    """
    memory, moves = route.memory, Moves(route.memory.cache)
    if not route.can_share:
        if config.host_bytes:
            _LOG.warning("host_bytes is not used: this model keeps more of a sequence than what is in its slot")
        return Slots(FreshSlots(memory), None, None, None, None, moves)
    slots = _prefix_slots(route, config) if config.prefix_caching else FreshSlots(memory)
    if not config.host_bytes:
        return Slots(slots, None, None, None, None, moves)
    frames = _frames(config.host_bytes, memory.pool.driver)
    carriers = open_carriers(memory.pool.driver)
    try:
        disk = _disk(config, carriers)
    except BaseException:
        carriers.close()
        raise
    host = HostTier(frames, carriers.copies)
    sessions = SessionSlots(
        slots,
        memory,
        Sessions(memory.cache, host, disk, clock),
        host,
        disk,
        moves,
        stay=stay_of(config.session_ttl_s),
        max_pages=_max_cached_pages(route, config),
        max_sessions=config.max_sessions,
        min_tokens=config.prefix_min_tokens,
        clock=clock,
    )
    prompts = PromptSlots(sessions, memory, host, moves, min_tokens=config.prefix_min_tokens)
    parking = ParkingSlots(prompts, sessions, memory, host, moves, carriers, min_tokens=config.prefix_min_tokens)
    return Slots(parking, sessions, prompts, host, carriers, moves)


def _frames(max_bytes: int, driver: Driver) -> FramePool:
    try:
        return FramePool(max_bytes, PinnedMemory(driver))
    except ConfigError as error:
        raise ConfigError(str(error).replace("max_bytes", "host_bytes")) from error


def _disk(config: EngineConfig, carriers: Carriers) -> DiskTier | None:
    if not (config.disk_folder and config.disk_bytes):
        return None
    return DiskTier(config.disk_folder, config.disk_bytes, carriers.files)


def _max_cached_pages(route: Route, config: EngineConfig) -> int:
    return int(route.memory.pool.max_pages * config.prefix_share)


def _prefix_slots(route: Route, config: EngineConfig) -> SlotSource:
    return PrefixSlots(
        route.memory,
        POLICIES[config.prefix_policy](),
        max_pages=_max_cached_pages(route, config),
        min_tokens=config.prefix_min_tokens,
    )
