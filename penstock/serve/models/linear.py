"""x · wᵀ + bias for weights that are plain tensors and for those that a checkpoint stores in 8 bits.

y = linear(x, weights.qkv, weights.qkv_bias)
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from penstock.core.formats import BLOCK, FP8_BLOCK, FP8_TENSOR, FP8_TOKEN, Format
from penstock.ops import gemm_counters, gemm_fp8, gemm_int8, quantize
from penstock.serve.models.layer_spec import ModelError
from penstock.serve.models.quantization import Scheme

Names = Iterator[tuple[str, Tensor]]
Operand = tuple[Tensor, Tensor]


def linear(x: Tensor, weight: "Tensor | QuantizedLinear", bias: Tensor | None = None) -> Tensor:
    """[T, K] → [T, N] in x.dtype."""
    if isinstance(weight, Tensor):
        return functional.linear(x, weight, bias)
    return weight(x, bias)


@dataclass(slots=True)
class Product:
    """One gemm: codes [N, K] and what quantises its other operand.

    Args:
        scale: of the codes, as gemm_fp8 and gemm_int8 take it.
        format: of the gemm.
        input_scale: [1], the static scale of all activations; None for a dynamic one.
        counters: of its own, which saves a fill in each call.
    """

    codes: Tensor
    scale: Tensor
    format: Format
    input_scale: Tensor | None
    counters: Tensor

    def quantise(self, x: Tensor) -> Operand:
        """Codes of x [T, K] and their scale."""
        return quantize(x, format=self.format, scale=self.static_scale(len(x)))

    def static_scale(self, rows: int) -> Tensor | None:
        """The scale of so many rows of activations as the format wants it; None where it comes from the values."""
        if self.input_scale is None or self.format is FP8_TENSOR:
            return self.input_scale
        return self.input_scale.expand(rows).contiguous()

    def multiply(self, operand: Operand, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        """[T, N] in dtype, of what quantise returned."""
        codes, scale = operand
        gemm = gemm_fp8 if self.codes.dtype.is_floating_point else gemm_int8
        options = {"format": self.format, "bias": bias, "out_dtype": dtype, "counters": self.counters}
        return gemm(codes, self.codes, scale, self.scale, **options)


@dataclass(slots=True)
class QuantizedLinear:
    """The weights of one or several published layers with the same input, one below the other.

    They are one product wherever that changes no number: scales of a tensor each become scales of rows; block scales join where
    a layer begins a new block; static scales of the input must be equal.

    Args:
        scheme: of all of them.
        modules, rows: their published names and output rows.
        codes: [N, K].
        scale: as stored, one after the other: [modules], [N], or [Σ ⌈rows/128⌉, ⌈K/128⌉].
        input_scale: [modules] with a static scheme, else None.
    """

    scheme: Scheme
    modules: tuple[str, ...]
    rows: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    products: list[Product] = field(default_factory=list)

    @classmethod
    def allocate(
        cls, scheme: Scheme, modules: dict[str, int], columns: int, device: str | torch.device, dtype: torch.dtype | None = None
    ) -> "QuantizedLinear":
        """Uninitialised; `dtype` is that of the codes, where they are wanted in a wider one."""
        rows = tuple(modules.values())
        scales: tuple[int, ...] = (sum(scheme.scale_rows(each) for each in rows),)
        if scheme.weights == "block":
            scales = (*scales, scheme.scale_columns(columns))
        return cls(
            scheme,
            tuple(modules),
            rows,
            torch.empty(sum(rows), columns, dtype=dtype or scheme.activations.dtype, device=device),
            torch.empty(scales, dtype=torch.float32, device=device),
            torch.empty(len(rows), dtype=torch.float32, device=device) if scheme.static else None,
        )

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, K] → [T, N] in x.dtype."""
        operand, parts, start = None, [], 0
        for product in self.products:
            if operand is None or product.input_scale is not None:
                operand = product.quantise(x)
            end = start + len(product.codes)
            parts.append(product.multiply(operand, x.dtype, None if bias is None else bias[start:end]))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def names(self) -> Names:
        """Where each tensor of a checkpoint goes."""
        codes = self.codes.split(self.rows)
        scales = self.scale.split([self.scheme.scale_rows(each) for each in self.rows])
        for index, module in enumerate(self.modules):
            yield f"{module}.weight", codes[index]
            scale = scales[index]
            yield f"{module}.{self.scheme.scale_name}", scale[:, None] if self.scheme.weights == "channel" else scale
            if self.input_scale is not None:
                yield f"{module}.input_scale", self.input_scale[index : index + 1]

    def prepare(self) -> None:
        """Checks the scales that were read and decides which layers are one product."""
        scales = self.scale.split([self.scheme.scale_rows(each) for each in self.rows])
        for index, module in enumerate(self.modules):
            check_scale(f"{module}.{self.scheme.scale_name}", scales[index])
            if self.input_scale is not None:
                check_scale(f"{module}.input_scale", self.input_scale[index], positive=True)
        blocks_join = self.scheme.weights != "block" or all(rows % BLOCK == 0 for rows in self.rows[:-1])
        inputs_agree = self.input_scale is None or bool((self.input_scale == self.input_scale[0]).all())
        count = len(self.modules)
        ends = [0, count] if blocks_join and inputs_agree else list(range(count + 1))
        self.products = [self._product(first, last) for first, last in pairwise(ends)]

    def _product(self, first: int, last: int) -> Product:
        """That of the layers first … last - 1."""
        scheme, rows = self.scheme, self.rows[first:last]
        start = sum(self.rows[:first])
        at = sum(scheme.scale_rows(each) for each in self.rows[:first])
        scale = self.scale[at : at + sum(scheme.scale_rows(each) for each in rows)]
        format = scheme.activations
        input_scale = None if self.input_scale is None else self.input_scale[first : first + 1]
        if scheme.weights == "tensor":
            if len(rows) == 1 and scheme.static and format is FP8_TOKEN:
                format = FP8_TENSOR
            else:
                scale = scale.repeat_interleave(torch.tensor(rows, device=scale.device))
        return Product(self.codes[start : start + sum(rows)], scale, format, input_scale, gemm_counters(self.codes.device))

    def dequantised(self) -> Tensor:
        """The weights [N, K] of one layer themselves, in place of codes that were allocated in their dtype."""
        [product] = self.products
        block = product.scale.dim() == 2
        scale = FP8_BLOCK.spread(product.scale, product.codes.shape, True) if block else product.scale.view(-1, 1)
        return product.codes.copy_(product.codes.float() * scale)


def check_scale(name: str, scale: Tensor, positive: bool = False) -> None:
    """Raises ModelError unless all scales are finite and none is negative, or zero where x is divided by it."""
    fine = scale.isfinite() & ((scale > 0) if positive else (scale >= 0))
    if not bool(fine.all()):
        first = scale[~fine].flatten()[0].item() if scale.dim() else scale.item()
        raise ModelError(f"{name} must be finite and {'positive' if positive else 'not negative'}, got {first}")
