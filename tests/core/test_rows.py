"""Rows of one layer as growing tensors, without a model: what they hold, what they refuse, what a failure leaves."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch

from vmem_kv.cache import KVCache
from vmem_kv.config import CacheConfig
from vmem_kv.driver.base import Driver, Reservation
from vmem_kv.driver.checked import CheckedDriver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import (
    ConfigError,
    DriverError,
    InvariantError,
    OutOfAddressSpace,
    OutOfPages,
    UsageError,
    VmemError,
)
from vmem_kv.layout import LayerSpec, Layout, TensorSpec
from vmem_kv.pages import BUDGET_SHARE
from vmem_kv.rows import _SHARE_OF_ADDRESSES, LayerRows, RowStore, close_rows
from vmem_kv.testing import Adaptor, FaultyDriver, ManualFence, driver_error, fail_kind

from .backends import open_backend, physical_bytes

PAGE = 4096
CPU = torch.device("cpu")
SPEC = LayerSpec(TensorSpec(2, 16, 4), TensorSpec(3, 32, 4))
"""128 and 384 bytes a token: a page of K is 32 tokens, one of V is 10 and two thirds."""


class Lab:
    """A store over a driver that can fail, under one that checks. `info` is what the driver says of itself instead."""

    def __init__(self, backend: str, info: Mapping[str, object] | None = None, /, **config: object) -> None:
        self.device = open_backend(backend, Ledger())
        self.faulty = FaultyDriver(Adaptor(self.device, replace(self.device.info, **(info or {}))))  # type: ignore[arg-type]
        self.driver = CheckedDriver(self.faulty)
        self.n_opened = 0
        options = {"page_bytes": PAGE, "max_tokens": 64, "max_bytes": 200 * PAGE, "layout": "per_layer"} | config
        self.store = RowStore(CacheConfig(**options), open_driver=self.open)  # type: ignore[arg-type]

    def open(self, device: torch.device, config: CacheConfig) -> Driver:
        self.n_opened += 1
        return self.driver

    def rows(self, n_rows: int = 2, n_tokens: int = 0) -> LayerRows:
        """Rows of so many tokens."""
        rows = self.store.open_rows(SPEC, torch.float32, n_rows, CPU)
        if n_tokens:
            rows.append(*states(n_rows, n_tokens))
        return rows


@pytest.fixture
def lab(backend: str) -> Iterator[Lab]:
    """A lab; in the end nothing may be left."""
    lab = Lab(backend)
    yield lab
    assert lab.store.stats().n_owned_pages == 0
    assert (lab.driver.n_live_mappings, lab.driver.n_live_handles, lab.driver.n_live_reservations) == (0, 0, 0)
    lab.device.close()


def states(n_rows: int, n_tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """Random K and V."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n_rows, s.n_heads, n_tokens, s.head_dim, generator=generator) for s in SPEC]


def same(rows: LayerRows, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(view, want) for view, want in zip(rows.views(), expected, strict=True))


def picked(parts: list[torch.Tensor], indices: list[int]) -> list[torch.Tensor]:
    return [part[indices] for part in parts]


def test_rows_hold_what_was_appended_at_addresses_that_stay(lab: Lab) -> None:
    rows = lab.rows(3)
    first, second = states(3, 20), states(3, 13, seed=1)
    rows.append(*first)
    address = rows.views()[0].data_ptr()
    rows.append(*second)
    assert same(rows, [torch.cat(parts, 2) for parts in zip(first, second, strict=True)])
    assert rows.views()[0].data_ptr() == address
    assert [view.shape[2] for view in rows.views(20)] == [13, 13]
    assert (rows.n_rows, rows.n_tokens, rows.first_token, rows.spec) == (3, 33, 0, SPEC)
    stats = lab.store.stats()
    assert stats.n_live_pages == stats.n_owned_pages == 3 * (2 + 4)
    assert stats.live_bytes == 3 * 33 * 512
    lab.store.check()
    rows.close()
    assert (lab.store.stats().n_owned_pages, lab.store.stats().n_peak_owned_pages) == (0, 18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, v: (k[:1], v[:1]), "holds 2 sequences, the model passes 1"),
        (lambda k, v: (k.to("meta"), v), "the cache is on cpu, the model's K on meta"),
        (lambda k, v: (k, v.double()), "holds torch.float32, the model's V is torch.float64"),
        (lambda k, v: (k, v[:, :2]), "holds 3 heads of 32, the model's V has 2 of 32"),
        (lambda k, v: (k, v[:, :, :1]), "K has 5 new tokens, V has 1"),
    ],
)
def test_states_of_another_shape_are_refused_by_name(lab: Lab, change: object, message: str) -> None:
    rows = lab.rows(2, 5)
    before = [view.clone() for view in rows.views()]
    with pytest.raises(UsageError, match=message):
        rows.append(*change(*states(2, 5)))  # type: ignore[operator]
    assert same(rows, before)
    rows.close()


def test_stopped_rows_start_again_on_the_same_memory(lab: Lab) -> None:
    rows = lab.rows(2, 20)
    n_owned = lab.store.stats().n_owned_pages
    rows.stop()
    assert (rows.n_rows, rows.n_tokens) == (0, 0)
    for call in (rows.views, lambda: rows.append(*states(0, 1))):
        with pytest.raises(UsageError, match="start them first"):
            call()
    rows.start(2)
    rows.append(*states(2, 20, seed=5))
    assert same(rows, states(2, 20, seed=5))
    assert lab.store.stats().n_owned_pages == n_owned
    rows.close()
    with pytest.raises(UsageError, match="the cache is closed"):
        rows.start(2)


def test_rows_that_cannot_be_stopped_go_on(lab: Lab) -> None:
    rows = lab.rows(2, 20)
    with lab.faulty.failing(fail_kind("fence", 1, driver_error())), pytest.raises(DriverError):
        rows.stop()
    assert same(rows, states(2, 20))
    rows.close()


def test_a_window_gives_its_front_back(lab: Lab) -> None:
    rows = lab.rows(2, 60)
    n_live = lab.store.stats().n_live_pages
    rows.slide(40)
    rows.slide(30)  # further back than it is: nothing
    assert rows.first_token == 40
    assert lab.store.stats().n_live_pages == n_live - 2 * (1 + 3)
    assert same(rows, [part[:, :, 40:] for part in states(2, 60)])
    rows.stop()
    rows.start(2)  # on slots without a front nothing could begin
    rows.append(*states(2, 3, seed=7))
    assert same(rows, states(2, 3, seed=7))
    assert lab.store.stats().n_live_pages + lab.store.stats().n_warm_pages == 2 * 2
    rows.close()


@pytest.mark.parametrize("n_tokens", [0, 9, 31, 32, 40])
def test_truncated_rows_go_on(lab: Lab, n_tokens: int) -> None:
    rows = lab.rows(2, 40)
    fork = rows.copy()
    assert rows.n_shared_tokens() > 0
    rows.truncate(n_tokens)
    rows.append(*states(2, 3, seed=8))
    expected = [
        torch.cat([old[:, :, :n_tokens], new], 2) for old, new in zip(states(2, 40), states(2, 3, 8), strict=True)
    ]
    assert same(rows, expected)
    assert same(fork, states(2, 40))
    fork.close()
    rows.truncate(n_tokens)  # shared with nobody now
    assert same(rows, [part[:, :, :n_tokens] for part in expected])
    for wrong in (-1, n_tokens + 1):
        with pytest.raises(UsageError, match="truncate to"):
            rows.truncate(wrong)
    rows.close()


def test_a_truncation_can_be_taken_back(lab: Lab) -> None:
    rows = lab.rows(2, 40)
    fork = rows.copy()
    rows.begin_truncate(3).undo()
    assert same(rows, states(2, 40))
    rows.begin_select(torch.tensor([0, 1])).undo()  # nothing was exchanged
    assert same(rows, states(2, 40))
    close_rows([rows, fork])


@pytest.mark.parametrize("indices", [[0, 1, 2], [1, 0, 1], [2, 2, 2], [2, 1], [1], []])
@pytest.mark.parametrize("n_tokens", [5, 32, 45])
def test_selected_rows_hold_what_those_held(lab: Lab, indices: list[int], n_tokens: int) -> None:
    rows = lab.rows(3, n_tokens)
    rows.select(torch.tensor(indices, dtype=torch.long))
    assert rows.n_rows == len(indices) == len(rows.cache.active_slots())
    if indices:
        expected = picked(states(3, n_tokens), indices)
        assert same(rows, expected)
        more = states(len(indices), 2, seed=3)
        rows.append(*more)
        assert same(rows, [torch.cat(parts, 2) for parts in zip(expected, more, strict=True)])
    lab.store.check()
    rows.close()


@pytest.mark.parametrize("layout", ["per_layer", "per_head"])
@pytest.mark.parametrize("n_tokens", [5, 45])
def test_copied_rows_change_places_among_themselves(lab: Lab, layout: str, n_tokens: int) -> None:
    lab.store = RowStore(replace(lab.store.config, layout=layout), open_driver=lab.open)
    rows = lab.rows(2, n_tokens)
    fork = rows.copy()
    fork.select(torch.tensor([1, 0]))
    assert same(fork, picked(states(2, n_tokens), [1, 0]))
    assert same(rows, states(2, n_tokens))
    close_rows([rows, fork])


def test_rows_that_are_not_there_are_not_selected(lab: Lab) -> None:
    rows = lab.rows(2, 5)
    for indices, message in (([2, 0], "of a batch of 2"), ([-1], "of a batch of 2"), ([0, 1, 0], "copy them")):
        with pytest.raises(UsageError, match=message):
            rows.select(torch.tensor(indices))
    with pytest.raises(UsageError, match="of a batch of 2"):
        rows.copy(torch.tensor([2]))
    assert same(rows, states(2, 5))
    rows.close()


@pytest.mark.parametrize("n_tokens", [0, 9, 45])
def test_copies_share_full_pages_and_go_their_own_way(lab: Lab, n_tokens: int) -> None:
    rows = lab.rows(2, n_tokens)
    new = rows.copy(torch.tensor([1, 0, 1]))
    assert lab.store.stats().n_saved_pages == 3 * sum(n_tokens * row // PAGE for row in (128, 384))
    more = states(3, 4, seed=2)
    new.append(*more)
    parts = zip(picked(states(2, n_tokens), [1, 0, 1]), more, strict=True)
    assert same(new, [torch.cat(pair, 2) for pair in parts])
    assert same(rows, states(2, n_tokens))
    rows.close()
    assert lab.store.stats().n_warm_pages == 0  # nobody needs them, but for those that the copy has too
    assert new.n_rows == 3
    empty = new.copy(torch.tensor([], dtype=torch.long))
    assert empty.n_rows == 0
    close_rows([empty, new])


def test_a_copy_of_more_rows_than_there_are_slots_lies_apart(lab: Lab) -> None:
    rows = lab.rows(2, 12)
    rows.slide(11)
    many = rows.copy(torch.tensor([1, 0] * 15))
    assert many.cache is rows.cache
    assert rows.cache.layout.n_slots == 32
    apart = rows.copy(torch.tensor([1, 1, 0]))
    assert apart.cache is not rows.cache
    assert (apart.first_token, apart.n_tokens) == (11, 12)
    assert same(apart, [part[:, :, 11:] for part in picked(states(2, 12), [1, 1, 0])])
    lab.store.check()
    with lab.faulty.failing(fail_kind("create", 2)), pytest.raises(OutOfPages):
        rows.copy(torch.tensor([1, 1, 0]))
    lab.store.check()
    close_rows([rows, many, apart])


def test_a_copy_that_nobody_can_look_at_is_given_back(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = lab.rows(2, 40)
    before = lab.store.stats()

    def fails(*arguments: object) -> None:
        raise MemoryError("planted")

    monkeypatch.setattr("vmem_kv.rows.RegionTensors", fails)
    for call in (rows.copy, lab.rows):
        with pytest.raises(MemoryError, match="planted"):
            call()
    monkeypatch.undo()
    after = lab.store.stats()
    assert (after.n_live_pages, after.n_saved_pages) == (before.n_live_pages, 0)
    assert same(rows, states(2, 40))
    rows.close()


def test_what_was_given_up_is_waited_for_where_memory_is_short(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a fence stands between what one layer gave up and what another needs."""
    rows, other = lab.rows(1, 32), lab.rows(1)
    assert lab.store._pool is not None
    lab.store._pool.resize(5)
    with pytest.raises(OutOfPages):
        other.append(*states(1, 20))
    fence = ManualFence()
    monkeypatch.setattr(rows.cache, "fence", lambda: fence)
    rows.stop()
    monkeypatch.setattr(fence, "wait", fence.pass_)  # as a kernel that ends while it is waited for
    other.append(*states(1, 20))
    assert same(other, states(1, 20))
    close_rows([rows, other])


def test_nothing_is_closed_under_a_tensor_that_looks_at_it(lab: Lab) -> None:
    first, second = lab.rows(2, 5), lab.rows(2, 6)
    view = second.views()[0]
    with pytest.raises(UsageError, match="still alive"):
        close_rows([first, second])
    assert same(first, states(2, 5))
    assert same(second, states(2, 6))
    first.close()
    with pytest.raises(UsageError, match="still alive"):
        close_rows([first, second])  # what was closed before stays closed
    with pytest.raises(UsageError, match="the cache is closed"):
        first.start(1)
    del view
    close_rows([first, second])
    close_rows([first, second])
    assert lab.store.trim() == 0
    assert not lab.store.settle()


def test_rows_without_tensors_are_closed_by_their_last_one(lab: Lab) -> None:
    rows, kept = lab.rows(2, 5), lab.rows(1, 5)
    view = rows.views()[0]
    del rows
    gc.collect()
    assert lab.store.stats().n_live_pages == 2 * 2 + 2
    del view
    gc.collect()
    assert kept.cache.pool.n_mapped == 2  # at once, not with the next call
    assert lab.store.stats().n_live_pages == 2
    assert copy.deepcopy(lab.store) is lab.store
    kept.close()


def test_memory_that_comes_free_behind_a_failing_unmap_is_given_back_in_the_end(lab: Lab) -> None:
    rows = lab.rows(2, 20)
    fork = rows.copy()
    with lab.faulty.failing(fail_kind("unmap", 1, driver_error())), pytest.raises(DriverError):
        fork.close()
    lab.store.check()
    assert same(rows, states(2, 20))
    fork.close()
    rows.close()


def test_a_close_that_fails_is_tried_again(lab: Lab) -> None:
    rows = lab.rows(2, 20)
    with lab.faulty.failing(fail_kind("unmap", None, driver_error())), pytest.raises(DriverError):
        rows.close()
    assert lab.store.stats().n_quarantined_pages > 0
    rows.close()


def test_whoever_handles_the_error_of_an_append_may_close(lab: Lab) -> None:
    rows = lab.rows(2, 5)
    try:
        with lab.faulty.failing(fail_kind("create", None, driver_error())):
            rows.append(*states(2, 59))
    except VmemError:
        rows.close()  # while the traceback has the frames of the append
    else:
        raise AssertionError("nothing failed")


def test_trim_gives_back_what_nobody_uses(lab: Lab) -> None:
    rows, other = lab.rows(2, 20), lab.rows(1, 20)
    rows.stop()
    assert lab.store.trim() == 2 * (1 + 2)
    assert lab.store.trim() == 0
    assert same(other, states(1, 20))
    close_rows([rows, other])


def test_one_driver_is_opened_and_closed_with_the_last_rows(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(lab.driver, "close", lambda: closed.append(True))
    first = lab.rows(2)
    second = lab.rows(3)
    assert lab.n_opened == 1
    with pytest.raises(ConfigError, match="a layer lies on cuda:0; a cache serves one device"):
        lab.store.open_rows(SPEC, torch.float32, 1, torch.device("cuda", 0))
    lab.store.require_owner()
    first.close()
    assert not closed
    second.close()
    assert closed == [True]
    lab.store.require_owner()
    lab.rows(1).close()
    assert lab.n_opened == 2


def test_in_another_process_nothing_is_done(lab: Lab) -> None:
    rows = lab.rows(2, 5)
    pool = rows.cache.pool
    pid, pool._pid = pool._pid, -1
    for call in (lab.store.require_owner, rows.close, lambda: lab.store.end_lease(rows._lease)):
        with pytest.raises(UsageError, match="belongs to process -1"):
            call()
    pool._pid = pid
    assert same(rows, states(2, 5))
    rows.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_bytes": PAGE - 1}, "less than one page"),
        ({"max_bytes": 1 << 60}, "does not fit"),
        ({"page_bytes": 100}, "multiple"),
    ],
)
def test_a_store_that_cannot_open_closes_its_driver(config: dict[str, object], message: str) -> None:
    lab = Lab("native", **config)
    closed: list[bool] = []
    close = lab.driver.close
    lab.driver.close = lambda: closed.append(True)  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ConfigError, match=message):
        lab.rows()
    assert closed == [True]
    close()


def test_a_store_without_a_budget_takes_what_the_pool_may_promise() -> None:
    lab = Lab("native", max_bytes=None)
    rows = lab.rows(1, 5)
    pool = rows.cache.pool
    assert pool.max_pages == int(pool._available_bytes * BUDGET_SHARE) // PAGE
    assert "GrowingView(shape=(1, 2, 64, 16)" in repr(rows._growing)  # without looking at what is not mapped
    rows.close()


def test_where_addresses_are_scarce_there_are_no_spare_rows(lab: Lab) -> None:
    reserve, asked = lab.faulty.reserve, []

    def only_small(n_bytes: int) -> Reservation:
        asked.append(n_bytes)
        if len(asked) == 1:
            raise OutOfAddressSpace("planted")
        return reserve(n_bytes)

    lab.faulty.reserve = only_small  # type: ignore[method-assign]
    rows = lab.rows(2, 5)
    lab.faulty.reserve = reserve  # type: ignore[method-assign]
    assert asked[0] == 16 * asked[1]
    assert rows.cache.layout.n_slots == 2
    apart = rows.copy()
    assert apart.cache is not rows.cache
    assert same(apart, states(2, 5))
    close_rows([rows, apart])


@pytest.mark.parametrize(("n_rows", "n_slots"), [(1, 6), (7, 7)])
def test_all_layers_together_leave_most_addresses_alone(n_rows: int, n_slots: int) -> None:
    """Two layers may have six rows each; who asks for more of them gets these, and no spare ones."""
    row_bytes = Layout.build("per_layer", [SPEC], n_slots=1, max_tokens=64, page_bytes=PAGE).virtual_bytes
    lab = Lab("native", {"max_reservation_bytes": _SHARE_OF_ADDRESSES * 2 * 6 * row_bytes})
    lab.store = RowStore(lab.store.config, 2, open_driver=lab.open)
    rows = lab.rows(n_rows)
    assert rows.cache.layout.n_slots == n_slots
    rows.close()


def test_a_large_batch_has_room_for_three_copies_beside_it(lab: Lab) -> None:
    rows = lab.rows(9, 1)
    copies = [rows.copy() for _ in range(4)]
    assert [copy.cache is rows.cache for copy in copies] == [True, True, True, False]
    close_rows([rows, *copies])


def test_a_finalizer_in_the_middle_of_a_call_waits_for_its_end(lab: Lab) -> None:
    kept, doomed = lab.rows(1, 5), [lab.rows(1, 5)]
    with lab.store._entered():
        doomed.clear()
        gc.collect()
        assert kept.cache.pool.n_mapped == 4
    assert kept.cache.pool.n_mapped == 2
    doomed = [lab.rows(1, 5)]
    with kept.cache.pool.lock:
        doomed.clear()
        gc.collect()
    assert kept.cache.pool.n_mapped == 4
    assert lab.store.stats().n_live_pages == 2
    kept.close()


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_the_layout_is_chosen_for_all_layers(lab: Lab, n_layers: int) -> None:
    lab.store = RowStore(lab.store.config, n_layers, open_driver=lab.open)
    rows = lab.rows(2, 5)
    assert lab.store.choice is not None
    assert f": {2 * max(1, n_layers)} planes need" in lab.store.choice.why
    rows.close()


def test_a_store_serves_one_layer_unless_told_otherwise(lab: Lab) -> None:
    rows = lab.rows(2, 5)
    assert lab.store.choice is not None
    assert ": 2 planes need" in lab.store.choice.why
    rows.close()


def test_the_books_of_all_rows_add_up(lab: Lab) -> None:
    """Pages of each state, in two caches, and of somebody else on the same pool."""
    live, other = lab.rows(2, 20), lab.rows(1, 40)
    assert lab.store._pool is not None
    elsewhere = KVCache(lab.store._pool, Layout.build("per_layer", [SPEC], n_slots=1, max_tokens=8, page_bytes=PAGE))
    elsewhere.ensure({elsewhere.acquire(): 8})
    live.stop()
    live.start(1)
    live.append(*states(1, 20))
    fence = ManualFence()
    other.cache.retire(other.cache.active_slots(), fence)
    stats = lab.store.stats()
    assert (stats.n_live_pages, stats.n_warm_pages, stats.n_pending_pages, stats.n_elsewhere_pages) == (3, 3, 6, 2)
    assert stats.n_owned_pages == 14
    fence.pass_()
    elsewhere.retire(elsewhere.active_slots())
    elsewhere.close()
    close_rows([live, other])


def test_spoilt_books_of_some_rows_are_found(lab: Lab) -> None:
    rows, other = lab.rows(2, 20), lab.rows(1, 5)
    lab.store.check()
    capacity = other.cache._slots.capacity
    capacity[other._slots[0]] += 1
    with pytest.raises(InvariantError):
        lab.store.check()
    capacity[other._slots[0]] -= 1
    close_rows([rows, other])


def test_pages_that_a_device_keeps_go_with_a_trim_and_with_the_last_rows() -> None:
    lab = Lab("native", {"keeps_pay": True})
    rows, other = lab.rows(2, 20), lab.rows(1, 20)
    held = physical_bytes(lab.device)
    rows.close()
    assert physical_bytes(lab.device) == held  # kept for whoever needs pages next
    assert lab.store.trim() == 2 * (1 + 2)
    assert physical_bytes(lab.device) == 3 * PAGE
    close, lab.driver.close = lab.driver.close, lambda: None  # type: ignore[method-assign]
    other.close()
    assert physical_bytes(lab.device) == 0  # before the driver goes, and they with it
    assert lab.store.stats().n_owned_pages == 0
    close()


def test_closed_rows_wait_for_the_kernels_that_may_still_read_them(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = lab.rows(2, 20)
    fork = rows.copy()
    for closing, n_left in ((fork, 2 * 3), (rows, 0)):
        fence = ManualFence()
        monkeypatch.setattr(rows.cache, "fence", lambda fence=fence: fence)
        monkeypatch.setattr(fence, "wait", fence.pass_)  # as a kernel that ends while it is waited for
        closing.close()
        assert fence.passed()
        assert lab.store.stats().mapped_bytes == n_left * PAGE


def test_in_another_process_a_copy_is_not_ended(lab: Lab) -> None:
    rows = lab.rows(2, 5)
    fork = rows.copy()
    pool = rows.cache.pool
    pid, pool._pid = pool._pid, -1
    with pytest.raises(UsageError, match="belongs to process -1"):
        lab.store.end_lease(fork._lease)
    pool._pid = pid
    fork.close()
    assert len(rows.cache.active_slots()) == 2
    rows.close()


def test_rows_that_were_closed_beside_a_copy_begin_nothing(lab: Lab) -> None:
    rows = lab.rows(2, 5)
    fork = rows.copy()
    fork.close()
    with pytest.raises(UsageError, match="the cache is closed"):
        fork.start(1)
    assert len(rows.cache.active_slots()) == 2
    rows.close()


def test_rows_start_on_the_memory_that_a_kernel_may_still_read(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for it; else they would take as much again beside it."""
    rows = lab.rows(2, 20)
    fence = ManualFence()
    monkeypatch.setattr(rows.cache, "fence", lambda: fence)
    rows.stop()
    monkeypatch.undo()
    monkeypatch.setattr(fence, "wait", fence.pass_)  # as a kernel that ends while it is waited for
    rows.start(2)
    rows.append(*states(2, 20, seed=5))
    assert lab.store.stats().n_owned_pages == 2 * 3
    rows.close()


def test_a_window_costs_the_rows_behind_it_their_memory_once(lab: Lab) -> None:
    rows = lab.rows(2, 60)
    rows.slide(40)
    rows.stop()
    rows.start(2)
    rows.append(*states(2, 20))
    rows.stop()
    assert lab.store.stats().n_warm_pages == 2 * 3
    rows.start(2)
    rows.append(*states(2, 20))
    assert lab.driver.calls["map"] == 2  # for the window, and for the rows behind it; none for the last
    rows.close()


def test_a_window_that_does_not_move_costs_nothing(lab: Lab) -> None:
    rows = lab.rows(1, 60)
    rows.slide(0)
    rows.stop()
    rows.start(1)
    rows.append(*states(1, 60))
    assert lab.driver.calls["map"] == 1  # the memory is still there
    rows.slide(40)
    assert rows.first_token == 40
    rows.close()


def test_no_rows_share_and_hold_nothing(lab: Lab) -> None:
    rows = lab.rows(2, 40)
    fork = rows.copy()
    rows.stop()
    assert rows.n_shared_tokens() == 0
    rows.truncate(0)
    for call in (rows.truncate, rows.begin_truncate):
        with pytest.raises(UsageError, match=r"truncate to 1 in rows that hold \[0, 0\)"):
            call(1)
    close_rows([rows, fork])
    assert (fork.n_rows, fork.n_tokens, fork.first_token) == (0, 0, 0)
    for of_closed in (fork.copy, lambda: fork.append(*states(2, 1))):
        with pytest.raises(UsageError, match="the cache is closed"):
            of_closed()
