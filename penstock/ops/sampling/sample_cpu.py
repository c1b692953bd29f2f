"""Without a sort of the vocabulary: rows together, filtered ones with candidates from torch.topk; the few that these do not
settle (a wide nucleus, ties at the cut) one by one."""

import math

import numpy as np
import torch
from torch import Tensor

from penstock.ops.sampling._options import rows_of
from penstock.ops.sampling._philox import words
from penstock.ops.sampling._weights import LARGEST, ONE, at_least, clean, draw, scales, weigh

# A nucleus is mostly smaller; a larger one is cheaper to sort than to select (numpy sorts with vector instructions).
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
    ids = [0] * B
    unsettled: list[int] = []
    if bool((heats == 0).any()):
        # torch.argmax does not promise the first of equal values; numpy's does.
        ids = rows.numpy().argmax(1).tolist()
    hot = ((heats > 0) & (largest > -math.inf)).tolist()
    scale = scales(heats)
    ks = rows_of(top_k, top_k_value, logits, torch.int32).tolist()
    ps = rows_of(top_p, top_p_value, logits).tolist()
    least = [at_least(p, 1 << ONE) for p in rows_of(min_p, min_p_value, logits).tolist()]
    bits, _ = words(seeds, offsets)
    free = [row for row in range(B) if hot[row] and ps[row] >= 1 and not 0 < ks[row] < V]
    step = max(1, TOGETHER // V)
    for start in range(0, len(free), step):
        some = free[start : start + step]
        index: slice | list[int] = slice(some[0], some[-1] + 1) if some[-1] - some[0] == len(some) - 1 else some
        weights = weigh(rows[index], largest[index, None], scale[index, None])
        for row, position in zip(some, _draw(weights, [least[row] for row in some], [bits[row] for row in some]), strict=True):
            ids[row] = position
    filtered = sorted({row for row in range(B) if hot[row]} - set(free))
    for start in range(0, len(filtered), step):
        some = filtered[start : start + step]
        settled = _draw_filtered(rows, largest, scale, ks, ps, least, bits, some) if len(some) > 1 else {}
        for row, position in settled.items():
            ids[row] = position
        unsettled += [row for row in some if row not in settled]
    for row in unsettled:
        top, by = float(largest[row]), float(scale[row])
        kept = keep(rows[row], top, by, ks[row], ps[row])
        [position] = _draw(weigh(rows[row][kept], top, by)[None], [least[row]], [bits[row]])
        ids[row] = int(kept[position])
    out.copy_(torch.tensor(ids, dtype=torch.int32))


def _draw(weights: Tensor, least: list[int], bits: list[int]) -> list[int]:
    """The drawn position of each row of weights; what weighs less than `least` is out."""
    if max(least) > 1:
        weights *= weights >= torch.tensor(least)[:, None]
    cumulative = weights.cumsum(1)
    targets = [draw(random, mass) for random, mass in zip(bits, cumulative[:, -1].tolist(), strict=True)]
    return torch.searchsorted(cumulative, torch.tensor(targets)[:, None], right=True)[:, 0].tolist()


def _draw_filtered(
    rows: Tensor,
    largest: Tensor,
    scale: Tensor,
    ks: list[int],
    ps: list[float],
    least: list[int],
    bits: list[int],
    some: list[int],
) -> dict[int, int]:
    """The drawn ids of those rows whose kept tokens are for certain among the largest CANDIDATES."""
    V = rows.shape[1]
    whole = len(some) == len(rows)
    own = rows if whole else rows[some]
    top, by = (largest, scale) if whole else (largest[some], scale[some])
    limits = [ks[row] if 0 < ks[row] < V else V for row in some]
    width = min(V, CANDIDATES, max(limits))
    values, order = own.topk(width)
    weights = weigh(values, top[:, None], by[:, None])
    if min(limits) < width:
        weights *= torch.arange(width) < torch.tensor(limits)[:, None]
    cumulative = weights.cumsum(1)
    masses = cumulative[:, -1].tolist()
    if max(limits) == V and width < V:
        everything = weigh(own, top[:, None], by[:, None]).sum(1).tolist()
        masses = [mass if limit < V else all_of_it for mass, limit, all_of_it in zip(masses, limits, everything, strict=True)]
    needed = [at_least(ps[row], mass) for row, mass in zip(some, masses, strict=True)]
    reach = torch.searchsorted(cumulative, torch.tensor(needed)[:, None])[:, 0] + 1
    by_count = torch.tensor([limit if ps[row] >= 1 else V for row, limit in zip(some, limits, strict=True)])
    reach = torch.where(by_count < V, by_count, reach)
    inside = reach <= width
    reach.clamp_(max=width)
    # A tie across the cut is settled by id, which topk does not promise.
    last = values.gather(1, reach[:, None] - 1)
    settled = (inside & ((own >= last).sum(1) == reach)).tolist()
    weights *= torch.arange(width) < reach[:, None]
    order, by_id = order.sort(1)
    drawn = _draw(weights.gather(1, by_id), [least[row] for row in some], [bits[row] for row in some])
    ids = order.gather(1, torch.tensor(drawn)[:, None].clamp_(max=width - 1))[:, 0].tolist()
    return {row: position for row, position, good in zip(some, ids, settled, strict=True) if good}


def keep(row: Tensor, top: float, scale: float, k: int, p: float) -> Tensor:
    """The ids, ascending, that top-k and top-p keep."""
    V = len(row)
    if 0 < k < V:
        values = row.topk(k).values
        if p < 1:
            cumulative = weigh(values, top, scale).cumsum(0)
            values = values[: _reach(cumulative, at_least(p, int(cumulative[-1])))]
    else:
        needed = at_least(p, int(weigh(row, top, scale).sum()))
        values = row.topk(min(CANDIDATES, V)).values
        cumulative = weigh(values, top, scale).cumsum(0)
        if int(cumulative[-1]) < needed:
            values = torch.from_numpy(np.sort(row.numpy())).flip(0)
            cumulative = weigh(values, top, scale).cumsum(0)
        values = values[: _reach(cumulative, needed)]
    # The weight is a function of the logit: the sorted values say how far the filter reaches, whichever ids they came from.
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
