"""Launches of `verify_draft`.

sample    every position draws from its target, and leaves the filter's cut and the masses kept
accept    one program a request: how many draft ids are accepted, and the ids where no rest has to be drawn
rest      many programs a request: the masses of max(0, p - q) at the rejected position
draw      one program a request: the id drawn from them
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.device import num_sms
from penstock.ops.sampling import _weights, filter_triton, sample_triton
from penstock.ops.sampling._philox import VERIFY_STREAM
from penstock.ops.sampling._state_triton import CERTAIN, CUT, CUT_ID, FLOATS, INTS, KEPT, MASSES, MODE, SCALE, TOP
from penstock.ops.sampling._weights_triton import clean, option, random_words, share, smallest_weight, weigh

STREAM = tl.constexpr(VERIFY_STREAM)
TILE = _weights.TILE
BLOCK = 1024


@triton.jit
def _kept_weights(x, columns, row, floats_ptr, ints_ptr, smallest):
    """Weights of clean logits after the row's filters."""
    cut = tl.load(floats_ptr + row * FLOATS + CUT)
    kept = (x > cut) | ((x == cut) & (columns <= tl.load(ints_ptr + row * INTS + CUT_ID)))
    weights = weigh(x, tl.load(floats_ptr + row * FLOATS + TOP), tl.load(floats_ptr + row * FLOATS + SCALE))
    return tl.where(kept & (weights >= smallest), weights, 0)


@triton.jit
def _accept_kernel(
    accepted_ptr,
    ids_ptr,
    rejected_ptr,
    plain_ptr,
    draft_ids_ptr,
    probs_ptr,
    floats_ptr,
    ints_ptr,
    masses_ptr,
    logits_ptr,
    seeds_ptr,
    offsets_ptr,
    min_p_ptr,
    min_p,
    n,
    V,
    logits_stride,
    drafts_stride,
    drafts_step,
    probs_stride,
    probs_step,
    HAS_PROBS: tl.constexpr,
):
    """Walks a request's draft to the first id that is not accepted; `rejected` is the row whose rest is to be drawn, or -1."""
    b = tl.program_id(0).to(tl.int64)
    first = b * (n + 1)
    rejected = tl.full([], -1, tl.int64)
    accepted = tl.zeros([], tl.int32)
    going = n > 0
    while going:
        row = first + accepted
        plain = tl.load(plain_ptr + row)
        proposed = tl.load(draft_ids_ptr + b * drafts_stride + accepted * drafts_step)
        inside = (proposed >= 0) & (proposed < V)
        agrees = inside & (proposed == plain)
        if HAS_PROBS:
            weighed = inside & (tl.load(ints_ptr + row * INTS + MODE) != CERTAIN)
            if weighed:
                mass = tl.load(masses_ptr + row * MASSES + KEPT)
                smallest = smallest_weight(option(min_p_ptr, row, min_p, tl.float32))
                x = clean(tl.load(logits_ptr + row * logits_stride + proposed))
                weight = _kept_weights(x, proposed, row, floats_ptr, ints_ptr, smallest)
                q = tl.load(probs_ptr + b * probs_stride + accepted * probs_step + proposed).to(tl.float32)
                _, coin = random_words(tl.load(seeds_ptr + row), tl.load(offsets_ptr + row), STREAM, tl.zeros([], tl.int32))
                agrees = tl.umulhi(coin, share(q, mass).to(tl.uint64)).to(tl.int64) < weight
                rejected = tl.where(agrees, rejected, row)
        if agrees:
            tl.store(ids_ptr + row, proposed)
        accepted += agrees.to(tl.int32)
        going = agrees & (accepted < n)
    tl.store(accepted_ptr + b, accepted)
    tl.store(rejected_ptr + b, rejected)
    tl.store(ids_ptr + first + accepted, tl.load(plain_ptr + first + accepted))
    for i in range(accepted + 1, n + 1):
        tl.store(ids_ptr + first + i, -1)


@triton.jit
def _rests(
    columns, b, row, mass, i, floats_ptr, ints_ptr, logits_ptr, probs_ptr, smallest, V, logits_stride, probs_stride, probs_step
):
    """max(0, weight - share of q) at some columns of the rejected position."""
    inside = columns < V
    x = clean(tl.load(logits_ptr + row * logits_stride + columns, inside, other=float("-inf")))
    weights = tl.where(inside, _kept_weights(x, columns, row, floats_ptr, ints_ptr, smallest), 0)
    q = tl.load(probs_ptr + b * probs_stride + i * probs_step + columns, inside, other=0.0).to(tl.float32)
    return tl.maximum(weights - share(q, mass), 0)


@triton.jit(do_not_specialize=["blocks"])
def _rest_kernel(
    rests_ptr,
    accepted_ptr,
    rejected_ptr,
    probs_ptr,
    floats_ptr,
    ints_ptr,
    masses_ptr,
    logits_ptr,
    min_p_ptr,
    min_p,
    V,
    logits_stride,
    probs_stride,
    probs_step,
    blocks,
    PADDED_TILES: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The rests of every tile of the rejected position."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.load(rejected_ptr + b)
    if row >= 0:
        mass = tl.load(masses_ptr + row * MASSES + KEPT)
        smallest = smallest_weight(option(min_p_ptr, row, min_p, tl.float32))
        i = tl.load(accepted_ptr + b)
        for block in range(tl.program_id(1) * blocks, (tl.program_id(1) + 1) * blocks):
            tiles = block * TILES + tl.arange(0, TILES)
            columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
            rests = _rests(
                columns,
                b,
                row,
                mass,
                i,
                floats_ptr,
                ints_ptr,
                logits_ptr,
                probs_ptr,
                smallest,
                V,
                logits_stride,
                probs_stride,
                probs_step,
            )
            tl.store(rests_ptr + b * PADDED_TILES + tiles, tl.sum(rests, axis=1), tiles < PADDED_TILES)


@triton.jit
def _draw_rest_kernel(
    ids_ptr,
    rests_ptr,
    accepted_ptr,
    rejected_ptr,
    probs_ptr,
    floats_ptr,
    ints_ptr,
    masses_ptr,
    logits_ptr,
    seeds_ptr,
    offsets_ptr,
    min_p_ptr,
    min_p,
    V,
    logits_stride,
    probs_stride,
    probs_step,
    PADDED_TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Inverts the cumulative rests by ascending id; where nothing rests the plain draw stays."""
    b = tl.program_id(0).to(tl.int64)
    row = tl.load(rejected_ptr + b)
    if row >= 0:
        tiles = tl.arange(0, PADDED_TILES)
        rests = tl.load(rests_ptr + b * PADDED_TILES + tiles)
        total = tl.sum(rests)
        if total > 0:
            bits, _ = random_words(tl.load(seeds_ptr + row), tl.load(offsets_ptr + row), STREAM, tl.zeros([], tl.int32))
            target = tl.umulhi(bits, total.to(tl.uint64)).to(tl.int64)
            tile = tl.sum((tl.cumsum(rests) <= target).to(tl.int32))
            target -= tl.sum(tl.where(tiles < tile, rests, 0))
            mass = tl.load(masses_ptr + row * MASSES + KEPT)
            smallest = smallest_weight(option(min_p_ptr, row, min_p, tl.float32))
            columns = tile * TILE + tl.arange(0, TILE)
            inner = _rests(
                columns,
                b,
                row,
                mass,
                tl.load(accepted_ptr + b),
                floats_ptr,
                ints_ptr,
                logits_ptr,
                probs_ptr,
                smallest,
                V,
                logits_stride,
                probs_stride,
                probs_step,
            )
            tl.store(ids_ptr + row, tile * TILE + tl.sum((tl.cumsum(inner) <= target).to(tl.int32)))


def launch(
    accepted: Tensor,
    ids: Tensor,
    draft_ids: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    seeds: Tensor,
    offsets: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    temperature_value: float,
    top_k_value: int,
    top_p_value: float,
    min_p_value: float,
) -> None:
    """Launches over requests."""
    B, positions, V = target_logits.shape
    if B == 0:
        return
    device = target_logits.device
    logits = target_logits.flatten(0, 1)
    row_seeds = seeds.repeat_interleave(positions)
    row_offsets = (offsets[:, None] + torch.arange(positions, device=device)).flatten()
    heats, ks, ps, floors = (
        None if option is None else option.repeat_interleave(positions) for option in (temperature, top_k, top_p, min_p)
    )
    plain = torch.empty(B * positions, dtype=torch.int32, device=device)
    numbers = temperature_value, top_k_value, top_p_value, min_p_value
    # A drafter that is certain of its ids needs no more than the plain draws.
    draw = sample_triton if draft_probs is None else filter_triton
    state = draw.launch(plain, logits, row_seeds, row_offsets, heats, ks, ps, floors, *numbers)
    probs = draft_probs if state is not None else None
    floats, ints, masses = (None, None, None) if state is None else state[:3]
    padded_tiles = triton.next_power_of_2(triton.cdiv(V, TILE))
    rejected = torch.empty(B, dtype=torch.int64, device=device)
    strides = (0, 0) if probs is None else (probs.stride(0), probs.stride(1))
    keys = (row_seeds, row_offsets, floors, float(min_p_value))
    _accept_kernel[(B,)](
        accepted,
        ids,
        rejected,
        plain,
        draft_ids,
        probs,
        floats,
        ints,
        masses,
        logits,
        *keys,
        positions - 1,
        V,
        logits.stride(0),
        *draft_ids.stride(),
        *strides,
        HAS_PROBS=probs is not None,
        num_warps=4,
        enable_fp_fusion=False,
    )
    if probs is None or positions == 1:
        return
    rests = torch.empty(B, padded_tiles, dtype=torch.int64, device=device)
    shape = {"PADDED_TILES": padded_tiles, "TILE": TILE}
    tiles = BLOCK // TILE
    all_blocks = triton.cdiv(padded_tiles, tiles)
    blocks = triton.cdiv(all_blocks, min(all_blocks, max(1, triton.cdiv(8 * num_sms(device), B))))
    common = (accepted, rejected, probs, floats, ints, masses, logits)
    _rest_kernel[(B, triton.cdiv(all_blocks, blocks))](
        rests,
        *common,
        *keys[2:],
        V,
        logits.stride(0),
        *strides,
        blocks,
        TILES=tiles,
        **shape,
        num_warps=4,
        enable_fp_fusion=False,
    )
    _draw_rest_kernel[(B,)](
        ids, rests, *common, *keys, V, logits.stride(0), *strides, **shape, num_warps=4, enable_fp_fusion=False
    )
