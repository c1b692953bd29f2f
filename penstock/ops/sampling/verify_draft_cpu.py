"""Requests together, one position after the other, up to each one's first rejection."""

import math

import numpy as np
import torch
from torch import Tensor

from penstock.ops.sampling import sample_cpu
from penstock.ops.sampling._options import rows_of
from penstock.ops.sampling._philox import VERIFY_STREAM, words
from penstock.ops.sampling._weights import ONE, at_least, clean, draw, scales, share, weigh, weigh_tiles

# Rows up to this long are filtered by sorting all of them at once, longer ones by selecting in one after the other.
SORTED = 1024
# Weights of about this many logits at once.
TOGETHER = 2**20
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


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
    """Fills accepted and ids."""
    B, positions, V = target_logits.shape
    options = (
        rows_of(temperature, temperature_value, target_logits),
        rows_of(top_k, top_k_value, target_logits, torch.int32),
        rows_of(top_p, top_p_value, target_logits),
        rows_of(min_p, min_p_value, target_logits),
    )
    plain = torch.empty(B * positions, dtype=torch.int32)
    at = offsets[:, None] + torch.arange(positions)
    keys = seeds.repeat_interleave(positions), at.flatten()
    heats, ks, ps, floors = (option.repeat_interleave(positions) for option in options)
    sample_cpu.launch(plain, target_logits.flatten(0, 1), *keys, heats, ks, ps, floors, 1.0, 0, 1.0, 0.0)
    ids.copy_(plain.view(B, positions))
    inside = (draft_ids >= 0) & (draft_ids < V)
    if draft_probs is None:
        agrees = inside & (draft_ids == ids[:, :-1])
    else:
        agrees = torch.zeros_like(inside)
        step = max(1, TOGETHER // V)
        for start in range(0, B, step):
            going = torch.arange(start, min(B, start + step))
            for i in range(positions - 1):
                going = going[inside[going, i]]
                if len(going) == 0:
                    break
                weights = _filtered(target_logits[going, i], *(option[going] for option in options))
                bits = words(seeds[going], at[going, i], VERIFY_STREAM)
                chosen, drawn = _verify(weights, draft_ids[going, i].long(), draft_probs[going, i].float(), *bits)
                ids[going, i] = torch.where(drawn >= 0, drawn, ids[going, i])
                agrees[going, i] = chosen
                going = going[chosen]
    accepted.copy_(agrees.to(torch.int32).cumprod(1).sum(1))
    ids.masked_fill_(torch.arange(positions) > accepted[:, None], -1)


def _filtered(rows: Tensor, heats: Tensor, ks: Tensor, ps: Tensor, floors: Tensor) -> Tensor:
    """[B, V] int64: the weights that the filters keep; 2**ONE for an id that is certain."""
    V = rows.shape[1]
    rows = clean(rows)
    top, scale = rows.amax(1), scales(heats)
    weights = weigh(rows, top[:, None], scale[:, None])
    certain = (heats == 0) | (top == -math.inf)
    if bool(certain.any()):
        first = torch.from_numpy(rows[certain].numpy().argmax(1))
        weights[certain] = torch.nn.functional.one_hot(first, V) << ONE
    counted = (ks > 0) & (ks < V)
    cut = (~certain & ((ps < 1) | counted)).nonzero()[:, 0]
    # The mass that top-p is a share of: of what top-k left, of the whole row where there is no top-k.
    needed = sample_cpu.needed_masses(ps[cut], weigh_tiles(rows[cut], top[cut], scale[cut])[0])
    if len(cut) and V <= SORTED:
        order = rows[cut].sort(dim=1, descending=True, stable=True).indices
        ordered = weights[cut].gather(1, order)
        limits = torch.where(ks[cut] > 0, ks[cut], V)
        ordered *= torch.arange(V) < limits[:, None]
        needed = torch.where(counted[cut], sample_cpu.needed_masses(ps[cut], ordered), needed)
        before = ordered.cumsum(1) - ordered
        weights[cut] = torch.zeros_like(ordered).scatter(1, order, ordered * (before < needed[:, None]))
    else:
        for row, wanted in zip(cut.tolist(), needed.tolist(), strict=True):
            own = rows[row], float(top[row]), float(scale[row])
            if counted[row]:
                kept = sample_cpu.keep_counted(*own, int(ks[row]), float(ps[row]))
            else:
                kept = sample_cpu.keep(*own, wanted)
            weights[row] = torch.zeros_like(weights[row]).index_copy(0, kept, weights[row, kept])
    least = torch.tensor([at_least(floor, 1 << ONE) for floor in floors.tolist()])
    return weights * (weights >= least[:, None])


def _verify(weights: Tensor, proposed: Tensor, probs: Tensor, bits: list[int], coins: list[int]) -> tuple[Tensor, Tensor]:
    """(which proposed ids are accepted; the ids at this position, -1 where the plain draw stays)."""
    masses = weights.sum(1)
    at = proposed[:, None]
    own = zip(weights.gather(1, at)[:, 0].tolist(), probs.gather(1, at)[:, 0].tolist(), masses.tolist(), coins, strict=True)
    accepted = torch.tensor([draw(coin, share(q, mass)) < weight for weight, q, mass, coin in own])
    drawn = proposed.to(torch.int32)
    rejected = (~accepted).nonzero()[:, 0]
    if len(rejected):
        rests = (weights[rejected] - shares(probs[rejected], masses[rejected])).clamp_(min=0).cumsum(1)
        totals = rests[:, -1].tolist()
        targets = [draw(bits[row], total) for row, total in zip(rejected.tolist(), totals, strict=True)]
        found = torch.searchsorted(rests, torch.tensor(targets)[:, None], right=True)[:, 0]
        drawn[rejected] = torch.where(rests[:, -1] > 0, found, -1).to(torch.int32)
    return accepted, drawn


def shares(fractions: Tensor, masses: Tensor) -> Tensor:
    """`share` of rows of fractions and a mass a row: the high half of products of 64-bit integers."""
    clamped = fractions.nan_to_num(nan=0.0).clamp(0.0, 1.0)
    steps = (clamped * 2.0**62).to(torch.int64).numpy().view(np.uint64)
    fourfold = (4 * masses)[:, None].numpy().view(np.uint64)
    low, high = fourfold & _WORD, fourfold >> _HALF
    steps_low, steps_high = steps & _WORD, steps >> _HALF
    middle = high * steps_low + (low * steps_low >> _HALF)
    other = low * steps_high + (middle & _WORD)
    return torch.from_numpy((high * steps_high + (middle >> _HALF) + (other >> _HALF)).view(np.int64))
