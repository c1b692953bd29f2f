"""Matrix products: gemm_fp8, gemm_int8, gemm_bf16_fp32 with split_fp32, and grouped_gemm for mixtures of experts.

Weights are [N, K], one row an output channel, as torch.nn.Linear has them: y = x · wᵀ. K is contiguous in both operands,
which is what FP8 and INT8 tensor cores want. `penstock.core.formats` says what the scales mean.

swap      with few tokens the product is computed transposed, w · xᵀ: a tensor-core instruction takes at least 64 rows of its
          first operand but as few as 16 of the second, and weights are never few
split     with few tiles K is divided among programs; the last to finish a tile adds the parts in a fixed order
"""
