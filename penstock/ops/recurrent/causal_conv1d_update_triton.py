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
    TAPS_PADDED: tl.constexpr,
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
    # Step k of the window is what tap k meets: the state, then x.
    step = tl.arange(0, TAPS_PADDED)
    held = inside[:, None] & (step < TAPS - 1)[None, :]
    state_at = state_ptr + slot.to(tl.int64) * state_slot + columns[:, None] * state_channel + step[None, :] * state_step
    x = tl.load(x_ptr + row.to(tl.int64) * x_row + columns, inside, other=0.0).to(tl.float32)
    window = tl.load(state_at, held, other=0.0).to(tl.float32)
    window = tl.where((step == TAPS - 1)[None, :], x[:, None], window)
    taps = tl.load(
        weight_ptr + columns[:, None] * weight_row + step[None, :] * weight_tap,
        inside[:, None] & (step < TAPS)[None, :],
        other=0.0,
    ).to(tl.float32)
    value = tl.sum(window * taps, axis=1)
    if HAS_BIAS:
        value += tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)
    if SILU:
        value = silu(value)
    # Every thread has read what it and its neighbours overwrite.
    tl.debug_barrier()
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), inside)
    tl.store(
        state_at - state_step, window.to(state_ptr.dtype.element_ty), inside[:, None] & ((step > 0) & (step < TAPS))[None, :]
    )


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
    taps = weight.shape[1]
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
        TAPS=taps,
        TAPS_PADDED=triton.next_power_of_2(taps),
        CHANNELS=CHANNELS,
        num_warps=4,
    )
