"""Speculative decoding: whatever is guessed, the output is what it would be without, token for token in float32."""

import collections
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from penstock.serve.config import EngineConfig, InvalidConfig, SpeculativeConfig
from penstock.serve.drafters import DraftModel, NgramDrafter
from penstock.serve.engine import Engine
from penstock.serve.graphs import DecodeGraphs
from penstock.serve.models.weights import random_weights
from penstock.serve.params import SamplingParams
from penstock.serve.plan import DraftRequest, Work
from penstock.serve.runner import Runner
from penstock.serve.sampler import matched, restricted
from tests.serve.simulated import SimulatedRunner
from tests.serve.small_model import SPEC, complete, make_engine, make_runner
from tests.serve.small_tokenizer import byte_level
from tests.serve.test_runner import record_plainly

PROMPTS = [[3 + at % 7 for at in range(length)] for length in (9, 1, 17, 4, 26)]
NGRAM = {"method": "ngram", "num_tokens": 4, "min_ngram": 1}


def ask(tokens, limit=5, arrival=0, num_prompt=1, name="a", params=None, seed=0):
    return DraftRequest(name, 0, arrival, tokens, num_prompt, params or SamplingParams(temperature=0.0), seed, limit)


# The n-gram drafter


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1, 2]),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2, 4, 1]),  # the last time counts
        ([9, 1, 2, 3, 8, 2, 3, 7, 1, 2, 3], [8, 2, 3, 7, 1]),  # the longest match counts more
        ([5, 5, 5], [5, 5, 5, 5, 5]),
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 1]),
        ([1, 2, 3, 4, 2], []),
        ([1], []),
    ],
)
def test_ngrams_go_on_as_they_did(tokens, draft):
    assert NgramDrafter(2, 3).propose([ask(tokens)]) == {"a": draft}
    grown, drafter = [], NgramDrafter(2, 3)  # the same whether looked up once or at every token
    for token in tokens:
        grown.append(token)
        got = drafter.propose([ask(grown)])
    assert got == {"a": draft}


def test_ngrams_of_one_request_are_not_those_of_the_next_of_its_name():
    drafter = NgramDrafter(2, 3)
    assert drafter.propose([ask([1, 2, 3, 1, 2], arrival=1), ask([4, 4, 4], 2, arrival=2, name="b")]) == {
        "a": [3, 1, 2, 3, 1],
        "b": [4, 4],
    }
    assert drafter.propose([ask([7, 8, 3, 1, 2], arrival=3)]) == {"a": []}
    assert list(drafter._indexes) == [3]


# What is kept of guesses


def test_guesses_are_kept_up_to_the_first_wrong_one():
    slots = [4, 4, 4, 0, 2, 2]
    assert matched([1, 2, 3, 9, 5, 6], slots, {4: [1, 2], 2: [5]}) == {4: [1, 2, 3], 0: [9], 2: [5, 6]}
    assert matched([1, 2, 3, 9, 5, 6], slots, {4: [0, 2], 2: [6]}) == {4: [1], 0: [9], 2: [5]}
    assert matched([1, 2], [3, 1], {}) == {3: [1], 1: [2]}


# Drafters of every kind around a real model


class Oracle:
    """Guesses from the right outputs, or beside them."""

    def __init__(self, prompts, outputs, beside=0):
        self.texts = [[*prompt, *output] for prompt, output in zip(prompts, outputs, strict=True)]
        self.beside = beside

    def propose(self, requests):
        drafts = {}
        for request in requests:
            known = list(request.token_ids)
            text = next((text for text in self.texts if text[: len(known)] == known), None)
            following = [] if text is None else text[len(known) : len(known) + request.limit]
            drafts[request.request_id] = [(token + self.beside) % 61 for token in following]
        return drafts


class Always:
    """Guesses the same, or what a function makes of it."""

    def __init__(self, draft):
        self.draft = draft

    def propose(self, requests):
        return {request.request_id: list(self.draft) for request in requests}


class Sometimes:
    """Right, wrong and no guesses in turn, of every length."""

    def __init__(self, right):
        self.right, self.count = right, 0

    def propose(self, requests):
        drafts = {}
        for name, draft in self.right.propose(requests).items():
            self.count += 1
            draft = draft[: self.count % 6]
            drafts[name] = [*draft[:-1], draft[-1] ^ 1] if draft and self.count % 3 == 0 else draft
        return drafts


DRAFTERS = {
    "right": lambda prompts, outputs: Oracle(prompts, outputs),
    "wrong": lambda prompts, outputs: Oracle(prompts, outputs, beside=1),
    "mixed": lambda prompts, outputs: Sometimes(Oracle(prompts, outputs)),
    "out of vocabulary": lambda prompts, outputs: Always([61, -1, 10**12]),
    "end tokens": lambda prompts, outputs: Always([2, 2, 2]),
    "empty": lambda prompts, outputs: Always([]),
    "silent": lambda prompts, outputs: type("Silent", (), {"propose": lambda self, requests: {}})(),
    "ngram": lambda prompts, outputs: NgramDrafter(1, 3),
    "same model": lambda prompts, outputs: small_draft(3),
    "other model": lambda prompts, outputs: small_draft(4),
}
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    "drawn": SamplingParams(temperature=1.2, max_tokens=12, seed=5, top_p=0.95),
    "penalised": SamplingParams(
        temperature=0.8, max_tokens=12, seed=6, repetition_penalty=1.5, frequency_penalty=0.7, min_tokens=9
    ),
    "stops": SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=list(range(0, 61, 7)), min_tokens=3, logprobs=2),
}
LIMITS = {
    "wide": {},
    "chunks": {"max_prefill_chunk": 3, "max_num_batched_tokens": 9},
    "tight": {"kv_cache_memory": 13 * 2048, "max_model_len": 48},
}


def small_draft(weights_seed, **options):
    options = {"max_num_seqs": 6, "page_size": 8, "max_num_batched_tokens": 16, **options}
    runner = make_runner(weights_seed=weights_seed, **options)
    return DraftModel(runner, max_num_seqs=options["max_num_seqs"], max_num_batched_tokens=options["max_num_batched_tokens"])


@pytest.fixture(scope="module")
def plain():
    """What comes without speculation."""
    engine = make_engine(enable_prefix_caching=False)
    return {name: complete(engine, PROMPTS, params) for name, params in PARAMS.items()}


def same(got, wanted):
    """Tokens are equal; log-probabilities are those of the same logits, computed in other shapes."""
    for mine, other in zip(got, wanted, strict=True):
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in other]
        for (_, own), (_, theirs) in zip(mine, other, strict=True):
            assert (own is None) == (theirs is None)
            for one, two in zip(own or [], theirs or [], strict=True):
                assert list(one) == list(two)
                values = [[entry.logprob for entry in each.values()] for each in (one, two)]
                torch.testing.assert_close(torch.tensor(values[0]), torch.tensor(values[1]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_output_is_that_without_speculation(plain, drafter, limits):
    names = list(PARAMS)
    for shift in range(2):  # all at once, each request with other parameters
        own = [names[(index + shift) % len(names)] for index in range(len(PROMPTS))]
        wanted = [plain[name][index] for index, name in enumerate(own)]
        outputs = [tokens for [(tokens, _)] in wanted]
        engine = make_engine(DRAFTERS[drafter](PROMPTS, outputs), speculative=NGRAM, **limits)
        for _ in range(2):  # again with the prompts in the cache
            same(complete(engine, PROMPTS, [PARAMS[name] for name in own]), wanted)
        got = engine.statistics()
        assert got.prefix_hit_tokens > 0
        assert got.num_preemptions > 0 or "kv_cache_memory" not in limits
        if drafter == "right" and not limits:
            assert got.draft_tokens == got.accepted_tokens > 50
        if drafter in ("wrong", "out of vocabulary", "empty", "silent"):
            assert got.accepted_tokens == 0 and (got.draft_tokens > 0) == (drafter == "wrong")


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 20])
@pytest.mark.parametrize("recorded", [False, True])
def test_guesses_of_any_number(plain, num_tokens, recorded):
    wanted = plain["greedy"]
    drafter = Sometimes(Oracle(PROMPTS, [tokens for [(tokens, _)] in wanted]))
    options = {"method": "ngram", "num_tokens": num_tokens}
    engine = make_engine(drafter, record_plainly if recorded else None, speculative=options)
    assert [graphs.q_len for graphs in engine.runner._graphs] == (
        [1, *([1 + num_tokens] if num_tokens < 8 else [])] if recorded else []
    )
    same(complete(engine, PROMPTS, PARAMS["greedy"]), wanted)
    assert engine.statistics().accepted_tokens > 0


def test_recorded_steps_with_guesses_write_pages_on_their_own():
    engine = make_engine(NgramDrafter(1, 3), record_plainly, speculative=NGRAM, page_size=1)
    runner = engine.runner
    wanted = complete(engine, PROMPTS, PARAMS["greedy"])
    runner._pages = runner._pages.clone()  # on a GPU the host's table and the device's are two
    runner._graphs = [
        DecodeGraphs(
            partial(runner._decode_step, graphs.q_len),
            graphs.sizes,
            graphs.padding[:, 0],
            device=runner.device,
            q_len=graphs.q_len,
            record=record_plainly,
        )
        for graphs in runner._graphs
    ]
    runner._write_pages = lambda updates: runner._pages.copy_(torch.from_numpy(runner._host_pages))
    same(complete(engine, PROMPTS, PARAMS["greedy"]), wanted)


def test_padding_of_guesses_writes_nothing(plain):
    wanted = plain["greedy"]
    drafter = Sometimes(Oracle(PROMPTS, [tokens for [(tokens, _)] in wanted]))
    engine = make_engine(drafter, record_plainly, speculative=NGRAM, enable_prefix_caching=False)
    engine.runner.pool.data.fill_(torch.nan)
    same(complete(engine, PROMPTS, PARAMS["greedy"]), wanted)
    written = ~engine.runner.pool.data.isnan().all(-1).all(-1)  # [L, 2, P, S]
    # No more than 4 wrong guesses after the last token that was computed.
    assert sum(len(prompt) + 11 for prompt in PROMPTS) <= written[0, 0].sum() <= sum(len(prompt) + 15 for prompt in PROMPTS)


# The draft model


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_the_same_model_makes_the_draws_of_the_model_itself(plain, limits):
    for name in ("greedy", "drawn", "penalised"):
        engine = make_engine(small_draft(3), speculative=NGRAM, **limits)
        same(complete(engine, PROMPTS, PARAMS[name]), plain[name])
        got = engine.statistics()
        assert got.accepted_tokens > 0.97 * got.draft_tokens > 0  # all of them, but for draws that end a request early


def test_a_draft_model_without_room_guesses_for_whom_it_can(plain):
    drafter = small_draft(3, kv_cache_memory=8 * 4096, max_model_len=40)  # pages for two requests
    engine = make_engine(drafter, speculative=NGRAM)
    same(complete(engine, PROMPTS, PARAMS["greedy"]), plain["greedy"])
    assert engine.statistics().accepted_tokens > 0
    drafter._forget(list(drafter._rows))
    assert drafter._pages.num_free == drafter._pages.num_pages == 8 and len(drafter._free_slots) == 6


def test_a_draft_model_does_not_know_tokens_past_its_vocabulary():
    drafter = small_draft(3)
    assert drafter.propose([ask([5, 61, 5])]) == {}
    assert drafter.propose([ask(list(range(128)))]) == {}  # nor positions
    assert len(drafter.propose([ask([5, 6, 5])])["a"]) == 5


def test_a_draft_model_takes_back_what_was_wrong():
    tokens, drafter = [5, 6, 5], small_draft(3)
    draft = drafter.propose([ask(tokens)])["a"]
    for following in ([], [draft[0] ^ 1, 9, 8, 7], [*draft, 4, 4], [*draft[:2], draft[2] ^ 1]):
        grown = [*tokens, *following]
        assert drafter.propose([ask(grown)]) == small_draft(3).propose([ask(grown)])
        drafter.propose([ask(tokens, arrival=1)])
        drafter._forget([0])
        assert drafter.propose([ask(tokens)])["a"] == draft


def test_a_draft_model_is_usable_after_an_interruption():
    drafter = small_draft(3)
    wanted = drafter.propose([ask([5, 6, 5])])
    execute = drafter._runner.execute

    def interrupted(plan):
        raise KeyboardInterrupt

    drafter._runner.execute = interrupted
    with pytest.raises(KeyboardInterrupt):
        drafter.propose([ask([5, 6, 5, 7], arrival=1)])
    drafter._runner.execute = execute
    assert drafter._pages.num_free == drafter._pages.num_pages
    assert drafter.propose([ask([5, 6, 5], arrival=2)]) == wanted


# The engine


def test_a_stop_string_among_right_guesses_ends_the_text_there():
    tokenizer = byte_level()
    script = tokenizer.encode("the water turns a wheel ")
    runner = SimulatedRunner(script=script, vocab_size=320, max_num_seqs=4, max_num_batched_tokens=32)
    config = EngineConfig("unused", max_num_seqs=4, max_num_batched_tokens=32, speculative={**NGRAM, "num_tokens": 9})
    engine = Engine(config, runner, tokenizer)
    engine.add_request("a", "x", SamplingParams(max_tokens=200, stop="rns a wheel the wat", logprobs=0))
    engine.add_request("b", "x", SamplingParams(max_tokens=70, seed=3))
    outputs = {}
    while engine.has_unfinished():
        for output in engine.step():
            outputs[output.request_id] = output.outputs[0]
    assert outputs["a"].text == "the water tu" and outputs["a"].stop_reason == "rns a wheel the wat"
    assert len(outputs["a"].logprobs) == len(outputs["a"].token_ids) < 100
    assert outputs["b"].token_ids == (script * 9)[:70] and len(runner.plans) < 45
    got = engine.statistics()
    assert 0 < got.accepted_tokens < got.draft_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 4}, 'must be a dict with "method" and any of num_tokens, model'),
        ({"method": "ngram", "depth": 3}, 'must be a dict with "method"'),
        ({"method": "eagle"}, '`method` must be "ngram" or "draft", got \'eagle\''),
        ({"method": "ngram", "num_tokens": 0}, "`num_tokens` must be an integer from 1 to 64, got 0"),
        ({"method": "ngram", "min_ngram": 3, "max_ngram": 2}, "`max_ngram` must be an integer ≥ min_ngram=3, got 2"),
        ({"method": "ngram", "model": "x"}, "`model` must be None unless method=\"draft\", got 'x'"),
        ({"method": "draft"}, "`model` must be a folder, got None"),
        ({"method": "draft", "model": "x", "kv_cache_memory": "much"}, "`kv_cache_memory` must be a positive number"),
        ({"method": "ngram", "verification": "typical"}, '`verification` must be "match" or "rejection"'),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InvalidConfig, match=message):
        EngineConfig("unused", speculative=options)


def test_options_are_normalised():
    config = EngineConfig("unused", speculative={"method": "ngram", "num_tokens": 3})
    assert config.speculation == SpeculativeConfig("ngram", 3) and config.num_draft_tokens == 3
    assert EngineConfig("unused", speculative=config.speculation) == config
    assert EngineConfig("unused").speculation is None and EngineConfig("unused").num_draft_tokens == 0


# Verification by rejection


def small_vocabulary(weights_seed, **options):
    spec = replace(SPEC, vocab_size=6, eos_token_ids=())
    weights = random_weights(spec, dtype=torch.float32, seed=weights_seed)
    for tensor in weights.tensors():
        if tensor.dim() == 2:
            tensor.mul_(8)
    options = {"max_num_seqs": 64, "page_size": 8, "max_num_batched_tokens": 1024, "kv_cache_memory": "1MiB", **options}
    return spec, weights, Runner(spec, weights, EngineConfig("unused", **options)), options


def exact(spec, weights, prompt, length, params):
    """The probability of every continuation, by the model itself with transformers' meaning of the parameters."""
    runner = Runner(spec, weights, EngineConfig("unused", max_num_seqs=1, kv_cache_memory="1MiB"))
    probs = {(): 1.0}
    for _ in range(length):
        for tokens in list(probs):
            work = Work(0, [*prompt, *tokens], 0, 0, [0, 1], True, 0)
            with torch.inference_mode():
                runner._take_pages([work])
                logits = runner.decoder.logits(runner._forward([], [work]))[0].double() / params.temperature
            kept = logits >= logits.topk(params.top_k).values[-1]
            share = logits.masked_fill(~kept, -torch.inf).softmax(-1).tolist()
            mass = probs.pop(tokens)
            probs |= {(*tokens, token): mass * one for token, one in enumerate(share) if one > 0}
    return probs


def test_the_joint_distribution_by_rejection_is_that_of_the_model():
    params = SamplingParams(temperature=1.3, top_k=5, max_tokens=4)
    spec, weights, runner, options = small_vocabulary(1)
    *_, other, _ = small_vocabulary(2)
    limits = {name: options[name] for name in ("max_num_seqs", "max_num_batched_tokens")}
    drafter = DraftModel(other, keep_probs=True, **limits)
    own = {"method": "ngram", "num_tokens": 3}  # the drafter is given
    engine = Engine(EngineConfig("unused", speculative=own, skip_tokenizer_init=True, **options), runner, None, drafter)
    prompt, count = [1, 4, 2, 0, 3], 2500
    prompts = [{"prompt_token_ids": prompt}] * count
    got = collections.Counter(tuple(tokens) for [(tokens, _)] in complete(engine, prompts, params))
    expected = {tokens: count * share for tokens, share in exact(spec, weights, prompt, 4, params).items()}
    assert set(got) <= set(expected)
    for pair in ((0, 1), (1, 2), (2, 3)):
        observed, means = collections.Counter(), collections.Counter()
        for tokens, mean in expected.items():
            cell = tuple(tokens[at] for at in pair)
            observed[cell] += got[tokens]
            means[cell] += mean
        common = [cell for cell, mean in means.items() if mean >= 5]
        cells = [(observed[cell], means[cell]) for cell in common]
        cells.append((count - sum(seen for seen, _ in cells), count - sum(mean for _, mean in cells)))
        statistic = 2 * sum(seen * math.log(seen / mean) for seen, mean in cells if seen)
        freedom = len(common)
        # Wilson and Hilferty's approximation of the χ² quantile at 1 - 1e-4
        limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
        assert statistic < limit, f"{pair}: G = {statistic:.1f} on {freedom} degrees of freedom, limit {limit:.1f}"
    assert 0.4 < engine.statistics().accepted_tokens / engine.statistics().draft_tokens < 0.9


def test_rejection_keeps_all_guesses_of_the_same_model_and_greedy_outputs(plain):
    for name in ("greedy", "stops", "drawn", "penalised"):
        drafter = small_draft(3)
        drafter.keep_probs = True
        engine = make_engine(drafter, speculative=NGRAM)
        got = complete(engine, PROMPTS, PARAMS[name])
        if PARAMS[name].temperature == 0:
            same(got, plain[name])
        statistics = engine.statistics()
        assert statistics.accepted_tokens > 0.97 * statistics.draft_tokens > 0


def test_rejection_needs_one_vocabulary():
    drafter = small_draft(3)
    drafter.keep_probs, drafter.vocab_size = True, 60
    with pytest.raises(InvalidConfig, match="same vocabulary, 61, got 60"):
        make_engine(drafter, speculative=NGRAM)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((0, 1.0, 0.0), [3, 2, 1, 0]),
        ((2, 1.0, 0.0), [3, 2]),
        ((0, 0.7, 0.0), [3, 2]),
        ((0, 1.0, 0.2), [3, 2]),
        ((3, 0.1, 0.0), [3]),
    ],
)
def test_what_a_guess_is_drawn_from(options, kept):
    logits = torch.tensor([[0.0, 1.0, 2.5, 3.0]]) * 2
    top_k, top_p, min_p = (torch.tensor([value]) for value in options)
    got = restricted(logits, torch.tensor([2.0]), top_k, top_p, min_p)
    assert sorted((got[0] > -torch.inf).nonzero().flatten().tolist(), reverse=True) == kept
    torch.testing.assert_close(got[0, kept], logits[0, kept] / 2)
