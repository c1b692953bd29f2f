"""Tests of this folder run on a GPU where there is one, and through the interpreter elsewhere."""

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
