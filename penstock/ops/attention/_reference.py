"""softmax(softcap(q · kᵀ · scale) + mask) · v: the definition, and the naive computation in the inputs' own dtype."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# (q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv], visible [n, m], scale, softcap, sinks) -> out [n, Hq, Dv], lse [n, Hq]
Attend = Callable[..., tuple[Tensor, Tensor]]


def visible_keys(q_len: int, k_len: int, left: int, right: int, device: torch.device) -> Tensor:
    """[q_len, k_len] bool: which keys each query sees; the last query stands on the last key."""
    keys = torch.arange(k_len, device=device)[None, :]
    own = torch.arange(k_len - q_len, k_len, device=device)[:, None]
    visible = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    if left >= 0:
        visible = visible & (keys >= own - left)
    if right >= 0:
        visible = visible & (keys <= own + right)
    return visible


def exact(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One request, every step in float32, or float64 for float64 inputs."""
    wide = torch.promote_types(q.dtype, torch.float32)
    seen = visible.any(0)[:, None, None]
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
    weights = torch.softmax(scores, -1)[:, :, : len(k)].masked_fill(dead[:, None], 0)
    return torch.einsum("hnm,mhd->nhd", weights, v), lse.T


def naive(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One request, scores and weights rounded to the inputs' dtype, as torch's math path does."""
    seen = visible.any(0)[:, None, None]
    group = q.shape[1] // k.shape[1]
    k = torch.where(seen, k, 0).repeat_interleave(group, 1).permute(1, 2, 0)
    v = torch.where(seen, v, 0).repeat_interleave(group, 1).transpose(0, 1)
    scores = (q.transpose(0, 1) @ k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column.masked_fill(~visible.any(-1)[:, None], float("-inf"))], -1)
        v = torch.cat([v, v.new_zeros(v.shape[0], 1, v.shape[2])], 1)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    weights = torch.softmax(scores, -1).masked_fill((lse == float("-inf"))[:, :, None], 0)
    return (weights @ v).transpose(0, 1), lse.T


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
) -> tuple[Tensor, Tensor]:
    """Applies `attend` to each request, given as (its rows of q, its k, its v); rows of no request are zero, -inf."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(*q.shape[:2], Dv, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=wide, device=q.device)
    right = 0 if causal else window_right
    for rows, k, v in requests:
        visible = visible_keys(rows.stop - rows.start, k.shape[0], window_left, right, q.device)
        result, logs = attend(q[rows], k, v, visible, scale, softcap, sinks)
        out[rows], lse[rows] = result.to(q.dtype), logs.to(wide)
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
