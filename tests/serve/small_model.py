"""A small random model, and engines around it."""

import torch

from penstock.serve.config import EngineConfig
from penstock.serve.engine import Engine
from penstock.serve.models.spec import LayerSpec, ModelSpec, RopeSpec
from penstock.serve.models.weights import random_weights
from penstock.serve.runner import Runner

LAYER = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=16, query_scale=0.25, mlp_size=48)
ROPE = RopeSpec(16, {"rope_type": "default", "rope_theta": 10000.0})
SPEC = ModelSpec("LlamaForCausalLM", 61, 32, (LAYER,) * 2, (ROPE,), 128, 1e-5, eos_token_ids=(2,))


def make_runner(record=None, *, weights_seed=3, **options):
    """A runner of the model in float32, its logits far apart."""
    weights = random_weights(SPEC, dtype=torch.float32, seed=weights_seed)
    for tensor in weights.tensors():
        if tensor.dim() == 2:
            tensor.mul_(15)
    return Runner(SPEC, weights, EngineConfig("unused", **{"max_num_seqs": 6, "page_size": 4, **options}), record=record)


def make_engine(drafter=None, record=None, **options):
    """An engine around the model."""
    options = {"max_num_seqs": 6, "page_size": 4, "max_num_batched_tokens": 64, "skip_tokenizer_init": True, **options}
    config = EngineConfig("unused", **options)
    return Engine(config, make_runner(record, **options), None, drafter)


def complete(engine, prompts, params):
    """(token ids, log-probabilities) of every completion of every prompt; params for all or a list."""
    every = params if isinstance(params, list) else [params] * len(prompts)
    for index, (prompt, own) in enumerate(zip(prompts, every, strict=True)):
        engine.add_request(str(index), prompt, own, stream=False)
    outputs = {}
    while engine.has_unfinished():
        for output in engine.step():
            outputs[output.request_id] = [(each.token_ids, each.logprobs) for each in output.outputs]
        engine.scheduler.check()
    assert engine.scheduler.num_free_pages == engine.runner.num_pages
    return [outputs[str(index)] for index in range(len(prompts))]
