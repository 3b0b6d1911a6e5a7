"""Frozen, validated configuration of the engine. None stands for: choose for me."""

from __future__ import annotations

from dataclasses import dataclass, field

from vmem_kv.config import CacheConfig
from vmem_kv.errors import ConfigError

ROUTES = ("auto", "packed", "rows")
PREFIX_POLICIES = ("lru", "cost")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the engine runs.

    Attributes:
        max_num_seqs: The most sequences that compute together; each has a slot.
        max_model_len: The most tokens of a sequence, prompt and answer; default: what the model was made for, and with
            LongRoPE the part of it in which the short factors hold.
        max_batch_tokens: The most tokens of one step. Longer prompts are computed in chunks.
        max_queued: The most requests that wait; more are refused.
        max_n: The most answers that one request may ask for.
        premap_tokens: How far ahead of need memory is mapped while a step computes; 0 for not at all.
        route: "packed", "rows", or "auto": packed where the model supports it.
        kernel: The attention kernel of the packed route, by name, or "auto".
        pack_weights: On a CPU, compute with a rearranged copy of the weights: much faster, for as much memory again
            (less where the first copy is mapped from a file).
        prefix_caching: Begin a sequence with what others of its domain have computed of its tokens. Models that keep
            more than K and V of all tokens compute everything anyway.
        prefix_policy: Which cached prefix goes first when room is needed: "lru", the least recently used, or "cost",
            the one of which the least work for each page is expected to be saved.
        prefix_share: The part of the memory budget, from 0 to 1, that cached prefixes may hold which nobody uses,
            sessions included. Beyond it prefixes go, then sessions leave the device, the longest unused first. They
            give way to live requests in any case.
        prefix_slots: How many of them, and of sessions, are kept, beyond the slots that are free anyway; default: three
            for each running sequence. They cost addresses, not memory.
        prefix_min_tokens: Shorter prefixes are computed: that costs less than looking after them.
        host_bytes: Host memory for what running sequences lose for want of pages, and for sessions; 0 for none, and
            then there are no sessions. It is taken as it is needed, and kept.
        disk_bytes: Room on disk for sessions beyond that; 0 for none.
        disk_folder: Where, on a local disk.
        session_ttl_s: How long a session that nobody asks for keeps its slot. Then it is in host memory for ten times
            as long, on disk for sixty times, and is gone.
        max_session_ttl_s: The longest that a request may ask for in its stead; default: `session_ttl_s`.
        max_sessions: The most sessions, wherever they are. For one more, whoever has most of them loses one.
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
    prefix_caching: bool = True
    prefix_policy: str = "lru"
    prefix_share: float = 1.0
    prefix_slots: int | None = None
    prefix_min_tokens: int = 16
    host_bytes: int = 0
    disk_bytes: int = 0
    disk_folder: str | None = None
    session_ttl_s: float = 60.0
    max_session_ttl_s: float | None = None
    max_sessions: int = 1_024
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_model_len",
            "max_batch_tokens",
            "max_queued",
            "max_n",
            "prefix_min_tokens",
            "max_sessions",
        ):
            value = getattr(self, name)
            if value is None and name == "max_model_len":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a positive number")
        for name in ("premap_tokens", "prefix_slots", "host_bytes", "disk_bytes"):
            value = getattr(self, name)
            if value is None and name == "prefix_slots":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name} is {value!r}; it must be 0 or more")
        if self.prefix_policy not in PREFIX_POLICIES:
            raise ConfigError(f"prefix_policy is {self.prefix_policy!r}; choose one of {', '.join(PREFIX_POLICIES)}")
        if not 0 <= self.prefix_share <= 1:
            raise ConfigError(f"prefix_share is {self.prefix_share!r}; it must be from 0 to 1")
        if not self.session_ttl_s >= 0:
            raise ConfigError(f"session_ttl_s is {self.session_ttl_s!r}; it must be 0 or more seconds")
        if not self.longest_session_ttl_s >= self.session_ttl_s:
            raise ConfigError(
                f"max_session_ttl_s is {self.max_session_ttl_s!r}; it must be session_ttl_s ({self.session_ttl_s:g}) "
                "or more"
            )
        if self.disk_bytes and not self.disk_folder:
            raise ConfigError("disk_bytes is set without disk_folder; name a folder on a local disk")
        if self.disk_bytes and not self.host_bytes:
            raise ConfigError("disk_bytes is set without host_bytes; what goes to disk passes through host memory")
        if self.route not in ROUTES:
            raise ConfigError(f"route is {self.route!r}; choose one of {', '.join(ROUTES)}")
        if self.cache.max_tokens is not None:
            raise ConfigError("cache.max_tokens is set; the engine's slots are as long as max_model_len, set that")
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens is {self.max_batch_tokens}, below max_num_seqs {self.max_num_seqs}; "
                "every running sequence must be able to compute a token in each step"
            )

    @property
    def longest_session_ttl_s(self) -> float:
        """The longest that a session may keep its slot."""
        return self.session_ttl_s if self.max_session_ttl_s is None else self.max_session_ttl_s

    @property
    def n_prefix_slots(self) -> int:
        """Slots beside those of running sequences."""
        if not (self.prefix_caching or self.host_bytes):
            return 0
        return 3 * self.max_num_seqs if self.prefix_slots is None else self.prefix_slots
