"""What the capture keeps from one block to the next: walks of models, and answers of rules."""

import gc
import weakref

import pytest
import torch
from torch import nn

import pycoherence as pc
from pycoherence.capture.answers import key_of
from pycoherence.capture.facts import EXAMPLES, Facts, Regular
from pycoherence.capture.model import modules_of
from pycoherence.capture.owners import owners_of
from pycoherence.capture.rules import rule_of


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


@pytest.mark.parametrize("change", [replaced, renamed, taken_away, added, deep, shared])
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


def key(func, *args, known, moves=True, **kwargs):
    return key_of(func, args, kwargs, {id(x): f for x, f in known}, moves=moves)


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
    assert len(keys) == 7


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
    assert owners_of(torch.t, (x,), {}, rule, owned, [x.t()], 4) == [Regular(1, 4)]
