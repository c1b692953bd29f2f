"""Large dense products: both operands come through the tensor memory accelerator; one warp group loads while two multiply.

As many programs as there are multiprocessors walk the tiles, so that the next tile is loaded while one is stored. Scales must
be constant along K.
"""

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.device import num_sms
from penstock.ops.matmul.tile_triton import TMA_BYTES, TileConfig, walk

BAND = 16


def fits_tma(tensor: Tensor) -> bool:
    """The tensor memory accelerator can address the rows of this tensor."""
    starts = tensor.is_meta or tensor.data_ptr() % TMA_BYTES == 0
    step = tensor.shape[-1] * tensor.element_size() % TMA_BYTES == 0
    return tensor.is_contiguous() and tensor.numel() > 0 and starts and step


@triton.jit
def _wide_kernel(
    out_ptr,
    x_desc,
    w_desc,
    xs_ptr,
    ws_ptr,
    bias_ptr,
    M,
    N,
    K,
    tiles_m,
    tiles_n,
    programs,
    out_stride,
    XS: tl.constexpr,
    WS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
):
    ACC: tl.constexpr = tl.int32 if x_desc.dtype == tl.int8 else tl.float32
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, warp_specialize=SPECIALIZE):
        tile_m, tile_n = walk(tile, tiles_m, tiles_n, BAND)
        acc = tl.zeros([BM, BN], ACC)
        for step in tl.range(0, tl.cdiv(K, BK)):
            x = x_desc.load([tile_m * BM, step * BK])
            w = w_desc.load([tile_n * BN, step * BK])
            acc = tl.dot(x, tl.trans(w), acc, out_dtype=ACC)
        rows = tile_m * BM + tl.arange(0, BM)
        live = rows < M
        channels = tile_n * BN + tl.arange(0, BN)
        w_live = channels < N
        result = acc.to(tl.float32)
        if XS == "tensor":
            result *= tl.load(xs_ptr)
        elif XS == "token":
            result *= tl.load(xs_ptr + rows, live, other=0.0)[:, None]
        if WS == "tensor":
            result *= tl.load(ws_ptr)
        elif WS == "channel":
            result *= tl.load(ws_ptr + channels, w_live, other=0.0)[None, :]
        if HAS_BIAS:
            result += tl.load(bias_ptr + channels, w_live, other=0.0).to(tl.float32)[None, :]
        at = out_ptr + (rows.to(tl.int64) * out_stride)[:, None] + channels[None, :]
        tl.store(at, result.to(out_ptr.dtype.element_ty), live[:, None] & w_live[None, :])


def launch_wide(
    out: Tensor,
    x: Tensor,
    w: Tensor,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    x_scales: str,
    w_scales: str,
    bias: Tensor | None,
    config: TileConfig,
) -> None:
    """Launches a program for each multiprocessor; with four warps the compiler specialises them."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (M, K), N = x.shape, w.shape[0]
    tiles_m, tiles_n = triton.cdiv(M, config.block_m), triton.cdiv(N, config.block_n)
    programs = min(num_sms(x.device), tiles_m * tiles_n)
    _wide_kernel[(programs,)](
        out,
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(w, [config.block_n, config.block_k]),
        out if x_scale is None else x_scale,
        out if w_scale is None else w_scale,
        out if bias is None else bias,
        M,
        N,
        K,
        tiles_m,
        tiles_n,
        programs,
        out.stride(0),
        XS=x_scales,
        WS=w_scales,
        HAS_BIAS=bias is not None,
        SPECIALIZE=config.num_warps == 4,
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BAND=BAND,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
