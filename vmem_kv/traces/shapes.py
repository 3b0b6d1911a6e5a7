"""What one token adds to the KV cache of a model: by name, or by numbers such as ``32x8x128:bf16``.

The numbers are those of the models' published configurations. Only the shape of K and V is known here, no weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vmem_kv.errors import ConfigError
from vmem_kv.layout import LayerSpec, TensorSpec

_ELEMENT_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "fp8": 1, "int8": 1}
_CUSTOM = re.compile(r"(\d+)x(\d+)x(\d+)(?::([a-z0-9]+))?", re.ASCII)

_MOST = {"layers": 9_999, "heads": 9_999, "size of a head": 99_999}
"""A greater number in a shape is taken for a mistake."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The K and V of a model."""

    name: str
    layers: tuple[LayerSpec, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes that one token adds over all layers."""
        return sum(layer.key.token_bytes + layer.value.token_bytes for layer in self.layers)


def _uniform(name: str, n_layers: int, n_kv_heads: int, head_dim: int, element_bytes: int = 2) -> ModelShape:
    return ModelShape(name, (LayerSpec.uniform(n_kv_heads, head_dim, element_bytes),) * n_layers)


SHAPES = {
    shape.name: shape
    for shape in (
        _uniform("llama-3-8b", 32, 8, 128),
        _uniform("llama-3-70b", 80, 8, 128),
        _uniform("llama-3.2-1b", 16, 8, 64),
        _uniform("mistral-7b", 32, 8, 128),
        _uniform("qwen3-0.6b", 28, 8, 128),
        _uniform("qwen3-8b", 36, 8, 128),
        _uniform("smollm2-135m", 30, 3, 64),
        # A rotary key of 64 beside a latent of 512, one head each.
        ModelShape("deepseek-v3", (LayerSpec(TensorSpec(1, 64, 2), TensorSpec(1, 512, 2)),) * 61),
    )
}
"""Known shapes by name; K and V of two bytes a number."""


def find_shape(text: str) -> ModelShape:
    """Return a shape by its name, or made of LAYERSxHEADSxDIM with an optional number format behind a colon.

    Raises:
        ConfigError: The name is unknown, or a number makes no sense.
    """
    wanted = text.strip().lower()
    if wanted in SHAPES:
        return SHAPES[wanted]
    match = _CUSTOM.fullmatch(wanted)
    if match is None:
        raise ConfigError(
            f"unknown model shape {text[:80]!r}; choose {', '.join(SHAPES)}, or write K/V layers x heads x size, "
            "for example 32x8x128:bf16"
        )
    for digits, (what, most) in zip(match.group(1, 2, 3), _MOST.items(), strict=True):
        if len(digits) > 20 or not 1 <= int(digits) <= most:
            raise ConfigError(f"model shape {text[:80]!r}: {what} is {digits[:20]}; it must lie between 1 and {most:,}")
    n_layers, n_heads, head_dim = (int(digits) for digits in match.group(1, 2, 3))
    dtype = match[4] or "bf16"
    if dtype not in _ELEMENT_BYTES:
        raise ConfigError(f"unknown number format {dtype!r} in {text!r}; choose one of {', '.join(_ELEMENT_BYTES)}")
    return _uniform(wanted, n_layers, n_heads, head_dim, _ELEMENT_BYTES[dtype])
