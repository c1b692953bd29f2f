"""|got - float64| ≤ 2 · max|same-dtype reference - float64| + one rounding: a tolerance nobody picks.

Both sides come from the operator's own reference: once on the inputs widened to float64, once on the inputs as they are.
Quantised codes are judged by their distance in codes, and the results of an operator declared exact by their bits.
An operator whose kernels must round in between (attention's P) declares a `baseline` that rounds in the same places.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Make
from penstock.core.check import short
from penstock.core.op import Op

CODES = (torch.float8_e4m3fn, torch.int8)
# Sums in another order move a value across the middle between two codes once in thousands; beyond that, what rounding the
# inputs of the reference does counts twice.
MOVED_CODES = 0.01


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty and its kin hold NaN (integers: the largest value), so that an unwritten output shows."""
    memory = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        memory.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def judge(name: str, got: Tensor, exact: Tensor, same_dtype: Tensor, tile: int | None = None) -> None:
    """Raises AssertionError unless `got` is as close to `exact` as the budget allows.

    Args:
        name: of the output, for the message.
        got: what an implementation returned.
        exact: the reference in float64.
        same_dtype: the reference (or the declared baseline) in the inputs' own dtype.
        tile: the budget is taken per tile × tile square of the last two dimensions, so that one wrong tile cannot hide.
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, wanted {list(exact.shape)}"
    if got.dtype in CODES and got.dtype == exact.dtype:
        _judge_codes(name, got.cpu(), exact.cpu(), same_dtype.cpu())
        return
    if not got.dtype.is_floating_point:
        wrong = (got.cpu() != exact.cpu()).nonzero()
        assert len(wrong) == 0, f"{name}: {len(wrong)} integers differ, first at {wrong[0].tolist()}"
        return
    home = exact.device
    got64, exact, same = got.detach().to(home).double(), exact.double(), same_dtype.to(home).double()
    special = ~exact.isfinite()
    agree = torch.where(exact.isnan(), got64.isnan(), got64 == exact)
    assert bool(agree[special].all()), f"{name}: infinities or NaNs are not where the reference has them"
    bad = ~got64.isfinite() & ~special
    if bool(bad.any()):
        where = bad.nonzero()
        raise AssertionError(f"{name}: {len(where)} values are not finite, first at {where[0].tolist()} of {list(got.shape)}")
    if got.numel() == 0:
        return
    zero = torch.zeros_like(exact)
    error = torch.where(special, zero, (got64 - exact).abs())
    naive = torch.where(special, zero, (same - exact).abs())
    facts = torch.finfo(got.dtype)
    rounding = torch.where(special, zero, facts.eps * exact.abs() + facts.tiny)
    allowed = 2 * _tile_max(naive, tile) + rounding
    over = error - allowed
    if bool((over > 0).any()):
        worst = int(over.argmax())
        at = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
        raise AssertionError(
            f"{name}: {int((over > 0).sum())} of {error.numel()} values over budget; at {at} got {got64.flatten()[worst]:.6g}, "
            f"exact {exact.flatten()[worst]:.6g}, error {error.flatten()[worst]:.3g}, "
            f"allowed {allowed.flatten()[worst]:.3g} ({short(got.dtype)})"
        )


def _judge_codes(name: str, got: Tensor, exact: Tensor, same: Tensor) -> None:
    """One code up or down, for few more values than in the reference of the same dtype. NaN must be where it should be."""
    steps = (_ordinal(got) - _ordinal(exact)).abs()
    far, moved = (steps > 1).nonzero(), int((steps > 0).sum())
    assert len(far) == 0, (
        f"{name}: {len(far)} of {steps.numel()} codes are more than one off, first at {far[0].tolist()}: "
        f"got {got[tuple(far[0])].float():.6g}, exact {exact[tuple(far[0])].float():.6g}"
    )
    explained = 1 + 2 * int((_ordinal(same) != _ordinal(exact)).sum()) + int(MOVED_CODES * steps.numel())
    assert moved <= explained, f"{name}: {moved} of {steps.numel()} codes are one off, rounding explains {explained}"


def _ordinal(codes: Tensor) -> Tensor:
    """The codes in numerical order; both zeros of FP8 are 0 and both its NaNs lie far off."""
    if codes.dtype is torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    magnitude = bits & 127
    return torch.where(magnitude == 127, 1000, torch.where(bits > 127, -magnitude, magnitude))


def _tile_max(values: Tensor, tile: int | None) -> Tensor:
    """Every value replaced by the largest of its tile, or of the whole tensor."""
    if tile is None or values.dim() < 2:
        return values.max().expand_as(values)
    rows, columns = values.shape[-2:]
    flat = values.reshape(-1, 1, rows, columns)
    largest = torch.nn.functional.max_pool2d(flat, tile, tile, ceil_mode=True)
    spread = largest.repeat_interleave(tile, -2)[..., :rows, :].repeat_interleave(tile, -1)[..., :columns]
    return spread.reshape(values.shape)


def _widen(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype.is_floating_point
    return value.double() if narrow else value


def _clone(value: Any) -> Any:
    """A copy with the same strides."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 0:
        return value.clone()
    storage = value.untyped_storage()
    copy = torch.empty(0, dtype=value.dtype, device=value.device).set_(storage.clone())
    return copy.as_strided(value.shape, value.stride(), value.storage_offset())


def _results(op: Op, arguments: dict[str, Any], impl: str) -> list[tuple[str, Tensor]]:
    """What the call returns and what it changes in place, by name."""
    returned = op(**arguments, impl=impl)
    returned = returned if isinstance(returned, tuple) else (returned,)
    results = [(f"{op.name}[{i}]", value) for i, value in enumerate(returned) if isinstance(value, Tensor)]
    for argument in op.arguments:
        value = arguments.get(argument.name)
        if argument.is_write and not argument.name.startswith("out") and isinstance(value, Tensor):
            results.append((argument.name, value))
    return results


def _bits(values: Tensor) -> Tensor:
    """The values as bytes: NaN equals NaN, and 0 differs from -0."""
    return values.detach().contiguous().reshape(-1).view(torch.uint8)


def judge_bits(name: str, got: Tensor, wanted: Tensor) -> None:
    """Raises AssertionError unless the results agree in every bit."""
    assert got.shape == wanted.shape, f"{name}: shape {list(got.shape)}, wanted {list(wanted.shape)}"
    assert got.dtype == wanted.dtype, f"{name}: {short(got.dtype)}, wanted {short(wanted.dtype)}"
    wrong = (_bits(got) != _bits(wanted)).nonzero()
    assert len(wrong) == 0, (
        f"{name}: {len(wrong)} of {got.nbytes} bytes differ from the reference, first byte {wrong[0].item()}"
    )


def check_case(op: Op, impl: str, case: Case, device: torch.device | str = "cpu", seed: int = 0) -> None:
    """Runs one implementation on one case, twice, against the operator's reference on the same device.

    The reference runs where the implementation does because what a plan returns depends on the device.
    Raises AssertionError when a value is over budget, not written, or differs between two runs.
    """
    arguments = case.build(Make(device, seed))
    oracle = _clone if op.exact else lambda value: _widen(_clone(value))
    exact = _results(op, {name: oracle(value) for name, value in arguments.items()}, "reference")
    plain = "baseline" if op.has_baseline else "reference"
    same = _results(op, {name: _clone(value) for name, value in arguments.items()}, plain)
    with poisoned():
        first = _results(op, {name: _clone(value) for name, value in arguments.items()}, impl)
        second = _results(op, {name: _clone(value) for name, value in arguments.items()}, impl)
    assert len(first) == len(exact) == len(same), f"{op.name}: {len(first)} results, the reference has {len(exact)}"
    for (name, got), (_, again), (_, wide), (_, narrow) in zip(first, second, exact, same, strict=True):
        assert torch.equal(_bits(got), _bits(again)), f"{name}: two runs on the same inputs differ"
        title = f"{name} of {op.name}, {impl}, case {case.name}"
        if op.exact:
            judge_bits(title, got, wide)
        else:
            judge(title, got, wide, narrow, op.tile)
