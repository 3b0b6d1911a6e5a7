"""What an engine has to know of a model before it opens anything for it."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from vmem_kv.errors import ConfigError

DEFAULT_MODEL_LEN = 32_768


def keeps_latents(model: PreTrainedModel) -> bool:
    """Whether K and V are kept as latents, which the packed route would keep expanded: many times as large."""
    return getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None) is not None


def max_model_len(model: PreTrainedModel, wanted: int | None) -> int:
    """Return the most tokens of a sequence that this model is served with.

    Args:
        model: Made for `max_position_embeddings` tokens, if it says so.
        wanted: What the operator asked for; None for all that there is.

    Raises:
        ConfigError: More was asked for than the model can be served with.
    """
    config = model.config.get_text_config(decoder=True)
    made_for = getattr(config, "max_position_embeddings", None)
    if wanted is not None and made_for and wanted > made_for:
        raise ConfigError(f"max_model_len is {wanted}; the model was made for {made_for} tokens")
    border = longrope_border(config)
    if border is None:
        return wanted or made_for or DEFAULT_MODEL_LEN
    if wanted is not None and wanted > border:
        raise ConfigError(
            f"max_model_len is {wanted}; at most {border} are served: beyond them the model (rope_type longrope) turns "
            "all keys by other factors, and with them those of everybody who computes in the same step"
        )
    return min(wanted or border, made_for or border)


def longrope_border(config: PreTrainedConfig) -> int | None:
    """Return the length up to which LongRoPE's short factors hold; None where a model has no LongRoPE.

    transformers chooses the factors for a whole pass, by its longest sequence. Other types depend on no length within
    `max_position_embeddings`, the dynamic one included.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(of_type for of_type in parameters.values() if isinstance(of_type, dict))]
    return min(
        (int(rope["original_max_position_embeddings"]) for rope in each if rope.get("rope_type") == "longrope"),
        default=None,
    )


def vocabulary(model: PreTrainedModel) -> int:
    """Tokens that can both be read and be written."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(int(table.weight.shape[0]) for table in tables if table is not None)


def end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end an answer, by the model's generation settings."""
    ends = None if model.generation_config is None else model.generation_config.eos_token_id
    if ends is None:
        ends = model.config.get_text_config(decoder=True).eos_token_id
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
