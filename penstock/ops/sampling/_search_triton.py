"""Searches among the candidates of a row by one program: how many or how much lies past a logit, and where the cut is."""

import triton
import triton.language as tl

from penstock.ops.sampling._weights_triton import clean, key_of, logit_of, weigh


@triton.jit
def elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK: tl.constexpr):
    """A chunk of the candidates, or of the row where the list of candidates is no use: (logits, ids, which are candidates)."""
    slots = start + tl.arange(0, CHUNK)
    inside = slots < length
    near = tl.load(candidates_ptr + slots, inside & listed, other=float("-inf"))
    far = clean(tl.load(logits_ptr + slots, inside & (listed == 0), other=float("-inf")))
    ids = tl.where(listed, tl.load(candidate_ids_ptr + slots, inside & listed, other=0), slots)
    x = tl.where(listed, near, far)
    return x, ids, inside & (x >= low) & (x < high)


@triton.jit
def search(
    enough,
    by_mass: tl.constexpr,
    reached,
    upper,
    length,
    listed,
    logits_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    low,
    high,
    top,
    scale,
    CHUNK: tl.constexpr,
):
    """The largest key from which the candidates on are enough, in number or mass; they are from `reached` on.

    Halves the interval of keys and draws its ends in to keys that occur.
    """
    while reached < upper:
        pivot = reached + (upper - reached + 1) // 2
        amount = tl.zeros([CHUNK], tl.int64)
        lowest = tl.zeros([CHUNK], tl.int64) + upper
        highest = tl.zeros([CHUNK], tl.int64) + reached
        for start in range(0, length, CHUNK):
            x, _, chosen = elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
            keys = key_of(x).to(tl.int64)
            above = chosen & (keys >= pivot)
            if by_mass:
                amount += tl.where(above, weigh(x, top, scale), 0)
            else:
                amount += above.to(tl.int64)
            lowest = tl.where(above, tl.minimum(lowest, keys), lowest)
            highest = tl.where(chosen & (keys < pivot), tl.maximum(highest, keys), highest)
        if tl.sum(amount) >= enough:
            reached = tl.min(lowest)
        else:
            upper = tl.max(highest)
    return reached


@triton.jit
def past(cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, top, scale, CHUNK: tl.constexpr):
    """Number and mass of the candidates past the cut, and number at it."""
    number = tl.zeros([CHUNK], tl.int32)
    ties = tl.zeros([CHUNK], tl.int32)
    mass = tl.zeros([CHUNK], tl.int64)
    for start in range(0, length, CHUNK):
        x, _, chosen = elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
        past = chosen & (x > cut)
        number += past.to(tl.int32)
        ties += (chosen & (x == cut)).to(tl.int32)
        mass += tl.where(past, weigh(x, top, scale), 0)
    return tl.sum(number), tl.sum(mass), tl.sum(ties)


@triton.jit
def tie_cut(wanted, V, cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK: tl.constexpr):
    """The id up to which `wanted` candidates have the logit `cut`."""
    below = tl.full([], -1, tl.int32)
    last = tl.zeros([], tl.int32) + V
    while last - below > 1:
        middle = below + (last - below) // 2
        number = tl.zeros([CHUNK], tl.int32)
        for start in range(0, length, CHUNK):
            x, ids, chosen = elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
            number += (chosen & (x == cut) & (ids <= middle)).to(tl.int32)
        enough = tl.sum(number) >= wanted
        last = tl.where(enough, middle, last)
        below = tl.where(enough, below, middle)
    return last


@triton.jit
def kept_mass(
    last_id,
    smallest,
    cut,
    cut_id,
    length,
    listed,
    logits_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    low,
    high,
    top,
    scale,
    CHUNK: tl.constexpr,
):
    """The mass of candidates kept, up to an id."""
    mass = tl.zeros([CHUNK], tl.int64)
    for start in range(0, length, CHUNK):
        x, ids, chosen = elements(start, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
        weights = weigh(x, top, scale)
        kept = chosen & ((x > cut) | ((x == cut) & (ids <= cut_id))) & (weights >= smallest)
        mass += tl.where(kept & (ids <= last_id), weights, 0)
    return tl.sum(mass)


@triton.jit
def cut_by_mass(
    needed,
    reached,
    V,
    length,
    listed,
    logits_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    low,
    high,
    top,
    scale,
    CHUNK: tl.constexpr,
):
    """(last logit, last id at it) of the shortest run of the order that has the needed mass; the key `reached` is in it."""
    key = search(
        needed,
        True,
        reached,
        key_of(top).to(tl.int64),
        length,
        listed,
        logits_ptr,
        candidates_ptr,
        candidate_ids_ptr,
        low,
        high,
        top,
        scale,
        CHUNK,
    )
    cut = logit_of(key.to(tl.int32))
    _, mass, ties = past(cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, top, scale, CHUNK)
    weight = tl.maximum(weigh(cut, top, scale), 1)
    kept = (needed - mass + weight - 1) // weight
    cut_id = tl.zeros([], tl.int32) + V
    if kept < ties:
        cut_id = tie_cut(kept, V, cut, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, CHUNK)
    return cut, cut_id


@triton.jit
def draw_kept(
    bits,
    smallest,
    cut,
    cut_id,
    V,
    length,
    listed,
    logits_ptr,
    candidates_ptr,
    candidate_ids_ptr,
    low,
    high,
    top,
    scale,
    CHUNK: tl.constexpr,
):
    """(id drawn among what is kept, its mass)."""
    mass = kept_mass(
        V, smallest, cut, cut_id, length, listed, logits_ptr, candidates_ptr, candidate_ids_ptr, low, high, top, scale, CHUNK
    )
    target = tl.umulhi(bits, mass.to(tl.uint64)).to(tl.int64)
    below = tl.full([], -1, tl.int32)
    last = tl.zeros([], tl.int32) + V - 1
    while last - below > 1:
        middle = below + (last - below) // 2
        reached = kept_mass(
            middle,
            smallest,
            cut,
            cut_id,
            length,
            listed,
            logits_ptr,
            candidates_ptr,
            candidate_ids_ptr,
            low,
            high,
            top,
            scale,
            CHUNK,
        )
        last = tl.where(reached > target, middle, last)
        below = tl.where(reached > target, below, middle)
    return last, mass
