"""Byte arithmetic and geometry: pure functions, held against counting by hand."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest

from vmem_kv.driver.base import DriverInfo
from vmem_kv.errors import ConfigError, DriverError, OutOfAddressSpace
from vmem_kv.growth import PageRange, SlotId, plan_growth
from vmem_kv.layout import LAYOUT_KINDS, WASTE_TARGET, LayerSpec, Layout, TensorSpec, choose_layout
from vmem_kv.units import GIB, KIB, MIB, ceil_div, format_bytes, is_power_of_two, parse_bytes, round_up

ODD = (
    LayerSpec(TensorSpec(3, 5, 2), TensorSpec(1, 7, 4)),
    LayerSpec.uniform(2, 6, 2),
    LayerSpec(TensorSpec(1, 3, 1), TensorSpec(2, 9, 2)),
)
SHAPES = {
    "odd head sizes, K and V of different shapes": ODD,
    "latent attention: one wide head beside a narrow one": (LayerSpec(TensorSpec(1, 64, 2), TensorSpec(1, 512, 2)),)
    * 3,
    "one layer": (LayerSpec.uniform(2, 8, 2),),
    "five layers, so that groups do not divide": (LayerSpec.uniform(1, 16, 4),) * 5,
}
INFO = DriverInfo("test", "cpu", 4096, 1000, True, 2, False, 1 << 40, 1 << 46, "test")


# Units


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        *[("0", 0), ("64k", 64 * KIB), ("1.5GiB", 3 * GIB // 2), (" 2 MB ", 2 * MIB), (7, 7), ("1b", 1), ("0.3", 0)],
        ("9007199254740993", 9007199254740993),  # one more than a float can tell apart
        *[("1k", 1024), ("1m", 1024**2), ("1g", 1024**3), ("1t", 1024**4), ("2.25t", 9 * 1024**4 // 4)],
    ],
)
def test_sizes_are_read(text: str | int, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "-1", "x", "1 2", "k", "1e3", "1..5", -1])
def test_what_is_no_size_is_a_config_error(text: str | int) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes(text)


def test_sizes_are_written_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536, 3 * 1024**2, 1024**6)] == [
        *("0 B", "1023 B", "1.00 KiB", "1.50 KiB", "3.00 MiB", "1024.00 PiB")
    ]
    assert format_bytes(1024**4) == "1.00 TiB"


def test_rounding_goes_up_and_only_up() -> None:
    for value, multiple in itertools.product(range(40), range(1, 10)):
        assert ceil_div(value, multiple) == len(range(0, value, multiple))
        assert round_up(value, multiple) % multiple == 0
        assert 0 <= round_up(value, multiple) - value < multiple


def test_powers_of_two_are_known() -> None:
    assert [n for n in range(-4, 70) if is_power_of_two(n)] == [1, 2, 4, 8, 16, 32, 64]


def test_a_driver_error_survives_copying_and_says_what_failed() -> None:
    error = copy.copy(DriverError("map", 12, "ENOMEM", 3, "no memory"))
    assert (error.operation, error.code, error.name, error.n_done) == ("map", 12, "ENOMEM", 3)
    assert str(error) == "map failed with ENOMEM (12): no memory"


# Layout


@pytest.mark.parametrize("kind", [*LAYOUT_KINDS, "group:3", "group:99"])
@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
def test_no_two_elements_share_an_address(kind: str, layers: tuple[LayerSpec, ...]) -> None:
    layout = Layout.build(kind, layers, n_slots=2, max_tokens=3, page_bytes=64)
    seen = bytearray(layout.virtual_bytes)
    n_bytes = 0
    for strides in (*layout.keys, *layout.values):
        spec = strides.spec
        for slot, head, token in itertools.product(range(2), range(spec.n_heads), range(3)):
            start = (
                strides.offset_bytes
                + slot * strides.slot_bytes
                + head * strides.head_bytes
                + token * strides.token_bytes
            )
            assert start >= 0
            place = slice(start, start + spec.head_bytes)
            assert not any(seen[place]), f"layer element at {start} overlaps another"
            assert len(seen[place]) == spec.head_bytes
            seen[place] = b"\x01" * spec.head_bytes
            n_bytes += spec.head_bytes
    assert n_bytes == 2 * 3 * layout.token_bytes == sum(seen)
    assert layout.token_bytes == sum(k.token_bytes + v.token_bytes for k, v in layers)


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
def test_every_token_lies_in_its_planes_row(kind: str, layers: tuple[LayerSpec, ...]) -> None:
    layout = Layout.build(kind, layers, n_slots=3, max_tokens=4, page_bytes=128)
    for strides in (*layout.keys, *layout.values):
        for slot, head, token in itertools.product(range(3), range(strides.spec.n_heads), range(4)):
            start = strides.offset_bytes + slot * strides.slot_bytes
            start += head * strides.head_bytes + token * strides.token_bytes
            plane = max((p for p in layout.planes if p.base_bytes <= start), key=lambda p: p.base_bytes)
            row = plane.base_bytes + slot * plane.span_bytes + token * plane.token_bytes
            assert row <= start
            assert start + strides.spec.head_bytes <= row + plane.token_bytes


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("page_bytes", [64, 4096, 3 * 4096])
def test_spans_are_multiples_of_the_page_and_of_the_row(
    kind: str, layers: tuple[LayerSpec, ...], page_bytes: int
) -> None:
    layout = Layout.build(kind, layers, n_slots=3, max_tokens=100, page_bytes=page_bytes)
    base = 0
    for plane in layout.planes:
        assert plane.base_bytes == base
        assert plane.span_bytes % page_bytes == 0
        assert plane.span_bytes % plane.token_bytes == 0
        assert plane.span_bytes >= 100 * plane.token_bytes
        base += 3 * plane.span_bytes
    assert layout.virtual_bytes == base


def test_the_kinds_differ_in_their_planes_only() -> None:
    def rows(kind: str) -> list[int]:
        return [p.token_bytes for p in Layout.build(kind, ODD, n_slots=1, max_tokens=1, page_bytes=64).planes]

    assert rows("per_head") == [10, 10, 10, 28, 12, 12, 12, 12, 3, 18, 18]
    assert rows("per_layer") == [30, 28, 24, 24, 3, 36]
    assert rows("group:2") == [54, 52, 3, 36]
    assert rows("group:3") == [57, 88]
    assert rows("token_major") == [145]


@pytest.mark.parametrize("kind", LAYOUT_KINDS)
def test_capacity_is_the_inverse_of_pages(kind: str) -> None:
    layout = Layout.build(kind, ODD, n_slots=1, max_tokens=300, page_bytes=64)
    for n_tokens in range(301):
        pages = [-(-n_tokens * plane.token_bytes // 64) for plane in layout.planes]
        assert layout.n_pages(n_tokens) == sum(pages)
        capacity = layout.token_capacity(pages)
        assert n_tokens <= capacity == layout.capacity_of(n_tokens) <= 300
        assert layout.n_pages(capacity) == layout.n_pages(n_tokens) or n_tokens == 0
        if n_tokens:
            fewer = [max(0, n - 1) for n in pages]
            assert layout.token_capacity(fewer) < n_tokens
    assert layout.capacity_of(301) == layout.capacity_of(1000) == 300


@pytest.mark.parametrize(
    "kind",
    [
        *["", "rows", "group", "group:", "group:0", "group:00", "group:-1"],
        *["group:x", "group:²", "per_layer:2", "per_head:", "group:2:3"],
    ],
)
def test_an_unknown_layout_is_a_config_error(kind: str) -> None:
    with pytest.raises(ConfigError, match="unknown layout"):
        Layout.build(kind, ODD, n_slots=1, max_tokens=1, page_bytes=64)


def test_sizes_that_are_not_positive_are_config_errors() -> None:
    for wrong in ({"n_slots": 0}, {"max_tokens": -1}, {"page_bytes": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Layout.build("per_layer", ODD, **({"n_slots": 1, "max_tokens": 1, "page_bytes": 64} | wrong))
    with pytest.raises(ConfigError):
        Layout.build("per_layer", [], n_slots=1, max_tokens=1, page_bytes=64)
    with pytest.raises(ConfigError):
        Layout.build("per_layer", [LayerSpec.uniform(0, 8, 2)], n_slots=1, max_tokens=1, page_bytes=64)


# The choice of a layout

MODEL = (LayerSpec.uniform(3, 64, 2),) * 30


@pytest.mark.parametrize("expected_tokens", [128, 1024, 8192, 131072])
def test_auto_keeps_waste_under_the_target_where_the_granularity_allows_it(expected_tokens: int) -> None:
    info = replace(INFO, max_mappings=1 << 30)
    choice = choose_layout(info, MODEL, n_slots=8, expected_tokens=expected_tokens)
    layout = Layout.build(choice.kind, MODEL, n_slots=8, max_tokens=expected_tokens, page_bytes=choice.page_bytes)
    waste = len(layout.planes) * choice.page_bytes / 2 / (expected_tokens * layout.token_bytes)
    assert waste <= WASTE_TARGET or choice.page_bytes == info.granularity_bytes
    doubled = 2 * waste
    assert doubled > WASTE_TARGET or choice.page_bytes * 2 > 2 * MIB
    assert f"{waste:.1%}" in choice.why


def test_auto_takes_fewer_planes_as_mappings_get_short() -> None:
    kinds = [
        choose_layout(replace(INFO, max_mappings=n, reads_best="per_head"), MODEL, n_slots=8, expected_tokens=1024).kind
        for n in (8 * 2 * 180, 8 * 2 * 180 - 1, 8 * 2 * 60 - 1, 8 * 2 * 30 - 1, 8 * 2 * 16 - 1, 8 * 2 * 8 - 1, 1)
    ]
    assert kinds == ["per_head", "per_layer", "group:2", "group:4", "group:8", "group:16", "token_major"]


def test_auto_counts_every_page_where_neighbours_do_not_merge() -> None:
    info = replace(INFO, neighbours_merge=False, mappings_per_run=1, device="cuda:0", granularity_bytes=2 * MIB)
    choice = choose_layout(replace(info, max_mappings=60), MODEL, n_slots=1, expected_tokens=1024)
    assert choice.kind == "per_layer"
    choice = choose_layout(replace(info, max_mappings=59), MODEL, n_slots=1, expected_tokens=1024)
    assert choice.kind == "group:2"


@pytest.mark.parametrize("kind", ["per_head", "per_layer"])
def test_auto_begins_with_the_layout_that_the_device_reads_best(kind: str) -> None:
    info = replace(INFO, max_mappings=1 << 30, reads_best=kind)
    assert choose_layout(info, MODEL, n_slots=1, expected_tokens=100).kind == kind


def test_a_choice_that_was_made_is_kept_and_explained() -> None:
    choice = choose_layout(INFO, MODEL, n_slots=2, expected_tokens=64, kind="group:4", page_bytes=8192)
    assert (choice.kind, choice.page_bytes) == ("group:4", 8192)
    for word in ("group:4", "8.00 KiB", "16 planes", "64 of 1,000 mappings", "2 sequences", "64 tokens", "%"):
        assert word in choice.why


def test_a_page_that_the_driver_cannot_map_is_a_config_error_with_one_that_it_can() -> None:
    for page_bytes, hint in ((4097, "8192"), (1, "4096"), (-4096, "4096")):
        with pytest.raises(ConfigError, match=hint):
            choose_layout(INFO, MODEL, n_slots=1, expected_tokens=10, page_bytes=page_bytes)
    for keywords in ({"expected_tokens": 0}, {"n_slots": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            choose_layout(INFO, MODEL, **({"n_slots": 1, "expected_tokens": 10} | keywords))


# Growth


def test_planning_growth_changes_nothing_and_says_the_same_twice() -> None:
    layout = Layout.build("per_layer", ODD, n_slots=2, max_tokens=100, page_bytes=64)
    mapped = {SlotId(s): [PageRange(0, s)] * 6 for s in range(2)}
    before = copy.deepcopy(mapped)
    lengths = {SlotId(1): 30, SlotId(0): 7}
    plans = [plan_growth(layout, 1 << 20, mapped, lengths) for _ in range(2)]
    assert plans[0] == plans[1]
    assert mapped == before
    assert lengths == {1: 30, 0: 7}


def test_a_plan_is_the_missing_pages_in_order_and_nothing_else() -> None:
    layout = Layout.build("per_layer", ODD, n_slots=2, max_tokens=100, page_bytes=64)
    base = 1 << 20
    mapped = {SlotId(0): [PageRange(0, 2)] * 6, SlotId(1): [PageRange(3, 5)] * 6}
    plan = plan_growth(layout, base, mapped, {SlotId(0): 10, SlotId(1): 40})
    expected = [
        base + plane.base_bytes + slot * plane.span_bytes + page * 64
        for slot, n_tokens, first in ((0, 10, 2), (1, 40, 5))
        for plane in layout.planes
        for page in range(first, -(-n_tokens * plane.token_bytes // 64))
    ]
    assert plan.places == expected
    assert plan.n_pages == len(expected)
    assert [(run.slot_id, run.plane_index) for run in plan.runs] == sorted(
        (run.slot_id, run.plane_index) for run in plan.runs
    )


def test_a_plan_beyond_the_slot_is_refused() -> None:
    layout = Layout.build("per_layer", ODD, n_slots=1, max_tokens=100, page_bytes=64)
    mapped = {SlotId(0): [PageRange(0, 0)] * 6}
    assert plan_growth(layout, 0, mapped, {SlotId(0): 100}).n_pages == layout.n_pages(100)
    with pytest.raises(OutOfAddressSpace):
        plan_growth(layout, 0, mapped, {SlotId(0): 101})
