"""The engine: outputs as they grow, stop strings, log-probabilities, n completions, aborts and interruptions."""

import itertools

import pytest

from penstock.serve.config import EngineConfig
from penstock.serve.engine import Engine, InvalidPrompt, child_seed
from penstock.serve.outputs import Logprob
from penstock.serve.params import SamplingParams
from penstock.serve.scheduler import RequestRefused
from tests.serve.simulated import SimulatedRunner
from tests.serve.small_tokenizer import byte_level

TOKENIZER = byte_level()


def build(script=None, tokenizer=TOKENIZER, **limits):
    """An engine over a simulated runner that hashes, or writes a text (or token ids) over and over."""
    limits = {"vocab_size": 320, "eos_token_ids": (), "max_num_seqs": 4, "max_num_batched_tokens": 32, **limits}
    runner = SimulatedRunner(script=TOKENIZER.encode(script) if isinstance(script, str) else script, **limits)
    config = EngineConfig(
        "unused", max_num_seqs=limits["max_num_seqs"], max_num_batched_tokens=limits["max_num_batched_tokens"]
    )
    return Engine(config, runner, tokenizer)


def run(engine):
    """Every output of every request, in order."""
    outputs = {}
    while engine.has_unfinished():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    for grown in outputs.values():
        assert [output.finished for output in grown] == [False] * (len(grown) - 1) + [True]
    assert engine.scheduler.num_free_pages == engine.runner.num_pages
    return outputs


def complete(engine, prompt="the wheel", **params):
    """The one completion of one request."""
    engine.add_request("a", prompt, SamplingParams(**params))
    return run(engine)["a"][-1].outputs[0]


def test_increments_hold_what_is_new():
    """Together they are the whole, and a completion that got nothing is left out."""
    whole, pieces = build(), build()
    params = SamplingParams(n=3, seed=1, max_tokens=9, logprobs=1)
    whole.add_request("a", "the wheel", params)
    pieces.add_request("a", "the wheel", params, increments=True)
    expected = run(whole)["a"][-1]
    joined = {index: ("", [], []) for index in range(3)}
    for output in run(pieces)["a"]:
        assert output.outputs
        for new in output.outputs:
            assert new.token_ids or new.finished
            text, token_ids, logprobs = joined[new.index]
            joined[new.index] = text + new.text, token_ids + new.token_ids, logprobs + new.logprobs
    assert joined == {each.index: (each.text, each.token_ids, each.logprobs) for each in expected.outputs}


def test_statistics_count_what_was_done():
    engine = build(num_pages=8, max_model_len=64)
    for name in "abc":
        engine.add_request(name, [1, 2, 3, 4, 5], SamplingParams(max_tokens=12))
    assert (engine.statistics().num_waiting, engine.statistics().num_running) == (3, 0)
    engine.step()
    now = engine.statistics()
    assert (now.num_running, now.num_pages, now.num_free_pages, now.output_tokens) == (3, 8, 2, 3)
    run(engine)
    done = engine.statistics()
    assert (done.prompt_tokens, done.output_tokens, done.num_running, done.num_free_pages) == (15, 36, 0, 8)
    assert done.num_preemptions == engine.scheduler.num_preemptions > 0


def test_a_bias_beyond_the_vocabulary_is_refused():
    with pytest.raises(InvalidPrompt, match="logit_bias: token id 320 is not in the vocabulary of 320"):
        build().add_request("a", [1], SamplingParams(logit_bias={320: 1.0}))


# Text


def test_outputs_grow_token_by_token():
    engine = build("the turbine")
    engine.add_request("a", "the wheel", SamplingParams(max_tokens=4))
    outputs = run(engine)["a"]
    script = TOKENIZER.encode("the turbine")
    assert [output.outputs[0].token_ids for output in outputs] == [(script * 4)[:count] for count in (1, 2, 3, 4)]
    texts = [output.outputs[0].text for output in outputs]
    assert texts[-1] == TOKENIZER.decode((script * 4)[:4])
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    last = outputs[-1]
    assert (last.prompt, last.prompt_token_ids) == ("the wheel", TOKENIZER.encode("the wheel"))
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("length", None)
    assert outputs[0].outputs[0].finish_reason is None and outputs[0].outputs[0].logprobs is None


def test_without_stream_only_the_end_comes():
    engine = build("the turbine")
    engine.add_request("a", "the wheel", SamplingParams(max_tokens=4), stream=False)
    outputs = run(engine)["a"]
    assert len(outputs) == 1 and len(outputs[0].outputs[0].token_ids) == 4
    metrics = outputs[0].metrics
    assert metrics.arrival_time < metrics.first_token_time < metrics.finished_time


def test_a_stop_string_ends_the_output_and_is_not_shown():
    engine = build("water turns here")
    engine.add_request("a", "x", SamplingParams(max_tokens=50, stop=["zzz", "rns h"]))
    outputs = run(engine)["a"]
    assert outputs[-1].outputs[0].text == "water tu"
    assert (outputs[-1].outputs[0].finish_reason, outputs[-1].outputs[0].stop_reason) == ("stop", "rns h")
    assert all("water tu".startswith(output.outputs[0].text) for output in outputs)
    assert complete(build("water turns here"), max_tokens=50, stop="rns h", include_stop_str_in_output=True).text == (
        "water turns h"
    )


def test_text_held_for_a_stop_string_comes_at_the_end():
    count = len(TOKENIZER.encode("water tu"))
    completion = complete(build(TOKENIZER.encode("water tu")), max_tokens=count, stop="turbine")
    assert (completion.text, completion.finish_reason) == ("water tu", "length")


def test_a_stop_string_at_the_last_token_is_a_stop():
    count = len(TOKENIZER.encode("water turns"))
    completion = complete(build(TOKENIZER.encode("water turns")), max_tokens=count, stop="turns")
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("water ", "stop", "turns")


def test_bytes_left_over_at_the_end_are_shown_as_such():
    completion = complete(build(TOKENIZER.encode("a🙂")), max_tokens=3)
    assert (completion.text, completion.finish_reason) == ("a\ufffd", "length")
    stopped = complete(build(TOKENIZER.encode("a🙂")), max_tokens=3, stop="\ufffd")
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("a", "stop", "\ufffd")


def test_min_tokens_lets_a_stop_string_pass():
    script = [TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]]
    completion = complete(build(script), max_tokens=9, min_tokens=4, stop="a")
    assert (completion.text, len(completion.token_ids)) == ("abab", 5)


def test_the_end_token_counts_but_is_not_text():
    script = [*TOKENIZER.encode("stop"), 0]
    for extra in ({}, {"skip_special_tokens": False}):
        completion = complete(build(script), max_tokens=50, **extra)
        assert (completion.text, completion.token_ids, completion.finish_reason) == ("stop", script, "stop")
        assert completion.stop_reason is None
    shown = complete(build(script), max_tokens=50, skip_special_tokens=False, include_stop_str_in_output=True)
    assert shown.text == "stop<eos>"


def test_a_stop_token_is_named():
    script = TOKENIZER.encode("stop here")
    completion = complete(build(script), max_tokens=50, stop_token_ids=[script[-1]])
    assert (completion.stop_reason, completion.token_ids) == (script[-1], script)
    assert completion.text == TOKENIZER.decode(script[:-1])


def test_end_tokens_of_model_and_tokenizer_both_count():
    assert build(eos_token_ids=(5, 0)).eos_token_ids == (5, 0)
    assert build(eos_token_ids=(5,)).eos_token_ids == (5, 0)
    assert build(eos_token_ids=(5,), tokenizer=None).eos_token_ids == (5,)


def test_without_a_tokenizer_tokens_go_in_and_out():
    engine = build(script=[7, 8], tokenizer=None)
    completion = complete(engine, prompt=[1, 2, 3], max_tokens=3, logprobs=0)
    assert (completion.text, completion.token_ids) == ("", [7, 8, 7])
    assert completion.logprobs[0] == {7: Logprob(-1.0, 2, None)}
    with pytest.raises(InvalidPrompt, match="there is no tokenizer; give prompt_token_ids"):
        engine.add_request("b", "text")
    with pytest.raises(InvalidPrompt, match="searched for in text, but there is no tokenizer"):
        engine.add_request("b", [1], SamplingParams(stop="x"))


def test_detokenize_false_makes_no_text():
    completion = complete(build("the turbine"), max_tokens=3, detokenize=False)
    assert completion.text == "" and len(completion.token_ids) == 3


# Log-probabilities and n


def test_logprobs_have_the_sampled_token_first_and_then_the_most_likely():
    token = TOKENIZER.encode("a")[0]
    completion = complete(build([token]), max_tokens=3, logprobs=1)
    assert len(completion.logprobs) == 3
    assert list(completion.logprobs[0].items()) == [
        (token, Logprob(-1.0, 2, "a")),
        (token + 1, Logprob(-0.5, 1, TOKENIZER.decode([token + 1]))),
    ]
    assert completion.cumulative_logprob == -3.0
    assert list(complete(build([token]), max_tokens=1, logprobs=3).logprobs[0]) == [token, token + 1, token + 2]
    assert complete(build([token]), max_tokens=1).cumulative_logprob is None
    with pytest.raises(InvalidPrompt, match="logprobs=321 is more than the vocabulary of 320"):
        build().add_request("a", "x", SamplingParams(logprobs=321))


def test_n_completions_differ_and_the_first_is_that_of_n_1():
    engine = build()
    engine.add_request("many", "the wheel", SamplingParams(n=3, seed=5, max_tokens=6))
    engine.add_request("one", "the wheel", SamplingParams(seed=5, max_tokens=6))
    outputs = run(engine)
    many, one = outputs["many"][-1], outputs["one"][-1]
    assert [completion.index for completion in many.outputs] == [0, 1, 2]
    tokens = [completion.token_ids for completion in many.outputs]
    assert tokens[0] == one.outputs[0].token_ids
    assert len({tuple(ids) for ids in tokens}) == 3


def test_seeds():
    assert child_seed(5, 0) == 5 and child_seed(-1, 0) == 2**63 - 1
    seeds = [child_seed(seed, index) for seed in (5, 6) for index in range(50)]
    assert len(set(seeds)) == 100 and all(0 <= seed < 2**63 for seed in seeds)

    def drawn(config_seed):
        engine = build()
        engine._seeds.seed(config_seed)
        for name in "ab":
            engine.add_request(name, "the wheel", SamplingParams(max_tokens=6))
        outputs = run(engine)
        return [outputs[name][-1].outputs[0].token_ids for name in "ab"]

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0)[0] != drawn(0)[1]


def test_a_finished_completion_waits_for_the_others():
    engine = build()
    engine.add_request("a", "the wheel", SamplingParams(n=4, seed=1, max_tokens=40, stop_token_ids=list(range(0, 320, 9))))
    outputs = run(engine)["a"]
    lengths = [len(completion.token_ids) for completion in outputs[-1].outputs]
    assert len(set(lengths)) > 1
    shortest = lengths.index(min(lengths))
    ended = [output.outputs[shortest] for output in outputs if output.outputs[shortest].finished]
    assert len(ended) > 1 and all(completion == ended[0] for completion in ended)


def test_tokens_do_not_depend_on_the_pool():
    def tokens(**limits):
        engine = build(**limits)
        for index in range(6):
            engine.add_request(str(index), "the turbine turns", SamplingParams(seed=index, max_tokens=20))
        outputs = run(engine)
        return {name: grown[-1].outputs[0] for name, grown in outputs.items()}, engine.scheduler.num_preemptions

    tight, preemptions = tokens(num_pages=10, max_num_batched_tokens=5)
    wide, none = tokens(num_pages=200)
    assert preemptions > 0 and none == 0 and tight == wide


# Refusals


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([320], r"token id 320 is not in the vocabulary, 0 … 319"),
        ([-1], "token id -1 is not in the vocabulary"),
        ([1] * 256, "the prompt has 256 tokens; max_model_len=256 takes at most 255"),
        ([1.5], "must hold integers only"),
        ([True], "must hold integers only"),
        (["a"], "must hold integers only"),
        (5, "a prompt must be a string, a list of token ids, or a dict with one of them, got int"),
        (None, "got NoneType"),
        ({}, r'a dict must have "prompt" or "prompt_token_ids", got \[\]'),
        ({"prompt": 5}, '"prompt" must be a string, got int'),
        ("\ud800", "lone surrogate"),
    ],
)
def test_a_refused_request_leaves_the_others_alone(prompt, sentence):
    engine = build()
    engine.add_request("good", "the wheel", SamplingParams(max_tokens=2))
    with pytest.raises(InvalidPrompt, match=sentence):
        engine.add_request("bad", prompt)
    outputs = run(engine)
    assert list(outputs) == ["good"] and outputs["good"][-1].outputs[0].finish_reason == "length"


def test_a_name_in_use_and_wrong_params_are_refused():
    engine = build()
    engine.add_request("a", "x")
    with pytest.raises(InvalidPrompt, match="'a' is already here"):
        engine.add_request("a", "x")
    with pytest.raises(InvalidPrompt, match="params must be SamplingParams, got dict"):
        engine.add_request("b", "x", {"n": 1})
    assert issubclass(InvalidPrompt, ValueError) and issubclass(RequestRefused, ValueError)


def test_a_dict_may_bring_text_and_tokens():
    engine = build()
    engine.add_request("a", {"prompt": "shown", "prompt_token_ids": (1, 2)}, SamplingParams(max_tokens=1))
    output = run(engine)["a"][-1]
    assert (output.prompt, output.prompt_token_ids) == ("shown", [1, 2])


# Aborts, interruptions, failures


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_abort_ends_every_completion_with_one_last_output(steps):
    engine = build(max_num_seqs=2, max_num_batched_tokens=4)
    engine.add_request("a", "the wheel turns", SamplingParams(n=3, max_tokens=30))
    engine.add_request("b", "the wheel", SamplingParams(max_tokens=3))
    for _ in range(steps):
        engine.step()
    assert engine.abort("a") is True
    assert engine.abort("a") is False and engine.abort("nobody") is False
    outputs = run(engine)
    assert [completion.finish_reason for completion in outputs["a"][-1].outputs] == ["abort"] * 3
    assert len(outputs["a"]) == 1 and outputs["b"][-1].outputs[0].finish_reason == "length"


class Interrupted(SimulatedRunner):
    """Raises in the third step."""

    error: BaseException = KeyboardInterrupt()

    def execute(self, plan):
        if len(self.plans) == 2:
            self.plans.append(plan)
            raise self.error
        return super().execute(plan)


@pytest.mark.parametrize(("error", "reason"), [(KeyboardInterrupt(), "abort"), (RuntimeError("out of memory"), "error")])
def test_after_an_interruption_all_have_ended_and_the_engine_goes_on(error, reason):
    engine = build(max_num_seqs=2, max_num_batched_tokens=8)
    expected = complete(engine, seed=3, max_tokens=6)
    runner = Interrupted(vocab_size=320, max_num_seqs=2, max_num_batched_tokens=8)
    runner.error = error
    engine = Engine(engine.config, runner, TOKENIZER)
    for name in "abc":
        engine.add_request(name, "the wheel turns", SamplingParams(max_tokens=30))
    with pytest.raises(type(error)):
        while True:
            engine.step()
    engine.scheduler.check()
    assert engine.scheduler.num_free_pages == runner.num_pages
    assert engine.has_unfinished()
    outputs = run(engine)
    assert {name: grown[-1].outputs[0].finish_reason for name, grown in outputs.items()} == dict.fromkeys("abc", reason)
    assert complete(engine, seed=3, max_tokens=6) == expected


def test_a_completion_that_had_ended_keeps_its_reason():
    engine = build()
    stops = list(range(0, 320, 9))
    engine.add_request("a", "the wheel", SamplingParams(n=4, seed=1, max_tokens=40, stop_token_ids=stops))
    while not any(completion.finished for output in engine.step() for completion in output.outputs):
        pass
    engine.abort_all()
    assert {completion.finish_reason for completion in run(engine)["a"][-1].outputs} == {"stop", "abort"}


def test_an_interruption_inside_the_scheduler_is_survived(monkeypatch):
    engine = build()
    engine.add_request("a", "the wheel", SamplingParams(max_tokens=5))
    engine.step()
    with monkeypatch.context() as patch:

        def interrupted(*_):
            raise KeyboardInterrupt

        patch.setattr(engine.scheduler, "_make_room", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    engine.scheduler.check()
    assert run(engine)["a"][-1].outputs[0].finish_reason == "abort"
    assert len(complete(engine, max_tokens=4).token_ids) == 4
