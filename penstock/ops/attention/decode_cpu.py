"""attention_decode on the CPU: pages gathered by one index_select a cache, one fused attention over the padded batch."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from penstock.ops.attention import _cpu

# Padding costs like keys; a call per request costs like this many keys of one request.
CALL_IN_KEYS = 128


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
    spans = [min(length, left + q_len) if left >= 0 else length for length in lengths]
    longest = max(spans, default=0)
    if longest == 0:
        _cpu.write_dead(out, out_lse)
        return
    right = 0 if causal else right
    B = len(lengths)
    if B * longest > sum(spans) + B * CALL_IN_KEYS:
        q_ends = [b * q_len for b in range(B + 1)]
        requests = _cpu.paged_requests(k_cache, v_cache, page_table, q_ends, seqlens_k, left)
        _cpu.attend_requests(out, out_lse, q, requests, causal, scale, left, right, softcap, sinks)
        return
    _, S, Hkv, D = k_cache.shape
    group = q.shape[1] // Hkv
    keys = torch.arange(longest)[None]
    ends = seqlens_k.long()[:, None]
    if left >= 0:
        keys = keys + (ends - longest).clamp_(min=0)
    uniform = min(spans) == longest
    # Slots past the end may hold NaN, which no mask removes: the request's last key stands in for them.
    own = keys if uniform else torch.minimum(keys, (ends - 1).clamp_(min=0))
    if own.shape[0] != B:
        own = own.expand(B, -1)
    pages = page_table.long().gather(1, own // S)
    if not uniform and 0 in lengths:
        pages = pages.masked_fill(ends == 0, 0)
    k, v = (_cpu.gather_pages(cache, pages, own % S).transpose(1, 2) for cache in (k_cache, v_cache))
    visible = _visible(keys, ends, q_len, left, right, uniform)
    scale = D**-0.5 if scale is None else scale
    grouped = q.view(B, q_len, Hkv, group, D)
    if softcap or sinks is not None or out_lse is not None:
        mask = None if visible is None else visible[:, None, None]
        result, lse = _cpu.softmax_attention(grouped.permute(0, 2, 3, 1, 4), k, v, mask, scale, softcap, sinks)
        out.view(B, q_len, Hkv, group, -1).copy_(result.permute(0, 3, 1, 2, 4))
        if out_lse is not None:
            out_lse.view(B, q_len, Hkv, group).copy_(lse.permute(0, 3, 1, 2))
    else:
        rows = grouped.transpose(1, 2).reshape(B, Hkv, q_len * group, D)
        mask = None if visible is None else visible[:, None]
        if mask is not None and q_len > 1:
            mask = mask.repeat_interleave(group, 2)
        result = scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        out.view(B, q_len, Hkv, group, -1).copy_(result.view(B, Hkv, q_len, group, -1).transpose(1, 2))
    if min(lengths) < q_len:
        own = ends + torch.arange(q_len) - q_len
        dead = (ends == 0) if right < 0 else (ends == 0) | (own + right < 0)
        dead = dead.expand(B, q_len).reshape(-1, 1)
        out.masked_fill_(dead[:, :, None], 0)
        if out_lse is not None:
            out_lse.masked_fill_(dead, float("-inf"))


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
