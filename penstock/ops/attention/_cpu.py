"""The CPU path: torch's fused attention where it can say what is asked, an explicit softmax where it cannot."""

from collections.abc import Iterable, Iterator
from itertools import repeat

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from penstock.ops.attention._reference import FP8, allowed_pairs, visible_keys

# Elements of float32 scores that the explicit softmax makes at once: 64 MiB.
SCORES_AT_ONCE = 1 << 24


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Explicit softmax with GQA.

    Args:
        q: [B, Hkv, group, n, D]; k [B, Hkv, m, D]; v [B, Hkv, m, Dv].
        visible: broadcast to [B, Hkv, group, n, m], or None when every key is.
        sinks: [Hkv · group].
    Returns: out [B, Hkv, group, n, Dv] and lse [B, Hkv, group, n], zero and -inf where nothing is visible.
    """
    B, Hkv, group, n, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.reshape(B, Hkv, group * n, D).to(wide) @ k.to(wide).transpose(-1, -2)).mul_(scale)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(B, Hkv, group, n, -1)
    if visible is not None:
        scores = scores.masked_fill_(~visible, float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    dead = highest == float("-inf")
    if sinks is not None:
        sinks = sinks.to(wide).view(Hkv, group, 1, 1)
        highest = torch.maximum(highest, sinks)
    highest = highest.masked_fill_(dead, 0)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total += torch.exp(sinks - highest)
    out = (weights.view(B, Hkv, group * n, -1) @ v.to(wide)).view(B, Hkv, group, n, -1) / total.masked_fill(dead, 1)
    lse = (highest + total.log()).masked_fill_(dead, float("-inf"))
    return out, lse[..., 0]


def attend_request(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    allowed: Tensor | None = None,
) -> None:
    """One request of n queries [n, Hq, D] and m keys [m, Hkv, D], written to out [n, Hq, Dv].

    allowed: [Hq, n, m] bool, which pairs may meet at all.
    """
    n, m = q.shape[0], k.shape[0]
    ahead = m - n
    if n == 0:
        return
    if m == 0:
        write_dead(out, out_lse)
        return
    first = max(0, ahead - left) if left >= 0 else 0
    k, v = k[first:], v[first:]
    if allowed is not None:
        meet = visible_keys(n, m, left, right, q.device)[:, first:] & allowed[..., first:]
        # What nobody looks at may be NaN.
        seen = meet.flatten(0, 1).any(0)[:, None, None]
        _explicit(out, out_lse, q, k.where(seen, 0), v.where(seen, 0), meet, scale, softcap, sinks)
        return
    unlimited = left < 0 or left >= m - 1
    sees_all = n == 1 or (unlimited and (right < 0 or right >= n - 1))
    plain = not softcap and sinks is None and out_lse is None
    aligned = right == 0 and ahead == 0 and unlimited and plain
    if n == 1 and plain:
        # The heads of one KV head as rows of one product, which is else one row high: 3 to 10 times faster in bfloat16.
        grouped = q.view(1, k.shape[1], -1, q.shape[2])
        keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        out.copy_(scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(out.shape))
        return
    visible = None if sees_all or aligned else visible_keys(n, m, left, right, q.device)[:, first:]
    if not plain:
        _explicit(out, out_lse, q, k, v, visible, scale, softcap, sinks)
        return
    result = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=visible,
        is_causal=aligned and n > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )[0].transpose(0, 1)
    out.copy_(result)
    if visible is not None and ahead < 0:
        out.masked_fill_(~visible.any(-1)[:, None, None], 0)


def write_dead(out: Tensor, out_lse: Tensor | None) -> None:
    """What rows that see no key return."""
    out.zero_()
    if out_lse is not None:
        out_lse.fill_(float("-inf"))


def attend_requests(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    requests: Iterable[tuple[slice, Tensor, Tensor]],
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    block_mask: Tensor | None = None,
) -> None:
    """Each request, given as (its rows of q, its k, its v), by itself; the rows after the last are padding."""
    right = 0 if causal else window_right
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    end = 0
    for b, (rows, k, v) in enumerate(requests):
        lse = None if out_lse is None else out_lse[rows]
        allowed = None if block_mask is None else allowed_pairs(block_mask[b], rows.stop - rows.start, k.shape[0])
        attend_request(out[rows], lse, q[rows], k, v, window_left, right, scale, softcap, sinks, allowed)
        end = rows.stop
    if end < q.shape[0]:
        write_dead(out[end:], None if out_lse is None else out_lse[end:])


def _explicit(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    n, Hq, D = q.shape
    Hkv = k.shape[1]
    keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    step = max(1, SCORES_AT_ONCE // (Hq * k.shape[0]))
    for start in range(0, n, step):
        rows = slice(start, min(n, start + step))
        part = q[rows].view(-1, Hkv, Hq // Hkv, D).permute(1, 2, 0, 3)[None]
        seen = None if visible is None else visible[..., rows, :]
        if seen is not None and seen.dim() == 3:
            seen = seen.unflatten(0, (1, Hkv, Hq // Hkv))
        result, lse = softmax_attention(part, keys, values, seen, scale, softcap, sinks)
        out[rows] = result[0].permute(2, 0, 1, 3).reshape(-1, Hq, v.shape[2])
        if out_lse is not None:
            out_lse[rows] = lse[0].permute(2, 0, 1).reshape(-1, Hq)


def gather_slots(cache: Tensor, slots: Tensor) -> Tensor:
    """[*slots.shape, Hkv, D]: the keys or values in these slots, numbered page · S + offset."""
    S = cache.shape[1]
    if cache.stride(0) == S * cache.stride(1):
        return cache.flatten(0, 1).index_select(0, slots.flatten()).view(*slots.shape, *cache.shape[2:])
    slots = slots.long()
    return cache[slots // S, slots % S]


def first_slots(cache: Tensor, pages: list[int], length: int) -> Tensor:
    """[length, Hkv, D] of one request: a view of the cache where its pages follow each other, otherwise a copy."""
    P, S, Hkv, D = cache.shape
    page, slot, head, one = cache.stride()
    first = pages[0] if pages else 0
    end = first + len(pages)
    if page == S * slot and first >= 0 and end <= P and pages == list(range(first, end)):
        return cache.as_strided((length, Hkv, D), (slot, head, one), cache.storage_offset() + first * page)
    return cache.index_select(0, torch.tensor(pages, dtype=torch.int64)).flatten(0, 1)[:length]


def paged_requests(
    k_cache: Tensor, v_cache: Tensor, page_table: Tensor, q_ends: list[int], seqlens_k: Tensor, left: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows of q, k, v) of each request, from the first page that the window lets a query see."""
    S, table = k_cache.shape[1], page_table.tolist()
    for b, k_len in enumerate(seqlens_k.tolist()):
        rows = slice(q_ends[b], q_ends[b + 1])
        first = max(0, k_len - (rows.stop - rows.start) - left) // S if left >= 0 else 0
        pages = table[b][first : -(-k_len // S)]
        # Masks count from the last key, so that keys may be missing at the front.
        k_len -= first * S
        yield rows, first_slots(k_cache, pages, k_len), first_slots(v_cache, pages, k_len)


def fp8_requests(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    q_ends: list[int],
    seqlens_k: Tensor,
    left: int,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Iterator[tuple[slice, Tensor, Tensor]]]:
    """q in float32, and (rows of q, k, v) of each request in float32: FP8 values times their scales."""

    def requests() -> Iterator[tuple[slice, Tensor, Tensor]]:
        # Pages are gathered as bytes, which torch can index.
        stored = paged_requests(k_cache.view(torch.uint8), v_cache.view(torch.uint8), page_table, q_ends, seqlens_k, left)
        k_scales: Iterator[Tensor | None] = repeat(_column(k_scale))
        if k_scale is not None and k_scale.dim() == 3:
            cache = k_scale[..., None]
            k_scales = (scale for _, scale, _ in paged_requests(cache, cache, page_table, q_ends, seqlens_k, left))
        for (rows, k, v), scale in zip(stored, k_scales, strict=False):
            yield rows, _times(k, scale), _times(v, _column(v_scale))

    return _times(q.view(torch.uint8), _column(q_scale)), requests()


def _column(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale[..., None]


def _times(stored: Tensor, scale: Tensor | None) -> Tensor:
    values = stored.view(FP8).float()
    return values if scale is None else values.mul_(scale)
