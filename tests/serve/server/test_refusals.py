"""Whatever is sent, the answer is the asked one or an error object below 500."""

import json
import socket

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from penstock.cli import main
from penstock.serve.config import EngineConfig
from penstock.serve.engine import Engine
from tests.serve.server.servers import around
from tests.serve.simulated import SimulatedRunner

GOOD = {"model": "demo", "prompt": "x", "max_tokens": 2}
JSON = {"content-type": "application/json"}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def refused(answer, status=400):
    """The error of an answer."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert answer.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", 5),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", [1.5]),
        ("prompt", [-1]),
        ("prompt", [4096]),
        ("prompt", [True]),
        ("prompt", "\ud800"),
        ("max_tokens", 0),
        ("max_tokens", "5"),
        ("max_tokens", 2.5),
        ("max_tokens", 1 << 40),
        ("max_tokens", 2048),
        ("temperature", -1),
        ("temperature", "warm"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("n", 0),
        ("n", 129),
        ("stop", [""]),
        ("stop", [7]),
        ("seed", 1 << 70),
        ("logprobs", -1),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 1000}),
        ("logit_bias", {"5000": 1}),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("response_format", {"type": "xml"}),
        ("best_of", 3),
        ("suffix", "end"),
    ],
)
def test_wrong_values(live, field, value):
    error = refused(live.post("/v1/completions", content=json.dumps(GOOD | {field: value}), headers=JSON))
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "wizard", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "[]"}}]}],
        [{"role": "user", "content": "x" * 100_000}],
    ],
)
def test_wrong_messages(live, messages):
    refused(live.post("/v1/chat/completions", CHAT | {"messages": messages}))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"model": "demo", "prompt": "\xff"}',
        b'{"model": "demo", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "demo", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=["empty", "cut", "null", "list", "no text", "invalid UTF-8", "huge number", "deep"],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_bodies_that_are_no_request(live, path, body):
    refused(live.post(path, content=body, headers=JSON))


def test_errors_name_the_field_and_what_it_may_be(live):
    error = refused(live.post("/v1/completions", GOOD | {"temperature": 9}))
    assert error["param"] == "temperature" and error["message"] == "temperature: Input should be less than or equal to 2"
    error = refused(live.post("/v1/completions", {"model": "demo", "prompt": "x", "top_q": 1}))
    assert error["param"] == "top_q" and "Extra inputs are not permitted" in error["message"]
    error = refused(live.post("/v1/completions", GOOD | {"max_tokens": 2048}))
    assert error["code"] == "context_length_exceeded" and "the context is 2048 tokens" in error["message"]
    error = refused(live.post("/v1/completions", content=b"{", headers=JSON))
    assert error["message"].startswith("the body is no JSON: ")
    error = refused(live.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}))
    assert "content-type: application/json" in error["message"]


def test_the_client_raises_the_types_it_has(live):
    with live.client() as client:
        with pytest.raises(openai.NotFoundError) as raised:
            client.completions.create(model="other", prompt="x")
        assert raised.value.code == "model_not_found" and raised.value.param == "model"
        with pytest.raises(openai.BadRequestError, match="echo gives no log-probabilities"):
            client.completions.create(model="demo", prompt="x", echo=True, logprobs=1)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="demo", input="x")


def test_unknown_paths_and_methods(live):
    refused(live.get("/nowhere"), 404)
    refused(live.get("/v1/completions"), 405)
    refused(live.get("/v1/models/other"), 404)


def test_request_ids_come_back(live):
    assert live.get("/health", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    made = live.get("/health", headers={"x-request-id": "not one word"}).headers["x-request-id"]
    assert len(made) == 32


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_too_large_is_refused_before_it_is_read(live, announced):
    head = "content-length: 1000000000" if announced else "transfer-encoding: chunked"
    with socket.create_connection(live.url.removeprefix("http://").split(":")) as connection:
        lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", head, "", ""]
        connection.sendall("\r\n".join(lines).encode())
        if not announced:
            piece = b"10000\r\n" + b" " * 65536 + b"\r\n"
            for _ in range(65):
                connection.sendall(piece)
        connection.settimeout(10)
        answer = b""
        while b"\r\n\r\n" not in answer or b"}}" not in answer:
            more = connection.recv(65536)
            assert more, answer
            answer += more
    assert b" 413 " in answer.split(b"\r\n", 1)[0] and b"the body is larger than 4194304 bytes" in answer


# Schemathesis: what the OpenAPI document allows, and what it does not

POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", POSTS)
def test_the_document_is_kept(live, path, mode):
    """Right requests, but for the model's name, which no document has, and wrong ones."""
    operation = schemathesis.openapi.from_url(live.url + "/openapi.json")[path]["POST"]
    wrong = mode is GenerationMode.NEGATIVE

    @settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        if not wrong and isinstance(case.body, dict):
            case.body |= {"model": "demo"} | ({"max_tokens": 2, "n": 1} if "completions" in path else {})
        answer = case.call(timeout=30)
        case.validate_response(answer, checks=CHECKS + [schemathesis.checks.negative_data_rejection] * wrong)
        statuses.append(answer.status_code)

    statuses: list[int] = []
    check()
    assert wrong or 200 in statuses, statuses


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/health", "/ready", "/metrics"])
def test_routes_without_a_body(live, path):
    operation = schemathesis.openapi.from_url(live.url + "/openapi.json")[path]["GET"]

    @settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def check(case):
        case.validate_response(case.call(timeout=30), checks=CHECKS)

    check()


def test_an_api_key_is_asked_for(offline, caplog):
    """Everywhere but where probes and Prometheus ask; it is in no log."""
    caplog.set_level("DEBUG")
    build = lambda: Engine(EngineConfig("demo"), SimulatedRunner(vocab_size=4096), offline.tokenizer)  # noqa: E731
    with around(build, api_key="open sesame") as (url, _), httpx.Client(base_url=url) as client:
        for path in ("/v1/models", "/openapi.json", "/nowhere"):
            assert refused(client.get(path), 401)["code"] == "invalid_api_key"
        for wrong in ("Bearer open", "open sesame", "Bearer open sesame!", "Bearer öpen"):
            assert refused(client.get("/v1/models", headers={"authorization": wrong.encode()}), 401)
        assert refused(client.post("/v1/completions", json=GOOD), 401)["type"] == "authentication_error"
        assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3
        with openai.OpenAI(base_url=url + "/v1", api_key="open sesame") as known:
            assert known.completions.create(**GOOD).usage.completion_tokens == 2
    records = [record for record in caplog.records if record.name.startswith(("penstock", "uvicorn"))]
    assert records and not any("sesame" in str(vars(record)) for record in records)


def test_the_key_may_come_from_the_environment(monkeypatch):
    given = []
    monkeypatch.setattr("penstock.serve.server.command.serve", lambda build, options, listening: given.append(options) or 0)
    monkeypatch.setenv("PENSTOCK_API_KEY", "from there")
    assert main(["serve", "demo"]) == 0 and main(["serve", "demo", "--api-key", "from here"]) == 0
    assert [options.api_key for options in given] == ["from there", "from here"]
    assert "from there" not in repr(given[0])
