"""CPU stand-ins for the operators behind the CUDA attention kernels, with the very signatures of the real ones.

    flash_attention_forward    torch's `aten::_flash_attention_forward`, as in torch 2.11
    flash_attn_varlen_forward  `_flash_attn_varlen_forward` in `flash_attn.flash_attn_interface`, flash-attn 2.7 and 2.8
    flash_attn_with_kvcache    `flash_attn.flash_attn_with_kvcache`, likewise
    fa3_with_kvcache           `flash_attn_with_kvcache` of fa3-fwd 0.0.3 and flash-attn-3

Hand them to the adapters in `vmem_kv.attention` to see, without a GPU, that the right arguments arrive.

Guarantees: plain float64 mathematics; loads exactly what the lengths say, and for FlashAttention-3 the rest of the last
tile too, which it multiplies by zero as the real one does. Checks what the real ones check, and also what they trust:
the two maxima, and that rows lie inside K and V. What an adapter never asks for (dropout, block tables, rotary
embedding, appending) is refused.

Raises ValueError on everything that it rejects.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NoReturn

import torch

Window = tuple[int, int]
_NO_WINDOW = (-1, -1)
_HALF = (torch.bfloat16, torch.float16)


def flash_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend as torch's operator does with sums and used lengths given.

    Returns:
        The output `[n_tokens, n_q_heads, head_dim]`, and four empty tensors for what nobody reads.
    """
    _refuse(dropout_p=dropout_p, return_debug_mask=return_debug_mask, alibi_slopes=alibi_slopes)
    output = _varlen(
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        seqused_k,
        max_q,
        max_k,
        scale,
        is_causal,
        (-1 if window_size_left is None else window_size_left, -1 if window_size_right is None else window_size_right),
        0.0,
    )
    empty = output.new_empty(0)
    return output, empty, empty, empty, empty


def flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend as flash-attn's variable-length forward does with used lengths given.

    Returns:
        The output `[n_tokens, n_q_heads, head_dim]`, and three empty tensors for what nobody reads.
    """
    _refuse(
        dropout_p=dropout_p,
        alibi_slopes=alibi_slopes,
        return_softmax=return_softmax,
        block_table=block_table,
        leftpad_k=leftpad_k,
    )
    output = _varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        (window_size_left, window_size_right),
        softcap,
    )
    empty = output.new_empty(0)
    return output, empty, empty, empty


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _NO_WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor:
    """Attend as flash-attn does from `[n_seqs, n, n_q_heads, head_dim]` to slots `[n_slots, n, n_kv_heads, head_dim]`.

    Returns:
        The output, shaped as the queries.
    """
    _refuse(k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, block_table=block_table)
    _refuse(alibi_slopes=alibi_slopes, num_splits=num_splits, return_softmax_lse=return_softmax_lse)
    _require(rotary_interleaved, "rotary embedding is not emulated")
    _require(q.dim() == 4 and k_cache.dim() == 4 and v_cache.dim() == 4, "q, k_cache and v_cache have 4 dimensions")
    n_seqs, n_queries, n_q_heads, head_dim = q.shape
    query_starts = torch.arange(n_seqs + 1, dtype=torch.int32) * n_queries
    output = _slots(
        q.reshape(-1, n_q_heads, head_dim),
        k_cache,
        v_cache,
        query_starts,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        n_queries,
        softmax_scale,
        causal,
        window_size,
        softcap,
        tile_tokens=1,
    )
    return output.view(q.shape)


def fa3_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = _NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor:
    """Attend as FlashAttention-3 does from packed queries to slots `[n_slots, n, n_kv_heads, head_dim]`.

    It loads whole tiles of keys and values, up to the end of the slots' view: NaN in a tile's rest poisons the output.

    Returns:
        The output `[n_tokens, n_q_heads, head_dim]`.
    """
    _refuse(k=k, v=v, qv=qv, rotary_cos=rotary_cos, rotary_sin=rotary_sin, page_table=page_table)
    _refuse(cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens, scheduler_metadata=scheduler_metadata)
    _refuse(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk)
    _refuse(num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin, return_softmax_lse=return_softmax_lse)
    _require(rotary_interleaved, "rotary embedding is not emulated")
    _require(cu_seqlens_q is not None and max_seqlen_q is not None, "packed queries need cu_seqlens_q and max_seqlen_q")
    assert max_seqlen_q is not None
    return _slots(
        q,
        k_cache,
        v_cache,
        cu_seqlens_q,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        max_seqlen_q,
        softmax_scale,
        causal,
        window_size,
        softcap,
        tile_tokens=fa3_tile_tokens(q.shape[-1], is_causal=causal and max_seqlen_q > 1, has_window=window_size[0] >= 0),
    )


def fa3_tile_tokens(head_dim: int, *, is_causal: bool, has_window: bool) -> int:
    """Return how many keys one tile of FlashAttention-3 has on Hopper, for 16-bit K and V of one size, not paged."""
    if head_dim <= 64:
        return 128 if is_causal or has_window else 192
    if head_dim <= 96:
        return 128 if has_window else 144
    if head_dim <= 128:
        return 128 if is_causal or has_window else 176
    if head_dim <= 192:
        return 96 if has_window else 112
    return 64 if has_window else 80


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor | None,
    key_starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
    max_q: int,
    max_k: int,
    scale: float | None,
    is_causal: bool,
    window: Window,
    softcap: float,
) -> torch.Tensor:
    _require(key.dim() == 3 and value.dim() == 3, "packed K and V have 3 dimensions")
    _check_states(query, key, value)
    n_seqs = _check_starts(query, query_starts, max_q)
    first_rows = _integers("the starts of K", key_starts, n_seqs + 1, query.device)[:-1]
    used = _integers("seqused_k", lengths, n_seqs, query.device)
    _require(max(used) <= max_k, f"max_k is {max_k}, below the longest length {max(used)}")
    spans = [(first, first + length) for first, length in zip(first_rows, used, strict=True)]
    _require(all(0 <= begin <= end <= len(key) for begin, end in spans), "rows outside of K")
    sequences = [(key[begin:end], value[begin:end], end - begin) for begin, end in spans]
    return _attend(query, query_starts, sequences, scale, is_causal, window, softcap)


def _slots(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_starts: torch.Tensor | None,
    ends: torch.Tensor | None,
    slot_indices: torch.Tensor | None,
    leftpads: torch.Tensor | None,
    max_q: int,
    scale: float | None,
    is_causal: bool,
    window: Window,
    softcap: float,
    *,
    tile_tokens: int,
) -> torch.Tensor:
    _require(keys.dim() == 4 and values.dim() == 4, "K and V by slots have 4 dimensions")
    _require(keys.shape[:2] == values.shape[:2], "K and V have other slots or spans")
    _check_states(query, keys, values)
    n_seqs = _check_starts(query, query_starts, max_q)
    slots = _integers("cache_batch_idx", slot_indices, n_seqs, query.device)
    last = _integers("cache_seqlens", ends, n_seqs, query.device)
    first = [0] * n_seqs if leftpads is None else _integers("cache_leftpad", leftpads, n_seqs, query.device)
    sequences = []
    for slot, begin, end in zip(slots, first, last, strict=True):
        _require(0 <= slot < len(keys), f"there is no slot {slot}")
        _require(0 <= begin <= end <= keys.shape[1], f"tokens {begin} to {end} leave a slot of {keys.shape[1]}")
        loaded = min(begin + math.ceil((end - begin) / tile_tokens) * tile_tokens, keys.shape[1])
        sequences.append((keys[slot, begin:loaded], values[slot, begin:loaded], end - begin))
    return _attend(query, query_starts, sequences, scale, is_causal, window, softcap)


def _attend(
    query: torch.Tensor,
    query_starts: torch.Tensor | None,
    sequences: list[tuple[torch.Tensor, torch.Tensor, int]],
    scale: float | None,
    is_causal: bool,
    window: Window,
    softcap: float,
) -> torch.Tensor:
    """Attend sequence by sequence; each is (loaded keys, loaded values, how many of them are its own)."""
    assert query_starts is not None
    starts = query_starts.tolist()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    output = torch.empty_like(query)
    for index, (keys, values, length) in enumerate(sequences):
        begin, end = starts[index], starts[index + 1]
        n_groups = query.shape[1] // keys.shape[1]
        k, v = (t.double().repeat_interleave(n_groups, 1).transpose(0, 1) for t in (keys, values))
        scores = query[begin:end].double().transpose(0, 1) @ k.transpose(1, 2) * factor
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(end - begin).unsqueeze(1) + length - (end - begin)
        key = torch.arange(len(keys)).unsqueeze(0)
        is_seen = key < length
        if window[0] >= 0:
            is_seen = is_seen & (key >= position - window[0])
        right = 0 if is_causal else window[1]
        if right >= 0:
            is_seen = is_seen & (key <= position + right)
        # A NaN key is masked as any other; a NaN value is not, because zero times NaN is NaN.
        weights = torch.softmax(scores.masked_fill(~is_seen, -math.inf), 2)
        output[begin:end] = (weights @ v).transpose(0, 1).to(query.dtype)
    return output


def _check_states(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    _require(query.dtype in _HALF, f"only float16 and bfloat16, not {query.dtype}")
    _require(query.dtype == key.dtype == value.dtype, "query, key and value have one dtype")
    _require(query.device == key.device == value.device, "query, key and value are on one device")
    _require(all(t.stride(-1) == 1 for t in (query, key, value)), "the last dimension is contiguous")
    for tensor in (query, key, value):
        aligned = all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        _require(aligned and tensor.data_ptr() % 16 == 0, "addresses and strides are multiples of 16 bytes")
    _require(query.dim() == 3, "queries have 3 dimensions")
    head_dim = query.shape[-1]
    _require(head_dim % 8 == 0 and head_dim <= 256, f"head size {head_dim} is no multiple of 8 up to 256")
    _require(key.shape[-1] == head_dim == value.shape[-1], "query, key and value have one head size")
    _require(key.shape[-2] == value.shape[-2], "key and value have as many heads")
    _require(query.shape[1] % key.shape[-2] == 0, "heads of key and value divide those of the query")


def _check_starts(query: torch.Tensor, starts: torch.Tensor | None, max_q: int) -> int:
    _require(starts is not None and starts.numel() >= 2, "the batch is not empty")
    assert starts is not None
    n_seqs = starts.numel() - 1
    rows = _integers("the starts of the queries", starts, n_seqs + 1, query.device)
    longest = max(end - begin for begin, end in pairwise(rows))
    _require(rows[-1] - rows[0] == len(query), f"{rows[-1] - rows[0]} queries by their starts, {len(query)} by shape")
    _require(longest <= max_q, f"max_q is {max_q}, below the {longest} queries of a sequence")
    # The real ones then swap heads for tokens, which takes exactly one token of every sequence.
    _require(max_q > 1 or len(query) == n_seqs, "with max_q 1 every sequence brings one token")
    return n_seqs


def _integers(name: str, tensor: torch.Tensor | None, n_items: int, device: torch.device) -> list[int]:
    if tensor is None:
        _reject(f"{name} must be given")
    _require(tensor.dtype == torch.int32, f"{name} must be int32, not {tensor.dtype}")
    _require(tensor.shape == (n_items,), f"{name} must have shape ({n_items},), not {tuple(tensor.shape)}")
    _require(tensor.is_contiguous(), f"{name} must be contiguous")
    _require(tensor.device == device, f"{name} must be on {device}, not on {tensor.device}")
    return [int(i) for i in tensor.tolist()]


def _refuse(**arguments: object) -> None:
    """Refuse what is not emulated, unless it is off."""
    for name, argument in arguments.items():
        _require(argument is None or (not isinstance(argument, torch.Tensor) and not argument), f"{name} not emulated")


def _require(condition: bool, rule: str) -> None:
    if not condition:
        _reject(rule)


def _reject(rule: str) -> NoReturn:
    raise ValueError(f"the operator would refuse this: {rule}")
