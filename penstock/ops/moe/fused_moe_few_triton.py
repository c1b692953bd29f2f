"""A few slots in two launches on CUDA cores: gate, up and their gated product; down and the weighted sum. No float atomics.

Tensor cores would multiply padding, and tiles of 128 channels leave most multiprocessors idle: one token of 8 experts of 768
channels makes 48 of them. Here a program has a few channels of one slot, or, in the second launch, of one token, whose slots it
walks in their order. With FP8 the gated product stays in float32, and whoever reads it quantises it in groups of 128.

It awaits its measurement on a GPU: `impl="triton_few"` asks for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from penstock.core.device import has_dependent_launch
from penstock.core.formats import FP8_MAX
from penstock.core.formats_triton import encode, magnitude, scale_of
from penstock.core.tuning import tuned
from penstock.ops.matmul.scales import input_format, kinds
from penstock.ops.quantization.quantize import quantize


@dataclass(frozen=True)
class FewConfig:
    """Launch configuration of both kernels.

    Args:
        channels: of a program.
        blocks: of 128 values of K in a step.
    """

    channels: int
    blocks: int
    num_warps: int
    num_stages: int


def candidates(part: str, N: int, K: int) -> Iterator[FewConfig]:
    """Configs worth timing: up to 128 products a thread in a step."""
    for channels in (4, 8, 16, 32):
        for blocks in (2, 4, 8):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    if 16 <= channels * blocks * 128 // (32 * warps) <= 128 // (1 + (part == "gate_up")):
                        yield FewConfig(channels, blocks, warps, stages)


@tuned(candidates)
def configure(part: str, N: int, K: int) -> FewConfig:
    """The default: 8 KB of weights in each step of a program.

    Args:
        part: "gate_up" or "down".
        N: channels of the result.
    """
    return FewConfig(16, 2 if part == "gate_up" else 4, 4, 4)


@triton.jit
def _expert(ids_ptr, slot, first_id, E):
    """(the expert of a slot, whether it is one of ours)."""
    expert = tl.load(ids_ptr + slot) - first_id
    ours = (expert >= 0) & (expert < E)
    return tl.where(ours, expert, 0).to(tl.int64), ours


@triton.jit
def _weights(w_ptr, channels, live, blocks, K, w_row):
    """[channels, blocks, 128] weights of the columns of some blocks, in float32."""
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    at = w_ptr + (channels.to(tl.int64) * w_row)[:, None, None] + columns[None, :, :]
    return tl.load(at, live[:, None, None] & (columns < K)[None, :, :], other=0.0).to(tl.float32)


@triton.jit
def _block_scales(ws_ptr, channels, live, blocks, K):
    """[channels, blocks] scales of an expert's squares."""
    count = tl.cdiv(K, 128)
    at = ws_ptr + (channels // 128 * count)[:, None] + blocks[None, :]
    return tl.load(at, live[:, None] & (blocks < count)[None, :], other=0.0)


@triton.jit(do_not_specialize=["first_id", "E"])
def _gate_up_kernel(
    h_ptr,
    x_ptr,
    w_ptr,
    xs_ptr,
    ws_ptr,
    ids_ptr,
    I,
    K,
    tiles,
    x_stride,
    w_expert,
    w_row,
    ws_expert,
    first_id,
    E,
    TOP_K: tl.constexpr,
    XS: tl.constexpr,
    WS: tl.constexpr,
    EARLY: tl.constexpr,
    BN: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    slot = (tl.program_id(0) // tiles).to(tl.int64)
    expert, ours = _expert(ids_ptr, slot, first_id, E)
    if ours == 0:
        return
    token = slot // TOP_K
    channels = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    live = channels < I
    w_ptr += expert * w_expert
    count = tl.cdiv(K, 128)
    square_rows = expert * tl.cdiv(2 * I, 128) * count
    gate = tl.zeros([BN, BLOCKS, 128], tl.float32)
    up = tl.zeros([BN, BLOCKS, 128], tl.float32)
    for first in tl.range(0, count, BLOCKS, num_stages=STAGES):
        blocks = first + tl.arange(0, BLOCKS)
        columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
        x = tl.load(x_ptr + token * x_stride + columns, columns < K, other=0.0).to(tl.float32)
        if XS == "block":
            x *= tl.load(xs_ptr + token * count + blocks, blocks < count, other=0.0)[:, None]
        x_gate = x[None, :, :]
        x_up = x[None, :, :]
        if WS == "block":
            x_gate = x_gate * _block_scales(ws_ptr + square_rows, channels, live, blocks, K)[:, :, None]
            x_up = x_up * _block_scales(ws_ptr + square_rows, I + channels, live, blocks, K)[:, :, None]
        gate += _weights(w_ptr, channels, live, blocks, K, w_row) * x_gate
        up += _weights(w_ptr, I + channels, live, blocks, K, w_row) * x_up
    gate_sum = tl.sum(tl.sum(gate, 2), 1)
    up_sum = tl.sum(tl.sum(up, 2), 1)
    if XS == "tensor":
        xs = tl.load(xs_ptr)
        gate_sum *= xs
        up_sum *= xs
    elif XS == "token":
        xs = tl.load(xs_ptr + token)
        gate_sum *= xs
        up_sum *= xs
    if WS == "tensor":
        ws = tl.load(ws_ptr + expert * ws_expert)
        gate_sum *= ws
        up_sum *= ws
    elif WS == "channel":
        gate_sum *= tl.load(ws_ptr + expert * (2 * I) + channels, live, other=0.0)
        up_sum *= tl.load(ws_ptr + expert * (2 * I) + I + channels, live, other=0.0)
    product = gate_sum / (1.0 + tl.exp(-gate_sum)) * up_sum
    tl.store(h_ptr + slot * I + channels, product.to(h_ptr.dtype.element_ty), live)


@triton.jit(do_not_specialize=["first_id", "E"])
def _down_kernel(
    out_ptr,
    h_ptr,
    w_ptr,
    ws_ptr,
    ids_ptr,
    weights_ptr,
    shared_ptr,
    H,
    I,
    out_stride,
    w_expert,
    w_row,
    ws_expert,
    weights_stride,
    shared_stride,
    first_id,
    E,
    TOP_K: tl.constexpr,
    WS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    LARGEST: tl.constexpr,
    EARLY: tl.constexpr,
    BN: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    if EARLY:
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BN + tl.arange(0, BN)
    live = channels < H
    count = tl.cdiv(I, 128)
    steps = tl.cdiv(count, BLOCKS)
    total = tl.zeros([BN], tl.float32)
    acc = tl.zeros([BN, BLOCKS, 128], tl.float32)
    # One loop over the steps of all slots, so that the next slot's weights are on their way while this one's are added.
    for step in tl.range(0, TOP_K * steps, num_stages=STAGES):
        slot = token * TOP_K + step // steps
        expert, ours = _expert(ids_ptr, slot, first_id, E)
        blocks = step % steps * BLOCKS + tl.arange(0, BLOCKS)
        columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
        h = tl.load(h_ptr + slot * I + columns, (columns < I) & ours, other=0.0).to(tl.float32)
        if WS != "none":
            scale = scale_of(tl.max(magnitude(h), 1), LARGEST)
            h = encode(h, scale[:, None], tl.float8e4nv).to(tl.float32) * scale[:, None]
        wide = h[None, :, :]
        if WS == "block":
            squares = ws_ptr + expert * tl.cdiv(H, 128) * count
            wide = wide * _block_scales(squares, channels, live, blocks, I)[:, :, None]
        acc += _weights(w_ptr + expert * w_expert, channels, live & ours, blocks, I, w_row) * wide
        if step % steps == steps - 1:
            y = tl.sum(tl.sum(acc, 2), 1)
            if WS == "tensor":
                y *= tl.load(ws_ptr + expert * ws_expert)
            elif WS == "channel":
                y *= tl.load(ws_ptr + expert * H + channels, live, other=0.0)
            weight = tl.load(weights_ptr + token * weights_stride + step // steps)
            # A slot of another rank adds nothing, whatever its weight is.
            total += tl.where(ours, weight, 0.0) * tl.where(ours, y.to(out_ptr.dtype.element_ty).to(tl.float32), 0.0)
            acc = tl.zeros([BN, BLOCKS, 128], tl.float32)
    if HAS_SHARED:
        total += tl.load(shared_ptr + token * shared_stride + channels, live, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_stride + channels, total.to(out_ptr.dtype.element_ty), live)


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
    """Launches both; an x that is not FP8 yet is quantised first."""
    T, H = x.shape
    E, _, I = w_down.shape
    S, top_k = topk_ids.numel(), topk_ids.shape[1]
    if out.numel() == 0:
        return
    early = has_dependent_launch(x.device)
    x_scales, w_scales = kinds(format)
    if format is not None and x_scale is None:
        x_format = input_format(format)
        x, x_scale = quantize(x, format=x_format, impl="triton")
        x_scales = x_format.granularity
    topk_ids = topk_ids.contiguous()
    product = torch.empty(S, I, dtype=out.dtype if format is None else torch.float32, device=x.device)
    chained: dict[str, Any] = {}
    if S:
        config = configure.on(x.device, "gate_up", I, H)
        tiles = triton.cdiv(I, config.channels)
        _gate_up_kernel[(S * tiles,)](
            product,
            x,
            w_gate_up,
            x if x_scale is None else x_scale,
            x if w_gate_up_scale is None else w_gate_up_scale,
            topk_ids,
            I,
            H,
            tiles,
            x.stride(0),
            w_gate_up.stride(0),
            w_gate_up.stride(1),
            0 if w_gate_up_scale is None or w_gate_up_scale.numel() == 1 else 1,
            expert_offset,
            E,
            TOP_K=top_k,
            XS=x_scales,
            WS=w_scales,
            EARLY=early,
            BN=config.channels,
            BLOCKS=config.blocks,
            num_warps=config.num_warps,
            STAGES=config.num_stages,
        )
        chained = {"launch_pdl": True} if early else {}
    config = configure.on(x.device, "down", H, I)
    _down_kernel[(T, triton.cdiv(H, config.channels))](
        out,
        product,
        w_down,
        x if w_down_scale is None else w_down_scale,
        topk_ids,
        topk_weights,
        out if shared_output is None else shared_output,
        H,
        I,
        out.stride(0),
        w_down.stride(0),
        w_down.stride(1),
        0 if w_down_scale is None or w_down_scale.numel() == 1 else 1,
        topk_weights.stride(0),
        0 if shared_output is None else shared_output.stride(0),
        expert_offset,
        E,
        TOP_K=top_k,
        WS=w_scales,
        HAS_SHARED=shared_output is not None,
        LARGEST=FP8_MAX,
        EARLY=bool(chained),
        BN=config.channels,
        BLOCKS=config.blocks,
        num_warps=config.num_warps,
        STAGES=config.num_stages,
        **chained,
    )
