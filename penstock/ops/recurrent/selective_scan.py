"""h = exp(step · A) ∘ h + step · x · B, y = (h · C + D · x) · silu(z) for every token of every channel: Mamba-1's scan."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES, boolean
from penstock.core.op import op
from penstock.ops.recurrent._cases import offsets
from penstock.ops.recurrent._discretise import finish, step_sizes, wide_of

SPEC = {
    "x": ("T Ch", FLOATS),
    "dt": ("T Ch", ("x", torch.float32)),
    "A": ("Ch N", ("x", torch.float32)),
    "B": ("T G N", "x"),
    "C": ("T G N", "x"),
    "cu_seqlens": ("R+1", INDICES),
    "D?": ("Ch", ("x", torch.float32)),
    "z?": ("T Ch", "x"),
    "dt_bias?": ("Ch", ("x", torch.float32)),
    "initial_states?": ("R Ch N", ("x", torch.float32)),
    "out?": ("T Ch", "x"),
    "out_states?": ("R Ch N", ("x", torch.float32)),
    "dt_softplus": boolean,
}
INFINITE = float("inf")


@op(
    "(Tensor(a!) out, Tensor(b!) out_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor cu_seqlens, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, Tensor? initial_states, bool dt_softplus) -> ()",
    SPEC,
)
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool | None = None,
    initial_states: Tensor | None = None,
    out: tuple[Tensor | None, Tensor | None] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The selective scan of packed requests, each from its initial state to its final one.

    A decode step is the same call with one token for each request: cu_seqlens = 0, 1, …, R.

    Args:
        x: [T, Ch] float16, bfloat16 or float32; any stride between tokens.
        dt: [T, Ch], dtype of x or float32, before bias and softplus.
        A: [Ch, N], dtype of x or float32; negative: exp(step · A) is the decay of each of a channel's N states.
        B, C: [T, G, N] in x.dtype; the Ch / G channels of a group share them.
        cu_seqlens: [R+1] int32; request r owns the tokens cu_seqlens[r] to cu_seqlens[r+1].
        D: [Ch], dtype of x or float32: adds D · x. None adds nothing.
        z: [T, Ch] in x.dtype: multiplies the result by silu(z). None multiplies by nothing.
        dt_bias: [Ch], dtype of x or float32, added to dt.
        dt_softplus: whether dt + dt_bias goes through softplus; None: exactly when dt_bias is given.
        initial_states: [R, Ch, N], dtype of x or float32; None: zeros.
        out: (y, final_states), each None for a new tensor; final_states lie elsewhere than initial_states.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: (y [T, Ch] in x.dtype, final_states [R, Ch, N] in the dtype of initial_states, without them float32). Tokens of no
        request give zeros; a request of no token keeps its state.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Gu & Dao, arXiv:2312.00752.
    """
    y, states = (None, None) if out is None else out
    softplus = dt_bias is not None if dt_softplus is None else dt_softplus
    launch = selective_scan.pick(impl, x, dt, A, B, C, cu_seqlens, D, z, dt_bias, initial_states, y, states, softplus)
    if y is None:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if states is None:
        dtype = wide_of(x) if initial_states is None else initial_states.dtype
        states = torch.empty((len(cu_seqlens) - 1, *A.shape), dtype=dtype, device=x.device)
    launch(y, states, x, dt, A, B, C, cu_seqlens, D, z, dt_bias, initial_states, softplus)
    return y, states


@selective_scan.relation
def _relation(x: Tensor, B: Tensor, **others: object) -> tuple[str, str] | None:
    if B.shape[1] == 0 or x.shape[1] % B.shape[1]:
        return "B", f"must have a number of groups that divides Ch={x.shape[1]}, got {B.shape[1]}"
    return None


@selective_scan.reference
def _reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    wide, per_group = wide_of(x), x.shape[1] // B.shape[1]
    steps = step_sizes(dt, dt_bias, dt_softplus, 0.0, INFINITE, wide)
    y, states = torch.zeros(x.shape, dtype=wide, device=x.device), _start(x, A, cu_seqlens, initial_states)
    for request, (first, last) in enumerate(pairwise(cu_seqlens.tolist())):
        h = states[request]
        for t in range(first, last):
            keys, queries = (values[t].to(wide).repeat_interleave(per_group, 0) for values in (B, C))
            h = torch.exp(steps[t][:, None] * A.to(wide)) * h + (steps[t] * x[t].to(wide))[:, None] * keys
            y[t] = (h * queries).sum(1)
        states[request] = h
    own = int(cu_seqlens[-1])
    y[:own] = finish(y[:own], x[:own], D, None if z is None else z[:own])
    return y.to(x.dtype), states


def _start(x: Tensor, A: Tensor, cu_seqlens: Tensor, initial_states: Tensor | None) -> Tensor:
    """The initial states in the wide dtype, in memory of their own."""
    if initial_states is not None:
        return initial_states.to(wide_of(x), copy=True)
    return torch.zeros((len(cu_seqlens) - 1, *A.shape), dtype=wide_of(x), device=x.device)


def _unfit(x: Tensor, A: Tensor, B: Tensor, C: Tensor, **others: object) -> str | None:
    tensors = {"x": x, "A": A, "B": B, "C": C} | {name: others[name] for name in ("dt", "z", "out", "D", "dt_bias")}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of `{name}` has stride {tensor.stride(-1)}, the kernel reads stride 1"
    for name in ("initial_states", "out_states"):
        tensor = others[name]
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            return f"`{name}` has strides {list(tensor.stride())}, the kernel wants it contiguous"
    return f"N up to 64 fits in a program, this is {A.shape[1]}" if not 0 < A.shape[1] <= 64 else None


@selective_scan.impl("triton", needs=("triton",), supports=_unfit)
def _triton(
    out: Tensor,
    out_states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
) -> None:
    from penstock.ops.recurrent.selective_scan_triton import launch

    launch(out, out_states, x, dt, A, B, C, cu_seqlens, D, z, dt_bias, initial_states, dt_softplus)


@selective_scan.impl("cpu", needs=("cpu",))
def _cpu(
    out: Tensor,
    out_states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    dt_softplus: bool,
) -> None:
    """Token after token, but all requests that still have one at once: as many steps as the longest has tokens."""
    wide, per_group = wide_of(x), x.shape[1] // B.shape[1]
    states = _start(x, A, cu_seqlens, initial_states)
    steps = step_sizes(dt, dt_bias, dt_softplus, 0.0, INFINITE, wide)
    taken, decay = steps * x.to(wide), A.to(wide)
    y = torch.zeros(x.shape, dtype=wide)
    lengths = cu_seqlens.diff()
    # The longest first: those that still have tokens are a prefix.
    order = lengths.argsort(descending=True)
    begins, ends = cu_seqlens[:-1][order], lengths[order].tolist()
    h = states[order]
    live = len(ends)
    for t in range(ends[0] if ends else 0):
        while ends[live - 1] <= t:
            live -= 1
        rows = begins[:live] + t
        keys, queries = (values[rows].to(wide).repeat_interleave(per_group, 1) for values in (B, C))
        active = h[:live]
        active.mul_(torch.exp(steps[rows][..., None] * decay)).addcmul_(taken[rows][..., None], keys)
        y[rows] = (active * queries).sum(2)
    states[order] = h
    own = int(cu_seqlens[-1])
    y[:own] = finish(y[:own], x[:own], D, None if z is None else z[:own])
    out.copy_(y)
    out_states.copy_(states)


@selective_scan.cost
def _cost(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    cu_seqlens: Tensor,
    z: Tensor | None = None,
    initial_states: Tensor | None = None,
    **options: object,
) -> Cost:
    states = (len(cu_seqlens) - 1) * A.numel()
    written = 4 * states if initial_states is None else nbytes(initial_states)
    return Cost(bytes=2 * nbytes(x) + nbytes(dt, A, B, C, z, initial_states) + written)


@selective_scan.cases
def cases() -> Iterable[Case]:
    """Mamba 2.8B and Falcon-Mamba 7B; then the awkward ones."""

    def case(
        name: str,
        lengths: list[int],
        channels: int,
        N: int,
        G: int = 1,
        *,
        dtype: torch.dtype = torch.bfloat16,
        state: torch.dtype | None = None,
        gate: bool = False,
        extra: int = 0,
        bench: bool = False,
        **options: object,
    ) -> Case:
        def build(make):
            tokens = sum(lengths) + extra
            arguments = {
                "x": make.randn(tokens, channels, dtype=dtype),
                "dt": make.randn(tokens, channels, dtype=dtype),
                "A": -make.randn(channels, N, dtype=torch.float32).abs() - 0.1,
                "B": make.randn(tokens, G, N, dtype=dtype),
                "C": make.randn(tokens, G, N, dtype=dtype),
                "cu_seqlens": offsets(make, lengths),
                "D": make.randn(channels, dtype=torch.float32),
                "dt_bias": make.randn(channels, dtype=torch.float32) - 3.0,
            }
            if state:
                arguments["initial_states"] = make.randn(len(lengths), channels, N, dtype=state)
            if gate:
                arguments["z"] = make.randn(tokens, channels, dtype=dtype)
            return arguments | options

        return Case(name, build, bench)

    f32, bf16 = torch.float32, torch.bfloat16
    yield case("two_segments", [18], 24, 16, gate=True)
    yield case("ragged_state", [3, 0, 9, 1], 24, 8, 2, state=f32, extra=3)
    yield case("decode_ragged_bfloat16_state", [1, 1, 1], 20, 16, state=bf16, gate=True)
    yield case("float32_ragged", [7, 2], 16, 5, dtype=f32, dt_bias=None, dt_softplus=True, D=None)
    yield case("empty", [], 16, 16)
    yield case("empty_request", [0], 16, 16, state=f32)
    for name, channels in (("mamba_2.8b", 5120), ("falcon_mamba_7b", 8192)):
        for batch, lengths in (("1x8k", [8192]), ("8x1k", [1024] * 8)):
            if name == "mamba_2.8b" or batch == "8x1k":
                yield case(f"{name}_{batch}", lengths, channels, 16, gate=True, state=f32, bench=True)
