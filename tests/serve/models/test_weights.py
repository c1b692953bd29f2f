"""Reading checkpoints: packing, shards, dtypes, tied embeddings, memory, and every way that a file can be wrong."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.serve.models.names import checkpoint_names
from penstock.serve.models.spec import LayerSpec, ModelError, ModelSpec, RopeSpec, read_spec
from penstock.serve.models.weights import load_weights, random_weights

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


def load(directory, dtype=torch.float32, **options):
    return load_weights(directory, read_spec(directory), dtype=dtype, **options)


@pytest.fixture
def editable(checkpoint, tmp_path):
    """editable(case) → (directory, tensors, save): a copy whose tensors can be changed and written back."""

    def copy(case):
        source = checkpoint(case)
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        tensors = load_file(source / FILE)
        save_file(tensors, tmp_path / FILE)
        return tmp_path, tensors, lambda: save_file(tensors, tmp_path / FILE)

    return copy


def shard(directory, tensors, count):
    """Writes `tensors` as `count` shards with an index, as large checkpoints are published."""
    names = sorted(tensors)
    weight_map = {name: f"model-{i * count // len(names) + 1:05}-of-{count:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, directory / file)
    (directory / FILE).unlink(missing_ok=True)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_every_tensor_lands_in_its_place(case, checkpoint):
    directory = checkpoint(case)
    weights = load(directory)
    places = checkpoint_names(read_spec(directory), weights)
    published = load_file(directory / FILE)
    assert places.keys() == published.keys()
    for name, tensor in published.items():
        assert torch.equal(places[name], tensor), name


def test_packed_parameters_are_single_contiguous_tensors(checkpoint):
    weights = load(checkpoint("llama-bias"))
    published = load_file(checkpoint("llama-bias") / FILE)
    prefix = "model.layers.1.self_attn."
    assert torch.equal(weights.layers[1].qkv, torch.cat([published[f"{prefix}{p}_proj.weight"] for p in "qkv"]))
    assert torch.equal(weights.layers[1].qkv_bias, torch.cat([published[f"{prefix}{p}_proj.bias"] for p in "qkv"]))
    assert all(tensor.is_contiguous() for tensor in weights.tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_converted(editable, stored, dtype):
    directory, tensors, save = editable("qwen2")
    for name in tensors:
        tensors[name] = tensors[name].to(stored)
    save()
    weights = load(directory, dtype=dtype)
    assert torch.equal(weights.layers[1].down, tensors["model.layers.1.mlp.down_proj.weight"].to(dtype))


def test_shards_with_progress(editable):
    directory, tensors, _ = editable("llama")
    shard(directory, tensors, 3)
    seen = []
    weights = load(directory, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(weights.lm_head, tensors["lm_head.weight"])
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] and len(seen) == len(tensors) + 1


def test_tied_embeddings_are_one_tensor(checkpoint):
    weights = load(checkpoint("qwen2"))
    assert weights.lm_head is weights.embedding


@pytest.mark.parametrize("same", [True, False])
def test_tied_config_with_a_head_in_the_file(editable, same):
    directory, tensors, save = editable("qwen2")
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head if same else head + 1
    save()
    weights = load(directory)
    assert (weights.lm_head is weights.embedding) == same
    assert torch.equal(weights.lm_head, tensors["lm_head.weight"])


def test_tied_config_with_only_the_head_in_the_file(editable):
    directory, tensors, save = editable("qwen2")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save()
    assert torch.equal(load(directory).embedding, tensors["lm_head.weight"])


def test_rotary_buffers_are_ignored(editable):
    directory, tensors, save = editable("llama")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save()
    load(directory)


def test_layers_that_guess_tokens_are_not_read(editable):
    directory, tensors, save = editable("deepseek3")
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(64, 128)
    save()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    wrong(directory, "model.layers.2.eh_proj.weight")
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    load(directory)


def wrong(directory, *words):
    with pytest.raises(ModelError) as error:
        load(directory)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_files(editable):
    directory, tensors, _ = editable("llama")
    weight_map = shard(directory, tensors, 2)
    (directory / weight_map[UP]).unlink()
    wrong(directory, INDEX, weight_map[UP], "missing")
    (directory / INDEX).write_text("{}")
    wrong(directory, INDEX, "weight_map")
    (directory / INDEX).unlink()
    (directory / "pytorch_model.bin").touch()
    wrong(directory, str(directory), FILE, "pytorch_model.bin")


def test_missing_tensor(editable):
    directory, tensors, save = editable("llama")
    removed = tensors.pop(UP)
    save()
    wrong(directory, FILE, UP)
    weight_map = shard(directory, {**tensors, UP: removed}, 2)
    file = directory / weight_map[UP]
    save_file({name: tensors[name] for name in tensors if weight_map[name] == file.name}, file)
    wrong(directory, file.name, UP)


def test_unexpected_tensor(editable):
    directory, tensors, save = editable("llama")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save()
    wrong(directory, FILE, "model.layers.0.self_attn.q_proj.bias")


def test_wrong_shape(editable):
    directory, tensors, save = editable("llama")
    tensors[UP] = tensors[UP][:95].contiguous()
    save()
    wrong(directory, FILE, UP, "[96, 64]", "[95, 64]")


def test_wrong_dtype(editable):
    directory, tensors, save = editable("llama")
    tensors[UP] = tensors[UP].to(torch.int8)
    save()
    wrong(directory, FILE, UP, "I8")


@pytest.mark.parametrize("size", [0, 5, 4000, -1])
def test_truncated_file(editable, size):
    directory, _, _ = editable("llama")
    data = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(data[:size])
    wrong(directory, FILE, "truncated")


def test_random_weights_depend_on_the_seed_alone():
    layer = LayerSpec(num_heads=2, num_kv_heads=1, head_dim=8, query_scale=1.0, mlp_size=24, post_norms=True, qkv_bias=True)
    spec = ModelSpec("Gemma2ForCausalLM", 31, 16, (layer,) * 2, (RopeSpec(8, {}),), 64, 1e-6, norm_weight_offset=1.0)
    first, again, other = (random_weights(spec, dtype=torch.float32, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.layers[1].qkv, again.layers[1].qkv)
    assert not torch.equal(first.layers[1].qkv, other.layers[1].qkv)
    assert first.layers[0].qkv.std().sub(0.02).abs() < 0.002
    assert not first.norm.any() and not first.layers[0].post_mlp_norm.any() and not first.layers[0].qkv_bias.any()


MEMORY = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from penstock.core.formats import FP8_BLOCK
from penstock.serve.models.quantization import EVERY, Modules, Quantization, Scheme
from penstock.serve.models.spec import LayerSpec, ModelSpec, RopeSpec
from penstock.serve.models.names import checkpoint_names
from penstock.serve.models.parameters import allocate_weights
from penstock.serve.models.weights import load_weights
layer = LayerSpec(num_heads=8, num_kv_heads=4, head_dim=64, query_scale=1.0, mlp_size=3072)
spec = ModelSpec("LlamaForCausalLM", 8000, 768, (layer,) * 5, (RopeSpec(64, {}),), 64, 1e-6)
if sys.argv[3] == "fp8":
    quantization = Quantization(((EVERY, Scheme(FP8_BLOCK, "block")),), Modules.read(()))
    spec = replace(spec, layers=(layer,) * 20, quantization=quantization)
if sys.argv[2] == "write":
    import json
    from safetensors.torch import save_file
    names = checkpoint_names(spec, allocate_weights(spec, device="cpu", dtype=torch.float32, tied=False))
    weight_map = {}
    for i, (name, tensor) in enumerate(names.items()):
        weight_map[name] = f"part-{i * 5 // len(names)}.safetensors"
    for file in sorted(set(weight_map.values())):
        part = {n: t.copy_(torch.ones(())).contiguous() for n, t in names.items() if weight_map[n] == file}
        save_file(part, f"{sys.argv[1]}/{file}")
    json.dump({"weight_map": weight_map}, open(f"{sys.argv[1]}/model.safetensors.index.json", "w"))
else:
    # VmHWM and not ru_maxrss: the latter starts from the parent's size, which a fork inherits.
    def peak():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
    torch.ones(8).mul(2)
    before = peak()
    load_weights(sys.argv[1], spec, dtype=torch.float32)
    print(peak() - before, sum(file.stat().st_size for file in Path(sys.argv[1]).glob("*.safetensors")))
"""


@pytest.mark.parametrize("kind", ["float32", "fp8"])
def test_peak_host_memory_is_the_checkpoint_and_one_shard(kind, tmp_path):
    subprocess.run([sys.executable, "-c", MEMORY, tmp_path, "write", kind], check=True)
    shards = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    out = subprocess.run([sys.executable, "-c", MEMORY, tmp_path, "read", kind], check=True, capture_output=True, text=True)
    used, parameters = map(int, out.stdout.split())
    assert parameters > 180e6 and len(shards) == 5
    assert used < parameters + max(shards) + 16e6, (used, parameters, max(shards))
