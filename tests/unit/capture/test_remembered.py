"""The capture keeps walks of models and answers of rules from one block to the next."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pycoherence as pc
from pycoherence.capture import answers
from pycoherence.capture.answers import key_of
from pycoherence.capture.facts import EXAMPLES, Facts, Regular
from pycoherence.capture.model import modules_of
from pycoherence.capture.owners import owners_of
from pycoherence.capture.rules import DIMENSIONS, ELEMENTWISE, MOVEMENT, rule_of


def names(model):
    return [path for path, _ in modules_of(model)]


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))


def test_a_walk_is_that_of_named_modules():
    model = net()
    for _ in range(2):
        assert modules_of(model) == list(model.named_modules())


def replaced(model):
    model[0] = nn.Linear(3, 5)


def renamed(model):
    model[1].last = model[1]._modules.pop("1")


def taken_away(model):
    del model[1][1]


def added(model):
    model[1].append(nn.Linear(2, 2))


def deep(model):
    model[1][0] = nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def shared(model):
    model[1][0] = model[0]


def moved(model):
    """The same names and modules in the same order, of other parents."""
    model[1].head = model[1]._modules.pop("1")
    modules_of(model)
    model.head = model[1].head
    del model[1].head


@pytest.mark.parametrize("change", [replaced, renamed, taken_away, added, deep, shared, moved])
def test_a_walk_sees_that_modules_changed(change):
    model = net()
    modules_of(model)
    change(model)
    assert modules_of(model) == list(model.named_modules())


def test_a_walk_keeps_no_model_alive():
    model = net()
    modules_of(model)
    gone = weakref.ref(model[1])
    del model
    gc.collect()
    assert gone() is None


def test_a_model_at_the_address_of_another_is_walked_anew():
    for size in range(2, 50):
        model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(size)])
        assert len(names(model)) == size + 1
        del model


class Equal(nn.Linear):
    """Compares as a tensor does."""

    def __eq__(self, other):
        return torch.ones(2)

    def __hash__(self):
        return id(self)


def test_modules_may_compare_as_they_like():
    model, x = nn.Sequential(Equal(3, 2)), torch.randn(4, 3)
    for _ in range(2):
        with pc.collect(model, pc.SqNorms()) as record:
            model(x).sum().backward()
        assert record.batch_size == 4


def test_a_parameter_may_be_registered_again():
    class Again(nn.Linear):
        def forward(self, x):
            weight = self.weight
            del self.weight
            self.weight = weight
            return super().forward(x)

    model = Again(3, 2)
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        model(torch.ones(4, 3)).sum().backward()
    torch.testing.assert_close(record.sq_norms, torch.full((4,), 8.0))


def test_parameters_that_change_between_blocks_are_seen():
    model, x = net(), torch.randn(5, 3)
    for change in (lambda: None, lambda: model[0].bias.requires_grad_(False)):
        change()
        with pc.collect(model, pc.SqNorms()) as record:
            model(x).sum().backward()
        expected = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(record.by_parameter) == expected


def facts(stride, count, soft=0):
    return Facts(EXAMPLES, Regular(stride, count), soft=soft)


def key(func, *args, known, kind=MOVEMENT, results=(), **kwargs):
    return key_of(func, args, kwargs, results, {id(x): f for x, f in known}, kind)


def test_arguments_that_are_equal_but_of_other_types_are_told_apart():
    x = torch.randn(2, 3)
    known = [(x, facts(3, 2))]
    keys = {
        key(torch.Tensor.__getitem__, x, index, known=known)
        for index in (1, True, (1,), [1], slice(1), slice(None, None, 1), None, ..., "1")
    }
    assert None not in keys
    assert len(keys) == 9


def test_owners_shapes_and_certainty_are_told_apart():
    x, wide = torch.randn(2, 3), torch.randn(2, 4)
    known = [facts(3, 2), facts(1, 3), facts(3, 2, soft=1), facts(3, 2, soft=2)]
    keys = {key(torch.t, x, known=[(x, f)]) for f in known}
    keys |= {key(torch.t, x, known=[]), key(torch.t, wide, known=[]), key(torch.t, x, 1, known=[])}
    keys |= {key(torch.t, x, known=[], results=[x])}
    assert len(keys) == 8


def test_what_depends_on_numbers_has_no_key():
    x, index = torch.randn(2, 3), torch.tensor([1, 0])
    known = [(x, facts(3, 2))]
    assert key(torch.index_select, x, 0, index, known=known) is None
    assert key(torch.Tensor.__getitem__, x, (slice(None), index), known=known) is None
    assert key(torch.masked_select, x, x > 0, known=known) is None
    assert key(torch.index_select, x, 0, index=index, known=known) is None
    assert key(torch.cat, [x, x], out=object(), known=known) is None
    # What is moved, and not told where to, may be of integers.
    assert key(torch.cat, [index, index], known=[(index, facts(1, 2))]) is not None


def test_numbers_matter_to_no_function_of_numbers():
    x = torch.randn(2, 3)
    known = [(x, facts(3, 2))]
    rates = {key(torch.mul, x, rate, known=known, kind=ELEMENTWISE) for rate in (0.1, 0.2, 3.0)}
    assert len(rates) == 1
    assert len({key(torch.sum, x, dim, known=known, kind=DIMENSIONS) for dim in (0, 1)}) == 2
    # The letters of a product come first.
    letters = ("bi->b", "bi->i")
    assert len({key(torch.einsum, s, x, known=known, kind=DIMENSIONS) for s in letters}) == 2


def test_integers_of_constants_may_be_dimensions():
    x, one, mask = torch.randn(2, 3), torch.tensor(1), torch.ones(3, dtype=torch.bool)
    classes = torch.tensor([0, 2])
    known = [(x, facts(3, 2)), (classes, facts(1, 2))]
    assert key(torch.softmax, x, one, known=known, kind=DIMENSIONS) is None
    assert key(torch.topk, x, k=one, known=known, kind=DIMENSIONS) is None
    assert key(torch.permute, x, torch.tensor([1, 0]), known=known, kind=DIMENSIONS) is None
    assert key(F.cross_entropy, x, classes, known=known, kind=DIMENSIONS) is not None
    assert key(F.softmax, x, mask, known=known, kind=DIMENSIONS) is not None
    assert key(torch.add, x, one, known=known, kind=ELEMENTWISE) is not None


def outcome(forward, *args):
    """Squared norms of a block, or its refusal."""
    model, x = nn.Linear(3, 3), torch.arange(27.0).sin().view(3, 3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.arange(9.0).cos().view(3, 3))
        model.bias.zero_()
    try:
        with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
            forward(model, x, *args).square().sum().backward()
        return record.sq_norms
    except pc.UnsupportedError as error:
        return str(error)


T = torch.tensor
ON_NUMBERS = {
    "transpose": lambda m, x, k: m(m(x).transpose(T(k), T(1 + k))),
    "permute": lambda m, x, k: m(m(x).permute(*T([[0, 2, 1], [1, 0, 2]][k]))),
    "topk": lambda m, x, k: m(x).topk(T(1 + k), 1).values @ m.weight,
    "softmax": lambda m, x, k: m(m(x).softmax(dim=T(1 - k))),
    "tensordot": lambda m, x, k: (
        torch.tensordot(m(x), m(x)[0].detach(), T([[2 - k], [0]])) @ m.weight
    ),
    "interpolate": lambda m, x, k: F.interpolate(m(x), size=[T(4 - k)]).mT @ m.weight,
    "one_hot": lambda m, x, k: F.one_hot(IDS[k]).float() @ m.weight[: 2 + k],
}
IDS = torch.tensor([[[0, 1], [1, 1], [0, 0]], [[0, 2], [2, 1], [1, 0]]])


@pytest.mark.parametrize("name", ON_NUMBERS)
@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)])
def test_numbers_that_stand_for_dimensions_and_sizes_are_looked_at_each_time(name, order):
    expected = []
    for k in range(2):
        answers._answers.clear()
        expected.append(outcome(ON_NUMBERS[name], k))
    for k in order:
        assert type(outcome(ON_NUMBERS[name], k)) is type(expected[k])
        if isinstance(expected[k], torch.Tensor):
            torch.testing.assert_close(outcome(ON_NUMBERS[name], k), expected[k])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_windows_of_the_memory_are_looked_at_each_time(order):
    # Equal shapes, and another place in the memory.
    assert not rule_of(torch.as_strided).lasts
    model = nn.Linear(2, 1, bias=False)
    x = torch.randn(3, 2)
    for start in order:
        with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
            y = model(x)
            y.as_strided((1, 1), (1, 1), start).sum().backward()
        expected = torch.zeros(3)
        expected[start] = x[start].square().sum()
        torch.testing.assert_close(record.sq_norms, expected)


@pytest.mark.parametrize("turn", [False, True])
def test_a_block_does_not_take_the_answer_of_another(turn):
    """The same function of the same shape, with the batch in another place."""
    model, x = nn.Linear(3, 3, bias=False), torch.randn(4, 4, 3)
    for dim in (0, 1, 0) if turn else (1, 0, 1):
        with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
            y = model(pc.mark_examples(x, dim=dim)).transpose(0, 1)
            model(y.flip(2)).square().sum().backward()
        expected = []
        for b in range(4):
            one = x.select(dim, b)
            loss = model(model(one).flip(1)).square().sum()
            (g,) = torch.autograd.grad(loss, [model.weight])
            expected.append(g.square().sum())
        torch.testing.assert_close(record.sq_norms, torch.stack(expected))


def test_owners_are_those_of_the_rule():
    x = torch.randn(4, 6)
    rule = rule_of(torch.t)
    owned = [(x, facts(6, 4))]
    assert owners_of(torch.t, (x,), {}, rule, owned, [x.t()]) == [Regular(1, 4)]
