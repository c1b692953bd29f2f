"""Recurrent state beside the pages: for each slot of the runner and each Mamba layer what convolution and scan carry on.

A state belongs to its request's slot alone. It cannot be cut at a page nor taken back by a token: a model with recurrent state
has no shared prefixes and no drafts to reject, and a request that was preempted is computed again from its first token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.serve.models.layer_spec import MambaSpec
from penstock.serve.models.spec import ModelError, ModelSpec
from penstock.serve.plan import StepPlan


def slot_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes of one slot in all layers."""
    return sum(m.conv_channels * (m.conv_width - 1) * dtype.itemsize + 4 * m.inner_size * m.state_size for m in spec.mambas)


class StatePool:
    """The state of every slot.

    layers[i], of the i-th Mamba layer, is (conv [slots, channels, W-1] in the model's dtype, ssm [slots, heads, P, N] float32).
    """

    def __init__(self, mambas: Sequence[MambaSpec], num_slots: int, *, dtype: torch.dtype, device: str | torch.device):
        shapes = {(m.conv_channels, m.conv_width - 1, m.num_heads, m.head_dim, m.state_size) for m in mambas}
        if len(shapes) > 1:
            raise ModelError(f"the Mamba layers must agree in their sizes, got {sorted(shapes)}")
        channels, kept, heads, size, states = shapes.pop() if shapes else (0, 0, 0, 0, 0)
        self.conv = torch.zeros((len(mambas), num_slots, channels, kept), dtype=dtype, device=device)
        self.ssm = torch.zeros((len(mambas), num_slots, heads, size, states), dtype=torch.float32, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = list(zip(self.conv, self.ssm, strict=True))
        self._next = [0] * num_slots

    def enter(self, plan: StepPlan) -> None:
        """Clears the slots of requests that begin in this step; every other one must go on where it stopped."""
        fresh = []
        for work in (*plan.decodes, *plan.prefills):
            if work.start == 0:
                fresh.append(work.slot)
            elif work.start != self._next[work.slot]:
                stands = self._next[work.slot]
                raise RuntimeError(
                    f"slot {work.slot} goes on at token {work.start}, its recurrent state is that of {stands} tokens"
                )
            self._next[work.slot] = work.start + len(work.token_ids)
        if fresh:
            slots = torch.tensor(fresh, device=self.conv.device)
            self.conv.index_fill_(1, slots, 0)
            self.ssm.index_fill_(1, slots, 0)
