"""/v1/chat/completions: from messages to a prompt, and from text to messages and function calls."""

import inspect
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.serve.outputs import CompletionOutput, Logprob
from penstock.serve.packages import MissingPackage
from penstock.serve.server.dispatch import Outputs
from penstock.serve.server.errors import bad_request
from penstock.serve.server.protocol import (
    AssistantMessage,
    ChatRequest,
    Content,
    Message,
    TextFormat,
    Tool,
    ToolChoice,
    ToolMessage,
)
from penstock.serve.server.replies import Reply, chosen, finish_reason
from penstock.serve.server.sampling import format_grammar
from penstock.serve.server.tools import CLOSE, OPEN, Call, CallScanner, describe, tools_grammar
from penstock.serve.text import ChatError, Tokenizer

# For a checkpoint that brings no template of its own.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


# From messages to a prompt


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    add_generation_prompt: bool = True,
    more: dict[str, Any] | None = None,
) -> str:
    """The prompt of a conversation; 400 where the template refuses it.

    A template that does not speak of tools gets them as a system message, and calls and their results as text.
    """
    own = tokenizer.hf_tokenizer.chat_template
    speaks_of_tools = bool(own) and "tools" in str(own)
    plain = [_message(message, as_text=not speaks_of_tools) for message in messages]
    if tools and not speaks_of_tools:
        plain.insert(0, {"role": "system", "content": describe(tools)})
    taken = inspect.signature(tokenizer.hf_tokenizer.apply_chat_template).parameters.keys() | {"messages", "tokenize"}
    if reserved := taken & (more or {}).keys():
        raise bad_request(f"chat_template_kwargs may not hold {', '.join(sorted(reserved))}", param="chat_template_kwargs")
    try:
        return tokenizer.render_chat(
            plain,
            chat_template=None if own else PLAIN_TEMPLATE,
            add_generation_prompt=add_generation_prompt,
            tools=[tool.model_dump(exclude_none=True) for tool in tools] if tools and speaks_of_tools else None,
            **(more or {}),
        )
    except ChatError as error:
        raise bad_request(str(error), param="messages") from error
    except Exception as error:  # a template is a program that came with the checkpoint; it may raise anything
        raise bad_request(f"the chat template fails: {type(error).__name__}: {error}", param="messages") from error


def _message(message: Message, *, as_text: bool) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _text(message.content)}
    if isinstance(message, ToolMessage):
        if as_text:
            return {"role": "user", "content": f"<tool_response>\n{plain['content']}\n</tool_response>"}
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        calls = [{"name": call.function.name, "arguments": _arguments(call.function.arguments)} for call in message.tool_calls]
        if as_text:
            written = [f"{OPEN}\n{json.dumps(call, ensure_ascii=False)}\n{CLOSE}" for call in calls]
            plain["content"] = "\n".join([*([plain["content"]] if plain["content"] else []), *written])
        else:
            plain["tool_calls"] = [
                {"id": given.id, "type": "function", "function": call}
                for given, call in zip(message.tool_calls, calls, strict=True)
            ]
    return plain


def _arguments(text: str) -> dict[str, Any]:
    """Arguments as the object that templates write out."""
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise bad_request(f"the arguments of a function call are no JSON: {error}", param="messages") from error
    if not isinstance(arguments, dict):
        raise bad_request(f"the arguments of a function call must be a JSON object, got {text}", param="messages")
    return arguments


def _text(content: Content | None) -> str:
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content or ""


# What the answer may be


@dataclass(frozen=True)
class Shape:
    """What tools and response_format make of the answer.

    Args:
        tools: those that the model is told of.
        named: the one function that must be called.
    """

    grammar: str | None = None
    tools: tuple[Tool, ...] = ()
    named: str | None = None


def shape_of(request: ChatRequest) -> Shape:
    """Reads tools, tool_choice and response_format; 400 for what contradicts itself."""
    tools = tuple(request.tools or ())
    choice: Any = request.tool_choice or ("auto" if tools else "none")
    named = choice.function.name if isinstance(choice, ToolChoice) else None
    if not tools and (named or choice == "required"):
        raise bad_request("tool_choice asks for a call and there are no tools", param="tool_choice")
    if named and named not in {tool.function.name for tool in tools}:
        raise bad_request(f"tool_choice names {named!r}, which is not among the tools", param="tool_choice")
    if choice == "none" or not tools:
        return Shape(format_grammar(request.response_format))
    if request.response_format is not None and not isinstance(request.response_format, TextFormat):
        raise bad_request('response_format and tools exclude each other unless tool_choice is "none"', param="response_format")
    callable_now = [tool for tool in tools if named in (None, tool.function.name)]
    parallel = request.parallel_tool_calls is not False and named is None
    try:
        return Shape(tools_grammar(callable_now, must_call=choice != "auto", parallel=parallel), tools, named)
    except MissingPackage as error:
        raise bad_request(str(error), param="tools") from error


def max_tokens_of(request: ChatRequest) -> int | None:
    """The limit under either of its names."""
    if request.max_tokens and request.max_completion_tokens and request.max_tokens != request.max_completion_tokens:
        raise bad_request("max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens")
    return request.max_completion_tokens or request.max_tokens


def logprobs_of(request: ChatRequest) -> int | None:
    """How many likely tokens to report; None for no report."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


# From outputs to messages


@dataclass
class _Choice:
    """One answer while it grows."""

    scanner: CallScanner | None
    named: str | None
    num_calls: int = 0
    begun: bool = False
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def feed(self, output: CompletionOutput, top: int) -> tuple[list[str | Call], dict[str, Any] | None, str | None]:
        """(text and calls, log-probabilities, finish reason) of an output or an increment of one."""
        reason = finish_reason(output.finish_reason)
        parts: list[str | Call] = [output.text] if output.text else []
        if self.scanner is not None:
            parts = self.scanner.feed(output.text)
            if reason and (rest := self.scanner.flush()):
                parts.append(rest)
        self.num_calls += sum(isinstance(part, Call) for part in parts)
        if reason == "stop" and self.num_calls and not self.named:
            reason = "tool_calls"
        logprobs = None
        if output.logprobs is not None:
            logprobs = {"content": [_logprob(entries, top) for entries in output.logprobs], "refusal": None}
        return parts, logprobs, reason


def _logprob(entries: dict[int, Logprob], top: int) -> dict[str, Any]:
    sampled, ranked = chosen(entries)
    return _entry(sampled) | {"top_logprobs": [_entry(entry) for entry in ranked if (entry.rank or 0) <= top]}


def _entry(logprob: Logprob) -> dict[str, Any]:
    """A token's text, and its bytes where it is whole characters."""
    text = logprob.decoded_token or ""
    data = None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
    return {"token": text, "logprob": max(logprob.logprob, -9999.0), "bytes": data}


class ChatReply:
    """The answer to one request."""

    def __init__(self, request: ChatRequest, model: str, shape: Shape) -> None:
        self._request = request
        self._model = model
        self._top = logprobs_of(request) or 0
        self._choices = [_Choice(CallScanner() if shape.tools else None, shape.named) for _ in range(request.n or 1)]
        self.reply = Reply.begin("chatcmpl", "chat.completion.chunk" if request.stream else "chat.completion", model)

    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        while taken := await outputs.take():
            for prompt_index, output in taken:
                self.reply.count(prompt_index, output)
                choices += [self._message(completion) for completion in output.outputs]
        return self.reply.holding(choices, usage=self.reply.usage())

    def _message(self, output: CompletionOutput) -> dict[str, Any]:
        parts, logprobs, reason = self._choices[output.index].feed(output, self._top)
        calls = [part.as_json() for part in parts if isinstance(part, Call)]
        text = "".join(part for part in parts if isinstance(part, str))
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        choice = {"index": output.index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        choice["stop_reason"] = output.stop_reason
        return choice | ({"token_ids": output.token_ids} if self._request.return_token_ids else {})

    async def chunks(self, outputs: Outputs) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as it comes."""
        options = self._request.stream_options
        extra = {"usage": None} if options and options.include_usage else {}
        while taken := await outputs.take():
            made = []
            for prompt_index, output in taken:
                self.reply.count(prompt_index, output)
                made += [choice for completion in output.outputs for choice in self._deltas(completion)]
            yield [self.reply.holding([choice], **extra) for choice in made]
        if extra:
            yield [self.reply.holding([], usage=self.reply.usage())]

    def _deltas(self, output: CompletionOutput) -> list[dict[str, Any]]:
        choice = self._choices[output.index]
        before = choice.num_calls
        parts, logprobs, reason = choice.feed(output, self._top)
        deltas: list[dict[str, Any]] = []
        if not choice.begun:
            choice.begun = True
            deltas.append({"role": "assistant", "content": ""})
        for part in parts:
            if isinstance(part, Call):
                deltas.append({"tool_calls": [part.as_json(before)]})
                before += 1
            else:
                deltas.append({"content": part})
        tokens = {"token_ids": output.token_ids} if self._request.return_token_ids else {}
        if not deltas and (logprobs or tokens or reason):
            deltas.append({})
        made: list[dict[str, Any]] = []
        for delta in deltas:
            made.append({"index": output.index, "delta": delta, "logprobs": None, "finish_reason": None})
        if made:
            made[-1] |= {"logprobs": logprobs, "finish_reason": reason, **tokens}
            if output.stop_reason is not None:
                made[-1]["stop_reason"] = output.stop_reason
        return made
