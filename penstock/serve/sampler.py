"""The sampling state of every slot, and the choice of each row's next token."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from penstock.ops import apply_penalties, log_probs, sample, verify_draft
from penstock.serve.params import SamplingParams
from penstock.serve.plan import SlotInit, TokenLogprobs

_TEMPERATURE, _TOP_P, _MIN_P, _REPETITION, _PRESENCE, _FREQUENCY = range(6)
NO_DRAFTS: Mapping[int, Sequence[int]] = MappingProxyType({})
NO_PROBS: Mapping[int, Sequence[Tensor]] = MappingProxyType({})
NO_MASKS: Mapping[int, Sequence[bytes]] = MappingProxyType({})


class Sampler:
    """Per-slot sampling parameters kept on the device, and the penalty tables once a request needs them.

    What a slot samples depends on its own parameters, seed, position in its output and logits alone.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device):
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.device = device
        self.params: dict[int, SamplingParams] = {}
        self.numbers = torch.zeros((6, max_num_seqs), dtype=torch.float32)
        self.top_k = torch.zeros(max_num_seqs, dtype=torch.int32)
        self.seeds = torch.zeros(max_num_seqs, dtype=torch.int64)
        self.counts: Tensor | None = None  # [max_num_seqs, V] int32, output tokens
        self.prompt_mask: Tensor | None = None  # [max_num_seqs, V] bool
        self._drawn: set[int] = set()  # slots with temperature > 0
        self._penalised: set[int] = set()
        self._held: set[int] = set()  # slots with min_tokens
        self._reported: set[int] = set()  # slots with logprobs
        self._biased: set[int] = set()  # slots with logit_bias
        self._rows: list[int] = []  # the slots that _gathered was made for
        self._gathered: dict[str, Any] = {}
        self._greedy = True  # no row of _gathered is drawn, so that offsets do not matter
        self._any_offsets = self.seeds[:0]

    def admit(self, new: SlotInit) -> None:
        """A request takes a slot."""
        slot, params = new.slot, new.params
        self.release(slot)
        self.params[slot] = params
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self.numbers[:, slot] = torch.tensor((params.temperature, params.top_p, params.min_p, *penalties))
        self.top_k[slot] = min(params.top_k, self.vocab_size)
        self.seeds[slot] = new.seed
        if params.temperature > 0:
            self._drawn.add(slot)
        if params.min_tokens > 0:
            self._held.add(slot)
        if params.logprobs is not None:
            self._reported.add(slot)
        if params.logit_bias:
            self._biased.add(slot)
        if penalties != (1.0, 0.0, 0.0):
            self._penalised.add(slot)
            self._count(new)

    def release(self, slot: int) -> None:
        """The request of a slot is gone; a slot that is free already stays so."""
        self.params.pop(slot, None)
        for slots in (self._drawn, self._penalised, self._held, self._reported, self._biased):
            slots.discard(slot)
        self._rows = []

    def sample(
        self,
        logits: Tensor,
        slots: list[int],
        num_outputs: list[int],
        drafts: Mapping[int, Sequence[int]] = NO_DRAFTS,
        draft_probs: Mapping[int, Sequence[Tensor]] = NO_PROBS,
        masks: Mapping[int, Sequence[bytes]] = NO_MASKS,
    ) -> tuple[dict[int, list[int]], dict[int, list[TokenLogprobs]]]:
        """The next tokens of each slot, and their log-probabilities for the slots that want them.

        Args:
            logits: [n, V] float32; changed in place. A slot has one row, and one more for each token of its draft.
            slots: the slot of each row.
            num_outputs: tokens each row's request has emitted, and those of its draft before the row.
            drafts: slot → guesses; a guess that is drawn itself is right, and the next row then counts.
            draft_probs: slot → for each guess the distribution [V] that it was drawn from; it is then accepted or replaced so
                that the tokens have the distribution of the model.
            masks: slot → for each of its rows the tokens that may be sampled, bit t % 8 of byte t // 8 for token t.
        """
        changed = bool(self._penalised or self._held or self._biased or masks)
        if not (self._drawn or self._reported or changed):
            # numpy is several times as fast as torch on a CPU
            best = logits.argmax(-1).tolist() if logits.is_cuda else logits.numpy().argmax(-1).tolist()
            return matched(best, slots, drafts), {}
        if slots != self._rows:
            self._gather(slots)
        reported = bool(self._reported) and not self._reported.isdisjoint(slots)
        raw = logits.clone() if reported and changed else logits
        self._adjust(logits, slots, num_outputs, drafts, masks)
        offsets = self._any_offsets if self._greedy else torch.tensor(num_outputs, dtype=torch.int64).to(self.device)
        token_ids = matched(sample(logits, offsets=offsets, **self._gathered).tolist(), slots, drafts)
        verified = [slot for slot in drafts if slot in self._drawn and slot in draft_probs]
        if verified:
            token_ids |= self._verify(logits, slots, num_outputs, verified, drafts, draft_probs)
        if self._penalised:
            self._add_counts(token_ids)
        return token_ids, self._report(raw, slots, token_ids) if reported else {}

    def draw(self, logits: Tensor, slots: list[int], num_outputs: list[int]) -> tuple[dict[int, list[int]], dict[int, Tensor]]:
        """The next token of each slot, and the distribution [V] that it was drawn from where the temperature is not 0."""
        if slots != self._rows:
            self._gather(slots)
        self._adjust(logits, slots, num_outputs, NO_DRAFTS, NO_MASKS)
        index = torch.tensor(slots, dtype=torch.int64)
        temperature, top_p, min_p = (row.to(self.device) for row in self.numbers[:3].index_select(1, index))
        drawn = restricted(logits, temperature, self.top_k.index_select(0, index).to(self.device), top_p, min_p)
        offsets = torch.tensor(num_outputs, dtype=torch.int64).to(self.device)
        ids = sample(drawn, temperature=(temperature > 0).float(), seeds=self._gathered["seeds"], offsets=offsets)
        token_ids = matched(ids.tolist(), slots, NO_DRAFTS)
        if self._penalised:
            self._add_counts(token_ids)
        probs = drawn.softmax(-1)
        return token_ids, {slot: probs[row] for row, slot in enumerate(slots) if slot in self._drawn}

    def _adjust(
        self,
        logits: Tensor,
        slots: list[int],
        num_outputs: list[int],
        drafts: Mapping[int, Sequence[int]],
        masks: Mapping[int, Sequence[bytes]],
    ) -> None:
        """All that changes logits before the temperature, in place."""
        if self._penalised:
            self._penalise(logits, slots, drafts)
        if self._held:
            self._hold(logits, slots, num_outputs)
        if self._biased:
            self._bias(logits, slots)
        if masks:
            self._forbid(logits, slots, masks)

    def _verify(
        self,
        logits: Tensor,
        slots: list[int],
        num_outputs: list[int],
        verified: list[int],
        drafts: Mapping[int, Sequence[int]],
        draft_probs: Mapping[int, Sequence[Tensor]],
    ) -> dict[int, list[int]]:
        """The next tokens of slots whose guesses were drawn, by rejection; shorter drafts end with -1."""
        longest = max(len(drafts[slot]) for slot in verified)
        first = [slots.index(slot) for slot in verified]
        last = [row + len(drafts[slot]) for row, slot in zip(first, verified, strict=True)]
        rows = [[min(begin + at, end) for at in range(longest + 1)] for begin, end in zip(first, last, strict=True)]
        ids = torch.full((len(verified), longest), -1, dtype=torch.int32)
        probs = logits.new_zeros(len(verified), longest, logits.shape[1])
        for row, slot in enumerate(verified):
            count = len(drafts[slot])
            ids[row, :count] = torch.tensor(drafts[slot])
            probs[row, :count] = torch.stack(list(draft_probs[slot][:count]))
        index = torch.tensor(verified)
        temperature, top_p, min_p = (row.to(self.device) for row in self.numbers[:3].index_select(1, index))
        accepted, following = verify_draft(
            ids.to(self.device),
            probs,
            logits[torch.tensor(rows, device=self.device)],
            temperature=temperature,
            top_k=self.top_k.index_select(0, index).to(self.device),
            top_p=top_p,
            min_p=min_p,
            seeds=self.seeds.index_select(0, index).to(self.device),
            offsets=torch.tensor([num_outputs[row] for row in first], dtype=torch.int64).to(self.device),
        )
        columns = zip(verified, accepted.tolist(), following.tolist(), strict=True)
        return {slot: tokens[: count + 1] for slot, count, tokens in columns}

    def _gather(self, slots: list[int]) -> None:
        """Collects the parameters of the rows; an option that no row uses stays a number, which costs nothing."""
        index = torch.tensor(slots, dtype=torch.int64)
        numbers = self.numbers.index_select(1, index)
        top_k = self.top_k.index_select(0, index)
        options: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        self._greedy = self._drawn.isdisjoint(slots)
        if not self._greedy:
            options["temperature"] = numbers[_TEMPERATURE]
            if bool(top_k.any()):
                options["top_k"] = top_k
            if bool((numbers[_TOP_P] < 1).any()):
                options["top_p"] = numbers[_TOP_P]
            if bool(numbers[_MIN_P].any()):
                options["min_p"] = numbers[_MIN_P]
        options["seeds"] = self.seeds.index_select(0, index)
        self._gathered = {
            name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in options.items()
        }
        self._any_offsets = self._gathered["seeds"]
        self._rows = list(slots)

    def _count(self, new: SlotInit) -> None:
        """Fills the slot's rows of the penalty tables from its tokens so far."""
        if self.counts is None or self.prompt_mask is None:
            shape = (self.numbers.shape[1], self.vocab_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self.prompt_mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        output = torch.tensor(new.output_token_ids, dtype=torch.int64)
        self.counts[new.slot] = output.bincount(minlength=self.vocab_size).to(self.device, torch.int32)
        self.prompt_mask[new.slot] = False
        self.prompt_mask[new.slot, torch.tensor(new.prompt_token_ids, dtype=torch.int64, device=self.device)] = True

    def _penalise(self, logits: Tensor, slots: list[int], drafts: Mapping[int, Sequence[int]]) -> None:
        assert self.counts is not None and self.prompt_mask is not None
        rows = [row for row, slot in enumerate(slots) if slot in self._penalised]
        if not rows:
            return
        index = torch.tensor([slots[row] for row in rows])
        repetition, presence, frequency = self.numbers[_REPETITION:].index_select(1, index).to(self.device).unbind(0)
        where, index = torch.tensor(rows, device=self.device), index.to(self.device)
        counts = self.counts.index_select(0, index)
        if drafts:  # a row sees the guesses before it as output
            before = [drafts.get(slots[row], ())[: row - slots.index(slots[row])] for row in rows]
            _add(counts, [(at, token) for at, guesses in enumerate(before) for token in guesses])
        logits[where] = apply_penalties(
            logits[where],
            counts,
            self.prompt_mask.index_select(0, index),
            repetition=repetition,
            presence=presence,
            frequency=frequency,
        )

    def _add_counts(self, token_ids: Mapping[int, Sequence[int]]) -> None:
        assert self.counts is not None
        _add(self.counts, [(slot, token) for slot, run in token_ids.items() if slot in self._penalised for token in run])

    def _hold(self, logits: Tensor, slots: list[int], num_outputs: list[int]) -> None:
        """Before a request has its min_tokens, the tokens that would end it cannot be drawn."""
        rows: list[int] = []
        tokens: list[int] = []
        for row, (slot, emitted) in enumerate(zip(slots, num_outputs, strict=True)):
            if slot in self._held and emitted < self.params[slot].min_tokens:
                params = self.params[slot]
                ends = {*params.stop_tokens, *(() if params.ignore_eos else self.eos_token_ids)}
                tokens += [token for token in sorted(ends) if token < self.vocab_size]
                rows += [row] * (len(tokens) - len(rows))
        if rows:
            logits[torch.tensor(rows, device=self.device), torch.tensor(tokens, device=self.device)] = -torch.inf

    def _bias(self, logits: Tensor, slots: list[int]) -> None:
        for row, slot in enumerate(slots):
            if slot in self._biased:
                tokens, values = zip(*self.params[slot].token_biases, strict=True)
                index = torch.tensor(tokens, device=self.device)
                logits[row].index_add_(0, index, torch.tensor(values, dtype=logits.dtype, device=self.device))

    def _forbid(self, logits: Tensor, slots: list[int], masks: Mapping[int, Sequence[bytes]]) -> None:
        """Minus infinity for the tokens that a mask leaves out."""
        rows = [row for row, slot in enumerate(slots) if slot in masks]
        left = {slot: iter(own) for slot, own in masks.items()}
        words = torch.frombuffer(bytearray(b"".join(next(left[slots[row]]) for row in rows)), dtype=torch.uint8)
        words = words.view(len(rows), -1).to(self.device)
        bits = words[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=self.device) & 1
        allowed = bits.flatten(1)[:, : self.vocab_size].bool()
        where = torch.tensor(rows, device=self.device)
        logits[where] = logits[where].masked_fill(~allowed, -torch.inf)

    def _report(
        self, logits: Tensor, slots: list[int], token_ids: Mapping[int, Sequence[int]]
    ) -> dict[int, list[TokenLogprobs]]:
        """Log-probabilities of the model itself, before penalties and temperature."""
        runs = {slot: run for slot, run in token_ids.items() if slot in self._reported}
        rows = [slots.index(slot) + at for slot, run in runs.items() for at in range(len(run))]
        sampled = torch.tensor([token for run in runs.values() for token in run], dtype=torch.int32, device=self.device)
        wanted = [self.params[slots[row]].logprobs or 0 for row in rows]
        index = torch.tensor(rows, device=self.device)
        chosen, ranks, tokens, values = log_probs(logits[index], sampled, top_n=min(max(wanted), self.vocab_size))
        columns = zip(rows, wanted, chosen.tolist(), ranks.tolist(), values.tolist(), tokens.tolist(), strict=True)
        report: dict[int, list[TokenLogprobs]] = {slot: [] for slot in runs}
        for row, count, own, rank, likely, ids in columns:
            report[slots[row]].append(TokenLogprobs(ids[:count], likely[:count], rank, own))
        return report


def matched(sampled: list[int], slots: list[int], drafts: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """Slot → the sampled tokens up to the first that is not the guess for its place, that one included."""
    if not drafts:
        return {slot: [token] for slot, token in zip(slots, sampled, strict=True)}
    runs: dict[int, list[int]] = {}
    row = 0
    while row < len(slots):
        draft = drafts.get(slots[row], ())
        run = runs[slots[row]] = sampled[row : row + 1]
        for guess, token in zip(draft, sampled[row + 1 : row + 1 + len(draft)], strict=True):
            if guess != run[-1]:
                break
            run.append(token)
        row += 1 + len(draft)
    return runs


def restricted(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[n, V] logits over the temperature, -inf for what top-k, top-p and min-p leave out; by row, temperature 0 counts as 1."""
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    ordered, order = scaled.sort(descending=True, stable=True)
    ranks = torch.arange(logits.shape[1], device=logits.device)
    kept = (top_k[:, None] <= 0) | (ranks < top_k[:, None])
    probs = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
    kept &= (probs.cumsum(-1) - probs < top_p[:, None]) & (probs >= min_p[:, None] * probs[:, :1])
    return scaled.masked_fill(~torch.zeros_like(kept).scatter(1, order, kept), -torch.inf)


def _add(counts: Tensor, pairs: list[tuple[int, int]]) -> None:
    """One more at each (row, token)."""
    if pairs:
        rows, tokens = torch.tensor(pairs, device=counts.device).unbind(1)
        counts.index_put_((rows, tokens), torch.ones_like(rows, dtype=counts.dtype), accumulate=True)
