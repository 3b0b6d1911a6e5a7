"""Frozen, validated configuration of the engine. None stands for: choose for me."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmem_kv.config import CacheConfig
from vmem_kv.errors import ConfigError

ROUTES = ("auto", "packed", "rows")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine runs.

    Attributes:
        max_num_seqs: The most sequences that compute together; each has a slot.
        max_model_len: The most tokens of a sequence, prompt and answer; default: what the model was made for.
        max_batch_tokens: The most tokens of one step. Longer prompts are computed in chunks.
        max_queued: The most requests that wait; more are refused.
        max_n: The most answers that one request may ask for.
        premap_tokens: How far ahead of need memory is mapped while a step computes; 0 for not at all.
        route: "packed", "rows", or "auto": packed where the model supports it.
        kernel: The attention kernel of the packed route, by name, or "auto".
        pack_weights: On a CPU, compute with a rearranged copy of the weights: much faster, for as much memory again
            (less where the first copy is mapped from a file).
        cache: How memory is used: budget, page size, layout. `max_tokens` is ours (`max_model_len`).

    Raises:
        ConfigError: A value makes no sense; the message names it.
    """

    max_num_seqs: int = 32
    max_model_len: int | None = None
    max_batch_tokens: int = 512
    max_queued: int = 1_024
    max_n: int = 8
    premap_tokens: int = 16
    route: str = "auto"
    kernel: str = "auto"
    pack_weights: bool = True
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_model_len", "max_batch_tokens", "max_queued", "max_n"):
            value = getattr(self, name)
            if value is None and name == "max_model_len":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a positive number")
        if isinstance(self.premap_tokens, bool) or not isinstance(self.premap_tokens, int) or self.premap_tokens < 0:
            raise ConfigError(f"premap_tokens is {self.premap_tokens!r}; it must be 0 or more")
        if self.route not in ROUTES:
            raise ConfigError(f"route is {self.route!r}; choose one of {', '.join(ROUTES)}")
        if self.cache.max_tokens is not None:
            raise ConfigError("cache.max_tokens is set; the engine's slots are as long as max_model_len, set that")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens is {self.max_batch_tokens}, below max_num_seqs {self.max_num_seqs}; "
                "every running sequence must be able to compute a token in each step"
            )
