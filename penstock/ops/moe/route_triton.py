"""A program of one warp takes one token, so that every maximum is a few shuffles and no barrier.

The experts stand as [groups, members], both padded to powers of two.
"""

import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.moe.route import LEAST_SUM


@triton.jit
def _first_best(order, numbers, open_, BIG: tl.constexpr):
    """The number of the largest of `order` among the open ones, the smallest number where several are equal."""
    most = tl.max(tl.where(open_, order, float("-inf")), 0)
    return tl.min(tl.where(open_ & (order == most), numbers, BIG), 0)


@triton.jit
def _route_kernel(
    ids_ptr,
    weights_ptr,
    logits_ptr,
    bias_ptr,
    row_stride,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LEAST_SUM: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = E // GROUPS
    BIG: tl.constexpr = 2147483647
    groups = tl.arange(0, G)
    members = tl.arange(0, M)
    inside = (groups < GROUPS)[:, None] & (members < SIZE)[None, :]
    ids = groups[:, None] * SIZE + members[None, :]
    x = tl.load(logits_ptr + row * row_stride + ids, inside, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("-inf"), x)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        most = tl.max(tl.max(x, 1), 0)
        powers = tl.exp(x - tl.where(most == float("-inf"), 0.0, most))
        total = tl.sum(tl.sum(powers, 1), 0)
        scores = powers / tl.where(total == 0.0, 1.0, total)
    order = x
    if HAS_BIAS:
        order = scores + tl.load(bias_ptr + ids, inside, other=0.0).to(tl.float32)
    if TOP_GROUPS < GROUPS:
        masked = tl.where(inside, order, float("-inf"))
        worth = tl.max(masked, 1)
        if HAS_BIAS and SIZE > 1:
            first = tl.min(tl.where(masked == worth[:, None], members[None, :], BIG), 1)
            worth += tl.max(tl.where(members[None, :] == first[:, None], float("-inf"), masked), 1)
        left = groups < GROUPS
        for _ in tl.static_range(TOP_GROUPS):
            left = left & (groups != _first_best(worth, groups, left, BIG))
        inside = inside & (left == 0)[:, None]
    flat_order = tl.reshape(order, (G * M,))
    flat_scores = tl.reshape(scores, (G * M,))
    flat_ids = tl.reshape(ids, (G * M,))
    open_ = tl.reshape(inside, (G * M,))
    slots = tl.arange(0, K)
    chosen = tl.zeros([K], tl.int32)
    weights = tl.zeros([K], tl.float32)
    for slot in tl.static_range(TOP_K):
        best = _first_best(flat_order, flat_ids, open_, BIG)
        here = open_ & (flat_ids == best)
        chosen = tl.where(slots == slot, best, chosen)
        weights = tl.where(slots == slot, tl.sum(tl.where(here, flat_scores, 0.0), 0), weights)
        open_ = open_ & (flat_ids != best)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, 0) + LEAST_SUM)
    tl.store(ids_ptr + row * TOP_K + slots, chosen, slots < TOP_K)
    tl.store(weights_ptr + row * TOP_K + slots, weights * scale, slots < TOP_K)


def launch(
    ids: Tensor,
    weights: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    num_groups: int | None,
    top_groups: int | None,
    scale: float,
) -> None:
    """Launches over tokens."""
    T, E = logits.shape
    if T == 0:
        return
    groups, kept = num_groups or 1, top_groups or 1
    tile = triton.next_power_of_2(groups) * triton.next_power_of_2(E // groups)
    _route_kernel[(T,)](
        ids,
        weights,
        logits,
        logits if bias is None else bias,
        logits.stride(0),
        scale,
        E=E,
        TOP_K=top_k,
        GROUPS=groups,
        TOP_GROUPS=kept,
        SIGMOID=scoring == "sigmoid",
        RENORMALIZE=renormalize,
        HAS_BIAS=bias is not None,
        LEAST_SUM=LEAST_SUM,
        G=triton.next_power_of_2(groups),
        M=triton.next_power_of_2(E // groups),
        K=triton.next_power_of_2(top_k),
        num_warps=1 if tile <= 512 else 4,
    )
