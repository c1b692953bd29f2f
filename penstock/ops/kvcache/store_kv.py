"""k_cache[slot // S, slot % S] = k, v_cache likewise, for slot ≥ 0; in FP8 saturate(k / k_scale)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES, anything
from penstock.core.formats import FP8_TENSOR, Format
from penstock.core.op import NotSupported, op
from penstock.ops.kvcache.store_kv_cpu import store

FP8 = torch.float8_e4m3fn
WIDE = (torch.float32, torch.float64)

SPEC = {
    "k": ("T H D", FLOATS),
    "v": ("T H Dv", "k"),
    "k_cache": ("P S H D", ("k", FP8)),
    "v_cache": ("P S H Dv", ("k", FP8)),
    "slots": ("T", INDICES),
    "format": anything,
    "k_scale?": ("1", WIDE),
    "v_scale?": ("1", WIDE),
}


@op(
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, str? format, Tensor? k_scale, Tensor? v_scale) "
    "-> ()",
    SPEC,
)
def store_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    format: Format | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Writes new keys and values into their slots of the paged cache, in place.

    Args:
        k: [T, Hkv, D] float16, bfloat16 or float32; any strides.
        v: [T, Hkv, Dv] in k.dtype.
        k_cache: [P, S, Hkv, D] in k.dtype, or float8_e4m3fn with format=FP8_TENSOR; NHD or HND by strides.
        v_cache: [P, S, Hkv, Dv] in k_cache.dtype.
        slots: [T] int32: page · S + offset, below P · S; a negative slot writes nothing. Slots must differ from each other.
        format: None stores the values as they are; FP8_TENSOR stores k / k_scale rounded to nearest even, saturating at ±448.
        k_scale: [1] float32, with FP8_TENSOR; x ≈ stored · scale.
        v_scale: [1] float32, with FP8_TENSOR.
        impl: "auto", "triton", "cpu" or "reference".
    Raises: ContractError when shapes or dtypes disagree or scales are missing; NotSupported for other formats, or when no
        implementation takes the call.
    Source: Kwon et al., arXiv:2309.06180 (paged attention).
    """
    if format is not None and format is not FP8_TENSOR:
        name = getattr(format, "name", format)
        raise NotSupported(f"store_kv: format {name}: the cache has no room for its scales; use FP8_TENSOR or None")
    name = None if format is None else "FP8_TENSOR"
    launch = store_kv.pick(impl, k, v, k_cache, v_cache, slots, name, k_scale, v_scale)
    if name or k_cache.dtype is not k.dtype or v_cache.dtype is not k.dtype or k_scale is not None or v_scale is not None:
        _check_format(name, {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale})
    launch(k, v, k_cache, v_cache, slots, name, k_scale, v_scale)


def _check_format(format: str | None, named: dict[str, Any]) -> None:
    # A float64 cache holds the scaled values unrounded: with it the reference is its own oracle.
    wanted = {None: named["k"].dtype, "FP8_TENSOR": torch.float64 if named["k"].dtype is torch.float64 else FP8}[format]
    for name in ("k_cache", "v_cache"):
        if named[name].dtype is not wanted:
            raise store_kv.contract.error(name, f"must be {wanted} with format={format}", named)
    for name in ("k_scale", "v_scale"):
        if (named[name] is None) is not (format is None):
            fault = f"must be {'None' if format is None else 'a float32 tensor [1]'} with format={format}"
            raise store_kv.contract.error(name, fault, named)


@store_kv.reference
def _reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    format: str | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    size = k_cache.shape[1]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
            row = x[token]
            if scale is not None:
                wide = row.to(torch.promote_types(row.dtype, torch.float32))
                row = (wide / scale).clamp(-FP8_TENSOR.largest, FP8_TENSOR.largest)
            cache[slot // size, slot % size] = row.to(cache.dtype)


def _unfit(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, **others: object) -> str | None:
    for name, tensor in {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of `{name}` has stride {tensor.stride(-1)}, the kernel wants stride 1"
    return None


@store_kv.impl("triton", needs=("triton",), supports=_unfit)
def _triton(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    format: str | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    from penstock.ops.kvcache.store_kv_triton import launch

    launch(k, v, k_cache, v_cache, slots, k_scale, v_scale)


@store_kv.impl("cpu", needs=("cpu",))
def _cpu(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    format: str | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    store(k, v, k_cache, v_cache, slots, k_scale, v_scale)


@store_kv.check_values
def _check_values(k_cache: Tensor, slots: Tensor, **others: object) -> None:
    capacity = k_cache.shape[0] * k_cache.shape[1]
    if slots.numel() and int(slots.max()) >= capacity:
        fault = f"must be below P · S = {capacity}, the largest is {int(slots.max())}"
        raise store_kv.contract.error("slots", fault, {"k_cache": k_cache, "slots": slots})


@store_kv.cost
def _cost(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, **options: object) -> Cost:
    written = k.numel() * k_cache.element_size() + v.numel() * v_cache.element_size()
    return Cost(bytes=nbytes(k, v, slots) + written)


@store_kv.cases
def cases() -> Iterable[Case]:
    """Both layouts, packed inputs, FP8; then the awkward ones."""

    def case(
        name: str,
        T: int,
        P: int,
        S: int,
        H: int,
        D: int,
        *,
        Dv: int | None = None,
        hnd: bool = False,
        packed: bool = False,
        fp8: bool = False,
        padding: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        bench: bool = False,
    ) -> Case:
        def build(make):
            width = D + (Dv or D)
            both = make.randn(T, H, width, dtype=dtype, scale=40.0 if fp8 else 1.0)
            slots = make.permutation(P * S)[:T]
            if padding:
                slots[:: T // padding] = -1

            def cache(dimension: int) -> Tensor:
                held = make.randn(*((P, H, S, dimension) if hnd else (P, S, H, dimension)), dtype=dtype)
                held = held.to(FP8) if fp8 else held
                return held.transpose(1, 2) if hnd else held

            k, v = both[..., :D], both[..., D:]
            return {
                "k": k if packed else k.contiguous(),
                "v": v if packed else v.contiguous(),
                "k_cache": cache(D),
                "v_cache": cache(Dv or D),
                "slots": slots,
                "format": FP8_TENSOR if fp8 else None,
                "k_scale": make.tensor([0.25], torch.float32) if fp8 else None,
                "v_scale": make.tensor([1.5], torch.float32) if fp8 else None,
            }

        return Case(name, build, bench)

    yield case("decode_row", 1, 4, 16, 8, 128)
    yield case("hnd", 5, 4, 16, 2, 64, hnd=True)
    yield case("packed_padded", 9, 6, 16, 2, 64, packed=True, padding=3)
    yield case("ragged_page_of_one", 7, 40, 1, 3, 40, dtype=torch.float16)
    yield case("page_of_256_float32", 3, 2, 256, 1, 32, dtype=torch.float32)
    yield case("wider_keys", 4, 3, 8, 2, 192, Dv=128)
    yield case("fp8", 6, 4, 16, 2, 64, fp8=True, padding=2)
    yield case("fp8_hnd_ragged", 5, 4, 4, 3, 40, fp8=True, hnd=True, dtype=torch.float16)
    yield case("empty", 0, 2, 16, 2, 64)
    yield case("decode_64x8x128", 64, 1024, 16, 8, 128, bench=True)
    yield case("prefill_32768x8x128", 32768, 2048, 16, 8, 128, packed=True, bench=True)
    yield case("prefill_32768x8x128_fp8", 32768, 512, 64, 8, 128, packed=True, fp8=True, bench=True)
    yield case("prefill_32768x8x128_hnd", 32768, 512, 64, 8, 128, packed=True, hnd=True, bench=True)
