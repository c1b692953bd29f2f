"""The catalogue: one plain import line per public operator, nothing else."""

from penstock.ops.attention.decode import attention_decode as attention_decode
from penstock.ops.attention.decode_plan import attention_decode_plan as attention_decode_plan
from penstock.ops.attention.merge import merge_attention as merge_attention
from penstock.ops.attention.prefill import attention_prefill as attention_prefill
from penstock.ops.attention.prefill_paged import attention_prefill_paged as attention_prefill_paged
from penstock.ops.norm.rms_norm import rms_norm as rms_norm
