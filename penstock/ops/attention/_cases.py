"""Drawing of the attention operators' inputs, and what a call must cost at least."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, Make, nbytes

Lengths = Sequence[tuple[int, int]]


def _offsets(make: Make, lengths: Sequence[int]) -> Tensor:
    return make.tensor([0, *accumulate(lengths)])


def _sinks(make: Make, heads: int, wanted: bool) -> dict[str, Tensor]:
    return {"sinks": make.randn(heads, dtype=torch.float32)} if wanted else {}


def prefill(
    name: str,
    lengths: Lengths,
    Hq: int,
    Hkv: int,
    D: int,
    *,
    Dv: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    padding: int = 0,
    with_sinks: bool = False,
    bench: bool = False,
    **options: Any,
) -> Case:
    """A case of attention_prefill; `lengths` holds (q_len, k_len) of each request, `padding` rows follow the last."""

    def build(make: Make) -> dict[str, Any]:
        q_lens, k_lens = [q for q, _ in lengths], [k for _, k in lengths]
        return {
            "q": make.randn(sum(q_lens) + padding, Hq, D, dtype=dtype),
            "k": make.randn(sum(k_lens) + padding, Hkv, D, dtype=dtype),
            "v": make.randn(sum(k_lens) + padding, Hkv, Dv or D, dtype=dtype),
            "cu_seqlens_q": _offsets(make, q_lens),
            "cu_seqlens_k": _offsets(make, k_lens),
            "max_seqlen_q": max(q_lens, default=0),
            "max_seqlen_k": max(k_lens, default=0),
            **_sinks(make, Hq, with_sinks),
            **options,
        }

    return Case(name, build, bench)


def pages(
    make: Make,
    seqlens: Sequence[int],
    Hkv: int,
    D: int,
    Dv: int,
    page_size: int,
    dtype: torch.dtype,
    head_major: bool = False,
    transposed: bool = False,
    poison: bool = True,
) -> dict[str, Tensor]:
    """A paged cache with its pages in random order; slots and pages that no request owns hold NaN when `poison`.

    head_major: a head's slots of a page are one run; transposed: so are a head's values of one dimension.
    """
    counts = [-(-length // page_size) for length in seqlens]
    num_pages = sum(counts) + 1
    order = make.permutation(num_pages)

    def cache(width: int, transposed: bool = False) -> Tensor:
        if transposed:
            return make.randn(num_pages, Hkv, width, page_size, dtype=dtype).permute(0, 3, 1, 2)
        if head_major:
            return make.randn(num_pages, Hkv, page_size, width, dtype=dtype).transpose(1, 2)
        return make.randn(num_pages, page_size, Hkv, width, dtype=dtype)

    k_cache, v_cache = cache(D), cache(Dv, transposed)
    # The last page of the order is nobody's; it fills the table's unused entries.
    table = order[-1:].expand(len(seqlens), max(counts, default=0)).clone()
    start = 0
    for b, (count, length) in enumerate(zip(counts, seqlens, strict=True)):
        own = order[start : start + count]
        table[b, :count] = own
        start += count
        if poison and make.device.type != "meta" and length % page_size:
            for each in (k_cache, v_cache):
                each[int(own[-1]), length % page_size :] = float("nan")
    if poison and make.device.type != "meta":
        for each in (k_cache, v_cache):
            each[int(order[-1])] = float("nan")
    return {"k_cache": k_cache, "v_cache": v_cache, "page_table": table, "seqlens_k": make.tensor(list(seqlens))}


def _scales(make: Make, kind: str, rows: int, Hq: int, cache: Tensor) -> dict[str, Tensor]:
    """Scales of FP8 values: "static" for each head, "token" for each token and head of queries and keys."""
    if not kind:
        return {}
    P, S, Hkv, _ = cache.shape

    def scale(*shape: int) -> Tensor:
        return make.randn(*shape, dtype=torch.float32).abs_().mul_(0.5).add_(0.5)

    if kind == "static":
        return {"q_scale": scale(Hq), "k_scale": scale(Hkv), "v_scale": scale(1)}
    return {"q_scale": scale(rows, Hq), "k_scale": scale(P, Hkv, S).transpose(1, 2), "v_scale": scale(Hkv)}


def _block_mask(make: Make, share: float, lengths: Lengths, Hq: int) -> dict[str, Tensor]:
    """A random block mask of which `share` is set, and the first request's first block of rows of head 0 sees nothing."""
    if not share:
        return {}
    blocks = [-(-max(lens, default=0) // 128) for lens in zip(*lengths, strict=True)]
    mask = (make.integers(0, 1000, len(lengths), Hq, *blocks) < 1000 * share).to(torch.uint8)
    if make.device.type != "meta":
        mask[0, 0, 0] = 0
    return {"block_mask": mask}


def paged_prefill(
    name: str,
    lengths: Lengths,
    Hq: int,
    Hkv: int,
    D: int,
    *,
    Dv: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 16,
    head_major: bool = False,
    transposed: bool = False,
    padding: int = 0,
    with_sinks: bool = False,
    with_scales: str = "",
    with_blocks: float = 0.0,
    bench: bool = False,
    **options: Any,
) -> Case:
    """A case of attention_prefill_paged; `lengths` holds (q_len, k_len) of each request."""

    def build(make: Make) -> dict[str, Any]:
        q_lens, k_lens = [q for q, _ in lengths], [k for _, k in lengths]
        rows = sum(q_lens) + padding
        paged = pages(make, k_lens, Hkv, D, Dv or D, page_size, dtype, head_major, transposed, poison=not bench)
        return {
            "q": make.randn(rows, Hq, D, dtype=dtype),
            **paged,
            "cu_seqlens_q": _offsets(make, q_lens),
            "max_seqlen_q": max(q_lens, default=0),
            **({"max_seqlen_k": max(k_lens)} if with_blocks else {}),
            **_sinks(make, Hq, with_sinks),
            **_scales(make, with_scales, rows, Hq, paged["k_cache"]),
            **_block_mask(make, with_blocks, lengths, Hq),
            **options,
        }

    return Case(name, build, bench)


def decode(
    name: str,
    seqlens: Sequence[int],
    Hq: int,
    Hkv: int,
    D: int,
    *,
    Dv: int | None = None,
    q_len: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 16,
    head_major: bool = False,
    transposed: bool = False,
    with_sinks: bool = False,
    with_scales: str = "",
    bench: bool = False,
    **options: Any,
) -> Case:
    """A case of attention_decode; a length of 0 is a padding row."""

    def build(make: Make) -> dict[str, Any]:
        rows = len(seqlens) * q_len
        paged = pages(make, seqlens, Hkv, D, Dv or D, page_size, dtype, head_major, transposed, poison=not bench)
        return {
            "q": make.randn(rows, Hq, D, dtype=dtype),
            **paged,
            "q_len": q_len,
            **_sinks(make, Hq, with_sinks),
            **_scales(make, with_scales, rows, Hq, paged["k_cache"]),
            **options,
        }

    return Case(name, build, bench)


def visible_pairs(q_len: int, k_len: int, left: int, right: int) -> int:
    """(query, key) pairs that the mask leaves."""
    own = torch.arange(k_len - q_len, k_len, dtype=torch.int64)
    last = (own + right).clamp(max=k_len - 1) if right >= 0 else torch.full_like(own, k_len - 1)
    first = (own - left).clamp(min=0) if left >= 0 else torch.zeros_like(own)
    return int((last - first + 1).clamp(min=0).sum())


def attention_cost(
    q: Tensor,
    Hkv: int,
    Dv: int,
    q_lens: Sequence[int],
    k_lens: Sequence[int],
    *,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    block_mask: Tensor | None = None,
    **others: Any,
) -> Cost:
    """Visible pairs cost 2 · (D + Dv) operations a head; keys that some query sees, queries and results are moved once.

    Of a block mask the share of its elements that are set is taken for the share of pairs that meet.
    """
    _, Hq, D = q.shape
    left, right = window
    right = 0 if causal else right
    pairs = sum(visible_pairs(n, m, left, right) for n, m in zip(q_lens, k_lens, strict=True))
    seen = sum(min(m, left + n) if left >= 0 else m for n, m in zip(q_lens, k_lens, strict=True) if n)
    quantized = q.element_size() == 1
    moved = nbytes(q) + q.shape[0] * Hq * Dv * max(2, q.element_size()) + seen * Hkv * (D + Dv) * q.element_size()
    share = 1.0 if block_mask is None else float(block_mask.float().mean())
    return Cost(bytes=moved, flops=int(share * 2 * pairs * Hq * (D + Dv)), rate="fp8" if quantized else "bf16")
