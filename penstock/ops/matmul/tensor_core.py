"""What tensor cores make of a sum, for the error budgets of products: a model of their accumulators, not of any one result.

An instruction adds `depth` exact products to the accumulator. All are aligned to the largest of them and cut off so many bits
below it: 13 on Hopper for FP8 (DeepSeek-AI, arXiv:2412.19437, section 3.5.2), 23 for 16-bit operands.
"""

import torch
from torch import Tensor

FP8_DEPTH, FP8_BITS = 32, 13
HALF_DEPTH, HALF_BITS = 16, 23


def accumulated(x: Tensor, w: Tensor, restart: int | None = None) -> Tensor:
    """x · wᵀ as FP8 tensor cores add it up; every `restart` values of K the sum moves to a float32 one."""
    K = x.shape[1]
    total = x.new_zeros(x.shape[0], w.shape[0], dtype=torch.float32)
    for first in range(0, K, restart or max(K, 1)):
        part = slice(first, min(first + (restart or K), K))
        total += cut_off(x[:, part], w[:, part], FP8_DEPTH, FP8_BITS)
    return total


def cut_off(x: Tensor, w: Tensor, depth: int, bits: int) -> Tensor:
    """x · wᵀ in float32, every sum of `depth` products cut off `bits` bits below its largest part; of matrices or batches."""
    wide, weights = x.double(), w.double()
    total = wide.new_zeros(*x.shape[:-1], w.shape[-2])
    for first in range(0, x.shape[-1], depth):
        step = slice(first, first + depth)
        a, b = wide[..., step], weights[..., step]
        added = total + a @ b.mT
        # The largest product itself is not known here; the root of the sum of their squares is about as large.
        products = (a.square() @ b.square().mT).sqrt()
        largest = torch.maximum(torch.maximum(total.abs(), added.abs()), products)
        unit = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - 1 - bits)
        total = (added / unit).trunc() * unit
    return total.float()
