"""EngineConfig: every wrong field named at once, sizes parsed, models found."""

import inspect
import sys
import types

import pytest

from penstock.serve.config import EngineConfig, InvalidConfig, parse_bytes, resolve_model
from penstock.serve.llm import LLM


@pytest.mark.parametrize(
    ("value", "size"),
    [(4096, 4096), ("4096", 4096), ("1KiB", 1024), ("2GiB", 2**31), ("1.5 GB", 1_500_000_000), ("512MiB", 2**29)],
)
def test_sizes(value, size):
    assert parse_bytes(value) == size
    assert EngineConfig("m", kv_cache_memory=value).kv_cache_bytes == size


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "", "GiB", "2 gigs", "-1GiB", "0", "2iB", "0.1", "1e9"])
def test_what_is_no_size(value):
    with pytest.raises(InvalidConfig, match="`kv_cache_memory` must be a positive number of bytes, or a string such as"):
        EngineConfig("m", kv_cache_memory=value)


def test_every_reason_at_once():
    with pytest.raises(InvalidConfig) as caught:
        EngineConfig(
            "",
            tokenizer=3,
            device="gpu",
            dtype="int8",
            max_model_len=1,
            max_num_seqs=0,
            max_num_batched_tokens=0,
            max_prefill_chunk=0,
            kv_cache_memory="much",
            page_size=12,
            seed=-1,
            skip_tokenizer_init="no",
            enforce_eager=None,
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == "EngineConfig:"
    assert [line.split("`")[1] for line in lines[1:]] == [
        "model",
        "tokenizer",
        "device",
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_prefill_chunk",
        "page_size",
        "seed",
        "skip_tokenizer_init",
        "enforce_eager",
        "kv_cache_memory",
    ]
    assert "  `page_size` must be None or a power of two, got 12" in lines


def test_a_step_holds_a_token_for_every_running_request():
    with pytest.raises(InvalidConfig, match=r"`max_num_batched_tokens` must be an integer ≥ max_num_seqs=64, .* got 32"):
        EngineConfig("m", max_num_batched_tokens=32)


def test_llm_has_the_same_names_and_defaults():
    config = inspect.signature(EngineConfig).parameters
    llm = inspect.signature(LLM).parameters
    shared = [name for name in config if name in llm and name != "model"]
    assert set(config) - set(shared) == {"model", "max_prefill_chunk"}
    assert {name: llm[name].default for name in shared} == {name: config[name].default for name in shared}


def test_a_model_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no such folder; give a folder with config.json"):
        resolve_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"the folder has no config.json"):
        resolve_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(NotADirectoryError, match="not a file in it"):
        resolve_model(tmp_path / "config.json")
    config = EngineConfig(tmp_path)
    assert config.model_path == config.tokenizer_path == tmp_path
    assert str(EngineConfig(tmp_path, tokenizer="other").tokenizer_path) == "other"


def test_demo_is_the_checkpoint_of_the_package(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    package = types.ModuleType("penstock.serve.demo")
    package.PATH = tmp_path
    monkeypatch.setitem(sys.modules, "penstock.serve.demo", package)
    assert resolve_model("demo") == tmp_path
