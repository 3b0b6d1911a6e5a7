"""The adapters of CUDA kernels, through stand-ins for their operators, against `sdpa` and the real signatures."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from vmem_kv.attention.base import AttentionSpec, BoundKernel, Kernel
from vmem_kv.attention.batch import RaggedBatch
from vmem_kv.attention.fa3 import BUILDS, Fa3
from vmem_kv.attention.flash_attn import FlashAttn, FlashAttnOperators
from vmem_kv.attention.sdpa import Sdpa
from vmem_kv.attention.torch_flash import TorchFlash
from vmem_kv.errors import ConfigError, UsageError
from vmem_kv.tensors import SlotKV
from vmem_kv.testing import attention_ops as ops

from . import signatures
from .harness import MIXES, SPAN, Case, Seq, assert_same, build_batch, make_case, spec
from .signatures import Recorder, bind_aten, output_shape_by_torch


class Rig(NamedTuple):
    """One adapter over recorded stand-ins."""

    kernel: Kernel
    recorders: dict[str, Recorder]
    options: dict[str, dict[str, Any]]  # of the spec, that it has


WINDOW = {"window": 24}
SOFTCAP = {"softcap": 2.5}
PLAIN: dict[str, dict[str, Any]] = {"plain": {}, "not causal": {"is_causal": False}}


def rig(name: str) -> Rig:
    recorders = {
        "aten": Recorder(ops.flash_attention_forward),
        "varlen": Recorder(ops.flash_attn_varlen_forward),
        "slots": Recorder(ops.flash_attn_with_kvcache),
        "fa3": Recorder(ops.fa3_with_kvcache),
    }
    full, forward_only = BUILDS
    all_options = PLAIN | {"window": WINDOW, "softcap": SOFTCAP, "both": WINDOW | SOFTCAP}
    return {
        "torch_flash": Rig(TorchFlash(recorders["aten"]), recorders, PLAIN | {"window": WINDOW}),
        "flash_attn": Rig(
            FlashAttn(FlashAttnOperators(recorders["varlen"], recorders["slots"])), recorders, all_options
        ),
        "fa3": Rig(Fa3(recorders["fa3"], full), recorders, all_options),
        "fa3_fwd": Rig(Fa3(recorders["fa3"], forward_only), recorders, PLAIN | {"softcap": SOFTCAP}),
    }[name]


def parts_of(case: Case) -> list[RaggedBatch]:
    """The batches that an adapter of FlashAttention-2 calls its operators with."""
    return [part.batch for part in case.batch.parts] or [case.batch]


ADAPTERS = ["torch_flash", "flash_attn", "fa3", "fa3_fwd"]


def against_sdpa(kernel: Kernel, asked: AttentionSpec, sequences: list[Seq], layout: str = "per_layer") -> Case:
    bound = kernel.bind(asked, "cpu")
    case = make_case(asked, sequences, layout=layout, slack_tokens=bound.slack_tokens)
    assert_same(asked, bound(*case.arguments), Sdpa().bind(asked, "cpu")(*case.arguments))
    return case


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("option", ["plain", "not causal", "window", "softcap", "both"])
def test_every_mix_with_every_option_that_it_has(adapter: str, mix: str, option: str) -> None:
    kernel, _, options = rig(adapter)
    if option in options:
        against_sdpa(kernel, spec(**options[option]), MIXES[mix])
        return
    lacking = spec(**{"window": WINDOW, "softcap": SOFTCAP, "both": WINDOW | SOFTCAP}[option])
    with pytest.raises(ConfigError, match=r"has no (soft capping|sliding window)"):
        kernel.bind(lacking, "cpu")


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("layout", ["per_layer", "per_head", "token_major"])
@pytest.mark.parametrize(("n_q_heads", "n_kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_layouts_and_groupings(adapter: str, layout: str, n_q_heads: int, n_kv_heads: int) -> None:
    asked = spec(n_q_heads, n_kv_heads, 64)
    for mix in ("mixed off the base, some idle", "decode of long and short, any order"):
        against_sdpa(rig(adapter).kernel, asked, MIXES[mix], layout)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_sizes(adapter: str, head_dim: int) -> None:
    against_sdpa(rig(adapter).kernel, spec(4, 2, head_dim), MIXES["mixed"])


@pytest.mark.parametrize("adapter", ["torch_flash", "flash_attn", "fa3"])
def test_half_precision(adapter: str) -> None:
    against_sdpa(rig(adapter).kernel, spec(dtype=torch.float16), MIXES["mixed"])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_empty_batch_calls_no_operator(adapter: str) -> None:
    kernel, recorders, _ = rig(adapter)
    asked = spec()
    case = make_case(asked, [Seq(0, 3, 1)])
    assert kernel.bind(asked, "cpu")(*case.arguments).shape == (0, 4, 64)
    assert all(not recorder.calls for recorder in recorders.values())


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("lacking", "what"),
    [
        (spec(dtype=torch.float32), "torch.float32"),
        (spec(head_dim=264), "head size 264"),
        (spec(head_dim=60), "head size 60"),
        (spec(head_dim=128, value_dim=64), "keys of another size than values"),
        (spec(has_sinks=True), "attention sinks"),
    ],
)
def test_what_all_of_them_lack_is_refused(adapter: str, lacking: AttentionSpec, what: str) -> None:
    with pytest.raises(ConfigError, match=f"has no {what}"):
        rig(adapter).kernel.bind(lacking, "cpu")


def test_the_forward_only_build_lacks_half_precision() -> None:
    with pytest.raises(ConfigError, match=r"has no torch\.float16; use torch\.bfloat16"):
        rig("fa3_fwd").kernel.bind(spec(dtype=torch.float16), "cpu")


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("window", [None, 24])
def test_torchs_operator_is_called_as_both_schemas_say(mix: str, window: int | None) -> None:
    kernel, recorders, _ = rig("torch_flash")
    asked = spec(window=window)
    case = against_sdpa(kernel, asked, MIXES[mix])
    for call, batch in zip(recorders["aten"].calls, parts_of(case), strict=True):
        given = bind_aten(call)
        assert output_shape_by_torch(call) == given["query"].shape
        assert given["key"] is case.kv.keys
        assert given["value"] is case.kv.values
        assert given["cum_seq_q"] is batch.query_starts
        assert given["cum_seq_k"] is batch.slot_starts
        assert given["seqused_k"] is batch.lengths
        assert (given["max_q"], given["max_k"]) == (batch.max_query_tokens, batch.max_length)
        assert (given["scale"], given["is_causal"], given["dropout_p"]) == (asked.scale, True, 0.0)
        edges = (23, 0) if window and batch.max_length > window else (None, None)
        assert (given["window_size_left"], given["window_size_right"]) == edges


@pytest.mark.parametrize("mix", MIXES)
def test_flash_attn_decodes_by_slot_and_does_the_rest_packed(mix: str) -> None:
    kernel, recorders, _ = rig("flash_attn")
    case = against_sdpa(kernel, spec(window=24, softcap=2.5), MIXES[mix])
    by_slot = recorders["slots"].bound(signatures.flash_attn_with_kvcache)
    packed = recorders["varlen"].bound(signatures.flash_attn_varlen_forward)
    for batch in parts_of(case):
        window = (23, 0) if batch.max_length > 24 else (-1, -1)
        if batch.max_query_tokens == 1:
            given = by_slot.pop()
            # The kernel splits its work by the second size: the longest slot's end, never the slot's span.
            assert given["k_cache"].shape[:2] == given["v_cache"].shape[:2] == (8, batch.max_slot_end)
            assert given["k_cache"].data_ptr() == case.kv.keys.data_ptr()
            assert given["cache_seqlens"] is batch.slot_ends
            assert given["cache_batch_idx"] is batch.slot_indices
            assert given["cache_leftpad"] is (None if batch.starts_at_base else batch.slot_offsets)
            assert (given["window_size"], given["softcap"], given["softmax_scale"]) == (window, 2.5, 0.11)
        else:
            given = packed.pop()
            assert given["k"] is case.kv.keys
            assert given["seqused_k"] is batch.lengths
            assert (given["window_size_left"], given["window_size_right"], given["softcap"]) == (*window, 2.5)
            assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (batch.max_query_tokens, batch.max_length)
    assert (by_slot, packed) == ([], [])


@pytest.mark.parametrize("adapter", ["torch_flash", "flash_attn"])
@pytest.mark.parametrize(
    "sequences",
    [
        [Seq(5, 9, 1), Seq(3, 30, 4), Seq(1, 33, 0), Seq(1, 7, 2)],  # neighbours: seen in place
        [Seq(1, 33, 0), Seq(5, 9, 1), Seq(1, 7, 2), Seq(3, 30, 4)],  # in turns: gathered and scattered
        [Seq(1, 33, 0), Seq(5, 9, 1), Seq(3, 30, 4), Seq(1, 7, 2)],  # prefill in place, decode gathered
    ],
)
def test_decode_beside_prefill_is_called_as_decode(adapter: str, sequences: list[Seq]) -> None:
    """With one call for both, no decode would be split over its keys: these operators go by the longest queries."""
    kernel, recorders, _ = rig(adapter)
    case = against_sdpa(kernel, spec(), sequences)
    prefill, decode = parts_of(case)
    assert (prefill.max_query_tokens, prefill.max_length, prefill.n_tokens) == (5, 30, 8)
    assert (decode.max_query_tokens, decode.max_length, decode.n_tokens) == (1, 33, 2)
    calls = [call for recorder in recorders.values() for call in recorder.calls]
    assert sorted(call.arguments[0].numel() for call in calls) == [2 * 4 * 64, 8 * 4 * 64]


@pytest.mark.parametrize("adapter", ["torch_flash", "flash_attn", "fa3"])
@pytest.mark.parametrize(("window", "is_passed"), [(39, True), (40, False), (4096, False)])
def test_a_window_as_long_as_the_longest_sequence_is_none(adapter: str, window: int, is_passed: bool) -> None:
    kernel, recorders, _ = rig(adapter)
    against_sdpa(kernel, spec(window=window), [Seq(1, 40, 0), Seq(1, 7, 2)])
    (call,) = [call for recorder in recorders.values() for call in recorder.calls]
    passed = call.keywords.get("window_size", (call.keywords.get("window_size_left"),))[0]
    assert passed == (38 if is_passed else None if adapter == "torch_flash" else -1)


def off(rows: torch.Tensor, *, stride: int, address: int) -> torch.Tensor:
    """The same rows, laid out with so many elements too many between tokens and before the first."""
    n_rows, n_heads, dim = rows.shape
    row = n_heads * dim + stride
    buffer = torch.zeros(n_rows * row + address + 8, dtype=rows.dtype)
    moved = buffer.as_strided((n_rows, n_heads, dim), (row, dim, 1), address)
    return moved.copy_(rows)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", ["query", "keys", "values"])
@pytest.mark.parametrize(("stride", "address"), [(4, 0), (0, 4), (0, 0), (8, 8)])
def test_what_is_not_aligned_never_reaches_the_operator(adapter: str, name: str, stride: int, address: int) -> None:
    """On hardware it ends in an error that stays."""
    kernel, recorders, _ = rig(adapter)
    asked = spec()
    case = make_case(asked, [Seq(1, 9, 0)], slack_tokens=200)
    tensors = {"query": case.query, "keys": case.kv.keys, "values": case.kv.values}
    tensors[name] = off(tensors[name], stride=stride, address=address)
    call = kernel.bind(asked, "cpu")
    kv = SlotKV(tensors["keys"], tensors["values"], SPAN)
    if stride % 8 or address % 8:
        with pytest.raises(UsageError, match=f"{name} lie at .* multiples of 16 bytes"):
            call(tensors["query"], kv, case.batch)
        assert all(not recorder.calls for recorder in recorders.values())
    else:
        call(tensors["query"], kv, case.batch)


@pytest.mark.parametrize("mix", MIXES)
def test_fa3_is_called_by_slot_with_packed_queries(mix: str) -> None:
    kernel, recorders, _ = rig("fa3")
    case = against_sdpa(kernel, spec(), MIXES[mix])
    (given,) = recorders["fa3"].bound(signatures.fa3_with_kvcache)
    assert given["k_cache"].shape[:2] == (8, case.batch.max_slot_end)
    assert given["cache_batch_idx"] is case.batch.slot_indices
    assert given["cu_seqlens_q"] is case.batch.query_starts
    assert given["max_seqlen_q"] == case.batch.max_query_tokens
    assert (given["window_size"], given["softcap"], given["softmax_scale"]) == ((-1, -1), 0.0, 0.11)
    assert (given["cache_leftpad"] is None) == case.batch.starts_at_base


def bound(adapter: str, asked: AttentionSpec) -> BoundKernel:
    return rig(adapter).kernel.bind(asked, "cpu")


@pytest.mark.parametrize("adapter", ["torch_flash", "flash_attn"])
@pytest.mark.parametrize("sequence", [Seq(1, 20, 1), Seq(4, 20, 1), Seq(1, 20, 1, 3)])
def test_a_row_too_many_shows(adapter: str, sequence: Seq) -> None:
    """What lies behind a sequence is NaN, so the tests above see it when it is read."""
    asked = spec()
    case = make_case(asked, [sequence])
    wrong = build_batch([sequence._replace(length=21)])
    assert bound(adapter, asked).slack_tokens == 0
    assert bound(adapter, asked)(case.query, case.kv, wrong).isnan().any()


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("n_queries", [1, 5])
def test_less_slack_than_fa3_declares_shows(head_dim: int, n_queries: int) -> None:
    """A batch whose longest sequence lets the tiles of a short one run out: NaN behind its slack reaches the output."""
    asked = spec(2, 1, head_dim)
    kernel = bound("fa3", asked)
    tile = ops.fa3_tile_tokens(head_dim, is_causal=n_queries > 1, has_window=False)
    sequences = [Seq(n_queries, tile + 1, 0), Seq(1, SPAN, 2)]
    assert kernel.slack_tokens >= tile - 1
    enough = make_case(asked, sequences, slack_tokens=tile - 1)
    assert not kernel(*enough.arguments).isnan().any()
    short = make_case(asked, sequences, slack_tokens=tile - 2)
    assert kernel(*short.arguments)[:n_queries].isnan().all()


@pytest.mark.parametrize("head_dim", range(8, 264, 8))
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("has_window", [True, False])
def test_declared_slack_covers_every_tile(head_dim: int, is_causal: bool, has_window: bool) -> None:
    tile = ops.fa3_tile_tokens(head_dim, is_causal=is_causal, has_window=has_window)
    assert Fa3(ops.fa3_with_kvcache).slack_tokens(spec(head_dim=head_dim)) >= tile - 1


def test_slack_counts_the_tiles_of_larger_head_sizes() -> None:
    """A build without kernels for sizes up to 96 runs those for 128, with tiles of 176 keys in place of 144."""
    slack = [
        Fa3(ops.fa3_with_kvcache).slack_tokens(spec(head_dim=head_dim)) for head_dim in (64, 80, 96, 128, 136, 256)
    ]
    assert slack == [191, 175, 175, 175, 127, 79]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_with_as_many_tokens_mapped_as_it_says_a_kernel_meets_no_hole(adapter: str) -> None:
    """Mapping is stood in for by finite numbers, holes by NaN."""
    asked = spec(head_dim=128)
    kernel = bound(adapter, asked)
    lengths = (100, 177, SPAN - 3, SPAN)
    to_map = [kernel.tokens_to_map(length, SPAN) for length in lengths]
    slack = 0 if kernel.slack_tokens == 0 else 175
    assert to_map == [100 + slack, 177 + slack, SPAN if slack else SPAN - 3, SPAN]
    sequences = [Seq(1, length, slot) for slot, length in enumerate(lengths)]
    case = make_case(asked, sequences)
    for (_, length, slot, _), n_mapped in zip(sequences, to_map, strict=True):
        for rows in (case.kv.keys, case.kv.values):
            rows[slot * SPAN + length : slot * SPAN + n_mapped] = 0.0
    assert not kernel(*case.arguments).isnan().any()
    assert kernel.tokens_to_map(0, SPAN) == 0
    for n_tokens in (-1, SPAN + 1):
        with pytest.raises(UsageError, match=f"{n_tokens} tokens do not fit into a slot of {SPAN}"):
            kernel.tokens_to_map(n_tokens, SPAN)


def test_fa3_loads_nothing_behind_the_longest_sequence() -> None:
    asked = spec()
    case = make_case(asked, [Seq(1, 100, slot) for slot in range(4)])  # no slack anywhere
    assert not bound("fa3", asked)(*case.arguments).isnan().any()
