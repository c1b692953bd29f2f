"""What an option of the engine is worth: two engines around the same weights that differ in it alone, in alternation.

Shared prefix: requests one after another that begin with the same tokens; the time to the first token with and without the
prefix cache. Speculation: texts that repeat themselves, greedy; output tokens per second with and without n-gram guesses.
The outputs of both engines are compared first; in float32 they must be equal.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from penstock.bench import record
from penstock.bench.engine_peer import serve
from penstock.bench.shapes import config_of

WITH, WITHOUT = "with", "without"
TEXTS = (
    "for name in names:\n    print(name)\n" * 12,
    "The list is sorted. The list is short. " * 10,
    "x = x + 1\ny = y + 1\n" * 16,
    "If the argument is a string, it is returned. " * 8,
    "def read(path):\n    return path\n\n\n" * 8,
    "1, 2, 3, 4, 1, 2, 3, 4, " * 8,
    "a dictionary of keys and values, " * 10,
    "raise ValueError(name)\n" * 14,
)


@dataclass(frozen=True)
class Row:
    """One option on one workload.

    Args:
        seconds: medians by contestant; for a shared prefix to the first token of a request that is not the first of its
            prefix, else of the whole call.
        ratio: how many times faster the engine with the option was, median of the ratios of neighbours in time.
        quartiles: of these ratios.
        facts: what was counted.
        samples: seconds by contestant, neighbours at the same place.
    """

    option: str
    requests: int
    prompt: int
    output: int
    seconds: dict[str, float]
    ratio: float
    quartiles: tuple[float, float]
    facts: dict[str, float]
    samples: dict[str, list[float]]
    line: str


def engines(
    model: str, shape: str, device: torch.device, dtype: torch.dtype, option: Mapping[str, Any], **common: Any
) -> dict[str, Any]:
    """{with: LLM, without: LLM}; a checkpoint, or a shape with random weights, which both share."""
    settings = {WITH: option.get(WITH, {}), WITHOUT: option.get(WITHOUT, {})}
    common = {"device": str(device), **common}
    llm = serve("llm").LLM
    if model:
        name = str(dtype).removeprefix("torch.")
        return {who: llm(model, dtype=name, **common, **own) for who, own in settings.items()}
    spec = serve("models.spec").ModelSpec.from_config(config_of(shape))
    weights = serve("models.weights").random_weights(spec, device=device, dtype=dtype)
    made = {}
    for who, own in settings.items():
        config = serve("config").EngineConfig(model=shape, skip_tokenizer_init=True, **common, **own)
        runner = serve("runner").Runner(spec, weights, config)
        made[who] = llm(shape, runner=runner, skip_tokenizer_init=True, **common, **own)
    return made


def shared_prefix(llms: Mapping[str, Any], prefix: int, *, tail: int, requests: int, rounds: int) -> Row:
    """Time to the first token of requests that begin with the same `prefix` tokens; a new prefix in each round."""
    vocabulary = llms[WITH].engine.runner.vocab_size
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocabulary, (count,), generator=draw).tolist()

    common = tokens(prefix)
    _same_outputs(llms, [[*common, *tokens(tail)] for _ in range(2)], 16)
    samples: dict[str, list[float]] = {who: [] for who in llms}
    first: dict[str, list[float]] = {who: [] for who in llms}
    before = llms[WITH].engine.statistics()
    for turn in range(rounds):
        common = tokens(prefix)
        for index in range(requests):
            prompt = [*common, *tokens(tail)]
            for who in _in_turn(llms, turn + index):
                (samples if index else first)[who].append(_seconds(llms[who], [prompt], 1))
    after = llms[WITH].engine.statistics()
    facts = {
        "first of its prefix, with": statistics.median(first[WITH]),
        "first of its prefix, without": statistics.median(first[WITHOUT]),
        "hit rate": (after.prefix_hit_tokens - before.prefix_hit_tokens) / (after.prompt_tokens - before.prompt_tokens),
    }
    line = (
        f"{prefix} shared + {tail} own tokens: first token {{without}} ms without the cache, {{with}} ms with it, {{ratio}}x; "
        f"hit rate {facts['hit rate']:.1%}"
    )
    return _row("prefix caching", 1, prefix + tail, 1, samples, facts, line)


def speculation(llms: Mapping[str, Any], requests: int, output: int, *, rounds: int) -> Row:
    """Output tokens per second on texts that repeat themselves, `requests` at a time."""
    prompts = [llms[WITH].tokenizer.encode(text) for text in TEXTS]
    groups = [prompts[at : at + requests] for at in range(0, len(prompts), requests)]
    for group in groups:
        _same_outputs(llms, group, output)
    samples: dict[str, list[float]] = {who: [] for who in llms}
    before = llms[WITH].engine.statistics()
    for turn in range(rounds):
        for index, group in enumerate(groups):
            for who in _in_turn(llms, turn + index):
                samples[who].append(_seconds(llms[who], group, output))
    after = llms[WITH].engine.statistics()
    drafted, accepted = after.draft_tokens - before.draft_tokens, after.accepted_tokens - before.accepted_tokens
    total = rounds * len(prompts) * output
    facts = {"draft tokens": drafted, "accepted tokens": accepted, "acceptance": accepted / max(1, drafted)}
    facts |= {f"tokens per second, {who}": total / sum(samples[who]) for who in llms}
    k = llms[WITH].engine.config.num_draft_tokens
    plain, guessed = (facts[f"tokens per second, {who}"] for who in (WITHOUT, WITH))
    line = (
        f"{requests} x {output} tokens of text that repeats: {plain:.0f} tokens/s, with {k} n-gram guesses {guessed:.0f}, "
        f"{{ratio}}x; {facts['acceptance']:.0%} of the guesses were right"
    )
    return _row("speculation", requests, sum(map(len, prompts)) // len(prompts), output, samples, facts, line)


def _row(
    option: str,
    requests: int,
    prompt: int,
    output: int,
    samples: dict[str, list[float]],
    facts: dict[str, float],
    line: str,
) -> Row:
    ratios = [slow / fast for slow, fast in zip(samples[WITHOUT], samples[WITH], strict=True)]
    seconds = {who: statistics.median(values) for who, values in samples.items()}
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    words = {who: f"{value * 1e3:.1f}" for who, value in seconds.items()}
    line = f"{line.format(ratio=f'{ratio:.2f}', **words)} (quartiles {low:.2f} to {high:.2f})"
    return Row(option, requests, prompt, output, seconds, ratio, (low, high), facts, samples, line)


def _in_turn(llms: Mapping[str, Any], turn: int) -> Sequence[str]:
    names = list(llms)
    return names if turn % 2 else names[::-1]


def _seconds(llm: Any, prompts: Sequence[list[int]], output: int) -> float:
    start = time.perf_counter()
    _outputs(llm, prompts, output)  # token ids are read, so a GPU has finished
    return time.perf_counter() - start


def _outputs(llm: Any, prompts: Sequence[list[int]], output: int) -> list[list[int]]:
    wanted = serve("params").SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
    made = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, progress=False)
    return [list(each.outputs[0].token_ids) for each in made]


def _same_outputs(llms: Mapping[str, Any], prompts: Sequence[list[int]], output: int) -> None:
    """Refuses engines whose greedy outputs differ; in 16 bits, where equal logits round apart, only their lengths."""
    mine, other = (_outputs(llms[who], prompts, output) for who in (WITH, WITHOUT))
    exact = llms[WITH].engine.runner.dtype == torch.float32
    if mine != other if exact else [len(each) for each in mine] != [len(each) for each in other]:
        raise ValueError(f"red gate: the option changes the output: {mine} with, {other} without")


def bench_from_command_line(
    console: Console,
    device: torch.device,
    *,
    model: str,
    shape: str,
    quick: bool,
    prefix: int,
    guesses: int,
    output: Path | None,
) -> None:
    """`penstock bench engine --shared-prefix N` and `--speculative K`; each writes a JSON file of its own."""
    if model and shape:
        raise ValueError(f"give a model or a shape, got both: {model!r} and {shape!r}")
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    common: dict[str, Any] = {"kv_cache_memory": "4GiB"} if on_gpu else {}

    def keep(name: str, what: str, rows: Callable[[], list[Row]]) -> None:
        console.print(f"@start engine {what}", markup=False)
        made = rows()
        for row in made:
            console.print(row.line, markup=False)
        document = {
            "schema": record.SCHEMA,
            "model": what,
            "dtype": str(dtype).removeprefix("torch."),
            "environment": record.environment(device),
            "rows": [asdict(row) for row in made],
        }
        path = (output or record.default_folder(device)) / f"{name}.json"
        record.write_json(path, document)
        console.print(f"@done {path}", markup=False)

    chosen = shape or ("" if model else "tiny" if quick else "llama-3.1-8b" if on_gpu else "small")

    def prefix_rows() -> list[Row]:
        tail = 16 if quick else 64
        limits = {"max_model_len": prefix + tail + 32, "max_num_seqs": 2, **common}
        llms = engines(model, chosen, device, dtype, {WITHOUT: {"enable_prefix_caching": False}}, **limits)
        return [shared_prefix(llms, prefix, tail=tail, requests=4, rounds=1 if quick else 5)]

    def guess_rows() -> list[Row]:
        option = {WITH: {"speculative": {"method": "ngram", "num_tokens": guesses}}}
        length = 16 if quick else 128
        limits = {"max_model_len": 768, "max_num_seqs": len(TEXTS), **common}
        llms = engines(model or "demo", "", device, dtype, option, **limits)
        counts = [1] if quick else [1, len(TEXTS)]
        return [speculation(llms, requests, length, rounds=1 if quick else 4) for requests in counts]

    if prefix:
        keep("engine_shared_prefix", Path(model).name or chosen, prefix_rows)
    if guesses:
        keep("engine_speculative", Path(model).name or "demo", guess_rows)
