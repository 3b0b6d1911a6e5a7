"""The engines under comparison, each ready to serve a workload in a process of its own.

    vmem_kv      this engine
    static       transformers' generate, batches of 8 in order of arrival, padded on the left, DynamicCache
    continuous   transformers' own continuous batching
    vllm         vLLM's CPU build, where the interpreter has it

Each is opened with a `Setting`, and serves a short workload to warm up before those that count.
Nothing is imported before the engine that needs it is opened: the interpreter of one need not have another.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.serving_log import Log
from benchmarks.serving_workload import Ask, Workload

N_TOGETHER = 32
"""The most sequences that engines with continuous batching compute together."""
N_STATIC_BATCH = 8
N_STEP_TOKENS = 512
"""The most tokens of a step: our default, and for transformers, whose default makes no sense on a CPU."""
GIB = 1 << 30
PAGE_TOKENS = 128
"""Of transformers' continuous batching: its default of 256 would waste more. vLLM's own on a CPU is 128 as well."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all engines get alike."""

    model: str  # a folder
    dtype: str
    n_threads: int
    token_bytes: int
    kv_bytes: int  # what the workloads need at most, in blocks of PAGE_TOKENS; for engines that must be told
    vllm_options: tuple[tuple[str, Any], ...] = ()


class System(Protocol):
    """An open engine."""

    def serve(self, workload: Workload, log: Log) -> dict[str, Any]:
        """Answer everything, telling the log; return what else there is to say, as plain data."""

    def close(self) -> None:
        """Give everything back."""


class _Steps(Protocol):
    """An engine that is driven step by step."""

    def add(self, index: int, ask: Ask) -> None: ...

    def has_work(self) -> bool: ...

    def step(self) -> list[tuple[int, list[int]]]:
        """Return new tokens by the request's index."""

    def memory(self) -> tuple[int, int]:
        """Bytes set aside for K and V, and those of them that live tokens need in whole pages."""


def n_blocks_of(workload: Workload) -> int:
    """Return how many blocks of `PAGE_TOKENS` hold everything at once."""
    return sum(-(-(len(ask.prompt) + ask.n_output) // PAGE_TOKENS) for ask in workload.asks)


def _serve_in_steps(engine: _Steps, workload: Workload, log: Log) -> None:
    log.memory(*engine.memory())
    n_added = 0
    while n_added < len(workload.asks) or engine.has_work():
        while n_added < len(workload.asks) and log.has_arrived(n_added):
            engine.add(n_added, workload.asks[n_added])
            n_added += 1
        if not engine.has_work():
            log.wait_for(n_added)
            continue
        for index, token_ids in engine.step():
            log.tokens(index, token_ids)
        log.memory(*engine.memory())


class Vmem:
    """This engine, with text and all: what a server would run, without HTTP in front."""

    def __init__(self, setting: Setting) -> None:
        from vmem_kv.engine.engine import Engine
        from vmem_kv.engine.llm import make_config

        model, tokenizer = _load(setting, "sdpa")
        # No prompts have anything in common, and the peers are told not to look for it either.
        config = make_config(max_num_seqs=N_TOGETHER, max_batch_tokens=N_STEP_TOKENS, prefix_caching=False)
        self._engine = Engine(model, tokenizer, config)
        self._forward_s = self._step_s = 0.0
        run = self._engine.route.run

        def timed(batch: Any) -> Any:
            began = time.perf_counter()
            logits = run(batch)
            self._forward_s += time.perf_counter() - began
            return logits

        self._engine.route.run = timed  # type: ignore[method-assign]
        self._indices: dict[str, int] = {}
        self._final_tokens: dict[str, int] = {}
        self._n_ended_pages = 0

    def serve(self, workload: Workload, log: Log) -> dict[str, Any]:
        before = self._engine.snapshot()
        self._forward_s = self._step_s = 0.0
        self._n_ended_pages = 0
        _serve_in_steps(self, workload, log)
        after = self._engine.snapshot()
        calls = {
            name: n - before.cache.driver_calls.get(name, 0)
            for name, n in after.cache.driver_calls.items()
            if n > before.cache.driver_calls.get(name, 0)
        }
        return {
            "n_steps": after.n_steps - before.n_steps,
            "n_preempted": after.n_preempted - before.n_preempted,
            "page_bytes": after.page_bytes,
            "n_peak_pages": after.cache.n_peak_owned_pages,
            "driver_calls": calls,
            "overhead_share": 1 - self._forward_s / self._step_s,
            "layout": self._engine.memory.choice.why,
        }

    def close(self) -> None:
        self._engine.close()

    def add(self, index: int, ask: Ask) -> None:
        from vmem_kv.engine.request import Request
        from vmem_kv.engine.sampling_params import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=ask.n_output, ignore_eos=True)
        request = Request(ask.prompt, params)
        self._indices[request.request_id] = index
        self._final_tokens[request.request_id] = len(ask.prompt) + ask.n_output - 1
        self._engine.add(request)

    def has_work(self) -> bool:
        return self._engine.has_work

    def step(self) -> list[tuple[int, list[int]]]:
        began = time.perf_counter()
        updates = self._engine.step()
        self._step_s += time.perf_counter() - began
        self._n_ended_pages = 0
        for update in updates:
            if update.error is not None:
                raise update.error
            if update.is_finished:  # its slot is empty by now, but was not during the step
                n_tokens = self._final_tokens[update.request_id]
                self._n_ended_pages += self._engine.memory.cache.layout.n_pages(n_tokens)
        return [(self._indices[update.request_id], update.token_ids) for update in updates]

    def memory(self) -> tuple[int, int]:
        cache = self._engine.memory.cache
        layout, stats = cache.layout, cache.stats()
        n_needed = sum(layout.n_pages(slot.n_tokens) for slot in cache.slot_stats()) + self._n_ended_pages
        return stats.owned_bytes, n_needed * stats.page_bytes


class Static:
    """`generate` on up to `N_STATIC_BATCH` requests that have arrived, until the longest answer is done."""

    def __init__(self, setting: Setting) -> None:
        self._model, _ = _load(setting, "sdpa")

    def serve(self, workload: Workload, log: Log) -> dict[str, Any]:
        n_done = n_batches = 0
        while n_done < len(workload.asks):
            log.wait_for(n_done)
            end = n_done
            while end < len(workload.asks) and end - n_done < N_STATIC_BATCH and log.has_arrived(end):
                end += 1
            self._answer(workload, range(n_done, end), log)
            n_done, n_batches = end, n_batches + 1
        return {"n_batches": n_batches}

    def close(self) -> None:
        """Nothing is held."""

    def _answer(self, workload: Workload, indices: range, log: Log) -> None:
        import torch
        from transformers import DynamicCache
        from transformers.generation import BaseStreamer

        asks = [workload.asks[i] for i in indices]
        longest = max(len(ask.prompt) for ask in asks)
        rows = [[0] * (longest - len(ask.prompt)) + list(ask.prompt) for ask in asks]
        mask = [[0] * (longest - len(ask.prompt)) + [1] * len(ask.prompt) for ask in asks]
        cache = DynamicCache(config=self._model.config)

        class Streamer(BaseStreamer):  # type: ignore[misc, unused-ignore]
            def __init__(self) -> None:
                self.is_prompt = True

            def put(self, value: torch.Tensor) -> None:
                if self.is_prompt:
                    self.is_prompt = False
                    return
                for index, token_id in zip(indices, value.tolist(), strict=True):
                    log.tokens(index, [token_id])
                # While a layer grows, its old K is still there beside the new one.
                n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
                log.memory(n_bytes + cache.layers[0].keys.nbytes)

            def end(self) -> None:
                pass

        n_output = max(ask.n_output for ask in asks)
        self._model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            past_key_values=cache,
            do_sample=False,
            min_new_tokens=n_output,
            max_new_tokens=n_output,
            pad_token_id=0,
            streamer=Streamer(),
        )


class Continuous:
    """transformers' continuous batching, with as many pages as the workload needs, and one more for each request."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._model, _ = _load(setting, "sdpa")

    def serve(self, workload: Workload, log: Log) -> dict[str, Any]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        n_blocks = n_blocks_of(workload) + len(workload.asks)
        log.memory(n_blocks * PAGE_TOKENS * self._setting.token_bytes)
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=n_blocks,
            max_batch_tokens=N_STEP_TOKENS,
            max_requests_per_batch=N_TOGETHER,
            allow_block_sharing=False,
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config
        ) as manager:
            for index, ask in enumerate(workload.asks):
                log.wait_for(index)
                manager.add_request(
                    list(ask.prompt),
                    request_id=str(index),
                    max_new_tokens=ask.n_output,
                    record_timestamps=True,
                    eos_token_id=-1,
                )
            n_left = len(workload.asks)
            while n_left:
                result = manager.get_result(timeout=1.0)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("transformers' continuous batching ended before it had answered")
                    continue
                if result.error is not None:
                    raise RuntimeError(f"request {result.request_id}: {result.error}")
                if result.is_finished():
                    n_left -= 1
                    for token_id, at_s in zip(result.generated_tokens, result.timestamps, strict=True):
                        log.tokens(int(result.request_id), [token_id], at_s)
        return {"n_blocks": n_blocks, "page_tokens": PAGE_TOKENS}

    def close(self) -> None:
        """Nothing is held."""


class Vllm:
    """vLLM in this process, without prefix caching. Eager: its compilation takes minutes at each start."""

    def __init__(self, setting: Setting) -> None:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_KVCACHE_SPACE=str(-(-setting.kv_bytes // GIB)),
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, sorted(os.sched_getaffinity(0))[: setting.n_threads])),
            VLLM_LOGGING_LEVEL="ERROR",
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
        )
        vllm = importlib.import_module("vllm")
        options: dict[str, Any] = {
            "model": setting.model,
            "dtype": setting.dtype,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_num_seqs": N_TOGETHER,
            "disable_log_stats": True,
            **dict(setting.vllm_options),
        }
        self._options = options
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**options))
        self._sampling: Any = importlib.import_module("vllm.sampling_params")
        config = self._engine.vllm_config
        self._block_bytes = int(config.cache_config.block_size) * setting.token_bytes
        self._n_step_tokens = int(config.scheduler_config.max_num_batched_tokens)
        self._blocks = self._engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool

    def serve(self, workload: Workload, log: Log) -> dict[str, Any]:
        _serve_in_steps(self, workload, log)
        return {
            "n_blocks": self._blocks.num_gpu_blocks,
            "block_bytes": self._block_bytes,
            "max_num_batched_tokens": self._n_step_tokens,
            "options": self._options,
        }

    def close(self) -> None:
        """The process ends."""

    def add(self, index: int, ask: Ask) -> None:
        params = self._sampling.SamplingParams(
            temperature=0.0,
            max_tokens=ask.n_output,
            ignore_eos=True,
            output_kind=self._sampling.RequestOutputKind.DELTA,
        )
        self._engine.add_request(str(index), {"prompt_token_ids": list(ask.prompt)}, params)

    def has_work(self) -> bool:
        return bool(self._engine.has_unfinished_requests())

    def step(self) -> list[tuple[int, list[int]]]:
        return [(int(o.request_id.split("-")[0]), list(o.outputs[0].token_ids)) for o in self._engine.step()]

    def memory(self) -> tuple[int, int]:
        n_used = self._blocks.num_gpu_blocks - self._blocks.get_num_free_blocks()
        return self._blocks.num_gpu_blocks * self._block_bytes, n_used * self._block_bytes


OPENERS: dict[str, Callable[[Setting], System]] = {
    "vmem_kv": Vmem,
    "static": Static,
    "continuous": Continuous,
    "vllm": Vllm,
}


@contextlib.contextmanager
def open_system(name: str, setting: Setting) -> Iterator[tuple[System, float]]:
    """Open an engine; yield it and the seconds that this took."""
    began = time.perf_counter()
    system = OPENERS[name](setting)
    took_s = time.perf_counter() - began
    try:
        yield system, took_s
    finally:
        system.close()


def _load(setting: Setting, attention: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        setting.model, dtype=getattr(torch, setting.dtype), attn_implementation=attention, local_files_only=True
    )
    has_tokenizer = Path(setting.model, "tokenizer_config.json").is_file()
    return model.eval(), AutoTokenizer.from_pretrained(setting.model, local_files_only=True) if has_tokenizer else None
