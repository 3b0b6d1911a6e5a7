"""What a configuration takes; what it refuses is in `tests/proof/test_remaining_branches.py`."""

from __future__ import annotations

import mmap

import pytest
import torch

from vmem_kv.config import CacheConfig
from vmem_kv.devices import open_driver
from vmem_kv.errors import ConfigError
from vmem_kv.layout import LAYOUT_KINDS

COUNTS = ["max_tokens", "page_bytes", "max_bytes", "expected_tokens"]


@pytest.mark.parametrize("name", COUNTS)
def test_one_is_enough_and_nothing_is_left_to_the_cache(name: str) -> None:
    for value in (1, 2, None):
        assert getattr(CacheConfig(**{name: value}), name) == value  # type: ignore[arg-type]
    for refused in (0, -1):
        with pytest.raises(ConfigError, match=f"{name} is {refused}; it must be a positive number"):
            CacheConfig(**{name: refused})  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["auto", *LAYOUT_KINDS, "group:1", "group:30"])
def test_every_kind_of_layout_can_be_chosen(layout: str) -> None:
    assert CacheConfig(layout=layout).layout == layout


@pytest.mark.parametrize("layout", ["group:0", "group:", "group:-1", "per_layer ", "", None])
def test_what_is_no_layout_is_refused_with_the_choice(layout: str | None) -> None:
    with pytest.raises(ConfigError, match="choose auto, per_head, per_layer, group:N or token_major"):
        CacheConfig(layout=layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["auto", "native", "python"])
def test_every_way_of_the_host_driver_can_be_chosen(way: str) -> None:
    assert CacheConfig(host_path=way).host_path == way


def test_without_a_word_about_huge_pages_memory_has_ordinary_ones() -> None:
    driver = open_driver(torch.device("cpu"), CacheConfig())
    assert driver.info.granularity_bytes == mmap.PAGESIZE
    driver.close()


def test_a_configuration_carries_nothing_else() -> None:
    assert not hasattr(CacheConfig(), "__dict__")
