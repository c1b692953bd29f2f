"""y = activation(bias + Σ_k weight[:, k] · [state, x][:, k]), then state = [state, x][:, 1:]: one token of each request."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES, one_of
from penstock.core.op import op
from penstock.ops.recurrent._discretise import activate, wide_of

SPEC = {
    "x": ("B C", FLOATS),
    "weight": ("C W", ("x", torch.float32)),
    "bias?": ("C", ("x", torch.float32)),
    "state": ("S C K", ("x", torch.float32)),
    "state_indices?": ("B", INDICES),
    "out?": ("B C", "x"),
    "activation": one_of("silu", None),
}


@op(
    "(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor(b!) state, Tensor? state_indices, str? activation) -> ()",
    SPEC,
)
def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    state_indices: Tensor | None = None,
    activation: str | None = "silu",
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """One step of causal_conv1d for each request: reads the state, writes the output, shifts the state by one.

    Args:
        x: [B, C] float16, bfloat16 or float32; rows of any stride.
        weight: [C, W], dtype of x or float32; tap W-1 meets x itself.
        bias: [C], dtype of x or float32, or None.
        state: [S, C, W-1], dtype of x or float32, any strides, changed in place: the last W-1 inputs, oldest first.
        state_indices: [B] int32, the slot of each request; None: request b has slot b. -1 is padding: its row is zeros and no
            state is touched. The other slots differ from each other.
        activation: "silu" or None.
        out: [B, C] in x.dtype, may be x itself.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [B, C] in x.dtype.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Gu & Dao, arXiv:2312.00752.
    """
    launch = causal_conv1d_update.pick(impl, x, weight, bias, state, state_indices, out, activation)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    launch(out, x, weight, bias, state, state_indices, activation)
    return out


@causal_conv1d_update.relation
def _relation(
    x: Tensor, weight: Tensor, state: Tensor, state_indices: Tensor | None, **others: object
) -> tuple[str, str] | None:
    if state.shape[2] != weight.shape[1] - 1:
        return "state", f"must be [S, C, W-1={weight.shape[1] - 1}], got {list(state.shape)}"
    if state_indices is None and len(state) < len(x):
        return "state", f"must have a slot for each of {len(x)} requests without `state_indices`, got {len(state)}"
    return None


@causal_conv1d_update.reference
def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, state_indices: Tensor | None, activation: str | None
) -> Tensor:
    wide, act = wide_of(x), activate(activation)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for b, slot in enumerate(range(len(x)) if state_indices is None else state_indices.tolist()):
        if slot < 0:
            continue
        inputs = torch.cat([state[slot].to(wide), x[b, :, None].to(wide)], 1)
        value = (weight.to(wide) * inputs).sum(1)
        y[b] = act(value if bias is None else value + bias.to(wide))
        state[slot] = inputs[:, 1:].to(state.dtype)
    return y.to(x.dtype)


def _unfit(x: Tensor, out: Tensor | None, weight: Tensor, bias: Tensor | None, **others: object) -> str | None:
    for name, tensor in (("x", x), ("out", out), ("bias", bias)):
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of `{name}` has stride {tensor.stride(-1)}, the kernel reads stride 1"
    if weight.shape[1] > 8:
        return f"the kernel unrolls at most 8 taps, weight has {weight.shape[1]}"
    return None


@causal_conv1d_update.impl("triton", needs=("triton",), supports=_unfit)
def _triton(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    activation: str | None,
) -> None:
    from penstock.ops.recurrent.causal_conv1d_update_triton import launch

    launch(out, x, weight, bias, state, state_indices, activation)


@causal_conv1d_update.impl("cpu", needs=("cpu",))
def _cpu(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    state_indices: Tensor | None,
    activation: str | None,
) -> None:
    """All requests at once; padded rows are left out by their indices."""
    wide = wide_of(x)
    live = None
    rows: Tensor | slice = slice(0, len(x))
    inputs = x
    if state_indices is not None:
        live = (state_indices >= 0).nonzero()[:, 0]
        rows, inputs = state_indices[live].long(), x[live]
    window = torch.cat([state[rows].to(wide), inputs.to(wide)[..., None]], 2)
    y = (window * weight.to(wide)).sum(2)
    y = activate(activation)(y if bias is None else y + bias.to(wide))
    state[rows] = window[..., 1:].to(state.dtype)
    if live is None:
        out.copy_(y)
    else:
        out.zero_().index_copy_(0, live, y.to(out.dtype))


@causal_conv1d_update.cost
def _cost(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, **options: object) -> Cost:
    kept = 2 * len(x) * state.shape[1] * state.shape[2] * state.element_size()
    return Cost(bytes=2 * nbytes(x) + nbytes(weight, bias) + kept)


@causal_conv1d_update.cases
def cases() -> Iterable[Case]:
    """Decode batches of Mamba-2 2.7B and Bamba 9B; then the awkward ones."""

    def case(
        name: str,
        B: int,
        C: int,
        W: int = 4,
        *,
        dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype = torch.bfloat16,
        indices: list[int] | None = None,
        bias: bool = True,
        gap: int = 0,
        bench: bool = False,
        **options: object,
    ) -> Case:
        def build(make):
            arguments = {
                "x": make.randn(B, C + gap, dtype=dtype)[:, :C],
                "weight": make.randn(C, W, dtype=dtype, scale=0.5),
                "bias": make.randn(C, dtype=dtype) if bias else None,
                "state": make.randn(max(B, 1) + 3, C, W - 1, dtype=state_dtype),
            }
            if indices is not None:
                arguments["state_indices"] = make.tensor(indices)
            elif bench:
                arguments["state_indices"] = make.permutation(B + 3)[:B]
            return arguments | options

        return Case(name, build, bench)

    yield case("one_row", 1, 96)
    yield case("ragged_padded", 5, 72, indices=[6, -1, 0, 3, -1], gap=8)
    yield case("float32_state", 3, 40, state_dtype=torch.float32, activation=None)
    yield case("two_taps_float32", 2, 33, 2, dtype=torch.float32, state_dtype=torch.float32, bias=False)
    yield case("empty", 0, 16)
    for name, C in (("mamba2_2.7b", 5376), ("bamba_9b", 8448)):
        for B in (1, 64, 256):
            if name == "mamba2_2.7b" or B == 64:
                yield case(f"{name}_{B}", B, C, gap=C - 176, bench=True)
