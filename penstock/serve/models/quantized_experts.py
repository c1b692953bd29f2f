"""The weights of all experts of a layer in FP8, as fused_moe takes them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.core.formats import BLOCK, FP8_BLOCK, FP8_TOKEN, Format
from penstock.serve.models.linear import check_scale
from penstock.serve.models.quantization import Scheme


@dataclass(slots=True)
class QuantizedExperts:
    """One of the two matrices of every expert, [E, N, K], where N is one published layer (down) or two (gate, up).

    fused_moe quantises its activations itself, by token or by 128 of a token's columns, and the gated product always by 128.
    Static scales of the input, which are coarser, are read and not used.

    Args:
        scheme: of all experts.
        modules: [E][layers] published names.
        rows: output rows of each layer; columns: those of the published weight.
        codes: [E, layers · rows', K'], where rows' and K' are a multiple of 128 with block scales if gate and up must begin
            blocks of their own: what is added is zero, and adds zero.
        scale: as stored: [E, layers], [E, layers · rows], or [E, layers · ⌈rows/128⌉, ⌈K/128⌉]; after prepare, of the format.
        input_scale: [E, layers] with a static scheme until prepare.
        format: FP8_TOKEN or FP8_BLOCK.
    """

    scheme: Scheme
    modules: list[tuple[str, ...]]
    rows: int
    columns: int
    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    format: Format

    @classmethod
    def allocate(
        cls,
        scheme: Scheme,
        modules: list[tuple[str, ...]],
        rows: int,
        columns: int,
        device: str | torch.device,
        padded: tuple[int, int],
    ) -> "QuantizedExperts":
        """Uninitialised, but for the padding up to (rows, columns) of each layer, which is zero."""
        experts, layers, block = len(modules), len(modules[0]), scheme.weights == "block"
        scales: tuple[int, ...] = (experts, layers * scheme.scale_rows(rows))
        if block:
            scales = (*scales, scheme.scale_columns(columns))
        new = torch.empty if padded == (rows, columns) else torch.zeros
        return cls(
            scheme,
            modules,
            rows,
            columns,
            new((experts, layers * padded[0], padded[1]), dtype=scheme.activations.dtype, device=device),
            torch.empty(scales, dtype=torch.float32, device=device),
            torch.empty((experts, layers), dtype=torch.float32, device=device) if scheme.static else None,
            FP8_BLOCK if block else FP8_TOKEN,
        )

    def names(self) -> Iterator[tuple[str, Tensor]]:
        """Where each tensor of a checkpoint goes."""
        for expert, modules in enumerate(self.modules):
            codes, scales = self.codes[expert].chunk(len(modules)), self.scale[expert].chunk(len(modules))
            for layer, module in enumerate(modules):
                yield f"{module}.weight", codes[layer][: self.rows, : self.columns]
                scale = scales[layer]
                yield f"{module}.{self.scheme.scale_name}", scale[:, None] if self.scheme.weights == "channel" else scale
                if self.input_scale is not None:
                    yield f"{module}.input_scale", self.input_scale[expert, layer : layer + 1]

    def prepare(self) -> None:
        """Checks the scales that were read and gives each row its own where it had its layer's."""
        check_scale(f"{self.modules[0][0]} … {self.modules[-1][-1]}.{self.scheme.scale_name}", self.scale)
        if self.scheme.weights == "tensor":
            self.scale = self.scale.repeat_interleave(self.rows, 1)
        self.input_scale = None


def padded_size(scheme: Scheme, size: int) -> int:
    """The width of an expert: a multiple of 128 with block scales, so that the up projection begins a block."""
    return -(-size // BLOCK) * BLOCK if scheme.weights == "block" else size
