"""Results as lines for a person: µs, share of the roofline floor, bandwidth or rate, ratio to each peer."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from penstock.bench.record import Result, Timed
from penstock.bench.roofline import Ceilings


def microseconds(value: float) -> str:
    """Three figures: 4.31, 43.1, 431."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def achieved(result: Result, timed: Timed) -> str:
    """What the median means in TFLOP/s where operations make the floor, in GB/s otherwise."""
    seconds = timed.median_us * 1e-6
    if result.bound == "compute" and result.flops:
        return f"{result.flops / seconds / 1e12:.1f} TFLOP/s"
    return f"{result.bytes / seconds / 1e9:.0f} GB/s" if result.bytes else "-"


def table(results: Sequence[Result]) -> Table:
    """One line for each contestant of each case; of each peer the ratio stands beside the implementation."""
    lines = Table(box=None, pad_edge=False)
    for heading in ("case", "contestant", "µs (p10-p90)", "of floor", "achieved", "faster than peers by", "host µs", "how"):
        lines.add_column(
            heading, justify="left" if heading in ("case", "contestant", "faster than peers by", "how") else "right"
        )
    for result in results:
        for timed in result.timed:
            ratios = "  ".join(f"{peer} {value:.2f}x" for peer, value in timed.ratios.items())
            how = f"{timed.method}, {result.sets} sets" + (f"; {timed.note}" if timed.note else "")
            lines.add_row(
                f"{result.operator} {result.case}",
                timed.name if timed.kind == "implementation" else f"({timed.name})",
                f"{microseconds(timed.median_us)} ({microseconds(timed.p10_us)}-{microseconds(timed.p90_us)})",
                f"{timed.of_floor:.0%}" if timed.of_floor else "-",
                achieved(result, timed),
                ratios,
                f"{result.host_us:.2f}" if result.host_us and timed.kind == "implementation" else "",
                how,
            )
        for name, reason in result.without.items():
            lines.add_row(f"{result.operator} {result.case}", f"({name})", "-", "", "", f"[dim]{_plain(reason)}[/dim]", "", "")
    return lines


def ceilings_line(ceilings: Ceilings) -> str:
    """The ceilings in one line."""
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in ceilings.matmul.items())
    notes = "".join(f"; {reason}" for reason in ceilings.notes.values())
    return f"ceilings: copy {ceilings.copy / 1e9:.0f} GB/s, {rates}{notes}"


def show(results: Sequence[Result], console: Console | None = None) -> None:
    """Prints the table."""
    (console or Console(width=200, soft_wrap=True)).print(table(results))


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
