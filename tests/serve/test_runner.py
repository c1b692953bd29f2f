"""The runner on a small random model: pool sizes, recorded steps, sampling state, what a plan may hold."""

import numpy as np
import pytest
import torch

from penstock.serve.config import EngineConfig, SchedulerConfig
from penstock.serve.graphs import FIELDS, DecodeGraphs, padded_sizes
from penstock.serve.kv import KVPool, activation_bytes, available_memory, host_memory, page_bytes, size_pool
from penstock.serve.models.spec import LayerSpec, ModelError, ModelSpec, RopeSpec
from penstock.serve.models.weights import random_weights
from penstock.serve.params import SamplingParams
from penstock.serve.plan import SlotInit, StepPlan, StepResult, Work
from penstock.serve.runner import Runner, resolve_device, resolve_dtype
from penstock.serve.scheduler import Scheduler, TokenEvent

LAYER = LayerSpec(num_heads=4, num_kv_heads=2, head_dim=16, query_scale=0.25, mlp_size=48)
ROPE = RopeSpec(16, {"rope_type": "default", "rope_theta": 10000.0})
SPEC = ModelSpec("LlamaForCausalLM", 61, 32, (LAYER,) * 2, (ROPE,), 128, 1e-5, eos_token_ids=(2,))
PROMPTS = [list(range(3, 3 + n)) for n in (9, 1, 17, 4, 26)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def make_runner(record=None, **options):
    weights = random_weights(SPEC, dtype=torch.float32, seed=3)
    for tensor in weights.tensors():
        if tensor.dim() == 2:
            tensor.mul_(15)
    return Runner(SPEC, weights, EngineConfig("unused", **{"max_num_seqs": 6, "page_size": 4, **options}), record=record)


def generate(runner, prompts, params, *, budget=64, max_num_seqs=6, num_pages=None):
    """(tokens, log-probabilities) of each prompt; params one for all or a list; the seed of prompt i is 100 + i."""
    pages = runner.num_pages if num_pages is None else num_pages
    scheduler = Scheduler(SchedulerConfig(pages, runner.page_size, runner.max_model_len, max_num_seqs, budget))
    every = params if isinstance(params, list) else [params] * len(prompts)
    for i, (prompt, own) in enumerate(zip(prompts, every, strict=True)):
        scheduler.add(str(i), prompt, own, own.seed if own.seed is not None else 100 + i, runner.eos_token_ids)
    tokens, logprobs = [[] for _ in prompts], [[] for _ in prompts]
    while (plan := scheduler.step()) is not None:
        for event in scheduler.commit(runner.execute(plan)):
            if isinstance(event, TokenEvent):
                tokens[int(event.request_id)].append(event.token_id)
                logprobs[int(event.request_id)].append(event.logprobs)
    generate.preemptions = scheduler.num_preemptions
    return tokens, logprobs


def record_plainly(step):
    """Stands for a CUDA graph: the same buffers in and out, the step run again at each replay."""
    result = step()
    return lambda: result.copy_(step()), result


# ---- the pool


def test_pages_fill_what_is_available():
    each = page_bytes(SPEC, 16, torch.bfloat16)
    assert each == 2 * 16 * 2 * 16 * 2 * 2
    options = {"page_size": 16, "dtype": torch.bfloat16, "max_num_seqs": 4}
    size = size_pool(SPEC, available=100 * each + 1, max_model_len=None, fill=True, **options)
    assert (size.num_pages, size.max_model_len) == (100, 128)
    size = size_pool(SPEC, available=100 * each, max_model_len=50, fill=False, **options)
    assert (size.num_pages, size.max_model_len) == (4 * 4, 50)


def test_a_pool_too_small_says_what_it_needs():
    options = {"page_size": 16, "dtype": torch.float32, "max_num_seqs": 4, "fill": True}
    with pytest.raises(ModelError, match=r"needs 64\.00 KiB .* 128 tokens \(the smallest useful length\), 8\.00 KiB is"):
        size_pool(SPEC, available=8192, max_model_len=None, **options)
    with pytest.raises(ModelError, match=r"needs 32\.00 KiB .* 50 tokens \(max_model_len\), 8\.00 KiB is"):
        size_pool(SPEC, available=8192, max_model_len=50, **options)


def test_a_long_model_is_cut_to_what_the_pool_holds():
    long = ModelSpec("LlamaForCausalLM", 61, 32, (LAYER,) * 2, (ROPE,), 1 << 20, 1e-5)
    each = page_bytes(long, 16, torch.float32)
    size = size_pool(
        long, page_size=16, dtype=torch.float32, available=10 * each, max_model_len=None, max_num_seqs=4, fill=True
    )
    assert size.max_model_len == 160


def test_memory_that_is_available():
    assert 0 < host_memory() < 1 << 50
    options = {"dtype": torch.bfloat16, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    assert 0 < available_memory(SPEC, device=torch.device("cpu"), **options) <= host_memory()
    assert activation_bytes(SPEC, torch.bfloat16, 64, 4) > 64 * 2 * 48 * 2 + 4 * 61 * 4


def test_layers_view_one_allocation():
    pool = KVPool(SPEC, 5, 4, dtype=torch.float16, device="cpu")
    assert [k.shape for k, _ in pool.layers] == [(5, 4, 2, 16)] * 2
    assert {t.untyped_storage().data_ptr() for pair in pool.layers for t in pair} == {pool.data.data_ptr()}


def test_layers_of_different_shape_are_refused():
    other = LayerSpec(num_heads=4, num_kv_heads=1, head_dim=16, query_scale=0.25, mlp_size=48)
    mixed = ModelSpec("LlamaForCausalLM", 61, 32, (LAYER, other), (ROPE,), 128, 1e-5)
    with pytest.raises(ModelError, match="must agree in KV heads"):
        KVPool(mixed, 5, 4, dtype=torch.float16, device="cpu")


# ---- recorded decode steps


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])])
def test_padded_sizes(limit, sizes):
    assert padded_sizes(limit) == sizes


def test_a_replay_sees_its_rows_and_padding():
    seen = []

    def step(columns):
        seen.append(columns.clone())
        return columns[:3].T.float()

    padding = tuple(range(10, 10 + len(FIELDS)))
    graphs = DecodeGraphs(step, [1, 4, 6], padding, device=torch.device("cpu"), record=record_plainly)
    columns = graphs.host_inputs(2)
    assert columns.shape == (len(FIELDS), 4)
    columns[:, :2] = 7
    logits = graphs.replay(2)
    assert torch.equal(logits, torch.full((2, 3), 7.0))
    assert np.array_equal(seen[-1][:, 2], padding)
    assert graphs.host_inputs(3)[0].tolist() == [10] * 4  # nothing of the last step is left


@pytest.mark.parametrize("page_size", [1, 4, 32])
def test_recorded_steps_give_the_same_tokens(page_size):
    eager, recorded = make_runner(page_size=page_size), make_runner(record_plainly, page_size=page_size)
    recorded._pages = recorded._pages.clone()  # on a GPU the host's table and the device's are two
    recorded._graphs = DecodeGraphs(
        recorded._decode_step, padded_sizes(6), recorded._graphs.padding[:, 0], device=recorded.device, record=record_plainly
    )
    recorded._write_pages = lambda updates: recorded._pages.copy_(torch.from_numpy(recorded._host_pages))
    assert generate(recorded, PROMPTS, GREEDY) == generate(eager, PROMPTS, GREEDY)


def test_padding_rows_write_nothing():
    runner = make_runner(record_plainly)
    runner.pool.data.fill_(torch.nan)
    generate(runner, PROMPTS[:3], GREEDY)
    written = ~runner.pool.data.isnan().all(-1).all(-1)  # [L, 2, P, S]
    assert written.sum().item() == sum(len(prompt) + 9 for prompt in PROMPTS[:3]) * 2 * 2


# ---- plans


def test_an_empty_plan_and_a_plan_that_samples_nothing():
    runner = make_runner()
    assert runner.execute(StepPlan([], [], [], [3])) == StepResult({}, {})
    new = SlotInit(2, "a", [5, 6, 7, 8], [], GREEDY, 0)
    work = Work(2, [5, 6, 7], 0, 0, [3], sample=False, num_output=0)
    assert runner.execute(StepPlan([new], [], [work], [])) == StepResult({}, {})
    result = runner.execute(StepPlan([], [Work(2, [8], 3, 1, [], sample=True, num_output=0)], [], []))
    assert list(result.token_ids) == [2]


def test_load_errors(monkeypatch):
    with pytest.raises(ModelError, match="max_model_len 129 is more than the 128 positions"):
        make_runner(max_model_len=129)
    with pytest.raises(ModelError, match="float8"):
        resolve_dtype("auto", ModelSpec("LlamaForCausalLM", 61, 32, (LAYER,), (ROPE,), 128, 1e-5, dtype="float8_e4m3fn"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(ModelError, match="cuda:1"):
        resolve_device("cuda:1")


# ---- sampling state


def test_min_tokens_keeps_end_tokens_away():
    runner = make_runner()
    free, _ = generate(runner, PROMPTS, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True))
    stops = [tokens[2] for tokens in free]
    params = [SamplingParams(temperature=0.0, max_tokens=10, stop_token_ids=[stop, 500]) for stop in stops]
    stopped, _ = generate(runner, PROMPTS, params)
    assert all(len(tokens) <= 3 for tokens in stopped)
    held = [SamplingParams(temperature=0.0, max_tokens=10, stop_token_ids=[stop, 500], min_tokens=6) for stop in stops]
    for tokens, stop in zip(generate(runner, PROMPTS, held)[0], stops, strict=True):
        assert len(tokens) >= 6 and not {stop, 2} & set(tokens[:5])


def test_penalties_are_those_of_each_row_and_survive_preemption():
    runner = make_runner()
    strong = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, presence_penalty=2.0, repetition_penalty=50.0)
    params = [strong, GREEDY, strong, GREEDY, strong]
    plain, _ = generate(runner, PROMPTS, GREEDY)
    assert runner.sampler.counts is None  # made when first needed
    mixed, _ = generate(runner, PROMPTS, params)
    assert mixed[1] == plain[1] and mixed[3] == plain[3]
    for i in (0, 2, 4):
        assert len(set(mixed[i])) == 10 and not set(mixed[i]) & set(PROMPTS[i])
    assert generate(runner, PROMPTS, params, num_pages=13)[0] == mixed
    assert generate.preemptions > 0
    assert generate(runner, PROMPTS, GREEDY)[0] == plain


def test_biases_are_those_of_each_row():
    runner = make_runner()
    plain, unbiased = generate(runner, PROMPTS, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1))
    away = [
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1, logit_bias={tokens[0]: -100.0})
        for tokens in plain
    ]
    forced = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, logit_bias={7: 100.0})
    mixed, reported = generate(runner, PROMPTS, [away[0], forced, GREEDY, *away[3:]])
    assert mixed[1] == [7] * 6 and mixed[2][:6] == plain[2]
    for row in (0, 3, 4):
        assert plain[row][0] not in mixed[row]
        assert reported[row][0].token_ids == unbiased[row][0].token_ids  # what the model itself says


def test_seeded_sampling_does_not_depend_on_the_batch():
    runner = make_runner()
    params = [
        SamplingParams(temperature=1.5, max_tokens=10, seed=1, ignore_eos=True),
        SamplingParams(temperature=1.0, max_tokens=10, seed=2, ignore_eos=True, top_k=5),
        SamplingParams(temperature=0.7, max_tokens=10, seed=-3, ignore_eos=True, top_p=0.8),
        SamplingParams(temperature=0.0, max_tokens=10, seed=4, ignore_eos=True),
        SamplingParams(temperature=2.0, max_tokens=10, seed=5, ignore_eos=True, min_p=0.1),
    ]
    alone = [generate(runner, [prompt], [own])[0][0] for prompt, own in zip(PROMPTS, params, strict=True)]
    together, _ = generate(runner, PROMPTS, params)
    assert together == alone
    assert generate(runner, PROMPTS, params, num_pages=13)[0] == alone
    assert generate.preemptions > 0
    other = [SamplingParams(temperature=1.5, max_tokens=10, seed=9, ignore_eos=True)]
    assert generate(runner, PROMPTS[:1], other)[0][0] != alone[0]


def test_logprobs_are_the_models_own():
    runner = make_runner()
    params = [
        SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=3),
        SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=3.0, max_tokens=4, ignore_eos=True, logprobs=0, presence_penalty=1.0),
    ]
    tokens, logprobs = generate(runner, PROMPTS[:3], params)
    assert logprobs[1] == [None] * 4
    for token, entry in zip(tokens[0], logprobs[0], strict=True):
        assert entry.token_ids[0] == token and entry.sampled_rank == 1 and len(entry.token_ids) == 3
        assert entry.logprobs == sorted(entry.logprobs, reverse=True) and entry.logprobs[0] == entry.sampled_logprob
    for entry in logprobs[2]:
        assert entry.token_ids == [] and entry.sampled_logprob < 0 and 1 <= entry.sampled_rank <= 61
    single = [SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=61)]
    entry = generate(runner, PROMPTS[:1], single)[1][0][0]
    assert sum(np.exp(entry.logprobs)) == pytest.approx(1.0, abs=1e-5)


def test_a_slot_can_be_released_twice_and_reused():
    runner = make_runner()
    runner.sampler.release(4)
    first, _ = generate(runner, PROMPTS[:1], SamplingParams(temperature=2.0, seed=1, ignore_eos=True, max_tokens=5))
    second, _ = generate(runner, PROMPTS[:1], GREEDY)
    third, _ = generate(runner, PROMPTS[:1], SamplingParams(temperature=2.0, seed=1, ignore_eos=True, max_tokens=5))
    assert first == third and second != first
