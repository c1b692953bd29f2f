"""Environment variables, devices, formats, cases, features."""

import pytest
import torch

from penstock.core import device, env, features, formats
from penstock.core.cases import Make, nbytes


def test_a_bad_environment_value_raises(monkeypatch):
    assert env.CHECK.read() in env.CHECK.choices
    monkeypatch.setenv("PENSTOCK_CHECK", "value")
    with pytest.raises(ValueError, match="PENSTOCK_CHECK must be 'static' or 'values', got 'value'"):
        env.CHECK.read()


def test_meta_tensors_stand_for_an_h200():
    meta = torch.device("meta")
    assert device.has_wgmma(meta) and device.has_tma(meta) and device.num_sms(meta) == 132
    assert not device.has_wgmma(torch.device("cpu"))


def test_unknown_device_types_are_refused():
    with pytest.raises(ValueError, match="must be cuda, cpu or meta, got xpu"):
        device.properties(torch.device("xpu"))


def test_formats_round_to_nearest_even_and_saturate():
    values = torch.tensor([0.0, 1.0625, 1.1875, 447.0, 1e6, -1e6])
    coded = formats.FP8_TENSOR.encode(values).float()
    assert coded.tolist() == [0.0, 1.0, 1.25, 448.0, 448.0, -448.0]
    assert formats.INT8_TOKEN.encode(torch.tensor([0.5, 1.5, 200.0, -200.0])).tolist() == [0, 2, 127, -127]
    assert formats.INT8_TOKEN.encode(torch.tensor([float("nan"), float("inf")])).tolist() == [0, 127]


def test_formats_say_the_shape_and_the_value_of_their_scales():
    x = torch.zeros(2, 130, 300)
    x[1, 129, 299] = 448.0
    x[0, 0, 0] = float("nan")
    shapes = {
        "FP8_TENSOR": (1,),
        "FP8_TOKEN": (2, 130),
        "FP8_BLOCK": (2, 130, 3),
        "INT8_TOKEN": (2, 130),
        "INT8_CHANNEL": (2, 130),
    }
    for name, shape in shapes.items():
        format = formats.FORMATS[name]
        scale = format.dynamic_scale(x)
        assert scale.shape == format.scale_shape(x.shape) == shape
        assert scale.flatten()[-1] == torch.tensor(448.0) / format.largest
        assert (scale.flatten()[:-1] == 1).all()
        assert (format.spread(scale, x.shape) * x)[1, 129, 299] == 448.0 * 448.0 / format.largest
    squares = formats.FP8_BLOCK.dynamic_scale(x, weight=True)
    assert squares.shape == formats.FP8_BLOCK.scale_shape(x.shape, weight=True) == (2, 2, 3)
    assert formats.FP8_BLOCK.spread(squares, x.shape, weight=True).shape == x.shape
    assert formats.FP8_TOKEN.dynamic_scale(torch.full((1, 2), 1e-45)) == formats.SMALLEST_SCALE


def test_a_case_is_drawn_the_same_twice_and_never_zero():
    first, second = Make("cpu", 3), Make("cpu", 3)
    assert torch.equal(first.randn(4, 5), second.randn(4, 5))
    assert torch.equal(first.integers(0, 9, 7), second.integers(0, 9, 7))
    assert not torch.equal(Make("cpu", 4).randn(4, 5), Make("cpu", 3).randn(4, 5))
    assert first.randn(100).count_nonzero() == 100
    assert Make("meta").randn(10**6, 10**6).shape == (10**6, 10**6)


def test_nbytes():
    assert nbytes(torch.empty(3, dtype=torch.float32), None, torch.empty(2, dtype=torch.bfloat16)) == 16


def test_every_feature_answers_for_a_cpu_tensor():
    for feature in features.FEATURES.values():
        answer = feature([torch.empty(0)], False)
        assert answer is None or (isinstance(answer, str) and answer)
