"""The signatures of the real operators, written down from the versions that are named, and calls held against them.

Each says where it was read. tests/gpu/test_signatures.py compares them with the packages where these are installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# torch 2.11.0, `torch.ops.aten._flash_attention_forward.default._schema`; later versions append keyword arguments.
ATEN_2_11_POSITIONAL = (
    *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
    *("dropout_p", "is_causal", "return_debug_mask"),
)
ATEN_2_11_KEYWORD = ("scale", "window_size_left", "window_size_right", "seqused_k", "alibi_slopes")


# github.com/Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py `_flash_attn_varlen_forward`, flash-attn 2.7
# and 2.8; 2.8 appends `zero_tensors`.
def flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    block_table=None, leftpad_k=None, seqused_k=None,
):  # fmt: skip
    raise NotImplementedError


# github.com/Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py `flash_attn_with_kvcache`, flash-attn 2.7 and
# 2.8: the same in both.
def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    raise NotImplementedError


# PyPI's wheel fa3-fwd 0.0.3, fa3_fwd_interface.py `flash_attn_with_kvcache`; and flash-attn-3,
# github.com/Dao-AILab/flash-attention, hopper/flash_attn_interface.py at commit 01afd16d: the same in both.
def fa3_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    raise NotImplementedError


class Call(NamedTuple):
    """One recorded call."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Recorder:
    """Passes calls on, and keeps them."""

    def __init__(self, operator: Callable[..., Any]) -> None:
        self._operator = operator
        self.calls: list[Call] = []

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls.append(Call(arguments, keywords))
        return self._operator(*arguments, **keywords)

    def bound(self, signature: Callable[..., Any]) -> list[dict[str, Any]]:
        """Return the arguments of every call by name, as `signature` takes them."""
        return [dict(inspect.signature(signature).bind(*c.arguments, **c.keywords).arguments) for c in self.calls]


def bind_aten(call: Call) -> dict[str, Any]:
    """Return the arguments by name as the installed torch's operator takes them.

    Raises:
        TypeError: It would not take them, or torch 2.11's would not.
    """
    schema = torch.ops.aten._flash_attention_forward.default._schema
    positional = [a for a in schema.arguments if not a.kwarg_only]
    keyword = {a.name: a for a in schema.arguments if a.kwarg_only}
    if tuple(a.name for a in positional) != ATEN_2_11_POSITIONAL or not set(ATEN_2_11_KEYWORD) <= set(keyword):
        raise TypeError(f"the installed torch has another schema: {schema}")
    if len(call.arguments) != len(positional):
        raise TypeError(f"{len(call.arguments)} positional arguments, not {len(positional)}")
    unknown = set(call.keywords) - set(ATEN_2_11_KEYWORD)
    if unknown:
        raise TypeError(f"torch 2.11 has no {unknown}")
    given = [*zip(positional, call.arguments, strict=True), *((keyword[k], v) for k, v in call.keywords.items())]
    for argument, value in given:
        if not _fits(str(argument.type), value):
            raise TypeError(f"{argument.name} is {argument.type}, not {type(value).__name__}")
    return {argument.name: value for argument, value in given}


def output_shape_by_torch(call: Call) -> torch.Size:
    """Give the call to torch's own operator, on tensors without data, and return its output's shape."""

    def without_data(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    arguments = [without_data(a) for a in call.arguments]
    keywords = {name: without_data(value) for name, value in call.keywords.items()}
    shape: torch.Size = torch.ops.aten._flash_attention_forward(*arguments, **keywords)[0].shape
    return shape


def _fits(kind: str, value: object) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(kind.removeprefix("Optional[").removesuffix("]"), value)
    types: dict[str, type] = {"Tensor": torch.Tensor, "int": int, "SymInt": int, "float": float, "bool": bool}
    return type(value) is types[kind]
