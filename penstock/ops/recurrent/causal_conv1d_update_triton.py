"""A program owns a run of channels of one request: it reads its state once and writes it once, one step further."""

import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.recurrent._segments_triton import silu

CHANNELS = 256


@triton.jit
def _update_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    index_ptr,
    channels,
    out_row,
    x_row,
    weight_row,
    weight_tap,
    state_slot,
    state_channel,
    state_step,
    HAS_BIAS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    slot = row
    if HAS_INDEX:
        slot = tl.load(index_ptr + row)
    out_at = out_ptr + row.to(tl.int64) * out_row + columns
    if slot < 0:
        tl.store(out_at, tl.zeros((CHANNELS,), tl.float32).to(out_ptr.dtype.element_ty), inside)
        return
    # A thread has whole channels: what it reads no other writes. Tap k meets step k of the state, the last tap x.
    x = tl.load(x_ptr + row.to(tl.int64) * x_row + columns, inside, other=0.0)
    state_at = state_ptr + slot.to(tl.int64) * state_slot + columns * state_channel
    taps_at = weight_ptr + columns * weight_row
    value = x.to(tl.float32) * tl.load(taps_at + (TAPS - 1) * weight_tap, inside, other=0.0).to(tl.float32)
    for step in tl.static_range(TAPS - 1):
        held = tl.load(state_at + step * state_step, inside, other=0.0)
        value += held.to(tl.float32) * tl.load(taps_at + step * weight_tap, inside, other=0.0).to(tl.float32)
        if step > 0:
            tl.store(state_at + (step - 1) * state_step, held, inside)
    if TAPS > 1:
        tl.store(state_at + (TAPS - 2) * state_step, x.to(state_ptr.dtype.element_ty), inside)
    if HAS_BIAS:
        value += tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)
    if SILU:
        value = silu(value)
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), inside)


def launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    activation: str | None,
) -> None:
    """Launches over requests and runs of channels."""
    rows, channels = x.shape
    if x.numel() == 0:
        return
    _update_kernel[(rows, triton.cdiv(channels, CHANNELS))](
        out,
        x,
        weight,
        x if bias is None else bias,
        state,
        x if state_indices is None else state_indices,
        channels,
        out.stride(0),
        x.stride(0),
        *weight.stride(),
        *state.stride(),
        HAS_BIAS=bias is not None,
        HAS_INDEX=state_indices is not None,
        SILU=activation == "silu",
        TAPS=weight.shape[1],
        CHANNELS=CHANNELS,
        num_warps=4,
    )
