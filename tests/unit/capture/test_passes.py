"""Forward and backward passes as people really run them."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from catalogue.row import Uses
from support.checks import (
    assert_exact,
    assert_grads_equal,
    assert_norms,
    captured_pass,
    plain_pass,
)
from support.models import MLP, X, classification, make, regression, two_layers
from support.oracle import per_example_gradients
from torch import Tensor, nn

import pycoherence as pc

F64 = torch.float64


def check(forward: Callable[..., Tensor], *inputs: Tensor, **layers: nn.Module) -> None:
    """Norms and gradients of such a model are exact, for a mean and for a sum."""
    for reduction in ("mean", "sum"):
        model = Uses(forward, **{name: copy.deepcopy(x) for name, x in layers.items()}).double()
        assert_exact(model, regression(reduction), inputs, F64, reduction)


@pytest.mark.parametrize(
    "activation",
    [F.relu_, torch.sigmoid_, torch.tanh_, lambda x: x.add_(1).mul_(2), F.elu_],
    ids=["relu_", "sigmoid_", "tanh_", "add_-mul_", "elu_"],
)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 6),
        nn.LayerNorm(6),
        nn.RMSNorm(6, eps=1e-5),
        nn.GroupNorm(2, 6),
        nn.BatchNorm1d(6).eval(),
    ],
    ids=["linear", "layer-norm", "rms-norm", "group-norm", "batch-norm"],
)
def test_activations_in_place(layer: nn.Module, activation: Callable[[Tensor], Tensor]) -> None:
    check(lambda m, x: m.b(activation(m.a(x))), X, a=layer, b=nn.Linear(6, 3))


def test_activations_in_place_after_embedding_and_conv() -> None:
    ids = torch.tensor([[1, 2, 2], [0, 3, 1], [1, 1, 1], [4, 0, 0]])
    check(lambda m, i: m.a(i).relu_(), ids, a=nn.Embedding(5, 4))
    check(lambda m, x: m.a(x[:, None]).relu_(), X, a=nn.Conv1d(1, 3, 3, padding="same"))


def test_an_input_changed_in_place_too_late_raises_as_always() -> None:
    model, x = nn.Linear(6, 4).double(), X.clone()
    with pc.collect(model, pc.SqNorms()):
        loss = model(x).sum()
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_unused_parameters_have_no_gradient_and_zero_norms() -> None:
    check(lambda m, x: m.a(x), X, **two_layers())


def test_outputs_that_do_not_reach_the_loss() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.a(x)
        m.b(hidden)
        return hidden * 2

    check(forward, X, **two_layers())


def test_outputs_used_in_part() -> None:
    check(lambda m, x: m.a(x)[:, 1:3] * m.b(m.a2(x))[:, :1], X, a2=nn.Linear(6, 4), **two_layers())


def test_outputs_used_twice() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.a(x)
        return hidden.sin().sum(1, keepdim=True) + m.b(hidden) * hidden[:, :1]

    check(forward, X, **two_layers())


def test_a_broadcast_output_gradient() -> None:
    """The gradient of a sum is one number, expanded to a tensor without strides."""
    model, plain = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()
    plain.load_state_dict(model.state_dict())
    plain(X).sum().backward()
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        model(X).sum().backward()
    assert_grads_equal(model, plain, 1e-12)
    torch.testing.assert_close(record.by_parameter["bias"].sq_norms, torch.full((5,), 4.0).double())


def test_detach_cuts_as_always() -> None:
    check(lambda m, x: m.b(m.a(x).detach()), X, **two_layers())


def test_no_grad_inside_is_left_alone() -> None:
    """The first use makes a target and must not count; the second is measured."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = m.b(m.a(x))
        return m.b(m.a(x)) - target.sin()

    check(forward, X, **two_layers())


def test_inference_mode_inside_is_left_alone() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.inference_mode():
            m.b(m.a(x))
        return m.b(m.a(x))

    check(forward, X, **two_layers())


def test_several_inputs_and_branches() -> None:
    check(
        lambda m, x, y: torch.cat([m.a(x), m.b(y).tanh()], 1),
        *(X, X[:, :4].cos()),
        a=nn.Linear(6, 4),
        b=nn.Linear(4, 3),
    )


def test_examples_that_the_loss_leaves_out_have_zero_norm() -> None:
    model, batch = make("mlp", F64)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        inputs, labels = batch
        kept = torch.where(labels > 2, labels, -100)
        return F.cross_entropy(model(inputs), kept, reduction="sum")

    gradients = per_example_gradients(model, loss, batch)
    _, _, record = captured_pass(model, loss, batch, "sum")
    assert_norms(record, gradients, 1e-10)
    assert record.sq_norms[batch[1] <= 2].count_nonzero() == 0


def test_dropout_with_a_seed_equals_plain_autograd() -> None:
    model, batch = make("cnn", F64)
    model.insert(3, nn.Dropout2d(0.5))
    model.append(nn.Dropout(0.3))
    model.double()

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        torch.manual_seed(7)
        return classification("mean")(model, batch)

    plain, _ = plain_pass(model, loss, batch)
    ours, _, _ = captured_pass(model, loss, batch)
    assert_grads_equal(ours, plain, 1e-12)


def test_gradients_accumulate_as_always() -> None:
    model, (inputs, labels) = make("mlp")
    plain = copy.deepcopy(model)
    for part in (slice(0, 2), slice(2, 5)):
        batch = (inputs[part], labels[part])
        classification("mean")(plain, batch).backward()
        with pc.collect(model, pc.SqNorms()) as record:
            classification("mean")(model, batch).backward()
        gradients = per_example_gradients(model, classification("mean"), batch)
        assert_norms(record, gradients, 1e-5)
    assert_grads_equal(model, plain, 1e-6)


def test_several_losses_in_one_sum() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        out = model(batch[0])
        return F.cross_entropy(out, batch[1]) + 0.1 * out.square().mean()

    model, batch = make("mlp", F64)
    assert_exact(model, loss, batch, F64)


def test_training_steps_inside_the_block() -> None:
    """Zeroing, stepping, clipping, saving, printing: ordinary uses of parameters all pass."""
    model, batch = make("mlp")
    plain = copy.deepcopy(model)
    for net, context in ((plain, None), (model, pc.collect(model, pc.SqNorms()))):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1, weight_decay=0.1)
        if context is not None:
            context.__enter__()
        optimizer.zero_grad()
        classification("mean")(net, batch).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        str(net), net.state_dict(), copy.deepcopy(net), repr(list(net.parameters()))
        if context is not None:
            context.__exit__(None, None, None)
    torch.testing.assert_close([*model.parameters()], [*plain.parameters()], rtol=1e-5, atol=1e-6)


def test_parameters_of_two_dtypes() -> None:
    model = Uses(lambda m, x: m.b(m.a(x.float()).double()), **two_layers())
    model.b.double()
    with pc.collect(model, pc.SqNorms()) as record:
        regression("mean")(model, (X,)).backward()
    gradients = per_example_gradients(
        Uses(lambda m, x: m.b(m.a(x)), a=model.a, b=model.b), regression("mean"), (X,)
    )
    assert_norms(record, gradients, 1e-5)
    assert record.by_parameter["a.weight"].sq_norms.dtype == torch.float32
    assert record.by_parameter["b.weight"].sq_norms.dtype == F64


def test_a_model_in_another_module_is_measured_by_its_own_names() -> None:
    inner, head = MLP().double(), nn.Linear(7, 2).double()
    x = torch.randn(4, 11, dtype=F64)
    with pc.collect(inner, pc.SqNorms()) as record:
        head(inner(x)).square().mean().backward()
    assert list(record.by_parameter) == [name for name, _ in inner.named_parameters()]
    assert head.weight.grad is not None
