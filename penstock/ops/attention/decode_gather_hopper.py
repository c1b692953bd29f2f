"""The pieces of a request are added by the last program that leaves one: no second kernel.

A piece stands in the scratch; then its program takes a ticket. Sixteen pieces, in the order of their keys, are a group: the
last program of a group adds them, and of more groups than one the last adds the groups. Which program adds depends on time;
what is added to what does not: the bits are the same. Tickets are counted in the plan, from 0, and left at 0 again.
"""

from penstock.core.gluon import gl, gluon, thread_barrier
from penstock.ops.attention import _softmax_hopper as softmax

# Pieces of a group: 256 pieces, which is as many as two programs a multiprocessor leave, are 16 groups.
GROUP = gl.constexpr(16)


@gluon.jit
def add(scratch, pieces, head, row, C: gl.constexpr):
    """(normalised sum [dv, rows], log2 of its denominator) of pieces.

    Args:
        scratch: results, their lse.
        pieces: program of the first, programs from one to the next, how many, the program of the request's first piece.
    """
    part_ptr, part_lse_ptr = scratch
    first, stride, count, request_first = pieces
    # As many as fill 64 registers are on their way at once.
    AT_ONCE: gl.constexpr = C.pieces_at_once
    width = gl.arange(0, C.dv, layout=gl.SliceLayout(1, C.scores_layout))
    exists = row < C.group * C.q_len
    holds = (width < C.out_width)[:, None] & exists[None, :]
    at = (row * C.out_width)[None, :] + width[:, None]
    acc = gl.zeros([C.dv, C.rows], gl.float32, layout=C.scores_layout)
    m = gl.full([C.rows], float("-inf"), gl.float32, layout=gl.SliceLayout(0, C.scores_layout))
    l = gl.zeros([C.rows], gl.float32, layout=gl.SliceLayout(0, C.scores_layout))
    for start in range(0, count, AT_ONCE):
        lses = ()
        parts = ()
        for index in gl.static_range(AT_ONCE):
            there = start + index < count
            program = gl.where(there, first + (start + index) * stride, first)
            begin = first_row(program, request_first, head, C)
            lse = gl.load(part_lse_ptr + begin + row, exists & there, other=float("-inf"), cache_modifier=".cg")
            lses = lses + (lse,)  # type: ignore[assignment]  # noqa: RUF005
            line = part_ptr + begin * C.out_width
            part = gl.load(line + at, holds & there, other=0.0, cache_modifier=".cg")
            parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005
        for index in gl.static_range(AT_ONCE):
            m_new = gl.maximum(m, lses[index])
            base = softmax.finite(m_new)
            weight = gl.exp2(lses[index] - base)
            alpha = gl.exp2(m - base)
            l = l * alpha + weight
            acc = acc * alpha[None, :] + parts[index] * weight[None, :]
            m = m_new
    dead = m == float("-inf")
    l = gl.where(dead, 1.0, l)
    return acc * (1.0 / l)[None, :], gl.where(dead, float("-inf"), m + gl.log2(l))


@gluon.jit
def first_row(program, request_first, head, C: gl.constexpr):
    """The first row in the scratch of a program's piece: of the request that began with it, or of one begun before."""
    slot = 2 * program + gl.where(program == request_first, 1, 0)
    return gl.cast(slot * C.kv_heads + head, gl.int64) * (C.group * C.q_len)


@gluon.jit
def pieces_of(unit_start, request, num_requests, programs, C: gl.constexpr):
    """(first, last) of the programs whose runs hold tiles of a request, or end just before them."""
    total = gl.load(unit_start + num_requests)
    working = gl.cast(gl.maximum(gl.minimum(programs, (total + C.share - 1) // C.share), 1), gl.int64)
    begin = gl.load(unit_start + request) + C.lead + 1
    end = gl.load(unit_start + request + 1)
    # The program whose run holds unit u is the last c with c · total // working <= u.
    return gl.cast((begin * working - 1) // total, gl.int32), gl.cast((end * working - 1) // total, gl.int32)


@gluon.jit
def is_last(tickets, place, members):
    """Takes a ticket; whether all members have one now. What they stored before can be read after."""
    # Every thread has stored before the ticket, which one of them takes for all, releases it.
    thread_barrier()
    last = gl.atomic_add(tickets + place, 1, sem="acq_rel", scope="gpu") == members - 1
    if last:
        gl.store(tickets + place, 0)
    thread_barrier()
    return last
