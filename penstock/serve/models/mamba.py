"""The Mamba-2 mixer of a decoder layer, in the place of attention.

in_proj gives the gate z, what is convolved (x, B and C) and a step for each head; the output of the scan is gated and normed.
"""

import torch
from torch import Tensor, split_with_sizes

from penstock.ops import causal_conv1d, causal_conv1d_update, rms_norm, ssd_prefill, ssm_state_update
from penstock.serve.models.batch import Batch
from penstock.serve.models.layer_spec import MambaSpec
from penstock.serve.models.linear import linear
from penstock.serve.models.parameters import MambaWeights


class MambaMixer:
    """One layer's mixer and the states of all slots in it."""

    def __init__(self, spec: MambaSpec, weights: MambaWeights, state: tuple[Tensor, Tensor], *, eps: float):
        self.spec = spec
        self.weights = weights
        self.conv_state, self.ssm_state = state
        self.eps = eps
        self.A = -weights.A_log.float().exp()
        self.D, self.dt_bias = weights.D.float(), weights.dt_bias.float()
        self.parts = (spec.inner_size, spec.conv_channels, spec.num_heads)
        grouped = spec.num_groups * spec.state_size
        self.conv_parts = (spec.inner_size, grouped, grouped)
        # Each group of channels is normed by itself.
        self.norm = (
            weights.norm if spec.num_groups == 1 else torch.ones_like(weights.norm[: spec.inner_size // spec.num_groups])
        )

    def __call__(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Normed [T, H] → [T, inner] before the output projection; moves the states of the batch's slots on."""
        own, spec, decodes = self.weights, self.spec, batch.num_decodes
        z, mixed, dt = split_with_sizes(linear(hidden, own.in_proj, own.in_bias), self.parts, 1)
        y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        if decodes:
            self._decode(y[:decodes], z[:decodes], mixed[:decodes], dt[:decodes], batch)
        if batch.cu_seqlens_q is not None:
            self._prefill(y[decodes:], z[decodes:], mixed[decodes:], dt[decodes:], batch)
        if spec.num_groups == 1:
            rms_norm(y, self.norm, eps=self.eps, out=y)
        else:
            groups = y.view(len(y), spec.num_groups, -1)
            rms_norm(groups, self.norm, eps=self.eps, out=groups)
            y.mul_(own.norm)
        return y

    def _decode(self, y: Tensor, z: Tensor, mixed: Tensor, dt: Tensor, batch: Batch) -> None:
        """One token of each request."""
        assert batch.state_slots is not None
        own, slots = self.weights, batch.state_slots[: batch.num_decodes]
        mixed = causal_conv1d_update(mixed, own.conv, own.conv_bias, self.conv_state, state_indices=slots)
        x, B, C = self._split(mixed)
        ssm_state_update(
            self.ssm_state,
            x,
            dt,
            self.A,
            B,
            C,
            D=self.D,
            z=z.view(x.shape),
            dt_bias=self.dt_bias,
            dt_limit=self.spec.dt_limit,
            state_indices=slots,
            out=y.view(x.shape),
        )

    def _prefill(self, y: Tensor, z: Tensor, mixed: Tensor, dt: Tensor, batch: Batch) -> None:
        """A chunk of each request, from the state of the chunk before it."""
        assert batch.state_slots is not None and batch.cu_seqlens_q is not None
        own, slots, cu_seqlens = self.weights, batch.state_slots[batch.num_decodes :], batch.cu_seqlens_q
        mixed = causal_conv1d(mixed, own.conv, own.conv_bias, cu_seqlens, state=self.conv_state, state_indices=slots)
        x, B, C = self._split(mixed)
        _, states = ssd_prefill(
            x,
            dt,
            self.A,
            B,
            C,
            cu_seqlens,
            D=self.D,
            z=z.view(x.shape),
            dt_bias=self.dt_bias,
            dt_limit=self.spec.dt_limit,
            initial_states=self.ssm_state.index_select(0, slots),
            out=(y.view(x.shape), None),
        )
        self.ssm_state.index_copy_(0, slots.long(), states)

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        x, B, C = split_with_sizes(mixed, self.conv_parts, 1)
        grouped = (len(mixed), spec.num_groups, spec.state_size)
        return x.view(len(mixed), spec.num_heads, spec.head_dim), B.view(grouped), C.view(grouped)
