"""Ways bypassing the capture. Each must be exact or refused; never quietly wrong."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue.parts import Native, Square
from support.checks import assert_grads_equal, assert_norms, plain_pass
from support.models import X4 as X
from support.models import regression, square_mlp
from support.oracle import per_example_gradients
from support.shown import shown
from support.snapshots import Snapshot
from torch import Tensor, nn

import pycoherence as pc


def exact_or(model: nn.Module, forward: Callable, *errors: type[Exception]) -> None:
    """A pass through `forward(model, x)` is exact, or ends in an error before `.grad` changes."""
    loss = regression("mean")
    plain, _ = plain_pass(model, loss, (X,))
    ours, x = copy.deepcopy(model), X.clone().requires_grad_()
    before = Snapshot(ours)
    try:
        with pc.collect(ours, pc.SqNorms()) as record:
            loss(lambda x: forward(ours, x), (x,)).backward()
    except errors:
        before.assert_unchanged(ours)
        return
    assert_norms(record, per_example_gradients(model, loss, (X,)), 1e-10)
    assert_grads_equal(ours, plain, 1e-12)


BYPASSES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "native-function": lambda m, x: nn.functional.linear(x, Native.apply(m[0].weight)),
    "plain-copy-of-the-mode": lambda m, x: _without_modes(m, x),
}


def _without_modes(model: nn.Module, x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return model[0](x)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "next-to-a-known-use"])
@pytest.mark.parametrize("bypass", BYPASSES.values(), ids=BYPASSES)
def test_use_past_the_capture_is_refused_before_any_gradient(
    bypass: Callable[[nn.Module, Tensor], Tensor], alone: bool
) -> None:
    model = square_mlp()
    before = Snapshot(model)
    message = r"parameter '(weight|bias)' of module '0'.*What to do"
    with pc.collect(model, pc.SqNorms()), pytest.raises(pc.UnsupportedError, match=message):
        (bypass(model, X) if alone else bypass(model, X) + model(X)).square().mean().backward()
    before.assert_unchanged(model)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "next-to-a-known-use"])
@pytest.mark.parametrize(
    "backward",
    [
        lambda loss, m: loss.backward(),
        pytest.param(lambda loss, m: torch.autograd.backward(loss), marks=shown),
        pytest.param(lambda loss, m: torch.autograd.backward([loss, loss]), marks=shown),
        pytest.param(
            lambda loss, m: torch.autograd.backward(tensors=(loss,), retain_graph=True),
            marks=shown,
        ),
        lambda loss, m: Tensor.backward(self=loss),
        lambda loss, m: torch.autograd.grad(loss, list(m.parameters())),
        lambda loss, m: torch.autograd.grad(outputs=[loss], inputs=m[0].weight),
        lambda loss, m: loss.expand(3).backward(torch.ones(3, dtype=loss.dtype)),
    ],
    ids=["method", "autograd", "list", "keywords", "unbound", "grad", "grad-keywords", "vector"],
)
def test_forward_outside_the_block_is_refused(
    backward: Callable[[Tensor, nn.Module], None], alone: bool
) -> None:
    model = square_mlp()
    outside = model(X).square().mean()
    before = Snapshot(model)
    with pc.collect(model, pc.SqNorms()):
        loss = outside if alone else outside + model(X).square().mean()
        with pytest.raises(pc.UnsupportedError, match=r"'.*' of module '.*bypassing the capture"):
            backward(loss, model)
    before.assert_unchanged(model)


def test_forward_in_another_block_is_refused() -> None:
    model = square_mlp()
    with pc.collect(model, pc.SqNorms()):
        loss = model(X).square().mean()
    with (
        pytest.raises(pc.UnsupportedError, match="bypassing the capture"),
        pc.collect(model, pc.SqNorms()) as record,
    ):
        (loss + model(X).square().mean()).backward()
    with pytest.raises(RuntimeError, match="no backward pass"):
        _ = record.sq_norms


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_models_are_exact_or_refused(backend: str) -> None:
    model = square_mlp()
    torch.compile(model, backend=backend)  # as it has to be before the block
    exact_or(model, lambda m, x: torch.compile(m, backend=backend)(x), pc.UnsupportedError)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_scripted_models_are_exact_or_refused(how: str) -> None:
    model = square_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, X)
    for net in (model, scripted):
        exact_or_refused_with(net, scripted)


def exact_or_refused_with(tracked: nn.Module, run: nn.Module) -> None:
    try:
        with pc.collect(tracked, pc.SqNorms()) as record:
            regression("mean")(run, (X,)).backward()
    except pc.UnsupportedError:
        return
    gradients = per_example_gradients(square_like(tracked), regression("mean"), (X,))
    assert_norms(record, gradients, 1e-10)


def square_like(model: nn.Module) -> nn.Sequential:
    copied = square_mlp()
    copied.load_state_dict(model.state_dict())
    return copied


def test_functional_call_with_the_parameters_themselves_is_exact() -> None:
    model = square_mlp()
    parameters = dict(model.named_parameters())
    exact_or(model, lambda m, x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)))
    assert all(p.grad is None for p in parameters.values())


def test_functional_call_with_other_tensors_measures_nothing() -> None:
    model = square_mlp()
    others = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pc.collect(model, pc.SqNorms()) as record:
        torch.func.functional_call(model, others, (X,))
    with pytest.raises(RuntimeError, match=r"no parameter of the model was used.*model\(x\)"):
        _ = record.sq_norms


def test_forward_mode_raises() -> None:
    model = square_mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            torch.autograd.forward_ad.dual_level(),
            pytest.raises((RuntimeError, NotImplementedError)),
            pc.collect(model, pc.SqNorms()),
        ):
            model(torch.autograd.forward_ad.make_dual(X, torch.ones_like(X)))


def unseen_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    first, second = model
    return second(Native.apply(first(batch[0]))).square().flatten(1).sum(1).mean()


def test_a_function_that_is_not_seen_keeps_the_batch_first() -> None:
    model, inputs = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)).double(), torch.stack([X, -X])
    with pc.collect(model, pc.SqNorms()) as record:
        unseen_loss(model, (inputs,)).backward()
    assert_norms(record, per_example_gradients(model, unseen_loss, (inputs,)), 1e-10)


@pytest.mark.parametrize("steps", [4, 3])
def test_a_function_that_is_not_seen_is_refused_when_the_batch_is_elsewhere(steps: int) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)).double()
    inputs = torch.randn(steps, 4, 6, dtype=torch.float64)
    with pc.collect(model, pc.SqNorms()):
        pc.mark_examples(inputs, dim=1)
        with pytest.raises(pc.UnsupportedError, match="torch does not show"):
            unseen_loss(model, (inputs,))


class Rounded(torch.autograd.Function):
    """A straight-through estimator, whose own code is not that of its backward pass."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.mul(4).round() / 4

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 3 * grads[0]


class Quantised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, Rounded.apply(self.weight), self.bias)


def test_a_custom_function_of_a_parameter_is_exact() -> None:
    model = nn.Sequential(Quantised(6, 6)).double()
    exact_or(model, lambda model, x: model(x))


class Mixed(torch.autograd.Function):
    """Multiplies two parameters and a number; its backward pass takes no batch of gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, scale)
        return a @ b * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        a, b, scale = ctx.saved_tensors
        given = torch.einsum("ij,kj->ik", grads[0], b), torch.einsum("ji,jk->ik", a, grads[0])
        return *(g * scale for g in given), None


class Followed(nn.Module):
    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.layers, self.alone = square_mlp(), alone

    def forward(self, x: Tensor) -> Tensor:
        first, _, last, _ = self.layers
        weight = Mixed.apply(first.weight, last.weight, torch.tensor(0.5))
        weight = Square.apply(weight + 1)
        y = nn.functional.linear(x, weight, first.bias + last.bias)
        return y if self.alone else y + self.layers(x)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "next-to-a-known-use"])
def test_custom_functions_of_parameters_are_followed(alone: bool) -> None:
    exact_or(Followed(alone), lambda model, x: model(x))


class Left(torch.autograd.Function):
    """Leaves an example for its backward pass, which its forward pass has no use for."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor, how: str) -> Tensor:
        if how == "saved":
            ctx.save_for_backward(x)
        else:
            ctx.x = x if how == "attribute" else {"all": (x,)}
        return w.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("not reached")


@pytest.mark.parametrize("how", ["saved", "attribute", "nested"])
def test_custom_functions_that_keep_examples_are_refused(how: str) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        x = model[1](x)
        return nn.functional.linear(x, Left.apply(model[0].weight, x.detach(), how))

    model = square_mlp()
    with pc.collect(model, pc.SqNorms()), pytest.raises(pc.UnsupportedError, match="bypassing"):
        forward(model, X).square().mean().backward()


def test_what_inference_mode_makes_of_parameters_is_constant() -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.inference_mode():
            norm = (model[0].weight * 2).norm()
        assert norm > 0
        return model(x)

    model = square_mlp()
    exact_or(model, forward)
