"""One decoder for every architecture: the spec says which pieces a layer has, penstock's operators compute them.

decoder = Decoder(spec, weights, pool.layers, max_model_len=4096)
hidden = decoder.forward(token_ids, batch)              # [T, H]
logits = decoder.logits(hidden[last_rows])              # float32 [n, V]
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, split_with_sizes
from torch.nn.functional import embedding

from penstock.ops import (
    add_rms_norm,
    attention_decode,
    attention_decode_plan,
    attention_prefill_paged,
    rms_norm,
    rope,
    rope_norm_store_kv,
    rope_table,
    store_kv,
)
from penstock.serve.models.batch import Batch
from penstock.serve.models.feed_forward import Experts, Mlp
from penstock.serve.models.latent import LatentAttention
from penstock.serve.models.linear import linear
from penstock.serve.models.mamba import MambaMixer
from penstock.serve.models.parameters import LayerWeights, Weights
from penstock.serve.models.spec import LayerSpec, ModelSpec

# Where one kernel between two matmuls is faster than four. On a CPU the calls are the cost and working in place saves copies:
# 57 µs against 40 for a row of 4 + 2 heads of 64 in float32.
FUSED = ("cuda",)


class Decoder:
    """The decoder of one model: parameters, rotary tables and the pages of each layer, bound together once."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        caches: Sequence[tuple[Tensor, Tensor]],
        *,
        max_model_len: int,
        states: Sequence[tuple[Tensor, Tensor]] = (),
    ):
        self.embedding = weights.embedding
        self.lm_head = weights.lm_head
        dtype, device = weights.embedding.dtype, weights.embedding.device
        tables = [
            rope_table(own.parameters, head_dim=own.head_dim, max_position=max_model_len, device=device) for own in spec.ropes
        ]
        inputs = [layer.input_norm for layer in weights.layers]
        self.first_norm = inputs[0]
        self.norm_eps = spec.norm_eps
        self.norm_offset = spec.norm_weight_offset
        self.logit_softcap = spec.logit_softcap
        # transformers multiplies by the scale rounded to the model's dtype: 55.4256 becomes 55.5 in bfloat16
        scale = spec.embedding_scale
        self.embedding_scale = None if scale is None else torch.tensor(scale, dtype=dtype).item()
        self.logit_scale = spec.logit_scale
        kept, carried = iter(caches), iter(states)
        self.layers = [
            DecoderLayer(spec, layer, own, next(carried if layer.mamba else kept), tables, next_norm)
            for layer, own, next_norm in zip(spec.layers, weights.layers, [*inputs[1:], weights.norm], strict=True)
        ]

    def forward(self, token_ids: Tensor, batch: Batch) -> Tensor:
        """Hidden states [T, H] after the final norm, of token ids [T]; stores their keys and values."""
        residual = embedding(token_ids, self.embedding)
        if self.embedding_scale is not None:
            residual.mul_(self.embedding_scale)
        hidden = rms_norm(residual, self.first_norm, eps=self.norm_eps, weight_offset=self.norm_offset)
        for layer in self.layers:
            hidden = layer(hidden, residual, batch)
        return hidden

    def plan(self, seqlens_k: Tensor, page_size: int, q_len: int = 1) -> tuple[Tensor, ...] | None:
        """The schedule of attention_decode for these lengths [B], from the device; None on a CPU or without attention."""
        layer = next((layer.spec for layer in self.layers if layer.spec.mamba is None), None)
        if layer is None or not seqlens_k.is_cuda:
            return None
        return attention_decode_plan(
            seqlens_k,
            num_heads_q=layer.num_heads,
            num_heads_kv=layer.num_kv_heads,
            head_dim=layer.head_dim,
            page_size=page_size,
            q_len=q_len,
            device=seqlens_k.device,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [n, V] of hidden states [n, H]."""
        logits = linear(hidden, self.lm_head).float()
        if self.logit_scale is not None:
            logits.mul_(self.logit_scale)
        if self.logit_softcap is not None:
            logits.div_(self.logit_softcap).tanh_().mul_(self.logit_softcap)
        return logits


class DecoderLayer:
    """Attention, or a Mamba mixer, and MLP of one layer; leaves the residual added and normed for the layer that follows."""

    __slots__ = (
        "attention_options",
        "cos_sin",
        "eps",
        "feed_forward",
        "fused",
        "head_split",
        "k_cache",
        "latent",
        "mamba",
        "next_norm",
        "offset",
        "residual_scale",
        "spec",
        "v_cache",
        "weights",
    )

    def __init__(
        self,
        model: ModelSpec,
        layer: LayerSpec,
        weights: LayerWeights,
        cache: tuple[Tensor, Tensor],
        tables: Sequence[Tensor],
        next_norm: Tensor,
    ):
        self.spec = layer
        self.weights = weights
        self.k_cache, self.v_cache = cache
        self.cos_sin = None if layer.rope is None or not tables else tables[layer.rope]
        self.next_norm = next_norm
        self.eps = model.norm_eps
        self.offset = model.norm_weight_offset
        self.residual_scale = model.residual_scale
        self.head_split = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
        self.feed_forward: Mlp | Experts | None = None
        if layer.experts is not None and weights.experts is not None:
            self.feed_forward = Experts(layer.experts, weights.experts)
        elif layer.mlp_size:
            self.feed_forward = Mlp(layer.activation, weights)
        self.mamba = None
        if layer.mamba is not None and weights.mamba is not None:
            self.mamba = MambaMixer(layer.mamba, weights.mamba, cache, eps=model.norm_eps)
        self.latent = None
        if layer.latent is not None and weights.latent is not None and self.cos_sin is not None:
            self.latent = LatentAttention(
                layer.latent,
                weights.latent,
                self.k_cache,
                self.cos_sin,
                heads=layer.num_heads,
                scale=layer.query_scale,
                eps=model.norm_eps,
            )
        self.fused = self.cos_sin is not None and self.cos_sin.device.type in FUSED
        # a window of w keys, the query's own included, leaves w - 1 to its left
        self.attention_options: dict[str, Any] = {
            "scale": layer.query_scale,
            "window": (-1 if layer.window is None else layer.window - 1, -1),
            "softcap": layer.attention_softcap,
        }

    def __call__(self, hidden: Tensor, residual: Tensor, batch: Batch) -> Tensor:
        """Normed [T, H] → normed for the next layer; adds to residual [T, H] in place."""
        own, eps, offset = self.weights, self.eps, self.offset
        mix = self.mamba or self.latent or self.attend
        hidden = linear(mix(hidden, batch), own.o, own.o_bias)
        if self.residual_scale is not None:
            hidden.mul_(self.residual_scale)
        if own.post_attention_norm is not None:
            rms_norm(hidden, own.post_attention_norm, eps=eps, weight_offset=offset, out=hidden)
        if self.feed_forward is None or own.mlp_norm is None:
            add_rms_norm(hidden, residual, self.next_norm, eps=eps, weight_offset=offset, out=(hidden, residual))
            return hidden
        add_rms_norm(hidden, residual, own.mlp_norm, eps=eps, weight_offset=offset, out=(hidden, residual))
        hidden = self.feed_forward(hidden)
        if self.residual_scale is not None:
            hidden.mul_(self.residual_scale)
        if own.post_mlp_norm is not None:
            rms_norm(hidden, own.post_mlp_norm, eps=eps, weight_offset=offset, out=hidden)
        add_rms_norm(hidden, residual, self.next_norm, eps=eps, weight_offset=offset, out=(hidden, residual))
        return hidden

    def attend(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Attention output [T, Hq·D] before the output projection; stores the new keys and values."""
        assert self.weights.qkv is not None
        qkv = linear(hidden, self.weights.qkv, self.weights.qkv_bias)
        q = self.store_fused(qkv, batch) if self.fused else self.store_in_place(qkv, batch)
        return self.attention(q, batch).view(hidden.shape[0], -1)

    def store_fused(self, qkv: Tensor, batch: Batch) -> Tensor:
        """Queries [T, Hq, D], normed and rotated; stores the keys, likewise, and the values."""
        own, caches = self.weights, (self.k_cache, self.v_cache)
        assert self.cos_sin is not None
        options: dict[str, Any] = {"eps": self.eps, "weight_offset": self.offset, "q_norm": own.q_norm, "k_norm": own.k_norm}
        q = rope_norm_store_kv(qkv, self.cos_sin, batch.positions, batch.slots, *caches, **options)
        assert isinstance(q, Tensor)
        return q

    def store_in_place(self, qkv: Tensor, batch: Batch) -> Tensor:
        """The same by separate operators, which overwrite qkv."""
        own = self.weights
        heads = qkv.view(qkv.shape[0], -1, self.spec.head_dim)
        q, k, v = split_with_sizes(heads, self.head_split, 1)
        if own.q_norm is not None and own.k_norm is not None:
            rms_norm(q, own.q_norm, eps=self.eps, weight_offset=self.offset, out=q)
            rms_norm(k, own.k_norm, eps=self.eps, weight_offset=self.offset, out=k)
        if self.cos_sin is not None:
            rope(q, k, self.cos_sin, batch.positions, out=(q, k))
        store_kv(k, v, self.k_cache, self.v_cache, batch.slots)
        return q

    def attention(self, q: Tensor, batch: Batch) -> Tensor:
        """attention_decode on the decode rows of q [T, Hq, D], attention_prefill_paged on the rest."""
        k_cache, v_cache, options = self.k_cache, self.v_cache, self.attention_options
        cu_seqlens_q, decodes = batch.cu_seqlens_q, batch.num_decodes
        if cu_seqlens_q is None:
            options = {"q_len": batch.q_len, "plan": batch.decode_plan, **options}
            return attention_decode(q, k_cache, v_cache, batch.page_table, batch.seqlens_k, **options)
        pages, seqlens, longest = batch.page_table, batch.seqlens_k, batch.max_seqlen_q
        if decodes == 0:
            return attention_prefill_paged(q, k_cache, v_cache, pages, cu_seqlens_q, seqlens, max_seqlen_q=longest, **options)
        out = torch.empty_like(q)
        attention_decode(
            q[:decodes],
            k_cache,
            v_cache,
            pages[:decodes],
            seqlens[:decodes],
            plan=batch.decode_plan,
            out=out[:decodes],
            **options,
        )
        attention_prefill_paged(
            q[decodes:],
            k_cache,
            v_cache,
            pages[decodes:],
            cu_seqlens_q,
            seqlens[decodes:],
            max_seqlen_q=longest,
            out=out[decodes:],
            **options,
        )
        return out
