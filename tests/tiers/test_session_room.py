"""A session that comes back from disk makes room for itself by moving others, and never by losing itself."""

from __future__ import annotations

import mmap
from pathlib import Path

from vmem_kv.tiers.disk import DiskTier
from vmem_kv.tiers.sessions import Level, Sessions

from .conftest import OpenTiers

TOKENS = [5 * i + 3 for i in range(40)]


def test_a_session_that_is_read_back_is_not_lost_for_the_one_that_gives_way(
    open_tiers: OpenTiers, tmp_path: Path
) -> None:
    """Host memory holds one of the two, and the disk the other one."""
    bench = open_tiers()
    n_bytes = len(TOKENS) * bench.cache.layout.token_bytes
    bench.frames.max_frames = bench.frames.n_frames_for(n_bytes)
    disk = DiskTier(tmp_path, -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    sessions = Sessions(bench.cache, bench.host, disk)
    sessions.retain("one", bench.begin(TOKENS), TOKENS)
    assert sessions.demote("one") is Level.HOST
    assert sessions.demote("one") is Level.DISK
    sessions.retain("two", bench.begin(TOKENS[1:]), TOKENS[1:])
    assert sessions.demote("two") is Level.HOST
    slot_id, tokens = sessions.resume("one")
    assert list(tokens) == TOKENS
    assert bench.holds(slot_id, TOKENS)
    assert sessions.stats().n_gone == 1  # there was room for one of them
    sessions.close()
    bench.cache.retire(slot_id)
    disk.close()
