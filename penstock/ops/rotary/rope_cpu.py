"""The CPU path of rope: queries and keys that lie side by side are rotated by the same few torch calls."""

import torch
from torch import Tensor


def _side_by_side(q: Tensor, k: Tensor) -> bool:
    """Whether k's heads follow q's in one buffer."""
    return (
        q.stride() == k.stride()
        and k.data_ptr() - q.data_ptr() == q.shape[1] * q.stride(1) * q.element_size()
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    )


def _pairs(x: Tensor, heads: int, half: int, interleaved: bool) -> Tensor:
    """[T, heads, 2, half] view of the rotated dimensions: partners differ in the third index."""
    token, head, one = x.stride()
    partner, step = (one, 2 * one) if interleaved else (half * one, one)
    return x.as_strided((x.shape[0], heads, 2, half), (token, head, partner, step))


def _rows(cos_sin: Tensor, positions: Tensor) -> Tensor:
    """The table's rows; a negative position gets cosines 1 and sines 0."""
    if min(positions.tolist()) >= 0:
        return cos_sin.index_select(0, positions)
    half = cos_sin.shape[1] // 2
    still = cos_sin.new_tensor([1.0] * half + [0.0] * half)
    return torch.where((positions < 0).unsqueeze(1), still, cos_sin.index_select(0, positions.clamp(min=0)))


def rotate(out_q: Tensor, out_k: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> None:
    """Writes rotated q and k; outputs may be the inputs."""
    tokens, heads_q, dim = q.shape
    heads, rotated = heads_q + k.shape[1], cos_sin.shape[1]
    if tokens * heads * dim == 0:
        return
    half = rotated // 2
    packed = heads_q < heads and _side_by_side(q, k)
    x = _pairs(q if packed else torch.cat((q, k), 1), heads, half, interleaved)
    in_place = out_q is q and out_k is k
    if packed and in_place and x.dtype == cos_sin.dtype:
        a, b = x.unbind(2)
        cos, sin = _rows(cos_sin, positions).view(tokens, 1, 2, half).unbind(2)
        turned = (a * cos).addcmul_(b, sin, value=-1)
        b.mul_(cos).addcmul_(a, sin)
        a.copy_(turned)
        return
    # chunk and split_with_sizes, because Tensor.split passes through Python.
    cos, sin = _rows(cos_sin, positions).view(tokens, 1, 1, rotated).chunk(2, 3)
    result = x * cos
    (a, b), (first, second) = x.chunk(2, 2), result.chunk(2, 2)
    first.addcmul_(b, sin, value=-1)
    second.addcmul_(a, sin)
    if rotated < dim:
        if out_q is not q:
            out_q[..., rotated:].copy_(q[..., rotated:])
        if out_k is not k:
            out_k[..., rotated:].copy_(k[..., rotated:])
    if packed and (in_place or _side_by_side(out_q, out_k)):
        _pairs(out_q, heads, half, interleaved).copy_(result)
        return
    new_q, new_k = result.split_with_sizes((heads_q, heads - heads_q), 1)
    _pairs(out_q, heads_q, half, interleaved).copy_(new_q)
    _pairs(out_k, heads - heads_q, half, interleaved).copy_(new_k)
