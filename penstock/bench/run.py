"""Benchmarks an operator: for every case the gate first, then all implementations and peers in alternation.

results = bench_operator(rms_norm, device=torch.device("cuda"))
"""

import functools
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from penstock.bench.correct import disagreement, verify
from penstock.bench.host import pick_us
from penstock.bench.inputs import rotation, tensors_of
from penstock.bench.peers import Peer, peers_of
from penstock.bench.record import Result, Timed
from penstock.bench.roofline import Ceilings, bound_by, floor_us, measure_ceilings
from penstock.bench.timing import Call, measure, ratio
from penstock.core.cases import Case, Make, nbytes
from penstock.core.check import describe
from penstock.core.op import NotSupported, Op
from penstock.testing.budget import Arguments, copy_arguments, results


def catalogue() -> dict[str, Op]:
    """Every public operator by name."""
    found = vars(importlib.import_module("penstock.ops")).values()
    return {value.name: value for value in found if isinstance(value, Op)}


def bench_operator(
    op: Op,
    cases: Sequence[Case] | None = None,
    *,
    device: torch.device,
    impls: Sequence[str] | None = None,
    peers: dict[str, Peer] | None = None,
    ceilings: Ceilings | None = None,
    budget: float = 1.0,
    host: bool = True,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Times an operator's cases.

    Args:
        cases: default: those marked `bench`.
        impls: names to time, "reference" among them if wanted; default: every implementation that takes the case.
        peers: default: all that penstock.bench.peers knows.
        ceilings: default: measured now.
        budget: seconds of sampling for each case.
        host: also time contract and choice.
        on_result: called with each result as it comes.
    """
    cases = [case for case in op.all_cases() if case.bench] if cases is None else cases
    peers = peers_of(op) if peers is None else peers
    ceilings = measure_ceilings(device) if ceilings is None else ceilings
    finished = []
    for case in cases:
        result = _bench_case(op, case, device, impls, peers, ceilings, budget, host)
        finished.append(result)
        if on_result:
            on_result(result)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return finished


def with_plan(op: Op, arguments: Arguments) -> Arguments:
    """attention_decode's arguments with a plan, which serves all layers of a step and so stays outside the timing."""
    known = catalogue()
    if op.name != "attention_decode" or arguments.get("plan") is not None or "attention_decode_plan" not in known:
        return arguments
    q, pages = arguments["q"], arguments["k_cache"]
    plan = known["attention_decode_plan"](
        arguments["seqlens_k"],
        num_heads_q=q.shape[1],
        num_heads_kv=pages.shape[2],
        head_dim=q.shape[2],
        page_size=pages.shape[1],
        q_len=arguments.get("q_len", 1),
        window=arguments.get("window", (-1, -1)),
    )
    return {**arguments, "plan": plan}


def _bench_case(
    op: Op,
    case: Case,
    device: torch.device,
    impls: Sequence[str] | None,
    peers: dict[str, Peer],
    ceilings: Ceilings,
    budget: float,
    host: bool,
) -> Result:
    begun = time.perf_counter()
    arguments = with_plan(op, case.build(Make(device)))
    without: dict[str, str] = {}
    ours = dict(_green(op, arguments, impls, without))
    cost = op.cost_of(arguments)
    floor = floor_us(cost, ceilings) if cost else None
    timed: list[Timed] = []
    sets: list[Arguments] = [arguments]
    host_us = None
    moved = cost.bytes if cost else nbytes(*tensors_of(arguments))
    if ours:
        first = next(iter(ours))
        with torch.no_grad():
            result = op(**arguments, impl=first)
            sets = rotation(arguments, result, moved, device)
            contestants = {name: [functools.partial(op, **chosen, impl=name) for chosen in sets] for name in ours}
            ours_results = results(op, copy_arguments(arguments), first)
            theirs = dict(_agreeing(peers, sets, list(ours_results.values()), without))
        del result, ours_results
        series = measure({**contestants, **theirs}, device, budget=budget)
        for name in contestants:
            ratios = {peer: ratio(series[peer], series[name]) for peer in theirs}
            timed.append(Timed.of(series[name], "implementation", floor, ratios))
        timed += [Timed.of(series[name], "peer", floor, {}) for name in theirs]
        if host:
            host_us = pick_us(op, arguments, first)
    else:
        without.update(dict.fromkeys(peers, "not timed: no implementation passed the gate"))
    return Result(
        operator=op.name,
        case=case.name,
        arguments={name: describe(value) for name, value in arguments.items()},
        bytes=cost.bytes if cost else None,
        flops=cost.flops if cost else None,
        floor_us=floor,
        bound=bound_by(cost, ceilings) if cost else None,
        sets=len(sets),
        rotated_bytes=moved * len(sets),
        timed=tuple(timed),
        without=without,
        host_us=host_us,
        seconds=time.perf_counter() - begun,
    )


def _green(op: Op, arguments: Arguments, impls: Sequence[str] | None, without: dict[str, str]) -> Iterator[tuple[str, None]]:
    """The implementations that take the case and agree with the reference; the reasons of the others go to `without`."""
    unknown = [name for name in impls or () if name not in (*op.implementations, "reference")]
    if unknown:
        raise ValueError(f"{op.name} has no implementation {unknown}; it has {', '.join(op.implementations)} and reference")
    for name in impls or op.implementations:
        try:
            fault = "" if name == "reference" else verify(op, name, arguments)
        except NotSupported as refusal:
            without[name] = str(refusal).splitlines()[1].strip().removeprefix(name).strip()
        except torch.OutOfMemoryError as error:
            without[name] = f"could not be verified: {_one_line(error)}"
        except Exception as error:
            # A broken kernel must not cost the numbers of the others; its error is this contestant's result.
            without[name] = f"failed: {_one_line(error)}"
            if not _alive(arguments):
                raise
        else:
            if fault:
                without[name] = f"red gate: {fault}"
            else:
                yield name, None


def _agreeing(
    peers: dict[str, Peer], sets: Sequence[Arguments], ours: Any, without: dict[str, str]
) -> Iterator[tuple[str, list[Call]]]:
    """The peers that can run and compute the same, with a call for each input set."""
    for name, prepare in peers.items():
        try:
            first = prepare(sets[0])
            if isinstance(first, str):
                without[name] = first
                continue
            fault = disagreement(first(), ours)
            if fault:
                without[name] = fault
                continue
            calls = [first]
            for chosen in sets[1:]:
                call = prepare(chosen)
                if isinstance(call, str):
                    raise ValueError(f"took the first input set and refused a copy of it: {call}")
                calls.append(call)
        except Exception as error:
            without[name] = f"failed: {_one_line(error)}"
            if not _alive(sets[0]):
                raise
            continue
        yield name, calls


def warm_peers(op: Op, device: torch.device) -> Iterator[str]:
    """Calls every peer of the operator that builds kernels of its own once on every benchmark case; says how long it took."""
    for case in op.all_cases():
        if not case.bench:
            continue
        for name, prepare in peers_of(op).items():
            if not name.startswith("FlashInfer"):
                continue
            begun = time.perf_counter()
            try:
                call = prepare(case.build(Make(device)))
                if not isinstance(call, str):
                    call()
                outcome = call if isinstance(call, str) else "built"
            except Exception as error:
                outcome = f"failed: {_one_line(error)}"
            yield f"{op.name} {case.name} {name}: {outcome}, {time.perf_counter() - begun:.1f} s"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:240]


def _alive(arguments: Arguments) -> bool:
    """Whether the device still works: after an illegal access every later call of the process fails."""
    try:
        for tensor in tensors_of(arguments)[:1]:
            (tensor.reshape(-1)[:1].double() + 1).cpu()
    except RuntimeError:
        return False
    return True
