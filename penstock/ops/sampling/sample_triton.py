"""Launches of `sample`.

scan      one pass: the largest logit of every tile of 128 ids; in rows without top-k also the tile's weights
row       one program a row: greedy rows, rows without filters, rows at top-k; the first eight turns of the others, decided
          where the masses of whole tiles suffice, as they do for peaked distributions
and where top-p or min-p may apply
check     one pass over rows still open: float32 sums of what stands before each of four turns
decide    one program a row: the first turn whose id is kept; where the sums' error leaves that open, exact and alone

A bound of the candidates of top-k steers only the speed. Where more than CAPACITY ids reach it, or top-k exceeds the number of
tiles, the row's one program searches the whole row: exact, but many times slower.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from penstock.core.device import has_dependent_launch, num_sms
from penstock.ops.sampling import _state_triton as slots
from penstock.ops.sampling import _weights
from penstock.ops.sampling.sample_check_triton import check_kernel, decide_kernel
from penstock.ops.sampling.sample_row_triton import row_kernel
from penstock.ops.sampling.sample_scan_triton import scan_kernel

TILE = _weights.TILE
BLOCK = 2048
PROGRAMS_PER_SM = 8
CAPACITY = 8192
PART = 32


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
    """What a launch leaves of each row: floats, ints and masses, whose slots are in _state_triton, and its tiles' maxima."""

    floats: Tensor
    ints: Tensor
    masses: Tensor
    maxima: Tensor


class Grid(NamedTuple):
    """How a pass deals the tiles of B rows to programs.

    Args:
        padded_tiles: tiles of a row, a power of two; tiles: of a block; blocks: of a program; splits: programs of a row.
    """

    padded_tiles: int
    tiles: int
    blocks: int
    splits: int

    @classmethod
    def of(cls, B: int, V: int, device: torch.device) -> "Grid":
        """Enough programs to fill the device."""
        padded_tiles = triton.next_power_of_2(triton.cdiv(V, TILE))
        tiles = max(1, BLOCK // TILE)
        all_blocks = triton.cdiv(padded_tiles, tiles)
        blocks = triton.cdiv(all_blocks, min(all_blocks, triton.cdiv(PROGRAMS_PER_SM * num_sms(device), B)))
        return cls(padded_tiles, tiles, blocks, triton.cdiv(all_blocks, blocks))


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
        filters: the state holds what filter_triton goes on from.
    Returns: with filters the state, None where all rows are greedy.
    """
    B, V = logits.shape
    if B == 0:
        return None
    device = logits.device
    padded_tiles, tiles, blocks, splits = Grid.of(B, V, device)
    grid = (B, splits)
    row = (V, logits.stride(0))
    early = has_dependent_launch(device)
    shape: dict[str, Any] = {"PADDED_TILES": padded_tiles, "TILE": TILE, "EARLY": early}
    tiled: dict[str, Any] = {"TILES": tiles, "PART": min(PART, TILE), "num_warps": 4, "enable_fp_fusion": False}
    alone: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False, "launch_pdl": early}

    options = (temperature, top_k, top_p, min_p, temperature_value, top_k_value, top_p_value, min_p_value)
    draws, by_count, whole, by_mass, pends = Work.of(V, *options)

    def scratch(columns: int, dtype: torch.dtype, wanted: bool) -> Any:
        return torch.empty(B, columns, dtype=dtype, device=device) if wanted else None

    maxima = torch.empty(B, padded_tiles, dtype=torch.float32, device=device)
    sums = scratch(padded_tiles, torch.int64, whole)
    filters = filters and draws
    state = (
        scratch(slots.FLOATS.value, torch.float32, pends or filters),
        scratch(slots.INTS.value, torch.int32, pends or filters),
        scratch(slots.MASSES.value, torch.int64, pends or filters),
    )
    candidates = scratch(CAPACITY, torch.float32, by_count)
    candidate_ids = scratch(CAPACITY, torch.int32, by_count)
    tile_list = scratch(padded_tiles, torch.int32, by_count)
    heats = (temperature, top_k, float(temperature_value), int(top_k_value))
    scan_kernel[grid](maxima, sums, logits, *heats, *row, blocks, MAY_BE_WHOLE=whole, **shape, **tiled)
    row_kernel[(B,)](
        out,
        *state,
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
        FILTERS=filters,
        **shape,
        **alone,
    )
    if by_mass:
        check_kernel[grid](*state, maxima, logits, *row, blocks, **shape, **tiled, launch_pdl=early)
    if pends:
        keys = (seeds, offsets, min_p, float(min_p_value))
        terms = blocks * (TILE // min(PART, TILE))
        decide_kernel[(B,)](out, *state, maxima, sums, logits, *keys, *row, terms, **shape, **alone)
    return State(*state, maxima) if filters else None
