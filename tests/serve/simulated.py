"""A runner without a model: it keeps the runner's side of the contract and checks that every plan keeps the other.

Its KV pool stores the token and position of every entry, and the next token is a hash of the history read back through
the page table. A page given to two requests of different history, one written by both, a position skipped or a chunk lost
fails an assertion.
"""

import zlib
from dataclasses import dataclass, field

from penstock.serve.plan import SlotInit, StepPlan, StepResult, TokenLogprobs, Work


@dataclass
class _Row:
    init: SlotInit
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    sampled: list[int] = field(default_factory=list)


class SimulatedRunner:
    """Answers plans; `rows` is its slot table, `plans` what it was given."""

    has_recurrent_state = False

    def __init__(
        self,
        num_pages: int = 64,
        page_size: int = 4,
        max_model_len: int = 256,
        vocab_size: int = 50,
        eos_token_ids: tuple[int, ...] = (),
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        max_prefill_chunk: int | None = None,
        script: list[int] | None = None,
    ) -> None:
        self.num_pages, self.page_size, self.max_model_len = num_pages, page_size, max_model_len
        self.vocab_size, self.eos_token_ids = vocab_size, eos_token_ids
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_prefill_chunk = max_prefill_chunk
        self.pool: list[list[tuple[int, int] | None]] = [[None] * page_size for _ in range(num_pages)]
        self.rows: dict[int, _Row] = {}
        self.plans: list[StepPlan] = []
        self.script = script  # the tokens of every output, in place of the hash

    def next_token(self, seed: int, history: list[int]) -> int:
        """The token that this model makes after a history."""
        return zlib.crc32(repr((seed, history)).encode()) % self.vocab_size

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        for slot in plan.freed:
            self.rows.pop(slot, None)
        for init in plan.new:
            assert 0 <= init.slot < self.max_num_seqs and init.slot not in self.rows, f"slot {init.slot} is taken"
            self.rows[init.slot] = _Row(init, sampled=list(init.output_token_ids))
        assert plan.num_tokens <= self.max_num_batched_tokens
        works = [*plan.decodes, *plan.prefills]
        assert works and len({work.slot for work in works}) == len(works)
        assert all(len(work.token_ids) == 1 + work.num_draft and work.sample for work in plan.decodes)
        assert not any(work.num_draft for work in plan.prefills)
        tokens: dict[int, list[int]] = {}
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for work in works:
            self._write(self.rows[work.slot], work)
        for work in works:  # after all have written, as in every layer of a model
            row = self.rows[work.slot]
            self._read(row, work)
            if work.sample:
                tokens[work.slot] = [self._sample(row)]
                for guess in work.draft:
                    assert 0 <= guess < self.vocab_size
                    if guess != tokens[work.slot][-1]:
                        break
                    row.computed += 1
                    tokens[work.slot].append(self._sample(row))
                if (count := row.init.params.logprobs) is not None:
                    logprobs[work.slot] = [self._logprobs(token, count) for token in tokens[work.slot]]
        return StepResult(tokens, logprobs)

    def _write(self, row: _Row, work: Work) -> None:
        history = [*row.init.prompt_token_ids, *row.sampled]
        stop = work.start + len(work.token_ids) - work.num_draft
        assert work.token_ids == [*history[work.start : stop], *work.draft] and stop > work.start
        found = work.start - row.computed  # tokens in pages of others
        assert found == 0 or (found > 0 and found % self.page_size == row.computed % self.page_size == 0)
        assert work.sample == (stop == len(history)) and work.num_output == len(row.sampled)
        assert self.max_prefill_chunk is None or stop - work.start <= self.max_prefill_chunk
        assert work.page_index == len(row.pages)
        row.pages += work.new_pages
        assert all(0 <= page < self.num_pages for page in work.new_pages)
        assert len(row.pages) >= -(-(stop + work.num_draft) // self.page_size)
        for position, token in enumerate(work.token_ids, start=work.start):
            page = row.pages[position // self.page_size]
            assert not any(page in other.pages for other in self.rows.values() if other is not row), "a shared page is written"
            self.pool[page][position % self.page_size] = (position, token)
        row.computed = stop

    def _read(self, row: _Row, work: Work) -> None:
        stop = row.computed + work.num_draft
        entries = [self.pool[row.pages[at // self.page_size]][at % self.page_size] for at in range(stop)]
        history = [*row.init.prompt_token_ids, *row.sampled]
        assert entries == list(enumerate([*history[: row.computed], *work.draft])), "a page was overwritten"

    def _sample(self, row: _Row) -> int:
        token = self.next_token(row.init.seed, [*row.init.prompt_token_ids, *row.sampled])
        if self.script is not None:
            token = self.script[len(row.sampled) % len(self.script)]
        row.sampled.append(token)
        return token

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        """The sampled token is the second most likely one, its successor the most likely."""
        ranked = [(token + 1) % self.vocab_size, token, *((token + 2 + at) % self.vocab_size for at in range(count))]
        return TokenLogprobs(ranked[:count], [-0.5 * (at + 1) for at in range(count)], 2, -1.0)
