"""The schedule against a plain second one, over rules and over the real allocator."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from vmem_kv.driver.accounting import AccountingDriver
from vmem_kv.driver.host import HostDriver
from vmem_kv.driver.ledger import Ledger
from vmem_kv.errors import ConfigError, OutOfAddressSpace, OutOfPages, UsageError
from vmem_kv.layout import LayerSpec, Layout
from vmem_kv.replay.memory import AllocatorMemory, Key, Shortage
from vmem_kv.replay.rivals import RivalMemory, blocks_of, maximum_length, power_of_two
from vmem_kv.replay.schedule import POLICIES, Replay, StepTime, fcfs, first_fit, shortest
from vmem_kv.replay.statistics import Report
from vmem_kv.replay.study import SCHEMES, Setting, count_steady_calls, measure_decode, open_allocator
from vmem_kv.traces import Request, find_shape
from vmem_kv.units import KIB, MIB

from .reference import Outcome, simulate

BLOCK = 16
N_BLOCKS = 64
TIMES = StepTime(0.01, 1e-4, 1e-6)
LAYERS = [LayerSpec.uniform(1, 32, 2)] * 2
TOKEN_BYTES = 2 * 2 * 64  # so that a page of 4 KiB is one block
HEADROOM = 1 / 16


def traffic(seed: int, n_requests: int = 60) -> list[Request]:
    """Short and long requests, some that never fit, some in bursts, some that ask for nothing."""
    rng = random.Random(seed)
    at, found = 0.0, []
    for _ in range(n_requests):
        at += rng.choice([0.0, 0.0, 0.05, 3.0])
        prompt = rng.choice([1, 15, 16, 17, rng.randint(1, 400), rng.randint(1, 1200)])
        found.append(Request(at, prompt, rng.choice([0, 1, 2, rng.randint(1, 40), rng.randint(1, 300)])))
    return found


def paged() -> RivalMemory:
    budget = N_BLOCKS * BLOCK * TOKEN_BYTES
    return RivalMemory("paged", blocks_of(BLOCK), TOKEN_BYTES, budget, max_tokens=1 << 40, headroom=HEADROOM)


def allocator(*, keeps_warm: bool = False, n_slots: int = 12, kind: str = "token_major") -> AllocatorMemory:
    layout = Layout.build(kind, LAYERS, n_slots=n_slots, max_tokens=N_BLOCKS * BLOCK, page_bytes=4 * KIB)
    driver = AccountingDriver(MIB, 4 * KIB)
    return AllocatorMemory(
        "ours", driver, layout, N_BLOCKS * 4 * KIB, headroom=HEADROOM, keeps_warm=keeps_warm, items=driver.items
    )


def run(memory: object, requests: Sequence[Request], **options: object) -> Report:
    return Replay(memory, requests, n_max_running=12, step_time=TIMES, **options).run()  # type: ignore[arg-type]


def reference(requests: list[Request], **options: object) -> Outcome:
    times = (TIMES.fixed_s, TIMES.prefill_s, TIMES.context_s)
    headroom = int(N_BLOCKS * HEADROOM)
    return simulate(
        requests, block=BLOCK, n_blocks=N_BLOCKS, headroom_blocks=headroom, n_max_running=12, times=times, **options
    )  # type: ignore[arg-type]


def assert_same(report: Report, outcome: Outcome, block_bytes: int) -> None:
    counts = report.counts
    for name in ("n_done", "n_rejected", "n_preemptions", "n_output_tokens", "n_prompt_tokens", "n_steps"):
        assert getattr(counts, name) == getattr(outcome, name), name
    assert report.n_peak_running == outcome.n_peak_running
    assert report.whole.seconds == pytest.approx(outcome.seconds)
    live, held = outcome.live_token_seconds * TOKEN_BYTES, outcome.held_block_seconds * block_bytes
    assert report.whole.live_of_active == pytest.approx(live / held)
    assert report.whole.active_bytes == pytest.approx(held / outcome.seconds, abs=1)


MEMORIES: dict[str, Callable[[], object]] = {
    "rule": paged,
    "allocator, cold": allocator,
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("is_timed", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_every_count_is_that_of_a_plain_simulation(memory: str, is_timed: bool, seed: int) -> None:
    requests = traffic(seed)
    patience = 2.0 if seed % 2 else float("inf")
    where = MEMORIES[memory]()
    report = run(where, requests, is_timed=is_timed, patience_s=patience)
    assert_same(report, reference(requests, is_timed=is_timed, patience_s=patience), BLOCK * TOKEN_BYTES)
    assert report.is_complete
    assert report.counts.n_done + report.counts.n_rejected == len(requests)
    if isinstance(where, AllocatorMemory):
        where.check()
        where.close()


def test_the_random_traffic_reaches_every_branch() -> None:
    options = [{"is_timed": False}, {"is_timed": True, "patience_s": 2.0}]
    reports = [run(paged(), traffic(seed), **option) for seed in range(25) for option in options]
    assert sum(r.counts.n_preemptions for r in reports) > 20
    assert sum(r.counts.n_rejected for r in reports) > 20
    assert sum(r.counts.n_recomputed_tokens for r in reports) > 1000


class Leaks(RivalMemory):
    """Forgets to take back one sequence in three."""

    def end(self, keys: Sequence[Key]) -> None:
        super().end([key for key in keys if key % 3])


class AdmitsTooMany(RivalMemory):
    def lack(self, n_tokens: int, request: Request | None = None) -> Shortage | None:
        return None


@pytest.mark.parametrize("broken", [Leaks, AdmitsTooMany])
def test_the_comparison_notices_a_memory_that_counts_wrongly(broken: type[RivalMemory]) -> None:
    budget = N_BLOCKS * BLOCK * TOKEN_BYTES
    memory = broken("broken", blocks_of(BLOCK), TOKEN_BYTES, budget, max_tokens=1 << 40, headroom=HEADROOM)
    requests = traffic(3)
    with pytest.raises((AssertionError, KeyError)):
        assert_same(run(memory, requests), reference(requests), BLOCK * TOKEN_BYTES)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["token_major", "per_layer", "group:2", "per_head"])
def test_warm_slots_and_layouts_lose_no_request_and_keep_the_books(seed: int, kind: str) -> None:
    memory = allocator(keeps_warm=True, kind=kind)
    requests = traffic(seed)
    report = run(memory, requests)
    memory.check()
    assert report.counts.n_done + report.counts.n_rejected == len(requests)
    assert report.whole.live_of_active is not None
    assert report.whole.live_of_mapped is not None
    assert report.whole.live_of_owned is not None
    assert 0 < report.whole.live_of_owned <= report.whole.live_of_mapped <= report.whole.live_of_active <= 1
    assert report.peak_owned_bytes <= N_BLOCKS * 4 * KIB
    memory.close()


def test_wrong_books_are_noticed() -> None:
    memory = allocator()
    memory.begin(100, 100)
    memory.check()
    memory._n_active_pages += 1
    with pytest.raises(UsageError, match="in our books"):
        memory.check()
    memory.close()


def test_a_sequence_that_finds_no_room_leaves_nothing_behind() -> None:
    memory = allocator()
    key = memory.begin(1000, 1000)
    assert memory.lack(100) is OutOfPages
    with pytest.raises(OutOfPages):
        memory.begin(100, 100)
    memory.check()
    assert memory.cache.active_slots() == [key]
    memory.end([key])
    memory.end([memory.begin(100, 100)])
    memory.check()
    memory.close()


def test_a_driver_that_cannot_hold_the_budget_is_closed() -> None:
    opened: list[AccountingDriver] = []

    def open_small(budget_bytes: int, page_bytes: int) -> AccountingDriver:
        opened.append(AccountingDriver(4 * MIB, page_bytes))
        return opened[-1]

    setting = Setting.for_trace(find_shape("smollm2-135m"), 64 * MIB, 100, n_max_running=4)
    with pytest.raises(ConfigError, match="does not fit"):
        open_allocator(setting, name="x", kind="token_major", page_bytes=64 * KIB, open_driver=open_small)
    with pytest.raises(UsageError, match="closed driver"):
        opened[0].reserve(64 * KIB)


def test_a_policy_decides_who_comes_next() -> None:
    prompts = [900, 500, 40, 80]

    def below(limit: int) -> Callable[[int], bool]:
        return lambda index: prompts[index] < limit

    assert (fcfs(prompts, below(600)), first_fit(prompts, below(600))) == (None, 1)
    assert (shortest(prompts, below(600)), shortest(prompts, below(40))) == (2, None)
    assert first_fit(prompts, below(0)) is None
    requests = [Request(None, n, 30) for n in (600, 600, 20, 20, 20)]
    steps = {name: run(paged(), requests, policy=policy).counts.n_steps for name, policy in POLICIES.items()}
    assert all(run(paged(), requests, policy=policy).counts.n_done == 5 for policy in POLICIES.values())
    assert steps["fcfs"] == steps["first_fit"] == 60  # the second long one waits for the first
    peak = {name: run(paged(), requests, policy=policy).n_peak_running for name, policy in POLICIES.items()}
    assert peak == {"fcfs": 4, "first_fit": 4, "shortest": 4}
    # With first come, first served the short ones wait behind the long one: fewer run at first.
    first = {name: Replay(paged(), requests, policy=policy, step_time=TIMES) for name, policy in POLICIES.items()}
    for replay in first.values():
        replay._make_step()
    assert {name: len(replay._running) for name, replay in first.items()} == {"fcfs": 1, "first_fit": 4, "shortest": 4}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_may_begin_more_requests_than_a_policy_looks_at(policy: str) -> None:
    budget = 1000 * BLOCK * TOKEN_BYTES
    memory = RivalMemory("x", blocks_of(BLOCK), TOKEN_BYTES, budget, max_tokens=1 << 40, headroom=0.0)
    requests = [Request(None, 16, 1)] * 3000
    report = Replay(memory, requests, n_max_running=2048, policy=POLICIES[policy]).run()
    assert (report.counts.n_done, report.counts.n_steps, report.n_peak_running) == (3000, 3, 1000)
    assert report.loaded.n_running == pytest.approx(1000)
    # The last step is full, too, and nobody waits behind it.
    assert report.loaded.seconds == pytest.approx(report.whole.seconds * 2 / 3)


def test_time_is_loaded_while_the_trace_has_more() -> None:
    replay = Replay(paged(), [Request(None, 16, 5)] * 2, n_max_running=12)
    replay._make_step()
    assert replay.statistics.loaded.seconds == 0  # the trace is at its end, and both run
    n_at_once = 64  # as many as a policy looks at: the queue is taken whole
    memory = RivalMemory("x", blocks_of(1), TOKEN_BYTES, 1000 * TOKEN_BYTES, max_tokens=1000)
    replay = Replay(memory, [Request(None, 1, 1)] * 100, n_max_running=n_at_once)
    replay._make_step()
    assert replay.statistics.loaded.seconds == replay.statistics.whole.seconds > 0


@pytest.mark.parametrize("what", ["paged", "power of two", "token_major", "per_layer", "mappings", "merged"])
def test_what_fits_at_once_is_what_a_memory_really_takes(what: str) -> None:
    budget = 160 * BLOCK * TOKEN_BYTES

    def open_() -> RivalMemory | AllocatorMemory:
        if what in ("paged", "power of two"):
            rule = blocks_of(BLOCK) if what == "paged" else power_of_two
            return RivalMemory(what, rule, TOKEN_BYTES, budget, max_tokens=1024, headroom=0.0)
        kind = "per_layer" if what in ("per_layer", "merged") else "token_major"
        layout = Layout.build(kind, LAYERS, n_slots=64, max_tokens=1024, page_bytes=4 * KIB)
        limit = {"mappings": 100, "merged": 30}.get(what, 1 << 20)
        driver = AccountingDriver(
            4 * MIB,
            4 * KIB,
            neighbours_merge=what == "merged",
            mappings_per_run=2 if what == "merged" else 1,
            max_mappings=limit,
        )
        return AllocatorMemory(what, driver, layout, budget, headroom=0.0, keeps_warm=False)

    found: set[bool] = set()
    for seed in range(20):
        rng = random.Random(seed)
        lengths = [rng.choice([5000, 1, 16, 17, rng.randint(1, 500)]) for _ in range(60)] if seed else [16, 5000, 17]
        memory = open_()
        fit = memory.n_at_once(lengths)
        n_begun, is_full = 0, False
        for n_tokens in lengths:
            if memory.obstacle(n_tokens) is None:
                if memory.lack(n_tokens) is not None:
                    is_full = True
                    break
                memory.begin(n_tokens, n_tokens)
                n_begun += 1
        assert fit == (n_begun, is_full)
        assert n_begun > 1
        found.add(fit.is_full)
        assert memory.n_at_once(lengths) == fit  # what runs does not matter
        memory.close()
    assert found == {False, True}


def test_all_that_fit_are_said_to_be_all() -> None:
    assert paged().n_at_once([16, 16]) == (2, False)
    assert paged().n_at_once([16] * (N_BLOCKS + 1)) == (N_BLOCKS, True)
    assert paged().n_at_once([]) == (0, False)


def test_a_rule_under_which_nobody_grows_leaves_nothing_free() -> None:
    shape = find_shape("llama-3-8b")
    requests = [Request(None, 90, 11)] * 200
    setting = Setting.for_trace(shape, 101 * 100 * shape.token_bytes, max(r.final_tokens for r in requests), 2048)
    memory = SCHEMES["maximum length"].open(setting)
    report = Replay(memory, requests, n_max_running=2048).run()
    assert report.n_peak_running == memory.n_at_once(r.final_tokens for r in requests).n_sequences == 101
    assert not SCHEMES["maximum length"].grows
    assert [name for name, scheme in SCHEMES.items() if not scheme.grows] == ["maximum length"]


def test_arrivals_are_kept_and_idle_time_is_not_counted() -> None:
    requests = [Request(1000.0, 16, 2), Request(2000.0, 16, 2)]
    replay = Replay(paged(), requests, is_timed=True, step_time=TIMES)
    report = replay.run()
    assert report.n_peak_running == 1
    assert replay.now_s == pytest.approx(1000 + 2 * 0.01 + 1e-4 * 16 + 1e-6 * (16 + 17))
    assert report.whole.seconds == pytest.approx(2 * (2 * 0.01 + 1e-4 * 16 + 1e-6 * (16 + 17)))
    assert run(paged(), requests).n_peak_running == 2


def test_a_prompt_writes_all_tokens_but_the_last_output() -> None:
    report = run(paged(), [Request(None, 16, 3)])
    assert report.counts.n_steps == 3
    assert report.peak_live_bytes == 18 * TOKEN_BYTES
    nothing_asked = run(paged(), [Request(None, 16, 0)])
    assert nothing_asked.counts.n_steps == 1
    assert nothing_asked.counts.n_done == 1


def test_what_cannot_run_alone_is_rejected() -> None:
    limit = N_BLOCKS * BLOCK
    for memory in (paged(), allocator()):
        report = run(memory, [Request(None, limit + 1, 1), Request(None, limit, 1), Request(None, limit, 2)])
        assert (report.counts.n_done, report.counts.n_rejected) == (1, 2)


class RefusesToGrow(RivalMemory):
    def grow(self, lengths: Mapping[Key, int]) -> None:
        raise OutOfPages("never")

    def begin(self, n_tokens: int, expected_tokens: int, request: Request | None = None) -> Key:
        if n_tokens > 100:
            raise OutOfPages("never")
        return super().begin(n_tokens, expected_tokens)


def test_a_memory_that_promises_too_much_ends_in_rejections_and_not_in_a_loop() -> None:
    memory = RefusesToGrow("x", blocks_of(BLOCK), TOKEN_BYTES, 1 << 20, max_tokens=1 << 40)
    report = run(memory, [Request(None, 50, 2), Request(None, 50, 5), Request(None, 200, 5), Request(None, 60, 1)])
    assert report.counts.n_done + report.counts.n_rejected == 4
    assert report.counts.n_done == 1
    assert report.is_complete


def test_arrivals_that_go_back_are_refused_when_they_matter() -> None:
    requests = [Request(5.0, 1, 1), Request(4.0, 1, 1)]
    with pytest.raises(ConfigError, match="--load full"):
        run(paged(), requests, is_timed=True)
    with pytest.raises(ConfigError, match="--load full"):
        run(paged(), [Request(None, 1, 1)], is_timed=True)
    assert run(paged(), requests).counts.n_done == 2


@pytest.mark.parametrize("times", [(0.0, 0.0, 0.0), (-1.0, 0.0, 0.0), (1.0, -1.0, 0.0), (float("nan"), 0.0, 0.0)])
def test_a_senseless_clock_is_refused(times: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError):
        StepTime(*times)


def test_an_interruption_leaves_what_was_found() -> None:
    def interrupt(n_through: int) -> None:
        if n_through >= 5:
            raise KeyboardInterrupt

    memory = allocator(keeps_warm=True)
    replay = Replay(memory, traffic(1), step_time=TIMES, watch=interrupt)
    with pytest.raises(KeyboardInterrupt):
        replay.run()
    report = replay.report()
    assert not report.is_complete
    assert 5 <= report.counts.n_done + report.counts.n_rejected < 60
    assert report.whole.live_of_active
    memory.close()
    assert memory.cache.pool.n_owned == 0


def test_real_memory_gives_the_same_counts_and_all_of_it_back() -> None:
    shape = find_shape("2x1x32:bf16")
    ledger = Ledger()
    layout = Layout.build("token_major", shape.layers, n_slots=12, max_tokens=N_BLOCKS * BLOCK, page_bytes=4 * KIB)
    driver = HostDriver(ledger=ledger)
    real = AllocatorMemory("real", driver, layout, N_BLOCKS * 4 * KIB, headroom=HEADROOM, keeps_warm=False)
    requests = traffic(7)
    report = run(real, requests)
    real.check()
    assert_same(report, reference(requests), 4 * KIB)
    real.close()
    assert (ledger.n_bytes, ledger.n_mappings) == (0, 0)


def test_rules_hold_what_they_say() -> None:
    assert [power_of_two(n) for n in (1, 16, 17, 1024, 1025)] == [16, 16, 32, 1024, 2048]
    assert [blocks_of(256)(n) for n in (1, 256, 257)] == [256, 256, 512]
    assert maximum_length(4096)(1) == 4096
    memory = RivalMemory("max", maximum_length(100), 10, 1000, max_tokens=100, headroom=0.0)
    assert memory.obstacle(100) is None
    assert memory.obstacle(101) is OutOfAddressSpace
    keys = [memory.begin(5, 50) for _ in range(1)]
    assert (memory.active_bytes, memory.owned_bytes, memory.mapped_bytes) == (1000, 1000, 1000)
    assert memory.lack(1) is OutOfPages
    with pytest.raises(OutOfPages):
        memory.begin(1, 1)
    memory.end(keys)
    assert memory.active_bytes == 0
    assert memory.lack(1) is None


def test_all_schemes_open_and_serve(tmp_path: Path) -> None:
    setting = Setting.for_trace(find_shape("smollm2-135m"), 256 * MIB, 1500, n_max_running=16)
    requests = traffic(2)
    for scheme in SCHEMES.values():
        memory = scheme.open(setting)
        report = Replay(memory, requests, n_max_running=16).run()
        assert report.counts.n_done == len(requests), scheme.name
        assert scheme.waste
        assert (report.step_times is None) == isinstance(memory, RivalMemory)
        memory.close()


def test_no_scheme_gets_more_than_its_budget() -> None:
    setting = Setting.for_trace(find_shape("smollm2-135m"), 64 * MIB, 1500, n_max_running=64)
    for scheme in SCHEMES.values():
        memory = scheme.open(setting)
        report = Replay(memory, traffic(2, 200), n_max_running=64).run()
        assert 0 <= report.peak_active_bytes <= report.peak_owned_bytes <= 64 * MIB, scheme.name
        memory.close()


def test_a_budget_below_one_token_or_one_page_is_refused() -> None:
    shape = find_shape("llama-3-8b")
    with pytest.raises(ConfigError, match="does not hold one token"):
        Setting.for_trace(shape, 100, 10)
    with pytest.raises(ConfigError, match="less than one page"):
        SCHEMES["vmem_kv per layer, 2 MiB"].open(Setting.for_trace(shape, MIB, 10))


@pytest.mark.parametrize("kind", ["per_layer", "token_major"])
def test_a_batch_that_comes_again_calls_no_driver(kind: str) -> None:
    setting = Setting.for_trace(find_shape("smollm2-135m"), 4096 * MIB, 1500, n_max_running=64)
    first, second, third = count_steady_calls(setting, traffic(4), kind=kind, page_bytes=2 * MIB)
    assert first >= 4
    assert (second, third) == (0, 0)


def test_a_cache_that_keeps_nothing_warm_does_call() -> None:
    memory = allocator()
    n_calls = []
    for _ in range(3):
        key = memory.begin(100, 100)
        memory.end([key])
        n_calls.append((memory.n_batches, memory.n_driver_calls or 0))
    for before, after in pairwise(n_calls):
        assert after[0] > before[0]
        assert after[1] > before[1]
    assert all(calls > batches for batches, calls in n_calls)  # seven pages to a batch
    memory.close()


def test_decode_steps_are_told_apart_by_whether_somebody_grows() -> None:
    setting = Setting.for_trace(find_shape("smollm2-135m"), 64 * MIB, 1500)
    cost = measure_decode(setting, traffic(4), kind="token_major", page_bytes=2 * MIB, n_running=32, n_steps=100)
    assert cost.quiet is not None
    assert cost.growing is not None
    assert cost.quiet.n_steps == cost.n_steps == 100
    assert 0 < cost.growing.n_steps <= 100
    assert cost.budget_bytes > 64 * MIB
    # 91 tokens to a page: each of 32 sequences needs one or two more in 100 steps.
    assert 32 <= cost.n_pages_per_growing_step * cost.growing.n_steps <= 64
    # Fewer mappings than that takes: what a step costs is found all the same.
    few = measure_decode(
        setting, traffic(4), kind="token_major", page_bytes=2 * MIB, n_running=32, n_steps=100, max_mappings=3
    )
    assert few.n_pages_per_growing_step == cost.n_pages_per_growing_step
    with pytest.raises(ConfigError, match="are needed at once"):
        measure_decode(setting, traffic(4), kind="token_major", page_bytes=2 * MIB, n_running=61, n_steps=1)


def limited(max_mappings: int, *, merges: bool, kind: str = "token_major") -> AllocatorMemory:
    """A memory with pages in plenty and few mappings."""
    layout = Layout.build(kind, LAYERS, n_slots=12, max_tokens=N_BLOCKS * BLOCK, page_bytes=4 * KIB)
    per_run = 2 if merges else 1
    driver = AccountingDriver(
        4 * MIB, 4 * KIB, neighbours_merge=merges, mappings_per_run=per_run, keeps_pay=False, max_mappings=max_mappings
    )
    return AllocatorMemory("few", driver, layout, 2 * MIB, headroom=0, keeps_warm=False, items=driver.items)


def test_where_every_page_is_a_mapping_their_limit_works_as_a_budget_of_pages() -> None:
    n_preempted = n_held = 0
    for seed in range(6):
        memory = limited(N_BLOCKS, merges=False)
        requests = traffic(seed)
        report = run(memory, requests)
        memory.check()
        memory.close()
        outcome = simulate(
            requests, block=BLOCK, n_blocks=N_BLOCKS, headroom_blocks=0, n_max_running=12, times=(0.01, 1e-4, 1e-6)
        )
        assert_same(report, outcome, BLOCK * TOKEN_BYTES)
        counts = report.counts
        # The longest slot has as many pages as there are mappings: longer requests fail by their addresses.
        assert counts.rejected.keys() <= {"OutOfAddressSpace", "OutOfMappings"}
        assert counts.preempted.keys() <= {"OutOfMappings"}
        assert sum(counts.preempted.values()) == counts.n_preemptions
        n_preempted += counts.n_preemptions
        n_held += counts.held_up.get("OutOfMappings", 0)
        assert counts.held_up.keys() <= {"OutOfMappings", "OutOfSlots"}
        assert report.max_mappings == N_BLOCKS
        assert 0 < report.n_peak_mappings <= N_BLOCKS
    assert n_preempted > 5
    assert n_held > 50


def test_where_neighbours_merge_the_limit_bounds_the_sequences_and_not_their_pages() -> None:
    requests = [Request(None, 400, 20)] * 6
    n_planes = len(limited(1000, merges=True, kind="per_layer").layout.planes)
    each = 2 * n_planes  # a run costs two
    memory = limited(3 * each + 1, merges=True, kind="per_layer")
    assert memory.layout.n_pages(400) > 3 * n_planes
    report = run(memory, requests)
    memory.check()
    memory.close()
    assert (report.counts.n_done, report.counts.n_preemptions) == (6, 0)
    assert (report.n_peak_running, report.n_peak_mappings) == (3, 3 * each)
    assert report.counts.held_up["OutOfMappings"] > 0
    nobody = run(limited(each - 1, merges=True, kind="per_layer"), requests)
    assert nobody.counts.rejected == {"OutOfMappings": 6}


class OverlooksMappings(AllocatorMemory):
    """Admits by pages alone, so that the limit shows where the allocator meets it."""

    def obstacle(self, n_tokens: int) -> Shortage | None:
        return None

    def lack(self, n_tokens: int, request: Request | None = None) -> Shortage | None:
        return None


@pytest.mark.parametrize("max_mappings", [30, 3])
def test_the_allocators_own_refusal_is_a_shortage_like_any_other(max_mappings: int) -> None:
    layout = Layout.build("token_major", LAYERS, n_slots=12, max_tokens=N_BLOCKS * BLOCK, page_bytes=4 * KIB)
    driver = AccountingDriver(4 * MIB, 4 * KIB, max_mappings=max_mappings)
    memory = OverlooksMappings("x", driver, layout, 2 * MIB, items=driver.items)
    requests = [Request(None, 100, 100)] * 5
    report = run(memory, requests)
    memory.check()
    memory.close()
    counts = report.counts
    assert report.n_peak_mappings <= max_mappings
    if max_mappings == 30:
        assert counts.n_done == 5
        assert counts.preempted.keys() == counts.held_up.keys() == {"OutOfMappings"}
    else:
        assert counts.rejected == {"OutOfMappings": 5}


def test_patience_begins_with_the_arrival_and_not_with_the_step_that_sees_it() -> None:
    # The first step lasts 10.01 s. Who came at 1 s has waited for 9.01 s when it ends, and there is no room for it yet.
    time = StepTime(10.0, 0.0, 0.0)
    requests = [Request(0.0, 1000, 2), Request(1.0, 1000, 1)]
    for patience_s, n_rejected in ((18.9, 1), (19.1, 0)):
        report = Replay(paged(), requests, is_timed=True, patience_s=patience_s, step_time=time).run()
        assert report.counts.n_rejected == n_rejected, patience_s
    assert report.counts.rejected == {}


def test_schemes_have_the_limits_of_what_they_imitate() -> None:
    setting = Setting.for_trace(find_shape("smollm2-135m"), 64 * MIB, 100, n_max_running=4)
    limits = {}
    for name in ("vmem_kv token-major, 2 MiB", "vmem_kv per layer, 64 KiB host pages", "power of two"):
        memory = SCHEMES[name].open(setting)
        limits[name] = memory.max_mappings
        memory.close()
    assert list(limits.values()) == [500_000, 65_530 - 4096, None]
