"""The sum of a request's pieces, in the order of its keys: what a split-KV kernel left in the scratch of a decode plan.

A program's run of units can only begin in the middle of one request (its piece stands in slot 2c) and end in the middle of one
(slot 2c+1). A request that lies in one run has no pieces: the split-KV kernel wrote its result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from penstock.core.device import has_dependent_launch, num_sms
from penstock.ops.attention._softmax_triton import LN2
from penstock.ops.attention.decode_plan import LEAD, SHARE


@triton.jit(do_not_specialize=["num_requests", "C"])
def _combine_kernel(
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    sinks_ptr,
    unit_start_ptr,
    out_token,
    out_head,
    num_requests,
    C,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    Q_LEN: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    LEAD: tl.constexpr,
    SHARE: tl.constexpr,
    PIECES: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    request = tl.program_id(0) // Q_LEN
    begin = tl.load(unit_start_ptr + request)
    end = tl.load(unit_start_ptr + request + 1)
    total = tl.load(unit_start_ptr + num_requests)
    working = tl.maximum(tl.minimum(C, tl.cdiv(total, SHARE)), 1).to(tl.int64)
    divisor = tl.maximum(total, 1)
    # The program whose run holds unit u is the last c with c · total // working <= u.
    first = (((begin + LEAD + 1) * working - 1) // divisor).to(tl.int32)
    last = ((end * working - 1) // divisor).to(tl.int32)
    if EARLY:
        # Before any exit: a kernel after this one must find the first one finished.
        gdc_wait()
    if (end > begin) & (first == last):
        return
    columns = tl.arange(0, BLOCK_DV)
    row = (tl.program_id(0) % Q_LEN) * GROUP + head % GROUP
    acc = tl.zeros([BLOCK_DV], tl.float32)
    m = float("-inf")
    l = 0.0
    if end > begin:
        for start in tl.range(first, last + 1, PIECES):
            programs = start + tl.arange(0, PIECES)
            exists = programs <= last
            slots = 2 * programs + (programs == first).to(tl.int32)
            piece = (slots * KV_HEADS + head // GROUP).to(tl.int64) * (GROUP * Q_LEN) + row
            lse = tl.load(part_lse_ptr + piece, exists, other=float("-inf"))
            part = tl.load(
                part_ptr + piece[:, None] * DV + columns[None, :], exists[:, None] & (columns < DV)[None, :], other=0.0
            )
            m_new = tl.maximum(m, tl.max(lse, 0))
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            weights = tl.exp2(lse - base)
            alpha = tl.exp2(m - base)
            l = l * alpha + tl.sum(weights, 0)
            acc = acc * alpha + tl.sum(weights[:, None] * part, 0)
            m = m_new
    dead = m == float("-inf")
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(m, sink)
        shrink = tl.exp2(m - highest)
        l = l * shrink + tl.exp2(sink - highest)
        acc = acc * shrink
        m = tl.where(dead, m, highest)
    l = tl.where(dead, 1.0, l)
    tl.store(out_ptr + token * out_token + head * out_head + columns, (acc / l).to(out_ptr.dtype.element_ty), columns < DV)
    if HAS_LSE:
        lse = tl.where(dead, float("-inf"), (m + tl.log2(l)) * LN2)
        tl.store(lse_ptr + token * (KV_HEADS * GROUP) + head, lse)


def empty_pieces(programs: int, num_heads_kv: int, rows: int, Dv: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(part, part_lse) of `combine`, uninitialised: two slots of each program; rows are group · q_len."""
    part = torch.empty(2 * programs, num_heads_kv, rows, Dv, dtype=torch.float32, device=device)
    return part, torch.empty(2 * programs, num_heads_kv, rows, dtype=torch.float32, device=device)


def combine(
    out: Tensor,
    out_lse: Tensor | None,
    part: Tensor,
    part_lse: Tensor,
    sinks: Tensor | None,
    unit_start: Tensor,
    num_heads_kv: int,
    q_len: int,
) -> None:
    """Launches over tokens and heads, with the split-KV kernel still running where the device can wait inside a kernel.

    Args:
        out: [B · q_len, Hq, Dv]; out_lse [B · q_len, Hq] or None.
        part: [2 · programs, Hkv, group · q_len, Dv] float32 normalised pieces; part_lse without Dv, in base 2.
    """
    T, Hq, Dv = out.shape
    programs = part.shape[0] // 2
    # With few KV heads there are many programs, and a long request has hundreds of pieces. A small batch leaves the registers
    # to hold 128 of them at once.
    wide = programs > 64 and T * Hq <= 2 * num_sms(out.device) and Dv <= 256
    early = has_dependent_launch(out.device)
    _combine_kernel[(T, Hq)](
        out,
        out if out_lse is None else out_lse,
        part,
        part_lse,
        out if sinks is None else sinks,
        unit_start,
        *out.stride()[:2],
        T // q_len,
        programs,
        KV_HEADS=num_heads_kv,
        GROUP=Hq // num_heads_kv,
        Q_LEN=q_len,
        HAS_LSE=out_lse is not None,
        HAS_SINKS=sinks is not None,
        LEAD=LEAD,
        SHARE=SHARE,
        PIECES=128 if wide else 32 if Dv <= 256 else 16,
        DV=Dv,
        BLOCK_DV=max(16, triton.next_power_of_2(Dv)),
        EARLY=early,
        num_warps=8 if wide else 4,
        **({"launch_pdl": True} if early else {}),
    )
