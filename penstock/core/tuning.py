"""Launch configs frozen in tables beside the kernels: looked up in a call, never searched for in one.

    def candidates(N: int) -> Iterator[Launch]: ...      # all that are worth timing

    @tuned(candidates)
    def configure(N: int) -> Launch: ...                 # the default, by arithmetic

    config = configure.on(x.device, N)                   # the table's config for this device and N, or the default

The default's arguments are the signature: calls that agree in them share a config. The table of rms_norm_triton.py is
rms_norm_tuned.json: {"NVIDIA H200": {"N=4096": {"rows": 1, "block": 4096, "num_warps": 8}}}. `penstock bench rms_norm --tune`
writes it: it forces each candidate in turn, checks it, times it. A table is read at the first look-up.
"""

import functools
import inspect
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

import torch

from penstock.core.device import properties

Config = TypeVar("Config")
Table = dict[str, dict[str, dict[str, Any]]]
_WATCHED: ContextVar["list[tuple[Tunable[Any], tuple[Any, ...]]] | None"] = ContextVar("watched", default=None)


class Tunable(Generic[Config]):
    """A default launch config by arithmetic, and better ones from a table.

    Args:
        default: from the signature to a frozen dataclass, which its annotations name.
        candidates: from the signature to the configs that the tuner times.
        table: the JSON file.
    """

    def __init__(self, default: Callable[..., Config], candidates: Callable[..., Iterable[Config]], table: Path):
        functools.update_wrapper(self, default)
        self.default = default
        self.candidates = candidates
        self.table = table
        self.names = tuple(inspect.signature(default).parameters)
        self._forced: Config | None = None
        self._known: dict[tuple[Any, ...], Config] = {}

    def __call__(self, *signature: Any) -> Config:
        return self.default(*signature)

    def __repr__(self) -> str:
        return f"<launch config of {self.table.name}: {', '.join(self.names)}>"

    @functools.cached_property
    def type(self) -> type[Config]:
        """The dataclass of a config."""
        found = get_type_hints(self.default).get("return")
        if not isinstance(found, type) or not is_dataclass(found):
            raise TypeError(f"{self.default.__qualname__} must be annotated to return a dataclass, got {found}")
        return found  # type: ignore[return-value]

    def on(self, device: torch.device, *signature: Any) -> Config:
        """The config for a call with this signature on this device."""
        watched = _WATCHED.get()
        if watched is not None:
            watched.append((self, signature))
        if self._forced is not None:
            return self._forced
        key = (device, *signature)
        config = self._known.get(key)
        if config is None:
            config = self._known[key] = self._look_up(device, signature)
        return config

    def key(self, signature: tuple[Any, ...]) -> str:
        """The signature as the table writes it: "N=4096"."""
        return " ".join(f"{name}={value}" for name, value in zip(self.names, signature, strict=True))

    @contextmanager
    def forced(self, config: Config) -> Iterator[None]:
        """Inside, every look-up answers with this config; for the tuner."""
        before, self._forced = self._forced, config
        try:
            yield
        finally:
            self._forced = before

    def forget(self) -> None:
        """Reads the table again at the next look-up."""
        self._known.clear()

    def _look_up(self, device: torch.device, signature: tuple[Any, ...]) -> Config:
        entry = read_table(self.table).get(properties(device).name, {}).get(self.key(signature))
        if entry is None:
            return self.default(*signature)
        wanted = {field.name for field in fields(self.type)}  # type: ignore[arg-type]
        if entry.keys() != wanted:
            raise ValueError(
                f"{self.table}: the entry {self.key(signature)} must have {', '.join(sorted(wanted))}, "
                f"got {', '.join(sorted(entry))}; write it again with --tune"
            )
        return self.type(**entry)


def tuned(
    candidates: Callable[..., Iterable[Config]], table: Path | None = None
) -> Callable[[Callable[..., Config]], Tunable[Config]]:
    """Makes a Tunable of the function that computes a default config.

    Args:
        candidates: the configs that the tuner times, from the same arguments.
        table: default: beside the file of the function, its `_triton` or `_hopper` replaced by `_tuned.json`.
    """

    def declare(default: Callable[..., Config]) -> Tunable[Config]:
        place = Path(inspect.getfile(default))
        beside = place.with_name(re.sub(r"_(triton|hopper)$", "", place.stem) + "_tuned.json")
        return Tunable(default, candidates, table or beside)

    return declare


@contextmanager
def watching() -> Iterator[list[tuple[Tunable[Any], tuple[Any, ...]]]]:
    """Inside, every look-up is appended to the list with its signature: what a call could be tuned in."""
    seen: list[tuple[Tunable[Any], tuple[Any, ...]]] = []
    token = _WATCHED.set(seen)
    try:
        yield seen
    finally:
        _WATCHED.reset(token)


def read_table(path: Path) -> Table:
    """The configs in a table; none when there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_table(path: Path, device: str, entries: Mapping[str, Any]) -> None:
    """Adds configs by signature to the table of a device; the file changes whole or not at all."""
    table = read_table(path)
    table[device] = dict(sorted({**table.get(device, {}), **{key: asdict(entry) for key, entry in entries.items()}}.items()))
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
        json.dump(table, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
