"""The CPU path of quantize: the definition with fewer tensors, the blocks of a row seen as a dimension."""

import torch
from torch import Tensor

from penstock.core.formats import BLOCK, Format


def encode(out: Tensor, out_scale: Tensor | None, x: Tensor, scale: Tensor | None, format: Format, weight: bool) -> None:
    """Writes codes, and the scale when none is given."""
    wide = x.float()
    if scale is None and out_scale is not None:
        scale = out_scale.copy_(format.dynamic_scale(wide, weight))
    if scale is None or x.numel() == 0:
        return
    whole = format.granularity == "block" and not weight and x.shape[-1] % BLOCK == 0
    if whole:
        scaled = (wide.unflatten(-1, (-1, BLOCK)) / scale.unsqueeze(-1)).flatten(-2)
    else:
        scaled = wide / format.spread(scale, x.shape, weight)
    scaled.clamp_(-format.largest, format.largest)
    if out.dtype is torch.int8:
        # An unordered number has no defined integer.
        scaled.nan_to_num_(nan=0.0).round_()
    out.copy_(scaled)
