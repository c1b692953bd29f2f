"""y = silu(gate) · up with [gate | up] = x, silu(g) = g / (1 + exp(-g)), in float32, rounded once."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS
from penstock.core.op import op
from penstock.core.rows import unfit_rows

SPEC = {"x": ("* 2*C", FLOATS), "out?": ("* C", "x")}


@op("(Tensor(a!) out, Tensor x) -> ()", SPEC)
def silu_and_mul(x: Tensor, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """SwiGLU's gate: the first half of the last dimension, through silu, times the second half.

    Args:
        x: [..., 2C] float16, bfloat16 or float32: gate, then factor; any strides.
        out: [..., C] in x.dtype; may be the first or the second half of x itself.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [..., C] in x.dtype.
    Raises: ContractError when the last dimension is odd or out disagrees; NotSupported when no implementation takes the call.
    Source: Shazeer, arXiv:2002.05202.
    """
    launch = silu_and_mul.pick(impl, x, out)
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2) if out is None else out
    launch(out, x)
    return out


@silu_and_mul.reference
def _reference(x: Tensor) -> Tensor:
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def _unfit(x: Tensor, out: Tensor | None) -> str | None:
    return unfit_rows(x=x, out=out)


@silu_and_mul.impl("triton", needs=("triton",), supports=_unfit)
def _triton(out: Tensor, x: Tensor) -> None:
    from penstock.ops.activation.gated_triton import launch

    launch(out, x, "silu")


@silu_and_mul.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, x: Tensor) -> None:
    gate, up = x.chunk(2, -1)
    if gate.dtype in (torch.bfloat16, torch.float16):
        out.copy_(torch.nn.functional.silu(gate.float(), inplace=True).mul_(up))
    else:
        torch.mul(torch.nn.functional.silu(gate), up, out=out)


@silu_and_mul.cost
def _cost(x: Tensor, **options: object) -> Cost:
    return Cost(bytes=nbytes(x) + nbytes(x) // 2)


@silu_and_mul.cases
def cases() -> Iterable[Case]:
    """Widths of feed-forward layers, then the awkward ones."""

    def case(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, bench: bool = False) -> Case:
        return Case(name, lambda make: {"x": make.randn(*shape, dtype=dtype, scale=3.0)}, bench)

    yield case("decode_row", 1, 2 * 1408)
    yield case("batch_of_sequences", 3, 5, 2 * 96)
    yield case("ragged", 7, 2 * 300)
    yield case("float16_ragged", 5, 2 * 1001, dtype=torch.float16)
    yield case("float32_one_column", 4, 2, dtype=torch.float32)
    yield case("wide", 2, 2 * 20000)
    yield case("empty", 0, 512)
    yield case("no_columns", 3, 0)
    yield case("decode_64x28672", 64, 28672, bench=True)
    yield case("prefill_4096x28672", 4096, 28672, bench=True)
    yield case("prefill_16384x4096", 16384, 4096, bench=True)
