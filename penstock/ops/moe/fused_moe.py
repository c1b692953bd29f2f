"""y[t] = Σ_j weight[t, j] · down(silu(gate(x[t])) · up(x[t])) over the token's experts: a feed-forward layer of a mixture."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import DENSE, INDICES, anything, count, one_of
from penstock.core.formats import BLOCK, FORMATS, FP8_BLOCK, Format, name_of
from penstock.core.op import op
from penstock.ops.matmul.scales import dequantised, expert_scale, input_format, is_fp8_format, scale_fault, weight_shapes
from penstock.ops.matmul.tensor_core import accumulated
from penstock.ops.moe import _cases

OPERANDS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
RESULTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_EXPERTS = 512
MAX_TOP_K = 64

SPEC = {
    "x": ("T H", OPERANDS),
    "w_gate_up": ("E 2*I H", OPERANDS),
    "w_down": ("E H I", "w_gate_up"),
    "topk_ids": ("T k", INDICES, DENSE),
    "topk_weights": ("T k", (torch.float32, torch.float64), DENSE),
    "w_gate_up_scale": anything,
    "w_down_scale": anything,
    "x_scale": anything,
    "shared_output?": ("T H", RESULTS, DENSE),
    "format": is_fp8_format,
    "activation": one_of("silu"),
    "expert_offset": count,
    "out?": ("T H", RESULTS, DENSE),
}


@op(
    "(Tensor(a!) out, Tensor x, Tensor w_gate_up, Tensor w_down, Tensor topk_ids, Tensor topk_weights,"
    " Tensor? w_gate_up_scale, Tensor? w_down_scale, Tensor? x_scale, Tensor? shared_output, str? format, str activation,"
    " int expert_offset) -> ()",
    SPEC,
    tile=128,
)
def fused_moe(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    w_gate_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    format: Format | None = None,
    activation: str = "silu",
    expert_offset: int = 0,
    shared_output: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The experts of each token, and the weighted sum of what they give, in float32 and in the order of topk_ids.

    With a format the weights are FP8. x is FP8 with its scale, or it is quantised first, by FP8_BLOCK or else by FP8_TOKEN. The
    gated product is float32 and is quantised in groups of 128 channels, as activations of FP8_BLOCK, whatever the format: so a
    token's result does not depend on the others, and no pass over whole rows is needed. Without a format the gated product is
    rounded to x.dtype. Each expert's output is rounded to the result's dtype before it is weighted.

    Args:
        x: [T, H] bfloat16, float16 or float8_e4m3fn; float32 and float64 on CPU; stride 1 along H.
        w_gate_up: [E, 2I, H], the gate's rows first; x.dtype, or float8_e4m3fn with a format; E up to 512.
        w_down: [E, H, I], dtype of w_gate_up.
        topk_ids: [T, k] int32; ids outside [expert_offset, expert_offset + E) add nothing, as on another rank's experts; the
            same id may stand twice in a row.
        topk_weights: [T, k] float32.
        w_gate_up_scale: float32: FP8_TENSOR [1] or [E], FP8_TOKEN [E, 2I], FP8_BLOCK [E, ⌈2I/128⌉, ⌈H/128⌉].
        w_down_scale: float32: FP8_TENSOR [1] or [E], FP8_TOKEN [E, H], FP8_BLOCK [E, ⌈H/128⌉, ⌈I/128⌉].
        x_scale: float32, when x is FP8: FP8_TENSOR [1], FP8_TOKEN [T], FP8_BLOCK [T, ⌈H/128⌉].
        format: how the weights, and x when it is FP8, are quantised; None for not at all.
        activation: "silu".
        expert_offset: the id of the first expert in the weights.
        shared_output: [T, H] in the result's dtype, added in float32 before the sum is rounded.
        out: [T, H]; not shared_output itself.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: [T, H] in x.dtype, bfloat16 for FP8.
    Raises: ContractError when shapes, dtypes or scales disagree; NotSupported when no implementation takes the call.
    Source: Shazeer et al., arXiv:1701.06538; Gale et al., arXiv:2211.15841; DeepSeek-AI, arXiv:2412.19437 (FP8 by blocks).
    """
    name = name_of(format)
    scales = (w_gate_up_scale, w_down_scale, x_scale)
    options = (shared_output, name, activation, expert_offset)
    launch = fused_moe.pick(impl, x, w_gate_up, w_down, topk_ids, topk_weights, *scales, *options, out)
    if out is None:
        out = x.new_empty(x.shape, dtype=torch.bfloat16 if x.element_size() == 1 else x.dtype)
    launch(out, x, w_gate_up, w_down, topk_ids, topk_weights, *scales, *options)
    return out


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@fused_moe.relation
def _relation(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    w_gate_up_scale: Tensor | None,
    w_down_scale: Tensor | None,
    x_scale: Tensor | None,
    shared_output: Tensor | None,
    format: str | None,
    out: Tensor | None,
    **others: object,
) -> tuple[str, str] | None:
    E = w_gate_up.shape[0]
    if not 1 <= E <= MAX_EXPERTS:
        return "w_gate_up", f"must have 1 to {MAX_EXPERTS} experts, got {E}"
    if w_down.shape[2] == 0:
        return "w_down", "must have at least one channel of the product, got 0"
    if topk_ids.shape[1] > MAX_TOP_K:
        return "topk_ids", f"must have at most {MAX_TOP_K} experts a token, got {topk_ids.shape[1]}"
    # The float64 oracle comes with float64 for every float.
    weights = torch.float64 if x.dtype is torch.float64 else x.dtype if format is None else torch.float8_e4m3fn
    if w_gate_up.dtype is not weights:
        return "w_gate_up", f"must be {_short(weights)} with format={format}, got {_short(w_gate_up.dtype)}"
    if x.dtype is torch.float8_e4m3fn and (format is None or x_scale is None):
        return "x_scale", "and `format` must be given when x is float8_e4m3fn"
    if x.dtype not in (torch.float8_e4m3fn, torch.float64) and x_scale is not None:
        return "x_scale", f"must be None when x is {_short(x.dtype)}: it is quantised here"
    result = torch.bfloat16 if x.element_size() == 1 else x.dtype
    for name, value in (("shared_output", shared_output), ("out", out)):
        if value is not None and value.dtype is not result:
            return name, f"must be {_short(result)}, got {_short(value.dtype)}"
    if x_scale is not None:
        fault = scale_fault(format, "x_scale", x_scale, [FORMATS[format].scale_shape(x.shape)] if format else [])
        if fault:
            return fault
    for name, scale, w in (("w_gate_up_scale", w_gate_up_scale, w_gate_up), ("w_down_scale", w_down_scale, w_down)):
        fault = scale_fault(format, name, scale, weight_shapes(format, tuple(w.shape)) if format else [])
        if fault:
            return fault
    return None


def _plain(x: Tensor, w: Tensor, restart: int | None) -> Tensor:
    return x @ w.t()


def _compute(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w_gate_up_scale: Tensor | None,
    w_down_scale: Tensor | None,
    x_scale: Tensor | None,
    shared_output: Tensor | None,
    format: str | None,
    activation: str,
    expert_offset: int,
    rounded: torch.dtype | None = None,
) -> Tensor:
    """The definition; with `rounded` the naive computation, which rounds to that dtype what kernels keep between the products.

    The naive one leaves the product unquantised: where an accumulator moves a value to the next code, the error is that of a
    code's rounding, which this counts for every value.
    """
    T, k = topk_ids.shape
    E = w_gate_up.shape[0]
    multiply = _plain if rounded is None or format is None else accumulated
    restart = BLOCK if format == "FP8_BLOCK" else None
    if format is not None and x_scale is None:
        kind = input_format(format)
        wide = dequantised(x, None, None)
        x_scale = kind.dynamic_scale(wide)
        wide = kind.encode(wide / kind.spread(x_scale, wide.shape)).to(wide.dtype) * kind.spread(x_scale, wide.shape)
    else:
        wide = dequantised(x, x_scale, format)
    outputs = wide.new_zeros(T * k, x.shape[1])
    local = topk_ids.flatten() - expert_offset
    for expert in local.unique().tolist():
        if not 0 <= expert < E:
            continue
        slots = (local == expert).nonzero()[:, 0]
        scales = [
            None if scale is None or format is None else expert_scale(scale, expert, E, format)
            for scale in (w_gate_up_scale, w_down_scale)
        ]
        products = multiply(wide[slots // k], dequantised(w_gate_up[expert], scales[0], format, weight=True), restart)
        gate, up = products.chunk(2, -1)
        product = gate * torch.sigmoid(gate) * up
        if format is not None and rounded is None:
            scale = FP8_BLOCK.spread(FP8_BLOCK.dynamic_scale(product), product.shape)
            product = FP8_BLOCK.encode(product / scale).to(product.dtype) * scale
        elif format is None and rounded is not None:
            product = product.to(rounded).to(product.dtype)
        y = multiply(product, dequantised(w_down[expert], scales[1], format, weight=True), BLOCK)
        outputs[slots] = y if rounded is None else y.to(rounded).to(y.dtype)
    inside = (topk_ids >= expert_offset) & (topk_ids < expert_offset + E)
    weights = torch.where(inside, topk_weights, 0).to(wide.dtype)
    total = (outputs.view(T, k, x.shape[1]) * weights[..., None]).sum(1)
    return total if shared_output is None else total + shared_output


fused_moe.reference(_compute)


@fused_moe.baseline
def _baseline(x: Tensor, *others: Any) -> Tensor:
    compute: Callable[..., Tensor] = _compute
    return compute(x, *others, rounded=torch.bfloat16 if x.element_size() == 1 else x.dtype)


def _fits(x: Tensor, w_gate_up: Tensor, w_down: Tensor, **others: Any) -> str | None:
    if x.dtype is torch.float32:
        return "float32 operands: tensor cores would round them to TF32"
    for name, value in (("x", x), ("w_gate_up", w_gate_up), ("w_down", w_down)):
        if value.stride(-1) != 1 and value.shape[-1] > 1:
            return f"the last dimension of `{name}` has stride {value.stride(-1)}, the kernels read stride 1"
    for name in ("w_gate_up_scale", "w_down_scale", "x_scale"):
        if others[name] is not None and not others[name].is_contiguous():
            return f"`{name}` has strides {list(others[name].stride())}, the kernels want it contiguous"
    return None


@fused_moe.impl("triton", needs=("triton",), supports=_fits, instructions=("HGMMA", "QGMMA"))
def _triton(out: Tensor, *arguments: Any) -> None:
    from penstock.ops.moe.fused_moe_triton import launch

    launch(out, *arguments)


@fused_moe.impl("cpu", needs=("cpu",))
def _cpu(out: Tensor, x: Tensor, *others: Any) -> None:
    if x.dtype is torch.float64:
        out.copy_(_compute(x, *others))
        return
    from penstock.ops.moe.fused_moe_cpu import compute

    compute(out, x, *others)


@fused_moe.cost
def _cost(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    expert_offset: int = 0,
    shared_output: Tensor | None = None,
    **options: Any,
) -> Cost:
    E, H, intermediate = w_down.shape
    local = topk_ids - expert_offset
    mine = local[(local >= 0) & (local < E)]
    hit = len(mine.unique())
    read = hit * 3 * H * intermediate * w_down.element_size() + nbytes(x, topk_ids, topk_weights, shared_output)
    written = x.numel() * (2 if x.element_size() == 1 else x.element_size())
    rate = "fp8" if w_down.element_size() == 1 else "bf16"
    return Cost(bytes=read + written, flops=6 * mine.numel() * H * intermediate, rate=rate)


@fused_moe.cases
def cases() -> Iterable[Case]:
    """Every format, awkward routings, then the layers of published models."""
    return _cases.layers()
