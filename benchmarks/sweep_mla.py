"""Checks and times configs of the Hopper kernel of latent decode, each in a process of its own: a hang costs one of them.

    PYTHONPATH=. python benchmarks/sweep_mla.py --output "$OUT/sweep_mla.json"
    PYTHONPATH=. python benchmarks/sweep_mla.py --device cpu --impl triton --config 64,8,2 --shape 3x100     # a dry run

A config is the values of LatentConfig (of MlaConfig for the portable kernel), "default" what a call takes. All are compiled and
checked side by side: the small cases and the shapes against the reference, the shapes twice for the same bits. Then one after
another is timed in alternation with the portable kernel and FlashInfer, whose kernels another process has built; plans are made
outside the timing. The floor is that of the rates measured in the same run.
"""

import argparse
import fcntl
import functools
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from watched import watch

SHAPES = ["128x4096", "32x8192", "1x32768"]
CONFIGS = ["128,1", "128,0", "64,1", "64,0", "256,0"]


def say(**facts: object) -> None:
    """One line for the parent."""
    print("@" + json.dumps(facts), flush=True)


def forced(impl: str, config: str) -> Any:
    """Inside, calls take this config."""
    from contextlib import nullcontext
    from dataclasses import fields
    from importlib import import_module

    if config == "default":
        return nullcontext()
    configure = import_module(f"penstock.ops.attention.mla_{impl}").configure
    kinds = [field.type for field in fields(configure.type)]
    values = [word == "1" if kind in (bool, "bool") else int(word) for word, kind in zip(config.split(","), kinds, strict=True)]
    return configure.forced(configure.type(*values))


def drawn_shapes(options: argparse.Namespace) -> Any:
    """The cases to time."""
    from penstock.ops.attention import mla

    for shape in options.shape:
        count, length = map(int, shape.split("x"))
        for heads in options.heads:
            yield mla._case(f"{shape}_{heads}", [length] * count, heads, scale=192**-0.5, bench=True)


def check(options: argparse.Namespace, device: Any) -> list[Any]:
    """The shapes that are right; says what became of each."""
    import torch

    from penstock.bench.correct import verify
    from penstock.core.cases import Make
    from penstock.core.op import NotSupported
    from penstock.ops import mla_decode
    from penstock.testing import check_case

    right = []
    small = [case for case in mla_decode.all_cases() if not case.bench and device.type == "cuda"]
    for case in [*small, *drawn_shapes(options)]:
        say(begins=case.name)
        try:
            if case in small:
                check_case(mla_decode, options.impl, case, device)
                say(case=case.name, fault="")
                continue
            drawn = case.build(Make(device))
            first, second = (mla_decode(**drawn, impl=options.impl) for _ in range(2))
            fault = "" if torch.equal(first, second) else "two calls gave different bits"
            fault = fault or verify(mla_decode, options.impl, drawn)
            if not fault:
                right.append((case, drawn))
            say(case=case.name, fault=fault)
        except NotSupported as refusal:
            say(case=case.name, fault="", refused=str(refusal).splitlines()[1].strip())
        except AssertionError as error:
            say(case=case.name, fault=str(error)[:300])
    return right


def alone(lock: Any) -> bool:
    """Whether no other process checks or times; from then on none does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def work(options: argparse.Namespace) -> None:
    """The ceilings, or one config: its checks, and its time when it has the GPU alone."""
    import torch

    from penstock.bench.inputs import rotation
    from penstock.bench.peers import peers_of
    from penstock.bench.roofline import Ceilings, bound_by, floor_us, measure_ceilings
    from penstock.bench.timing import measure, ratio
    from penstock.ops import attention_decode_plan, mla_decode

    device = torch.device(options.device)
    config = options.config[0]
    with forced(options.impl, config), open(options.lock, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        right = check(options, device)
        fcntl.flock(lock, fcntl.LOCK_UN)
        if not right:
            return
        built = Path(options.lock).with_name("built")
        while not built.exists() or not alone(lock):
            say(begins="waiting")
            time.sleep(0.2)
        kept = Path(options.lock).with_name("ceilings.json")
        if not kept.exists():
            say(begins="ceilings")
            found = measure_ceilings(device, quick=device.type == "cpu", budget=0.2)
            kept.write_text(json.dumps([found.copy, found.matmul]))
            say(case="ceilings", copy=found.copy, matmul=found.matmul)
        ceilings = Ceilings(*json.loads(kept.read_text()))
        for case, drawn in right:
            say(begins=f"timing {case.name}")
            # A step plans once for all of its layers, so plans stay outside, as FlashInfer's does.
            Hq, (_, page_size, width) = drawn["q_latent"].shape[1], drawn["cache"].shape
            plan = attention_decode_plan(
                drawn["seqlens_k"], num_heads_q=Hq, num_heads_kv=1, head_dim=width, page_size=page_size, impl="triton"
            )
            sets = [{**arguments, "plan": plan} for arguments in rotation(drawn, None, None, device)]
            calls = {"this": [functools.partial(mla_decode, **arguments, impl=options.impl) for arguments in sets]}
            if options.impl != "triton":
                calls["triton"] = [functools.partial(mla_decode, **arguments, impl="triton") for arguments in sets]
            if built.read_text() == "" and device.type == "cuda":
                for name, peer in peers_of(mla_decode).items():
                    made = [peer(arguments) for arguments in sets]
                    if callable(made[0]):
                        calls[name] = made
                    else:
                        say(case=case.name, left_out=f"{name}: {made[0]}")
            cost = mla_decode.cost_of(drawn)
            floor = floor_us(cost, ceilings) if device.type == "cuda" else 0.0
            series = measure(calls, device, budget=options.budget * len(calls))
            for name, each in series.items():
                say(case=case.name, name=name, us=each.median_us, p10=each.p10_us, p90=each.p90_us, method=each.method,
                    rounds=len(each.samples_us), ratio=ratio(each, series["this"]), floor_us=floor,
                    bound=bound_by(cost, ceilings) if floor else "")  # fmt: skip


def main() -> int:
    """Starts the workers and prints a table; the number of faults, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--impl", default="hopper")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--shape", action="append", default=[], help="requests x keys, such as 32x8192")
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--budget", type=float, default=0.05, help="seconds of sampling for each contestant of a case")
    parser.add_argument("--limit", type=float, default=80.0, help="seconds that a process may take")
    parser.add_argument("--silence", type=float, default=30.0, help="seconds without a word after which it is ended")
    parser.add_argument("--build", type=float, default=45.0, help="seconds that FlashInfer may take to build its kernels")
    parser.add_argument("--output", type=Path, default=Path("sweep_mla.json"))
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shape = options.shape or SHAPES
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if options.lock:
        work(options)
        return 0

    facts: list[dict[str, Any]] = []
    began = time.monotonic()

    def run(config: str, passed: list[str], log: Path) -> None:
        last = [""]

        def hear(line: str) -> None:
            if line.startswith("@"):
                fact = json.loads(line[1:])
                last[0] = fact.get("begins", last[0])
                if "begins" not in fact:
                    facts.append({"config": config, **fact})

        with log.open("w") as stream:
            ended = watch([sys.executable, __file__, "--config", config, *passed], stream, options.limit, hear, options.silence)
        if ended.fault:
            facts.append({"config": config, "case": last[0], "fault": ended.fault})
            print(f"{config} {last[0]}: {ended.fault}\n" + "\n".join(ended.tail[-12:]), flush=True)

    def build(folder: Path) -> None:
        fault = "not on a CPU"
        if options.device != "cpu":
            command = [sys.executable, "-m", "penstock.bench", "mla_decode", "--device", options.device, "--warm"]
            with (folder / "build.log").open("w") as stream:
                ended = watch(command, stream, options.build, lambda line: None)
            fault = ended.fault
        if fault:
            facts.append({"config": "FlashInfer", "case": "build", "left_out": fault})
        (folder / "built.partial").write_text(fault)
        (folder / "built.partial").rename(folder / "built")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        passed = ["--device", options.device, "--impl", options.impl, "--lock", str(folder / "lock")]
        passed += ["--budget", str(options.budget), "--heads", *map(str, options.heads)]
        passed += [part for shape in options.shape for part in ("--shape", shape)]
        threads = [threading.Thread(target=build, args=(folder,))]
        for config in options.config or CONFIGS:
            threads.append(threading.Thread(target=run, args=(config, passed, folder / f"{config}.log")))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    options.output.write_text(json.dumps(facts, indent=1) + "\n")
    return report(facts, time.monotonic() - began)


def report(facts: list[dict[str, Any]], seconds: float) -> int:
    """Prints what there is to know, shortest first."""
    checked = [fact for fact in facts if "fault" in fact]
    faults = [fact for fact in checked if fact["fault"]]
    print(f"{len(checked)} checks, {len(faults)} faults, {seconds:.0f} s")
    for fact in faults:
        print(f"  {fact['config']:<8} {fact['case']}: {fact['fault']}")
    for line in sorted({f"  left out: {fact['left_out']}" for fact in facts if "left_out" in fact}):
        print(line)
    for fact in facts:
        if "copy" in fact:
            rates = ", ".join(f"{name} {rate * 1e-12:.0f} TFLOP/s" for name, rate in fact["matmul"].items())
            print(f"  copy {fact['copy'] * 1e-9:.0f} GB/s, {rates}")
    for fact in sorted((fact for fact in facts if "us" in fact), key=lambda fact: (fact["case"], fact["config"])):
        share = f"{fact['floor_us'] / fact['us']:6.0%} of the {fact['bound']} floor" if fact["floor_us"] else ""
        print(f"  {fact['case']:<14} {fact['config']:<8} {fact['name']:<11} {fact['us']:9.1f} µs {fact['ratio']:6.2f}x{share}")
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
