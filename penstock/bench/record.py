"""What a benchmark leaves behind: results as data, where and on what they were made, and the JSON file that holds both."""

import datetime
import functools
import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from penstock.bench.roofline import Ceilings
from penstock.bench.timing import Series, protocol

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Timed:
    """One contestant's numbers on one case; µs per call.

    Args:
        kind: "implementation" or "peer".
        of_floor: the roofline floor over the median, 1 when the call is as fast as memory and tensor cores allow.
        ratios: for an implementation, the time of each peer over its own; above 1 it is faster than the peer.
    """

    name: str
    kind: str
    median_us: float
    p10_us: float
    p90_us: float
    samples_us: tuple[float, ...]
    method: str
    calls: int
    note: str
    of_floor: float | None
    ratios: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, series: Series, kind: str, floor: float | None, ratios: dict[str, float]) -> "Timed":
        """The numbers of a series of samples."""
        return cls(
            name=series.name,
            kind=kind,
            median_us=series.median_us,
            p10_us=series.p10_us,
            p90_us=series.p90_us,
            samples_us=series.samples_us,
            method=series.method,
            calls=series.calls,
            note=series.note,
            of_floor=floor and floor / series.median_us,
            ratios=ratios,
        )


@dataclass(frozen=True)
class Result:
    """One case of one operator.

    Args:
        arguments: what the call was given, in words.
        floor_us: max(bytes / copy bandwidth, operations / matmul rate); None when the operator declares no cost.
        bound: which of the two makes the floor.
        sets: input sets in rotation; rotated_bytes: what they hold or move together.
        timed: the contestants that passed the gate.
        without: for each contestant that has no number the reason.
        host_us: contract and choice of one eager call.
    """

    operator: str
    case: str
    arguments: dict[str, str]
    bytes: int | None
    flops: int | None
    floor_us: float | None
    bound: str | None
    sets: int
    rotated_bytes: int
    timed: tuple[Timed, ...]
    without: dict[str, str]
    host_us: float | None
    seconds: float


def slug(name: str) -> str:
    """A device's name as a folder: "NVIDIA H200" becomes nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_name(device: torch.device) -> str:
    """The product's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":", 1)[1].strip() for line in _cpu_facts() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def environment(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date; asked once for each process."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _answer("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version for name in ("triton", "transformers", "flashinfer-python") if (version := _version(name))},
    }
    if device.type == "cuda":
        facts["driver"] = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["clocks"] = _answer(
            "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"
        )
        properties = torch.cuda.get_device_properties(device)
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_bytes"] = properties.total_memory
        facts["l2_bytes"] = properties.L2_cache_size
        facts["cudnn"] = torch.backends.cudnn.version()
    else:
        facts["threads"] = torch.get_num_threads()
        facts["cores"] = os.cpu_count()
    return facts


def write(
    path: Path,
    device: torch.device,
    results: Sequence[Result],
    ceilings: Ceilings,
    command: str,
) -> Path:
    """Writes the results of one operator; the file appears whole or not at all."""
    document = {
        "schema": SCHEMA,
        "command": command,
        "environment": environment(device),
        "protocol": protocol(device),
        "ceilings": asdict(ceilings),
        "results": [asdict(result) for result in results],
    }
    return write_json(path, document)


def write_json(path: Path, document: Any) -> Path:
    """Writes a document as JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
        json.dump(document, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def default_folder(device: torch.device) -> Path:
    """benchmarks/results/<device> under the working directory."""
    return Path("benchmarks") / "results" / slug(device_name(device))


def _cpu_facts() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _answer(*command: str) -> str:
    """What a command prints, or why it could not be asked."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return (
        done.stdout.strip() if done.returncode == 0 else f"unknown ({done.stderr.strip().splitlines()[-1:] or done.returncode})"
    )
