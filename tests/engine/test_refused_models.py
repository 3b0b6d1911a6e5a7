"""Models that would answer one request by what others left or do are refused at load, or served within bounds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.hf.architectures import build_model, common
from vmem_kv.engine import model_facts
from vmem_kv.engine.engine import Engine
from vmem_kv.engine.llm import make_config
from vmem_kv.engine.module_state import find_module_state
from vmem_kv.engine.request import Request
from vmem_kv.errors import ConfigError

from .harness import backend, greedy, prompt_of, run, tokens

BORDER = 32
MAX_POSITIONS = 96
ROUTES = ["packed", "rows"]


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Scaled as tests/hf/architectures.py says."""
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(16.0 if "attn" in name else 3.0)
    return model.eval()


def rope_llama(rope: dict[str, Any]) -> PreTrainedModel:
    return build(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **common(
                max_position_embeddings=MAX_POSITIONS, head_dim=64, rope_parameters={"rope_theta": 10_000.0, **rope}
            )
        ),
    )


def longrope() -> PreTrainedModel:
    return rope_llama(
        {
            "rope_type": "longrope",
            "factor": 3.0,
            "original_max_position_embeddings": BORDER,
            "short_factor": [1.0] * 32,
            "long_factor": [1.0 + i / 2 for i in range(32)],
        }
    )


def recurrent_gemma() -> PreTrainedModel:
    return build(
        transformers.RecurrentGemmaForCausalLM,
        transformers.RecurrentGemmaConfig(
            **common(max_position_embeddings=MAX_POSITIONS, num_hidden_layers=3, lru_width=64)
        ),
    )


def bidirectional_gemma() -> PreTrainedModel:
    return build(
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(
            **common(
                max_position_embeddings=MAX_POSITIONS, head_dim=64, sliding_window=8, use_bidirectional_attention=True
            )
        ),
    )


def engine(model: PreTrainedModel, **options: Any) -> Engine:
    return Engine(model, None, make_config(**options), open_driver=backend())


def generated(model: PreTrainedModel, prompt: tuple[int, ...], n_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_tokens, do_sample=False, eos_token_id=None
        )
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_state_in_modules_is_refused(route: str) -> None:
    with pytest.raises(ConfigError, match="RecurrentGemma") as caught:
        engine(recurrent_gemma(), route=route)
    if route != "packed":
        assert "keep what requests leave" in str(caught.value)
        assert "conv1d_state" in str(caught.value)


class Keeping(torch.nn.Module):
    """Keeps the tokens it saw last in one way; hands them to a model."""

    written: torch.Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("written", torch.zeros(1, 2, dtype=torch.long), persistent=False)
        self.register_buffer("weights", torch.zeros(8))

    def forward(self, token_ids: torch.Tensor) -> None:
        if self.how == "attribute":
            self.last = token_ids
        elif self.how == "buffer":
            self.written.copy_(token_ids)
        elif self.how == "growing":
            self.last = torch.cat([getattr(self, "last", token_ids[:, :0]), token_ids], 1)
        elif self.how == "table":
            self.table = torch.arange(token_ids.shape[1])
        elif self.how == "lazy" and not hasattr(self, "table"):
            self.table = torch.arange(8)


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("attribute", ["0.last"]),
        ("buffer", ["0.written"]),
        ("growing", ["0.last"]),
        ("table", []),
        ("lazy", []),
        ("not", []),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_only_what_depends_on_tokens_is_state(how: str, found: list[str], times: int) -> None:
    """Also where the model has been used before."""
    model = torch.nn.Sequential(Keeping(how))
    for _ in range(times):
        assert find_module_state(model, model) == found


@pytest.mark.parametrize("route", ROUTES)
def test_a_packed_models_module_that_keeps_state_is_seen(route: str) -> None:
    model = copy.deepcopy(build_model("llama"))
    embeddings: Any = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, _, output: setattr(module, "last", output))
    with pytest.raises(ConfigError, match=r"embed_tokens\.last"):
        engine(model, route=route)


@pytest.mark.parametrize("route", ["auto", *ROUTES])
def test_attention_that_is_not_causal_is_refused(route: str) -> None:
    with pytest.raises(ConfigError, match="not causal"):
        engine(bidirectional_gemma(), route=route)


def test_longrope_is_served_up_to_its_border() -> None:
    for route in ROUTES:
        served = engine(longrope(), route=route)
        assert served.max_model_len == BORDER
        served.close()
    shorter = engine(longrope(), max_model_len=20)
    assert shorter.max_model_len == 20
    shorter.close()
    with pytest.raises(ConfigError, match=f"at most {BORDER} are served.*longrope"):
        engine(longrope(), max_model_len=BORDER + 1)


@pytest.mark.parametrize("route", ROUTES)
def test_within_the_border_lengths_change_nobody_elses_tokens(route: str) -> None:
    check_equal_generate(longrope(), route, BORDER)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rope_type", ["dynamic", "yarn"])
def test_other_ropes_are_served_whole(rope_type: str, route: str) -> None:
    rope = {"rope_type": rope_type, "factor": 3.0, "original_max_position_embeddings": BORDER}
    check_equal_generate(rope_llama(rope), route, MAX_POSITIONS)


def check_equal_generate(model: PreTrainedModel, route: str, length: int) -> None:
    """Some come to the most tokens that are served while others are short."""
    asks = [(prompt_of(n), n_tokens) for n in (3, 9) for n_tokens in (length - n, 7)]
    expected = [generated(model, prompt, n_tokens) for prompt, n_tokens in asks]
    served = engine(model, route=route, max_num_seqs=4)
    assert served.max_model_len == length
    requests = [Request(prompt, greedy(n_tokens, ignore_eos=True)) for prompt, n_tokens in asks]
    answers = run(served, requests)
    served.close()
    assert [tokens(answers, request) for request in requests] == expected


@pytest.mark.parametrize("route", ROUTES)
def test_beyond_the_border_they_would(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(model_facts, "longrope_border", lambda config: None)
    with pytest.raises(AssertionError):
        check_equal_generate(longrope(), route, MAX_POSITIONS)
