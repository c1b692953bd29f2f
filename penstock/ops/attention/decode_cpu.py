"""attention_decode on the CPU: requests of like lengths together, their pages gathered by one index_select a cache."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from penstock.ops.attention import _cpu

# Padding costs like keys; a call of its own costs a request like this many keys.
CALL_IN_KEYS = 128
# Gathered keys of one batch: they stay in a core's L2 until they are used, and their memory is reused, not mapped anew.
GATHERED_BYTES = 1 << 20


def batches(spans: Sequence[int], key_bytes: int) -> Iterator[list[int]]:
    """Requests to attend together, longest first, given the keys each one reads and the bytes of a key."""
    order = sorted((b for b, span in enumerate(spans) if span), key=lambda b: -spans[b])
    batch: list[int] = []
    total = 0
    for b in order:
        if batch:
            padded = (len(batch) + 1) * spans[batch[0]]
            wasted = padded - total - spans[b]
            if padded * key_bytes > GATHERED_BYTES or wasted > len(batch) * CALL_IN_KEYS:
                yield batch
                batch, total = [], 0
        batch.append(b)
        total += spans[b]
    if batch:
        yield batch


def attend(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    q_len: int,
    causal: bool,
    scale: float | None,
    left: int,
    right: int,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Writes out [B · q_len, Hq, Dv] and, when given, out_lse [B · q_len, Hq]."""
    lengths = seqlens_k.tolist()
    if q_len == 1 and not softcap and sinks is None and out_lse is None and lengths:
        longest, shortest = max(lengths), min(lengths)
        key_bytes = k_cache.shape[2] * k_cache.shape[3] * q.element_size()
        sees_all = shortest > 0 and (left < 0 or longest <= left + 1)
        together = longest - shortest <= CALL_IN_KEYS and len(lengths) * longest * key_bytes <= GATHERED_BYTES
        if sees_all and (together or len(lengths) == 1):
            _attend_together(out, q, k_cache, v_cache, page_table, seqlens_k, longest, shortest, scale)
            return
    spans = [min(length, left + q_len) if left >= 0 else length for length in lengths]
    right = 0 if causal else right
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if 0 in lengths:
        _cpu.write_dead(out, out_lse)
    B, Hq = len(lengths), q.shape[1]
    q_rows, out_rows = q.view(B, q_len, Hq, q.shape[2]), out.view(B, q_len, Hq, out.shape[2])
    lse_rows = None if out_lse is None else out_lse.view(B, q_len, Hq)
    Hkv, D = k_cache.shape[2:]
    for batch in batches(spans, Hkv * D * q.element_size()):
        b = batch[0]
        if len(batch) == 1:
            lse = None if lse_rows is None else lse_rows[b]
            requests = _cpu.paged_requests(k_cache, v_cache, page_table[b : b + 1], [0, q_len], seqlens_k[b : b + 1], left)
            for _, k, v in requests:
                _cpu.attend_request(out_rows[b], lse, q_rows[b], k, v, left, right, scale, softcap, sinks)
            continue
        own: slice | Tensor = slice(b, b + len(batch))
        if batch != list(range(b, b + len(batch))):
            own = torch.tensor(batch)
        result, logs = _attend_batch(
            q_rows[own],
            k_cache,
            v_cache,
            page_table[own],
            seqlens_k[own].long()[:, None],
            max(spans[b] for b in batch),
            all(spans[b] == spans[batch[0]] for b in batch),
            left,
            right,
            scale,
            softcap,
            sinks,
            out_lse is not None,
        )
        out_rows[own] = result
        if lse_rows is not None and logs is not None:
            lse_rows[own] = logs


def _attend_together(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    longest: int,
    shortest: int,
    scale: float | None,
) -> None:
    """The common step in few torch calls: one token of each request, which sees all its keys, of which there is one or more."""
    B, (S, Hkv) = q.shape[0], k_cache.shape[1:3]
    mask = None
    if B == 1:
        pages = page_table.tolist()[0][: -(-longest // S)]
        k, v = (_cpu.first_slots(cache, pages, longest).transpose(0, 1)[None] for cache in (k_cache, v_cache))
    else:
        table: np.ndarray = page_table[:, : -(-longest // S)].numpy()
        keys: np.ndarray = np.arange(longest, dtype=np.int32)
        slots = (table[:, :, None] * S + keys[:S]).reshape(B, -1)[:, :longest] if longest >= S else table * S + keys
        if shortest < longest:
            seen = keys < seqlens_k.numpy()[:, None]
            # Slots past the end may hold NaN, which no mask removes: the request's first key stands in for them.
            slots = np.where(seen, slots, slots[:, :1])
            mask = torch.from_numpy(seen)[:, None, None]
        rows = torch.from_numpy(slots)
        k, v = (_cpu.gather_slots(cache, rows).transpose(1, 2) for cache in (k_cache, v_cache))
    result = scaled_dot_product_attention(q.view(B, Hkv, -1, q.shape[2]), k, v, attn_mask=mask, scale=scale)
    out.view(B, Hkv, -1, out.shape[2]).copy_(result)


def _attend_batch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    ends: Tensor,
    longest: int,
    uniform: bool,
    left: int,
    right: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out [B, q_len, Hq, Dv] and lse [B, q_len, Hq] of requests padded to `longest` keys; `ends` [B, 1] are their lengths."""
    B, q_len, Hq, D = q.shape
    S, Hkv = k_cache.shape[1:3]
    group = Hq // Hkv
    keys = torch.arange(longest)[None]
    if left >= 0:
        keys = keys + (ends - longest).clamp_(min=0)
    # Slots past the end may hold NaN, which no mask removes: the request's last key stands in for them.
    own = (keys if uniform else torch.minimum(keys, ends - 1)).expand(B, -1)
    pages = page_table.long().gather(1, own // S)
    slots = pages * S + own % S
    k, v = (_cpu.gather_slots(cache, slots).transpose(1, 2) for cache in (k_cache, v_cache))
    visible = _visible(keys, ends, q_len, left, right, uniform)
    grouped = q.view(B, q_len, Hkv, group, D)
    lse = None
    if softcap or sinks is not None or return_lse:
        mask = None if visible is None else visible[:, None, None]
        result, lse = _cpu.softmax_attention(grouped.permute(0, 2, 3, 1, 4), k, v, mask, scale, softcap, sinks)
        out = result.permute(0, 3, 1, 2, 4).reshape(B, q_len, Hq, -1).to(q.dtype)
        lse = lse.permute(0, 3, 1, 2).reshape(B, q_len, Hq)
    else:
        rows = grouped.transpose(1, 2).reshape(B, Hkv, q_len * group, D)
        mask = None if visible is None else visible[:, None]
        if mask is not None and q_len > 1:
            mask = mask.repeat_interleave(group, 2)
        result = scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        out = result.view(B, Hkv, q_len, group, -1).transpose(1, 2).reshape(B, q_len, Hq, -1)
        if right >= 0 and q_len > 1:
            dead = ends + torch.arange(q_len) - q_len + right < 0
            out = out.masked_fill(dead[:, :, None, None], 0)
    return out, lse


def _visible(keys: Tensor, ends: Tensor, q_len: int, left: int, right: int, uniform: bool) -> Tensor | None:
    """[B, q_len, keys] bool, or None when every query sees every gathered key."""
    if q_len == 1:
        return None if uniform else (keys < ends)[:, None]
    own = (ends + torch.arange(-q_len, 0))[:, :, None]
    visible = keys[:, None] < ends[:, :, None]
    if left >= 0:
        visible = visible & (keys[:, None] >= own - left)
    if right >= 0:
        visible = visible & (keys[:, None] <= own + right)
    return visible.expand(-1, q_len, -1)
