"""Pages found again, with a real model in float32: the same tokens as without."""

import pytest
import torch

from penstock.serve.config import EngineConfig, InvalidConfig
from penstock.serve.engine import Engine
from penstock.serve.params import SamplingParams
from tests.serve.small_model import complete as generate
from tests.serve.small_model import make_engine, make_runner

COMMON = [7 + at % 50 for at in range(37)]
TAILS = ((37, []), (37, [5]), (20, [3, 3, 3]), (36, [9, 9]), (4, [8]), (37, []))
PROMPTS = [[*COMMON[:length], *tail] for length, tail in TAILS]
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.5, max_tokens=9, ignore_eos=True, seed=11, n=3, repetition_penalty=1.3)


def complete(engine, prompts, params):
    return [[tokens for tokens, _ in each] for each in generate(engine, prompts, params)]


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("limits", [{}, {"max_prefill_chunk": 5}, {"kv_cache_memory": 0}], ids=["wide", "chunks", "tight"])
def test_the_tokens_are_those_without_the_cache(page_size, limits):
    if "kv_cache_memory" in limits:  # 72 tokens
        limits = {"kv_cache_memory": 72 * 512, "max_model_len": 64}
    params = [GREEDY, DRAWN, GREEDY, DRAWN, GREEDY, GREEDY]
    plain = complete(make_engine(page_size=page_size, enable_prefix_caching=False), PROMPTS, params)
    engine = make_engine(page_size=page_size, **limits)
    for _ in range(2):  # the second time all is there
        assert complete(engine, PROMPTS, params) == plain
    got = engine.statistics()
    assert 0 < got.prefix_hit_tokens < got.prompt_tokens
    if "kv_cache_memory" in limits:
        assert got.num_preemptions > 0 or page_size == 16  # 4 pages: too few for two requests at a time
    else:
        assert got.prefix_hit_tokens > got.prompt_tokens / 2


def test_the_next_turn_of_a_conversation_finds_the_whole_last_one():
    engine, plain = make_engine(), make_engine(enable_prefix_caching=False)
    history, computed = COMMON[:10], 0
    for turn in range(3):
        before = engine.statistics().prefix_hit_tokens
        [[answer]] = complete(engine, [history], GREEDY)
        assert complete(plain, [history], GREEDY) == [[answer]]
        found = engine.statistics().prefix_hit_tokens - before
        assert found == computed // 4 * 4
        computed = len(history) + len(answer) - 1
        history = [*history, *answer, 20 + turn, 21]


def test_stored_keys_and_values_are_equal_to_those_computed_at_once():
    engine, plain = make_engine(), make_engine(enable_prefix_caching=False)
    kept = []
    for each in (engine, plain):
        complete(each, [PROMPTS[2]], GREEDY)
        each.add_request("a", PROMPTS[0], GREEDY)
        each.step()
        [request] = each.scheduler._running
        kept.append(each.runner.pool.data[:, :, request.pages].flatten(2, 3)[:, :, : len(COMMON)])
        each.abort_all()
    assert engine.statistics().prefix_hit_tokens == 20
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=2e-5)


def test_a_model_with_recurrent_state_finds_nothing():
    class Recurrent:
        has_recurrent_state = True

        def __getattr__(self, name):
            return getattr(runner, name)

    runner = make_runner()
    for wanted in (None, False):
        config = EngineConfig("unused", max_num_seqs=6, enable_prefix_caching=wanted)
        assert not Engine(config, Recurrent(), None).scheduler.config.enable_prefix_caching
    with pytest.raises(InvalidConfig, match="`enable_prefix_caching` must be None or False"):
        Engine(EngineConfig("unused", max_num_seqs=6, enable_prefix_caching=True), Recurrent(), None)
    with pytest.raises(InvalidConfig, match="`speculative` must be None"):
        Engine(EngineConfig("unused", max_num_seqs=6, speculative={"method": "ngram"}), Recurrent(), None)
