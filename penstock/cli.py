"""The `penstock` command: generate, serve, ops, bench, doctor.

Results go to stdout, everything else to stderr. Exit code 0: done; 1: failed, with one `error:` message; 2: wrong usage; 130:
interrupted. torch is imported inside the commands, so that help is quick.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    import torch

    from penstock.core.op import Op
    from penstock.serve.llm import LLM
    from penstock.serve.params import SamplingParams

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="LLM-inference operators at the limit of the hardware, and a compact serving runtime built from them.",
)
DEVICE_HELP = "auto (the first GPU if there is one, else the CPU), cpu, cuda or cuda:N."


class UsageError(ValueError):
    """A command line that asks for something that cannot be; exit code 2."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code; the console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments, prog_name="penstock", standalone_mode=False) or 0
        sys.stdout.flush()
    except typer.TyperException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        return error.exit_code
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        # Whoever read our output has left; so that the interpreter's last flush does not complain, it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments[:1] == ["--debug"]:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    if code == 130:
        print("interrupted", file=sys.stderr)
    return code


def explain(error: Exception) -> str:
    """An error as its message; with its class and a way to learn more when it is not one that we raise for users."""
    ours = type(error).__module__.startswith("penstock.")
    if (ours or isinstance(error, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error} (`penstock --debug ...` shows where)"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(sys.modules["penstock"].__version__)
        raise typer.Exit()


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from; must come first.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


# ---- penstock generate


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help='Folder of a Hugging Face checkpoint, or "demo".', metavar="MODEL")],
    prompt: Annotated[str, typer.Option(help='The text to go on from; "-" reads it from stdin.')],
    max_tokens: Annotated[int, typer.Option(help="Tokens to make at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; larger is more random.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample from the smallest set of tokens with this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this fraction of the likeliest one's probability.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens seen before less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the output; may be given several times.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message, with the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="The system's message; implies --chat.")] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and output together; default: the model's.")] = None,
    stats: Annotated[bool, typer.Option(help="Show on stderr which kernels ran, why, and how fast.")] = True,
) -> None:
    """Generate text, shown as it comes."""
    from penstock.serve.config import EngineConfig, InvalidConfig, resolve_model
    from penstock.serve.params import InvalidParameter, SamplingParams

    try:
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            ignore_eos=ignore_eos,
        )
        EngineConfig(model=model, device=device, dtype=dtype, max_model_len=max_model_len)
    except (InvalidParameter, InvalidConfig) as error:
        reasons = "; ".join(line.strip() for line in str(error).splitlines())
        raise UsageError(reasons.removeprefix("SamplingParams: ").removeprefix("EngineConfig:; ")) from error
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    resolve_model(model)
    resolve_device(device)

    from penstock.serve.llm import LLM

    with loading_bar() as progress:
        llm = LLM(model, device=device, dtype=dtype, max_model_len=max_model_len, max_num_seqs=1, progress=progress)
    request: Any = text
    if chat or system is not None:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        rendered = llm.tokenizer.render_chat(messages)
        request = {"prompt": rendered, "prompt_token_ids": llm.tokenizer.encode(rendered, add_special_tokens=False)}
    measured = write_as_it_comes(llm, request, params)
    if stats:
        show_choices()
        print(measured.describe(), file=sys.stderr)


@dataclass(frozen=True)
class Measured:
    """What one request took; times in seconds."""

    prompt_tokens: int
    output_tokens: int
    first_token: float
    others: float
    finish_reason: str

    def describe(self) -> str:
        """One line for people."""
        parts = [f"{self.prompt_tokens} tokens in, {self.output_tokens} out ({self.finish_reason})"]
        parts.append(f"time to first token {self.first_token * 1e3:.0f} ms")
        if self.output_tokens > 1 and self.others > 0:
            parts.append(f"then {(self.output_tokens - 1) / self.others:.1f} tokens per second")
        return ", ".join(parts)


def write_as_it_comes(llm: "LLM", request: Any, params: "SamplingParams") -> Measured:
    """Streams one request to stdout."""
    begin = time.perf_counter()
    first = 0.0
    shown = 0
    for output in llm.stream(request, params):
        completion = output.outputs[0]
        first = first or time.perf_counter() - begin
        sys.stdout.write(completion.text[shown:])
        sys.stdout.flush()
        shown = len(completion.text)
    took = time.perf_counter() - begin
    sys.stdout.write("\n")
    sys.stdout.flush()
    return Measured(
        len(output.prompt_token_ids), len(completion.token_ids), first, took - first, completion.finish_reason or "unfinished"
    )


def show_choices() -> None:
    """A table of the operators that ran: which implementation, and why not one before it."""
    rows = []
    for operator in catalogue():
        for name, passed_over in operator.choices().items():
            rows.append((operator.name, name, "; ".join(f"{other}: {reason}" for other, reason in passed_over.items())))
    print(file=sys.stderr)
    write_table(("operator", "implementation", "better ones, and why not"), rows, sys.stderr)
    print(file=sys.stderr)


@contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr for the bytes of a checkpoint read so far; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    out = Console(stderr=True)

    with Progress(TextColumn("reading weights"), BarColumn(), DownloadColumn(), console=out, transient=True) as bar:
        task = bar.add_task("weights", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ---- penstock serve


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help='Folder of a Hugging Face checkpoint, or "demo".', metavar="MODEL")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one; the log tells.", min=0, max=65535)] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="What requests call the model; default: its folder.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Ask for this key; PENSTOCK_API_KEY keeps it out of `ps`.")] = None,
    max_queue: Annotated[int, typer.Option(help="Completions that may wait; more are answered 429.", min=0)] = 1024,
    max_body: Annotated[str, typer.Option(help="Largest body of a request.")] = "4MiB",
    max_output_tokens: Annotated[int | None, typer.Option(help="The most a request may ask for.", min=1)] = None,
    drain_seconds: Annotated[float, typer.Option(help="For running requests after SIGTERM.", min=0)] = 30.0,
    log_format: Annotated[str, typer.Option(help="text, or json for one object a line.")] = "text",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and output together; default: the model's.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Completions computed together.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens computed in one step.")] = 2048,
    kv_cache_memory: Annotated[str | None, typer.Option(help='Of the pages, such as "4GiB"; default: what is free.')] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens of a page; default: 64 on a GPU, 16 on a CPU.")] = None,
    seed: Annotated[int, typer.Option(help="Of the seeds drawn for requests that bring none.")] = 0,
) -> None:
    """Serve a model over HTTP, with OpenAI's interface."""
    from penstock.core.env import API_KEY
    from penstock.serve.config import EngineConfig, InvalidConfig, parse_bytes, resolve_model
    from penstock.serve.packages import optional

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        optional(package, "penstock serve")
    engine_options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_cache_memory": kv_cache_memory,
        "page_size": page_size,
        "seed": seed,
    }
    try:
        EngineConfig(model=model, **engine_options)
        largest = parse_bytes(max_body)
    except InvalidConfig as error:
        raise UsageError("; ".join(line.strip() for line in str(error).splitlines()[1:])) from error
    except ValueError as error:
        raise UsageError(f"--max-body must be {error}") from error
    for name, value, choices in (
        ("--log-format", log_format, ("text", "json")),
        ("--log-level", log_level, ("debug", "info", "warning", "error")),
    ):
        if value not in choices:
            raise UsageError(f"{name} must be {' or '.join(choices)}, got {value!r}")
    folder = resolve_model(model)
    resolve_device(device)

    from penstock.serve.llm import LLM
    from penstock.serve.server import command, logs
    from penstock.serve.server.app import Options

    logs.configure(as_json=log_format == "json", level=log_level)
    options = Options(
        model=served_model_name or ("demo" if model == "demo" else folder.resolve().name),
        api_key=API_KEY.read() if api_key is None else api_key,
        max_queue=max_queue,
        max_body=largest,
        max_output_tokens=max_output_tokens,
    )
    listening = command.Listening(host, port, drain_seconds)
    raise typer.Exit(command.serve(lambda: LLM(model, **engine_options).engine, options, listening))


# ---- penstock ops


@app.command()
def ops(device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto") -> None:
    """List the operators and which implementations run here."""
    chosen = resolve_device(device)
    on_gpu = chosen.type == "cuda"
    rows = []
    for operator in catalogue():
        for name, reason in operator.availability(chosen).items():
            rows.append((operator.name, name, "no" if reason else "yes", reason))
        rows.append((operator.name, "reference", "by name" if on_gpu else "yes", 'impl="reference"' if on_gpu else ""))
    write_table(("operator", "implementation", f"on {chosen}", "why not"), rows)


# ---- penstock bench


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Measure operators, the engine or a server on this machine."""
    try:
        module = import_module("penstock.bench.cli")
    except ModuleNotFoundError as error:
        if error.name not in ("penstock.bench", "penstock.bench.cli"):
            raise
        raise UsageError("this installation has no penstock.bench") from error
    # It records the command it was given, which it reads from here.
    sys.argv = ["penstock bench", *context.args]
    command, arguments = module.command_of(context.args)
    name = "penstock bench" if arguments is context.args else "penstock bench serve"
    code = command(arguments, prog_name=name, standalone_mode=False)
    raise typer.Exit(code or 0)


# ---- penstock doctor


@app.command()
def doctor() -> None:
    """Check this machine; exit code 1 when something is broken."""
    rows = [(name, value, fault and f"error: {fault}") for name, value, fault in examine()]
    write_table((), rows)
    faults = [name for name, _, fault in rows if fault]
    if faults:
        print(f"error: {', '.join(faults)} must be mended", file=sys.stderr)
        raise typer.Exit(1)


def examine() -> Iterator[tuple[str, str, str]]:
    """(name, value, fault or "") of everything that decides whether and how Penstock runs here."""
    yield "penstock", sys.modules["penstock"].__version__, ""
    yield "python", f"{platform.python_version()} on {platform.platform()}", ""
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy"):
        yield package, *_package(package)
    try:
        import torch
    except Exception as error:
        yield "import torch", "failed", str(error)
        return
    gpus = torch.cuda.device_count()
    triton, fault = _package("triton")
    yield "triton", triton, fault if gpus else ""
    yield from _environment()
    yield from _cpu_facts()
    if not gpus:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield "gpu", f"none found; {built}", ""
    for index in range(gpus):
        yield from _gpu_facts(torch.device("cuda", index))
    if gpus:
        compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), "")
        yield "C compiler", compiler or "none", "" if compiler else "Triton needs one to launch kernels"
    try:
        yield "operators", f"{len(catalogue())} load", ""
    except Exception as error:
        yield "operators", "do not load", str(error)


def _package(name: str) -> tuple[str, str]:
    """The installed version, and what is wrong with it."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("penstock") or ()]
    except metadata.PackageNotFoundError:  # run from the source tree
        requirements = []
    wanted = next((requirement for requirement in requirements if requirement.name == name), Requirement(name))
    fault = f"Penstock needs {wanted.name}{wanted.specifier}"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed", fault
    return version, "" if wanted.specifier.contains(version, prereleases=True) else fault


def _environment() -> Iterator[tuple[str, str, str]]:
    from penstock.core.env import VARIABLES
    from penstock.core.features import interpreting

    for variable in VARIABLES:
        source = "set" if variable.name in os.environ else "default"
        try:
            value = variable.read()
            shown = value if variable.choices else "a secret" if value else "empty"
            yield variable.name, f"{shown} ({source})", ""
        except ValueError as error:
            yield variable.name, repr(os.environ[variable.name]), str(error)
    on = os.environ.get("TRITON_INTERPRET", "0") != "0" and interpreting()
    yield "Triton interpreter", "on: kernels run on the CPU, slowly" if on else "off (TRITON_INTERPRET=1 turns it on)", ""


def _cpu_facts() -> Iterator[tuple[str, str, str]]:
    import torch

    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    yield "cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores", ""
    yield "bfloat16 on the cpu", "in hardware" if fast else "emulated, slow", ""


def _gpu_facts(device: "torch.device") -> Iterator[tuple[str, str, str]]:
    import torch

    from penstock.core.device import has_tma, has_wgmma, properties

    try:
        facts = properties(device)
        memory = torch.cuda.get_device_properties(device).total_memory
    except RuntimeError as error:
        yield str(device), "does not answer", str(error)
        return
    yield str(device), f"{facts.name}, {memory / 2**30:.0f} GiB, driver {_driver(device.index)}", ""
    major, minor = facts.capability
    features = [name for name, has in (("wgmma", has_wgmma), ("TMA", has_tma)) if has(device)]
    yield "", f"capability {major}.{minor}, {facts.num_sms} multiprocessors, {' and '.join(features) or 'no wgmma, no TMA'}", ""


def _driver(index: int) -> str:
    query = ["nvidia-smi", f"--id={index}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} of nvidia-smi)"
    return answer.stdout.strip()


# ---- shared


def catalogue() -> "list[Op]":
    """Every public operator, by name."""
    import penstock.ops
    from penstock.core.op import Op

    return sorted((value for value in vars(penstock.ops).values() if isinstance(value, Op)), key=lambda found: found.name)


def resolve_device(name: str) -> "torch.device":
    """The torch device of an option's value; a usage error when there is none such."""
    import torch

    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def write_table(header: Sequence[str], rows: Iterable[Sequence[str]], file: TextIO | None = None) -> None:
    """Columns two spaces apart, the same in a terminal, a pipe and a document."""
    lines = [tuple(header), *map(tuple, rows)] if header else list(map(tuple, rows))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip(), file=file)
