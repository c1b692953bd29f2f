"""Computes step plans: host tables and device tensors, the decoder, the sampler, CUDA graphs for decode steps.

runner = Runner.load(EngineConfig(model="path/of/checkpoint"))
result = runner.execute(plan)          # see docs/serving.md
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from penstock.serve.config import EngineConfig
from penstock.serve.graphs import DecodeGraphs, Record, cuda_graph_recorder, padded_sizes
from penstock.serve.kv import KVPool, available_memory, size_pool
from penstock.serve.models.batch import Batch
from penstock.serve.models.decoder import Decoder
from penstock.serve.models.parameters import Weights
from penstock.serve.models.spec import ModelError, ModelSpec, read_spec
from penstock.serve.models.weights import Progress, load_weights
from penstock.serve.plan import StepPlan, StepResult, Work
from penstock.serve.sampler import Sampler
from penstock.serve.states import StatePool, slot_bytes

MAX_Q_LEN = 8  # tokens of a request that attention_decode takes


class Runner:
    """One model on one device.

    Attributes:
        num_pages, page_size: the pool that the scheduler hands out.
        max_model_len: the longest prompt and output together.
        vocab_size, eos_token_ids: of the model.
        states: the recurrent states of the slots, None for a model of attention alone.
        has_recurrent_state: whether a request has more to remember than its pages.
    """

    @classmethod
    def load(cls, config: EngineConfig, progress: Progress | None = None) -> "Runner":
        """Reads the checkpoint and takes memory for its pages.

        Args:
            progress: called with (bytes read, bytes in all).
        Raises: ModelError in one sentence when the checkpoint or the memory does not do.
        """
        spec = read_spec(config.model_path)
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, spec)
        weights = load_weights(config.model_path, spec, device=device, dtype=dtype, progress=progress)
        return cls(spec, weights, config)

    def __init__(self, spec: ModelSpec, weights: Weights, config: EngineConfig, *, record: Record | None = None):
        device, dtype = weights.embedding.device, weights.embedding.dtype
        page_size = config.page_size or (64 if device.type == "cuda" else 16)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()
        if (config.max_model_len or 0) > spec.max_context:
            raise ModelError(f"max_model_len {config.max_model_len} is more than the {spec.max_context} positions of the model")
        given = config.kv_cache_bytes
        available = given or available_memory(
            spec,
            device=device,
            dtype=dtype,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_logits=config.max_num_seqs * (1 + config.num_draft_tokens),
        )
        size = size_pool(
            spec,
            page_size=page_size,
            dtype=dtype,
            available=available - config.max_num_seqs * slot_bytes(spec, dtype),
            max_model_len=config.max_model_len,
            fill=given is not None or device.type == "cuda",
            max_num_seqs=config.max_num_seqs,
        )
        self.device = device
        self.dtype = dtype
        self.vocab_size = spec.vocab_size
        self.eos_token_ids = spec.eos_token_ids
        self.page_size = page_size
        self.num_pages = size.num_pages
        self.max_model_len = size.max_model_len
        self.pool = KVPool(spec, size.num_pages, page_size, dtype=dtype, device=device)
        self.has_recurrent_state = bool(spec.mambas)
        self.states = StatePool(spec.mambas, config.max_num_seqs, dtype=dtype, device=device) if spec.mambas else None
        states = self.states.layers if self.states is not None else ()
        self.decoder = Decoder(spec, weights, self.pool.layers, max_model_len=size.max_model_len, states=states)
        self.sampler = Sampler(config.max_num_seqs, spec.vocab_size, spec.eos_token_ids, device)
        self.max_pages = -(-size.max_model_len // page_size)
        self._page_bits = page_size.bit_length() - 1
        # the last row is that of padding
        pages = torch.zeros((config.max_num_seqs + 1, self.max_pages), dtype=torch.int32)
        self._host_pages: np.ndarray = pages.numpy()
        self._pages = pages.to(device)
        limit = 4 * config.max_num_batched_tokens + 8 * config.max_num_seqs + 8
        self._staging = torch.empty(limit, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._host: np.ndarray = self._staging.numpy()
        self._columns: dict[tuple[int, int], _Columns] = {}
        self._gathered_slots: list[int] = []
        self._gathered_pages = self._pages
        self._graphs: list[DecodeGraphs] = []  # by q_len
        if record is not None or (device.type == "cuda" and not config.enforce_eager):
            record = record or cuda_graph_recorder()
            padding = (0, 0, -1, 0, config.max_num_seqs, config.max_num_seqs * self.max_pages, 0)
            q_lens = {q_len for q_len in (1, 1 + config.num_draft_tokens) if q_len <= MAX_Q_LEN}
            with torch.inference_mode():
                for q_len in sorted(q_lens):
                    step = partial(self._decode_step, q_len)
                    sizes = padded_sizes(config.max_num_seqs)
                    self._graphs.append(DecodeGraphs(step, sizes, padding, device=device, q_len=q_len, record=record))

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Computes one step: stores keys and values, and samples where the plan says so."""
        for slot in plan.freed:
            self.sampler.release(slot)
        for new in plan.new:
            self.sampler.admit(new)
        updates = self._take_pages((*plan.decodes, *plan.prefills))
        if not plan.decodes and not plan.prefills:
            return StepResult({}, {})
        if self.states is not None:
            self.states.enter(plan)
        together = self._q_len(plan)
        if together is None:
            # Guesses of several lengths are rows of the prefill, which is where their attention is.
            decodes = [work for work in plan.decodes if not work.num_draft]
            chunks = [*(work for work in plan.decodes if work.num_draft), *plan.prefills]
            sampled = [*decodes, *(work for work in chunks if work.sample)]
            self._write_pages(updates)
            hidden = self._forward(decodes, chunks)
            if not sampled:
                if self.device.type == "cuda":  # the staging buffer is still being read
                    torch.cuda.current_stream().synchronize()
                return StepResult({}, {})
            logits = self.decoder.logits(hidden)
        else:
            q_len, graphs = together
            sampled = plan.decodes
            if graphs is not None and len(updates) <= len(sampled) * q_len:
                logits = self._replay(graphs, sampled, updates)
            else:
                self._write_pages(updates)
                logits = self._decode(sampled, q_len, updates)
            if any(len(work.token_ids) < q_len for work in sampled):
                logits = logits[_own_rows(sampled, q_len).to(self.device)]
        slots = [work.slot for work in sampled]
        num_outputs = [work.num_output for work in sampled]
        drafts = {work.slot: work.draft for work in sampled if work.num_draft}
        if drafts:
            slots = [work.slot for work in sampled for _ in range(1 + work.num_draft)]
            num_outputs = [work.num_output + at for work in sampled for at in range(1 + work.num_draft)]
        if plan.wants_probs:
            token_ids, probs = self.sampler.draw(logits, slots, num_outputs)
            return StepResult(token_ids, {}, probs)
        return StepResult(*self.sampler.sample(logits, slots, num_outputs, drafts, plan.draft_probs, plan.masks))

    def _q_len(self, plan: StepPlan) -> tuple[int, DecodeGraphs | None] | None:
        """Tokens of each request, and what was recorded for as many, where attention_decode does the whole step."""
        if plan.prefills:
            return None
        lengths = {len(work.token_ids) for work in plan.decodes}
        longest = max(lengths)
        for graphs in self._graphs:
            if longest <= graphs.q_len:
                return graphs.q_len, graphs
        return (longest, None) if lengths == {longest} and longest <= MAX_Q_LEN else None

    def _take_pages(self, works: Sequence[Work]) -> list[tuple[int, int]]:
        """Enters new pages in the host's table and returns (index in the flat table, page) for the device's."""
        updates: list[tuple[int, int]] = []
        for work in works:
            if work.new_pages:
                begin, end = work.page_index, work.page_index + len(work.new_pages)
                self._host_pages[work.slot, begin:end] = work.new_pages
                base = work.slot * self.max_pages
                updates.extend(zip(range(base + begin, base + end), work.new_pages, strict=True))
        return updates

    def _write_pages(self, updates: list[tuple[int, int]]) -> None:
        if updates and self.device.type == "cuda":  # on CPU both tables are one
            pairs = torch.tensor(updates, dtype=torch.int64).to(self.device)
            self._pages.view(-1).index_copy_(0, pairs[:, 0], pairs[:, 1].int())

    def _fill_decodes(self, decodes: Sequence[Work], tokens: np.ndarray, requests: np.ndarray, q_len: int = 1) -> None:
        """Writes tokens [3, n · q_len] (id, position, KV slot) and requests [2, n] (length, table row) of the decode rows.

        A request of fewer tokens begins with padding, which is written nowhere: attention counts from the last token.
        """
        # Plain lists: for a few rows numpy's calls cost three times as much, for 64 rows the same.
        page_of, bits, within = self._host_pages.item, self._page_bits, self.page_size - 1
        rows = [work.slot for work in decodes]
        if q_len == 1:
            positions = [work.start for work in decodes]
            kv_slots = [(page_of(row, at >> bits) << bits) + (at & within) for row, at in zip(rows, positions, strict=True)]
            tokens[:] = [work.token_ids[0] for work in decodes], positions, kv_slots
            requests[:] = [at + 1 for at in positions], rows
            return
        columns: list[tuple[int, int, int]] = []
        for work in decodes:
            columns += [(0, 0, -1)] * (q_len - len(work.token_ids))
            for at, token in enumerate(work.token_ids, start=work.start):
                columns.append((token, at, (page_of(work.slot, at >> bits) << bits) + (at & within)))
        tokens[:] = np.array(columns, dtype=np.int32).T
        requests[:] = [work.start + len(work.token_ids) for work in decodes], rows

    def _kv_slots(self, rows: np.ndarray | int, positions: np.ndarray) -> np.ndarray:
        pages = self._host_pages[rows, positions >> self._page_bits]
        return (pages << self._page_bits) + (positions & (self.page_size - 1))

    def _decode(self, decodes: Sequence[Work], q_len: int, updates: list[tuple[int, int]]) -> Tensor:
        """Logits [n · q_len, V] of a step of decodes alone; what can be kept from the last step is."""
        columns = self._columns.get((len(decodes), q_len))
        if columns is None:
            columns = self._columns[len(decodes), q_len] = _Columns(len(decodes), q_len, self.device)
        slots = [work.slot for work in decodes]
        self._fill_decodes(decodes, *columns.values, q_len)
        token_ids, positions, kv_slots, seqlens, rows = columns.upload()
        width = self._width(max(work.start for work in decodes) + q_len)
        if updates or self._gathered_slots != slots or self._gathered_pages.shape[1] != width:
            self._gathered_pages = self._pages[:, :width].index_select(0, rows)
            self._gathered_slots = slots
        plan = self.decoder.plan(seqlens, self.page_size, q_len)
        batch = Batch(
            positions,
            kv_slots,
            self._gathered_pages,
            seqlens,
            len(decodes),
            decode_plan=plan,
            state_slots=rows,
            q_len=q_len,
        )
        return self.decoder.logits(self.decoder.forward(token_ids, batch))

    def _width(self, longest: int) -> int:
        """Columns of the page table that a step needs, rounded up: few distinct shapes, so that checks are remembered."""
        return min(self.max_pages, 1 << (-(-longest // self.page_size) - 1).bit_length())

    def _forward(self, decodes: Sequence[Work], prefills: Sequence[Work]) -> Tensor:
        """Hidden states [n, H] of the tokens that are sampled from, in a step of one-token decodes and of longer chunks."""
        num_decodes, num_tokens = len(decodes), len(decodes) + sum(len(work.token_ids) for work in prefills)
        num_requests = num_decodes + len(prefills)
        num_last = num_decodes + sum(1 + work.num_draft for work in prefills if work.sample)
        sizes = (3 * num_tokens, 2 * num_requests, len(prefills) + 1, num_last)
        ends = np.cumsum(sizes)
        tokens = self._host[: ends[0]].reshape(3, num_tokens)
        requests = self._host[ends[0] : ends[1]].reshape(2, num_requests)
        cu_seqlens, last = self._host[ends[1] : ends[2]], self._host[ends[2] : ends[3]]
        if decodes:
            self._fill_decodes(decodes, tokens[:, :num_decodes], requests[:, :num_decodes])
        last[:num_decodes] = range(num_decodes)
        at, num_sampled, longest_q = num_decodes, num_decodes, 1
        cu_seqlens[0] = 0
        for i, work in enumerate(prefills):
            length = len(work.token_ids)
            where = np.arange(work.start, work.start + length)
            chunk = tokens[:, at : at + length]
            chunk[0], chunk[1], chunk[2] = work.token_ids, where, self._kv_slots(work.slot, where)
            requests[:, num_decodes + i] = work.start + length, work.slot
            at += length
            cu_seqlens[i + 1] = at - num_decodes
            longest_q = max(longest_q, length)
            if work.sample:
                count = 1 + work.num_draft
                last[num_sampled : num_sampled + count] = range(at - count, at)
                num_sampled += count
        width = self._width(int(requests[0].max()))
        self._gathered_slots = []

        packed = self._staging[: ends[3]].to(self.device, non_blocking=True)
        token_ids, positions, kv_slots = packed[: ends[0]].view(3, num_tokens).unbind(0)
        seqlens, rows = packed[ends[0] : ends[1]].view(2, num_requests).unbind(0)
        batch = Batch(
            positions=positions,
            slots=kv_slots,
            page_table=self._pages[:, :width].index_select(0, rows),
            seqlens_k=seqlens,
            num_decodes=num_decodes,
            cu_seqlens_q=packed[ends[1] : ends[2]],
            max_seqlen_q=longest_q,
            decode_plan=self.decoder.plan(seqlens[:num_decodes], self.page_size) if decodes else None,
            state_slots=rows,
        )
        hidden = self.decoder.forward(token_ids, batch)
        return hidden.index_select(0, packed[ends[2] : ends[3]])

    def _replay(self, graphs: DecodeGraphs, decodes: Sequence[Work], updates: list[tuple[int, int]]) -> Tensor:
        """Logits [n · q_len, V] of a step of decodes alone, by the recorded step of the next larger size."""
        count, q_len = len(decodes), graphs.q_len
        columns = graphs.host_inputs(count)
        self._fill_decodes(decodes, columns[:3, : count * q_len], columns[3:5, :count], q_len)
        if updates:
            columns[5:7, : len(updates)] = np.array(updates).T
        return graphs.replay(count)

    def _decode_step(self, q_len: int, columns: Tensor) -> Tensor:
        """The step that is recorded: [len(FIELDS), size · q_len] int32 → logits, with no host read of device data."""
        token_ids, positions, kv_slots, seqlens, rows, update_index, update_page = columns.unbind(0)
        size = columns.shape[1] // q_len
        seqlens = seqlens[:size]
        self._pages.view(-1).index_copy_(0, update_index.long(), update_page)
        batch = Batch(
            positions=positions,
            slots=kv_slots,
            page_table=self._pages.index_select(0, rows[:size]),
            seqlens_k=seqlens,
            num_decodes=size,
            decode_plan=self.decoder.plan(seqlens, self.page_size, q_len),
            q_len=q_len,
            # the row of padding has no state
            state_slots=None if self.states is None else rows.masked_fill(rows == self._pages.shape[0] - 1, -1),
        )
        return self.decoder.logits(self.decoder.forward(token_ids, batch))


def _own_rows(decodes: Sequence[Work], q_len: int) -> Tensor:
    """The rows of [n · q_len] that are not padding."""
    ends = [(end * q_len, len(work.token_ids)) for end, work in enumerate(decodes, start=1)]
    return torch.tensor([row for end, length in ends for row in range(end - length, end)])


def keep_freed_memory() -> None:
    """Lets this process keep up to 64 MiB of freed memory, which every layer would otherwise map and fault in anew.

    glibc returns large freed blocks to the system until one of nearly 32 MiB was freed; that one is never touched. A prefill of
    768 tokens of the small bundled model takes 53 ms instead of 68.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)


def resolve_device(name: str) -> torch.device:
    """ "auto" takes the first CUDA device if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {name} was asked for and torch finds no CUDA device")
    return torch.device(name)


def resolve_dtype(name: str, spec: ModelSpec) -> torch.dtype:
    """ "auto" takes the dtype that the checkpoint's config names."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = spec.dtype if name == "auto" else name
    if name not in dtypes:
        raise ModelError(f"the config names dtype {name}, which is not one of {', '.join(dtypes)}; give one")
    return dtypes[name]


class _Columns:
    """The inputs of a decode step of n requests, int32: token id, position, KV slot [3, n · q_len]; length, row [2, n]."""

    def __init__(self, requests: int, q_len: int, device: torch.device):
        split = 3 * requests * q_len
        self.host = torch.empty(split + 2 * requests, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.on_device = self.host.to(device)  # on a CPU they are one
        flat: np.ndarray = self.host.numpy()
        self.values: tuple[np.ndarray, np.ndarray] = flat[:split].reshape(3, -1), flat[split:].reshape(2, -1)
        self.fields = (*self.on_device[:split].view(3, -1).unbind(0), *self.on_device[split:].view(2, -1).unbind(0))

    def upload(self) -> tuple[Tensor, ...]:
        """The five rows on the device, as filled on the host."""
        if self.on_device is not self.host:
            self.on_device.copy_(self.host, non_blocking=True)
        return self.fields
