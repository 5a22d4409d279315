"""embedding_reduce against F.embedding and autograd, one example at a time; exactly."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from materialised import gradients, reductions
from strategies import dtypes, numbers, tails

import pycoherence as pc


@st.composite
def calls(draw: st.DrawFn):
    dtype = draw(dtypes)
    b, t, v, d = (draw(st.integers(low, high)) for low, high in ((0, 5), (0, 9), (1, 7), (0, 6)))
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    ids = draw(numbers((b, t), torch.float64, top=20)).remainder(v).to(kind)
    if draw(st.booleans()):
        ids = ids.mT.contiguous().mT
    padding = draw(st.none() | st.integers(0, v - 1))
    return ids, draw(numbers((b, t, d), dtype)), v, padding, draw(tails(b, (v, d), dtype))


@given(calls())
def test_equals_materialised_gradients(call) -> None:
    ids, g, v, padding, tail = call
    rows = gradients(
        lambda w, b: F.embedding(ids[b : b + 1], w, padding_idx=padding), (v, g.shape[2]), g
    )
    expected = reductions(rows, tail["want"], tail.get("coef"), tail.get("direction"))
    actual = pc.ops.embedding_reduce(ids, g, v, padding_idx=padding, **tail)
    for name, ours, truth in zip(expected._fields, actual, expected, strict=True):
        assert (ours is None) == (truth is None)
        if ours is not None:
            assert torch.equal(ours.double(), truth), name


def test_repeated_ids_are_added_before_they_are_squared() -> None:
    ids, g = torch.tensor([[3, 3, 3]]), torch.tensor([[[1.0], [2.0], [-3.0]]])
    assert pc.ops.embedding_reduce(ids, g, 5).sq_norms.item() == 0


def test_a_large_table_costs_only_the_rows_in_use() -> None:
    """`[B, V, D]` would be 3 TB here."""
    ids, g = torch.tensor([[5, 10**6 - 1], [7, 7]]), torch.ones(2, 2, 4)
    out = pc.ops.embedding_reduce(ids, g, 10**6, want=("sq_norms", "weighted_sum"))
    assert out.sq_norms.tolist() == [8, 16]
    assert out.weighted_sum[[5, 7, 8, 10**6 - 1]].sum(1).tolist() == [4, 8, 0, 4]


def test_padding_hides_what_is_not_finite() -> None:
    ids, g = torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2, 3)
    g[0, 0], g[1, 1] = float("nan"), float("inf")
    out = pc.ops.embedding_reduce(ids, g, 2, padding_idx=0, want=("sq_norms", "weighted_sum"))
    assert out.sq_norms.tolist() == [3, 3]
    assert out.weighted_sum.tolist() == [[0, 0, 0], [2, 2, 2]]
