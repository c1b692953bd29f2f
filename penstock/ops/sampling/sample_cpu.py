"""Row by row without a sort of the vocabulary: candidates come from torch.topk, and few of them need weights."""

import math

import numpy as np
import torch
from torch import Tensor

from penstock.ops.sampling._philox import random_bits_of
from penstock.ops.sampling._weights import ONE, at_least, clean, draw, scales, weigh

FIRST_CANDIDATES = 256
GROWTH = 8


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
    """Fills out; rows at temperature 0 take one pass together, the others go one by one."""
    B = logits.shape[0]
    if B == 0:
        return
    rows = clean(logits)
    largest = rows.amax(1)
    heats = torch.full((B,), temperature_value) if temperature is None else temperature.float()
    # torch.max does not promise the first of equal values; numpy's argmax does.
    ids = rows.numpy().argmax(1).tolist() if bool((heats == 0).any()) else [0] * B
    scale = scales(heats).tolist()
    ks = [top_k_value] * B if top_k is None else top_k.tolist()
    ps = torch.full((B,), top_p_value).tolist() if top_p is None else top_p.float().tolist()
    floors = torch.full((B,), min_p_value).tolist() if min_p is None else min_p.float().tolist()
    keys = zip(seeds.tolist(), offsets.tolist(), strict=True)
    for row, (heat, top, key) in enumerate(zip(heats.tolist(), largest.tolist(), keys, strict=True)):
        if heat == 0:
            continue
        if top == -math.inf:
            ids[row] = 0
            continue
        kept = _keep(rows[row], top, scale[row], ks[row], ps[row])
        values = rows[row] if kept is None else rows[row][kept]
        weights = weigh(values, top, scale[row])
        if floors[row] > 0:
            weights *= weights >= at_least(floors[row], 1 << ONE)
        cumulative = weights.cumsum(0).numpy()
        position = int(np.searchsorted(cumulative, draw(random_bits_of(*key), int(cumulative[-1])), side="right"))
        ids[row] = position if kept is None else int(kept[position])
    out.copy_(torch.tensor(ids, dtype=torch.int32))


def _keep(row: Tensor, top: float, scale: float, k: int, p: float) -> Tensor | None:
    """The ids, ascending, that top-k and top-p keep; None for all."""
    V = len(row)
    by_count = 0 < k < V
    if not by_count and p >= 1:
        return None
    if by_count:
        values = row.topk(k).values
        if p < 1:
            cumulative = weigh(values, top, scale).cumsum(0)
            values = values[: _reach(cumulative, at_least(p, int(cumulative[-1])))]
    else:
        needed = at_least(p, int(weigh(row, top, scale).sum()))
        candidates = FIRST_CANDIDATES
        while True:
            values = row.topk(min(candidates, V)).values
            cumulative = weigh(values, top, scale).cumsum(0)
            if candidates >= V or int(cumulative[-1]) >= needed:
                break
            candidates *= GROWTH
        values = values[: _reach(cumulative, needed)]
    # The weight is a function of the logit: the sorted values say how far the filter reaches, whichever ids they came from.
    last = values[-1]
    kept = (row >= last).nonzero().squeeze(1)
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
