"""The decoder against transformers: logits at every position, in float32 and in bfloat16, whole and in pieces."""

import pytest
import torch

from penstock.serve.models import decoder
from tests.serve.models.session import Session

LENGTHS = (37, 1, 22)
PROMPTS = [torch.randint(3, 199, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]


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
