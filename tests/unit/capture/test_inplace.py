"""Whatever plain torch lets be changed in place, a captured pass must let be changed too."""

from collections.abc import Callable

import pytest
import torch
from catalogue.layers import LAYERS, randomise
from catalogue.row import linear, uses
from support.checks import assert_exact, plain_pass
from support.models import regression
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")

CHANGES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "input": lambda x, y: x.add_(1),
    "output": lambda x, y: y.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("frozen", ["none", "weight", "bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_changes_in_place(name: str, frozen: str, change: Callable[[Tensor, Tensor], None]) -> None:
    build, shape = LAYERS[name]
    model, batch = randomise(build()).double(), (torch.randn(shape, dtype=torch.float64),)
    for parameter, value in model.named_parameters():
        value.requires_grad_(parameter != frozen)
    if not any(p.requires_grad for p in model.parameters()):
        return

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Linear in the output, so that nothing but the layer keeps it."""
        hidden = batch[0] * 2
        out = model(hidden)
        weights = torch.arange(out[0].numel(), dtype=out.dtype).cos().reshape(out[0].shape)
        first = (out * weights).flatten(1).sum(1).mean()
        change(hidden, out)
        return first + (out * weights.exp()).flatten(1).sum(1).mean()

    try:
        plain_pass(model, loss, batch)
    except RuntimeError:  # torch refuses: the layer needs what was changed
        return
    assert_exact(model, loss, batch, torch.float64)


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)], ids=["2d", "3d"])
def test_changes_after_an_embedding(shape: tuple[int, ...]) -> None:
    model, ids = nn.Embedding(5, 6).double(), torch.randint(5, shape)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(batch[0]).mul_(2).relu_().flatten(1).sum(1).mean()

    assert_exact(model, loss, (ids,), torch.float64)


def test_an_mlp_on_sequences_with_activations_in_place() -> None:
    model = nn.Sequential(
        *(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True)),
        *(nn.Linear(8, 3), nn.ELU(inplace=True)),
    ).double()
    assert_exact(model, regression("mean"), (torch.randn(4, 5, 6).double(),), torch.float64)


@pytest.mark.parametrize("times", [3, 4], ids=["T=3", "T=B"])
@pytest.mark.parametrize("ahead", [False, True], ids=["behind", "ahead"])
def test_parts_of_a_made_tensor_are_written_with_the_batch_in_the_second_dimension(
    times: int, ahead: bool
) -> None:
    """The made tensor is a part of the graph from the first write on."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.inside(x.transpose(0, 1))
        both = hidden.new_zeros(*hidden.shape[:2], 10)
        places = slice(5), slice(5, 10)
        first, second = places[::-1] if ahead else places
        both[..., first].copy_(hidden)
        both[..., second].copy_(hidden.flip(0) * 2)
        return m.out(both).transpose(0, 1)

    model = uses(forward, inside=linear(6, 5), out=linear(10, 2))().double()
    assert_exact(model, regression("mean"), (torch.randn(4, times, 6).double(),), torch.float64)
