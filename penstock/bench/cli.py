"""`penstock bench OP …`, `engine` and `serve`; also `python -m penstock.bench`."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Time operators against their roofline floor and their peers, or the engine against transformers.",
    add_completion=False,
)


@app.command()
def bench(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="OP…|all|ceilings|engine|serve",
            help="Operators by name, all of them, the ceilings alone, the engine, or a server (`serve --help` tells more).",
        ),
    ],
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu; default: cuda where there is one.")] = "",
    case: Annotated[
        list[str], typer.Option(help="Only cases whose name contains this; also those too small to be timed by default.")
    ] = [],  # noqa: B006
    impl: Annotated[list[str], typer.Option(help="Only these implementations; reference may be named.")] = [],  # noqa: B006
    peer: Annotated[list[str], typer.Option(help="Only peers whose name contains this; none for no peers.")] = [],  # noqa: B006
    budget: Annotated[float, typer.Option(help="Seconds of sampling for each case.")] = 1.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small cases and ceilings, little time: a test of the way, not a number.")
    ] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Time an operator's candidate configs and write its table.")] = False,
    warm: Annotated[
        bool, typer.Option("--warm", help="Only call every peer once, so that its kernels are built and cached.")
    ] = False,
    host: Annotated[bool, typer.Option("--host/--no-host", help="Also time contract and choice of one eager call.")] = True,
    model: Annotated[str, typer.Option(help="engine: a local checkpoint.")] = "",
    shape: Annotated[str, typer.Option(help="engine: a published shape with random weights instead of a checkpoint.")] = "",
    output: Annotated[Path | None, typer.Option(help="Folder of the JSON files; default benchmarks/results/<device>.")] = None,
) -> None:
    """Time operators against their roofline floor and their peers, or the engine against transformers."""
    import torch

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if tune and where.type == "cpu":
        # Candidates are kernels: without a GPU they run through the interpreter, chosen before Triton is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    console = Console(width=200, soft_wrap=True)
    targets = _special(console, list(targets), where, model=model, shape=shape, quick=quick, output=output)
    if not targets:
        return
    from penstock.bench.run import catalogue

    known = catalogue()
    targets = list(known) if targets == ["all"] else targets
    unknown = [target for target in targets if target not in known]
    if unknown:
        raise typer.BadParameter(f"no operator {', '.join(unknown)}; there are {', '.join(known)}, all, ceilings and engine")
    if warm:
        from penstock.bench.run import warm_peers

        for target in targets:
            for line in warm_peers(known[target], where):
                console.print(line, markup=False)
        return
    if tune:
        from penstock.bench.tune import tune_from_command_line

        operators = [known[target] for target in targets]
        tune_from_command_line(console, operators, where, case=case, impls=impl, budget=budget, quick=quick, output=output)
        return
    _operators(console, targets, where, case, impl, peer, 0.1 if quick else budget, quick, host, output)


def _special(
    console: Console, targets: list[str], device, *, model: str, shape: str, quick: bool, output: Path | None
) -> list[str]:
    """Does what is not an operator; returns the other targets."""
    if "ceilings" in targets:
        from penstock.bench import record, report
        from penstock.bench.roofline import measure_ceilings

        ceilings = measure_ceilings(device, quick=quick)
        console.print(report.ceilings_line(ceilings), markup=False)
        path = (output or record.default_folder(device)) / "ceilings.json"
        record.write(path, device, [], ceilings, _command())
        console.print(f"@done {path}", markup=False)
    if "engine" in targets:
        from penstock.bench.engine import bench_from_command_line

        bench_from_command_line(console, device, model=model, shape=shape, quick=quick, output=output)
    return [target for target in targets if target not in ("ceilings", "engine")]


def _command() -> str:
    """What was asked for, without the folder, which says nothing about the numbers."""
    words = sys.argv[1:]
    if "--output" in words:
        at = words.index("--output")
        words = words[:at] + words[at + 2 :]
    return "penstock bench " + shlex.join(words)


def _operators(
    console: Console,
    targets: list[str],
    device,
    case: list[str],
    impl: list[str],
    peer: list[str],
    budget: float,
    quick: bool,
    host: bool,
    output: Path | None,
) -> None:
    from penstock.bench import record, report
    from penstock.bench.peers import peers_of
    from penstock.bench.roofline import measure_ceilings
    from penstock.bench.run import bench_operator, catalogue

    ceilings = measure_ceilings(device, quick=quick, budget=0.1 if quick else 0.4)
    console.print(report.ceilings_line(ceilings))
    folder = output or record.default_folder(device)
    for target in targets:
        op = catalogue()[target]
        cases = [c for c in op.all_cases() if (any(word in c.name for word in case) if case else c.bench)]
        if quick and not case:
            cases = [c for c in op.all_cases() if not c.bench and "empty" not in c.name][:2]
        if case and not cases:
            raise typer.BadParameter(f"{target} has no case named like {case}; it has {[c.name for c in op.all_cases()]}")
        # Compilation takes minutes of a quick run's seconds.
        skipped = "torch.compile" if quick and not peer else None
        peers = {
            name: prepare
            for name, prepare in peers_of(op).items()
            if name != skipped and (not peer or any(word in name for word in peer))
        }
        console.print(f"@start {target}", markup=False)
        path = folder / f"{target}.json"
        finished: list[record.Result] = []

        def keep(result: record.Result, finished: list = finished, path: Path = path) -> None:
            # Written after every case: a later one may hang.
            console.print(f"  {result.operator} {result.case}: {result.seconds:.1f} s", markup=False)
            finished.append(result)
            record.write(path, device, finished, ceilings, _command())

        results = bench_operator(
            op,
            cases,
            device=device,
            impls=impl or None,
            peers=peers,
            ceilings=ceilings,
            budget=budget,
            host=host,
            on_result=keep,
        )
        report.show(results, console)
        if not results:
            console.print(f"{target} has no benchmark case", markup=False)
        console.print(f"@done {path}", markup=False)


def command_of(arguments: list[str]) -> tuple[typer.Typer, list[str]]:
    """The command that the arguments are for, and those it takes: `serve` has options of its own."""
    if arguments[:1] != ["serve"]:
        return app, arguments
    from penstock.bench import serve_command

    return serve_command.app, arguments[1:]


def main() -> None:
    """The command of `python -m penstock.bench`."""
    command, arguments = command_of(sys.argv[1:])
    command(arguments)
