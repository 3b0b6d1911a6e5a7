"""`generate` over a `VmemCache` on a device: the tokens of DynamicCache, and all memory back."""

from __future__ import annotations

import gc
import importlib.util

import pytest

pytest.importorskip("transformers")

import torch
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

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


ATTENTIONS = [
    ("sdpa", torch.float32),
    ("sdpa", torch.bfloat16),
    ("vmem_kv", torch.float32),
    pytest.param(
        "flash_attention_2",
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_FLASH_ATTN, reason="the package flash-attn is not installed"),
    ),
]
N_NEW_TOKENS = 40
LEAK_BYTES = 4 << 20


def generate(model: LlamaForCausalLM, tokens: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens `[batch, n]` and the scores of the first new one `[batch, vocab_size]` in float32."""
    output = model.generate(
        tokens,
        past_key_values=cache,
        max_new_tokens=N_NEW_TOKENS,
        min_new_tokens=N_NEW_TOKENS,
        do_sample=False,
        attention_mask=torch.ones_like(tokens),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences, output.logits[0].float()


def free_bytes() -> int:
    """What the driver has to give, with nothing kept back by torch."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize(("attention", "dtype"), ATTENTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_model_answers_as_over_dynamic_cache(attention: str, dtype: torch.dtype, batch: int) -> None:
    """In float32 token by token; in 16 bits the logits nearly, for two equal ones may change places."""
    model = build(attention, dtype)
    tokens = torch.randint(1, 128, (batch, 1100), device="cuda:0")
    expected, expected_logits = generate(model, tokens, DynamicCache(config=model.config))
    with VmemCache(model.config) as cache:
        output, logits = generate(model, tokens, cache)
        cache.check()
        assert cache.stats().n_live_pages > 0
    assert output.shape == expected.shape
    if dtype is torch.float32:
        assert torch.equal(output, expected)
    scale = float(expected_logits.abs().max())
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=scale * (1e-4 if dtype is torch.float32 else 3e-2))


def test_caches_leave_no_memory_behind() -> None:
    """Ten caches one after the other; what one of them maps is more than what all may leave behind."""
    model = build("sdpa", torch.bfloat16)
    tokens = torch.randint(1, 128, (1, 1100), device="cuda:0")

    def use() -> int:
        with VmemCache(model.config) as cache:
            generate(model, tokens, cache)
            stats = cache.stats()
            return stats.n_live_pages * stats.page_bytes

    use()  # what CUDA, torch and the kernels keep for good
    before = free_bytes()
    mapped_bytes = [use() for _ in range(10)]
    assert min(mapped_bytes) > LEAK_BYTES
    assert before - free_bytes() < LEAK_BYTES


def test_a_cache_that_is_kept_is_seen_as_a_leak() -> None:
    """The measure of the test above can fail."""
    model = build("sdpa", torch.bfloat16)
    tokens = torch.randint(1, 128, (1, 1100), device="cuda:0")
    with VmemCache(model.config) as warm:
        generate(model, tokens, warm)
    before = free_bytes()
    with VmemCache(model.config) as kept:
        generate(model, tokens, kept)
        assert before - free_bytes() >= LEAK_BYTES
    assert before - free_bytes() < LEAK_BYTES
