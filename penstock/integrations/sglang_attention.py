"""The class that SGLang wants of an attention backend; imported by SGLang alone. The work is done in sglang.py."""

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch import Tensor

from penstock.core.op import NotSupported
from penstock.integrations.sglang import BACKEND, Step, attend, pages_of


def _refuse(faults: dict[str, bool]) -> None:
    found = [name for name, given in faults.items() if given]
    if found:
        raise NotSupported(f"{BACKEND}: no operator for {', '.join(found)}")


class Backend(AttentionBackend):
    """Decoder attention over token pools in the model's dtype; eager, and decode in CUDA graphs."""

    def __init__(self, runner: Any):
        super().__init__()
        self.page_size = runner.page_size
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.pool = runner.token_to_kv_pool
        self.max_pages = -(-runner.model_config.context_len // self.page_size)
        self.device = runner.device
        self.graphs: dict[int, Step] = {}
        self.forward_metadata: Step | None = None
        _refuse(
            {
                f"pages of {self.page_size} tokens": self.page_size not in (1, 2, 4, 8, 16, 32, 64, 128, 256),
                f"a cache of {runner.kv_cache_dtype}": runner.kv_cache_dtype != runner.dtype,
                "latent attention": runner.use_mla_backend,
                "speculative decoding": runner.spec_algorithm.is_speculative(),
                "a pool of windows": isinstance(self.pool, SWAKVPool),
            }
        )

    def init_forward_metadata(self, forward_batch: Any) -> None:
        mode, lengths = forward_batch.forward_mode, forward_batch.seq_lens
        pages = -(-int(forward_batch.seq_lens_cpu.max()) // self.page_size) if len(lengths) else 0
        step = Step(pages_of(self.req_to_token, forward_batch.req_pool_indices, self.page_size, pages), lengths.int())
        if not mode.is_decode_or_idle():
            _refuse({f"forward mode {mode}": not mode.is_extend()})
            step.cu_seqlens_q = torch.nn.functional.pad(forward_batch.extend_seq_lens.cumsum(0), (1, 0)).int()
            step.longest = max(forward_batch.extend_seq_lens_cpu, default=0)
        self.forward_metadata = step

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.tables = torch.zeros(max_bs, self.max_pages, dtype=torch.int32, device=self.device)
        self.lengths = torch.zeros(max_bs, dtype=torch.int32, device=self.device)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        _refuse({f"CUDA graphs of {forward_batch.forward_mode}": not forward_batch.forward_mode.is_decode_or_idle()})
        requests = forward_batch.batch_size
        if in_capture:
            self.graphs[requests] = Step(self.tables[:requests], self.lengths[:requests])
        self.forward_metadata = self.graphs[requests]

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        requests = forward_batch.batch_size
        step = self.graphs[requests]
        indices = forward_batch.req_pool_indices[:requests]
        step.page_table.copy_(pages_of(self.req_to_token, indices, self.page_size, self.max_pages))
        step.seq_lens.copy_(forward_batch.seq_lens[:requests])

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **options: Any
    ) -> Tensor:
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, options)

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **options: Any
    ) -> Tensor:
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache, options)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool, options: dict[str, Any]
    ) -> Tensor:
        sinks = options.pop("sinks", None)
        faults = {f"the option {name}": value is not None for name, value in options.items()}
        faults["cross attention"] = layer.is_cross_attention
        faults[f"attention of type {layer.attn_type}"] = layer.attn_type != AttentionType.DECODER
        faults["temperatures by length"] = layer.xai_temperature_len > 0
        _refuse(faults)
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v)
        assert self.forward_metadata is not None, "SGLang calls init_forward_metadata before the layers"
        heads = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        k_pool, v_pool = self.pool.get_kv_buffer(layer.layer_id)
        result = attend(
            heads,
            k_pool,
            v_pool,
            self.forward_metadata,
            self.page_size,
            scale=layer.scaling,
            window=layer.sliding_window_size if layer.sliding_window_size > -1 else None,
            softcap=layer.logit_cap or None,
            sinks=sinks,
        )
        return result.flatten(1)
