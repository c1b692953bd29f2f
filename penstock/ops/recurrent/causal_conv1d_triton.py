"""A program owns a tile of tokens × channels of one request and reads it once for each tap; all but the first come from L1.

The program of a request's first tile also writes its state: it alone reads the old one.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.recurrent._segments_triton import locate, silu

# Programs that clear the rows after the last request.
CLEARING = 4


@dataclass(frozen=True)
class Launch:
    """Tokens and channels of a tile."""

    tokens: int = 32
    channels: int = 128
    num_warps: int = 4


def configure(total: int, requests: int) -> Launch:
    """Short tiles where requests are short: a tile never spans two."""
    return Launch() if total >= 24 * requests else Launch(tokens=8)


@triton.jit(do_not_specialize=["total", "num_requests", "num_places"])
def _conv_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    cu_ptr,
    state_ptr,
    index_ptr,
    total,
    channels,
    num_requests,
    num_places,
    out_row,
    x_row,
    weight_row,
    weight_tap,
    state_slot,
    state_channel,
    state_step,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLEAR: tl.constexpr,
):
    columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    place = tl.program_id(1)
    steps = tl.arange(0, TOKENS)
    zeros = tl.zeros((TOKENS, CHANNELS), tl.float32)
    if place >= num_places:
        owned = tl.load(cu_ptr + num_requests)
        for base in range(owned + (place - num_places) * TOKENS, total, CLEAR * TOKENS):
            rows = base + steps
            at = rows.to(tl.int64)[:, None] * out_row + columns[None, :]
            tl.store(out_ptr + at, zeros.to(out_ptr.dtype.element_ty), (rows < total)[:, None] & inside[None, :])
        return
    request, segment, first, end, stop = locate(cu_ptr, num_requests, place, TOKENS)
    if segment > 0 and first >= stop:
        return
    slot = request
    if HAS_INDEX:
        slot = tl.load(index_ptr + request)
    begin = tl.load(cu_ptr + request)
    rows = first + steps
    mask = (rows < end)[:, None] & inside[None, :]
    out_at = out_ptr + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    if slot < 0:
        tl.store(out_at, zeros.to(out_ptr.dtype.element_ty), mask)
        return
    state_rows = state_ptr + slot.to(tl.int64) * state_slot + columns * state_channel
    value = zeros
    if HAS_BIAS:
        value += tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(TAPS):
        tap = tl.load(weight_ptr + columns * weight_row + k * weight_tap, inside, other=0.0).to(tl.float32)
        source = rows - (TAPS - 1) + k
        x = tl.load(
            x_ptr + source.to(tl.int64)[:, None] * x_row + columns[None, :], mask & (source >= begin)[:, None], other=0.0
        ).to(tl.float32)
        if HAS_STATE and k < TAPS - 1:
            if segment == 0:
                step = source - begin + (TAPS - 1)
                early = mask & (source < begin)[:, None]
                x += tl.load(state_rows[None, :] + step[:, None] * state_step, early, other=0.0).to(tl.float32)
        value += tap[None, :] * x
    if SILU:
        value = silu(value)
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask)
    if HAS_STATE and TAPS > 1:
        if segment == 0:
            keep = tl.arange(0, TAPS_PADDED)
            origin = stop - (TAPS - 1) + keep
            live = (keep < TAPS - 1)[:, None] & inside[None, :]
            kept = tl.load(
                x_ptr + origin.to(tl.int64)[:, None] * x_row + columns[None, :], live & (origin >= begin)[:, None], other=0.0
            ).to(tl.float32)
            # A request shorter than the taps keeps some of its old state.
            older = origin - begin + (TAPS - 1)
            kept += tl.load(state_rows[None, :] + older[:, None] * state_step, live & (origin < begin)[:, None], other=0.0).to(
                tl.float32
            )
            # Other threads of this program still read what this one overwrites.
            tl.debug_barrier()
            tl.store(state_rows[None, :] + keep[:, None] * state_step, kept.to(state_ptr.dtype.element_ty), live)


def launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    state: Tensor | None,
    state_indices: Tensor | None,
    activation: str | None,
) -> None:
    """Launches over the places of the requests' tiles, and a few programs that clear what belongs to none."""
    total, channels = x.shape
    requests, taps = len(cu_seqlens) - 1, weight.shape[1]
    if channels == 0 or (total == 0 and (state is None or requests == 0)):
        return
    config = configure(total, requests)
    places = total // config.tokens + requests if requests else 0
    _conv_kernel[(triton.cdiv(channels, config.channels), places + CLEARING)](
        out,
        x,
        weight,
        x if bias is None else bias,
        cu_seqlens,
        x if state is None else state,
        cu_seqlens if state_indices is None else state_indices,
        total,
        channels,
        requests,
        places,
        out.stride(0),
        x.stride(0),
        *weight.stride(),
        *((0, 0, 0) if state is None else state.stride()),
        HAS_BIAS=bias is not None,
        HAS_STATE=state is not None,
        HAS_INDEX=state_indices is not None,
        SILU=activation == "silu",
        TAPS=taps,
        TAPS_PADDED=triton.next_power_of_2(max(taps - 1, 1)),
        TOKENS=config.tokens,
        CHANNELS=config.channels,
        CLEAR=CLEARING,
        num_warps=config.num_warps,
    )
