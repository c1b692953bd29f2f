"""LLM: calling forms, order, refusals before anything runs, streams, chat, Ctrl-C."""

import itertools
import sys
import types

import pytest

import penstock
from penstock.serve.config import InvalidConfig
from penstock.serve.engine import InvalidPrompt
from penstock.serve.llm import LLM
from penstock.serve.params import SamplingParams
from penstock.serve.text import TokenizerError
from tests.serve.simulated import SimulatedRunner
from tests.serve.small_tokenizer import CHAT, byte_level

TOKENIZER = byte_level(CHAT)


def build(**options):
    runner = SimulatedRunner(vocab_size=320, script=options.pop("script", None), num_pages=options.pop("num_pages", 64))
    return LLM("unused", tokenizer=TOKENIZER, runner=runner, **options)


def ids(text):
    return TOKENIZER.encode(text)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("the wheel", [("the wheel", ids("the wheel"))]),
        (["a", "b"], [("a", ids("a")), ("b", ids("b"))]),
        ({"prompt": "a"}, [("a", ids("a"))]),
        ({"prompt_token_ids": [3, 4]}, [(None, [3, 4])]),
        ([3, 4], [(None, [3, 4])]),
        ([[3, 4], [5]], [(None, [3, 4]), (None, [5])]),
        (["a", {"prompt_token_ids": [5]}, [6, 7]], [("a", ids("a")), (None, [5]), (None, [6, 7])]),
        ([], []),
    ],
)
def test_calling_forms(prompts, expected):
    outputs = build().generate(prompts, SamplingParams(max_tokens=2))
    assert [(output.prompt, output.prompt_token_ids) for output in outputs] == expected
    assert all(output.finished and len(output.outputs[0].token_ids) == 2 for output in outputs)


def test_outputs_come_in_the_order_of_the_prompts_with_their_own_params():
    llm = build()
    lengths = [9, 1, 5, 3]
    outputs = llm.generate(["a", "b", "c", "d"], [SamplingParams(max_tokens=length, seed=1) for length in lengths])
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert [output.prompt for output in outputs] == ["a", "b", "c", "d"]
    alone = [llm.generate(prompt, SamplingParams(max_tokens=9, seed=1))[0] for prompt in "abcd"]
    for together, single in zip(outputs, alone, strict=True):
        count = len(together.outputs[0].token_ids)
        assert together.outputs[0].token_ids == single.outputs[0].token_ids[:count]


def test_default_params():
    assert len(build().generate("a")[0].outputs[0].token_ids) == SamplingParams().max_tokens


def test_many_prompts_through_a_small_pool():
    outputs = build(num_pages=8, max_num_seqs=4, max_num_batched_tokens=8).generate(
        [[index, index] for index in range(2, 42)], SamplingParams(max_tokens=12, seed=0)
    )
    wide = build().generate([[index, index] for index in range(2, 42)], SamplingParams(max_tokens=12, seed=0))
    assert [output.outputs[0].token_ids for output in outputs] == [output.outputs[0].token_ids for output in wide]


# Refusals


def test_every_bad_prompt_is_named_before_anything_runs():
    llm = build()
    with pytest.raises(InvalidPrompt) as caught:
        llm.generate(["good", "", [1, 999], 7, [1] * 300])
    message = str(caught.value)
    for part in (
        "prompt 1: the prompt is empty",
        "prompt 2: token id 999",
        "prompt 3: a prompt must be",
        "prompt 4: the",
    ):
        assert part in message
    assert "prompt 0" not in message
    assert llm.engine.runner.plans == [] and not llm.engine.has_unfinished()


@pytest.mark.parametrize(
    ("params", "error", "sentence"),
    [
        ([SamplingParams()], ValueError, "one for all or one for each of 2 prompts, got 1"),
        ([], ValueError, "got 0"),
        ({"n": 1}, TypeError, "must be SamplingParams or a list of them"),
        ([SamplingParams(), None], TypeError, "must be SamplingParams or a list of them"),
    ],
)
def test_params_that_do_not_match(params, error, sentence):
    with pytest.raises(error, match=sentence):
        build().generate(["a", "b"], params)


def test_prompts_of_no_kind():
    with pytest.raises(InvalidPrompt, match="prompts must be a prompt or a list of prompts, got int"):
        build().generate(5)


# Streams


def test_a_stream_grows_and_ends():
    llm = build(script=ids("the turbine turns"))
    outputs = list(llm.stream("x", SamplingParams(max_tokens=4)))
    texts = [output.outputs[0].text for output in outputs]
    assert len(texts) == 4 and all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert [output.finished for output in outputs] == [False, False, False, True]


def test_a_stream_checks_at_once_and_runs_when_read():
    llm = build()
    with pytest.raises(InvalidPrompt, match="the prompt is empty"):
        llm.stream("")
    llm.stream("x")
    assert not llm.engine.has_unfinished()


def test_a_closed_stream_frees_its_pages():
    llm = build()
    stream = llm.stream("the wheel", SamplingParams(max_tokens=50))
    next(stream)
    assert llm.engine.scheduler.num_running == 1
    stream.close()
    assert llm.engine.scheduler.num_running == 0 and llm.engine.scheduler.num_free_pages == 64
    assert len(llm.generate("a", SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3
    assert not llm.engine.has_unfinished()


def test_streams_and_generate_may_be_mixed():
    llm = build()
    params = [SamplingParams(seed=seed, max_tokens=8) for seed in (1, 2)]
    expected = [llm.generate("the wheel", one)[0].outputs[0].token_ids for one in params]
    first, second = (llm.stream("the wheel", one) for one in params)
    got = [(next(first), next(second))]
    assert llm.generate("the wheel", params[0])[0].outputs[0].token_ids == expected[0]
    got += list(zip(first, second, strict=True))
    assert [output.outputs[0].token_ids for output in got[-1]] == expected and len(got) == 8


# Chat


def test_chat_renders_encodes_and_answers():
    llm = build(script=ids("turbine"))
    message = [{"role": "user", "content": "hello"}]
    output = llm.chat(message, SamplingParams(max_tokens=2))[0]
    assert output.prompt == "[user]hello[assistant]"
    assert output.prompt_token_ids == TOKENIZER.encode(output.prompt, add_special_tokens=False)
    outputs = llm.chat([message, message], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2]
    assert llm.chat(message, chat_template="{{ x }}", chat_template_kwargs={"x": "y"})[0].prompt == "y"


def test_the_template_brings_its_own_begin_token():
    tokenizer = byte_level(CHAT, begin=True)
    llm = LLM("unused", tokenizer=tokenizer, runner=SimulatedRunner(vocab_size=320))
    assert llm.generate("hello")[0].prompt_token_ids[0] == 1
    assert llm.chat([{"role": "user", "content": "hello"}])[0].prompt_token_ids[0] != 1


def test_every_bad_conversation_is_named():
    good = [{"role": "user", "content": "hello"}]
    with pytest.raises(InvalidPrompt) as caught:
        build().chat([good, [], [{"role": "bad", "content": ""}]])
    assert "conversation 1: messages must be" in str(caught.value)
    assert "conversation 2: the chat template refuses the messages: no such role" in str(caught.value)
    assert "conversation 0" not in str(caught.value)


# Interruption and construction


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_generate_leaves_nothing_behind(error, monkeypatch):
    llm = build()
    stream = llm.stream("the wheel", SamplingParams(max_tokens=50))
    next(stream)
    execute, calls = llm.engine.runner.execute, []

    def interrupted(plan):
        calls.append(plan)
        if len(calls) == 3:
            raise error
        return execute(plan)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "execute", interrupted)
        with pytest.raises(error):
            llm.generate(["a", "b"], SamplingParams(max_tokens=40))
    assert llm.engine.scheduler.num_free_pages == 64 and list(llm._inboxes) == ["0"]
    *_, last = stream
    assert last.outputs[0].finish_reason == ("abort" if error is KeyboardInterrupt else "error")
    assert len(llm.generate("a", SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3
    assert llm._inboxes == {}


def test_an_interruption_between_two_steps_leaves_nothing_behind(monkeypatch):
    llm = build()
    with monkeypatch.context() as patch:

        def interrupted(bar, done):
            raise KeyboardInterrupt

        patch.setattr("penstock.serve.llm._Bar.show", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], SamplingParams(max_tokens=40))
    assert llm.engine.scheduler.num_free_pages == 64 and llm.engine.scheduler.num_running == 0
    assert len(llm.generate("a", SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3


def test_the_bar_is_on_stderr_and_only_where_asked(capsys):
    llm = build()
    llm.generate(["a", "b"], use_tqdm=False)
    assert capsys.readouterr() == ("", "")
    llm.generate(["a", "b"], progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "2/2" in captured.err


def test_the_runner_is_loaded_from_the_config(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    TOKENIZER.hf_tokenizer.save_pretrained(tmp_path)
    loaded = {}

    class Runner:
        @classmethod
        def load(cls, config, progress=None):
            loaded.update(config=config, progress=progress)
            return SimulatedRunner(vocab_size=320, max_model_len=99)

    module = types.ModuleType("penstock.serve.runner")
    module.Runner = Runner
    monkeypatch.setitem(sys.modules, "penstock.serve.runner", module)
    llm = LLM(tmp_path, dtype="float32", kv_cache_memory="1MiB", max_model_len=50, progress=print)
    assert loaded["config"].kv_cache_bytes == 2**20 and loaded["progress"] is print
    assert llm.engine.max_model_len == 50 and LLM(tmp_path).engine.max_model_len == 99
    assert llm.generate("the wheel", SamplingParams(max_tokens=2))[0].finished
    assert llm.tokenizer.encode("é") == ids("é")


def test_construction_fails_with_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        LLM(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot read one from"):
        LLM(tmp_path)
    with pytest.raises(InvalidConfig, match="`dtype`"):
        build(dtype="int3")
    assert penstock.LLM is LLM and penstock.SamplingParams is SamplingParams


def test_without_a_tokenizer():
    llm = LLM("unused", skip_tokenizer_init=True, runner=SimulatedRunner(vocab_size=320))
    assert llm.generate([1, 2], SamplingParams(max_tokens=2))[0].outputs[0].text == ""
    with pytest.raises(TokenizerError, match="skip_tokenizer_init=True"):
        llm.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(InvalidPrompt, match="prompt 0: the prompt is text, but there is no tokenizer"):
        llm.generate("text")
