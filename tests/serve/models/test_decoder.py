"""The decoder against transformers: logits at every position, in float32 and in bfloat16, whole and in pieces."""

import pytest
import torch

from penstock.serve.kv import KVPool
from penstock.serve.models import decoder
from penstock.serve.models.batch import Batch
from penstock.serve.models.decoder import Decoder
from penstock.serve.models.spec import read_spec
from penstock.serve.models.weights import load_weights
from penstock.serve.states import StatePool

PAGE = 8
LENGTHS = (37, 1, 22)
PROMPTS = [torch.randint(3, 199, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]


class Session:
    """A few requests with their own pages, computed in whatever pieces a test likes."""

    def __init__(self, directory, dtype, page_size=PAGE, requests=3, longest=48):
        spec = read_spec(directory)
        weights = load_weights(directory, spec, dtype=dtype)
        self.page_size, pages = page_size, -(-longest // page_size)
        self.pool = KVPool(spec, requests * pages, page_size, dtype=dtype, device="cpu")
        self.pool.data.fill_(torch.nan)
        states = StatePool(spec.mambas, requests, dtype=dtype, device="cpu").layers
        self.decoder = Decoder(spec, weights, self.pool.layers, max_model_len=longest, states=states)
        shuffled = torch.randperm(requests * pages, generator=torch.Generator().manual_seed(0)).int()
        self.table = shuffled.view(requests, pages)
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
        batch = Batch(
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            page_table=self.table[rows],
            seqlens_k=torch.tensor([self.lengths[row] for row in rows], dtype=torch.int32),
            num_decodes=len(decodes),
            cu_seqlens_q=cu_seqlens if prefills else None,
            max_seqlen_q=max((len(piece) for piece in prefills.values()), default=1),
            state_slots=torch.tensor(rows, dtype=torch.int32),
        )
        logits = self.decoder.logits(self.decoder.forward(torch.cat(pieces).int(), batch))
        return dict(zip(rows, logits.split([len(piece) for piece in pieces]), strict=True))


@pytest.fixture(scope="session")
def expected(checkpoint):
    """expected(case, dtype) → the logits [n, V] that transformers computes for each prompt, one prompt at a time."""
    import transformers

    known = {}

    def compute(case, dtype):
        if (case, dtype) not in known:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint(case), dtype=dtype, attn_implementation="eager"
            )
            with torch.inference_mode():
                known[case, dtype] = [model(prompt[None]).logits[0].float() for prompt in PROMPTS]
        return known[case, dtype]

    return compute


def relative_error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("fused", [False, True])
def test_logits_of_whole_prompts(case, checkpoint, expected, monkeypatch, fused):
    monkeypatch.setattr(decoder, "FUSED", ("cpu",) if fused else ())
    got = Session(checkpoint(case), torch.float32).step({}, dict(enumerate(PROMPTS)))
    for i, wanted in enumerate(expected(case, torch.float32)):
        assert wanted.std() > 0.1  # logits that differ enough for the comparison to mean something
        torch.testing.assert_close(got[i], wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())


def test_logits_of_chunks_and_decodes_in_mixed_batches(case, checkpoint, expected):
    session = Session(checkpoint(case), torch.float32)
    wanted = expected(case, torch.float32)
    got = {i: [] for i in range(len(PROMPTS))}

    def step(decodes, prefills):
        pieces = {i: PROMPTS[i][session.lengths[i] : session.lengths[i] + n] for i, n in (*decodes.items(), *prefills.items())}
        result = session.step({i: pieces[i] for i in decodes}, {i: pieces[i] for i in prefills})
        for i, logits in result.items():
            got[i].append(logits)

    step({}, {1: 1, 0: 5})
    step({}, {0: 3, 2: 11})
    while session.lengths[2] < LENGTHS[2]:
        step({2: 1}, {0: 1 + session.lengths[2] % 3})
    while session.lengths[0] < LENGTHS[0]:
        step({0: 1}, {})
    for i in got:
        torch.testing.assert_close(torch.cat(got[i]), wanted[i], rtol=1e-4, atol=2e-5 * wanted[i].abs().max().item())


def test_bfloat16_is_as_accurate_as_transformers(case, checkpoint, expected):
    got = Session(checkpoint(case), torch.bfloat16).step({}, dict(enumerate(PROMPTS)))
    wanted, peer = expected(case, torch.float32), expected(case, torch.bfloat16)
    ours = relative_error(torch.cat(list(got.values())), torch.cat(wanted))
    theirs = relative_error(torch.cat(peer), torch.cat(wanted))
    assert ours <= 2 * theirs, (ours, theirs)
