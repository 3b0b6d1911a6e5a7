"""The engine's slots: one cache for all layers of a model, one slot for each running sequence.

Guarantees: every question about room is answered in pages, by the plan that the growth itself would use. A call that
raises changed nothing but warm slots that went cold.
Assumes: one thread, apart from the premapping one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from vmem_kv.cache import KVCache
from vmem_kv.config import CacheConfig
from vmem_kv.devices import OpenDriver
from vmem_kv.errors import CapacityError, ConfigError, DriverError, OutOfMappings, OutOfSlots, VmemError
from vmem_kv.growth import SlotId
from vmem_kv.layout import Choice, LayerSpec, Layout, choose_layout
from vmem_kv.pages import PagePool
from vmem_kv.premap import Premapper
from vmem_kv.tensors import GrowingView, RegionTensors, SlotKV
from vmem_kv.units import format_bytes

DEFAULT_EXPECTED_TOKENS = 1_024
_LOG = logging.getLogger("vmem_kv")


class SlotMemory:
    """A driver, a pool and a cache for one model.

    Args:
        config: Budget, page size and layout.
        layers: What one token adds to each layer.
        dtype: Of K and V.
        device: Where the model lies.
        n_slots: The most sequences that run together.
        n_spare_slots: Slots beside them, for sequences that are kept and do not run. Fewer where addresses are short.
        max_tokens: The most tokens of a sequence.
        slack_tokens: Tokens behind a sequence's last one that the attention kernel may load.
        premap_tokens: How far to map ahead of need; 0 for not at all.
        needs_rows: Whether kernels will see K and V as rows that one number names, which not every layout allows.
        open_driver: Opens the driver for the device.

    Raises:
        ConfigError: The machine cannot offer this; nothing was left behind.
        OutOfAddressSpace: The slots are too long.
    """

    def __init__(
        self,
        config: CacheConfig,
        layers: Sequence[LayerSpec],
        dtype: torch.dtype,
        device: torch.device,
        *,
        n_slots: int,
        n_spare_slots: int = 0,
        max_tokens: int,
        slack_tokens: int,
        premap_tokens: int,
        needs_rows: bool,
        open_driver: OpenDriver,
    ) -> None:
        self.dtype = dtype
        self.slack_tokens = slack_tokens
        self._retiring: list[SlotId] = []
        self._is_freed = False
        driver = open_driver(device, config)
        try:
            has_even_rows = all(layer.key.head_bytes == layer.value.head_bytes for layer in layers)
            kind = "token_major" if config.layout == "auto" and needs_rows and not has_even_rows else config.layout
            self.choice: Choice = choose_layout(
                driver.info,
                layers,
                n_slots=n_slots,
                expected_tokens=min(config.expected_tokens or DEFAULT_EXPECTED_TOKENS, max_tokens),
                kind=kind,
                page_bytes=config.page_bytes,
            )
            max_pages = None if config.max_bytes is None else config.max_bytes // self.choice.page_bytes
            if max_pages == 0:
                raise ConfigError(
                    f"max_bytes is {config.max_bytes}, less than one page of {format_bytes(self.choice.page_bytes)}; "
                    "raise it or set a smaller page_bytes"
                )
            self.pool = PagePool(driver, self.choice.page_bytes, max_pages)

            def lay_out(n_all_slots: int) -> Layout:
                return Layout.build(
                    self.choice.kind,
                    layers,
                    n_slots=n_all_slots,
                    max_tokens=max_tokens + slack_tokens,
                    page_bytes=self.choice.page_bytes,
                )

            n_affordable = driver.info.max_reservation_bytes // lay_out(1).virtual_bytes
            self.cache = KVCache(self.pool, lay_out(max(n_slots, min(n_slots + n_spare_slots, n_affordable))))
        except VmemError:
            driver.close()
            raise
        self._tensors = RegionTensors(self.cache, self._free)
        self.premapper = Premapper(self.cache, premap_tokens) if premap_tokens else None
        if self.premapper is not None:
            self.premapper.start()

    def layer(self, layer_index: int) -> SlotKV:
        """Return the K and V of one layer over all slots, for kernels."""
        return self._tensors.layer(layer_index, self.dtype)

    def views(self, layer_index: int, slot_id: SlotId) -> tuple[GrowingView, GrowingView]:
        """Return the K and V of one layer in one slot."""
        layout = self.cache.layout
        return (
            self._tensors.view(layout.keys[layer_index], [slot_id], self.dtype),
            self._tensors.view(layout.values[layer_index], [slot_id], self.dtype),
        )

    def n_pages(self, n_tokens: int) -> int:
        """Pages that a sequence of so many tokens takes, from nothing."""
        return self.cache.layout.n_pages(n_tokens + self.slack_tokens)

    def n_missing_pages(self, lengths: Mapping[SlotId, int]) -> int:
        """Pages to be mapped before these sequences have these lengths."""
        return self.cache.n_missing_pages(self._with_slack(lengths))

    def n_mapped_pages(self, slot_id: SlotId) -> int:
        """Pages under a slot now."""
        with self.pool.lock:
            return self.cache.region.table.n_pages(slot_id)

    def n_available_pages(self) -> int:
        """Pages that growth could have now: unused ones and those of slots that nobody owns."""
        with self.pool.lock:
            return self.pool.n_available + self.cache.n_warm_pages()

    def n_usable_pages(self) -> int:
        """Pages that a sequence could have that is alone."""
        return self.pool.max_pages - self.pool.n_quarantined

    def max_tokens_alone(self, at_most: int) -> int:
        """Return the most tokens, up to `at_most`, that one sequence can come to with all memory for itself."""
        low, high = 0, at_most
        while low < high:  # n_pages grows with the tokens
            middle = (low + high + 1) // 2
            if self.n_pages(middle) <= self.n_usable_pages():
                low = middle
            else:
                high = middle - 1
        return low

    def acquire(self, expected_tokens: int, domain: str) -> SlotId:
        """Return a slot for a new sequence; see `KVCache.acquire`. Waits as `grow` does."""
        try:
            return self.cache.acquire(expected_tokens=expected_tokens, domain=domain)
        except OutOfSlots:
            if self._retiring:
                self.retire([])
            self.settle()
            return self.cache.acquire(expected_tokens=expected_tokens, domain=domain)

    def fork(self, slot_id: SlotId, n_tokens: int) -> SlotId:
        """Return a slot that begins with another one's first tokens; see `KVCache.fork`. Waits as `grow` does."""
        try:
            return self.cache.fork(slot_id, n_tokens)
        except CapacityError:
            self.settle()
            return self.cache.fork(slot_id, n_tokens)

    def grow(self, lengths: Mapping[SlotId, int]) -> None:
        """Make room for these lengths; see `KVCache.ensure`.

        Pages of slots that nobody owns are used before new ones are created, so that the engine never holds more than
        its sequences once needed. What waits for a kernel or for the premapping thread is waited for before this gives
        up.
        """
        wanted = self._with_slack(lengths)
        self._free_warm_pages(wanted)
        try:
            self.cache.ensure(wanted)
        except CapacityError:
            self.settle()
            self.cache.ensure(wanted)

    def cut(self, slot_id: SlotId, n_tokens: int) -> None:
        """Say that a sequence has its first tokens only: what was mapped or written for more does not count.

        Raises:
            CapacityError, DriverError, UsageError: See `KVCache.truncate`.
        """
        self.cache.truncate(slot_id, n_tokens)

    def slide(self, first_tokens: Mapping[SlotId, int]) -> None:
        """Give up what lies before these tokens, which no layer will read again.

        Where the driver fails, the pages are quarantined and the sequences go on.

        Raises:
            DriverError: The device is lost.
        """
        for slot_id, first_token in first_tokens.items():
            try:
                self.cache.slide(slot_id, first_token)
            except (DriverError, OutOfMappings) as error:
                if isinstance(error, DriverError) and error.is_fatal:
                    raise
                _LOG.warning("sliding slot %d: %s", slot_id, error)

    def premap(self, lengths: Mapping[SlotId, int]) -> None:
        """Ask for room for these lengths, in the background."""
        premapper = self.premapper
        if premapper is not None and premapper.is_alive:
            wanted, ahead = self._with_slack(lengths), premapper.premap_tokens
            self._free_warm_pages(wanted)
            premapper.request({s: n - ahead for s, n in wanted.items()})

    def retire(self, slot_ids: Sequence[SlotId]) -> None:
        """End sequences; their memory stays mapped for the next ones.

        Where the driver fails, what could not be retired is tried again with the next ones.

        Raises:
            DriverError: The device is lost.
        """
        self._retiring += slot_ids
        try:
            self.cache.retire(self._retiring)
        except DriverError as error:
            if error.is_fatal:
                raise
            _LOG.warning("retiring slots %s: %s", self._retiring, error)
            active = self.cache.active_slots()
            self._retiring = [slot_id for slot_id in self._retiring if slot_id in active]
        else:
            self._retiring = []

    def reclaim(self) -> None:
        """Take the pages of all slots that nobody owns."""
        self.settle()
        self.cache.reclaim(self.n_available_pages())

    def settle(self) -> None:
        """Let pass what holds slots and pages for a moment only: kernels, and the premapping thread."""
        if self.premapper is not None:
            self.premapper.wait_idle()
        self.cache.settle()

    def close(self) -> None:
        """Give everything back. Idempotent.

        Raises:
            DriverError: Something could not be given back, nor when it was tried again; the rest was. Calling again
                tries again. A lost device is no error: it took its memory back.
            UsageError: Host memory is still pinned; close its tier, then this again.
        """
        if self.premapper is not None:
            self.premapper.stop()
        if self._tensors.let_go():
            self._free()

    def _free(self) -> None:
        if self._is_freed:
            return
        failures: list[VmemError] = []

        def succeeds(step: Callable[[], object]) -> bool:
            try:
                step()
            except VmemError as error:
                _LOG.warning("closing the engine's memory: %s", error)
                failures.append(error)
                return False
            return True

        for _ in range(2):  # closing a cache again tries again what is stuck in it
            succeeds(lambda: self.cache.retire(self.cache.active_slots()))
            succeeds(self.cache.settle)
            if succeeds(self.cache.close):
                break
        succeeds(self.pool.trim)  # pages whose release fails go with the driver
        if not succeeds(self.pool.driver.close):
            raise failures[0]  # the others follow from it
        self._is_freed = True

    def _free_warm_pages(self, wanted: Mapping[SlotId, int]) -> None:
        """Take from slots that nobody owns what these lengths need and the pool would have to create.

        Where the driver fails, the pages are quarantined and new ones are created instead.

        Raises:
            DriverError: The device is lost.
        """
        n_missing = self.cache.n_missing_pages(wanted)
        with self.pool.lock:
            n_pages = min(n_missing - self.pool.n_free, self.cache.n_warm_pages())
        if n_pages <= 0:
            return
        try:
            self.cache.reclaim(n_pages)
        except DriverError as error:
            if error.is_fatal:
                raise
            _LOG.warning("reclaiming %d pages: %s", n_pages, error)

    def _with_slack(self, lengths: Mapping[SlotId, int]) -> dict[SlotId, int]:
        return {slot_id: n + self.slack_tokens for slot_id, n in lengths.items()}
