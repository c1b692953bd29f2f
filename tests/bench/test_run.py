"""A benchmark of an operator: the gate decides who gets a number, peers are judged too, files hold everything."""

import json

import pytest
import torch

from penstock.bench import record, report
from penstock.bench.host import pick_us, recorded
from penstock.bench.inputs import rotation, tensors_of
from penstock.bench.peers import compiled_reference, peers_of
from penstock.bench.roofline import Ceilings
from penstock.bench.run import bench_operator, catalogue
from penstock.testing.budget import copy_arguments

CPU = torch.device("cpu")
CEILINGS = Ceilings(1e10, {"float32": 1e11})
PEERS = {
    "multiplied": lambda arguments: lambda: arguments["x"] * 2,
    "tripled": lambda arguments: lambda: arguments["x"] * 3,
    "absent": lambda arguments: "is not installed",
    "raising": lambda arguments: lambda: arguments["y"],
}


@pytest.fixture
def result(double):
    return bench_operator(double, device=CPU, peers=PEERS, ceilings=CEILINGS, budget=0.05)[0]


def test_a_red_gate_yields_no_number(result):
    assert [timed.name for timed in result.timed] == ["right", "multiplied"]
    assert "over budget" in result.without["wrong"] and result.without["wrong"].startswith("red gate")
    assert "not finite" in result.without["lazy"]
    assert result.without["narrow"] == "N is above 4"
    assert result.without["broken"] == "failed: RuntimeError: the device said no"


def test_without_a_green_implementation_no_peer_is_timed(double):
    result = bench_operator(double, device=CPU, peers=PEERS, impls=["wrong"], ceilings=CEILINGS, budget=0.05)[0]
    assert result.timed == () and result.host_us is None
    assert result.without["multiplied"] == "not timed: no implementation passed the gate"


def test_peers_are_compared_and_have_reasons(result):
    assert "differs from ours by 0.5" in result.without["tripled"]
    assert result.without["absent"] == "is not installed"
    assert result.without["raising"] == "failed: KeyError: 'y'"
    ours, peer = result.timed
    assert ours.ratios.keys() == {"multiplied"} and 0.02 < ours.ratios["multiplied"] < 50
    assert peer.kind == "peer" and peer.ratios == {}


def test_floor_and_rotation(result):
    assert result.bytes == 2 * 256 * 512 * 4 and result.bound == "memory"
    assert result.floor_us == pytest.approx(result.bytes / 1e10 * 1e6)
    assert result.timed[0].of_floor == pytest.approx(result.floor_us / result.timed[0].median_us)
    assert result.rotated_bytes == result.sets * result.bytes > 3 * 32 * 2**20


def test_an_unknown_implementation_is_named(double):
    with pytest.raises(ValueError, match=r"has no implementation \['cuda'\]; it has right, wrong"):
        bench_operator(double, device=CPU, peers={}, impls=["cuda"], ceilings=CEILINGS)


def test_json_holds_everything(result, tmp_path):
    path = record.write(tmp_path / "cpu" / "double.json", CPU, [result], CEILINGS, "penstock bench double")
    document = json.loads(path.read_text())
    assert document.keys() == {"schema", "command", "environment", "protocol", "ceilings", "results"}
    assert document["environment"].keys() >= {"device", "date", "commit", "python", "torch", "packages", "threads"}
    assert document["environment"]["packages"]["triton"]
    assert document["ceilings"] == {"copy": 1e10, "matmul": {"float32": 1e11}, "notes": {}}
    timed = document["results"][0]["timed"][0]
    assert timed.keys() >= {
        "name",
        "kind",
        "median_us",
        "p10_us",
        "p90_us",
        "samples_us",
        "method",
        "calls",
        "of_floor",
        "ratios",
    }
    assert len(timed["samples_us"]) >= 5
    assert list(tmp_path.glob("**/*.partial")) == []


def test_table_has_a_line_for_everything(result, capsys):
    report.show([result])
    printed = capsys.readouterr().out
    for word in ("right", "(multiplied)", "(tripled)", "is not installed", "multiplied", "GB/s", "wall clock"):
        assert word in printed, word


def test_names_for_folders_and_numbers():
    assert record.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert [report.microseconds(value) for value in (4.312, 43.12, 431.2)] == ["4.31", "43.1", "431"]


def test_copies_keep_strides_and_shared_memory():
    whole = torch.randn(4, 6)
    arguments = {"k": whole[:, 1::2], "v": whole.t(), "pair": (whole, 3), "none": None, "empty": torch.empty(0, 2)}
    copies = copy_arguments(arguments)
    for name in ("k", "v"):
        assert torch.equal(copies[name], arguments[name]) and copies[name].stride() == arguments[name].stride()
    assert copies["k"].data_ptr() != arguments["k"].data_ptr()
    assert copies["k"].untyped_storage().data_ptr() == copies["pair"][0].untyped_storage().data_ptr()
    assert copies["pair"][1] == 3 and copies["empty"].shape == (0, 2)
    assert len(tensors_of(arguments)) == 4
    assert len(rotation(arguments, whole, None, CPU)) == 512


def test_host_cost_is_of_the_remembered_choice(double):
    x = torch.randn(2, 3)
    picked, launched = recorded(double, {"x": x}, "right")
    assert picked[0] == "right" and picked[1] is x and launched[1] is x
    assert 0.1 < pick_us(double, {"x": x}, "right", calls=200) < 500
    assert "pick" not in vars(double)


def test_every_peer_answers_for_every_case_of_the_catalogue():
    from penstock.core.cases import Make

    for op in catalogue().values():
        for name, prepare in peers_of(op).items():
            if name == "torch.compile":
                continue
            for case in op.all_cases():
                if case.bench or "empty" in case.name:
                    continue
                answer = prepare(case.build(Make("cpu")))
                assert callable(answer) or (isinstance(answer, str) and answer), (op.name, name, case.name)


def test_the_reference_is_what_torch_compile_is_given():
    op = catalogue()["rms_norm"]
    call = compiled_reference(op)({"x": torch.randn(2, 8), "weight": torch.ones(8)})
    assert callable(call)
