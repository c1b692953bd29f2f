"""FP8 products on a CPU: codes become floats by shifts, a few channels at a time, so that what was widened stays in the cache.

torch converts e4m3 value by value, which takes longer than the product of a few tokens. The bits of a code, moved to where
float16 has its exponent and mantissa, are the value / 256, subnormal ones included.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.core.formats import BLOCK, FORMATS, FP8_BLOCK

# Channels widened at a time; whole blocks of scales, and at K = 4096 about the 1 MB of a core's L2 cache.
CHANNELS = 2 * BLOCK
# A float16's sign, its exponent but for the highest bit, and three bits of mantissa.
KEPT = -0x4080


def decoded(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of e4m3 codes in float32 or bfloat16, both of which hold them exactly."""
    small = codes.view(torch.int8)
    if codes.numel() and small.bitwise_and(127).amax() == 127:
        # A NaN: its bits would be those of a number.
        return codes.to(dtype)
    bits = small.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(KEPT)
    return bits.view(torch.float16).float().mul_(256).to(dtype)


def has_bf16_products() -> bool:
    """Whether oneDNN multiplies bfloat16 at least as fast as float32 here."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def multiply(x: Tensor, w: Tensor, w_scale: Tensor, w_scales: str) -> Tensor:
    """x · wᵀ with the scales of the weights applied, in float32.

    Args:
        x: [M, K] float32 or bfloat16; bfloat16 sums are rounded to bfloat16 before they are scaled.
        w: [N, K] codes.
        w_scales: "tensor", "channel" or "block".
    """
    N = w.shape[0]
    y = x.new_empty(x.shape[0], N, dtype=torch.float32)
    for first in range(0, N, CHANNELS):
        part = decoded(w[first : first + CHANNELS], x.dtype)
        if w_scales == "block":
            part.mul_(FP8_BLOCK.spread(w_scale[first // BLOCK :], part.shape, weight=True))
        y[:, first : first + CHANNELS] = F.linear(x, part)
    return y if w_scales == "block" else y.mul_(w_scale)


def gemm(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, format: str, rough: bool) -> Tensor:
    """x · wᵀ with all scales applied, in float32.

    Args:
        x: [M, K] codes.
        rough: the result will be bfloat16, so that sums may be rounded to it once more where that is faster.
    """
    kind = FORMATS[format]
    if format == "FP8_BLOCK":
        return multiply(decoded(x, torch.float32).mul_(kind.spread(x_scale, x.shape)), w, w_scale, "block")
    wide = decoded(x, torch.bfloat16 if rough and has_bf16_products() else torch.float32)
    y = multiply(wide, w, w_scale, "tensor" if format == "FP8_TENSOR" else "channel")
    return y.mul_(kind.spread(x_scale, x.shape))
