"""out[cu_seqlens[b] + i] = cache[page_table[b, i // S], i % S] for i < seqlens[b]; every other row is zero."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES
from penstock.core.op import op
from penstock.ops.kvcache.gather_kv_cpu import gather
from penstock.ops.kvcache.layout import FP8, KVLayout

SPEC = {
    "cache": ("P S H D", (*FLOATS, FP8, torch.int8, torch.uint8)),
    "page_table": ("B max_pages", INDICES),
    "seqlens": ("B", INDICES),
    "cu_seqlens": ("B+1", INDICES),
    "out?": ("T H D", "cache"),
}


@op("(Tensor(a!) out, Tensor cache, Tensor page_table, Tensor seqlens, Tensor cu_seqlens, int total) -> ()", SPEC, exact=True)
def gather_kv(
    cache: Tensor,
    page_table: Tensor,
    seqlens: Tensor,
    cu_seqlens: Tensor,
    *,
    total: int | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The cached rows of each request, packed one request after another.

    Args:
        cache: [P, S, Hkv, D] any float, float8_e4m3fn or 8-bit integers; any order by strides. Bytes are copied as they are.
        page_table: [B, max_pages] int32; entries past a request's end may hold anything.
        seqlens: [B] int32: rows to take from each request, at most max_pages · S.
        cu_seqlens: [B+1] int32 running sums: request b's rows start at cu_seqlens[b]. A request may be given more room than
            seqlens[b]; what is left of it is zero, as are rows from cu_seqlens[B] on.
        total: T, the rows of the result. Without it and without `out`, cu_seqlens[B] is read on the host: on a GPU that waits
            for the device, and it cannot be captured in a CUDA graph nor compiled without a graph break.
        out: [T, Hkv, D] in cache.dtype.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [T, Hkv, D] in cache.dtype.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Kwon et al., arXiv:2309.06180 (paged attention).
    """
    launch = gather_kv.pick(impl, cache, page_table, seqlens, cu_seqlens, out)
    if out is None:
        total = int(cu_seqlens[-1]) if total is None else total
        if total < 0:
            raise gather_kv.contract.error("total", f"must be an integer >= 0, got {total}", {"cu_seqlens": cu_seqlens})
        out = cache.new_empty(total, cache.shape[2], cache.shape[3])
    elif total is not None and total != out.shape[0]:
        raise gather_kv.contract.error("total", f"must be {out.shape[0]}, the rows of out, got {total}", {"out": out})
    launch(out, cache, page_table, seqlens, cu_seqlens, out.shape[0])
    return out


@gather_kv.reference
def _reference(cache: Tensor, page_table: Tensor, seqlens: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    result, size = cache.new_zeros(total, *cache.shape[2:]), cache.shape[1]
    starts = cu_seqlens.tolist()
    for request, (length, table) in enumerate(zip(seqlens.tolist(), page_table.tolist(), strict=True)):
        start = starts[request]
        length = min(length, min(starts[request + 1], total) - start)
        for i in range(0, length, size):
            rows = min(size, length - i)
            result[start + i : start + i + rows] = cache[table[i // size], :rows]
    return result


def _unfit(out: Tensor | None, **others: object) -> str | None:
    if out is not None and out.stride(-1) != 1 and out.shape[-1] > 1:
        return f"the last dimension of `out` has stride {out.stride(-1)}, the kernel wants stride 1"
    return None


@gather_kv.impl("triton", needs=("triton",), supports=_unfit)
def _triton(out: Tensor, cache: Tensor, page_table: Tensor, seqlens: Tensor, cu_seqlens: Tensor, total: int) -> None:
    from penstock.ops.kvcache.gather_kv_triton import launch

    launch(out, cache, page_table, seqlens, cu_seqlens)


@gather_kv.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, cache: Tensor, page_table: Tensor, seqlens: Tensor, cu_seqlens: Tensor, total: int) -> None:
    gather(out, cache, page_table, seqlens, cu_seqlens)


@gather_kv.check_values
def _check_values(cache: Tensor, page_table: Tensor, seqlens: Tensor, **others: object) -> None:
    room = page_table.shape[1] * cache.shape[1]
    if seqlens.numel() and int(seqlens.max()) > room:
        fault = f"must be at most max_pages · S = {room}, the largest is {int(seqlens.max())}"
        raise gather_kv.contract.error("seqlens", fault, {"cache": cache, "page_table": page_table, "seqlens": seqlens})


@gather_kv.cost
def _cost(
    cache: Tensor, page_table: Tensor, seqlens: Tensor, cu_seqlens: Tensor, total: int | None = None, **options: object
) -> Cost:
    rows = int(cu_seqlens[-1]) if total is None else total
    row = cache.shape[2] * cache.shape[3] * cache.element_size()
    return Cost(bytes=2 * rows * row + nbytes(seqlens, cu_seqlens) + rows // cache.shape[1] * 4)


@gather_kv.cases
def cases() -> Iterable[Case]:
    """Both layouts, every page size class; then the awkward ones."""

    def case(
        name: str,
        lengths: list[int],
        S: int,
        H: int,
        D: int,
        *,
        order: str = "NHD",
        room: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        bench: bool = False,
    ) -> Case:
        def build(make):
            pages = [-(-length // S) for length in lengths]
            width = max(pages, default=0) + 1
            P = sum(pages) + 2
            cache = KVLayout(S, H, D, dtype=dtype, v_order=order).allocate(P, device=make.device).v
            cache.copy_(make.randn(P, S, H, D, dtype=torch.float32))
            starts = [0]
            for length in lengths:
                starts.append(starts[-1] + length + room)
            drawn = make.permutation(P)
            table = make.integers(0, P, len(lengths), width)
            used = 0
            for request, number in enumerate(pages):
                table[request, :number] = drawn[used : used + number]
                used += number
            return {
                "cache": cache,
                "page_table": table,
                "seqlens": make.tensor(lengths),
                "cu_seqlens": make.tensor(starts),
                "total": starts[-1] + room,
            }

        return Case(name, build, bench)

    yield case("ragged", [5, 0, 33, 1], 16, 2, 64)
    yield case("hnd", [7, 40], 16, 3, 40, order="HND", dtype=torch.float16)
    yield case("page_of_one", [3, 2], 1, 1, 32, dtype=torch.float32)
    yield case("page_of_256", [300], 256, 1, 32)
    yield case("fp8", [9, 20], 8, 2, 64, dtype=FP8)
    yield case("fp8_transposed", [9, 70], 32, 3, 40, order="HDN", dtype=FP8)
    yield case("padded", [4, 0, 9], 4, 2, 24, room=3)
    yield case("empty", [], 16, 2, 64)
    yield case("empty_requests", [0, 0], 16, 2, 64)
    yield case("prefill_16x2048", [2048] * 16, 16, 8, 128, bench=True)
    yield case("prefill_16x2048_hnd", [2048] * 16, 64, 8, 128, order="HND", bench=True)
    yield case("prefill_16x2048_fp8_transposed", [2048] * 16, 64, 8, 128, order="HDN", dtype=FP8, bench=True)
    yield case("skewed_1x32768+31x256", [32768] + [256] * 31, 64, 8, 128, bench=True)
