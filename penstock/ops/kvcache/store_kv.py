"""k_cache[slot // S, slot % S] = k, v_cache likewise, for slot ≥ 0; in FP8 saturate(k / k_scale)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from penstock.core.cases import Case, Cost, nbytes
from penstock.core.check import FLOATS, INDICES, anything
from penstock.core.formats import FORMATS, FP8_TENSOR, FP8_TOKEN, Format, name_of
from penstock.core.op import NotSupported, op
from penstock.ops.kvcache.layout import FP8, KVLayout
from penstock.ops.kvcache.store_kv_cpu import store

SPEC = {
    "k": ("T H D", FLOATS),
    "v": ("T H Dv", "k"),
    "k_cache": ("P S H D", (*FLOATS, FP8)),
    "v_cache": ("P S H Dv", (*FLOATS, FP8)),
    "slots": ("T", INDICES),
    "format": anything,
    "k_scale": anything,
    "v_scale": anything,
}


@op(
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, str? format, Tensor(c!)? k_scale, "
    "Tensor? v_scale) -> ()",
    SPEC,
    exact=True,
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
        k_cache: [P, S, Hkv, D] in k.dtype, with a format float8_e4m3fn; any order by strides (`KVLayout`).
        v_cache: [P, S, Hkv, Dv] in k_cache.dtype; any order, transposed inside its pages included.
        slots: [T] int32: page · S + offset, below P · S; a negative slot writes nothing. Slots must differ from each other.
        format: None stores the values as they are. FP8_TENSOR stores x / scale rounded to nearest even, saturating at ±448.
            FP8_TOKEN does so too, and takes the scale of each token and head of k from its values: max|k| / 448.
        k_scale: float32: FP8_TENSOR [1] or [Hkv]; FP8_TOKEN [P, S, Hkv], a cache that is written in the same slots.
        v_scale: [1] or [Hkv] float32, with either format; x ≈ stored · scale.
        impl: "auto", "triton", "cpu" or "reference".
    Raises: ContractError when shapes or dtypes disagree or scales are missing; NotSupported for other formats, or when no
        implementation takes the call.
    Source: Kwon et al., arXiv:2309.06180 (paged attention).
    """
    if format not in (None, FP8_TENSOR, FP8_TOKEN):
        raise NotSupported(f"store_kv: format {name_of(format)}: a cache is kept as it is, in FP8_TENSOR or in FP8_TOKEN")
    name = None if format is None else format.name
    launch = store_kv.pick(impl, k, v, k_cache, v_cache, slots, name, k_scale, v_scale)
    launch(k, v, k_cache, v_cache, slots, name, k_scale, v_scale)


@store_kv.relation
def _relation(
    k: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    format: str | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    **others: object,
) -> tuple[str, str] | None:
    return cache_fault(k.dtype, k_cache, v_cache, format, k_scale, v_scale)


def cache_fault(
    dtype: torch.dtype,
    k_cache: Tensor,
    v_cache: Tensor,
    format: str | None,
    k_scale: Any,
    v_scale: Any,
) -> tuple[str, str] | None:
    """(argument, what it must be) for the first cache or scale that does not go with the format, or None."""
    wanted = dtype if format is None else FORMATS[format].dtype
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype is not wanted:
            return name, f"must be {wanted} with format={format}, got {cache.dtype}"
    heads = [1], [k_cache.shape[2]]
    shapes = {"k_scale": ([*k_cache.shape[:3]],) if format == "FP8_TOKEN" else heads, "v_scale": heads}
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if format is None:
            if scale is not None:
                return name, "must be None without a format"
            continue
        shown = " or ".join(map(str, shapes[name]))
        if not isinstance(scale, Tensor):
            return name, f"must be a float32 tensor {shown} with format={format}, got {scale}"
        # The float64 oracle of an operator that stores comes with float64 scales.
        if (
            scale.dtype not in (torch.float32, torch.float64)
            or [*scale.shape] not in shapes[name]
            or scale.device != k_cache.device
        ):
            got = f"{scale.dtype}{[*scale.shape]} on {scale.device}"
            return name, f"must be float32 {shown} on {k_cache.device} with format={format}, got {got}"
    return None


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
    size, kept = k_cache.shape[1], slots >= 0
    place = slots[kept] // size, slots[kept] % size
    key, value = k[kept], v[kept]
    if format is not None and k_scale is not None and v_scale is not None:
        wide = torch.promote_types(k.dtype, torch.float32)
        key, value, scale = key.to(wide), value.to(wide), k_scale
        if format == "FP8_TOKEN":
            scale = FORMATS[format].dynamic_scale(key)
            k_scale[place] = scale
        key, value = (FORMATS[format].encode(x / s.unsqueeze(-1)) for x, s in ((key, scale), (value, v_scale)))
    if k_cache.dtype is FP8:
        # Indexed writes exist for bytes, not for FP8.
        key, value, k_cache, v_cache = (x.view(torch.uint8) for x in (key, value, k_cache, v_cache))
    k_cache[place], v_cache[place] = key, value


def _unfit(k: Tensor, v: Tensor, **others: object) -> str | None:
    for name, tensor in {"k": k, "v": v}.items():
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
def _cost(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    format: Format | None = None,
    **options: object,
) -> Cost:
    written = k.numel() * k_cache.element_size() + v.numel() * v_cache.element_size()
    scales = 4 * k.shape[0] * k.shape[1] if format == FP8_TOKEN else 0
    return Cost(bytes=nbytes(k, v, slots) + written + scales)


@store_kv.cases
def cases() -> Iterable[Case]:
    """Every order of a cache, packed inputs, FP8; then the awkward ones."""

    def case(
        name: str,
        T: int,
        P: int,
        S: int,
        H: int,
        D: int,
        *,
        Dv: int | None = None,
        order: str = "NHD",
        v_order: str | None = None,
        packed: bool = False,
        format: Format | None = None,
        per_head: bool = False,
        padding: int = 0,
        runs: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        bench: bool = False,
    ) -> Case:
        def build(make):
            held = dtype if format is None else FP8
            layout = KVLayout(S, H, D, Dv, held, order, v_order, k_scales=format == FP8_TOKEN)
            k_cache, v_cache, k_scale = layout.allocate(P, device=make.device)
            for cache in (k_cache, v_cache, k_scale):
                if cache is not None:
                    cache.copy_(make.randn(*cache.shape, dtype=torch.float32))
            both = make.randn(T, H, D + (Dv or D), dtype=dtype, scale=1.0 if format is None else 40.0)
            # A prefill fills page after page, a decoding step one slot of each of many pages.
            pages = make.permutation(P)[: -(-T // S)]
            slots = (pages[:, None] * S + make.tensor(range(S))).flatten()[:T] if runs else make.permutation(P * S)[:T]
            if padding:
                slots[:: T // padding] = -1
            k, v = both[..., :D], both[..., D:]
            arguments = {
                "k": k if packed else k.contiguous(),
                "v": v if packed else v.contiguous(),
                "k_cache": k_cache,
                "v_cache": v_cache,
                "slots": slots,
                "format": format,
            }
            if format is not None:
                scales = H if per_head else 1
                static = make.tensor([0.25 + 0.125 * head for head in range(scales)], torch.float32)
                arguments |= {"k_scale": static if k_scale is None else k_scale, "v_scale": static * 1.5}
            return arguments

        return Case(name, build, bench)

    yield case("decode_row", 1, 4, 16, 8, 128)
    yield case("hnd", 5, 4, 16, 2, 64, order="HND")
    yield case("packed_padded", 9, 6, 16, 2, 64, packed=True, padding=3)
    yield case("ragged_page_of_one", 7, 40, 1, 3, 40, dtype=torch.float16)
    yield case("page_of_256_float32", 3, 2, 256, 1, 32, dtype=torch.float32)
    yield case("wider_keys", 4, 3, 8, 2, 192, Dv=128)
    yield case("fp8", 6, 4, 16, 2, 64, format=FP8_TENSOR, padding=2)
    yield case("fp8_hnd_ragged", 5, 4, 4, 3, 40, format=FP8_TENSOR, order="HND", per_head=True, dtype=torch.float16)
    yield case("fp8_token", 6, 4, 16, 2, 64, format=FP8_TOKEN, padding=2)
    yield case("fp8_token_transposed", 37, 6, 16, 2, 64, format=FP8_TOKEN, order="HND", v_order="HDN", runs=True, packed=True)
    yield case("fp8_transposed_ragged", 41, 3, 64, 3, 40, format=FP8_TENSOR, v_order="HDN", per_head=True, padding=4)
    yield case("empty", 0, 2, 16, 2, 64)
    yield case("empty_fp8_token", 0, 2, 16, 2, 64, format=FP8_TOKEN)
    yield case("decode_64x8x128", 64, 1024, 16, 8, 128, bench=True)
    yield case(
        "decode_64x8x128_fp8_token_transposed", 64, 256, 64, 8, 128, format=FP8_TOKEN, order="HND", v_order="HDN", bench=True
    )
    for name, S, order, v_order, format in (
        ("", 16, "NHD", None, None),
        ("_hnd", 64, "HND", None, None),
        ("_fp8", 64, "NHD", None, FP8_TENSOR),
        ("_fp8_token", 64, "NHD", None, FP8_TOKEN),
        ("_fp8_token_transposed", 64, "HND", "HDN", FP8_TOKEN),
    ):
        options: dict[str, Any] = {"packed": True, "runs": True, "bench": True}
        shape = (32768, 32768 // S, S, 8, 128)
        yield case(f"prefill_32768x8x128{name}", *shape, order=order, v_order=v_order, format=format, **options)
