"""Up to four launches: sort the slots by expert; gate, up and their gated product; down; the weighted sums. No float atomics.

Gate and up are two products of one tile, so that the epilogue has both and its rows of 128 channels, which share a scale. Rows
of x are read through the sorted slots' tokens; the product and its scales lie in sorted order. On Hopper each launch is brought
to the device while the one before it still runs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.core.device import has_dependent_launch
from penstock.core.formats import BLOCK, FP8_MAX
from penstock.core.formats_triton import encode_groups
from penstock.core.tuning import tuned
from penstock.ops.matmul.grouped_gemm_triton import BAND, average, kind_of, launch_grouped, rows_of, tile_bound
from penstock.ops.matmul.scales import input_format, kinds
from penstock.ops.matmul.tile_triton import (
    TileConfig,
    accumulate,
    descriptor,
    find_tile,
    over_channels,
    over_tokens,
    own_tile,
    scale_rows,
)
from penstock.ops.moe.sort_triton import sort_slots
from penstock.ops.quantization.quantize import quantize

# Up to so many slots each is a group of its own: sorting them would take longer than reading an expert twice, out of the L2.
OWN_SLOTS = 16


def candidates(kind: str, rows: int, I: int, K: int) -> Iterator[TileConfig]:
    """Configs worth timing; FP8 has tiles of whole groups of 128 channels."""
    step = 64 if kind == "bf16" else 128
    if rows <= 64:
        for block_m in sorted({max(16, rows), max(16, 2 * rows)} - {128}):
            for block_n in (128, 64) if kind == "bf16" else (128,):
                for warps in (4, 8):
                    for stages in (2, 3, 4, 6):
                        if (block_m + 2 * block_n) * step * (2 if kind == "bf16" else 1) * stages <= 220_000:
                            yield TileConfig(block_m, block_n, step, warps, stages, True, True)
        return
    for block_m, warps, stages in ((128, 8, 3), (64, 8, 3), (64, 8, 4), (64, 4, 3)):
        yield TileConfig(block_m, 128, step, warps, stages, False, True)
    if kind == "bf16":
        yield TileConfig(128, 64, step, 8, 4, False, True)
        yield TileConfig(64, 64, step, 4, 4, False, True)


@tuned(candidates)
def configure(kind: str, rows: int, I: int, K: int) -> TileConfig:
    """The default for gate and up: two tiles of weights in each step.

    Args:
        kind: "bf16", "fp8" or "fp8_block".
        rows: of an expert on average, rounded up to a power of two.
        I: channels of the product.
    """
    step = 64 if kind == "bf16" else 128
    if rows <= 64:
        return TileConfig(max(16, rows), 128, step, 4 if rows <= 32 else 8, 3, True, True)
    return TileConfig(64 if kind == "fp8_block" else 128, 128, step, 8, 3, False, True)


@triton.jit(do_not_specialize=["num_rows", "x_count", "first_id", "E"])
def _gate_up_kernel(
    h_ptr,
    hs_ptr,
    x_ptr,
    w_ptr,
    w_desc,
    xs_ptr,
    ws_ptr,
    offsets_ptr,
    tokens_ptr,
    num_rows,
    x_count,
    I,
    K,
    tiles_n,
    x_stride,
    w_expert,
    w_row,
    ws_expert,
    first_id,
    E,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    XS: tl.constexpr,
    WS: tl.constexpr,
    W_ONE: tl.constexpr,
    UP_ONE: tl.constexpr,
    LARGEST: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EARLY: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
):
    """TOP_K is not 0 when every slot is a group of its own: then offsets_ptr holds the slots' ids."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if TOP_K > 0:
        group, first, stop, tile_n = own_tile(offsets_ptr, tl.program_id(0), tiles_n, first_id, E)
    else:
        group, first, stop, tile_n = find_tile(offsets_ptr, tl.program_id(0), num_rows, tiles_n, E, SIZE, False, BM, BAND)
    if group < 0:
        return
    rows, live, source, x_live = rows_of(tokens_ptr, first, stop, x_count, TOP_K == 0, BM)
    if TOP_K > 0:
        source = source // TOP_K
    channels = tile_n * BN + tl.arange(0, BN)
    w_live = channels < I
    expert = group.to(tl.int64)
    x_rows = x_ptr + source * x_stride
    w_rows = w_ptr + expert * w_expert + channels.to(tl.int64) * w_row
    up_rows = w_ptr + expert * w_expert + (I + channels).to(tl.int64) * w_row
    w_first = (expert * (2 * I)).to(tl.int32) + tile_n * BN
    blocks = tl.cdiv(K, 128)
    xs_rows = xs_ptr + source * blocks
    scale_row = expert * tl.cdiv(2 * I, 128)
    ws_rows = scale_rows(ws_ptr, scale_row, channels, tile_n * BN, blocks, W_ONE)
    up_scale_rows = scale_rows(ws_ptr, scale_row, I + channels, I + tile_n * BN, blocks, UP_ONE)
    gate, up = accumulate(x_rows, x_live, w_rows, w_live, w_desc, w_first, up_rows, w_desc, w_first + I, xs_rows, ws_rows,
                          up_scale_rows, 0, tl.cdiv(K, BK), K, True, XS == "block", WS == "block", W_ONE, UP_ONE, SWAP, False,
                          TMA, EVEN_K, BM, BN, BK)  # fmt: skip
    if XS == "tensor":
        xs = tl.load(xs_ptr)
        gate *= xs
        up *= xs
    elif XS == "token":
        xs = over_tokens(tl.load(xs_ptr + source, x_live, other=0.0), SWAP)
        gate *= xs
        up *= xs
    if WS == "tensor":
        ws = tl.load(ws_ptr + expert * ws_expert)
        gate *= ws
        up *= ws
    elif WS == "channel":
        gate *= over_channels(tl.load(ws_ptr + expert * (2 * I) + channels, w_live, other=0.0), SWAP)
        up *= over_channels(tl.load(ws_ptr + expert * (2 * I) + I + channels, w_live, other=0.0), SWAP)
    product = gate / (1.0 + tl.exp(-gate)) * up
    if SWAP:
        product = tl.trans(product)
    mask = live[:, None] & w_live[None, :]
    at = h_ptr + (rows.to(tl.int64) * I)[:, None] + channels[None, :]
    if h_ptr.dtype.element_ty == tl.float8e4nv:
        # TMA reads past the gate's last row into the up's first.
        product = tl.where(w_live[None, :], product, 0.0)
        groups = tile_n * (BN // 128) + tl.arange(0, BN // 128)
        count = tl.cdiv(I, 128)
        scales_at = (rows.to(tl.int64) * count)[:, None] + groups[None, :]
        live_groups = live[:, None] & (groups < count)[None, :]
        codes = encode_groups(product, hs_ptr, scales_at, live_groups, LARGEST, True, tl.float8e4nv)
        tl.store(at, codes, mask)
    else:
        tl.store(at, product.to(h_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["first_id", "E"])
def _sum_kernel(
    out_ptr,
    y_ptr,
    position_ptr,
    weights_ptr,
    shared_ptr,
    H,
    out_stride,
    weights_stride,
    shared_stride,
    first_id,
    E,
    OWN: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if EARLY:
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(position_ptr + token * TOP_K + slot)
        if OWN:
            row = tl.where((row >= first_id) & (row < first_id + E), token * TOP_K + slot, -1)
        weight = tl.load(weights_ptr + token * weights_stride + slot)
        y = tl.load(y_ptr + row.to(tl.int64) * H + columns, inside & (row >= 0), other=0.0).to(tl.float32)
        # A slot of another rank adds nothing, whatever its weight is.
        total += tl.where(row >= 0, weight, 0.0) * y
    if HAS_SHARED:
        total += tl.load(shared_ptr + token * shared_stride + columns, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_stride + columns, total.to(out_ptr.dtype.element_ty), inside)


def _gate_up(
    product: Tensor,
    product_scale: Tensor | None,
    x: Tensor,
    x_scale: Tensor | None,
    x_scales: str,
    w: Tensor,
    w_scale: Tensor | None,
    w_scales: str,
    offsets: Tensor,
    tokens: Tensor | None,
    early: bool,
    first_id: int,
    top_k: int,
) -> None:
    """With tokens None every slot is a group of its own, and offsets are the slots' ids."""
    S, I = product.shape
    E, _, K = w.shape
    config = configure.on(x.device, kind_of(x, x_scales, w_scales), average(S, E), I, K)
    w_desc, tma = descriptor(w, config)
    tiles_n = triton.cdiv(I, config.block_n)
    # A tile of channels has one scale of weights a block, unless it begins in the middle of a square.
    one = w_scales == "block" and BLOCK % config.block_n == 0
    options: dict[str, Any] = {"launch_pdl": True} if early and tokens is not None else {}
    tiles_m = S if tokens is None else tile_bound(S, E, config.block_m)
    _gate_up_kernel[(tiles_m * tiles_n,)](
        product,
        product if product_scale is None else product_scale,
        x,
        w,
        w_desc,
        x if x_scale is None else x_scale,
        x if w_scale is None else w_scale,
        offsets,
        offsets if tokens is None else tokens,
        S,
        S if tokens is None else x.shape[0],
        I,
        K,
        tiles_n,
        x.stride(0),
        w.stride(0),
        w.stride(1),
        0 if w_scale is None or w_scale.numel() == 1 else 1,
        first_id,
        E,
        SIZE=triton.next_power_of_2(E + 1),
        TOP_K=0 if tokens is not None else top_k,
        XS=x_scales,
        WS=w_scales,
        W_ONE=one,
        UP_ONE=one and I % BLOCK == 0,
        LARGEST=FP8_MAX,
        SWAP=config.swap,
        TMA=tma,
        EVEN_K=K % config.block_k == 0,
        EARLY=early,
        BM=config.block_m,
        BN=config.block_n,
        BK=config.block_k,
        BAND=BAND,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )


def launch(
    out: Tensor,
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w_gate_up_scale: Tensor | None,
    w_down_scale: Tensor | None,
    x_scale: Tensor | None,
    shared_output: Tensor | None,
    format: str | None,
    activation: str,
    expert_offset: int,
) -> None:
    """Launches the chain; an x that is not FP8 yet is quantised first."""
    T, H = x.shape
    E, _, I = w_down.shape
    S = topk_ids.numel()
    if out.numel() == 0:
        return
    early = has_dependent_launch(x.device)
    x_scales, w_scales = kinds(format)
    if format is not None and x_scale is None:
        x_format = input_format(format)
        x, x_scale = quantize(x, format=x_format, impl="triton")
        x_scales = x_format.granularity
    y = out.new_empty(S, H)
    topk_ids = topk_ids.contiguous()
    own = S <= OWN_SLOTS
    position = offsets = topk_ids
    tokens = None
    if S:
        if not own:
            tokens, position, offsets = sort_slots(topk_ids, E, expert_offset, early)
        product = torch.empty(S, I, dtype=w_down.dtype, device=x.device)
        product_scale = None if format is None else x.new_empty(S, triton.cdiv(I, BLOCK), dtype=torch.float32)
        tiles = (offsets, tokens, early, expert_offset, topk_ids.shape[1])
        _gate_up(product, product_scale, x, x_scale, x_scales, w_gate_up, w_gate_up_scale, w_scales, *tiles)
        scales = (product_scale, w_down_scale, "none" if format is None else "block", w_scales)
        first_id = expert_offset if own else None
        launch_grouped(y, product, w_down, offsets, None, *scales, tail=False, early=early, own=first_id)
    block = min(1024, triton.next_power_of_2(H))
    _sum_kernel[(T, triton.cdiv(H, block))](
        out,
        y,
        position,
        topk_weights,
        out if shared_output is None else shared_output,
        H,
        out.stride(0),
        topk_weights.stride(0),
        0 if shared_output is None else shared_output.stride(0),
        expert_offset,
        E,
        OWN=own,
        TOP_K=topk_ids.shape[1],
        HAS_SHARED=shared_output is not None,
        EARLY=early and S > 0,
        BLOCK=block,
        num_warps=4,
        **({"launch_pdl": True} if early and S else {}),
    )
