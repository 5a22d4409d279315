"""embedding_reduce against F.embedding and autograd, one example at a time; exactly."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.backends import on_each_cpu_backend
from support.materialised import assert_exactly, gradients
from support.strategies import lookups, tails

import pycoherence as pc
from pycoherence.ops import Reduced


@st.composite
def calls(draw: st.DrawFn):
    (ids, g), v, padding = draw(lookups())
    return ids, g, v, padding, draw(tails(len(g), (v, g.shape[2]), g.dtype))


@given(calls())
def test_equals_materialised_gradients(call) -> None:
    ids, g, v, padding, tail = call
    rows = gradients(
        lambda w, b: F.embedding(ids[b : b + 1], w, padding_idx=padding), (v, g.shape[2]), g
    )

    def run() -> Reduced:
        return pc.ops.embedding_reduce(ids, g, v, padding_idx=padding, **tail)

    assert_exactly("embedding_reduce", run, rows, tail)


def test_repeated_ids_are_added_before_they_are_squared() -> None:
    ids, g = torch.tensor([[3, 3, 3]]), torch.tensor([[[1.0], [2.0], [-3.0]]])
    assert pc.ops.embedding_reduce(ids, g, 5).sq_norms.item() == 0


@on_each_cpu_backend("embedding_reduce")
def test_a_large_table_costs_only_the_rows_in_use(backend: str) -> None:
    """`[B, V, D]` would be 3 TB here."""
    ids, g = torch.tensor([[5, 10**6 - 1], [7, 7]]), torch.ones(2, 2, 4)
    out = pc.ops.embedding_reduce(ids, g, 10**6, want=("sq_norms", "weighted_sum"))
    assert out.sq_norms.tolist() == [8, 16]
    assert out.weighted_sum[[5, 7, 8, 10**6 - 1]].sum(1).tolist() == [4, 8, 0, 4]


@on_each_cpu_backend("embedding_reduce")
def test_padding_hides_what_is_not_finite(backend: str) -> None:
    ids, g = torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2, 3)
    g[0, 0], g[1, 1] = float("nan"), float("inf")
    out = pc.ops.embedding_reduce(ids, g, 2, padding_idx=0, want=("sq_norms", "weighted_sum"))
    assert out.sq_norms.tolist() == [3, 3]
    assert out.weighted_sum.tolist() == [[0, 0, 0], [2, 2, 2]]


@on_each_cpu_backend("embedding_reduce")
def test_what_is_not_finite_stays_in_its_rows(backend: str) -> None:
    """Rows that an example does not look up are no zeros that meet NaN."""
    ids, g, nan = torch.tensor([[0], [1]]), torch.ones(2, 1, 2), float("nan")
    g[0, 0, 0] = nan
    direction = torch.tensor([[1.0, 1.0], [2.0, 2.0], [nan, 1.0]])
    out = pc.ops.embedding_reduce(ids, g, 3, direction=direction, want=("dots", "sum_dots", "gram"))
    gram = pc.ops.embedding_gram(ids, g)
    expected = torch.tensor([[nan, 0.0], [0.0, 2.0]])
    for found, truth in (
        (gram, expected),
        (out.gram, expected),
        (out.dots, torch.tensor([nan, 4.0])),
        (out.sum_dots, torch.tensor([nan, 2.0])),
    ):
        assert torch.equal(found.nan_to_num(7), truth.nan_to_num(7))


def test_many_lookups_of_an_id_keep_their_digits() -> None:
    torch.manual_seed(0)
    ids, g = torch.zeros(1, 5000, dtype=torch.long), torch.rand(1, 5000, 3)
    with pc.backend("reference"):
        found = pc.ops.embedding_reduce(ids, g, 1, want=("weighted_sum",)).weighted_sum
    assert found is not None
    torch.testing.assert_close(found.double(), g.double().sum(1), rtol=1e-6, atol=0)
