"""Function calls in text: <tool_call>, a JSON object with "name" and "arguments", </tool_call>, as Qwen and Hermes write them.

The grammar makes a model write them so; whether it may, must, or must call one function is tool_choice.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.serve.grammar import WHITESPACE, lark
from penstock.serve.server.protocol import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def tools_grammar(tools: Sequence[Tool], *, must_call: bool, parallel: bool) -> str:
    """The grammar of answers.

    Args:
        tools: what may be called.
        must_call: nothing but calls; otherwise text and calls.
        parallel: whether there may be several calls.
    """
    rules = [f"body: {' | '.join(f'body_{index}' for index in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        schema = {"x-guidance": {"whitespace_pattern": WHITESPACE}, **(tool.function.parameters or NO_ARGUMENTS)}
        begin = f'\n{{"name": "{tool.function.name}", "arguments": '
        rules.append(f"body_{index}: {json.dumps(begin)} %json {json.dumps(schema)} {json.dumps('}' + chr(10) + CLOSE)}")
    if must_call:
        rules.append(f"call: {json.dumps(OPEN)} body")
        start = 'call ("\\n" call)*' if parallel else "call"
    else:
        # A lazy rule ends where it can: text that holds OPEN is always the lead of a call.
        rules.append(f"call: lead body\nlead[lazy]: TEXT {json.dumps(OPEN)}\nTEXT: /(.|\\n)*/")
        start = "call* TEXT" if parallel else "TEXT | call"
    return lark("\n".join(["%llguidance {}", f"start: {start}", *rules]))


@dataclass(frozen=True, slots=True)
class Call:
    """A function call found in text."""

    name: str
    arguments: str  # JSON

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """As a message holds it; a chunk's has an index."""
        call = {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }
        return call if index is None else {"index": index, **call}


class CallScanner:
    """Takes function calls out of text that comes in pieces; what is no call stays text."""

    def __init__(self) -> None:
        self._held = ""
        self._after_call = False

    def feed(self, text: str) -> list[str | Call]:
        """The text that is surely no part of a call, and the calls that are complete."""
        self._held += text
        found: list[str | Call] = []
        while (begin := self._held.find(OPEN)) >= 0:
            self._show(self._held[:begin], found)
            self._held = self._held[begin:]
            if CLOSE not in self._held:
                return found
            body, self._held = self._held.removeprefix(OPEN).split(CLOSE, 1)
            found.append(_parse(body))
            self._after_call = True
        held = next((size for size in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:size])), 0)
        self._show(self._held[: len(self._held) - held], found)
        self._held = self._held[len(self._held) - held :]
        return found

    def flush(self) -> str:
        """What is held when the text ends; a call cut short is text."""
        held, self._held = self._held, ""
        return held

    def _show(self, text: str, found: list[str | Call]) -> None:
        if self._after_call:  # white space between calls is no text
            text = text.lstrip()
        if text:
            self._after_call = False
            found.append(text)


def _parse(body: str) -> str | Call:
    try:
        call = json.loads(body)
    except ValueError:
        call = None
    if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict):
        return Call(call["name"], json.dumps(call["arguments"], ensure_ascii=False))
    return OPEN + body + CLOSE


def describe(tools: Sequence[Tool]) -> str:
    """The functions as a system message, for a chat template that has no words for them."""
    lines = [json.dumps(tool.model_dump(exclude_none=True), ensure_ascii=False) for tool in tools]
    call = '{"name": <name of the function>, "arguments": <JSON object>}'
    return "\n".join(["Functions that you may call:", *lines, f"To call one, write:\n{OPEN}\n{call}\n{CLOSE}"])
