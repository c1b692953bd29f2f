"""out = softmax(softcap(q · kᵀ · scale) + mask) · v over packed requests of any lengths."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost
from penstock.core.check import DENSE, FLOATS, INDICES, boolean, count, optional, positive
from penstock.core.op import op
from penstock.ops.attention import _cases, _cpu, _options, _reference

SPEC = {
    "q": ("Tq Hq D", FLOATS, DENSE),
    "k": ("Tk Hkv D", "q", DENSE),
    "v": ("Tk Hkv Dv", "q", DENSE),
    "cu_seqlens_q": ("B+1", INDICES, DENSE),
    "cu_seqlens_k": ("B+1", INDICES, DENSE),
    "max_seqlen_q": count,
    "max_seqlen_k": count,
    "causal": boolean,
    "scale": optional(positive),
    "window_left": _options.window_size,
    "window_right": _options.window_size,
    "softcap": _options.softcap_value,
    "sinks?": ("Hq", ("q", torch.float32), DENSE),
    "out?": ("Tq Hq Dv", "q", DENSE),
}


@op(
    "(Tensor(a!) out, Tensor(b!)? out_lse, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " int max_seqlen_q, int max_seqlen_k, bool causal, float? scale, int window_left, int window_right, float? softcap,"
    " Tensor? sinks) -> ()",
    SPEC,
    alignment=("q", "k", "v", "out"),
)
def attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed requests, each over its own keys.

    Query i of a request with q_len queries and k_len keys stands on key i + k_len - q_len: causal aligns bottom-right.

    Args:
        q: [Tq, Hq, D] float16, bfloat16, float32 or float64 (CPU); D up to 256.
        k: [Tk, Hkv, D] in q.dtype; Hq a multiple of Hkv.
        v: [Tk, Hkv, Dv] in q.dtype; Dv up to 256.
        cu_seqlens_q: [B+1] int32; request b owns rows cu_seqlens_q[b] to cu_seqlens_q[b+1] of q. Rows after the last are
            padding.
        cu_seqlens_k: [B+1] int32, likewise for k and v.
        max_seqlen_q: at least the longest request's number of queries; queries beyond it are not computed.
        max_seqlen_k: at least the longest request's number of keys.
        causal: no query sees keys after its own.
        scale: of the scores; 1/√D by default.
        window: how many keys to the left and right of its own a query sees; -1 for all.
        softcap: scores become softcap · tanh(score / softcap) before the mask; None or 0 for none.
        sinks: [Hq] in q.dtype or float32, a logit per head added to the denominator.
        return_lse: also return the log-sum-exp.
        out: [Tq, Hq, Dv] in q.dtype.
        impl: "auto", "hopper", "triton", "cpu" or "reference".
    Returns: out [Tq, Hq, Dv] in q.dtype; with return_lse also lse [Tq, Hq] float32 (float64 for float64 inputs), the natural
        logarithm of the denominator. Where no key is visible, and in padding rows, out is 0 and lse is -inf.
    Raises: ContractError when shapes, dtypes or options disagree; NotSupported when no implementation takes the call.
    Source: Dao, arXiv:2307.08691 (FlashAttention-2); Shah et al., arXiv:2407.08608 (FlashAttention-3, on Hopper); softcap:
        Gemma Team, arXiv:2408.00118; sinks: Xiao et al., arXiv:2309.17453, in the form of gpt-oss.
    """
    left, right = _options.split_window(attention_prefill.contract, window)
    options = (max_seqlen_q, max_seqlen_k, causal, scale, left, right, softcap, sinks)
    launch = attention_prefill.pick(impl, q, k, v, cu_seqlens_q, cu_seqlens_k, *options, out)
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    out_lse = q.new_empty(q.shape[:2], dtype=_options.lse_dtype(q)) if return_lse else None
    launch(out, out_lse, q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    return out if out_lse is None else (out, out_lse)


@attention_prefill.relation
def _relation(q: Tensor, k: Tensor, v: Tensor, **others: object) -> tuple[str, str] | None:
    return _options.relate_heads(q, k, v, ("k", "v"))


@attention_prefill.check_values
def _check_values(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, **others: object
) -> None:
    named = {"q": q, "k": k, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    contract = attention_prefill.contract
    _options.check_offsets(contract, "cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q, named)
    _options.check_offsets(contract, "cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k, named)


@attention_prefill.reference
def _reference_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    requests = _reference.packed_requests(k, v, cu_seqlens_q, cu_seqlens_k)
    return _reference.over_requests(_reference.exact, q, requests, v.shape[2], *options)


@attention_prefill.baseline
def _baseline(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    requests = _reference.packed_requests(k, v, cu_seqlens_q, cu_seqlens_k)
    return _reference.over_requests(_reference.naive, q, requests, v.shape[2], *options)


def _supports(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, **others: object) -> str | None:
    return _options.tma_reason(q, k, v, out, 0)


# At D = 256 the accumulator alone takes 128 registers: 8 bytes spilled with Triton 3.6, 40 with 3.9.
@attention_prefill.impl(
    "hopper", needs=("wgmma", "tma", "triton"), supports=_supports, instructions=("HGMMA", "UTMALDG"), spill_bytes=40
)
def _hopper(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> None:
    from penstock.ops.attention.prefill_hopper import launch

    launch(out, out_lse, q, k, v, None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options)


# At D = 256 a tile of 64 keys spills 40 bytes with Triton 3.6 and 56 with 3.9; 32 keys spill none, and halve the work between
# two rescalings.
@attention_prefill.impl("triton", needs=("triton",), instructions=("HGMMA",), spill_bytes=56)
def _triton(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *options: Any,
) -> None:
    from penstock.ops.attention.prefill_triton import launch

    launch(out, out_lse, q, k, v, None, cu_seqlens_q, cu_seqlens_k, *options)


@attention_prefill.impl("cpu", needs=("cpu",))
def _cpu_path(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *options: Any,
) -> None:
    requests = _reference.packed_requests(k, v, cu_seqlens_q, cu_seqlens_k)
    _cpu.attend_requests(out, out_lse, q, requests, *options)


@attention_prefill.cost
def _cost(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any) -> Cost:
    Hkv, Dv = v.shape[1:]
    return _cases.attention_cost(q, Hkv, Dv, cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), **options)


@attention_prefill.cases
def cases() -> Iterable[Case]:
    """Ragged batches with every option, then the shapes of models."""
    case = _cases.prefill
    mixed = [(5, 5), (70, 70), (1, 40), (0, 9), (33, 97)]
    yield case("ragged", mixed, 4, 2, 64)
    yield case("ragged_float16_lse", mixed, 8, 1, 64, dtype=torch.float16, return_lse=True)
    yield case("ragged_float32", mixed, 3, 3, 32, dtype=torch.float32, return_lse=True)
    yield case("ragged_fewer_keys_than_queries", [(40, 9), (7, 0), (20, 20)], 2, 2, 64, return_lse=True)
    yield case("ragged_non_causal", mixed, 4, 4, 64, causal=False)
    yield case("ragged_window", [(150, 150), (20, 200)], 2, 1, 64, window=(17, -1))
    yield case("ragged_window_two_sided", [(150, 130), (20, 200)], 2, 1, 64, causal=False, window=(40, 8), return_lse=True)
    yield case("softcap", [(70, 90)], 4, 2, 64, softcap=5.0, scale=0.3)
    yield case("sinks", [(70, 90), (3, 0)], 6, 2, 64, with_sinks=True, return_lse=True)
    yield case("head_dim_80", mixed, 2, 1, 80)
    yield case("head_dim_128_padded_rows", mixed, 2, 1, 128, padding=7, return_lse=True)
    yield case("head_dim_192_128", [(70, 70), (9, 40)], 2, 2, 192, Dv=128)
    yield case("head_dim_256", [(40, 70)], 2, 1, 256)
    yield case("empty_requests", [(0, 0), (0, 0)], 2, 1, 64, return_lse=True)
    yield case("empty", [], 2, 1, 64, return_lse=True)
    for lengths in ([1024] * 8, [4096] * 4, [8192] * 2, [16384]):
        name = f"{len(lengths)}x{lengths[0] // 1024}k"
        yield case(f"{name}_32_8_d128", [(n, n) for n in lengths], 32, 8, 128, bench=True)
    eight = [(8192, 8192)] * 2
    yield case("2x8k_32_8_d64", eight, 32, 8, 64, bench=True)
    yield case("2x8k_16_4_d256", eight, 16, 4, 256, bench=True)
    yield case("2x8k_32_8_d128_non_causal", eight, 32, 8, 128, causal=False, bench=True)
    yield case("2x8k_32_8_d128_window_1024", eight, 32, 8, 128, window=(1024, -1), bench=True)
