"""The parameters of a decoder: what there is of them, and their allocation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.serve.models.linear import QuantizedLinear
from penstock.serve.models.quantization import Scheme
from penstock.serve.models.quantized_experts import QuantizedExperts, padded_size
from penstock.serve.models.spec import PACKED, ExpertsSpec, LatentSpec, LayerSpec, MambaSpec, ModelError, ModelSpec

Matrix = Tensor | QuantizedLinear


@dataclass(slots=True)
class ExpertWeights:
    """A mixture's parameters: router [E, H] and its bias [E], gate_up [E, 2I, H], down [E, H, I]; the shared MLP's likewise."""

    router: Tensor
    router_bias: Tensor | None
    gate_up: Tensor | QuantizedExperts
    down: Tensor | QuantizedExperts
    shared_gate_up: Matrix | None
    shared_down: Matrix | None
    shared_gate: Tensor | None


@dataclass(slots=True)
class LatentWeights:
    """Parameters of latent attention: queries in one step (q) or two (q_a, q_norm, q_b); kv_a [rank + rope, H] and kv_b.

    kv_b is multiplied into queries and outputs too, where nothing is quantised: a quantised one is dequantised once it is read.
    """

    q: Matrix | None
    q_a: Matrix | None
    q_a_bias: Tensor | None
    q_norm: Tensor | None
    q_b: Matrix | None
    kv_a: Matrix
    kv_a_bias: Tensor | None
    kv_norm: Tensor
    kv_b: Matrix


@dataclass(slots=True)
class MambaWeights:
    """A Mamba-2 mixer's parameters: in_proj [gate, x, B, C, dt; H], conv [channels, W], three numbers a head, norm [inner]."""

    in_proj: Matrix
    in_bias: Tensor | None
    conv: Tensor
    conv_bias: Tensor | None
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor
    norm: Tensor


@dataclass(slots=True)
class LayerWeights:
    """One layer's parameters: qkv [(Hq+2Hkv)·D, H], o [H, Hq·D], gate_up [2I, H], down [H, I]; absent ones are None."""

    input_norm: Tensor
    qkv: Matrix | None
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    latent: LatentWeights | None
    mamba: MambaWeights | None
    o: Matrix
    o_bias: Tensor | None
    post_attention_norm: Tensor | None
    mlp_norm: Tensor | None
    gate_up: Matrix | None
    gate_up_bias: Tensor | None
    down: Matrix | None
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
            yield from (value for value in _leaves(layer) if isinstance(value, Tensor))
        for weight in self.quantized():
            yield weight.codes
            yield weight.scale
            if weight.input_scale is not None:
                yield weight.input_scale

    def quantized(self) -> Iterator[QuantizedLinear | QuantizedExperts]:
        """Those of 8 bits."""
        for layer in self.layers:
            yield from (value for value in _leaves(layer) if not isinstance(value, Tensor))

    def prepare(self) -> None:
        """Makes products of what was read in 8 bits."""
        for weight in self.quantized():
            weight.prepare()
        for layer in self.layers:
            if layer.latent is not None and isinstance(layer.latent.kv_b, QuantizedLinear):
                layer.latent.kv_b = layer.latent.kv_b.dequantised()


def _leaves(part: Any) -> Iterator[Tensor | QuantizedLinear | QuantizedExperts]:
    for field in part.__slots__:
        value = getattr(part, field)
        if isinstance(value, Tensor | QuantizedLinear | QuantizedExperts):
            yield value
        elif value is not None:
            yield from _leaves(value)


def shared_name(experts: ExpertsSpec) -> str:
    """What the shared MLP is called: Qwen2-MoE's one shared expert, DeepSeek's several that are one MLP."""
    return "mlp.shared_expert" if experts.shared_gate else "mlp.shared_experts"


def allocate_weights(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype, tied: bool) -> Weights:
    """Uninitialised parameters of the given architecture, each allocated once on the device."""

    def new(*shape: int, wide: bool = False) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.float32 if wide else dtype)

    hidden = spec.hidden_size

    def scheme_of(prefix: str, *modules: str) -> Scheme | None:
        """That of all these modules, which are one product."""
        if spec.quantization is None:
            return None
        names = [spec.published(prefix + module) for module in modules]
        schemes = [spec.quantization.scheme(name) for name in names]
        for name, scheme in zip(names, schemes, strict=True):
            if scheme != schemes[0]:
                raise ModelError(f"quantization_config: {name} must be quantised as {names[0]} is, got {scheme}, {schemes[0]}")
        return schemes[0]

    def matrix(prefix: str, modules: dict[str, int], columns: int, codes: torch.dtype | None = None) -> Matrix:
        """The weights of modules with one input, by the output rows of each."""
        scheme = scheme_of(prefix, *modules)
        if scheme is None:
            return new(sum(modules.values()), columns)
        published = {spec.published(prefix + module): rows for module, rows in modules.items()}
        return QuantizedLinear.allocate(scheme, published, columns, device, codes)

    def expert_weights(prefix: str, experts: ExpertsSpec) -> ExpertWeights:
        count, size, shared = experts.count, experts.size, experts.shared_size
        gates: list[tuple[str, ...]] = [(f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj") for e in range(count)]
        downs: list[tuple[str, ...]] = [(f"mlp.experts.{e}.down_proj",) for e in range(count)]
        scheme = scheme_of(prefix, *(name for each in (*gates, *downs) for name in each))
        gate_up: Tensor | QuantizedExperts
        down: Tensor | QuantizedExperts
        if scheme is None:
            gate_up, down = new(count, 2 * size, hidden), new(count, hidden, size)
        elif not scheme.activations.dtype.is_floating_point:
            raise ModelError(f"{spec.architecture} with experts of 8-bit integers is not supported; FP8 or 16 bits are")
        else:
            gates, downs = ([tuple(spec.published(prefix + m) for m in each) for each in all] for all in (gates, downs))
            wide = padded_size(scheme, size)
            gate_up = QuantizedExperts.allocate(scheme, gates, size, hidden, device, (wide, hidden))
            down = QuantizedExperts.allocate(scheme, downs, hidden, size, device, (hidden, wide))
        own = shared_name(experts)
        return ExpertWeights(
            router=new(count, hidden, wide=experts.float32_router),
            router_bias=new(count, wide=True) if experts.bias else None,
            gate_up=gate_up,
            down=down,
            shared_gate_up=matrix(f"{prefix}{own}.", {"gate_proj": shared, "up_proj": shared}, hidden) if shared else None,
            shared_down=matrix(f"{prefix}{own}.", {"down_proj": hidden}, shared) if shared else None,
            shared_gate=new(1, hidden) if experts.shared_gate else None,
        )

    def latent_weights(prefix: str, latent: LatentSpec, heads: int, bias: bool) -> LatentWeights:
        q, rank = heads * (latent.nope_dim + latent.rope_dim), latent.query_rank
        row, up = latent.rank + latent.rope_dim, heads * (latent.nope_dim + latent.value_dim)
        prefix += "self_attn."
        return LatentWeights(
            q=matrix(prefix, {"q_proj": q}, hidden) if rank is None else None,
            q_a=None if rank is None else matrix(prefix, {"q_a_proj": rank}, hidden),
            q_a_bias=new(rank) if bias and rank is not None else None,
            q_norm=None if rank is None else new(rank),
            q_b=None if rank is None else matrix(prefix, {"q_b_proj": q}, rank),
            kv_a=matrix(prefix, {"kv_a_proj_with_mqa": row}, hidden),
            kv_a_bias=new(row) if bias else None,
            kv_norm=new(latent.rank),
            kv_b=matrix(prefix, {"kv_b_proj": up}, latent.rank, codes=dtype),
        )

    def mamba_weights(prefix: str, mamba: MambaSpec) -> MambaWeights:
        return MambaWeights(
            in_proj=matrix(prefix, {"mamba.in_proj": mamba.projected}, hidden),
            in_bias=new(mamba.projected) if mamba.proj_bias else None,
            conv=new(mamba.conv_channels, mamba.conv_width),
            conv_bias=new(mamba.conv_channels) if mamba.conv_bias else None,
            A_log=new(mamba.num_heads),
            D=new(mamba.num_heads),
            dt_bias=new(mamba.num_heads),
            norm=new(mamba.inner_size),
        )

    def layer_weights(index: int, layer: LayerSpec) -> LayerWeights:
        prefix, head, latent, mamba = f"model.layers.{index}.", layer.head_dim, layer.latent, layer.mamba
        plain, dense = latent is None and mamba is None, layer.experts is None and layer.mlp_size > 0
        q, kv, size = layer.num_heads * head, layer.num_kv_heads * head, layer.mlp_size
        if mamba is not None:
            mixed, output = mamba.inner_size, "mamba.out_proj"
        else:
            mixed, output = layer.num_heads * (head if latent is None else latent.value_dim), "self_attn.o_proj"
        gate_up = {PACKED: 2 * size} if spec.packed_mlp else {"mlp.gate_proj": size, "mlp.up_proj": size}
        qkv = {f"self_attn.{part}_proj": rows for part, rows in (("q", q), ("k", kv), ("v", kv))}
        return LayerWeights(
            input_norm=new(hidden),
            qkv=matrix(prefix, qkv, hidden) if plain else None,
            qkv_bias=new(q + 2 * kv) if layer.qkv_bias and plain else None,
            q_norm=new(head) if layer.qk_norm and plain else None,
            k_norm=new(head) if layer.qk_norm and plain else None,
            latent=None if latent is None else latent_weights(prefix, latent, layer.num_heads, layer.qkv_bias),
            mamba=None if mamba is None else mamba_weights(prefix, mamba),
            o=matrix(prefix, {output: hidden}, mixed),
            o_bias=new(hidden) if layer.o_bias else None,
            post_attention_norm=new(hidden) if layer.post_norms else None,
            mlp_norm=new(hidden) if size else None,
            gate_up=matrix(prefix, gate_up, hidden) if dense else None,
            gate_up_bias=new(2 * size) if layer.mlp_bias and dense else None,
            down=matrix(prefix, {"mlp.down_proj": hidden}, size) if dense else None,
            down_bias=new(hidden) if layer.mlp_bias and dense else None,
            experts=None if layer.experts is None else expert_weights(prefix, layer.experts),
            post_mlp_norm=new(hidden) if layer.post_norms else None,
        )

    embedding = new(spec.vocab_size, hidden)
    lm_head = embedding if tied else new(spec.vocab_size, hidden)
    return Weights(embedding, lm_head, new(hidden), [layer_weights(index, layer) for index, layer in enumerate(spec.layers)])
