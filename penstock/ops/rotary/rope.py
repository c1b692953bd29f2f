"""(a, b) → (a·cos − b·sin, b·cos + a·sin) for the pairs (a, b) of a head's first R dimensions, angles by position."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES, boolean
from penstock.core.op import op
from penstock.ops.rotary.rope_cpu import rotate

SPEC = {
    "q": ("T Hq D", FLOATS),
    "k": ("T Hkv D", "q"),
    "cos_sin": ("M 2*R_half", (torch.float32, torch.float64)),
    "positions": ("T", INDICES),
    "out_q?": ("T Hq D", "q"),
    "out_k?": ("T Hkv D", "q"),
    "interleaved": boolean,
}


@op(
    "(Tensor(a!) out_q, Tensor(b!) out_k, Tensor q, Tensor k, Tensor cos_sin, Tensor positions, bool interleaved) -> ()",
    SPEC,
)
def rope(
    q: Tensor,
    k: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    out: tuple[Tensor | None, Tensor | None] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, in one pass.

    Args:
        q: [T, Hq, D] float16, bfloat16 or float32; any strides, so a view of a packed qkv buffer will do.
        k: [T, Hkv, D] in q.dtype.
        cos_sin: [max_position, R] float32, cosines then sines (`rope_table`); R even, R <= D. Dimensions from R on are copied.
        positions: [T] int32, each in [0, max_position); a negative position marks a padding row, whose result is a plain copy.
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + R/2).
        out: (q, k) to write; either may be None for a new tensor, or the input itself to rotate in place.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: (q, k) rotated, shapes and dtype of the inputs.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Su et al., arXiv:2104.09864; partial rotation and halves as in GPT-NeoX.
    """
    out_q, out_k = out if out is not None else (None, None)
    launch = rope.pick(impl, q, k, cos_sin, positions, out_q, out_k, interleaved)
    if cos_sin.shape[1] > q.shape[2]:
        named = {"q": q, "k": k, "cos_sin": cos_sin}
        fault = f"must be [max_position, R] with R <= D={q.shape[2]}, got {list(cos_sin.shape)}"
        raise rope.contract.error("cos_sin", fault, named)
    out_q = torch.empty_like(q) if out_q is None else out_q
    out_k = torch.empty_like(k) if out_k is None else out_k
    launch(out_q, out_k, q, k, cos_sin, positions, interleaved)
    return out_q, out_k


@rope.reference
def _reference(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    half = cos_sin.shape[1] // 2
    rows = cos_sin[positions.clamp(min=0).long()]
    padding = (positions < 0)[:, None]
    cos = rows[:, :half].masked_fill(padding, 1.0)[:, None]
    sin = rows[:, half:].masked_fill(padding, 0.0)[:, None]

    def turned(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        result = wide.clone()
        first, second = (
            (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
        )
        result[..., first] = wide[..., first] * cos - wide[..., second] * sin
        result[..., second] = wide[..., second] * cos + wide[..., first] * sin
        return result.to(x.dtype)

    return turned(q), turned(k)


def _unfit(q: Tensor, k: Tensor, cos_sin: Tensor, out_q: Tensor | None, out_k: Tensor | None, **others: object) -> str | None:
    for name, tensor in {"q": q, "k": k, "cos_sin": cos_sin, "out_q": out_q, "out_k": out_k}.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of `{name}` has stride {tensor.stride(-1)}, the kernel reads stride 1"
    return None


@rope.impl("triton", needs=("triton",), supports=_unfit)
def _triton(out_q: Tensor, out_k: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> None:
    from penstock.ops.rotary.rope_triton import launch

    launch(out_q, out_k, q, k, cos_sin, positions, interleaved)


@rope.impl("cpu", needs=("cpu",))
def _cpu(out_q: Tensor, out_k: Tensor, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, interleaved: bool) -> None:
    rotate(out_q, out_k, q, k, cos_sin, positions, interleaved)


@rope.check_values
def _check_values(cos_sin: Tensor, positions: Tensor, **others: object) -> None:
    if positions.numel() and int(positions.max()) >= cos_sin.shape[0]:
        fault = f"must be below max_position={cos_sin.shape[0]}, the largest is {int(positions.max())}"
        raise rope.contract.error("positions", fault, {"cos_sin": cos_sin, "positions": positions})


@rope.cost
def _cost(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, **options: object) -> Cost:
    rows = min(positions.numel(), cos_sin.shape[0]) * cos_sin.shape[1] * cos_sin.element_size()
    return Cost(bytes=2 * nbytes(q, k) + nbytes(positions) + rows)


@rope.cases
def cases() -> Iterable[Case]:
    """Heads of common models, both pairings, packed views; then the awkward ones."""

    def case(
        name: str,
        T: int,
        Hq: int,
        Hkv: int,
        D: int,
        *,
        R: int | None = None,
        packed: bool = False,
        padded: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        bench: bool = False,
        **options: object,
    ) -> Case:
        def build(make):
            qkv = make.randn(T, (Hq + 2 * Hkv) * D, dtype=dtype).view(T, Hq + 2 * Hkv, D)
            q, k = qkv[:, :Hq], qkv[:, Hq : Hq + Hkv]
            positions = make.integers(0, 512, T)
            if padded:
                positions[T // 2 :] = -1
            angles = make.randn(512, (R or D) // 2, dtype=torch.float32, scale=3.0)
            return {
                "q": q if packed else q.contiguous(),
                "k": k if packed else k.contiguous(),
                "cos_sin": torch.cat((angles.cos(), angles.sin()), 1),
                "positions": positions,
                **options,
            }

        return Case(name, build, bench)

    yield case("decode_row", 1, 32, 8, 128)
    yield case("packed", 5, 4, 2, 64, packed=True)
    yield case("partial", 3, 6, 6, 64, R=16, packed=True)
    yield case("interleaved", 4, 8, 1, 64, interleaved=True)
    yield case("interleaved_partial_float32", 3, 2, 2, 96, R=48, interleaved=True, dtype=torch.float32)
    yield case("ragged_heads", 7, 5, 1, 80, R=40, dtype=torch.float16)
    yield case("padded", 6, 4, 2, 32, padded=True)
    yield case("wide_head_float32", 2, 3, 1, 256, dtype=torch.float32)
    yield case("empty", 0, 4, 2, 64)
    yield case("decode_64x32+8x128", 64, 32, 8, 128, packed=True, bench=True)
    yield case("prefill_8192x32+8x128", 8192, 32, 8, 128, packed=True, bench=True)
    yield case("prefill_8192x32+8x128_interleaved", 8192, 32, 8, 128, packed=True, bench=True, interleaved=True)
    yield case("prefill_8192x64+8x128_partial", 8192, 64, 8, 128, R=64, packed=True, bench=True)
