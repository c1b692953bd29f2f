"""Recurrent state beside the pages: slots that are taken again, refusals, a clamp that transformers makes in prefill alone."""

import pytest
import torch
import transformers

from penstock.serve.config import EngineConfig
from penstock.serve.llm import LLM
from penstock.serve.models.spec import ModelError, ModelSpec, read_spec
from penstock.serve.params import SamplingParams
from penstock.serve.plan import SlotInit, StepPlan, Work
from penstock.serve.runner import Runner
from penstock.serve.states import StatePool, slot_bytes

FIELDS = {
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 16,
    "n_groups": 2,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**FIELDS, time_step_limit=(0.005, 0.02))).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("mamba2-limit")
    model.save_pretrained(path)
    return path


def config(path, **options):
    return EngineConfig(path, device="cpu", dtype="float32", page_size=4, skip_tokenizer_init=True, **options)


def generate(llm, prompts):
    return [output.outputs[0].token_ids for output in llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY)]


def test_steps_are_clamped_in_decode_as_in_prefill(model, checkpoint):
    # transformers clamps them in prefill alone, so that its own cache changes what it computes: compared without it.
    prompt = [5, 9, 17, 30, 31, 6, 100]
    wanted = list(prompt)
    with torch.inference_mode():
        for _ in range(GREEDY.max_tokens):
            wanted.append(int(model(torch.tensor([wanted]), use_cache=False).logits[0, -1].argmax()))
    llm = LLM(checkpoint, device="cpu", dtype="float32", skip_tokenizer_init=True)
    assert generate(llm, [prompt]) == [wanted[len(prompt) :]]


def test_a_slot_taken_again_begins_with_zeros(checkpoint):
    prompts = [[3 + i, 50, 7 + i, 9] for i in range(5)]
    options = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True}
    alone = [generate(LLM(checkpoint, **options, max_num_seqs=1), [prompt])[0] for prompt in prompts]
    assert generate(LLM(checkpoint, **options, max_num_seqs=1), prompts) == alone
    assert generate(LLM(checkpoint, **options, max_num_seqs=2, max_num_batched_tokens=3), prompts) == alone


def work(start, tokens, slot=0, new_pages=(0,)):
    return Work(slot, tokens, start, 0, list(new_pages), True, 0)


def test_a_request_must_go_on_where_its_state_stands(checkpoint):
    runner = Runner.load(config(checkpoint, max_num_seqs=2))
    enter = SlotInit(0, "a", [5, 6, 7], [], GREEDY, 0)
    runner.execute(StepPlan([enter], [], [work(0, [5, 6])], []))
    with pytest.raises(RuntimeError, match="slot 0 goes on at token 3, its recurrent state is that of 2 tokens"):
        runner.execute(StepPlan([], [], [work(3, [7], new_pages=())], []))
    again = SlotInit(1, "b", [5, 6, 7], [], GREEDY, 0)
    with pytest.raises(RuntimeError, match="slot 1 goes on at token 2, its recurrent state is that of 0 tokens"):
        runner.execute(StepPlan([again], [], [work(2, [7], slot=1)], []))


def test_recorded_decode_steps_are_the_same_and_padding_touches_no_state(checkpoint):
    spec = read_spec(checkpoint)
    from penstock.serve.models.weights import load_weights

    weights = load_weights(checkpoint, spec, dtype=torch.float32)

    def record(step):
        result = step()

        def replay():
            result.copy_(step())

        return replay, result

    plans = [
        StepPlan([SlotInit(i, str(i), [5 + i, 6, 7], [], GREEDY, 0) for i in range(3)], [], [], []),
        StepPlan([], [work(3, [8], slot=i, new_pages=()) for i in range(3)], [], []),
    ]
    prefill = StepPlan(plans[0].new, [], [work(0, [5 + i, 6, 7], slot=i, new_pages=(i,)) for i in range(3)], [])
    results, states = [], []
    for recorder in (None, record):
        runner = Runner(spec, weights, config(checkpoint, max_num_seqs=4), record=recorder)
        runner.states.ssm[:, 3] = 7.0
        runner.execute(prefill)
        results.append(runner.execute(plans[1]).token_ids)
        states.append(runner.states.ssm.clone())
    assert results[0] == results[1]
    # a product of four rows adds in another order than one of three
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-6)
    assert (states[1][:, 3] == 7.0).all()


def test_memory_of_the_states_is_counted(checkpoint):
    spec = read_spec(checkpoint)
    pool = StatePool(spec.mambas, 3, dtype=torch.float32, device="cpu")
    assert (pool.conv.nbytes + pool.ssm.nbytes) == 3 * slot_bytes(spec, torch.float32)
    runner = Runner.load(config(checkpoint, max_num_seqs=2, max_model_len=40))
    assert (runner.num_pages, runner.max_model_len, runner.pool.data.numel()) == (20, 40, 0)


def test_what_is_not_supported_is_named():
    hybrid = {"architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 1, "num_hidden_layers": 1}
    with pytest.raises(ModelError, match=r"mixture-of-experts layers \(num_local_experts=1\)"):
        ModelSpec.from_config(transformers.GraniteMoeHybridConfig(**hybrid))
    config = transformers.Mamba2Config(**FIELDS, hidden_act="gelu", architectures=["Mamba2ForCausalLM"])
    with pytest.raises(ModelError, match="hidden activation gelu"):
        ModelSpec.from_config(config)
