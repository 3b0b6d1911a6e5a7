"""One layer's K and V for a batch of sequences that step together, as growing tensors.

    store = RowStore(CacheConfig(), n_layers=30)       one driver and one pool, opened at the first use
    rows = store.open_rows(spec, torch.float32, 4, device)     addresses only
    rows.append(k, v); k, v = rows.views()

Guarantees: K and V are written in place; `views` returns views of exactly the used tokens, at an address that
never changes. A call that raises a CapacityError or UsageError changed nothing. Rows that copy each other share the
pages that are full of the same tokens; copied is what is left, less than a page in each plane. Memory goes back when
`close` is called, or when the last tensor that looks at it has died.

Assumptions: one thread at a time per store. Not for autograd: states are stored detached.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch

from vmem_kv.cache import Exchange, KVCache
from vmem_kv.config import CacheConfig
from vmem_kv.devices import OpenDriver, open_driver
from vmem_kv.driver.base import Driver
from vmem_kv.errors import (
    ConfigError,
    OutOfAddressSpace,
    OutOfMappings,
    OutOfPages,
    OutOfSlots,
    UsageError,
    VmemError,
)
from vmem_kv.growth import SlotId
from vmem_kv.layout import Choice, LayerSpec, Layout, choose_layout
from vmem_kv.pages import PagePool
from vmem_kv.stats import CacheStats
from vmem_kv.tensors import GrowingView, RegionTensors
from vmem_kv.units import format_bytes

DEFAULT_MAX_TOKENS = 32_768
DEFAULT_EXPECTED_TOKENS = 4_096

ROOM_FOR_ROWS = 32
"""Rows for which a layer reserves addresses at least, so that its rows can be forked beside each other."""

_SHARE_OF_ADDRESSES = 16
"""What part of the largest reservation all layers may take together, for rows that may never be needed."""

_Result = TypeVar("_Result")


@dataclass(eq=False)
class Lease:
    """The slots of a cache that one `LayerRows` has. Its finalizer keeps it, so it does not know the rows."""

    cache: KVCache
    slots: Sequence[SlotId] = ()


class RowStore:
    """A driver and a pool for the layers of one model, opened when the first layer's shape is known.

    Args:
        config: How to use memory.
        n_layers: How many layers will share it; layout and page size are chosen for all of them.
        open_driver: Opens the driver for the device on which the first layer lies.
    """

    def __init__(self, config: CacheConfig, n_layers: int = 1, open_driver: OpenDriver = open_driver) -> None:
        self.config = config
        self._open_driver = open_driver
        self.max_tokens = config.max_tokens or DEFAULT_MAX_TOKENS
        self.choice: Choice | None = None
        self._n_layers = max(1, n_layers)
        self._pool: PagePool | None = None
        self._leases: dict[KVCache, set[Lease]] = {}
        self._orphans: deque[Lease] = deque()
        """Leases whose last tensor died at a moment when they could not be ended (see `abandon`)."""
        self._n_entered = 0
        self._last_stats = CacheStats.empty()

    def open_rows(self, spec: LayerSpec, dtype: torch.dtype, n_rows: int, device: torch.device) -> LayerRows:
        """Reserve addresses for `n_rows` sequences of one layer. No memory is mapped.

        Raises:
            ConfigError: The configuration does not fit this machine, or the layer lies on another device than the
                first one did.
            OutOfAddressSpace: The reservation is too large.
            DriverError: Memory of layers that nobody uses any more could not be given back.
        """
        with self._entered():
            pool, kind = self._open_pool(spec, n_rows, device)
            lease = self.lease(self._open_cache(pool, kind, spec, n_rows))
            try:
                rows = LayerRows(self, lease, dtype, n_rows)
                rows.start(n_rows)
            except BaseException:
                with suppress(VmemError):
                    self.end_lease(lease)
                raise
            return rows

    def lease(self, cache: KVCache, slots: Sequence[SlotId] = ()) -> Lease:
        """Note that somebody uses a cache, and these slots of it, until `end_lease`."""
        lease = Lease(cache, slots)
        self._leases.setdefault(cache, set()).add(lease)
        return lease

    def stats(self) -> CacheStats:
        """Return the sum over all rows; once everything is closed, the peak and the calls that there were.

        Raises:
            DriverError: Memory of layers that nobody uses any more could not be given back.
        """
        with self._entered():
            return self._last_stats if self._pool is None else self._sum_stats(self._pool)

    def _sum_stats(self, pool: PagePool) -> CacheStats:
        parts = [cache.stats() for cache in self._leases]
        n_live, n_warm, n_pending = (
            sum(getattr(part, name) for part in parts) for name in ("n_live_pages", "n_warm_pages", "n_pending_pages")
        )
        with pool.lock:
            return CacheStats(
                page_bytes=pool.page_bytes,
                max_pages=pool.max_pages,
                n_free_pages=pool.n_free,
                n_in_flight_pages=pool.n_in_flight,
                n_live_pages=n_live,
                n_warm_pages=n_warm,
                n_pending_pages=n_pending,
                n_saved_pages=sum(part.n_saved_pages for part in parts),
                n_elsewhere_pages=pool.n_mapped - n_live - n_warm - n_pending,
                n_quarantined_pages=pool.n_quarantined,
                n_peak_owned_pages=pool.n_peak_owned,
                n_mappings=pool.n_mappings,
                max_mappings=pool.driver.info.max_mappings,
                virtual_bytes=sum(part.virtual_bytes for part in parts),
                live_bytes=sum(part.live_bytes for part in parts),
                driver_calls=dict(pool.driver.calls),
            )

    def check(self) -> None:
        """Verify the books of all rows. Raises InvariantError."""
        with self._entered():
            for cache in self._leases:
                cache.check()

    def trim(self) -> int:
        """Unmap all warm slots and release all free pages; return how many pages came free.

        Raises:
            DriverError: See `KVCache.reclaim`.
        """
        with self._entered():
            pool = self._pool
            if pool is None:
                return 0
            n_owned = pool.n_owned
            pool.make_room(pool.max_pages)
            pool.trim()
            return n_owned - pool.n_owned

    def settle(self) -> bool:
        """Wait until what the layers gave up has come back; return whether anything was still out.

        Raises:
            DriverError: See `KVCache.settle`.
        """
        return sum(cache.settle() for cache in self._leases) > 0

    def require_owner(self) -> None:
        """Raise UsageError in a forked child."""
        if self._pool is not None:
            self._pool.require_owner()

    def end_lease(self, lease: Lease) -> None:
        """Give back what somebody had of a cache; with the last lease of all, give everything back to the system.

        Raises:
            DriverError: Memory could not be given back. It is tried again with the cache's last lease; if this is the
                last one, call again.
        """
        cache, pool = lease.cache, lease.cache.pool
        pool.require_owner()
        with self._entered():
            if lease not in self._leases.get(cache, ()):
                return
            if len(self._leases[cache]) > 1:
                self._leases[cache].discard(lease)  # what cannot be given back now goes with the last lease
                self.retire(lease)
                cache.settle()
                cache.reclaim(pool.max_pages)
                return
            cache.retire(cache.active_slots())
            cache.settle()
            cache.close()
            del self._leases[cache]
            if not self._leases and pool is self._pool:
                pool.trim()
                self._last_stats = self._sum_stats(pool)  # nothing is left of it but the peak and the calls
                pool.driver.close()
                self._pool = None

    def retire(self, lease: Lease) -> None:
        """End the sequences of a lease. See `KVCache.retire`."""
        fence = lease.cache.fence()  # may fail; from here on the sequences end, even if giving memory back fails
        slots, lease.slots = lease.slots, ()
        if slots:
            lease.cache.retire(slots, fence)

    def abandon(self, lease: Lease) -> None:
        """End a lease whose last tensor has died, from a finalizer.

        A finalizer can run anywhere, also in the middle of a call on this store or in a thread that holds the pool's
        lock just now: then the lease waits for the end of that call, or for the next one. Nobody is there to hear of
        an error: its pages stay counted in the pool.
        """
        self._orphans.append(lease)
        lock = lease.cache.pool.lock
        if not self._n_entered and lock.acquire(blocking=False):
            lock.release()
            with suppress(VmemError):
                self._end_orphans()

    def __deepcopy__(self, memo: dict[int, object]) -> RowStore:
        return self  # a copied cache draws on the same pool

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Keep finalizers from closing caches in the middle of a call; do what they left, before and after."""
        self._end_orphans()
        self._n_entered += 1
        try:
            yield
        finally:
            self._n_entered -= 1
        self._end_orphans()

    def _end_orphans(self) -> None:
        while self._orphans and not self._n_entered:
            self.end_lease(self._orphans.popleft())

    def _open_cache(self, pool: PagePool, kind: str, spec: LayerSpec, n_rows: int) -> KVCache:
        """Reserve addresses for rows, and for forks of them unless addresses are scarce."""
        build = functools.partial(Layout.build, kind, [spec], max_tokens=self.max_tokens, page_bytes=pool.page_bytes)
        row_bytes = build(n_slots=1).virtual_bytes * self._n_layers
        n_affordable = pool.driver.info.max_reservation_bytes // _SHARE_OF_ADDRESSES // row_bytes
        n_slots = max(n_rows, min(max(4 * n_rows, ROOM_FOR_ROWS), n_affordable))
        try:
            return KVCache(pool, build(n_slots=n_slots))
        except OutOfAddressSpace:
            return KVCache(pool, build(n_slots=n_rows))

    def _open_pool(self, spec: LayerSpec, n_rows: int, device: torch.device) -> tuple[PagePool, str]:
        """Return the pool, opened if it is not, and the layout kind for a layer of so many rows."""
        if self._pool is not None:
            here = torch.device(self._pool.driver.info.device)
            if device != here:
                raise ConfigError(
                    f"this cache began on {here}, and a layer lies on {device}; a cache serves one device, so place "
                    "the whole model on one"
                )
            # The pool fixes the page size; how many planes the mappings allow depends on the rows.
            self.choice = self._choose(self._pool.driver, spec, n_rows, self._pool.page_bytes)
            return self._pool, self.choice.kind
        config = self.config
        driver = self._open_driver(device, config)
        try:
            self.choice = self._choose(driver, spec, n_rows, config.page_bytes)
            page_bytes, max_pages = self.choice.page_bytes, None
            if config.max_bytes is not None:
                max_pages = config.max_bytes // page_bytes
                if max_pages == 0:
                    raise ConfigError(
                        f"max_bytes is {config.max_bytes}, less than one page of {format_bytes(page_bytes)}; "
                        "raise it or set a smaller page_bytes"
                    )
            self._pool = PagePool(driver, page_bytes, max_pages)
        except VmemError:
            driver.close()
            raise
        return self._pool, self.choice.kind

    def _choose(self, driver: Driver, spec: LayerSpec, n_rows: int, page_bytes: int | None) -> Choice:
        return choose_layout(
            driver.info,
            [spec] * self._n_layers,
            n_slots=n_rows,
            expected_tokens=min(self.config.expected_tokens or DEFAULT_EXPECTED_TOKENS, self.max_tokens),
            kind=self.config.layout,
            page_bytes=page_bytes,
        )


class LayerRows:
    """K and V of one layer: `[n_rows, n_heads, n_tokens, head_dim]`."""

    def __init__(self, store: RowStore, lease: Lease, dtype: torch.dtype, max_rows: int) -> None:
        self.store = store
        self.cache = lease.cache
        self.dtype = dtype
        self.device = torch.device(lease.cache.pool.driver.info.device)
        self.max_rows = max_rows
        """For how many rows the layout was chosen."""
        self.first_token = 0
        """Tokens before this one were given up by `slide`."""
        self.n_tokens = 0
        """Tokens written, counted from the sequence's start."""
        self._lease = lease
        self._has_slid = False
        self._tensors: RegionTensors | None = None
        self._growing: tuple[GrowingView, GrowingView] | None = None
        self._look()

    @property
    def n_rows(self) -> int:
        """Sequences in the batch; 0 after `stop`."""
        return len(self._slots)

    @property
    def _slots(self) -> Sequence[SlotId]:
        return self._lease.slots

    @property
    def spec(self) -> LayerSpec:
        """Heads and sizes of K and V."""
        return self.cache.layout.layers[0]

    def start(self, n_rows: int) -> None:
        """Begin `n_rows` empty sequences, on warm memory where there is some.

        Waits for the last kernels of sequences that ended: their memory is what to begin on, not more of it elsewhere.

        Raises:
            OutOfSlots: There are not so many neighbouring slots; others may have them. Nothing changed.
            DriverError: See `KVCache.settle` and `KVCache.acquire`.
        """
        self._require_open()
        self.cache.settle()
        if self._has_slid:  # a slot without its front is as good as none: give it back instead of mapping others beside
            self.cache.reclaim(self.cache.pool.max_pages)
            self._has_slid = False
        self._take_slots(self.cache.acquire_adjacent(n_rows))
        self.first_token = self.n_tokens = 0

    def stop(self) -> None:
        """End the sequences. Their memory stays mapped for the next `start`.

        Raises:
            DriverError: No fence could be recorded: nothing changed. Or the sequences ended, and memory that a window
                gave up could not be unmapped.
        """
        try:
            self.store.retire(self._lease)
        finally:
            if not self._slots:  # pragma: no branch: what is left by an exception, coverage does not count
                self._growing = None
                self.first_token = self.n_tokens = 0

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Write the next tokens of every row.

        Args:
            key_states: `[n_rows, n_heads, n, head_dim]`, any strides.
            value_states: The same, with V's heads and size.

        Raises:
            OutOfPages, OutOfMappings, OutOfAddressSpace: There is no room for them. Nothing changed.
            UsageError: Rows, heads, size, dtype or device are not those of this layer. Nothing changed.
        """
        n_tokens = self.n_tokens + key_states.shape[2]
        if (key_states.shape, value_states.shape) != self._expected_shapes(key_states.shape[2]) or not (
            key_states.dtype is value_states.dtype is self.dtype
            and key_states.device == value_states.device == self.device
        ):
            self._refuse(key_states, value_states)
        self._started()
        # No name holds them while this may fail: who catches the error may close the cache, and its traceback has us.
        self._ensure(n_tokens)
        keys, values = self._started()
        keys.write(self.n_tokens, key_states)
        values.write(self.n_tokens, value_states)
        self.n_tokens = n_tokens

    def views(self, first_token: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V from `first_token` (default: the first kept) to the end, without copying."""
        keys, values = self._started()
        first = self.first_token if first_token is None else first_token
        return keys.cut(first, self.n_tokens), values.cut(first, self.n_tokens)

    def truncate(self, n_tokens: int) -> None:
        """Drop the tokens from `n_tokens` on; their pages stay for the next ones, unless others have them too.

        Raises:
            UsageError: `n_tokens` is beyond the length, or before what `slide` gave up. Nothing changed.
            CapacityError: Tokens are to go that others share, and there is no room for a page of one's own at the new
                end. Nothing changed.
            DriverError: Likewise; see `KVCache.truncate`.
        """
        if n_tokens < self.n_shared_tokens():
            self.begin_truncate(n_tokens).commit()
        else:
            self._require_length(n_tokens)
            self._ensure(n_tokens)
            self.n_tokens = n_tokens

    def begin_truncate(self, n_tokens: int) -> Change:
        """Do of `truncate` what can fail. Raises as it does."""
        self._require_length(n_tokens)
        exchange = self._patiently(lambda: self.cache.begin_truncate(self._slots, n_tokens))
        return Change(self, exchange, n_tokens=n_tokens)

    def n_shared_tokens(self) -> int:
        """How many tokens of some row lie in pages that others have too, wholly or in part."""
        return max((self.cache.shared_tokens(slot_id) for slot_id in self._slots), default=0)

    def slide(self, first_token: int) -> None:
        """Give up the tokens before `first_token`; whole pages before it go back to the pool.

        Raises:
            DriverError: See `KVCache.slide`.
        """
        if first_token > self.first_token:
            self._has_slid = True
            try:
                self.cache.slide(self._slots, first_token)
            finally:
                self.first_token = self.cache.first_token(self._slots[0])

    def select(self, indices: torch.Tensor) -> None:
        """Make row i hold what row `indices[i]` holds now, for every i; rows that stay are not touched.

        Args:
            indices: `[n]`, at most as many as there are rows; `copy` takes more.

        Raises:
            UsageError: An index is out of range, or there are more than rows. Nothing changed.
            OutOfMappings: Pages could not be exchanged. Nothing changed.
            DriverError: Likewise; or the rows are changed, and memory of those that ended could not be given back.
        """
        self.begin_select(indices).commit()

    def begin_select(self, indices: torch.Tensor) -> Change:
        """Do of `select` what can fail: exchange the full pages that differ. Raises as it does."""
        self._require_rows(indices)
        rows = indices.tolist()
        if len(rows) > self.n_rows:
            raise UsageError(f"{len(rows)} rows of a batch of {self.n_rows}; copy them to rows of their own")
        moves = {target: source for target, source in enumerate(rows) if target != source}
        slots = self._slots
        sources = {slots[target]: slots[source] for target, source in moves.items()}
        exchange = self._patiently(lambda: self.cache.begin_share(sources, self.n_tokens)) if moves else None
        return Change(self, exchange, moves, len(rows))

    def copy(self, indices: torch.Tensor | None = None) -> LayerRows:
        """Return rows of their own; row i holds what row `indices[i]` of these holds, by default row i.

        Raises:
            CapacityError: No room for them. Nothing changed.
            DriverError: They could not be made. Nothing changed.
            UsageError: An index is out of range. Nothing changed.
        """
        self._require_open()
        indices = torch.arange(self.n_rows) if indices is None else indices
        self._require_rows(indices)
        sources = [self._slots[index] for index in indices.tolist()]
        slots: Sequence[SlotId] = ()
        if sources:
            try:
                slots = self._patiently(lambda: self.cache.fork_adjacent(sources))
            except OutOfSlots:
                return self._copy_apart(indices)
        lease = self.store.lease(self.cache, slots)
        try:
            new = LayerRows(self.store, lease, self.dtype, max(self.max_rows, len(slots)))
        except BaseException:
            with suppress(VmemError):
                self.store.end_lease(lease)
            raise
        new.first_token, new.n_tokens, new._has_slid = self.first_token, self.n_tokens, self._has_slid
        return new

    def _copy_apart(self, indices: torch.Tensor) -> LayerRows:
        """`copy` into a reservation of its own, with no page shared: where the slots of this one do not suffice."""
        new = self.store.open_rows(self.spec, self.dtype, indices.numel(), self.device)
        try:
            new._ensure(self.n_tokens)
            new.n_tokens = self.n_tokens
            new.slide(self.first_token)
        except VmemError:
            new.close()
            raise
        for target, source in zip(new.views(), self.views(), strict=True):
            for i, index in enumerate(indices.tolist()):
                target[i].copy_(source[index])
        return new

    def _copy_tails(self, moves: Mapping[int, int]) -> None:
        """Give rows the tokens of other rows that are in no full page. Rows may change places."""
        assert self._tensors is not None
        sources = torch.tensor(list(moves.values()), device=self.device)
        for tails in self._tensors.tails(self._slots, self.n_tokens):
            moved = tails.index_select(1, sources)
            for i, target in enumerate(moves):
                tails[:, target].copy_(moved[:, i])

    def _shrink(self, n_rows: int) -> None:
        """End the rows from `n_rows` on."""
        gone = self._slots[n_rows:]
        self._take_slots(self._slots[:n_rows])
        self.cache.retire(gone)

    def _ensure(self, n_tokens: int) -> None:
        lengths = dict.fromkeys(self._slots, n_tokens)
        self._patiently(lambda: self.cache.ensure(lengths))

    def _patiently(self, call: Callable[[], _Result]) -> _Result:
        """Make a call that takes memory; where there is none, what was given up may wait for a kernel only."""
        try:
            return call()
        except (OutOfPages, OutOfMappings, OutOfSlots):
            if not self.store.settle():
                raise
            return call()

    def _require_length(self, n_tokens: int) -> None:
        if not self.first_token <= n_tokens <= self.n_tokens:
            raise UsageError(f"truncate to {n_tokens} in rows that hold [{self.first_token}, {self.n_tokens})")

    def _require_rows(self, indices: torch.Tensor) -> None:
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.n_rows:
            raise UsageError(f"rows {indices.tolist()} of a batch of {self.n_rows}")

    def close(self) -> None:
        """Give the memory back; see `close_rows`."""
        close_rows([self])

    def _let_go(self) -> bool:
        """Drop our own tensors if they are the last ones; else change nothing and return False."""
        if self._tensors is not None:
            self._growing = None
            if not self._tensors.let_go():
                self._take_slots(self._slots)
                return False
            self._tensors = None
        return True

    def _look(self) -> None:
        self._tensors = RegionTensors(self.cache, functools.partial(self.store.abandon, self._lease))
        self._take_slots(self._slots)

    def _give_back(self) -> None:
        self.store.end_lease(self._lease)
        self._lease.slots = ()
        self.first_token = self.n_tokens = 0

    def _take_slots(self, slots: Sequence[SlotId]) -> None:
        self._lease.slots = slots
        if slots and self._tensors is not None:
            layout = self.cache.layout
            keys, values = (self._tensors.view(part[0], slots, self.dtype) for part in (layout.keys, layout.values))
            self._growing = keys, values

    def _expected_shapes(self, n_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        key, value = self.spec
        n_rows = len(self._slots)
        return (n_rows, key.n_heads, n_tokens, key.head_dim), (n_rows, value.n_heads, n_tokens, value.head_dim)

    def _refuse(self, key_states: torch.Tensor, value_states: torch.Tensor) -> NoReturn:
        """Say why states do not belong to this layer, and what would."""
        self._require_open()
        for what, states, spec in zip("KV", (key_states, value_states), self.spec, strict=True):
            if states.shape[0] != self.n_rows:
                raise UsageError(
                    f"the cache holds {self.n_rows} sequences, the model passes {states.shape[0]}; "
                    "call reset() before a batch of another size, or use another cache"
                )
            if states.device != self.device:
                raise UsageError(
                    f"the cache is on {self.device}, the model's {what} on {states.device}; move the model there, or "
                    "make a new cache"
                )
            if states.dtype is not self.dtype:
                raise UsageError(
                    f"the cache holds {self.dtype}, the model's {what} is {states.dtype}; "
                    "make a new cache for a model of another dtype"
                )
            if (states.shape[1], states.shape[3]) != (spec.n_heads, spec.head_dim):
                raise UsageError(
                    f"the cache holds {spec.n_heads} heads of {spec.head_dim}, the model's {what} has "
                    f"{states.shape[1]} of {states.shape[3]}; make a new cache for another model"
                )
        raise UsageError(f"K has {key_states.shape[2]} new tokens, V has {value_states.shape[2]}; pass as many of both")

    def _require_open(self) -> None:
        if self._tensors is None:
            raise UsageError("the cache is closed; make a new one")

    def _started(self) -> tuple[GrowingView, GrowingView]:
        """K and V over the slots, whole."""
        if self._growing is None:
            raise UsageError("the rows were stopped or closed; start them first")
        return self._growing


class Change:
    """A change of rows of which the part that can fail is done: `commit` or `undo` ends it, exactly one of them.

    Several layers change together, or none of them: each begins, and the changes are committed when all have begun.
    Nobody uses the rows meanwhile.
    """

    def __init__(
        self,
        rows: LayerRows,
        exchange: Exchange | None,
        moves: Mapping[int, int] | None = None,
        n_rows: int | None = None,
        n_tokens: int | None = None,
    ) -> None:
        self._rows = rows
        self._exchange = exchange
        self._moves = moves or {}
        self._n_rows = rows.n_rows if n_rows is None else n_rows
        self._n_tokens = rows.n_tokens if n_tokens is None else n_tokens

    def commit(self) -> None:
        """Do the rest.

        Raises:
            DriverError: It is done; memory of rows that ended could not be given back.
        """
        rows = self._rows
        if self._exchange is not None:
            self._exchange.commit()
        rows.n_tokens = self._n_tokens
        if self._moves:
            rows._copy_tails(self._moves)
        if self._n_rows < rows.n_rows:
            rows._shrink(self._n_rows)

    def undo(self) -> None:
        """Leave the rows as they were before.

        Raises:
            DriverError: That failed: the rows cannot grow any more, and may hold the wrong tokens.
        """
        if self._exchange is not None:
            self._exchange.undo()


def close_rows(rows: Sequence[LayerRows]) -> None:
    """Give the memory of several layers back: of all of them or, while somebody still looks into one, of none.

    Idempotent.

    Raises:
        UsageError: Views made by `views` are still alive: drop them and close again; or this is a forked child.
            Nothing changed.
        DriverError, OutOfMappings: Memory could not be given back; call again to try again.
    """
    for layer in rows:
        layer.cache.pool.require_owner()
    was_open = [layer._tensors is not None for layer in rows]
    for i, layer in enumerate(rows):
        if not layer._let_go():
            for earlier in range(i):
                if was_open[earlier]:
                    rows[earlier]._look()
            raise UsageError(
                "tensors that look into the cache are still alive (cache.layers[i].keys, or attention inputs that "
                "were kept); clone what you need, drop them, and close again"
            )
    for layer in rows:
        layer._give_back()
