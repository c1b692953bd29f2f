"""Launches of `sample`.

maxima    one pass: the largest logit of every tile of 128 ids
bracket   one program a row: greedy ids; between which logits the cut of top-k or top-p lies
narrow    one pass, for rows at top-p whose bounds hold many ids: tighter bounds
gather    one pass: masses of the tiles above, candidates in between (top-k reads only the tiles that hold some)
cut       one program a row: the exact cut among the candidates
draw      one program a row: the id

Bounds steer only the speed. Where they miss the cut, hold more than CAPACITY ids, or top-k exceeds the number of tiles, the
row's one program searches the whole row: exact, but many times slower.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from penstock.core.device import num_sms
from penstock.ops.sampling import sample_scan_triton as scan
from penstock.ops.sampling.sample_row_triton import bracket_kernel, cut_kernel, draw_kernel

TILE = 128
MAX_TILES = 2048
BLOCK = 1024
PROGRAMS_PER_SM = 8
CHUNK = 1024
CAPACITY = 8192


class State(NamedTuple):
    """What the passes leave of each row: floats and ints (slots in sample_scan_triton), the mass kept in each tile."""

    floats: Tensor
    ints: Tensor
    masses: Tensor
    tile: int


def launch(
    out: Tensor,
    logits: Tensor,
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
) -> State | None:
    """Launches what the options given as numbers leave to do; rows decide the rest on the device. None where all are greedy."""
    B, V = logits.shape
    if B == 0:
        return None
    device = logits.device
    tile = max(TILE, triton.next_power_of_2(triton.cdiv(V, MAX_TILES)))
    padded_tiles = triton.next_power_of_2(triton.cdiv(V, tile))
    tiles = max(1, BLOCK // tile)
    shape = {"PADDED_TILES": padded_tiles, "TILE": tile}
    all_blocks = triton.cdiv(padded_tiles, tiles)
    splits = min(all_blocks, max(1, triton.cdiv(PROGRAMS_PER_SM * num_sms(device), B)))
    blocks = triton.cdiv(all_blocks, splits)
    grid = (B, triton.cdiv(all_blocks, blocks))
    row = (V, logits.stride(0))
    maxima = torch.empty(B, padded_tiles, dtype=torch.float32, device=device)
    floats = torch.empty(B, scan.FLOATS.value, dtype=torch.float32, device=device)
    ints = torch.empty(B, scan.INTS.value, dtype=torch.int32, device=device)
    sums = torch.empty(B, scan.MASSES.value, dtype=torch.int64, device=device)
    scan.maxima_kernel[grid](maxima, logits, *row, blocks, TILES=tiles, **shape, num_warps=4)
    cuts_by_mass = top_p is not None or top_p_value < 1
    counts = torch.empty(B, scan.BINS.value, dtype=torch.int32, device=device) if cuts_by_mass else ints
    bracket_kernel[(B,)](
        out,
        floats,
        ints,
        sums,
        counts,
        maxima,
        logits,
        temperature,
        top_k,
        top_p,
        float(temperature_value),
        int(top_k_value),
        float(top_p_value),
        *row,
        CAPACITY,
        MAY_CUT_BY_MASS=cuts_by_mass,
        **shape,
        num_warps=4,
        enable_fp_fusion=False,
    )
    if temperature is None and temperature_value == 0:
        return None
    masses = torch.empty(B, padded_tiles, dtype=torch.int64, device=device)
    cuts = cuts_by_mass or top_k is not None or 0 < top_k_value < V
    held = CAPACITY if cuts else 1
    candidates = torch.empty(B, held, dtype=torch.float32, device=device)
    candidate_ids = torch.empty(B, held, dtype=torch.int32, device=device)
    by_count_alone = top_k is None and 0 < top_k_value < V
    if cuts_by_mass and not by_count_alone and V > CAPACITY:
        scan.narrow_kernel[grid](
            counts,
            floats,
            ints,
            sums,
            logits,
            *row,
            blocks,
            BLOCK=tiles * tile,
            num_warps=4,
            enable_fp_fusion=False,
        )
    scan.gather_kernel[grid](
        masses,
        candidates,
        candidate_ids,
        floats,
        ints,
        sums,
        counts,
        maxima,
        logits,
        top_p,
        min_p,
        float(top_p_value),
        float(min_p_value),
        *row,
        blocks,
        held,
        TILES=tiles,
        **shape,
        num_warps=4,
        enable_fp_fusion=False,
    )
    if cuts:
        cut_kernel[(B,)](
            masses,
            floats,
            ints,
            sums,
            candidates,
            candidate_ids,
            logits,
            top_k,
            top_p,
            min_p,
            int(top_k_value),
            float(top_p_value),
            float(min_p_value),
            *row,
            held,
            CHUNK=CHUNK,
            **shape,
            num_warps=4,
            enable_fp_fusion=False,
        )
    draw_kernel[(B,)](
        out,
        masses,
        floats,
        ints,
        logits,
        seeds,
        offsets,
        min_p,
        float(min_p_value),
        *row,
        **shape,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return State(floats, ints, masses, tile)
