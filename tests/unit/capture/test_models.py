"""Whole networks: norms by the oracle, gradients by plain autograd."""

import pytest
import torch
from support.checks import assert_exact
from support.models import MODELS, classification, make

import pycoherence as pc
from pycoherence.ops import BACKENDS

DTYPES = {"f32": torch.float32, "f64": torch.float64}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_norms_and_gradients_are_exact(name: str, reduction: str, dtype: torch.dtype) -> None:
    model, batch = make(name, dtype)
    assert_exact(model, classification(reduction), batch, dtype, reduction)


@pytest.mark.parametrize("name", MODELS)
def test_the_reference_path_is_exact_too(name: str) -> None:
    assert "reference" in BACKENDS
    model, batch = make(name)
    with pc.backend("reference"):
        assert_exact(model, classification("mean"), batch, torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_one(name: str) -> None:
    model, (inputs, labels) = make(name)
    batch = (inputs[:1], labels[:1])
    assert_exact(model, classification("mean"), batch, torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_may_change_from_pass_to_pass(name: str) -> None:
    """Nothing may be kept from the first batch: rivals decided once by its length."""
    model, (inputs, labels) = make(name)
    for size in (4, 2, 5):
        assert_exact(
            model, classification("sum"), (inputs[:size], labels[:size]), torch.float32, "sum"
        )
    if name == "transformer":
        batch = (inputs[:, :4], labels[:, :4])
        assert_exact(model, classification("mean"), batch, torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_itself_is_unchanged(name: str) -> None:
    model, batch = make(name)
    plain = classification("mean")(model, batch)
    with pc.collect(model, pc.SqNorms()):
        captured = classification("mean")(model, batch)
        captured.backward()
    torch.testing.assert_close(captured, plain, rtol=1e-6, atol=0)
