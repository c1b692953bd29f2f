"""state = exp(step · A) · state + step · x ⊗ B, y = (state · C + D · x) · silu(z): one token of each request, Mamba-2."""

from collections.abc import Iterable

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES, boolean
from penstock.core.op import op
from penstock.ops.recurrent._cases import heads
from penstock.ops.recurrent._discretise import finish, limits, step_sizes, wide_of

SPEC = {
    "state": ("S H P N", FLOATS),
    "x": ("B H P", FLOATS),
    "dt": ("B H", ("x", torch.float32)),
    "A": ("H", ("x", torch.float32)),
    "B": ("B G N", "x"),
    "C": ("B G N", "x"),
    "D?": ("H", ("x", torch.float32)),
    "z?": ("B H P", "x"),
    "dt_bias?": ("H", ("x", torch.float32)),
    "state_indices?": ("B", INDICES),
    "out?": ("B H P", "x"),
    "dt_softplus": boolean,
    "dt_min": limits,
    "dt_max": limits,
}


@op(
    "(Tensor(a!) out, Tensor(b!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? state_indices, bool dt_softplus, float dt_min, float dt_max) -> ()",
    SPEC,
)
def ssm_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state_indices: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """One step of ssd_prefill for each request, on states that stay where they are.

    Args:
        state: [S, H, P, N] float32, bfloat16 or float16, changed in place; the sum is float32 and is rounded when it is stored,
            y comes from the unrounded one.
        x: [B, H, P] float16, bfloat16 or float32; any stride between requests.
        dt: [B, H], dtype of x or float32, before bias and softplus.
        A: [H], dtype of x or float32; negative: exp(step · A) is the decay.
        B, C: [B, G, N] in x.dtype; the H / G heads of a group share them.
        D: [H], dtype of x or float32: adds D · x. None adds nothing.
        z: [B, H, P] in x.dtype: multiplies the result by silu(z). None multiplies by nothing.
        dt_bias: [H], dtype of x or float32, added to dt.
        dt_softplus: whether dt + dt_bias goes through softplus; None: exactly when dt_bias is given.
        dt_limit: the step is clamped to it, after softplus.
        state_indices: [B] int32, the slot of each request; None: request b has slot b. -1 is padding: its row is zeros and no
            state is touched. The other slots differ from each other.
        out: [B, H, P] in x.dtype, may be x itself.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: y [B, H, P] in x.dtype.
    Raises: ContractError when shapes or dtypes disagree; NotSupported when no implementation takes the call.
    Source: Dao & Gu, arXiv:2405.21060.
    """
    softplus = dt_bias is not None if dt_softplus is None else dt_softplus
    low, high = dt_limit
    launch = ssm_state_update.pick(impl, state, x, dt, A, B, C, D, z, dt_bias, state_indices, out, softplus, low, high)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    launch(out, state, x, dt, A, B, C, D, z, dt_bias, state_indices, softplus, low, high)
    return out


@ssm_state_update.relation
def _relation(
    state: Tensor, x: Tensor, B: Tensor, state_indices: Tensor | None, dt_min: float, dt_max: float, **others: object
) -> tuple[str, str] | None:
    if B.shape[1] == 0 or x.shape[1] % B.shape[1]:
        return "B", f"must have a number of groups that divides H={x.shape[1]}, got {B.shape[1]}"
    if state_indices is None and len(state) < len(x):
        return "state", f"must have a slot for each of {len(x)} requests without `state_indices`, got {len(state)}"
    return ("dt_max", f"must be at least dt_min={dt_min}, got {dt_max}") if dt_max < dt_min else None


@ssm_state_update.reference
def _reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> Tensor:
    wide, per_group = wide_of(x), x.shape[1] // B.shape[1]
    steps = step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max, wide)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for b, slot in enumerate(range(len(x)) if state_indices is None else state_indices.tolist()):
        if slot < 0:
            continue
        step = steps[b][:, None, None]
        keys, queries = (values[b].to(wide).repeat_interleave(per_group, 0)[:, None, :] for values in (B, C))
        h = torch.exp(step * A.to(wide)[:, None, None]) * state[slot].to(wide) + step * x[b].to(wide)[:, :, None] * keys
        state[slot] = h.to(state.dtype)
        row = slice(b, b + 1)
        y[row] = finish((h * queries).sum(2)[None], x[row], D, None if z is None else z[row])
    return y.to(x.dtype)


def _unfit(state: Tensor, x: Tensor, B: Tensor, C: Tensor, **others: object) -> str | None:
    tensors = {"state": state, "x": x, "B": B, "C": C} | {name: others[name] for name in ("z", "out", "A", "D", "dt_bias")}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of `{name}` has stride {tensor.stride(-1)}, the kernel reads stride 1"
    return None


@ssm_state_update.impl("triton", needs=("triton",), supports=_unfit)
def _triton(
    out: Tensor,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> None:
    from penstock.ops.recurrent.ssm_state_update_triton import launch

    launch(out, state, x, dt, A, B, C, D, z, dt_bias, state_indices, dt_softplus, dt_min, dt_max)


@ssm_state_update.impl("cpu", needs=("cpu",))
def _cpu(
    out: Tensor,
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_indices: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> None:
    """All requests at once, heads of a group against its one row of B and C; padded rows are left out by their indices."""
    wide, (H, P), (G, N) = wide_of(x), x.shape[1:], B.shape[1:]
    live, rows = None, None
    if state_indices is not None:
        live = (state_indices >= 0).nonzero()[:, 0]
        rows = state_indices[live].long()
        x, dt, B, C = x[live], dt[live], B[live], C[live]
        z = None if z is None else z[live]
    count = len(x)
    steps = step_sizes(dt, dt_bias, dt_softplus, dt_min, dt_max, wide)
    h = (state[:count] if rows is None else state[rows]).to(wide)
    h = h * torch.exp(steps * A.to(wide))[:, :, None, None]
    taken = (x.to(wide) * steps[:, :, None]).view(count, G, H // G, P, 1)
    h = h.view(count, G, H // G, P, N).addcmul_(taken, B.to(wide)[:, :, None, None, :])
    y = (h.view(count, G, H // G * P, N) @ C.to(wide)[..., None]).view(count, H, P)
    h = h.view(count, H, P, N)
    if rows is None or live is None:
        state[:count] = h
        out.copy_(finish(y, x, D, z))
    else:
        state.index_copy_(0, rows, h.to(state.dtype))
        out.zero_().index_copy_(0, live, finish(y, x, D, z).to(out.dtype))


@ssm_state_update.cost
def _cost(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None = None, **options: object
) -> Cost:
    return Cost(bytes=2 * x.numel() * B.shape[2] * state.element_size() + 2 * nbytes(x) + nbytes(dt, B, C, z))


@ssm_state_update.cases
def cases() -> Iterable[Case]:
    """Decode batches of Mamba-2 2.7B, Bamba 9B and Falcon-H1 7B; then the awkward ones."""

    def case(
        name: str,
        batch: int,
        H: int,
        P: int,
        G: int,
        N: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        state: torch.dtype = torch.float32,
        indices: list[int] | None = None,
        gate: bool = False,
        packed: bool = False,
        bench: bool = False,
        **options: object,
    ) -> Case:
        def build(make):
            arguments = heads(make, batch, H, P, G, N, dtype, packed=packed)
            arguments["state"] = make.randn(batch + 2, H, P, N, dtype=state)
            if gate:
                arguments["z"] = make.randn(batch, H, P, dtype=dtype)
            if indices is not None:
                arguments["state_indices"] = make.tensor(indices)
            elif bench:
                arguments["state_indices"] = make.permutation(batch + 2)[:batch]
            return arguments | options

        return Case(name, build, bench)

    f32, bf16 = torch.float32, torch.bfloat16
    yield case("one_request", 1, 4, 16, 1, 32, packed=True)
    yield case("ragged_padded", 4, 4, 24, 2, 20, indices=[5, -1, 0, 2], gate=True)
    yield case("bfloat16_state", 3, 2, 64, 1, 16, state=bf16, dt_limit=(0.02, 0.3))
    yield case("float32", 2, 3, 8, 1, 16, dtype=f32, dt_bias=None, dt_softplus=True)
    yield case("empty", 0, 2, 16, 1, 16)
    for name, H, P, G, N in (("mamba2_2.7b", 80, 64, 1, 128), ("bamba_9b", 128, 64, 1, 128), ("falcon_h1_7b", 24, 128, 1, 256)):
        for batch in (1, 64, 256):
            if name == "mamba2_2.7b" or batch == 64:
                yield case(f"{name}_{batch}", batch, H, P, G, N, packed=True, bench=True)
    yield case("mamba2_2.7b_64_bfloat16_state", 64, 80, 64, 1, 128, state=bf16, packed=True, bench=True)
