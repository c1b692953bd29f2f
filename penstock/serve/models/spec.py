"""The architecture of a decoder as data, read from a Hugging Face config.

spec = ModelSpec.from_config(transformers.AutoConfig.from_pretrained(path))     # or read_spec(path)
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


class ModelError(ValueError):
    """A checkpoint or its config cannot be read or is not supported; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One rotary table: `parameters` holds rope_type, rope_theta and the factors of that type."""

    head_dim: int
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture of experts in place of the MLP.

    Of `count` experts of width `size` a token uses `top_k`; moe_route says what the options of the choice mean. All tokens use
    one more MLP of width `shared_size`, if that is not 0, weighted by a sigmoid of its own with `shared_gate`.
    """

    count: int
    top_k: int
    size: int
    scoring: str = "softmax"
    renormalize: bool = True
    num_groups: int | None = None
    top_groups: int | None = None
    scale: float = 1.0
    bias: bool = False
    float32_router: bool = False
    shared_size: int = 0
    shared_gate: bool = False


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention: keys and values of all heads are kept as one row of `rank` + `rope_dim` numbers.

    A head's query and key have `nope_dim` dimensions without positions and `rope_dim` rotated ones, its value has `value_dim`.
    Queries go through `query_rank` numbers first, where that is not None.
    """

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None = None
    interleaved: bool = True


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer. `window` counts the keys a query sees, itself included; `rope` indexes ModelSpec.ropes."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scale: float
    mlp_size: int
    activation: str = "silu"
    window: int | None = None
    attention_softcap: float | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    post_norms: bool = False
    rope: int = 0
    experts: ExpertsSpec | None = None
    latent: LatentSpec | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole decoder; every number that the model code needs and no tensor."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    max_position_embeddings: int
    norm_eps: float
    norm_weight_offset: float = 0.0
    embedding_scale: float | None = None
    logit_softcap: float | None = None
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    @classmethod
    def from_config(cls, config: Any) -> "ModelSpec":
        """Reads a Hugging Face config object; ModelError names what is not supported."""
        architectures = getattr(config, "architectures", None) or []
        if not architectures:
            raise ModelError(f"the config names no architecture; known are {', '.join(ARCHITECTURES)}")
        name = architectures[0]
        if name not in ARCHITECTURES:
            raise ModelError(f"the architecture {name} is not known; known are {', '.join(ARCHITECTURES)}")
        _refuse_unsupported(name, config)
        return ARCHITECTURES[name](name, config)

    @property
    def max_context(self) -> int:
        """Positions that the model can be asked for: those of its config, times what its rotary scaling adds."""
        longest = self.max_position_embeddings
        for rope in self.ropes:
            if rope.parameters["rope_type"] in ("linear", "dynamic", "yarn"):
                trained = rope.parameters.get("original_max_position_embeddings", self.max_position_embeddings)
                longest = max(longest, int(trained * rope.parameters["factor"]))
        return longest

    @property
    def num_parameters(self) -> int:
        """Weights in the checkpoint, norms and biases included."""
        total = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2) + self.hidden_size
        return total + sum(layer_parameters(self.hidden_size, layer) for layer in self.layers)


def layer_parameters(hidden: int, layer: LayerSpec) -> int:
    """Weights of one layer, norms and biases included."""
    total = hidden * (4 if layer.post_norms else 2) + hidden * layer.o_bias
    if layer.latent is None:
        q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        total += hidden * (2 * q + 2 * kv) + 2 * layer.head_dim * layer.qk_norm + (q + 2 * kv) * layer.qkv_bias
    else:
        latent = layer.latent
        q = layer.num_heads * (latent.nope_dim + latent.rope_dim)
        rank, value = latent.query_rank, layer.num_heads * latent.value_dim
        total += hidden * q if rank is None else rank * (hidden + q + 1 + layer.qkv_bias)
        total += (hidden + layer.qkv_bias) * (latent.rank + latent.rope_dim) + latent.rank
        total += latent.rank * (layer.num_heads * latent.nope_dim + value) + value * hidden
    if layer.experts is None:
        return total + 3 * hidden * layer.mlp_size + (2 * layer.mlp_size + hidden) * layer.mlp_bias
    experts = layer.experts
    total += experts.count * (hidden + 3 * hidden * experts.size + experts.bias)
    return total + 3 * hidden * experts.shared_size + hidden * experts.shared_gate


def read_spec(path: str | Path) -> ModelSpec:
    """Reads config.json and, when present, the eos ids of generation_config.json in a local checkpoint directory."""
    directory = Path(path)
    raw = _read_json(directory / "config.json")
    if raw is None:
        raise ModelError(f"{directory} has no config.json, so it is not a Hugging Face checkpoint")
    architectures = raw.get("architectures") or []
    if architectures and architectures[0] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"{directory}: the architecture {architectures[0]} is not known; known are {known}")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{directory / 'config.json'} does not describe a model: {reason}") from error
    generation = _read_json(directory / "generation_config.json") or {}
    try:
        spec = ModelSpec.from_config(config)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from error
    eos = _token_ids(generation.get("eos_token_id"))
    return replace(spec, eos_token_ids=tuple(dict.fromkeys(spec.eos_token_ids + eos)))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _refuse_unsupported(name: str, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        get = quantization.get if isinstance(quantization, dict) else lambda key: getattr(quantization, key, None)
        raise ModelError(
            f"{name} with quantization_config ({get('quant_method')}) is not supported; use the unquantised checkpoint"
        )
    for field in ("num_local_experts", "num_experts", "n_routed_experts"):
        if (getattr(config, field, None) or 0) > 1 and name not in _MIXTURES:
            raise ModelError(f"{name} with mixture-of-experts layers ({field}={getattr(config, field)}) is not supported")
    if getattr(config, "alibi", False):
        raise ModelError(f"{name} with ALiBi position biases (alibi=True) is not supported")
    if getattr(config, "use_bidirectional_attention", None):
        raise ModelError(f"{name} with use_bidirectional_attention is not supported; a decoder attends causally")


_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
_ROPE_FACTORS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def _rope(name: str, config: Any, head_dim: int, layer_type: str | None = None, theta: float = 10_000.0) -> RopeSpec:
    """transformers 5 has rope_parameters, at times per layer type; published configs rope_theta and rope_scaling."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if layer_type in parameters:
        parameters = parameters[layer_type] or {}
    elif layer_type == "sliding_attention":  # the older form of Gemma 3: one scaling, for the global layers only
        parameters = {"rope_theta": getattr(config, "rope_local_base_freq", None)}
    parameters = dict(parameters)
    kind = parameters.get("rope_type") or parameters.pop("type", None) or "default"
    if kind not in _ROPE_FACTORS:
        raise ModelError(f"{name} with rope_type {kind} is not supported; supported are {', '.join(_ROPE_FACTORS)}")
    partial = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    if partial != 1.0:
        raise ModelError(f"{name} with partial_rotary_factor {partial} is not supported; the whole head is rotated")
    for factor in _ROPE_FACTORS[kind]:
        if not isinstance(parameters.get(factor), int | float):
            raise ModelError(f"{name}: rope_type {kind} needs the number {factor}, got {parameters.get(factor)!r}")
    parameters["rope_type"] = kind
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = getattr(config, "rope_theta", None) or theta
    if kind in ("llama3", "yarn"):
        parameters.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    if kind == "dynamic":
        parameters["original_max_position_embeddings"] = config.max_position_embeddings
    return RopeSpec(head_dim, parameters)


def _head_dim(name: str, config: Any) -> int:
    heads, kv_heads = config.num_attention_heads, _kv_heads(config)
    if heads % kv_heads:
        raise ModelError(f"{name}: num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads}")
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        if config.hidden_size % heads:
            raise ModelError(
                f"{name}: head_dim is absent and hidden_size {config.hidden_size} is not a multiple of {heads} heads"
            )
        head_dim = config.hidden_size // heads
    if head_dim % 2 or not 0 < head_dim <= 256:
        raise ModelError(f"{name}: head_dim must be an even number of at most 256, got {head_dim}")
    return head_dim


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _sliding_windows(config: Any) -> list[int | None]:
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ModelError(f"layer_types may name sliding_attention and full_attention, got {kind}")
    return [getattr(config, "sliding_window", None) if kind == "sliding_attention" else None for kind in kinds]


def _model(
    name: str,
    config: Any,
    *,
    windows: Sequence[int | None] | None = None,
    ropes: tuple[RopeSpec, ...] = (),
    rope_of_layer: Sequence[int] | None = None,
    activation: str | None = None,
    query_scale: float | None = None,
    experts: Sequence[ExpertsSpec | None] | None = None,
    layer: dict[str, Any],
    **fields: Any,
) -> ModelSpec:
    """The parts that all architectures share; `layer` goes to every LayerSpec, `fields` to the ModelSpec."""
    head_dim, count = _head_dim(name, config), config.num_hidden_layers
    windows = windows or [None] * count
    if len(windows) != count:
        raise ModelError(f"{name}: layer_types names {len(windows)} layers, num_hidden_layers is {count}")
    activation = activation or config.hidden_act
    if experts is not None and activation != "silu":
        raise ModelError(f"{name} with hidden activation {activation} is not supported; experts have silu")
    if activation not in _ACTIVATIONS:
        raise ModelError(f"{name} with hidden activation {activation} is not supported; {', '.join(_ACTIVATIONS)} are")
    layers = tuple(
        LayerSpec(
            **{
                "num_heads": config.num_attention_heads,
                "num_kv_heads": _kv_heads(config),
                "head_dim": head_dim,
                "query_scale": query_scale or head_dim**-0.5,
                "mlp_size": config.intermediate_size,
                "activation": _ACTIVATIONS[activation],
                "window": windows[i],
                "rope": rope_of_layer[i] if rope_of_layer else 0,
                "experts": experts[i] if experts else None,
                **layer,
            }
        )
        for i in range(count)
    )
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "bfloat16"
    return ModelSpec(
        architecture=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=layers,
        ropes=ropes or (_rope(name, config, head_dim),),
        max_position_embeddings=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        eos_token_ids=_token_ids(getattr(config, "eos_token_id", None)),
        dtype=str(dtype).removeprefix("torch."),
        **fields,
    )


def _llama(name: str, config: Any) -> ModelSpec:
    bias = bool(getattr(config, "attention_bias", False))
    mlp_bias = bool(getattr(config, "mlp_bias", False))
    return _model(name, config, layer={"qkv_bias": bias, "o_bias": bias, "mlp_bias": mlp_bias})


def _mistral(name: str, config: Any) -> ModelSpec:
    window = getattr(config, "sliding_window", None)
    return _model(name, config, windows=[window] * config.num_hidden_layers, layer={})


def _qwen2(name: str, config: Any) -> ModelSpec:
    return _model(name, config, windows=_sliding_windows(config), layer={"qkv_bias": True})


def _qwen3(name: str, config: Any) -> ModelSpec:
    bias = bool(getattr(config, "attention_bias", False))
    layer = {"qk_norm": True, "qkv_bias": bias, "o_bias": bias}
    return _model(name, config, windows=_sliding_windows(config), layer=layer)


def _mixtral(name: str, config: Any) -> ModelSpec:
    mixture = ExpertsSpec(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size)
    count = config.num_hidden_layers
    return _model(name, config, windows=[config.sliding_window] * count, experts=[mixture] * count, layer={})


def _sparse(config: Any, mixture: ExpertsSpec) -> list[ExpertsSpec | None]:
    """Qwen's rule: every decoder_sparse_step-th layer is a mixture, but for those of mlp_only_layers."""
    dense, step = set(config.mlp_only_layers or ()), config.decoder_sparse_step
    return [None if i in dense or (i + 1) % step else mixture for i in range(config.num_hidden_layers)]


def _qwen2_moe(name: str, config: Any) -> ModelSpec:
    mixture = ExpertsSpec(
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        renormalize=config.norm_topk_prob,
        shared_size=config.shared_expert_intermediate_size,
        shared_gate=True,
    )
    bias = bool(getattr(config, "qkv_bias", True))
    layer = {"qkv_bias": bias}
    return _model(name, config, windows=_sliding_windows(config), experts=_sparse(config, mixture), layer=layer)


def _qwen3_moe(name: str, config: Any) -> ModelSpec:
    mixture = ExpertsSpec(
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, renormalize=config.norm_topk_prob
    )
    bias = bool(getattr(config, "attention_bias", False))
    window = config.sliding_window if getattr(config, "use_sliding_window", False) else None
    windows = [window] * config.num_hidden_layers
    layer = {"qk_norm": True, "qkv_bias": bias, "o_bias": bias}
    return _model(name, config, windows=windows, experts=_sparse(config, mixture), layer=layer)


def _deepseek(name: str, config: Any, mixture: ExpertsSpec) -> ModelSpec:
    latent = LatentSpec(
        config.kv_lora_rank,
        config.qk_rope_head_dim,
        config.qk_nope_head_dim,
        config.v_head_dim,
        config.q_lora_rank,
        bool(getattr(config, "rope_interleave", True)),
    )
    rope = _rope(name, config, latent.rope_dim)
    scale = (latent.nope_dim + latent.rope_dim) ** -0.5
    if rope.parameters["rope_type"] == "yarn" and rope.parameters.get("mscale_all_dim"):
        factor, weight = rope.parameters["factor"], rope.parameters["mscale_all_dim"]
        magnitude = 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
        scale *= magnitude**2
    bias = bool(getattr(config, "attention_bias", False))
    layer = {
        "latent": latent,
        "num_kv_heads": 1,
        "head_dim": latent.rank + latent.rope_dim,
        "query_scale": scale,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
    }
    count, dense = config.num_hidden_layers, config.first_k_dense_replace
    experts = [None if i < dense else mixture for i in range(count)]
    return _model(name, config, ropes=(rope,), experts=experts, layer=layer)


def _deepseek_experts(config: Any, **options: Any) -> ExpertsSpec:
    return ExpertsSpec(
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        scale=config.routed_scaling_factor,
        float32_router=True,
        shared_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
        **options,
    )


def _deepseek_v2(name: str, config: Any) -> ModelSpec:
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise ModelError(f"{name} with topk_method {config.topk_method} is not supported; greedy, group_limited_greedy are")
    groups: dict[str, Any] = {}
    if config.topk_method == "group_limited_greedy":
        groups = {"num_groups": config.n_group, "top_groups": config.topk_group}
    # The published model's norm_topk_prob is false, and transformers does not read it.
    return _deepseek(name, config, _deepseek_experts(config, renormalize=False, **groups))


def _deepseek_v3(name: str, config: Any) -> ModelSpec:
    options = {"renormalize": config.norm_topk_prob, "num_groups": config.n_group, "top_groups": config.topk_group}
    return _deepseek(name, config, _deepseek_experts(config, scoring="sigmoid", bias=True, **options))


def _gemma(name: str, config: Any, *, layer: dict[str, Any], **fields: Any) -> ModelSpec:
    bias = bool(getattr(config, "attention_bias", False))
    return _model(
        name,
        config,
        windows=_sliding_windows(config),
        activation=config.hidden_activation,
        query_scale=config.query_pre_attn_scalar**-0.5,
        norm_weight_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        logit_softcap=config.final_logit_softcapping,
        layer={"qkv_bias": bias, "o_bias": bias, "post_norms": True, **layer},
        **fields,
    )


def _gemma2(name: str, config: Any) -> ModelSpec:
    return _gemma(name, config, layer={"attention_softcap": config.attn_logit_softcapping})


def _gemma3(name: str, config: Any) -> ModelSpec:
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ModelError(f"{name} with attn_logit_softcapping is not supported; published Gemma 3 models have none")
    head_dim = _head_dim(name, config)
    ropes = (
        _rope(name, config, head_dim, "full_attention", 1_000_000.0),
        _rope(name, config, head_dim, "sliding_attention", 10_000.0),
    )
    local = [int(window is not None) for window in _sliding_windows(config)]
    return _gemma(name, config, layer={"qk_norm": True}, ropes=ropes, rope_of_layer=local)


ARCHITECTURES: dict[str, Callable[[str, Any], ModelSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "MixtralForCausalLM": _mixtral,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "DeepseekV2ForCausalLM": _deepseek_v2,
    "DeepseekV3ForCausalLM": _deepseek_v3,
}
_MIXTURES = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
)
