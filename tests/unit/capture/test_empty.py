"""Nothing in, nothing out: no examples, no positions, no channels to speak of."""

import pytest
import torch
from catalogue.layers import LAYERS, randomise
from support.checks import assert_exact
from support.models import MODELS, classification, make, regression
from torch import nn

import pycoherence as pc

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_of_none(name: str) -> None:
    build, shape = LAYERS[name]
    model, x = randomise(build()).double(), torch.zeros(0, *shape[1:], dtype=torch.float64)
    if "instance-norm" in name:
        pytest.skip("torch itself does not take empty batches here")
    assert_exact(model, regression("sum"), (x,), torch.float64, "sum")


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_none_through_a_network(name: str) -> None:
    model, (inputs, labels) = make(name)
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        classification("sum")(model, (inputs[:0], labels[:0])).backward()
    assert record.batch_size == 0
    assert record.sq_norms.shape == (0,)
    assert all(p.grad.count_nonzero() == 0 for p in model.parameters())
    coherence = record.coherence()
    assert (coherence.n, coherence.total_sq_norm, coherence.sum_sq_norm) == (0, 0, 0)
    assert coherence.m != coherence.m


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(7, 5), (3, 0, 7)),
        (nn.LayerNorm(6), (3, 0, 6)),
        (nn.RMSNorm(6, eps=1e-5), (3, 0, 6)),
        (nn.LayerNorm((2, 3)), (3, 0, 2, 3)),
    ],
    ids=["linear", "layer-norm", "rms-norm", "layer-norm-two-dims"],
)
def test_no_positions(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.float64)
    assert_exact(layer.double(), regression("mean"), (x,), torch.float64)
