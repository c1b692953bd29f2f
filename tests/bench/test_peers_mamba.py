"""The public kernels of recurrent mixers: what they are not given, and why."""

import torch

from penstock.bench import peers_mamba
from penstock.bench.peers import peers_of
from penstock.ops import ssd_prefill


def test_they_are_peers_of_their_operators():
    assert "mamba-ssm" in peers_of(ssd_prefill)


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setattr(peers_mamba.importlib.util, "find_spec", lambda name: None)
    for prepare in (prepare for named in peers_mamba.MAMBA.values() for prepare in named.values()):
        assert prepare({"x": torch.ones(2)}).endswith("is not installed")


def test_ragged_batches_are_refused(monkeypatch):
    monkeypatch.setattr(peers_mamba, "_missing", lambda package, arguments: None)
    arguments = {"x": torch.ones(5, 2, 16), "cu_seqlens": torch.tensor([0, 2, 5])}
    assert "one dense batch" in peers_mamba.MAMBA["ssd_prefill"]["mamba-ssm"](arguments)
    assert "one dense batch" in peers_mamba.MAMBA["causal_conv1d"]["fla"](arguments)
