"""The inputs of products: random operands quantised as their format has it, groups of every awkward size."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Make
from penstock.core.formats import BLOCK, FP8_BLOCK, FP8_TENSOR, FP8_TOKEN, INT8_TOKEN, Format
from penstock.ops.matmul.counters import COUNTERS
from penstock.ops.matmul.split_fp32 import split_fp32

AWKWARD = [0, 1, 63, 65, 0, 64, 127, 145]


def quantised(make: Make, format: Format | None, *shape: int, weight: bool = False, dtype: torch.dtype = torch.bfloat16):
    """(values, scale) of normal numbers, weights with a deviation of 1/√K; no scale without a format.

    Codes are drawn as such, e4m3 of 100 · a normal number, with scales that differ by up to two times.
    """
    size = max(shape[-1], 1) ** -0.5 if weight else 1.0
    if format is None:
        return make.randn(*shape, dtype=dtype, scale=size), None
    wanted = format.scale_shape(shape, weight and format.granularity == "block")
    if weight and format.granularity == "tensor" and len(shape) == 3:
        wanted = shape[:1]
    spread = make.randn(*wanted, dtype=torch.float32).abs().clamp(max=3.0) * 0.3 + 0.7
    if format.dtype is torch.int8:
        values = make.randn(*shape, dtype=torch.float32, scale=40.0).clamp(-127, 127).to(torch.int8)
        return values, spread * size / 40
    values = _codes(make, shape)
    return values, spread * size / 100


def _codes(make: Make, shape: Sequence[int]) -> Tensor:
    """e4m3 codes of normal numbers; large ones expert by expert, since float32 takes four times their bytes."""
    if len(shape) < 3 or make.device.type == "meta":
        return make.randn(*shape, dtype=torch.float32, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn)
    values = torch.empty(*shape, dtype=torch.float8_e4m3fn, device=make.device)
    for expert in values:
        expert.copy_(make.randn(*shape[1:], dtype=torch.float32, scale=100.0).clamp(-448, 448).to(torch.float8_e4m3fn))
    return values


def offsets(make: Make, sizes: Sequence[int]) -> Tensor:
    """[0, the sums of the first sizes]."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + size)
    return make.tensor(ends)


def grouped_case(
    name: str,
    sizes: Sequence[int],
    N: int,
    K: int,
    format: Format | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tail: int = 0,
    tokens: int | None = None,
    gaps: bool = False,
    bench: bool = False,
    **options: Any,
) -> Case:
    """Args: tail: rows after the last group; tokens: rows of x that gather reads, some out of range; gaps: rows with gaps."""

    def build(make: Make) -> dict[str, Any]:
        rows = sum(sizes) + tail
        count = rows if tokens is None else tokens
        x, x_scale = quantised(make, format, count, K + 16 * gaps, dtype=dtype)
        w, w_scale = quantised(make, format, len(sizes), N, K + 16 * gaps, weight=True, dtype=dtype)
        if gaps:
            x, w = x[:, :K], w[:, :, :K]
            if format is FP8_BLOCK:
                blocks = -(-K // BLOCK)
                x_scale, w_scale = x_scale[:, :blocks].contiguous(), w_scale[..., :blocks].contiguous()
        arguments = {"x": x, "w": w, "group_offsets": offsets(make, sizes), **options}
        if format is not None:
            arguments |= {"x_scale": x_scale, "w_scale": w_scale, "format": format}
        if tokens is not None:
            arguments["gather"] = make.integers(-1, tokens + 1, rows)
        return arguments

    return Case(name, build, bench)


def grouped() -> Iterator[Case]:
    """Cases of grouped_gemm."""
    case = grouped_case
    for format in (None, FP8_TENSOR, FP8_TOKEN, FP8_BLOCK):
        name = "bf16" if format is None else format.name.lower()
        few = format in (FP8_TENSOR, FP8_TOKEN)
        yield case(f"{name}_ragged", AWKWARD[:5] if few else AWKWARD, 136 if format is FP8_BLOCK else 40, 144, format)
        yield case(f"{name}_ragged_small", [3, 0, 17, 1], 136, 136, format, tail=5)
        yield case(f"{name}_ragged_gather", [0, 5, 30, 0, 2], 64, 144, format, tokens=9, tail=3)
        if not few:
            yield case(f"{name}_ragged_gaps", [2, 0, 20], 48, 130, format, gaps=True)
            yield case(f"{name}_large_group", [130, 0, 129], 72, 128, format)
        yield case(f"{name}_empty_groups", [0, 0, 0], 32, 128, format, tail=2)
        yield case(f"{name}_empty", [0, 0], 32, 128, format)
        yield case(f"{name}_no_k", [3, 2], 32, 0, format)
    yield case("float16_ragged", AWKWARD[:5], 72, 96, dtype=torch.float16)
    yield case("float32_ragged", AWKWARD[:5], 72, 96, dtype=torch.float32)
    yield case("bf16_float32_out_ragged", [3, 0, 20], 72, 96, out_dtype=torch.float32)
    for format in (FP8_TENSOR, FP8_BLOCK):
        name = format.name.lower()
        yield case(f"{name}_exact_ragged", [3, 0, 140], 72, 272, format, out_dtype=torch.float32, exact_accumulation=True)
    yield case("one_group_ragged", [67], 72, 96)
    yield case("many_groups", [3 * (i % 71 == 5) for i in range(512)], 16, 64)
    for format in (None, FP8_TENSOR, FP8_TOKEN, FP8_BLOCK):
        name = "bf16" if format is None else format.name.lower()
        for rows in (8, 64, 128, 512, 4096):
            yield case(f"{name}_g8_m{rows}_n4096_k7168", [rows] * 8, 4096, 7168, format, bench=True)
        yield case(f"{name}_g64_m32_n3072_k4096", [32] * 64, 3072, 4096, format, bench=True)


def _dense(
    name: str,
    M: int,
    N: int,
    K: int,
    format: Format,
    *,
    biased: bool = False,
    gaps: bool = False,
    counted: bool = False,
    bench: bool = False,
    **options: Any,
) -> Case:
    """Args: gaps: rows with gaps; counted: the caller keeps the counters."""

    def build(make: Make) -> dict[str, Any]:
        x, x_scale = quantised(make, format, M, K + 16 * gaps)
        w, w_scale = quantised(make, format, N, K + 16 * gaps, weight=True)
        if gaps:
            x, w = x[:, :K], w[:, :K]
        arguments = {"x": x, "w": w, "x_scale": x_scale, "w_scale": w_scale, "format": format, **options}
        if biased:
            arguments["bias"] = make.randn(N, dtype=torch.bfloat16)
        if counted:
            arguments["counters"] = _zeros(make)
        return arguments

    return Case(name, build, bench)


def _zeros(make: Make) -> Tensor:
    return torch.zeros(COUNTERS, dtype=torch.int32, device=make.device)


def fp8() -> Iterator[Case]:
    """Cases of gemm_fp8."""
    for format in (FP8_TENSOR, FP8_TOKEN, FP8_BLOCK):
        name = format.name.lower()
        yield _dense(f"{name}_ragged", 5, 136, 400, format, biased=True)
        yield _dense(f"{name}_ragged_split", 17, 70, 640, format, counted=True)
        yield _dense(f"{name}_ragged_many_rows", 145, 136, 144, format)
        yield _dense(f"{name}_ragged_float32", 3, 40, 272, format, out_dtype=torch.float32, exact_accumulation=True)
        yield _dense(f"{name}_empty", 0, 40, 128, format)
        yield _dense(f"{name}_no_k", 3, 40, 0, format, biased=True)
        for M in (1, 16, 64, 128):
            yield _dense(f"{name}_m{M}_n4096_k4096", M, 4096, 4096, format, counted=True, bench=True)
        yield _dense(f"{name}_m8192_n8192_k8192", 8192, 8192, 8192, format, bench=True)
    yield _dense("fp8_tensor_ragged_gaps", 9, 40, 130, FP8_TENSOR, gaps=True)
    yield _dense(
        "fp8_tensor_exact_m16_n4096_k4096", 16, 4096, 4096, FP8_TENSOR, counted=True, exact_accumulation=True, bench=True
    )
    yield _dense("fp8_tensor_exact_m8192_n8192_k8192", 8192, 8192, 8192, FP8_TENSOR, exact_accumulation=True, bench=True)


def int8() -> Iterator[Case]:
    """Cases of gemm_int8."""
    yield _dense("ragged", 5, 136, 400, INT8_TOKEN, biased=True)
    yield _dense("ragged_split", 17, 70, 640, INT8_TOKEN, counted=True)
    yield _dense("ragged_many_rows", 145, 136, 144, INT8_TOKEN, out_dtype=torch.float32)
    yield _dense("ragged_gaps", 9, 40, 130, INT8_TOKEN, gaps=True)
    yield _dense("empty", 0, 40, 128, INT8_TOKEN)
    yield _dense("no_k", 3, 40, 0, INT8_TOKEN)
    for M in (16, 64, 128):
        yield _dense(f"m{M}_n4096_k4096", M, 4096, 4096, INT8_TOKEN, counted=True, bench=True)
    yield _dense("m8192_n8192_k8192", 8192, 8192, 8192, INT8_TOKEN, bench=True)


def _routed(
    name: str, M: int, N: int, K: int, *, counted: bool = False, gaps: bool = False, bench: bool = False, **options: Any
) -> Case:
    def build(make: Make) -> dict[str, Any]:
        x = make.randn(M, K + 8 * gaps)[:, :K]
        w_hi, w_lo = split_fp32(make.randn(N, K, dtype=torch.float32, scale=max(K, 1) ** -0.5))
        arguments = {"x": x, "w_hi": w_hi, "w_lo": w_lo, **options}
        return arguments | {"counters": _zeros(make)} if counted else arguments

    return Case(name, build, bench)


def router() -> Iterator[Case]:
    """Cases of gemm_bf16_fp32."""
    yield _routed("ragged", 5, 70, 264)
    yield _routed("ragged_split", 17, 130, 640, counted=True)
    yield _routed("ragged_many_rows", 145, 72, 136, out_dtype=torch.bfloat16)
    yield _routed("ragged_gaps", 3, 16, 100, gaps=True)
    yield _routed("empty", 0, 16, 64)
    yield _routed("no_k", 2, 16, 0)
    for M in (1, 16, 64, 512, 4096):
        yield _routed(f"m{M}_n192_k4096", M, 192, 4096, counted=True, bench=True)
