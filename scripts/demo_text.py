"""English prose from the standard library of the running interpreter: the text behind the bundled checkpoint.

Source files are parsed, never imported; the order is fixed, so one version of Python always gives the same text.
"""

import ast
import builtins
import codecs
import inspect
import re
import sysconfig
import zlib
from pathlib import Path

SYSTEM = "You answer questions about Python."
EXCLUDED = {"site-packages", "dist-packages", "pydoc_data", "test_email", "lib2to3"}
QUESTIONS = ["What does {} do?", "What is {}?", "Explain {}.", "Tell me about {}."]

TYPOGRAPHY = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": " - ", "–": "-", "…": "...", "\t": "    "})
BULLET = re.compile(r"(?:[*•+-]|\d{1,2}[.)]|\([a-z0-9]\)) +")
NOISE = re.compile(r"""^\s*(?:\.\.\s|\.\\"|\.[A-Z]{2}\b|([=\-*~^#"+_.])\1{2,}\s*$|Related help topics:|\$Id)""")
CODE = re.compile(r">>>|::=|==|\+=|[{}\\|]|\w = |^(?:def|class|import|from|for|if|while|try|return|@)\b.*[:)]$", re.M)
SIGNATURE = re.compile(r"(?:class |async )?([A-Za-z_][\w.]*)\([\w\s,.*=\[\]'\"/-]*\)|([A-Za-z_]\w*\.[\w.]*\w)")


def strip_markup(text: str) -> str:
    """Plain text from reStructuredText: roles, double backquotes, `LaTeX quotes' and typographic characters removed."""
    text = re.sub(r"\bXXX[:,]? ?", "", text.translate(TYPOGRAPHY))
    text = re.sub(r":[a-z:]+:`~?([^`]*)`", r"\1", text)
    text = re.sub(r"``([^`]*)``|`([^`']*)[`']_{0,2}", lambda m: m[1] or m[2] or "", text)
    text = re.sub(r"^(\s*):(?:param|arg|type|raises?|returns?|rtype)[^:\n]*:\s*", r"\1", text, flags=re.M)
    return re.sub(r"::$", ":", text, flags=re.M)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences, rather than code, a table or a grammar."""
    words = re.findall(r"[A-Za-z]+(?:'[a-z]+)?", paragraph)
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    starts = re.match(r"""["'(*]?[A-Z]|["'*]\w|[a-z_.]+\(""", BULLET.sub("", paragraph, count=1))
    return len(words) >= 5 and letters >= 0.86 * len(paragraph) and paragraph.isascii() and bool(starts)


def clean(text: str) -> list[str]:
    """Paragraphs of prose with their hard line breaks removed; code, tables and what introduces them dropped."""
    lines = ["" if NOISE.match(line) else line for line in strip_markup(text).splitlines()]
    kept: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        block = inspect.cleandoc(block)
        if SIGNATURE.fullmatch(block):
            kept.append(" ".join(block.split()))
            continue
        found = False
        if not CODE.search(block) and not re.search(r"\S {3,}\S", block):
            items = re.split(rf"\n(?=\s*{BULLET.pattern})", block)
            for item in (" ".join(item.split()) for item in items):
                if is_prose(item):
                    kept.append(item)
                    found = True
        if not found and block and kept and not kept[-1].endswith((".", "!", "?", ")")):
            kept.pop()  # "For example:" without its example teaches the model to stop making sense
    return kept


def deduplicate(documents: list[list[str]]) -> list[list[str]]:
    """Every paragraph once, at its first place, compared without case and spacing; documents left empty are dropped."""
    seen: set[str] = set()
    unique = []
    for paragraphs in documents:
        fresh = []
        for paragraph in paragraphs:
            key = re.sub(r"\W+", "", paragraph).lower()
            if key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        if any(not SIGNATURE.fullmatch(p) for p in fresh):
            unique.append(fresh)
    return unique


def describe(node: ast.AST, owner: str) -> list[str]:
    """Names, argument names and docstrings of a class or function and of those directly inside it."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    name = f"{owner}.{node.name}"
    if not isinstance(node, ast.ClassDef):
        name += f"({', '.join(a.arg for a in node.args.args if a.arg != 'self')})"
    paragraphs = clean(ast.get_docstring(node) or "")
    document = [name, *paragraphs] if paragraphs else []
    for child in ast.iter_child_nodes(node):
        document += describe(child, node.name)
    return document


def docstrings(tree: ast.Module, module: str) -> list[list[str]]:
    """One document for the module's docstring and one for each top-level class or function."""
    return [clean(ast.get_docstring(tree) or ""), *(describe(node, module) for node in tree.body)]


def comments(source: str) -> list[str]:
    """Paragraphs of the comment blocks that hold whole sentences."""
    blocks = re.findall(r"(?:^[ \t]*#.*\n)+", source, flags=re.M)
    texts = (re.sub(r"^[ \t]*#+ ?", "", block, flags=re.M) for block in blocks)
    return [p for text in texts for p in clean(text) if p.endswith((".", "!", "?")) and len(p) > 60]


def builtin_documents() -> list[list[str]]:
    """The docstrings of the built-in functions and types, which have no Python source to parse."""
    documents = []
    for name, value in sorted(vars(builtins).items()):
        members = sorted(vars(value).items()) if isinstance(value, type) and not issubclass(value, Exception) else []
        document = []
        for label, item in [(f"{name}()", value), *((f"{name}.{key}()", item) for key, item in members)]:
            text = getattr(item, "__doc__", None)
            if callable(item) and isinstance(text, str) and not name.startswith("_"):
                paragraphs = clean(re.sub(r"^\S+\(.*\) -+> .*\n", "", text, flags=re.M))
                document += [label, *paragraphs] if paragraphs else []
        documents.append(document)
    return documents


def assigned(path: Path):
    """The literal that the first assignment of a source file assigns."""
    statements = ast.parse(path.read_text("utf-8")).body
    return ast.literal_eval(next(s.value for s in statements if isinstance(s, ast.Assign | ast.AnnAssign)))


def gather() -> list[list[str]]:
    """Documents, each a list of paragraphs, from the standard library of the running interpreter, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [clean(text) for _, text in sorted(assigned(root / "pydoc_data" / "topics.py").items())]
    documents.append(codecs.decode(assigned(root / "this.py"), "rot13").split("\n\n"))
    documents += builtin_documents()
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if EXCLUDED & set(parts) or not path.is_file():
            continue
        if path.suffix == ".txt" and parts[0] in ("LICENSE.txt", "idlelib"):
            documents.append(clean(path.read_text("utf-8", "replace")))
        elif path.suffix == ".py":
            try:
                source = path.read_bytes().decode("utf-8")
                tree = ast.parse(source)
            except (SyntaxError, ValueError):
                continue  # the test suite ships files that are broken on purpose
            name = path.parent.name if path.stem == "__init__" else path.stem
            documents += [*docstrings(tree, name), comments(source)]
    return deduplicate(documents)


def conversations(documents: list[list[str]]) -> list[str]:
    """Question-and-answer documents in the format of the chat template, from half of the documented names."""
    texts = []
    for paragraphs in documents:
        for index, paragraph in enumerate(paragraphs):
            match = SIGNATURE.fullmatch(paragraph)
            following = next((i for i, p in enumerate(paragraphs[index + 1 :]) if SIGNATURE.fullmatch(p)), 3)
            answer = paragraphs[index + 1 : index + 1 + min(following, 3)]
            number = zlib.crc32(" ".join([paragraph, *answer]).encode())
            if match and answer and "test" not in paragraph.lower() and number % 2:
                question = QUESTIONS[number // 2 % len(QUESTIONS)].format(match[1] or match[2])
                system = f"<|system|>{SYSTEM}<|eos|>" if number // 8 % 4 == 0 else ""
                body = "\n".join(answer)
                texts.append(f"<|bos|>{system}<|user|>{question}<|eos|><|assistant|>{body}<|eos|>")
    return texts


def split(documents: list[list[str]]) -> tuple[list[str], list[str]]:
    """Training and validation texts; one document in 32 is held out, with the conversations made from it."""
    held_out = [zlib.crc32("\n".join(d).encode()) % 32 == 0 for d in documents]
    parts = ([d for d, held in zip(documents, held_out, strict=True) if held is want] for want in (False, True))
    train, validation = ([f"<|bos|>{chr(10).join(d)}<|eos|>" for d in p] + conversations(p) for p in parts)
    return train, validation
