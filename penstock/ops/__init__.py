"""The catalogue: one plain import line per public operator, nothing else."""
