"""One turn of `sample`: a tile of the whole row by its mass, then an id in it."""

import triton
import triton.language as tl

from penstock.ops.sampling import _weights
from penstock.ops.sampling._philox import SAMPLE_STREAM
from penstock.ops.sampling._weights_triton import clean, random_words, weigh

STREAM = tl.constexpr(SAMPLE_STREAM)
ALL_TURNS = tl.constexpr(_weights.TURNS)


@triton.jit
def masses_of_tiles(maxima, sums, top, scale):
    """sums · weights of the maxima >> 40, as the high half of a product of 64-bit integers."""
    factors = weigh(maxima, top, scale)
    return tl.umulhi((sums << 12).to(tl.uint64), (factors << 12).to(tl.uint64)).to(tl.int64)


@triton.jit
def words_of_turns(first, seed, offset, NUMBER: tl.constexpr):
    """The random words of NUMBER turns."""
    zero = tl.zeros([NUMBER], tl.int64)
    return random_words(zero + seed, zero + offset, STREAM, first + tl.arange(0, NUMBER))


@triton.jit
def draw_turns(bits, more, cumulative, total, scale, logits_ptr, V, TILE: tl.constexpr):
    """(ids, their logits, equal logits before each in its tile) of turns: a tile by its mass, then an id in it."""
    target = tl.umulhi(bits, tl.zeros_like(bits) + total.to(tl.uint64)).to(tl.int64)
    tile = tl.sum((cumulative[None, :] <= target[:, None]).to(tl.int32), axis=1)
    columns = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x = clean(tl.load(logits_ptr + columns, columns < V, other=float("-inf")))
    weights = weigh(x, tl.max(x, axis=1)[:, None], scale)
    inner = tl.umulhi(more, tl.sum(weights, axis=1).to(tl.uint64)).to(tl.int64)
    ids = tile * TILE + tl.sum((tl.cumsum(weights, axis=1) <= inner[:, None]).to(tl.int32), axis=1)
    logits = tl.sum(tl.where(columns == ids[:, None], x, 0.0), axis=1)
    ties = tl.sum(((x == logits[:, None]) & (columns < ids[:, None])).to(tl.int32), axis=1)
    return ids, logits, ties
