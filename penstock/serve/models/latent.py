"""Multi-head latent attention: the cache holds one row [latent | rotated key] of a token for all its heads.

Decoding multiplies each head's query by its up-projection of the keys and attends to the latents themselves (mla_decode).
Prompts have too many queries for that: their keys and values are restored from the latents, and attention_prefill runs.
"""

import torch
from torch import Tensor, split_with_sizes

from penstock.ops import attention_prefill, gather_kv, mla_decode, rms_norm, rope, store_kv
from penstock.serve.models.batch import Batch
from penstock.serve.models.linear import linear
from penstock.serve.models.parameters import LatentWeights
from penstock.serve.models.spec import LatentSpec


class LatentAttention:
    """One layer's latent attention, bound to its parameters and its cache [P, S, 1, rank + rope_dim]."""

    __slots__ = ("cache", "cos_sin", "eps", "heads", "scale", "spec", "up_keys", "up_values", "weights")

    def __init__(
        self, spec: LatentSpec, weights: LatentWeights, cache: Tensor, cos_sin: Tensor, *, heads: int, scale: float, eps: float
    ):
        self.spec = spec
        self.weights = weights
        self.cache = cache
        self.cos_sin = cos_sin
        self.heads = heads
        self.scale = scale
        self.eps = eps
        assert isinstance(weights.kv_b, Tensor)
        up = weights.kv_b.view(heads, spec.nope_dim + spec.value_dim, spec.rank)
        self.up_keys, self.up_values = split_with_sizes(up, (spec.nope_dim, spec.value_dim), 1)

    def __call__(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Attention output [T, Hq · value_dim] before the output projection; stores the new rows."""
        spec, total, decodes = self.spec, hidden.shape[0], batch.num_decodes
        q = self._queries(hidden).view(total, self.heads, -1)
        q_nope, q_rope = split_with_sizes(q, (spec.nope_dim, spec.rope_dim), 2)
        row = linear(hidden, self.weights.kv_a, self.weights.kv_a_bias)
        latent, k_rope = split_with_sizes(row, (spec.rank, spec.rope_dim), 1)
        rms_norm(latent, self.weights.kv_norm, eps=self.eps, out=latent)
        k_rope = k_rope[:, None]
        rope(q_rope, k_rope, self.cos_sin, batch.positions, interleaved=spec.interleaved, out=(q_rope, k_rope))
        latents, rotated = split_with_sizes(self.cache, (spec.rank, spec.rope_dim), 3)
        store_kv(latent[:, None], k_rope, latents, rotated, batch.slots)
        if batch.cu_seqlens_q is None:
            return self._decode(q_nope, q_rope, batch, total)
        out = hidden.new_empty(total, self.heads * spec.value_dim)
        if decodes:
            out[:decodes] = self._decode(q_nope[:decodes], q_rope[:decodes], batch, decodes)
        out[decodes:] = self._prefill(q[decodes:], batch)
        return out

    def _queries(self, hidden: Tensor) -> Tensor:
        own = self.weights
        if own.q_a is None or own.q_norm is None or own.q_b is None:
            assert own.q is not None
            return linear(hidden, own.q)
        return linear(rms_norm(linear(hidden, own.q_a, own.q_a_bias), own.q_norm, eps=self.eps), own.q_b)

    def _decode(self, q_nope: Tensor, q_rope: Tensor, batch: Batch, decodes: int) -> Tensor:
        q_latent = torch.einsum("bhd,hdc->bhc", q_nope, self.up_keys)
        out = mla_decode(
            q_latent,
            q_rope,
            self.cache[:, :, 0],
            batch.page_table[:decodes],
            batch.seqlens_k[:decodes],
            q_len=batch.q_len,
            scale=self.scale,
            plan=batch.decode_plan,
        )
        return torch.einsum("bhc,hdc->bhd", out, self.up_values).reshape(decodes, -1)

    def _prefill(self, q: Tensor, batch: Batch) -> Tensor:
        spec, decodes = self.spec, batch.num_decodes
        assert batch.cu_seqlens_q is not None
        seqlens = batch.seqlens_k[decodes:]
        ends = torch.nn.functional.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
        lengths = seqlens.tolist()
        rows = gather_kv(self.cache, batch.page_table[decodes:], seqlens, ends, total=sum(lengths))[:, 0]
        latent, k_rope = split_with_sizes(rows, (spec.rank, spec.rope_dim), 1)
        up = linear(latent, self.weights.kv_b).view(len(rows), self.heads, -1)
        k_nope, values = split_with_sizes(up, (spec.nope_dim, spec.value_dim), 2)
        keys = torch.cat([k_nope, k_rope[:, None].expand(-1, self.heads, -1)], -1)
        out = attention_prefill(
            q,
            keys,
            values,
            batch.cu_seqlens_q,
            ends,
            max_seqlen_q=batch.max_seqlen_q,
            max_seqlen_k=max(lengths),
            scale=self.scale,
        )
        return out.reshape(len(q), -1)
