"""Native CUDA kernels on a GPU: larger shapes in every dtype, and CUDA graphs.

The samples of the ops run there in tests/unit/ops. The smallest shape of each op is called small,
for `compute-sanitizer python -m pytest -m gpu tests/kernels/gpu -k small`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import DTYPES, TOLERANCE, assert_close, assert_reduced_close, in_float64
from support.op_calls import ALL, NORMS, SUM, Source
from torch import Tensor

import pycoherence as pc
from pycoherence.ops.core.dispatch import fastest
from pycoherence.ops.core.spec import tensors_of

pytestmark = pytest.mark.gpu

Args = tuple[Any, ...]


def whole(new: Source, *shape: int) -> Tensor:
    """Whole numbers, whose sums have no doubtful signs."""
    return torch.randint(-8, 9, shape, device=new.device).to(new.dtype)


def embedding_reduce(
    new: Source, want: tuple[str, ...], b: int, t: int, v: int, d: int, padding: int = -1
) -> Args:
    ids = torch.randint(v, (b, t), device=new.device)
    return ids, whole(new, b, t, d), v, padding, *new.tail(want, b, v, d, coef=want == ALL)


def embedding_gram(new: Source, b: int, t: int, v: int, d: int, *other: int) -> Args:
    batches: list[Tensor | None] = []
    for shape in ((b, t), other):
        known = len(shape) == 2
        batches += [
            torch.randint(v, shape, device=new.device) if known else None,
            new(*shape, d) if known else None,
        ]
    return *batches, -1


def gram_median(new: Source, b: int, iterations: int, tolerance: float = 0.0) -> Args:
    rows = torch.randn(b, 20, device=new.device)
    kept = torch.rand(b, device=new.device) < 0.8
    return (rows @ rows.mT).to(new.dtype), kept, 1e-3, tolerance, iterations


def orders(factors: Callable[[Source, int], Args]) -> list[Callable[[Source], Args]]:
    """A rule for every way, of as many examples as it is for."""

    def call(rule: str, k: float, batch: int) -> Callable[[Source], Args]:
        return lambda new: (*factors(new, batch), rule, k, False)

    rules = (
        ("winsorized_mean", 2.0, 7),
        ("winsorized_mean", 12.0, 200),
        ("trimmed_mean", 4.0, 33),
        ("median", 0.0, 100),
        ("median", 0.0, 300),
        ("median_of_means", 5.0, 40),
        ("sign_agreement", 0.25, 33),
    )
    return [call(*rule) for rule in rules]


def table(new: Source, b: int) -> Args:
    return torch.randint(50, (b, 9), device=new.device), whole(new, b, 9, 70), 50, 3


def gram_filter(new: Source, b: int, threshold: float) -> Args:
    """Whole numbers, so that rounding takes none in."""
    rows = torch.randint(-3, 4, (b, 4), device=new.device).double()
    kept = torch.rand(b, device=new.device) < 0.8
    return (rows @ rows.mT).to(new.dtype), kept, threshold


# The first is small.
CALLS: dict[str, list[Callable[[Source], Args]]] = {
    "embedding_reduce": [
        lambda new: embedding_reduce(new, ALL, 3, 5, 4, 6, 1),
        lambda new: embedding_reduce(new, ALL, 33, 129, 1000, 132, 7),
        lambda new: embedding_reduce(new, ALL, 9, 700, 2, 65),
        lambda new: embedding_reduce(new, ALL, 1000, 3, 1, 256),
        lambda new: embedding_reduce(new, NORMS, 33, 129, 1000, 130),
        lambda new: embedding_reduce(new, NORMS, 5000, 1, 10**6, 64),
        lambda new: embedding_reduce(new, ("dots",), 33, 129, 1000, 130),
        lambda new: embedding_reduce(new, SUM, 33, 129, 50000, 72),
    ],
    "embedding_gram": [
        lambda new: embedding_gram(new, 3, 5, 4, 6),
        lambda new: embedding_gram(new, 33, 129, 1000, 768),
        lambda new: embedding_gram(new, 33, 129, 1000, 65, 17, 1000),
        lambda new: embedding_gram(new, 5, 3000, 2, 30),
    ],
    # Signs of one position are counted by products of matrices, in Triton.
    "linear_order": orders(lambda new, b: (new(b, 1, 130), new(b, 1, 75)))[:-1],
    "dense_order": orders(lambda new, b: (new(b, 5, 301),)),
    "embedding_order": orders(table),
    "gram_median": [
        lambda new: gram_median(new, 9, 3),
        lambda new: gram_median(new, 257, 100, 1e-4),
        lambda new: gram_median(new, 6000, 4),
    ],
    "row_sq_norms": [
        lambda new: ([new(3, n) for n in (1, 5, 130)],),
        lambda new: ([new(65, 3 * n)[:, ::2] for n in range(150)],),
        lambda new: ([new(9, 10**6), new(9, 0)],),
    ],
    "gram_filter": [
        lambda new: gram_filter(new, 9, 0.9),
        lambda new: gram_filter(new, 257, 0.7123),
        lambda new: gram_filter(new, 6000, 1.2345),
    ],
}

SIZES = [(op, i) for op, calls in CALLS.items() for i in range(len(calls))]
each_size = pytest.mark.parametrize(
    ("op", "index"), SIZES, ids=[f"{op}-{i or 'small'}" for op, i in SIZES]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def arguments(op: str, index: int, dtype: torch.dtype) -> Args:
    return CALLS[op][index](Source("cuda", dtype))


def run(op: str, args: Args) -> tuple[Tensor, ...]:
    out = getattr(torch.ops.pycoherence, op)(*args)
    return (out,) if isinstance(out, Tensor) else out


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    pairs = zip(tensors_of(first), tensors_of(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("op", CALLS)
def test_native_is_picked(op: str) -> None:
    args = arguments(op, 0, torch.bfloat16)
    assert fastest(pc.ops.specs[op], "cuda", args).name == "native"


@each_dtype
@each_size
def test_agrees_with_the_reference_in_float64(op: str, index: int, dtype: torch.dtype) -> None:
    args = arguments(op, index, dtype)
    expected = pc.ops.specs[op].reference(*in_float64(args))
    if isinstance(expected, Tensor):
        assert_close(*run(op, args), expected, TOLERANCE[dtype], op)
    elif op.endswith("_reduce"):
        assert_reduced_close(run(op, args), expected, TOLERANCE[dtype], op)
    else:
        for ours, truth in zip(run(op, args), expected, strict=True):
            assert_close(ours, truth, TOLERANCE[dtype], op)


@each_size
def test_is_bitwise_repeatable(op: str, index: int) -> None:
    args = arguments(op, index, torch.float32)
    assert same(run(op, args), run(op, args))


@each_size
def test_runs_in_a_cuda_graph(op: str, index: int) -> None:
    """And the graph computes anew from what its arguments hold then."""
    args, others = (arguments(op, index, torch.bfloat16) for _ in range(2))
    expected = run(op, others)
    run(op, args)  # loads what it needs
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(op, args)
    for x, other in zip(tensors_of(args), tensors_of(others), strict=True):
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert same(out, expected)


def test_grams_of_some_columns_at_a_time() -> None:
    args = arguments("embedding_gram", 1, torch.float32)
    (expected,) = run("embedding_gram", args)
    pc.set_workspace(2**20)
    try:
        (found,) = run("embedding_gram", args)
    finally:
        pc.set_workspace(None)
    assert_close(found, expected, 1e-6)
