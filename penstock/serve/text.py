"""Text in and text out: tokenizer, chat template, incremental detokeniser, stop strings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


class TokenizerError(ValueError):
    """A tokenizer is absent, unreadable, or lacks what was asked of it."""


class ChatError(ValueError):
    """Messages that cannot be rendered to a prompt."""


class Tokenizer:
    """A fast Hugging Face tokenizer, cut down to what serving needs."""

    def __init__(self, hf_tokenizer: Any) -> None:
        if not getattr(hf_tokenizer, "is_fast", False):
            raise TokenizerError(
                f"{type(hf_tokenizer).__name__} is not a fast tokenizer; serving needs one with a tokenizer.json"
            )
        self.hf_tokenizer = hf_tokenizer
        self.backend = hf_tokenizer.backend_tokenizer
        self._token_texts: dict[int, str] = {}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own end token, if it names one."""
        token_id = self.hf_tokenizer.eos_token_id
        return () if token_id is None else (token_id,)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, with the tokenizer's own leading and closing tokens unless told otherwise."""
        return list(self.hf_tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, bytes that form no character replaced by U+FFFD."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """The text of one token, special or not; remembered, for log-probabilities ask for many."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        **template_arguments: Any,
    ) -> str:
        """The prompt that the chat template makes of messages; encode it without special tokens, it brings its own.

        Raises: ChatError when there is no template, the messages are malformed or the template refuses them.
        """
        from jinja2.exceptions import TemplateError

        _check_messages(messages)
        if chat_template is None and not self.hf_tokenizer.chat_template:
            raise ChatError("the tokenizer has no chat template; pass `chat_template` or use a plain prompt")
        try:
            return self.hf_tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template_arguments,
            )
        except TemplateError as error:
            raise ChatError(f"the chat template refuses the messages: {error}") from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer saved in a folder; never asks the network."""
    path = Path(path)
    if not path.is_dir():
        raise TokenizerError(f"tokenizer: there is no folder {str(path)!r}")
    from transformers import AutoTokenizer

    try:
        return Tokenizer(AutoTokenizer.from_pretrained(str(path), local_files_only=True))
    except TokenizerError:
        raise
    except Exception as error:  # the loaders raise whatever their parsers do
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise TokenizerError(
            f"tokenizer: cannot read one from {str(path)!r} ({reason}); with skip_tokenizer_init=True "
            f"prompts and outputs are token ids and none is needed"
        ) from error


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ChatError(f'messages must be a non-empty list of {{"role": …, "content": …}}, got {messages!r}')
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ChatError(f'message {index} must be a dict with a "role" string, got {message!r}')
        if "content" not in message and "tool_calls" not in message:
            raise ChatError(f'message {index} must have "content", got only {", ".join(sorted(message))}')


class IncrementalDetokenizer:
    """Turns tokens into text one at a time; a character split over tokens comes out once, when it is complete.

    The end of the prompt gives the context that decides, for some tokenizers, whether the first word begins with a
    space. All pieces and the flush together are the text of the output tokens.
    """

    _stream: DecodeStream

    CONTEXT = 8  # tokens of the prompt to look back at
    HELD = 64  # tokens; more than any character has, so what is held is no character and is given out

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._pending: list[int] = []  # fed since text last came out
        self._open(list(prompt_token_ids[-self.CONTEXT :]))

    def feed(self, token_id: int) -> str:
        """The text that this token completes; often one word, sometimes nothing yet."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception as error:  # tokenizers has no class for it
            if "Invalid prefix" not in str(error):
                raise
            return self.flush()  # a decoder that rewrote earlier text: go on from what it says now
        if text is None:
            return self.flush() if len(self._pending) >= self.HELD else ""
        self._pending = []
        return text

    def flush(self) -> str:
        """Whatever is still held, incomplete characters as U+FFFD."""
        if not self._pending:
            return ""
        text = self._decode(self._pending)
        self._open(self._pending)
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _open(self, context: list[int]) -> None:
        """Begin anew after these tokens, which must end in a whole character or are not looked at."""
        if self._decode(context).endswith(REPLACEMENT):
            context = []
        self._pending = []
        self._stream = DecodeStream(ids=list(context), skip_special_tokens=self._skip_special_tokens)


class StopScanner:
    """Finds the first stop string in text that comes in pieces, and never gives out a part of it.

    First means completed first, whatever the pieces are; of several completed by the same character the longest.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        self._stop = sorted(stop, key=len, reverse=True)
        self._include = include
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown, and the stop string once one was found (nothing may be fed after that)."""
        if not self._stop:
            return text, None
        text = self._held + text
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            end, _, stop = min(ends)
            self._held = ""
            return text[:end] if self._include else text[: end - len(stop)], stop
        longest = min(len(text), len(self._stop[0]) - 1)
        held = next((size for size in range(longest, 0, -1) if self._may_begin(text[-size:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """The text held back, once it is known that no more will come."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stop)
