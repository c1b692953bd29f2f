"""A tensor's leading dimensions seen as rows that lie at outer · stride + inner · stride: what a row-wise kernel addresses."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Row r starts (r // inner) · outer_stride + (r % inner) · inner_stride elements after the first."""

    count: int
    inner: int
    outer_stride: int
    inner_stride: int

    def strides(self, inner: int) -> tuple[int, int]:
        """The two strides when the rows are walked as `inner` rows at a time; a single stride serves any `inner`."""
        if self.inner == 1:
            return self.outer_stride * inner, self.outer_stride
        return self.outer_stride, self.inner_stride


def fold_rows(tensor: Tensor) -> Rows | None:
    """The rows of a tensor, or None when its leading dimensions do not fold into two."""
    folded: list[list[int]] = []
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * stride:
            folded[-1] = [folded[-1][0] * size, stride]
        else:
            folded.append([size, stride])
    if len(folded) > 2:
        return None
    count = tensor.numel() // max(tensor.shape[-1], 1)
    if len(folded) == 2:
        return Rows(count, folded[1][0], folded[0][1], folded[1][1])
    return Rows(count, 1, folded[0][1] if folded else 0, 0)


def unfit_rows(**tensors: Tensor | None) -> str | None:
    """Why a row-wise kernel cannot walk these tensors together, or None when it can."""
    walked: dict[str, Rows] = {}
    for name, tensor in tensors.items():
        if tensor is None or tensor.numel() == 0:
            continue
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of `{name}` has stride {tensor.stride(-1)}, the kernel reads stride 1"
        rows = fold_rows(tensor)
        if rows is None:
            return f"the leading dimensions of `{name}` do not fold into two: strides {list(tensor.stride())}"
        if rows.inner > 1:
            walked[name] = rows
    sizes = {rows.inner for rows in walked.values()}
    return f"{', '.join(walked)} fold into different rows: {sorted(sizes)}" if len(sizes) > 1 else None


def walk_rows(*tensors: Tensor) -> tuple[int, int, list[int]]:
    """(rows, inner size, two strides of each tensor) of tensors that `unfit_rows` found fit."""
    folds = []
    for tensor in tensors:
        rows = fold_rows(tensor)
        if rows is None:
            raise ValueError(f"strides {list(tensor.stride())} of shape {list(tensor.shape)} do not fold into rows")
        folds.append(rows)
    inner = max(rows.inner for rows in folds)
    return folds[0].count, inner, [stride for rows in folds for stride in rows.strides(inner)]
