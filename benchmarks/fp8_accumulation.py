"""The error of FP8 products against float64 on the dequantised operands, with and without exact accumulation, and of torch's.

PYTHONPATH=. python benchmarks/fp8_accumulation.py
"""

import argparse

import torch

from penstock.core.cases import Make
from penstock.core.formats import FP8_BLOCK, FP8_TENSOR
from penstock.ops import gemm_fp8, quantize


def main() -> None:
    """Prints the root mean square and the largest error, as shares of the root mean square of the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--depths", type=int, nargs="+", default=[1024, 4096, 16384])
    options = parser.parse_args()
    make = Make(options.device)
    for shift in (0.0, 1.0):
        for K in options.depths:
            x = make.randn(options.rows, K, dtype=torch.float32) + shift
            w = make.randn(1024, K, dtype=torch.float32) + shift
            for format in (FP8_TENSOR, FP8_BLOCK):
                x8, xs = quantize(x, format=format)
                w8, ws = quantize(w, format=format, weight=format is FP8_BLOCK)
                exact = gemm_fp8(x8.double(), w8.double(), xs.double(), ws.double(), format=format, impl="reference")
                size = exact.square().mean().sqrt()

                def show(name: str, y: torch.Tensor, exact=exact, size=size, K=K, shift=shift, format=format) -> None:
                    error = (y.double() - exact) / size
                    rms, most = float(error.square().mean().sqrt()), float(error.abs().max())
                    print(f"mean {shift:g} K {K:>5} {format.name:<10} {name:<22} rms {rms:.1e} max {most:.1e}")

                for exactly in (False, True):
                    y = gemm_fp8(
                        x8, w8, xs, ws, format=format, out_dtype=torch.float32, exact_accumulation=exactly, impl=options.impl
                    )
                    show("exact accumulation" if exactly else "fast accumulation", y)
                if format is FP8_TENSOR and x.is_cuda:
                    for fast in (True, False):
                        y = torch._scaled_mm(x8, w8.t(), xs, ws, out_dtype=torch.float32, use_fast_accum=fast)
                        show(f"torch, {'fast' if fast else 'not fast'}", y)


if __name__ == "__main__":
    main()
