"""A decoder and its pages, driven by a test in whatever pieces it likes."""

import torch

from penstock.serve.kv import KVPool
from penstock.serve.models.batch import Batch
from penstock.serve.models.decoder import Decoder
from penstock.serve.models.spec import read_spec
from penstock.serve.models.weights import load_weights
from penstock.serve.states import StatePool

PAGE = 8


class Session:
    """A few requests with their own pages, computed in whatever pieces a test likes."""

    def __init__(self, directory, dtype, page_size=PAGE, requests=3, longest=48, device="cpu"):
        spec = read_spec(directory)
        weights = load_weights(directory, spec, dtype=dtype, device=device)
        self.page_size, pages = page_size, -(-longest // page_size)
        self.pool = KVPool(spec, requests * pages, page_size, dtype=dtype, device=device)
        self.pool.data.fill_(torch.nan)
        states = StatePool(spec.mambas, requests, dtype=dtype, device=device).layers
        self.decoder = Decoder(spec, weights, self.pool.layers, max_model_len=longest, states=states)
        shuffled = torch.randperm(requests * pages, generator=torch.Generator().manual_seed(0)).int()
        self.table = shuffled.view(requests, pages)
        self.device = device
        self.lengths = [0] * requests

    @torch.inference_mode()
    def step(self, decodes, prefills):
        """decodes and prefills: {request: tokens}; returns {request: logits of those tokens}."""
        rows, positions, slots = [*decodes, *prefills], [], []
        pieces = [*decodes.values(), *prefills.values()]
        for row, piece in zip(rows, pieces, strict=True):
            at = torch.arange(self.lengths[row], self.lengths[row] + len(piece), dtype=torch.int32)
            positions.append(at)
            slots.append(self.table[row, at // self.page_size] * self.page_size + at % self.page_size)
            self.lengths[row] += len(piece)
        cu_seqlens = torch.tensor([0, *(len(piece) for piece in prefills.values())], dtype=torch.int32).cumsum(0).int()
        to = self.device
        batch = Batch(
            positions=torch.cat(positions).to(to),
            slots=torch.cat(slots).to(to),
            page_table=self.table[rows].to(to),
            seqlens_k=torch.tensor([self.lengths[row] for row in rows], dtype=torch.int32, device=to),
            num_decodes=len(decodes),
            cu_seqlens_q=cu_seqlens.to(to) if prefills else None,
            max_seqlen_q=max((len(piece) for piece in prefills.values()), default=1),
            state_slots=torch.tensor(rows, dtype=torch.int32, device=to),
        )
        logits = self.decoder.logits(self.decoder.forward(torch.cat(pieces).int().to(to), batch))
        return dict(zip(rows, logits.split([len(piece) for piece in pieces]), strict=True))
