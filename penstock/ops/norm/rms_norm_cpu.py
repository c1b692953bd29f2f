"""The CPU path shared by rms_norm and add_rms_norm: four torch calls, because at batch 1 the calls are the cost."""

import torch
from torch import Tensor


def normalise(out: Tensor, x: Tensor, weight: Tensor, eps: float, offset: float) -> None:
    """out = x / sqrt(mean(x²) + eps) · (weight + offset); out may be x."""
    if x.numel() == 0:
        return
    if offset:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    # One reduction call; mean(x²) is the squared norm over N.
    scale = torch.linalg.vector_norm(wide, 2, -1, True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    torch.mul(wide * scale, weight, out=out)
