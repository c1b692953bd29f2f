"""Checks and times launch configs of the Hopper kernel of prefill, each in a process of its own: a hang costs one of them.

    PYTHONPATH=. python benchmarks/sweep_prefill.py --case 2x8k_32_8_d128 --config 2,128,2,1 --config 3,64,4,0 --check 6

A config is consumers,block_n,stages,pingpong and, if it differs, the MB of keys in a section, then the names of what is on
beside these (codes, chains); "default" is what a call takes. Behind an @ stands what the names of its cases hold:
2,128,3,1,codes@fp8. All are compiled and checked side by side, then timed one after another, each in alternation with the
peers. Cases with a block mask run in alternation with triton.
"""

import argparse
import fcntl
import functools
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

from watched import watch

OPERATORS = ("attention_prefill", "attention_prefill_paged")


def say(**facts: object) -> None:
    """One line for the parent."""
    print("@" + json.dumps(facts), flush=True)


def work(options: argparse.Namespace) -> None:
    """Checks one config, or a share of the small cases, and times what was asked for."""
    from contextlib import AbstractContextManager, nullcontext

    import torch

    import penstock.ops
    from penstock.bench.correct import verify
    from penstock.bench.inputs import rotation
    from penstock.bench.peers import peers_of
    from penstock.bench.timing import measure, ratio
    from penstock.core.cases import Case, Make
    from penstock.core.op import NotSupported, Op
    from penstock.ops.attention import prefill_hopper
    from penstock.testing import check_case

    config, _, word = options.config[0].partition("@")
    forced: AbstractContextManager[None] = nullcontext()
    if config != "default":
        numbers = [int(part) for part in config.split(",") if part.isdigit()]
        switches = {part: True for part in config.split(",") if not part.isdigit()}
        consumers, block_n, stages, pingpong = numbers[:4]
        chosen = prefill_hopper.HopperConfig(consumers, block_n, stages, bool(pingpong), **switches)
        forced = prefill_hopper.configure.forced(chosen)
        prefill_hopper.SECTION_BYTES = numbers[4] << 20 if len(numbers) > 4 else prefill_hopper.SECTION_BYTES
    device = torch.device("cuda:0")

    def small(contains: str) -> list[tuple[Op, Case, str]]:
        operators = [getattr(penstock.ops, name) for name in OPERATORS]
        cases = [(op, case) for op in operators for case in op.all_cases() if not case.bench and contains in case.name]
        return [(op, case, impl) for op, case in cases for impl in op.implementations if impl.startswith("hopper")]

    def check(op: Op, case: Case, impl: str) -> None:
        name = f"{op.name} {case.name} {impl}"
        say(begins=name)
        try:
            check_case(op, impl, case, device)
            torch.cuda.synchronize()
            say(case=name, fault="")
        except NotSupported as refusal:
            say(case=name, fault="", refused=str(refusal).splitlines()[1].strip())
        except AssertionError as error:
            say(case=name, fault=str(error)[:300])

    with forced, open(options.lock, "w") as lock:
        # Checks go on side by side; whoever times has the GPU alone.
        fcntl.flock(lock, fcntl.LOCK_SH)
        if options.share:
            index, shares = map(int, options.share.split("/"))
            for each in small("")[index::shares]:
                check(*each)
            return
        for each in small(options.small) if options.small and config != "default" else []:
            check(*each)
        wanted = []
        for name in OPERATORS:
            op = getattr(penstock.ops, name)
            for case in op.all_cases():
                if case.name in options.case and word in case.name:
                    say(begins=f"{op.name} {case.name}")
                    drawn = case.build(Make(device))
                    op(**drawn, impl="hopper")
                    torch.cuda.synchronize()
                    fault = verify(op, "hopper", drawn)
                    say(case=f"{op.name} {case.name}", fault=fault)
                    if not fault:
                        wanted.append((op, case))
        fcntl.flock(lock, fcntl.LOCK_EX)
        say(turn=1)
        for op, case in wanted:
            say(begins=f"{op.name} {case.name}")
            drawn = case.build(Make(device))
            sets = rotation(drawn, None, None, device)
            ours = ["hopper", "triton"] if "block_mask" in drawn else ["hopper"]
            calls = {name: [functools.partial(op, **arguments, impl=name) for arguments in sets] for name in ours}
            for name, peer in peers_of(op).items():
                made = [peer(arguments) for arguments in sets] if name in options.peer else []
                if made and callable(made[0]):
                    calls[name] = made
            series = measure(calls, device, budget=options.budget * len(calls))
            cost = op.cost_of(drawn)
            for name, found in series.items():
                rate = cost.flops / found.median_us * 1e-6
                say(
                    case=f"{op.name} {case.name}",
                    name=name,
                    us=found.median_us,
                    tflops=rate,
                    ratio=ratio(found, series["hopper"]),
                )


def main() -> int:
    """Starts the workers and prints a table; the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", default=[], help="a benchmark case of prefill, dense or paged")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--peer", action="append", default=[], help='such as "SDPA cuDNN"')
    parser.add_argument("--check", type=int, default=0, help="processes that run the small cases with the default config")
    parser.add_argument("--small", default="", help="small cases with this in their names are checked with each config")
    parser.add_argument("--budget", type=float, default=0.15, help="seconds of sampling for each contestant of a case")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds a process may take")
    parser.add_argument("--silence", type=float, default=60.0, help="seconds without a word after which it is ended")
    parser.add_argument("--output", type=Path, default=Path("sweep_prefill.json"))
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.lock:
        work(options)
        return 0

    facts: list[dict[str, object]] = []
    began = time.monotonic()

    def run(config: str, extra: list[str], log: Path) -> None:
        last = [""]

        def hear(line: str) -> None:
            if line.startswith("@"):
                fact = json.loads(line[1:])
                last[0] = fact.get("begins", last[0])
                if "begins" not in fact and "turn" not in fact:
                    facts.append({"config": config, **fact})

        command = [sys.executable, str(Path(__file__)), "--config", config, *extra]
        with log.open("w") as stream:
            ended = watch(command, stream, options.limit, hear, options.silence)
        if ended.fault:
            facts.append({"config": config, "case": last[0], "fault": ended.fault})
            print(f"{config} {last[0]}: {ended.fault}\n" + "\n".join(ended.tail[-12:]), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        lock = ["--lock", str(Path(folder) / "lock"), "--budget", str(options.budget), "--small", options.small]
        chosen = [part for name in options.case for part in ("--case", name)]
        chosen += [part for name in options.peer for part in ("--peer", name)]
        jobs = [(config, [*lock, *chosen]) for config in options.config]
        jobs += [("default", [*lock, "--share", f"{i}/{options.check}"]) for i in range(options.check)]
        threads = [
            threading.Thread(target=run, args=(config, extra, Path(folder) / f"{i}.log"))
            for i, (config, extra) in enumerate(jobs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    options.output.write_text(json.dumps(facts, indent=1) + "\n")
    faults = [fact for fact in facts if fact.get("fault")]
    checked = [fact for fact in facts if "fault" in fact]
    print(f"{len(checked)} checks, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    for fact in checked:
        if fact["fault"] or "refused" in fact:
            print(f"  {fact['config']:<26} {fact['case']}: {fact['fault'] or fact['refused']}")
    for fact in sorted((fact for fact in facts if "us" in fact), key=lambda fact: str(fact["case"])):
        print(
            f"  {fact['case']:<52} {fact['config']:<26} {fact['name']:<13} {fact['us']:9.1f} µs {fact['tflops']:6.0f} TFLOP/s "
            f" {fact['ratio']:.3f}x"
        )
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
