"""Options that are a number for every row or a [B] tensor, one a row: how they are split, checked and read."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from penstock.core.op import Op

OPTION = (torch.float32, torch.float64)
# What an option must be, as a test of numbers and tensors and in words.
Range = tuple[Callable[[Any], Any], str]


def split(op: Op, ranges: Mapping[str, Range], options: Mapping[str, Any], logits: Tensor) -> tuple[list[Any], list[Any]]:
    """The options' tensors (None where a number is given) and their numbers (0 or 1 where a tensor is given).

    Raises ContractError when a number is out of its range; tensors are the contract's and `check_rows`' business.
    """
    tensors: list[Any] = []
    values: list[Any] = []
    for name, option in options.items():
        if isinstance(option, Tensor):
            tensors.append(option)
            values.append(1)
            continue
        good, wanted = ranges[name]
        kind = int if "integer" in wanted else (int, float)
        if isinstance(option, bool) or not isinstance(option, kind) or not good(option):
            raise op.contract.error(name, f"must be {wanted}, or a [B] tensor, got {option!r}", {"logits": logits})
        tensors.append(None)
        values.append(option)
    return tensors, values


def check_rows(op: Op, ranges: Mapping[str, Range], arguments: Mapping[str, Any]) -> None:
    """Raises ContractError when a tensor option holds a value out of its range."""
    for name, (good, wanted) in ranges.items():
        option = arguments[name]
        if option is None or bool(good(option).all()):
            continue
        bad = option[~good(option)][0].item()
        raise op.contract.error(name, f"must hold {wanted} in every row, got {bad!r}", arguments)


def rows_of(option: Tensor | None, value: float, logits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B] of the dtype, whichever way the option was given."""
    if option is None:
        return torch.full((logits.shape[0],), value, dtype=dtype, device=logits.device)
    return option.to(dtype)
