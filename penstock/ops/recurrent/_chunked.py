"""Mamba-2's scan as matrix products over chunks: the CPU path, and the naive computation that sets the error budget.

Within a chunk y = (C · Bᵀ ∘ L) · x with L[t, s] = exp(a[s+1] + … + a[t]) · step[s]; between chunks a state of [P, N] is carried.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 64


def scan_chunks(
    x: Tensor,
    steps: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    states: Tensor,
    rounded: Callable[[Tensor], Tensor],
) -> Tensor:
    """y [T, H, P] before D and the gate, and the final states [B, H, P, N] in place of the initial ones.

    Args:
        steps: [T, H] in the wide dtype of the result.
        rounded: applied to every operand of a product that is not an input.
    """
    y = torch.zeros(x.shape, dtype=steps.dtype, device=x.device)
    H, G = x.shape[1], B.shape[1]
    # Heads first: [H, T, P], [G, T, N]
    x, B, C = (values.to(steps.dtype).transpose(0, 1) for values in (x, B, C))
    decays = (steps * A.to(steps.dtype)).T
    steps = steps.T
    for request, (first, last) in enumerate(pairwise(cu_seqlens.tolist())):
        h = states[request]
        for begin in range(first, last, CHUNK):
            own = slice(begin, min(begin + CHUNK, last))
            keys, queries, step = B[:, own], C[:, own], steps[:, own]
            total = decays[:, own].cumsum(1)
            # Above the diagonal the difference is positive and its exponential may overflow.
            gap = (total[:, :, None] - total[:, None, :]).tril_()
            scores = (queries @ keys.mT).repeat_interleave(H // G, 0)
            weights = rounded((scores * gap.exp_() * step[:, None, :]).tril_())
            inner = weights @ x[:, own]
            outer = queries.repeat_interleave(H // G, 0) @ rounded(h).mT
            y[own] = (inner + outer * total.exp()[..., None]).transpose(0, 1)
            left = total[:, -1:]
            taken = rounded(x[:, own] * ((left - total).exp() * step)[..., None])
            h = h * left.exp()[..., None] + taken.mT @ keys.repeat_interleave(H // G, 0)
        states[request] = h
    return y
