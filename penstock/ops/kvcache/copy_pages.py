"""cache[destination] = cache[source] for each (source, destination) pair, in place."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES
from penstock.core.op import op
from penstock.ops.kvcache.layout import FP8, KVLayout

SPEC = {
    "cache": ("P S H D", (*FLOATS, FP8, torch.int8, torch.uint8)),
    "pairs": ("n 2", INDICES),
}


@op("(Tensor(a!) cache, Tensor pairs) -> ()", SPEC, exact=True)
def copy_pages(cache: Tensor, pairs: Tensor, *, impl: str = "auto") -> None:
    """Duplicates pages of a paged cache, in place: what copy-on-write and forked requests need.

    Args:
        cache: [P, S, Hkv, D] any float, float8_e4m3fn or 8-bit integers; any order by strides. Bytes are copied as they are.
        pairs: [n, 2] int32 (source, destination). No destination may be a source or another destination; a source may repeat.
            A pair with a negative number is padding and copies nothing.
        impl: "auto", "triton", "cpu" or "reference".
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Kwon et al., arXiv:2309.06180 (paged attention).
    """
    launch = copy_pages.pick(impl, cache, pairs)
    launch(cache, pairs)


@copy_pages.reference
def _reference(cache: Tensor, pairs: Tensor) -> None:
    for source, destination in pairs.tolist():
        if source >= 0 and destination >= 0:
            cache[destination] = cache[source]


@copy_pages.impl("triton", needs=("triton",))
def _triton(cache: Tensor, pairs: Tensor) -> None:
    from penstock.ops.kvcache.copy_pages_triton import launch

    launch(cache, pairs)


@copy_pages.impl("cpu", needs=("cpu",))
def _cpu(cache: Tensor, pairs: Tensor) -> None:
    # A page is large and pairs are few: one plain copy for each, with no temporary.
    for source, destination in pairs.tolist():
        if source >= 0 and destination >= 0:
            cache[destination].copy_(cache[source])


@copy_pages.check_values
def _check_values(cache: Tensor, pairs: Tensor) -> None:
    kept = [(source, destination) for source, destination in pairs.tolist() if source >= 0 and destination >= 0]
    sources, destinations = {source for source, _ in kept}, [destination for _, destination in kept]
    if len(set(destinations)) < len(destinations) or sources & set(destinations):
        raise copy_pages.contract.error("pairs", "must have destinations that occur once", {"cache": cache, "pairs": pairs})
    if max([*sources, *destinations], default=-1) >= cache.shape[0]:
        raise copy_pages.contract.error("pairs", f"must be below P={cache.shape[0]}", {"cache": cache, "pairs": pairs})


@copy_pages.cost
def _cost(cache: Tensor, pairs: Tensor, **options: object) -> Cost:
    page = cache.shape[1] * cache.shape[2] * cache.shape[3] * cache.element_size()
    return Cost(bytes=2 * len(pairs) * page + nbytes(pairs))


@copy_pages.cases
def cases() -> Iterable[Case]:
    """Both layouts and several page sizes; then the awkward ones."""

    def case(
        name: str,
        n: int,
        P: int,
        S: int,
        H: int,
        D: int,
        *,
        order: str = "NHD",
        padded: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        bench: bool = False,
    ) -> Case:
        def build(make):
            cache = KVLayout(S, H, D, dtype=dtype, v_order=order).allocate(P, device=make.device).v
            cache.copy_(make.randn(P, S, H, D, dtype=torch.float32))
            pairs = make.permutation(P)[: 2 * n].reshape(n, 2).clone()
            if padded:
                pairs[::2] = -1
            return {"cache": cache, "pairs": pairs}

        return Case(name, build, bench)

    yield case("pair", 1, 4, 16, 2, 64)
    yield case("ragged", 3, 9, 16, 3, 40, dtype=torch.float16)
    yield case("hnd", 2, 6, 8, 3, 32, order="HND")
    yield case("page_of_one_float32", 4, 12, 1, 1, 24, dtype=torch.float32)
    yield case("page_of_256", 1, 3, 256, 1, 32)
    yield case("fp8", 2, 6, 16, 2, 64, dtype=FP8)
    yield case("fp8_transposed", 2, 6, 16, 3, 40, order="HDN", dtype=FP8)
    yield case("padded", 4, 9, 16, 2, 64, padded=True)
    yield case("empty", 0, 4, 16, 2, 64)
    yield case("fork_8", 8, 64, 16, 8, 128, bench=True)
    yield case("fork_1024", 1024, 4096, 16, 8, 128, bench=True)
    yield case("fork_1024_fp8_transposed", 1024, 4096, 64, 8, 128, order="HDN", dtype=FP8, bench=True)
    yield case("fork_1024_hnd", 1024, 4096, 16, 8, 128, order="HND", bench=True)
