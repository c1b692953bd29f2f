"""out = softmax(softcap(q · kᵀ · scale) + mask) · v over packed queries, and keys that stand in pages."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost
from penstock.core.check import DENSE, FLOATS, INDICES, anything, boolean, count, optional, positive
from penstock.core.op import op
from penstock.ops.attention import _cases, _cpu, _options, _reference
from penstock.ops.attention._reference import FP8

SPEC = {
    "q": ("Tq Hq D", (*FLOATS, FP8), DENSE),
    "k_cache": ("P S Hkv D", "q", DENSE),
    "v_cache": ("P S Hkv Dv", "q"),
    "page_table": ("B max_pages", INDICES, DENSE),
    "cu_seqlens_q": ("B+1", INDICES, DENSE),
    "seqlens_k": ("B", INDICES, DENSE),
    "max_seqlen_q": count,
    "max_seqlen_k": optional(count),
    "causal": boolean,
    "scale": optional(positive),
    "window_left": _options.window_size,
    "window_right": _options.window_size,
    "softcap": _options.softcap_value,
    "sinks?": ("Hq", (*FLOATS, torch.float32), DENSE),
    "q_scale": anything,
    "k_scale": anything,
    "v_scale": anything,
    "block_mask?": ("B Hq q_blocks k_blocks", (torch.uint8,), DENSE),
    "out?": ("Tq Hq Dv", FLOATS, DENSE),
}


@op(
    "(Tensor(a!) out, Tensor(b!)? out_lse, Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor cu_seqlens_q,"
    " Tensor seqlens_k, int max_seqlen_q, int? max_seqlen_k, bool causal, float? scale, int window_left, int window_right,"
    " float? softcap, Tensor? sinks, Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, Tensor? block_mask) -> ()",
    SPEC,
    alignment=("q", "k_cache", "v_cache", "k_scale", "out"),
)
def attention_prefill_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_mask: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed queries over keys in a paged cache: whole prompts, or chunks of them after a cached prefix.

    Query i of a request with q_len queries and k_len keys stands on key i + k_len - q_len: causal aligns bottom-right.

    Args:
        q: [Tq, Hq, D] float16, bfloat16, float32, float64 (CPU) or float8_e4m3fn; D up to 256.
        k_cache: [P, S, Hkv, D] in q.dtype; NHD or HND by strides; Hq a multiple of Hkv; kernels take S a power of two up
            to 256.
        v_cache: [P, S, Hkv, Dv] in q.dtype; Dv up to 256; FP8 values may be transposed inside their
            pages, which the Hopper kernel asks for, with pages of 128 or 256.
        page_table: [B, max_pages] int32; entries past a request's last page may hold anything.
        cu_seqlens_q: [B+1] int32; request b owns rows cu_seqlens_q[b] to cu_seqlens_q[b+1] of q. Rows after the last are
            padding.
        seqlens_k: [B] int32, each request's keys, those of its queries included: they are already stored.
        max_seqlen_q: at least the longest request's number of queries; queries beyond it are not computed.
        max_seqlen_k: at least the longest request's number of keys, to order work for the L2; max_pages · S by default.
        causal: no query sees keys after its own.
        scale: of the scores; 1/√D by default.
        window: how many keys to the left and right of its own a query sees; -1 for all.
        softcap: scores become softcap · tanh(score / softcap) before the mask; None or 0 for none.
        sinks: [Hq] in q.dtype or float32, a logit per head added to the denominator.
        q_scale: of FP8 queries, float32: [1], [Hq], or [Tq, Hq] for each token and head; 1 by default. x ≈ stored · scale.
        k_scale: of FP8 keys, float32: [1], [Hkv], or [P, S, Hkv] for each token and head; 1 by default.
        v_scale: of FP8 values, float32: [1] or [Hkv]; 1 by default.
        block_mask: [B, Hq, q_blocks, k_blocks] uint8, at least as many blocks as the longest request has: where it is 0, the
            128 queries and 128 keys of a request that it stands for do not meet. Tiles are skipped.
        return_lse: also return the log-sum-exp.
        out: [Tq, Hq, Dv] in q.dtype; for FP8 queries bfloat16, float16 or float32.
        impl: "auto", "hopper", "triton", "cpu" or "reference".
    FP8 queries and keys are multiplied as they are; a weight exp(s - m) is stored as e4m3(256 · exp(s - m)) against the running
    maximum m, and the denominator sums what is not rounded.

    Returns: out [Tq, Hq, Dv] in q.dtype, or bfloat16 for FP8 queries; with return_lse also lse [Tq, Hq] float32 (float64 for
        float64 inputs), the natural logarithm of the denominator. Where no key is visible, and in padding rows, out is 0 and
        lse is -inf.
    Raises: ContractError when shapes, dtypes or options disagree; NotSupported when no implementation takes the call.
    Source: Dao, arXiv:2307.08691 (FlashAttention-2); Kwon et al., arXiv:2309.06180 (paged KV cache);
        Shah et al., arXiv:2407.08608 (FlashAttention-3: FP8, and the kernel for Hopper).
    """
    left, right = _options.split_window(attention_prefill_paged.contract, window)
    options = (max_seqlen_q, max_seqlen_k, causal, scale, left, right, softcap, sinks, q_scale, k_scale, v_scale, block_mask)
    tensors = (q, k_cache, v_cache, page_table, cu_seqlens_q, seqlens_k)
    launch = attention_prefill_paged.pick(impl, *tensors, *options, out)
    if out is None:
        out = q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3], dtype=_options.out_dtype(q))
    out_lse = q.new_empty(q.shape[:2], dtype=_options.lse_dtype(q)) if return_lse else None
    launch(out, out_lse, *tensors, *options)
    return out if out_lse is None else (out, out_lse)


@attention_prefill_paged.relation
def _relation(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int | None,
    q_scale: object,
    k_scale: object,
    v_scale: object,
    block_mask: Tensor | None,
    **others: object,
) -> tuple[str, str] | None:
    longest = page_table.shape[1] * k_cache.shape[1] if max_seqlen_k is None else max_seqlen_k
    return (
        _options.relate_heads(q, k_cache, v_cache, ("k_cache", "v_cache"))
        or _options.relate_scales(q, k_cache, v_cache, q_scale, k_scale, v_scale)
        or _options.relate_block_mask(block_mask, q, seqlens_k, max_seqlen_q, longest)
    )


@attention_prefill_paged.check_values
def _check_values(
    q: Tensor,
    k_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int | None,
    **others: object,
) -> None:
    named = {"q": q, "k_cache": k_cache, "page_table": page_table, "cu_seqlens_q": cu_seqlens_q, "seqlens_k": seqlens_k}
    contract = attention_prefill_paged.contract
    _options.check_offsets(contract, "cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q, named)
    _options.check_pages(contract, k_cache, page_table, seqlens_k, named)
    longest = int(seqlens_k.max()) if seqlens_k.numel() else 0
    if max_seqlen_k is not None and longest > max_seqlen_k:
        raise contract.error("max_seqlen_k", f"must be at least {longest}, got {max_seqlen_k}", named)


def _definition(exact: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    def path(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        page_table: Tensor,
        cu_seqlens_q: Tensor,
        seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int | None,
        *options_and_scales: Any,
    ) -> tuple[Tensor, Tensor]:
        *options, q_scale, k_scale, v_scale, block_mask = options_and_scales
        rounded = _reference.narrow_weights if q.dtype is FP8 else _reference.naive
        dtype = _options.out_dtype(q)
        q, k_cache, v_cache = _reference.dequantized(q, k_cache, v_cache, q_scale, k_scale, v_scale)
        requests = _reference.paged_requests(k_cache, v_cache, page_table, cu_seqlens_q.tolist(), seqlens_k)
        attend = _reference.exact if exact else rounded
        return _reference.over_requests(attend, q, requests, v_cache.shape[3], *options, block_mask=block_mask, dtype=dtype)

    return path


attention_prefill_paged.reference(_definition(exact=True))
attention_prefill_paged.baseline(_definition(exact=False))


def _bounded(
    launch: Callable[..., None],
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int | None,
    *options: Any,
) -> None:
    """Launches with the most keys that a request can have, where the call does not say."""
    if max_seqlen_k is None:
        max_seqlen_k = page_table.shape[1] * k_cache.shape[1]
    tensors = (q, k_cache, v_cache, page_table, cu_seqlens_q, seqlens_k)
    launch(out, out_lse, *tensors, max_seqlen_q, max_seqlen_k, *options)


def _hopper_supports(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor | None,
    k_scale: Tensor | None,
    **others: object,
) -> str | None:
    if q.dtype is FP8:
        return _options.fp8_tma_reason(q, k_cache, v_cache, out, k_scale)
    return _options.tma_reason(q, k_cache, v_cache, out, k_cache.shape[1])


# At D = 256 up to 40 bytes, as where keys are packed; FP8 with a cap and a window 24 with Triton 3.6, 72 with 3.9.
@attention_prefill_paged.impl(
    "hopper",
    needs=("wgmma", "tma", "triton"),
    supports=_hopper_supports,
    instructions=("HGMMA", "QGMMA", "UTMALDG"),
    spill_bytes=72,
)
def _hopper(*arguments: Any) -> None:
    from penstock.ops.attention.prefill_hopper import launch

    _bounded(launch, *arguments)


def _triton_supports(k_cache: Tensor, **others: object) -> str | None:
    return _options.page_size_reason(k_cache)


# At D = 256 a tile of 64 keys spills up to 96 bytes; 32 keys spill none, and halve the work between two rescalings.
@attention_prefill_paged.impl("triton", needs=("triton",), supports=_triton_supports, instructions=("HGMMA",), spill_bytes=96)
def _triton(*arguments: Any) -> None:
    from penstock.ops.attention.prefill_triton import launch

    _bounded(launch, *arguments)


@attention_prefill_paged.impl("cpu", needs=("cpu",))
def _cpu_path(
    out: Tensor,
    out_lse: Tensor | None,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int | None,
    *options_and_scales: Any,
) -> None:
    *options, q_scale, k_scale, v_scale, block_mask = options_and_scales
    # Where blocks are masked keys are counted from the first.
    window_left = options[2] if block_mask is None else -1
    ends = cu_seqlens_q.tolist()
    if q.dtype is FP8:
        q, requests = _cpu.fp8_requests(
            q, k_cache, v_cache, page_table, ends, seqlens_k, window_left, q_scale, k_scale, v_scale
        )
    else:
        requests = _cpu.paged_requests(k_cache, v_cache, page_table, ends, seqlens_k, window_left)
    _cpu.attend_requests(out, out_lse, q, requests, *options, block_mask=block_mask)


@attention_prefill_paged.cost
def _cost(q: Tensor, k_cache: Tensor, v_cache: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, **options: Any) -> Cost:
    Hkv, Dv = v_cache.shape[2:]
    return _cases.attention_cost(q, Hkv, Dv, cu_seqlens_q.diff().tolist(), seqlens_k.tolist(), **options)


@attention_prefill_paged.cases
def cases() -> Iterable[Case]:
    """Prompts, chunks after a prefix, every page size, both cache layouts; then the shapes of models."""
    case = _cases.paged_prefill
    mixed = [(5, 5), (70, 70), (1, 40), (0, 9), (33, 97)]
    yield case("ragged", mixed, 4, 2, 64)
    yield case("ragged_page_1", mixed, 2, 1, 64, page_size=1)
    yield case("ragged_page_256_lse", mixed, 2, 2, 64, page_size=256, return_lse=True)
    yield case("ragged_page_64_head_major", mixed, 4, 1, 128, page_size=64, head_major=True)
    yield case("ragged_float16", mixed, 4, 2, 64, dtype=torch.float16, return_lse=True)
    yield case("ragged_float32", mixed, 3, 1, 32, dtype=torch.float32, return_lse=True)
    yield case("ragged_window", [(60, 150), (20, 200)], 2, 1, 64, window=(17, -1))
    yield case("softcap_sinks", [(30, 90), (3, 2)], 4, 2, 64, softcap=5.0, with_sinks=True, return_lse=True)
    yield case("head_dim_96_padded_rows", mixed, 2, 1, 96, padding=7, return_lse=True)
    yield case("head_dim_192_128", [(40, 70), (9, 40)], 2, 2, 192, Dv=128, page_size=32)
    yield case("head_dim_256", [(70, 90)], 2, 1, 256)
    fp8: dict[str, Any] = {"dtype": FP8, "with_scales": "static"}
    yield case("ragged_fp8", mixed, 4, 2, 64, **fp8, return_lse=True)
    yield case("ragged_fp8_token_transposed", mixed, 4, 1, 128, dtype=FP8, with_scales="token", transposed=True, page_size=64)
    yield case("fp8_options", [(30, 90), (3, 2)], 4, 2, 64, **fp8, softcap=5.0, with_sinks=True, window=(40, -1))
    turned: dict[str, Any] = {"dtype": FP8, "transposed": True, "page_size": 128}
    yield case(
        "ragged_fp8_page_128_transposed", [*mixed, (140, 300)], 4, 2, 128, **turned, with_scales="token", return_lse=True
    )
    yield case("fp8_options_transposed", [(30, 90), (140, 300), (3, 2)], 4, 4, 64, **turned, with_scales="static", softcap=5.0,
               with_sinks=True, window=(140, -1), return_lse=True)  # fmt: skip
    yield case("fp8_head_dim_192_128", [(40, 70), (9, 40)], 2, 2, 192, Dv=128, page_size=32, dtype=FP8)
    blocks = [(300, 300), (5, 260), (130, 40), (0, 9)]
    yield case("ragged_block_mask", blocks, 4, 2, 64, with_blocks=0.5, return_lse=True)
    yield case("block_mask_float32", [(140, 270)], 2, 1, 32, dtype=torch.float32, with_blocks=0.4, window=(150, -1))
    yield case("block_mask_fp8_sinks", [(140, 270)], 2, 1, 64, with_blocks=0.4, with_sinks=True, **fp8)
    yield case("fp8_block_mask_transposed", [(140, 300), (0, 9)], 2, 1, 64, **turned, with_scales="token", with_blocks=0.5,
               window=(150, -1), return_lse=True)  # fmt: skip
    yield case("block_mask_head_dim_256", [(140, 270)], 2, 1, 256, with_blocks=0.4, return_lse=True)
    yield case("empty_requests", [(0, 0), (0, 0)], 2, 1, 64)
    yield case("empty", [], 2, 1, 64, return_lse=True)
    yield case("4x4k_32_8_d128", [(4096, 4096)] * 4, 32, 8, 128, page_size=64, bench=True)
    yield case("1x16k_32_8_d128", [(16384, 16384)], 32, 8, 128, page_size=64, bench=True)
    yield case("8x512_after_8k_32_8_d128", [(512, 8704)] * 8, 32, 8, 128, page_size=64, bench=True)
    for name, lengths in {"4x4k": [(4096, 4096)] * 4, "2x8k": [(8192, 8192)] * 2, "1x16k": [(16384, 16384)]}.items():
        fp8 = {"dtype": FP8, "with_scales": "token", "transposed": True}
        yield case(f"{name}_32_8_d128_fp8", lengths, 32, 8, 128, page_size=128, bench=True, **fp8)
    yield case("1x16k_32_8_d128_blocks_25", [(16384, 16384)], 32, 8, 128, page_size=128, with_blocks=0.25, bench=True)
    yield case("4x4k_32_8_d128_page_16", [(4096, 4096)] * 4, 32, 8, 128, page_size=16, bench=True)
