"""Runs the source of Gluon kernels for Hopper on CPU threads: what they compute and how they wait, not layouts nor speed.

The functions are ordinary Python, so they are executed against stand-ins: a thread for each partition, mbarriers with phases
and byte counts, named barriers with thread counts, copies that spoil their destination at once and land later, asynchronous
products that must find the same operands when they start and when they are waited for. Deadlocks, phase slips, early releases,
wrong masks and reads outside a tensor show; shared memory is arranged as swizzled operands are, 64 columns after 64 columns.
"""

import ast
import inspect
import itertools
import math
import random
import re
import threading
import time
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

TIMEOUT = 20.0
HERE = threading.local()


class Scalar(int):
    """An integer of a kernel; division truncates as on the GPU."""

    def to(self, _dtype):
        return self

    def __floordiv__(self, other):
        return Scalar(math.trunc(int(self) / int(other)) if (self < 0) != (other < 0) else int(self) // int(other))

    def __mod__(self, other):
        return Scalar(int(self) - int(self // other) * int(other))


def _lift(name):
    plain = getattr(int, name)

    def method(self, other):
        if not isinstance(other, int):
            return NotImplemented
        return Scalar(plain(self, other))

    return method


for _name in ("add", "sub", "mul", "and", "or", "xor", "radd", "rsub", "rmul"):
    setattr(Scalar, f"__{_name}__", _lift(f"__{_name}__"))


def bare(value):
    return value.data if isinstance(value, Block) else value


class Block:
    """A tensor of a kernel; with `memory` its values are addresses."""

    type = SimpleNamespace(layout="layout")

    def __init__(self, data, memory=None):
        self.data, self.memory = data, memory

    def __getitem__(self, key):
        return Block(self.data[key], self.memory)

    def to(self, dtype, bitcast=False):
        return Block(self.data.view(dtype) if bitcast else self.data.to(dtype), self.memory)

    def __rshift__(self, bits):
        return Block(self.data >> bits)

    def __floordiv__(self, other):
        return Block(torch.div(self.data, bare(other), rounding_mode="trunc"))

    def __mod__(self, other):
        return Block(torch.fmod(self.data, bare(other)))


def _elementwise(name):
    def method(self, other):
        if isinstance(other, Pointer):
            return Block(self.data + other.offset, other.memory)
        return Block(getattr(torch.Tensor, name)(self.data, bare(other)), self.memory)

    return method


for _name in ("add", "sub", "mul", "truediv", "le", "lt", "ge", "gt", "eq", "and", "radd", "rsub", "rmul", "rtruediv"):
    setattr(Block, f"__{_name}__", _elementwise(f"__{_name}__"))
Block.__hash__ = None  # type: ignore[assignment]


class Pointer:
    def __init__(self, memory, offset=0):
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other):
        return Block(other.data + self.offset, self.memory) if isinstance(other, Block) else self.moved(other)

    def moved(self, steps):
        return Pointer(self.memory, self.offset + int(steps))


def _cells(pointer, mask, shape=None):
    """(the memory as a line, addresses, which of them count)."""
    line = pointer.memory
    at = pointer.data if isinstance(pointer, Block) else torch.tensor(pointer.offset)
    if shape is not None:
        at = torch.broadcast_to(at, shape)
    keep = torch.broadcast_to(torch.as_tensor(bare(mask)), at.shape)
    used = at[keep]
    assert used.numel() == 0 or (int(used.min()) >= 0 and int(used.max()) < line.numel()), "address outside the tensor"
    return line, at, keep


def load(pointer, mask=True, other=0, cache_modifier=""):
    line, at, keep = _cells(pointer, mask)
    found = torch.full(at.shape, other, dtype=line.dtype)
    found[keep] = line[at[keep]]
    return Block(found) if at.dim() else Scalar(int(found)) if line.dtype is torch.int32 else Block(found)


def store(pointer, value, mask=True):
    value = torch.as_tensor(bare(value))
    shape = torch.broadcast_shapes(value.shape, pointer.data.shape if isinstance(pointer, Block) else ())
    line, at, keep = _cells(pointer, mask, shape)
    line[at[keep]] = torch.broadcast_to(value, shape)[keep].to(line.dtype)


def atomic_add(pointer, value, sem, scope):
    line, at, _ = _cells(pointer, True)
    before = Scalar(int(line[at]))
    line[at] += value
    return before


class Shared:
    """Shared memory: pieces 128 bytes wide one after the other."""

    def __init__(self, flat, shape, turned=False):
        self.flat, self.shape, self.turned, self.dtype = flat, list(shape), turned, flat.dtype

    def index(self, index):
        size = self.flat.numel() // self.shape[0]
        assert 0 <= index < self.shape[0], f"index {index} of {self.shape}"
        return Shared(self.flat[index * size : (index + 1) * size], self.shape[1:])

    def permute(self, order):
        if len(self.shape) > 2:
            return Plain(self.flat.view(self.shape).permute(order))
        assert order == (1, 0)
        return Shared(self.flat, self.shape, not self.turned)

    def matrix(self):
        width = self.shape[-1]
        piece = min(width, 128 // self.dtype.itemsize)
        logical = self.flat.view(width // piece, -1, piece).transpose(0, 1).reshape(-1, width)
        return logical.T if self.turned else logical

    def store(self, value):
        if len(self.shape) == 1:
            self.flat.copy_(value.data)
        else:
            rows, width = self.shape
            piece = min(width, 128 // self.dtype.itemsize)
            pieces = value.data.reshape(rows, width // piece, piece).transpose(0, 1)
            self.flat.view(width // piece, rows, piece).copy_(pieces)

    def load(self, layout):
        if len(self.shape) == 1:
            return Block(self.flat.clone() if self.dtype.is_floating_point else self.flat.clone().long())
        return Block(self.matrix().clone())


class Plain:
    """Shared memory that is not swizzled, seen in several dimensions."""

    def __init__(self, data):
        self.data = data

    def load(self, layout):
        return Block(self.data.clone())


def reinterpret(buffer, dtype, shape, layout):
    assert math.prod(shape) <= buffer.flat.numel() and dtype.itemsize == buffer.dtype.itemsize
    return Shared(buffer.flat.view(dtype)[: math.prod(shape)], shape)


class Barrier:
    def __init__(self):
        self.phase, self.bytes, self.pending, self.count = 0, 0, 0, 0

    def settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count
            HERE.program.changed.notify_all()


class Barriers:
    def __init__(self, count):
        self.all = [Barrier() for _ in range(count)]

    def index(self, index):
        return self.all[int(index)]


class Broken(Exception):
    """Another partition failed."""


def _until(condition, what):
    program = HERE.program
    end = time.monotonic() + TIMEOUT
    while not condition():
        if program.fault:
            raise Broken
        if not program.changed.wait(0.5) and time.monotonic() > end:
            raise RuntimeError(f"{HERE.name} waits for ever for {what}")


class mbarrier:
    MBarrierLayout = staticmethod(lambda: "barriers")

    @staticmethod
    def init(barrier, count):
        barrier.count = barrier.pending = count

    @staticmethod
    def expect(barrier, size):
        with HERE.program.changed:
            assert barrier.pending > 0, "an arrival too many"
            barrier.bytes, barrier.pending = barrier.bytes + size, barrier.pending - 1
            barrier.settle()

    @staticmethod
    def arrive(barrier, count):
        with HERE.program.changed:
            assert barrier.pending >= count, "an arrival too many"
            barrier.pending -= count
            barrier.settle()

    @staticmethod
    def wait(barrier, phase, pred=True):
        if pred:
            with HERE.program.changed:
                _until(lambda: barrier.phase != phase & 1, f"a barrier in phase {phase & 1}")


def _named_barrier(text, number):
    kind, total = re.match(r"bar\.(sync|arrive) \$1, (\d+);", text).groups()
    program = HERE.program
    with program.changed:
        state = program.named.setdefault(int(number), [0, 0])
        state[0] += HERE.threads
        assert state[0] <= int(total), f"named barrier {number}: {state[0]} threads of {total}"
        generation = state[1]
        if state[0] == int(total):
            state[:] = 0, generation + 1
            program.changed.notify_all()
        elif kind == "sync":
            _until(lambda: state[1] != generation, f"named barrier {number}")
    return Scalar(0)


def inline_asm(text, constraints, arguments, dtype, is_pure, pack):
    if text.startswith("bar."):
        return _named_barrier(text, arguments[0])
    if text.startswith("mov.b32 $0, {$1, $2}"):
        low, high = (each.data.to(torch.int32) for each in arguments)
        return Block((low & 0xFFFF) | (high << 16))
    if len(arguments) == 2:
        assert text.startswith("cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1")
        codes = torch.stack([each.data.to(torch.float8_e4m3fn) for each in arguments], -1)
        return Block(codes.view(torch.int16).squeeze(-1))
    assert "cvt.rn." in text or text == "mov.b32 $0, $1;"
    return Block(arguments[0].data.to(dtype))


def line_of(tensor):
    """All of a tensor's memory."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


class Descriptor:
    """A tensor map; what lies outside it reads as zero and is not written."""

    def __init__(self, made):
        self.memory, self.begin = line_of(made.base), made.base.storage_offset()
        self.shape, self.strides, self.box = made.shape, made.strides, made.block_shape
        self.dtype = self.memory.dtype

    def cells(self, at):
        assert len(at) == len(self.shape)
        lines = [torch.arange(size) + int(start) for start, size in zip(at, self.box, strict=True)]
        keep, where = torch.tensor(True), torch.tensor(self.begin)
        for dim, (line, size, stride) in enumerate(zip(lines, self.shape, self.strides, strict=True)):
            line = line.view([-1 if each == dim else 1 for each in range(len(at))])
            keep, where = keep & (line >= 0) & (line < size), where + line * stride
        used = where[keep]
        assert used.numel() == 0 or (int(used.min()) >= 0 and int(used.max()) < self.memory.numel()), "copy outside the tensor"
        return where.reshape(-1), keep.reshape(-1)


def tma_load(descriptor, at, barrier, target):
    assert target.shape == descriptor.box, f"a copy of {descriptor.box} into {target.shape}"
    where, keep = descriptor.cells(at)
    target.flat.fill_(float("nan"))
    program = HERE.program

    def land():
        HERE.program = program
        time.sleep(random.random() * 0.001)
        found = torch.zeros(where.shape, dtype=target.dtype)
        found[keep] = descriptor.memory[where[keep]]
        target.flat.copy_(found)
        with program.changed:
            barrier.bytes -= found.nbytes
            barrier.settle()

    program.copies.append(threading.Thread(target=land))
    program.copies[-1].start()


def tma_store(descriptor, at, source):
    HERE.stores.append((descriptor, at, source, source.flat.clone()))


def tma_store_wait(pending):
    assert pending == 0
    for descriptor, at, source, issued in HERE.stores:
        assert torch.equal(issued.nan_to_num(), source.flat.nan_to_num()), "results changed while they were being stored"
        where, keep = descriptor.cells(at)
        descriptor.memory[where[keep]] = issued[keep]
    HERE.stores.clear()


class Product:
    """An asynchronous product."""

    def __init__(self, a, b, acc, use_acc):
        self.operands, self.result = (a, b, acc, use_acc), None
        self.at_start = self.compute()

    def compute(self):
        a, b, acc, use_acc = self.operands
        left = a.data if isinstance(a, Block) else a.matrix()
        product = left.float() @ b.matrix().float()
        return product + (acc.compute() if isinstance(acc, Product) else acc.data) if use_acc else product

    def finish(self):
        found = self.compute()
        assert torch.equal(found.nan_to_num(1e30), self.at_start.nan_to_num(1e30)), "an operand changed during a product"
        self.result = Block(found)


def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
    assert is_async
    HERE.products.append(Product(a, b, acc, use_acc))
    return HERE.products[-1]


def warpgroup_mma_wait(num_outstanding, deps):
    if random.random() < 0.3:
        time.sleep(random.random() * 0.0005)
    while len(HERE.products) > num_outstanding:
        HERE.products.pop(0).finish()
    found = tuple(each.result if isinstance(each, Product) else each for each in deps)
    assert all(each is not None for each in found), "a result was used before it was waited for"
    return found[0] if len(found) == 1 else found


class Program:
    def __init__(self):
        self.changed = threading.Condition()
        self.named: dict[int, list[int]] = {}
        self.copies: list[threading.Thread] = []
        self.fault: Any = None


def warp_specialize(parts, warps, registers):
    program, number, count = HERE.program, HERE.number, HERE.count

    def run(function, arguments, width, name):
        HERE.program, HERE.number, HERE.count, HERE.name, HERE.threads = program, number, count, name, width * 32
        HERE.products, HERE.stores = [], []
        try:
            function(*arguments)
            assert not HERE.products and not HERE.stores, "work was left in flight"
        except Broken:
            pass
        except BaseException as error:
            program.fault = program.fault or error
            with program.changed:
                program.changed.notify_all()

    threads = [
        threading.Thread(target=run, args=(function, arguments, [4, *warps][index], f"{function.__name__} {index}"))
        for index, (function, arguments) in enumerate(parts)
    ]
    for thread in threads:
        thread.start()
    for thread in [*threads, *program.copies]:
        thread.join()


def _either(condition, a, b):
    if isinstance(condition, Block):
        return Block(torch.where(condition.data, torch.as_tensor(bare(a)), torch.as_tensor(bare(b))))
    return Scalar(a if condition else b)


def _extreme(torch_one, python_one):
    def pick(a, b):
        if isinstance(a, Block) or isinstance(b, Block):
            return Block(torch_one(torch.as_tensor(bare(a)), torch.as_tensor(bare(b))))
        return Scalar(python_one(a, b))

    return pick


def _reduced(found):
    return Scalar(int(found)) if found.dim() == 0 else Block(found)


def _allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(shape[0])
    size = math.prod(shape)
    return Shared(torch.zeros(size, dtype=dtype) if dtype is torch.int32 else torch.full((size,), math.nan, dtype=dtype), shape)


gl = SimpleNamespace(
    **{name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int8", "int16", "int32", "int64")},
    float8e4nv=torch.float8_e4m3fn,
    constexpr=lambda value: value,
    to_tensor=Scalar,
    where=_either,
    static_range=lambda *ends: map(Scalar, range(*ends)),
    minimum=_extreme(torch.minimum, min),
    maximum=_extreme(torch.maximum, max),
    program_id=lambda axis: Scalar(HERE.number[axis]),
    num_programs=lambda axis: Scalar(HERE.count[axis]),
    arange=lambda begin, end, layout=None: Block(torch.arange(begin, end)),
    zeros=lambda shape, dtype, layout=None: Block(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, value, dtype, layout=None: Block(torch.full(shape, value, dtype=dtype)),
    expand_dims=lambda block, axis: Block(block.data.unsqueeze(axis), block.memory),
    permute=lambda block, order: Block(block.data.permute(order)),
    reshape=lambda block, shape: Block(block.data.reshape(shape), block.memory),
    split=lambda block: tuple(map(Block, block.data.unbind(-1))),
    join=lambda a, b: Block(torch.stack([a.data, b.data], -1)),
    convert_layout=lambda block, layout, assert_trivial=False: block,
    exp2=lambda block: Block(torch.exp2(block.data)),
    log2=lambda block: Block(torch.log2(block.data)),
    max=lambda block, axis: _reduced(block.data.amax(axis)),
    sum=lambda block, axis: _reduced(block.data.sum(axis)),
    associative_scan=lambda block, axis, combine: Block(block.data.cumsum(axis)),
    cast=lambda value, dtype: value,
    load=load,
    store=store,
    atomic_add=atomic_add,
    allocate_shared_memory=_allocate,
    warp_specialize=warp_specialize,
    inline_asm_elementwise=inline_asm,
    **{name: lambda *given, **named: "layout" for name in ("NVMMASharedLayout", "SwizzledSharedLayout", "BlockedLayout")},
    **{name: lambda *given, **named: "layout" for name in ("SliceLayout", "DotOperandLayout")},
)
STAND_INS = {
    "gl": gl,
    "mbarrier": mbarrier,
    "reinterpret": reinterpret,
    "tma_load": tma_load,
    "tma_store": tma_store,
    "tma_store_wait": tma_store_wait,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "fence_async_shared": lambda: None,
    "thread_barrier": lambda: None,
    "range": lambda *ends: map(Scalar, range(*ends)),
}


def functions_of(module: ModuleType, **others: Any) -> SimpleNamespace:
    """A module's kernels and device functions as plain functions on the stand-ins.

    Args:
        others: what their global names shall stand for: other modules made this way, or constants.
    """
    found: list[ast.stmt] = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef) and any("gluon.jit" in ast.unparse(each) for each in node.decorator_list):
            node.decorator_list = []
            node.args.kwonlyargs, node.returns = [], None
            for argument in node.args.args:
                argument.annotation = None
            found.append(node)
    constants = {name: value.value for name, value in vars(module).items() if type(value).__name__ == "constexpr"}
    names: dict[str, Any] = {**STAND_INS, **constants, **others}
    exec(compile(ast.Module(found, []), module.__file__ or "", "exec"), names)
    return SimpleNamespace(**names)


def run(kernel: Any, programs: int | tuple[int, ...], arguments: tuple[Any, ...], order: Sequence[int] | None = None) -> None:
    """Runs the programs of a grid one after another, in this order; raises what went wrong in one of them."""
    grid = (programs,) if isinstance(programs, int) else programs
    places = list(itertools.product(*map(range, grid)))
    for place in places if order is None else [places[index] for index in order]:
        HERE.program, HERE.number, HERE.count, HERE.name = Program(), place, grid, "kernel"
        kernel(*arguments)
        if HERE.program.fault:
            raise HERE.program.fault


def as_argument(value: Any) -> Any:
    """What a launch passes, as the stand-ins take it."""
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    if isinstance(value, torch.Tensor):
        return Pointer(line_of(value), value.storage_offset())
    return Scalar(value) if type(value) is int else value
