"""Launch configs: the default without a table, the table's config with one, and a table that does not fit is refused."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from penstock.core.tuning import Tunable, read_table, tuned, watching, write_table

CPU, META = torch.device("cpu"), torch.device("meta")


@dataclass(frozen=True)
class Launch:
    rows: int
    num_warps: int


def default(N: int, paged: bool) -> Launch:
    return Launch(1, 4)


def candidates(N: int, paged: bool):
    yield Launch(2, 8)


@pytest.fixture
def tunable(tmp_path) -> Tunable[Launch]:
    return Tunable(default, candidates, tmp_path / "x_tuned.json")


def test_without_a_table_the_default(tunable):
    assert tunable.on(CPU, 64, True) == tunable(64, True) == Launch(1, 4)


def test_a_table_by_device_and_signature(tunable):
    write_table(tunable.table, "NVIDIA H200", {"N=64 paged=True": Launch(2, 8)})
    write_table(tunable.table, "NVIDIA H200", {"N=128 paged=True": Launch(4, 8)})
    write_table(tunable.table, "Triton interpreter", {"N=64 paged=True": Launch(8, 8)})
    assert tunable.on(META, 64, True) == Launch(2, 8)
    assert tunable.on(META, 128, True) == Launch(4, 8)
    assert tunable.on(META, 64, False) == Launch(1, 4)
    assert tunable.on(CPU, 64, True) == Launch(8, 8)
    assert list(read_table(tunable.table)["NVIDIA H200"]) == ["N=128 paged=True", "N=64 paged=True"]
    assert [path.name for path in tunable.table.parent.iterdir()] == ["x_tuned.json"]


def test_a_look_up_reads_no_file_again(tunable):
    assert tunable.on(META, 64, True) == Launch(1, 4)
    write_table(tunable.table, "NVIDIA H200", {"N=64 paged=True": Launch(2, 8)})
    assert tunable.on(META, 64, True) == Launch(1, 4)
    tunable.forget()
    assert tunable.on(META, 64, True) == Launch(2, 8)


def test_an_entry_with_other_fields_is_refused(tunable):
    tunable.table.write_text(json.dumps({"NVIDIA H200": {"N=64 paged=True": {"rows": 1, "stages": 2}}}))
    with pytest.raises(ValueError, match="N=64 paged=True must have num_warps, rows, got rows, stages"):
        tunable.on(META, 64, True)


def test_forced_and_watched(tunable):
    with watching() as seen, tunable.forced(Launch(16, 16)):
        assert tunable.on(META, 64, True) == Launch(16, 16)
    assert seen == [(tunable, (64, True))]
    assert tunable.on(META, 64, True) == Launch(1, 4)
    assert len(seen) == 1


def test_the_table_lies_beside_the_kernel():
    made = tuned(candidates)(default)
    assert made.table == Path(__file__).with_name("test_tuning_tuned.json")
    assert made.type is Launch
    assert made.__name__ == "default"


def test_a_default_without_a_dataclass_is_refused(tmp_path):
    path = tmp_path / "y_tuned.json"
    path.write_text('{"NVIDIA H200": {"N=1": {}}}')
    with pytest.raises(TypeError, match="must be annotated to return a dataclass, got <class 'int'>"):
        Tunable(_number, candidates, path).on(META, 1)


def _number(N: int) -> int:
    return N
