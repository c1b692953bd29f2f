"""An operator remembers which implementation it picked and why the better ones were passed over."""

import torch

from penstock.core.op import op

SPEC = {"x": ("* N", torch.float32)}


def make(name):
    """A fresh operator with an implementation that this call does not suit, and one that it does."""

    def double(x, *, impl="auto"):
        launch = operator.pick(impl, x)
        out = torch.empty_like(x)
        launch(out, x)
        return out

    double.__name__ = name
    operator = op("(Tensor(a!) out, Tensor x) -> ()", SPEC)(double)
    operator.reference(lambda x: x * 2)
    operator.impl("choosy", needs=("cpu",), supports=lambda x: None if x.shape[-1] == 4 else "wants four columns")(
        lambda out, x: out.copy_(x + x)
    )
    return operator


def test_choices_begin_empty_and_tell_why():
    operator = make("choices_test_double")
    assert operator.choices() == {}
    operator(torch.ones(2, 3))
    assert operator.choices() == {"reference": {"choosy": "wants four columns"}}
    operator(torch.ones(2, 4))
    assert operator.choices()["choosy"] == {}
    operator(torch.ones(2, 4), impl="reference")
    assert operator.choices()["reference"] == {}


def test_choices_are_a_copy():
    operator = make("choices_test_copy")
    operator(torch.ones(1, 4))
    operator.choices().clear()
    operator.choices()["choosy"]["other"] = "changed"
    assert operator.choices() == {"choosy": {}}
