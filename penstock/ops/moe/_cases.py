"""The inputs of fused_moe: random tokens, weights and routings."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Make
from penstock.core.formats import BLOCK, FP8_BLOCK, FP8_TENSOR, FP8_TOKEN, Format


def _weights(make: Make, E: int, N: int, K: int, format: Format | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Normal weights of deviation 1/√K, drawn expert by expert: float32 takes four times the bytes of FP8."""
    if format is None:
        return make.randn(E, N, K, dtype=dtype, scale=max(K, 1) ** -0.5), None
    shape = {"tensor": (E,), "token": (E, N), "block": (E, -(-N // BLOCK), -(-K // BLOCK))}[format.granularity]
    scale = (make.randn(*shape, dtype=torch.float32).abs().clamp(max=3.0) * 0.3 + 0.7) * max(K, 1) ** -0.5 / 100
    values = torch.empty(E, N, K, dtype=torch.float8_e4m3fn, device=make.device)
    if make.device.type != "meta":
        for expert in values:
            expert.copy_(make.randn(N, K, dtype=torch.float32, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn))
    return values, scale


def routing(make: Make, T: int, E: int, k: int) -> Tensor:
    """[T, k] ids, the k of a token distinct."""
    if make.device.type == "meta":
        return torch.empty(T, k, dtype=torch.int32, device="meta")
    return make.randn(T, E, dtype=torch.float32).argsort(1)[:, :k].to(torch.int32).contiguous()


def layer(
    name: str,
    T: int,
    E: int,
    k: int,
    H: int,
    intermediate: int,
    format: Format | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    ready: bool = False,
    experts: int = 0,
    repeated: bool = False,
    shared: bool = False,
    bench: bool = False,
    **options: Any,
) -> Case:
    """Args: ready: x is FP8; experts: that ids choose from, more than E; repeated: ids may repeat within a token."""

    def build(make: Make) -> dict[str, Any]:
        x = make.randn(T, H, dtype=dtype)
        w_gate_up, gate_up_scale = _weights(make, E, 2 * intermediate, H, format, dtype)
        w_down, down_scale = _weights(make, E, H, intermediate, format, dtype)
        known = experts or E
        ids = make.integers(-1, known, T, k) if repeated else routing(make, T, known, k)
        weights = make.randn(T, k, dtype=torch.float32).abs() / max(k, 1)
        arguments = {"x": x, "w_gate_up": w_gate_up, "w_down": w_down, "topk_ids": ids, "topk_weights": weights, **options}
        if format is not None:
            arguments |= {"w_gate_up_scale": gate_up_scale, "w_down_scale": down_scale, "format": format}
        if ready and format is not None:
            arguments["x"] = make.randn(T, H, dtype=torch.float32, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn)
            spread = make.randn(*format.scale_shape((T, H)), dtype=torch.float32).abs().clamp(max=3.0)
            arguments["x_scale"] = (spread * 0.3 + 0.7) / 100
        if shared:
            arguments["shared_output"] = make.randn(T, H, dtype=dtype)
        return arguments

    return Case(name, build, bench)


# experts, top k, hidden size, intermediate size on one device
MODELS = {
    "qwen3_30b": (128, 8, 2048, 768),
    "qwen3_235b_tp8": (128, 8, 4096, 192),
    "deepseek_v3_tp8": (256, 8, 7168, 256),
}


def layers() -> Iterator[Case]:
    """Cases of fused_moe."""
    for format in (None, FP8_TENSOR, FP8_TOKEN, FP8_BLOCK):
        name = "bf16" if format is None else format.name.lower()
        yield layer(f"{name}_ragged", 7, 5, 3, 144, 80, format)
        yield layer(f"{name}_ragged_parallel", 9, 3, 2, 128, 192, format, experts=8, expert_offset=2, shared=True)
        if format in (None, FP8_BLOCK):
            yield layer(f"{name}_ragged_repeated", 7, 4, 3, 96, 64, format, repeated=True)
            yield layer(f"{name}_large_ragged", 66, 2, 2, 128, 48, format)
        yield layer(f"{name}_decode_row", 2, 8, 3, 128, 64, format, experts=14, expert_offset=3, repeated=True)
        yield layer(f"{name}_empty", 0, 4, 2, 128, 64, format)
    for format in (FP8_TENSOR, FP8_TOKEN, FP8_BLOCK):
        yield layer(f"{format.name.lower()}_ready_ragged", 3, 3, 2, 144, 136, format, ready=True)
    yield layer("no_choices", 3, 4, 0, 64, 32)
    yield layer("float16_ragged", 5, 4, 2, 64, 32, dtype=torch.float16)
    yield layer("float32_ragged", 5, 4, 2, 64, 32, dtype=torch.float32, shared=True)
    for model, shape in MODELS.items():
        for T in (1, 16, 64, 256, 1024, 4096):
            yield layer(f"fp8_block_{model}_{T}", T, *shape, FP8_BLOCK, ready=True, bench=True)
    for T in (1, 64, 4096):
        yield layer(f"fp8_tensor_qwen3_30b_{T}", T, *MODELS["qwen3_30b"], FP8_TENSOR, ready=True, bench=True)
        yield layer(f"bf16_qwen3_30b_{T}", T, *MODELS["qwen3_30b"], bench=True)
