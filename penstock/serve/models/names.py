"""The published names of a checkpoint's tensors, and where each of them goes."""

from torch import Tensor

from penstock.serve.models.parameters import (
    ExpertWeights,
    LatentWeights,
    LayerWeights,
    MambaWeights,
    Matrix,
    Weights,
    shared_name,
)
from penstock.serve.models.spec import PACKED, ExpertsSpec, LayerSpec, ModelSpec

LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

Names = dict[str, Matrix | None]


def checkpoint_names(spec: ModelSpec, weights: Weights) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint goes: its published name → the parameter, or the part of a packed one."""
    names: Names = {EMBEDDING: weights.embedding, "model.norm.weight": weights.norm}
    if weights.lm_head is not weights.embedding:
        names[LM_HEAD] = weights.lm_head
    for index, (layer, own) in enumerate(zip(spec.layers, weights.layers, strict=True)):
        by_suffix = _layer_names(layer, own, spec.packed_mlp)
        if own.latent is not None:
            by_suffix |= _latent_names(own.latent)
        if own.mamba is not None:
            by_suffix |= _mamba_names(own.mamba, own)
        if layer.experts is not None and own.experts is not None:
            by_suffix |= _expert_names(layer.experts, own.experts)
        names |= {f"model.layers.{index}.{suffix}": to for suffix, to in by_suffix.items()}
    plain = {spec.published(name): to for name, to in names.items() if isinstance(to, Tensor)}
    return plain | {name: to for weight in weights.quantized() for name, to in weight.names()}


def _layer_names(layer: LayerSpec, own: LayerWeights, packed: bool) -> Names:
    q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    pre_mlp = "pre_feedforward_layernorm" if layer.post_norms else "post_attention_layernorm"
    names: Names = {
        "input_layernorm.weight": own.input_norm,
        "post_attention_layernorm.weight": own.post_attention_norm,
        f"{pre_mlp}.weight": own.mlp_norm,
        "post_feedforward_layernorm.weight": own.post_mlp_norm,
        "self_attn.q_norm.weight": own.q_norm,
        "self_attn.k_norm.weight": own.k_norm,
        "self_attn.o_proj.weight": own.o,
        "self_attn.o_proj.bias": own.o_bias,
        "mlp.down_proj.weight": own.down,
        "mlp.down_proj.bias": own.down_bias,
    }
    for kind, qkv, gate_up in (("weight", own.qkv, own.gate_up), ("bias", own.qkv_bias, own.gate_up_bias)):
        if isinstance(qkv, Tensor):
            parts = qkv.split((q, kv, kv))
            names |= {f"self_attn.{part}_proj.{kind}": parts[i] for i, part in enumerate("qkv")}
        if isinstance(gate_up, Tensor) and packed:
            names[f"{PACKED}.{kind}"] = gate_up
        elif isinstance(gate_up, Tensor):
            names[f"mlp.gate_proj.{kind}"], names[f"mlp.up_proj.{kind}"] = gate_up.chunk(2)
    return names


def _mamba_names(own: MambaWeights, layer: LayerWeights) -> Names:
    return {
        "self_attn.o_proj.weight": None,
        "self_attn.o_proj.bias": None,
        "mamba.in_proj.weight": own.in_proj,
        "mamba.in_proj.bias": own.in_bias,
        "mamba.conv1d.weight": own.conv[:, None],
        "mamba.conv1d.bias": own.conv_bias,
        "mamba.A_log": own.A_log,
        "mamba.D": own.D,
        "mamba.dt_bias": own.dt_bias,
        "mamba.norm.weight": own.norm,
        "mamba.out_proj.weight": layer.o,
        "mamba.out_proj.bias": layer.o_bias,
    }


def _latent_names(own: LatentWeights) -> Names:
    return {
        "self_attn.q_proj.weight": own.q,
        "self_attn.q_a_proj.weight": own.q_a,
        "self_attn.q_a_proj.bias": own.q_a_bias,
        "self_attn.q_a_layernorm.weight": own.q_norm,
        "self_attn.q_b_proj.weight": own.q_b,
        "self_attn.kv_a_proj_with_mqa.weight": own.kv_a,
        "self_attn.kv_a_proj_with_mqa.bias": own.kv_a_bias,
        "self_attn.kv_a_layernorm.weight": own.kv_norm,
        "self_attn.kv_b_proj.weight": own.kv_b,
    }


def _expert_names(spec: ExpertsSpec, own: ExpertWeights) -> Names:
    shared = shared_name(spec)
    names: Names = {
        "mlp.gate.weight": own.router,
        "mlp.gate.e_score_correction_bias": own.router_bias,
        f"{shared}.down_proj.weight": own.shared_down,
        "mlp.shared_expert_gate.weight": own.shared_gate,
    }
    if isinstance(own.shared_gate_up, Tensor):
        names[f"{shared}.gate_proj.weight"], names[f"{shared}.up_proj.weight"] = own.shared_gate_up.chunk(2)
    if isinstance(own.gate_up, Tensor) and isinstance(own.down, Tensor):
        for e, (gate_up, down) in enumerate(zip(own.gate_up, own.down, strict=True)):
            expert = f"mlp.experts.{e}"
            names[f"{expert}.gate_proj.weight"], names[f"{expert}.up_proj.weight"] = gate_up.chunk(2)
            names[f"{expert}.down_proj.weight"] = down
    return names
