"""The CPU stand-ins: same signatures as the real operators, and every rule of theirs is seen to reject a breach."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vmem_kv.testing import attention_ops as ops

from . import signatures
from .signatures import ATEN_2_11_KEYWORD, ATEN_2_11_POSITIONAL, Call, bind_aten

SPAN = 32
N_SLOTS = 3


@pytest.mark.parametrize("name", ["flash_attn_varlen_forward", "flash_attn_with_kvcache", "fa3_with_kvcache"])
def test_signatures_are_the_real_ones(name: str) -> None:
    ours = inspect.signature(getattr(ops, name)).parameters.values()
    real = inspect.signature(getattr(signatures, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in real]


def test_torchs_signature_is_that_of_2_11() -> None:
    parameters = inspect.signature(ops.flash_attention_forward).parameters.values()
    by_kind = {kind: tuple(p.name for p in parameters if p.kind is kind) for kind in (p.kind for p in parameters)}
    assert by_kind == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: ATEN_2_11_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY: ATEN_2_11_KEYWORD,
    }


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def rows(n: int = N_SLOTS * SPAN, n_heads: int = 2, dim: int = 16) -> torch.Tensor:
    return torch.zeros(n, n_heads, dim, dtype=torch.bfloat16)


def aten(**change: Any) -> Call:
    arguments = {
        "query": rows(5, 4),
        "key": rows(),
        "value": rows(),
        "cum_seq_q": int32(0, 1, 5),
        "cum_seq_k": int32(64, 3, 0),
        "max_q": 4,
        "max_k": 20,
        "dropout_p": 0.0,
        "is_causal": True,
        "return_debug_mask": False,
        "scale": 0.5,
        "seqused_k": int32(9, 20),
    } | change
    positional = tuple(arguments.pop(name) for name in ATEN_2_11_POSITIONAL)
    return Call(positional, arguments)


def call_aten(**change: Any) -> None:
    call = aten(**change)
    ops.flash_attention_forward(*call.arguments, **call.keywords)


def call_varlen(**change: Any) -> None:
    names = {"query": "q", "key": "k", "value": "v", "cum_seq_q": "cu_seqlens_q", "cum_seq_k": "cu_seqlens_k"}
    names |= {"max_q": "max_seqlen_q", "max_k": "max_seqlen_k", "is_causal": "causal", "scale": "softmax_scale"}
    call = aten(**change)
    arguments = dict(zip(ATEN_2_11_POSITIONAL, call.arguments, strict=True)) | call.keywords
    del arguments["return_debug_mask"]
    ops.flash_attn_varlen_forward(**{names.get(name, name): value for name, value in arguments.items()})


def call_slots(**change: Any) -> None:
    arguments = {
        "q": rows(2, 4).unsqueeze(1),
        "k_cache": rows().view(N_SLOTS, SPAN, 2, 16),
        "v_cache": rows().view(N_SLOTS, SPAN, 2, 16),
        "cache_seqlens": int32(9, 20),
        "cache_batch_idx": int32(2, 0),
    } | change
    ops.flash_attn_with_kvcache(**arguments)


def call_fa3(**change: Any) -> None:
    arguments = {
        "q": rows(5, 4),
        "k_cache": rows().view(N_SLOTS, SPAN, 2, 16),
        "v_cache": rows().view(N_SLOTS, SPAN, 2, 16),
        "cache_seqlens": int32(9, 20),
        "cache_batch_idx": int32(2, 0),
        "cu_seqlens_q": int32(0, 1, 5),
        "max_seqlen_q": 4,
    } | change
    ops.fa3_with_kvcache(**arguments)


@pytest.mark.parametrize("operator", [call_aten, call_varlen, call_slots, call_fa3])
def test_a_right_call_is_taken(operator: Callable[..., None]) -> None:
    operator()


STATES = [
    ({"query": rows(5, 4).float(), "key": rows().float(), "value": rows().float()}, "float16 and bfloat16"),
    ({"key": rows().half()}, "one dtype"),
    ({"key": rows().to("meta")}, "one device"),
    ({"value": rows(dim=32)[..., ::2]}, "last dimension is contiguous"),
    ({"key": rows(dim=20)[..., :16]}, "multiples of 16 bytes"),
    ({"key": rows(dim=24)[..., 4:20]}, "multiples of 16 bytes"),
    ({"query": rows(5, 4, 264), "key": rows(dim=264), "value": rows(dim=264)}, "264 is no multiple of 8 up to 256"),
    ({"value": rows(dim=8)}, "one head size"),
    ({"value": rows(n_heads=1)}, "as many heads"),
    ({"query": rows(5, 3)}, "divide those of the query"),
]
LENGTHS = [
    ({"cum_seq_q": None}, "not empty"),
    ({"cum_seq_q": int32(0)}, "not empty"),
    ({"cum_seq_q": int32(0, 1, 4)}, "4 queries by their starts, 5 by shape"),
    ({"cum_seq_q": torch.tensor([0, 1, 5])}, "int32, not torch.int64"),
    ({"max_q": 3}, "below the 4 queries"),
    ({"query": rows(1, 4), "cum_seq_q": int32(0, 1, 1), "max_q": 1}, "every sequence brings one token"),
    ({"cum_seq_k": None}, "starts of K must be given"),
    ({"cum_seq_k": int32(64, 3)}, r"shape \(3,\), not \(2,\)"),
    ({"cum_seq_k": int32(88, 3, 0)}, "outside of K"),
    ({"cum_seq_k": int32(-1, 3, 0)}, "outside of K"),
    ({"seqused_k": None}, "seqused_k must be given"),
    ({"seqused_k": int32(9, 0, 20)[::2]}, "contiguous"),
    ({"seqused_k": int32(9, 20).to("meta")}, "must be on cpu"),
    ({"max_k": 19}, "max_k is 19, below the longest length 20"),
    ({"dropout_p": 0.1}, "dropout_p not emulated"),
    ({"alibi_slopes": torch.zeros(4)}, "alibi_slopes not emulated"),
]


@pytest.mark.parametrize("operator", [call_aten, call_varlen])
@pytest.mark.parametrize(("change", "rule"), [*STATES, *LENGTHS])
def test_a_packed_call_that_breaks_a_rule_is_rejected(
    operator: Callable[..., None], change: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        operator(**change)


@pytest.mark.parametrize("operator", [call_slots, call_fa3])
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"k_cache": rows()}, "4 dimensions"),
        ({"k_cache": rows().view(N_SLOTS, SPAN, 2, 16)[:, :-1]}, "other slots or spans"),
        ({"v_cache": rows().half().view(N_SLOTS, SPAN, 2, 16)}, "one dtype"),
        ({"cache_batch_idx": None}, "must be given"),
        ({"cache_batch_idx": int32(3, 0)}, "no slot 3"),
        ({"cache_batch_idx": int32(2, 0).long()}, "int32"),
        ({"cache_seqlens": int32(9, 33)}, "leave a slot of 32"),
        ({"cache_leftpad": int32(10, 0)}, "leave a slot of 32"),
        ({"cache_leftpad": int32(0)}, "shape"),
        ({"k": rows(2, 2)}, "k not emulated"),
        ({"num_splits": 4}, "num_splits not emulated"),
        ({"rotary_interleaved": False}, "rotary"),
    ],
)
def test_a_call_by_slots_that_breaks_a_rule_is_rejected(
    operator: Callable[..., None], change: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        operator(**change)


def test_fa3_needs_to_be_told_about_packed_queries() -> None:
    with pytest.raises(ValueError, match="cu_seqlens_q and max_seqlen_q"):
        call_fa3(max_seqlen_q=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_splits": 1}, "torch 2.11 has no {'num_splits'}"),
        ({"block_table": None}, "torch 2.11 has no {'block_table'}"),
        ({"scale": 1}, "scale is .*, not int"),
        ({"is_causal": 1}, "is_causal is bool, not int"),
        ({"max_q": 4.0}, "max_q is .*, not float"),
        ({"seqused_k": [1, 2]}, "seqused_k is .*Tensor.*, not list"),
    ],
)
def test_a_call_that_torchs_schema_does_not_take_is_seen(change: dict[str, Any], message: str) -> None:
    bind_aten(aten())
    with pytest.raises(TypeError, match=message):
        bind_aten(aten(**change))
