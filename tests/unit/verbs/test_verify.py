"""`verify` must pass what is exact and name what is not."""

import math

import pytest
import torch
import torch.nn.functional as F
from catalogue.refusals import REFUSALS
from catalogue.row import Uses
from support.models import MODELS, classification, make
from support.snapshots import Snapshot
from torch import Tensor, nn

import pycoherence as pc

MEAN = classification("mean")
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_passes_exact_models(name: str, reduction: str, dtype: torch.dtype) -> None:
    model, batch = make(name, dtype)
    result = pc.verify(model, classification(reduction), batch, loss_reduction=reduction)
    assert result.failures == []
    names = [n for n, _ in model.named_parameters()]
    assert list(result.sq_norms) == list(result.gradient) == names
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    assert max(*result.sq_norms.values(), *result.gradient.values()) < limit


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_passes_models_in_half_precision(name: str, dtype: torch.dtype) -> None:
    model, batch = make(name, dtype)
    assert pc.verify(model, MEAN, batch).failures == []


def test_leaves_the_model_and_its_gradients_alone() -> None:
    model, batch = make("cnn")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = Snapshot(model)
    pc.verify(model, MEAN, batch)
    before.assert_unchanged(model)
    with torch.no_grad():
        pc.verify(model, MEAN, batch)
        assert not torch.is_grad_enabled()


def two_branches(mix) -> nn.Module:
    """A mixed branch next to an honest one; they meet only in the sum of the losses."""
    return Uses(
        lambda m, x: m.honest(x) + mix(m.mixed(x)), honest=nn.Linear(6, 3), mixed=nn.Linear(6, 3)
    ).double()


def total(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum(1).mean()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_groups_of_rows(reduction: str) -> None:
    """A mixture of the rows of a group mixes no examples."""
    model = two_branches(lambda y: y.view(-1, 2, 3).softmax(1).view(-1, 3))
    x = torch.randn(8, 6, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return getattr(model(x).square().sum(1), reduction)()

    def verify(group_size: int, x: Tensor) -> pc.Verification:
        return pc.verify(model, loss, x, loss_reduction=reduction, group_size=group_size)

    for group_size in (2, 4, 8):
        assert max(verify(group_size, x).sq_norms.values()) < 1e-12
    with pytest.raises(pc.UnsupportedError, match="not whole groups of group_size=2"):
        verify(2, x[:7])
    with pytest.raises(TypeError, match="group_size to be a whole number"):
        verify(2.0, x)


X = torch.linspace(-2, 1, 24, dtype=torch.float64).reshape(4, 6).cos()

MIXES = {
    "centred": lambda y: (y - y.mean(0)).square(),
    "softmax-over-the-batch": lambda y: y.softmax(0).log(),
    "first-of-the-batch": lambda y: y * y[:1],
    "rolled": lambda y: y * y.roll(1, 0),
    "sorted": lambda y: y.sort(0).values * torch.arange(len(y)).unsqueeze(1),
    "divided-by-the-batch": lambda y: y / len(y),
}


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_names_the_parameters_whose_examples_are_mixed(mix) -> None:
    with pytest.raises(pc.VerificationError) as failure:
        pc.verify(two_branches(mix), total, X)
    message = str(failure.value)
    named = [line.split(":")[0].strip() for line in message.splitlines()[1:-1]]
    assert "mixed.weight" in named
    assert not any(name.startswith("honest") for name in named)
    assert "mixes examples" in message


@pytest.mark.parametrize(("actual", "said"), [("mean", "sum"), ("sum", "mean")])
@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_loss_reduction_fails_for_every_parameter(
    name: str, actual: str, said: str
) -> None:
    model, batch = make(name, torch.float64)
    with pytest.raises(pc.VerificationError, match="loss_reduction") as failure:
        pc.verify(model, classification(actual), batch, loss_reduction=said)
    for parameter, _ in model.named_parameters():
        assert f"{parameter}:" in str(failure.value)


def test_a_batch_dimension_that_is_not_the_first_fails() -> None:
    """`[T, B, C]` with T = B: no shape tells."""
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 4, 3, dtype=torch.float64)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, weights = batch
        return (model(x).square().sum(2) * weights).sum(0).mean()

    with pytest.raises(pc.VerificationError, match="first dimension"):
        pc.verify(model, loss, (x, torch.rand(4, dtype=torch.float64)))


def test_weighted_examples_fail() -> None:
    """Their loss is a mean by the weights of the batch, not over the examples."""
    model, (inputs, labels) = make("mlp", torch.float64)
    weights = torch.linspace(0.1, 3, 7, dtype=torch.float64)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], weight=weights)

    with pytest.raises(pc.VerificationError):
        pc.verify(model, loss, (inputs, labels))


def test_dropout_fails_and_eval_mode_passes() -> None:
    model, batch = make("mlp")
    model.append(nn.Dropout(0.5))
    with pytest.raises(pc.VerificationError, match=r"model\.eval\(\)"):
        pc.verify(model, MEAN, batch)
    model.eval()
    assert pc.verify(model, MEAN, batch).failures == []


def test_an_error_in_one_example_of_many_is_found() -> None:
    def leak(y: Tensor) -> Tensor:
        return torch.cat([y[:-1], y[-1:] + 0.01 * y[:1] * (len(y) > 1)])

    with pytest.raises(pc.VerificationError, match=r"mixed\.weight"):
        pc.verify(two_branches(leak), total, X)


def test_the_allowed_error_can_be_set() -> None:
    def nearly(y: Tensor) -> Tensor:
        return y * (1 + 1e-6 * (len(y) > 1))

    assert pc.verify(two_branches(nearly), total, X, rtol=1e-4).failures == []
    with pytest.raises(pc.VerificationError, match=r"more than 1\.0e-08"):
        pc.verify(two_branches(nearly), total, X, rtol=1e-8)


def test_refusals_pass_through() -> None:
    case = REFUSALS["native-function"]
    with pytest.raises(pc.UnsupportedError, match="'scale' of module '1'"):
        pc.verify(case.build(), lambda model, x: model(x).mean(), case.inputs())


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "nested"])
def test_batches_may_be_nested(form: str) -> None:
    model, (inputs, labels) = make("mlp")
    batch, read = {
        "tuple": ((inputs, labels), lambda b: b),
        "list": ([inputs, labels], lambda b: b),
        "dict": ({"x": inputs, "y": labels}, lambda b: (b["x"], b["y"])),
        "nested": (
            {"x": [inputs, "name"], "y": (labels, 3, None)},
            lambda b: (b["x"][0], b["y"][0]),
        ),
    }[form]
    assert pc.verify(model, lambda m, b: MEAN(m, read(b)), batch).failures == []


def test_tensors_of_another_length_are_shared_by_all_examples() -> None:
    model, (inputs, labels) = make("mlp")
    scale = torch.tensor([1.0, 2.0])

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return MEAN(model, batch[:2]) * batch[2].sum() * batch[3]

    batch = (inputs, labels, scale, torch.tensor(2.0))
    assert pc.verify(model, loss, batch).failures == []


def test_unused_and_frozen_parameters_pass() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3)}).double()
    model["a"].bias.requires_grad_(False)
    result = pc.verify(model, lambda m, x: m["a"](x).square().mean(), X)
    assert list(result.sq_norms) == ["a.weight", "b.weight", "b.bias"]
    assert result.gradient["b.weight"] == 0


def test_gradients_that_vanish_but_for_rounding_pass() -> None:
    """A bias before a norm has no effect; what is left of its gradient is noise."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5, elementwise_affine=False))
    model[0].weight.requires_grad_(False)
    model.append(nn.Linear(5, 3))
    x = torch.randn(4, 6)
    shift = nn.Sequential(nn.LayerNorm(6), nn.Softmax(1), nn.Linear(6, 3), nn.LogSoftmax(1))
    for net in (model, shift):
        assert pc.verify(net, lambda m, x: m(x).square().mean(), x).failures == []


def test_nan_on_both_sides_is_no_failure() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    x[1, 0] = float("nan")
    result = pc.verify(model, lambda m, x: m(x).square().mean(), x)
    assert result.failures == []


def test_nan_on_both_sides_hides_no_error_of_another_example() -> None:
    x = X.clone()
    x[1, 0] = float("nan")
    with pytest.raises(pc.VerificationError, match=r"mixed\.weight"):
        pc.verify(two_branches(MIXES["rolled"]), total, x)
    with pytest.raises(pc.VerificationError):
        pc.verify(nn.Linear(6, 2).double(), lambda m, x: m(x).square().sum(), x)


def test_nan_on_one_side_is_a_failure() -> None:
    def poison(y: Tensor) -> Tensor:
        return y * (math.nan if len(y) == 1 else 1)

    with pytest.raises(pc.VerificationError, match=r"mixed\.weight"):
        pc.verify(two_branches(poison), total, X)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"empty|example"):
        pc.verify(nn.Linear(3, 2), lambda m, x: m(x).sum(), torch.zeros(0, 3), loss_reduction="sum")


def test_a_batch_of_one_passes() -> None:
    model, (inputs, labels) = make("mlp")
    assert pc.verify(model, MEAN, (inputs[:1], labels[:1])).failures == []


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    model, batch = make("mlp")
    with pytest.raises(ValueError, match="scalar"):
        pc.verify(model, lambda m, b: m(b[0]), batch)
    with pytest.raises(ValueError, match="got no use"):
        pc.verify(model, lambda m, b: b[0].sum(), batch)
