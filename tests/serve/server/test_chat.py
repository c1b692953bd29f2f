"""/v1/chat/completions as OpenAI's client sees it: messages, formats, function calls."""

import json

import openai
import pytest

from penstock import SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine import Engine
from penstock.serve.server import chat, tools
from penstock.serve.server.protocol import ChatRequest
from tests.serve.server.servers import around
from tests.serve.simulated import SimulatedRunner

ASK = [{"role": "user", "content": "What is a generator?"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Basel", "Turin"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Looks it up.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def client(live):
    with live.client() as client:
        yield client


def test_text_and_usage(client, offline):
    answer = client.chat.completions.create(model="demo", messages=ASK, temperature=0, max_completion_tokens=12)
    [output] = offline.chat(ASK, SamplingParams(temperature=0, max_tokens=12))[0].outputs
    [choice] = answer.choices
    assert (choice.message.content, choice.message.role) == (output.text, "assistant")
    assert choice.finish_reason == output.finish_reason and choice.message.tool_calls is None
    assert answer.usage.completion_tokens == len(output.token_ids) and answer.object == "chat.completion"


def test_stream_is_the_whole(client, offline):
    options = {"n": 3, "seed": 4, "max_tokens": 10}
    stream = client.chat.completions.create(
        model="demo", messages=ASK, **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts, reasons, roles = [""] * 3, [None] * 3, [None] * 3
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            assert (choice.delta.role is not None) == (roles[choice.index] is None)
            roles[choice.index] = choice.delta.role or roles[choice.index]
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    outputs = offline.chat(ASK, SamplingParams(**options))[0].outputs
    assert texts == [output.text for output in outputs] and reasons == [output.finish_reason for output in outputs]
    assert chunks[-1].usage.completion_tokens == sum(len(output.token_ids) for output in outputs)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, offline, stream):
    options = {"temperature": 0, "max_tokens": 6}
    answer = client.chat.completions.create(model="demo", messages=ASK, logprobs=True, top_logprobs=2, stream=stream, **options)
    blocks = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    entries = [entry for block in blocks if block for entry in block.content]
    [output] = offline.chat(ASK, SamplingParams(**options, logprobs=2))[0].outputs
    wanted = [list(position.values()) for position in output.logprobs]
    assert [entry.token for entry in entries] == [position[0].decoded_token for position in wanted]
    assert [entry.logprob for entry in entries] == pytest.approx([position[0].logprob for position in wanted], abs=1e-5)
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token and len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


def test_logprobs_without_top_have_the_sampled_token_alone(client):
    answer = client.chat.completions.create(model="demo", messages=ASK, logprobs=True, max_tokens=3, temperature=0)
    assert all(entry.top_logprobs == [] for entry in answer.choices[0].logprobs.content)


def test_messages_in_all_their_forms(live, offline):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call("now", "{}")]},
        {"role": "tool", "content": "noon", "tool_call_id": "a"},
    ]
    tokens = live.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert offline.tokenizer.decode(tokens, skip_special_tokens=False) == (
        "<|bos|><|system|>Be brief.<|eos|><|user|>one\ntwo<|eos|>"
        '<|assistant|><tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|eos|>'
        "<|user|><tool_response>\nnoon\n</tool_response><|eos|><|assistant|>"
    )


def call(name, arguments):
    return {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}


# Formats


@pytest.mark.parametrize("stream", [False, True])
def test_json_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="demo", messages=ASK, response_format=form, seed=seed, max_tokens=120, stream=stream
        )
        text = "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message.content
        person = json.loads(text)
        assert set(person) == {"name", "age"} and 0 <= person["age"] <= 150


def test_json_object(client):
    """Any object; one that is cut short by the limit is the beginning of one."""
    form = {"type": "json_object"}
    for seed in range(4):
        answer = client.chat.completions.create(
            model="demo", messages=ASK, response_format=form, seed=seed, max_tokens=60, logit_bias={"98": 5}
        )
        [choice] = answer.choices
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_the_client_parses_into_a_type(client):
    import pydantic

    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=12)
        age: int = pydantic.Field(ge=0, le=150)

    answer = client.chat.completions.parse(model="demo", messages=ASK, response_format=Person, seed=1, max_tokens=120)
    assert isinstance(answer.choices[0].message.parsed, Person)


# Function calls


def calls_of(client, stream, **options):
    """(calls, content, finish reason) of an answer, streamed or not."""
    options = {"model": "demo", "messages": ASK, "tools": TOOLS, "seed": 3, "max_tokens": 200, **options}
    if not stream:
        [choice] = client.chat.completions.create(**options).choices
        calls = [(each.function.name, each.function.arguments) for each in choice.message.tool_calls or []]
        assert all(each.id.startswith("call_") for each in choice.message.tool_calls or [])
        return calls, choice.message.content, choice.finish_reason
    calls, content, reason = [], "", None
    for chunk in client.chat.completions.create(**options, stream=True):
        [choice] = chunk.choices
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for each in choice.delta.tool_calls or []:
            assert each.index == len(calls) and each.id.startswith("call_")
            calls.append((each.function.name, each.function.arguments))
    return calls, content or None, reason


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call(client, stream):
    calls, content, reason = calls_of(client, stream, tool_choice="required", parallel_tool_calls=False)
    assert len(calls) == 1 and content is None and reason == "tool_calls"
    name, arguments = calls[0]
    arguments = json.loads(arguments)
    assert name == "now" or (arguments["city"] in ("Basel", "Turin") and 1 <= arguments["days"] <= 9)


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_call(client, stream):
    choice = {"type": "function", "function": {"name": "weather"}}
    calls, content, reason = calls_of(client, stream, tool_choice=choice)
    assert [name for name, _ in calls] == ["weather"] and content is None and reason == "stop"
    assert json.loads(calls[0][1])["city"] in ("Basel", "Turin")


def test_functions_may_have_the_names_of_choices(client):
    tools = [{"type": "function", "function": {"name": name}} for name in ("auto", "required", "none")]
    for name in ("auto", "required", "none"):
        choice = {"type": "function", "function": {"name": name}}
        assert calls_of(client, False, tools=tools, tool_choice=choice)[0] == [(name, "{}")]
    calls, _, _ = calls_of(client, False, tools=tools, tool_choice="required", parallel_tool_calls=False, seed=11)
    assert calls[0][0] in ("auto", "required", "none")
    assert calls_of(client, False, tools=tools, tool_choice="auto", max_tokens=12)[1]


def test_auto_may_answer_in_text(client):
    calls, content, reason = calls_of(client, False, tool_choice="auto", max_tokens=12)
    assert calls == [] and content and reason in ("length", "stop")
    assert calls_of(client, False, tool_choice="none", max_tokens=12)[0] == []


@pytest.mark.parametrize("stream", [False, True])
def test_auto_may_call(offline, stream):
    """The text is a script; the grammar follows it, and ends the request where it leaves the grammar."""
    written = 'Well <tool_call>\n{"name": "weather", "arguments": {"city": "Turin", "days": 2}}\n</tool_call>'
    for text, found in [
        (written, ([("weather", '{"city": "Turin", "days": 2}')], "Well ", "tool_calls")),
        (written.replace("Turin", "Oslo"), None),
        (written.replace("weather", "whether"), None),
    ]:
        tokens = offline.tokenizer.encode(text, add_special_tokens=False)
        with around(lambda tokens=tokens: scripted(offline.tokenizer, [*tokens, 1])) as (url, _):
            client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
            if found:
                assert calls_of(client, stream, tool_choice="auto") == found
            else:
                with pytest.raises(openai.APIError, match="could not be continued"):
                    calls_of(client, stream, tool_choice="auto")


def scripted(tokenizer, script):
    """An engine that writes these tokens."""
    runner = SimulatedRunner(num_pages=512, max_model_len=1024, vocab_size=4096, eos_token_ids=(1,), script=script)
    return Engine(EngineConfig("demo"), runner, tokenizer)


def test_what_contradicts_itself_is_refused(client):
    for options, message in [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "not among the tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}}, "Invalid type"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}}, "ignore_eos"),
        ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "may not hold tokenize"),
    ]:
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(model="demo", messages=ASK, **options)


# Calls in text, without a model


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "found", "rest"),
    [
        ("no call", ["no call"], ""),
        ("a < b <tool", ["a < b "], "<tool"),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', [tools.Call("f", '{"a": 1}')], ""),
        (
            'so:<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>{"name":"g","arguments":{}}</tool_call> end',
            ["so:", tools.Call("f", "{}"), tools.Call("g", "{}"), "end"],
            "",
        ),
        ("<tool_call>no json</tool_call>", ["<tool_call>no json</tool_call>"], ""),
        ('<tool_call>{"name": "f"', [], '<tool_call>{"name": "f"'),
    ],
)
def test_scanner(text, found, rest, size):
    scanner = tools.CallScanner()
    got = []
    for at in range(0, len(text), size):
        for part in scanner.feed(text[at : at + size]):
            if got and isinstance(part, str) and isinstance(got[-1], str):
                got[-1] += part
            else:
                got.append(part)
    assert got == found and scanner.flush() == rest


def test_a_template_that_speaks_of_tools_gets_them(offline, monkeypatch):
    template = (
        "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{{ messages[-1].tool_calls[0].function.arguments.a }}"
    )
    monkeypatch.setattr(offline.tokenizer.hf_tokenizer, "chat_template", template)
    body = {"model": "demo", "tools": TOOLS, "messages": [*ASK, {"role": "assistant", "tool_calls": [call("now", '{"a": 7}')]}]}
    request = ChatRequest.model_validate(body)
    assert chat.render(offline.tokenizer, request.messages, tools=request.tools) == "[weather][now]7"


def test_without_a_template_there_is_a_plain_one(offline, monkeypatch):
    monkeypatch.setattr(offline.tokenizer.hf_tokenizer, "chat_template", None)
    request = ChatRequest.model_validate({"model": "demo", "messages": [{"role": "system", "content": "Hm."}, *ASK]})
    assert chat.render(offline.tokenizer, request.messages) == "<|bos|>system: Hm.\nuser: What is a generator?\nassistant:"
