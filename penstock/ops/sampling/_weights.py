"""weight = floor(2**40 · exp((logit - largest) / temperature)), an integer that every machine computes alike.

Integer sums do not depend on their order, so that splits, blocks and batches cannot change a token; and the exponential is a
polynomial of float32 multiplications and additions that are never fused, so that a CPU and a GPU agree to the last bit.
Its relative error is below 2**-22 near the largest logit; weights under 2**-40 of the largest are zero.

A whole row is drawn from in two steps, so that one pass over its logits is enough: a tile of 128 ids, whose mass is the sum of
weights relative to the tile's largest logit times the weight of that logit in the row, then an id in the tile.
"""

import math

import torch
from torch import Tensor

TILE = 128
TURNS = 32  # draws from the whole row before top-p or min-p is drawn from by itself
ONE = 40  # the largest logit weighs 2**ONE; 2**22 of them still fit in an int64
# 2**f = 1 + f·(…) for |f| ≤ 1/2, fitted for the least relative error (below 1e-8 before rounding).
POLYNOMIAL = (
    0.00015353370690718293,
    0.0013398875016719103,
    0.00961843691766262,
    0.055503323674201965,
    0.24022647738456726,
    0.6931471824645996,
    1.0,
)
LOWEST = -64.0
LOG2E = 1.44269504  # the same float32 as log2(e)
LARGEST = torch.finfo(torch.float32).max


def clean(logits: Tensor) -> Tensor:
    """The logits as float32: NaN becomes -inf, +inf the largest finite number, -0 becomes 0."""
    return torch.nan_to_num(logits.float(), nan=-math.inf, posinf=LARGEST, neginf=-math.inf) + 0.0


def scales(temperature: Tensor) -> Tensor:
    """log2(e) / temperature as float32, infinite quotients replaced by the largest number."""
    return ((1.0 / temperature.float()) * LOG2E).clamp_max(LARGEST)


def weigh(logits: Tensor, largest: Tensor | float, scale: Tensor | float) -> Tensor:
    """Integer weights, int64, of clean logits. A row whose largest logit is -inf has weights zero."""
    exponent = ((logits - largest) * scale).nan_to_num_(nan=LOWEST).clamp_min_(LOWEST)
    whole = exponent.round()
    exponent -= whole
    power = exponent * POLYNOMIAL[0]
    for coefficient in POLYNOMIAL[1:-1]:
        power.add_(coefficient).mul_(exponent)
    power.add_(POLYNOMIAL[-1])
    bits = power.view(torch.int32).add_((whole.to(torch.int32) + ONE) << 23)
    return bits.view(torch.float32).to(torch.int64)


def weigh_tiles(logits: Tensor, largest: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(mass of each tile in its row, weights of ids in their tile) of clean rows.

    Args:
        logits: [B, V].
        largest, scale: [B], of each row.
    Returns: ([B, T] int64, [B, T, TILE] int64), where T = ceil(V / TILE).
    """
    tiles = torch.nn.functional.pad(logits, (0, -logits.shape[1] % TILE), value=-math.inf).unflatten(1, (-1, TILE))
    maxima = tiles.amax(2)
    weights = weigh(tiles, maxima[..., None], scale[:, None, None])
    factors, sums = weigh(maxima, largest[:, None], scale[:, None]), weights.sum(2)
    # sums · factors >> ONE in halves of 24 bits.
    half = (1 << 24) - 1
    a, b, c, d = sums >> 24, sums & half, factors >> 24, factors & half
    return (a * c << 8) + (a * d + b * c + (b * d >> 24) >> 16), weights


def at_least(fraction: float, mass: int) -> int:
    """The smallest integer >= fraction · mass, and at least 1; the fraction counts in steps of 2**-63."""
    return max(1, -(-mass * int(fraction * 2.0**63) >> 63))


def keep(row: Tensor, temperature: Tensor, k: int, p: float, floor: float) -> Tensor:
    """[V] int64: the weights of a clean row's ids by id, zero where a filter drops them; the one certain id weighs 2**ONE.

    Sorts the row; the only floating-point arithmetic is that of the weights.
    """
    ordered, order = row.sort(descending=True, stable=True)
    kept = torch.zeros_like(order)
    if temperature == 0 or ordered[0] == -math.inf:
        kept[order[0]] = 1 << ONE
        return kept
    weights = weigh(ordered, ordered[0], scales(temperature))
    if k > 0:
        weights[k:] = 0
    if p < 1:
        counted = 0 < k < len(row)
        whole = weights if counted else weigh_tiles(row[None], ordered[:1], scales(temperature)[None])[0]
        before = weights.cumsum(0) - weights
        weights[before >= at_least(p, int(whole.sum()))] = 0
    weights[weights < at_least(floor, 1 << ONE)] = 0
    return kept.scatter(0, order, weights)


def share(fraction: float, mass: int) -> int:
    """floor(fraction · mass) for a fraction clamped to [0, 1], counted in steps of 2**-62; 0 for NaN."""
    return mass * int(min(fraction, 1.0) * 2.0**62) >> 62 if fraction > 0 else 0


def draw(bits: int, mass: int) -> int:
    """A uniform integer below mass from 64 random bits."""
    return bits * mass >> 64
