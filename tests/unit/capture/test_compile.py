"""Compiled models and steps run in a block as they were written."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.checks import assert_grads_equal, assert_norms, relative_error
from support.models import X4 as X
from support.oracle import m_coherence, per_example_gradients
from torch import Tensor, nn

import pycoherence as pc

Pass = Callable[[nn.Module, Callable[..., Any]], pc.Record]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(batch[0]).square().mean(1).mean()


def in_block(model: nn.Module, run: Callable[[], Tensor | None]) -> pc.Record:
    with pc.collect(model, pc.SqNorms()) as record:
        found = run()
        if found is not None:
            found.backward()
    return record


def of_model(model: nn.Module, compiled: Callable[..., Any]) -> pc.Record:
    fast = compiled(model)
    return in_block(model, lambda: loss(fast, (X,)))


def that_has_run(model: nn.Module, compiled: Callable[..., Any]) -> pc.Record:
    fast = compiled(model)
    fast(X)
    record = in_block(model, lambda: loss(fast, (X,)))
    assert relative_error(fast(X), model(X)) < 1e-12
    return record


def of_loss(model: nn.Module, compiled: Callable[..., Any]) -> pc.Record:
    fast = compiled(lambda: loss(model, (X,)))
    fast()
    return in_block(model, fast)


def of_step(model: nn.Module, compiled: Callable[..., Any]) -> pc.Record:
    def step() -> None:
        loss(model, (X,)).backward()

    return in_block(model, compiled(step))


@pytest.mark.parametrize("fullgraph", [False, True], ids=["graphs", "fullgraph"])
@pytest.mark.parametrize(
    "run", [of_model, that_has_run, of_loss, of_step], ids=lambda run: run.__name__
)
def test_what_is_compiled_is_exact(run: Pass, fullgraph: bool) -> None:
    torch.compiler.reset()
    model = network()
    plain, truth = copy.deepcopy(model), per_example_gradients(model, loss, (X,))

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend="eager", fullgraph=fullgraph)

    assert_norms(run(model, compiled), truth, 1e-10)
    loss(plain, (X,)).backward()
    assert_grads_equal(model, plain, 1e-12)


def test_a_compiled_model_is_measured_under_its_own_names() -> None:
    fast = torch.compile(network(), backend="eager")
    record = in_block(fast, lambda: loss(fast, (X,)))
    assert list(record.by_parameter) == [name for name, _ in fast.named_parameters()]


def test_other_verbs_on_a_compiled_model() -> None:
    torch.compiler.reset()
    model = network()
    fast = torch.compile(model, backend="eager")
    meter = pc.CoherenceMeter(model)
    meter.update(lambda model, batch: loss(fast, batch), (X,))
    m = m_coherence(per_example_gradients(model, loss, (X,)))
    assert meter.compute().m == pytest.approx(m, rel=1e-9)


@pytest.mark.parametrize("fullgraph", [False, True], ids=["graphs", "fullgraph"])
def test_a_block_inside_a_compiled_function_is_refused(fullgraph: bool) -> None:
    torch.compiler.reset()
    model = network()

    def step() -> Tensor:
        with pc.collect(model, pc.SqNorms()) as record:
            loss(model, (X,)).backward()
        return record.sq_norms

    with pytest.raises(Exception, match="cannot be opened inside a compiled function"):
        torch.compile(step, backend="eager", fullgraph=fullgraph)()
    assert all(p.grad is None for p in model.parameters())
    assert step().shape == (4,)


def test_threads_leave_their_blocks_in_any_order() -> None:
    torch.compiler.reset()
    entered, left = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with pc.collect(network(), pc.SqNorms()):
            entered.set()
            left.wait(timeout=30)

    thread = threading.Thread(target=elsewhere)
    with pc.collect(network(), pc.SqNorms()):
        thread.start()
        entered.wait(timeout=30)
    left.set()
    thread.join()

    ran: list[bool] = []

    def seen() -> None:
        ran.append(torch.compiler.is_compiling())

    torch.compile(seen, backend="eager")()
    assert ran == [True]
