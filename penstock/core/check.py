"""Shape and dtype contracts, stated as data and checked once per signature.

    SPEC = {"x": ("* N", FLOATS), "weight": ("N", ("x", torch.float32)), "out?": ("* N", "x"), "eps": positive}

A tensor's entry is (shape, dtypes) or (shape, dtypes, DENSE). In the shape a word is a symbol that must agree wherever it
appears, a number is itself, `B+1` and `2*C` are what they say, and a leading `*` stands for any batch dimensions. A dtype is
a torch dtype or the name of an earlier argument. DENSE asks for stride 1 in the last dimension. A `?` after the name lets the
argument be None. An option's entry is a function that returns None when the value is good and otherwise what it must be.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INDICES = (torch.int32,)
DENSE = "dense"

Spec = Mapping[str, Any]


class ContractError(ValueError):
    """A call whose arguments disagree with the operator's contract."""


def anything(value: object) -> None:
    """An option that any value satisfies."""
    return None


def positive(value: object) -> str | None:
    """A finite number above zero."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    return None if good else "a positive number"


def boolean(value: object) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "True or False"


def count(value: object) -> str | None:
    """An integer of at least zero."""
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return None if good else "an integer >= 0"


def optional(rule: Callable[[object], str | None]) -> Callable[[object], str | None]:
    """The rule, or None."""

    def check(value: object) -> str | None:
        wanted = None if value is None else rule(value)
        return wanted and f"None or {wanted}"

    return check


def one_of(*choices: object) -> Callable[[object], str | None]:
    """One of a few values."""
    wanted = " or ".join(repr(choice) for choice in choices)
    return lambda value: None if value in choices else wanted


def describe(value: object) -> str:
    """`bfloat16[2, 4096] on cuda:0` for a tensor, the value itself otherwise."""
    if not isinstance(value, Tensor):
        return repr(value)
    text = f"{short(value.dtype)}{list(value.shape)} on {value.device}"
    return text if value.is_contiguous() else f"{text}, strides {list(value.stride())}"


def short(dtype: torch.dtype) -> str:
    """The dtype's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


_DIMENSION = re.compile(r"(?:(?P<factor>\d+)\*)?(?P<symbol>[A-Za-z_]\w*)(?:\+(?P<plus>\d+))?|(?P<literal>\d+)")


@dataclass(frozen=True)
class _Dimension:
    text: str
    symbol: str | None
    factor: int
    plus: int

    @staticmethod
    def parse(text: str) -> "_Dimension":
        match = _DIMENSION.fullmatch(text)
        if match is None:
            raise ValueError(f"cannot read the dimension {text!r} of a contract")
        if match["literal"]:
            return _Dimension(text, None, 1, int(match["literal"]))
        return _Dimension(text, match["symbol"], int(match["factor"] or 1), int(match["plus"] or 0))

    def agrees(self, size: int, symbols: dict[str, int]) -> bool:
        if self.symbol is None:
            return size == self.plus
        if self.symbol in symbols:
            return size == self.factor * symbols[self.symbol] + self.plus
        value, rest = divmod(size - self.plus, self.factor)
        if rest or value < 0:
            return False
        symbols[self.symbol] = value
        return True

    def show(self, symbols: dict[str, int]) -> str:
        if self.symbol in symbols:
            return f"{self.text}={self.factor * symbols[self.symbol] + self.plus}"
        return self.text


@dataclass(frozen=True)
class _TensorRule:
    name: str
    optional: bool
    leading: bool
    dimensions: tuple[_Dimension, ...]
    dtypes: tuple[Any, ...]
    dense: bool

    @staticmethod
    def parse(key: str, shape: str, dtypes: Any, *flags: str) -> "_TensorRule":
        words = shape.split()
        leading = words[:1] == ["*"]
        dimensions = tuple(_Dimension.parse(word) for word in words[leading:])
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        return _TensorRule(key.rstrip("?"), key.endswith("?"), leading, dimensions, dtypes, DENSE in flags)

    def fault(self, value: object, named: dict[str, Any], symbols: dict[str, Any]) -> str | None:
        """What the value must be and what it is, or None when it is right; binds the symbols it meets first."""
        if value is None and self.optional:
            return None
        if not isinstance(value, Tensor):
            return f"must be a tensor, got {type(value).__name__}"
        allowed: list[torch.dtype] = []
        for dtype in self.dtypes:
            resolved = named[dtype].dtype if isinstance(dtype, str) else dtype
            if resolved not in allowed:
                allowed.append(resolved)
        if value.dtype not in allowed:
            return f"must be {' or '.join(short(dtype) for dtype in allowed)}, got {short(value.dtype)}"
        shape = tuple(value.shape)
        rank = len(self.dimensions)
        split = len(shape) - rank
        bound = dict(symbols)
        good = split >= 0 if self.leading else split == 0
        if good and self.leading:
            good = bound.setdefault("*", shape[:split]) == shape[:split]
        good = good and all(d.agrees(size, bound) for d, size in zip(self.dimensions, shape[split:], strict=True))
        if not good:
            lead = ["*"] if self.leading else []
            if self.leading and "*" in symbols:
                lead = [str(size) for size in symbols["*"]]
            wanted = ", ".join(lead + [dimension.show(symbols) for dimension in self.dimensions])
            return f"must be [{wanted}], got {list(shape)}"
        symbols.update(bound)
        device = symbols.setdefault("device", value.device)
        if value.device != device:
            return f"must be on {device} like the other tensors, got {value.device}"
        if self.dense and value.stride(-1) != 1 and value.shape[-1] > 1:
            return f"must have stride 1 in its last dimension, got strides {list(value.stride())}"
        return None


class Contract:
    """The parsed contract of one operator; `check` raises ContractError with every tensor of the call listed."""

    def __init__(self, operator: str, spec: Spec):
        self.operator = operator
        self.names = tuple(key.rstrip("?") for key in spec)
        self.rules: list[_TensorRule | Callable[[object], str | None]] = [
            _TensorRule.parse(key, *entry) if isinstance(entry, tuple) else entry for key, entry in spec.items()
        ]

    def check(self, arguments: Sequence[object]) -> dict[str, Any]:
        """Checks the arguments, given in the order of the spec; returns them by name."""
        named = dict(zip(self.names, arguments, strict=True))
        symbols: dict[str, Any] = {}
        for name, rule in zip(self.names, self.rules, strict=True):
            value = named[name]
            if isinstance(rule, _TensorRule):
                fault = rule.fault(value, named, symbols)
            else:
                wanted = rule(value)
                fault = wanted and f"must be {wanted}, got {value!r}"
            if fault:
                raise self.error(name, fault, named)
        return named

    def error(self, name: str, fault: str, named: Mapping[str, object]) -> ContractError:
        """ContractError that names the argument, the wanted and the got, and lists the call's tensors."""
        return ContractError(f"{self.operator}: `{name}` {fault}{list_tensors(named)}")


def list_tensors(named: Mapping[str, object]) -> str:
    """One indented line for each tensor of a call."""
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    width = max((len(name) for name in tensors), default=0)
    return "".join(f"\n  {name:<{width}}  {describe(value)}" for name, value in tensors.items())
