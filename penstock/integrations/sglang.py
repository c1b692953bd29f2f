"""SGLang on our operators: `register`, an entry point of sglang.srt.plugins, acts with PENSTOCK_SGLANG=1.

    layer of the host              registered as                                chosen by
    attention                      register_attention_backend("penstock")       --attention-backend penstock
    mixtures of experts, not       a runner's name, and a hook around           --moe-runner-backend penstock
      quantised                    MoeRunner.run

Nothing is replaced until it is chosen. What needs no SGLang stands here; the class of the attention backend stands in
sglang_attention.py. FP8 caches and FP8 experts go through SGLang's own integration of hpc-ops, see hpc_ops.py.

Source: the plug-in interfaces of SGLang 0.5.23.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from penstock.core import env
from penstock.core.op import NotSupported
from penstock.ops.attention.decode import attention_decode
from penstock.ops.attention.prefill_paged import attention_prefill_paged
from penstock.ops.moe.fused_moe import fused_moe

BACKEND = "penstock"
MIXTURE = "sglang.srt.layers.moe.moe_runner.runner.MoeRunner.run"


def register() -> None:
    """Registers the attention backend and the runner of mixtures, when the environment variable PENSTOCK_SGLANG is 1.

    SGLang calls it once in every process.
    """
    if env.SGLANG.read() == "0":
        return
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.moe.utils import register_moe_runner_backend_name
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_attention_backend_choices, add_moe_runner_backend_choices

    register_attention_backend(BACKEND)(_make_backend)
    add_attention_backend_choices([BACKEND])
    register_moe_runner_backend_name(BACKEND)
    add_moe_runner_backend_choices([BACKEND])
    HookRegistry.register(MIXTURE, _run_mixture, HookType.AROUND)


def _make_backend(runner: Any) -> Any:
    from penstock.integrations.sglang_attention import Backend

    return Backend(runner)


# ---- attention


@dataclass
class Step:
    """The requests of one forward pass.

    Args:
        page_table: [requests, pages] int32.
        seq_lens: [requests] int32, new tokens included.
        cu_seqlens_q: [requests + 1] int32; None in decode, where every request has one new token.
        longest: most new tokens of a request.
    """

    page_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor | None = None
    longest: int = 1


def pages_of(req_to_token: Tensor, requests: Tensor, page_size: int, pages: int) -> Tensor:
    """[requests, pages] int32: the pages of each request, from SGLang's table of token slots; its pages are whole."""
    return (req_to_token[:, : pages * page_size : page_size][requests] // page_size).int()


def attend(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    step: Step,
    page_size: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """attention_decode or attention_prefill_paged over SGLang's pools of tokens.

    Args:
        q: [tokens, heads, dim]; the new keys and values are in the pools already.
        k_pool, v_pool: [slots, KV heads, dim].
        window: tokens to the left of its own that a query sees.
    Returns: [tokens, heads, dim of the values].
    """
    caches = (pool.view(-1, page_size, *pool.shape[1:]) for pool in (k_pool, v_pool))
    options: dict[str, Any] = {
        "scale": scale,
        "window": (-1, -1) if window is None else (window, -1),
        "softcap": softcap,
        "sinks": sinks,
    }
    if step.cu_seqlens_q is None:
        return attention_decode(q, *caches, step.page_table, step.seq_lens, **options)
    return attention_prefill_paged(
        q, *caches, step.page_table, step.cu_seqlens_q, step.seq_lens, max_seqlen_q=step.longest, **options
    )


# ---- mixtures of experts


def _run_mixture(run: Callable[..., Any], runner: Any, dispatch_output: Any, quant_info: Any, lora_info: Any = None) -> Any:
    """Around MoeRunner.run: ours when our name is the chosen runner."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    if get_moe_runner_backend().value != BACKEND:
        return run(runner, dispatch_output, quant_info, lora_info)
    refused = mixture_faults(quant_info, runner.config, runner.lora_enabled)
    if refused:
        raise NotSupported(f"{BACKEND}: no operator for experts with {', '.join(refused)}")
    weights, ids, _ = dispatch_output.topk_output
    result = mixture(dispatch_output.hidden_states, ids, weights, quant_info, runner.config)
    return StandardCombineInput(hidden_states=result)


def mixture_faults(quant_info: Any, config: Any, lora_enabled: bool) -> list[str]:
    """What fused_moe cannot express of a layer that SGLang describes by a TritonMoeQuantInfo and a MoeRunnerConfig."""
    if type(quant_info).__name__ != "TritonMoeQuantInfo":
        return [f"a {type(quant_info).__name__}"]
    quantised = ("use_mxfp8", "use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16")
    unlike = {
        "quantised weights (for FP8: PENSTOCK_HPC=1 and --moe-runner-backend hpc_ops)": any(
            getattr(quant_info, name) for name in quantised
        ),
        "biases": quant_info.b13 is not None or quant_info.b2 is not None,
        "interleaved gates": quant_info.fuse_swiglu_interleaved,
        f"the activation {config.activation}": config.activation != "silu" or not config.is_gated,
        "weights on the input": config.apply_router_weight_on_input,
        "results that are not summed": config.no_combine,
        "a scaled or clamped activation": any(
            value is not None for value in (config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit)
        ),
        "LoRA": lora_enabled,
    }
    return [name for name, found in unlike.items() if found]


def mixture(x: Tensor, ids: Tensor, weights: Tensor, quant_info: Any, config: Any) -> Tensor:
    """fused_moe of [tokens, width]; ids are those of this rank's experts, -1 elsewhere."""
    weights = weights.float()
    if config.routed_scaling_factor is not None:
        weights = weights * config.routed_scaling_factor
    return fused_moe(x, quant_info.w13_weight, quant_info.w2_weight, ids.int(), weights)
