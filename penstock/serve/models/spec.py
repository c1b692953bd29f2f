"""The architecture of a decoder as data, read from a Hugging Face config.

spec = ModelSpec.from_config(transformers.AutoConfig.from_pretrained(path))     # or read_spec(path)
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from penstock.serve.models.layer_spec import ExpertsSpec, LatentSpec, LayerSpec, MambaSpec, ModelError, layer_parameters
from penstock.serve.models.quantization import Quantization, read_quantization

# A model without positions has no longest context; tables of the runtime need a number.
UNBOUNDED = 1 << 20
PACKED = "mlp.gate_up_proj"  # of an architecture that renames it: gate and up are one tensor in the checkpoint too


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One rotary table: `parameters` holds rope_type, rope_theta and the factors of that type."""

    head_dim: int
    parameters: dict[str, Any]


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
    residual_scale: float | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    renamed: tuple[tuple[str, str], ...] = ()  # parts of Llama's tensor names → what this architecture calls them
    quantization: Quantization | None = None
    draft_layers: int = 0  # that guess tokens, after the others in the checkpoint; they are not read

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
        return replace(ARCHITECTURES[name](name, config), quantization=read_quantization(config))

    def published(self, name: str) -> str:
        """What the architecture calls a tensor or module that has this name in Llama, or in Qwen's mixtures."""
        for old, new in self.renamed:
            name = name.replace(old, new)
        return name

    @property
    def packed_mlp(self) -> bool:
        """Whether gate and up are one tensor in the checkpoint."""
        return any(old == PACKED for old, _ in self.renamed)

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
    def attention_layers(self) -> tuple[LayerSpec, ...]:
        """Those with keys and values."""
        return tuple(layer for layer in self.layers if layer.mamba is None)

    @property
    def mambas(self) -> tuple[MambaSpec, ...]:
        """Those with recurrent state."""
        return tuple(layer.mamba for layer in self.layers if layer.mamba is not None)

    @property
    def num_parameters(self) -> int:
        """Weights in the checkpoint, norms and biases included."""
        total = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2) + self.hidden_size
        return total + sum(layer_parameters(self.hidden_size, layer) for layer in self.layers)


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
    ropes: tuple[RopeSpec, ...] | None = None,
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
        ropes=(_rope(name, config, head_dim),) if ropes is None else ropes,
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
    renamed = (
        ("mlp.gate.", "block_sparse_moe.gate."),
        ("mlp.experts.", "block_sparse_moe.experts."),
        ("gate_proj", "w1"),
        ("up_proj", "w3"),
        ("down_proj", "w2"),
    )
    windows = [config.sliding_window] * count
    return _model(name, config, windows=windows, experts=[mixture] * count, layer={}, renamed=renamed)


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
    guessing = getattr(config, "num_nextn_predict_layers", None) or 0
    return _model(name, config, ropes=(rope,), experts=experts, layer=layer, draft_layers=guessing)


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


def _hybrid(
    name: str, config: Any, *, mlp_size: int, rope: int | None, ropes: tuple[RopeSpec, ...], **fields: Any
) -> ModelSpec:
    """Attention in some layers and Mamba-2 in the others, each followed by an MLP."""
    bias, limit = bool(getattr(config, "attention_bias", False)), config.time_step_limit
    mamba = MambaSpec(
        num_heads=config.mamba_n_heads,
        head_dim=config.mamba_d_head,
        num_groups=config.mamba_n_groups,
        state_size=config.mamba_d_state,
        conv_width=config.mamba_d_conv,
        conv_bias=bool(config.mamba_conv_bias),
        proj_bias=bool(config.mamba_proj_bias),
        dt_limit=(0.0, float("inf")) if limit is None else (float(limit[0]), float(limit[1])),
    )
    _check_mamba(name, mamba, config.hidden_act)
    layer = {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(getattr(config, "mlp_bias", False)), "mlp_size": mlp_size}
    spec = _model(name, config, ropes=ropes, layer=layer, **fields)
    kinds = config.layers_block_type
    layers = tuple(
        replace(own, rope=rope) if kind == "full_attention" else replace(own, mamba=mamba, o_bias=mamba.proj_bias)
        for own, kind in zip(spec.layers, kinds, strict=True)
    )
    return replace(spec, layers=layers)


def _check_mamba(name: str, mamba: MambaSpec, activation: str) -> None:
    if activation != "silu":
        raise ModelError(f"{name} with hidden activation {activation} is not supported; a Mamba-2 mixer gates with silu")
    if mamba.num_groups < 1 or mamba.num_heads % mamba.num_groups:
        raise ModelError(f"{name}: {mamba.num_heads} Mamba heads must be a multiple of {mamba.num_groups} groups")


def _bamba(name: str, config: Any) -> ModelSpec:
    # Half of each head is rotated: config classes fix it, published configs may name it.
    rotated = _head_dim(name, config) // 2
    parameters = dict(getattr(config, "rope_parameters", None) or {"rope_theta": 10_000.0})
    parameters.pop("partial_rotary_factor", None)
    ropes = (
        _rope(
            name, SimpleNamespace(rope_parameters=parameters, max_position_embeddings=config.max_position_embeddings), rotated
        ),
    )
    names = (
        ("mlp.", "feed_forward."),
        ("post_attention_layernorm", "pre_ff_layernorm"),
        ("model.norm.", "model.final_layernorm."),
    )
    return _hybrid(name, config, mlp_size=config.intermediate_size, rope=0, ropes=ropes, renamed=names)


def _granite_hybrid(name: str, config: Any) -> ModelSpec:
    if config.num_local_experts:
        raise ModelError(
            f"{name} with mixture-of-experts layers (num_local_experts={config.num_local_experts}) is not supported"
        )
    rotates = config.position_embedding_type == "rope"
    ropes = (_rope(name, config, _head_dim(name, config)),) if rotates else ()
    return _hybrid(
        name,
        config,
        mlp_size=config.shared_intermediate_size,
        rope=0 if rotates else None,
        ropes=ropes,
        query_scale=config.attention_multiplier,
        embedding_scale=_unless_one(config.embedding_multiplier),
        residual_scale=_unless_one(config.residual_multiplier),
        logit_scale=_unless_one(1 / config.logits_scaling),
        renamed=(("mlp.gate_up_proj", "shared_mlp.input_linear"), ("mlp.down_proj", "shared_mlp.output_linear")),
    )


def _unless_one(scale: float) -> float | None:
    return None if scale == 1 else float(scale)


def _mamba2(name: str, config: Any) -> ModelSpec:
    mamba = MambaSpec(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_groups=config.n_groups,
        state_size=config.state_size,
        conv_width=config.conv_kernel,
        conv_bias=bool(config.use_conv_bias),
        proj_bias=bool(config.use_bias),
        dt_limit=(float(config.time_step_limit[0]), float(config.time_step_limit[1])),
    )
    _check_mamba(name, mamba, config.hidden_act)
    layer = LayerSpec(num_heads=0, num_kv_heads=0, head_dim=0, query_scale=0.0, mlp_size=0, o_bias=mamba.proj_bias, mamba=mamba)
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or "bfloat16"
    return ModelSpec(
        architecture=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=(layer,) * config.num_hidden_layers,
        ropes=(),
        max_position_embeddings=UNBOUNDED,
        norm_eps=config.layer_norm_epsilon,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        eos_token_ids=_token_ids(config.eos_token_id),
        dtype=str(dtype).removeprefix("torch."),
        renamed=(
            ("model.norm.", "backbone.norm_f."),
            ("model.embed_tokens", "backbone.embeddings"),
            ("model.", "backbone."),
            ("input_layernorm", "norm"),
            ("mamba.", "mixer."),
        ),
    )


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
    "Mamba2ForCausalLM": _mamba2,
    "BambaForCausalLM": _bamba,
    "GraniteMoeHybridForCausalLM": _granite_hybrid,
}
_MIXTURES = (
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
)
