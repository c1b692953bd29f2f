"""Checks and times variants of attention_decode, each in a process of its own: a hang costs one of them.

    PYTHONPATH=. python benchmarks/sweep_decode.py --variant hopper --variant hopper:64,2,1 --variant hopper:64,3,0 \\
        --variant peers --check 4 --case 64x512 --case 64x4k --output $OUT/sweep_decode.json
    PYTHONPATH=. python benchmarks/sweep_decode.py --device cpu --variant triton:1,0,2 --case ragged_lse     # a dry run

A variant is an implementation, hopper or triton, and after a colon its numbers: of hopper block_n, stages and gather; then of
both programs a multiprocessor, lead and share of the plan (decode_plan.py). `peers` are FlashInfer's kernels. Each is timed in
alternation with the portable kernel as it is called by default and with a copy of as many bytes as the case must move; so
variants compare by their ratios to these. Every timed case is first compared with the portable kernel and with itself.
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from watched import watch

Facts = list[dict[str, Any]]


def say(**facts: object) -> None:
    """One line for the parent."""
    print("@" + json.dumps(facts), flush=True)


@contextmanager
def planned(programs: int, lead: int, share: int) -> Iterator[None]:
    """Inside, plans and kernels are made for these constants."""
    from penstock.ops.attention import _combine_triton, decode_plan, decode_plan_triton, decode_triton

    places = [(decode_plan, "PROGRAMS_PER_SM", programs)]
    for module in (decode_plan, decode_plan_triton, decode_triton, _combine_triton):
        places += [(module, "LEAD", lead), (module, "SHARE", share)]
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def parse(variant: str) -> tuple[str, list[int], list[int]]:
    """(implementation, its launch config, the plan's constants); empty where the defaults hold."""
    impl, _, words = variant.partition(":")
    numbers = [int(word) for word in words.split(",") if word]
    own = {"hopper": 3, "triton": 0, "peers": 0}[impl]
    if len(numbers) not in (0, own, own + 3):
        raise ValueError(f"{variant}: {impl} takes {own} numbers, and 3 of the plan, or none; got {len(numbers)}")
    return impl, numbers[:own], numbers[own:]


@contextmanager
def as_said(variant: str) -> Iterator[str]:
    """Inside, calls and plans are the variant's; gives its implementation."""
    impl, config, plan = parse(variant)
    with ExitStack() as stack:
        if plan:
            stack.enter_context(planned(*plan))
        if config:
            from penstock.ops.attention.decode_hopper import HopperConfig, configure

            stack.enter_context(configure.forced(HopperConfig(config[0], config[1], bool(config[2]))))
        yield impl


def work(options: argparse.Namespace) -> None:
    """Checks a share of the small cases with one variant, or compares and times it."""
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    variant = options.variant[0]
    with open(options.lock, "w") as lock:
        # Checks and compilers go on side by side, whoever times has the GPU alone; FlashInfer compiles too long to wait for.
        if variant != "peers":
            fcntl.flock(lock, fcntl.LOCK_SH)
        import torch

        device = torch.device(options.device)
        if options.share:
            return check_small(variant, *map(int, options.share.split("/")), device)
        right = [case for case in chosen(options) if compare(variant, case, device)]
        fcntl.flock(lock, fcntl.LOCK_UN)
        while not alone(lock):
            say(turn=0)
            time.sleep(0.2)
        for case in right:
            say(begins=case.name)
            time_case(variant, case, device, options.budget)


def alone(lock: TextIO) -> bool:
    """Takes the GPU, unless somebody else has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_small(variant: str, index: int, shares: int, device: Any) -> None:
    """Every so manieth of the small cases against the reference, by the budget of the tests."""
    from penstock.core.op import NotSupported
    from penstock.ops import attention_decode
    from penstock.testing import check_case

    small = [case for case in attention_decode.all_cases() if not case.bench]
    for case in small[index::shares]:
        say(begins=case.name)
        with as_said(variant) as impl:
            try:
                check_case(attention_decode, impl, case, device)
                say(case=case.name, fault="")
            except NotSupported as refusal:
                say(case=case.name, fault="", refused=str(refusal).splitlines()[1].strip())
            except AssertionError as error:
                say(case=case.name, fault=str(error)[:300])


def chosen(options: argparse.Namespace) -> list[Any]:
    """This process's share of the cases whose name contains one of the words."""
    from penstock.ops import attention_decode

    index, parts = map(int, options.part.split("/"))
    return [case for case in attention_decode.all_cases() if any(word in case.name for word in options.case)][index::parts]


def compare(variant: str, case: Any, device: Any) -> bool:
    """Whether the variant's results on a case agree with the portable kernel's and, bit by bit, with its own."""
    import torch

    from penstock.bench.correct import disagreement
    from penstock.bench.inputs import tensors_of
    from penstock.bench.peers import peers_of
    from penstock.bench.run import with_plan
    from penstock.core.cases import Make
    from penstock.core.op import NotSupported
    from penstock.ops import attention_decode

    say(begins=case.name)
    drawn = case.build(Make(device))
    want = attention_decode(**with_plan(attention_decode, drawn), impl="triton")
    if variant == "peers":
        for name, peer in peers_of(attention_decode).items():
            call = peer(drawn)
            fault = disagreement(call(), want) if callable(call) else ""
            say(
                case=case.name,
                fault=f"{name} {fault}" if fault else "",
                **({} if callable(call) else {"refused": f"{name} {call}"}),
            )
        return True
    if parse(variant)[1][:1] == [128] and case.name.endswith("fp8"):
        say(case=case.name, fault="", refused="FP8 values come in blocks of 64 keys")
        return False
    with as_said(variant) as impl:
        ready = with_plan(attention_decode, drawn)
        try:
            first, second = (attention_decode(**ready, impl=impl) for _ in range(2))
        except NotSupported as refusal:
            say(case=case.name, fault="", refused=str(refusal).splitlines()[1].strip())
            return False
    fault = disagreement(first, want)
    same = all(torch.equal(a, b) for a, b in zip(tensors_of(first), tensors_of(second), strict=True))
    fault = fault or ("" if same else "other bits the second time")
    say(case=case.name, fault=fault)
    return not fault


def time_case(variant: str, case: Any, device: Any, budget: float) -> None:
    """Times the variant, the portable kernel and a copy in alternation."""
    import torch

    from penstock.bench.inputs import rotation
    from penstock.bench.peers import peers_of
    from penstock.bench.run import with_plan
    from penstock.bench.timing import measure, ratio
    from penstock.core.cases import Make
    from penstock.ops import attention_decode

    drawn = case.build(Make(device))
    cost = attention_decode.cost_of(drawn)
    sets = rotation(drawn, None, cost.bytes, device)
    plain = [with_plan(attention_decode, arguments) for arguments in sets]
    calls: dict[str, list[Callable[[], Any]]] = {
        "triton": [functools.partial(attention_decode, **arguments, impl="triton") for arguments in plain]
    }
    if variant == "peers":
        for name, peer in peers_of(attention_decode).items():
            made = [peer(arguments) for arguments in sets]
            if callable(made[0]):
                calls[name] = made
    else:
        with as_said(variant) as impl:
            own = [with_plan(attention_decode, arguments) for arguments in sets]

        def call(arguments: dict[str, Any]) -> Any:
            with as_said(variant):
                return attention_decode(**arguments, impl=impl)

        calls[variant] = [functools.partial(call, arguments) for arguments in own]
    half = [torch.empty(cost.bytes // 2, dtype=torch.uint8, device=device) for _ in range(2)]
    if device.type != "cpu":
        # Distinct halves for each set, or the copy would find them in the cache.
        pairs = [[torch.empty_like(each) for each in half] for _ in sets]
        calls["copy"] = [functools.partial(torch.bitwise_not, source, out=target) for source, target in pairs]
    series = measure(calls, device, budget=budget * len(calls))
    for name, found in series.items():
        against = {other: ratio(series[other], found) for other in ("triton", "copy") if other in series and other != name}
        say(
            case=case.name, name=name, us=found.median_us, p10=found.p10_us, p90=found.p90_us, method=found.method, over=against
        )


def table(facts: Facts) -> Iterator[str]:
    """A line for each case: µs of portable kernel and copy, and of the others µs, share of the copy's speed and ratio."""
    timed = [fact for fact in facts if "us" in fact]
    for case in dict.fromkeys(fact["case"] for fact in timed):
        here = [fact for fact in timed if fact["case"] == case]
        shared = {name: [fact["us"] for fact in here if fact["name"] == name] for name in ("triton", "copy")}
        words = [f"{name} {min(us):.1f}-{max(us):.1f}" for name, us in shared.items() if us]
        for fact in here:
            if fact["name"] not in shared:
                share = f" {fact['over']['copy']:.0%}" if "copy" in fact["over"] else ""
                words.append(f"{fact['name']} {fact['us']:.1f}{share} {fact['over']['triton']:.2f}x")
        yield f"  {case}: " + ", ".join(words)


def main() -> int:
    """Starts the workers and prints a table; 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--variant", action="append", default=[])
    parser.add_argument("--case", action="append", default=[], help="cases whose name contains this")
    parser.add_argument("--few", action="append", default=[], help="the same for all variants but the first and the peers")
    parser.add_argument("--check", type=int, default=0, help="processes that run the small cases with the first variant")
    parser.add_argument("--budget", type=float, default=0.03, help="seconds of sampling for each contestant of a case")
    parser.add_argument("--limit", type=float, default=110.0, help="seconds a process may take")
    parser.add_argument("--silence", type=float, default=70.0, help="seconds without a word after which it is ended")
    parser.add_argument("--output", type=Path, default=Path("sweep_decode.json"))
    parser.add_argument(
        "--deal", type=int, default=1, help="processes that share the cases of the first variant, and of the peers"
    )
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--lock", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for variant in options.variant:
        parse(variant)
    if options.lock:
        work(options)
        return 0

    facts: Facts = []
    began = time.monotonic()

    def run(variant: str, extra: list[str], log: Path) -> None:
        last = [""]

        def hear(line: str) -> None:
            if line.startswith("@"):
                fact = json.loads(line[1:])
                last[0] = fact.get("begins", last[0])
                if "begins" not in fact and "turn" not in fact:
                    facts.append({"variant": variant, **fact})

        command = [sys.executable, str(Path(__file__)), "--device", options.device, "--variant", variant, *extra]
        with log.open("w") as stream:
            ended = watch(command, stream, options.limit, hear, options.silence)
        if ended.fault:
            facts.append({"variant": variant, "case": last[0], "fault": ended.fault})
            print(f"{variant} {last[0]}: {ended.fault}\n" + "\n".join(ended.tail[-8:]), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        common = ["--lock", str(Path(folder) / "lock"), "--budget", str(options.budget)]
        jobs = []
        for index, variant in enumerate(options.variant):
            wide = index == 0 or variant == "peers" or not options.few
            words = [part for word in (options.case if wide else options.few) for part in ("--case", word)]
            parts = options.deal if wide else 1
            jobs += [(variant, [*common, *words, "--part", f"{i}/{parts}"]) for i in range(parts)]
        jobs += [(options.variant[0], [*common, "--share", f"{i}/{options.check}"]) for i in range(options.check)]
        threads = [
            threading.Thread(target=run, args=(variant, extra, Path(folder) / f"{i}.log"))
            for i, (variant, extra) in enumerate(jobs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    options.output.write_text(json.dumps(facts, indent=1) + "\n")
    checked = [fact for fact in facts if "fault" in fact]
    faults = [fact for fact in checked if fact["fault"]]
    print(f"{len(checked)} checks, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    refused: dict[str, int] = {}
    for fact in checked:
        if fact["fault"]:
            print(f"  {fact['variant']} {fact['case']}: {fact['fault']}")
        elif "refused" in fact:
            refused[f"{fact['variant']}: {fact['refused']}"] = refused.get(f"{fact['variant']}: {fact['refused']}", 0) + 1
    for reason, count in refused.items():
        print(f"  left out {count} of {reason}")
    print("\n".join(table(facts)))
    return min(len(faults), 1)


if __name__ == "__main__":
    sys.exit(main())
