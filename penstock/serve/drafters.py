"""Guess the next tokens of requests: from their own text, or with a smaller model.

A guess that is wrong costs time, never a wrong token: the model computes every guess and keeps those it agrees with.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from penstock.serve.pages import PagePool
from penstock.serve.params import SamplingParams
from penstock.serve.plan import DraftRequest, SlotInit, StepPlan, Work

if TYPE_CHECKING:
    from penstock.serve.engine import Runner


class Drafter(Protocol):
    """Whatever guesses tokens."""

    def propose(self, requests: Sequence[DraftRequest]) -> dict[str, list[int]]:
        """Request id → up to `limit` tokens that may come next; a request may be left out."""
        ...


class NgramDrafter:
    """The longest run of last tokens that came before goes on as it did the last time.

    Where that ends at the last token, the guess repeats itself.
    """

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self._sizes = range(min_ngram, max_ngram + 1)
        self._indexes: dict[int, _NgramIndex] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> dict[str, list[int]]:
        indexes = {each.arrival: self._indexes.get(each.arrival) or _NgramIndex(self._sizes) for each in requests}
        self._indexes = indexes  # those of requests that are gone go too
        return {each.request_id: indexes[each.arrival].after(each.token_ids, each.limit) for each in requests}


class _NgramIndex:
    """Where each n-gram of a growing sequence last ended, the one at its end left out."""

    def __init__(self, sizes: range) -> None:
        self._ends: list[tuple[int, dict[tuple[int, ...], int]]] = [(size, {}) for size in reversed(sizes)]
        self._indexed = 0

    def after(self, tokens: Sequence[int], limit: int) -> list[int]:
        for size, ends in self._ends:
            for end in range(max(size, self._indexed), len(tokens)):
                ends[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
        for size, ends in self._ends:
            before = ends.get(tuple(tokens[-size:]))
            if before is not None:
                following = list(tokens[before : before + limit])
                return [following[at % len(following)] for at in range(limit)]
        return []


@dataclass(slots=True)
class _Row:
    """A request in the tables of the smaller model."""

    slot: int
    pages: list[int] = field(default_factory=list)
    num_sent: int = 0  # pages that the runner knows of
    num_computed: int = 0
    base: int = 0  # tokens the request had when it was last guessed for
    draft: list[int] = field(default_factory=list)
    probs: list[Any] = field(default_factory=list)  # for each of draft what it was drawn from


class DraftModel:
    """A smaller model draws the next tokens with the parameters and the seed of the request itself.

    It so makes the draws that the model will make wherever the two agree, not only those of temperature 0. It has its own
    pages; a request that finds none is not guessed for.

    Args:
        runner: of the smaller model.
        max_num_seqs, max_num_batched_tokens: that it was made for.
        keep_probs: keep what the guesses were drawn from, for verification by rejection.
    """

    def __init__(self, runner: "Runner", *, max_num_seqs: int, max_num_batched_tokens: int, keep_probs: bool = False) -> None:
        self.probs: dict[int, list[Any]] = {}  # slot of the request → [V] for each guess of the last proposal
        self.vocab_size = runner.vocab_size
        self.keep_probs = keep_probs
        self._runner = runner
        self._max_tokens = max_num_batched_tokens
        self._pages = PagePool(runner.num_pages)
        self._free_slots = list(range(max_num_seqs))
        self._rows: OrderedDict[int, _Row] = OrderedDict()  # by arrival, longest unused first
        self._new: list[SlotInit] = []
        self._freed: list[int] = []

    def propose(self, requests: Sequence[DraftRequest]) -> dict[str, list[int]]:
        served = [(request, row) for request in requests if (row := self._admit(request, requests)) is not None]
        drafts: dict[str, list[int]] = {}
        try:
            for request, row in served:
                row.base, row.draft, row.probs = len(request.token_ids), drafts.setdefault(request.request_id, []), []
            while active := [(request, row) for request, row in served if len(row.draft) < request.limit]:
                self._advance(active)
        except BaseException:
            self._new = []
            self._forget(list(self._rows))
            raise
        self.probs = {request.slot: row.probs for request, row in served if row.probs}
        return drafts

    def _admit(self, request: DraftRequest, others: Sequence[DraftRequest]) -> _Row | None:
        """The row of a request with pages for all that will be computed, or None."""
        size, tokens = self._runner.page_size, request.token_ids
        last = len(tokens) + request.limit - 1
        row = self._rows.get(request.arrival)
        unseen = tokens if row is None else tokens[row.base :]
        if last > self._runner.max_model_len or max(unseen, default=0) >= self._runner.vocab_size:
            return None
        here = {other.arrival for other in others}
        missing = -(-last // size) - (0 if row is None else len(row.pages))
        idle = [arrival for arrival in self._rows if arrival not in here]
        while idle and (missing > self._pages.num_free or (row is None and not self._free_slots)):
            self._forget([idle.pop(0)])
        if missing > self._pages.num_free or (row is None and not self._free_slots):
            return None
        if row is None:
            row = self._rows[request.arrival] = _Row(self._free_slots.pop())
        if row.num_computed == 0 or _is_penalised(request.params):
            prompt, output = list(tokens[: request.num_prompt]), list(tokens[request.num_prompt :])
            params = request.params if request.params.logprobs is None else replace(request.params, logprobs=None)
            self._new.append(SlotInit(row.slot, request.request_id, prompt, output, params, request.seed))
        self._rows.move_to_end(request.arrival)
        agreed = row.base
        for guess, token in zip(row.draft, tokens[row.base :], strict=False):
            if guess != token:
                break
            agreed += 1
        row.num_computed = min(row.num_computed, agreed, len(tokens) - 1)
        if missing > 0:
            row.pages += self._pages.allocate(missing)
        return row

    def _advance(self, active: list[tuple[DraftRequest, _Row]]) -> None:
        """One step of the smaller model: a guess more for the requests of which it has computed all tokens."""
        budget = self._max_tokens
        works: list[tuple[_Row, Work]] = []
        for request, row in active:
            tokens = [*request.token_ids[row.num_computed : row.base], *row.draft[max(0, row.num_computed - row.base) :]]
            count = min(len(tokens), budget)
            if count:
                num_output = row.base + len(row.draft) - request.num_prompt
                sample = count == len(tokens)
                sent, row.num_sent = row.num_sent, len(row.pages)
                work = Work(row.slot, tokens[:count], row.num_computed, sent, row.pages[sent:], sample, num_output)
                works.append((row, work))
                budget -= count
        decodes = [work for _, work in works if len(work.token_ids) == 1 and work.sample]
        prefills = [work for _, work in works if len(work.token_ids) > 1 or not work.sample]
        plan = StepPlan(self._new, decodes, prefills, self._freed, wants_probs=self.keep_probs)
        self._new, self._freed = [], []
        result = self._runner.execute(plan)
        for row, work in works:
            row.num_computed += len(work.token_ids)
            if work.sample:
                row.draft += result.token_ids[work.slot]
                if work.slot in result.probs:
                    row.probs.append(result.probs[work.slot])

    def _forget(self, arrivals: Sequence[int]) -> None:
        for arrival in arrivals:
            row = self._rows.pop(arrival)
            self._pages.release(row.pages)
            self._free_slots.append(row.slot)
            self._freed.append(row.slot)


def _is_penalised(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
