"""Addresses as tensors: every layout's rows are where the documentation says, and kernels read nothing behind them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import FrozenInstanceError

import pytest
import torch

from tests.core.backends import BACKENDS, open_backend
from tests.core.bench import MIXED
from tests.core.subprocesses import output_of, run_python
from vmem_kv.cache import KVCache
from vmem_kv.driver.base import Driver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import ConfigError, UsageError
from vmem_kv.layout import LAYOUT_KINDS, LayerSpec, Layout
from vmem_kv.pages import PagePool
from vmem_kv.storage import open_storage, storage_by_dlpack
from vmem_kv.tensors import RegionTensors

PAGE = 4096
CPU = torch.device("cpu")
N_SLOTS, MAX_TOKENS, N_HEADS, HEAD_DIM, N_LAYERS = 3, 50, 3, 16, 4


@pytest.fixture(params=BACKENDS)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    driver = open_backend(request.param, Ledger())
    yield driver
    driver.close()


class Opened:
    """A cache of a few layers, as tensors."""

    def __init__(self, driver: Driver, kind: str, spec: LayerSpec, n_layers: int = N_LAYERS) -> None:
        self.deaths: list[str] = []
        self.pool = PagePool(driver, PAGE, 1000)
        layout = Layout.build(kind, [spec] * n_layers, n_slots=N_SLOTS, max_tokens=MAX_TOKENS, page_bytes=PAGE)
        self.cache = KVCache(self.pool, layout)
        self.tensors = RegionTensors(self.cache, lambda: self.deaths.append("dead"))

    def close(self) -> None:
        assert self.tensors.let_go()
        self.cache.retire(self.cache.active_slots())
        self.cache.settle()
        self.cache.close()
        self.pool.trim()
        assert not self.deaths  # whoever lets go needs not be told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_rows_and_views_show_the_same_tokens(driver: Driver, kind: str, dtype: torch.dtype) -> None:
    opened = Opened(driver, kind, LayerSpec.uniform(N_HEADS, HEAD_DIM, dtype.itemsize))
    cache, layout = opened.cache, opened.cache.layout
    slots = list(cache.acquire_adjacent(N_SLOTS))
    cache.ensure(dict.fromkeys(slots, MAX_TOKENS))
    written = {}
    for layer_index in range(N_LAYERS):
        kv = opened.tensors.layer(layer_index, dtype)
        for strides, rows in ((layout.keys[layer_index], kv.keys), (layout.values[layer_index], kv.values)):
            assert rows.shape == (N_SLOTS * kv.span_tokens, N_HEADS, HEAD_DIM)
            view = opened.tensors.view(strides, slots, dtype)
            states = torch.randn(N_SLOTS, N_HEADS, MAX_TOKENS, HEAD_DIM).to(dtype)
            view.write(0, states)
            written[layer_index, rows is kv.values] = states
    for layer_index in range(N_LAYERS):
        kv = opened.tensors.layer(layer_index, dtype)
        for is_value, rows in ((False, kv.keys), (True, kv.values)):
            for slot_id in slots:
                first = slot_id * kv.span_tokens
                expected = written[layer_index, is_value][slot_id].transpose(0, 1)
                assert torch.equal(rows[first : first + MAX_TOKENS].float(), expected.float())
                rows[first].copy_(rows[first + 1])  # they can be written as well
    del kv, rows, view
    opened.close()


def test_a_layer_whose_slots_differ_in_length_has_no_rows_for_both(driver: Driver) -> None:
    opened = Opened(driver, "per_layer", MIXED[0])
    with pytest.raises(ConfigError, match="token_major"):
        opened.tensors.layer(0, torch.bfloat16)
    opened.close()


def test_a_cache_does_not_close_under_its_tensors(driver: Driver) -> None:
    opened = Opened(driver, "per_layer", LayerSpec.uniform(N_HEADS, HEAD_DIM, 4))
    kv = opened.tensors.layer(0, torch.float32)
    with pytest.raises(UsageError, match="tensors that look into the cache are still alive"):
        opened.cache.close()
    opened.tensors.layer(0, torch.float32)  # nothing changed
    keys = kv.keys[:1]
    del kv
    del opened.tensors
    with pytest.raises(UsageError, match="still alive"):
        opened.cache.close()
    del keys
    opened.cache.close()


def test_tensors_of_a_closed_cache_say_so(driver: Driver) -> None:
    opened = Opened(driver, "per_layer", LayerSpec.uniform(N_HEADS, HEAD_DIM, 4))
    opened.cache.close()  # the object that makes views is no view
    assert opened.tensors.let_go()  # again
    with pytest.raises(UsageError, match="the cache is closed"):
        opened.tensors.layer(0, torch.float32)


def test_what_kernels_get_can_be_printed_and_not_changed(driver: Driver) -> None:
    opened = Opened(driver, "per_layer", LayerSpec.uniform(N_HEADS, HEAD_DIM, 4))
    kv = opened.tensors.layer(0, torch.float32)
    assert repr(kv) == f"SlotKV(n_rows={N_SLOTS * kv.span_tokens}, span_tokens={kv.span_tokens}, dtype=torch.float32)"
    assert kv != opened.tensors.layer(0, torch.float32)  # without looking at what is not mapped
    with pytest.raises(FrozenInstanceError):
        kv.span_tokens = 1  # type: ignore[misc]
    assert not hasattr(kv, "__dict__")
    del kv
    opened.close()


def test_the_last_tensor_that_dies_is_noticed(driver: Driver) -> None:
    opened = Opened(driver, "per_layer", LayerSpec.uniform(N_HEADS, HEAD_DIM, 4))
    (slot_id,) = opened.cache.acquire_adjacent(1)
    opened.cache.ensure({slot_id: 5})
    view = opened.tensors.view(opened.cache.layout.keys[0], [slot_id], torch.float32).cut(0, 5)
    view.zero_()
    slice_of_it = view[0, 1].view(torch.int32)[2:]
    del view
    assert not opened.tensors.let_go()
    assert not opened.deaths
    del opened.tensors  # as when the rows are dropped without closing
    gc.collect()
    assert not opened.deaths
    assert slice_of_it.sum() == 0
    del slice_of_it
    assert opened.deaths == ["dead"]
    opened.cache.retire(slot_id)
    opened.cache.settle()
    opened.cache.close()
    opened.pool.trim()


@pytest.mark.parametrize("make", [open_storage, storage_by_dlpack])
def test_storage_is_the_memory_itself_and_its_death_is_seen(make: object, driver: Driver) -> None:
    opened = Opened(driver, "token_major", LayerSpec.uniform(N_HEADS, HEAD_DIM, 4))
    slots = opened.cache.acquire_adjacent(1)
    opened.cache.ensure({slots[0]: 3})
    reservation = opened.cache.region.reservation
    storage = make(reservation.base, reservation.n_bytes, CPU)  # type: ignore[operator]
    assert (storage.data_ptr(), storage.nbytes()) == (reservation.base, reservation.n_bytes)
    tensor = torch.empty(0, dtype=torch.float32).set_(storage, 0, (8,), (1,))
    tensor.fill_(7)
    opened.tensors.view(opened.cache.layout.keys[0], slots, torch.float32).cut(0, 1).add_(1)
    assert tensor.tolist() == [8.0] * 8
    dead = weakref.ref(storage)
    del storage
    gc.collect()
    assert dead() is not None
    del tensor
    assert dead() is None
    opened.close()


OVER_READ = """
    import torch
    from tests.test_tensors import PAGE, Opened
    from tests.core.backends import open_backend
    from vmem_kv.attention.base import AttentionSpec
    from vmem_kv.attention.batch import RaggedBatch
    from vmem_kv.attention.choose import choose
    from vmem_kv.driver.ledger import Ledger
    from vmem_kv.layout import LayerSpec
    from vmem_kv.tensors import RegionTensors

    n_heads, head_dim = 2, 64
    tokens_a_page = PAGE // (n_heads * head_dim * 4)
    opened = Opened(open_backend({backend!r}, Ledger()), "per_layer", LayerSpec.uniform(n_heads, head_dim, 4), 1)
    slots = list(opened.cache.acquire_adjacent(3))
    lengths = [tokens_a_page, 3 * tokens_a_page, 2 * tokens_a_page]  # each ends where its last page ends
    opened.cache.ensure(dict(zip(slots, lengths)))
    kv = opened.tensors.layer(0, torch.float32)
    for slot_id, length in zip(slots, lengths):
        first = slot_id * kv.span_tokens
        for rows in (kv.keys, kv.values):
            rows[first : first + length] = torch.randn(length, n_heads, head_dim)
    kernel = choose("sdpa", AttentionSpec(4, n_heads, head_dim, head_dim, torch.float32, 0.125), "cpu")
    for n_new in ([1, 1, 1], [0, 5, 1], lengths):
        starts = [0, n_new[0], n_new[0] + n_new[1], sum(n_new)]
        batch = RaggedBatch.build(
            starts, [s * kv.span_tokens for s in slots], [n + {too_many} for n in lengths], span_tokens=kv.span_tokens,
            n_rows=kv.keys.shape[0], device="cpu"
        )
        output = kernel(torch.randn(sum(n_new), 4, head_dim), kv, batch)
        assert output.isfinite().all()
    kept = RegionTensors(opened.cache, lambda: print("called at the process's end, when nobody needs it"))
    print("read nothing behind the last page")
    """


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_reads_nothing_behind_the_last_page(backend: str) -> None:
    assert output_of(OVER_READ.format(backend=backend, too_many=0)) == "read nothing behind the last page"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_read_behind_the_last_page_would_be_a_fault(backend: str) -> None:
    assert run_python(OVER_READ.format(backend=backend, too_many=1)).returncode == -11
