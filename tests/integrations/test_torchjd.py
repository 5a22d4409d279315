"""TorchJD's weightings as rules, and its engine, against TorchJD itself and its Jacobian."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import MODELS
from support.raising import Expected, fail, raising
from support.steps import B, larger
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.integrations.torchjd import Engine

torchjd = pytest.importorskip("torchjd")
from torchjd import aggregation as jd  # noqa: E402
from torchjd.autogram import Engine as TheirEngine  # noqa: E402

# UPGrad and DualProj solve quadratic programs by packages that TorchJD does not ask for.
AGGREGATORS: dict[str, tuple[Callable[[], Any], str]] = {
    "upgrad": (jd.UPGrad, "qpsolvers"),
    "dualproj": (jd.DualProj, "qpsolvers"),
    "mgda": (jd.MGDA, ""),
    "aligned-mtl": (jd.AlignedMTL, ""),
    "imtl-g": (jd.IMTLG, ""),
    "mean": (jd.Mean, ""),
    "sum": (jd.Sum, ""),
    "krum": (lambda: jd.Krum(2, 3), ""),
    "pcgrad": (jd.PCGrad, ""),
}


def make(name: str) -> Any:
    make_one, needs = AGGREGATORS[name]
    if needs:
        pytest.importorskip(needs)
        pytest.importorskip("quadprog")
    return make_one()


def weighting_of(aggregator: Any) -> Any:
    return getattr(aggregator, "gramian_weighting", aggregator.weighting)


def losses_of(model: nn.Module, batch: Any) -> Tensor:
    found = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return found if found.dim() == 1 else found.mean(1)


def jacobian(model: nn.Module, losses: Tensor) -> Tensor:
    parameters = list(model.parameters())
    rows = [
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for loss in losses
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_a_weighting_as_a_rule(aggregator: str, name: str, dtype: torch.dtype) -> None:
    theirs = make(aggregator)
    model, batch = larger(name, dtype)
    torch.manual_seed(0)  # of PCGrad's order
    expected = theirs(jacobian(model, losses_of(model, batch)))
    for reduction, scale in (("mean", 1), ("sum", B)):
        model.zero_grad()
        torch.manual_seed(0)
        rule = pc.FromWeighting(weighting_of(make(aggregator)))
        with pc.aggregate(model, rule, loss_reduction=reduction) as agg:
            losses = losses_of(model, batch)
            (losses.mean() if reduction == "mean" else losses.sum()).backward()
        assert_near(gradient(model), expected * scale, 1e-5 if dtype == torch.float32 else 1e-9)
        assert agg.report.network.weights.shape == (B,)


@pytest.mark.parametrize("aggregator", ["mgda", "imtl-g", "aligned-mtl"])
def test_a_weighting_on_vectors(aggregator: str) -> None:
    rows = torch.randn(7, 40)
    rule = pc.FromWeighting(make(aggregator).gramian_weighting)
    assert_near(rule(rows), make(aggregator)(rows), 1e-5)


def test_a_preference_in_the_dtype_of_the_model() -> None:
    pytest.importorskip("qpsolvers")
    pytest.importorskip("quadprog")
    rows, preference = torch.randn(5, 30), torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])
    found = pc.FromWeighting(jd.UPGradWeighting(preference))(rows)
    assert_near(found, jd.UPGrad(preference)(rows), 1e-5)


def test_each_parameter_alone() -> None:
    model, batch = larger("mlp")
    rule = pc.FromWeighting(jd.MGDAWeighting(), per="parameter")
    with pc.aggregate(model, rule):
        losses_of(model, batch).mean().backward()
    rows = jacobian(model, losses_of(model, batch))
    parts = rows.split([p.numel() for p in model.parameters()], 1)
    assert_near(gradient(model), torch.cat([jd.MGDA()(part) for part in parts]), 1e-9)


def test_not_finite() -> None:
    rows = torch.randn(6, 9)
    rows[2] = torch.nan
    rule = pc.FromWeighting(jd.MGDAWeighting())
    others = rows[[0, 1, 3, 4, 5]]
    assert_near(rule(rows, nonfinite="drop"), jd.MGDA()(others), 1e-5)
    assert rule(rows).isnan().all()


class Reused(nn.Module):
    """One layer twice, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.table(ids).mT).mT.tanh()
        return self.head(self.layer(self.layer(x).tanh()).mean(1))


class Tied(nn.Module):
    """A table that is the last weight too, and a weight that no module is called for."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(7, 6), nn.Parameter(torch.rand(6))
        self.layer = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layer(self.table(ids)) * self.scale
        return x.tanh().mean(1) @ self.table.weight.T


def case(name: str) -> tuple[nn.Module, Any]:
    if name in MODELS:
        return larger(name)
    torch.manual_seed(5)
    model = {"reused": Reused, "tied": Tied}[name]().double()
    return model, (torch.randint(7, (B, 5)), torch.randint(7, (B,)))


@pytest.mark.parametrize("name", [*MODELS, "reused", "tied"])
def test_the_engine(name: str) -> None:
    model, batch = case(name)
    rows = jacobian(model, losses_of(model, batch))
    engine, weights = Engine(model), torch.linspace(-1, 1, B).double()
    for times in (1, 2):  # one engine for all steps, whose gradients add up
        with engine:
            losses = losses_of(model, batch)
        gramian = engine.compute_gramian(losses)
        assert_near(gramian, rows @ rows.T, 1e-10)
        engine.backward(weights)
        assert_near(gradient(model), times * (weights @ rows), 1e-10)
    if name != "tied":  # of which TorchJD leaves out products of several uses
        theirs = TheirEngine(model, batch_dim=0)
        assert_near(gramian, theirs.compute_gramian(losses_of(model, batch)), 1e-9)


def test_the_gramian_in_the_block_and_several_modules() -> None:
    first, second = nn.Linear(4, 5), nn.Linear(5, 1)
    x = torch.randn(6, 4)
    with Engine(first, second) as engine:
        gramian = engine.compute_gramian(second(first(x).relu()).squeeze(1))
    expected = TheirEngine(first, second, batch_dim=0)
    assert_near(gramian, expected.compute_gramian(second(first(x).relu()).squeeze(1)), 1e-5)


def test_the_engine_leaves_a_model_as_it_was() -> None:
    model, batch = larger("mlp")
    engine = Engine(model)
    with pytest.raises(Expected), engine:
        fail(losses_of(model, batch))
    with engine:
        losses = losses_of(model, batch)
    engine.compute_gramian(losses)
    assert all(p.grad is None for p in model.parameters())
    losses_of(model, batch).mean().backward()


def used() -> tuple[Engine, Tensor]:
    model, batch = larger("mlp")
    with Engine(model) as engine:
        losses = losses_of(model, batch)
    return engine, losses


def computed(weights: Any) -> None:
    engine, losses = used()
    engine.compute_gramian(losses)
    engine.backward(weights)


def reopened() -> None:
    engine, _ = used()
    with engine, engine:
        pass


test_values = raising(
    ValueError,
    {
        "scalar": (
            lambda: used()[0].compute_gramian(used()[1].mean()),
            r"one loss for each of 11 examples, \[11\], got shape \(\); for several",
        ),
        "weights": (lambda: computed(torch.ones(3).double()), "11"),
        "none": (lambda: Engine(nn.ReLU()), "parameter"),
        "number": (
            lambda: pc.FromWeighting(lambda gram: gram)(torch.ones(2, 3)),
            r"to give 2 weights, one for each example, got shape \(2, 2\)",
        ),
    },
)
test_types = raising(
    TypeError,
    {
        "class": (lambda: pc.FromWeighting(jd.MGDAWeighting), r"a class; write MGDAWeighting\(\)"),
        "aggregator": (
            lambda: pc.FromWeighting(jd.MGDA()),
            r"got the aggregator MGDA; give its weighting, such as MGDAWeighting\(\)",
        ),
        "nothing": (lambda: pc.FromWeighting(3), "a function of a Gram matrix, got 3"),
        "result": (
            lambda: pc.FromWeighting(lambda gram: [1.0])(torch.ones(1, 3)),
            "to give a real tensor of weights, got list",
        ),
    },
)
test_order = raising(
    RuntimeError,
    {
        "forward": (lambda: Engine(nn.Linear(2, 1)).compute_gramian(torch.ones(2)), "with engine"),
        "backward": (lambda: used()[0].backward(torch.ones(B)), "call compute_gramian"),
        "open": (reopened, "open already"),
    },
)
