"""Times the candidate tiles of matrix products, all of them compiled beforehand by many processes.

    PYTHONPATH=. python benchmarks/sweep_tiles.py fused_moe:fp8_block_qwen3_30b_64 grouped_gemm:fp8_tensor_g8_m64
    PYTHONPATH=. python benchmarks/sweep_tiles.py gemm_bf16_fp32/triton_few:m1_n192_k4096       # another implementation
    PYTHONPATH=. python benchmarks/sweep_tiles.py --device meta fused_moe:fp8_block_qwen3_30b_64     # compiles, and ends

    PYTHONPATH=. python benchmarks/sweep_tiles.py --freeze sweep_tiles.json     # writes what was measured into the tables

What `penstock bench --tune` does for one case after another takes minutes here, because there are dozens of candidates and each
compiles for a second or two. The default is verified against the reference, the others against the default.
"""

import argparse
import importlib
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

LIMIT_ERROR = 0.01
MODULES = {
    "gemm_tuned": "penstock.ops.matmul.gemm_triton",
    "grouped_gemm_tuned": "penstock.ops.matmul.grouped_gemm_triton",
    "gemm_bf16_fp32_few_tuned": "penstock.ops.matmul.gemm_bf16_fp32_few_triton",
    "fused_moe_tuned": "penstock.ops.moe.fused_moe_triton",
}


def impl_of(target: str) -> str:
    """The implementation that "operator/implementation:case" names, triton by default."""
    return target.partition(":")[0].partition("/")[2] or "triton"


def found(target: str) -> list[tuple[Any, Any]]:
    """(operator, case) of "operator:name of a case" or its beginning; without a colon every benchmark case."""
    from penstock.bench.run import catalogue

    name, _, words = target.partition(":")
    name = name.partition("/")[0]
    op = catalogue()[name]
    known = [(op, case) for case in op.all_cases() if case.bench]
    exact = [(op, case) for op, case in known if case.name == words]
    return exact or [(op, case) for op, case in known if case.name.startswith(words)]


def looked_up(op: Any, case: Any, impl: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """The launch configs that a call looks up, found by compiling its kernels."""
    from penstock.core.cases import Make
    from penstock.core.tuning import watching

    with quiet_compile(), watching() as seen:
        op(**case.build(Make("meta")), impl=impl)
    return list(dict.fromkeys(seen))


def quiet_compile() -> Any:
    """compile_only without reading the machine code."""
    from penstock.testing import gate

    gate._inspect = lambda kernel: None  # type: ignore[assignment,return-value]
    return gate.compile_only()


def compile_one(job: tuple[str, str, int, int]) -> str:
    """Compiles one candidate of one call into Triton's cache; returns the compiler's complaint, if any."""
    from penstock.core.cases import Make

    target, case_name, place, index = job
    op, case = next((op, case) for op, case in found(target) if case.name == case_name)
    impl = impl_of(target)
    tunable, signature = looked_up(op, case, impl)[place]
    config = list(tunable.candidates(*signature))[index]
    try:
        with quiet_compile(), tunable.forced(config):
            op(**case.build(Make("meta")), impl=impl)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def freeze(record: Path) -> None:
    """Writes the best configs of a record into their tables, where they beat the default by more than the tuner's margin."""
    from penstock.bench.tune import MARGIN
    from penstock.core.tuning import write_table

    for entry in json.loads(record.read_text()):
        stem, _, key = entry["key"].partition(" ")
        tunable = importlib.import_module(MODULES[stem]).configure
        known = {field.name for field in fields(tunable.type)}
        default = tunable.default(*[int(word) if word.isdigit() else word for _, word in (w.split("=") for w in key.split())])
        configs = {name: values for name, values in entry["configs"].items() if known <= values.keys() and name in entry["us"]}
        times = {tunable.type(**{k: values[k] for k in known}): entry["us"][name] for name, values in configs.items()}
        best = min(times, key=lambda config: times[config])
        if default not in times or times[default] > MARGIN * times[best]:
            write_table(tunable.table, entry["device"], {key: best})
            print(f"{stem} {key}: {best}, {times[best]:.1f} µs; the default takes {times.get(default, float('nan')):.1f}")


def main() -> None:
    """Prints the best candidates of every case and writes all times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--freeze", type=Path, help="a record of an earlier run")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of sampling for each case and launch config")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", ".")) / "sweep_tiles.json")
    parser.add_argument("--best", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=600.0, help="no case begins after this")
    options = parser.parse_args()
    if options.freeze:
        freeze(options.freeze)
        return
    began = time.monotonic()
    calls = [(target, op, case) for target in options.targets for op, case in found(target)]
    places = {(target, case.name): looked_up(op, case, impl_of(target)) for target, op, case in calls}
    jobs = [
        (target, case.name, place, index)
        for target, op, case in calls
        for place, (tunable, signature) in enumerate(places[target, case.name])
        for index in range(len(list(tunable.candidates(*signature))))
    ]
    with ProcessPoolExecutor(options.workers) as pool:
        complaints = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    print(f"{len(jobs)} candidates of {len(calls)} cases compiled in {time.monotonic() - began:.0f} s", flush=True)
    for job, complaint in complaints.items():
        if complaint:
            print("  refused", job, complaint)
    if options.device == "meta":
        return
    import torch

    from penstock.bench.correct import disagreement, results, verify
    from penstock.bench.inputs import rotation
    from penstock.bench.peers import peers_of
    from penstock.bench.roofline import bound_by, floor_us, measure_ceilings
    from penstock.bench.timing import measure
    from penstock.bench.tune import _forced
    from penstock.core.cases import Make
    from penstock.core.device import properties

    device = torch.device(options.device)
    ceilings = measure_ceilings(device, quick=True, budget=0.2)
    print(f"copy {ceilings.copy / 1e9:.0f} GB/s, {ceilings.matmul}", flush=True)
    record: list[dict[str, Any]] = []
    for target, op, case in calls:
        if time.monotonic() - began > options.seconds:
            print(f"{op.name} {case.name}: no time left")
            continue
        torch.cuda.empty_cache()
        impl = impl_of(target)
        arguments = case.build(Make(device))
        cost = op.cost_of(arguments)
        floor = floor_us(cost, ceilings)
        try:
            fault = verify(op, impl, arguments)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        torch.cuda.empty_cache()
        print(
            f"{op.name} {case.name}: floor {floor:.1f} µs ({bound_by(cost, ceilings)}){', RED ' + fault[:300] if fault else ''}"
        )
        ours = results(op, arguments, impl)
        sets = rotation(arguments, list(ours.values()), cost.bytes, device)
        peers = {}
        for name, prepare in peers_of(op).items():
            try:
                made = [prepare(chosen) for chosen in sets]
                if any(isinstance(call, str) for call in made) or disagreement(made[0](), list(ours.values())):
                    continue
                peers[name] = made
            except Exception as error:
                print(f"  {name}: {type(error).__name__}: {str(error)[:160]}")
        for place, (tunable, signature) in enumerate(places[target, case.name]):
            contestants: dict[str, Any] = {}
            configs = {"default": tunable.default(*signature)}
            for index, config in enumerate(tunable.candidates(*signature)):
                if not complaints[target, case.name, place, index]:
                    configs[str(config)] = config
            for name, config in configs.items():
                try:
                    with tunable.forced(config), torch.no_grad():
                        got = results(op, arguments, impl)
                    worst = max(
                        float((got[key].float() - ours[key].float()).norm() / ours[key].float().norm().clamp_min(1e-9))
                        for key in ours
                    )
                    if not worst <= LIMIT_ERROR:
                        print(f"  WRONG by {worst:.3g}: {config}")
                        continue
                except Exception as error:
                    print(f"  failed {config}: {type(error).__name__}: {str(error)[:160]}")
                    continue
                contestants[name] = [_forced(op, impl, tunable, config, chosen) for chosen in sets]
            series = measure({**contestants, **peers}, device, budget=options.budget)
            times = {name: one.median_us for name, one in series.items()}
            key = f"{tunable.table.stem} {tunable.key(signature)}"
            record.append(
                {
                    "operator": op.name,
                    "case": case.name,
                    "key": key,
                    "device": properties(device).name,
                    "floor_us": floor,
                    "fault": fault,
                    "us": times,
                    "configs": {name: asdict(config) for name, config in configs.items()},
                }
            )
            options.output.write_text(json.dumps(record, indent=1))
            best = sorted(contestants, key=lambda name: times[name])[: options.best]
            print(f"  {key}: default {times['default']:.1f} ({floor / times['default']:.0%} of floor)", end="")
            print("".join(f"; {name} {times[name]:.1f}" for name in peers), flush=True)
            for name in best:
                values = ",".join(str(int(value)) for value in asdict(configs[name]).values())
                print(f"    {times[name]:.1f} {floor / times[name]:.0%} {values}")


if __name__ == "__main__":
    main()
