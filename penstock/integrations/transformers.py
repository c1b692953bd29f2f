"""transformers on our operators: `enable(model)` swaps attention, norms, rotary embedding and gated MLPs of one model.

    layer of the host                 what runs instead
    ATTENTION (AttentionInterface)    attention_prefill over packed requests, whose lengths stand in the mask
    {Family}RMSNorm                   rms_norm
    {Family}RotaryEmbedding, apply_rotary_pos_emb   one float32 table for a forward pass, and rope
    {Family}MLP                       two products into one buffer, and silu_and_mul or gelu_and_mul
    {Family}Experts (ExpertsInterface)              fused_moe

Everything is set on the instances of one model and taken off by `disable`; classes and modules of transformers stay as they
are, but for two entries under our name in its registries. A call that we cannot express raises NotSupported.
"""

import functools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from penstock.core.op import NotSupported
from penstock.ops.activation.gelu_and_mul import gelu_and_mul
from penstock.ops.activation.silu_and_mul import silu_and_mul
from penstock.ops.attention.prefill import attention_prefill
from penstock.ops.moe.fused_moe import fused_moe
from penstock.ops.norm.rms_norm import rms_norm
from penstock.ops.rotary.rope import rope

# The host's continuous batching takes an attention by its name: one with "flash" in it gets cumulative lengths and no mask.
ATTENTION = "penstock_flash"
EXPERTS = "penstock"
_ENABLED = "_penstock_enabled"
_ABSENT = ...  # survives copy.deepcopy


@dataclass(frozen=True)
class Family:
    """What the classes `{prefix}RMSNorm`, `{prefix}MLP`, … of one modeling file have in common."""

    prefix: str
    eps: str = "variance_epsilon"
    weight_offset: float = 0.0


FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3"),
    "qwen3_moe": Family("Qwen3Moe"),
    "gemma": Family("Gemma", eps="eps", weight_offset=1.0),
    "gemma2": Family("Gemma2", eps="eps", weight_offset=1.0),
    "gemma3": Family("Gemma3", eps="eps", weight_offset=1.0),
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu_and_mul,
    "gelu_pytorch_tanh": functools.partial(gelu_and_mul, approximate="tanh"),
    "gelu": functools.partial(gelu_and_mul, approximate="none"),
}


@dataclass
class Report:
    """What `enable` did: layers replaced by class and operator, and layers left to the host by class and reason."""

    replaced: Counter[tuple[str, str]] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = []
        for title, counts in (("replaced", self.replaced), ("left", self.left)):
            lines += [f"{title:<8}  {n:>4} × {name:<24} {text}" for (name, text), n in sorted(counts.items())]
        return "\n".join(lines)


class _Swap:
    """The changes made to one model, in order, and the report of them."""

    def __init__(self, model: Any):
        self.model = model
        self.report = Report()
        self.rotation_reason = _rotation_reason(model)
        self.changes: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        self.changes.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def forward(self, module: nn.Module, function: Callable[..., Any], operator: str) -> None:
        """Gives one module another forward."""
        self.set(module, "forward", types.MethodType(function, module))
        self.report.replaced[type(module).__name__, operator] += 1

    def undo(self) -> None:
        for owner, name, before in reversed(self.changes):
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def enable(model: Any) -> Report:
    """Swaps the layers of a transformers model for our operators, in place, for inference.

    Args:
        model: a PreTrainedModel made of Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE, Gemma, Gemma2 or Gemma3 layers.
    Returns: what was replaced, and what was left and why; `print` it. The same report again when the model is enabled already.
    Raises: TypeError for another kind of model; NotSupported when no layer of it is known. Later, inside the model,
        NotSupported for a mask or an option that attention cannot express, and where gradients are asked for: nothing falls
        back to the host's implementation.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"enable: `model` must be a PreTrainedModel of transformers, got {type(model).__name__}")
    if _ENABLED in vars(model):
        return vars(model)[_ENABLED].report
    swap = _Swap(model)
    try:
        for module in model.modules():
            _visit(swap, module)
    except BaseException:
        swap.undo()
        raise
    if not swap.report.replaced:
        raise NotSupported(f"enable: no layer of {type(model).__name__} can be replaced\n{swap.report}")
    vars(model)[_ENABLED] = swap
    return swap.report


def disable(model: Any) -> None:
    """Puts every layer back exactly as `enable` found it; ValueError when the model is not enabled."""
    swap = vars(model).pop(_ENABLED, None)
    if swap is None:
        raise ValueError(f"disable: this {type(model).__name__} is not enabled")
    swap.undo()


def _visit(swap: _Swap, module: nn.Module) -> None:
    """Swaps one module, or reports why not when it has weights of its own or a kind that we know."""
    name, family = type(module).__name__, _family_of(module)
    kind = next((kind for kind in _SWAPS if name.endswith(kind)), None)
    if kind is None:
        holds_weights = any(True for _ in module.parameters(recurse=False))
        fault = "no operator takes its place" if holds_weights else None
    elif family is None:
        fault = "not one of our families"
    elif "forward" in vars(module):
        fault = "its forward is not the one of its class"
    else:
        fault = _SWAPS[kind](swap, module, family)
    if fault is not None:
        swap.report.left[name, fault] += 1


def _family_of(module: nn.Module) -> Family | None:
    """The family whose modeling file defines the module's class."""
    cls = type(module)
    for name, family in FAMILIES.items():
        if cls.__module__ == f"transformers.models.{name}.modeling_{name}" and cls.__name__.startswith(family.prefix):
            return family
    return None


def _refuse_gradients(module: nn.Module, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        name = type(module).__name__
        raise NotSupported(f"{name}: our operators have no gradients; run the model under torch.inference_mode()")


# ---- norms, MLPs, rotary embedding


def _swap_norm(swap: _Swap, module: nn.Module, family: Family) -> str | None:
    if module.weight.dtype != swap.model.dtype:
        return f"its weight is {module.weight.dtype} in a model of {swap.model.dtype}, so its result has another dtype"
    eps = getattr(module, family.eps)

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        _refuse_gradients(self, hidden_states, self.weight)
        return rms_norm(hidden_states, self.weight, eps=eps, weight_offset=family.weight_offset)

    swap.forward(module, forward, "rms_norm")
    return None


def _swap_mlp(swap: _Swap, module: nn.Module, family: Family) -> str | None:
    from transformers.activations import ACT2FN

    name = next((name for name in GATES if type(module.act_fn) is type(ACT2FN[name])), None)
    if name is None:
        return f"no operator for the activation {type(module.act_fn).__name__}"
    for projection in (module.gate_proj, module.up_proj):
        if type(projection) is not nn.Linear:
            return f"its projection is a {type(projection).__name__}, not torch's Linear"
        if "forward" in vars(projection) or projection._forward_hooks or projection._forward_pre_hooks:
            return "its projection has hooks or a forward of its own"
    gate = GATES[name]

    def forward(self: Any, x: Tensor) -> Tensor:
        _refuse_gradients(self, x, self.gate_proj.weight)
        width = self.gate_proj.out_features
        rows = x.reshape(-1, x.shape[-1])
        both = x.new_empty(rows.shape[0], 2 * width)
        for linear, half in ((self.gate_proj, both[:, :width]), (self.up_proj, both[:, width:])):
            if linear.bias is None:
                torch.mm(rows, linear.weight.t(), out=half)
            else:
                torch.addmm(linear.bias, rows, linear.weight.t(), out=half)
        return self.down_proj(gate(both).view(*x.shape[:-1], width))

    swap.forward(module, forward, "gelu_and_mul" if "gelu" in name else "silu_and_mul")
    return None


def _swap_experts(swap: _Swap, module: Any, family: Family) -> str | None:
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import ExpertsInterface

    faults = {
        f"the activation {type(module.act_fn).__name__}": type(module.act_fn) is not type(ACT2FN["silu"]),
        "experts without a gate": not module.has_gate,
        "biases": module.has_bias,
        "transposed or interleaved weights": module.is_transposed or not module.is_concatenated,
        "experts of several ranks": module._is_expert_parallel,
    }
    found = [name for name, given in faults.items() if given]
    if found:
        return f"no operator for {', '.join(found)}"
    ExpertsInterface.register(EXPERTS, mix)
    for config in (module.config, swap.model.config):
        if config._experts_implementation != EXPERTS:
            swap.set(config, "_experts_implementation_internal", EXPERTS)
    swap.report.replaced[type(module).__name__, "fused_moe"] += 1
    return None


def mix(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of each token for ExpertsInterface: hidden_states [tokens, width], indices and weights [tokens, k]."""
    _refuse_gradients(module, hidden_states, module.gate_up_proj)
    return fused_moe(hidden_states, module.gate_up_proj, module.down_proj, top_k_index.int(), top_k_weights.float())


def _swap_rotary(swap: _Swap, module: nn.Module, family: Family) -> str | None:
    if swap.rotation_reason is not None:
        return swap.rotation_reason
    of_host = module.forward

    def forward(self: Any, x: Tensor, position_ids: Tensor, *layer_type: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """(cos_sin, positions) in place of (cos, sin): a row for each token of the batch."""
        cos, sin = of_host(x.new_empty(0, dtype=torch.float32), position_ids, *layer_type, **options)
        half = cos.shape[-1] // 2
        table = torch.cat((cos[..., :half], sin[..., :half]), -1).expand(x.shape[0], -1, -1).reshape(-1, 2 * half)
        return table, torch.arange(table.shape[0], dtype=torch.int32, device=table.device)

    swap.forward(module, forward, "table of rope, once for each forward pass")
    return None


def _rotate(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb for what our rotary embedding returns; q and k are [batch, heads, length, head_dim]."""
    batch, _, length, _ = q.shape
    rotated = rope(q.transpose(1, 2).flatten(0, 1), k.transpose(1, 2).flatten(0, 1), cos_sin, positions)
    q, k = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in rotated)
    return q, k


_NO_INTERFACE = "its model does not choose its attention by AttentionInterface"


def _rotation_reason(model: Any) -> str | None:
    """Why the rotary embedding of a model cannot be exchanged for one that returns a table."""
    if not model._can_set_attn_implementation():
        return _NO_INTERFACE
    for module in model.modules():
        if _family_of(module) is not None and type(module).__name__.endswith("Attention"):
            function = type(module).forward
            if "apply_rotary_pos_emb" not in function.__code__.co_names or "forward" in vars(module):
                return f"the forward of {type(module).__name__} is not the one whose apply_rotary_pos_emb we know"
    return None


def _rebound(function: Any, **names: Any) -> types.FunctionType:
    """The same function, which sees other objects under these global names."""
    scope = {**function.__globals__, **names}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# ---- attention


def _swap_attention(swap: _Swap, module: Any, family: Family) -> str | None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if not swap.model._can_set_attn_implementation():
        return _NO_INTERFACE
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, packed_lengths)
    for config in (module.config, swap.model.config):
        if config._attn_implementation != ATTENTION:
            # The host's setter would look for a flash-attention package because of the name.
            swap.set(config, "_attn_implementation_internal", ATTENTION)
    if swap.rotation_reason is None:
        swap.forward(module, _rebound(type(module).forward, apply_rotary_pos_emb=_rotate), "attention_prefill, rope")
    else:
        swap.report.replaced[type(module).__name__, "attention_prefill"] += 1
    return None


def packed_lengths(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **others: Any,
) -> Tensor:
    """The mask of the host, as the offsets of attention_prefill: int32 [2, 1, 1, requests + 1], queries then keys.

    One request when no row has padding: all rows have the same lengths, and their heads stand side by side. Otherwise five for
    each row, since offsets have no gaps: queries that are padding, keys that are padding, the sequence, and again both at its
    end. Four dimensions, because that is what the host hands through unchanged.

    Args: as transformers.masking_utils calls its mask functions; attention_mask is [batch, tokens], True for a token.
    Raises: NotSupported for a pattern other than causal or windowed causal, and for padding inside a sequence. A padding mask
        is read by the host once for each pattern of a forward pass, as the host's own masks are.
    """
    patterns = dict(_patterns(mask_function))
    unknown = patterns.keys() - _KNOWN_PATTERNS
    if unknown:
        raise NotSupported(f"{ATTENTION}: no operator for a mask of {sorted(unknown)}; there are {sorted(_KNOWN_PATTERNS)}")
    if _PACKED in patterns:
        return _packed_rows(_closed_over(patterns[_PACKED], "packed_sequence_mask"))
    end = q_offset + q_length
    tokens = attention_mask.shape[1] if attention_mask is not None else end
    complete = isinstance(end, Tensor) or tokens >= end
    if attention_mask is None or (complete and bool(attention_mask.all())):
        offsets = torch.zeros(2, 2, dtype=torch.int32, device=device)
        offsets[0, 1], offsets[1, 1] = q_length, end - kv_offset
        return offsets.view(2, 1, 1, 2)
    seen = attention_mask.to(device=device, dtype=torch.bool)
    first = seen.int().argmax(1)
    stop = torch.where(seen.any(1), tokens - seen.flip(1).int().argmax(1), first)
    holes = (seen.sum(1) != stop - first).nonzero()
    if len(holes):
        raise NotSupported(f"{ATTENTION}: row {int(holes[0])} of the attention mask has padding between its tokens")
    pad_q, real_q = _cut(first, stop, q_offset, q_length)
    pad_k, real_k = _cut(first, torch.minimum(stop, torch.as_tensor(end, device=device)), kv_offset, kv_length)
    none = torch.zeros_like(first)
    queries = torch.stack((pad_q, none, real_q, q_length - pad_q - real_q, none), 1)
    keys = torch.stack((none, pad_k, real_k, none, kv_length - pad_k - real_k), 1)
    offsets = torch.stack((queries.flatten(), keys.flatten())).cumsum(1)
    return nn.functional.pad(offsets, (1, 0)).int().view(2, 1, 1, -1)


def _cut(first: Tensor, stop: Tensor, offset: int | Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Of `length` positions from `offset`, how many lie before `first`, and how many from there to `stop`."""
    before = (first - offset).clamp(0, length)
    return before, ((stop - offset).clamp(0, length) - before).clamp(min=0)


_PACKED = "packed_sequence_mask_function"
_KNOWN_PATTERNS = {"causal_mask_function", "sliding_window_overlay", _PACKED}


def _patterns(mask_function: Any) -> Iterator[tuple[str, Any]]:
    """The patterns whose intersection a mask function of the host is, by name."""
    name = mask_function.__qualname__.split(".")[0]
    if name == "and_masks":
        for part in _closed_over(mask_function, "mask_functions"):
            yield from _patterns(part)
    elif name == "remap_positions_for_packed_sequence":
        yield from _patterns(_closed_over(mask_function, "mask_function"))
    else:
        yield name, mask_function


def _closed_over(function: Any, name: str) -> Any:
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


def _packed_rows(sequence: Tensor, capturing: bool | None = None) -> Tensor:
    """Offsets of rows that hold several sequences each; sequence [batch, tokens] numbers them within a row.

    The host reads how many there are, except while a CUDA graph is captured: then there are as many as tokens, most of them
    empty. Continuous batching captures, and does not use this mask.
    """
    batch, tokens = sequence.shape
    apart = (sequence + tokens * torch.arange(batch, device=sequence.device)[:, None]).flatten()
    if capturing is None:
        capturing = sequence.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing:
        counts = torch.zeros_like(apart).scatter_add_(0, apart, torch.ones_like(apart))
    else:
        _, counts = torch.unique_consecutive(apart, return_counts=True)
    # One empty request more, so that a single sequence is told from rows without padding.
    offsets = nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    offsets = torch.cat((offsets, offsets[-1:]))
    return torch.stack((offsets, offsets)).view(2, 1, 1, -1)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for AttentionInterface, in a batch with or without padding, and packed by continuous batching.

    Args: as transformers calls it: query [B, Hq, Tq, D], key [B, Hkv, Tk, D], value [B, Hkv, Tk, Dv]; attention_mask what
        `packed_lengths` returned, None for sequences without padding that end together.
    Returns: ([B, Tq, Hq, Dv], None); rows of padding are 0.
    Raises: NotSupported for gradients, dropout, attention weights as a result, a position bias, attention that is not causal,
        and masks of another kind.
    """
    _refuse_gradients(module, query, key, value)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    faults = {
        "dropout": dropout > 0,
        "attention that is not causal": not causal,
        "attention weights as a result": bool(kwargs.get("output_attentions")),
        "a position bias": kwargs.get("position_bias") is not None,
        "a cache with block tables": cache is not None and kwargs.get("block_table") is not None,
        "a mask in four dimensions": attention_mask is not None and attention_mask.dtype != torch.int32,
    }
    wanted = [name for name, asked in faults.items() if asked]
    if wanted:
        raise NotSupported(f"{ATTENTION}: no operator for {', '.join(wanted)}")
    options = {
        "scale": scaling,
        "window": (-1, -1) if sliding_window is None else (sliding_window - 1, -1),
        "softcap": softcap,
        "sinks": s_aux,
    }
    batch, _, length, _ = query.shape
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        lengths = kwargs["cu_seq_lens_q"].int(), kwargs["cu_seq_lens_k"]
        longest = {"max_seqlen_q": kwargs["max_length_q"], "max_seqlen_k": kwargs["max_length_k"]}
        out = attention_prefill(*(x[0].transpose(0, 1) for x in (query, key, value)), *lengths, **longest, **options)
        return out[None], None
    longest = {"max_seqlen_q": length, "max_seqlen_k": key.shape[2]}
    if attention_mask is None:
        attention_mask = torch.tensor([[0, length], [0, key.shape[2]]], dtype=torch.int32, device=query.device)
    cu_seqlens_q, cu_seqlens_k = attention_mask.flatten(1).unbind() if attention_mask.dim() == 4 else attention_mask.unbind()
    if cu_seqlens_q.shape[0] == 2:
        side_by_side = (x.flatten(0, 1).transpose(0, 1) for x in (query, key, value))
        out = attention_prefill(*side_by_side, cu_seqlens_q, cu_seqlens_k, **longest, **options)
        return out.unflatten(1, (batch, -1)).transpose(0, 1), None
    in_rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = attention_prefill(*in_rows, cu_seqlens_q, cu_seqlens_k, **longest, **options)
    return out.unflatten(0, (batch, length)), None


_SWAPS: dict[str, Callable[[_Swap, Any, Family], str | None]] = {
    "RMSNorm": _swap_norm,
    "MLP": _swap_mlp,
    "Experts": _swap_experts,
    "RotaryEmbedding": _swap_rotary,
    "Attention": _swap_attention,
}
