"""The arrows of docs/design.md, read off the imports. Each rule is also shown to fail on a planted violation."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "penstock").rglob("*.py"))

# What each part may import of ours. `bench` and `testing` load operators by name.
MAY_IMPORT = {
    "core": {"core"},
    "testing": {"testing", "core"},
    "dist": {"dist", "core"},
    "ops": {"ops", "dist", "core"},
    "quant": {"quant", "ops", "dist", "core"},
    "serve": {"serve", "ops", "dist", "core"},
    "bench": {"bench", "testing", "core"},
    "integrations": {"integrations", "serve", "quant", "ops", "dist", "core"},
    "cli": {"cli", "bench", "testing", "integrations", "serve", "quant", "ops", "dist", "core"},
}
TRITON_FILES = ("_triton.py", "_hopper.py", "core/interpreter.py", "core/gluon.py")
WITHOUT_TORCH = ("scheduler", "pages", "plan", "params", "outputs")
CORE_LINES, CORE_FILE_LINES, FILE_LINES = 1500, 300, 600


def imported(tree: ast.AST) -> list[tuple[str, str, ast.stmt]]:
    """(module, name or "", statement) of every import, at any depth."""
    found: list[tuple[str, str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "", node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(module, alias.name, node) for alias in node.names]
    return found


def part_of(module: str) -> str | None:
    """`ops` for penstock.ops.norm.rms_norm; None for what is not ours, "" for penstock itself."""
    words = module.split(".")
    if words[0] != "penstock":
        return None
    return words[1] if len(words) > 1 else ""


def violations(path: str, source: str) -> list[str]:
    """What is wrong with one file of the package, by the rules of docs/design.md."""
    tree = ast.parse(source)
    found = []
    lines = source.count("\n")
    words = path.removesuffix(".py").split("/")
    part = words[1] if len(words) > 2 else words[1].removeprefix("__init__")
    room = words[2] if part == "ops" and len(words) > 3 else None
    if lines > FILE_LINES:
        found.append(f"{path}: {lines} lines, at most {FILE_LINES}")
    if part == "core" and lines > CORE_FILE_LINES:
        found.append(f"{path}: {lines} lines, at most {CORE_FILE_LINES} in core")
    top_level = set(map(id, tree.body))
    for module, name, node in imported(tree):
        where = f"{path}:{node.lineno}"
        if module.startswith("."):
            found.append(f"{where}: relative import {module}")
            continue
        base = module.split(".")[0]
        if base == "triton" and id(node) in top_level and not path.endswith(TRITON_FILES):
            found.append(f"{where}: imports Triton when it is imported; put the kernel into a _triton.py file")
        if base == "transformers" and id(node) in top_level:
            found.append(f"{where}: imports transformers when it is imported")
        if base == "torch" and path.startswith("penstock/serve/") and words[-1] in WITHOUT_TORCH:
            found.append(f"{where}: {words[-1]}.py must not import torch")
        target = part_of(f"{module}.{name}" if module == "penstock" else module)
        if target is None or part not in MAY_IMPORT:
            continue
        if target not in MAY_IMPORT[part]:
            found.append(f"{where}: {part} may not import {module}")
        if part == "ops" and target == "ops":
            found += [f"{where}: {fault}" for fault in _between_rooms(room, module, name)]
    if part == "ops":
        found += [f"{path}:{node.lineno}: {fault}" for node, fault in _state(tree)]
    return found


def _between_rooms(room: str | None, module: str, name: str) -> list[str]:
    parts = module.split(".")
    if room is None:
        return []
    if len(parts) == 3 and parts[2] == room:
        return []
    if len(parts) < 4:
        return [f"imports the catalogue or a room ({module}); import the operator's own file"]
    if parts[2] != room and (parts[3].startswith("_") or name.startswith("_")):
        return [f"imports {module}.{name}, a private of room {parts[2]}"]
    return []


def _state(tree: ast.Module) -> list[tuple[ast.stmt, str]]:
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append((node, f"global {', '.join(node.names)}: operators hold no state"))
    for node in tree.body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        empty = isinstance(value, (ast.Dict, ast.List)) and not ast.dump(value).count("Constant")
        if empty and not (value.keys if isinstance(value, ast.Dict) else value.elts):
            found.append((node, "an empty container at module level: operators hold no state"))
    return found


@pytest.mark.parametrize("path", FILES)
def test_file_keeps_the_rules(path):
    assert violations(path, (ROOT / path).read_text()) == []


def test_core_is_small():
    total = sum((ROOT / path).read_text().count("\n") for path in FILES if path.startswith("penstock/core/"))
    assert total <= CORE_LINES, f"penstock/core has {total} lines, at most {CORE_LINES}"


def test_no_operator_has_a_rooms_name():
    rooms = {path.split("/")[2] for path in FILES if path.startswith("penstock/ops/") and path.count("/") > 2}
    import penstock.ops

    assert rooms.isdisjoint(vars(penstock.ops).keys() - rooms)
    for room in rooms:
        assert not callable(getattr(penstock.ops, room, None)), f"operator and room are both named {room}"


PLANTED = [
    ("penstock/core/a.py", "from penstock.ops.norm.rms_norm import rms_norm\n", "core may not import penstock.ops"),
    ("penstock/core/a.py", "def f():\n    import penstock.serve.llm\n", "core may not import penstock.serve"),
    ("penstock/core/a.py", "from penstock import serve\n", "core may not import penstock"),
    ("penstock/testing/a.py", "import penstock.ops\n", "testing may not import penstock.ops"),
    ("penstock/ops/norm/a.py", "from penstock.serve.llm import LLM\n", "ops may not import penstock.serve"),
    ("penstock/ops/norm/a.py", "from penstock.ops import silu_and_mul\n", "imports the catalogue"),
    ("penstock/ops/norm/a.py", "from penstock.ops.activation import silu_and_mul\n", "imports the catalogue or a room"),
    ("penstock/ops/norm/a.py", "from penstock.ops.attention._mask import visible\n", "a private of room attention"),
    ("penstock/ops/norm/a.py", "from penstock.ops.attention.decode import _cpu\n", "a private of room attention"),
    ("penstock/ops/norm/a.py", "from .rms_norm import rms_norm\n", "relative import"),
    ("penstock/ops/norm/a.py", "import triton\n", "put the kernel into a _triton.py file"),
    ("penstock/ops/norm/a.py", "_workspaces = {}\n", "operators hold no state"),
    ("penstock/ops/norm/a.py", "def f():\n    global x\n    x = 1\n", "operators hold no state"),
    ("penstock/serve/scheduler.py", "def f():\n    import torch\n", "scheduler.py must not import torch"),
    ("penstock/serve/text.py", "from transformers import AutoTokenizer\n", "imports transformers when it is imported"),
    ("penstock/serve/text.py", "from penstock.cli import main\n", "serve may not import penstock.cli"),
    ("penstock/serve/a.py", "from penstock.integrations.vllm import register\n", "serve may not import penstock.integrations"),
    ("penstock/integrations/a.py", "from penstock.cli import main\n", "integrations may not import penstock.cli"),
    ("penstock/integrations/a.py", "import transformers\n", "imports transformers when it is imported"),
    ("penstock/bench/a.py", "from penstock.ops.norm.rms_norm import rms_norm\n", "bench may not import penstock.ops"),
    ("penstock/core/a.py", "x = 1\n" * 301, "at most 300 in core"),
    ("penstock/serve/a.py", "x = 1\n" * 601, "at most 600"),
]


@pytest.mark.parametrize(("path", "source", "fault"), PLANTED)
def test_planted_violation_is_found(path, source, fault):
    assert any(fault in line for line in violations(path, source)), violations(path, source)


def test_a_good_file_passes():
    source = (
        "import torch\nfrom penstock.ops.attention import _mask\nfrom penstock.ops.norm.rms_norm import rms_norm\n"
        "\n\ndef f():\n    import triton\n"
    )
    assert violations("penstock/ops/attention/a.py", source) == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import penstock", ("torch", "transformers", "triton")),
        ("import penstock.ops", ("transformers", "triton")),
        ("import penstock.serve.scheduler", ("torch", "transformers")),
        ("from penstock import SamplingParams", ("torch", "transformers")),
        ("import penstock.serve.llm, penstock.serve.grammar", ("fastapi", "uvicorn", "prometheus_client", "llguidance")),
    ],
)
def test_import_is_light(statement, absent):
    program = f"{statement}; import sys; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_import_makes_no_cuda_context():
    program = "import penstock.ops, torch; print(torch.cuda.is_initialized())"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "False"
