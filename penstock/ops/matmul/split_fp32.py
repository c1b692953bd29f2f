"""w ≈ w_hi + w_lo / 256: float32 weights as two bfloat16 tensors, for gemm_bf16_fp32."""

import torch
from torch import Tensor


def split_fp32(w: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float32 values in two bfloat16 numbers of eight bits each; made once, when weights are loaded.

    w_hi is w rounded; w_lo is 256 times what that left. Their sum w_hi + w_lo / 256 differs from w by at most 2⁻¹⁷ of it.

    Args:
        w: any shape, float32.
    Returns: (w_hi, w_lo), both of w's shape in bfloat16; w_lo is 0 where w is not finite.
    Raises: ValueError when w is not float32.
    """
    if w.dtype is not torch.float32:
        raise ValueError(f"split_fp32: `w` must be float32, got {str(w.dtype).removeprefix('torch.')}")
    w_hi = w.to(torch.bfloat16)
    left = torch.where(w_hi.isfinite(), w - w_hi.float(), 0.0)
    return w_hi, (left * 256).to(torch.bfloat16)
