"""Launches of `sample`.

scan      one pass: the largest logit of every tile of 128 ids; in rows without top-k also the tile's weights
row       one program a row: draws for greedy rows, rows without filters and rows at top-k, whose candidates are few; draws the
          first four turns of the others
and where top-p or min-p may apply
check     one pass over the tiles that hold something as large as the drawn ids: the masses before each of them
decide    one program a row: the first turn whose id is kept; a row that has none goes on alone, many times slower

`verify_draft` needs the exact cut of top-p and the mass kept too: bounds, narrow, gather, cut and total, in filter_*_triton.
Bounds steer only the speed. Where they miss the cut, hold more than CAPACITY ids, or top-k exceeds the number of tiles, the
row's one program searches the whole row: exact, but many times slower.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from penstock.core.device import has_dependent_launch, num_sms
from penstock.ops.sampling import _weights
from penstock.ops.sampling import sample_scan_triton as scan
from penstock.ops.sampling.filter_cut_triton import bounds_kernel, cut_kernel, total_kernel
from penstock.ops.sampling.filter_pass_triton import gather_kernel, narrow_kernel
from penstock.ops.sampling.sample_row_triton import row_kernel
from penstock.ops.sampling.sample_turns_triton import TURNS, check_kernel, decide_kernel

TILE = _weights.TILE
BLOCK = 2048
FINE_BLOCK = 1024
PROGRAMS_PER_SM = 8
CHUNK = 1024
CAPACITY = 8192


class Work(NamedTuple):
    """What the options given as numbers leave to do, of what the rows of a tensor of options may ask for.

    Args:
        draws: some row may not be greedy; by_count: cut by top-k; whole: without top-k.
        by_mass: some whole row may be cut by top-p; pends: by top-p or min-p.
    """

    draws: bool
    by_count: bool
    whole: bool
    by_mass: bool
    pends: bool

    @classmethod
    def of(
        cls,
        V: int,
        temperature: Tensor | None,
        top_k: Tensor | None,
        top_p: Tensor | None,
        min_p: Tensor | None,
        temperature_value: float,
        top_k_value: int,
        top_p_value: float,
        min_p_value: float,
    ) -> "Work":
        """From the options of a launch."""
        draws = temperature is not None or temperature_value > 0
        whole = draws and (top_k is not None or not 0 < top_k_value < V)
        by_mass = whole and (top_p is not None or top_p_value < 1)
        return cls(
            draws,
            draws and (top_k is not None or 0 < top_k_value < V),
            whole,
            by_mass,
            by_mass or (whole and (min_p is not None or min_p_value > 0)),
        )


class State(NamedTuple):
    """What a launch leaves of each row: floats, ints and masses, whose slots are in sample_scan_triton."""

    floats: Tensor
    ints: Tensor
    masses: Tensor


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
    filters: bool = False,
) -> State | None:
    """Launches what the options given as numbers leave to do; rows decide the rest on the device.

    Args:
        filters: the state holds the cut and the mass kept of every row.
    Returns: None where all rows are greedy.
    """
    B, V = logits.shape
    if B == 0:
        return None
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
    late: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False, "launch_pdl": early}

    options = (temperature, top_k, top_p, min_p, temperature_value, top_k_value, top_p_value, min_p_value)
    draws, by_count, whole, by_mass, pends = Work.of(V, *options)

    def scratch(columns: int, dtype: torch.dtype, wanted: bool = True) -> Tensor | None:
        return torch.empty(B, columns, dtype=dtype, device=device) if wanted else None

    maxima = scratch(padded_tiles, torch.float32)
    sums = scratch(padded_tiles, torch.int64, whole)
    floats = torch.empty(B, scan.FLOATS.value, dtype=torch.float32, device=device)
    ints = torch.empty(B, scan.INTS.value, dtype=torch.int32, device=device)
    masses = torch.empty(B, scan.MASSES.value, dtype=torch.int64, device=device)
    before = scratch(TURNS.value, torch.int64, pends)
    drawn_ids = scratch(TURNS.value, torch.int32, pends)
    drawn_x = scratch(TURNS.value, torch.float32, pends)
    candidates = scratch(CAPACITY, torch.float32, by_count or filters)
    candidate_ids = scratch(CAPACITY, torch.int32, by_count or filters)
    tile_list = scratch(padded_tiles, torch.int32, by_count)
    scan.scan_kernel[grid](
        maxima,
        sums,
        logits,
        temperature,
        top_k,
        float(temperature_value),
        int(top_k_value),
        *row,
        blocks,
        MAY_BE_WHOLE=whole,
        TILES=tiles,
        **shape,
        num_warps=4,
        enable_fp_fusion=False,
    )
    row_kernel[(B,)](
        out,
        floats,
        ints,
        masses,
        before,
        drawn_ids,
        drawn_x,
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
        **late | {"num_warps": 8 if by_count else 4},
    )
    if not draws:
        return None
    finer = tiles // max(1, min(tiles, FINE_BLOCK // TILE))
    fine: dict[str, Any] = {**shape, "TILES": tiles // finer, **late}
    if pends:
        if by_mass:
            check_kernel[grid](before, drawn_ids, drawn_x, floats, ints, maxima, logits, *row, blocks * finer, **fine)
        decide_kernel[(B,)](
            out,
            before,
            drawn_ids,
            floats,
            ints,
            masses,
            maxima,
            sums,
            logits,
            seeds,
            offsets,
            min_p,
            float(min_p_value),
            *row,
            **shape,
            **late,
        )
    if filters and whole:
        lists = (candidates, candidate_ids, floats, ints, masses)
        tile_masses = scratch(padded_tiles, torch.int64)
        counts = scratch(scan.BINS.value, torch.int32)
        floor = (min_p, float(min_p_value))
        bounds_kernel[(B,)](floats, ints, counts, maxima, logits, top_p, float(top_p_value), *row, CAPACITY, **shape, **late)
        if by_mass and V > CAPACITY:
            narrow_kernel[grid](counts, *lists[2:], logits, *row, blocks, BLOCK=tiles * TILE, EARLY=early, **late)
        gather_kernel[grid](tile_masses, *lists, counts, maxima, logits, *floor, *row, blocks * finer, CAPACITY, **fine)
        if by_mass:
            cut = (tile_masses, *lists[2:], *lists[:2], logits, *floor, *row, CAPACITY)
            cut_kernel[(B,)](*cut, CHUNK=CHUNK, **shape, **late)
        total_kernel[(B,)](tile_masses, ints, masses, PADDED_TILES=padded_tiles, EARLY=early, **late)
    return State(floats, ints, masses)
