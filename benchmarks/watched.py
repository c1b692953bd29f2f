"""Processes with a time limit: a hang or a crash of one costs no other."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
# Compiling a peer's kernels is silent and long; a kernel that hangs is silent for good.
SILENCE = 150.0


@dataclass
class Ended:
    """How a process ended: its exit status, why it was killed if it was, and its last lines."""

    status: int
    killed: str
    tail: list[str]
    seconds: float

    @property
    def fault(self) -> str:
        """One line, empty when all went well."""
        if self.killed:
            return self.killed
        last = next((line for line in reversed(self.tail) if line.strip()), "")
        return f"exit status {self.status}: {last.strip()[:200]}" if self.status else ""


def environment() -> dict[str, str]:
    """The environment of a part: this working tree first, then what was on the path."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, "COLUMNS": "200"}


def watch(command: list[str], log: TextIO, limit: float, on_line: Callable[[str], None], silence: float = SILENCE) -> Ended:
    """Runs a command until it ends, exceeds the limit or says nothing for too long; every line goes to the log."""
    began = time.monotonic()
    log.write(f"\n$ {' '.join(command)}\n")
    log.flush()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env=environment(),
    )
    tail: list[str] = []
    heard = [time.monotonic()]

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            heard[0] = time.monotonic()
            log.write(line)
            tail.append(line.rstrip("\n"))
            del tail[:-40]
            on_line(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    killed = ""
    while process.poll() is None and not killed:
        now = time.monotonic()
        if now - began > limit:
            killed = f"stopped at its limit of {limit:.0f} s"
        elif now - heard[0] > silence:
            killed = f"stopped after {silence:.0f} s without a word"
        else:
            time.sleep(0.1)
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    reader.join(5)
    log.flush()
    return Ended(status, killed, tail, time.monotonic() - began)
