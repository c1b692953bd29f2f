"""An operator: a public function, the reference that defines it, its implementations in order of preference, its cases.

The public function checks and chooses with `pick`, allocates its results, and launches:

    @op("(Tensor(a!) out, Tensor x, Tensor weight, float eps) -> ()", SPEC)
    def rms_norm(x, weight, *, eps=1e-6, out=None, impl="auto"):
        launch = rms_norm.pick(impl, x, weight, out, eps)
        out = torch.empty_like(x) if out is None else out
        launch(out, x, weight, eps)
        return out

The schema lists what a launch takes. Arguments named out… and marked (a!) are results; the reference takes the others and
returns the results. Whatever else is marked (a!) is changed in place, by the reference too.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.core import env
from penstock.core.cases import Case, Cost
from penstock.core.check import Contract, Spec, list_tensors
from penstock.core.features import FEATURES

_PLAIN = frozenset((type(None), bool, int, float, str))
MEMO_LIMIT = 8192
_LIBRARY = torch.library.Library("penstock", "FRAGMENT")
_VALUES = env.CHECK.read() == "values"


class NotSupported(RuntimeError):
    """No implementation takes a valid call; the message gives each one's reason."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator, and what it needs."""

    name: str
    launch: Callable[..., None]
    needs: tuple[str, ...]
    supports: Callable[..., str | None] | None
    instructions: tuple[str, ...]
    spill_bytes: int
    slower: Callable[..., str | None] | None = None

    def refuses(self, named: dict[str, Any], by_name: bool) -> str | None:
        """Why this implementation cannot take the call, or None when it can."""
        tensors = [value for value in named.values() if isinstance(value, Tensor)]
        for need in self.needs:
            reason = FEATURES[need](tensors, by_name)
            if reason:
                return reason
        reason = self.supports(**named) if self.supports else None
        return reason or (self.slower(**named) if self.slower and not by_name else None)


class Op:
    """An operator: call it like the function it wraps."""

    def __init__(
        self,
        function: Callable[..., Any],
        schema: str,
        spec: Spec,
        exact: bool = False,
        tile: int | None = None,
        alignment: tuple[str, ...] = (),
    ):
        functools.update_wrapper(self, function)
        self.function = function
        self.name = function.__name__
        self.module = function.__module__
        self.contract = Contract(self.name, spec)
        self.exact = exact
        self.tile = tile
        self._aligned = [self.contract.names.index(name) for name in alignment]
        self.implementations: dict[str, Implementation] = {}
        self.definition: Callable[..., Any] | None = None
        self._baseline: Callable[..., Any] | None = None
        self._cases: Callable[[], Iterable[Case]] = tuple
        self._cost: Callable[..., Cost] | None = None
        self._relation: Callable[..., tuple[str, str] | None] = lambda **named: None
        self._check_values: Callable[..., None] | None = None
        self._picked: dict[tuple[object, ...], Callable[..., None]] = {}
        self._choices: dict[str, dict[str, str]] = {}
        self._define(schema)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<operator {self.name}: {', '.join([*self.implementations, 'reference'])}>"

    # ---- what an operator file declares

    def reference(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Declares the plain definition of the operator."""
        self.definition = function
        return function

    def baseline(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Declares the naive computation in the inputs' own dtype, whose error sets the budget; default: the reference."""
        self._baseline = function
        return function

    def impl(
        self,
        name: str,
        *,
        needs: tuple[str, ...],
        supports: Callable[..., str | None] | None = None,
        slower: Callable[..., str | None] | None = None,
        instructions: tuple[str, ...] = (),
        spill_bytes: int = 0,
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Declares an implementation; earlier ones are preferred.

        Args:
            needs: features (core/features.py) the call's device must have.
            supports: takes the contract's arguments by name, answers None or why not.
            slower: likewise, of calls that it takes: why "auto" passes it over for a later one that is faster.
            instructions: SASS mnemonics that the compiled kernels must contain between them.
            spill_bytes: register spill that the compile gate accepts.
        """
        unknown = [need for need in needs if need not in FEATURES]
        if unknown or name in (*self.implementations, "auto", "reference"):
            raise ValueError(f"{self.name}: implementation {name!r} is taken, or needs unknown features {unknown}")

        def declare(launch: Callable[..., None]) -> Callable[..., None]:
            self.implementations[name] = Implementation(name, launch, needs, supports, instructions, spill_bytes, slower)
            return launch

        return declare

    def cases(self, function: Callable[[], Iterable[Case]]) -> Callable[[], Iterable[Case]]:
        """Declares the named shapes that tests, benchmarks, tuner and compile gate share."""
        self._cases = function
        return function

    def cost(self, function: Callable[..., Cost]) -> Callable[..., Cost]:
        """Declares the fewest bytes and operations of a call, from the public function's arguments."""
        self._cost = function
        return function

    def relation(self, function: Callable[..., tuple[str, str] | None]) -> Callable[..., tuple[str, str] | None]:
        """Declares what shapes must satisfy beyond the contract's symbols; answers None or (argument, "must be …")."""
        self._relation = function
        return function

    def check_values(self, function: Callable[..., None]) -> Callable[..., None]:
        """Declares a check of what tensors hold, made only with PENSTOCK_CHECK=values."""
        self._check_values = function
        return function

    # ---- what others ask

    def all_cases(self) -> list[Case]:
        """The declared cases."""
        return list(self._cases())

    def cost_of(self, arguments: dict[str, Any]) -> Cost | None:
        """The fewest bytes and operations of a call with these arguments, when declared."""
        return self._cost(**arguments) if self._cost else None

    @property
    def has_baseline(self) -> bool:
        """Whether impl="baseline" (for tests) differs from impl="reference"."""
        return self._baseline is not None

    def availability(self, device: torch.device) -> dict[str, str]:
        """For each implementation "" when this device has what it needs, otherwise what is missing."""
        probe = [torch.empty(0, device=device)]
        reasons = {}
        for name, candidate in self.implementations.items():
            missing = [reason for need in candidate.needs if (reason := FEATURES[need](probe, False))]
            reasons[name] = missing[0] if missing else ""
        return reasons

    def choices(self) -> dict[str, dict[str, str]]:
        """The implementations picked since the start, each with why those before it were passed over, as last seen."""
        return {name: dict(passed_over) for name, passed_over in list(self._choices.items())}

    # ---- choosing

    def pick(self, impl: str, *args: Any) -> Callable[..., None]:
        """Checks the contract and returns the launch function; both remembered by signature.

        Args:
            impl: "auto", "reference" or an implementation's name; a name never falls back.
            args: the contract's arguments, in its order.
        Raises: ContractError; NotSupported with every implementation's reason.
        """
        if torch.compiler.is_compiling():
            return functools.partial(self.library_op, impl)
        # Each word of this costs up to 0.1 µs a tensor. isinstance with what is no tensor is slow, Tensor has a metaclass; so
        # are making, hashing and comparing torch.device and strides: the index stands for the device, −1 on the CPU, and a
        # contiguous tensor is one like any other, whatever strides its dimensions of size 1 have.
        parts = [
            (a.shape, a.dtype, a.get_device(), a.is_contiguous() or a.stride())
            if type(a) is Tensor or (type(a) not in _PLAIN and isinstance(a, Tensor))
            else a
            for a in args
        ]
        try:
            parts += [args[i].data_ptr() & 15 for i in self._aligned if args[i] is not None]
            key = (impl, *parts)
            launch = self._picked.get(key)
        except (TypeError, AttributeError):  # unhashable, or without an address where a tensor belongs: the contract names it
            self.contract.check(args)
            raise
        if launch is None:
            named = self.contract.check(args)
            fault = self._relation(**named)
            if fault:
                raise self.contract.error(*fault, named)
            launch = self._choose(impl, named)
            if len(self._picked) >= MEMO_LIMIT:
                self._picked.clear()
            self._picked[key] = launch
        if _VALUES and self._check_values:
            self._check_values(**dict(zip(self.contract.names, args, strict=True)))
        return launch

    def chosen(self, impl: str, *args: Any) -> str:
        """The name of the implementation that `pick` takes for these arguments."""
        launch = self.pick(impl, *args)
        return next((name for name, i in self.implementations.items() if i.launch is launch), "reference")

    def _choose(self, impl: str, named: dict[str, Any]) -> Callable[..., None]:
        if impl == "reference":
            self._choices[impl] = {}
            return functools.partial(self._launch_plain, self.definition)
        if impl == "baseline" and self._baseline:
            return functools.partial(self._launch_plain, self._baseline)
        if impl != "auto" and impl not in self.implementations:
            known = ", ".join(["auto", *self.implementations, "reference"])
            raise self.contract.error("impl", f"must be one of {known}, got {impl!r}", named)
        candidates = self.implementations.values() if impl == "auto" else [self.implementations[impl]]
        reasons: dict[str, str] = {}
        for candidate in candidates:
            reason = candidate.refuses(named, by_name=impl != "auto")
            if reason is None:
                self._choices[candidate.name] = reasons
                return candidate.launch
            reasons[candidate.name] = reason
        on_cpu = all(value.device.type == "cpu" for value in named.values() if isinstance(value, Tensor))
        if impl == "auto" and on_cpu:
            self._choices["reference"] = reasons
            return functools.partial(self._launch_plain, self.definition)
        if impl == "auto":
            reasons["reference"] = "on a GPU it must be asked for by name"
        lines = "".join(f"\n  {name:<10} {reason}" for name, reason in reasons.items())
        raise NotSupported(f"{self.name}: no implementation takes this call{lines}{list_tensors(named)}")

    # ---- launching

    def _launch_plain(self, definition: Callable[..., Any] | None, *args: Any) -> None:
        if definition is None:
            raise NotSupported(f"{self.name}: has no reference")
        results = definition(*args[self._num_outs :])
        results = results if isinstance(results, tuple) else (results,)
        for out, result in zip(args[: self._num_outs], results, strict=False):
            if out is not None:
                out.copy_(result)

    def _define(self, schema: str) -> None:
        """Registers penstock::<name>(str impl, <schema>), so that torch.compile sees one opaque call that mutates."""
        _LIBRARY.define(f"{self.name}(str impl, {schema.lstrip().removeprefix('(')}")
        self.library_op = getattr(torch.ops.penstock, self.name).default
        self.arguments = self.library_op._schema.arguments[1:]
        names = [argument.name for argument in self.arguments]
        missing = [name for name in self.contract.names if name not in names]
        if missing:
            raise ValueError(f"{self.name}: the schema lacks the contract's arguments {missing}; it has {names}")
        self._num_outs = sum(a.is_write and a.name.startswith("out") for a in self.arguments)
        positions = [names.index(name) for name in self.contract.names]

        def run(impl: str, *args: Any) -> None:
            self.pick(impl, *[args[position] for position in positions])(*args)

        _LIBRARY.impl(self.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"penstock::{self.name}", lambda *args: None, lib=_LIBRARY)


def op(
    schema: str, spec: Spec, exact: bool = False, tile: int | None = None, alignment: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Op]:
    """Makes an operator of a public function; see the head of this file.

    Args:
        exact: every implementation returns the reference's very bits; there is no float64 oracle.
        tile: results are judged by squares of this many rows and columns, so that one wrong tile of a matrix product shows.
        alignment: tensors whose address an implementation's `supports` looks at; a choice is remembered for it modulo 16.
    """
    return lambda function: Op(function, schema, spec, exact, tile, alignment)
