"""Quantised checkpoints in the layouts that are published, and what they mean: transformers on dequantised weights.

The reference knows nothing of penstock: it reads the tensors that it wrote and quantises the inputs of its linear layers by the
words of the format, in float64 or in the dtype of the model.
"""

import json
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tests.serve.models.conftest import build

FP8_BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
AUTO_FP8 = {"quant_method": "fp8", "ignored_layers": ["lm_head"]}
BLOCK = 128


def compressed_tensors(kind, weights, inputs, *, ignore=("lm_head",), **fields):
    """A quantization_config as llm-compressor writes it."""
    shared = {"num_bits": 8, "type": kind, "symmetric": True, "group_size": None, "actorder": None, "block_structure": None}
    block = weights == "block"
    group = {
        "targets": ["Linear"],
        "weights": {**shared, "strategy": weights, "dynamic": False} | ({"block_structure": [128, 128]} if block else {}),
        "input_activations": {**shared, "strategy": inputs, "dynamic": inputs != "tensor"}
        | ({"group_size": 128} if block else {}),
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if kind == "float" else "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        **fields,
    }


@dataclass
class Published:
    """A model of conftest and the way it is quantised.

    Args:
        weights: "tensor", "channel" or "block"; inputs: "token", "block" or "static".
        plain: parts of the names of linear layers that are not quantised, as `config` says.
        scale_shape, scale_dtype: of one weight scale of a tensor, of all.
    """

    model: str
    config: dict
    weights: str
    inputs: str
    changes: dict
    dtype: torch.dtype = torch.float8_e4m3fn
    plain: tuple[str, ...] = ()
    scale_name: str = "weight_scale"
    scale_shape: tuple[int, ...] = (1,)
    scale_dtype: torch.dtype = torch.float32
    inputs_differ: bool = False
    kv_scales: bool = False


# Joined: every part is a multiple of 128. Ragged: neither rows nor columns are.
JOINED = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 64}
RAGGED = {"hidden_size": 160, "intermediate_size": 200}
EXPERTS = {"hidden_size": 160, "intermediate_size": 96, "moe_intermediate_size": 72}
BLOCKS = {"weights": "block", "inputs": "block", "scale_name": "weight_scale_inv"}
CHANNELS = {"weights": "channel", "inputs": "token", "scale_dtype": torch.bfloat16}
STATIC = {"weights": "tensor", "inputs": "static"}
_GATE = "re:.*mlp[.]gate$"

PUBLISHED = {
    "fp8-block-qwen3": Published(
        "qwen3", FP8_BLOCK | {"modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"]}, changes=JOINED, **BLOCKS
    ),
    "fp8-block-llama-ragged": Published("llama-bias", FP8_BLOCK, changes=RAGGED, **BLOCKS),
    "fp8-block-qwen3-moe": Published("qwen3-moe", FP8_BLOCK, changes=EXPERTS, **BLOCKS),
    "fp8-block-deepseek3": Published("deepseek3", FP8_BLOCK, changes=EXPERTS, **BLOCKS),
    "fp8-static-mixtral": Published(
        "mixtral", AUTO_FP8 | {"activation_scheme": "static"}, changes={}, scale_shape=(), **STATIC
    ),
    "fp8-tensor-llama": Published(
        "llama", AUTO_FP8 | {"activation_scheme": "dynamic"}, "tensor", "token", changes={}, scale_shape=()
    ),
    "fp8-channel-qwen3": Published("qwen3", compressed_tensors("float", "channel", "token"), changes={}, **CHANNELS),
    "fp8-channel-qwen2-moe": Published(
        "qwen2-moe",
        compressed_tensors("float", "channel", "token", ignore=["lm_head", _GATE, "re:.*shared_expert_gate$"]),
        changes={},
        **CHANNELS,
    ),
    "fp8-static-llama-kv": Published(
        "llama",
        compressed_tensors("float", "tensor", "tensor", kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False}),
        changes={},
        kv_scales=True,
        **STATIC,
    ),
    "fp8-static-llama-inputs-differ": Published(
        "llama-bias", compressed_tensors("float", "tensor", "tensor"), changes={}, inputs_differ=True, **STATIC
    ),
    "fp8-group-deepseek2": Published(
        "deepseek2",
        compressed_tensors("float", "block", "group", ignore=["lm_head", _GATE]),
        "block",
        "block",
        changes=EXPERTS,
    ),
    "int8-channel-llama": Published(
        "llama",
        compressed_tensors(
            "int", "channel", "token", ignore=["lm_head", "re:.*layers[.]1[.]mlp.*", "model.layers.0.self_attn.o_proj"]
        ),
        changes={},
        dtype=torch.int8,
        plain=("layers.1.mlp", "layers.0.self_attn.o_proj"),
        **CHANNELS,
    ),
    "int8-static-qwen2": Published(
        "qwen2", compressed_tensors("int", "tensor", "tensor"), changes={}, dtype=torch.int8, **STATIC
    ),
    "int8-channel-bamba": Published(
        "bamba", compressed_tensors("int", "channel", "token"), changes={}, dtype=torch.int8, **CHANNELS
    ),
}
LINEAR = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "in_proj", "out_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
)


class Checkpoint:
    """A published checkpoint in `directory`, and its reference.

    Attributes:
        scales: linear layer → its weight's scales as [rows of scales, columns of scales]; input_scales: → [1].
        dequantised: the checkpoint with plain float32 weights.
    """

    def __init__(self, published: Published, directory: Path):
        self.published, self.directory = published, directory
        self.reference_directory = directory / "dequantised"
        model = build(published.model, **published.changes)
        model.save_pretrained(self.reference_directory)
        tensors = load_file(self.reference_directory / "model.safetensors")
        self.modules, self.input_scales, stored = [], {}, {}
        for name, tensor in tensors.items():
            module = name.removesuffix(".weight")
            if name == module or not module.endswith(LINEAR) or any(part in module for part in published.plain):
                stored[name] = tensor
                continue
            self.modules.append(module)
            codes, scale = self.quantise(tensor)
            stored[name] = codes
            tensors[name] = codes.float() * self.spread(scale, tensor.shape)
            shape = {"tensor": published.scale_shape, "channel": (len(tensor), 1), "block": tuple(scale.shape)}[
                published.weights
            ]
            stored[f"{module}.{published.scale_name}"] = scale.view(shape)
            if published.inputs == "static":
                self.input_scales[module] = torch.tensor([self.range(module) / self.largest])
                stored[f"{module}.input_scale"] = self.input_scales[module].view(published.scale_shape).clone()
            if published.kv_scales and module.endswith(("k_proj", "v_proj")):
                stored[f"{module.rsplit('.', 1)[0]}.{module[-6]}_scale"] = torch.tensor(0.02)
        save_file(tensors, self.reference_directory / "model.safetensors")
        save_file(stored, directory / "model.safetensors")
        config = json.loads((self.reference_directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": published.config}))
        self.weights = {module: tensors[f"{module}.weight"] for module in self.modules}

    @property
    def largest(self):
        return 448.0 if self.published.dtype.is_floating_point else 127.0

    def range(self, module):
        """What a calibration might have found: some inputs lie beyond."""
        wide = 20.0 if module.endswith(("down_proj", "w2")) else 4.0
        return wide * (1 + 0.1 * (sum(map(ord, module)) % 5)) if self.published.inputs_differ else wide

    def quantise(self, weight):
        """(codes, scale) of a weight, the scale in as many dimensions as the weight."""
        rows, columns = weight.shape
        tile = self.tile(weight.shape)
        padded = functional.pad(weight, (0, -columns % tile[1], 0, -rows % tile[0]))
        tiles = padded.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))
        scale = (tiles.abs().amax((1, 3)) / self.largest).to(self.published.scale_dtype)
        return self.encode(weight / self.spread(scale, weight.shape)), scale

    def tile(self, shape):
        """What shares a scale of a weight."""
        rows, columns = shape
        return {"tensor": (rows, columns), "channel": (1, columns), "block": (BLOCK, BLOCK)}[self.published.weights]

    def spread(self, scale, shape):
        """The scale of every value of a weight."""
        for dim, each in enumerate(self.tile(shape)):
            scale = scale.float().repeat_interleave(each, dim).narrow(dim, 0, shape[dim])
        return scale

    def encode(self, values):
        limited = values.clamp(-self.largest, self.largest)
        return limited.to(self.published.dtype) if self.published.dtype.is_floating_point else limited.round().to(torch.int8)

    def fake(self, x, group=None, static=None):
        """x through its codes: scales of rows, of `group` columns of them, or one for all."""
        rows, columns = x.shape
        group = group or columns
        groups = functional.pad(x, (0, -columns % group)).unflatten(1, (-1, group))
        scale = groups.abs().amax(-1) / self.largest if static is None else static.to(x.dtype).expand(rows, groups.shape[1])
        scale = torch.where(scale == 0, 1.0, scale)
        scale = scale.repeat_interleave(group, 1)[:, :columns]
        return self.encode(x / scale).to(x.dtype) * scale

    def reference(self, dtype):
        """The transformers model whose linear layers see quantised inputs; in 16 bits they multiply in float32, as ours do."""
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.reference_directory, dtype=dtype, attn_implementation="eager"
        )
        wide = torch.promote_types(dtype, torch.float32)
        group = BLOCK if self.published.inputs == "block" else None
        for name, module in model.named_modules():
            # absorbed into queries and outputs: the weight is dequantised, its inputs are not quantised
            if name in self.weights and not name.endswith("kv_b_proj"):
                self._patch_linear(module, self.weights[name].to(wide), group, self.input_scales.get(name))
            elif name.endswith(".experts") and any(each.startswith(f"{name}.") for each in map(self._home, self.modules)):
                self._patch_experts(module, [each for each in self.modules if self._home(each).startswith(f"{name}.")], group)
        return model

    @staticmethod
    def _home(module):
        return module.replace("block_sparse_moe", "mlp")

    def _patch_linear(self, module, weight, group, static):
        def forward(own, x):
            flat = self.fake(x.reshape(-1, x.shape[-1]).to(weight.dtype), group, static)
            return (
                functional.linear(flat, weight, None if own.bias is None else own.bias.to(weight.dtype))
                .to(x.dtype)
                .view(*x.shape[:-1], -1)
            )

        module.forward = types.MethodType(forward, module)

    def _patch_experts(self, module, names, group):
        experts = {}
        for name in names:
            experts.setdefault(int(name.split(".")[-2]), {})[name.split(".")[-1]] = self.weights[name]

        def forward(own, x, ids, weights):
            wide = torch.promote_types(x.dtype, torch.float32)
            quantised, out = self.fake(x.to(wide), group), torch.zeros_like(x, dtype=wide)
            for expert, parts in experts.items():
                gate, up, down = (
                    parts[a if a in parts else b].to(wide)
                    for a, b in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
                )
                product = functional.silu(quantised @ gate.t()) * (quantised @ up.t())
                y = (self.fake(product, BLOCK) @ down.t()).to(x.dtype)
                out += y * torch.where(ids == expert, weights, 0).sum(1, keepdim=True).to(wide)
            return out.to(x.dtype)

        module.forward = types.MethodType(forward, module)
