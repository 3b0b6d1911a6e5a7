"""Tiny random models, one for each way in which a model of transformers uses its cache.

Guarantees: built from configuration classes alone (nothing is downloaded), seeded, in evaluation mode, and shared by a
whole test session, so a test must not change a model. Weights are scaled up, those of attention most: the logits of a
freshly initialised model are so close together that rounding could choose the next token, and its attention adds so
little that many models would repeat one token whatever the cache held. For the same reason no output embedding is tied.
Windows and chunks are 8 tokens, and a head of a token is at least 128 bytes, so that 40 tokens cross the windows and,
with pages of 4 KiB, some pages.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
WINDOW = 8
MAX_POSITIONS = 256
FIRST_ORDINARY_TOKEN = 3  # below: padding, end, beginning
SPECIAL_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


@dataclass(frozen=True)
class Architecture:
    """How to build one model, and what its cache consists of."""

    name: str
    model_class: str
    build_config: Callable[[], PreTrainedConfig]
    layer_kinds: frozenset[str]  # what `get_layer_types_and_kwargs` must say about the configuration
    is_encoder_decoder: bool = False
    attention_scale: float = 16.0  # of the weights of attention; 3 for all others
    cache_argument: str = "past_key_values"  # what `forward` and `generate` call the cache

    @property
    def has_kv(self) -> bool:
        """Whether any layer keeps keys and values."""
        return bool(self.layer_kinds - {"linear_attention", "conv", "dummy"})

    @property
    def has_window(self) -> bool:
        """Whether any layer forgets."""
        return bool(self.layer_kinds & {"sliding_attention", "chunked_attention"})

    @property
    def has_state(self) -> bool:
        """Whether any layer keeps a state that is not keys and values."""
        return bool(self.layer_kinds & {"linear_attention", "conv", "hybrid"})


def common(**overrides: Any) -> dict[str, Any]:
    """What the tiny configurations have in common, and what one of them has instead."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        **SPECIAL_TOKENS,
    }
    fields.update(overrides)
    return fields


def _llama() -> PreTrainedConfig:
    return transformers.LlamaConfig(**common(head_dim=64, num_hidden_layers=3))


def _qwen3() -> PreTrainedConfig:
    return transformers.Qwen3Config(**common(head_dim=64, num_key_value_heads=1))


def _gpt2() -> PreTrainedConfig:
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=128,
        n_layer=2,
        n_head=4,
        n_positions=MAX_POSITIONS,
        tie_word_embeddings=False,
        **SPECIAL_TOKENS,
    )


def _qwen2_moe() -> PreTrainedConfig:
    return transformers.Qwen2MoeConfig(
        **common(
            hidden_size=128,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


def _mistral() -> PreTrainedConfig:
    return transformers.MistralConfig(**common(head_dim=64, sliding_window=WINDOW))


def _gemma2() -> PreTrainedConfig:
    return transformers.Gemma2Config(
        **common(head_dim=64, sliding_window=WINDOW, query_pre_attn_scalar=64, attn_logit_softcapping=50.0)
    )


def _gemma3() -> PreTrainedConfig:
    return transformers.Gemma3TextConfig(
        **common(
            head_dim=64,
            num_hidden_layers=3,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        )
    )


def _gpt_oss() -> PreTrainedConfig:
    return transformers.GptOssConfig(
        **common(
            head_dim=64,
            sliding_window=WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"],
        )
    )


def _llama4() -> PreTrainedConfig:
    return transformers.Llama4TextConfig(
        **common(
            head_dim=64,
            num_hidden_layers=4,
            intermediate_size_mlp=96,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            attention_chunk_size=WINDOW,
        )
    )


def _gemma3n() -> PreTrainedConfig:
    pattern = ["sliding_attention"] * 4 + ["full_attention"]
    return transformers.Gemma3nTextConfig(
        **common(
            head_dim=64,
            num_hidden_layers=10,
            num_kv_shared_layers=5,
            layer_types=pattern * 2,
            sliding_window=WINDOW,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=16,
            laurel_rank=8,
            altup_num_inputs=2,
        )
    )


def _deepseek_v3() -> PreTrainedConfig:
    return transformers.DeepseekV3Config(
        **common(
            num_key_value_heads=4,
            moe_intermediate_size=32,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            kv_lora_rank=96,
            q_lora_rank=32,
            qk_rope_head_dim=32,
            qk_nope_head_dim=32,
            v_head_dim=32,
        )
    )


def _qwen3_next() -> PreTrainedConfig:
    return transformers.Qwen3NextConfig(
        **common(
            head_dim=64,
            num_hidden_layers=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


def _jamba() -> PreTrainedConfig:
    return transformers.JambaConfig(
        **common(
            hidden_size=128,
            num_hidden_layers=4,
            num_experts=2,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=8,
        )
    )


def _bamba() -> PreTrainedConfig:
    return transformers.BambaConfig(
        **common(
            hidden_size=128,
            num_hidden_layers=3,
            attn_layer_indices=[0, 2],
            mamba_n_heads=8,
            mamba_d_state=8,
            mamba_chunk_size=16,
        )
    )


def _falcon_h1() -> PreTrainedConfig:
    return transformers.FalconH1Config(
        **common(
            hidden_size=128,
            mamba_d_ssm=128,
            mamba_expand=1,
            mamba_n_heads=8,
            mamba_d_state=8,
            mamba_chunk_size=16,
        )
    )


def _lfm2() -> PreTrainedConfig:
    return transformers.Lfm2Config(
        **common(hidden_size=128, num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2)
    )


def _mamba() -> PreTrainedConfig:
    return transformers.MambaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=8,
        tie_word_embeddings=False,
        **SPECIAL_TOKENS,
    )


def _t5() -> PreTrainedConfig:
    return transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=64,
        d_ff=96,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
        **SPECIAL_TOKENS,
    )


def _bart() -> PreTrainedConfig:
    return transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=MAX_POSITIONS,
        decoder_start_token_id=2,
        tie_word_embeddings=False,
        forced_eos_token_id=None,
        **SPECIAL_TOKENS,
    )


def _architecture(
    build_config: Callable[[], PreTrainedConfig], model_class: str, *layer_kinds: str, **fields: Any
) -> Architecture:
    name = build_config.__name__.removeprefix("_")
    return Architecture(name, model_class, build_config, frozenset(layer_kinds), **fields)


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _architecture(_llama, "LlamaForCausalLM", "full_attention"),
        _architecture(_qwen3, "Qwen3ForCausalLM", "full_attention"),
        _architecture(_gpt2, "GPT2LMHeadModel", "full_attention"),
        _architecture(_qwen2_moe, "Qwen2MoeForCausalLM", "full_attention"),
        _architecture(_mistral, "MistralForCausalLM", "sliding_attention"),
        _architecture(_gemma2, "Gemma2ForCausalLM", "full_attention", "sliding_attention"),
        _architecture(_gemma3, "Gemma3ForCausalLM", "full_attention", "sliding_attention"),
        _architecture(_gpt_oss, "GptOssForCausalLM", "full_attention", "sliding_attention"),
        _architecture(_llama4, "Llama4ForCausalLM", "full_attention", "chunked_attention"),
        _architecture(_gemma3n, "Gemma3nForCausalLM", "full_attention", "sliding_attention", "dummy"),
        _architecture(_deepseek_v3, "DeepseekV3ForCausalLM", "full_attention"),
        _architecture(_qwen3_next, "Qwen3NextForCausalLM", "full_attention", "linear_attention"),
        _architecture(_jamba, "JambaForCausalLM", "full_attention", "linear_attention"),
        _architecture(_bamba, "BambaForCausalLM", "full_attention", "linear_attention"),
        _architecture(_falcon_h1, "FalconH1ForCausalLM", "hybrid"),
        _architecture(_lfm2, "Lfm2ForCausalLM", "full_attention", "conv"),
        _architecture(_mamba, "MambaForCausalLM", "linear_attention", cache_argument="cache_params"),
        _architecture(
            _t5, "T5ForConditionalGeneration", "full_attention", is_encoder_decoder=True, attention_scale=8.0
        ),
        _architecture(_bart, "BartForConditionalGeneration", "full_attention", is_encoder_decoder=True),
    )
}


def _scale_matrices(model: PreTrainedModel, attention_scale: float) -> None:
    # Decay rates and convolutions are left alone: they are exponents and filters, not projections.
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "A_log" not in name and "conv" not in name:
            is_attention = "attn" in name.lower() or "attention" in name.lower()
            parameter.mul_(attention_scale if is_attention else 3.0)


@functools.cache
def build_model(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> PreTrainedModel:
    """Return the architecture's model, the same one for the same arguments. `attention=None` is the model's default."""
    if dtype == torch.float32 and attention is None:
        architecture = ARCHITECTURES[name]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a test's own seed is not disturbed
            torch.manual_seed(0)
            model: PreTrainedModel = getattr(transformers, architecture.model_class)(architecture.build_config())
            _scale_matrices(model, architecture.attention_scale)
        return model.eval()
    model = copy.deepcopy(build_model(name)).to(dtype)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


@functools.cache
def build_assistant(name: str) -> PreTrainedModel:
    """Return a model that proposes what `build_model(name)` would say, often but not always right."""
    model = copy.deepcopy(build_model(name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * 0.03)
    # Five guesses a round, however unsure: short guesses would never take back more than one token. But with the
    # oldest releases an assistant cannot make several guesses through a window, whatever the cache.
    if ARCHITECTURES[name].has_window and Version(transformers.__version__) < Version("5.18"):
        return model
    model.generation_config.num_assistant_tokens = 5
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def random_tokens(batch_size: int, length: int, seed: int) -> torch.Tensor:
    """Return ordinary tokens, `[batch_size, length]`, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_ORDINARY_TOKEN, VOCABULARY, (batch_size, length), generator=generator)
