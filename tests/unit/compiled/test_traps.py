"""Things that a trace would bake in are traced anew, refused or found, none silently wrong."""

import copy
import gc
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.replayed import assert_same, same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pycoherence as pc


def mlp() -> Any:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def batch(n: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6), torch.randint(4, (n,))


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def pair(build: Callable[[], Any] = mlp) -> Any:
    model = build()
    return model, copy.deepcopy(model)


# Made anew.


def test_dropout_training_and_frozen_parameters() -> None:
    model, twin = pair(lambda: nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.2), nn.Linear(5, 4)))
    step = pc.compile(model, mean_loss, pc.SqNorms())
    changes: list[Callable[[Any], Any]] = [
        lambda m: None,
        lambda m: setattr(m[1], "p", 0.7),
        lambda m: m.eval(),
        lambda m: m[0].weight.requires_grad_(False),
        lambda m: m.double().float(),  # new numbers in the same parameters
        lambda m: m[2].register_forward_hook(lambda m, args, out: 2 * out),
    ]
    for traces, change in zip((1, 2, 3, 4, 4, 5), changes, strict=True):
        for each in (model, twin):
            change(each)
            each.zero_grad()
        assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
        assert step.traces == traces


def test_shapes_strides_and_dtypes_of_the_batch() -> None:
    model, twin = pair()
    step = pc.compile(model, mean_loss, pc.SqNorms())
    for traces, n in ((1, 7), (2, 3), (2, 7), (2, 3)):
        assert_same(step, model, twin, mean_loss, batch(n), pc.SqNorms())
        assert step.traces == traces
    x, y = torch.randn(6, 7).T, torch.randint(4, (7,))
    assert_same(step, model, twin, mean_loss, (x, y), pc.SqNorms())
    assert step.traces == 3


def test_one_tensor_twice_is_not_two() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1][:, :4])

    model, twin = pair()
    step = pc.compile(model, loss_fn, pc.SqNorms())
    x = torch.randn(7, 6)
    assert_same(step, model, twin, loss_fn, (x, x), pc.SqNorms())
    assert_same(step, model, twin, loss_fn, (x, torch.randn(7, 6)), pc.SqNorms())
    assert step.traces == 2


def test_modules_and_parameters_that_are_replaced() -> None:
    model, twin = pair()
    step = pc.compile(model, mean_loss, pc.SqNorms())
    assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
    new = nn.Parameter(torch.randn(5, 6))
    model[0].weight, twin[0].weight = new, nn.Parameter(new.detach().clone())
    assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
    assert step.traces == 1  # parameters are inputs
    model[1], twin[1] = nn.Tanh(), nn.Tanh()
    assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
    model[2].weight, twin[2].weight = model[2].weight, twin[2].weight
    assert step.traces == 2
    with torch.no_grad():
        model[0].weight.mul_(2)
        twin[0].weight.mul_(2)
    assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
    assert step.traces == 2


def test_weights_that_are_tied_later() -> None:
    model, twin = pair(lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    step = pc.compile(model, mean_loss, pc.SqNorms())
    given = torch.randn(7, 6), torch.randint(6, (7,))
    assert_same(step, model, twin, mean_loss, given, pc.SqNorms())
    for each in (model, twin):
        each[1].weight = each[0].weight
        each.zero_grad()
    assert_same(step, model, twin, mean_loss, given, pc.SqNorms())
    assert step.traces == 2


def test_numbers_around_the_loss() -> None:
    smoothing = 0.0
    weights = torch.ones(4)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], weights, label_smoothing=smoothing)

    model, twin = pair()
    step = pc.compile(model, loss_fn, pc.SqNorms())
    assert_same(step, model, twin, loss_fn, batch(), pc.SqNorms())
    weights.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))  # in place
    assert_same(step, model, twin, loss_fn, batch(), pc.SqNorms())
    assert step.traces == 1
    weights = torch.tensor([4.0, 2.0, 3.0, 4.0])  # another tensor
    assert_same(step, model, twin, loss_fn, batch(), pc.SqNorms())
    assert step.traces == 2
    smoothing = 0.3
    assert_same(step, model, twin, loss_fn, batch(), pc.SqNorms())
    assert step.traces == 3


SCALE = 1.0


def test_globals_and_objects_around_the_loss() -> None:
    global SCALE

    class Loss:
        def __init__(self) -> None:
            self.power = 1

        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            return SCALE * mean_loss(model, batch) ** self.power

    model, twin = pair()
    loss_fn = Loss()
    step = pc.compile(model, loss_fn, pc.SqNorms())
    assert_same(step, model, twin, loss_fn, batch(), pc.SqNorms())
    try:
        SCALE = 2.0
        assert_same(step, model, twin, loss_fn, batch(), pc.SqNorms())
    finally:
        SCALE = 1.0
    loss_fn.power = 2
    assert_same(step, model, twin, loss_fn, batch(), pc.SqNorms())
    assert step.traces == 3


def test_switches_of_torch_and_of_the_library() -> None:
    model, twin = pair()
    step = pc.compile(model, mean_loss, pc.SqNorms())
    assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
    assert step.traces == 2
    with pc.backend("reference"):
        assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
    assert step.traces == 3
    torch.use_deterministic_algorithms(False)
    try:
        assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
    finally:
        torch.use_deterministic_algorithms(True)
    assert step.traces == 4


def test_directions_that_are_replaced() -> None:
    model, twin = pair()
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    dots = pc.Dots(direction)
    step = pc.compile(model, mean_loss, dots)
    for _ in range(2):
        assert_same(step, model, twin, mean_loss, batch(), dots)
    direction["0.weight"].mul_(2)
    assert_same(step, model, twin, mean_loss, batch(), dots)
    assert step.traces == 1
    direction["0.weight"] = torch.randn(5, 6)
    assert_same(step, model, twin, mean_loss, batch(), dots)
    assert step.traces == 2


def test_places_that_the_capture_reads() -> None:
    """An index that is kept by the model, which tells whose examples rows are."""

    class Reordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)
            self.order = nn.Buffer(torch.tensor([2, 0, 1]))
            self.back = nn.Buffer(torch.tensor([1, 2, 0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x[self.order]).tanh()[self.back])

    model, twin = pair(Reordered)
    step = pc.compile(model, mean_loss, pc.SqNorms())
    for _ in range(2):
        assert_same(step, model, twin, mean_loss, batch(3), pc.SqNorms())
    assert step.traces == 1
    for each in (model, twin):
        each.order.copy_(torch.tensor([1, 0, 2]))
        each.back.copy_(torch.tensor([1, 0, 2]))
    assert_same(step, model, twin, mean_loss, batch(3), pc.SqNorms())
    assert step.traces == 2


def test_too_many_traces() -> None:
    step = pc.compile(mlp(), mean_loss, pc.SqNorms(), max_traces=2)
    step(batch(3))
    step(batch(4))
    with pytest.raises(RuntimeError, match="max_traces=2"):
        step(batch(5))
    step(batch(3))


# Refused.


class Trap(nn.Module):
    """A linear layer, and what is done beside it."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.count = 0
        self.kept: list[Tensor] = []
        self.numbers = nn.Buffer(torch.zeros(()))
        self._trap = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._trap(self, x)


def branch(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return y if y.mean() > 1e9 else 2 * y


def swallowed(m: Any, x: Tensor) -> Tensor:
    """A branch whose error nobody sees."""
    y = m.a(x)
    try:
        return y if float(y.detach().sum()) > 1e9 else 2 * y
    except RuntimeError:
        return 2 * y


def counter(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return m.a(x)


def kept_attribute(m: Any, x: Tensor) -> Tensor:
    m.last = m.a(x)
    return m.last


def kept_in_a_list(m: Any, x: Tensor) -> Tensor:
    m.kept.append(m.a(x).detach())
    return m.a(x)


def python_random(m: Any, x: Tensor) -> Tensor:
    return m.a(x) * (0.5 if random.random() < 1e-9 else 1)


def own_generator(m: Any, x: Tensor) -> Tensor:
    return m.a(x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))


def drawn_again(m: Any, x: Tensor) -> Tensor:
    layer = lambda x: F.dropout(m.a(x), 0.5)  # noqa: E731
    return checkpoint(layer, x, use_reentrant=False)


def new_buffer(m: Any, x: Tensor) -> Tensor:
    m.numbers = m.numbers + 1
    return m.a(x)


HELD = [[torch.ones(4)], {"deep": [{"deeper": torch.ones(4)}]}]


def unseen_constant(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + HELD[1]["deep"][0]["deeper"]


def another_name(m: Any, x: Tensor) -> Tensor:
    return m.a(x) @ torch.ones(4, 4) + m.names[0]


def masked(m: Any, x: Tensor) -> Tensor:
    rows = x[x[:, 0] > 0]
    return m.a(x) + rows.sum()


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "branch": (branch, r"test_traps.py:\d+ reads numbers of the batch or the parameters"),
    "swallowed": (swallowed, r"test_traps.py:\d+ reads numbers of the batch or the parameters"),
    "counter": (counter, r"sets attributes of modules \(count\)"),
    "attribute": (kept_attribute, r"sets attributes of modules \(last\)"),
    "list": (kept_in_a_list, "numbers that Python keeps|kept a tensor of the pass"),
    "random": (python_random, "Python's or NumPy's random"),
    "generator": (own_generator, "generator of its own"),
    "checkpointed-dropout": (drawn_again, "draws random numbers again"),
    "new-buffer": (new_buffer, "in the place of the buffers numbers"),
    "unseen-constant": (unseen_constant, r"neither in the batch nor .* constants="),
    "mask": (masked, r"test_traps.py:\d+ reads numbers of the batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    forward, says = REFUSED[name]
    model = Trap(forward)
    step = pc.compile(model, mean_loss, pc.SqNorms())
    with pytest.raises(pc.UnsupportedError, match=says) as error:
        step(batch())
    assert "What to do:" in str(error.value)
    assert model.a.weight.grad is None  # nothing happened
    assert step.traces == 0
    model.kept.clear()
    gc.collect()
    with pc.collect(model, pc.SqNorms()) as record:
        mean_loss(model, batch()).backward()
    assert type(record.sq_norms) is Tensor


def test_parameters_under_another_name_are_refused() -> None:
    model: Any = Trap(another_name)
    model.names = [model.a.bias]
    step = pc.compile(model, mean_loss, pc.SqNorms())
    with pytest.raises(pc.UnsupportedError, match="requires a gradient"):
        step(batch())


def test_tensors_that_require_gradients_are_refused() -> None:
    prompt = torch.ones(6, requires_grad=True)
    step = pc.compile(mlp(), lambda m, b: mean_loss(m, (b[0] + prompt, b[1])), pc.SqNorms())
    with pytest.raises(pc.UnsupportedError, match="requires a gradient"):
        step(batch())
    x, y = batch()
    with pytest.raises(pc.UnsupportedError, match="requires a gradient"):
        pc.compile(mlp(), mean_loss, pc.SqNorms())((x.requires_grad_(), y))


def test_listed_constants_are_accepted() -> None:
    model, twin = Trap(unseen_constant), Trap(unseen_constant)
    twin.load_state_dict(model.state_dict())
    held = HELD[1]["deep"][0]["deeper"]  # pyright: ignore
    step = pc.compile(model, mean_loss, pc.SqNorms(), constants=[held])
    for _ in range(3):
        assert_same(step, model, twin, mean_loss, batch(), pc.SqNorms())
        held.mul_(1.5)


def test_a_constant_that_is_written_is_refused() -> None:
    steps = torch.zeros(())

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        steps.add_(1)
        return mean_loss(model, batch) + steps

    step = pc.compile(mlp(), loss_fn, pc.SqNorms())
    with pytest.raises(pc.UnsupportedError, match="writes into a tensor"):
        step(batch())


def test_a_batch_that_is_written_is_refused() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        batch[0].mul_(2)
        return mean_loss(model, batch)

    with pytest.raises(pc.UnsupportedError, match="writes into tensors of the batch"):
        pc.compile(mlp(), loss_fn, pc.SqNorms())(batch())


def test_other_kinds_of_batches_are_refused() -> None:
    step = pc.compile(mlp(), mean_loss, pc.SqNorms())
    with pytest.raises(pc.UnsupportedError, match="holds a object"):
        step((*batch(), object()))
    with pytest.raises(pc.UnsupportedError, match="not dense"):
        step((torch.eye(6).to_sparse(), torch.zeros(6, dtype=torch.int64)))


def test_a_block_around_a_step_is_refused() -> None:
    model = mlp()
    step = pc.compile(model, mean_loss, pc.SqNorms())
    for _ in range(2):
        with pc.collect(model, pc.SqNorms()), pytest.raises(RuntimeError, match="nested"):
            step(batch())
        step(batch())


def test_wrappers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(pc.UnsupportedError, match=r"DistributedDataParallel.*\.module"):
        pc.compile(Wrapped(mlp()), mean_loss, pc.SqNorms())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"rule": pc.Median}, TypeError, "object"),
        ({"loss_scale": 0.0}, ValueError, "loss_scale"),
        ({"loss_reduction": "none"}, ValueError, "loss_reduction"),
        ({"check": -1}, ValueError, "check"),
        ({"max_traces": 0}, ValueError, "max_traces"),
        ({"max_traces": 1.5}, TypeError, "max_traces"),
        ({"constants": [1]}, TypeError, "constants"),
        ({"group_size": 0}, ValueError, "group_size"),
    ],
    ids=str,
)
def test_arguments(options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        pc.compile(mlp(), mean_loss, pc.SqNorms(), **options)


def weighting(gram: Tensor) -> Tensor:
    return gram.diagonal()


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (pc.NormClip(1.0, generator=torch.Generator()), "NormClip has a generator"),
        (pc.AutoClip(1.0, 1.0, generator=pc.secure_normal), "AutoClip has a generator"),
        (pc.Bucketing(2, pc.Krum(1), torch.Generator()), "Bucketing has a generator"),
        (pc.AdaptiveClip(1.0), "AdaptiveClip keeps a state in 'threshold'"),
        (pc.ARC(1, pc.AdaptiveClip(1.0)), "ARC keeps a state in 'threshold'"),
        (pc.FromWeighting(weighting), "FromWeighting gives its function"),
        (pc.MDA(1), "MDA reads numbers"),
        (pc.NNM(1, pc.SMEA(1)), "SMEA reads numbers"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_rules_that_are_refused(rule: Any, says: str) -> None:
    with pytest.raises(pc.UnsupportedError, match=rf"{says}.*What to do: "):
        pc.compile(mlp(), mean_loss, pc.SqNorms(), rule=rule)


def test_bulyan_that_drops_is_refused() -> None:
    with pytest.raises(pc.UnsupportedError, match=r"Bulyan with nonfinite=.drop. reads"):
        pc.compile(mlp(), mean_loss, rule=pc.Bulyan(1), nonfinite="drop")


def test_a_step_that_blocks_have_begun_is_refused() -> None:
    """Its noise is that of the largest part of its batches, which blocks know."""
    model, rule = mlp(), pc.NormClip(1.0, 1.0)
    step = pc.compile(model, mean_loss, rule=rule)
    step(batch())
    with pc.aggregate(model, rule, last=False):
        mean_loss(model, batch()).backward()
    with pytest.raises(pc.UnsupportedError, match=r"NormClip.* with last=False"):
        step(batch())
    with pc.aggregate(model, rule):
        mean_loss(model, batch()).backward()
    step(batch())
    assert step.traces == 1


def test_a_rule_with_a_state_of_its_own_is_refused() -> None:
    class Kept:
        def state_dict(self) -> dict[str, float]:
            return {}

    rule = pc.NormClip(1.0)
    object.__setattr__(rule, "threshold", Kept())
    with pytest.raises(pc.UnsupportedError, match=r"NormClip keeps a state in 'threshold'"):
        pc.compile(mlp(), mean_loss, rule=rule)


def test_no_statistic() -> None:
    with pytest.raises(ValueError, match="statistics"):
        pc.compile(mlp(), mean_loss)


def test_a_loss_that_is_no_scalar() -> None:
    step = pc.compile(mlp(), lambda m, b: m(b[0]), pc.SqNorms())
    with pytest.raises(ValueError, match="scalar"):
        step(batch())


# Found by the check.


def test_what_python_keeps_out_of_sight_is_found() -> None:
    """A generator of numbers that no one looks into."""
    numbers = iter(range(1, 100))
    model = mlp()
    step = pc.compile(model, lambda m, b: next(numbers) * mean_loss(m, b), pc.SqNorms())
    model[0].weight.grad = before = torch.ones(5, 6)
    with pytest.raises(pc.VerificationError, match="the gradient of"):
        step(batch())
    assert model[0].weight.grad is before
    assert same(before, torch.ones(5, 6))
    with pytest.raises(pc.VerificationError):  # and not used without a check the next time
        step(batch())
    assert step.traces == 0


def test_buffers_are_put_back_when_a_check_fails() -> None:
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    model: Any = nn.Sequential(nn.Unflatten(1, (3, 2)), norm, nn.Flatten(), nn.Linear(6, 4))
    numbers = iter(range(1, 100))
    step = pc.compile(model, lambda m, b: next(numbers) * mean_loss(m, b), pc.SqNorms())
    before = {name: x.clone() for name, x in model.named_buffers()}
    with pytest.raises(pc.VerificationError, match=re.escape("a replay of the pass")):
        step(batch())
    assert all(same(x, before[name]) for name, x in model.named_buffers())


def test_a_later_check_finds_what_changes_later() -> None:
    numbers = iter([1] * 3 + [2] * 100)
    step = pc.compile(mlp(), lambda m, b: next(numbers) * mean_loss(m, b), pc.SqNorms(), check=4)
    given = batch()
    for _ in range(7):  # two in the first, and one in each fourth
        step(given)
    with pytest.raises(pc.VerificationError, match="the loss"):
        step(given)
