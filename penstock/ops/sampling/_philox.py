"""Philox4x32-10: 128 random bits of a 128-bit counter and a 64-bit key, in torch and in Python integers.

A draw uses the counter (offset low, offset high, stream, turn), the key (seed low, seed high) and the first two words of the
answer, 64 bits in all. `verify_draft` has a stream of its own, whose last two words accept or reject.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
SAMPLE_STREAM = 0
VERIFY_STREAM = 1
# From this many rows on, tensors are faster than Python's integers.
MANY = 32
_WORD = 0xFFFFFFFF


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """The answer to each counter.

    Args:
        counter: [B, 4] int64 holding 32-bit words.
        key: [B, 2] int64 holding 32-bit words.
    Returns: [B, 4] int64 holding 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(1)
    k0, k1 = key.unbind(1)
    for _ in range(ROUNDS):
        # A product of two words wraps modulo 2**64, which keeps both of its halves.
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (second >> 32) & _WORD ^ c1 ^ k0, second & _WORD
        c2, c3 = (first >> 32) & _WORD ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & _WORD, (k1 + KEY_STEPS[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], 1)


def words(seeds: Tensor, offsets: Tensor, stream: int = SAMPLE_STREAM, turn: int = 0) -> tuple[list[int], list[int]]:
    """The first 64 bits of every (seed, offset), and the last, as unsigned integers."""
    if len(seeds) < MANY:
        pairs = [words_of(seed, offset, stream, turn) for seed, offset in zip(seeds.tolist(), offsets.tolist(), strict=True)]
    else:
        zero = torch.zeros_like(seeds)
        counter = torch.stack([offsets & _WORD, offsets >> 32 & _WORD, zero + stream, zero + turn], 1)
        answers = philox(counter, torch.stack([seeds & _WORD, seeds >> 32 & _WORD], 1)).tolist()
        pairs = [(b << 32 | a, d << 32 | c) for a, b, c, d in answers]
    return [first for first, _ in pairs], [last for _, last in pairs]


def words_of(seed: int, offset: int, stream: int = SAMPLE_STREAM, turn: int = 0) -> tuple[int, int]:
    """The first and the last 64 bits of one (seed, offset), in Python's integers."""
    c0, c1, c2, c3 = offset & _WORD, offset >> 32 & _WORD, stream, turn
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = second >> 32 ^ c1 ^ k0, second & _WORD
        c2, c3 = first >> 32 ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & _WORD, (k1 + KEY_STEPS[1]) & _WORD
    return c1 << 32 | c0, c3 << 32 | c2
