"""Runs one scenario twice, on the stock cache and on ours, and compares what came out.

A scenario is a function of a `Run`: it makes caches with `run.make_cache()`, does something with a model, and returns
named tensors. When transformers itself refuses the scenario for a model, ours has to refuse with the same exception
type, and the refusal has to be one that the test expects: a scenario that fails on both sides proves nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from vmem_kv import VmemCache

from .architectures import Architecture

MakeSimpleCache = Callable[[Any], DynamicCache]


def make_stock(config: Any) -> DynamicCache:
    """Return the cache that transformers would make."""
    return DynamicCache(config=config)


def make_ours(config: Any, **options: Any) -> VmemCache:
    """Return our cache, with its defaults where the test does not say otherwise."""
    return VmemCache(config, **options)


@dataclass
class Run:
    """One execution of a scenario: which model, and which caches."""

    architecture: Architecture
    model: PreTrainedModel
    make_simple_cache: MakeSimpleCache
    resources: ExitStack
    caches: list[Cache] = field(default_factory=list)

    def make_cache(self) -> Cache:
        """Return an empty cache of the form that the model takes."""
        config = self.model.config.get_text_config(decoder=True)
        cache: Cache = self._simple(config)
        if self.architecture.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, self._simple(config))
        self.caches.append(cache)
        return cache

    def copy_of(self, cache: Cache) -> Cache:
        """Return a deep copy, the documented way to reuse a prefix."""
        duplicate: Cache = copy.deepcopy(cache)
        for simple in simple_caches(duplicate):
            self._close_at_end(simple)
        self.caches.append(duplicate)
        return duplicate

    def as_argument(self, cache: Cache) -> dict[str, Cache]:
        """Return the keyword with which the model takes the cache."""
        return {self.architecture.cache_argument: cache}

    def emptied(self, cache: Cache) -> Cache:
        """Return an empty cache in place of `cache`: ours is reset, the stock one replaced.

        Replaced, because resetting a `DynamicCache` keeps its length in the older releases of transformers.
        """
        simple = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if isinstance(simple, VmemCache):
            cache.reset()
            return cache
        return self.make_cache()

    def _simple(self, config: Any) -> DynamicCache:
        cache = self.make_simple_cache(config)
        self._close_at_end(cache)
        return cache

    def _close_at_end(self, cache: Cache) -> None:
        if isinstance(cache, VmemCache):
            self.resources.callback(cache.close)


Scenario = Callable[[Run], dict[str, torch.Tensor]]


@dataclass
class Outcome:
    """What a scenario returned, or what it raised."""

    tensors: dict[str, torch.Tensor]
    error: Exception | None = None


def execute(
    scenario: Scenario, architecture: Architecture, model: PreTrainedModel, make_simple_cache: MakeSimpleCache
) -> Outcome:
    """Run the scenario with caches of one kind, give their memory back, and check their books before."""
    with ExitStack() as resources:
        run = Run(architecture, model, make_simple_cache, resources)
        try:
            torch.manual_seed(1234)
            outcome = Outcome(scenario(run))
        except Exception as error:
            # The frames of a traceback hold views into the cache, which could not be closed under them.
            error.__cause__ = error.__context__ = None
            outcome = Outcome({}, error.with_traceback(None))
        for cache in run.caches:
            check_books(cache)
        run.caches.clear()
        return outcome


def simple_caches(cache: Cache) -> list[Cache]:
    """Return the cache, or both halves of an encoder-decoder cache."""
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


def check_books(cache: Cache) -> None:
    """Have our caches verify their own bookkeeping."""
    for simple in simple_caches(cache):
        if isinstance(simple, VmemCache):
            simple.check()


def cached_states(cache: Cache) -> dict[str, torch.Tensor]:
    """Return copies of all keys and values that the cache holds, by name."""
    return {
        f"{half}.{index}.{name}": tensor.detach().clone()
        for half, simple in enumerate(simple_caches(cache))
        for index, layer in enumerate(simple.layers)
        for name in ("keys", "values")
        if isinstance(tensor := getattr(layer, name, None), torch.Tensor)
    }


def assert_same_outcome(expected: Outcome, actual: Outcome, tolerance: float = 1e-4) -> None:
    """Whole numbers (tokens) must be identical, other numbers (logits, states) must agree within `tolerance`."""
    if expected.error is not None:
        assert actual.error is not None, f"transformers refused ({expected.error!r}) and ours did not"
        assert type(actual.error) is type(expected.error), (
            f"transformers refused with {expected.error!r}, ours with {actual.error!r}"
        )
        return
    if actual.error is not None:
        raise AssertionError("the stock cache did it, ours failed") from actual.error
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert actual.tensors[name].shape == tensor.shape, name
        if not tensor.is_floating_point():
            assert torch.equal(actual.tensors[name], tensor), f"{name} differ:\n{actual.tensors[name]}\n{tensor}"
        else:
            assert tensor.isfinite().all(), f"{name} of the stock cache proves nothing"
            close = torch.isclose(actual.tensors[name], tensor, rtol=tolerance, atol=tolerance)
            assert close.all(), f"{name}: {int((~close).sum())} of {close.numel()} numbers differ"
