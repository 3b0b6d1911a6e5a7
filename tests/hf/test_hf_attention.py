"""The registered attention function against a plain reference in float64."""

import pytest
import torch

pytest.importorskip("transformers")

from vmem_kv.errors import ConfigError
from vmem_kv.integrations.hf_attention import packed_sdpa_attention


class FakeModule(torch.nn.Module):
    """What transformers' attention functions read off a module."""

    is_causal = True

    def __init__(self, n_groups):
        super().__init__()
        self.num_key_value_groups = n_groups


def reference(query, key, value, mask, scale):
    query, key, value = (t.double() for t in (query, key, value))
    n_groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(n_groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "n_heads", "n_kv"), [(1, 9, 3), (4, 9, 3), (1, 4, 4), (2, 8, 1)])
@pytest.mark.parametrize("n_tokens", [1, 17, 600])
def test_decoding_matches_a_plain_reference(dtype, batch, n_heads, n_kv, n_tokens):
    generator = torch.Generator().manual_seed(n_tokens)
    query = torch.randn(batch, n_heads, 1, 32, generator=generator).to(dtype)
    # Strided, as the cache hands it out: head and row strides far larger than the length.
    key, value = (torch.randn(batch, n_kv, 1024, 32, generator=generator).to(dtype)[:, :, :n_tokens] for _ in "kv")
    output, weights = packed_sdpa_attention(FakeModule(n_heads // n_kv), query, key, value, None, scaling=0.3)
    assert weights is None
    assert output.shape == (batch, 1, n_heads, 32)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(output.double(), reference(query, key, value, None, 0.3), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("is_bool", [True, False])
@pytest.mark.parametrize("mask_heads", [1, 6])
def test_masks_reach_the_packed_heads(is_bool, mask_heads):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 6, 1, 16), torch.randn(3, 2, 40, 16), torch.randn(3, 2, 40, 16)
    allowed = torch.rand(3, mask_heads, 1, 40) < 0.6
    allowed[..., 0] = True
    mask = allowed if is_bool else torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    output, _ = packed_sdpa_attention(FakeModule(3), query, key, value, mask, scaling=0.25)
    torch.testing.assert_close(output.double(), reference(query, key, value, mask, 0.25), atol=1e-5, rtol=1e-5)


def test_several_query_tokens_go_to_the_stock_function():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    output, _ = packed_sdpa_attention(FakeModule(2), query, key, value, None, scaling=0.25)
    torch.testing.assert_close(output.double(), reference(query, key, value, causal, 0.25), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["softcap", "s_aux"])
def test_what_the_kernel_lacks_is_refused(what):
    states = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ConfigError, match="eager"):
        packed_sdpa_attention(FakeModule(1), states, states, states, None, **{what: 30.0})
