"""The sampling state of every slot, and the choice of each row's next token."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from penstock.ops import apply_penalties, log_probs, sample
from penstock.serve.params import SamplingParams
from penstock.serve.plan import SlotInit, TokenLogprobs

_TEMPERATURE, _TOP_P, _MIN_P, _REPETITION, _PRESENCE, _FREQUENCY = range(6)
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
        self, logits: Tensor, slots: list[int], num_outputs: list[int], masks: Mapping[int, Sequence[bytes]] = NO_MASKS
    ) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """The next token of each row, and the log-probabilities of the slots that want them.

        Args:
            logits: [n, V] float32; changed in place.
            slots: the slot of each row.
            num_outputs: tokens each row has emitted.
            masks: slot → for each of its rows the tokens that may be sampled, bit t % 8 of byte t // 8 for token t.
        """
        changed = bool(self._penalised or self._held or self._biased or masks)
        if not (self._drawn or self._reported or changed):
            if logits.is_cuda:
                return logits.argmax(-1).tolist(), {}
            return logits.numpy().argmax(-1).tolist(), {}  # several times as fast as torch's on a CPU
        if slots != self._rows:
            self._gather(slots)
        reported = [row for row, slot in enumerate(slots) if slot in self._reported] if self._reported else []
        raw = logits.clone() if reported and changed else logits
        penalised = [row for row, slot in enumerate(slots) if slot in self._penalised] if self._penalised else []
        if penalised:
            self._penalise(logits, slots, penalised)
        if self._held:
            self._hold(logits, slots, num_outputs)
        if self._biased:
            self._bias(logits, slots)
        if masks:
            self._forbid(logits, slots, masks)
        offsets = self._any_offsets if self._greedy else torch.tensor(num_outputs, dtype=torch.int64).to(self.device)
        ids = sample(logits, offsets=offsets, **self._gathered)
        if penalised:
            self._add_counts(slots, penalised, ids)
        token_ids = ids.tolist()
        return token_ids, self._report(raw, ids, slots, reported) if reported else {}

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

    def _penalise(self, logits: Tensor, slots: list[int], rows: list[int]) -> None:
        assert self.counts is not None and self.prompt_mask is not None
        index = torch.tensor([slots[row] for row in rows])
        repetition, presence, frequency = self.numbers[_REPETITION:].index_select(1, index).to(self.device).unbind(0)
        where, index = torch.tensor(rows, device=self.device), index.to(self.device)
        logits[where] = apply_penalties(
            logits[where],
            self.counts.index_select(0, index),
            self.prompt_mask.index_select(0, index),
            repetition=repetition,
            presence=presence,
            frequency=frequency,
        )

    def _add_counts(self, slots: list[int], rows: list[int], ids: Tensor) -> None:
        assert self.counts is not None
        index = torch.tensor([slots[row] for row in rows], device=self.device)
        chosen = ids[torch.tensor(rows, device=self.device)].long()
        self.counts[index, chosen] += 1

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

    def _report(self, logits: Tensor, ids: Tensor, slots: list[int], rows: list[int]) -> dict[int, TokenLogprobs]:
        """Log-probabilities of the model itself, before penalties and temperature."""
        index = torch.tensor(rows, device=self.device)
        wanted = [self.params[slots[row]].logprobs or 0 for row in rows]
        chosen, ranks, tokens, values = log_probs(logits[index], ids[index], top_n=min(max(wanted), self.vocab_size))
        columns = zip(rows, wanted, chosen.tolist(), ranks.tolist(), values.tolist(), tokens.tolist(), strict=True)
        return {
            slots[row]: TokenLogprobs(tokens[:count], values[:count], rank, chosen)
            for row, count, chosen, rank, values, tokens in columns
        }
