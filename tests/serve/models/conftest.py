"""Small random checkpoints of every architecture, written by transformers as published ones are."""

from pathlib import Path

import pytest
import torch

_SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "final_logit_softcapping": 9.0}

_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
}
_GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
_DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}

CASES = {
    "llama": ("Llama", {"rope_theta": 5000.0}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}),
    "llama-llama3": ("Llama", {"rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama-yarn": (
        "Llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_theta": 1e6}),
    "gemma2": ("Gemma2", {**_GEMMA, **_ALTERNATING, "attn_logit_softcapping": 5.0}),
    "gemma3": (
        "Gemma3",
        {
            **_GEMMA,
            "sliding_window": 7,
            "num_hidden_layers": 3,
            "layer_types": [*_ALTERNATING["layer_types"], "sliding_attention"],
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]}),
    "qwen3-moe": ("Qwen3Moe", {**_EXPERTS, "norm_topk_prob": True, "head_dim": 32}),
    "deepseek2": ("DeepseekV2", {**_DEEPSEEK, **_GROUPS, "q_lora_rank": None, "topk_method": "group_limited_greedy"}),
    "deepseek3": ("DeepseekV3", {**_DEEPSEEK, **_GROUPS, "q_lora_rank": 28}),
    "deepseek3-yarn": ("DeepseekV3", {**_DEEPSEEK, **_GROUPS, "q_lora_rank": 28, "rope_scaling": _DEEPSEEK_YARN}),
}


def build(name: str, **changes):
    """The transformers model of a case: norms and biases random too, so that each of them matters."""
    import transformers

    family, fields = CASES[name]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**{**_SMALL, **fields, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(case) → the directory of a float32 checkpoint, written once a session."""
    written: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in written:
            written[name] = tmp_path_factory.mktemp(name)
            build(name).save_pretrained(written[name])
        return written[name]

    return write


@pytest.fixture(scope="session")
def build_model():
    return build


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(CASES))
