"""inv_freq_i = theta^(-2i/R), stretched for contexts longer than the trained one; and the facts a model states about it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.core.op import NotSupported


@dataclass(frozen=True)
class RopeConfig:
    """What determines a rotary table.

    Args:
        rotary_dim: R, the rotated dimensions of a head.
        max_position: rows of the table.
        theta: base of the geometric series of frequencies.
        scaling: "default", "linear", "dynamic", "llama3", "yarn", "longrope" or "proportional".
        factor: by how much the context is stretched.
        original_max_position: context length of training; llama3, yarn, dynamic, longrope.
        low_freq_factor, high_freq_factor: llama3's band of wavelengths.
        beta_fast, beta_slow: yarn's band, in rotations over the original context.
        truncate: yarn rounds its band to whole dimensions.
        attention_factor: multiplies cos and sin; None for the variant's own value.
        mscale, mscale_all_dim: DeepSeek's form of yarn's attention factor, their ratio.
        short_factor, long_factor: longrope's divisors of each frequency.
        zero_frequencies: proportional: trailing frequencies that are zero, so that their dimensions do not turn.
    """

    rotary_dim: int
    max_position: int
    theta: float = 10000.0
    scaling: str = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    zero_frequencies: int = 0

    def __post_init__(self) -> None:
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be even and positive, got {self.rotary_dim}")
        if self.max_position < 0:
            raise ValueError(f"max_position must be at least 0, got {self.max_position}")
        if self.scaling not in SCALINGS:
            raise NotSupported(f"rope_table: scaling {self.scaling!r} is not one of {', '.join(SCALINGS)}")

    @property
    def original(self) -> int:
        """The context length of training; max_position when not stated."""
        return self.original_max_position or self.max_position


def _series(config: RopeConfig, theta: float) -> Tensor:
    """1 / theta^(2i/R), float32."""
    return 1.0 / (theta ** (torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim))


def _default(config: RopeConfig) -> tuple[Tensor, float]:
    return _series(config, config.theta), 1.0


def _linear(config: RopeConfig) -> tuple[Tensor, float]:
    return _series(config, config.theta) / config.factor, 1.0


def _dynamic(config: RopeConfig) -> tuple[Tensor, float]:
    """Theta grows with the length, which is here the table's: max_position, never less than the original."""
    length = max(config.max_position, config.original)
    growth = config.factor * length / config.original - (config.factor - 1)
    return _series(config, config.theta * growth ** (config.rotary_dim / (config.rotary_dim - 2))), 1.0


def _llama3(config: RopeConfig) -> tuple[Tensor, float]:
    """Short wavelengths stay, long ones are divided by the factor, between them a linear blend in rotations."""
    plain = _series(config, config.theta)
    rotations = config.original / (2 * math.pi / plain)
    blend = (rotations - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    mixed = (1 - blend) * plain / config.factor + blend * plain
    stretched = torch.where(rotations < config.low_freq_factor, plain / config.factor, mixed)
    return torch.where(rotations > config.high_freq_factor, plain, stretched), 1.0


def _yarn(config: RopeConfig) -> tuple[Tensor, float]:
    """Dimensions that turn often stay, slow ones are divided by the factor, a ramp between; logits grow by the factor."""

    def dimension(rotations: float) -> float:
        wavelengths = math.log(config.original / (rotations * 2 * math.pi))
        return config.rotary_dim * wavelengths / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    # A band of no width would divide by zero.
    width = high - low if high != low else 0.001
    kept = 1 - ((torch.arange(config.rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    periods = config.theta ** (torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim)
    frequencies = (1.0 / (config.factor * periods)) * (1 - kept) + (1.0 / periods) * kept

    def magnitude(share: float) -> float:
        return 0.1 * share * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.mscale and config.mscale_all_dim:
        return frequencies, magnitude(config.mscale) / magnitude(config.mscale_all_dim)
    return frequencies, magnitude(1.0)


def _longrope(config: RopeConfig) -> tuple[Tensor, float]:
    """Every frequency has its own divisor: the long list for tables longer than the original context, else the short."""
    divisors = torch.tensor(config.long_factor if config.max_position > config.original else config.short_factor)
    periods = config.theta ** (torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim)
    stretched = config.factor > 1
    return 1.0 / (divisors * periods), math.sqrt(1 + math.log(config.factor) / math.log(config.original)) if stretched else 1.0


def _proportional(config: RopeConfig) -> tuple[Tensor, float]:
    frequencies = _series(config, config.theta)
    if config.zero_frequencies:
        frequencies[-config.zero_frequencies :] = 0.0
    return frequencies / config.factor, 1.0


SCALINGS: Mapping[str, Callable[[RopeConfig], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}


def frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """(inverse frequencies float32 [R/2], attention factor)."""
    values, factor = SCALINGS[config.scaling](config)
    return values, factor if config.attention_factor is None else config.attention_factor


# What a dictionary must state, because no default is right for every model.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def _stated(source: Any, *names: str) -> Any:
    """The first of these attributes (or keys) that is there and not None."""
    for name in names:
        value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
        if value is not None:
            return value
    return None


def read_config(config: Any, *, max_position: int | None, head_dim: int | None, layer_type: str | None) -> RopeConfig:
    """RopeConfig of a Hugging Face config, or of its rope_parameters / rope_scaling dictionary alone.

    Raises: ValueError when the head dimension, the length or the layer type cannot be told; NotSupported for unknown scaling.
    """
    whole = {} if isinstance(config, Mapping) else config
    parameters = config if isinstance(config, Mapping) else _stated(config, "rope_parameters", "rope_scaling") or {}
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        if layer_type not in nested:
            raise ValueError(f"rope_table: `layer_type` must be one of {', '.join(nested)}, got {layer_type!r}")
        parameters = parameters[layer_type]
    kind = _stated(parameters, "rope_type", "type") or "default"
    head_dim = head_dim or _stated(whole, "qk_rope_head_dim", "head_dim")
    if head_dim is None and _stated(whole, "num_attention_heads"):
        head_dim = _stated(whole, "hidden_size") // _stated(whole, "num_attention_heads")
    if head_dim is None:
        raise ValueError("rope_table: `head_dim` is not in the configuration: state it")
    trained = _stated(whole, "max_position_embeddings")
    original = _stated(whole, "original_max_position_embeddings") or _stated(parameters, "original_max_position_embeddings")
    length = max_position if max_position is not None else trained
    if length is None:
        raise ValueError("rope_table: `max_position` is not in the configuration: state it")
    original = trained if kind == "dynamic" and trained else original or trained
    missing = [name for name in _NEEDED.get(kind, ()) if parameters.get(name) is None]
    if kind in ("dynamic", "llama3", "yarn", "longrope") and original is None:
        missing.append("original_max_position_embeddings")
    if kind in ("yarn", "longrope") and trained is None and parameters.get("factor") is None:
        missing.append("factor")
    if missing:
        raise ValueError(f"rope_table: scaling {kind!r} needs {', '.join(missing)}, which the configuration does not state")
    share = _stated(parameters, "partial_rotary_factor")
    share = share if share is not None else _stated(whole, "partial_rotary_factor") or 1.0
    factor = _stated(parameters, "factor")
    if factor is None:
        factor = trained / original if kind in ("yarn", "longrope") and trained and original else 1.0
    options = {
        name: parameters[name]
        for name in ("low_freq_factor", "high_freq_factor", "attention_factor", "mscale", "mscale_all_dim", "truncate")
        if parameters.get(name) is not None
    }
    return RopeConfig(
        rotary_dim=head_dim if kind == "proportional" else int(head_dim * share),
        max_position=length,
        theta=_stated(parameters, "rope_theta") or _stated(whole, "rope_theta") or 10000.0,
        scaling=kind,
        factor=factor,
        original_max_position=original,
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        short_factor=tuple(parameters.get("short_factor") or ()),
        long_factor=tuple(parameters.get("long_factor") or ()),
        zero_frequencies=head_dim // 2 - int(share * head_dim // 2) if kind == "proportional" else 0,
        **options,
    )
