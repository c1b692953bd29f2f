"""q, k = hadamard(rope(norm(q))), likewise k; k and v go into their slots of the cache: what stands between two matmuls."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES, anything, boolean, positive
from penstock.core.formats import FORMATS, FP8_TENSOR, FP8_TOKEN, Format, name_of
from penstock.core.op import NotSupported, op
from penstock.ops.kvcache.layout import FP8, KVLayout
from penstock.ops.kvcache.store_kv import cache_fault, store_kv

SPEC = {
    "qkv": ("T C", FLOATS),
    "cos_sin": ("M 2*R_half", (torch.float32, torch.float64)),
    "positions": ("T", INDICES),
    "slots": ("T", INDICES),
    "k_cache": ("P S Hkv D", (*FLOATS, FP8)),
    "v_cache": ("P S Hkv D", (*FLOATS, FP8)),
    "q_norm?": ("D", ("qkv", torch.float32)),
    "k_norm?": ("D", ("qkv", torch.float32)),
    "k_scale": anything,
    "v_scale": anything,
    "out?": ("T Hq D", (*FLOATS, FP8)),
    "out_scale?": ("T Hq", (torch.float32, torch.float64)),
    "eps": positive,
    "weight_offset": anything,
    "norm_first": boolean,
    "interleaved": boolean,
    "hadamard": boolean,
    "format": anything,
}


@op(
    "(Tensor(a!) out, Tensor(b!)? out_scale, Tensor qkv, Tensor cos_sin, Tensor positions, Tensor slots, Tensor(c!) k_cache, "
    "Tensor(d!) v_cache, Tensor? q_norm, Tensor? k_norm, Tensor(e!)? k_scale, Tensor? v_scale, float eps, float weight_offset, "
    "bool norm_first, bool interleaved, bool hadamard, str? format) -> ()",
    SPEC,
)
def rope_norm_store_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    norm_first: bool = True,
    interleaved: bool = False,
    hadamard: bool = False,
    format: Format | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Per-head norms and rotation of queries and keys, and the paged store of keys and values, in one pass over memory.

    Everything between the input and the result is float32, rounded once.

    Args:
        qkv: [T, (Hq + 2·Hkv)·D] float16, bfloat16 or float32: the heads of q, then k, then v; any stride between tokens.
        cos_sin: [max_position, R] float32 (`rope_table`); R even, R <= D. Dimensions from R on do not turn.
        positions: [T] int32; a negative position does not turn.
        slots: [T] int32: page · S + offset; a negative slot stores nothing. Slots must differ from each other.
        k_cache: [P, S, Hkv, D] in qkv.dtype, with a format float8_e4m3fn; any order by strides (`KVLayout`).
        v_cache: [P, S, Hkv, D] in k_cache.dtype; any order, transposed inside its pages included.
        q_norm: [D] weight of the root-mean-square norm of each query head, dtype of qkv or float32; None for no norm.
        k_norm: likewise of each key head.
        eps: added to the mean square.
        weight_offset: added to the weights; 1.0 for Gemma.
        norm_first: the norm comes before the rotation (Qwen3, Gemma 3); False: after it (Hunyuan).
        interleaved: pairs are dimensions (2i, 2i + 1) instead of (i, i + R/2).
        hadamard: last, q and k go through the orthonormal Walsh-Hadamard transform of a head, which leaves their products as
            they are and spreads outliers before quantisation; D a power of two.
        format: None; FP8_TENSOR or FP8_TOKEN store 8 bits as `store_kv` does, and quantise q by token and head.
        k_scale: float32: FP8_TENSOR [1] or [Hkv]; FP8_TOKEN [P, S, Hkv], a cache that is written in the same slots.
        v_scale: [1] or [Hkv] float32, with either format.
        out: [T, Hq, D] in qkv.dtype; with a format (q, q_scale), either None for a new tensor.
        impl: "auto", "triton", "cpu" or "reference".
    Returns: q [T, Hq, D] in qkv.dtype; with a format (q, q_scale): float8_e4m3fn and float32 [T, Hq], x ≈ q · q_scale.
    Raises: ContractError when shapes or dtypes disagree; NotSupported for other formats, for the transform of a D that is no
        power of two, or when no implementation takes the call.
    Source: Su et al., arXiv:2104.09864; Henry et al., arXiv:2010.04245 (QK-norm); Ashkboos et al., arXiv:2404.00456 (Hadamard).
    """
    if format not in (None, FP8_TENSOR, FP8_TOKEN):
        raise NotSupported(
            f"rope_norm_store_kv: format {name_of(format)}: a cache is kept as it is, in FP8_TENSOR or FP8_TOKEN"
        )
    D = k_cache.shape[-1]
    if hadamard and D & (D - 1):
        raise NotSupported(f"rope_norm_store_kv: the Hadamard transform needs a head dimension that is a power of two, got {D}")
    name = None if format is None else format.name
    q, q_scale = out if isinstance(out, tuple) else (out, None)
    scales, options = (k_scale, v_scale), (eps, weight_offset, norm_first, interleaved, hadamard, name)
    inputs = (qkv, cos_sin, positions, slots, k_cache, v_cache, q_norm, k_norm, *scales)
    launch = rope_norm_store_kv.pick(impl, *inputs, q, q_scale, *options)
    shape = (qkv.shape[0], qkv.shape[1] // D - 2 * k_cache.shape[2], D)
    if q is None:
        q = torch.empty(shape, dtype=qkv.dtype if format is None else format.dtype, device=qkv.device)
    if format is None:
        launch(q, None, *inputs, *options)
        return q
    if q_scale is None:
        q_scale = torch.empty(shape[:2], dtype=torch.promote_types(qkv.dtype, torch.float32), device=qkv.device)
    launch(q, q_scale, *inputs, *options)
    return q, q_scale


@rope_norm_store_kv.relation
def _relation(
    qkv: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Any,
    v_scale: Any,
    out: Tensor | None,
    out_scale: Tensor | None,
    format: str | None,
    **others: object,
) -> tuple[str, str] | None:
    Hkv, D = k_cache.shape[2:]
    heads, rest = divmod(qkv.shape[1], D) if D else (0, 1)
    if rest or heads < 2 * Hkv:
        return "qkv", f"must be [T, (Hq + 2·Hkv)·D] with Hkv={Hkv}, D={D}, got {list(qkv.shape)}"
    if cos_sin.shape[1] > D:
        return "cos_sin", f"must be [max_position, R] with R <= D={D}, got {list(cos_sin.shape)}"
    wanted = qkv.dtype if format is None else FORMATS[format].dtype
    if out is not None and (out.dtype is not wanted or out.shape[1] != heads - 2 * Hkv):
        got = f"{out.dtype}{list(out.shape)}"
        return "out", f"must be {wanted}[T, Hq={heads - 2 * Hkv}, D] with format={format}, got {got}"
    if format is None and out_scale is not None:
        return "out", "must be one tensor without a format"
    return cache_fault(qkv.dtype, k_cache, v_cache, format, k_scale, v_scale)


@rope_norm_store_kv.reference
def _reference(
    qkv: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    eps: float,
    weight_offset: float,
    norm_first: bool,
    interleaved: bool,
    hadamard: bool,
    format: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    (Hkv, D), half = k_cache.shape[2:], cos_sin.shape[1] // 2
    wide = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.reshape(qkv.shape[0], qkv.shape[1] // D, D)
    q, k, v = heads.to(wide).split((heads.shape[1] - 2 * Hkv, Hkv, Hkv), 1)
    rows, padding = cos_sin[positions.clamp(min=0).long()], (positions < 0)[:, None]
    cos = rows[:, :half].masked_fill(padding, 1.0)[:, None]
    sin = rows[:, half:].masked_fill(padding, 0.0)[:, None]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight.to(wide) + weight_offset)

    def prepared(x: Tensor, weight: Tensor | None) -> Tensor:
        x = normed(x, weight) if norm_first else x
        y = x.clone()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., second] * cos + x[..., first] * sin
        y = y if norm_first else normed(y, weight)
        size = 1
        while hadamard and size < D:
            a, b = y.unflatten(-1, (D // (2 * size), 2, size)).unbind(-2)
            y = torch.stack((a + b, a - b), -2).flatten(-3)
            size *= 2
        return y * D**-0.5 if hadamard else y

    q, k = prepared(q, q_norm), prepared(k, k_norm)
    if format is None:
        store_kv(k.to(qkv.dtype), v.to(qkv.dtype), k_cache, v_cache, slots, impl="reference")
        return q.to(qkv.dtype)
    kind = FORMATS[format]
    store_kv(k, v, k_cache, v_cache, slots, format=kind, k_scale=k_scale, v_scale=v_scale, impl="reference")
    token = FORMATS["FP8_TOKEN"]
    q_scale = token.dynamic_scale(q)
    return token.encode(q / q_scale.unsqueeze(-1)), q_scale


def _unfit(qkv: Tensor, cos_sin: Tensor, out: Tensor | None, out_scale: Tensor | None, **others: object) -> str | None:
    for name, tensor in {"qkv": qkv, "cos_sin": cos_sin, "out": out, "out_scale": out_scale}.items():
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of `{name}` has stride {tensor.stride(-1)}, the kernel wants stride 1"
    return None


@rope_norm_store_kv.impl("triton", needs=("triton",), supports=_unfit)
def _triton(*arguments: Any) -> None:
    from penstock.ops.rotary.rope_norm_store_kv_triton import launch

    launch(*arguments)


def _wide(qkv: Tensor, format: str | None, **others: object) -> str | None:
    return "float64 is quantised by the reference alone" if format and qkv.dtype is torch.float64 else None


@rope_norm_store_kv.impl("cpu", needs=("cpu",), supports=_wide)
def _cpu(*arguments: Any) -> None:
    from penstock.ops.rotary.rope_norm_store_kv_cpu import run

    run(*arguments)


@rope_norm_store_kv.check_values
def _check_values(cos_sin: Tensor, positions: Tensor, k_cache: Tensor, slots: Tensor, **others: object) -> None:
    error, capacity = rope_norm_store_kv.contract.error, k_cache.shape[0] * k_cache.shape[1]
    if positions.numel() and int(positions.max()) >= cos_sin.shape[0]:
        fault = f"must be below max_position={cos_sin.shape[0]}, the largest is {int(positions.max())}"
        raise error("positions", fault, {"cos_sin": cos_sin, "positions": positions})
    if slots.numel() and int(slots.max()) >= capacity:
        fault = f"must be below P · S = {capacity}, the largest is {int(slots.max())}"
        raise error("slots", fault, {"k_cache": k_cache, "slots": slots})


@rope_norm_store_kv.cost
def _cost(
    qkv: Tensor, cos_sin: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any
) -> Cost:
    T, width = qkv.shape
    rows = min(T, cos_sin.shape[0]) * cos_sin.shape[1] * cos_sin.element_size()
    scales = 4 * T * (width // k_cache.shape[3] - k_cache.shape[2]) if options.get("format") is not None else 0
    return Cost(bytes=nbytes(qkv, positions, slots) + rows + T * width * k_cache.element_size() + scales)


@rope_norm_store_kv.cases
def cases() -> Iterable[Case]:
    """Llama, Qwen3 and Hunyuan shapes, every order of a cache, every scheme of scales; then the awkward ones."""

    def case(
        name: str,
        T: int,
        Hq: int,
        Hkv: int,
        D: int,
        *,
        R: int | None = None,
        S: int = 16,
        norms: bool = False,
        order: str = "NHD",
        v_order: str | None = None,
        format: Format | None = None,
        per_head: bool = False,
        padding: int = 0,
        runs: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        bench: bool = False,
        **options: Any,
    ) -> Case:
        def build(make):
            layout = KVLayout(S, Hkv, D, None, dtype if format is None else FP8, order, v_order, format is FP8_TOKEN)
            P = -(-T // S) + 2
            caches = layout.allocate(P, device=make.device)
            for cache in caches:
                if cache is not None:
                    cache.copy_(make.randn(*cache.shape, dtype=torch.float32))
            pages = make.permutation(P)[: -(-T // S)]
            slots = (pages[:, None] * S + make.tensor(range(S))).flatten()[:T] if runs else make.permutation(P * S)[:T]
            positions = make.integers(0, 512, T)
            if padding:
                slots[:: T // padding] = -1
                positions[-1:] = -1
            angles = make.randn(512, (R or D) // 2, dtype=torch.float32, scale=3.0)
            arguments = {
                "qkv": make.randn(T, (Hq + 2 * Hkv) * D, dtype=dtype),
                "cos_sin": torch.cat((angles.cos(), angles.sin()), 1),
                "positions": positions,
                "slots": slots,
                "k_cache": caches.k,
                "v_cache": caches.v,
                "format": format,
                **options,
            }
            if norms:
                arguments |= {"q_norm": make.randn(D, dtype=dtype), "k_norm": make.randn(D, dtype=dtype)}
            if format is not None:
                static = make.tensor([0.01 + 0.002 * head for head in range(Hkv if per_head else 1)], torch.float32)
                arguments |= {"k_scale": static if caches.k_scale is None else caches.k_scale, "v_scale": static * 0.7}
            return arguments

        return Case(name, build, bench)

    transposed: dict[str, Any] = {"order": "HND", "v_order": "HDN", "runs": True}
    yield case("decode_row", 1, 8, 2, 64)
    yield case("normed_padded", 5, 4, 2, 64, norms=True, padding=2)
    yield case("norm_after_hnd", 4, 6, 2, 64, norms=True, norm_first=False, order="HND")
    yield case("partial_interleaved", 3, 4, 4, 64, R=16, interleaved=True, norms=True, weight_offset=1.0)
    yield case("ragged_heads_float16", 7, 5, 1, 80, R=40, dtype=torch.float16)
    yield case("hadamard_float32", 3, 3, 2, 128, hadamard=True, dtype=torch.float32, norms=True)
    yield case("wide_head", 2, 3, 1, 256, norms=True)
    yield case("fp8", 6, 4, 2, 64, format=FP8_TENSOR, per_head=True, padding=2)
    yield case("fp8_token_hadamard", 5, 4, 2, 64, format=FP8_TOKEN, hadamard=True, norms=True, order="HND")
    yield case("fp8_token_transposed_ragged", 19, 3, 1, 96, format=FP8_TOKEN, norms=True, padding=3, **transposed)
    yield case("fp8_token_partial_hadamard", 3, 2, 1, 64, R=48, format=FP8_TOKEN, hadamard=True, norm_first=False, norms=True)
    yield case("only_keys", 3, 0, 2, 64, norms=True)
    yield case("empty", 0, 4, 2, 64)
    yield case("empty_fp8", 0, 4, 2, 64, format=FP8_TOKEN)
    yield case("decode_64x32+8x128", 64, 32, 8, 128, S=64, norms=True, bench=True)
    for T in (8192, 32768):
        shape = (T, 32, 8, 128)
        yield case(f"prefill_{T}x32+8x128", *shape, S=64, runs=True, bench=True)
        yield case(f"prefill_{T}x32+8x128_normed", *shape, S=64, norms=True, runs=True, bench=True)
        yield case(
            f"prefill_{T}x32+8x128_fp8_token_transposed", *shape, S=64, norms=True, format=FP8_TOKEN, **transposed, bench=True
        )
    hard: dict[str, Any] = {"norms": True, "hadamard": True, "format": FP8_TOKEN, "norm_first": False}
    yield case("prefill_32768x64+8x128_fp8_hadamard", 32768, 64, 8, 128, S=64, **hard, **transposed, bench=True)
