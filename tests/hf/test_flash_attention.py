"""transformers' own "flash_attention_2" over our cache: kernels get views of the mapped memory, and no copies.

flash-attn needs a GPU. Here its two functions, with the signatures of flash-attn 2.8, are plain torch; everything
around them (masks, unpadding, the choice of the function) is transformers' own code.
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache, modeling_flash_attention_utils

from tests.core.backends import BACKENDS, open_backend
from vmem_kv import VmemCache

from .architectures import build_model, random_tokens


class FlashAttn:
    """flash-attn's functions, on any device, and what they were called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def flash_attn_func(
        self,
        q: torch.Tensor,  # [B, S, H, D]
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> torch.Tensor:
        self.calls.append(("dense", k, v))
        attend = partial(attend_one, scale=softmax_scale, causal=causal, window=window_size[0])
        return torch.stack([attend(*one) for one in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        self,
        q: torch.Tensor,  # [n_tokens, H, D]
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.calls.append(("varlen", k, v))
        attend = partial(attend_one, scale=softmax_scale, causal=causal, window=window_size[0])
        starts = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
        return torch.cat([attend(q[q0:q1], k[k0:k1], v[k0:k1]) for (q0, k0), (q1, k1) in pairwise(starts)])


def attend_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None, causal: bool, window: int
) -> torch.Tensor:
    """One sequence, `[n, H, D]` each; causal and window aligned at the bottom right, as flash-attn does."""
    n_queries, n_keys = q.shape[0], k.shape[0]
    behind = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)[None]
    visible = torch.ones_like(behind, dtype=torch.bool)
    if causal:
        visible &= behind >= 0
    if window >= 0:
        visible &= behind <= window
    output = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=visible,
        scale=scale,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> FlashAttn:
    """Let transformers find these functions where it looks for the package."""
    functions, module = FlashAttn(), modeling_flash_attention_utils
    found = (functions.flash_attn_func, functions.flash_attn_varlen_func, None, module._pad_input, module._unpad_input)
    monkeypatch.setattr(module, "_lazy_imports", lambda *args, **kwargs: found)
    monkeypatch.setattr(module, "_loaded_implementation", None)
    return functions


def flash_model(name: str) -> Any:
    """The model with the attention that `set_attn_implementation` would choose if the package were here."""
    model = copy.deepcopy(build_model(name)).to(torch.bfloat16)
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_padded", [False, True], ids=["full rows", "padded rows"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_flash_attention_sees_the_same_keys(flash_attn: FlashAttn, name: str, is_padded: bool, backend: str) -> None:
    model, inputs = flash_model(name), random_tokens(3, 9, seed=0)
    mask = torch.ones_like(inputs)
    if is_padded:
        mask[0, :4] = mask[2, :1] = 0
    outputs, kinds = [], []
    open_driver = lambda device, config: open_backend(backend)  # noqa: E731
    for cache in (DynamicCache(config=model.config), ours := VmemCache(model.config, open_driver=open_driver)):
        flash_attn.calls.clear()
        outputs.append(
            model.generate(
                inputs, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0
            )
        )
        kinds.append([kind for kind, _, _ in flash_attn.calls])
    assert torch.equal(*outputs)
    assert kinds[0] == kinds[1]
    assert ("varlen" in kinds[0]) == is_padded
    if not is_padded:
        assert_no_copies(flash_attn, ours)
    flash_attn.calls.clear()
    ours.close()


def assert_no_copies(flash_attn: FlashAttn, cache: VmemCache) -> None:
    """What the cache's kernels were given lies in its reservations."""
    reservations = [layer._rows.cache.region.reservation for layer in cache.layers]
    for _, *states in flash_attn.calls:
        for tensor in states:
            assert any(r.base <= tensor.data_ptr() < r.end for r in reservations), "a copy was attended"
            assert tensor.stride(-1) == 1
