"""The catalogue: one plain import line per public operator, nothing else."""

from penstock.ops.norm.rms_norm import rms_norm as rms_norm
