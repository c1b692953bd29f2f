"""y = gelu(gate) · up with [gate | up] = x, exact (erf) or by the tanh approximation, in float32, rounded once."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, one_of
from penstock.core.op import op
from penstock.core.rows import unfit_rows

SPEC = {"x": ("* 2*C", FLOATS), "out?": ("* C", "x"), "approximate": one_of("tanh", "none")}


@op("(Tensor(a!) out, Tensor x, str approximate) -> ()", SPEC)
def gelu_and_mul(x: Tensor, *, approximate: str = "tanh", out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """GEGLU's gate: the first half of the last dimension, through gelu, times the second half.

    Args:
        x: [..., 2C] float16, bfloat16 or float32: gate, then factor; any strides.
        approximate: "tanh" for g/2 · (1 + tanh(√(2/π) · (g + 0.044715 g³))); "none" for g/2 · (1 + erf(g/√2)).
        out: [..., C] in x.dtype; may be the first or the second half of x itself.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [..., C] in x.dtype.
    Raises: ContractError when the last dimension is odd or out disagrees; NotSupported when no implementation takes the call.
    Source: Hendrycks & Gimpel, arXiv:1606.08415; Shazeer, arXiv:2002.05202.
    """
    launch = gelu_and_mul.pick(impl, x, out, approximate)
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2) if out is None else out
    launch(out, x, approximate)
    return out


@gelu_and_mul.reference
def _reference(x: Tensor, approximate: str) -> Tensor:
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    if approximate == "tanh":
        share = 1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    else:
        share = 1 + torch.erf(gate * math.sqrt(0.5))
    return (0.5 * gate * share * up).to(x.dtype)


def _unfit(x: Tensor, out: Tensor | None, **others: object) -> str | None:
    return unfit_rows(x=x, out=out)


@gelu_and_mul.impl("triton", needs=("triton",), supports=_unfit)
def _triton(out: Tensor, x: Tensor, approximate: str) -> None:
    from penstock.ops.activation.gated_triton import launch

    launch(out, x, "gelu_tanh" if approximate == "tanh" else "gelu")


@gelu_and_mul.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, x: Tensor, approximate: str) -> None:
    gate, up = x.chunk(2, -1)
    if gate.dtype in (torch.bfloat16, torch.float16):
        out.copy_(torch.nn.functional.gelu(gate.float(), approximate=approximate).mul_(up))
        return
    if approximate == "none":
        # torch's own gelu approximates erf on some CPUs, to 1.2e-6 where the formula with torch.erf is off by 4.5e-7.
        torch.mul(torch.erf(gate * math.sqrt(0.5)).add_(1).mul_(gate).mul_(0.5), up, out=out)
        return
    torch.mul(torch.nn.functional.gelu(gate, approximate=approximate), up, out=out)


@gelu_and_mul.cost
def _cost(x: Tensor, **options: object) -> Cost:
    return Cost(bytes=nbytes(x) + nbytes(x) // 2)


@gelu_and_mul.cases
def cases() -> Iterable[Case]:
    """Both forms; widths of feed-forward layers, then the awkward ones."""

    def case(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, bench: bool = False, **options: object) -> Case:
        return Case(name, lambda make: {"x": make.randn(*shape, dtype=dtype, scale=3.0), **options}, bench)

    yield case("decode_row", 1, 2 * 1408)
    yield case("exact", 3, 5, 2 * 96, approximate="none")
    yield case("ragged", 7, 2 * 300)
    yield case("float16_ragged_exact", 5, 2 * 1001, dtype=torch.float16, approximate="none")
    yield case("float32_one_column", 4, 2, dtype=torch.float32)
    yield case("wide", 2, 2 * 20000)
    yield case("empty", 0, 512)
    yield case("no_columns", 3, 0)
    yield case("decode_64x28672", 64, 28672, bench=True)
    yield case("prefill_4096x28672", 4096, 28672, bench=True)
    yield case("prefill_4096x28672_exact", 4096, 28672, bench=True, approximate="none")
