"""The classes that vLLM wants of an attention backend; imported by vLLM alone. The work is done in vllm.py."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from penstock.core.op import NotSupported
from penstock.integrations.vllm import BACKEND, Batch, attend
from penstock.ops.attention.decode import MAX_Q_LEN


class Backend(AttentionBackend):
    """Decoder attention over caches of any layout: strides are honoured, so vLLM may choose it."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type["Implementation"]:
        return Implementation

    @staticmethod
    def get_builder_cls() -> type["Builder"]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [16, 32, 64, 128, 256]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= 256

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True


class Builder(AttentionMetadataBuilder[Batch]):
    """A Batch from what vLLM knows of a step; requests of one new token come first, or of the drafted tokens and one."""

    reorder_batch_threshold: int | None = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(reorder_batch_threshold=1, supports_spec_as_decode=True)
        self.reorder_batch_threshold = min(self.reorder_batch_threshold or 1, MAX_Q_LEN)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Batch:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotSupported(f"{BACKEND}: no operator for attention that is not causal, or not for every request")
        decodes, prefills, front, _ = split_decodes_and_prefills(
            common, decode_threshold=self.reorder_batch_threshold, require_uniform=True
        )
        return Batch(
            tokens=common.num_actual_tokens,
            decodes=decodes,
            decode_len=front // decodes if decodes else 1,
            starts=common.query_start_loc[decodes:] - front if prefills else None,
            longest=common.max_query_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slots=common.slot_mapping.int(),
        )


class Implementation(AttentionImpl[Batch]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ):
        refused = {
            "ALiBi": alibi_slopes is not None,
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            f"a cache of {kv_cache_dtype}": kv_cache_dtype not in Backend.supported_kv_cache_dtypes,
        }
        for name, asked in refused.items():
            if asked:
                raise NotSupported(f"{BACKEND}: no operator for {name}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window, self.logits_soft_cap, self.sinks = sliding_window, logits_soft_cap, sinks
        self.stores = kv_sharing_target_layer_name is None

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotSupported(f"{BACKEND}: attention does not quantise its result")
        if attn_metadata is None:  # a dry run, to measure memory
            return output.zero_()
        heads = output.view(query.shape)
        attend(
            query,
            key if self.stores else None,
            value if self.stores else None,
            kv_cache,
            attn_metadata,
            heads,
            scale=self.scale,
            window=self.sliding_window,
            softcap=self.logits_soft_cap,
            sinks=self.sinks,
        )
        return output
