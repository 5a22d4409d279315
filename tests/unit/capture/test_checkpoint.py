"""Activation checkpointing: layers that are run again in the backward pass."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from catalogue.row import Uses
from support.checks import assert_grads_equal, assert_norms, assert_sums, plain_pass, relative_error
from support.models import X4 as X
from support.models import regression, square_mlp
from support.oracle import m_coherence, per_example_gradients
from support.shown import SHOWN, shown
from support.snapshots import Snapshot
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import pycoherence as pc

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

Forward = Callable[[nn.Module, Tensor], Tensor]


def without_early_stop(model: nn.Module, x: Tensor) -> Tensor:
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return checkpoint(model, x, use_reentrant=False)


def nested(outer: bool, inner: bool) -> Forward:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        def both(x: Tensor) -> Tensor:
            return checkpoint(m[2:], m[:2](x), use_reentrant=inner)

        return checkpoint(both, x, use_reentrant=outer)

    return forward


NEW: dict[str, Forward] = {
    "whole": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "no-metadata-check": lambda m, x: checkpoint(
        m, x, use_reentrant=False, determinism_check="none"
    ),
    "first-half": lambda m, x: m[2:](checkpoint(m[:2], x, use_reentrant=False)),
    "second-half": lambda m, x: checkpoint(m[2:], m[:2](x), use_reentrant=False),
    "sequential": lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=False),
    "no-early-stop": without_early_stop,
    "nested": nested(False, False),
}
OLD: dict[str, Forward] = {
    "reentrant": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "second-half-reentrant": lambda m, x: checkpoint(m[2:], m[:2](x), use_reentrant=True),
    "sequential-reentrant": lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=True),
    "nested-reentrant": nested(True, True),
    "new-in-reentrant": nested(True, False),
    "reentrant-in-new": nested(False, True),
}
# torch 2.10 does not show the backward pass of a reentrant checkpoint to modes.
EVERY = NEW | OLD if SHOWN else NEW
FEW = {name: how for name, how in EVERY.items() if "first" in name or "sequential" in name}


def assert_exact(model: nn.Module, forward: Forward, x: Tensor = X) -> None:
    loss, leaf = regression("mean"), x.clone().requires_grad_()
    truth = per_example_gradients(model, loss, (x,))
    plain, (plain_x,) = plain_pass(model, loss, (x,))
    ours = copy.deepcopy(model)
    with pc.collect(ours, pc.SqNorms(), keep_factors=True) as record:
        loss(lambda x: forward(ours, x), (leaf,)).backward()
    assert_norms(record, truth, 1e-10)
    assert_grads_equal(ours, plain, 1e-12)
    assert relative_error(leaf.grad, plain_x.grad) < 1e-12
    coef = torch.linspace(-1, 2, len(x)).double()
    assert_sums(record.weighted_sum(coef), truth, coef, 1e-10)
    aggregated = copy.deepcopy(model)
    leaf = x.clone().requires_grad_()
    for rule in (pc.Winsorized(1), pc.GeometricMedian()):
        found, simple = copy.deepcopy(aggregated), copy.deepcopy(aggregated)
        with pc.aggregate(found, rule):
            loss(lambda x, m=found: forward(m, x), (leaf,)).backward()
        with pc.aggregate(simple, rule):
            loss(simple, (leaf,)).backward()
        assert_grads_equal(found, simple, 1e-8)


@pytest.mark.parametrize("how", EVERY.values(), ids=EVERY)
def test_checkpoints_are_exact(how: Forward) -> None:
    assert_exact(square_mlp(), how)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": lambda: nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 6, 1), nn.Flatten()),
    "LayerNorm": lambda: nn.LayerNorm(6),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
    "RMSNorm": lambda: nn.RMSNorm(6, eps=1e-5),
    "BatchNorm1d": lambda: nn.BatchNorm1d(6).eval(),
    "numbers": lambda: Uses(lambda m, x: x * m.p + m.p, p=torch.randn(6)),
    "transposed": lambda: Uses(lambda m, x: torch.addmm(m.b, x, m.p), p=W(), b=torch.randn(6)),
    "twice": lambda: Uses(lambda m, x: F.linear(F.linear(x, m.p).tanh(), m.p), p=W()),
    "made": lambda: Uses(lambda m, x: F.linear(x, m.p.exp() * m.q), p=W(), q=torch.randn(6)),
}


def W() -> Tensor:
    return torch.randn(6, 6) / 3


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", FEW.values(), ids=FEW)
def test_checkpointed_layers_are_exact(name: str, how: Forward) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    assert_exact(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer, nn.Linear(6, 6)).double(), how)


def test_a_parameter_inside_and_outside() -> None:
    """Cross terms between uses of which one is run again."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m[2](checkpoint(m, m[2](x), use_reentrant=False)).sin()

    model, loss = square_mlp(), regression("mean")
    wrapped = Uses(lambda m, x: forward(m.net, x), net=model)
    plain = Uses(lambda m, x: m.net[2](m.net(m.net[2](x))).sin(), net=copy.deepcopy(model))
    truth = per_example_gradients(plain, loss, (X,))
    with pc.collect(wrapped, pc.SqNorms()) as record:
        loss(wrapped, (X,)).backward()
    assert_norms(record, truth, 1e-10)


@shown
@pytest.mark.parametrize("where", ["inside-and-outside", "in-two-checkpoints"])
def test_a_parameter_shared_with_a_reentrant_checkpoint_is_refused(where: str) -> None:
    """Its pass is of its own, so that terms between the uses would be lost."""
    model = square_mlp()
    with pc.collect(model, pc.SqNorms()) as record:
        x = X.clone().requires_grad_()
        first = checkpoint(model[0], x, use_reentrant=True) if "two" in where else model[0](x)
        loss = checkpoint(model[0], first.tanh(), use_reentrant=True).square().mean()
        with pytest.raises(pc.UnsupportedError, match=r"of module '0'.*use_reentrant=False"):
            loss.backward()
    with pytest.raises(RuntimeError, match="not complete"):
        _ = record.sq_norms
    assert all(p._post_accumulate_grad_hooks is None for p in model.parameters())


def test_dropout_in_a_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)).double()
    found = []
    for forward in (lambda x: model(x), lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        with pc.collect(model, pc.SqNorms()) as record:
            forward(X).square().mean().backward()
        found.append(record.sq_norms)
    assert relative_error(*found) < 1e-12


@pytest.mark.parametrize("how", EVERY.values(), ids=EVERY)
def test_autocast_around_a_checkpoint(how: Forward) -> None:
    model, found = square_mlp().float(), []
    for forward in (lambda m, x: m(x), how):
        ours, x = copy.deepcopy(model), X.float().requires_grad_()
        with pc.collect(ours, pc.SqNorms()) as record:
            with torch.autocast("cpu", torch.bfloat16):
                loss = forward(ours, x).float().square().mean()
            loss.backward()
        found.append(record.sq_norms)
    assert relative_error(*found) < 1e-5


@pytest.mark.parametrize("how", NEW.values(), ids=NEW)
def test_other_verbs(how: Forward) -> None:
    """They ask for gradients by torch.autograd.grad."""
    model, loss = square_mlp(), regression("mean")
    truth = per_example_gradients(model, loss, (X,))

    def checkpointed(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return loss(lambda x: how(model, x), batch)

    coef = torch.tensor([1.0, 0.0, -1.0, 2.0], dtype=torch.float64)
    assert_sums(pc.weighted_sum(model, checkpointed, (X,), coef), truth, coef, 1e-10)
    meter = pc.CoherenceMeter(model)
    meter.update(checkpointed, (X,))
    assert meter.compute().m == pytest.approx(m_coherence(truth), rel=1e-9)
    assert not pc.verify(model, checkpointed, (X,)).failures
    with pc.collect(model, pc.SqNorms()):
        total = checkpointed(model, (X,))
        found = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
        again = torch.autograd.grad([total], model[0].weight, allow_unused=True)
    for gradient, g in zip(found, truth.values(), strict=True):
        assert relative_error(gradient, g.mean(0)) < 1e-10
    assert relative_error(again[0], found[0]) < 1e-10


def test_a_reentrant_checkpoint_in_other_verbs_is_refused() -> None:
    """Torch cannot run it in torch.autograd.grad either."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model[2:], model[:2](x), use_reentrant=True).square().mean()

    with pytest.raises(pc.UnsupportedError, match="use_reentrant=False"):
        pc.CoherenceMeter(square_mlp()).update(loss, X.clone())


@pytest.mark.parametrize("how", NEW.values(), ids=NEW)
def test_a_backward_pass_after_the_block_is_refused(how: Forward) -> None:
    model = square_mlp()
    with pc.collect(model, pc.SqNorms()):
        loss = how(model, X).square().mean()
    before = Snapshot(model, grads=False)
    with pytest.raises(Exception, match=r"inside the block|checkpoint"):
        loss.backward()
    before.assert_unchanged(model)


def test_checkpoint_around_what_is_not_tracked_is_fine() -> None:
    head, trunk = nn.Linear(6, 3).double(), square_mlp()
    with pc.collect(head, pc.SqNorms()) as record:
        out = head(checkpoint(trunk, X, use_reentrant=False))
        regression("mean")(lambda x: out, (X,)).backward()
    hidden = trunk(X).detach()
    assert_norms(record, per_example_gradients(head, regression("mean"), (hidden,)), 1e-10)


def test_other_hooks_on_saved_tensors() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return m(x)

    assert_exact(square_mlp(), forward)


def test_the_general_fallback_in_a_checkpoint() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return torch.logaddexp(F.linear(x, m.q), m.p)

    model = Uses(forward, p=torch.randn(5), q=torch.randn(5, 6)).double()
    truth = per_example_gradients(model, regression("mean"), (X,))
    with pc.collect(model, pc.SqNorms(), on_unsupported="vmap") as record:
        run = regression("mean")
        run(lambda x: checkpoint(model, x, use_reentrant=False), (X,)).backward()
    assert_norms(record, truth, 1e-10)


def test_training_goes_on_afterwards() -> None:
    model = square_mlp()
    for how in EVERY.values():
        before = Snapshot(model, grads=False)
        with pc.collect(model, pc.SqNorms()):
            how(model, X.clone().requires_grad_()).square().mean().backward()
        before.assert_unchanged(model)
        model.zero_grad()
