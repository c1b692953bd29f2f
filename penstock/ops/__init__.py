"""The catalogue: one plain import line per public operator, nothing else."""

from penstock.ops.activation.gelu_and_mul import gelu_and_mul as gelu_and_mul
from penstock.ops.activation.silu_and_mul import silu_and_mul as silu_and_mul
from penstock.ops.activation.silu_and_mul_quant import silu_and_mul_quant as silu_and_mul_quant
from penstock.ops.attention.decode import attention_decode as attention_decode
from penstock.ops.attention.decode_plan import attention_decode_plan as attention_decode_plan
from penstock.ops.attention.merge import merge_attention as merge_attention
from penstock.ops.attention.prefill import attention_prefill as attention_prefill
from penstock.ops.attention.prefill_paged import attention_prefill_paged as attention_prefill_paged
from penstock.ops.kvcache.copy_pages import copy_pages as copy_pages
from penstock.ops.kvcache.gather_kv import gather_kv as gather_kv
from penstock.ops.kvcache.store_kv import store_kv as store_kv
from penstock.ops.matmul.grouped_gemm import grouped_gemm as grouped_gemm
from penstock.ops.moe.fused_moe import fused_moe as fused_moe
from penstock.ops.moe.route import moe_route as moe_route
from penstock.ops.norm.add_rms_norm import add_rms_norm as add_rms_norm
from penstock.ops.norm.layer_norm import layer_norm as layer_norm
from penstock.ops.norm.rms_norm import rms_norm as rms_norm
from penstock.ops.norm.rms_norm_quant import rms_norm_quant as rms_norm_quant
from penstock.ops.quantization.dequantize import dequantize as dequantize
from penstock.ops.quantization.hadamard import hadamard as hadamard
from penstock.ops.quantization.quantize import quantize as quantize
from penstock.ops.rotary.rope import rope as rope
from penstock.ops.rotary.table import rope_table as rope_table
from penstock.ops.sampling.apply_penalties import apply_penalties as apply_penalties
from penstock.ops.sampling.log_probs import log_probs as log_probs
from penstock.ops.sampling.sample import sample as sample
