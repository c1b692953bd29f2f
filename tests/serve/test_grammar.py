"""Output that follows a grammar: by itself, in a batch of others, through preemption, and refused with a reason."""

import json
import re
import sys

import pytest

from penstock import LLM, SamplingParams
from penstock.serve import grammar as grammars
from penstock.serve.engine import InvalidPrompt

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm():
    return LLM("demo", device="cpu", dtype="float32", max_num_seqs=8, max_model_len=256)


def made(llm, prompts, **options):
    params = SamplingParams(**{"max_tokens": 120, "temperature": 1.0, "seed": 7} | options)
    return [output.outputs[0] for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("seed", range(4))
def test_sampled_output_follows_the_schema_and_ends(llm, seed):
    [output] = made(llm, ["A person:"], grammar=grammars.json_schema(PERSON), seed=seed)
    value = json.loads(output.text)
    assert set(value) == {"name", "age"} and 0 <= value["age"] <= 150 and len(value["name"]) <= 12
    assert output.finish_reason == "stop"


def test_without_the_grammar_the_same_seed_makes_no_json(llm):
    [output] = made(llm, ["A person:"])
    with pytest.raises(ValueError):
        json.loads(output.text)


def test_neighbours_in_the_batch_are_not_changed(llm):
    free = SamplingParams(temperature=0, max_tokens=24)
    bound = SamplingParams(temperature=0, max_tokens=24, grammar=grammars.regex(r"[0-9]{8}"))
    [alone] = llm.generate(["A generator is"], free)
    outputs = llm.generate(["A generator is", "The number", "A generator is"], [free, bound, free])
    assert [outputs[0].outputs[0].token_ids, outputs[2].outputs[0].token_ids] == [alone.outputs[0].token_ids] * 2
    assert re.fullmatch(r"[0-9]{8}", outputs[1].outputs[0].text)


def test_each_of_n_completions_has_its_own_place(llm):
    params = SamplingParams(n=4, seed=3, max_tokens=120, grammar=grammars.json_schema(PERSON))
    [output] = llm.generate("A person:", params)
    texts = [completion.text for completion in output.outputs]
    assert all(json.loads(text) for text in texts) and len(set(texts)) > 1


def test_preemption_changes_nothing():
    options = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 128, "page_size": 8}
    params = [
        SamplingParams(seed=seed, max_tokens=90, grammar=grammars.json_schema({**PERSON, "properties": wide(seed)}))
        for seed in range(4)
    ]
    prompts = ["A person: " * 4] * 4
    roomy, tight = (
        LLM("demo", **options, kv_cache_memory=pages * 8 * 4 * 2 * 2 * 64 * 4)  # pages of 8 tokens in 4 layers of 2 heads of 64
        for pages in (64, 20)
    )
    expected = [output.outputs[0] for output in roomy.generate(prompts, params)]
    got = [output.outputs[0] for output in tight.generate(prompts, params)]
    assert roomy.engine.scheduler.num_preemptions == 0 and tight.engine.scheduler.num_preemptions > 0
    assert [output.token_ids for output in got] == [output.token_ids for output in expected]
    assert all(json.loads(output.text) for output in got)


def wide(seed):
    """Properties that need many tokens."""
    name = {"type": "string", "minLength": 60, "maxLength": 70, "pattern": "^[a-z ]+$"}
    return {"name": name, "age": {"type": "integer", "minimum": seed, "maximum": seed}}


def test_white_space_is_bounded(llm):
    grammar = llm.engine._compile(grammars.json_object())
    for token in llm.tokenizer.encode('{\n    "a": 1,\n    "b"', add_special_tokens=False):
        assert allowed(grammar, token)
        grammar.accept(token)
    [line_feed] = llm.tokenizer.encode("\n", add_special_tokens=False)
    grammar.accept(line_feed)
    assert not grammar.fault and not allowed(grammar, line_feed)


def test_rollback_takes_tokens_back(llm):
    grammar = llm.engine._compile(grammars.regex("abc|abd"))
    tokens = llm.tokenizer.encode("ab", add_special_tokens=False)
    before = grammar.mask()
    for token in tokens:
        grammar.accept(token)
    assert grammar.mask() != before
    grammar.rollback(len(tokens))
    assert grammar.mask() == before and not grammar.fault


def test_masks_after_guesses_are_those_of_going_there(llm):
    tokens = llm.tokenizer.encode('{"name": "x"', add_special_tokens=False)
    ahead, serial = (llm.engine._compile(grammars.json_schema(PERSON)) for _ in range(2))
    expected = [serial.mask()]
    for token in tokens:
        serial.accept(token)
        expected.append(serial.mask())
    assert ahead.masks(tokens) == expected and ahead.mask() == expected[0]
    wrong = ahead.masks([tokens[0], 1, *tokens[1:]])  # no end is allowed there
    assert wrong[:2] == expected[:2] and len(wrong) == len(tokens) + 2 and ahead.mask() == expected[0]
    assert not ahead.fault


def test_a_forbidden_token_is_a_fault(llm):
    grammar = llm.engine._compile(grammars.regex("[0-9]+"))
    assert grammar.fault == ""
    grammar.accept(llm.tokenizer.encode("x", add_special_tokens=False)[0])
    assert grammar.fault and grammar.finished


def test_log_probabilities_are_the_models_own(llm):
    [free] = made(llm, ["The number"], temperature=0, max_tokens=1, logprobs=3)
    [bound] = made(llm, ["The number"], temperature=0, max_tokens=1, logprobs=3, grammar=grammars.regex("[0-9]{4}"))
    assert list(bound.logprobs[0].items())[1:] == list(free.logprobs[0].items())[:3]


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (grammars.lark("start: nowhere"), "does not compile"),
        (grammars.regex("(?=a)b"), "look-around"),
        (grammars.json_schema({"type": "no such type"}), "Invalid type: no such type"),
    ],
)
def test_a_grammar_that_is_none_is_refused(llm, grammar, reason):
    with pytest.raises(InvalidPrompt, match=reason):
        llm.generate("x", SamplingParams(grammar=grammar))


def test_without_a_tokenizer_or_an_end_token_there_is_no_grammar(llm):
    bare = LLM("demo", device="cpu", skip_tokenizer_init=True, max_num_seqs=1, max_model_len=64)
    with pytest.raises(InvalidPrompt, match="there is no tokenizer"):
        bare.generate([[5]], SamplingParams(grammar=grammars.regex("a")))
    with pytest.raises(grammars.GrammarError, match="no end token"):
        grammars.GrammarCompiler(llm.tokenizer, 4096, ())


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'penstock\[serve\]'"):
        grammars.json_object()


def allowed(grammar, token):
    return bool(grammar.mask()[token // 8] >> token % 8 & 1)
