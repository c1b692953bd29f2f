"""Quantisation to 8 bits and back: quantize, dequantize; and the rotation that prepares for it: hadamard.

x ≈ q · scale. `penstock.core.formats` says what shares a scale and how the numbers are rounded; it is the reference here.

format          stored          shape of the scales of x [..., K]
FP8_TENSOR      float8_e4m3fn   [1]
FP8_TOKEN       float8_e4m3fn   [...]
FP8_BLOCK       float8_e4m3fn   [..., ⌈K/128⌉]; with weight=True, x [..., N, K]: [..., ⌈N/128⌉, ⌈K/128⌉]
INT8_TOKEN      int8            [...]
INT8_CHANNEL    int8            [...]: a row of a weight [N, K] is an output channel
"""
