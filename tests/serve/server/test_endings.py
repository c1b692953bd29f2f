"""How a server ends: told to, told twice, and when its engine fails."""

import json
import signal
import socket
import sys
import textwrap
import threading
import time

import httpx
import openai
import pytest

from penstock.serve.config import EngineConfig
from penstock.serve.engine import Engine
from penstock.serve.server.command import _Server
from tests.serve.server.servers import around, command
from tests.serve.server.test_load import slow_engine
from tests.serve.simulated import SimulatedRunner

LONG = {"model": "demo", "prompt": "A generator is", "max_tokens": 600, "temperature": 0}
SMALL = ("--max-num-seqs", "4", "--max-model-len", "1024")


def streamed(running, seen, begun):
    """Reads a long stream in a thread; `seen` gets its chunks, or the error that ends it."""

    def read():
        try:
            with running.client() as client:
                for chunk in client.completions.create(**LONG, stream=True, extra_body={"ignore_eos": True}):
                    seen.append(chunk.choices[0])
                    begun.set()
        except openai.APIError as error:
            seen.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(30)
    return thread


def test_sigterm_finishes_what_runs_and_refuses_what_comes():
    with command(*SMALL) as running:
        seen, begun = [], threading.Event()
        reader = streamed(running, seen, begun)
        keep_alive = httpx.Client(base_url=running.url, timeout=30)
        assert keep_alive.get("/ready").status_code == 200
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert len(seen) < 600, "the stream ended before it could be interrupted"
        ready = keep_alive.get("/ready")
        refused = httpx.post(running.url + "/v1/completions", json=LONG)
        assert (ready.status_code, keep_alive.get("/health").status_code) == (503, 200)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert refused.headers["retry-after"]
        reader.join(60)
        assert running.process.wait(20) == 0
        assert len(seen) >= 1 and seen[-1].finish_reason == "length"
        assert sum(bool(choice.finish_reason) for choice in seen) == 1
        messages = [line["message"] for line in running.lines]
        assert "draining" in messages and "requests are ended before they are done" not in messages


def test_a_second_signal_ends_what_runs():
    with command(*SMALL, "--drain-seconds", "60") as running:
        seen, begun = [], threading.Event()
        reader = streamed(running, seen, begun)
        begin = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(20) == 0 and time.monotonic() - begin < 15
        reader.join(10)
        assert len(seen) < 600, "the stream ended before it could be interrupted"
        assert "before it was done" in str(seen[-1])


def test_a_drain_has_a_limit(offline):
    servers = []

    def make(config, service):
        servers.append(_Server(config, service, drain_seconds=0.5))
        return servers[0]

    with around(lambda: slow_engine(offline.tokenizer, max_num_seqs=2), make) as (url, service):
        answers = []
        ask = lambda: answers.append(httpx.post(url + "/v1/completions", json=LONG | {"max_tokens": 400}, timeout=30))  # noqa: E731
        asking = threading.Thread(target=ask)
        asking.start()
        while not service.dispatch.num_open:
            time.sleep(0.01)
        servers[0].handle_exit(signal.SIGTERM, None)
        asking.join(20)
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "aborted"


class Failing(SimulatedRunner):
    """Breaks at its tenth step."""

    def execute(self, plan):
        if len(self.plans) == 9:
            raise RuntimeError("the device is lost")
        return super().execute(plan)


@pytest.mark.parametrize("stream", [True, False])
def test_every_request_hears_of_a_failure(offline, stream):
    build = lambda: Engine(EngineConfig("demo"), Failing(vocab_size=4096, max_model_len=128), offline.tokenizer)  # noqa: E731
    with around(build) as (url, service), openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        errors = []

        def ask():
            try:
                answer = client.completions.create(model="demo", prompt="x", max_tokens=30, stream=stream)
                list(answer)
            except openai.APIError as error:
                errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(errors) == 3 and all("the engine has failed" in str(error) for error in errors)
        health = httpx.get(url + "/health")
        assert health.status_code == 503 and "the device is lost" in health.json()["reason"]
        later = httpx.post(url + "/v1/completions", json={"model": "demo", "prompt": "x"})
        assert later.status_code == 503 and later.json()["error"]["code"] == "engine_dead"
        assert "penstock_engine_alive 0.0" in httpx.get(url + "/metrics").text
        assert service.dispatch.num_open == 0


def test_the_process_ends_with_one_when_the_engine_fails(tmp_path):
    """The real runner, made to raise after some steps; /health tells before the end."""
    program = tmp_path / "failing.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            from penstock.cli import main
            from penstock.serve.runner import Runner

            execute, steps = Runner.execute, []

            def failing(self, plan):
                steps.append(plan)
                if len(steps) == 20:
                    raise RuntimeError("the device is lost")
                return execute(self, plan)

            Runner.execute = failing
            sys.exit(main())
            """
        )
    )
    with command(*SMALL, program=(str(program),)) as running:
        seen, begun = [], threading.Event()
        reader = streamed(running, seen, begun)
        reader.join(20)
        assert "the engine has failed" in str(seen[-1])
        assert running.get("/health").status_code == 503 and running.get("/ready").status_code == 503
        assert running.process.wait(20) == 1
        [failure] = [line for line in running.lines if line["message"] == "the engine has failed"]
        assert failure["level"] == "critical" and "the device is lost" in failure["exception"]


def test_what_cannot_be_loaded_ends_with_one(tmp_path, capsys, monkeypatch):
    from penstock.cli import main

    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Nothing"]}))
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "demo", "--port", str(taken.getsockname()[1])]) == 1
    assert "Address already in use" in capsys.readouterr().err
    assert main(["serve", "demo", "--log-format", "xml"]) == 2
    assert main(["serve", "demo", "--max-body", "much"]) == 2
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "demo"]) == 1
    assert "pip install 'penstock[serve]'" in capsys.readouterr().err
