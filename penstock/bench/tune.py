"""The tuner: finds the launch configs a call looks up, times every candidate that is right, freezes the best in its table.

A candidate replaces the default when it is faster by more than the margin over all cases that share its signature.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from penstock.bench.correct import Parts, expect_parts, verify
from penstock.bench.inputs import rotation
from penstock.bench.run import with_plan
from penstock.bench.timing import Call, measure, ratio
from penstock.core.cases import Case, Make
from penstock.core.device import properties
from penstock.core.op import NotSupported, Op
from penstock.core.tuning import Tunable, watching, write_table
from penstock.testing.budget import Arguments

# Candidates that a test of the way times beside the default.
QUICK = 2
# Less than this is what two measurements of one config differ by.
MARGIN = 1.01
DEFAULT = "default"


@dataclass(frozen=True)
class Choice:
    """What came of one signature.

    Args:
        config: the best config, the default among them.
        gain: how many times faster it is than the default, the geometric mean over the cases.
        gains: for each config that was right how many times faster it is than the default.
        default_us: what the default takes in each case, µs.
        refused: for each candidate without a number the reason.
    """

    tunable: Tunable[Any]
    key: str
    config: Any
    gain: float
    cases: tuple[str, ...]
    gains: dict[str, float]
    refused: dict[str, str]
    default_us: tuple[float, ...]

    @property
    def timed(self) -> int:
        """Configs that were right."""
        return len(self.gains)


def tune_operator(
    op: Op,
    cases: Sequence[Case] | None = None,
    *,
    device: torch.device,
    impls: Sequence[str] | None = None,
    budget: float = 1.0,
    limit: int | None = None,
    on_choice: Callable[[Choice], None] | None = None,
) -> list[Choice]:
    """Times the candidates of every launch config that the operator's cases look up.

    Args:
        cases: default: those marked `bench`.
        impls: default: every implementation that takes the case.
        budget: seconds of sampling for each signature and case.
        limit: candidates of a signature, the first ones; all by default.
        on_choice: told of each choice as it is made.
    """
    cases = [case for case in op.all_cases() if case.bench] if cases is None else cases
    places: dict[tuple[int, tuple[Any, ...]], list[tuple[str, Case]]] = {}
    tunables: dict[int, Tunable[Any]] = {}
    for case in cases:
        arguments = with_plan(op, case.build(Make(device)))
        for name in impls or op.implementations:
            for tunable, signature in _looked_up(op, name, arguments):
                tunables[id(tunable)] = tunable
                places.setdefault((id(tunable), signature), []).append((name, case))
    choices = []
    for (identity, signature), users in places.items():
        choice = _choose(op, tunables[identity], signature, users, device, budget, limit)
        choices.append(choice)
        if on_choice:
            on_choice(choice)
    return choices


def write_choices(choices: Sequence[Choice], device: torch.device, folder: Path | None = None) -> list[Path]:
    """Writes the choices into their tables, or into tables of the same names in a folder."""
    written = []
    for tunable in {id(choice.tunable): choice.tunable for choice in choices}.values():
        path = folder / tunable.table.name if folder else tunable.table
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = {choice.key: choice.config for choice in choices if choice.tunable is tunable}
        write_table(path, properties(device).name, entries)
        tunable.forget()
        written.append(path)
    return written


def _looked_up(op: Op, impl: str, arguments: Arguments) -> dict[tuple[Tunable[Any], tuple[Any, ...]], None]:
    """The launch configs that one call looks up, each once; none when the implementation does not take the call."""
    with watching() as seen, torch.no_grad():
        try:
            op(**arguments, impl=impl)
        except NotSupported:
            return {}
    return dict.fromkeys(seen)


def _choose(
    op: Op,
    tunable: Tunable[Any],
    signature: tuple[Any, ...],
    users: Sequence[tuple[str, Case]],
    device: torch.device,
    budget: float,
    limit: int | None,
) -> Choice:
    default = tunable.default(*signature)
    others = [config for config in tunable.candidates(*signature) if config != default][:limit]
    configs = {DEFAULT: default, **{str(config): config for config in others}}
    refused: dict[str, str] = {}
    gains: dict[str, list[float]] = {}
    default_us: list[float] = []
    for impl, case in users:
        arguments = with_plan(op, case.build(Make(device)))
        expected = list(expect_parts(op, arguments))
        for name, config in configs.items():
            if name not in refused and (reason := _wrong(op, impl, tunable, config, arguments, expected)):
                refused[name] = reason
        if DEFAULT in refused:
            raise RuntimeError(f"{op.name} {impl}, case {case.name}: the default config is wrong: {refused[DEFAULT]}")
        del expected
        with torch.no_grad():
            sets = rotation(arguments, op(**arguments, impl=impl), None, device)
        calls = {
            name: [_forced(op, impl, tunable, config, chosen) for chosen in sets]
            for name, config in configs.items()
            if name not in refused
        }
        series = measure(calls, device, budget=budget)
        default_us.append(series[DEFAULT].median_us)
        for name in calls:
            gains.setdefault(name, []).append(ratio(series[DEFAULT], series[name]))
    means = {
        name: math.exp(statistics.fmean(map(math.log, values))) for name, values in gains.items() if len(values) == len(users)
    }
    best = max(means, key=lambda name: means[name])
    if means[best] < MARGIN:
        best = DEFAULT
    return Choice(
        tunable=tunable,
        key=tunable.key(signature),
        config=configs[best],
        gain=means[best],
        cases=tuple(case.name for _, case in users),
        gains=means,
        refused=refused,
        default_us=tuple(default_us),
    )


def _forced(op: Op, impl: str, tunable: Tunable[Any], config: Any, arguments: Arguments) -> Call:
    def call() -> Any:
        with tunable.forced(config):
            return op(**arguments, impl=impl)

    return call


def _wrong(op: Op, impl: str, tunable: Tunable[Any], config: Any, arguments: Arguments, expected: Parts) -> str:
    """Why a candidate cannot be used, or "": it must launch and agree with the reference."""
    try:
        with tunable.forced(config):
            return verify(op, impl, arguments, expected)
    except Exception as error:
        # Too much shared memory, too many registers: the compiler's answer is this candidate's result.
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def tune_from_command_line(
    console: Console,
    ops: Sequence[Op],
    device: torch.device,
    *,
    case: Sequence[str] = (),
    impls: Sequence[str] = (),
    budget: float,
    quick: bool,
    output: Path | None,
) -> None:
    """`penstock bench OP --tune`: writes the tables and says what was chosen."""
    for op in ops:
        cases = [c for c in op.all_cases() if (any(word in c.name for word in case) if case else c.bench)]
        if not case and (quick or device.type == "cpu"):
            cases = [c for c in op.all_cases() if not c.bench and "empty" not in c.name][:2]
        names = impls or [name for name, impl in op.implementations.items() if impl.needs != ("cpu",)]
        paths: dict[Path, None] = {}

        def keep(choice: Choice, name: str = op.name, paths: dict[Path, None] = paths) -> None:
            timed = ", ".join(f"{case} {us:.1f} µs" for case, us in zip(choice.cases, choice.default_us, strict=True))
            console.print(
                f"{name} {choice.key}: {choice.config}, {choice.gain:.2f}x the default ({timed}); "
                f"{choice.timed} configs timed, {len(choice.refused)} refused",
                markup=False,
            )
            for candidate, gain in sorted(choice.gains.items(), key=lambda pair: -pair[1]):
                console.print(f"  {gain:.3f} {candidate}", markup=False)
            for candidate, reason in choice.refused.items():
                console.print(f"  refused {candidate}: {reason}", markup=False)
            # Written after every choice: the time may end before the last.
            paths.update(dict.fromkeys(write_choices([choice], device, output)))

        budget = 0.05 if quick else budget
        limit = QUICK if quick else None
        choices = tune_operator(op, cases, device=device, impls=names, budget=budget, limit=limit, on_choice=keep)
        if not choices:
            console.print(f"{op.name}: its cases look up no launch config", markup=False)
        for path in paths:
            console.print(f"@done {path}", markup=False)
