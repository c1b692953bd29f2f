"""Checkpoints as published, read one tensor at a time into packed parameters.

weights = load_weights("path/of/checkpoint", spec, device="cuda", dtype=torch.bfloat16)
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penstock.serve.models.names import EMBEDDING, LM_HEAD, checkpoint_names
from penstock.serve.models.parameters import Weights, allocate_weights
from penstock.serve.models.quantization import KV_SCALES
from penstock.serve.models.quantized_experts import QuantizedExperts
from penstock.serve.models.spec import ModelError, ModelSpec

logger = logging.getLogger("penstock.serve")
Progress = Callable[[int, int], None]
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATING = {"F16": 2, "BF16": 2, "F32": 4}
_SPREAD = 24.0  # deviation of random codes: five of it are in the range of 8-bit integers
_CODES = {"F8_E4M3": 1, "I8": 1}


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
    embedding = spec.published(EMBEDDING)
    tied = spec.tie_word_embeddings and not {LM_HEAD, embedding} <= found
    weights = allocate_weights(spec, device=device, dtype=dtype, tied=tied)
    targets = checkpoint_names(spec, weights)
    if tied and embedding not in found and LM_HEAD in found:
        targets[LM_HEAD] = targets.pop(embedding)
    codes = {
        name: weight.scheme.stored for weight in weights.quantized() for name, _ in weight.names() if name.endswith(".weight")
    }
    drafts = tuple(f"model.layers.{len(spec.layers) + index}." for index in range(spec.draft_layers))
    unused: list[str] = []
    unread, total, done = set(targets), sum(file.stat().st_size for file in files), 0
    for file in files:
        with _open(file) as tensors:
            for name in names[file]:
                # a buffer that old checkpoints carry; layers for guesses
                if name.endswith("rotary_emb.inv_freq") or name.startswith(drafts):
                    continue
                if name not in targets:
                    if spec.quantization is None or not _unused(file, tensors, name):
                        raise ModelError(f"{file} has the tensor {name}, which {spec.architecture} does not use")
                    unused.append(name)
                    continue
                done += _read_tensor(file, tensors, name, targets[name], codes.get(name))
                unread.discard(name)
                if progress is not None:
                    progress(done, total)
    if unread:
        raise _missing(Path(path), spec, unread)
    _warn_of_unused(unused, weights)
    weights.prepare()
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
        if tensor.dtype in (torch.float8_e4m3fn, torch.int8):
            continue
        if tensor.dim() >= 2:
            tensor.normal_(0.0, 0.02, generator=generator)
        else:
            tensor.zero_()
    for weight in weights.quantized():
        weight.codes.copy_(torch.empty(weight.codes.shape, device=device).normal_(0.0, _SPREAD, generator=generator))
        weight.scale.fill_(0.02 / _SPREAD)
        if weight.input_scale is not None:
            weight.input_scale.fill_(1 / _SPREAD)
    weights.prepare()
    for layer in weights.layers:
        norms = [layer.input_norm, layer.q_norm, layer.k_norm, layer.post_attention_norm, layer.mlp_norm, layer.post_mlp_norm]
        if layer.latent is not None:
            norms += [layer.latent.q_norm, layer.latent.kv_norm]
        if layer.mamba is not None:
            norms.append(layer.mamba.norm)
        for norm in (*norms, weights.norm):
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


def _read_tensor(file: Path, tensors: Any, name: str, target: Tensor, codes: str | None) -> int:
    """Copies one tensor into its place with conversion and returns its bytes in the file.

    Args:
        codes: the dtype that quantised weights have in the file; None for what is not quantised.
    """
    view = tensors.get_slice(name)
    shape, dtype = list(view.get_shape()), view.get_dtype()
    # a single scale is published as [1] and as []
    if shape != list(target.shape) and not (shape == [] and target.shape == (1,)):
        raise ModelError(f"{file}: {name} must be {list(target.shape)} by the config, got {shape}")
    if dtype not in (_FLOATING if codes is None else (codes,)):
        wanted = f"one of {', '.join(_FLOATING)}" if codes is None else f"{codes} by its quantization_config"
        raise ModelError(f"{file}: {name} must be {wanted}, got {dtype}")
    target.copy_(tensors.get_tensor(name))
    return target.numel() * (_FLOATING | _CODES)[dtype]


def _unused(file: Path, tensors: Any, name: str) -> bool:
    """Whether a quantised checkpoint may have this tensor for nothing: scales of 8-bit keys and values, zero points of 0."""
    if name.endswith(tuple(f".{suffix}" for suffix in KV_SCALES)):
        return True
    if not name.endswith("_zero_point"):
        return False
    if bool(tensors.get_tensor(name).any()):
        raise ModelError(f"{file}: {name} must be 0 (weights and activations are symmetric), got other values")
    return True


def _warn_of_unused(unused: list[str], weights: Weights) -> None:
    """One sentence for each thing that a quantised checkpoint asks for and that is done more exactly."""
    scales = [name for name in unused if not name.endswith("_zero_point")]
    if scales:
        kept = weights.embedding.dtype
        logger.warning("%s and %d more are not used: keys and values are kept in %s", scales[0], len(scales) - 1, kept)
    for layer in weights.layers:
        if layer.experts is not None and isinstance(layer.experts.down, QuantizedExperts) and layer.experts.down.scheme.static:
            logger.warning("the experts' input_scale are not used: their activations get scales as they come")
            return


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
