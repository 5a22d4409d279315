"""The native lookups: long runs of one id, ids of any size, tables that fit nowhere, bad ids."""

import pytest
import torch
from support.backends import assert_reduced_close, backends_of
from torch import Tensor

import pycoherence as pc
from pycoherence.ops import Reduced

pytestmark = pytest.mark.skipif(
    "native" not in backends_of("embedding_reduce"), reason="the native kernels are not built"
)


@pytest.mark.parametrize(("b", "t"), [(1, 300_000), (300_000, 1), (3, 100_000), (100_000, 3)])
def test_long_runs_of_one_id_do_not_drift(b: int, t: int) -> None:
    """The same number again and again, where every rounding has the same sign."""
    g = torch.full((b, t, 19), 0.1)
    with pc.backend("native"):
        out = pc.ops.embedding_reduce(
            torch.full((b, t), 2), g, 4, want=("sq_norms", "weighted_sum", "second_moment")
        )
    each = g[0, 0, 0].double().item() * t
    for found, expected in (
        (out.sq_norms, each**2 * 19),
        (out.weighted_sum, each * b),
        (out.second_moment, each**2 * b),
    ):
        assert found is not None
        kept = found if found.dim() == 1 else found[2]
        assert ((kept.double() / expected - 1).abs() < 1e-5).all()


def lookups(b: int, t: int, high: int) -> tuple[Tensor, Tensor]:
    """Ids with the lowest and the highest one, and output gradients."""
    torch.manual_seed(0)
    ids = torch.randint(high + 1, (b, t))
    ids[0, 0], ids[-1, -1] = high, 0
    return ids, torch.randn(b, t, 5)


@pytest.mark.parametrize("high", [1, 7, 2047, 2048, 2**22, 2**33 + 1, 2**62])
def test_only_the_order_of_ids_matters(high: int) -> None:
    ids, g = lookups(9, 37, high)
    _, ranks = torch.unique(ids, return_inverse=True)
    with pc.backend("native"):
        for padding in (None, high):
            rank = None if padding is None else int(ranks.max())
            gram = pc.ops.embedding_gram(ids, g, padding_idx=padding)
            assert torch.equal(gram, pc.ops.embedding_gram(ranks, g, padding_idx=rank))
            norms = pc.ops.embedding_reduce(ids, g, high + 1, padding_idx=padding)
            same = pc.ops.embedding_reduce(ranks, g, len(g) * 37, padding_idx=rank)
            assert torch.equal(norms.sq_norms, same.sq_norms)


@pytest.mark.parametrize("threads", [1, 3])
def test_more_lookups_than_one_block_of_the_sort(threads: int) -> None:
    ids, g = lookups(6, 9001, 2999)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        args = (ids, g, 3000, 7, torch.randn(6), torch.randn(3000, 5), 127)
        with pc.backend("native"):
            ours = Reduced(*torch.ops.pycoherence.embedding_reduce(*args))
    finally:
        torch.set_num_threads(before)
    wide = (ids, g.double(), 3000, 7, args[4].double(), args[5].double(), 111)
    truth = Reduced(*pc.ops.specs["embedding_reduce"].reference(*wide))
    # Signs of sums that nearly cancel depend on rounding.
    assert_reduced_close(ours._replace(sign_sum=truth.sign_sum), truth, 1e-5)


def test_dots_with_the_sum_need_no_table() -> None:
    """`[V, D]` would be 16 TB here."""
    ids, g = torch.tensor([[5, 2**40 - 1], [5, 5]]), torch.ones(2, 2, 4)
    with pc.backend("native"):
        out = pc.ops.embedding_reduce(ids, g, 2**40, want=("sq_norms", "sum_dots"))
    assert out.sum_dots is not None
    assert out.sum_dots.tolist() == [4 * (3 + 1), 4 * 2 * 3]


@pytest.mark.parametrize("want", Reduced._fields)
@pytest.mark.parametrize("bad", [-1, -(2**40), 5, 2**40])
@pytest.mark.parametrize("width", [3, 0])
def test_the_native_op_checks_ids_itself(width: int, bad: int, want: str) -> None:
    """Also where -1 means that there is no padding."""
    ids, g = torch.tensor([[0, 4], [bad, 1]]), torch.ones(2, 2, width)
    native = torch.ops.pycoherence_native
    direction = torch.ones(5, width) if want == "dots" else None
    with pytest.raises(IndexError, match=r"embedding_reduce: expected ids in \[0, 5\), got ids"):
        native.embedding_reduce(ids, g, 5, -1, None, direction, 1 << Reduced._fields.index(want))
    if bad < 0:
        for args in ((ids, g, None, None, -1), (ids[:1], g[:1], ids, g, -1)):
            with pytest.raises(IndexError, match=f"embedding_gram: expected ids >= 0, got {bad}"):
                native.embedding_gram(*args)


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 2, 0), (0, 2, 3)])
def test_where_nothing_is_looked_up_gradients_are_zero(shape: tuple[int, ...]) -> None:
    g, nan = torch.ones(shape), torch.full((2, 2, shape[2]), float("nan"))
    ids, others = torch.zeros(shape[:2], dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    with pc.backend("native"):
        out = pc.ops.embedding_reduce(
            ids, g, 3, direction=torch.full((3, shape[2]), float("nan")), want=Reduced._fields
        )
        gram = pc.ops.embedding_gram(ids, g, others, nan)
    assert all(x is not None and not x.any() for x in out)
    assert gram.shape == (shape[0], 2)
    assert not gram.any()
