"""out = softmax(softcap(q · kᵀ · scale) + mask) · v for the newest one to eight tokens of each request."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost
from penstock.core.check import DENSE, FLOATS, INDICES, Contract, anything, boolean, optional, positive
from penstock.core.op import op
from penstock.ops.attention import _cases, _cpu, _options, _reference
from penstock.ops.attention._reference import FP8
from penstock.ops.attention.decode_plan import DecodePlan

MAX_Q_LEN = 8


def few(value: object) -> str | None:
    """A count of tokens that decode takes."""
    good = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_Q_LEN
    return None if good else f"an integer from 1 to {MAX_Q_LEN}"


SPEC = {
    "q": ("Tq Hq D", (*FLOATS, FP8), DENSE),
    "k_cache": ("P S Hkv D", "q", DENSE),
    "v_cache": ("P S Hkv Dv", "q"),
    "page_table": ("B max_pages", INDICES, DENSE),
    "seqlens_k": ("B", INDICES, DENSE),
    "q_len": few,
    "causal": boolean,
    "scale": optional(positive),
    "window_left": _options.window_size,
    "window_right": _options.window_size,
    "softcap": _options.softcap_value,
    "sinks?": ("Hq", FLOATS, DENSE),
    "q_scale": anything,
    "k_scale": anything,
    "v_scale": anything,
    "out?": ("Tq Hq Dv", FLOATS, DENSE),
}


@op(
    "(Tensor(a!) out, Tensor(b!)? out_lse, Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seqlens_k,"
    " int q_len, bool causal, float? scale, int window_left, int window_right, float? softcap, Tensor? sinks,"
    " Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, Tensor[]? plan) -> ()",
    SPEC,
    alignment=("q", "k_cache", "v_cache", "k_scale"),
)
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    q_len: int = 1,
    plan: DecodePlan | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each request's last q_len tokens over its keys in a paged cache.

    Args:
        q: [B · q_len, Hq, D] float16, bfloat16, float32, float64 (CPU) or float8_e4m3fn; D up to 256; a request's rows are
            consecutive.
        k_cache: [P, S, Hkv, D] in q.dtype; NHD or HND by strides; Hq a multiple of Hkv; kernels take S a power of two up
            to 256.
        v_cache: [P, S, Hkv, Dv] in q.dtype; Dv up to 256; FP8 values may be transposed inside their pages.
        page_table: [B, max_pages] int32; entries past a request's last page may hold anything.
        seqlens_k: [B] int32, each request's keys, those of its q_len tokens included; 0 for a padding row.
        q_len: tokens of each request, 1 to 8.
        plan: what attention_decode_plan returned for these lengths; made on the spot by default.
        causal: no query sees keys after its own.
        scale: of the scores; 1/√D by default.
        window: how many keys to the left and right of its own a query sees; -1 for all.
        softcap: scores become softcap · tanh(score / softcap) before the mask; None or 0 for none.
        sinks: [Hq] in q.dtype or float32, a logit per head added to the denominator.
        q_scale: of FP8 queries, float32: [1], [Hq], or [B · q_len, Hq] for each token and head; 1 by default.
        k_scale: of FP8 keys, float32: [1], [Hkv], or [P, S, Hkv] for each token and head; 1 by default.
        v_scale: of FP8 values, float32: [1] or [Hkv]; 1 by default.
        return_lse: also return the log-sum-exp.
        out: [B · q_len, Hq, Dv] in q.dtype; for FP8 queries bfloat16, float16 or float32.
        impl: "auto", "triton", "hopper", "cpu" or "reference".
    FP8 queries and keys are multiplied as they are; a weight exp(s - m) is stored as e4m3(256 · exp(s - m)) against the running
    maximum m, and the denominator sums what is not rounded.

    Returns: out [B · q_len, Hq, Dv] in q.dtype, or bfloat16 for FP8 queries; with return_lse also lse [B · q_len, Hq] float32
        (float64 for float64 inputs), the natural logarithm of the denominator. Where no key is visible out is 0 and lse is
        -inf.
    Raises: ContractError when shapes, dtypes or options disagree; NotSupported when no implementation takes the call.
    Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Kwon et al., arXiv:2309.06180 (paged KV cache).
    """
    left, right = _options.split_window(attention_decode.contract, window)
    options = (q_len, causal, scale, left, right, softcap, sinks, q_scale, k_scale, v_scale)
    launch = attention_decode.pick(impl, q, k_cache, v_cache, page_table, seqlens_k, *options, out)
    if plan is not None:
        check_plan(attention_decode.contract, plan, seqlens_k)
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3], dtype=_options.out_dtype(q))
    out_lse = q.new_empty(q.shape[:2], dtype=_options.lse_dtype(q)) if return_lse else None
    launch(out, out_lse, q, k_cache, v_cache, page_table, seqlens_k, *options, plan)
    return out if out_lse is None else (out, out_lse)


def check_plan(contract: Contract, plan: DecodePlan, seqlens_k: Tensor) -> None:
    """ContractError unless the plan is one for as many requests, on their device; its values are not read."""
    B = seqlens_k.shape[0]
    if not isinstance(plan, (tuple, list)) or len(plan) != 4 or not all(isinstance(part, Tensor) for part in plan):
        raise contract.error("plan", f"must be what attention_decode_plan returned, got {type(plan).__name__}", {})
    sizes = [part.numel() for part in plan]
    if sizes[:2] != [B + 1, B] or sizes[2] == 0:
        raise contract.error("plan", f"must be made for B = {B} requests, got {sizes[1]}", {"seqlens_k": seqlens_k})
    if any(part.device != seqlens_k.device or part.dtype != torch.int32 for part in plan):
        raise contract.error("plan", f"must be int32 on {seqlens_k.device}", DecodePlan(*plan)._asdict())


@attention_decode.relation
def _relation(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    q_len: int,
    q_scale: object,
    k_scale: object,
    v_scale: object,
    **others: object,
) -> tuple[str, str] | None:
    if q.shape[0] != seqlens_k.shape[0] * q_len:
        return "q", f"must have B·q_len = {seqlens_k.shape[0]}·{q_len} rows, got {q.shape[0]}"
    heads = _options.relate_heads(q, k_cache, v_cache, ("k_cache", "v_cache"))
    return heads or _options.relate_scales(q, k_cache, v_cache, q_scale, k_scale, v_scale)


@attention_decode.check_values
def _check_values(q: Tensor, k_cache: Tensor, page_table: Tensor, seqlens_k: Tensor, **others: object) -> None:
    named = {"q": q, "k_cache": k_cache, "page_table": page_table, "seqlens_k": seqlens_k}
    _options.check_pages(attention_decode.contract, k_cache, page_table, seqlens_k, named)


def _definition(exact: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def path(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        page_table: Tensor,
        seqlens_k: Tensor,
        q_len: int,
        *options_and_plan: Any,
    ) -> tuple[Tensor, Tensor]:
        *options, q_scale, k_scale, v_scale, _ = options_and_plan
        rounded = _reference.narrow_weights if q.dtype is FP8 else _reference.naive
        dtype = _options.out_dtype(q)
        q, k_cache, v_cache = _reference.dequantized(q, k_cache, v_cache, q_scale, k_scale, v_scale)
        ends = [b * q_len for b in range(seqlens_k.shape[0] + 1)]
        requests = _reference.paged_requests(k_cache, v_cache, page_table, ends, seqlens_k)
        attend = _reference.exact if exact else rounded
        return _reference.over_requests(attend, q, requests, v_cache.shape[3], *options, dtype=dtype)

    return path


attention_decode.reference(_definition(exact=True))
attention_decode.baseline(_definition(exact=False))


def _supports(k_cache: Tensor, **others: object) -> str | None:
    return _options.page_size_reason(k_cache)


def _hopper_supports(q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, **others: object) -> str | None:
    if q.dtype is FP8:
        return _options.fp8_tma_reason(q, k_cache, v_cache, None, k_scale, block=64, widest=_options.MAX_HEAD_DIM)
    return _options.tma_reason(q, k_cache, v_cache, None, k_cache.shape[1])


# 64 query rows spill 24 bytes, 32 at D = 256 136.
@attention_decode.impl(
    "hopper",
    needs=("wgmma", "tma", "triton"),
    supports=_hopper_supports,
    instructions=("HGMMA", "QGMMA", "UTMALDG"),
    spill_bytes=136,
)
def _hopper(*arguments: Any) -> None:
    from penstock.ops.attention.decode_hopper import launch

    launch(*arguments)


@attention_decode.impl("triton", needs=("triton",), supports=_supports)
def _triton(*arguments: Any) -> None:
    from penstock.ops.attention.decode_triton import launch

    launch(*arguments)


@attention_decode.impl("cpu", needs=("cpu",))
def _cpu_path(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    q_len: int,
    *options_and_plan: Any,
) -> None:
    from penstock.ops.attention.decode_cpu import attend

    *options, q_scale, k_scale, v_scale, _ = options_and_plan
    if q.dtype is FP8:
        ends = [b * q_len for b in range(seqlens_k.shape[0] + 1)]
        caches, scales = (k_cache, v_cache), (q_scale, k_scale, v_scale)
        q, requests = _cpu.fp8_requests(q, *caches, page_table, ends, seqlens_k, options[2], *scales)
        _cpu.attend_requests(out, out_lse, q, requests, *options)
        return
    attend(out, out_lse, q, k_cache, v_cache, page_table, seqlens_k, q_len, *options)


@attention_decode.cost
def _cost(q: Tensor, v_cache: Tensor, seqlens_k: Tensor, q_len: int = 1, **options: Any) -> Cost:
    Hkv, Dv = v_cache.shape[2:]
    k_lens = seqlens_k.tolist()
    return _cases.attention_cost(q, Hkv, Dv, [q_len if m else 0 for m in k_lens], k_lens, **options)


@attention_decode.cases
def cases() -> Iterable[Case]:
    """Ragged and padded batches with every option, then the batches of a server."""
    case = _cases.decode
    mixed = [5, 130, 0, 64, 257, 1]
    yield case("ragged", mixed, 4, 2, 64)
    yield case("ragged_lse", mixed, 8, 1, 128, page_size=64, return_lse=True)
    yield case("ragged_head_major", mixed, 8, 2, 64, page_size=32, head_major=True)
    yield case("ragged_page_1", [5, 90, 0, 33], 3, 1, 64, page_size=1)
    yield case("ragged_page_256", mixed, 2, 2, 64, page_size=256)
    yield case("ragged_float16", mixed, 4, 1, 64, dtype=torch.float16, return_lse=True)
    yield case("ragged_float32", mixed, 3, 3, 32, dtype=torch.float32, return_lse=True)
    yield case("ragged_q_len_4", [5, 130, 0, 3, 65], 6, 2, 64, q_len=4, return_lse=True)
    yield case("ragged_q_len_8", [200, 7, 64], 12, 1, 64, q_len=8)
    yield case("ragged_window", [150, 3, 0, 300], 2, 1, 64, window=(70, -1), return_lse=True)
    yield case("ragged_window_q_len_3", [150, 3, 300], 2, 1, 64, window=(20, -1), q_len=3)
    yield case("ragged_non_causal_q_len_2", [150, 1, 64], 2, 1, 64, causal=False, q_len=2)
    yield case("softcap_sinks", [150, 0, 64, 7], 4, 2, 64, softcap=5.0, with_sinks=True, return_lse=True)
    yield case("ragged_fp8", mixed, 4, 2, 64, dtype=FP8, with_scales="static", return_lse=True)
    fp8: dict[str, Any] = {"dtype": FP8, "with_scales": "token", "transposed": True}
    yield case("ragged_fp8_token_transposed", mixed, 8, 1, 128, page_size=64, **fp8, return_lse=True)
    yield case("ragged_fp8_q_len_3", [150, 3, 300], 6, 2, 64, q_len=3, window=(120, -1), softcap=5.0, with_sinks=True, **fp8)
    yield case("fp8_head_dim_192_128", [40, 130], 2, 2, 192, Dv=128, dtype=FP8)
    yield case("head_dim_80", mixed, 2, 1, 80)
    yield case("head_dim_192_128", [40, 130], 2, 2, 192, Dv=128)
    yield case("head_dim_256", [40, 130], 4, 1, 256)
    yield case("many_rows", [40, 130], 16, 2, 128, q_len=8)
    yield case("many_rows_head_dim_256", [70], 8, 1, 256, q_len=8)
    yield case("padded_rows_only", [0, 0, 0], 4, 2, 64, return_lse=True)
    yield case("empty", [], 2, 1, 64, return_lse=True)
    batches = {
        "64x512": [512] * 64,
        "64x4k": [4096] * 64,
        "32x128_32x4k": [128] * 32 + [4096] * 32,
        "1x16k_15x64": [16384] + [64] * 15,
        "1x64k_31x4k": [65536] + [4096] * 31,
        "1x128k_31x4k": [131072] + [4096] * 31,
    }
    for name, seqlens in batches.items():
        for Hq, Hkv in ((8, 1), (32, 8), (64, 8)):
            yield case(f"{name}_{Hq}_{Hkv}_d128", seqlens, Hq, Hkv, 128, page_size=64, bench=True)
            yield case(f"{name}_{Hq}_{Hkv}_d128_fp8", seqlens, Hq, Hkv, 128, page_size=64, bench=True, **fp8)
