"""Writes docs/operators/ and the table of operators in README.md from the operators' own docstrings.

python scripts/build_docs.py            # write
python scripts/build_docs.py --check    # exit code 1 when a page is not what would be written
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import penstock.ops
from penstock.core.op import Op

ROOT = Path(__file__).resolve().parent.parent
PAGES = Path("docs/operators")
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Source|Sources):\s*(.*)")
NEEDS = {
    "cpu": "CPU tensors",
    "triton": "a GPU and Triton",
    "wgmma": "Hopper's matrix instructions",
    "tma": "Hopper's tensor memory accelerator",
}


def main(arguments: list[str]) -> int:
    """Writes or checks every page; returns the exit code."""
    pages = {PAGES / f"{name}.md": page(name, value) for name, value in public().items()}
    pages[PAGES / "README.md"] = index()
    pages[Path("README.md")] = with_table((ROOT / "README.md").read_text())
    stale = [path for path, text in pages.items() if not (ROOT / path).is_file() or (ROOT / path).read_text() != text]
    left = [path.relative_to(ROOT) for path in (ROOT / PAGES).glob("*.md") if path.relative_to(ROOT) not in pages]
    if "--check" in arguments:
        for path in stale + left:
            print(f"{path} is out of date; run `make docs`")
        return 1 if stale or left else 0
    for path in left:
        (ROOT / path).unlink()
    (ROOT / PAGES).mkdir(exist_ok=True)
    for path in stale:
        (ROOT / path).write_text(pages[path])
        print(f"wrote {path}")
    return 0


def public() -> dict[str, Any]:
    """Everything the catalogue offers, in alphabetical order: operators, and the functions and classes beside them."""
    offered = {name: value for name, value in vars(penstock.ops).items() if not name.startswith("_")}
    return {name: offered[name] for name in sorted(offered) if callable(offered[name])}


def page(name: str, value: Any) -> str:
    """The page of one operator."""
    module = importlib.import_module(value.__module__ if not isinstance(value, Op) else value.module)
    function = value.function if isinstance(value, Op) else value
    parts = [
        "<!-- written by scripts/build_docs.py from the docstring -->",
        f"# {name}",
        quoted(paragraph(module.__doc__)) if isinstance(value, Op) else "",
        f"```text\nfrom penstock.ops import {name}\n\n{signature(name, function)}\n```",
        *docstring(inspect.getdoc(function) or ""),
    ]
    if isinstance(value, Op):
        parts += ["## Implementations", implementations(value), "## Cases", cases(value)]
    source = Path(inspect.getfile(function)).relative_to(ROOT).as_posix()
    parts.append(f"**File:** [{source}](../../{source})")
    return "\n\n".join(part for part in parts if part) + "\n"


def signature(name: str, function: Callable[..., Any]) -> str:
    """The call with its defaults; one argument a line where one line is too short."""
    found = inspect.signature(function)
    plain = [parameter.replace(annotation=parameter.empty) for parameter in found.parameters.values()]
    line = f"{name}{found.replace(parameters=plain, return_annotation=found.empty)}".replace("torch.", "")
    if len(line) <= 100:
        return line
    arguments, star = [], False
    for parameter in plain:
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            arguments.append("*")
            star = True
        arguments.append(str(parameter).replace("torch.", ""))
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


def docstring(text: str) -> list[str]:
    """A docstring as Markdown: paragraphs, then one part for each section."""
    parts: list[str] = []
    plain: list[str] = []
    lines = iter([*text.splitlines(), "Source:"])
    section: str | None = None
    body: list[str] = []
    for line in lines:
        match = SECTION.fullmatch(line)
        if match is None:
            (plain if section is None else body).append(line)
            continue
        if section is None:
            parts += [block_of(block) for block in "\n".join(plain).split("\n\n") if block.strip()]
        else:
            parts.append(render(section, body))
        section, body = match[1], [match[2]]
    return [part for part in parts if part]


def block_of(text: str) -> str:
    """A paragraph on one line; lines of code as they are."""
    lines = text.strip("\n").splitlines()
    if all(line.startswith("    ") for line in lines):
        return "```text\n" + "\n".join(line[4:] for line in lines) + "\n```"
    return escaped(" ".join(text.split()))


def render(section: str, body: list[str]) -> str:
    """One section: a list for arguments, a sentence otherwise."""
    if section not in ("Args", "Attributes"):
        text = " ".join(" ".join(body).split())
        return f"**{section}:** {escaped(text)}" if text else ""
    items: list[str] = []
    for line in filter(str.strip, body):
        start = re.match(r"    (\*{0,2}\w[\w, ]*): (.*)", line)
        if start:
            names = ", ".join(f"`{argument.strip()}`" for argument in start[1].split(","))
            items.append(f"- {names}: {escaped(start[2])}")
        elif items:
            items[-1] += " " + escaped(line.strip())
    return "## Arguments\n\n" + "\n".join(items)


def implementations(operator: Op) -> str:
    """The table of implementations in order of preference."""
    rows = ["| name | needs | instructions it is compiled to |", "|---|---|---|"]
    for name, implementation in operator.implementations.items():
        needs = " and ".join(NEEDS.get(need, need) for need in implementation.needs)
        rows.append(f"| `{name}` | {needs} | {', '.join(implementation.instructions) or '-'} |")
    rows.append("| `reference` | nothing; on a GPU it must be asked for by name | - |")
    return "\n".join(rows)


def cases(operator: Op) -> str:
    """The named shapes, those for benchmarks apart."""
    found = operator.all_cases()
    tested = ", ".join(f"`{case.name}`" for case in found if not case.bench)
    timed = ", ".join(f"`{case.name}`" for case in found if case.bench)
    return f"Tested: {tested}." + (f"\n\nTested on a GPU, and timed: {timed}." if timed else "")


def index() -> str:
    """The list of all operators, room by room."""
    parts = [
        "<!-- written by scripts/build_docs.py from the docstrings -->",
        "# Operators",
        "Every operator takes `impl=`: `auto` (the first implementation that takes the call), a name, or `reference`. "
        "`penstock ops` says which of them run on the machine at hand.",
    ]
    for room, names in rooms().items():
        module = importlib.import_module(f"penstock.ops.{room}")
        parts += [f"## {room}", escaped(paragraph(module.__doc__)), table(names, "")]
    return "\n\n".join(parts) + "\n"


def rooms() -> dict[str, list[str]]:
    """The names of the catalogue by room."""
    found: dict[str, list[str]] = {}
    for name, value in public().items():
        module = value.module if isinstance(value, Op) else value.__module__
        found.setdefault(module.split(".")[2], []).append(name)
    return dict(sorted(found.items()))


def table(names: list[str], folder: str) -> str:
    """One row for each operator: name with a link, first sentence, implementations."""
    rows = ["| operator | what it computes | implementations |", "|---|---|---|"]
    for name in names:
        value = public()[name]
        function = value.function if isinstance(value, Op) else value
        first = escaped(paragraph(inspect.getdoc(function))).replace("|", "\\|")
        kinds = ", ".join([*value.implementations, "reference"]) if isinstance(value, Op) else ""
        rows.append(f"| [`{name}`]({folder}{name}.md) | {first} | {kinds} |")
    return "\n".join(rows)


def with_table(readme: str) -> str:
    """README.md with its table of operators brought up to date."""
    begin, end = "<!-- operators -->", "<!-- end of operators -->"
    if begin not in readme or end not in readme:
        raise SystemExit(f"error: README.md lacks the lines {begin} and {end}")
    before, rest = readme.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n\n{table(list(public()), f'{PAGES}/')}\n\n{end}{after}"


def paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def quoted(text: str) -> str:
    """A formula as a quotation."""
    return f"> {escaped(text)}" if text else ""


def escaped(text: str) -> str:
    """Text whose stars, brackets and outer underscores Markdown must leave alone; what is between backquotes stays."""
    pieces = text.split("`")
    for position in range(0, len(pieces), 2):
        pieces[position] = re.sub(r"([*<]|(?<!\w)_|_(?!\w))", r"\\\1", pieces[position])
    return "`".join(pieces)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
