"""What an eager call costs on the host above its launch: contract and choice, which `pick` makes and remembers."""

import statistics
import time
from typing import Any

from penstock.core.op import Op
from penstock.testing.budget import Arguments


def recorded(op: Op, arguments: Arguments, impl: str) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Makes one call; returns what it gave its own pick and what it then launched with.

    Raises: ValueError when the public function does not go through its own pick.
    """
    picked: list[tuple[Any, ...]] = []
    launched: list[tuple[Any, ...]] = []
    pick = op.pick

    def watch(*values: Any) -> Any:
        launch = pick(*values)
        picked.append(values)

        def watched(*given: Any) -> None:
            launched.append(given)
            launch(*given)

        return watched

    setattr(op, "pick", watch)  # noqa: B010
    try:
        op(**arguments, impl=impl)
    finally:
        delattr(op, "pick")
    if not picked or not launched:
        raise ValueError(f"{op.name} did not call {op.name}.pick and launch what it answers")
    return picked[0], launched[0]


def pick_us(op: Op, arguments: Arguments, impl: str = "auto", *, calls: int = 5000, rounds: int = 7) -> float:
    """µs of one remembered `pick` with the values that this call gives it; the median of several rounds."""
    values, _ = recorded(op, arguments, impl)
    pick = op.pick
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            pick(*values)
        taken.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(taken)
