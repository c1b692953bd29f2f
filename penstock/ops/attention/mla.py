"""out = softmax((q_latent · cᵀ + q_rope · rᵀ) · scale) · c: one row [c | r] of a paged cache is key and value of every head."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, Make, nbytes
from penstock.core.check import DENSE, FLOATS, INDICES, optional, positive
from penstock.core.op import op
from penstock.ops.attention import _cases, _options, _reference
from penstock.ops.attention.decode import check_plan, few
from penstock.ops.attention.decode_plan import DecodePlan

MAX_LATENT = 512
MAX_ROPE = 256

SPEC = {
    "q_latent": ("Tq Hq Dc", FLOATS, DENSE),
    "q_rope": ("Tq Hq Dr", "q_latent", DENSE),
    "cache": ("P S Dk", "q_latent", DENSE),
    "page_table": ("B max_pages", INDICES, DENSE),
    "seqlens_k": ("B", INDICES, DENSE),
    "q_len": few,
    "scale": optional(positive),
    "out?": ("Tq Hq Dc", "q_latent", DENSE),
}


@op(
    "(Tensor(a!) out, Tensor(b!)? out_lse, Tensor q_latent, Tensor q_rope, Tensor cache, Tensor page_table, Tensor seqlens_k,"
    " int q_len, float? scale, Tensor[]? plan) -> ()",
    SPEC,
    alignment=("q_latent", "q_rope", "cache"),
)
def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    scale: float | None = None,
    q_len: int = 1,
    plan: DecodePlan | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head latent attention of each request's last q_len tokens, on the compressed cache (the absorbed form).

    Args:
        q_latent: [B · q_len, Hq, Dc] float16, bfloat16, float32 or float64 (CPU): the part of each query without positions,
            multiplied by its head's up-projection of the keys; kernels take Dc up to 512.
        q_rope: [B · q_len, Hq, Dr] in the same dtype, rotated; kernels take Dr up to 256.
        cache: [P, S, Dc + Dr] in the same dtype, a row the normalised latent and then the rotated key that all heads share;
            kernels take S a power of two up to 256.
        page_table: [B, max_pages] int32; entries past a request's last page may hold anything.
        seqlens_k: [B] int32, each request's keys, those of its q_len tokens included; 0 for a padding row.
        scale: of the scores; 1/√(Dc + Dr) by default. A model's own is that of its uncompressed heads: DeepSeek-V2's and V3's
            is 1/√(128 + 64), times the square of YaRN's factor.
        q_len: tokens of each request, 1 to 8; no token sees a later one.
        plan: what attention_decode_plan returned for these lengths with num_heads_kv=1 and head_dim=Dc + Dr; made on the spot
            by default.
        return_lse: also return the log-sum-exp.
        out: [B · q_len, Hq, Dc] in q_latent.dtype.
        impl: "auto", "triton", "hopper" (Dc 512 and Dr 64; "auto" takes it from 64 query rows on), "cpu" or "reference".
    Returns: out [B · q_len, Hq, Dc], to be multiplied by each head's up-projection of the values; with return_lse also lse
        [B · q_len, Hq] float32 (float64 for float64 inputs). Where no key is visible out is 0 and lse is -inf.
    Raises: ContractError when shapes, dtypes or options disagree; NotSupported when no implementation takes the call.
    Source: DeepSeek-AI, arXiv:2405.04434, section 2.1.
    """
    options = (q_len, scale)
    launch = mla_decode.pick(impl, q_latent, q_rope, cache, page_table, seqlens_k, *options, out)
    if plan is not None:
        check_plan(mla_decode.contract, plan, seqlens_k)
    out = torch.empty_like(q_latent, memory_format=torch.contiguous_format) if out is None else out
    out_lse = q_latent.new_empty(q_latent.shape[:2], dtype=_options.lse_dtype(q_latent)) if return_lse else None
    launch(out, out_lse, q_latent, q_rope, cache, page_table, seqlens_k, *options, plan)
    return out if out_lse is None else (out, out_lse)


@mla_decode.relation
def _relation(
    q_latent: Tensor, q_rope: Tensor, cache: Tensor, seqlens_k: Tensor, q_len: int, **others: object
) -> tuple[str, str] | None:
    if q_latent.shape[0] != seqlens_k.shape[0] * q_len:
        return "q_latent", f"must have B·q_len = {seqlens_k.shape[0]}·{q_len} rows, got {q_latent.shape[0]}"
    Dc, Dr = q_latent.shape[2], q_rope.shape[2]
    if cache.shape[2] != Dc + Dr:
        return "cache", f"must have rows of Dc + Dr = {Dc} + {Dr} values, got {cache.shape[2]}"
    return None


@mla_decode.check_values
def _check_values(q_latent: Tensor, cache: Tensor, page_table: Tensor, seqlens_k: Tensor, **others: object) -> None:
    named = {"q_latent": q_latent, "cache": cache, "page_table": page_table, "seqlens_k": seqlens_k}
    _options.check_pages(mla_decode.contract, cache, page_table, seqlens_k, named)


def as_one_head(q_latent: Tensor, q_rope: Tensor, cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k_cache, v_cache) of the same attention as attention_decode sees it: one KV head, the values a part of the keys."""
    keys = cache[:, :, None]
    return torch.cat([q_latent, q_rope], -1), keys, keys[..., : q_latent.shape[2]]


def _over_requests(
    attend: _reference.Attend,
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    q_len: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    q, keys, values = as_one_head(q_latent, q_rope, cache)
    ends = [b * q_len for b in range(seqlens_k.shape[0] + 1)]
    requests = _reference.paged_requests(keys, values, page_table, ends, seqlens_k)
    return _reference.over_requests(attend, q, requests, q_latent.shape[2], True, scale, -1, -1, None, None)


def _definition(attend: _reference.Attend) -> Callable[..., tuple[Tensor, Tensor]]:
    def path(*arguments: Any) -> tuple[Tensor, Tensor]:
        *given, _ = arguments
        return _over_requests(attend, *given)

    return path


mla_decode.reference(_definition(_reference.exact))
mla_decode.baseline(_definition(_reference.naive))


def _supports(q_latent: Tensor, q_rope: Tensor, cache: Tensor, **others: object) -> str | None:
    for name, width, most in (("Dc", q_latent.shape[2], MAX_LATENT), ("Dr", q_rope.shape[2], MAX_ROPE)):
        if width > most:
            return f"{name} = {width} is over {most}"
    return _options.page_size_reason(cache)


def _hopper_supports(q_latent: Tensor, q_rope: Tensor, cache: Tensor, q_len: int, **others: object) -> str | None:
    return _options.latent_tma_reason(q_latent, q_rope, cache, q_len)


def _hopper_slower(q_latent: Tensor, q_len: int, **others: object) -> str | None:
    rows = q_latent.shape[1] * q_len
    return f"its products have 64 rows, the call {rows}: the portable kernel is faster" if rows < 64 else None


# It spills what the ends of a piece need, and in one warpgroup's loop addresses of operands, two dozen words for two tiles:
# 216 bytes with Triton 3.6, 200 with 3.9.
@mla_decode.impl(
    "hopper",
    needs=("wgmma", "tma", "triton"),
    supports=_hopper_supports,
    slower=_hopper_slower,
    instructions=("HGMMA", "UTMALDG"),
    spill_bytes=216,
)
def _hopper(*arguments: Any) -> None:
    from penstock.ops.attention.mla_hopper import launch

    launch(*arguments)


# 64 rows of a latent of 512 leave a thread few registers for addresses: 152 bytes with Triton 3.6, 664 with 3.9.
@mla_decode.impl("triton", needs=("triton",), supports=_supports, spill_bytes=664)
def _triton(*arguments: Any) -> None:
    from penstock.ops.attention.mla_triton import launch

    launch(*arguments)


@mla_decode.impl("cpu", needs=("cpu",))
def _cpu(
    out: Tensor,
    out_lse: Tensor | None,
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    q_len: int,
    scale: float | None,
    plan: object,
) -> None:
    from penstock.ops.attention.decode_cpu import attend

    q, keys, values = as_one_head(q_latent, q_rope, cache)
    attend(out, out_lse, q, keys, values, page_table, seqlens_k, q_len, True, scale, -1, -1, None, None)


@mla_decode.cost
def _cost(q_latent: Tensor, q_rope: Tensor, seqlens_k: Tensor, q_len: int = 1, **options: object) -> Cost:
    Hq, Dc, Dr = q_latent.shape[1], q_latent.shape[2], q_rope.shape[2]
    k_lens = seqlens_k.tolist()
    pairs = sum(_cases.visible_pairs(q_len, m, -1, 0) for m in k_lens if m)
    moved = 2 * nbytes(q_latent) + nbytes(q_rope) + sum(k_lens) * (Dc + Dr) * q_latent.element_size()
    return Cost(bytes=moved, flops=2 * pairs * Hq * (2 * Dc + Dr))


def _case(
    name: str,
    seqlens: list[int],
    Hq: int,
    Dc: int = 512,
    Dr: int = 64,
    *,
    q_len: int = 1,
    page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    bench: bool = False,
    **options: Any,
) -> Case:
    def build(make: Make) -> dict[str, Any]:
        paged = _cases.pages(make, seqlens, 1, Dc + Dr, 1, page_size, dtype, poison=not bench)
        del paged["v_cache"]
        return {
            "q_latent": make.randn(len(seqlens) * q_len, Hq, Dc, dtype=dtype),
            "q_rope": make.randn(len(seqlens) * q_len, Hq, Dr, dtype=dtype),
            "cache": paged.pop("k_cache").squeeze(2),
            **paged,
            "q_len": q_len,
            **options,
        }

    return Case(name, build, bench)


@mla_decode.cases
def cases() -> Iterable[Case]:
    """Ragged and padded batches, then the heads of DeepSeek-V2-Lite and V3 on one and on eight devices."""
    mixed = [5, 130, 0, 64, 257, 1]
    yield _case("ragged", mixed, 16, return_lse=True)
    yield _case("ragged_128_heads", [70, 0, 129], 128, scale=0.1)
    yield _case("ragged_24_heads_float16", mixed, 24, page_size=16, dtype=torch.float16, return_lse=True)
    yield _case("ragged_32_heads_q_len_3", [70, 0, 2, 129], 32, q_len=3, page_size=128, return_lse=True)
    yield _case("ragged_small", mixed, 3, 40, 24, page_size=1, return_lse=True)
    yield _case("ragged_float16", mixed, 5, 64, 32, page_size=16, dtype=torch.float16)
    yield _case("ragged_float32", mixed, 2, 64, 16, page_size=32, dtype=torch.float32, return_lse=True)
    yield _case("ragged_q_len_3", [5, 130, 0, 2, 65], 16, 128, 32, q_len=3, return_lse=True)
    yield _case("many_rows_q_len_8", [40, 130], 20, 64, 16, q_len=8, page_size=256)
    yield _case("padded_rows_only", [0, 0], 16, 64, 16, return_lse=True)
    yield _case("empty", [], 16, 64, 16, return_lse=True)
    for name, seqlens in {"128x4k": [4096] * 128, "16x4k": [4096] * 16, "1x64k_31x4k": [65536] + [4096] * 31}.items():
        for Hq in (16, 128):
            yield _case(f"{name}_{Hq}", seqlens, Hq, scale=192**-0.5, bench=True)
