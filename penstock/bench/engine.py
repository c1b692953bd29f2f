"""Tokens per second of penstock.LLM against transformers on the same weights, in alternation, greedy outputs compared first.

Each contestant makes 1, n/3 and n tokens: the first time is the time to the first token, the difference of the last two is
n - n/3 pure decode steps, whatever a scheduler mixes into the prefill. On CUDA a decode step also stands against the time in
which its bytes (weights, except the rows of the embedding, and keys and values) can be streamed at the measured copy rate.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from penstock.bench import record
from penstock.bench.engine_peer import (
    around_weights,
    divergence,
    generate_batch,
    generate_each,
    load_checkpoint,
    serve,
)
from penstock.bench.roofline import Ceilings, measure_ceilings
from penstock.bench.shapes import config_of

Generate = Callable[[Sequence[list[int]], int], list[list[int]]]
OURS = "penstock"


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together; prompts are random and between half and all of `prompt` tokens long."""

    requests: int
    prompt: int
    output: int

    @property
    def outputs(self) -> tuple[int, int, int]:
        """The output lengths that are timed."""
        return 1, max(2, self.output // 3), self.output


@dataclass(frozen=True)
class Row:
    """One contestant on one workload; seconds are medians over rounds.

    Args:
        tokens_per_second: output tokens over the whole time, prefill included.
        step_seconds: one decode step of all requests.
        ratios: how many times faster penstock was than this peer, medians of the ratios of each round.
        of_floor: the streaming floor over a decode step; None on a CPU.
        samples: seconds by output length, one for each round.
    """

    contestant: str
    requests: int
    prompt: int
    output: int
    tokens_per_second: float
    first_token_seconds: float
    step_seconds: float
    ratios: dict[str, float]
    of_floor: float | None
    samples: dict[int, list[float]]
    line: str = ""


@dataclass
class Pair:
    """The two engines on the same weights."""

    llm: Any
    peer: Any
    vocab_size: int
    spec: Any
    weight_bytes: int


def bench_engine(
    pair: Pair,
    workloads: Sequence[Workload],
    device: torch.device,
    *,
    rounds: int = 5,
    each: bool = True,
    ceilings: Ceilings | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> tuple[list[Row], dict[str, str]]:
    """Times the workloads.

    Args:
        rounds: every contestant once in each, in alternation.
        each: where there are several requests, also transformers one after another.
        ceilings: give the streaming floor; None for no floor.
    Returns: the rows, and for each workload that has none the reason.
    """
    rows: list[Row] = []
    without: dict[str, str] = {}
    for workload in workloads:
        generator = torch.Generator().manual_seed(0)
        spread = torch.linspace(workload.prompt // 2, workload.prompt, workload.requests).long()
        lengths = spread.tolist() if workload.requests > 1 else [workload.prompt]
        prompts = [torch.randint(0, pair.vocab_size, (length,), generator=generator).tolist() for length in lengths]
        contestants: dict[str, Generate] = {OURS: _ours(pair.llm)}
        if workload.requests == 1:
            contestants["transformers"] = lambda given, count: generate_batch(pair.peer, given, count)
        else:
            contestants["transformers, one padded batch"] = lambda given, count: generate_batch(pair.peer, given, count)
        if workload.requests > 1 and each:
            contestants["transformers, one after another"] = lambda given, count: generate_each(pair.peer, given, count)
        made = {name: generate(prompts, workload.output) for name, generate in contestants.items()}
        # One after another is what every request means; padding is the batch's own affair.
        theirs = made.get("transformers, one after another") or list(made.values())[1]
        fault = divergence(pair.peer, prompts, made[OURS], theirs)
        if fault:
            without[f"{workload.requests} requests"] = f"red gate: {fault}"
            continue
        samples = _alternate(contestants, prompts, workload, rounds, device)
        floor = None if ceilings is None else _floor_seconds(pair, workload, lengths, ceilings)
        for name in contestants:
            row = _row(name, workload, samples, floor)
            rows.append(row)
            if on_row:
                on_row(row)
    return rows, without


def _ours(llm: Any) -> Generate:
    params = serve("params").SamplingParams

    def generate(prompts: Sequence[list[int]], count: int) -> list[list[int]]:
        wanted = params(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, progress=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def _alternate(
    contestants: dict[str, Generate], prompts: list[list[int]], workload: Workload, rounds: int, device: torch.device
) -> dict[str, dict[int, list[float]]]:
    samples: dict[str, dict[int, list[float]]] = {name: {n: [] for n in workload.outputs} for name in contestants}
    names = list(contestants)
    for index in range(rounds):
        turn = index % len(names)
        for count in workload.outputs:
            for name in names[turn:] + names[:turn]:
                _wait(device)
                start = time.perf_counter()
                contestants[name](prompts, count)
                _wait(device)
                samples[name][count].append(time.perf_counter() - start)
    return samples


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _row(name: str, workload: Workload, samples: dict[str, dict[int, list[float]]], floor: float | None) -> Row:
    first, middle, last = workload.outputs

    def steps(who: str) -> list[float]:
        return [(b - a) / (last - middle) for a, b in zip(samples[who][middle], samples[who][last], strict=True)]

    def ratio(mine: list[float], other: list[float]) -> float:
        return statistics.median(b / a for a, b in zip(mine, other, strict=True))

    ratios = {}
    if name != OURS:
        ratios = {
            "tokens per second": ratio(samples[OURS][last], samples[name][last]),
            "time to first token": ratio(samples[OURS][first], samples[name][first]),
            "decode step": ratio(steps(OURS), steps(name)),
        }
    total, step = statistics.median(samples[name][last]), statistics.median(steps(name))
    rate, wait = workload.requests * last / total, statistics.median(samples[name][first])
    of_floor = None if floor is None else floor / step
    line = (
        f"{workload.requests} x {workload.prompt} -> {last} tokens, {name}: {rate:.1f} tokens/s, "
        f"first token {wait * 1e3:.1f} ms, decode step {step * 1e3:.2f} ms"
    )
    line += f", {of_floor:.0%} of the streaming floor" if of_floor else ""
    line += "".join(f"; penstock {value:.2f}x in {what}" for what, value in ratios.items())
    return Row(
        contestant=name,
        requests=workload.requests,
        prompt=workload.prompt,
        output=last,
        tokens_per_second=rate,
        first_token_seconds=wait,
        step_seconds=step,
        ratios=ratios,
        of_floor=of_floor,
        samples=samples[name],
        line=line,
    )


def _floor_seconds(pair: Pair, workload: Workload, lengths: list[int], ceilings: Ceilings) -> float:
    """The streaming floor of one decode step in the middle of the timed ones."""
    _, middle, last = workload.outputs
    tokens = sum(lengths) + len(lengths) * (middle + last) // 2
    size = pair.peer.dtype.itemsize
    each = sum(2 * layer.num_kv_heads * layer.head_dim * size for layer in pair.spec.layers)
    return (pair.weight_bytes + tokens * each) / ceilings.copy


def streamed_bytes(parameters: Sequence[torch.Tensor], embedding: torch.Tensor, head: torch.Tensor) -> int:
    """Bytes of all weights that one decode step reads: an embedding that is not also the head gives single rows."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in parameters)
    shared = embedding.data_ptr() == head.data_ptr()
    return total if shared else total - embedding.numel() * embedding.element_size()


def pair_of_checkpoint(path: str | Path, device: torch.device, dtype: torch.dtype, **options: Any) -> Pair:
    """Both engines from one checkpoint."""
    options["enable_prefix_caching"] = False  # the prompts come again and again
    spec = serve("models.spec").read_spec(serve("config").resolve_model(path))
    folder = serve("config").resolve_model(path)
    name = str(dtype).removeprefix("torch.")
    llm = serve("llm").LLM(str(path), device=str(device), dtype=name, skip_tokenizer_init=True, **options)
    peer = load_checkpoint(folder, device, dtype)
    parameters = list(peer.parameters())
    streamed = streamed_bytes(parameters, peer.get_input_embeddings().weight, peer.get_output_embeddings().weight)
    return Pair(llm, peer, spec.vocab_size, spec, streamed)


def pair_of_shape(shape: str, device: torch.device, dtype: torch.dtype, **options: Any) -> Pair:
    """Both engines around one set of random weights in a published shape."""
    options["enable_prefix_caching"] = False  # the prompts come again and again
    config = config_of(shape)
    spec = serve("models.spec").ModelSpec.from_config(config)
    weights = serve("models.weights").random_weights(spec, device=device, dtype=dtype)
    engine_config = serve("config").EngineConfig(model=shape, device=str(device), skip_tokenizer_init=True, **options)
    runner = serve("runner").Runner(spec, weights, engine_config)
    llm = serve("llm").LLM(shape, device=str(device), runner=runner, skip_tokenizer_init=True, **options)
    streamed = streamed_bytes(list(weights.tensors()), weights.embedding, weights.lm_head)
    return Pair(llm, around_weights(config, spec, weights), spec.vocab_size, spec, streamed)


def bench_from_command_line(
    console: Console, device: torch.device, *, model: str, shape: str, quick: bool, output: Path | None
) -> None:
    """`penstock bench engine`: a checkpoint, or a shape with random weights; writes engine.json."""
    if model and shape:
        raise ValueError(f"give a model or a shape, got both: {model!r} and {shape!r}")
    on_gpu = device.type == "cuda"
    if not model and not shape and not quick and not on_gpu:
        model = "demo"
    shape = shape or ("" if model else "tiny" if quick else "llama-3.1-8b")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if quick:
        workloads, rounds = [Workload(1, 12, 9), Workload(4, 12, 9)], 2
    elif on_gpu:
        workloads, rounds = [Workload(1, 1024, 64), Workload(16, 1024, 64), Workload(64, 1024, 64)], 3
    else:
        workloads, rounds = [Workload(1, 64, 48), Workload(16, 64, 24)], 5
    longest = max(workload.prompt + workload.output for workload in workloads)
    options: dict[str, Any] = {
        "max_num_seqs": max(workload.requests for workload in workloads),
        "max_model_len": longest + 1,
        "max_num_batched_tokens": 8192 if on_gpu else 2048,
    }
    if on_gpu:
        # The peer's cache needs room too, so the pool gets what the largest workload fills, and no more.
        options["kv_cache_memory"] = "24GiB"
        options["page_size"] = 64
    console.print(f"@start engine {model or shape}", markup=False)
    pair = pair_of_checkpoint(model, device, dtype, **options) if model else pair_of_shape(shape, device, dtype, **options)
    ceilings = measure_ceilings(device, quick=quick) if on_gpu else None
    document: dict[str, Any] = {
        "schema": record.SCHEMA,
        "model": Path(model).name or shape,
        "dtype": str(dtype).removeprefix("torch."),
        "environment": record.environment(device),
        "rounds": rounds,
        "ceilings": ceilings and asdict(ceilings),
        "rows": [],
        "without": {},
    }
    path = (output or record.default_folder(device)) / "engine.json"

    def keep(row: Row) -> None:
        # Written after every row: a later workload may run into the time limit.
        console.print(row.line, markup=False)
        document["rows"].append(asdict(row))
        record.write_json(path, document)

    _, without = bench_engine(pair, workloads, device, rounds=rounds, each=not on_gpu, ceilings=ceilings, on_row=keep)
    document["without"] = without
    for workload, reason in without.items():
        console.print(f"{workload}: no number, {reason}", markup=False)
    record.write_json(path, document)
    console.print(f"@done {path}", markup=False)
