"""Marks of `mark_examples`, against one example at a time."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.row import embedding, linear, normal, uses
from support.checks import (
    assert_grads_equal,
    assert_gram,
    assert_norms,
    assert_sums,
    relative_error,
)
from support.models import stepwise
from support.oracle import joined, m_coherence, per_example_gradients
from torch import Tensor, nn

import pycoherence as pc

D = torch.float64


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D)


def assert_as(record: Any, truth: dict[str, Tensor]) -> None:
    """Size, norms and Gram matrix."""
    assert record.batch_size == len(next(iter(truth.values())))
    assert_norms(record, truth, 1e-10)
    assert_gram(record, truth, 1e-10)


def by_loss(model: nn.Module, losses: Any, count: int) -> dict[str, Tensor]:
    """The gradient of each of several losses of one plain forward pass."""
    parameters = dict(model.named_parameters())
    found = {name: p.new_zeros(count, *p.shape) for name, p in parameters.items()}
    for b, loss in enumerate(losses(model)):
        grads = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
        for name, g in zip(parameters, grads, strict=True):
            if g is not None:
                found[name][b] = g
    return found


# Another dimension.


def summed(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(batch[0]).square().flatten(1).sum(1).mean()


@pytest.mark.parametrize("dim", [1, -2])
@pytest.mark.parametrize(("steps", "size"), [(5, 4), (4, 4), (1, 3), (7, 1)])
def test_time_first(steps: int, size: int, dim: int) -> None:
    model, inputs = stepwise(), x(steps, size, 3)
    truth = per_example_gradients(model, summed, (inputs.transpose(0, 1),))
    with pc.collect(model, pc.SqNorms(), pc.Gram()) as record:
        out = model(pc.mark_examples(inputs, dim=dim))
        out.square().sum((0, 2)).mean().backward()
    assert_as(record, truth)


def test_examples_in_the_last_dimension() -> None:
    model, inputs = nn.Linear(3, 2).double(), x(3, 5)
    truth = per_example_gradients(model, summed, (inputs.T,))
    with pc.collect(model, pc.SqNorms(), pc.Gram()) as record:
        model(pc.mark_examples(inputs, dim=1).T).square().sum(1).mean().backward()
    assert_as(record, truth)


@pytest.mark.parametrize("size", [4, 6])
def test_groups_of_a_time_first_batch(size: int) -> None:
    model, inputs = stepwise(), x(5, size, 3)
    truth = per_example_gradients(model, summed, (inputs.transpose(0, 1),), 2)
    with pc.collect(model, pc.SqNorms(), pc.Gram(), group_size=2) as record:
        out = model(pc.mark_examples(inputs, dim=1))
        out.square().sum((0, 2)).mean().backward()
    assert_as(record, truth)


def test_rows_that_are_no_whole_groups() -> None:
    model = stepwise()
    inputs, groups = x(4, 5, 3), pc.collect(model, pc.SqNorms(), group_size=2)
    with groups, pytest.raises(pc.UnsupportedError, match="not whole groups"):
        model(pc.mark_examples(inputs, dim=1))


# Owners of rows.

PACKED = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, -1, -1, -1])
SHUFFLED = torch.tensor([2, 0, -1, 3, 3, 0, 1, -1, 2, 3, 0])


def documents(owner: Tensor) -> Any:
    """The loss of each document: the sum over its words."""

    def losses(inputs: Tensor) -> Any:
        return lambda model: [
            model(inputs[owner == b]).square().sum() for b in range(int(owner.max()) + 1)
        ]

    return losses


@pytest.mark.parametrize("owner", [PACKED, SHUFFLED, SHUFFLED.int()], ids=str)
def test_packed_documents(owner: Tensor) -> None:
    model, inputs = stepwise(), x(len(owner), 3)
    truth = by_loss(model, documents(owner)(inputs), 4)
    with pc.collect(model, pc.SqNorms(), pc.Gram(), loss_reduction="sum") as record:
        out = model(pc.mark_examples(inputs, owner=owner))
        out[owner >= 0].square().sum().backward()
    assert_as(record, truth)
    for name, p in model.named_parameters():
        assert relative_error(p.grad, truth[name].sum(0)) < 1e-11


def test_packed_documents_with_a_masked_loss() -> None:
    model, inputs = stepwise(), x(len(PACKED), 3)
    truth = by_loss(model, documents(PACKED)(inputs), 4)
    with pc.collect(model, pc.SqNorms(), pc.Gram(), loss_reduction="sum") as record:
        out = model(pc.mark_examples(inputs, owner=PACKED)).square().sum(1)
        (out * (PACKED >= 0)).sum().backward()
    assert_as(record, truth)


@pytest.mark.parametrize("owner", [PACKED, SHUFFLED], ids=str)
def test_a_loss_with_padding_in_it_is_refused(owner: Tensor) -> None:
    model = stepwise()
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        loss = model(pc.mark_examples(x(len(owner), 3), owner=owner)).square().sum()
        with pytest.raises(pc.UnsupportedError, match="padding"):
            loss.backward()
    with pytest.raises(RuntimeError, match="not complete"):
        _ = record.sq_norms


def test_words_of_packed_documents() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).double()
    words = torch.randint(9, (len(PACKED),))
    truth = by_loss(model, documents(PACKED)(words), 4)
    with pc.collect(model, pc.SqNorms(), pc.Gram(), loss_reduction="sum") as record:
        out = model(pc.mark_examples(words, owner=PACKED))
        out[PACKED >= 0].square().sum().backward()
    assert_as(record, truth)


def test_tokens_of_a_packed_row() -> None:
    """`[1, N]` words: what is one row to torch is several documents once it is flattened."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).double()
    words = torch.randint(9, (1, len(SHUFFLED)))
    truth = by_loss(model, documents(SHUFFLED)(words[0]), 4)
    with pc.collect(model, pc.SqNorms(), pc.Gram(), loss_reduction="sum") as record:
        out = model(pc.mark_examples(words.flatten(), owner=SHUFFLED).unsqueeze(0))
        out[0, SHUFFLED >= 0].square().sum().backward()
    assert_as(record, truth)


def messages(m: Any, nodes: Tensor, edges: Tensor, batch: Tensor, count: int) -> Tensor:
    """Messages along edges, and a readout that adds the nodes of each graph up."""
    h = m.node(nodes).tanh()
    sent = m.message(h[edges[0]])
    h = h + torch.zeros_like(h).index_add(0, edges[1], sent)
    return m.out(h.new_zeros(count, 4).index_add(0, batch, h.tanh()))


def graphs() -> nn.Module:
    return uses(messages, node=linear(3, 4), message=linear(4, 4), out=linear(4, 2))().double()


BATCH = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
EDGES = torch.tensor([[0, 1, 2, 2, 3, 4, 5, 7, 8, 6], [1, 0, 1, 0, 4, 3, 6, 5, 7, 8]])


def test_graphs() -> None:
    model, nodes = graphs(), x(9, 3)

    def one(model: nn.Module, b: int) -> Tensor:
        mine = (b == BATCH).nonzero().flatten()
        edges = EDGES[:, BATCH[EDGES[0]] == b] - mine[0]
        return model(nodes[mine], edges, torch.zeros_like(mine), 1).square().sum()

    truth = by_loss(model, lambda model: [one(model, b) for b in range(3)], 3)
    with pc.collect(model, pc.SqNorms(), pc.Gram()) as record:
        out = model(pc.mark_examples(nodes, owner=BATCH), EDGES, BATCH, 3)
        out.square().sum(1).mean().backward()
    assert_as(record, truth)


def test_an_edge_between_graphs_is_not_quietly_wrong() -> None:
    model, nodes = graphs(), x(9, 3)
    edges = torch.cat([EDGES, torch.tensor([[0], [8]])], 1)

    def loss() -> None:
        out = model(pc.mark_examples(nodes, owner=BATCH), edges, BATCH, 3)
        out.square().sum(1).mean().backward()

    with pc.collect(model, pc.SqNorms()), pytest.raises(pc.UnsupportedError, match="several"):
        loss()


@pytest.mark.parametrize("before", [False, True], ids=["first", "later"])
def test_ragged_rows_beside_a_batch(before: bool) -> None:
    """Boxes of images: how many examples there are may be known before, or be told by the mark."""
    model = nn.ModuleDict({"image": nn.Linear(3, 4), "box": nn.Linear(2, 4)}).double()
    owner, images, boxes = torch.tensor([0, 0, 2, 2, 2]), x(4, 3), x(5, 2)

    def forward(model: Any, images: Tensor, boxes: Tensor, owner: Tensor) -> Tensor:
        if before:
            h = model["image"](images)
            each = model["box"](pc.mark_examples(boxes, owner=owner))
        else:
            # The last image has no box, so that the owner alone would say that there are three.
            images = pc.mark_examples(images, dim=0)
            each = model["box"](pc.mark_examples(boxes, owner=owner))
            h = model["image"](images)
        return h.index_add(0, owner, each)

    def one(model: Any, b: int) -> Tensor:
        mine = boxes[owner == b]
        ids = torch.zeros(len(mine), dtype=torch.int64)
        return forward(model, images[b : b + 1], mine, ids).square().sum()

    truth = by_loss(model, lambda model: [one(model, b) for b in range(4)], 4)
    with pc.collect(model, pc.SqNorms(), pc.Gram()) as record:
        forward(model, images, boxes, owner).square().sum(1).mean().backward()
    assert_as(record, truth)


# What all examples share.


def operator(m: Any, u: Tensor, places: Tensor) -> Tensor:
    """DeepONet: a net of the function, and one of the places where it is asked for."""
    return m.branch(u).tanh() @ m.trunk(pc.mark_examples(places, dim=None)).tanh().T


@pytest.mark.parametrize("places", [4, 7])
@pytest.mark.parametrize("trunk_alone", [False, True])
def test_shared_coordinates(places: int, trunk_alone: bool) -> None:
    model = uses(operator, branch=linear(5, 6), trunk=linear(2, 6))().double()
    u, at = x(4, 5), x(places, 2)
    model.branch.requires_grad_(not trunk_alone)
    plain = copy.deepcopy(model)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(batch[0], at).square().sum(1).mean()

    truth = per_example_gradients(plain, loss, (u,))
    with pc.collect(model, pc.SqNorms(), pc.Gram()) as record:
        loss(model, (u,)).backward()
    assert_as(record, truth)
    loss(plain, (u,)).backward()
    assert_grads_equal(model, plain, 1e-11)


def test_a_shared_table_of_targets() -> None:
    model, prototypes = nn.Linear(3, 2).double(), x(4, 2)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return torch.cdist(model(batch[0]), pc.mark_examples(prototypes, dim=None)).sum(1).mean()

    inputs = x(4, 3)
    truth = per_example_gradients(model, loss, (inputs,))
    with pc.collect(model, pc.SqNorms(), pc.Gram()) as record:
        loss(model, (inputs,)).backward()
    assert_as(record, truth)


# The other verbs.


def packed_loss(model: nn.Module, inputs: Tensor) -> Tensor:
    out = model(pc.mark_examples(inputs, owner=PACKED))
    return out[PACKED >= 0].square().sum()


def test_robust_gradients_of_documents() -> None:
    model, inputs = stepwise(), x(len(PACKED), 3)
    truth = by_loss(model, documents(PACKED)(inputs), 4)
    for rule in (pc.Median(), pc.NormClip(0.5), pc.GeometricMedian()):
        model.zero_grad()
        with pc.aggregate(model, rule, loss_reduction="sum") as agg:
            packed_loss(model, inputs).backward()
        assert agg.report.batch_size == 4
        if isinstance(rule, pc.Median):
            for name, p in model.named_parameters():
                middle = truth[name].sort(0).values[1:3].mean(0)
                assert relative_error(p.grad, 4 * middle) < 1e-10
    norms = joined(truth).norm(dim=1)
    model.zero_grad()
    with pc.aggregate(model, pc.NormClip(1.5), loss_reduction="sum"):
        packed_loss(model, inputs).backward()
    for name, p in model.named_parameters():
        clipped = torch.tensordot((1.5 / norms).clamp(max=1), truth[name], 1)
        assert relative_error(p.grad, clipped) < 1e-10


def test_weighted_sum_meter_and_pairs_of_documents() -> None:
    model, inputs = stepwise(), x(len(PACKED), 3)
    truth = by_loss(model, documents(PACKED)(inputs), 4)
    coef = torch.tensor([0.5, 0.0, -2.0, 3.0], dtype=D)
    total = pc.weighted_sum(model, packed_loss, inputs, coef, loss_reduction="sum")
    assert_sums(total, truth, coef, 1e-10)
    meter = pc.CoherenceMeter(model, loss_reduction="sum")
    meter.update(packed_loss, inputs)
    assert meter.compute().n == 4
    assert meter.compute().m == pytest.approx(m_coherence(truth), rel=1e-10)
    with pc.collect(model, pc.SqNorms(), pc.Gram(), loss_reduction="sum", group_size=2) as record:
        packed_loss(model, inputs).backward()
    assert_as(record, {n: g.unflatten(0, (2, 2)).sum(1) for n, g in truth.items()})


# Outside, and errors.


@pytest.mark.parametrize("options", [{}, {"dim": 1}, {"dim": None}, {"owner": torch.arange(3)}])
def test_outside_of_a_block_nothing_happens(options: Any) -> None:
    inputs = x(3, 4)
    assert pc.mark_examples(inputs, **options) is inputs
    with pc.collect(stepwise(), pc.SqNorms()):
        assert pc.mark_examples(inputs, **options) is inputs


def test_a_mark_ends_with_its_block() -> None:
    model, inputs = stepwise(), x(5, 4, 3)
    for _ in range(2):
        with pc.collect(model, pc.SqNorms()) as record:
            model(pc.mark_examples(inputs, dim=1)).sum().backward()
        assert record.batch_size == 4
        with pc.collect(model, pc.SqNorms()) as record:
            model(inputs).sum().backward()
        assert record.batch_size == 5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dim": 2}, r"dimension of a tensor of shape \(3, 4\), got dim=2"),
        ({"dim": -3}, r"got dim=-3"),
        ({"owner": torch.zeros(4, dtype=torch.int64)}, r"each of 3 rows.*\(4,\)"),
        ({"owner": torch.zeros(3, 4, dtype=torch.int64)}, r"each of 3 rows"),
        ({"owner": torch.zeros(3)}, r"whole number.*float32"),
        ({"owner": torch.ones(3, dtype=torch.bool)}, r"whole number.*bool"),
        ({"owner": torch.tensor([0, 1, -2])}, r"owners from 0, or -1 for none, got -2"),
    ],
)
def test_what_is_no_mark(options: Any, text: str) -> None:
    with pc.collect(stepwise(), pc.SqNorms()), pytest.raises(ValueError, match=text):
        pc.mark_examples(x(3, 4), **options)


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="expected a tensor, got list"):
        pc.mark_examples([1, 2])
    block, refused = pc.collect(stepwise(), pc.SqNorms()), pytest.raises(TypeError, match="list")
    with block, refused:
        pc.mark_examples([1, 2])


@pytest.mark.parametrize(
    "options", [{"dim": 1}, {"owner": torch.tensor([0, 1, 2, 3, 4, 5])}], ids=["dim", "owner"]
)
def test_other_numbers_of_examples(options: Any) -> None:
    model = stepwise()
    with pc.collect(model, pc.SqNorms()):
        model(x(4, 3))
        with pytest.raises(pc.UnsupportedError, match=r"mark_examples|batch size"):
            pc.mark_examples(x(6, 5, 3), **options)


def test_owners_that_are_all_padding() -> None:
    model, inputs, owner = stepwise(), x(4, 3), torch.full((3,), -1)
    truth = per_example_gradients(model, summed, (inputs,))
    with pc.collect(model, pc.SqNorms(), pc.Gram()) as record:
        loss = summed(model, (inputs,))
        rest = model(pc.mark_examples(x(3, 3), owner=owner))
        (loss + rest[owner >= 0].sum()).backward()
    assert_as(record, truth)


@pytest.mark.parametrize("equation", ["ai,io->ao", "ai,io->oa"])
def test_padding_of_a_product_whose_rows_come_last(equation: str) -> None:
    def product(m: Any, inputs: Tensor) -> Tensor:
        found = torch.einsum(equation, inputs, m.matrix)
        return found.T if equation.endswith("oa") else found

    model, inputs = uses(product, matrix=normal(4, 3))().double(), x(5, 4)
    owner = torch.tensor([1, -1, 0, 1, -1])

    def losses(model: nn.Module) -> list[Tensor]:
        return [model(inputs).square().sum(1)[owner == b].sum() for b in range(2)]

    truth = by_loss(model, losses, 2)
    with pc.collect(model, pc.SqNorms(), pc.Gram(), loss_reduction="sum") as record:
        rows = model(pc.mark_examples(inputs, owner=owner)).square().sum(1)
        rows[owner >= 0].sum().backward()
    assert_as(record, truth)
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum"):
        rows = model(pc.mark_examples(inputs, owner=owner)).square().sum(1)
        with pytest.raises(pc.UnsupportedError, match="padding"):
            rows.sum().backward()


def test_no_rows() -> None:
    model = stepwise()
    with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        none = torch.zeros(0, dtype=torch.int64)
        model(pc.mark_examples(x(0, 3), owner=none)).sum().backward()
    assert record.batch_size == 0


def test_a_model_that_marks_its_inputs_is_verified_one_at_a_time() -> None:
    """Outside of the block, where one example runs alone, the mark is nothing."""

    def marks(m: Any, batch: Tensor) -> Tensor:
        time_first = pc.mark_examples(batch.transpose(0, 1).contiguous(), dim=1)
        return m.layer(time_first).transpose(0, 1)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().flatten(1).sum(1).mean()

    for steps in (5, 4):
        model = uses(marks, layer=stepwise)()
        assert not pc.verify(model, loss, x(4, steps, 3)).failures


def test_a_mark_of_one_dimension_of_ids() -> None:
    """`[T]` places that would be taken for `[B]` ids, since there are as many."""

    def forward(m: Any, batch: Tensor, at: Tensor) -> Tensor:
        return m.words(batch) + m.places(pc.mark_examples(at, dim=None))

    model = uses(forward, words=linear(3, 4), places=embedding(4, 4))().double()
    at, inputs = torch.tensor([3, 1, 0, 2]), x(4, 4, 3)

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return F.silu(model(batch[0], at)).square().sum((1, 2)).mean()

    truth = per_example_gradients(model, loss, (inputs,))
    with pc.collect(model, pc.SqNorms(), pc.Gram()) as record:
        loss(model, (inputs,)).backward()
    assert_as(record, truth)
