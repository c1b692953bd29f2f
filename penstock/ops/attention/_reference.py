"""softmax(softcap(q · kᵀ · scale) + mask) · v: the definition, and the naive computation in the inputs' own dtype."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from penstock.ops.matmul.tensor_core import FP8_BITS, FP8_DEPTH, cut_off

FP8 = torch.float8_e4m3fn
# Queries and keys that one element of a block mask stands for.
MASK_BLOCK = 128
# Scores, and values of keys repeated for their heads, of one piece of a large request: 128 MiB in float64. Some eight of
# these exist at once.
PIECE = 1 << 24

# (q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv], visible [n, m], scale, softcap, sinks) -> out [n, Hq, Dv], lse [n, Hq]
Attend = Callable[..., tuple[Tensor, Tensor]]


def visible_keys(q_len: int, k_len: int, left: int, right: int, device: torch.device, rows: slice | None = None) -> Tensor:
    """[q_len, k_len] bool: which keys each query, or each of some rows, sees; the last query stands on the last key."""
    begin, end = (0, q_len) if rows is None else (rows.start, rows.stop)
    keys = torch.arange(k_len, device=device)[None, :]
    own = torch.arange(k_len - q_len + begin, k_len - q_len + end, device=device)[:, None]
    visible = torch.ones(end - begin, k_len, dtype=torch.bool, device=device)
    if left >= 0:
        visible = visible & (keys >= own - left)
    if right >= 0:
        visible = visible & (keys <= own + right)
    return visible


def exact(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One request, every step in float32, or float64 for float64 inputs; `visible` is [n, m] or [Hq, n, m]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    seen = _seen(visible)
    group = q.shape[1] // k.shape[1]
    # Zero where nobody looks: 0 · NaN is NaN.
    k = torch.where(seen, k, 0).to(wide).repeat_interleave(group, 1)
    v = torch.where(seen, v, 0).to(wide).repeat_interleave(group, 1)
    scores = torch.einsum("nhd,mhd->hnm", q.to(wide), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    dead = ~visible.any(-1)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    lse = scores.logsumexp(-1).masked_fill(dead, float("-inf"))
    weights = torch.softmax(scores, -1)[:, :, : len(k)].masked_fill(dead[..., None], 0)
    return torch.einsum("hnm,mhd->nhd", weights, v), lse.T


def naive(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One request, scores and weights rounded to the inputs' dtype, as torch's math path does."""
    seen = _seen(visible)
    group = q.shape[1] // k.shape[1]
    k = torch.where(seen, k, 0).repeat_interleave(group, 1).permute(1, 2, 0)
    v = torch.where(seen, v, 0).repeat_interleave(group, 1).transpose(0, 1)
    scores = (q.transpose(0, 1) @ k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column.masked_fill(~visible.any(-1)[..., None], float("-inf"))], -1)
        v = torch.cat([v, v.new_zeros(v.shape[0], 1, v.shape[2])], 1)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    weights = torch.softmax(scores, -1).masked_fill((lse == float("-inf"))[:, :, None], 0)
    return (weights @ v).transpose(0, 1), lse.T


def narrow_weights(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One request of dequantised FP8 values, rounded where a Hopper tensor core rounds FP8.

    On a GPU scores are added up as its accumulators do it (`tensor_core`), elsewhere in float32. Weights are stored as
    e4m3(256 · exp(score - highest score)).
    """
    group = q.shape[1] // k.shape[1]
    seen = _seen(visible)
    k = torch.where(seen, k, 0).repeat_interleave(group, 1)
    v = torch.where(seen, v, 0).repeat_interleave(group, 1)
    if q.is_cuda:
        scores = cut_off(q.transpose(0, 1), k.transpose(0, 1), FP8_DEPTH, FP8_BITS)
    else:
        scores = torch.einsum("nhd,mhd->hnm", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    highest = scores.amax(-1, keepdim=True) if len(k) else scores.new_full((*scores.shape[:2], 1), float("-inf"))
    dead = highest == float("-inf")
    weights = torch.exp(scores - highest.masked_fill(dead, 0))
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.to(total.dtype)[:, None, None] - highest.masked_fill(dead, 0))
    lse = (highest + total.log()).masked_fill(dead, float("-inf"))[..., 0]
    stored = (256 * weights).to(FP8).to(v.dtype) / 256
    out = torch.einsum("hnm,mhd->nhd", stored / total.masked_fill(dead, 1), v)
    return out.masked_fill(dead[..., 0].T[:, :, None], 0), lse.T


def _seen(visible: Tensor) -> Tensor:
    """[m, 1, 1] bool: the keys that some query of some head sees."""
    return visible.flatten(0, -2).any(0)[:, None, None]


def allowed_pairs(block_mask: Tensor, q_len: int, k_len: int, rows: slice | None = None) -> Tensor:
    """[Hq, q_len, k_len] bool of one request, or of some of its rows, from its block mask [Hq, query blocks, key blocks]."""
    begin, end = (0, q_len) if rows is None else (rows.start, rows.stop)
    queries = torch.arange(begin, end, device=block_mask.device) // MASK_BLOCK
    keys = torch.arange(k_len, device=block_mask.device) // MASK_BLOCK
    return block_mask[:, queries[:, None], keys[None, :]] != 0


def _pieces(q_len: int, k_len: int, Hq: int, Hkv: int, D: int) -> Iterator[tuple[slice, slice, slice]]:
    """(rows, heads, heads of keys) of one request: all at once, or as many heads of one of keys and rows as PIECE holds."""
    if Hq * k_len * max(q_len, D) <= PIECE:
        yield slice(0, q_len), slice(0, Hq), slice(0, Hkv)
        return
    group = Hq // Hkv
    count = max(1, min(group, PIECE // (k_len * D)))
    step = max(1, PIECE // (count * k_len))
    for kv_head in range(Hkv):
        for first in range(kv_head * group, (kv_head + 1) * group, count):
            heads = slice(first, min(first + count, (kv_head + 1) * group))
            for begin in range(0, q_len, step):
                yield slice(begin, min(begin + step, q_len)), heads, slice(kv_head, kv_head + 1)


def dequantized(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 values times their scales, in float32 (float64 where they are kept in it); others as they are."""
    if q.dtype is not FP8 and q_scale is None and k_scale is None and v_scale is None:
        return q, k_cache, v_cache
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    pairs = ((q, q_scale), (k_cache, k_scale), (v_cache, v_scale))
    q, k_cache, v_cache = (x.to(wide) if scale is None else x.to(wide) * scale.to(wide)[..., None] for x, scale in pairs)
    return q, k_cache, v_cache


def over_requests(
    attend: Attend,
    q: Tensor,
    requests: Iterator[tuple[slice, Tensor, Tensor]],
    Dv: int,
    causal: bool,
    scale: float | None,
    window_left: int,
    window_right: int,
    softcap: float | None,
    sinks: Tensor | None,
    *,
    block_mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Applies `attend` to each request, given as (its rows of q, its k, its v); rows of no request are zero, -inf.

    The result is of `dtype`, by default that of q. A large request is taken in pieces, which bounds the memory.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(*q.shape[:2], Dv, dtype=dtype or q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=wide, device=q.device)
    right = 0 if causal else window_right
    for b, (own, k, v) in enumerate(requests):
        q_len, k_len = own.stop - own.start, k.shape[0]
        for rows, heads, kv_heads in _pieces(q_len, k_len, q.shape[1], k.shape[1], max(q.shape[2], Dv)):
            visible = visible_keys(q_len, k_len, window_left, right, q.device, rows)
            if block_mask is not None:
                visible = visible & allowed_pairs(block_mask[b, heads], q_len, k_len, rows)
            piece = q[own][rows, heads], k[:, kv_heads], v[:, kv_heads]
            result, logs = attend(*piece, visible, scale, softcap, None if sinks is None else sinks[heads])
            out[own][rows, heads], lse[own][rows, heads] = result.to(out.dtype), logs.to(wide)
    return out, lse


def packed_requests(k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Requests whose keys are packed like their queries."""
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(q_ends) - 1):
        keys = slice(k_ends[b], k_ends[b + 1])
        yield slice(q_ends[b], q_ends[b + 1]), k[keys], v[keys]


def paged_requests(
    k_cache: Tensor, v_cache: Tensor, page_table: Tensor, q_ends: list[int], seqlens_k: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Requests whose keys stand in pages."""
    page_size = k_cache.shape[1]
    for b, k_len in enumerate(seqlens_k.tolist()):
        pages = page_table[b, : -(-k_len // page_size)].long()
        k, v = k_cache[pages].flatten(0, 1)[:k_len], v_cache[pages].flatten(0, 1)[:k_len]
        yield slice(q_ends[b], q_ends[b + 1]), k, v
