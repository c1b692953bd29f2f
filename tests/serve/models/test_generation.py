"""Greedy tokens of scheduler and runner together against transformers, for every architecture."""

import pytest
import torch

from penstock.serve.config import EngineConfig, SchedulerConfig
from penstock.serve.params import SamplingParams
from penstock.serve.runner import Runner
from penstock.serve.scheduler import Scheduler, TokenEvent

NEW_TOKENS = 12
LENGTHS = (19, 3, 30, 1, 11, 24, 7, 14)
PROMPTS = [torch.randint(3, 199, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in LENGTHS]


def generate(runner, prompts, *, budget=64, chunk=None, max_num_seqs=8, draft=None):
    """Greedy tokens of each prompt and the number of preemptions on the way.

    Args:
        draft: request → guesses of its next tokens.
    """
    limits = SchedulerConfig(
        num_pages=runner.num_pages,
        page_size=runner.page_size,
        max_model_len=runner.max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_prefill_chunk=chunk,
    )
    scheduler, tokens = Scheduler(limits), [[] for _ in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        scheduler.add(str(i), prompt, params, seed=i)
    guess = scheduler.draftable if draft else lambda _: ()
    while (plan := scheduler.step({each.request_id: draft(each) for each in guess(4)})) is not None:
        for event in scheduler.commit(runner.execute(plan)):
            if isinstance(event, TokenEvent):
                tokens[int(event.request_id)].append(event.token_id)
    return tokens, scheduler.num_preemptions


@pytest.fixture(scope="session")
def expected(checkpoint):
    """expected(case) → the greedy tokens of transformers' own generate for each prompt alone."""
    import transformers

    known = {}

    def compute(case):
        if case not in known:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint(case), dtype=torch.float32, attn_implementation="eager"
            )
            options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            known[case] = []
            for prompt in PROMPTS:
                ids = torch.tensor([prompt])
                output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
                known[case].append(output[0, len(prompt) :].tolist())
        return known[case]

    return compute


def load(directory, **options):
    return Runner.load(EngineConfig(directory, device="cpu", dtype="float32", page_size=8, **options))


def test_one_request(case, checkpoint, expected):
    tokens, _ = generate(load(checkpoint(case), max_num_seqs=1), PROMPTS[:1], max_num_seqs=1)
    assert tokens == expected(case)[:1]


def test_eight_ragged_requests_in_small_chunks(case, checkpoint, expected):
    tokens, _ = generate(load(checkpoint(case)), PROMPTS, budget=13, chunk=6)
    assert tokens == expected(case)
    assert len({tuple(output) for output in tokens}) == len(PROMPTS)  # not the same token for ever


def test_guesses_change_nothing(case, checkpoint, expected):
    runner, wrong = load(checkpoint(case), max_num_seqs=4), iter(range(10**6))

    def right(request):
        done = len(request.token_ids) - request.num_prompt
        return expected(case)[int(request.request_id)][done : done + request.limit]

    def mixed(request):
        tokens = right(request)[: next(wrong) % 5]
        return [*tokens[:2], *(abs(token - 1) for token in tokens[2:])]

    assert generate(runner, PROMPTS[:4], draft=right, max_num_seqs=4)[0] == expected(case)[:4]
    assert generate(runner, PROMPTS, draft=mixed, max_num_seqs=4)[0] == expected(case)


def test_preemption_changes_nothing(case, checkpoint, expected):
    runner = load(checkpoint(case), max_model_len=48)
    runner.num_pages = 9
    tokens, preemptions = generate(runner, PROMPTS, budget=40)
    assert preemptions > 0
    assert tokens == expected(case)


def test_load_takes_the_dtype_of_the_checkpoint_and_reports_progress(checkpoint):
    seen = []
    config = EngineConfig(checkpoint("qwen3"), device="cpu", max_model_len=64, max_num_seqs=2)
    runner = Runner.load(config, progress=lambda done, total: seen.append(done / total))
    assert runner.pool.data.dtype is torch.float32
    assert (runner.num_pages, runner.max_model_len, runner.vocab_size, runner.eos_token_ids) == (8, 64, 199, (2,))
    assert seen == sorted(seen) and seen[-1] == 1.0


@pytest.mark.parametrize("page_size", [1, 2, 256])
def test_page_sizes(checkpoint, expected, page_size):
    config = EngineConfig(checkpoint("mistral"), device="cpu", dtype="float32", page_size=page_size)
    assert generate(Runner.load(config), PROMPTS, budget=40)[0] == expected("mistral")
