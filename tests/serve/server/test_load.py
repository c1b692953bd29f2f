"""Many clients at once, clients that leave, clients that do not read, and more than the server takes."""

import asyncio
import json
import socket
import time

import httpx
import openai
import pytest

from penstock import LLM, SamplingParams
from penstock.serve.config import EngineConfig
from penstock.serve.engine import Engine
from tests.serve.server.servers import around
from tests.serve.simulated import SimulatedRunner

CLIENTS, TOKENS = 200, 24
WORDS = ["A generator", "The list", "If the argument", "Return a new", "This function"]


def prompt_of(index):
    return f"{WORDS[index % len(WORDS)]} {index} is"


async def read_stream(client, body):
    """(token ids, text, finish reason, usage) as they came."""
    tokens, text, reason, usage, done = [], "", None, None, False
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            assert not done or not line
            if line == "data: [DONE]":
                done = True
            elif line:
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    assert reason is None
                    tokens += choice["token_ids"]
                    text += choice["text"]
                    reason = choice["finish_reason"]
    assert done
    return tokens, text, reason, usage


def together(url, bodies, limit=120):
    async def run():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=limit, limits=limits) as client:
            return await asyncio.gather(*(read_stream(client, body) for body in bodies))

    return asyncio.run(run())


def held_pages(live):
    return live.metric("penstock_kv_cache_pages") - live.metric("penstock_kv_cache_pages_free")


@pytest.mark.slow
def test_two_hundred_streams_get_their_own_tokens(live, offline):
    """No token is lost, doubled or another's: each stream is what the model makes of its prompt without a server."""
    prompts = [prompt_of(index) for index in range(CLIENTS)]
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    expected = [output.outputs[0] for output in offline.generate(prompts, params)]
    body = {"model": "demo", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    made_before = live.metric("penstock_generation_tokens_total")
    streams = together(live.url, [body | {"prompt": prompt} for prompt in prompts])
    for (tokens, text, reason, usage), output in zip(streams, expected, strict=True):
        assert (tokens, text, reason) == (output.token_ids, output.text, "length")
        assert usage["completion_tokens"] == TOKENS
    assert live.metric("penstock_generation_tokens_total") == made_before + CLIENTS * TOKENS
    assert held_pages(live) == 0


def raw_request(url, body):
    """A connection on which a request was sent."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # takes little that is not read
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_their_pages(live, stream):
    """Their requests would run for minutes."""
    body = {"model": "demo", "prompt": "x", "n": 4, "max_tokens": 2000, "ignore_eos": True, "stream": stream}
    gone = live.metric("penstock_completions_total")
    connections = [raw_request(live.url, body) for _ in range(8)]
    wait_for(lambda: held_pages(live) >= 32)
    for connection in connections:
        if stream:
            assert connection.recv(100)
        connection.close()
    wait_for(lambda: held_pages(live) == 0)
    assert live.metric("penstock_num_requests_running") == live.metric("penstock_num_requests_waiting") == 0
    assert live.metric("penstock_completions_total") == gone + 8


def test_a_client_that_does_not_read_holds_up_nobody(offline):
    """Its stream is more than the buffers of its connection take, so the server is never done with it."""
    build = lambda: Engine(  # noqa: E731
        EngineConfig("demo"), SimulatedRunner(num_pages=1024, max_model_len=512, vocab_size=4096), offline.tokenizer
    )
    body = {"model": "demo", "prompt": "x", "n": 16, "max_tokens": 450, "ignore_eos": True, "stream": True, "logprobs": 20}
    with around(build) as (url, service):
        silent = raw_request(url, body)
        wait_for(lambda: service.loop.statistics.num_running == 16)
        for _ in range(3):
            assert httpx.post(url + "/v1/completions", json={"model": "demo", "prompt": "x"}).status_code == 200
        wait_for(lambda: service.loop.statistics.output_tokens == 16 * 450 + 3 * 16, seconds=60)
        wait_for(lambda: service.loop.statistics.num_free_pages == service.loop.statistics.num_pages)
        answered = 'penstock_http_responses_total{route="/v1/completions",status="200"} 3.0'
        assert answered in httpx.get(url + "/metrics").text, "the silent client took everything; make its stream longer"
        silent.close()
        wait_for(lambda: answered.replace("3.0", "4.0") in httpx.get(url + "/metrics").text)


def slow_engine(tokenizer, steps_per_second=50, **limits):
    """An engine whose steps take long."""
    runner = SimulatedRunner(num_pages=256, max_model_len=512, vocab_size=4096, **limits)
    execute = runner.execute

    def slowly(plan):
        time.sleep(1 / steps_per_second)
        return execute(plan)

    runner.execute = slowly
    return Engine(EngineConfig("demo", max_num_seqs=2), runner, tokenizer)


def test_overload_is_answered_429(offline):
    """Two run, two wait, the fifth is told to come back; the four are served."""
    body = {"model": "demo", "prompt": "x", "max_tokens": 30, "ignore_eos": True}
    with around(lambda: slow_engine(offline.tokenizer, max_num_seqs=2), max_queue=2) as (url, service):
        connections = [raw_request(url, body) for _ in range(4)]
        wait_for(lambda: service.dispatch.num_open == 4)
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError) as raised:
            client.completions.create(model="demo", prompt="y")
        assert raised.value.code == "queue_full" and int(raised.value.response.headers["retry-after"]) >= 1
        for connection in connections:
            connection.settimeout(30)
            assert b" 200 " in connection.recv(65536)
            connection.close()
        too_many = httpx.post(url + "/v1/completions", json=body | {"n": 5})
        assert too_many.status_code == 400 and "the server holds 4" in too_many.text
        assert "penstock_requests_refused_total 1.0" in httpx.get(url + "/metrics").text


def test_one_prompt_of_many_is_refused_and_none_runs(offline):
    with around(lambda: slow_engine(offline.tokenizer, max_num_seqs=2)) as (url, service):
        answer = httpx.post(url + "/v1/completions", json={"model": "demo", "prompt": ["x", "x " * 600]})
        assert answer.status_code == 400 and service.dispatch.num_open == 0
        assert service.loop.statistics.num_running == 0


def test_output_tokens_are_limited():
    build = lambda: LLM("demo", device="cpu", max_num_seqs=2, max_model_len=64).engine  # noqa: E731
    with around(build, max_output_tokens=3) as (url, _):
        body = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}
        assert httpx.post(url + "/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 3
        answer = httpx.post(url + "/v1/chat/completions", json=body | {"max_tokens": 4})
        assert answer.status_code == 400 and "at most 3" in answer.json()["error"]["message"]
