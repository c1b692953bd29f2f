"""`penstock bench serve`: starts a server, or takes a running one, and measures it at several rates."""

import asyncio
import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from penstock.bench import record
from penstock.bench.serve import Objectives, Row, Workload, as_json, run

app = typer.Typer(add_completion=False, rich_markup_mode=None)
PLOTTED = (("ttft", "time to first token"), ("tpot", "time per output token"), ("e2e", "whole request"))


@dataclass(frozen=True)
class Server:
    """Where a server is, and what it calls its model; the process, if it is ours."""

    url: str
    model: str
    process: subprocess.Popen | None = None


@app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Served for the run; with --url what the server calls it.")],
    url: Annotated[str, typer.Option(help="A running server, such as http://127.0.0.1:8000.")] = "",
    key: Annotated[str, typer.Option(help="Its API key.", envvar="OPENAI_API_KEY", show_envvar=True)] = "",
    rates: Annotated[str, typer.Option(help="Requests a second, by commas; inf sends all at once.")] = "1,2,4,8,16,inf",
    requests: Annotated[int, typer.Option(help="At each rate.", min=1)] = 100,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    goodput: Annotated[str, typer.Option(help="Objectives in ms, such as ttft:200,tpot:50,e2e:5000.")] = "ttft:200,tpot:50",
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    serve_options: Annotated[str, typer.Option(help='For `penstock serve`, such as "--dtype float32".')] = "",
    note: Annotated[str, typer.Option(help="Written into the results: what else ran on the machine, for one.")] = "",
    output: Annotated[Path | None, typer.Option(help="Folder of serve.json and serve.png.")] = None,
) -> None:
    """Latency against load."""
    import torch

    if find_spec("httpx") is None:
        raise typer.BadParameter("penstock bench serve needs the package httpx: pip install 'penstock[bench]'")
    loads = [Workload(rate, requests, prompt_tokens, output_tokens, seed) for rate in parse_rates(rates)]
    objectives = parse_objectives(goodput)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = output or record.default_folder(device)
    console = Console(width=200, soft_wrap=True)
    document: dict[str, Any] = {
        "schema": record.SCHEMA,
        "command": _command(model, rates, requests, prompt_tokens, output_tokens, goodput, seed, serve_options),
        "model": Path(model).name,
        "server": "at another address" if url else "started for the run, on this machine as the clients",
        "environment": record.environment(device),
        "note": note,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "objectives_seconds": {"ttft": objectives.ttft, "tpot": objectives.tpot, "e2e": objectives.e2e},
        "rows": [],
    }
    rows: list[Row] = []
    with contextlib.nullcontext(Server(url, model)) if url else started(model, shlex.split(serve_options)) as server:
        warm = Workload(math.inf, 4, prompt_tokens, output_tokens, seed + 1)
        asyncio.run(run(server.url, server.model, warm, objectives, key=key))
        for load in loads:
            row = asyncio.run(run(server.url, server.model, load, objectives, key=key))
            rows.append(row)
            console.print(row.line, markup=False)
            document["rows"].append(as_json(row) | {"load_average": round(os.getloadavg()[0], 1)})
            record.write_json(folder / "serve.json", document)  # after every rate: a later one may take too long
    console.print(f"@done {folder / 'serve.json'}", markup=False)
    if all(row.rate is None for row in rows):
        console.print("no plot: there is no rate to plot against", markup=False)
    elif find_spec("matplotlib") is None:
        console.print("no plot: it needs the package matplotlib: pip install 'penstock[bench]'", markup=False)
    else:
        plot(rows, document, folder / "serve.png")
        console.print(f"@done {folder / 'serve.png'}", markup=False)
    if any(row.failed for row in rows):
        raise typer.Exit(1)


def parse_rates(text: str) -> list[float]:
    """Positive numbers, by commas."""
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--rates must be numbers by commas, got {text!r}") from error
    if any(not rate > 0 for rate in rates):
        raise typer.BadParameter(f"--rates must be positive, got {text!r}")
    return rates


def parse_objectives(text: str) -> Objectives:
    """Objectives from name:milliseconds, by commas."""
    found: dict[str, float] = {}
    for word in filter(None, text.split(",")):
        match = re.fullmatch(r"(ttft|tpot|e2e):(\d+(?:\.\d+)?)", word.strip())
        if match is None:
            raise typer.BadParameter(f"--goodput must be like ttft:200,tpot:50,e2e:5000, got {text!r}")
        found[match[1]] = float(match[2]) / 1e3
    return Objectives(**found)


@contextlib.contextmanager
def started(model: str, arguments: Sequence[str] = ()) -> Iterator[Server]:
    """A server in a process of its own, which is told to end afterwards."""
    command = [sys.executable, "-m", "penstock", "serve", model, "--port", "0", "--log-format", "json", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if '"message": "listening"' in line:
                facts = json.loads(line)
                break
            sys.stderr.write(line)
        else:
            raise RuntimeError(f"the server ended with exit code {process.wait()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
        yield Server(facts["url"], facts["model"], process)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def plot(rows: Sequence[Row], document: dict[str, Any], path: Path) -> None:
    """Latency and throughput against the rate offered; the run of all at once is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    offered = [row for row in rows if row.rate is not None]
    rates = [row.rate for row in offered if row.rate is not None]
    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, PLOTTED, strict=False):
        for percentile in ("p50", "p90", "p99"):
            axis.plot(rates, [getattr(row, name)[percentile] * 1e3 for row in offered], marker="o", label=percentile)
        axis.set(title=title, ylabel="ms", yscale="log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend()
    axes[3].plot(rates, [row.requests_per_second for row in offered], marker="o", label="served")
    axes[3].plot(rates, [row.goodput for row in offered], marker="o", label="goodput")
    axes[3].plot(rates, rates, color="grey", linestyle=":", label="offered")
    axes[3].set(title="throughput", ylabel="requests/s")
    axes[3].legend()
    for axis in axes:
        axis.set(xlabel="requests/s offered", xscale="log")
        axis.set_xticks(rates, labels=[f"{rate:g}" for rate in rates])
        axis.xaxis.minorticks_off()
        axis.grid(alpha=0.3)
    environment = document["environment"]
    lengths = f"{document['prompt_tokens']} tokens in, {document['output_tokens']} out"
    figure.suptitle(f"{document['model']} on {environment['device']}, {lengths}, {environment['date'][:10]}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _command(model: str, *values: Any) -> str:
    rates, requests, prompt_tokens, output_tokens, goodput, seed, more = values
    words = f"penstock bench serve {Path(model).name} --rates {rates} --requests {requests} --prompt-tokens {prompt_tokens}"
    words += f" --output-tokens {output_tokens} --goodput {goodput} --seed {seed}"
    return f'{words} --serve-options "{more}"' if more else words
