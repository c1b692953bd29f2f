"""Launches of `sample`, implementation "triton_lean": the ids of "triton" with fewer instructions. It awaits measurement.

scan      one pass: the largest logit of every tile of 128 ids; in rows without top-k also the tile's weights
row       one program a row: greedy rows, rows without filters, rows at top-k; the first eight turns of the others, decided
          where the masses of whole tiles suffice, as they do for peaked distributions
and where top-p or min-p may apply
check     one pass over rows still open: float32 sums of what stands before each of four turns
decide    one program a row: the first turn whose id is kept; where the sums' error leaves that open, exact and alone
"""

from typing import Any

import torch
import triton
from torch import Tensor

from penstock.core.device import has_dependent_launch, num_sms
from penstock.ops.sampling import sample_lean_row_triton as state
from penstock.ops.sampling.sample_lean_check_triton import check_kernel, decide_kernel
from penstock.ops.sampling.sample_lean_row_triton import row_kernel
from penstock.ops.sampling.sample_lean_scan_triton import scan_kernel
from penstock.ops.sampling.sample_triton import BLOCK, CAPACITY, PROGRAMS_PER_SM, TILE, Work

PART = 32


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
) -> None:
    """Launches what the options given as numbers leave to do; rows decide the rest on the device."""
    B, V = logits.shape
    if B == 0:
        return
    device = logits.device
    padded_tiles = triton.next_power_of_2(triton.cdiv(V, TILE))
    tiles = max(1, BLOCK // TILE)
    all_blocks = triton.cdiv(padded_tiles, tiles)
    splits = min(all_blocks, max(1, triton.cdiv(PROGRAMS_PER_SM * num_sms(device), B)))
    blocks = triton.cdiv(all_blocks, splits)
    grid = (B, triton.cdiv(all_blocks, blocks))
    row = (V, logits.stride(0))
    early = has_dependent_launch(device)
    shape: dict[str, Any] = {"PADDED_TILES": padded_tiles, "TILE": TILE, "EARLY": early}
    tiled: dict[str, Any] = {"TILES": tiles, "PART": min(PART, TILE), "num_warps": 4, "enable_fp_fusion": False}
    alone: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False, "launch_pdl": early}

    options = (temperature, top_k, top_p, min_p, temperature_value, top_k_value, top_p_value, min_p_value)
    draws, by_count, whole, by_mass, pends = Work.of(V, *options)

    def scratch(columns: int, dtype: torch.dtype, wanted: bool) -> Tensor | None:
        return torch.empty(B, columns, dtype=dtype, device=device) if wanted else None

    maxima = torch.empty(B, padded_tiles, dtype=torch.float32, device=device)
    sums = scratch(padded_tiles, torch.int64, whole)
    pending = (
        scratch(state.FLOATS.value, torch.float32, pends),
        scratch(state.INTS.value, torch.int32, pends),
        scratch(state.MASSES.value, torch.int64, pends),
    )
    candidates = scratch(CAPACITY, torch.float32, by_count)
    candidate_ids = scratch(CAPACITY, torch.int32, by_count)
    tile_list = scratch(padded_tiles, torch.int32, by_count)
    heats = (temperature, top_k, float(temperature_value), int(top_k_value))
    scan_kernel[grid](maxima, sums, logits, *heats, *row, blocks, MAY_BE_WHOLE=whole, **shape, **tiled)
    row_kernel[(B,)](
        out,
        *pending,
        maxima,
        sums,
        candidates,
        candidate_ids,
        tile_list,
        logits,
        seeds,
        offsets,
        temperature,
        top_k,
        top_p,
        min_p,
        float(temperature_value),
        int(top_k_value),
        float(top_p_value),
        float(min_p_value),
        *row,
        CAPACITY,
        MAY_DRAW=draws,
        MAY_CUT_BY_COUNT=by_count,
        MAY_BE_WHOLE=whole,
        MAY_PEND=pends,
        **shape,
        **alone,
    )
    if by_mass:
        check_kernel[grid](*pending, maxima, logits, *row, blocks, **shape, **tiled, launch_pdl=early)
    if pends:
        keys = (seeds, offsets, min_p, float(min_p_value))
        terms = blocks * (TILE // min(PART, TILE))
        decide_kernel[(B,)](out, *pending, maxima, sums, logits, *keys, *row, terms, **shape, **alone)
