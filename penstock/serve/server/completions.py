"""/v1/completions."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.serve.engine import EncodedPrompt
from penstock.serve.outputs import CompletionOutput, Logprob
from penstock.serve.server.dispatch import Outputs
from penstock.serve.server.protocol import CompletionRequest
from penstock.serve.server.replies import Reply, chosen, finish_reason


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts; a list of integers is the tokens of one."""
    prompt: Any = request.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


@dataclass
class _Choice:
    """One completion while it grows."""

    index: int
    echoed: str  # the prompt's text, to be shown first; "" without echo
    prompt_token_ids: list[int]
    offset: int = 0  # characters of the text that the tokens so far made
    texts: list[str] = field(default_factory=list)
    begun: bool = False

    def feed(self, output: CompletionOutput, *, token_ids: bool) -> dict[str, Any]:
        """An output, or increment of one, as a choice of the answer."""
        text = output.text
        if not self.begun:
            self.begun = True
            self.offset = len(self.echoed)
            text = self.echoed + text
        logprobs = None if output.logprobs is None else self._logprobs(output.logprobs)
        choice = {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason(output.finish_reason),
            "stop_reason": output.stop_reason,
        }
        return choice | ({"token_ids": output.token_ids} if token_ids else {})

    def _logprobs(self, positions: list[dict[int, Logprob]]) -> dict[str, list[Any]]:
        block: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entries in positions:
            sampled, ranked = chosen(entries)
            block["tokens"].append(sampled.decoded_token)
            block["token_logprobs"].append(finite(sampled.logprob))
            block["top_logprobs"].append({entry.decoded_token: finite(entry.logprob) for entry in ranked})
            block["text_offset"].append(self.offset)
            self.offset += len(sampled.decoded_token or "")
        return block


def finite(logprob: float) -> float:
    """JSON has no infinity; this is what OpenAI writes for a token that could not be."""
    return max(logprob, -9999.0)


class CompletionReply:
    """The answer to one request.

    Args:
        texts: of the prompts, for echo.
    """

    def __init__(self, request: CompletionRequest, model: str, prompts: Sequence[EncodedPrompt], texts: Sequence[str]) -> None:
        self.reply = Reply.begin("cmpl", "text_completion", model)
        self._request = request
        n = request.n or 1
        self._choices = {
            (at, index): _Choice(at * n + index, texts[at] if request.echo else "", prompt.token_ids)
            for at, prompt in enumerate(prompts)
            for index in range(n)
        }

    async def whole(self, outputs: Outputs) -> dict[str, Any]:
        """The answer at once."""
        choices = []
        while taken := await outputs.take():
            choices += self._feed(taken)
        choices.sort(key=lambda choice: choice["index"])
        return self.reply.holding(choices, usage=self.reply.usage())

    async def chunks(self, outputs: Outputs) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer as it comes."""
        options = self._request.stream_options
        extra = {"usage": None} if options and options.include_usage else {}
        while taken := await outputs.take():
            yield [self.reply.holding([choice], **extra) for choice in self._feed(taken)]
        if extra:
            yield [self.reply.holding([], usage=self.reply.usage())]

    def _feed(self, taken: list[Any]) -> list[dict[str, Any]]:
        made = []
        for prompt_index, output in taken:
            self.reply.count(prompt_index, output)
            for completion in output.outputs:
                choice = self._choices[prompt_index, completion.index]
                made.append(choice.feed(completion, token_ids=bool(self._request.return_token_ids)))
        return made
