"""Servers to talk to: the command in a process of its own, and one in this process around any engine."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import uvicorn

from penstock.serve.server.app import Options, build_app
from penstock.serve.server.engine_loop import EngineLoop

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Command:
    """A running `penstock serve`; `lines` is its log."""

    process: subprocess.Popen
    url: str = ""
    lines: list[dict] = field(default_factory=list)

    def get(self, path, **options):
        return httpx.get(self.url + path, timeout=30, **options)

    def post(self, path, body=None, **options):
        if body is not None:
            options["json"] = body
        return httpx.post(self.url + path, timeout=30, **options)

    def client(self, **options):
        return openai.OpenAI(base_url=self.url + "/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60} | options)

    def metric(self, name):
        """The sum over labels of a metric."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@contextlib.contextmanager
def command(*arguments, program=("-m", "penstock")):
    """A server process that is killed at the end if it has not ended."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    words = [sys.executable, *program, "serve", "demo", "--port", "0", "--log-format", "json", "--dtype", "float32", *arguments]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    running = Command(process)
    listening = threading.Event()

    def read():
        for text in process.stderr:
            try:
                line = json.loads(text)
            except ValueError:
                line = {"message": text}
            running.lines.append(line)
            if line["message"] == "listening":
                running.url = line["url"]
                listening.set()
        listening.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert listening.wait(60) and running.url, running.lines
        yield running
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(10)


@contextlib.contextmanager
def around(build, make=lambda config, service: uvicorn.Server(config), **options):
    """A server in this process around the engine that `build` makes; its URL, its Service. It may end by itself."""
    loop = EngineLoop(build)
    loop.start()
    app = build_app(loop, Options(**{"model": "demo"} | options))
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = make(config, app.state.service)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", app.state.service
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
