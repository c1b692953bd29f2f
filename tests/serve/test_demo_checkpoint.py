"""The bundled checkpoint is complete, small, loads with no network, and was trained to a loss worth bundling."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.serve.demo import PATH

FILES = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_log.jsonl",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PATH, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(PATH, local_files_only=True)


@pytest.fixture(scope="module")
def log():
    return [json.loads(line) for line in (PATH / "train_log.jsonl").read_text("utf-8").splitlines()]


def test_folder_is_complete_and_at_most_8_megabytes():
    names = sorted(path.name for path in PATH.iterdir() if path.name != "__pycache__")
    assert names == sorted([*FILES, "__init__.py"])
    assert sum((PATH / name).stat().st_size for name in names) <= 8_000_000
    assert (PATH / "train_log.jsonl").stat().st_size < 200_000


def test_package_imports_nothing_heavy():
    program = "import sys, penstock.serve.demo; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_config():
    config = json.loads((PATH / "config.json").read_text("utf-8"))
    wanted = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "vocab_size": 4096,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    assert {name: config.get(name) for name in wanted} == wanted
    assert config["rope_parameters"]["rope_theta"] == 10000.0
    generation = json.loads((PATH / "generation_config.json").read_text("utf-8"))
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (0, 1, 2)


def test_weights_are_bfloat16_and_tied():
    with safe_open(PATH / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118


def test_model_prefers_documentation_to_noise(model, tokenizer):
    assert model.dtype == torch.bfloat16
    text = "Return True if all characters in the string are digits and there is at least one character."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    shuffled = ids.clone()
    shuffled[0, 1:] = ids[0, 1:].flip(0)
    with torch.no_grad():
        loss, noise = (model(input_ids=x, labels=x).loss.item() for x in (ids, shuffled))
    assert loss < 3.5 < noise


def test_late_positions_are_trained(model, tokenizer, log):
    text = "The value of the argument is used if the function is called with no other value. "
    ids = tokenizer(text * 200, return_tensors="pt", truncation=True, max_length=2048)["input_ids"]
    assert ids.shape == (1, 2048)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert losses[-512:].mean() < losses[:64].mean()


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_tokenizer_prepends_bos(tokenizer):
    assert tokenizer.is_fast
    assert tokenizer("Python")["input_ids"][0] == tokenizer.bos_token_id == 0
    assert tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|system|>"]) == [3, 4, 5]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|eos|>", "<|pad|>")


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " What is len? "}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>Be brief.<|eos|><|user|>What is len?<|eos|><|assistant|>"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert (ids.count(0), ids.count(1), ids[-1]) == (1, 2, 4)
    with pytest.raises(Exception, match="role must be system, user or assistant, got tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_log(log):
    facts, *steps, final = log
    assert facts["python"] and facts["parameters"] == 3_410_176
    assert all(math.isfinite(record["loss"]) and math.isfinite(record["validation_loss"]) for record in steps)
    assert [record["step"] for record in steps] == sorted(record["step"] for record in steps)
    best = min(steps, key=lambda record: record["validation_loss"])
    assert best["step"] == final["saved_step"]
    assert abs(final["validation_loss"] - best["validation_loss"]) < 0.02
    # A uniform guess over 4,096 tokens costs 8.3; the bundled run reached 4.23.
    assert final["validation_loss"] < 4.4
