"""y[t] = activation(bias + Σ_k weight[:, k] · x[t - W + 1 + k]) within each request; what lies before it is its state."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES, one_of
from penstock.core.op import op
from penstock.ops.recurrent._cases import offsets
from penstock.ops.recurrent._discretise import activate, wide_of

SPEC = {
    "x": ("T C", FLOATS),
    "weight": ("C W", ("x", torch.float32)),
    "bias?": ("C", ("x", torch.float32)),
    "cu_seqlens": ("B+1", INDICES),
    "state?": ("S C K", ("x", torch.float32)),
    "state_indices?": ("B", INDICES),
    "out?": ("T C", "x"),
    "activation": one_of("silu", None),
}


@op(
    "(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, Tensor(b!)? state, Tensor? state_indices, "
    "str? activation) -> ()",
    SPEC,
)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    state: Tensor | None = None,
    state_indices: Tensor | None = None,
    activation: str | None = "silu",
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Depthwise causal convolution of packed requests, each channel with its own W taps, and its state for what follows.

    Args:
        x: [T, C] float16, bfloat16 or float32; rows of any stride, such as a slice of a projection.
        weight: [C, W], dtype of x or float32; tap W-1 meets the token itself.
        bias: [C], dtype of x or float32, or None.
        cu_seqlens: [B+1] int32.
        state: [S, C, W-1], dtype of x or float32, changed in place: the inputs before the first token, oldest first (zeros for
            a request that begins), replaced by the last W-1 inputs. None: zeros before, nothing kept.
        state_indices: [B] int32, the slot of each request; None: request b has slot b. -1 is padding: its rows are zeros and no
            state is touched. The other slots differ from each other.
        activation: "silu" or None.
        out: [T, C] in x.dtype, not x itself.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [T, C] in x.dtype; rows that belong to no request are zeros.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Gu & Dao, arXiv:2312.00752.
    """
    launch = causal_conv1d.pick(impl, x, weight, bias, cu_seqlens, state, state_indices, out, activation)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    launch(out, x, weight, bias, cu_seqlens, state, state_indices, activation)
    return out


@causal_conv1d.relation
def _relation(
    weight: Tensor, cu_seqlens: Tensor, state: Tensor | None, state_indices: Tensor | None, **others: object
) -> tuple[str, str] | None:
    if weight.shape[1] < 1:
        return "weight", "must have at least one tap"
    if state is None:
        return None if state_indices is None else ("state_indices", "must be None without `state`")
    if state.shape[2] != weight.shape[1] - 1:
        return "state", f"must be [S, C, W-1={weight.shape[1] - 1}], got {list(state.shape)}"
    if state_indices is None and state.shape[0] < len(cu_seqlens) - 1:
        return "state", f"must have a slot for each of {len(cu_seqlens) - 1} requests without `state_indices`, got {len(state)}"
    return None


@causal_conv1d.reference
def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    state: Tensor | None,
    state_indices: Tensor | None,
    activation: str | None,
) -> Tensor:
    wide, act = wide_of(x), activate(activation)
    taps = weight.to(wide)
    y, W = torch.zeros(x.shape, dtype=wide, device=x.device), weight.shape[1]
    bounds = cu_seqlens.tolist()
    slots = range(len(bounds) - 1) if state_indices is None else state_indices.tolist()
    for (first, last), slot in zip(pairwise(bounds), slots, strict=True):
        if slot < 0:
            continue
        before = x.new_zeros(W - 1, x.shape[1]) if state is None else state[slot].T
        inputs = torch.cat([before.to(wide), x[first:last].to(wide)])
        for t in range(last - first):
            value = (taps * inputs[t : t + W].T).sum(1)
            y[first + t] = act(value if bias is None else value + bias.to(wide))
        if state is not None:
            state[slot] = inputs[last - first :].T.to(state.dtype)
    return y.to(x.dtype)


def _unfit(x: Tensor, out: Tensor | None, weight: Tensor, bias: Tensor | None, **others: object) -> str | None:
    for name, tensor in (("x", x), ("out", out), ("bias", bias)):
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of `{name}` has stride {tensor.stride(-1)}, the kernel reads stride 1"
    if weight.shape[1] > 8:
        return f"the kernel unrolls at most 8 taps, weight has {weight.shape[1]}"
    return None


@causal_conv1d.impl("triton", needs=("triton",), supports=_unfit)
def _triton(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    state: Tensor | None,
    state_indices: Tensor | None,
    activation: str | None,
) -> None:
    from penstock.ops.recurrent.causal_conv1d_triton import launch

    launch(out, x, weight, bias, cu_seqlens, state, state_indices, activation)


@causal_conv1d.impl("cpu", needs=("cpu",))
def _cpu(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    state: Tensor | None,
    state_indices: Tensor | None,
    activation: str | None,
) -> None:
    """A request at a time, a tap at a time: W passes over its rows."""
    wide, act, W = wide_of(x), activate(activation), weight.shape[1]
    taps, shift = weight.to(wide).T.contiguous(), None if bias is None else bias.to(wide)
    bounds = cu_seqlens.tolist()
    slots = range(len(bounds) - 1) if state_indices is None else state_indices.tolist()
    out[bounds[-1] :] = 0
    for (first, last), slot in zip(pairwise(bounds), slots, strict=True):
        if slot < 0:
            out[first:last] = 0
            continue
        length = last - first
        inputs = torch.zeros((W - 1 + length, x.shape[1]), dtype=wide)
        inputs[W - 1 :] = x[first:last]
        if state is not None:
            inputs[: W - 1] = state[slot].T
        y = inputs[:length] * taps[0] if shift is None else torch.addcmul(shift, inputs[:length], taps[0])
        for k in range(1, W):
            y.addcmul_(inputs[k : k + length], taps[k])
        out[first:last] = act(y)
        if state is not None:
            state[slot] = inputs[length:].T


@causal_conv1d.check_values
def _check_values(cu_seqlens: Tensor, state: Tensor | None, state_indices: Tensor | None, **others: object) -> None:
    if state is not None and state_indices is not None and state_indices.numel() and int(state_indices.max()) >= len(state):
        fault = f"must be below S = {len(state)}, the largest is {int(state_indices.max())}"
        raise causal_conv1d.contract.error("state_indices", fault, {"state": state, "state_indices": state_indices})


@causal_conv1d.cost
def _cost(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, state: Tensor | None = None, **options: object
) -> Cost:
    kept = 0 if state is None else 2 * (len(cu_seqlens) - 1) * state.shape[1] * state.shape[2] * state.element_size()
    return Cost(bytes=2 * nbytes(x) + nbytes(weight, bias, cu_seqlens) + kept)


@causal_conv1d.cases
def cases() -> Iterable[Case]:
    """Channels of Mamba-2 2.7B, Bamba 9B and Falcon-H1; then the awkward ones."""

    def case(
        name: str,
        lengths: list[int],
        C: int,
        W: int = 4,
        *,
        dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype | None = None,
        indices: list[int] | None = None,
        bias: bool = True,
        gap: int = 0,
        extra: int = 0,
        bench: bool = False,
        **options: object,
    ) -> Case:
        def build(make):
            slots = 1 + max(indices, default=0) if indices else len(lengths)
            arguments = {
                "x": make.randn(sum(lengths) + extra, C + gap, dtype=dtype)[:, :C],
                "weight": make.randn(C, W, dtype=dtype, scale=0.5),
                "bias": make.randn(C, dtype=dtype) if bias else None,
                "cu_seqlens": offsets(make, lengths),
            }
            if state_dtype:
                arguments["state"] = make.randn(slots, C, W - 1, dtype=state_dtype)
            if indices:
                arguments["state_indices"] = make.tensor(indices)
            return arguments | options

        return Case(name, build, bench)

    bf16 = torch.bfloat16
    yield case("one_request", [70], 64)
    yield case("ragged_state", [5, 1, 0, 66, 2, 3], 40, state_dtype=bf16, gap=24)
    yield case("ragged_padded_slots", [3, 9, 1], 33, state_dtype=torch.float32, indices=[4, -1, 0], extra=5, activation=None)
    yield case("two_taps_float32", [17, 4], 16, 2, dtype=torch.float32, state_dtype=torch.float32, bias=False)
    yield case("one_tap", [3, 2], 16, 1, dtype=torch.float16)
    yield case("empty", [], 16)
    yield case("empty_requests", [0, 0], 16, state_dtype=bf16)
    for name, C, wide in (
        ("mamba2_2.7b", 5376, 5376 + 5200),
        ("bamba_9b", 8448, 8448 + 8320),
        ("falcon_h1_7b", 3584, 3584 + 3096),
    ):
        for batch, lengths in (("1x8k", [8192]), ("8x1k", [1024] * 8), ("64x128", [128] * 64)):
            if name == "mamba2_2.7b" or batch == "8x1k":
                yield case(f"{name}_{batch}", lengths, C, state_dtype=bf16, gap=wide - C, bench=True)
