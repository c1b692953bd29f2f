"""Decode steps recorded as CUDA graphs over padded batch sizes.

One small int32 matrix holds all that changes from step to step, a column a token. A step is: fill the matrix on the host,
copy it to the device, replay. Padding columns have length 0 and write nowhere. With q_len tokens a request the first three
fields have a column for each token, seqlen and table_row use the first of their columns, one for each request.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

FIELDS = ("token_id", "position", "kv_slot", "seqlen", "table_row", "update_index", "update_page")
Step = Callable[[Tensor], Tensor]
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def padded_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that are recorded: powers of two, and the largest batch itself."""
    sizes = [1 << i for i in range(max_num_seqs.bit_length()) if 1 << i < max_num_seqs]
    return [*sizes, max_num_seqs]


def cuda_graph_recorder() -> Record:
    """A recorder whose graphs share one memory pool; each call gives (replay, the result that it writes)."""
    pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compilers and libraries settle before the recording
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = step()
        return graph.replay, result

    return record


class DecodeGraphs:
    """Recorded decode steps.

    Args:
        step: the whole step on the device, from [len(FIELDS), size · q_len] int32 to logits [size · q_len, V].
        sizes: padded batch sizes, ascending.
        padding: one value for each of FIELDS.
        q_len: tokens of each request.
        record: records a call; None records CUDA graphs.
    """

    def __init__(
        self,
        step: Step,
        sizes: Sequence[int],
        padding: Sequence[int],
        *,
        device: torch.device,
        q_len: int = 1,
        record: Record | None = None,
    ):
        record = cuda_graph_recorder() if record is None else record
        self.sizes = list(sizes)
        self.q_len = q_len
        self.padding = np.array(padding, dtype=np.int32)[:, None]
        self._recorded: dict[int, tuple[Tensor, Tensor, Callable[[], object], Tensor]] = {}
        for size in reversed(self.sizes):  # the largest first: the smaller ones then live in its memory
            host = torch.empty((len(FIELDS), size * q_len), dtype=torch.int32, pin_memory=device.type == "cuda")
            host.numpy()[:] = self.padding
            inputs = host.to(device, copy=True)
            replay, logits = record(partial(step, inputs))
            self._recorded[size] = (host, inputs, replay, logits)

    def size_for(self, rows: int) -> int:
        """The smallest recorded size with room for the requests."""
        return next(size for size in self.sizes if size >= rows)

    def host_inputs(self, rows: int) -> np.ndarray:
        """The host matrix of the size for this many requests, all padding; the first columns are to be filled."""
        values = self._recorded[self.size_for(rows)][0].numpy()
        values[:] = self.padding
        return values

    def replay(self, rows: int) -> Tensor:
        """Runs the step on the filled host matrix; logits [rows · q_len, V], valid until the next replay."""
        host, inputs, replay, logits = self._recorded[self.size_for(rows)]
        inputs.copy_(host, non_blocking=True)
        replay()
        return logits[: rows * self.q_len]
