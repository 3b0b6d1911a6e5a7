"""Fixtures that several folders of tests use, which tests run, and in which order."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from . import figures
from .figures import PROOFS, pytest_addoption, pytest_terminal_summary  # noqa: F401 - hooks

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job that a shell started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONG_FORMS = "slow"
"""The marker of tests that take minutes to hours."""


def pytest_configure(config: pytest.Config) -> None:
    """Leave the long forms out, unless the user's own expression has a word on them."""
    figures.pytest_configure(config)
    wanted = config.option.markexpr
    if LONG_FORMS not in wanted:
        config.option.markexpr = f"({wanted}) and not {LONG_FORMS}" if wanted else f"not {LONG_FORMS}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the proofs: they take longest, and who comes last may have all the others wait."""
    items.sort(key=lambda item: not item.nodeid.startswith(PROOFS))


TEXT = "the sky is blue because light of short waves scatters most in clear air and we look up to see it"


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with grouped queries, and a tokenizer of a few words, as a folder on disk."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *dict.fromkeys(TEXT.split())])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # such that the likeliest token is likelier by far
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
