"""Every known layer in every form: norms by the oracle, gradients by plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from catalogue.layers import LAYERS, B, randomise
from catalogue.row import normal, uses
from support.checks import assert_exact
from support.models import regression
from torch import Tensor, nn

DTYPES = {"f32": torch.float32, "f64": torch.float64}


class Wide(nn.Module):
    """A layer between an elementwise function and another, so that neither gradient is simple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        first, *rest = inputs
        first = first.tanh() * 1.5 if first.is_floating_point() else first
        return self.layer(first, *rest).sigmoid() + 0.1


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")


def make(name: str, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor]]:
    build, shape = LAYERS[name]
    return randomise(Wide(build())).to(dtype), (torch.randn(shape, dtype=dtype),)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_exact(name: str, dtype: torch.dtype) -> None:
    model, batch = make(name, dtype)
    assert_exact(model, regression("mean"), batch, dtype)


@pytest.mark.parametrize("name", LAYERS)
def test_exact_for_a_sum(name: str) -> None:
    model, batch = make(name, torch.float64)
    assert_exact(model, regression("sum"), batch, torch.float64, "sum")


@pytest.mark.parametrize("name", LAYERS)
def test_exact_on_strided_input(name: str) -> None:
    """Inputs as transposes leave them."""
    model, (x,) = make(name, torch.float64)
    x = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert_exact(model.layer, regression("mean"), (x,), torch.float64)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_exact_with_one_parameter_frozen(name: str, frozen: str) -> None:
    model, batch = make(name, torch.float64)
    parameters = dict(model.layer.named_parameters())
    if set(parameters) != {"weight", "bias"}:
        pytest.skip("it has only one")
    parameters[frozen].requires_grad_(False)
    assert_exact(model, regression("mean"), batch, torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_exact_when_the_input_needs_no_gradient(name: str) -> None:
    """As in a first layer: the input gradient is then left out."""
    model, (x,) = make(name, torch.float64)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return regression("mean")(model, tuple(x.detach() for x in batch))

    assert_exact(model, loss, (x,), torch.float64)


IDS = {
    "2d": (B, 6),
    "one-position": (B, 1),
    "3d": (B, 3, 2),
    "no-position": (B, 0),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("padding", [None, 2, -1])
@pytest.mark.parametrize("shape", IDS.values(), ids=IDS)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_embedding(
    kind: torch.dtype, shape: tuple[int, ...], padding: int | None, dtype: torch.dtype
) -> None:
    model = randomise(Wide(nn.Embedding(5, 7, padding_idx=padding))).to(dtype)
    ids = torch.randint(5, shape, dtype=kind)
    assert_exact(model, regression("mean"), (ids,), dtype)


def test_functional_calls_with_keywords() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = F.linear(bias=m.b, input=x, weight=m.a)
        x = F.layer_norm(weight=m.c, normalized_shape=[3], input=x)
        return F.conv1d(weight=m.k, input=x.unsqueeze(-1))

    shapes = {"a": (3, 4), "b": (3,), "c": (3,), "k": (2, 3, 1)}
    model = uses(forward, **{name: normal(*shape) for name, shape in shapes.items()})().double()
    assert_exact(model, regression("mean"), (torch.randn(B, 4).double(),), torch.float64)


def test_embedding_with_ids_second_and_keywords() -> None:
    def forward(m: nn.Module, ids: Tensor) -> Tensor:
        return F.embedding(weight=m.table, input=ids, padding_idx=-2)

    model, ids = uses(forward, table=normal(5, 3))().double(), torch.randint(5, (B, 6))
    assert_exact(model, regression("sum"), (ids,), torch.float64, "sum")


def test_a_weight_that_is_no_parameter_still_gets_its_gradient() -> None:
    """The bias is tracked; the weight is a tensor the user made and wants a gradient of."""
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    model = uses(lambda m, x: F.linear(x, weight, m.bias), bias=lambda: torch.zeros(3))().double()
    x = torch.randn(B, 4, dtype=torch.float64)
    assert_exact(model, regression("mean"), (x,), torch.float64)
    # Twice by assert_exact, in a plain and in a captured pass, and alike.
    twice = weight.grad.clone()
    weight.grad = None
    regression("mean")(model, (x,)).backward()
    torch.testing.assert_close(twice, 2 * weight.grad)
