"""/v1/completions as OpenAI's client sees it, against the same model without a server."""

import pytest

from penstock import SamplingParams

PROMPTS = ["A generator is", "The list is", "If the argument is"]
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(live):
    with live.client() as client:
        yield client


def expected(offline, prompt, **options):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12} | options)
    return offline.generate(prompt, params)[0].outputs


def test_text_and_usage(client, offline):
    answer = client.completions.create(model="demo", prompt=PROMPTS[0], **GREEDY)
    [choice] = answer.choices
    [output] = expected(offline, PROMPTS[0])
    assert (choice.text, choice.finish_reason, choice.index) == (output.text, "length", 0)
    prompt = offline.tokenizer.encode(PROMPTS[0])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answer.usage.total_tokens == len(prompt) + 12
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "demo"


def test_default_is_sixteen_tokens(client):
    assert client.completions.create(model="demo", prompt="x", extra_body={"ignore_eos": True}).usage.completion_tokens == 16


@pytest.mark.parametrize("form", ["texts", "tokens", "lists of tokens"])
def test_forms_of_prompts(client, offline, form):
    tokens = [offline.tokenizer.encode(prompt) for prompt in PROMPTS]
    prompt = {"texts": PROMPTS, "tokens": tokens[0], "lists of tokens": tokens}[form]
    answer = client.completions.create(model="demo", prompt=prompt, n=2, seed=5, max_tokens=8)
    wanted = PROMPTS if form != "tokens" else PROMPTS[:1]
    texts = [output.text for each in wanted for output in expected(offline, each, n=2, seed=5, max_tokens=8, temperature=1.0)]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    assert answer.usage.prompt_tokens == sum(map(len, tokens[: len(wanted)]))


def test_stream_is_the_whole(client, offline):
    chunks = list(
        client.completions.create(
            model="demo", prompt=PROMPTS, n=2, seed=1, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    texts, reasons = [""] * 6, [None] * 6
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "a choice goes on after its end"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    outputs = [each for prompt in PROMPTS for each in expected(offline, prompt, n=2, seed=1, max_tokens=8, temperature=1.0)]
    assert texts == [output.text for output in outputs] and reasons == [output.finish_reason for output in outputs]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == sum(len(each.token_ids) for each in outputs)
    assert len({chunk.id for chunk in chunks}) == 1


def test_frames_of_the_stream(live):
    """What is on the wire: one JSON object an event, and the end that clients wait for; no usage unless asked."""
    answer = live.post("/v1/completions", {"model": "demo", "prompt": "x", "stream": True, **GREEDY})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith('data: {"id":') for event in events[:-2])
    assert "usage" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, offline, stream):
    answer = client.completions.create(model="demo", prompt=PROMPTS[0], logprobs=3, stream=stream, **GREEDY)
    chunks = list(answer) if stream else [answer]
    joined = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in chunks:
        for name in joined:
            joined[name] += getattr(chunk.choices[0].logprobs, name)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    [output] = expected(offline, PROMPTS[0], logprobs=3)
    entries = [list(position.values()) for position in output.logprobs]
    assert joined["tokens"] == [position[0].decoded_token for position in entries]
    assert joined["token_logprobs"] == pytest.approx([position[0].logprob for position in entries], abs=1e-5)
    assert [len(top) for top in joined["top_logprobs"]] == [3] * 12
    assert [text[at:].startswith(token) for at, token in zip(joined["text_offset"], joined["tokens"], strict=True)] == [
        True
    ] * 12


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client, offline, stream):
    for prompt in (PROMPTS[0], offline.tokenizer.encode(PROMPTS[0], add_special_tokens=False)):
        answer = client.completions.create(model="demo", prompt=prompt, echo=True, stream=stream, **GREEDY)
        text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
        assert text == PROMPTS[0] + expected(offline, {"prompt_token_ids": tokens_of(offline, prompt)})[0].text


def tokens_of(offline, prompt):
    return offline.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


@pytest.mark.parametrize("stream", [False, True])
def test_stop_is_not_shown(client, offline, stream):
    [free] = expected(offline, PROMPTS[0], max_tokens=30)
    stop = free.text[20:26]
    answer = client.completions.create(
        model="demo", prompt=PROMPTS[0], stop=[stop, "never"], temperature=0, max_tokens=30, stream=stream
    )
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == free.text[: free.text.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].choices[0].stop_reason == stop


def test_seed_penalties_and_bias(client, offline):
    options = {"seed": 9, "presence_penalty": 1.5, "frequency_penalty": 0.5, "max_tokens": 20}
    answer = client.completions.create(model="demo", prompt=PROMPTS[1], logit_bias={"13": 4.0}, **options)
    [output] = expected(offline, PROMPTS[1], logit_bias={13: 4.0}, **options, temperature=1.0)
    assert answer.choices[0].text == output.text
    forced = client.completions.create(model="demo", prompt="x", logit_bias={"50": 100}, **GREEDY)
    assert forced.choices[0].text == offline.tokenizer.decode([50]) * 12


def test_fields_that_are_not_openais(client, offline):
    more = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 5, "stop_token_ids": [7], "ignore_eos": True}
    answer = client.completions.create(model="demo", prompt="x", seed=2, extra_body={**more, "return_token_ids": True})
    [output] = expected(offline, "x", seed=2, temperature=1.0, **more, max_tokens=16)
    assert answer.choices[0].token_ids == output.token_ids and answer.choices[0].text == output.text


def test_tokenize_and_back(live, offline):
    tokens = live.post("/tokenize", {"prompt": "The naïve 🐍 list"}).json()
    assert tokens["tokens"] == offline.tokenizer.encode("The naïve 🐍 list") and tokens["count"] == len(tokens["tokens"])
    assert live.post("/detokenize", {"model": "demo", "tokens": tokens["tokens"]}).json() == {
        "prompt": "<|bos|>The naïve 🐍 list"
    }
    chat = live.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}).json()
    assert offline.tokenizer.decode(chat["tokens"], skip_special_tokens=False) == "<|bos|><|user|>hi<|eos|>"


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("demo", "model", 2048)
    assert client.models.retrieve("demo").id == "demo"
