"""Gated activations: silu_and_mul, gelu_and_mul, silu_and_mul_quant.

The input's last dimension holds the gate, then the factor: x = [gate | up], each C wide; the result is C wide. Leading
dimensions are any; statistics there are none, so rows are independent.

`gated_triton.py` holds the one kernel that the first two use.
"""
