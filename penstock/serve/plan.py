"""What crosses between the scheduler and the runner: one plan per step, one result back."""

from dataclasses import dataclass, field

from penstock.serve.params import SamplingParams


@dataclass(frozen=True, slots=True)
class SlotInit:
    """A request enters, or after a preemption re-enters, a row of the runner's tables."""

    slot: int  # 0 … max_num_seqs - 1
    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int]  # already emitted before a preemption; empty at first
    params: SamplingParams
    seed: int  # resolved: params.seed or the engine's draw


@dataclass(frozen=True, slots=True)
class Work:
    """One request's part of one step."""

    slot: int
    token_ids: list[int]  # the tokens to compute, at positions start … start + len - 1
    start: int
    page_index: int  # where new_pages begin in this slot's row of the page table
    new_pages: list[int]  # pages taken for this step (often empty)
    sample: bool  # sample from the last token's logits (False for all but the last prefill chunk)
    num_output: int  # tokens emitted so far; the sampled one will be number num_output


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything the runner does in one step; `freed` comes before `new`, which may reuse a slot named there.

    A slot may be named in `freed` although its `new` never reached the runner, when a step was interrupted.
    """

    new: list[SlotInit]
    decodes: list[Work]  # len(token_ids) == 1 and sample; first in the batch
    prefills: list[Work]  # chunks, in first-come order
    freed: list[int]  # slots whose request ended or was preempted since the last plan
    masks: dict[int, list[bytes]] = field(default_factory=dict)  # slot → tokens that its rows may sample, a bit each

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return len(self.decodes) + sum(len(work.token_ids) for work in self.prefills)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the most likely tokens, and the sampled one."""

    token_ids: list[int]  # the params.logprobs most likely tokens, most likely first
    logprobs: list[float]  # theirs, in the same order
    sampled_rank: int  # 1 when the sampled token is the most likely one
    sampled_logprob: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the runner answers to a plan."""

    token_ids: dict[int, int]  # slot → sampled token, one for every Work with sample=True
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # slot → only where params.logprobs asks
