"""The CPU path of rope: queries and keys that lie side by side are rotated by the same torch calls."""

import torch
from torch import Tensor


def rotate(out_q: Tensor, out_k: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> None:
    """Writes rotated q and k; outputs may be the inputs."""
    tokens, heads_q = q.shape[:2]
    if tokens == 0:
        return
    heads_k = k.shape[1]
    x = torch.cat((q, k), 1)
    rows = cos_sin.index_select(0, positions.clamp(min=0))
    half = rows.shape[1] // 2
    if positions.min() < 0:
        rows = torch.where((positions < 0).unsqueeze(1), rows.new_tensor([1.0] * half + [0.0] * half), rows)
    cos, sin = rows.unsqueeze(1).chunk(2, -1)
    part = x[..., : 2 * half]
    a, b = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
    first, second = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    if interleaved:
        part.copy_(torch.stack((first, second), -1).flatten(-2))
    else:
        part.copy_(torch.cat((first, second), -1))
    new_q, new_k = x.split((heads_q, heads_k), 1)
    out_q.copy_(new_q)
    out_k.copy_(new_k)
