"""out = Σ exp(lse_i - lse) · out_i with lse = log Σ exp(lse_i): attention over the union of disjoint sets of keys."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, Make, nbytes
from penstock.core.check import DENSE, FLOATS
from penstock.core.op import op

SPEC = {
    "outs": ("n T Hq D", FLOATS, DENSE),
    "lses": ("n T Hq", (torch.float32, torch.float64), DENSE),
    "out?": ("T Hq D", "outs", DENSE),
}


@op("(Tensor(a!) out, Tensor(b!) out_lse, Tensor outs, Tensor lses) -> ()", SPEC)
def merge_attention(outs: Tensor, lses: Tensor, *, out: Tensor | None = None, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Merges attention results over disjoint sets of keys, as if computed over all keys at once.

    Args:
        outs: [n, T, Hq, D] float16, bfloat16, float32 or float64 (CPU).
        lses: [n, T, Hq] float32 (float64 on the CPU), natural logarithms. Where -inf, outs is not read into the result.
            Attention sinks belong to one of the n alone.
        out: [T, Hq, D] in outs.dtype.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: out [T, Hq, D] in outs.dtype and lse [T, Hq] in lses.dtype; 0 and -inf where all of lses is -inf.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Ye et al., arXiv:2501.01005 (FlashInfer), section 2.2.
    """
    launch = merge_attention.pick(impl, outs, lses, out)
    if out is None:
        out = outs.new_empty(outs.shape[1:])
    lse = lses.new_empty(lses.shape[1:])
    launch(out, lse, outs, lses)
    return out, lse


@merge_attention.reference
def _reference(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(outs.dtype, torch.float32)
    lse = torch.logsumexp(lses, 0)
    weights = torch.softmax(lses, 0).masked_fill(lse == float("-inf"), 0).to(wide)[..., None]
    return torch.where(weights > 0, weights * outs.to(wide), 0).sum(0).to(outs.dtype), lse


@merge_attention.impl("triton", needs=("triton",))
def _triton(out: Tensor, out_lse: Tensor, outs: Tensor, lses: Tensor) -> None:
    from penstock.ops.attention.merge_triton import launch

    launch(out, out_lse, outs, lses)


@merge_attention.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, out_lse: Tensor, outs: Tensor, lses: Tensor) -> None:
    merged, lse = _reference(outs, lses)
    out.copy_(merged)
    out_lse.copy_(lse)


@merge_attention.cost
def _cost(outs: Tensor, lses: Tensor, **options: object) -> Cost:
    return Cost(bytes=nbytes(outs, lses) + nbytes(outs[0], lses[0]))


@merge_attention.cases
def cases() -> Iterable[Case]:
    """Few and many parts, parts that saw no key, every dtype."""

    def case(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16, bench: bool = False, dead: bool = False) -> Case:
        def build(make: Make) -> dict[str, Tensor]:
            wide = torch.promote_types(dtype, torch.float32)
            outs, lses = make.randn(*shape, dtype=dtype), make.randn(*shape[:3], dtype=wide, scale=3.0)
            if dead and make.device.type != "meta":
                lses[0, ::2] = float("-inf")
                outs[0, ::2] = float("nan")
                lses[:, 1] = float("-inf")
            return {"outs": outs, "lses": lses}

        return Case(name, build, bench)

    yield case("two_parts_ragged", 2, 7, 4, 128)
    yield case("five_parts_padded", 5, 9, 3, 80, dead=True)
    yield case("many_parts_float16", 70, 3, 2, 64, dtype=torch.float16)
    yield case("float32", 3, 5, 2, 256, dtype=torch.float32, dead=True)
    yield case("float64", 3, 5, 2, 256, dtype=torch.float64)
    yield case("one_part", 1, 5, 2, 64)
    yield case("empty", 2, 0, 4, 64)
    yield case("two_parts_8192x32x128", 2, 8192, 32, 128, bench=True)
