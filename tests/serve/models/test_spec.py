"""The architecture as data: every known config, the forms that rope settings take, and each refusal."""

import json
from types import SimpleNamespace

import pytest

from penstock.serve.models.spec import ARCHITECTURES, ModelError, ModelSpec, read_spec

LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}


@pytest.fixture
def write(tmp_path):
    def write_config(raw, **changes):
        text = raw if isinstance(raw, str) else json.dumps({**raw, **changes})
        (tmp_path / "config.json").write_text(text)
        return tmp_path

    return write_config


def test_published_llama_config(write):
    directory = write(LLAMA_31_8B)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [128009, 7]}))
    spec = read_spec(directory)
    assert (spec.vocab_size, spec.hidden_size, len(spec.layers), spec.dtype) == (128256, 4096, 32, "bfloat16")
    assert spec.eos_token_ids == (128001, 128008, 128009, 7)
    assert spec.num_parameters == 8_030_261_248
    layer = spec.layers[0]
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.query_scale) == (32, 8, 128, 128**-0.5)
    assert spec.ropes[0].parameters == {**LLAMA_31_8B["rope_scaling"], "rope_theta": 500000.0}


def test_published_gemma3_config(write):
    spec = read_spec(write(GEMMA_3_1B))
    assert [layer.window for layer in spec.layers[:7]] == [512] * 5 + [None, 512]
    assert [layer.rope for layer in spec.layers[:7]] == [1] * 5 + [0, 1]
    assert [rope.parameters["rope_theta"] for rope in spec.ropes] == [1_000_000, 10_000]
    assert spec.tie_word_embeddings and spec.norm_weight_offset == 1.0 and spec.embedding_scale == 1152**0.5
    assert spec.layers[0].qk_norm and spec.layers[0].post_norms and spec.layers[0].activation == "gelu_tanh"
    assert spec.num_parameters == 999_885_952


@pytest.mark.parametrize("form", ["published", "transformers 5"])
def test_both_forms_of_rope_settings_mean_the_same(form):
    fields = {k: v for k, v in LLAMA_31_8B.items() if not k.startswith("rope_")}
    if form == "published":
        config = SimpleNamespace(**LLAMA_31_8B)
    else:
        config = SimpleNamespace(**fields, rope_parameters={**LLAMA_31_8B["rope_scaling"], "rope_theta": 500000.0})
    spec = ModelSpec.from_config(config)
    assert spec.ropes[0].parameters == {**LLAMA_31_8B["rope_scaling"], "rope_theta": 500000.0}


def test_older_rope_scaling_calls_the_type_type(write):
    spec = read_spec(write(LLAMA_31_8B, rope_scaling={"type": "linear", "factor": 2.0}))
    assert spec.ropes[0].parameters["rope_type"] == "linear"


def test_scaling_that_the_user_adds_lengthens_the_context(write):
    assert read_spec(write(LLAMA_31_8B)).max_context == 131072
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read_spec(write(LLAMA_31_8B, rope_scaling=scaling, max_position_embeddings=32768)).max_context == 131072


def test_older_gemma3_config_object_scales_only_the_global_layers():
    raw = {**GEMMA_3_1B, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    spec = ModelSpec.from_config(SimpleNamespace(**{**raw, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}))
    assert [rope.parameters["rope_type"] for rope in spec.ropes] == ["linear", "default"]
    assert [rope.parameters["rope_theta"] for rope in spec.ropes] == [1_000_000, 10_000]


def test_every_case_has_the_parameters_of_its_checkpoint(case, build_model):
    model = build_model(case)
    model.config.architectures = [type(model).__name__]
    spec = ModelSpec.from_config(model.config)
    # the bias of a sigmoid router is in the checkpoint, and a buffer
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert spec.num_parameters == sum(p.numel() for p in [*model.parameters(), *biases])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", *ARCHITECTURES]),
        ({"architectures": []}, ["no architecture"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quant_method", "fp8", "compressed-tensors", "gptq"]),
        ({"num_local_experts": 8}, ["mixture-of-experts", "num_local_experts=8"]),
        ({"alibi": True}, ["ALiBi"]),
        ({"hidden_act": "relu"}, ["relu", "silu"]),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, ["proportional", "llama3"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, ["high_freq_factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"head_dim": 320}, ["head_dim", "320"]),
        ({"head_dim": 127}, ["head_dim", "127"]),
        ({"num_key_value_heads": 5}, ["num_attention_heads 32", "num_key_value_heads 5"]),
        ({"hidden_size": 4097}, ["4097"]),
        ({"num_hidden_layers": "many"}, ["config.json", "num_hidden_layers"]),
    ],
)
def test_what_is_not_supported_is_named(write, changes, words):
    with pytest.raises(ModelError) as error:
        read_spec(write(LLAMA_31_8B, **changes))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_gemma3_attention_softcap_is_refused(write):
    with pytest.raises(ModelError, match="attn_logit_softcapping"):
        read_spec(write(GEMMA_3_1B, attn_logit_softcapping=50.0))


def test_missing_and_invalid_config(write, tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_spec(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        read_spec(write('{"vocab_size": 3'))
    with pytest.raises(ModelError, match="must hold a JSON object, got list"):
        read_spec(write("[1]"))
