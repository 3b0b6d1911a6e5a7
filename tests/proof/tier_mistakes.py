"""Mistakes that a tier could make, each as a patch that plants it: what a proof of the tiers must be seen to find."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.errors import DriverError
from vmem_kv.growth import SlotId
from vmem_kv.tiers.copies import HostCopy, end_of
from vmem_kv.tiers.host import HostTier, Parking, Restoring
from vmem_kv.tiers.moving import Move, Transfer
from vmem_kv.tiers.sessions import Sessions

Mistake = Callable[[pytest.MonkeyPatch], None]


def restores_a_stale_copy(patch: pytest.MonkeyPatch) -> None:
    """A park that takes what the copy holds for what the slot holds, without comparing tokens."""
    patch.setattr("vmem_kv.tiers.host.n_common", lambda one, other: min(len(one), len(other)))


def forgets_the_tail(patch: pytest.MonkeyPatch) -> None:
    """A restore that leaves out the last row."""
    moves = HostTier._moves

    def planted(tier: HostTier, copy: object, cache: object, slot: object, first: int, end: int) -> list[Move]:
        found = moves(tier, copy, cache, slot, first, end)  # type: ignore[arg-type]
        return [*found[:-1], Move(found[-1].address, found[-1].view[:-32])] if found else []

    patch.setattr(HostTier, "_moves", planted)


def loads_without_a_checksum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.tiers.streams.zlib", SimpleNamespace(crc32=lambda *_: 0))


def drops_what_nobody_else_has(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.tiers.host._is_droppable", lambda copy: not copy.is_written and not copy.n_readers)


def uses_frames_of_a_copy_that_stays(patch: pytest.MonkeyPatch) -> None:
    """A park that gives back one frame too many of those that the copy keeps."""
    commit = Parking._commit

    def planted(parking: Parking) -> None:
        commit(parking)
        if len(parking._copy.frames) > 3:
            parking._tier.frames.give(parking._copy.frames[-1:])

    patch.setattr(Parking, "_commit", planted)


def leaves_the_length_of_a_failed_restore(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Restoring, "_give_up", Restoring._settle_if_quiet)


def writes_over_what_is_to_go(patch: pytest.MonkeyPatch) -> None:
    """A park that writes where rows are that the copy has to keep if it fails."""
    patch.setattr(HostTier, "_free_from", lambda tier, copy, extents: end_of(extents, copy.layout))


def moves_everything_again(patch: pytest.MonkeyPatch) -> None:
    """A park that is right and slow: what the copy holds already is moved as well."""
    patch.setattr("vmem_kv.tiers.host.n_common", lambda one, other: 0)


def lets_sessions_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sessions, "poll", lambda sessions, max_sessions=None: 0)


def reads_another_session_from_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("vmem_kv.tiers.disk.DiskTier._find_gap", lambda disk, n_bytes: (len(disk._copies), 0))
    loads_without_a_checksum(patch)


def forgets_the_slot_of_a_resume_that_failed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sessions, "_retire_unwanted", lambda sessions: sessions._unwanted.clear())


def loses_a_session_whose_copy_failed(patch: pytest.MonkeyPatch) -> None:
    """A move down that takes a failure of the driver for a lack of memory."""
    to_host = Sessions._to_host

    def planted(sessions: Sessions, session: object, **keywords: bool) -> bool:
        try:
            return to_host(sessions, session, **keywords)  # type: ignore[arg-type]
        except DriverError:
            sessions._lose(session)  # type: ignore[arg-type]
            return True

    patch.setattr(Sessions, "_to_host", planted)


UNDER_FAULTS = [forgets_the_slot_of_a_resume_that_failed, loses_a_session_whose_copy_failed]

MISTAKES = [
    restores_a_stale_copy,
    forgets_the_tail,
    loads_without_a_checksum,
    drops_what_nobody_else_has,
    uses_frames_of_a_copy_that_stays,
    leaves_the_length_of_a_failed_restore,
    writes_over_what_is_to_go,
    moves_everything_again,
    lets_sessions_stay,
    reads_another_session_from_disk,
    *UNDER_FAULTS,
]
"""Those that random operations find."""


def vacates_before_it_has_read(patch: pytest.MonkeyPatch) -> None:
    """A park that gives the pages back first: whoever comes in between has them."""

    def planted(tier: HostTier, copy: HostCopy, cache: KVCache, slot_id: SlotId, tokens: list[int]) -> None:
        moves = tier._begin(copy, cache, slot_id, tokens, then_vacate=False)
        cache.vacate(slot_id)
        cache.ensure({slot_id: len(tokens)})
        moves.cancel()
        tier.copy_out(copy, cache, slot_id, tokens)
        cache.vacate(slot_id)

    patch.setattr(HostTier, "park", planted)


def does_not_wait(patch: pytest.MonkeyPatch) -> None:
    """A park that gives pages back, and calls rows its own, before the copies have run."""
    patch.setattr(Transfer, "wait", lambda transfer: None)


def cancels_without_waiting(patch: pytest.MonkeyPatch) -> None:
    """A park that gives frames back which a copy may still write."""
    patch.setattr(Transfer, "is_quiet", lambda transfer: True)


def restores_behind_its_back(patch: pytest.MonkeyPatch) -> None:
    """A restore whose copy may be written again at once."""
    patch.setattr(Restoring, "_settle", lambda restoring: None)
    original = HostTier.begin_restore

    def planted(tier: HostTier, *arguments: object, **keywords: object) -> Restoring:
        restoring = original(tier, *arguments, **keywords)  # type: ignore[arg-type]
        restoring._copy.n_readers -= 1
        return restoring

    patch.setattr(HostTier, "begin_restore", planted)
