"""Launches of `sample` with the exact cut and mass of every row's filters, which `verify_draft` weighs drafts with.

`sample` itself never needs the cut of top-p. Here, after its launches, for rows without top-k:
bounds    one program a row: logits between which the cut of top-p almost surely lies
narrow    one pass over rows whose bounds hold many ids: how many fall in each part
gather    one pass: the ids between the bounds, and the masses of tiles above them
cut       one program a row: the cut among these candidates, or, where it is not among them, in the row
total     one program a row: the mass kept
"""

from typing import Any

import torch
import triton
from torch import Tensor

from penstock.core.device import has_dependent_launch
from penstock.ops.sampling import sample_triton
from penstock.ops.sampling._state_triton import BINS
from penstock.ops.sampling.filter_cut_triton import bounds_kernel, cut_kernel, total_kernel
from penstock.ops.sampling.filter_pass_triton import gather_kernel, narrow_kernel
from penstock.ops.sampling.sample_triton import Grid, State, Work

FINE_BLOCK = 1024
CHUNK = 1024


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
    """As sample_triton.launch; the state holds the cut and the mass kept of every row, and is None where all are greedy."""
    options = (temperature, top_k, top_p, min_p, temperature_value, top_k_value, top_p_value, min_p_value)
    state = sample_triton.launch(out, logits, seeds, offsets, *options, filters=True)
    B, V = logits.shape
    work = Work.of(V, *options)
    if state is None or not work.whole:
        return state
    device = logits.device
    floats, ints, masses, maxima = state
    padded_tiles, tiles, blocks, splits = Grid.of(B, V, device)
    grid = (B, splits)
    finer = triton.cdiv(tiles * sample_triton.TILE, FINE_BLOCK)
    early = has_dependent_launch(device)
    late: dict[str, Any] = {"EARLY": early, "num_warps": 4, "enable_fp_fusion": False, "launch_pdl": early}
    shape: dict[str, Any] = {"PADDED_TILES": padded_tiles, "TILE": sample_triton.TILE, **late}
    capacity = sample_triton.CAPACITY
    row = (V, logits.stride(0))
    floor = (min_p, float(min_p_value))
    tile_masses = torch.empty(B, padded_tiles, dtype=torch.int64, device=device)
    counts = torch.empty(B, BINS.value, dtype=torch.int32, device=device)
    lists = (
        torch.empty(B, capacity, dtype=torch.float32, device=device),
        torch.empty(B, capacity, dtype=torch.int32, device=device),
    )
    bounds_kernel[(B,)](floats, ints, counts, maxima, logits, top_p, float(top_p_value), *row, capacity, **shape)
    if work.by_mass and capacity < V:
        narrow_kernel[grid](counts, floats, ints, masses, logits, *row, blocks, BLOCK=tiles * sample_triton.TILE, **late)
    gather_kernel[grid](
        tile_masses,
        *lists,
        floats,
        ints,
        masses,
        counts,
        maxima,
        logits,
        *floor,
        *row,
        blocks * finer,
        capacity,
        TILES=tiles // finer,
        **shape,
    )
    if work.by_mass:
        cut_kernel[(B,)](tile_masses, floats, ints, masses, *lists, logits, *floor, *row, capacity, CHUNK=CHUNK, **shape)
    total_kernel[(B,)](tile_masses, ints, masses, PADDED_TILES=padded_tiles, **late)
    return state
