"""The Python interface of hpc-ops over our operators: what `import hpc` finds with PENSTOCK_HPC=1.

vLLM and SGLang call hpc-ops by its module name, `hpc`. `install`, an entry point of both, puts this module under that name in
every worker process, so that their own integrations of hpc-ops run on our operators. Names, argument orders and layouts are
those of hpc-ops; what no operator covers is there too and raises NotSupported with its name.

Layouts: caches [pages, page size, KV heads, head dim], NHD or HND by strides, any page size that is a power of two; block
tables [requests, pages]; scales of queries [requests, heads, padded length] in a prefill and [rows, heads] in decode; a scale
multiplies the stored value back. Where hpc-ops wants unused slots of a page to be zero, ours may hold anything.

Source: the public interface of hpc-ops (github.com/Tencent/hpc-ops, hpc/*.py and its tests), commit 6e2eced.
"""

import importlib.util
import sys
from enum import IntEnum
from typing import Any, NoReturn

import torch
from torch import Tensor

from penstock.core import env
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR
from penstock.integrations.hpc_ops_attention import (
    QuantType,
    assign_attention_decode_task,
    attention_decode_bf16,
    attention_decode_fp8,
    attention_prefill_bf16,
    attention_with_kvcache_blocksparse_prefill_fp8,
    attention_with_kvcache_prefill_bf16,
    attention_with_kvcache_prefill_fp8,
    get_attention_decode_task_workspace,
    rope_norm_store_kv,
    rope_norm_store_kv_fp8,
)
from penstock.integrations.hpc_ops_attention import refuse as _refuse
from penstock.integrations.hpc_ops_moe import (
    fuse_moe,
    fuse_moe_blockwise,
    fuse_moe_blockwise_fp8,
    fuse_moe_pertensor_fp8,
    group_gemm_blockwise_fp8,
    group_gemm_fp8,
    group_gemm_pertensor_fp8,
    reformat_x_scale,
)
from penstock.ops.activation.silu_and_mul_quant import silu_and_mul_quant as _silu_and_mul_quant
from penstock.ops.matmul.counters import gemm_counters as _gemm_counters
from penstock.ops.matmul.gemm_bf16_fp32 import gemm_bf16_fp32 as _gemm_bf16_fp32
from penstock.ops.norm.rms_norm import rms_norm as _rms_norm
from penstock.ops.norm.rms_norm_quant import rms_norm_quant as _rms_norm_quant
from penstock.ops.quantization.quantize import quantize as _quantize
from penstock.ops.sampling.sample import sample as _sample

__all__ = [
    "QuantType",
    "SoftmaxPolicy",
    "act_mul_and_quant",
    "assign_attention_decode_task",
    "attention_decode_bf16",
    "attention_decode_fp8",
    "attention_prefill_bf16",
    "attention_with_kvcache_blocksparse_prefill_fp8",
    "attention_with_kvcache_prefill_bf16",
    "attention_with_kvcache_prefill_fp8",
    "fuse_moe",
    "fuse_moe_blockwise",
    "fuse_moe_blockwise_fp8",
    "fuse_moe_pertensor_fp8",
    "fused_rmsnorm_with_scale",
    "fused_sampler",
    "gemm_bf16xfp32",
    "get_attention_decode_task_workspace",
    "get_gemm_bf16xfp32_workspace",
    "group_gemm_blockwise_fp8",
    "group_gemm_fp8",
    "group_gemm_pertensor_fp8",
    "masked_act_mul_and_blockwise_quant",
    "masked_act_mul_and_quant",
    "reformat_x_scale",
    "rope_norm_store_kv",
    "rope_norm_store_kv_fp8",
    "scaled_fp8_quant",
]
__version__ = "penstock"
MODULES = ("act", "allreduce", "attention", "fuse_moe", "gemm", "group_gemm", "normalization", "rope", "sampler", "stem")
NOT_COVERED = {
    "print_attention_decode_task": "task maps of hpc-ops' own schedule",
    "count_and_gather": "a single stage of a mixture of experts",
    "reduce": "a single stage of a mixture of experts",
    "fuse_allreduce_rmsnorm_high_throughput": "communication",
    "fuse_allreduce_rmsnorm_low_latency": "communication",
    "empty_multimem": "communication",
    "stem_oam_prep_paged_kv": "block selection for sparse attention",
    "stem_oam_prep_varlen_q": "block selection for sparse attention",
    "stem_oam_gemm": "block selection for sparse attention",
    "stem_tpd": "block selection for sparse attention",
    "stem_paged_kv": "block selection for sparse attention",
}


def install() -> None:
    """Makes this module `import hpc`, when the environment variable PENSTOCK_HPC is 1; otherwise does nothing.

    An entry point of vllm.general_plugins and sglang.srt.plugins; calling it again changes nothing.
    Raises: RuntimeError when hpc-ops itself is installed: it is never shadowed.
    """
    this = sys.modules[__name__]
    if env.HPC.read() == "0" or sys.modules.get("hpc") is this:
        return
    spec = None if "hpc" in sys.modules else importlib.util.find_spec("hpc")
    found = sys.modules.get("hpc") or spec
    if found is not None:
        raise RuntimeError(f"PENSTOCK_HPC=1, but there is a module `hpc` already: {found}; uninstall it or unset the variable")
    for name in ("hpc", *(f"hpc.{module}" for module in MODULES)):
        sys.modules[name] = this


def __getattr__(name: str) -> Any:
    # Hosts ask with getattr whether the build they found has a function: one that hpc-ops does not publish is not there.
    if name in MODULES and name not in NOT_COVERED:
        return sys.modules[__name__]
    if name not in NOT_COVERED:
        raise AttributeError(f"module 'hpc' (penstock.integrations.hpc_ops) has no attribute {name!r}")

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name, NOT_COVERED[name])

    return refuse


class SoftmaxPolicy(IntEnum):
    """Where fused_sampler normalises: nowhere, over the vocabulary, or over what top-k left."""

    NONE = 0
    BEFORE_TOPK = 1
    AFTER_TOPK = 2


# ---- norm, activation, quantisation


def fused_rmsnorm_with_scale(
    a: Tensor,
    weight: Tensor,
    eps: float = torch.finfo(torch.float32).eps,
    scale: Tensor | None = None,
    is_moe: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """RMSNorm(a) / scale[0] in FP8; with is_moe (RMSNorm(a) in float32, / scale[0] in FP8, / scale[1] in FP8)."""
    weight = weight.view(-1)
    scale = torch.ones(1, device=a.device) if scale is None else scale.to(a.device)
    if not is_moe:
        return _rms_norm_quant(a, weight, format=FP8_TENSOR, scale=scale[:1], eps=eps)[0]
    wide = _rms_norm(a.float(), weight.float(), eps=eps)
    first, second = (_quantize(wide, format=FP8_TENSOR, scale=one)[0] for one in (scale[:1], scale[1:2]))
    return wide, first, second


def act_mul_and_quant(gate_up: Tensor, scale: Tensor, use_bf16_mul: bool = True, output: Tensor | None = None) -> Tensor:
    """silu(gate) · up · scale[0] in FP8; the product is float32 whatever use_bf16_mul says, which is more exact."""
    return _silu_and_mul_quant(gate_up, format=FP8_TENSOR, scale=scale.view(-1)[:1].reciprocal(), out=(output, None))[0]


def masked_act_mul_and_quant(gate_up: Tensor, scale: Tensor, num_per_expert: Tensor, output: Tensor | None = None) -> Tensor:
    """act_mul_and_quant of experts' rows, padded to one length; rows past an expert's number are computed too."""
    return act_mul_and_quant(gate_up, scale, output=output)


def masked_act_mul_and_blockwise_quant(
    gate_up: Tensor, num_per_expert: Tensor, output: Tensor | None = None, output_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(silu(gate) · up in FP8, a scale for each 128 columns) of experts' padded rows; a row of zeros has scale 1."""
    return _silu_and_mul_quant(gate_up, format=FP8_BLOCK, out=(output, output_scale))


def scaled_fp8_quant(input: Tensor, scale: Tensor, output: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(input / scale in FP8, scale)."""
    return _quantize(input, format=FP8_TENSOR, scale=scale.view(1), out=(output, None))


# ---- products


def get_gemm_bf16xfp32_workspace(max_weight_hidden_size: int, max_tokens: int = 131072) -> Tensor:
    """Zeros that gemm_bf16xfp32 leaves zero; their number does not depend on the sizes."""
    return _gemm_counters("cuda" if torch.cuda.is_available() else "cpu")


def gemm_bf16xfp32(
    x: Tensor,
    w_high: Tensor,
    w_low: Tensor,
    scale: Tensor | float,
    use_fp32_output: bool = False,
    use_splitk: bool = True,
    split_flag: Tensor | None = None,
) -> Tensor:
    """x · (w_high + w_low / 256)ᵀ by gemm_bf16_fp32, in float32 or bfloat16; scale must be 1 / 256 and is read by the host."""
    if float(scale) != 1 / 256:
        _refuse("gemm_bf16xfp32", f"scale={float(scale)}; the low part is 256 times what the high part left")
    dtype = torch.float32 if use_fp32_output else torch.bfloat16
    return _gemm_bf16_fp32(x, w_high, w_low, out_dtype=dtype, counters=split_flag)


# ---- sampling


def fused_sampler(
    logits: Tensor,
    *,
    penalty_mask: Tensor | None = None,
    slot_id: Tensor | None = None,
    repetition_penalty: Tensor | float = 0.0,
    temperature: Tensor | float = 0.0,
    softmax_policy: SoftmaxPolicy = SoftmaxPolicy.NONE,
    topk: Tensor | int = 0,
    topp: Tensor | float = 0.0,
    max_topk: int = 32,
    gumbel_noise: Tensor | None = None,
    draft_token_ids: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """One id a row [B, 1], from the top `topk` (0: max_topk) and of these the top `topp` (0: all), by `sample`.

    The distribution is that of hpc-ops; a seed gives other draws than there, and the same ones in every batch. With a
    temperature alone the draw is from the whole vocabulary.
    """
    asked = {
        "penalty_mask": penalty_mask is not None or slot_id is not None or not _is_zero(repetition_penalty),
        "gumbel_noise": gumbel_noise is not None,
        "draft_token_ids": draft_token_ids is not None,
        "softmax_policy=BEFORE_TOPK": softmax_policy == SoftmaxPolicy.BEFORE_TOPK,
    }
    for name, given in asked.items():
        if given:
            _refuse("fused_sampler", name)
    if max_topk not in (32, 64) or seed <= 0:
        raise ValueError(f"max_topk must be 32 or 64 and seed above 0, got {max_topk} and {seed}")
    if not _is_zero(topp) and softmax_policy == SoftmaxPolicy.NONE:
        raise ValueError("topp needs softmax_policy=AFTER_TOPK: without a softmax there are no probabilities")
    alone = _is_zero(topk) and _is_zero(topp) and softmax_policy == SoftmaxPolicy.NONE and not _is_zero(temperature)
    kept: Tensor | int = 0
    if not alone:
        inside = (topk > 0) & (topk <= max_topk) if isinstance(topk, Tensor) else 0 < topk <= max_topk
        kept = torch.where(inside, topk, max_topk).int() if isinstance(inside, Tensor) else topk if inside else max_topk
    mass = torch.where(topp > 0, topp, 1.0) if isinstance(topp, Tensor) else topp or 1.0
    heat = torch.where(temperature > 0, temperature, 1.0) if isinstance(temperature, Tensor) else temperature or 1.0
    rows = torch.arange(logits.shape[0], device=logits.device)
    options = {"temperature": heat, "top_k": kept, "top_p": mass}
    return _sample(logits, **options, seeds=torch.full_like(rows, seed), offsets=rows)[:, None]


def _is_zero(value: Tensor | float) -> bool:
    return not isinstance(value, Tensor) and value == 0
