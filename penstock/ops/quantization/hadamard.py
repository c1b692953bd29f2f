"""y = scale · H x, H[i, j] = (-1)^popcount(i & j): the Walsh-Hadamard transform of a row in N · log₂ N additions."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, optional, positive
from penstock.core.op import op
from penstock.core.rows import unfit_rows

LARGEST = 32768

SPEC = {"x": ("* N", FLOATS), "out?": ("* N", "x"), "scale": optional(positive)}


@op("(Tensor(a!) out, Tensor x, float? scale) -> ()", SPEC)
def hadamard(x: Tensor, *, scale: float | None = None, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Fast Walsh-Hadamard transform in natural order: spreads outliers over a row before it is quantised.

    With the default scale it is orthonormal and its own inverse.

    Args:
        x: [..., N] float16, bfloat16 or float32, N a power of two up to 32,768; any strides.
        scale: multiplies the sums; None for 1/√N.
        out: [..., N] in x.dtype, may be x itself.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [..., N] in x.dtype; sums are float32, rounded once.
    Raises: ContractError when N is no such power or out disagrees; NotSupported when no implementation takes the call.
    Sources: Fino & Algazi, IEEE Trans. Computers C-25 (1976); Ashkboos et al., arXiv:2404.00456.
    """
    launch = hadamard.pick(impl, x, out, scale)
    out = torch.empty_like(x) if out is None else out
    launch(out, x, scale)
    return out


@hadamard.relation
def _relation(x: Tensor, **others: object) -> tuple[str, str] | None:
    N = x.shape[-1]
    if N & (N - 1) or not 0 < N <= LARGEST:
        return "x", f"must have a last dimension that is a power of two up to {LARGEST}, got {N}"
    return None


@hadamard.reference
def _reference(x: Tensor, scale: float | None) -> Tensor:
    N = x.shape[-1]
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    half = 1
    while half < N:
        a, b = y.unflatten(-1, (N // (2 * half), 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return (y * (N**-0.5 if scale is None else scale)).to(x.dtype)


def _unfit(x: Tensor, out: Tensor | None, **others: object) -> str | None:
    return unfit_rows(x=x, out=out)


@hadamard.impl("triton", needs=("triton",), supports=_unfit)
def _triton(out: Tensor, x: Tensor, scale: float | None) -> None:
    from penstock.ops.quantization.hadamard_triton import launch

    launch(out, x, x.shape[-1] ** -0.5 if scale is None else scale)


@hadamard.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, x: Tensor, scale: float | None) -> None:
    N = x.shape[-1]
    # A copy, even of float32: the sums are written over it.
    y = x.to(torch.promote_types(x.dtype, torch.float32), copy=True, memory_format=torch.contiguous_format)
    spare = torch.empty_like(y)
    half = 1
    while half < N:
        a, b = y.view(*x.shape[:-1], N // (2 * half), 2, half).unbind(-2)
        sums, differences = spare.view(*x.shape[:-1], N // (2 * half), 2, half).unbind(-2)
        torch.add(a, b, out=sums)
        torch.sub(a, b, out=differences)
        y, spare = spare, y
        half *= 2
    torch.mul(y, N**-0.5 if scale is None else scale, out=out)


@hadamard.cost
def _cost(x: Tensor, **options: object) -> Cost:
    return Cost(bytes=2 * nbytes(x))


@hadamard.cases
def cases() -> Iterable[Case]:
    """Heads, model widths, the smallest and the largest; a ragged number of rows."""

    def case(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, bench: bool = False, **options: float) -> Case:
        return Case(name, lambda make: {"x": make.randn(*shape, dtype=dtype), **options}, bench)

    yield case("decode_row", 1, 4096)
    yield case("heads", 3, 5, 128)
    yield case("ragged_rows", 37, 64)
    yield case("ragged_rows_float16", 3, 512, dtype=torch.float16)
    yield case("float32", 5, 1024, dtype=torch.float32)
    yield case("one_column", 7, 1)
    yield case("two_columns_unscaled", 9, 2, scale=1.0)
    yield case("widest", 2, 32768)
    yield case("empty", 0, 512)
    yield case("heads_8192x64x128", 8192, 64, 128, bench=True)
    yield case("prefill_8192x4096", 8192, 4096, bench=True)
    yield case("prefill_8192x32768", 8192, 32768, bench=True)
