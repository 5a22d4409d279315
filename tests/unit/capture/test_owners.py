"""Whose element each one is: of tensors that hold the answer as their values."""

from collections.abc import Callable
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from catalogue.row import linear, normal, uses
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checks import assert_norms
from support.oracle import per_example_gradients
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.capture.blocks import current
from pycoherence.capture.facts import (
    EXAMPLES,
    MIXED,
    SHARED,
    Ids,
    Lost,
    Regular,
    along,
    ids_of,
    join,
    join_along,
    recognise,
    regular_at,
)
from pycoherence.capture.owners import written_owner
from pycoherence.sites import LinearSite

CPU = torch.device("cpu")
D = torch.float64


def plainly(shape: tuple[int, ...], owner: Regular) -> Tensor:
    """The ids of an owner, element by element."""
    ids = [i // owner.stride % owner.count for i in range(prod(shape))]
    return torch.tensor(ids, dtype=torch.int64).view(shape)


def said(owner: Any, shape: tuple[int, ...]) -> Tensor:
    return ids_of(owner, shape, CPU).expand(shape)


# Facts.

SHAPES = [(6,), (2, 3), (3, 2), (4, 3, 2), (1, 4), (4, 1), (2, 1, 4), (3, 3), (12, 2), (2, 2, 2, 2)]


class OneRow(nn.Module):
    """A row that all examples share meets a parameter before the batch does."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.layer, self.time = how, nn.Linear(3, 2), nn.Linear(1, 3)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layer(self.how(x, self.time(t)))


@pytest.mark.parametrize(
    "how",
    [
        lambda x, e: x + e,
        lambda x, e: x.relu() * e.expand(len(x), -1),
        lambda x, e: torch.cat([x[:, :2], e.expand(len(x), -1)[:, :1]], 1),
        lambda x, e: (x @ e.mT) * x,
        lambda x, e: torch.where(x > 0, x, e),
    ],
)
def test_rows_of_the_batch_are_not_taken_for_one_example(how: Any) -> None:
    model, x = OneRow(how), torch.randn(4, 3)
    t = torch.ones(1, 1)
    with (
        pytest.raises(pc.UnsupportedError, match=r"4 rows, but the batch size .* is 1"),
        pc.collect(model, pc.SqNorms()),
    ):
        model(t, x)
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        pc.mark_examples(t, dim=None)
        model(t, x).sum().backward()
    assert record.batch_size == 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_along_finds_the_dimension_if_there_is_one(shape: tuple[int, ...]) -> None:
    numel = prod(shape)
    for stride, count in product(range(1, numel + 1), range(1, numel + 1)):
        if numel % (stride * count):
            continue
        owner = Regular(stride, count)
        ids = plainly(shape, owner)
        assert torch.equal(said(owner, shape), ids)
        varying = [d for d in range(ids.dim()) if not (ids == ids.narrow(d, 0, 1)).all()]
        place = along(shape, owner)
        if place is None:
            assert len(varying) != 1
        else:
            d, inner = place
            assert varying == [d]
            assert regular_at(shape, d, inner, count) == owner


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_owner_along_a_dimension(shape: tuple[int, ...]) -> None:
    for d, n in enumerate(shape):
        for inner, count in product(range(1, n + 1), range(2, n + 1)):
            if n % (inner * count) == 0:
                owner = regular_at(shape, d, inner, count)
                assert along(shape, owner) == (d, inner)
                index = torch.arange(n).view([-1 if e == d else 1 for e in range(len(shape))])
                expected = (index // inner % count).expand(shape)
                assert torch.equal(said(owner, shape), expected)


def test_nothing_has_an_owner_along_what_has_its_size() -> None:
    assert along((3, 0), Regular(1, 3)) == (0, 1)
    assert along((0, 4), Regular(1, 4)) == (1, 1)
    assert along((0, 4), Regular(1, 5)) is None
    assert ids_of(Regular(1, 3), (3, 0), CPU).shape == (3, 0)
    assert recognise(torch.zeros(3, 0, dtype=torch.int64), (3, 0), 3, "f") == Regular(1, 3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_pattern_is_recognised(shape: tuple[int, ...]) -> None:
    numel = prod(shape)
    for stride, count in product(range(1, numel + 1), range(1, numel + 1)):
        if numel % (stride * count) == 0:
            ids = plainly(shape, Regular(stride, count))
            found = recognise(ids, shape, count, "f")
            assert isinstance(found, Regular)
            assert found.count == count
            assert torch.equal(said(found, shape), ids)


@given(st.data())
@settings(max_examples=60)
def test_any_ids_are_told_as_they_are(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    count = data.draw(st.integers(2, 4))
    drawn = st.lists(st.integers(0, count - 1), min_size=prod(shape), max_size=prod(shape))
    ids = torch.tensor(data.draw(drawn)).view(shape)
    found = recognise(ids, shape, count, "f")
    assert isinstance(found, (Regular, Ids))
    assert torch.equal(said(found, shape), ids)


@given(st.data())
@settings(max_examples=100)
def test_holes_never_change_what_is_known(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    count = data.draw(st.integers(2, 4))
    drawn = st.lists(st.integers(-1, count - 1), min_size=prod(shape), max_size=prod(shape))
    ids = torch.tensor(data.draw(drawn)).view(shape)
    found = recognise(ids, shape, count, "f")
    known = ids != SHARED
    if found is None:
        assert not known.any()
    else:
        assert torch.equal(said(found, shape)[known], ids[known])


@pytest.mark.parametrize("ids", [[0, -1, -1, 1], [-1, -1, -1, 1], [0, 0, -1, 0], [0, -1, 1]])
def test_a_row_of_nobody_stays_nobodys(ids: list[int]) -> None:
    """Rows may lie in any order, so that nothing follows for a place from those before it."""
    found = recognise(torch.tensor(ids), (len(ids),), 2, "f")
    assert isinstance(found, Ids)
    assert said(found, (len(ids),)).tolist() == ids


def test_holes_in_one_of_two_dimensions() -> None:
    ids = torch.full((3, 4), SHARED)
    ids[:, 1] = torch.arange(3)
    assert recognise(ids, (3, 4), 3, "f") == regular_at((3, 4), 0, 1, 3)
    square = torch.full((3, 3), SHARED)
    square.diagonal().copy_(torch.arange(3))
    found = recognise(square, (3, 3), 3, "f")  # along either of the two
    assert torch.equal(said(found, (3, 3)), square)


def test_nobodys_and_everybodys() -> None:
    assert recognise(torch.full((4,), SHARED), (4,), 2, "f") is None
    assert recognise(torch.full((4,), MIXED), (4,), 2, "f") == Lost("f", mixed=True, count=2)
    some = recognise(torch.tensor([0, 1, MIXED, SHARED]), (4,), 2, "f")
    assert isinstance(some, Ids)
    only = recognise(torch.tensor([MIXED, SHARED]), (2,), 2, "f")
    assert only == Lost("f", mixed=True, count=2)
    assert said(Lost("f", mixed=False, count=2), (2, 2)).unique().tolist() == [MIXED]


def test_one_example_has_all() -> None:
    assert recognise(torch.zeros(2, 3, dtype=torch.int64), (2, 3), 1, "f") == Regular(1, 1)
    assert said(Regular(1, 1), (2, 3)).unique().tolist() == [0]
    assert along((2, 3), Regular(1, 1)) is None


def test_joined_ids() -> None:
    a = torch.tensor([SHARED, 0, 0, 0, MIXED, SHARED])
    b = torch.tensor([SHARED, SHARED, 0, 1, 1, 2])
    assert join(a, b).tolist() == [SHARED, 0, 0, MIXED, MIXED, 2]
    assert torch.equal(join(a, b), join(b, a))


def test_ids_joined_along_dimensions() -> None:
    ids = torch.tensor([[0, 0, SHARED], [0, 1, SHARED], [SHARED, SHARED, SHARED], [2, MIXED, 2]])
    assert join_along(ids, [1]).flatten().tolist() == [0, MIXED, SHARED, MIXED]
    assert join_along(ids, []) is ids
    assert join_along(ids[:, :1], [1]).shape == (4, 1)
    assert join_along(ids[:, :0], [1]).tolist() == [[SHARED]] * 4


def test_what_is_written_into_a_view() -> None:
    base = torch.zeros(2, 3, 4)
    view = base[:, 1]
    found = written_owner(base, None, view, regular_at((2, 4), 0, 1, 2))
    assert found == regular_at((2, 3, 4), 0, 1, 2)  # the pattern goes on in the zeros
    flipped = Ids(torch.tensor([[1], [0]]), 2)
    found = written_owner(base, regular_at((2, 3, 4), 0, 1, 2), view, flipped)
    expected = torch.tensor([0, 1]).view(2, 1, 1).repeat(1, 3, 4)
    expected[:, 1] = torch.tensor([[1], [0]])
    assert torch.equal(said(found, (2, 3, 4)), expected)
    mine = written_owner(base, found, base.permute(2, 0, 1), None)
    assert torch.equal(said(mine, (4, 2, 3)), expected.permute(2, 0, 1))
    lost = Lost("f", mixed=False, count=2)
    assert written_owner(base, lost, view, flipped) is lost


# Chains of functions on a tensor whose values are the examples.


def permuted(draw: Any, x: Tensor) -> Tensor:
    return x.permute(draw(st.permutations(range(x.dim()))))


def transposed(draw: Any, x: Tensor) -> Tensor:
    a, b = (draw(st.integers(-x.dim(), x.dim() - 1)) for _ in range(2))
    return x.clone().transpose_(a, b)


def flattened(draw: Any, x: Tensor) -> Tensor:
    d = draw(st.integers(0, x.dim() - 1))
    return x.flatten(d, min(d + 1, x.dim() - 1))


def unflattened(draw: Any, x: Tensor) -> Tensor:
    d = draw(st.integers(0, x.dim() - 1))
    n = draw(st.sampled_from([k for k in range(1, x.shape[d] + 1) if x.shape[d] % k == 0] or [1]))
    return x.unflatten(d, (n, x.shape[d] // n)) if x.numel() else x


def reshaped(draw: Any, x: Tensor) -> Tensor:
    n = draw(st.sampled_from([k for k in range(1, x.numel() + 1) if x.numel() % k == 0] or [1]))
    return x.reshape(n, x.numel() // n)


def sliced(draw: Any, x: Tensor) -> Tensor:
    d = draw(st.integers(0, x.dim() - 1))
    start, step = draw(st.integers(0, x.shape[d] - 1)), draw(st.integers(1, 2))
    return x[(slice(None),) * d + (slice(start, None, step),)]


def picked(draw: Any, x: Tensor) -> Tensor:
    d = draw(st.integers(0, x.dim() - 1))
    ids = st.lists(st.integers(0, x.shape[d] - 1), min_size=1, max_size=5)
    index = torch.tensor(draw(ids))
    if draw(st.booleans()):
        return x.index_select(d, index)
    return x[(slice(None),) * d + (index,)]


def masked(draw: Any, x: Tensor) -> Tensor:
    bits = draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x)))
    return x[torch.tensor([True, *bits[1:]])]


def catenated(draw: Any, x: Tensor) -> Tensor:
    d = draw(st.integers(0, x.dim() - 1))
    return torch.cat([x, x.flip(draw(st.integers(0, x.dim() - 1)))], d)


def stacked(draw: Any, x: Tensor) -> Tensor:
    return torch.stack([x, x.roll(1, 0)], draw(st.integers(0, x.dim())))


def rolled(draw: Any, x: Tensor) -> Tensor:
    return x.roll(draw(st.integers(-2, 2)), draw(st.integers(0, x.dim() - 1)))


def expanded(draw: Any, x: Tensor) -> Tensor:
    d = draw(st.integers(0, x.dim()))
    shape = list(x.shape)
    shape.insert(d, draw(st.integers(1, 3)))
    return x.unsqueeze(d).expand(shape)


def repeated(draw: Any, x: Tensor) -> Tensor:
    d, n = draw(st.integers(0, x.dim() - 1)), draw(st.integers(1, 2))
    if draw(st.booleans()):
        return x.repeat_interleave(n, d)
    return x.repeat([n if e == d else 1 for e in range(x.dim())])


def chunked(draw: Any, x: Tensor) -> Tensor:
    return draw(st.sampled_from(x.chunk(2, draw(st.integers(0, x.dim() - 1)))))


def unbound(draw: Any, x: Tensor) -> Tensor:
    d = draw(st.integers(0, x.dim() - 1))
    return draw(st.sampled_from(x.unbind(d))) if x.dim() > 1 else x


def split_and_joined(draw: Any, x: Tensor) -> Tensor:
    d = draw(st.integers(0, x.dim() - 1))
    return torch.cat(list(reversed(x.split(2, d))), d)


def gathered(draw: Any, x: Tensor) -> Tensor:
    d = draw(st.integers(0, x.dim() - 1))
    return x.gather(d, x.argsort(d, descending=True))


def sorted_by_value(draw: Any, x: Tensor) -> Tensor:
    order = x.flatten(1)[:, 0].argsort(descending=True) if x.dim() > 1 else x.argsort()
    return x[order]


def written(draw: Any, x: Tensor) -> Tensor:
    found = torch.zeros_like(x).clone()
    found[:] = x.flip(0)
    return found


def swapped(draw: Any, x: Tensor) -> Tensor:
    found = x.clone()
    found[0] = x[-1]
    return found


def put(draw: Any, x: Tensor) -> Tensor:
    order = torch.tensor(draw(st.permutations(range(len(x)))))
    return torch.empty_like(x).index_copy(0, order, x)


def added_in_place(draw: Any, x: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    found.transpose(0, -1).add_(x.transpose(0, -1))
    return found


STEPS = [
    permuted,
    transposed,
    flattened,
    unflattened,
    reshaped,
    sliced,
    picked,
    masked,
    catenated,
    stacked,
    rolled,
    expanded,
    repeated,
    chunked,
    unbound,
    split_and_joined,
    gathered,
    sorted_by_value,
    written,
    swapped,
    put,
    added_in_place,
]


def values_of(shape: tuple[int, ...], d: int) -> Tensor:
    ids = torch.arange(shape[d], dtype=D).view([-1 if e == d else 1 for e in range(len(shape))])
    return ids.expand(shape).clone()


def assert_owned(x: Tensor, path: list[str], count: int) -> None:
    facts = current().facts(x)
    with torch._C.DisableTorchFunction():
        if x.numel():
            assert facts.kind == EXAMPLES, path
            assert facts.owner.count == count, path
            found = said(facts.owner, tuple(x.shape))
            assert torch.equal(found, x.long()), (path, facts.owner)


@given(st.data())
@settings(max_examples=250)
def test_owners_are_those_of_the_values(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    d = data.draw(st.integers(0, len(shape) - 1))
    steps = data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=5))
    with pc.collect(nn.Linear(1, 1), pc.SqNorms()):
        x = pc.mark_examples(values_of(shape, d), dim=d)
        path: list[str] = [f"{shape}, {d}"]
        for step in steps:
            if x.numel() > 400 or x.dim() > 5 or not x.numel():
                break
            x = step(data.draw, x)
            path.append(step.__name__)
            assert_owned(x, path, shape[d])


@given(st.data())
@settings(max_examples=60)
def test_owners_of_packed_rows_are_those_of_the_values(data: st.DataObject) -> None:
    owner = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)))
    steps = data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=4))
    with pc.collect(nn.Linear(1, 1), pc.SqNorms()):
        values = owner.to(D).view(-1, 1, 1).expand(-1, 2, 3).clone()
        x = pc.mark_examples(values, owner=owner)
        path: list[str] = [str(owner.tolist())]
        for step in steps:
            if x.numel() > 400 or x.dim() > 5 or not x.numel():
                break
            x = step(data.draw, x)
            path.append(step.__name__)
            assert_owned(x, path, int(owner.max()) + 1)


# What users teach.


@torch.library.custom_op("owners::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    return x.flip(-1).transpose(0, 1).contiguous()


turned.register_autograd(lambda ctx, g: g.transpose(0, 1).flip(-1))


@torch.library.custom_op("owners::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


unknown.register_autograd(lambda ctx, g: g.transpose(0, 1))


@torch.library.custom_op("owners::centred", mutates_args=())
def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


centred.register_autograd(lambda ctx, g: g - g.mean(0))


@pc.register_rule(torch.ops.owners.turned.default)
def places_of_turned(args: Any, kwargs: Any, result: Tensor) -> Any:
    return [(args[0], (1, 0, 2))]


@pc.register_rule(torch.ops.owners.centred.default)
def places_of_centred(args: Any, kwargs: Any, result: Tensor) -> Any:
    return [(args[0], (-1, 1, 2))]


def through(function: Any) -> nn.Module:
    return uses(lambda m, x: m.b(function(m.a(x))), a=linear(3, 3), b=linear(3, 2))().double()


def second(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(batch[0]).square().sum((0, 2)).mean()


@pytest.mark.parametrize("steps", [4, 5])
def test_a_function_with_a_rule_of_the_user(steps: int) -> None:
    model, x = through(torch.ops.owners.turned.default), torch.randn(4, steps, 3, dtype=D)
    truth = per_example_gradients(model, second, (x,))
    with pc.collect(model, pc.SqNorms()) as record:
        second(model, (x,)).backward()
    assert_norms(record, truth, 1e-10)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (torch.ops.owners.unknown.default, r"module 'b'.*not known after.*register_rule"),
        (torch.ops.owners.centred.default, r"module 'b'.*mixed over the batch by.*centred"),
    ],
    ids=["without", "mixing"],
)
def test_a_function_that_loses_the_examples(function: Any, text: str) -> None:
    model, x = through(function), torch.randn(4, 4, 3, dtype=D)
    with pc.collect(model, pc.SqNorms()), pytest.raises(pc.UnsupportedError, match=text):
        model(x)


def test_rules_and_sites_are_of_functions() -> None:
    for register in (pc.register_rule, pc.register_site):
        with pytest.raises(TypeError, match="expected a torch function, got str"):
            register("linear")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"derived from pycoherence\.LayerRule"):
        pc.register_site(torch.ops.owners.turned.default)(int)  # pyright: ignore


@torch.library.custom_op("owners::planes", mutates_args=())
def planes(x: Tensor, weight: Tensor, factor: float) -> Tensor:
    return factor * torch.einsum("...pi,opi->...o", x, weight)


@torch.library.custom_op("owners::miscounted", mutates_args=())
def miscounted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


@pc.register_site(torch.ops.owners.planes.default)
class Planes(pc.LayerRule):
    features = 2

    def forward(self, x: Tensor, weight: Tensor, factor: float) -> Any:
        self.factor = factor
        return planes(x, weight, factor), (x, weight)

    def factors(self, rows: Any, g: Tensor, x: Tensor, weight: Tensor) -> Any:
        return [LinearSite(rows(x).flatten(-2), rows(self.factor * g), tuple(weight.shape))]

    def input_grad(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self.factor * torch.einsum("...o,opi->...pi", g, weight)


@pc.register_site(torch.ops.owners.miscounted.default)
class Miscounted(pc.LayerRule):
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return miscounted(x, weight, bias), (x, weight)

    def factors(self, rows: Any, g: Tensor, x: Tensor, weight: Tensor) -> Any:
        return [LinearSite(rows(x), rows(g))]

    def input_grad(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return g @ weight


# A layer whose rows are matrices, and its function in plain torch beside it.
PLANES = {"first": linear(3, 3), "last": linear(2, 2), "weight": normal(2, 5, 3)}
of_planes = uses(
    lambda m, x: m.last(torch.ops.owners.planes.default(m.first(x), m.weight, 0.5)), **PLANES
)
of_plain_planes = uses(
    lambda m, x: m.last(0.5 * torch.einsum("...pi,opi->...o", m.first(x), m.weight)), **PLANES
)


def total(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(batch[0]).square().flatten(1).sum(1).mean()


@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 6, 5, 3), (5, 2, 2, 5, 3)], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_a_site_whose_rows_are_matrices(shape: tuple[int, ...], dim: int) -> None:
    model, plain = of_planes().double(), of_plain_planes().double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(shape, dtype=D)
    if dim and len(shape) == 3:
        pytest.skip("the second of three dimensions is inside the matrices, and no batch")
    truth = per_example_gradients(plain, total, (x,))
    with pc.collect(model, pc.SqNorms(), on_unsupported="raise") as record:
        inputs = pc.mark_examples(x.transpose(0, dim).contiguous(), dim=dim)
        model(inputs).square().sum().div(len(x)).backward()
    assert record.batch_size == len(x)
    assert_norms(record, truth, 1e-10)


def test_a_site_whose_row_holds_two_examples() -> None:
    model, x = of_planes().double(), torch.randn(5, 4, 3, dtype=D)
    block = pc.collect(model, pc.SqNorms(), on_unsupported="raise")
    with block, pytest.raises(pc.UnsupportedError, match="examples"):
        model(pc.mark_examples(x.transpose(0, 1).contiguous(), dim=1))


def test_a_site_too_few() -> None:
    model = nn.Linear(3, 2).double()
    with pc.collect(model, pc.SqNorms()):
        x = torch.randn(4, 3, dtype=D)
        loss = torch.ops.owners.miscounted.default(x, model.weight, model.bias).sum()
        with pytest.raises(TypeError, match=r"Miscounted.factors.*2 parameters, got 1"):
            loss.backward()


def test_a_site_for_the_parameters_that_there_are() -> None:
    """One of the two is a constant here, so that one site is right."""
    model = nn.Linear(3, 2, bias=False).double()
    x, bias = torch.randn(4, 3, dtype=D), torch.ones(2, dtype=D)
    with pc.collect(model, pc.SqNorms()) as record:
        torch.ops.owners.miscounted.default(x, model.weight, bias).sum().backward()
    expected = 16 * 2 * x.square().sum(1)
    torch.testing.assert_close(record.sq_norms, expected, rtol=1e-10, atol=0)
