"""What is measured and how much of it, as data. Chosen once at the start; no algorithm asks which plan it is under.

Two sizes of the same suite: one for a device, one for the emulated driver, where memory is the host's, kernels are
reference operators on the CPU and times mean nothing. Each has a quick variant. Lists are in the order of their worth:
what comes first is measured first, and what comes last is left out first when time runs out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vmem_kv.units import GIB, MIB


@dataclass(frozen=True, slots=True)
class Shape:
    """The attention of a model."""

    name: str
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in one layer, in 16 bits."""
        return 2 * self.n_kv_heads * self.head_dim * 2


LLAMA_3_8B = Shape("Llama-3-8B", 32, 32, 8, 128)
QWEN3_06B = Shape("Qwen3-0.6B", 28, 16, 8, 128)
SMALL = Shape("small", 4, 8, 2, 64)
WIDE = Shape("wide", 2, 4, 4, 256)


KERNELS = ("torch_flash", "fa3", "sdpa", "flash_attn")
DISTURBANCES = (
    "map, access and unmap, same reservation",
    "map, access and unmap, another reservation",
    "create and release only",
    "map, access, fill and unmap, same reservation",
)


@dataclass(frozen=True, slots=True)
class Costs:
    """Guesses of how many seconds cases take. One is skipped where less than that is left of its part's budget."""

    probe: float
    dangerous: float  # with the start of a process of its own
    calls: float  # driver calls of one page size
    ceiling: float
    numerics: float
    memory: float
    tags: float
    contract: float
    speed: float  # a point, beside what follows from its size
    speed_per_gib: float  # to create, map, unmap and release pages of 2 MiB
    disturbance: float
    steps: float
    generation: float


@dataclass(frozen=True, slots=True)
class FactsScale:
    """Part 1."""

    page_multiples: tuple[int, ...]  # of the granularity
    n_samples: int  # of each call at each size
    run_lengths: tuple[int, ...]  # mappings in one cuMemSetAccess or cuMemUnmap
    n_run_samples: int
    n_ceiling: int  # live mappings to try for
    n_fresh_pages: int


@dataclass(frozen=True, slots=True)
class CorrectnessScale:
    """Part 2."""

    kernels: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]
    lengths: tuple[int, ...]  # beside those around page boundaries
    prefill_tokens: int  # of whole prompts; of those that end with a page, see below
    edge_prefill_tokens: int  # the longest such prompt that the reference in float64 is asked for
    layouts: tuple[str, ...]
    n_tag_checks: int
    tag_slots: int
    tag_tokens: int


@dataclass(frozen=True, slots=True)
class Point:
    """One batch of equal lengths; `query_tokens` new ones per sequence."""

    batch: int
    context: int
    query_tokens: int = 1

    @property
    def n_tokens(self) -> int:
        """Tokens in K and V."""
        return self.batch * self.context


@dataclass(frozen=True, slots=True)
class SpeedScale:
    """Part 3."""

    shapes: tuple[Shape, ...]
    points: tuple[Point, ...]
    layouts: tuple[str, ...]
    n_rounds: int
    flush_bytes: int  # written before each sample: empties the L2 cache, and hides the host's time to launch
    page_bytes: int
    max_bytes: int  # of all K and V that a point needs at one time
    span_tokens: int  # virtual room of a slot, at least the longest context


@dataclass(frozen=True, slots=True)
class InterferenceScale:
    """Part 4."""

    disturbances: tuple[str, ...]  # what goes on beside the kernels
    shape: Shape
    n_kernels: int  # samples per mode
    kernel_batch: int
    kernel_context: int
    churn_tokens: int  # mapped and unmapped at a time beside them
    decode_batch: int
    decode_context: int
    decode_layers: int
    n_steps: int  # of one turn of one mode
    n_turns: int
    premap_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationScale:
    """Part 5: the model's sizes, and what is generated."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: str
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    n_new_tokens: int
    n_rounds: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole suite."""

    is_emulated: bool
    costs: Costs
    budget_s: float  # for all parts together
    quick_budget_s: float  # of the quick variant
    facts: FactsScale
    correctness: CorrectnessScale
    speed: SpeedScale
    interference: InterferenceScale
    generation: GenerationScale


ON_A_DEVICE = Plan(
    is_emulated=False,
    costs=Costs(
        probe=0.2,
        dangerous=6,
        calls=1,
        ceiling=10,
        numerics=2,
        memory=2,
        tags=5,
        contract=8,
        speed=1.5,
        speed_per_gib=0.08,
        disturbance=8,
        steps=30,
        generation=25,
    ),
    budget_s=440,
    quick_budget_s=180,
    facts=FactsScale(
        page_multiples=(1, 2, 4, 8, 16),
        n_samples=200,
        run_lengths=(1, 8, 64),
        n_run_samples=40,
        n_ceiling=100_000,
        n_fresh_pages=64,
    ),
    correctness=CorrectnessScale(
        kernels=KERNELS,
        shapes=(LLAMA_3_8B, QWEN3_06B),
        dtypes=("bfloat16", "float16"),
        lengths=(1, 17, 500, 3000),
        prefill_tokens=600,
        edge_prefill_tokens=4096,
        layouts=("per_layer", "group:4", "token_major"),
        n_tag_checks=10_000_000,
        tag_slots=32,
        tag_tokens=8192,
    ),
    speed=SpeedScale(
        shapes=(LLAMA_3_8B, QWEN3_06B),
        points=(
            Point(64, 4096),
            Point(1, 131072),
            Point(256, 1024),
            Point(1, 4096, query_tokens=4096),
            Point(16, 16384),
            Point(1, 1024),
            Point(8, 4096, query_tokens=512),
            Point(8, 131072),
            Point(1, 32768),
            Point(256, 4096),
            Point(1, 32768, query_tokens=2048),
            Point(64, 16384),
        ),
        layouts=("per_layer", "token_major", "group:8", "group:2", "group:4"),
        n_rounds=30,
        flush_bytes=GIB,
        page_bytes=2 * MIB,
        max_bytes=64 * GIB,
        span_tokens=131072,
    ),
    interference=InterferenceScale(
        disturbances=DISTURBANCES,
        shape=LLAMA_3_8B,
        n_kernels=1000,
        kernel_batch=256,
        kernel_context=4096,
        churn_tokens=16_384,
        decode_batch=32,
        decode_context=2048,
        decode_layers=32,
        n_steps=128,
        n_turns=3,
        premap_tokens=256,
    ),
    generation=GenerationScale(
        hidden_size=2048,
        intermediate_size=8192,
        n_layers=16,
        n_q_heads=32,
        n_kv_heads=8,
        head_dim=64,
        vocab_size=128_256,
        dtype="bfloat16",
        contexts=(1024, 8192, 32768),
        batches=(1,),
        n_new_tokens=64,
        n_rounds=3,
    ),
)

EMULATED = Plan(
    is_emulated=True,
    costs=Costs(
        probe=0.05,
        dangerous=2,
        calls=0.2,
        ceiling=0.5,
        numerics=1,
        memory=0.5,
        tags=3,
        contract=3,
        speed=0.5,
        speed_per_gib=0.5,
        disturbance=2,
        steps=2,
        generation=1,
    ),
    budget_s=280,
    quick_budget_s=280,
    facts=FactsScale(
        page_multiples=(1, 2, 4, 8, 16),
        n_samples=20,
        run_lengths=(1, 8, 64),
        n_run_samples=5,
        n_ceiling=2000,
        n_fresh_pages=8,
    ),
    correctness=CorrectnessScale(
        kernels=KERNELS,
        shapes=(SMALL,),
        dtypes=("bfloat16", "float16"),
        lengths=(1, 17, 130),
        prefill_tokens=40,
        edge_prefill_tokens=4096,
        layouts=("per_layer", "group:2", "token_major"),
        n_tag_checks=1_000_000,
        tag_slots=8,
        tag_tokens=2048,
    ),
    speed=SpeedScale(
        shapes=(SMALL,),
        points=(Point(4, 256), Point(1, 512, query_tokens=32), Point(2, 1024)),
        layouts=("per_layer", "token_major", "group:8", "group:2", "group:4"),
        n_rounds=3,
        flush_bytes=MIB,
        page_bytes=2 * MIB,
        max_bytes=GIB // 2,
        span_tokens=2048,
    ),
    interference=InterferenceScale(
        disturbances=DISTURBANCES,
        shape=WIDE,
        n_kernels=40,
        kernel_batch=2,
        kernel_context=256,
        churn_tokens=2048,
        decode_batch=4,
        decode_context=1020,
        decode_layers=2,
        n_steps=8,
        n_turns=2,
        premap_tokens=64,
    ),
    generation=GenerationScale(
        hidden_size=64,
        intermediate_size=128,
        n_layers=2,
        n_q_heads=4,
        n_kv_heads=2,
        head_dim=16,
        vocab_size=128,
        dtype="bfloat16",
        contexts=(64, 128, 256),
        batches=(1,),
        n_new_tokens=8,
        n_rounds=1,
    ),
)


def choose_plan(*, emulate: bool, quick: bool) -> Plan:
    """Return the plan for a run."""
    plan = EMULATED if emulate else ON_A_DEVICE
    return _quick(plan) if quick else plan


def _quick(plan: Plan) -> Plan:
    """The same with the first of everything."""
    correctness, speed, generation = plan.correctness, plan.speed, plan.generation
    interference = plan.interference
    return replace(
        plan,
        budget_s=plan.quick_budget_s,
        facts=replace(
            plan.facts,
            page_multiples=plan.facts.page_multiples[:2],
            n_samples=min(plan.facts.n_samples, 20),
            n_run_samples=3,
            n_ceiling=min(plan.facts.n_ceiling, 500),
        ),
        correctness=replace(
            correctness,
            kernels=correctness.kernels[:2],
            shapes=correctness.shapes[:1],
            dtypes=correctness.dtypes[:1],
            layouts=correctness.layouts[:1],
            n_tag_checks=correctness.n_tag_checks // 10,
        ),
        speed=replace(speed, shapes=speed.shapes[:1], points=speed.points[:1], n_rounds=3),
        interference=replace(
            interference,
            disturbances=interference.disturbances[:1],
            n_kernels=interference.n_kernels // 3,
            n_turns=1,
        ),
        generation=replace(generation, contexts=generation.contexts[:1], n_rounds=1),
    )
