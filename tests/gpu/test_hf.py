"""`generate` over a `VmemCache` on a device: the tokens of DynamicCache, and all memory back."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("transformers")

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tests.gpu.device import NEEDS_A_GPU
from vmem_kv.integrations.hf import VmemCache

pytestmark = NEEDS_A_GPU

HAS_FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None


def build(attention: str, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation=attention)
    return model.to("cuda:0").eval()


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        ("sdpa", torch.float32),
        ("sdpa", torch.bfloat16),
        ("vmem_kv", torch.float32),
        pytest.param(
            "flash_attention_2",
            torch.bfloat16,
            marks=pytest.mark.skipif(not HAS_FLASH_ATTN, reason="the package flash-attn is not installed"),
        ),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_dynamic_cache(attention: str, dtype: torch.dtype, batch: int) -> None:
    model = build(attention, dtype)
    tokens = torch.randint(1, 128, (batch, 1100), device="cuda:0")
    options = {
        "max_new_tokens": 40,
        "min_new_tokens": 40,
        "do_sample": False,
        "attention_mask": torch.ones_like(tokens),
    }
    expected = model.generate(tokens, past_key_values=DynamicCache(config=model.config), **options)
    free_before = torch.cuda.mem_get_info()[0]
    with VmemCache(model.config) as cache:
        output = model.generate(tokens, past_key_values=cache, **options)
        cache.check()
        assert cache.stats().n_live_pages > 0
    assert torch.equal(output, expected)
    torch.cuda.empty_cache()
    # What stays is at most what CUDA itself keeps; the pages of one cache are far more.
    assert free_before - torch.cuda.mem_get_info()[0] < 64 << 20
