"""h = exp(step · A) · h + step · x ⊗ B, y = (h · C + D · x) · silu(z) for every token of every head: Mamba-2's scan."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES, boolean
from penstock.core.op import op
from penstock.ops.recurrent._cases import heads, offsets
from penstock.ops.recurrent._chunked import scan_chunks
from penstock.ops.recurrent._discretise import finish, limits, step_sizes, wide_of

SPEC = {
    "x": ("T H P", FLOATS),
    "dt": ("T H", ("x", torch.float32)),
    "A": ("H", ("x", torch.float32)),
    "B": ("T G N", "x"),
    "C": ("T G N", "x"),
    "cu_seqlens": ("R+1", INDICES),
    "D?": ("H", ("x", torch.float32)),
    "z?": ("T H P", "x"),
    "dt_bias?": ("H", ("x", torch.float32)),
    "initial_states?": ("R H P N", ("x", torch.float32)),
    "out?": ("T H P", "x"),
    "out_states?": ("R H P N", ("x", torch.float32)),
    "dt_softplus": boolean,
    "dt_min": limits,
    "dt_max": limits,
}


@op(
    "(Tensor(a!) out, Tensor(b!) out_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor cu_seqlens, Tensor? D, "
    "Tensor? z, Tensor? dt_bias, Tensor? initial_states, bool dt_softplus, float dt_min, float dt_max) -> ()",
    SPEC,
)
def ssd_prefill(
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
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
    out: tuple[Tensor | None, Tensor | None] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The state-space dual scan of packed requests, each from its initial state to its final one.

    Args:
        x: [T, H, P] float16, bfloat16 or float32; any stride between tokens, such as a slice of the convolution's output.
        dt: [T, H], dtype of x or float32, before bias and softplus.
        A: [H], dtype of x or float32; negative: exp(step · A) is the decay.
        B, C: [T, G, N] in x.dtype; the H / G heads of a group share them.
        cu_seqlens: [R+1] int32; request r owns the tokens cu_seqlens[r] to cu_seqlens[r+1].
        D: [H], dtype of x or float32: adds D · x. None adds nothing.
        z: [T, H, P] in x.dtype: multiplies the result by silu(z). None multiplies by nothing.
        dt_bias: [H], dtype of x or float32, added to dt.
        dt_softplus: whether dt + dt_bias goes through softplus; None: exactly when dt_bias is given.
        dt_limit: the step is clamped to it, after softplus.
        initial_states: [R, H, P, N], dtype of x or float32; None: zeros.
        out: (y, final_states), each None for a new tensor; final_states lie elsewhere than initial_states.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: (y [T, H, P] in x.dtype, final_states [R, H, P, N] in the dtype of initial_states, without them float32). Tokens of
        no request give zeros; a request of no token keeps its state.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Dao & Gu, arXiv:2405.21060.
    """
    y, states = (None, None) if out is None else out
    softplus = dt_bias is not None if dt_softplus is None else dt_softplus
    low, high = dt_limit
    launch = ssd_prefill.pick(impl, x, dt, A, B, C, cu_seqlens, D, z, dt_bias, initial_states, y, states, softplus, low, high)
    if y is None:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if states is None:
        shape = (len(cu_seqlens) - 1, *x.shape[1:], B.shape[2])
        dtype = wide_of(x) if initial_states is None else initial_states.dtype
        states = torch.empty(shape, dtype=dtype, device=x.device)
    launch(y, states, x, dt, A, B, C, cu_seqlens, D, z, dt_bias, initial_states, softplus, low, high)
    return y, states


@ssd_prefill.relation
def _relation(x: Tensor, B: Tensor, dt_min: float, dt_max: float, **others: object) -> tuple[str, str] | None:
    if B.shape[1] == 0 or x.shape[1] % B.shape[1]:
        return "B", f"must have a number of groups that divides H={x.shape[1]}, got {B.shape[1]}"
    return ("dt_max", f"must be at least dt_min={dt_min}, got {dt_max}") if dt_max < dt_min else None


@ssd_prefill.reference
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
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    wide, per_group = wide_of(x), x.shape[1] // B.shape[1]
    steps = step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max, wide)
    y, states = torch.zeros(x.shape, dtype=wide, device=x.device), _start(x, B, cu_seqlens, initial_states)
    for request, (first, last) in enumerate(pairwise(cu_seqlens.tolist())):
        h = states[request]
        for t in range(first, last):
            step = steps[t][:, None, None]
            keys, queries = (values[t].to(wide).repeat_interleave(per_group, 0)[:, None, :] for values in (B, C))
            h = torch.exp(step * A.to(wide)[:, None, None]) * h + step * x[t].to(wide)[:, :, None] * keys
            y[t] = (h * queries).sum(2)
        states[request] = h
    _end(y, x, D, z, cu_seqlens)
    return y.to(x.dtype), states


@ssd_prefill.baseline
def _baseline(
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
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """Chunks as matrix products whose operands are rounded to x.dtype, which tensor cores ask for."""
    states = _start(x, B, cu_seqlens, initial_states)
    steps = step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max, states.dtype)
    y = scan_chunks(x, steps, A, B, C, cu_seqlens, states, lambda values: values.to(x.dtype).to(values.dtype))
    _end(y, x, D, z, cu_seqlens)
    return y.to(x.dtype), states


def _start(x: Tensor, B: Tensor, cu_seqlens: Tensor, initial_states: Tensor | None) -> Tensor:
    """The initial states in the wide dtype, in memory of their own."""
    if initial_states is not None:
        return initial_states.to(wide_of(x), copy=True)
    return torch.zeros((len(cu_seqlens) - 1, *x.shape[1:], B.shape[2]), dtype=wide_of(x), device=x.device)


def _end(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, cu_seqlens: Tensor) -> None:
    """D and the gate on the tokens of requests, in place; the others stay zero."""
    own = int(cu_seqlens[-1])
    y[:own] = finish(y[:own], x[:own], D, None if z is None else z[:own])


def _unfit(x: Tensor, B: Tensor, C: Tensor, **others: object) -> str | None:
    tensors = {"x": x, "B": B, "C": C} | {
        name: others[name] for name in ("z", "out", "initial_states", "out_states", "A", "D", "dt_bias")
    }
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of `{name}` has stride {tensor.stride(-1)}, the kernel reads stride 1"
    for name in ("initial_states", "out_states"):
        tensor = others[name]
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            return f"`{name}` has strides {list(tensor.stride())}, the kernel wants it contiguous"
    P, N = x.shape[2], B.shape[2]
    if P > 128 or N > 256 or 0 in (P, N) or (P > 64 and P % 2):
        return f"P up to 128, even above 64, and N up to 256 fit in a program, these are {P} and {N}"
    return None


# What is spilled is kept for the whole walk and read back in it: 88 bytes at N = 128, 21 loads among some thousand instructions
# of a chunk; at N = 256 400, and 640 with Triton 3.9.
@ssd_prefill.impl("triton", needs=("triton",), supports=_unfit, instructions=("HGMMA",), spill_bytes=640)
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
    dt_min: float,
    dt_max: float,
) -> None:
    from penstock.ops.recurrent.ssd_prefill_triton import launch

    launch(out, out_states, x, dt, A, B, C, cu_seqlens, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max)


@ssd_prefill.impl("cpu", needs=("cpu",))
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
    dt_min: float,
    dt_max: float,
) -> None:
    states = _start(x, B, cu_seqlens, initial_states)
    steps = step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max, states.dtype)
    y = scan_chunks(x, steps, A, B, C, cu_seqlens, states, lambda values: values)
    _end(y, x, D, z, cu_seqlens)
    out.copy_(y)
    out_states.copy_(states)


@ssd_prefill.cost
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
    """A multiply-add takes an element into the state, another takes it out; chunks do more and are worth it."""
    T, H, P = x.shape
    states = (len(cu_seqlens) - 1) * H * P * B.shape[2]
    written = 4 * states if initial_states is None else nbytes(initial_states)
    return Cost(bytes=2 * nbytes(x) + nbytes(dt, B, C, z, initial_states) + written, flops=4 * T * H * P * B.shape[2])


@ssd_prefill.cases
def cases() -> Iterable[Case]:
    """Mamba-2 2.7B, Bamba 9B and Falcon-H1 7B; then the awkward ones."""

    def case(
        name: str,
        lengths: list[int],
        H: int,
        P: int,
        G: int,
        N: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        state: torch.dtype | None = None,
        gate: bool = False,
        plain: bool = False,
        packed: bool = False,
        extra: int = 0,
        bench: bool = False,
        **options: object,
    ) -> Case:
        def build(make):
            tokens = sum(lengths) + extra
            arguments = heads(make, tokens, H, P, G, N, dtype, packed=packed)
            arguments["cu_seqlens"] = offsets(make, lengths)
            if plain:
                del arguments["D"], arguments["dt_bias"]
                arguments["dt"] = arguments["dt"].abs() * 0.1
            if state:
                arguments["initial_states"] = make.randn(len(lengths), H, P, N, dtype=state)
            if gate:
                arguments["z"] = make.randn(tokens, H, P, dtype=dtype)
            return arguments | options

        return Case(name, build, bench)

    f32, bf16 = torch.float32, torch.bfloat16
    yield case("two_segments", [150], 2, 16, 1, 16, packed=True)
    yield case("ragged_state", [5, 0, 70, 1, 66], 4, 16, 2, 32, state=f32, gate=True)
    yield case("ragged_odd", [66, 3], 3, 24, 1, 20, state=bf16, extra=5, dt_limit=(0.02, 0.3))
    yield case("wide_head_ragged", [20, 67], 2, 72, 1, 16, state=f32, extra=3)
    yield case("float16_ragged", [65, 64], 2, 16, 1, 16, dtype=torch.float16, plain=True)
    yield case("float32_ragged", [40, 31], 2, 16, 2, 16, dtype=f32, state=f32, gate=True)
    yield case("empty", [], 2, 16, 1, 16)
    yield case("empty_request", [0, 0], 2, 16, 1, 16, state=bf16)
    for name, lengths, H, P, N in (
        ("mamba2_2.7b_1x8k", [8192], 80, 64, 128),
        ("mamba2_2.7b_8x1k", [1024] * 8, 80, 64, 128),
        ("mamba2_2.7b_64x128", [128] * 64, 80, 64, 128),
        ("bamba_9b_1x8k", [8192], 128, 64, 128),
        ("falcon_h1_7b_8x1k", [1024] * 8, 24, 128, 256),
    ):
        yield case(name, lengths, H, P, 1, N, state=f32, packed=True, bench=True)
