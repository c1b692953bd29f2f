"""Requests cut into segments of at most `length` tokens, one program each, with no host read of cu_seqlens.

Request b has the places from cu_seqlens[b] // length + b on: enough for its segments wherever it starts, so that T // length + B
places serve any lengths. Places that are left over are idle.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
REQUESTS = tl.constexpr(256)  # looked at in one step of the search


@triton.jit
def find_request(cu_ptr, num_requests, place, length, EXTRA: tl.constexpr):
    """The last request whose places begin at or before `place`; EXTRA = 1 counts one place more for each request before it."""
    found = 0
    for base in range(0, num_requests, REQUESTS):
        at = base + tl.arange(0, REQUESTS)
        first = tl.load(cu_ptr + at, at < num_requests, other=0) // length + at * EXTRA
        found += tl.sum(((at < num_requests) & (first <= place)).to(tl.int32))
    return tl.maximum(found - 1, 0)


@triton.jit
def locate(cu_ptr, num_requests, place, length):
    """(request, number of the segment in it, first token, end, end of the request); idle places have segment > 0 and no token."""
    request = find_request(cu_ptr, num_requests, place, length, 1)
    begin = tl.load(cu_ptr + request)
    stop = tl.load(cu_ptr + request + 1)
    segment = place - (begin // length + request)
    first = begin + segment * length
    return request, segment, first, tl.minimum(first + length, stop), stop


@triton.jit
def log1p_of(e):
    """log(1 + e) for e in [0, 1] to a rounding or two, as 2 · artanh(e / (2 + e)); log of the sum would lose small steps."""
    s = e / (e + 2.0)
    q = s * s
    p = 0.06666666666666667
    p = p * q + 0.07692307692307693
    p = p * q + 0.09090909090909091
    p = p * q + 0.1111111111111111
    p = p * q + 0.14285714285714285
    p = p * q + 0.2
    p = p * q + 0.3333333333333333
    return 2.0 * s * (p * q + 1.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + log1p_of(tl.exp(-tl.abs(x)))


@triton.jit
def silu(x):
    """x · sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))
