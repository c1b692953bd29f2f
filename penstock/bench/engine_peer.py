"""transformers on the same weights: built from a checkpoint, or around the engine's own tensors; and the gate on tokens."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Prompts = Sequence[list[int]]


def load_checkpoint(path: str | Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The checkpoint as transformers reads it, with SDPA."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", local_files_only=True)
    return _ready(model.to(device))


def around_weights(config: Any, spec: Any, weights: Any) -> Any:
    """A transformers model whose parameters are views of penstock's packed ones: no second copy on the device."""
    from transformers import AutoModelForCausalLM

    device, dtype = weights.embedding.device, weights.embedding.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    state = {
        "model.embed_tokens.weight": weights.embedding,
        "lm_head.weight": weights.lm_head,
        "model.norm.weight": weights.norm,
    }
    for i, (layer, own) in enumerate(zip(spec.layers, weights.layers, strict=True)):
        head = f"model.layers.{i}."
        sizes = [layer.num_heads * layer.head_dim] + [layer.num_kv_heads * layer.head_dim] * 2
        state[head + "input_layernorm.weight"] = own.input_norm
        state[head + "post_attention_layernorm.weight"] = own.mlp_norm
        for name, part in zip("qkv", own.qkv.split(sizes), strict=True):
            state[f"{head}self_attn.{name}_proj.weight"] = part
        state[head + "self_attn.o_proj.weight"] = own.o
        gate, up = own.gate_up.chunk(2)
        state |= {head + "mlp.gate_proj.weight": gate, head + "mlp.up_proj.weight": up}
        state[head + "mlp.down_proj.weight"] = own.down
        if own.q_norm is not None:
            state |= {head + "self_attn.q_norm.weight": own.q_norm, head + "self_attn.k_norm.weight": own.k_norm}
    model.load_state_dict(state, assign=True)
    # The rotary tables are buffers outside the state dict: made again, this time with values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.device.type == "meta"]
    if left:
        raise ValueError(f"{config.architectures[0]}: these parameters have no counterpart in penstock's weights: {left}")
    return _ready(model)


def _ready(model: Any) -> Any:
    model.eval()
    # Every contestant makes the same number of tokens.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    for option in ("temperature", "top_k", "top_p"):
        setattr(model.generation_config, option, None)
    return model


@torch.inference_mode()
def generate_batch(model: Any, prompts: Prompts, count: int) -> list[list[int]]:
    """Greedy tokens of all prompts in one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=count, do_sample=False)
    return out[:, longest:].tolist()


def generate_each(model: Any, prompts: Prompts, count: int) -> list[list[int]]:
    """Greedy tokens of the prompts, one after another."""
    return [generate_batch(model, [prompt], count)[0] for prompt in prompts]


def divergence(model: Any, prompts: Prompts, ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Why our greedy tokens are wrong, or "".

    In float32 tokens agree. In bfloat16 two correct programs part where two logits are nearly equal: at the first difference
    transformers' own logits of the two tokens must then lie within twice the largest difference between the logits that
    transformers itself computes with SDPA and with its eager attention, or twice one rounding of the largest logit, if that
    is more.
    """
    for index, (prompt, mine, other) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if len(mine) != len(other):
            return f"prompt {index}: {len(mine)} tokens, transformers made {len(other)}"
        at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), None)
        if at is None:
            continue
        logits, again = (_logits(model, prompt + other[:at], attention) for attention in ("sdpa", "eager"))
        rounding = torch.finfo(model.dtype).eps * float(logits.abs().max())
        allowed = 2 * max(float((logits - again).abs().max()), rounding)
        gap = float(logits[other[at]] - logits[mine[at]])
        if gap > allowed:
            return (
                f"prompt {index}, token {at}: {mine[at]}, transformers has {other[at]}; "
                f"their logits differ by {gap:.3g}, noise allows {allowed:.3g}"
            )
    return ""


@torch.inference_mode()
def _logits(model: Any, ids: list[int], attention: str) -> Tensor:
    model.set_attn_implementation(attention)
    try:
        return model(torch.tensor([ids], device=model.device), logits_to_keep=1).logits[0, -1].float()
    finally:
        model.set_attn_implementation("sdpa")


def serve(name: str) -> Any:
    """A module of penstock.serve by name: benchmarks load the runtime, they are not part of it."""
    return importlib.import_module(f"penstock.serve.{name}")
