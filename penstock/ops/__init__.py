"""The catalogue: one plain import line per public operator, nothing else."""

from penstock.ops.norm.rms_norm import rms_norm as rms_norm
from penstock.ops.sampling.apply_penalties import apply_penalties as apply_penalties
from penstock.ops.sampling.log_probs import log_probs as log_probs
from penstock.ops.sampling.sample import sample as sample
