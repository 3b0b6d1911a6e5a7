"""The timing audit: its arithmetic, its verdicts, and that it asks what it says. No time is judged here."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import prefix_timing
from benchmarks.prefix_timing import Seen, audit, compare, ks_distance, ks_p, verdict

from .harness import engine_on


def test_the_distance_is_that_of_the_distribution_functions() -> None:
    assert ks_distance([1, 2, 3], [1, 2, 3]) == 0
    assert ks_distance([1, 2], [3, 4]) == 1
    assert ks_distance([1, 2, 3, 4], [3, 4, 5, 6]) == 0.5
    assert ks_distance([1, 1, 1, 2], [1, 2, 2, 2]) == 0.5


def test_p_is_kolmogorovs() -> None:
    """Against values of his limit distribution, by the argument that the statistic comes to."""
    n = 1_000_000
    root = (n / 2) ** 0.5
    for x, p in ((0.5, 0.9639), (1.0, 0.2700), (1.36, 0.0495), (1.63, 0.0098), (2.0, 0.00067)):
        assert ks_p(x / root, n, n) == pytest.approx(p, rel=0.01)
    assert ks_p(0.0, 5, 5) == 1.0
    assert ks_p(1.0, 250, 250) < 1e-9


def test_samples_of_one_distribution_are_told_apart_as_often_as_p_says() -> None:
    rng = random.Random(3)

    def p_of(shift: float) -> float:
        left, right = [rng.gauss(0, 1) for _ in range(100)], [rng.gauss(shift, 1) for _ in range(100)]
        return compare(0, "same", left, right).p

    n_seen = sum(p_of(0.0) <= 0.05 for _ in range(400))
    assert 4 <= n_seen <= 36
    assert all(p_of(1.5) < 0.01 for _ in range(20))


def seen(auditor: str, p: float) -> Seen:
    return Seen(0, auditor, 10, 1.0, 2.0, 0.5, p)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([seen("another", 0.3), seen("same", 0.001)], "pass"),
        ([seen("another", 0.003), seen("same", 0.001)], "LEAK"),
        ([seen("another", 0.3), seen("same", 0.3)], "BLIND"),
        ([seen("another", 0.003), seen("same", 0.3)], "BLIND"),
    ],
)
def test_the_verdict_is_blind_before_anything_else(found: list[Seen], expected: str) -> None:
    assert verdict(found).startswith(expected)
    assert all(s.is_as_it_should_be for s in found) == (expected == "pass")


@pytest.mark.parametrize(("domain", "n_found"), [("owner", 3), ("auditor", 0)])
def test_the_auditor_asks_as_often_what_was_asked_before_as_what_was_not(domain: str, n_found: int) -> None:
    with engine_on(max_num_seqs=2) as engine:
        times = audit(engine, domain, 3, 40, random.Random(1))
        assert [len(kind) for kind in times] == [3, 3]
        stats = engine.snapshot().prefixes
        assert stats is not None
        assert stats.n_lookups == 12
        assert (stats.n_hits, stats.n_hit_tokens) == (n_found, n_found * 39)


def test_the_program_writes_what_it_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With times that are made up: who finds a prefix is faster."""

    def timed(engine: object, prompt: object, domain: str) -> float:
        before = engine.snapshot().prefixes.n_hits  # type: ignore[attr-defined]
        stock(engine, prompt, domain)  # type: ignore[arg-type]
        return 1.0 if engine.snapshot().prefixes.n_hits > before else 9.0  # type: ignore[attr-defined]

    stock = prefix_timing.first_token_ms
    monkeypatch.setattr(prefix_timing, "first_token_ms", timed)
    file = tmp_path / "audit.json"
    arguments = ["--model", "tiny", "--samples", "12", "--runs", "1", "--tokens", "24", "--json", str(file)]
    prefix_timing.main(arguments)
    record = json.loads(file.read_text())
    assert record["verdict"].startswith("pass")
    assert [(s["auditor"], s["p"] <= 0.01) for s in record["seen"]] == [("another", False), ("same", True)]
    monkeypatch.setattr(prefix_timing, "AUDITORS", {"another": "owner", "same": "owner"})  # a domain that is ignored
    with pytest.raises(SystemExit):
        prefix_timing.main(arguments)
    assert json.loads(file.read_text())["verdict"].startswith("LEAK")
