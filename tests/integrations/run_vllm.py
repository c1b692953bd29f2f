"""Greedy tokens of a small random Qwen3 in vLLM on the CPU: run_vllm.py FOLDER [--compile]; PENSTOCK_VLLM=1 for our plug-in.

Prints one line of JSON: the tokens of each prompt, how often vLLM called each of our functions, and what ran inside them.
"""

import functools
import json
import os
import sys
from pathlib import Path

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR"
)
CONFIG = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
PROMPTS = [[7 * i % 199 for i in range(1, n)] for n in (30, 4, 60)]
FUNCTIONS = ("attend", "norm", "add_norm", "_silu")


def write_checkpoint(folder: Path) -> None:
    """Random weights, so large that tokens depend on every layer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**CONFIG)).save_pretrained(folder)


def main(folder: Path, compiled: bool) -> None:
    from penstock.integrations import vllm as ours

    calls = dict.fromkeys(FUNCTIONS, 0)

    def counted(name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in FUNCTIONS:
        setattr(ours, name, counted(name, getattr(ours, name)))

    from vllm import LLM, SamplingParams

    if not (folder / "config.json").exists():
        write_checkpoint(folder)
    on = os.environ.get("PENSTOCK_VLLM") == "1"
    priority = {"ir_op_priority": {name: ["penstock", "native"] for name in ("rms_norm", "fused_add_rms_norm")}}
    llm = LLM(
        model=str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=not compiled,
        max_model_len=128,
        max_num_batched_tokens=64,
        seed=0,
        **({"kernel_config": priority} if on else {}),
    )
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    from penstock.ops import add_rms_norm, attention_decode, attention_prefill_paged, rms_norm, silu_and_mul, store_kv

    operators = (add_rms_norm, attention_decode, attention_prefill_paged, rms_norm, silu_and_mul, store_kv)
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "calls": calls,
        "ran": {op.name: list(op.choices()) for op in operators},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--compile" in sys.argv[2:])
