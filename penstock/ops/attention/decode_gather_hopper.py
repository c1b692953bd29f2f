"""What leaves a program of the Hopper kernel of decode; a request's pieces are added by the last that leaves one.

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
    return gl.cast(slot_of(program, request_first) * C.kv_heads + head, gl.int64) * (C.group * C.q_len)


@gluon.jit
def slot_of(program, request_first):
    """Of a program two: for the request that was begun before it, and for the one that began with it."""
    return 2 * program + gl.where(program == request_first, 1, 0)


@gluon.jit
def ticket_of_group(leader, request_first, side, C: gl.constexpr):
    """A group's ticket: by the slot of its first piece, for another request may begin in the same program."""
    return slot_of(leader, request_first) * (C.kv_heads * C.row_blocks) + side


@gluon.jit
def ticket_of_groups(request_first, side, C: gl.constexpr):
    """Where the groups of a request are counted: no request begins in the second program of one that has several groups."""
    return slot_of(request_first + 1, request_first + 1) * (C.kv_heads * C.row_blocks) + side


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


@gluon.jit
def store_results(out_ptr, lse_ptr, out_token, out_head, result, lse, request, head, row, C: gl.constexpr):
    """Columns of an accumulator, which are query rows, to where they belong."""
    width = gl.arange(0, C.dv, layout=gl.SliceLayout(1, C.scores_layout))
    exists = row < C.group * C.q_len
    token = gl.cast(request, gl.int64) * C.q_len
    own_head = head * C.group + row % C.group
    at = (row // C.group * out_token + own_head * out_head)[None, :] + width[:, None]
    holds = (width < C.out_width)[:, None] & exists[None, :]
    gl.store(out_ptr + token * out_token + at, result.to(out_ptr.dtype.element_ty), holds)
    if C.has_lse:
        HEADS: gl.constexpr = C.kv_heads * C.group
        gl.store(lse_ptr + token * HEADS + (row // C.group * HEADS + own_head), lse * softmax.LN2, exists)


@gluon.jit
def store_piece(scratch, result, lse, first_row, row, C: gl.constexpr):
    """The same of a piece, to the scratch."""
    part_ptr, part_lse_ptr = scratch
    width = gl.arange(0, C.dv, layout=gl.SliceLayout(1, C.scores_layout))
    exists = row < C.group * C.q_len
    holds = (width < C.out_width)[:, None] & exists[None, :]
    gl.store(part_ptr + first_row * C.out_width + ((row * C.out_width)[None, :] + width[:, None]), result, holds)
    gl.store(part_lse_ptr + first_row + row, lse, exists)


@gluon.jit
def collect(scratch, tickets, results, run, request, head, row_block, row, sink, C: gl.constexpr):
    """Adds what there is to add once this program's piece is stored: nothing, a group, or all of the request."""
    program, first, last = run
    count = last - first + 1
    leader = first + (program - first) // GROUP * GROUP
    members = gl.minimum(GROUP, last + 1 - leader)
    side = head * C.row_blocks + row_block
    if is_last(tickets, ticket_of_group(leader, first, side, C), members):
        result, lse = add(scratch, (leader, 1, members, first), head, row, C)
        if count <= GROUP:
            _store_whole(results, result, lse, request, head, row, sink, C)
        else:
            # The sum takes the place of the first piece, whose denominator every warp has read.
            thread_barrier()
            store_piece(scratch, result, lse, first_row(leader, first, head, C), row, C)
            groups = (count + GROUP - 1) // GROUP
            if is_last(tickets, ticket_of_groups(first, side, C), groups):
                total, total_lse = add(scratch, (first, GROUP, groups, first), head, row, C)
                _store_whole(results, total, total_lse, request, head, row, sink, C)


@gluon.jit
def _store_whole(results, result, lse, request, head, row, sink, C: gl.constexpr):
    """A request's sum of pieces, which have no sink yet."""
    out_ptr, lse_ptr, out_token, out_head = results
    if C.has_sinks:
        dead = lse == float("-inf")
        highest = gl.maximum(lse, sink)
        shrink = gl.where(dead, 0.0, gl.exp2(lse - highest))
        l = gl.where(dead, 1.0, shrink + gl.exp2(sink - highest))
        result = result * (shrink / l)[None, :]
        lse = gl.where(dead, float("-inf"), highest + gl.log2(l))
    store_results(out_ptr, lse_ptr, out_token, out_head, result, lse, request, head, row, C)
