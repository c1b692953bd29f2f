"""Normalisation of the last dimension: rms_norm, add_rms_norm, rms_norm_quant, layer_norm.

`rms_norm_triton.py` and `rms_norm_cpu.py` serve the first two: the residual sum is a switch of the same pass.
"""
