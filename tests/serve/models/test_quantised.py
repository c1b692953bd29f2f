"""Quantised checkpoints: logits and greedy tokens against their meaning in float64, and every way that one can be wrong.

Inputs of a linear layer are rounded to codes, and float32 may round the other way a value that float64 puts in the middle of
two: such a token is as far off as a code is, and those after it that attend to it. So three quarters of the tokens are judged
by the error of the plain computation in float32, and no token may be further off than that computation in bfloat16, where codes
move everywhere. A wrong scale of one expert moves more than a quarter of the tokens.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.core.formats import FP8_TOKEN
from penstock.serve.models.linear import QuantizedLinear
from penstock.serve.models.quantization import Modules, Quantization, Scheme
from penstock.serve.models.spec import ModelError, read_spec
from penstock.serve.models.weights import load_weights, random_weights
from tests.serve.models.quantised import PUBLISHED, Checkpoint, compressed_tensors
from tests.serve.models.session import Session
from tests.serve.models.test_generation import generate, load

FILE = "model.safetensors"
LENGTHS = (9, 1, 14, 3, 6, 2, 5, 4, 7, 2, 3, 1)
PROMPTS = [torch.randint(3, 199, (length,), generator=torch.Generator().manual_seed(i)) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """published(name) → the Checkpoint, written once a module."""
    written = {}

    def write(name):
        if name not in written:
            written[name] = Checkpoint(PUBLISHED[name], tmp_path_factory.mktemp(name))
        return written[name]

    return write


@pytest.fixture
def editable(published, tmp_path):
    """editable(name) → (directory, tensors, save, configure): a copy whose tensors and quantization_config can be changed."""

    def copy(name):
        source = published(name).directory
        config = json.loads((source / "config.json").read_text())
        tensors = load_file(source / FILE)

        def configure(**fields):
            changed = config | {"quantization_config": config["quantization_config"] | fields}
            (tmp_path / "config.json").write_text(json.dumps(changed))

        configure()
        save_file(tensors, tmp_path / FILE)
        return tmp_path, tensors, lambda: save_file(tensors, tmp_path / FILE), configure

    return copy


@pytest.fixture(scope="module")
def expected(published):
    """expected(name, dtype) → the logits [n, V] of the reference for all prompts, one prompt at a time."""
    known = {}

    def compute(name, dtype):
        if (name, dtype) not in known:
            model = published(name).reference(dtype)
            with torch.inference_mode():
                known[name, dtype] = torch.cat([model(prompt[None]).logits[0] for prompt in PROMPTS]).double()
        return known[name, dtype]

    return compute


def our_logits(directory, dtype, prompts=PROMPTS, device="cpu"):
    session = Session(directory, dtype, requests=len(prompts), device=device)
    return torch.cat(list(session.step({}, dict(enumerate(prompts))).values())).double().cpu()


def errors(got, exact):
    """The relative error of each token's logits."""
    return (got - exact).norm(dim=1) / exact.norm(dim=1)


def judge(got, exact, naive, naive_bfloat16):
    assert exact.std() > 0.1  # logits that differ enough for the comparison to mean something
    ours, single, wide = (errors(each, exact) for each in (got, naive, naive_bfloat16))
    assert ours.quantile(0.75) <= 2 * single.quantile(0.75) + torch.finfo(torch.float32).eps, (ours, single)
    assert ours.max() <= wide.max(), (ours, wide)


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_in_float32(name, published, expected):
    got = our_logits(published(name).directory, torch.float32)
    judge(got, *(expected(name, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_bfloat16_is_as_accurate_as_the_plain_computation(name, device, published, expected):
    got, exact = our_logits(published(name).directory, torch.bfloat16, device=device), expected(name, torch.float64)
    ours, theirs = (((each - exact).norm() / exact.norm()).item() for each in (got, expected(name, torch.bfloat16)))
    assert ours <= 2 * theirs, (ours, theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_greedy_tokens_in_mixed_batches(name, published):
    """A token is the best of the exact logits, but for a lead that our own error at that place can turn."""
    directory = published(name).directory
    prompts = [PROMPTS[i].tolist() for i in (0, 2, 1, 4)]
    tokens, _ = generate(load(directory, max_num_seqs=4), prompts, budget=13, chunk=6, max_num_seqs=4)
    model = published(name).reference(torch.float64)
    turned = 0
    for prompt, output in zip(prompts, tokens, strict=True):
        text = torch.tensor(prompt + output[:-1])
        with torch.inference_mode():
            exact = model(text[None]).logits[0, len(prompt) - 1 :].double()
        error = (our_logits(directory, torch.float32, [text])[len(prompt) - 1 :] - exact).abs().amax(1)
        lead = exact.amax(1) - exact.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert bool((lead <= 2 * error).all()), (name, lead, error)
        turned += int((lead > 0).sum())
    assert turned <= len(prompts), turned
    assert len({tuple(output) for output in tokens}) > 1


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("fp8-block-qwen3", "model.layers.1.mlp.down_proj.weight_scale_inv"),
        ("fp8-block-qwen3-moe", "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"),
        ("fp8-block-deepseek3", "model.layers.0.self_attn.kv_b_proj.weight_scale_inv"),
        ("fp8-static-mixtral", "model.layers.1.block_sparse_moe.experts.3.w3.weight_scale"),
        ("fp8-static-llama-inputs-differ", "model.layers.1.self_attn.k_proj.input_scale"),
        ("int8-channel-llama", "model.layers.1.self_attn.v_proj.weight_scale"),
    ],
)
def test_the_judge_sees_a_wrong_scale(name, scale, editable, expected):
    directory, tensors, save, _ = editable(name)
    tensors[scale].view(-1)[0] *= 1.25
    save()
    with pytest.raises(AssertionError):
        got, every = our_logits(directory, torch.float32), (torch.float64, torch.float32, torch.bfloat16)
        judge(got, *(expected(name, dtype) for dtype in every))


def products(directory, pick):
    weights = load_weights(directory, read_spec(directory), dtype=torch.float32)
    weight = pick(weights.layers[0])
    assert isinstance(weight, QuantizedLinear)
    return [(len(product.codes), product.format.name) for product in weight.products]


@pytest.mark.parametrize(
    ("name", "field", "wanted"),
    [
        ("fp8-block-qwen3", "qkv", [(512, "FP8_BLOCK")]),
        ("fp8-block-llama-ragged", "gate_up", [(200, "FP8_BLOCK")] * 2),
        ("fp8-static-llama-kv", "qkv", [(128, "FP8_TOKEN")]),
        ("fp8-static-llama-kv", "o", [(64, "FP8_TENSOR")]),
        ("fp8-static-llama-inputs-differ", "qkv", [(64, "FP8_TENSOR")] * 3),
        ("int8-channel-llama", "gate_up", [(192, "INT8_TOKEN")]),
    ],
)
def test_layers_with_one_input_are_one_product_where_that_is_exact(name, field, wanted, published):
    assert products(published(name).directory, lambda layer: getattr(layer, field)) == wanted


def test_kv_b_is_dequantised(published):
    checkpoint = published("fp8-block-deepseek3")
    weights = load_weights(checkpoint.directory, read_spec(checkpoint.directory), dtype=torch.bfloat16)
    exact = checkpoint.weights["model.layers.1.self_attn.kv_b_proj"]
    assert torch.equal(weights.layers[1].latent.kv_b, exact.to(torch.bfloat16))


@pytest.mark.parametrize("name", ["fp8-block-deepseek3", "int8-static-qwen2"])
def test_random_weights_of_a_quantised_spec(name, published):
    spec = read_spec(published(name).directory)
    weights, again = (random_weights(spec, dtype=torch.float32, seed=1) for _ in range(2))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(weights.tensors(), again.tensors(), strict=True))
    o = weights.layers[1].o
    deviation = (o.codes.float() * o.scale.flatten()[0]).std().item()
    assert abs(deviation - 0.02) < 0.002


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("fp8-block-qwen3", {f"{Q}.weight_scale_inv": None}, [FILE, f"lacks the tensor {Q}.weight_scale_inv"]),
        ("fp8-static-llama-kv", {f"{Q}.input_scale": None}, [f"lacks the tensor {Q}.input_scale"]),
        ("fp8-block-qwen3", {f"{Q}.weight_scale_inv": torch.ones(2, 1)}, [f"{Q}.weight_scale_inv", "[2, 2]", "[2, 1]"]),
        ("fp8-channel-qwen3", {f"{Q}.weight_scale": torch.ones(1)}, [f"{Q}.weight_scale", "[128, 1]", "[1]"]),
        ("fp8-static-llama-kv", {f"{Q}.weight_scale": torch.ones(64, 1)}, [f"{Q}.weight_scale", "[1]", "[64, 1]"]),
        ("fp8-block-qwen3", {f"{Q}.weight": torch.zeros(256, 192)}, [f"{Q}.weight", "F8_E4M3", "F32"]),
        ("fp8-channel-qwen3", {f"{Q}.weight": torch.zeros(128, 64, dtype=torch.int8)}, [f"{Q}.weight", "F8_E4M3", "I8"]),
        ("int8-channel-llama", {f"{Q}.weight_scale": torch.full((64, 1), torch.nan)}, [f"{Q}.weight_scale", "finite", "nan"]),
        ("fp8-static-llama-kv", {f"{Q}.input_scale": torch.zeros(1)}, [f"{Q}.input_scale", "positive", "0.0"]),
        ("int8-static-qwen2", {f"{Q}.input_zero_point": torch.tensor([3])}, [f"{Q}.input_zero_point", "symmetric"]),
        ("int8-channel-llama", {f"{Q}.weight_g_idx": torch.zeros(64)}, [f"{Q}.weight_g_idx", "does not use"]),
        (
            "fp8-block-qwen3",
            {"lm_head.weight": torch.zeros(199, 192).to(torch.float8_e4m3fn)},
            ["lm_head.weight", "BF16", "F8_E4M3"],
        ),
    ],
)
def test_wrong_tensors_are_named(name, change, words, editable):
    directory, tensors, save, _ = editable(name)
    for each, value in change.items():
        if value is None:
            del tensors[each]
        else:
            tensors[each] = value
    save()
    with pytest.raises(ModelError) as error:
        load_weights(directory, read_spec(directory), dtype=torch.float32)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_zero_points_of_zero_change_nothing(editable):
    directory, tensors, save, _ = editable("int8-static-qwen2")
    tensors[f"{Q}.input_zero_point"] = torch.zeros(1, dtype=torch.int8)
    save()
    load_weights(directory, read_spec(directory), dtype=torch.float32)


def test_what_is_done_otherwise_is_said(published, caplog):
    for name in ("fp8-block-qwen3", "fp8-static-llama-kv", "fp8-static-mixtral"):
        directory = published(name).directory
        load_weights(directory, read_spec(directory), dtype=torch.bfloat16)
    keys, experts = (record.getMessage() for record in caplog.records)
    assert "self_attn.k_scale and 3 more are not used" in keys and "torch.bfloat16" in keys
    assert "experts' input_scale" in experts


def group(**changes):
    """compressed-tensors of FP8 channels and tokens, with these fields of the weights or inputs changed."""
    config = compressed_tensors("float", "channel", "token")
    for path, value in changes.items():
        part, field = path.split("__")
        config["config_groups"]["group_0"][part][field] = value
    return config


def test_modules_find_their_scheme():
    tensor, channel = (Scheme(FP8_TOKEN, weights) for weights in ("tensor", "channel"))
    groups = ((Modules.read(["Linear"]), tensor), (Modules.read(["re:.*mlp[.]", "model.layers.7.self_attn"]), channel))
    quantization = Quantization(groups, Modules.read(["lm_head", "mlp.gate", "re:.*layers[.]3[.]"]))
    assert quantization.scheme("model.layers.0.self_attn.q_proj") is tensor
    assert quantization.scheme("model.layers.0.mlp.gate_proj") is channel  # a name comes before the class
    assert quantization.scheme("model.layers.7.self_attn.q_proj") is channel
    assert quantization.scheme("model.layers.70.self_attn.q_proj") is tensor
    assert quantization.scheme("lm_head") is None
    assert quantization.scheme("model.layers.0.mlp.gate") is None
    assert quantization.scheme("model.layers.3.mlp.up_proj") is None
    assert Quantization(groups[1:], Modules.read(())).scheme("model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant_method": "awq"}, ["quant_method", "fp8 or compressed-tensors", "'awq'"]),
        ({"quant_method": "mxfp4"}, ["quant_method", "'mxfp4'"]),
        ({"weight_block_size": [64, 128]}, ["weight_block_size", "[128, 128]", "[64, 128]"]),
        ({"activation_scheme": "static"}, ["activation_scheme", "dynamic with weight_block_size", "'static'"]),
        ({"fmt": "e5m2"}, ["fmt", "e4m3", "'e5m2'"]),
        ({"scale_fmt": "ue8m0"}, ["scale_fmt", "float32", "'ue8m0'"]),
        ({"modules_to_not_convert": "lm_head"}, ["modules_to_not_convert", "list", "'lm_head'"]),
        (group(weights__num_bits=4), ["config_groups.group_0.weights.num_bits", "8", "got 4"]),
        (group(weights__symmetric=False), ["weights.symmetric", "True", "got False"]),
        (group(weights__actorder="group"), ["weights.actorder", "absent", "'group'"]),
        (group(weights__strategy="group"), ["weights.strategy", "tensor or channel or block", "'group'"]),
        (group(input_activations__strategy="tensor"), ["input_activations.strategy", "token", "'tensor'"]),
        (group(input_activations__dynamic="local"), ["input_activations.dynamic", "True or False", "'local'"]),
        (group(input_activations__type="int"), ["input_activations.type", "float", "'int'"]),
        (group() | {"format": "pack-quantized"}, ["format", "float-quantized", "'pack-quantized'"]),
        (group() | {"format": "marlin-24"}, ["format", "'marlin-24'"]),
        (group() | {"config_groups": {"a": {"targets": ["Linear"], "weights": {}}}}, ["input_activations", "8 bits", "None"]),
        (group() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparsity_config.format", "sparse-24"]),
        (group() | {"ignore": ["re:("]}, ["quantization_config", "'('", "regular expression"]),
    ],
)
def test_what_is_not_covered_is_refused_before_a_weight_is_read(fields, words, editable):
    directory, _, _, configure = editable("fp8-block-qwen3")
    (directory / FILE).unlink()
    configure(**fields)
    with pytest.raises(ModelError) as error:
        spec = read_spec(directory)
        load_weights(directory, spec)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value) and FILE not in str(error.value)


def test_parts_of_one_product_with_different_schemes_are_refused(editable):
    directory, _, _, configure = editable("fp8-block-qwen3")
    configure(modules_to_not_convert=["lm_head", "model.layers.1.self_attn.k_proj"])
    with pytest.raises(ModelError, match=r"model\.layers\.1\.self_attn\.k_proj must be quantised as .*q_proj is"):
        load_weights(directory, read_spec(directory))


def test_experts_of_integers_are_refused(editable):
    directory, _, _, configure = editable("fp8-channel-qwen2-moe")
    configure(**compressed_tensors("int", "channel", "token"))
    with pytest.raises(ModelError, match="experts of 8-bit integers"):
        load_weights(directory, read_spec(directory))
