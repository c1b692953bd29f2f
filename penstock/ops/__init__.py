"""The catalogue: one plain import line per public operator, nothing else."""

from penstock.ops.activation.gelu_and_mul import gelu_and_mul as gelu_and_mul
from penstock.ops.activation.silu_and_mul import silu_and_mul as silu_and_mul
from penstock.ops.kvcache.copy_pages import copy_pages as copy_pages
from penstock.ops.kvcache.gather_kv import gather_kv as gather_kv
from penstock.ops.kvcache.store_kv import store_kv as store_kv
from penstock.ops.norm.add_rms_norm import add_rms_norm as add_rms_norm
from penstock.ops.norm.rms_norm import rms_norm as rms_norm
from penstock.ops.rotary.rope import rope as rope
from penstock.ops.rotary.table import rope_table as rope_table
from penstock.ops.sampling.sample import sample as sample
