"""What is counted, and how Prometheus reads it. Labels have few values, and none that a client chooses.

Guarantees: the engine's numbers are those of one snapshot, taken when they are asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vmem_kv.engine.async_engine import AsyncEngine, Health
from vmem_kv.engine.stats import EngineStats
from vmem_kv.engine.tier_stats import TierFigures
from vmem_kv.prefix.entry import PrefixStats

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The server's own counters, and the engine's snapshot.

    Args:
        engine: Whose snapshot is read.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._registry = registry = CollectorRegistry()
        self.responses = Counter(
            "vmem_kv_http_responses", "Responses, by route and status.", ("route", "status"), registry=registry
        )
        self.first_token_s = Histogram(
            "vmem_kv_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.between_tokens_s = Histogram(
            "vmem_kv_time_per_token_seconds",
            "Time between the tokens of an answer, on average over the answer.",
            buckets=(0.001, 0.0025, *_SECONDS[:9]),
            registry=registry,
        )
        self.request_s = Histogram(
            "vmem_kv_request_seconds", "From arrival to the last byte.", buckets=_SECONDS, registry=registry
        )
        self.ended_early = Counter(
            "vmem_kv_requests_ended_early",
            "Requests that ended before their answer did, by cause.",
            ("cause",),
            registry=registry,
        )
        self.n_open = 0
        """HTTP requests whose response is not complete."""
        open_requests = Gauge("vmem_kv_http_open_requests", "Responses that are not complete.", registry=registry)
        open_requests.set_function(lambda: self.n_open)
        self.recent_first_token_s: deque[float] = deque(maxlen=1_000)
        """Times to first token that the dashboard has not taken yet."""
        registry.register(_EngineCollector(engine))

    def saw_first_token(self, seconds: float) -> None:
        """Note how long a request's first token took."""
        self.first_token_s.observe(seconds)
        self.recent_first_token_s.append(seconds)

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Turns snapshots into metrics."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: registering must not take a snapshot."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Take a snapshot."""
        yield from _engine_metrics(self._engine.snapshot(), self._engine.health(), self._engine.n_rejected)


def _engine_metrics(stats: EngineStats, health: Health, n_rejected: int) -> Iterator[Metric]:
    cache = stats.cache
    gauges = {
        "running_sequences": ("Sequences that have a slot.", stats.n_running),
        "waiting_sequences": ("Sequences that wait for a slot.", stats.n_waiting),
        "engine_alive": ("Whether the engine runs.", int(health.is_alive)),
        "engine_silent_seconds": ("Since the engine last showed life.", health.silent_s),
        "mapper_alive": ("Whether memory is mapped ahead in the background.", int(bool(health.is_mapper_alive))),
        "draining": ("Whether nothing new is taken on.", int(health.is_draining)),
        "page_bytes": ("Size of a page.", cache.page_bytes),
        "pages_max": ("The pool's budget.", cache.max_pages),
        "pages_peak": ("The most pages that the pool ever owned.", cache.n_peak_owned_pages),
        "virtual_bytes": ("Addresses reserved.", cache.virtual_bytes),
        "mapped_bytes": ("Physical memory under the slots.", cache.mapped_bytes),
        "live_bytes": ("What the tokens of running sequences need.", stats.live_bytes),
        "mappings": ("Live mappings.", cache.n_mappings),
        "mappings_max": ("The limit on mappings.", cache.max_mappings),
    }
    yield from _each(GaugeMetricFamily, "", gauges)
    counters = {
        "steps": ("Engine steps.", stats.n_steps),
        "prompt_tokens": ("Prompt tokens computed.", stats.n_prompt_tokens),
        "generated_tokens": ("Tokens sampled.", stats.n_generated_tokens),
        "requests": ("Requests taken on.", stats.n_requests),
        "requests_rejected": ("Requests refused because too many waited.", n_rejected),
        "preemptions": ("Times that a sequence lost its slot.", stats.n_preempted),
        "recomputed_tokens": ("Tokens given up by preemptions.", stats.n_recomputed_tokens),
    }
    yield from _each(CounterMetricFamily, "", counters)
    pages = GaugeMetricFamily("vmem_kv_pages", "Pages by state.", labels=("state",))
    for state, n in stats.n_pages_by_state.items():
        pages.add_metric([state], n)
    yield pages
    if stats.prefixes is not None:
        yield from _prefix_metrics(stats.prefixes)
    if stats.tiers is not None:
        yield from _tier_metrics(stats.tiers)
    finished = CounterMetricFamily("vmem_kv_answers_finished", "Answers that ended, by reason.", labels=("reason",))
    for reason, n in stats.n_finished.items():
        finished.add_metric([reason], n)
    yield finished
    calls = CounterMetricFamily("vmem_kv_driver_calls", "Driver calls, by operation.", labels=("operation",))
    for operation, n in cache.driver_calls.items():
        calls.add_metric([operation], n)
    yield calls


def _tier_metrics(tiers: TierFigures) -> Iterator[Metric]:
    held = GaugeMetricFamily("vmem_kv_tier_bytes", "Memory and disk space that kept sequences hold.", labels=("tier",))
    bound = GaugeMetricFamily("vmem_kv_tier_bytes_max", "The bound on it.", labels=("tier",))
    for tier, n_bytes, max_bytes in (
        ("host", tiers.host.taken_bytes, tiers.host.max_bytes),
        ("disk", tiers.disk_bytes, tiers.max_disk_bytes),
    ):
        held.add_metric([tier], n_bytes)
        bound.add_metric([tier], max_bytes)
    yield held
    yield bound
    sessions = GaugeMetricFamily("vmem_kv_sessions", "Sessions by where they are.", labels=("tier",))
    for tier, n in tiers.n_sessions_by_tier.items():
        sessions.add_metric([tier], n)
    yield sessions
    moves = ("What is on its way between the device, host memory and disk.", tiers.n_moving)
    yield from _each(GaugeMetricFamily, "", {"tier_moves": moves})
    counters = {
        "parked_sequences": ("Times that a running sequence went to host memory.", tiers.n_parked),
        "restored_sequences": ("Times that one came back from there.", tiers.n_restored),
        "refused_parks": ("Times that one had to be computed again, for want of room or by a fault.", tiers.n_refused),
        "tier_out_bytes": ("Moved from the device to host memory.", tiers.host.out_bytes),
        "tier_in_bytes": ("Moved back.", tiers.host.in_bytes),
        "sessions_resumed": ("Sessions that a request went on with.", tiers.sessions.n_resumed),
        "sessions_moved_down": ("Sessions that went down a tier.", tiers.sessions.n_moved_down),
        "sessions_gone": ("Sessions that ended, by time or for want of room.", tiers.sessions.n_gone),
        "session_tokens": ("Tokens that were not computed, because a session had them.", tiers.n_session_tokens),
    }
    yield from _each(CounterMetricFamily, "", counters)


def _prefix_metrics(prefixes: PrefixStats) -> Iterator[Metric]:
    gauges = {
        "entries": ("Sequences that others can begin with.", prefixes.n_entries),
        "entries_in_use": ("Of them, those that run, or are kept by name.", prefixes.n_pinned),
        "pages": ("Pages that only cached prefixes and sessions keep.", prefixes.n_held_pages),
        "pages_max": ("The bound on these pages.", prefixes.max_pages),
    }
    yield from _each(GaugeMetricFamily, "prefix_", gauges)
    counters = {
        "lookups": ("Sequences that started.", prefixes.n_lookups),
        "hits": ("Of them, those that began with cached tokens.", prefixes.n_hits),
        "adoptions": ("Of them, those that went on in a cached slot.", prefixes.n_whole_hits),
        "looked_up_tokens": ("Tokens of sequences that started.", prefixes.n_looked_up_tokens),
        "hit_tokens": ("Of them, those that were not computed again.", prefixes.n_hit_tokens),
        "evictions": ("Cached prefixes given up.", prefixes.n_evicted),
        "evicted_pages": ("Pages that came free by that.", prefixes.n_evicted_pages),
    }
    yield from _each(CounterMetricFamily, "prefix_", counters)


def _each(
    family: type[GaugeMetricFamily | CounterMetricFamily], prefix: str, values: Mapping[str, tuple[str, float]]
) -> Iterator[Metric]:
    """A metric without labels for each (what it says, its value)."""
    for name, (text, value) in values.items():
        yield family(f"vmem_kv_{prefix}{name}", text, value)
