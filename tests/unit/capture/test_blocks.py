"""Blocks that are entered and never left, and inputs that no block can take apart."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalogue.row import embedding, linear, uses
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import pycoherence as pc
from pycoherence.capture.blocks import current

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_block_is_left() -> Iterator[None]:
    yield
    pc.close_blocks()
    assert current() is None
    assert not _get_current_function_mode_stack()


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def expected(net: nn.Module, x: Tensor = X) -> Tensor:
    norms = []
    for row in x:
        grads = torch.autograd.grad(net(row[None]).sum(), [*net.parameters()])
        norms.append(sum(g.square().sum() for g in grads))
    return torch.stack(norms).detach()


def assert_measures(net: nn.Module) -> None:
    with pc.collect(net, pc.SqNorms(), loss_reduction="sum") as record:
        net(X).sum().backward()
    torch.testing.assert_close(record.sq_norms, expected(net), rtol=1e-4, atol=0)


ENTER: dict[str, Callable[[nn.Module], Any]] = {
    "collect": lambda net: pc.collect(net, pc.SqNorms()),
    "aggregate": lambda net: pc.aggregate(net, pc.NormClip(1.0)),
}
verbs = pytest.mark.parametrize("verb", ENTER.values(), ids=ENTER)


@verbs
def test_a_block_that_nothing_holds_is_dropped(verb: Callable[[nn.Module], Any]) -> None:
    net = model()
    block = verb(net)
    seen = weakref.ref(block)
    block.__enter__()
    net(X)
    del block
    gc.collect()
    assert seen() is None
    assert current() is None
    assert net(X).shape == (4, 2)
    assert_measures(net)


@verbs
def test_a_block_that_is_held_is_named_and_closed(verb: Callable[[nn.Module], Any]) -> None:
    net = model()
    held = verb(net)
    inside = held.__enter__()
    loss = net(X).sum()
    with pytest.raises(RuntimeError, match=r"cannot be nested.*pc\.close_blocks\(\)"):
        pc.collect(net, pc.SqNorms()).__enter__()
    pc.close_blocks()
    pc.close_blocks()
    assert current() is None
    assert_measures(net)
    held.__exit__(ValueError, ValueError(), None)  # late, and harmless
    assert_measures(net)
    del loss, inside


def test_an_exception_between_two_hooks() -> None:
    net, record = model(), []

    def enter(module: nn.Module, args: Any) -> None:
        record.append(pc.collect(net, pc.SqNorms()))
        record[-1].__enter__()

    handle = net.register_forward_pre_hook(enter)
    with pytest.raises(RuntimeError, match="shape"):
        net(torch.ones(4, 7))
    handle.remove()
    with pytest.raises(RuntimeError, match="close_blocks"):
        assert_measures(net)
    pc.close_blocks()
    assert_measures(net)


def test_close_blocks_without_one_does_nothing() -> None:
    pc.close_blocks()
    with torch.device("cpu"):
        pc.close_blocks()
        assert torch.ones(1).device.type == "cpu"


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_blocks_are_closed_below_other_modes() -> None:
    net, block = model(), pc.collect(model(), pc.SqNorms())
    with Counting() as below:
        block.__enter__()
        with Counting() as above, torch.device("meta"):
            pc.close_blocks()
            stack = _get_current_function_mode_stack()
            assert [type(mode).__name__ for mode in stack] == [
                "Counting",
                "Counting",
                "DeviceContext",
            ]
            before = above.calls, below.calls
            assert torch.ones(1).is_meta
            assert (above.calls, below.calls) > before
        assert _get_current_function_mode_stack() == [below]
        assert_measures(net)
    assert not _get_current_function_mode_stack()


def test_a_block_that_is_left_below_another_mode() -> None:
    net, block = model(), pc.collect(model(), pc.SqNorms())
    block.__enter__()
    with Counting() as above:
        block.__exit__(None, None, None)
        assert _get_current_function_mode_stack() == [above]
        assert_measures(net)


def test_threads_have_blocks_of_their_own() -> None:
    nets, found, errors = [model(), model()], {}, []
    barrier = threading.Barrier(2, timeout=30)

    def measure(i: int) -> None:
        try:
            with pc.collect(nets[i], pc.SqNorms(), loss_reduction="sum") as record:
                barrier.wait()
                mine = current()
                loss = nets[i](X[: 3 + i]).sum()
                barrier.wait()
                loss.backward()
                assert current() is mine
                barrier.wait()
            found[i] = record.sq_norms
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=measure, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for i, net in enumerate(nets):
        torch.testing.assert_close(found[i], expected(net, X[: 3 + i]), rtol=1e-4, atol=0)


def test_a_thread_leaves_the_blocks_of_others_alone() -> None:
    net, seen = model(), []
    with pc.collect(net, pc.SqNorms(), loss_reduction="sum") as record:

        def elsewhere() -> None:
            seen.append(current())
            pc.close_blocks()
            seen.append(net(X).shape)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        net(X).sum().backward()
    assert seen == [None, (4, 2)]
    torch.testing.assert_close(record.sq_norms, expected(net), rtol=1e-4, atol=0)


# Inputs that no block can take apart.


def sparse(x: Tensor, layout: torch.layout) -> Tensor:
    return x.relu().to_sparse(layout=layout)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@verbs
def test_sparse_inputs(verb: Callable[[nn.Module], Any], layout: torch.layout) -> None:
    net, x = model(), sparse(X, layout)
    with pytest.raises(pc.UnsupportedError, match=r"sparse.*What to do:"), verb(net):
        net(x)
    assert_measures(net)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_inputs_in_a_product(layout: torch.layout) -> None:
    net, x = nn.Linear(3, 5), sparse(X, layout)
    block = pc.collect(net, pc.SqNorms())
    with pytest.raises(pc.UnsupportedError, match=r"What to do:"), block:
        torch.sparse.mm(x, net.weight.T).sum().backward()
    assert net.weight.grad is None


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "layout",
    [
        torch.strided,
        torch.jagged,
    ],
    ids=str,
)
@verbs
def test_nested_inputs(verb: Callable[[nn.Module], Any], layout: torch.layout) -> None:
    net = model()
    x = torch.nested.nested_tensor([X[:1], X[1:]], layout=layout)
    with pytest.raises(pc.UnsupportedError, match=r"nested|jagged.*What to do:"), verb(net):
        net(x)
    assert_measures(net)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "made",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged),
    ],
    ids=["coo", "csr", "jagged"],
)
def test_such_inputs_that_the_block_has_made(made: Callable[[Tensor], Tensor]) -> None:
    net = model()
    refused = pytest.raises(pc.UnsupportedError, match=r"(sparse|nested|jagged).*What to do:")
    with refused, pc.collect(net, pc.SqNorms()):
        net(made(X))
    assert_measures(net)


@verbs
def test_vmap_over_the_batch(verb: Callable[[nn.Module], Any]) -> None:
    net, x = model(), torch.stack([X, X + 1, X - 1])
    with pytest.raises(pc.UnsupportedError, match=r"torch\.vmap.*What to do:"), verb(net):
        torch.vmap(net)(x)
    assert_measures(net)


def test_vmap_without_parameters_is_nobodys_business() -> None:
    net = model()
    with pc.collect(net, pc.SqNorms(), loss_reduction="sum") as record:
        scaled = torch.vmap(lambda row: row * row.square().sum().clamp(1, 1))(X)
        net(scaled).sum().backward()
    torch.testing.assert_close(record.sq_norms, expected(net), rtol=1e-4, atol=0)


# Fake tensors: what they leave in caches must not be what later blocks find.


def with_positions(m: Any, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1], device=x.device)
    return m.out(torch.tanh(m.words(x) + m.table(places)))


# Makes its positions once, as many models do.
caching = uses(with_positions, words=linear(3, 4), table=embedding(6, 4), out=linear(4, 2))


def fake_pass(net: nn.Module, *, block: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(4, 5, 3))
        if not block:
            net(x)
            return
        with pc.collect(net, pc.SqNorms()):
            net(x)


@pytest.mark.parametrize("block", [False, True], ids=["before", "around-a-block"])
def test_a_fake_pass_poisons_nothing(block: bool) -> None:
    net, x = caching(), torch.randn(4, 5, 3)
    fake_pass(net, block=block)
    for _ in range(2):
        with pc.collect(net, pc.SqNorms(), loss_reduction="sum") as record:
            net(x).sum().backward()
        assert record.batch_size == 4
        assert type(record.sq_norms) is Tensor
        torch.testing.assert_close(record.sq_norms, expected(net, x), rtol=1e-4, atol=0)


def test_a_fake_pass_inside_a_block() -> None:
    """Such as that of a profiler which counts operations ahead of the true pass."""
    net, x = caching(), torch.randn(4, 5, 3)
    with pc.collect(net, pc.SqNorms(), loss_reduction="sum") as record:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            net(mode.from_tensor(x))
        net(x).sum().backward()
    torch.testing.assert_close(record.sq_norms, expected(net, x), rtol=1e-4, atol=0)
