"""rope_table against transformers' own rotary modules, for every scaling; and its errors."""

import pytest
import torch

from penstock.core.op import NotSupported
from penstock.ops import rope_table
from penstock.ops.rotary.scaling import RopeConfig

llama = pytest.importorskip("transformers.models.llama.modeling_llama")
from transformers import CohereConfig, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Phi3Config  # noqa: E402

LENGTH = 96
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 32},
    "yarn_deepseek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 48,
        "attention_factor": 1.25,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 3.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + i / 16 for i in range(16)],
        "long_factor": [2.0 + i / 4 for i in range(16)],
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
}


def config_with(scaling, length=LENGTH, **others):
    parameters = {"rope_theta": 20000.0, **scaling}
    return LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=length, rope_parameters=parameters, **others
    )


def theirs_of(module, length, **options):
    cos, sin = module(torch.zeros(1), torch.arange(length)[None], **options)
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), 1)


@pytest.mark.parametrize("name", SCALINGS)
def test_equals_transformers(name):
    config = config_with(SCALINGS[name])
    theirs = theirs_of(llama.LlamaRotaryEmbedding(config), LENGTH)
    ours = rope_table(config)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("length", [16, 96, 97, 300])
def test_dynamic_equals_transformers_at_the_table_s_length(length):
    config = config_with(SCALINGS["dynamic"])
    theirs = theirs_of(llama.LlamaRotaryEmbedding(config), length)
    torch.testing.assert_close(rope_table(config, max_position=length), theirs, rtol=2e-6, atol=2e-6)
    unscaled = rope_table(rotary_dim=32, max_position=length, theta=20000.0)
    assert torch.equal(rope_table(config, max_position=length), unscaled) == (length <= LENGTH)


@pytest.mark.parametrize("length", [32, 33])
def test_longrope_takes_the_divisors_of_its_length(length):
    config = config_with(SCALINGS["longrope"])
    theirs = theirs_of(llama.LlamaRotaryEmbedding(config), length)
    torch.testing.assert_close(rope_table(config, max_position=length), theirs, rtol=2e-6, atol=2e-6)


def test_long_positions_equal_transformers():
    config = config_with(SCALINGS["llama3"], length=131072, head_dim=64)
    positions = torch.tensor([0, 1, 4095, 65537, 131071])
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    rows = rope_table(config)[positions]
    torch.testing.assert_close(rows, torch.cat((cos[0, :, :32], sin[0, :, :32]), 1), rtol=0, atol=1e-4)


def test_partial_rotation_of_a_config():
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    config = GPTNeoXConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=64, rotary_pct=0.25)
    theirs = theirs_of(neox.GPTNeoXRotaryEmbedding(config), 64)
    assert theirs.shape[1] == 16
    torch.testing.assert_close(rope_table(config), theirs)


def test_parameters_by_layer_type():
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    config = Gemma3TextConfig(hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=64)
    module = gemma3.Gemma3RotaryEmbedding(config)
    for layer_type in ("full_attention", "sliding_attention"):
        theirs = theirs_of(module, 64, layer_type=layer_type)
        torch.testing.assert_close(rope_table(config, layer_type=layer_type), theirs)
    with pytest.raises(ValueError, match="layer_type"):
        rope_table(config)


def test_phi3_states_its_original_length_outside_the_dictionary():
    phi3 = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    config = Phi3Config(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    theirs = theirs_of(phi3.Phi3RotaryEmbedding(config), 128)
    torch.testing.assert_close(rope_table(config), theirs, rtol=2e-6, atol=2e-6)


def test_cohere_repeats_the_same_table():
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    config = CohereConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=32)
    cos, sin = cohere.CohereRotaryEmbedding(config)(torch.zeros(1), torch.arange(32)[None])
    torch.testing.assert_close(rope_table(config), torch.cat((cos[0, :, ::2], sin[0, :, ::2]), 1))


def test_a_dictionary_a_dataclass_and_keywords_agree():
    by_keyword = rope_table(rotary_dim=32, max_position=64, theta=5000.0, scaling="linear", factor=2.0)
    dataclass = RopeConfig(rotary_dim=32, max_position=64, theta=5000.0, scaling="linear", factor=2.0)
    modern = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    assert torch.equal(rope_table(dataclass), by_keyword)
    assert torch.equal(rope_table(modern, head_dim=32, max_position=64), by_keyword)
    assert torch.equal(rope_table(dataclass, max_position=16), by_keyword[:16])

    class Older:
        """A configuration written before rope_parameters existed."""

        rope_scaling = {"type": "linear", "factor": 2.0}  # noqa: RUF012
        rope_theta = 5000.0
        hidden_size, num_attention_heads, max_position_embeddings = 128, 4, 64

    assert torch.equal(rope_table(Older()), by_keyword)


def test_errors():
    with pytest.raises(NotSupported, match="axial"):
        rope_table({"rope_type": "axial"}, head_dim=32, max_position=8)
    with pytest.raises(ValueError, match="head_dim"):
        rope_table({"rope_type": "default"}, max_position=8)
    with pytest.raises(ValueError, match="max_position"):
        rope_table({"rope_type": "default"}, head_dim=8)
    with pytest.raises(ValueError, match="max_position"):
        rope_table(rotary_dim=8)
    with pytest.raises(ValueError, match="rotary_dim"):
        rope_table(rotary_dim=7, max_position=8)
    with pytest.raises(ValueError, match="factor"):
        rope_table({"rope_type": "default"}, head_dim=8, max_position=8, factor=2.0)
