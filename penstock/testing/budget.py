"""|got - float64| ≤ 2 · max|same-dtype reference - float64| + one rounding: a tolerance nobody picks.

Both sides come from the operator's own reference: once on the inputs widened to float64, once on the inputs as they are.
An operator whose kernels must round in between (attention's P) declares a `baseline` that rounds in the same places. The
results of an operator declared exact are judged by their bits.

Codes of 8 bits are judged before they are rounded: the reference runs with formats that keep the scaled values. A code must
be what some value rounds to that lies within that budget of the float64 value; so it may differ only next to a
boundary of rounding. The error is the largest of the reference on float32 inputs, and where values are rounded to 16 bits on
the way (a residual sum) that of the value itself besides.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Make
from penstock.core.check import short
from penstock.core.formats import FORMATS, Format
from penstock.core.op import Op

CODES = (torch.float8_e4m3fn, torch.int8)
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """What a result must be.

    Args:
        exact: by the reference in float64; of codes the scaled values before they are rounded.
        same: by the reference (or the declared baseline) in the inputs' own dtype.
        single: of codes, by the reference on the inputs widened to float32.
    """

    exact: Tensor
    same: Tensor
    single: Tensor | None = None


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


def judge_codes(name: str, got: Tensor, exact: Tensor, same: Tensor, single: Tensor) -> None:
    """Raises AssertionError unless every code is one that a value within the budget of `exact` rounds to.

    Args:
        name, got: as for `judge`; got is float8_e4m3fn or int8.
        exact, same, single: the scaled values before they are rounded, of an `Expected`.
    """
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, wanted {list(exact.shape)}"
    if got.numel() == 0:
        return
    exact = exact.double()
    own, worst = ((values.double() - exact).abs().nan_to_num(nan=0.0) for values in (same, single))
    allowed = 2 * own + 2 * worst.max() + torch.finfo(torch.float32).eps * exact.abs()
    least, most = (_ordinal(_round(exact + side * allowed, got.dtype)) for side in (-1, 1))
    code = _ordinal(got)
    wrong = ((code < least) | (code > most)).nonzero()
    if len(wrong):
        at = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{name}: {len(wrong)} of {code.numel()} codes are not what rounding explains; at {list(at)} got "
            f"{got[at].float():.6g}, exact {exact[at]:.9g}, allowed {allowed[at]:.3g} ({short(got.dtype)})"
        )


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest codes, ties to even, saturating."""
    largest = max(format.largest for format in FORMATS.values() if format.dtype is dtype)
    limited = values.clamp(-largest, largest)
    return limited.to(dtype) if dtype.is_floating_point else limited.nan_to_num(nan=0.0).round().to(dtype)


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


@dataclass(frozen=True, eq=False)
class _Unrounded(Format):
    """A format that keeps scaled values in `dtype` instead of rounding them to codes."""

    codes: Format

    @property
    def largest(self) -> float:
        return self.codes.largest

    def encode(self, values: Tensor) -> Tensor:
        limited = values.clamp(-self.largest, self.largest)
        limited = limited if self.codes.dtype.is_floating_point else limited.nan_to_num(nan=0.0)
        return limited.to(self.dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.codes)


@contextlib.contextmanager
def _unrounded(dtype: torch.dtype) -> Iterator[None]:
    """Inside, every format keeps values of this dtype."""
    kept = dict(FORMATS)
    FORMATS.update({name: _Unrounded(name, dtype, format.granularity, format) for name, format in kept.items()})
    try:
        yield
    finally:
        FORMATS.update(kept)


def copy_arguments(arguments: Arguments) -> Arguments:
    """The same values and strides in other memory; tensors that share memory share it in the copy."""
    storages: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            items = [copy(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if not isinstance(value, Tensor):
            return value
        if value.numel() == 0:
            return value.clone()
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()
        whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(storages[storage.data_ptr()])
        return whole.as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: copy(value) for name, value in arguments.items()}


def widen(arguments: Arguments, dtype: torch.dtype = torch.float64) -> Arguments:
    """The arguments with every floating tensor in another dtype."""
    return {name: _convert(value, dtype) for name, value in arguments.items()}


def _convert(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype.is_floating_point else value


def _changed(op: Op) -> list[str]:
    """The arguments that a call changes in place."""
    return [argument.name for argument in op.arguments if argument.is_write and not argument.name.startswith("out")]


def results(op: Op, arguments: Arguments, impl: str) -> dict[str, Tensor]:
    """What a call returns and what it changes in place, by name."""
    returned = op(**arguments, impl=impl)
    returned = returned if isinstance(returned, tuple) else (returned,)
    found = {f"{op.name}[{i}]": value for i, value in enumerate(returned) if isinstance(value, Tensor)}
    changed = {name: arguments.get(name) for name in _changed(op)}
    return found | {name: value for name, value in changed.items() if isinstance(value, Tensor)}


def expect(op: Op, arguments: Arguments) -> dict[str, Expected]:
    """What a call with these arguments must give, by name as `results` has it.

    The reference runs where the arguments are, because what a plan returns depends on the device.
    """
    plain = "baseline" if op.has_baseline else "reference"
    same = results(op, copy_arguments(arguments), "reference" if op.exact else plain)
    if op.exact:
        return {name: Expected(value, value) for name, value in same.items()}
    coded = {name for name, value in same.items() if value.dtype in CODES}
    if not coded or not isinstance(arguments.get("format"), Format):
        exact = results(op, widen(copy_arguments(arguments)), "reference")
        return {name: Expected(exact[name], value) for name, value in same.items()}

    def run(dtype: torch.dtype, wide: Arguments, impl: str) -> dict[str, Tensor]:
        with _unrounded(dtype):
            return results(op, wide | {"format": FORMATS[arguments["format"].name]}, impl)

    # Changed in place, codes cannot hold what is not rounded.
    held = {name: _convert(value, torch.float32) for name, value in arguments.items() if name in _changed(op) and name in coded}
    exact = run(torch.float64, widen(copy_arguments(arguments)), "reference")
    same = run(torch.float32, copy_arguments(arguments) | copy_arguments(held), plain)
    single = run(torch.float32, widen(copy_arguments(arguments), torch.float32), "reference")
    return {name: Expected(exact[name], value, single[name] if name in coded else None) for name, value in same.items()}


def judge_result(name: str, op: Op, got: Tensor, expected: Expected) -> None:
    """Raises AssertionError unless a result is as expected: by bits, as codes, or by the budget of its values."""
    if op.exact:
        judge_bits(name, got, expected.exact)
    elif expected.single is not None:
        judge_codes(name, got, expected.exact, expected.same, expected.single)
    else:
        judge(name, got, expected.exact, expected.same, op.tile)


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

    Raises AssertionError when a value is over budget, not written, or differs between two runs.
    """
    arguments = case.build(Make(device, seed))
    expected = expect(op, arguments)
    with poisoned():
        first = results(op, copy_arguments(arguments), impl)
        second = results(op, copy_arguments(arguments), impl)
    assert list(first) == list(expected), f"{op.name}: results {list(first)}, the reference has {list(expected)}"
    for name, got in first.items():
        assert torch.equal(_bits(got), _bits(second[name])), f"{name}: two runs on the same inputs differ"
        judge_result(f"{name} of {op.name}, {impl}, case {case.name}", op, got, expected[name])
