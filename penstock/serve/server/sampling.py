"""From a request's fields to SamplingParams."""

import re
from typing import Any

from penstock.serve import grammar as grammars
from penstock.serve.grammar import GrammarError
from penstock.serve.packages import MissingPackage
from penstock.serve.params import InvalidParameter, SamplingParams
from penstock.serve.server.errors import bad_request
from penstock.serve.server.protocol import JsonObjectFormat, JsonSchemaFormat, ResponseFormat, SamplingRequest

# These have the name and the meaning of a field of SamplingParams, and its default where they are absent.
SAME = (
    "n",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


def sampling_params(
    request: SamplingRequest, *, max_tokens: int | None, logprobs: int | None, grammar: str | None
) -> SamplingParams:
    """The parameters of a request; 400 for a value, or values together, that cannot be."""
    fields: dict[str, Any] = {name: value for name in SAME if (value := getattr(request, name)) is not None}
    if request.logit_bias:
        fields["logit_bias"] = {int(token_id): bias for token_id, bias in request.logit_bias.items()}
    try:
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, grammar=grammar, **fields)
    except InvalidParameter as error:
        named = re.search("`([a-z_]+)`", str(error))
        raise bad_request(str(error).removeprefix("SamplingParams: "), param=named and named[1]) from error


def format_grammar(wanted: ResponseFormat | None) -> str | None:
    """The grammar of a response_format; None when any text will do."""
    try:
        if isinstance(wanted, JsonSchemaFormat):
            return grammars.json_schema(wanted.json_schema.schema_)
        return grammars.json_object() if isinstance(wanted, JsonObjectFormat) else None
    except (GrammarError, MissingPackage) as error:
        raise bad_request(str(error), param="response_format") from error
