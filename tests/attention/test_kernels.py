"""The adapters of CUDA kernels, through stand-ins for their operators, against `sdpa` and the real signatures."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from vmem_kv.attention.base import AttentionSpec, BoundKernel, Kernel
from vmem_kv.attention.fa3 import BUILDS, Fa3
from vmem_kv.attention.flash_attn import FlashAttn, FlashAttnOperators
from vmem_kv.attention.sdpa import Sdpa
from vmem_kv.attention.torch_flash import TorchFlash
from vmem_kv.errors import ConfigError
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
    (call,) = recorders["aten"].calls
    assert output_shape_by_torch(call) == case.query.shape
    given = bind_aten(call)
    assert given["key"] is case.kv.keys
    assert given["value"] is case.kv.values
    assert given["cum_seq_q"] is case.batch.query_starts
    assert given["cum_seq_k"] is case.batch.slot_starts
    assert given["seqused_k"] is case.batch.lengths
    assert (given["max_q"], given["max_k"]) == (case.batch.max_query_tokens, case.batch.max_length)
    assert (given["scale"], given["is_causal"], given["dropout_p"]) == (asked.scale, True, 0.0)
    edges = (None, None) if window is None else (23, 0)
    assert (given["window_size_left"], given["window_size_right"]) == edges


@pytest.mark.parametrize("mix", MIXES)
def test_flash_attn_decodes_by_slot_and_does_the_rest_packed(mix: str) -> None:
    kernel, recorders, _ = rig("flash_attn")
    case = against_sdpa(kernel, spec(window=24, softcap=2.5), MIXES[mix])
    by_slot = recorders["slots"].bound(signatures.flash_attn_with_kvcache)
    packed = recorders["varlen"].bound(signatures.flash_attn_varlen_forward)
    is_decode = all(s.n_queries <= 1 and s.offset == 0 for s in MIXES[mix])
    assert (len(by_slot), len(packed)) == ((1, 0) if is_decode else (0, 1))
    if is_decode:
        given = by_slot[0]
        # The kernel splits its work by the second size: the longest length, never the slot's span.
        assert given["k_cache"].shape[:2] == given["v_cache"].shape[:2] == (8, case.batch.max_length)
        assert given["k_cache"].data_ptr() == case.kv.keys.data_ptr()
        assert given["cache_seqlens"] is case.batch.lengths
        assert given["cache_batch_idx"] is case.batch.slot_indices
        assert (given["window_size"], given["softcap"], given["softmax_scale"]) == ((23, 0), 2.5, 0.11)
    else:
        given = packed[0]
        assert given["k"] is case.kv.keys
        assert given["seqused_k"] is case.batch.lengths
        assert (given["window_size_left"], given["window_size_right"], given["softcap"]) == (23, 0, 2.5)
        assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (case.batch.max_query_tokens, case.batch.max_length)


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


def test_fa3_loads_nothing_behind_the_longest_sequence() -> None:
    asked = spec()
    case = make_case(asked, [Seq(1, 100, slot) for slot in range(4)])  # no slack anywhere
    assert not bound("fa3", asked)(*case.arguments).isnan().any()
