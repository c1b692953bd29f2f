"""Checkpoints as published, read one tensor at a time into packed parameters.

weights = load_weights("path/of/checkpoint", spec, device="cuda", dtype=torch.bfloat16)
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penstock.serve.models.spec import LayerSpec, MambaSpec, ModelError, ModelSpec

Progress = Callable[[int, int], None]
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_FLOATING = {"F16": 2, "BF16": 2, "F32": 4}


@dataclass(slots=True)
class MambaWeights:
    """A Mamba-2 mixer's parameters; in_proj gives the gate, x, B, C and dt, in this order."""

    in_proj: Tensor  # [projected, H]
    in_bias: Tensor | None
    conv: Tensor  # [conv_channels, W]
    conv_bias: Tensor | None
    A_log: Tensor  # [heads]
    D: Tensor
    dt_bias: Tensor
    norm: Tensor  # [inner]
    out_proj: Tensor  # [H, inner]
    out_bias: Tensor | None


@dataclass(slots=True)
class LayerWeights:
    """One layer's parameters: qkv [(Hq+2Hkv)·D, H], o [H, Hq·D], gate_up [2I, H], down [H, I]; absent ones are None."""

    input_norm: Tensor
    qkv: Tensor | None
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor | None
    o_bias: Tensor | None
    post_attention_norm: Tensor | None
    mlp_norm: Tensor | None
    gate_up: Tensor | None
    gate_up_bias: Tensor | None
    down: Tensor | None
    down_bias: Tensor | None
    post_mlp_norm: Tensor | None
    mamba: MambaWeights | None = None


@dataclass(slots=True)
class Weights:
    """All parameters: embedding [V, H], lm_head [V, H] (the same tensor when tied), norm [H] and the layers."""

    embedding: Tensor
    lm_head: Tensor
    norm: Tensor
    layers: list[LayerWeights]

    def tensors(self) -> Iterator[Tensor]:
        """Every distinct parameter once."""
        yield self.embedding
        if self.lm_head is not self.embedding:
            yield self.lm_head
        yield self.norm
        for layer in self.layers:
            for part, fields in ((layer, LayerWeights.__slots__[:-1]), (layer.mamba, MambaWeights.__slots__)):
                for field in fields if part is not None else ():
                    if (tensor := getattr(part, field)) is not None:
                        yield tensor


def allocate_weights(spec: ModelSpec, *, device: str | torch.device, dtype: torch.dtype, tied: bool) -> Weights:
    """Uninitialised parameters of the given architecture, each allocated once on the device."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    def mamba_weights(mamba: MambaSpec) -> MambaWeights:
        hidden = spec.hidden_size
        return MambaWeights(
            in_proj=new(mamba.projected, hidden),
            in_bias=new(mamba.projected) if mamba.proj_bias else None,
            conv=new(mamba.conv_channels, mamba.conv_width),
            conv_bias=new(mamba.conv_channels) if mamba.conv_bias else None,
            A_log=new(mamba.num_heads),
            D=new(mamba.num_heads),
            dt_bias=new(mamba.num_heads),
            norm=new(mamba.inner_size),
            out_proj=new(hidden, mamba.inner_size),
            out_bias=new(hidden) if mamba.proj_bias else None,
        )

    def layer_weights(layer: LayerSpec) -> LayerWeights:
        hidden, head = spec.hidden_size, layer.head_dim
        q, qkv = layer.num_heads * head, (layer.num_heads + 2 * layer.num_kv_heads) * head
        attends, has_mlp = layer.mamba is None, layer.mlp_size > 0
        return LayerWeights(
            input_norm=new(hidden),
            qkv=new(qkv, hidden) if attends else None,
            qkv_bias=new(qkv) if attends and layer.qkv_bias else None,
            q_norm=new(head) if attends and layer.qk_norm else None,
            k_norm=new(head) if attends and layer.qk_norm else None,
            o=new(hidden, q) if attends else None,
            o_bias=new(hidden) if attends and layer.o_bias else None,
            post_attention_norm=new(hidden) if layer.post_norms else None,
            mlp_norm=new(hidden) if has_mlp else None,
            gate_up=new(2 * layer.mlp_size, hidden) if has_mlp else None,
            gate_up_bias=new(2 * layer.mlp_size) if has_mlp and layer.mlp_bias else None,
            down=new(hidden, layer.mlp_size) if has_mlp else None,
            down_bias=new(hidden) if has_mlp and layer.mlp_bias else None,
            post_mlp_norm=new(hidden) if layer.post_norms else None,
            mamba=None if layer.mamba is None else mamba_weights(layer.mamba),
        )

    embedding = new(spec.vocab_size, spec.hidden_size)
    lm_head = embedding if tied else new(spec.vocab_size, spec.hidden_size)
    return Weights(embedding, lm_head, new(spec.hidden_size), [layer_weights(layer) for layer in spec.layers])


def checkpoint_names(spec: ModelSpec, weights: Weights) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint goes: its published name → the parameter, or the part of a packed one."""
    names = {EMBEDDING: weights.embedding, "model.norm.weight": weights.norm}
    if weights.lm_head is not weights.embedding:
        names[LM_HEAD] = weights.lm_head
    for index, (layer, own) in enumerate(zip(spec.layers, weights.layers, strict=True)):
        q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        pre_mlp = "pre_feedforward_layernorm" if layer.post_norms else "post_attention_layernorm"
        by_suffix: dict[str, Tensor | None] = {
            "input_layernorm.weight": own.input_norm,
            "post_attention_layernorm.weight": own.post_attention_norm,
            f"{pre_mlp}.weight": own.mlp_norm,
            "post_feedforward_layernorm.weight": own.post_mlp_norm,
            "self_attn.q_norm.weight": own.q_norm,
            "self_attn.k_norm.weight": own.k_norm,
            "self_attn.o_proj.weight": own.o,
            "self_attn.o_proj.bias": own.o_bias,
            "mlp.down_proj.weight": own.down,
            "mlp.down_proj.bias": own.down_bias,
        }
        for kind, qkv, gate_up in (("weight", own.qkv, own.gate_up), ("bias", own.qkv_bias, own.gate_up_bias)):
            if qkv is not None:
                parts = qkv.split((q, kv, kv))
                by_suffix |= {f"self_attn.{part}_proj.{kind}": parts[i] for i, part in enumerate("qkv")}
            if gate_up is not None and any(old.startswith("mlp.gate_up_proj") for old, _ in spec.renamed):
                by_suffix[f"mlp.gate_up_proj.{kind}"] = gate_up  # packed in the checkpoint too
            elif gate_up is not None:
                by_suffix[f"mlp.gate_proj.{kind}"], by_suffix[f"mlp.up_proj.{kind}"] = gate_up.chunk(2)
        if own.mamba is not None:
            by_suffix |= _mamba_names(own.mamba)
        names |= {f"model.layers.{index}.{suffix}": to for suffix, to in by_suffix.items() if to is not None}
    return {_renamed(name, spec): to for name, to in names.items()}


def _mamba_names(own: MambaWeights) -> dict[str, Tensor | None]:
    return {
        "mamba.in_proj.weight": own.in_proj,
        "mamba.in_proj.bias": own.in_bias,
        "mamba.conv1d.weight": own.conv[:, None],
        "mamba.conv1d.bias": own.conv_bias,
        "mamba.A_log": own.A_log,
        "mamba.D": own.D,
        "mamba.dt_bias": own.dt_bias,
        "mamba.norm.weight": own.norm,
        "mamba.out_proj.weight": own.out_proj,
        "mamba.out_proj.bias": own.out_bias,
    }


def _renamed(name: str, spec: ModelSpec) -> str:
    for old, new in spec.renamed:
        name = name.replace(old, new)
    return name


def load_weights(
    path: str | Path,
    spec: ModelSpec,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress | None = None,
) -> Weights:
    """Reads `model.safetensors`, or the shards of its index, into packed parameters.

    Files are memory-mapped and closed one after the other: the host never holds more than the parameters and one shard.

    Args:
        path: a directory with a published checkpoint.
        progress: called with (bytes done, bytes total) after every tensor.
    Raises: ModelError naming the file and the tensor that is missing, truncated, unexpected or of the wrong shape.
    """
    files = _checkpoint_files(Path(path))
    names = {file: _tensor_names(file) for file in files}
    found = {name for in_file in names.values() for name in in_file}
    embedding = _renamed(EMBEDDING, spec)
    tied = spec.tie_word_embeddings and not {LM_HEAD, embedding} <= found
    weights = allocate_weights(spec, device=device, dtype=dtype, tied=tied)
    targets = checkpoint_names(spec, weights)
    if tied and embedding not in found and LM_HEAD in found:
        targets[LM_HEAD] = targets.pop(embedding)
    unread, total, done = set(targets), sum(file.stat().st_size for file in files), 0
    for file in files:
        with _open(file) as tensors:
            for name in names[file]:
                if name.endswith("rotary_emb.inv_freq"):  # a buffer that old checkpoints carry
                    continue
                if name not in targets:
                    raise ModelError(f"{file} has the tensor {name}, which {spec.architecture} does not use")
                done += _read_tensor(file, tensors, name, targets[name])
                unread.discard(name)
                if progress is not None:
                    progress(done, total)
    if unread:
        raise _missing(Path(path), spec, unread)
    if spec.tie_word_embeddings and not tied and torch.equal(weights.embedding, weights.lm_head):
        weights.lm_head = weights.embedding
    if progress is not None:
        progress(total, total)
    return weights


def random_weights(
    spec: ModelSpec, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Weights:
    """Normal weights (deviation 0.02) and unit norms made on the device: a published shape with nothing downloaded."""
    weights = allocate_weights(spec, device=device, dtype=dtype, tied=spec.tie_word_embeddings)
    generator = torch.Generator(device=device).manual_seed(seed)
    for tensor in weights.tensors():
        if tensor.dim() == 2:
            tensor.normal_(0.0, 0.02, generator=generator)
        else:
            tensor.zero_()
    for layer in weights.layers:
        gated = None if layer.mamba is None else layer.mamba.norm
        norms = (layer.input_norm, layer.q_norm, layer.k_norm, layer.post_attention_norm, gated)
        for norm in (*norms, layer.mlp_norm, layer.post_mlp_norm, weights.norm):
            if norm is not None:
                norm.fill_(1.0 - spec.norm_weight_offset)
    return weights


def _checkpoint_files(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if not index.is_file():
        others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.gguf") for p in directory.glob(pattern))
        hint = f" (found {', '.join(others[:3])}, which are not read)" if others else ""
        raise ModelError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({directory / name for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a safetensors index with a weight_map: {error!r}") from error
    for file in files:
        if not file.is_file():
            raise ModelError(f"{index} names {file.name}, which is missing")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise ModelError(f"{file} ({size} bytes) is truncated or not a safetensors file: {error}") from error


def _tensor_names(file: Path) -> list[str]:
    with _open(file) as tensors:
        return list(tensors.keys())


def _read_tensor(file: Path, tensors: Any, name: str, target: Tensor) -> int:
    """Copies one tensor into its place with conversion and returns its bytes in the file."""
    view = tensors.get_slice(name)
    shape, dtype = list(view.get_shape()), view.get_dtype()
    if shape != list(target.shape):
        raise ModelError(f"{file}: {name} must be {list(target.shape)} by the config, got {shape}")
    if dtype not in _FLOATING:
        raise ModelError(f"{file}: {name} must be one of {', '.join(_FLOATING)}, got {dtype}")
    target.copy_(tensors.get_tensor(name))
    return target.numel() * _FLOATING[dtype]


def _missing(directory: Path, spec: ModelSpec, unread: set[str]) -> ModelError:
    name, more = min(unread), f" and {len(unread) - 1} more" if len(unread) > 1 else ""
    index = directory / INDEX_FILE
    where = directory / SINGLE_FILE
    if not where.is_file():
        where = index
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
        if named is not None:
            return ModelError(f"{directory / named} lacks the tensor {name}{more}, which {index.name} says it holds")
    return ModelError(f"{where} lacks the tensor {name}{more}, which {spec.architecture} needs")
