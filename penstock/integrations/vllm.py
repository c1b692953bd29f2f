"""vLLM on our operators: `register`, an entry point of vllm.general_plugins, acts with PENSTOCK_VLLM=1.

    layer of the host                        registered as                            chosen by
    attention                                register_backend("PENSTOCK")             --attention-backend PENSTOCK
      on the CPU platform, which has one     register_backend(CPU_ATTN)               always
    ir.ops.rms_norm, fused_add_rms_norm      provider "penstock"                      --kernel-config ir_op_priority
    SiluAndMul, GeluAndMul                   CustomOp.register_oot                    always

What needs no vLLM stands here: the table, and the functions on plain tensors that its classes call. The classes of the
attention backend stand in vllm_attention.py, which vLLM imports by name.

Source: the plug-in interfaces of vLLM 0.32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.core import env
from penstock.ops.activation.gelu_and_mul import gelu_and_mul
from penstock.ops.activation.silu_and_mul import silu_and_mul
from penstock.ops.attention.decode import attention_decode
from penstock.ops.attention.prefill_paged import attention_prefill_paged
from penstock.ops.kvcache.store_kv import store_kv
from penstock.ops.norm.add_rms_norm import add_rms_norm
from penstock.ops.norm.rms_norm import rms_norm

BACKEND = "PENSTOCK"
BACKEND_CLASS = "penstock.integrations.vllm_attention.Backend"
PROVIDER = "penstock"


def register() -> None:
    """Registers attention, norms and activations with vLLM, when the environment variable PENSTOCK_VLLM is 1.

    vLLM calls it in every process, at times twice.
    """
    if env.VLLM.read() == "0":
        return
    from vllm import ir
    from vllm.model_executor.custom_op import CustomOp, op_registry_oot
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, BACKEND_CLASS)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND_CLASS)
    ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes_norm)(norm)
    ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_add_norm, inplace=True)(add_norm)
    for host, function in ((SiluAndMul, _silu), (GeluAndMul, _gelu)):
        if host.__name__ not in op_registry_oot:
            forwards = dict.fromkeys(("forward_native", "forward_cuda", "forward_cpu", "forward_oot"), function)
            CustomOp.register_oot(name=host.__name__)(type(f"Penstock{host.__name__}", (host,), forwards))


# ---- norms and activations


def _silu(self: Any, x: Tensor) -> Tensor:
    return silu_and_mul(x)


def _gelu(self: Any, x: Tensor) -> Tensor:
    return gelu_and_mul(x, approximate=self.approximate)


def _takes_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype in (x.dtype, torch.float32)


def _takes_add_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _takes_norm(x, weight, epsilon, variance_size)


def norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """ir.ops.rms_norm by rms_norm: one rounding, after the weight."""
    return rms_norm(x, weight, eps=epsilon)


def add_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """ir.ops.fused_add_rms_norm by add_rms_norm, written over x and x_residual."""
    return add_rms_norm(x, x_residual, weight, eps=epsilon, out=(x, x_residual))


# ---- attention


@dataclass(frozen=True)
class Batch:
    """The requests of one step: first those with `decode_len` new tokens each, then those with more.

    Args:
        tokens: rows of the step that are not padding.
        decodes: requests in front, decode_len tokens each.
        starts: [prefills + 1] int32 first rows of the others, counted from the end of those in front; None without any.
        longest: most new tokens of a request.
        seq_lens: [requests] int32, new tokens included.
        block_table: [requests, pages] int32.
        slots: [tokens] int32, where their keys and values go; -1 for padding.
    """

    tokens: int
    decodes: int
    decode_len: int
    starts: Tensor | None
    longest: int
    seq_lens: Tensor
    block_table: Tensor
    slots: Tensor


def split_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views [pages, page size, heads, dim] of keys and values; kv_cache is [pages, heads, page size, 2 · dim], any strides."""
    k_cache, v_cache = kv_cache.transpose(1, 2).chunk(2, -1)
    return k_cache, v_cache


def attend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    kv_cache: Tensor,
    batch: Batch,
    output: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Stores the new keys and values and attends: attention_decode for the requests in front, attention_prefill_paged after.

    Args:
        query: [rows, heads, dim]; rows past batch.tokens are padding and their output is left as it is.
        key, value: [rows, KV heads, dim], None when another layer has stored them.
        output: of query's shape.
        window: tokens that a query sees, itself included.
    """
    k_cache, v_cache = split_cache(kv_cache)
    if key is not None and value is not None:
        store_kv(key[: batch.tokens], value[: batch.tokens], k_cache, v_cache, batch.slots[: batch.tokens])
    options: dict[str, Any] = {
        "scale": scale,
        "window": (-1, -1) if window is None else (window - 1, -1),
        "softcap": softcap,
        "sinks": sinks,
    }
    front = batch.decodes * batch.decode_len
    if batch.decodes:
        requests = batch.block_table[: batch.decodes], batch.seq_lens[: batch.decodes]
        out = output[:front]
        attention_decode(query[:front], k_cache, v_cache, *requests, q_len=batch.decode_len, out=out, **options)
    if batch.starts is not None:
        tensors = batch.block_table[batch.decodes :], batch.starts, batch.seq_lens[batch.decodes :]
        rows, out = query[front : batch.tokens], output[front : batch.tokens]
        attention_prefill_paged(rows, k_cache, v_cache, *tensors, max_seqlen_q=batch.longest, out=out, **options)
    return output
