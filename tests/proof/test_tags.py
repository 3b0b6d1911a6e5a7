"""Shadow tags on every K and V row at every step, pages that show nothing of a former owner, and both seen to fail."""

from __future__ import annotations

import random

import pytest

from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver
from vmem_kv.errors import ConfigError, OutOfSlots
from vmem_kv.growth import SlotId
from vmem_kv.layout import LayerSpec, Layout, TensorSpec
from vmem_kv.pages import PagePool
from vmem_kv.testing import DriverMemory, HostMemory
from vmem_kv.testing.operations import KINDS, odd_layout
from vmem_kv.testing.poison import PoisonDriver
from vmem_kv.testing.shadow import DriverWords, HostWords, ShadowTags, StaleRow, TagMismatch

from .conftest import Record
from .drivers import open_driver

pytestmark = pytest.mark.timeout(900)  # of a busy machine

N_CHECKS = 10_000_000
N_PAGES = 100_000


def decode(driver: Driver, n_checks: int, seed: int) -> ShadowTags:
    """Decode a changing batch until so many rows were verified: each step, all live rows of all sequences."""
    choose = random.Random(seed)
    page = driver.info.granularity_bytes
    layers = [LayerSpec.uniform(2, 16, 2)] * 8
    layout = Layout.build("per_layer", layers, n_slots=12, max_tokens=512, page_bytes=page)
    cache = KVCache(PagePool(driver, page, 4000, keep_freed=True), layout)
    tags = ShadowTags(layout, HostWords(cache.region.reservation))
    lengths: dict[SlotId, int] = {}
    owners: dict[SlotId, int] = {}
    n_sequences = 0
    while tags.n_checks < n_checks:
        if len(lengths) < 8:
            n_sequences += 1
            slot_id = cache.acquire(expected_tokens=choose.randint(10, 500), domain=str(n_sequences % 3))
            lengths[slot_id], owners[slot_id] = 0, n_sequences
        wanted = {s: min(512, n + (choose.randint(20, 200) if n == 0 else 1)) for s, n in lengths.items()}
        cache.ensure(wanted)
        for slot_id, n_tokens in wanted.items():
            tags.write(slot_id, lengths[slot_id], n_tokens, owners[slot_id])
        lengths = wanted
        for slot_id, n_tokens in wanted.items():
            tags.verify(slot_id, 0, n_tokens)
        for slot_id in [s for s, n in lengths.items() if n == 512 or choose.random() < 0.01]:
            del lengths[slot_id]
            cache.retire(slot_id)
        if choose.random() < 0.05:
            cache.reclaim(choose.randint(1, 100))
    cache.check()
    cache.retire(cache.active_slots())
    cache.close()
    cache.pool.trim()
    return tags


def verify_every_step(driver: Driver, driver_name: str, n_checks: int, seed: int, record: Record) -> None:
    """Decode, and verify all live rows at every step, so many times."""
    tags = decode(driver, n_checks, seed)
    record("shadow tags in a decoding batch", driver_name, K_and_V_rows_verified=tags.n_checks, mismatches=0)


def test_every_live_row_carries_its_tag_at_every_step(driver: Driver, driver_name: str, record: Record) -> None:
    verify_every_step(driver, driver_name, N_CHECKS, 1, record)


def some_tags(driver: Driver) -> tuple[KVCache, ShadowTags, ShadowTags]:
    """Two sequences of 20 tokens, tags as the host and as the driver's copies see them."""
    page = driver.info.granularity_bytes
    cache = KVCache(PagePool(driver, page, 100), odd_layout("per_head", page, n_slots=2))
    reservation = cache.region.reservation
    by_host, by_driver = (
        ShadowTags(cache.layout, w) for w in (HostWords(reservation), DriverWords(driver, reservation))
    )
    cache.ensure({cache.acquire(): 20, cache.acquire(): 20})
    return cache, by_host, by_driver


def close(cache: KVCache) -> None:
    cache.retire(cache.active_slots())
    cache.close()
    cache.pool.trim()


def test_both_ways_to_the_words_see_the_same(driver: Driver) -> None:
    cache, by_host, by_driver = some_tags(driver)
    for first, second in ((by_host, by_driver), (by_driver, by_host)):
        first.write(0, 0, 20, 7)
        second.expect(0, 0, first.identities(0, 20))
        second.verify(0, 3, 20)
    assert by_driver.n_checks == 17 * 4
    by_host.verify(0, 5, 5)
    assert by_host.n_checks == 17 * 4
    close(cache)


def row_of(cache: KVCache, plane_index: int, slot: int, token: int) -> tuple[int, int]:
    """Where a row lies, and how many bytes it has."""
    n_bytes = cache.layout.planes[plane_index].token_bytes
    return cache.layout.starts(cache.region.reservation.base, slot)[plane_index] + token * n_bytes, n_bytes


def test_a_tag_names_its_owner_and_its_generation(driver: Driver) -> None:
    cache, tags, _ = some_tags(driver)
    memory = HostMemory()
    tags.write(0, 0, 20, 7)
    tags.write(1, 0, 20, 8)
    (target, n_bytes), (source, _) = row_of(cache, 0, 0, 3), row_of(cache, 0, 1, 3)
    memory.write(target, memory.read(source, n_bytes))
    with pytest.raises(TagMismatch, match=r"slot 0, token 3, .*sequence 7 position 3 .*found sequence 8 position 3"):
        tags.verify(0, 0, 20)
    tags.write(0, 3, 4, 7)
    place, n_bytes = row_of(cache, 0, 0, 5)
    stale = memory.read(place, n_bytes)
    tags.write(0, 5, 6, 7)
    memory.write(place, stale)
    with pytest.raises(TagMismatch, match=r"token 5, .*layer 0 K head 0 generation 2.*head 0 generation 1"):
        tags.verify(0, 0, 20)
    memory.write(place, bytes(n_bytes))
    with pytest.raises(TagMismatch, match="found zeros"):
        tags.verify(0, 5, 6)
    close(cache)


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_of_a_row_carries_the_tag(kind: str) -> None:
    """Whatever is spoilt, and wherever: a word that is zero, that of another row, or one byte at a row's end."""
    driver, memory, n_spoilt = open_driver("native"), HostMemory(), 0
    page = driver.info.granularity_bytes
    cache = KVCache(PagePool(driver, page, 100), odd_layout(kind, page, n_slots=2))
    tags = ShadowTags(cache.layout, HostWords(cache.region.reservation))
    cache.ensure({cache.acquire(): 9})
    tags.write(0, 0, 9, 7)
    for index in range(len(cache.layout.planes)):
        row, n_bytes = row_of(cache, index, 0, 4)
        spoilt = [(row + i, bytes(8)) for i in range(0, n_bytes, 8)]
        spoilt += [(row + i, memory.read(row - n_bytes + i, 8)) for i in range(0, n_bytes, 8)]
        spoilt.append((row + n_bytes - 1, b"\0"))
        for address, data in spoilt:
            before = memory.read(address, len(data))
            memory.write(address, data)
            with pytest.raises(TagMismatch, match=f"token 4, plane {index}, byte {(address - row) // 8 * 8} "):
                tags.verify(0, 0, 9)
            memory.write(address, before)
            n_spoilt += 1
    assert n_spoilt == 2 * 1200 // 8 + len(cache.layout.planes)
    tags.verify(0, 0, 9)
    close(cache)
    driver.close()


def test_rows_show_zeros_or_their_own_domain_before_they_are_written(driver: Driver) -> None:
    cache, tags, by_driver = some_tags(driver)
    memory = HostMemory()
    for seen in (tags, by_driver):
        seen.adopt(0, "a")
        seen.require_clean(0, 0, 20)
        seen.require_clean(0, 3, 3)
    tags.write(0, 0, 20, 7)
    tags.adopt(0, "a")
    tags.require_clean(0, 0, 20)  # as its domain left it
    place, n_bytes = row_of(cache, 1, 0, 5)
    memory.write(place + 8, bytes(8))  # a page of it may have gone
    tags.require_clean(0, 0, 20)
    tags.write(1, 0, 20, 8)
    memory.write(place, memory.read(row_of(cache, 1, 1, 5)[0], n_bytes))
    with pytest.raises(StaleRow, match=r"slot 0, token 5, plane 1, byte 0 of its row shows old bytes: sequence 8 posi"):
        tags.require_clean(0, 0, 20)
    tags.require_clean(0, 6, 20)
    tags.adopt(0, "b")
    with pytest.raises(StaleRow, match="token 6, plane 0, byte 0 of its row shows old bytes: sequence 7 position 6"):
        tags.require_clean(0, 6, 20)
    close(cache)


def test_rows_that_cannot_carry_a_tag_are_refused() -> None:
    driver = open_driver("native")
    reservation = driver.reserve(1 << 20)
    for spec in (TensorSpec(1, 8, 1), TensorSpec(1, 17, 1), TensorSpec(2, 20, 1)):
        layout = Layout.build("per_layer", [LayerSpec(spec, spec)], n_slots=1, max_tokens=9, page_bytes=4096)
        with pytest.raises(ConfigError, match="head"):
            ShadowTags(layout, HostWords(reservation))


def dirty_and_look(driver: Driver, n_pages: int, seed: int = 5) -> tuple[int, int]:
    """Let domains take turns on few pages, each filling what it gets; return pages looked at, and bytes seen."""
    page = driver.info.granularity_bytes
    choose = random.Random(seed)
    layout = Layout.build(
        "per_layer", [LayerSpec.uniform(1, page // 4, 2)] * 4, n_slots=6, max_tokens=64, page_bytes=page
    )
    pool = PagePool(driver, page, 600, keep_freed=True)
    cache, memory, zeros, dirt = KVCache(pool, layout), HostMemory(), bytes(page), b"\xee" * page
    n_seen = n_dirty = turn = 0
    while n_seen < n_pages:
        turn += 1
        try:
            slot_id = cache.acquire(expected_tokens=choose.randint(1, 64), domain=f"tenant {turn}")
        except OutOfSlots:
            raise AssertionError("every slot was retired") from None
        cache.ensure({slot_id: choose.randint(1, 64)})
        for (first, end), plane in zip(cache.region.table.mapped[slot_id], layout.planes, strict=True):
            start = cache.region.reservation.base + plane.base_bytes + slot_id * plane.span_bytes
            for index in range(first, end):
                n_dirty += memory.read(start + index * page, page) != zeros
                memory.write(start + index * page, dirt)
                n_seen += 1
        cache.retire(slot_id)
        if choose.random() < 0.3:
            cache.reclaim(choose.randint(1, 200))
    close(cache)
    return n_seen, n_dirty


def read_pages_of_others(driver: Driver, driver_name: str, n_pages: int, seed: int, record: Record) -> None:
    """Look at so many pages that were somebody else's or new."""
    n_seen, n_dirty = dirty_and_look(driver, n_pages, seed)
    assert n_dirty == 0
    record("pages that were another tenant's or new", driver_name, pages_read=n_seen, with_old_bytes=n_dirty)


def test_a_page_that_was_anothers_reads_as_zeros(driver: Driver, driver_name: str, record: Record) -> None:
    read_pages_of_others(driver, driver_name, N_PAGES, 5, record)


def test_in_debug_mode_too_where_every_page_out_of_use_is_poisoned(driver_name: str, record: Record) -> None:
    driver = PoisonDriver(open_driver(driver_name), is_zeroing=False)
    n_seen, n_dirty = dirty_and_look(driver, N_PAGES // 10)
    assert n_dirty == 0
    record(
        "the same with every unused page poisoned",
        driver_name,
        pages_read=n_seen,
        with_old_bytes=n_dirty,
        times_poisoned=driver.n_poisoned,
    )
    driver.close()


def test_a_missed_scrub_is_seen(driver_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = open_driver(driver_name)
    monkeypatch.setattr(driver, "scrub", lambda spans: None)
    _, n_dirty = dirty_and_look(driver, 2000)
    assert n_dirty > 0


def test_copies_of_the_driver_and_the_process_see_one_memory(driver: Driver) -> None:
    cache, *_ = some_tags(driver)
    address = cache.region.reservation.base
    HostMemory().write(address, b"here")
    assert DriverMemory(driver).read(address, 4) == b"here"
    close(cache)
