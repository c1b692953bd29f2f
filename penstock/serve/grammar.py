"""Output that follows a grammar: which tokens may come next, by llguidance.

    grammar = GrammarCompiler(tokenizer, vocab_size, eos_token_ids).compile(json_schema({"type": "integer"}))
    while not grammar.finished:
        grammar.accept(choose(grammar.mask()))

The state belongs to the output, not to its pages, so a preempted request goes on where it was.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.serve.packages import optional
from penstock.serve.text import Tokenizer

# One space, or a line break and its indentation: without a bound a small model writes white space for ever.
WHITESPACE = r"[ ]|\n[ \t]{0,40}"
PURPOSE = "output that follows a grammar"


class GrammarError(ValueError):
    """Something that is no grammar, or one that cannot be followed: the reason."""


def json_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON texts that a schema allows."""
    return _from_json_schema(schema)


def json_object() -> str:
    """The grammar of all JSON objects."""
    return _from_json_schema({"type": "object"})


def regex(pattern: str) -> str:
    """The grammar of the texts that a regular expression matches as a whole."""
    return optional("llguidance", PURPOSE).LLMatcher.grammar_from_regex(pattern)


def lark(text: str) -> str:
    """A grammar in llguidance's dialect of Lark."""
    return optional("llguidance", PURPOSE).LLMatcher.grammar_from_lark(text)


def _from_json_schema(schema: Mapping[str, Any]) -> str:
    matcher = optional("llguidance", PURPOSE).LLMatcher
    try:
        return matcher.grammar_from_json_schema(dict(schema), overrides={"whitespace_pattern": WHITESPACE})
    except (ValueError, UnicodeEncodeError) as error:
        raise GrammarError(f"not a JSON schema: {error}") from error


class Grammar:
    """Where one output stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end."""
        return self._matcher.is_stopped()

    @property
    def fault(self) -> str:
        """Why the output cannot be followed further; "" while it can."""
        return self._matcher.get_error()

    def mask(self) -> bytes:
        """The tokens that may come next: bit t % 8 of byte t // 8 is token t."""
        return self._matcher.compute_bitmask()

    def masks(self, guesses: Sequence[int] = ()) -> list[bytes]:
        """The mask here, and that after each guess; what stands after a forbidden guess means nothing."""
        masks = [self.mask()]
        taken = 0
        for token_id in guesses:
            if masks[-1][token_id // 8] >> token_id % 8 & 1 and len(masks) == taken + 1:
                self.accept(token_id)
                taken += 1
                masks.append(self.mask())
            else:
                masks.append(masks[-1])
        self.rollback(taken)
        return masks

    def accept(self, token_id: int) -> None:
        """Go on by one token; one that the mask forbids is a `fault`."""
        self._matcher.consume_token(token_id)

    def rollback(self, count: int) -> None:
        """Take back the last tokens accepted."""
        self._matcher.rollback(count)

    def copy(self) -> "Grammar":
        """Another output at the same place."""
        return Grammar(self._matcher.deep_copy())


class GrammarCompiler:
    """Makes grammars for one vocabulary; any thread may compile.

    Args:
        vocab_size: of the model, which may be larger than the tokenizer's.
        eos_token_ids: may follow wherever the grammar allows an end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._llguidance = optional("llguidance", PURPOSE)
        if not eos_token_ids:
            raise GrammarError("the model has no end token, so a grammar could not end the output")
        size = max(vocab_size, len(tokenizer.hf_tokenizer))
        self._lock = threading.Lock()
        from_tokenizer = optional("llguidance.hf", PURPOSE).from_tokenizer
        self._vocabulary = from_tokenizer(tokenizer.hf_tokenizer, n_vocab=size, eos_token=list(eos_token_ids))

    def compile(self, text: str) -> Grammar:
        """A grammar at its beginning; GrammarError with the reason when there is none."""
        with self._lock:
            matcher = self._llguidance.LLMatcher(self._vocabulary, text, log_level=0)
        if matcher.is_error():
            raise GrammarError(f"the grammar does not compile: {matcher.get_error().strip()}")
        return Grammar(matcher)
