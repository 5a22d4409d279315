"""Triton kernels on a GPU: larger shapes in every dtype, CUDA graphs, streams, several devices.

The samples of the ops run there in tests/unit/ops. The smallest shape of each op is called small,
for `compute-sanitizer python -m pytest -m gpu tests/kernels/gpu -k small`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support import op_calls as make
from support.backends import DTYPES, TOLERANCE, assert_close, assert_reduced_close, in_float64
from support.op_calls import ALL, BOTH, CONV2D, MOMENTS, NORMS, SUM, Call, Source
from torch import Tensor, nn

import pycoherence as pc
from pycoherence.ops.core.dispatch import fastest
from pycoherence.ops.core.outputs import mask
from pycoherence.ops.core.spec import tensors_of

pytestmark = pytest.mark.gpu

# Signs are tested on whole numbers: of what is nearly zero, rounding decides.
NO_SIGNS = tuple(name for name in ALL if name != "sign_sum")

WINDOWS = {
    "1d": ((5,), (2,), (3,), (1,)),
    "2d": ((3, 2), (1, 2), (1, 0), (2, 1)),
    "3d": ((3, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1)),
}

# The first is small.
CALLS: dict[str, list[Callable[[Source], Call]]] = {
    "linear_reduce": [
        lambda new: make.linear_reduce(new, NO_SIGNS, 3, 17, 33, 20),
        lambda new: make.linear_reduce(new, NO_SIGNS, 33, 129, 300, 513),
        lambda new: make.linear_reduce(new, NORMS, 33, 20, 300, 513),
        lambda new: make.linear_reduce(new, MOMENTS, 5, 1000, 257, 130, coef=True),
        lambda new: make.linear_reduce(new, NO_SIGNS, 150, 1, 300, 270),
        lambda new: make.linear_reduce(new, BOTH, 3, 5000, 70, 65),
        lambda new: make.linear_reduce(new, SUM, 2, 70, 3000, 1030, coef=True),
        # Rows that Hopper copies by descriptors, in tiles that divide the weight and that do not.
        lambda new: make.linear_reduce(new, BOTH, 5, 130, 512, 384),
        lambda new: make.linear_reduce(new, NO_SIGNS, 5, 130, 520, 264),
        lambda new: make.linear_reduce(new, BOTH, 2, 2000, 264, 512),
    ],
    "conv_reduce": [
        lambda new: make.conv_reduce(new, NO_SIGNS, (3, 6, 9, 8), 10, CONV2D, 2),
        lambda new: make.conv_reduce(new, BOTH, (9, 19, 33, 31), 37),
        lambda new: make.conv_reduce(new, BOTH, (9, 64, 28, 28), 64, last=True),
        lambda new: make.conv_reduce(new, NO_SIGNS, (5, 33, 301), 33, WINDOWS["1d"], 3),
        lambda new: make.conv_reduce(new, MOMENTS, (4, 40, 25, 30), 70, WINDOWS["2d"], 2),
        lambda new: make.conv_reduce(new, BOTH, (3, 8, 9, 12, 11), 24, WINDOWS["3d"]),
        lambda new: make.conv_reduce(new, BOTH, (6, 66, 20, 20), 66, CONV2D, 66),
        lambda new: make.conv_reduce(new, NO_SIGNS, (6, 66, 20, 20), 132, CONV2D, 66, last=True),
        lambda new: make.conv_reduce(new, BOTH, (2, 3, 300, 301), 3, CONV2D, 3),
        lambda new: make.conv_reduce(new, NORMS, (6, 130, 7, 7), 257),
    ],
    "affine_reduce": [
        lambda new: make.affine_reduce(new, NO_SIGNS, "layer", 3, 17, 20),
        lambda new: make.affine_reduce(new, NO_SIGNS, "layer", 9, 301, 770),
        lambda new: make.affine_reduce(new, BOTH, "rms", 9, 301, 770),
        lambda new: make.affine_reduce(new, MOMENTS, "group", 17, 900, 65),
        lambda new: make.affine_reduce(new, BOTH, "bias", 5, 70000, 3),
        lambda new: make.affine_reduce(new, NO_SIGNS, "bias", 700, 1, 515),
    ],
    "linear_gram": [
        lambda new: make.linear_gram(new, 5, 1, 33, 20),
        lambda new: make.linear_gram(new, 300, 1, 300, 270),
        lambda new: make.linear_gram(new, 130, 1, 300, 270, 77),
        lambda new: make.linear_gram(new, 33, 129, 300, 513),
        lambda new: make.linear_gram(new, 9, 5, 1000, 800, 17),
    ],
    "conv_gram": [
        lambda new: make.conv_gram(new, None, (3, 6, 9, 8), 10, CONV2D, 2),
        lambda new: make.conv_gram(new, None, (17, 19, 33, 31), 37),
        lambda new: make.conv_gram(new, 9, (17, 130, 7, 7), 257),
        lambda new: make.conv_gram(new, 9, (17, 130, 7, 7), 130, CONV2D, 130),
    ],
    "dense_gram": [
        lambda new: make.dense_gram(new, 5, 33),
        lambda new: make.dense_gram(new, 130, 100_003),
        lambda new: make.dense_gram(new, 20, 70_001, 77),
    ],
    "linear_order": [
        lambda new: make.linear_order(new, "median_of_means", 3.0, 7, 5, 33, 20),
        lambda new: make.linear_order(new, "median_of_means", 3.0, 33, 129, 300, 513),
        lambda new: make.linear_order(new, "winsorized_mean", 2.0, 33, 20, 300, 513),
        lambda new: make.linear_order(new, "sign_agreement", 0.25, 33, 1, 300, 513),
    ],
    "conv_order": [
        lambda new: make.conv_order(new, "median_of_means", 3.0, (7, 6, 9, 8), 10),
        lambda new: make.conv_order(new, "winsorized_mean", 2.0, (9, 19, 33, 31), 37),
        lambda new: make.conv_order(new, "winsorized_mean", 2.0, (9, 66, 20, 20), 66, CONV2D, 66),
    ],
}

SIZES = [(op, i) for op, calls in CALLS.items() for i in range(len(calls))]
each_size = pytest.mark.parametrize(
    ("op", "index"), SIZES, ids=[f"{op}-{i or 'small'}" for op, i in SIZES]
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

Args = tuple


def arguments(op: str, index: int, dtype: torch.dtype, device: str = "cuda") -> Args:
    return CALLS[op][index](Source(device, dtype))[1]


def run(op: str, args: Args) -> tuple[Tensor, ...]:
    out = getattr(torch.ops.pycoherence, op)(*args)
    return (out,) if isinstance(out, Tensor) else out


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    pairs = zip(tensors_of(first), tensors_of(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def overwrite(args: Args, others: Args) -> None:
    for x, other in zip(args, others, strict=True):
        if isinstance(x, Tensor):
            x.copy_(other)


def assert_true(op: str, args: Args, tolerance: float) -> None:
    expected = pc.ops.specs[op].reference(*in_float64(args))
    if isinstance(expected, Tensor):
        assert_close(*run(op, args), expected, tolerance, op)
    else:
        assert_reduced_close(run(op, args), expected, tolerance, op)


@contextmanager
def tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("op", CALLS)
def test_triton_is_picked(op: str) -> None:
    args = arguments(op, 0, torch.bfloat16)
    assert fastest(pc.ops.specs[op], "cuda", args).name == "triton"


@each_dtype
@each_size
def test_agrees_with_the_reference_in_float64(op: str, index: int, dtype: torch.dtype) -> None:
    tolerance = 1e-11 if dtype == torch.float64 else TOLERANCE[dtype]
    assert_true(op, arguments(op, index, dtype), tolerance)


@each_size
def test_tf32_if_torch_allows_it(op: str, index: int) -> None:
    """It cuts off what it multiplies after 11 bits."""
    with tf32():
        assert_true(op, arguments(op, index, torch.float32), 4e-3)


@each_dtype
@pytest.mark.parametrize(("op", "index"), [size for size in SIZES if "reduce" in size[0]])
def test_whole_numbers_are_exact(op: str, index: int, dtype: torch.dtype) -> None:
    """So signs are too, in every dtype, and with TensorFloat-32."""
    *head, _, _, _ = arguments(op, index, dtype)
    if op == "affine_reduce" and head[1] is not None:
        pytest.skip("normalised numbers are not whole")
    whole = (x.clamp(-1, 1).round() if isinstance(x, Tensor) else x for x in head)
    args = (*whole, None, None, mask(("weighted_sum", "sign_sum")))
    expected = pc.ops.specs[op].reference(*in_float64(args))
    with tf32():
        found = run(op, args)
    for ours, truth in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert torch.equal(ours.double().cpu(), truth.double())


@each_dtype
@each_size
def test_is_bitwise_repeatable(op: str, index: int, dtype: torch.dtype) -> None:
    args = arguments(op, index, dtype)
    assert same(run(op, args), run(op, args))


@each_dtype
@each_size
def test_runs_in_a_cuda_graph(op: str, index: int, dtype: torch.dtype) -> None:
    """And the graph computes anew from what its arguments hold then."""
    args, others = (arguments(op, index, dtype) for _ in range(2))
    expected = run(op, others)
    run(op, args)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(op, args)
    overwrite(args, others)
    graph.replay()
    torch.cuda.synchronize()
    assert same(out, expected)


@pytest.mark.parametrize("op", CALLS)
def test_small_tapes_take_the_numbers_of_their_call(op: str) -> None:
    """The host decides once, and does the same for other tensors of the same shapes."""
    first, *others = (arguments(op, 0, torch.float32) for _ in range(3))
    run(op, first)
    for args in others:
        assert_true(op, args, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_small_layers_are_reduced_together(dtype: torch.dtype) -> None:
    model = nn.Sequential(
        *(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, groups=8), nn.Tanh()),
        *(nn.LayerNorm(12), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16, bias=False)),
    ).to("cuda", dtype)
    for _ in range(3):
        x = torch.randn(5, 3, 16, device="cuda").to(dtype)
        found = list[tuple[Tensor, ...]]()
        for backend in (None, "reference"):
            model.zero_grad()
            with pc.backend(backend), pc.collect(model, pc.SqNorms()) as record:
                model(x).square().mean((1, 2)).mean().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            each = [one.sq_norms for one in record.by_parameter.values()]
            found.append((record.sq_norms, *each, *gradients))
        for ours, truth in zip(*found, strict=True):
            assert ours.dtype == truth.dtype
            assert_close(ours, truth.double().cpu(), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("op", CALLS)
def test_runs_on_the_current_stream(op: str) -> None:
    args, others = (arguments(op, 0, torch.float32) for _ in range(2))
    expected = run(op, others)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # what ran on another stream would be too early
        overwrite(args, others)
        out = run(op, args)
        torch.cuda.current_stream().synchronize()
    assert same(out, expected)


@pytest.mark.parametrize("op", CALLS)
def test_runs_on_the_device_of_its_arguments(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert torch.cuda.current_device() == 0
    assert_true(op, arguments(op, 0, torch.float32, "cuda:1"), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_offsets_have_64_bits(dtype: torch.dtype) -> None:
    """The second example lies behind more than 2^31 numbers."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of memory")
    x = torch.zeros(2, 2**16, 2**15 + 64, device="cuda", dtype=dtype)[:, ::8192]
    x.copy_(torch.randn(x.shape, device="cuda"))
    g = torch.randn(2, 8, 40, device="cuda").to(dtype)
    assert_true("linear_reduce", (x, g, None, None, mask(BOTH)), 1e-5)
    assert_true("linear_gram", (x, g, None, None), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("positions", [1024, 1025, 5000])
def test_sums_of_one_sign_keep_their_digits(positions: int, dtype: torch.dtype) -> None:
    """Tensor cores cut off what an accumulator cannot hold, which never evens out here."""
    x, g = (torch.rand(3, positions, n, device="cuda").to(dtype) for n in (64, 48))
    for bits in (("sq_norms",), ("sq_norms", "weighted_sum")):
        assert_true("linear_reduce", (x, g, None, None, mask(bits)), 1e-5)
    assert_true("linear_gram", (x, g, None, None), 1e-5)
