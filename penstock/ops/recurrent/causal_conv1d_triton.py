"""A program owns a tile of tokens × channels of one request and reads it once for each tap; all but the first come from L1.

The program of a request's first tile also writes its state: it alone reads the old one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from penstock.core.tuning import tuned
from penstock.ops.recurrent._segments_triton import locate, silu

# Programs that clear the rows after the last request.
CLEARING = 4


@dataclass(frozen=True)
class Launch:
    """Tokens and channels of a tile."""

    tokens: int
    channels: int
    num_warps: int


def candidates(short: bool) -> Iterator[Launch]:
    """Wide tiles read whole rows, long tiles read fewer tokens twice."""
    shapes = [(32, 128, 4), (16, 256, 4), (64, 64, 4), (64, 128, 8), (16, 128, 2), (16, 512, 4)]
    for tokens, channels, num_warps in [(8, 128, 4), (4, 256, 4)] if short else shapes:
        yield Launch(tokens, channels, num_warps)


@tuned(candidates)
def configure(short: bool) -> Launch:
    """The default; `short`: requests of fewer than 24 tokens on the average, and a tile never spans two."""
    return Launch(8, 128, 4) if short else Launch(32, 128, 4)


@triton.jit
def _tap(x_base, weight_ptr, row, k, columns, inside, live, x_row, weight_row, weight_tap):
    """weight[:, k] · x of rows given relative to x_base, zeros where not `live`."""
    tap = tl.load(weight_ptr + columns * weight_row + k * weight_tap, inside, other=0.0).to(tl.float32)
    x = tl.load(x_base + row[:, None] * x_row + columns[None, :], live[:, None] & inside[None, :], other=0.0)
    return tap[None, :], x.to(tl.float32)


@triton.jit
def _first_rows_and_state(
    out_base,
    x_base,
    weight_ptr,
    state_base,
    shift,
    length,
    columns,
    inside,
    out_row,
    x_row,
    weight_row,
    weight_tap,
    state_channel,
    state_step,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The rows of a request that see its old state, and the new state."""
    edge = tl.arange(0, EDGE)
    state_at = state_base + columns[None, :] * state_channel
    early = tl.zeros((EDGE, columns.shape[0]), tl.float32) + shift[None, :]
    for k in tl.static_range(TAPS):
        from_x = edge - (TAPS - 1) + k
        live = (from_x >= 0) & (edge < length)
        tap, x = _tap(x_base, weight_ptr, from_x, k, columns, inside, live, x_row, weight_row, weight_tap)
        older = ((edge + k < TAPS - 1) & (edge < length))[:, None] & inside[None, :]
        x += tl.load(state_at + (edge + k)[:, None] * state_step, older, other=0.0).to(tl.float32)
        early += tap * x
    if SILU:
        early = silu(early)
    written = ((edge < TAPS - 1) & (edge < length))[:, None] & inside[None, :]
    tl.store(out_base + edge[:, None] * out_row + columns[None, :], early.to(out_base.dtype.element_ty), written)
    # The new state: the last inputs, and from a request shorter than the taps some of the old state.
    source = length - (TAPS - 1) + edge
    kept = (edge < TAPS - 1)[:, None] & inside[None, :]
    new_at = x_base + source.to(tl.int64)[:, None] * x_row + columns[None, :]
    new = tl.load(new_at, kept & (source >= 0)[:, None], other=0.0).to(tl.float32)
    old_at = state_at + (source + TAPS - 1)[:, None] * state_step
    new += tl.load(old_at, kept & (source < 0)[:, None], other=0.0).to(tl.float32)
    # Other threads of this program still read what this one overwrites.
    tl.debug_barrier()
    tl.store(state_at + edge[:, None] * state_step, new.to(state_base.dtype.element_ty), kept)


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
    EDGE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLEAR: tl.constexpr,
):
    columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = columns < channels
    place = tl.program_id(1)
    order = tl.arange(0, TOKENS)
    dtype = out_ptr.dtype.element_ty
    nothing = tl.zeros((TOKENS, CHANNELS), tl.float32)
    out_at = order[:, None] * out_row + columns[None, :]
    if place >= num_places:
        owned = tl.load(cu_ptr + num_requests)
        for base in range(owned + (place - num_places) * TOKENS, total, CLEAR * TOKENS):
            mask = (order < total - base)[:, None] & inside[None, :]
            tl.store(out_ptr + (base + tl.zeros((), tl.int64)) * out_row + out_at, nothing.to(dtype), mask)
        return
    request, segment, first, end, stop = locate(cu_ptr, num_requests, place, TOKENS)
    if segment > 0 and first >= stop:
        return
    slot = request
    if HAS_INDEX:
        slot = tl.load(index_ptr + request)
    begin = tl.load(cu_ptr + request)
    out_base = out_ptr + first.to(tl.int64) * out_row
    mask = (order < end - first)[:, None] & inside[None, :]
    if slot < 0:
        tl.store(out_base + out_at, nothing.to(dtype), mask)
        return
    x_base = x_ptr + first.to(tl.int64) * x_row
    shift = tl.zeros((CHANNELS,), tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias_ptr + columns, inside, other=0.0).to(tl.float32)
    value = nothing + shift[None, :]
    for k in tl.static_range(TAPS):
        row = order - (TAPS - 1) + k
        live = (row >= begin - first) & (order < end - first)
        tap, x = _tap(x_base, weight_ptr, row, k, columns, inside, live, x_row, weight_row, weight_tap)
        value += tap * x
    if SILU:
        value = silu(value)
    if HAS_STATE and TAPS > 1:
        # The first rows of a request also see its state; they are computed below.
        mask = mask & (first + order >= begin + TAPS - 1)[:, None]
    tl.store(out_base + out_at, value.to(dtype), mask)
    if HAS_STATE and TAPS > 1:  # noqa: SIM102
        if segment == 0:
            _first_rows_and_state(
                out_base,
                x_base,
                weight_ptr,
                state_ptr + slot.to(tl.int64) * state_slot,
                shift,
                stop - begin,
                columns,
                inside,
                out_row,
                x_row,
                weight_row,
                weight_tap,
                state_channel,
                state_step,
                SILU,
                TAPS,
                EDGE,
            )


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
    config = configure.on(x.device, total < 24 * requests)
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
        EDGE=triton.next_power_of_2(max(taps - 1, 1)),
        TOKENS=config.tokens,
        CHANNELS=config.channels,
        CLEAR=CLEARING,
        num_warps=config.num_warps,
    )
