"""Which linear layers of a checkpoint are quantised, and how, read from the `quantization_config` of its config.json.

Known are `quant_method` "fp8" (DeepSeek-V3, Qwen3 with a scale for 128×128; AutoFP8 with a scale for each tensor) and
"compressed-tensors" (llm-compressor) with 8-bit weights and 8-bit activations. Whatever else a config asks for is refused by
the name of the field, before a weight is read.

Sources: DeepSeek-AI, arXiv:2412.19437; the formats of the projects AutoFP8, compressed-tensors and transformers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.core.formats import BLOCK, FP8_BLOCK, FP8_TOKEN, INT8_TOKEN, Format
from penstock.serve.models.layer_spec import ModelError

KV_SCALES = ("k_scale", "v_scale", "kv_scale", "k_proj.output_scale", "v_proj.output_scale")
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_WHERE = "quantization_config"


@dataclass(frozen=True)
class Scheme:
    """One way to quantise a linear layer, x · wᵀ with both in 8 bits.

    Args:
        activations: FP8_TOKEN, FP8_BLOCK or INT8_TOKEN: how x is quantised when it comes, and the dtype of w.
        weights: what shares a scale: "tensor", "channel" (an output row) or "block" (128×128).
        static: x has one scale, which the checkpoint brings.
        scale_name: what the weight's scale is called, beside `weight`.
    """

    activations: Format
    weights: str
    static: bool = False
    scale_name: str = "weight_scale"

    @property
    def stored(self) -> str:
        """The dtype of the weight in a safetensors file."""
        return "F8_E4M3" if self.activations.dtype.is_floating_point else "I8"

    def scale_rows(self, rows: int) -> int:
        """Scales down a weight of so many rows."""
        return {"tensor": 1, "channel": rows, "block": -(-rows // BLOCK)}[self.weights]

    def scale_columns(self, columns: int) -> int:
        """Scales across a weight of so many columns."""
        return -(-columns // BLOCK) if self.weights == "block" else 1


@dataclass(frozen=True)
class Modules:
    """A list of modules as configs write it.

    Args:
        names: those of modules, of what they are in, or the ends of their own; or Linear, which is all of them.
        expressions: what the beginning of a name matches; "re:" stands before them in a config.
    """

    names: frozenset[str]
    expressions: tuple[re.Pattern[str], ...]

    @classmethod
    def read(cls, patterns: Sequence[str]) -> "Modules":
        """ModelError for what is not a regular expression."""
        names = frozenset(pattern for pattern in patterns if not pattern.startswith("re:"))
        try:
            return cls(names, tuple(re.compile(pattern[3:]) for pattern in patterns if pattern.startswith("re:")))
        except re.error as error:
            raise ModelError(f"{_WHERE}: {error.pattern!r} is not a regular expression: {error}") from error

    @property
    def every(self) -> bool:
        """Whether the list names the class of all."""
        return "Linear" in self.names

    def name(self, module: str) -> bool:
        """Whether the list has this module, other than by its class."""
        words = module.split(".")
        heads = (".".join(words[:end]) for end in range(1, len(words) + 1))
        tails = (".".join(words[start:]) for start in range(1, len(words)))
        return (
            any(head in self.names for head in heads)
            or any(tail in self.names for tail in tails)
            or any(expression.match(module) for expression in self.expressions)
        )


EVERY = Modules(frozenset({"Linear"}), ())


@dataclass(frozen=True)
class Quantization:
    """The schemes of a checkpoint, the modules that each is for, and those that are not quantised."""

    groups: tuple[tuple[Modules, Scheme], ...]
    ignored: Modules

    def scheme(self, module: str) -> Scheme | None:
        """How the linear layer of this published name is quantised; None for not at all."""
        if self.ignored.every or self.ignored.name(module):
            return None
        by_name = (scheme for targets, scheme in self.groups if targets.name(module))
        by_class = (scheme for targets, scheme in self.groups if targets.every)
        return next(by_name, None) or next(by_class, None)


def read_quantization(config: Any) -> Quantization | None:
    """Reads the config object's quantization_config; None where there is none.

    Raises: ModelError naming the field, the wanted and the got, when the checkpoint is quantised in a way that is not known.
    """
    raw = getattr(config, _WHERE, None) or getattr(config, "compression_config", None)
    if not raw:
        return None
    fields: dict[str, Any] = raw if isinstance(raw, dict) else raw.to_dict()
    method = fields.get("quant_method")
    if method == "fp8":
        return _read_fp8(fields)
    if method == "compressed-tensors":
        return _read_compressed_tensors(fields)
    raise _refused(
        "quant_method", "fp8 or compressed-tensors (use such a checkpoint, or the one that is not quantised)", method
    )


def _refused(field: str, wanted: str, got: object) -> ModelError:
    return ModelError(f"{_WHERE}: {field} must be {wanted}, got {got!r}")


def _one_of(fields: dict[str, Any], where: str, name: str, *allowed: Any) -> Any:
    value = fields.get(name)
    if value not in allowed:
        wanted = " or ".join("absent" if each is None else str(each) for each in allowed)
        raise _refused(f"{where}{name}", wanted, value)
    return value


def _modules(fields: dict[str, Any], where: str, *names: str) -> Modules:
    """The list under the first of these names that is there."""
    for name in names:
        value = fields.get(name)
        if value is not None:
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise _refused(f"{where}{name}", "a list of names", value)
            return Modules.read(value)
    return Modules.read(())


def _read_fp8(fields: dict[str, Any]) -> Quantization:
    _one_of(fields, "", "fmt", "e4m3", "float8_e4m3fn", None)
    # float32 scales; "ue8m0" would have those of activations be powers of two
    _one_of(fields, "", "scale_fmt", None, "float32")
    activations = _one_of(fields, "", "activation_scheme", "dynamic", "static", None)
    block = fields.get("weight_block_size")
    if block is None:
        scheme = Scheme(FP8_TOKEN, "tensor", static=activations == "static")
    elif list(block) != [BLOCK, BLOCK]:
        raise _refused("weight_block_size", f"[{BLOCK}, {BLOCK}] or absent", block)
    elif activations == "static":
        raise _refused("activation_scheme", "dynamic with weight_block_size", activations)
    else:
        scheme = Scheme(FP8_BLOCK, "block", scale_name="weight_scale_inv")
    return Quantization(((EVERY, scheme),), _modules(fields, "", "modules_to_not_convert", "ignored_layers"))


def _read_compressed_tensors(fields: dict[str, Any]) -> Quantization:
    _one_of(fields, "", "format", *_FORMATS, None)
    sparsity = fields.get("sparsity_config") or {}
    _one_of(sparsity, "sparsity_config.", "format", "dense", None)
    if fields.get("transform_config"):
        raise _refused("transform_config", "absent", fields["transform_config"])
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _refused("config_groups", "an object with at least one group", groups)
    read = tuple(
        (_modules(group, f"config_groups.{name}.", "targets"), _read_group(f"config_groups.{name}.", group))
        for name, group in groups.items()
    )
    return Quantization(read, _modules(fields, "", "ignore"))


def _read_group(where: str, group: dict[str, Any]) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    for name, value in (("weights", weights), ("input_activations", inputs)):
        if not isinstance(value, dict):
            raise _refused(where + name, "an object: weights and activations are both of 8 bits", value)
    _one_of(group, where, "output_activations", None)
    _one_of(group, where, "format", *_FORMATS, None)
    assert isinstance(weights, dict) and isinstance(inputs, dict)
    for name, arguments in (("weights.", weights), ("input_activations.", inputs)):
        _one_of(arguments, where + name, "num_bits", 8)
        _one_of(arguments, where + name, "symmetric", True, None)
        _one_of(arguments, where + name, "actorder", None)
    kind = _one_of(weights, f"{where}weights.", "type", "float", "int")
    _one_of(inputs, f"{where}input_activations.", "type", kind)
    _one_of(weights, f"{where}weights.", "dynamic", False, None)
    dynamic = _one_of(inputs, f"{where}input_activations.", "dynamic", True, False)
    strategies = ("tensor", "channel", "block", None) if kind == "float" else ("tensor", "channel", None)
    strategy = _one_of(weights, f"{where}weights.", "strategy", *strategies) or "tensor"
    if strategy == "block":
        structure = weights.get("block_structure")
        if structure not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
            raise _refused(f"{where}weights.block_structure", f"[{BLOCK}, {BLOCK}]", structure)
        _one_of(inputs, f"{where}input_activations.", "dynamic", True)
        _one_of(inputs, f"{where}input_activations.", "strategy", "group")
        _one_of(inputs, f"{where}input_activations.", "group_size", BLOCK)
        return Scheme(FP8_BLOCK, "block")
    # One dynamic scale for all tokens of a step would make an answer depend on the requests beside it.
    if dynamic:
        _one_of(inputs, f"{where}input_activations.", "strategy", "token")
    else:
        _one_of(inputs, f"{where}input_activations.", "strategy", "tensor", None)
    return Scheme(FP8_TOKEN if kind == "float" else INT8_TOKEN, strategy, static=not dynamic)
