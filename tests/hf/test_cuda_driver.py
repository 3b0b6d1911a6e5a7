"""`generate` over the CUDA driver: the same tokens, and nothing is unmapped before the device has come past it.

The device is emulated: its memory is the process's own, so torch's CPU kernels compute over what the CUDA driver maps.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from tests.core.backends import emulated_device
from vmem_kv import VmemCache
from vmem_kv.config import CacheConfig
from vmem_kv.devices import open_driver
from vmem_kv.driver.base import Driver
from vmem_kv.driver.cuda import CudaDriver, NoRuntime, describe_cuda
from vmem_kv.errors import ConfigError, DriverError, OutOfPages, UsageError
from vmem_kv.layout import LayerSpec
from vmem_kv.rows import LayerRows, RowStore
from vmem_kv.testing.emulator import NOTHING, Emulator

from .architectures import ARCHITECTURES, build_model
from .harness import assert_same_outcome, execute, make_ours, make_stock
from .scenarios import SCENARIOS
from .test_generate_equal import REFUSED_BY_TRANSFORMERS

CPU = torch.device("cpu")
PAGE = 4096
SPEC = LayerSpec.uniform(2, 32, 4)  # 256 bytes per token in each of K and V: 16 tokens a page


def open_cuda(device: torch.device, config: CacheConfig) -> Driver:
    """The CUDA driver, whose memory torch reaches as the CPU's."""
    return CudaDriver(0, NoRuntime(), tensor_device=str(device))


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    emulator = emulated_device()
    yield emulator
    assert emulator.live() == NOTHING
    assert emulator.violations() == []


@pytest.mark.parametrize("scenario", ["greedy", "beam_search", "assisted", "continued", "rows_selected_and_repeated"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_are_those_of_the_stock_cache(emulator: Emulator, name: str, scenario: str) -> None:
    architecture = ARCHITECTURES[name]
    model = build_model(architecture.name, torch.float32, None)
    expected = execute(SCENARIOS[scenario], architecture, model, make_stock)
    actual = execute(SCENARIOS[scenario], architecture, model, partial(make_ours, open_driver=open_cuda))
    assert (expected.error is not None) == (architecture.name in REFUSED_BY_TRANSFORMERS.get(scenario, ()))
    assert_same_outcome(expected, actual, 1e-4)


class Fixture:
    """Rows of one layer on the emulated device, with a budget in pages."""

    def __init__(self, **options: Any) -> None:
        self.store = RowStore(CacheConfig(page_bytes=PAGE, layout="per_layer", **options), 1, open_cuda)

    def open(self, n_rows: int = 1) -> LayerRows:
        return self.store.open_rows(SPEC, torch.float32, n_rows, CPU)


def tokens(n_tokens: int, n_rows: int = 1) -> torch.Tensor:
    return torch.randn(n_rows, 2, n_tokens, 32)


def let_go_soon(emulator: Emulator) -> threading.Thread:
    """Let the device finish while somebody waits for it."""

    def finish() -> None:
        time.sleep(0.05)
        emulator.let_go(0)

    thread = threading.Thread(target=finish)
    thread.start()
    return thread


def test_a_new_batch_waits_for_the_last_ones_kernels(emulator: Emulator) -> None:
    rows = Fixture().open()
    rows.append(tokens(5), tokens(5))
    emulator.hold(0)
    emulator.use(rows.views()[0].data_ptr(), 64)
    rows.stop()
    assert emulator.is_busy()
    thread = let_go_soon(emulator)
    rows.start(1)
    assert not emulator.is_busy()
    thread.join()
    rows.append(tokens(5), tokens(5))
    rows.close()


def test_closing_waits_for_the_last_kernels(emulator: Emulator) -> None:
    rows = Fixture().open()
    rows.append(tokens(5), tokens(5))
    emulator.hold(0)
    emulator.use(rows.views()[0].data_ptr(), 64)
    thread = let_go_soon(emulator)
    rows.close()
    thread.join()


def test_a_window_keeps_its_pages_until_the_device_has_come_past_them(emulator: Emulator) -> None:
    fixture = Fixture()
    rows = fixture.open()
    rows.append(tokens(64), tokens(64))
    n_pages = fixture.store.stats().n_owned_pages
    emulator.hold(0)
    emulator.use(rows.views()[0].data_ptr(), 64)
    rows.slide(40)
    assert fixture.store.stats().n_free_pages == 0
    emulator.let_go(0)
    rows.append(tokens(1), tokens(1))  # looks after what has waited
    stats = fixture.store.stats()
    assert (stats.n_owned_pages, stats.n_free_pages) == (n_pages, 2)  # four came back, two were taken
    rows.close()


def test_a_shortage_waits_for_pages_that_are_on_their_way_back(emulator: Emulator) -> None:
    fixture = Fixture(max_bytes=8 * PAGE)
    rows = fixture.open()
    rows.append(tokens(64), tokens(64))
    emulator.hold(0)
    emulator.use(rows.views()[0].data_ptr(), 64)
    rows.slide(40)
    thread = let_go_soon(emulator)
    rows.append(tokens(16), tokens(16))
    thread.join()
    with pytest.raises(OutOfPages):
        rows.append(tokens(64), tokens(64))
    rows.close()


@pytest.mark.parametrize("is_selecting", [False, True])
def test_rows_end_even_where_memory_cannot_be_given_back(emulator: Emulator, is_selecting: bool) -> None:
    fixture = Fixture()
    rows = fixture.open(2)
    rows.append(tokens(64, 2), tokens(64, 2))
    emulator.hold(0)
    emulator.use(rows.views()[0].data_ptr(), 64)
    rows.slide(40)  # waits for the device
    emulator.let_go(0)
    emulator.fail("cuMemUnmap", 1, nth=3, and_on=True)  # K and V of the first row go, those of the second do not
    with pytest.raises(DriverError):
        rows.select(torch.tensor([0])) if is_selecting else rows.stop()
    emulator.succeed("cuMemUnmap")
    assert rows.n_rows == (1 if is_selecting else 0)
    if is_selecting:
        rows.append(tokens(1), tokens(1))
    rows.close()
    assert fixture.store.stats().n_owned_pages == 0


def test_a_layer_that_cannot_be_looked_at_leaves_nothing_behind(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("torch would not")

    fixture = Fixture()
    monkeypatch.setattr("vmem_kv.tensors.open_storage", refuse)
    with pytest.raises(RuntimeError, match="torch would not"):
        fixture.open()
    assert emulator.live() == NOTHING
    monkeypatch.undo()
    fixture.open().close()


def test_the_layout_follows_the_device_and_not_the_tensors_over_it(emulator: Emulator) -> None:
    store = RowStore(CacheConfig(page_bytes=PAGE), 1, open_cuda)
    rows = store.open_rows(SPEC, torch.float32, 1, CPU)
    assert store.choice is not None
    assert store.choice.kind == "per_layer"
    rows.close()


def test_closing_with_views_out_is_refused(emulator: Emulator) -> None:
    rows = Fixture().open()
    rows.append(tokens(5), tokens(5))
    keys, _ = rows.views()
    with pytest.raises(UsageError, match="tensors that look into the cache are still alive"):
        rows.close()
    assert keys.shape == (1, 2, 5, 32)
    del keys, _
    rows.close()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_dtype_is_stored_as_it_is(emulator: Emulator, dtype: torch.dtype) -> None:
    spec = LayerSpec.uniform(2, 32, dtype.itemsize)
    rows = Fixture().store.open_rows(spec, dtype, 1, CPU)
    states = tokens(40).to(dtype)
    rows.append(states[:, :, :30], states[:, :, :30])
    rows.append(states[:, :, 30:], states[:, :, 30:])
    for view in rows.views():
        assert view.dtype is dtype
        assert torch.equal(view.float(), states.float())
    del view
    rows.close()


def test_a_layer_on_another_device_is_refused(emulator: Emulator) -> None:
    fixture = Fixture()
    rows = fixture.open()
    with pytest.raises(ConfigError, match="a cache serves one device"):
        fixture.store.open_rows(SPEC, torch.float32, 1, torch.device("meta"))
    rows.close()


class TorchsDevice(NamedTuple):
    """What torch says of a device."""

    uuid: uuid.UUID


@pytest.mark.parametrize("is_same", [True, False])
def test_the_device_must_be_the_one_that_torch_means(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    ours = uuid.UUID(describe_cuda().devices[0].uuid)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 20)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: TorchsDevice(ours if is_same else uuid.uuid4())
    )
    if is_same:
        driver = open_driver(torch.device("cuda"), CacheConfig())
        assert driver.info.device == "cuda:0"
        assert driver.info.memory_bytes == (2 << 30) + (2 << 20)  # what nobody has, and what torch can spare
        driver.close()
        return
    with pytest.raises(ConfigError, match=r"cuda:0 is device .* to torch and .* to the CUDA driver"):
        open_driver(torch.device("cuda"), CacheConfig())


def test_a_cuda_device_without_a_torch_for_it_is_refused() -> None:
    cache = VmemCache(build_model("llama", torch.float32, None).config)
    with pytest.raises(ConfigError, match="there is no driver for meta"):
        cache.update(torch.empty(1, 2, 1, 16, device="meta"), torch.empty(1, 2, 1, 16, device="meta"), 0)
    if torch.version.cuda is None:
        with pytest.raises(ConfigError, match="was built without CUDA"):
            open_driver(torch.device("cuda"), CacheConfig())
    cache.close()
