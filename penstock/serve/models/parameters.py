"""The parameters of a decoder: what there is of them, and their allocation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.serve.models.spec import ExpertsSpec, LatentSpec, LayerSpec, ModelSpec


@dataclass(slots=True)
class ExpertWeights:
    """A mixture's parameters: router [E, H] and its bias [E], gate_up [E, 2I, H], down [E, H, I]; the shared MLP's likewise."""

    router: Tensor
    router_bias: Tensor | None
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor | None
    shared_down: Tensor | None
    shared_gate: Tensor | None


@dataclass(slots=True)
class LatentWeights:
    """Parameters of latent attention: queries in one step (q) or two (q_a, q_norm, q_b); kv_a [rank + rope, H] and kv_b."""

    q: Tensor | None
    q_a: Tensor | None
    q_a_bias: Tensor | None
    q_norm: Tensor | None
    q_b: Tensor | None
    kv_a: Tensor
    kv_a_bias: Tensor | None
    kv_norm: Tensor
    kv_b: Tensor


@dataclass(slots=True)
class LayerWeights:
    """One layer's parameters: qkv [(Hq+2Hkv)·D, H], o [H, Hq·D], gate_up [2I, H], down [H, I]; absent ones are None."""

    input_norm: Tensor
    qkv: Tensor | None
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    latent: LatentWeights | None
    o: Tensor
    o_bias: Tensor | None
    post_attention_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor | None
    gate_up_bias: Tensor | None
    down: Tensor | None
    down_bias: Tensor | None
    experts: ExpertWeights | None
    post_mlp_norm: Tensor | None


@dataclass(slots=True)
class Weights:
    """All parameters: embedding [V, H], lm_head [V, H] (the same tensor when tied), norm [H] and the layers."""

    embedding: Tensor
    lm_head: Tensor
    norm: Tensor
    layers: list[LayerWeights]

    def tensors(self) -> Iterator[Tensor]:
        """Every distinct parameter once."""
        yield self.embedding
        if self.lm_head is not self.embedding:
            yield self.lm_head
        yield self.norm
        for layer in self.layers:
            yield from _tensors(layer)


def _tensors(part: Any) -> Iterator[Tensor]:
    for field in part.__slots__:
        value = getattr(part, field)
        if isinstance(value, Tensor):
            yield value
        elif value is not None:
            yield from _tensors(value)


def allocate_weights(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype, tied: bool) -> Weights:
    """Uninitialised parameters of the given architecture, each allocated once on the device."""

    def new(*shape: int, wide: bool = False) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.float32 if wide else dtype)

    hidden = spec.hidden_size

    def expert_weights(experts: ExpertsSpec) -> ExpertWeights:
        count, size, shared = experts.count, experts.size, experts.shared_size
        return ExpertWeights(
            router=new(count, hidden, wide=experts.float32_router),
            router_bias=new(count, wide=True) if experts.bias else None,
            gate_up=new(count, 2 * size, hidden),
            down=new(count, hidden, size),
            shared_gate_up=new(2 * shared, hidden) if shared else None,
            shared_down=new(hidden, shared) if shared else None,
            shared_gate=new(1, hidden) if experts.shared_gate else None,
        )

    def latent_weights(latent: LatentSpec, heads: int, bias: bool) -> LatentWeights:
        q, rank = heads * (latent.nope_dim + latent.rope_dim), latent.query_rank
        row = latent.rank + latent.rope_dim
        return LatentWeights(
            q=new(q, hidden) if rank is None else None,
            q_a=None if rank is None else new(rank, hidden),
            q_a_bias=new(rank) if bias and rank is not None else None,
            q_norm=None if rank is None else new(rank),
            q_b=None if rank is None else new(q, rank),
            kv_a=new(row, hidden),
            kv_a_bias=new(row) if bias else None,
            kv_norm=new(latent.rank),
            kv_b=new(heads * (latent.nope_dim + latent.value_dim), latent.rank),
        )

    def layer_weights(layer: LayerSpec) -> LayerWeights:
        head, latent, dense = layer.head_dim, layer.latent, layer.experts is None
        qkv = (layer.num_heads + 2 * layer.num_kv_heads) * head
        value_dim = head if latent is None else latent.value_dim
        return LayerWeights(
            input_norm=new(hidden),
            qkv=new(qkv, hidden) if latent is None else None,
            qkv_bias=new(qkv) if layer.qkv_bias and latent is None else None,
            q_norm=new(head) if layer.qk_norm else None,
            k_norm=new(head) if layer.qk_norm else None,
            latent=None if latent is None else latent_weights(latent, layer.num_heads, layer.qkv_bias),
            o=new(hidden, layer.num_heads * value_dim),
            o_bias=new(hidden) if layer.o_bias else None,
            post_attention_norm=new(hidden) if layer.post_norms else None,
            mlp_norm=new(hidden),
            gate_up=new(2 * layer.mlp_size, hidden) if dense else None,
            gate_up_bias=new(2 * layer.mlp_size) if layer.mlp_bias and dense else None,
            down=new(hidden, layer.mlp_size) if dense else None,
            down_bias=new(hidden) if layer.mlp_bias and dense else None,
            experts=None if layer.experts is None else expert_weights(layer.experts),
            post_mlp_norm=new(hidden) if layer.post_norms else None,
        )

    embedding = new(spec.vocab_size, hidden)
    lm_head = embedding if tied else new(spec.vocab_size, hidden)
    return Weights(embedding, lm_head, new(hidden), [layer_weights(layer) for layer in spec.layers])
