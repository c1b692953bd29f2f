"""One GPU session in one command: facts and ceilings, the GPU tests, every operator with its peers, the engine.

    PYTHONPATH=. python benchmarks/gpu_session.py --minutes 9 --output $OUT
    PYTHONPATH=. python benchmarks/gpu_session.py --device cpu --quick --minutes 3 --output session     # a dry run

Each part runs in processes of its own with a time limit, so that a hang or a crash costs one part, and among operators one
operator. What a part leaves unused goes to the parts after it. The output folder holds at most six files: facts.json,
tests.json, operators.json, engine.json, summary.txt and session.log; the summary is printed last.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from watched import ROOT, environment, watch

# Shares of the time that is left when a part begins.
PARTS = {"facts": 1.0, "tests": 5.0, "operators": 6.0, "engine": 4.0}
FACTS_LIMIT = 75.0
LARGE = "*[f'{o.name}-{i}-{c.name}' for o in catalogue().values() for i in o.implementations for c in o.all_cases() if c.bench]"
# What matters most goes first: the time may not be enough for all.
FIRST = (
    "attention_decode",
    "sample",
    "attention_prefill",
    "attention_prefill_paged",
    "rms_norm",
    "add_rms_norm",
    "silu_and_mul",
)
# Operators with a FlashInfer peer, whose kernels are compiled from source: done beside the tests, on idle cores.
WARMED = (
    "rms_norm",
    "add_rms_norm",
    "silu_and_mul",
    "attention_prefill",
    "attention_prefill_paged",
    "attention_decode",
    "sample",
)


@dataclass
class Session:
    """What all parts share."""

    options: argparse.Namespace
    scratch: Path
    log: TextIO
    end: float
    summary: list[str] = field(default_factory=list)
    warmers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def say(self, line: str) -> None:
        """Adds a line to the summary."""
        self.summary.append(line)
        print(line, flush=True)

    def left(self) -> float:
        """Seconds until the session ends."""
        return self.end - time.monotonic()

    def save(self, name: str, document: Any) -> None:
        """Writes one of the output files."""
        (self.options.output / name).write_text(json.dumps(document, indent=1) + "\n")


def start_warmers(session: Session) -> None:
    """Starts a process for each operator whose FlashInfer kernels have to be compiled."""
    options = session.options
    if options.device == "cpu" or importlib.util.find_spec("flashinfer") is None:
        return
    known = options.operators or names(session)
    for name in known:
        if name in WARMED:
            command = [sys.executable, "-m", "penstock.bench", name, "--device", options.device, "--warm"]
            session.warmers.append(
                subprocess.Popen(
                    command, cwd=ROOT, stdout=session.log, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
                )
            )


def end_warmers(session: Session, wait: float) -> None:
    """Waits for the warmers and ends those that take longer."""
    until = time.monotonic() + wait
    while session.warmers and time.monotonic() < until:
        session.warmers = [process for process in session.warmers if process.poll() is None]
        time.sleep(0.2)
    for process in session.warmers:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    session.warmers = []


def facts(session: Session, limit: float) -> None:
    """Device facts and ceilings."""
    folder = session.scratch / "facts"
    ended = watch(bench(session, "ceilings", folder=folder), session.log, min(limit, FACTS_LIMIT), quiet)
    found = folder / "ceilings.json"
    document: dict[str, Any] = stamped(session, found) if found.exists() else {"fault": ended.fault}
    session.save("facts.json", document)
    if "ceilings" not in document:
        session.say(f"facts: {ended.fault}")
        return
    where, ceilings = document["environment"], document["ceilings"]
    rates = ", ".join(f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in ceilings["matmul"].items())
    session.say(f"{where['device']}, torch {where['torch']}, driver {where.get('driver', '-')}, commit {where['commit']}")
    session.say(f"copy {ceilings['copy'] / 1e9:.0f} GB/s, {rates}  ({ended.seconds:.0f} s)")


def tests(session: Session, limit: float) -> None:
    """pytest -m gpu, several workers on one GPU: most of the time goes to compiling."""
    outcomes: dict[str, str] = {}
    # With workers a line reads "[gw0] [ 3%] PASSED tests/x.py::name", without "tests/x.py::name PASSED [ 3%]".
    told = re.compile(
        r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\s+(tests/\S+)|(tests/\S+::.+?)\s+(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
    )

    def read(line: str) -> None:
        if found := told.search(line):
            outcomes[found[2] or found[3]] = found[1] or found[4]

    workers = session.options.test_workers
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--import-mode=importlib"]
    command += ["--strict-markers", *(["-n", str(workers)] if workers else []), *(session.options.tests or marked())]
    if not session.options.large_tests:
        # The operators' part verifies these before it times them, on the GPU; here their oracle would run on the CPU.
        for name in ask(session, LARGE):
            command += ["--deselect", f"tests/ops/test_conformance.py::test_case_on_gpu[{name}]"]
    command += ["-k", session.options.test_filter] if session.options.test_filter else []
    ended = watch(command, session.log, limit, read)
    counts = {kind: list(outcomes.values()).count(kind) for kind in sorted(set(outcomes.values()))}
    failed = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    session.save(
        "tests.json",
        {"counts": counts, "failed": failed, "fault": ended.fault, "seconds": ended.seconds, "outcomes": outcomes},
    )
    words = ", ".join(f"{count} {kind.lower()}" for kind, count in counts.items()) or "none ran"
    session.say(f"tests: {words}  ({ended.seconds:.0f} s{'; ' + ended.killed if ended.killed else ''})")
    for name in failed[:12]:
        session.say(f"  failed {name}")


def marked() -> list[str]:
    """Files with tests for a GPU; the others may import what a bare machine lacks."""
    return sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())


def operators(session: Session, limit: float) -> None:
    """Every operator's benchmark cases with all peers; an operator that hangs or crashes is left out and the rest goes on."""
    folder = session.scratch / "operators"
    end = time.monotonic() + limit
    end_warmers(session, limit / 2)
    waiting = session.options.operators or names(session)
    faults: dict[str, str] = {}
    while waiting:
        running: list[str] = []
        done: list[str] = []

        def read(line: str, running: list[str] = running, done: list[str] = done) -> None:
            if line.startswith("@start "):
                running.append(line.split()[1])
            elif line.startswith("@done "):
                done.append(Path(line.split(maxsplit=1)[1]).stem)
            elif line.strip():
                print("  " + line, flush=True)

        ended = watch(bench(session, *waiting, folder=folder), session.log, max(1.0, end - time.monotonic()), read)
        waiting = [name for name in waiting if name not in done]
        if not waiting:
            break
        culprit = running[-1] if running and running[-1] in waiting else ""
        over = time.monotonic() >= end
        for name in [culprit] if culprit and not over else waiting:
            faults[name] = ended.fault if name == culprit or not culprit else "no time left"
        waiting = [] if over or not culprit else [name for name in waiting if name != culprit]
    documents = {path.stem: stamped(session, path) for path in sorted(folder.glob("*.json"))}
    session.save("operators.json", {"operators": documents, "faults": faults})
    session.say("operator case: µs (p10-p90), share of the roofline floor; faster than peers by")
    for name, document in documents.items():
        for result in document["results"]:
            for line in result_lines(name, result):
                session.say(line)
    for name, fault in faults.items():
        session.say(f"{name}: no numbers, {fault}")


def result_lines(name: str, result: dict[str, Any]) -> list[str]:
    """One line for each implementation of a case."""
    lines = []
    for timed in result["timed"]:
        if timed["kind"] != "implementation":
            continue
        of_floor = f"{timed['of_floor']:.0%}" if timed["of_floor"] else "-"
        ratios = ", ".join(f"{peer} {value:.2f}x" for peer, value in timed["ratios"].items())
        spread = f"{timed['p10_us']:.4g}-{timed['p90_us']:.4g}"
        mark = "" if timed["method"] == "cuda graph" else f" [{timed['method']}]"
        who = f"{name} {result['case']} {timed['name']}"
        lines.append(f"{who}: {timed['median_us']:.4g} ({spread}), {of_floor}; {ratios or 'no peer'}{mark}")
    reds = {who: why for who, why in result["without"].items() if why.startswith(("red gate", "failed", "could not"))}
    lines += [f"{name} {result['case']} {who}: NO NUMBER, {why[:140]}" for who, why in reds.items()]
    return lines


def engine(session: Session, limit: float) -> None:
    """Tokens per second of the engine in a published shape (CUDA) or on a small checkpoint (CPU), against transformers."""
    folder = session.scratch / "engine"
    options = session.options
    extra = ["--shape", options.shape] if options.shape else ["--model", options.model] if options.model else []
    ended = watch([*bench(session, "engine", folder=folder), *extra], session.log, limit, quiet, silence=limit)
    found = folder / "engine.json"
    document = stamped(session, found) if found.exists() else {}
    session.save("engine.json", {**document, "fault": ended.fault})
    for row in document.get("rows", []):
        session.say("engine " + row["line"])
    if ended.fault:
        session.say(f"engine: {ended.fault}")


def bench(session: Session, *targets: str, folder: Path) -> list[str]:
    """The command line of penstock.bench."""
    options = session.options
    command = [sys.executable, "-m", "penstock.bench", *targets, "--device", options.device, "--output", str(folder)]
    command += ["--budget", str(options.budget)]
    command += ["--quick"] if options.quick else []
    for peer in options.peer:
        command += ["--peer", peer]
    return command


def stamped(session: Session, path: Path) -> dict[str, Any]:
    """A result file, with the commit that was named for a working tree that carries no history."""
    document = json.loads(path.read_text())
    if session.options.commit:
        document["environment"]["commit"] = session.options.commit
    return document


def names(session: Session) -> list[str]:
    """Every operator of the catalogue."""
    found = ask(session, "*catalogue()")
    return [name for name in FIRST if name in found] + [name for name in found if name not in FIRST]


def ask(session: Session, expression: str) -> list[str]:
    """The words that an expression over penstock's catalogue prints."""
    code = f"from penstock.bench.run import catalogue; print('answer:', {expression})"
    found: list[str] = []

    def read(line: str) -> None:
        if line.startswith("answer:"):
            found.extend(line.split()[1:])

    ended = watch([sys.executable, "-c", code], session.log, 120.0, read)
    if not found:
        raise RuntimeError(f"the catalogue cannot be read: {ended.fault}")
    return found


def quiet(line: str) -> None:
    """Shows a part's lines as they come."""
    if line.strip():
        print("  " + line, flush=True)


def main() -> int:
    """Runs the chosen parts; 1 when one of them could not be run at all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything together")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "benchmarks/session")))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small problems: a test of the script")
    parser.add_argument("--operators", nargs="*", default=[], help="default: the whole catalogue")
    parser.add_argument("--peer", nargs="*", default=[], help="only peers whose name contains one of these")
    parser.add_argument("--budget", type=float, default=0.7, help="seconds of sampling for each case")
    parser.add_argument("--tests", nargs="*", default=[], help="paths for pytest; default: those with tests for a GPU")
    parser.add_argument("--large-tests", action="store_true", help="benchmark shapes in the tests too")
    parser.add_argument("--test-filter", default="", help="pytest's -k")
    parser.add_argument("--commit", default="", help="recorded where the working tree carries no history")
    parser.add_argument("--test-workers", type=int, default=6)
    parser.add_argument("--shape", default="", help="engine: a published shape; default llama-3.1-8b on cuda")
    parser.add_argument("--model", default="", help="engine: a checkpoint instead")
    options = parser.parse_args()
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.device != "cpu" and not options.model and not options.shape:
        options.shape = "llama-3.1-8b"
    chosen = options.parts.split(",")
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    run = {"facts": facts, "tests": tests, "operators": operators, "engine": engine}
    broken = 0
    with tempfile.TemporaryDirectory() as scratch, open(options.output / "session.log", "w") as log:
        session = Session(options, Path(scratch), log, time.monotonic() + options.minutes * 60)
        for index, part in enumerate(chosen):
            limit = session.left() * PARTS[part] / sum(PARTS[later] for later in chosen[index:])
            if part == "tests" and "operators" in chosen:
                start_warmers(session)
            print(f"== {part}, at most {limit:.0f} s", flush=True)
            try:
                run[part](session, limit)
            except Exception as error:
                # The other parts must still have their turn.
                session.say(f"{part}: {type(error).__name__}: {error}")
                broken = 1
        end_warmers(session, 0.0)
        (options.output / "summary.txt").write_text("\n".join(session.summary) + "\n")
    print("\n== summary\n" + "\n".join(session.summary), flush=True)
    return broken


if __name__ == "__main__":
    sys.exit(main())
