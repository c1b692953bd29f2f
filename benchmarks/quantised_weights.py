"""Times generation with the same shape in bfloat16, FP8 and INT8 weights, all random.

PYTHONPATH=. python benchmarks/quantised_weights.py llama-3.1-8b --device cuda --output $OUT/quantised_weights.json
PYTHONPATH=. python benchmarks/quantised_weights.py tiny --device cpu --output quantised_weights.json     # a dry run
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from penstock.bench.shapes import config_of
from penstock.core.formats import FP8_BLOCK, FP8_TOKEN, INT8_TOKEN
from penstock.serve.config import EngineConfig
from penstock.serve.llm import LLM
from penstock.serve.models.quantization import EVERY, Modules, Quantization, Scheme
from penstock.serve.models.spec import ModelSpec
from penstock.serve.models.weights import random_weights
from penstock.serve.params import SamplingParams
from penstock.serve.runner import Runner

SCHEMES = {
    "bfloat16": None,
    "fp8 block": Scheme(FP8_BLOCK, "block"),
    "fp8 token, channel": Scheme(FP8_TOKEN, "channel"),
    "fp8 tensor, static": Scheme(FP8_TOKEN, "tensor", static=True),
    "int8 token, channel": Scheme(INT8_TOKEN, "channel"),
}
LOADS = ((1, 16, 64), (64, 16, 64), (4, 1024, 1))


def measure(shape: str, device: str, scheme: Scheme | None, rounds: int) -> list[dict[str, Any]]:
    """Seconds of each load (requests, prompt tokens, output tokens) with one kind of weights."""
    spec = ModelSpec.from_config(config_of(shape))
    if scheme is not None:
        spec = dataclasses.replace(spec, quantization=Quantization(((EVERY, scheme),), Modules.read(())))
    options: dict[str, Any] = {"device": device, "max_model_len": 2048, "max_num_seqs": 64, "enable_prefix_caching": False}
    options["skip_tokenizer_init"] = True
    runner = Runner(spec, random_weights(spec, device=device), EngineConfig(shape, **options))
    llm = LLM(shape, runner=runner, **options)
    rows = []
    for requests, prompt, output in LOADS:
        prompts = [[(7 * i + j) % 100 + 3 for j in range(prompt)] for i in range(requests)]
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            llm.generate(prompts, params)
            seconds.append(time.perf_counter() - start)
        row = {"requests": requests, "prompt": prompt, "output": output}
        rows.append({**row, "seconds": statistics.median(seconds[1:]), "least": min(seconds[1:])})
    return rows


def main() -> None:
    """Prints a table and writes JSON; a scheme that fails leaves its message and the others go on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", help="a published shape, as in penstock bench engine --shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("quantised_weights.json"))
    options = parser.parse_args()
    document: dict[str, Any] = {"shape": options.shape, "device": options.device, "torch": torch.__version__, "weights": {}}
    for name, scheme in SCHEMES.items():
        try:
            rows = measure(options.shape, options.device, scheme, options.rounds)
            document["weights"][name] = {"rows": rows}
            print(
                name, *(f"{row['requests']}x{row['prompt']}+{row['output']} {row['seconds']:.4f} s" for row in rows), sep="  "
            )
        except (RuntimeError, ValueError) as error:
            document["weights"][name] = {"fault": f"{type(error).__name__}: {error}"}
            print(name, document["weights"][name]["fault"].splitlines()[0], sep="  ")
        if options.device == "cuda":
            torch.cuda.empty_cache()
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
