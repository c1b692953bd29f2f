"""Error of attention in FP8 and in bfloat16 against float64, on long requests whose keys have outlier channels.

PYTHONPATH=. python benchmarks/fp8_attention_error.py [keys]        # without a GPU it sets TRITON_INTERPRET=1 itself

The inputs are bfloat16; what is compared is ‖out - exact‖ / ‖exact‖ of the last 64 queries of one KV head with four query
heads, where exact is attention in float64 of the same inputs.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from penstock.core.formats import FP8_TENSOR, FP8_TOKEN
from penstock.ops import attention_prefill_paged, hadamard, quantize

QUERIES, HEADS, D, PAGE = 64, 4, 128, 128
OUTLIERS = (3, 41, 77, 126)


def draw(keys: int, boost: float, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v in bfloat16; `boost` multiplies four channels of k and divides them in q, so that the scores stay."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, D, generator=generator) for n, heads in ((QUERIES, HEADS), (keys, 1), (keys, 1)))
    k[:, :, OUTLIERS] *= boost
    q[:, :, OUTLIERS] /= boost
    return tuple(x.to(torch.bfloat16).to(device) for x in (q, k, v))


def paged(x: torch.Tensor) -> torch.Tensor:
    """[keys, 1, ...] as pages [P, S, 1, ...]."""
    return x.unflatten(0, (-1, PAGE))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scales: dict[str, torch.Tensor], impl: str) -> torch.Tensor:
    keys, device = k.shape[0], q.device
    return attention_prefill_paged(
        q,
        paged(k),
        paged(v),
        torch.arange(keys // PAGE, dtype=torch.int32, device=device)[None],
        torch.tensor([0, QUERIES], dtype=torch.int32, device=device),
        torch.tensor([keys], dtype=torch.int32, device=device),
        max_seqlen_q=QUERIES,
        impl=impl,
        **scales,
    )


def schemes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    """(name, q, k, v, scales) of each way to keep the inputs."""
    yield "bfloat16", q, k, v, {}
    v8, v_scale = quantize(v.view(1, -1), format=FP8_TENSOR)
    v8 = v8.view_as(v)

    def fp8(q, k, per_token):
        if not per_token:
            q8, q_scale = quantize(q.reshape(1, -1), format=FP8_TENSOR)
            k8, k_scale = quantize(k.reshape(1, -1), format=FP8_TENSOR)
            return q8.view_as(q), k8.view_as(k), v8, {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        q8, q_scale = quantize(q, format=FP8_TOKEN)
        k8, k_scale = quantize(k, format=FP8_TOKEN)
        return q8, k8, v8, {"q_scale": q_scale, "k_scale": paged(k_scale), "v_scale": v_scale}

    yield "FP8, a scale for each tensor", *fp8(q, k, False)
    yield "FP8, a scale for each token and head", *fp8(q, k, True)
    yield "the same, q and k rotated", *fp8(hadamard(q), hadamard(k), True)


def main() -> None:
    keys = int(sys.argv[1]) if len(sys.argv) > 1 else 32768
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{keys} keys, D {D}, {device}\n\n| outliers | kept as | relative error | of bfloat16's |\n|---|---|---|---|")
    for boost in (1.0, 20.0):
        q, k, v = draw(keys, boost, device)
        exact = attend(q.double().cpu(), k.double().cpu(), v.double().cpu(), {}, "reference")
        base = None
        for name, *call in schemes(q, k, v):
            out = attend(*call, "triton").double().cpu()
            error = float((out - exact).norm() / exact.norm())
            base = base or error
            print(f"| {boost:g}x | {name} | {error:.2e} | {error / base:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
