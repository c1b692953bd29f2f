"""Public Triton kernels of recurrent mixers as peers: those of mamba-ssm and of flash-linear-attention (fla-core).

Batches of equal lengths are given to them as the dense batches that they are fastest on. Both tune themselves in their first calls,
some of them on the state they change; what is prepared here is tuned on copies. Nothing is imported before a peer is prepared.
"""

import importlib
import importlib.util

from torch import Tensor

from penstock.bench.inputs import Arguments, copy_arguments
from penstock.bench.timing import Call

# What the published Mamba-2 checkpoints are trained and run with.
CHUNK = 256


def _missing(package: str, arguments: Arguments) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if not any(isinstance(value, Tensor) and value.is_cuda for value in arguments.values()):
        return "needs a CUDA device"
    return None


def _length(arguments: Arguments) -> int | str:
    """The length that all requests share."""
    lengths = arguments["cu_seqlens"].diff().unique().tolist()
    covered = int(arguments["cu_seqlens"][-1]) == len(arguments["x"])
    return (
        lengths[0] if len(lengths) == 1 and covered else "takes one dense batch; a call for each request would be a straw man"
    )


def _chunk_scan(arguments: Arguments) -> Call | str:
    if reason := _missing("mamba_ssm", arguments):
        return reason
    length = _length(arguments)
    if isinstance(length, str):
        return length
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    given = {name: arguments.get(name) for name in ("D", "dt_bias", "initial_states")}
    dense = {
        name: arguments[name].unflatten(0, (-1, length))
        for name in ("x", "dt", "B", "C", "z")
        if arguments.get(name) is not None
    }
    softplus = arguments.get("dt_softplus")
    given["dt_softplus"] = given["dt_bias"] is not None if softplus is None else softplus
    given["dt_limit"] = arguments.get("dt_limit", (0.0, float("inf")))

    def call() -> tuple[Tensor, ...]:
        return scan(A=arguments["A"], chunk_size=CHUNK, return_final_states=True, **dense, **given)

    return call


def _state_update(arguments: Arguments) -> Call | str:
    if reason := _missing("mamba_ssm", arguments):
        return reason
    state, x, dt, B = (arguments[name] for name in ("state", "x", "dt", "B"))
    if arguments.get("dt_limit", (0.0, float("inf"))) != (0.0, float("inf")) or arguments.get("dt_bias") is None:
        return "has no dt_limit and needs a dt_bias"
    update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
    P, N = x.shape[2], B.shape[2]
    # One value a head, seen as [P] and [P, N]: its kernel then reads one.
    A = arguments["A"][:, None, None].expand(-1, P, N)
    per_head = {name: arguments[name][:, None].expand(-1, P) for name in ("D", "dt_bias") if arguments.get(name) is not None}
    steps = dt[:, :, None].expand(-1, -1, P)
    indices = arguments.get("state_indices")

    def call() -> Tensor:
        return update(
            state,
            x,
            steps,
            A,
            B,
            arguments["C"],
            z=arguments.get("z"),
            dt_softplus=True,
            state_batch_indices=indices,
            **per_head,
        )

    return call


def _conv(arguments: Arguments) -> Call | str:
    if reason := _missing("fla", arguments):
        return reason
    length = _length(arguments)
    if isinstance(length, str):
        return length
    if arguments.get("state_indices") is not None:
        return "has no state indices"
    conv = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d
    x, state = arguments["x"].unflatten(0, (-1, length)), arguments.get("state")
    # Its state holds W inputs, of which the oldest is not used.
    initial = None if state is None else _padded(state, x.shape[0])

    def call() -> Tensor:
        y, _ = conv(
            x,
            arguments["weight"],
            arguments.get("bias"),
            initial_state=initial,
            output_final_state=initial is not None,
            activation=arguments.get("activation", "silu"),
        )
        return y

    return call


def _conv_update(arguments: Arguments) -> Call | str:
    if reason := _missing("fla", arguments):
        return reason
    update = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d_update
    x, state, indices = arguments["x"], arguments["state"], arguments.get("state_indices")
    if indices is not None and bool((indices < 0).any()):
        return "has no padding"
    # It takes no indices: its states lie in the order of the batch.
    cache = _padded(state if indices is None else state[indices.long()], len(x))
    options = {"weight": arguments["weight"], "bias": arguments.get("bias"), "activation": arguments.get("activation", "silu")}
    tuning = copy_arguments({"x": x, "cache": cache})
    update(tuning["x"], tuning["cache"], **options)
    return lambda: update(x, cache, **options)[0]


def _padded(state: Tensor, count: int) -> Tensor:
    wider = state.new_zeros(count, state.shape[1], state.shape[2] + 1)
    wider[..., 1:] = state[:count]
    return wider


MAMBA = {
    "ssd_prefill": {"mamba-ssm": _chunk_scan},
    "ssm_state_update": {"mamba-ssm": _state_update},
    "causal_conv1d": {"fla": _conv},
    "causal_conv1d_update": {"fla": _conv_update},
}
