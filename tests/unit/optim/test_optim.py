"""RM3, M3 and RA3 against the definition in plain Python, and as torch's optimizers behave."""

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pycoherence as pc

OPTIMIZERS = [pc.optim.RM3, pc.optim.M3, pc.optim.RA3]
every = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
both_ways = pytest.mark.parametrize("foreach", [False, True])


def plainly(
    kind: type, w: float, grads: Sequence[float | None], lr: float, decay: float, sign: int
) -> list[float]:
    """The weight after each step, in Python numbers; `None` is a step without a gradient."""
    path, seen = [], []
    for grad in grads:
        if grad is not None:
            seen.append(sign * grad + decay * w)
            due = len(seen) >= 3 if kind is not pc.optim.M3 else len(seen) % 3 == 0
            if due:
                last = seen[-3:]
                w -= lr * (sum(last) / 3 if kind is pc.optim.RA3 else sorted(last)[1])
        path.append(w)
    return path


def steps(optimizer: torch.optim.Optimizer, p: Tensor, grads: Sequence[Any]) -> list[Tensor]:
    """The weights after each step."""
    path = []
    for grad in grads:
        p.grad = None if grad is None else torch.as_tensor(grad).to(p)
        optimizer.step()
        path.append(p.detach().clone())
    return path


@every
@both_ways
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_step_is_the_definition(
    kind: Any, foreach: bool, maximize: bool, decay: float
) -> None:
    grads = torch.randn(10, 5, dtype=torch.float64)
    start = torch.randn(5, dtype=torch.float64)
    p = nn.Parameter(start.clone())
    options = {"lr": 0.3, "weight_decay": decay, "maximize": maximize, "foreach": foreach}
    path = torch.stack(steps(kind([p], **options), p, list(grads)))
    for i in range(5):
        sign = -1 if maximize else 1
        truth = plainly(kind, start[i].item(), grads[:, i].tolist(), 0.3, decay, sign)
        torch.testing.assert_close(path[:, i], torch.tensor(truth, dtype=torch.float64))


@every
@both_ways
def test_steps_without_a_gradient_do_not_count(kind: Any, foreach: bool) -> None:
    grads = [1.0, None, 4.0, None, None, 2.0, 3.0, None, 7.0, 5.0]
    p, idle = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(2))
    path = steps(kind([p, idle], lr=1.0, foreach=foreach), p, grads)
    torch.testing.assert_close(torch.stack(path), torch.tensor(plainly(kind, 0, grads, 1, 0, 1)))
    assert idle.tolist() == [1, 1]


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_foreach_gives_the_same_numbers(kind: Any, dtype: torch.dtype) -> None:
    """Parameters of several dtypes, shapes and layouts, without a gradient now and then."""
    shapes = [(3, 4), (0,), (), (2, 3, 5)]
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    params += [torch.randn(4, 6).mT, torch.randn(3, dtype=torch.float64)]
    copies = [[nn.Parameter(p.clone()) for p in params] for _ in range(2)]
    for foreach, ours in zip((False, True), copies, strict=True):
        torch.manual_seed(1)
        optimizer = kind(ours, lr=0.1, weight_decay=0.01, foreach=foreach)
        for step in range(7):
            for i, p in enumerate(ours):
                grad = torch.randn(p.shape).to(p)
                p.grad = None if (step + i) % 5 == 0 else grad
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*copies, strict=True))
    assert not any(torch.equal(a, p) for a, p in zip(copies[0], params, strict=True) if p.numel())


@both_ways
def test_the_median_is_one_of_the_three_numbers(foreach: bool) -> None:
    """`a + b + c - min - max` would give zero here."""
    p = nn.Parameter(torch.zeros(1))
    assert steps(pc.optim.RM3([p], lr=1, foreach=foreach), p, [[1e30], [1.0], [-1e30]])[2] == -1
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    path = steps(
        pc.optim.RM3([p], lr=1, foreach=foreach), p, [[3.0, 1.0], [256.0, 1.0], [1.0, 9.0]]
    )
    assert path[2].tolist() == [-3, -1]


@every
@both_ways
@pytest.mark.parametrize("when", [0, 1, 2])
def test_nan_shows(kind: Any, foreach: bool, when: int) -> None:
    grads = [[1.0, 1.0] for _ in range(3)]
    grads[when][0] = float("nan")
    p = nn.Parameter(torch.zeros(2))
    path = steps(kind([p], lr=1, foreach=foreach), p, grads)
    assert path[2].isnan().tolist() == [True, False]


@pytest.mark.gpu
@every
def test_cuda_agrees_with_cpu(kind: Any) -> None:
    """Where torch itself chooses foreach; NaN and infinities included."""
    grads = torch.randn(8, 4, 3)
    grads[5, 0, 0], grads[5, 1, 1], grads[6, 2, 2] = torch.nan, torch.inf, -torch.inf
    paths = []
    for device in ("cpu", "cuda"):
        p = nn.Parameter(torch.ones(4, 3, device=device))
        path = steps(kind([p], lr=0.1, weight_decay=0.1), p, list(grads))
        paths.append(torch.stack(path).cpu())
    torch.testing.assert_close(*paths, equal_nan=True)


@every
@both_ways
def test_gradients_are_copied(kind: Any, foreach: bool) -> None:
    """`zero_grad(set_to_none=False)` and accumulation write into the same tensor again."""
    grads = torch.randn(7, 3)
    alone, shared = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    path = steps(kind([alone], lr=1, foreach=foreach), alone, list(grads))
    optimizer = kind([shared], lr=1, foreach=foreach)
    shared.grad = torch.zeros(3)
    for grad, truth in zip(grads, path, strict=True):
        shared.grad.copy_(grad)
        optimizer.step()
        assert torch.equal(shared.grad, grad)  # the user's
        assert torch.equal(shared, truth)
        optimizer.zero_grad(set_to_none=False)


@every
@both_ways
@pytest.mark.parametrize("cut", range(5))
def test_a_state_dict_continues_where_it_was_taken(kind: Any, foreach: bool, cut: int) -> None:
    grads = torch.randn(9, 3)
    p = nn.Parameter(torch.zeros(3))
    path = steps(kind([p], lr=0.5, weight_decay=0.1, foreach=foreach), p, list(grads))

    p = nn.Parameter(torch.zeros(3))
    first = kind([p], lr=0.5, weight_decay=0.1)
    steps(first, p, list(grads[:cut]))
    q = nn.Parameter(p.detach().clone())
    second = kind([q], lr=7.0, foreach=foreach)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second.load_state_dict(state)
    second.param_groups[0]["foreach"] = foreach
    assert all(
        torch.equal(a, b) for a, b in zip(steps(second, q, grads[cut:]), path[cut:], strict=True)
    )


@every
def test_a_copy_is_independent(kind: Any) -> None:
    grads = torch.randn(4, 3)
    p = nn.Parameter(torch.zeros(3))
    optimizer = kind([p], lr=0.5)
    steps(optimizer, p, list(grads))
    q, other = copy.deepcopy((p, optimizer))
    assert other.param_groups[0]["params"][0] is q
    assert torch.equal(steps(optimizer, p, [grads[0]])[0], steps(other, q, [grads[0]])[0])


@every
@both_ways
def test_a_group_that_is_added_later_waits_for_its_own_gradients(kind: Any, foreach: bool) -> None:
    grads = [3.0, 1.0, 2.0, 5.0, 4.0, 8.0, 6.0]
    p, late = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
    optimizer = kind([p], lr=1.0, foreach=foreach)
    steps(optimizer, p, grads[:2])
    optimizer.add_param_group({"params": [late], "lr": 0.5, "weight_decay": 0.1})
    path = []
    for grad in grads[2:]:
        p.grad, late.grad = torch.tensor(grad), torch.tensor(grad)
        optimizer.step()
        path.append(late.item())
    assert path == pytest.approx(plainly(kind, 0, grads[2:], 0.5, 0.1, 1))
    assert p.item() == pytest.approx(plainly(kind, 0, grads, 1.0, 0.0, 1)[-1])


@every
def test_closure(kind: Any) -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = kind([p], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        losses = [optimizer.step(closure) for _ in range(9)]
    assert losses[:3] == [5, 5, 5]
    assert losses[-1] < 5
    assert optimizer.step() is None


@every
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_is_a_learning_rate(kind: Any, shape: tuple[int, ...]) -> None:
    for foreach in (False, True):
        p = nn.Parameter(torch.zeros(()))
        lr = torch.full(shape, 0.5)
        optimizer = kind([p], lr=lr, foreach=foreach)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        for _ in range(6):
            p.grad = torch.ones(())
            optimizer.step()
            scheduler.step()
        # Steps at the third and sixth gradient, or at all from the third on.
        assert p.item() == (-0.75 if kind is pc.optim.M3 else -1.25)


@every
def test_schedules_do_not_find_a_momentum(kind: Any) -> None:
    optimizer = kind([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5)


@every
def test_momentum_is_refused(kind: Any) -> None:
    p = nn.Parameter(torch.zeros(1))
    kind([p], lr=0.1, momentum=0.0)
    with pytest.raises(ValueError, match="Momentum causes instability with RM3"):
        kind([p], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"expected momentum 0, got 0\.5"):
        kind([{"params": [p], "momentum": 0.5}], lr=0.1)


@every
def test_bad_options_are_refused(kind: Any) -> None:
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"expected lr >= 0, got -0\.1"):
        kind([p], lr=-0.1)
    with pytest.raises(ValueError, match="expected weight_decay >= 0, got nan"):
        kind([{"params": [p], "weight_decay": float("nan")}], lr=0.1)
    with pytest.raises(ValueError, match=r"expected lr to be one number, got shape \(2,\)"):
        kind([p], lr=torch.ones(2))


@every
def test_complex_parameters_are_refused(kind: Any) -> None:
    bad, good = (nn.Parameter(torch.zeros(1, dtype=d)) for d in (torch.complex64, torch.float32))
    with pytest.raises(TypeError, match="expected real parameters, got complex ones"):
        kind([good, bad], lr=0.1)
    optimizer = kind([good], lr=0.1)
    with pytest.raises(TypeError, match="view_as_real"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


@every
def test_sparse_gradients_are_refused(kind: Any) -> None:
    dense, table = nn.Parameter(torch.zeros(2)), nn.Embedding(5, 2, sparse=True)
    optimizer = kind([{"params": [dense]}, {"params": table.parameters()}], lr=0.1)
    (table(torch.tensor([1])) * dense).sum().backward()
    with pytest.raises(RuntimeError, match=f"{kind.__name__} does not support sparse gradients"):
        optimizer.step()
    assert not optimizer.state  # not even the first group has counted it


@every
def test_a_network_learns(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(64, 4)
    y = x[:, :1] - x[:, 1:2]
    optimizer = kind(model.named_parameters(), lr=0.1)
    losses = []
    for step in range(300):
        part = slice(16 * (step % 4), 16 * (step % 4) + 16)
        loss = nn.functional.mse_loss(model(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.1 * sum(losses[:4])


@every
def test_constructor_errors_name_the_class(kind: Any) -> None:
    p = nn.Parameter(torch.zeros(1))
    for call in (lambda: kind([p]), lambda: kind([p], lr=0.1, nesterov=True)):
        with pytest.raises(TypeError, match=rf"^{kind.__name__}\.__init__"):
            call()
