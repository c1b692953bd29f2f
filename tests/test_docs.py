"""What the documents show is run: every Python block of README.md and docs/, and its printed output where that follows.

The word after ```python says how a block is run:

    (nothing)       in order, in one namespace for each document
    file=PATH       it is a file of the package; later blocks import it as if it stood there
    raises          it must raise, and the next text block is what it says
    no-run: REASON  not at all

A ```bash background block is a server: started, waited for until the port 8000 that it names answers, ended with the document.

A ```text block after a block that prints, at most one paragraph below it, is compared with what was printed.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*) ?(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `text` is the ```text block that follows it, if one does."""

    line: int
    language: str
    how: str
    code: str
    text: str | None


def blocks_of(source: str) -> list[Block]:
    """The fenced blocks of a document."""
    found = list(FENCE.finditer(source))
    blocks = []
    for match, following in zip(found, [*found[1:], None], strict=False):
        between = source[match.end() : following.start()] if following else ""
        is_output = following is not None and following[1] == "text" and between.count("\n\n") <= 2
        line = source[: match.start()].count("\n") + 2
        blocks.append(Block(line, match[1], match[2].strip(), match[3], following[3] if following and is_output else None))
    return [block for block in blocks if block.language == "python" or block.how == "background"]


def execute(path: Path) -> None:
    """Runs the blocks of one document in this process."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        port = free_port()  # in place of the 8000 that people read
        for block in blocks_of(path.read_text().replace("8000", str(port))):
            if block.how == "background":
                servers.enter_context(running(block.code, port))
                continue
            if block.how.startswith("no-run"):
                continue
            if block.how.startswith("file="):
                home = Path(block.how.removeprefix("file="))
                (Path(folder) / home.name).write_text(block.code)
                package = importlib.import_module(".".join(home.parent.parts))
                if folder not in package.__path__:
                    package.__path__.append(folder)
                continue
            # Line numbers of a traceback are those of the document.
            program = compile("\n" * (block.line - 1) + block.code, path.name, "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                said = run(program, namespace, must_raise=block.how == "raises")
            got = said if block.how == "raises" else printed.getvalue()
            if got and block.text is not None:
                assert squeezed(got) == squeezed(block.text), f"{path.name}:{block.line} prints\n{got}\nand not\n{block.text}"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(command, port):
    """A `penstock` command in the background, once its port answers."""
    process = subprocess.Popen([sys.executable, "-m", *shlex.split(command)])
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None, f"{command} has ended"
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        assert process.wait(60) == 0


def run(program, namespace, must_raise):
    """Runs a block; what it raised, in words, when it must."""
    if not must_raise:
        exec(program, namespace)
        return ""
    try:
        exec(program, namespace)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"line {program.co_firstlineno} raises nothing")


def squeezed(text):
    """Words alone: columns may be a space wider."""
    return text.split()


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks_of(path.read_text())], ids=lambda path: path.name)
def test_blocks_run(path):
    for block in blocks_of(path.read_text()):
        where = f"{path.name}:{block.line} ```{block.language} {block.how}"
        assert re.fullmatch(r"|raises|file=\S+\.py|no-run: .+|background", block.how), where
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in LINK.findall(path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("script", ["build_docs.py", "render_tables.py"])
def test_generated_pages_are_up_to_date(script):
    command = [sys.executable, f"scripts/{script}", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


SAMPLE = {
    "command": "penstock bench rms_norm",
    "environment": {
        "device": "GPU",
        "driver": "1.2",
        "torch": "2.13.0",
        "packages": {"triton": "3.7"},
        "date": "2026-01-02T03:04",
    },
    "ceilings": {"copy": 4.2e12},
    "results": [
        {
            "operator": "rms_norm",
            "case": case,
            "floor_us": floor,
            "timed": [
                {"name": "triton", "kind": "implementation", "median_us": 2 * floor, "of_floor": 0.5, "ratios": {"torch": 1.5}},
                {"name": "cpu", "kind": "implementation", "median_us": 9 * floor, "of_floor": 0.1, "ratios": {"torch": 0.3}},
                {"name": "torch", "kind": "peer", "median_us": 3 * floor, "of_floor": 0.3, "ratios": {}},
            ],
        }
        for case, floor in (("small", 1.0), ("large", 20.0))
    ],
}


def test_tables_of_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import render_tables

    path = Path("benchmarks/results/gpu/rms_norm.json")
    assert render_tables.tables([], True, "") == render_tables.NONE
    every = render_tables.tables([(path, SAMPLE)], True, "../")
    assert every.startswith(
        "GPU, driver 1.2, torch 2.13.0, Triton 3.7, 2026-01-02; copy bandwidth reached in these runs 4200 GB/s."
    )
    assert f"| [`rms_norm`](../{path}) | small | triton | 2.0 | 50% | torch 1.50x |" in every.splitlines()
    short = render_tables.tables([(path, SAMPLE)], False, "")
    assert "| large | triton | 40.0 |" in short and "| small |" not in short
    assert not render_tables.is_operator({**SAMPLE, "command": "penstock bench rms_norm --quick"})
    assert not render_tables.is_operator({"tokens_per_second": 1.0})


def test_the_runner_of_documents_notices(tmp_path):
    planted = {
        "print(1)": "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "raises": "```python raises\nx = 1\n```\n",
        "fails": "```python\nassert False\n```\n",
    }
    for name, source in planted.items():
        path = tmp_path / "planted.md"
        path.write_text(source)
        with pytest.raises(AssertionError):
            execute(path)
        assert name


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
