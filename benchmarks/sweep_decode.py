"""Times attention_decode over what a table of launch configs cannot hold: programs a multiprocessor, a request's lead, a share.

    PYTHONPATH=. python benchmarks/sweep_decode.py --case 64x512_8_1 --case 1x16k_15x64
    PYTHONPATH=. python benchmarks/sweep_decode.py --device cpu --case ragged_lse --programs 1 2 --leads 0 2     # a dry run

Every variant makes its own plan outside the timing, is checked against the reference, and is timed in alternation with the
others. The winner becomes PROGRAMS_PER_SM, LEAD and SHARE of penstock/ops/attention/decode_plan.py.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def planned(programs: int, lead: int, share: int) -> Iterator[None]:
    """Inside, plans and kernels are made for these constants."""
    from penstock.ops.attention import decode_plan, decode_plan_triton, decode_triton

    places = [(decode_plan, "PROGRAMS_PER_SM", programs)]
    for module in (decode_plan, decode_plan_triton, decode_triton):
        places += [(module, "LEAD", lead), (module, "SHARE", share)]
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def main() -> None:
    """Prints µs of every variant for every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--case", action="append", required=True, help="cases whose name contains this")
    parser.add_argument("--programs", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--leads", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--share", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.6, help="seconds of sampling for each case and config")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")

    import torch

    from penstock.bench.correct import expect_parts, verify
    from penstock.bench.inputs import rotation
    from penstock.bench.run import with_plan
    from penstock.bench.timing import measure
    from penstock.core.cases import Make
    from penstock.ops import attention_decode
    from penstock.ops.attention.decode_triton import DecodeConfig, configure
    from penstock.testing.budget import Arguments

    device = torch.device(options.device)
    # Room for two programs, and for four.
    configs = [DecodeConfig(64, 4, 4), DecodeConfig(64, 4, 3), DecodeConfig(32, 4, 6), DecodeConfig(32, 4, 4)]

    def call_of(arguments: Arguments, config: DecodeConfig, programs: int, lead: int) -> Callable[[], Any]:
        def call() -> Any:
            with planned(programs, lead, options.share), configure.forced(config):
                return attention_decode(**arguments, impl="triton")

        return call

    for case in attention_decode.all_cases():
        if not any(word in case.name for word in options.case):
            continue
        drawn = case.build(Make(device))
        expected = list(expect_parts(attention_decode, drawn))
        sets = rotation(drawn, None, None, device)
        calls: dict[str, list[Callable[[], Any]]] = {}
        for config in configs:
            for programs in options.programs:
                for lead in options.leads:
                    name = f"programs {programs} lead {lead} {config}"
                    with planned(programs, lead, options.share):
                        ready = [with_plan(attention_decode, arguments) for arguments in sets]
                        with configure.forced(config):
                            fault = verify(attention_decode, "triton", ready[0], expected)
                    if fault:
                        print(f"{case.name} {name}: {fault}", flush=True)
                    else:
                        calls[name] = [call_of(arguments, config, programs, lead) for arguments in ready]
        series = measure(calls, device, budget=options.budget * len(configs))
        for name, found in sorted(series.items(), key=lambda pair: pair[1].median_us):
            print(f"{case.name} {found.median_us:8.1f} µs  {name}", flush=True)


if __name__ == "__main__":
    main()
