"""The inputs of products: random operands quantised as their format has it, groups of every awkward size."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Make
from penstock.core.formats import BLOCK, FP8_BLOCK, FP8_TENSOR, FP8_TOKEN, Format

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
        yield case(f"{name}_ragged_small", [3, 0, 17, 1], 136, 256, format, tail=5)
        yield case(f"{name}_ragged_gather", [0, 5, 30, 0, 2], 64, 144, format, tokens=9, tail=3)
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
