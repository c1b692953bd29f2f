"""SamplingParams: what is accepted, what is normalised, and the sentence for what is not."""

import dataclasses
import math

import pytest

from penstock.serve.params import InvalidParameter, SamplingParams


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_k, params.top_p, params.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.stop, params.stop_token_ids) == (16, 0, (), ())
    assert (params.seed, params.logprobs, params.ignore_eos) == (None, None, False)
    assert (params.skip_special_tokens, params.include_stop_str_in_output, params.detokenize) == (True, False, True)


def test_normalisation():
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()
    assert SamplingParams(stop_token_ids=[3, 1]).stop_token_ids == (3, 1)
    assert SamplingParams(temperature=0).temperature == 0
    assert SamplingParams(logit_bias={7: -100, 2: 0.5}).logit_bias == ((7, -100), (2, 0.5))
    assert SamplingParams(logit_bias=None).logit_bias == ()
    assert SamplingParams(max_tokens=None, min_tokens=9).max_tokens is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("n", 1.0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", None),
        ("temperature", True),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_k", False),
        ("top_p", 0),
        ("top_p", 2),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("seed", 1.0),
        ("seed", True),
        ("seed", 2**63),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"7": 1.0}),
        ("logit_bias", {7: math.inf}),
        ("logit_bias", [7]),
        ("logit_bias", ((7,),)),
        ("grammar", ""),
        ("grammar", 5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 1]),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("ignore_eos", 1),
        ("logprobs", -1),
        ("logprobs", True),
        ("skip_special_tokens", None),
        ("include_stop_str_in_output", "yes"),
        ("detokenize", 0),
    ],
)
def test_a_wrong_value_names_field_wanted_and_got(field, value):
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"SamplingParams: `{field}` must be ")
    assert message.endswith(f", got {value!r}")
    assert "\n" not in message


def test_stop_strings_need_text():
    with pytest.raises(InvalidParameter, match=r"`detokenize` must be True, because stop=\('x',\)"):
        SamplingParams(stop="x", detokenize=False)


def test_unknown_names_and_changes_are_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2
    assert issubclass(InvalidParameter, ValueError)
