"""Without a sort of the vocabulary: rows together, those at top-k with candidates from torch.topk; the few that these do not
settle (many candidates, ties at the cut) one by one."""

import math

import numpy as np
import torch
from torch import Tensor

from penstock.ops.sampling._options import rows_of
from penstock.ops.sampling._philox import words
from penstock.ops.sampling._weights import LARGEST, ONE, TILE, TURNS, at_least, clean, draw, scales, weigh, weigh_tiles

# A top-k is mostly smaller; a larger one is cheaper to sort than to select (numpy sorts with vector instructions).
CANDIDATES = 256
# Weights of this many logits at once stay in a core's cache.
TOGETHER = 2**16


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
    """Fills out."""
    B, V = logits.shape
    if B == 0:
        return
    heats = rows_of(temperature, temperature_value, logits)
    rows = logits.float()
    largest = rows.amax(1)
    if bool((largest.isnan() | (largest > LARGEST)).any()):
        rows = clean(rows)
        largest = rows.amax(1)
    ids = torch.zeros(B, dtype=torch.int64)
    if bool((heats == 0).any()):
        # torch.argmax does not promise the first of equal values; numpy's does.
        ids = torch.from_numpy(rows.numpy().argmax(1))
    hot = (heats > 0) & (largest > -math.inf)
    scale = scales(heats)
    ks = rows_of(top_k, top_k_value, logits, torch.int32)
    ps = rows_of(top_p, top_p_value, logits)
    floors = rows_of(min_p, min_p_value, logits)
    counted = (ks > 0) & (ks < V)
    step = max(1, TOGETHER // V)
    whole, cut = (hot & ~counted).nonzero()[:, 0], (hot & counted).nonzero()[:, 0]
    for start in range(0, len(whole), step):
        some = whole[start : start + step]
        ids[some] = _draw_in_turns(rows[some], largest[some], scale[some], ps[some], floors[some], seeds[some], offsets[some])
    for start in range(0, len(cut), step):
        some = cut[start : start + step]
        ids[some] = _draw_counted(
            rows[some], largest[some], scale[some], ks[some], ps[some], floors[some], seeds[some], offsets[some]
        )
    out.copy_(ids)


def _draw_in_turns(
    rows: Tensor, top: Tensor, scale: Tensor, ps: Tensor, floors: Tensor, seeds: Tensor, offsets: Tensor
) -> Tensor:
    """The ids of rows without top-k: draws from the whole row until one is kept by top-p and min-p."""
    masses, weights = weigh_tiles(rows, top, scale)
    needed = needed_masses(ps, masses)
    least = torch.tensor([at_least(floor, 1 << ONE) for floor in floors.tolist()])
    filtered = bool(((ps < 1) | (floors > 0)).any())
    everything = weigh(rows, top[:, None], scale[:, None]) if filtered else rows
    ids = torch.zeros(len(rows), dtype=torch.int64)
    left = torch.arange(len(rows))
    for turn in range(TURNS):
        bits, more = words(seeds[left], offsets[left], turn=turn)
        tiles = _invert(masses[left], bits)
        drawn = tiles * TILE + _invert(weights[left, tiles], more)
        ids[left] = drawn
        if not filtered:
            return ids
        own, weighed = rows[left], everything[left]
        at = drawn[:, None]
        value = own.gather(1, at)
        before = (own > value) | ((own == value) & (torch.arange(rows.shape[1]) < at))
        kept = ((weighed * before).sum(1) < needed[left]) & (weighed.gather(1, at)[:, 0] >= least[left])
        kept |= (ps[left] >= 1) & (floors[left] == 0)
        left = left[~kept]
        if len(left) == 0:
            return ids
    bits, _ = words(seeds[left], offsets[left], turn=TURNS)
    for row, word in zip(left.tolist(), bits, strict=True):
        own = rows[row]
        kept = keep(own, float(top[row]), float(scale[row]), int(needed[row]))
        kept = kept[everything[row, kept] >= least[row]]
        ids[row] = kept[_invert(everything[row, kept][None], [word])]
    return ids


def _draw_counted(
    rows: Tensor, top: Tensor, scale: Tensor, ks: Tensor, ps: Tensor, floors: Tensor, seeds: Tensor, offsets: Tensor
) -> Tensor:
    """The ids of rows at top-k."""
    width = min(rows.shape[1], CANDIDATES, int(ks.max()))
    values, order = rows.topk(width)
    weights = weigh(values, top[:, None], scale[:, None])
    weights *= torch.arange(width) < ks[:, None]
    cumulative = weights.cumsum(1)
    needed = needed_masses(ps, weights)
    reach = torch.searchsorted(cumulative, needed[:, None])[:, 0] + 1
    reach = torch.where(ps < 1, reach, ks)
    # A tie across the cut is settled by id, which topk does not promise.
    last = values.gather(1, reach.clamp(max=width)[:, None] - 1)
    settled = (ks <= width) & ((rows >= last).sum(1) == reach)
    least = torch.tensor([at_least(floor, 1 << ONE) for floor in floors.tolist()])[:, None]
    weights *= (torch.arange(width) < reach[:, None]) & (weights >= least)
    order, by_id = order.sort(1)
    bits, _ = words(seeds, offsets)
    ids = order.gather(1, _invert(weights.gather(1, by_id), bits)[:, None].clamp_(max=width - 1))[:, 0]
    for row in (~settled).nonzero()[:, 0].tolist():
        kept = keep_counted(rows[row], float(top[row]), float(scale[row]), int(ks[row]), float(ps[row]))
        weights_kept = weigh(rows[row][kept], top[row], scale[row])
        weights_kept *= weights_kept >= least[row]
        ids[row] = kept[_invert(weights_kept[None], [bits[row]])]
    return ids


def needed_masses(ps: Tensor, masses: Tensor) -> Tensor:
    """[B]: the mass that top-p asks for of each row of masses; more than there can be where it keeps all."""
    sums = masses.sum(1).tolist()
    needed = [at_least(p, mass) if p < 1 else 2**62 for p, mass in zip(ps.tolist(), sums, strict=True)]
    return torch.tensor(needed, dtype=torch.int64)


def _invert(weights: Tensor, bits: list[int]) -> Tensor:
    """The drawn position of each row of weights."""
    cumulative = weights.cumsum(1)
    targets = [draw(random, mass) for random, mass in zip(bits, cumulative[:, -1].tolist(), strict=True)]
    return torch.searchsorted(cumulative, torch.tensor(targets)[:, None], right=True)[:, 0]


def keep(row: Tensor, top: float, scale: float, needed: int) -> Tensor:
    """The ids, ascending, of the shortest run of the order that has the needed mass; all where the row has less."""
    if int(weigh(row, top, scale).sum()) <= needed:
        return torch.arange(len(row))
    values = row.topk(min(CANDIDATES, len(row))).values
    cumulative = weigh(values, top, scale).cumsum(0)
    if int(cumulative[-1]) < needed:
        values = torch.from_numpy(np.sort(row.numpy())).flip(0)
        cumulative = weigh(values, top, scale).cumsum(0)
    return _ids_of(row, values[: _reach(cumulative, needed)])


def keep_counted(row: Tensor, top: float, scale: float, k: int, p: float) -> Tensor:
    """The ids, ascending, that top-k and then top-p keep."""
    values = row.topk(k).values
    if p < 1:
        cumulative = weigh(values, top, scale).cumsum(0)
        values = values[: _reach(cumulative, at_least(p, int(cumulative[-1])))]
    return _ids_of(row, values)


def _ids_of(row: Tensor, values: Tensor) -> Tensor:
    """The first ids of the order, whose logits are these: the weight is a function of the logit alone."""
    last = values[-1]
    kept = torch.from_numpy(np.flatnonzero(row.numpy() >= float(last)))
    surplus = len(kept) - len(values)
    if surplus > 0:
        equal = (row[kept] == last).nonzero().squeeze(1)
        stays = torch.ones_like(kept, dtype=torch.bool)
        stays[equal[len(equal) - surplus :]] = False
        kept = kept[stays]
    return kept


def _reach(cumulative: Tensor, needed: int) -> int:
    """How many entries it takes to reach the needed mass."""
    return int(np.searchsorted(cumulative.numpy(), needed)) + 1
