"""embedding_order against F.embedding and autograd, one example at a time, and scalar Python."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.backends import on_each_cpu_backend
from support.materialised import gradients
from support.plain_rules import ROUNDING, assert_aggregated
from support.strategies import lookups, nonfinite, orders, spoiled
from torch import Tensor

import pycoherence as pc

on_each_backend = on_each_cpu_backend("embedding_order")


@st.composite
def calls(draw: st.DrawFn):
    (ids, g), v, padding = draw(lookups(most=20))
    return ids, draw(spoiled(g)), v, padding, *draw(orders(len(g)))


@given(calls())
def test_equals_materialised_gradients(call) -> None:
    ids, g, v, padding, rule, k, drop = call
    rows = gradients(
        lambda w, b: F.embedding(ids[b : b + 1], w, padding_idx=padding), (v, g.shape[2]), g
    )

    def run() -> Tensor:
        keywords = {"padding_idx": padding, "nonfinite": nonfinite(drop)}
        return pc.ops.embedding_order(ids, g, v, rule, k, **keywords)

    assert_aggregated("embedding_order", run, rows, rule, k, drop, ROUNDING[g.dtype])


@on_each_backend
def test_examples_that_do_not_look_a_row_up_count_as_zeros(backend: str) -> None:
    ids, g = torch.tensor([[0], [0], [1], [0]]), torch.ones(4, 1, 2)
    assert pc.ops.embedding_order(ids, g, 3, "median").tolist() == [[1, 1], [0, 0], [0, 0]]
    mean = pc.ops.embedding_order(ids, g, 3, "winsorized_mean", 0)
    assert mean.tolist() == [[0.75, 0.75], [0.25, 0.25], [0, 0]]


@on_each_backend
def test_a_large_table_costs_only_the_rows_in_use(backend: str) -> None:
    """`[B, V, D]` would be 3 TB here."""
    ids, g = torch.tensor([[5, 10**6 - 1], [7, 7], [5, 7]]), torch.ones(3, 2, 4)
    out = pc.ops.embedding_order(ids, g, 10**6, "median")
    assert out.shape == (10**6, 4)
    assert out[[5, 7, 8, 10**6 - 1]].sum(1).tolist() == [4, 4, 0, 0]


@on_each_backend
def test_padding_hides_what_is_not_finite(backend: str) -> None:
    ids, g = torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2, 3)
    g[0, 0], g[1, 1] = float("nan"), float("inf")
    out = pc.ops.embedding_order(ids, g, 2, "trimmed_mean", 0, padding_idx=0)
    assert out.tolist() == [[0, 0, 0], [1, 1, 1]]
