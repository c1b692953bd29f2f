"""Normalisation of the last dimension: rms_norm, add_rms_norm.

`rms_norm_triton.py` and `rms_norm_cpu.py` serve both: the residual sum is a switch of the same pass.
"""
