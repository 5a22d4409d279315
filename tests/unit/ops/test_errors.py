"""Each check of the ops: the right kind of error, and words that help."""

import pytest
import torch
from support.raising import Calls, raising

import pycoherence as pc

ops = pc.ops
X, G = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
IDS = torch.zeros(2, 3, dtype=torch.long)
IMAGE, OUT = torch.zeros(2, 4, 6, 6), torch.zeros(2, 6, 6, 6)
META = torch.zeros(2, 3, 5, device="meta")

VALUE_ERRORS: Calls = {
    "embedding-table": (
        lambda: ops.embedding_reduce(IDS, G, -3),
        "expected num_embeddings >= 0, got -3",
    ),
    "conv-large": (
        lambda: ops.conv_reduce(IMAGE, OUT, kernel_size=(3, 3), padding=2**62, dilation=2**62),
        r"expected kernel_size, .* below 2\*\*31",
    ),
    "linear-2d": (
        lambda: ops.linear_reduce(X[:, 0], G[:, 0]),
        r"linear_reduce: expected x \[B, T, I\] and g \[B, T, O\], got \(2, 4\).*unsqueeze",
    ),
    "linear-batch": (lambda: ops.linear_reduce(X[:1], G), r"got \(1, 3, 4\) and \(2, 3, 5\)"),
    "linear-positions": (lambda: ops.linear_reduce(X[:, :2], G), r"\(2, 2, 4\) and \(2, 3, 5\)"),
    "linear-4d": (lambda: ops.linear_reduce(X[None], G[None]), "flatten positions into T"),
    "want-unknown": (
        lambda: ops.linear_reduce(X, G, want=("norms",)),
        r"want to name some of sq_norms, dots, .*got \('norms',\)",
    ),
    "want-empty": (lambda: ops.linear_reduce(X, G, want=()), "want to name some of"),
    "mask-zero": (
        lambda: torch.ops.pycoherence.linear_reduce(X, G, None, None, 0),
        "mask of 7 bits, got 0",
    ),
    "mask-large": (
        lambda: torch.ops.pycoherence.linear_reduce(X, G, None, None, 128),
        "mask of 7 bits, got 128",
    ),
    "mask-negative": (
        lambda: torch.ops.pycoherence.linear_reduce(X, G, None, None, -1),
        "mask of 7 bits, got -1",
    ),
    "dots-without-direction": (
        lambda: ops.linear_reduce(X, G, want=("dots",)),
        "'dots' is wanted but no direction was given",
    ),
    "direction-without-dots": (
        lambda: ops.linear_reduce(X, G, direction=torch.zeros(5, 4)),
        "direction was given but 'dots' is not wanted; add it to want",
    ),
    "coef-without-sum": (
        lambda: ops.linear_reduce(X, G, coef=torch.ones(2)),
        "coef was given but 'weighted_sum' is not wanted",
    ),
    "coef-shape": (
        lambda: ops.linear_reduce(X, G, coef=torch.ones(3), want=("weighted_sum",)),
        r"expected coef of shape \(2,\), got \(3,\)",
    ),
    "coef-scalar": (
        lambda: ops.linear_reduce(X, G, coef=torch.tensor(2.0), want=("weighted_sum",)),
        r"expected coef of shape \(2,\), got \(\)",
    ),
    "direction-transposed": (
        lambda: ops.linear_reduce(X, G, direction=torch.zeros(4, 5), want=("dots",)),
        r"expected direction of shape \(5, 4\), got \(4, 5\)",
    ),
    "conv-positions": (
        lambda: ops.conv_reduce(IMAGE, OUT, (3, 3)),
        r"output positions \[4, 4\], but g is \(2, 6, 6, 6\)",
    ),
    "conv-batch": (lambda: ops.conv_reduce(IMAGE[:1], OUT, (1, 1)), "conv_reduce: expected x"),
    "conv-unbatched": (
        lambda: ops.conv_reduce(IMAGE[0], OUT[0], (1, 1)),
        "conv_reduce: expected x",
    ),
    "conv-5-dims": (
        lambda: ops.conv_reduce(IMAGE[..., None, None, None], OUT[..., None, None, None], (1,) * 5),
        "1 to 4 numbers each",
    ),
    "conv-no-kernel": (lambda: ops.conv_reduce(IMAGE, OUT, ()), "1 to 4 numbers each"),
    "conv-stride-count": (
        lambda: ops.conv_reduce(IMAGE, OUT, (1, 1), stride=(1, 1, 1)),
        r"expected stride of one or 2 numbers, got \(1, 1, 1\)",
    ),
    "conv-zero-stride": (
        lambda: ops.conv_reduce(IMAGE, OUT, (1, 1), stride=0),
        "expected positive kernel_size, stride, dilation, groups",
    ),
    "conv-zero-groups": (lambda: ops.conv_reduce(IMAGE, OUT, (1, 1), groups=0), "positive"),
    "conv-zero-kernel": (lambda: ops.conv_reduce(IMAGE, OUT, (1, 0)), "positive kernel_size"),
    "conv-negative-padding": (
        lambda: ops.conv_reduce(IMAGE, OUT, (1, 1), padding=-1),
        "padding >= 0",
    ),
    "conv-groups": (
        lambda: ops.conv_reduce(IMAGE, OUT, (1, 1), groups=3),
        "expected channels divisible by groups=3, got 4 in and 6 out",
    ),
    "conv-same-stride": (
        lambda: ops.conv_reduce(IMAGE, OUT, (1, 1), stride=2, padding="same"),
        r"'same' with stride 1, got 'same' with stride \(2, 2\)",
    ),
    "conv-unknown-padding": (
        lambda: ops.conv_reduce(IMAGE, OUT, (1, 1), padding="full"),
        "'valid', or 'same' with stride 1, got 'full'",
    ),
    "conv-kernel-beyond-input": (
        lambda: ops.conv_reduce(torch.zeros(2, 1, 3), torch.zeros(2, 1, 0), (4,)),
        "conv_reduce: .*kernel",
    ),
    "embedding-2d-g": (
        lambda: ops.embedding_reduce(IDS[:, 0], G[:, 0], 5),
        r"embedding_reduce: expected ids \[B, T\] and g \[B, T, D\].*unsqueeze",
    ),
    "embedding-mismatch": (
        lambda: ops.embedding_reduce(IDS[:, :2], G, 5),
        r"got \(2, 2\) and \(2, 3, 5\)",
    ),
    "embedding-padding-high": (
        lambda: ops.embedding_reduce(IDS, G, 5, padding_idx=5),
        r"expected padding_idx in \[0, 5\), got 5",
    ),
    "embedding-padding-negative": (
        lambda: ops.embedding_reduce(IDS, G, 5, padding_idx=-1),
        r"expected padding_idx in \[0, 5\), got -1",
    ),
    "affine-2d": (
        lambda: ops.affine_reduce(G[:, 0]),
        r"affine_reduce: expected g \[B, T, C\].*got g \(2, 5\)",
    ),
    "affine-x-shape": (
        lambda: ops.affine_reduce(G, X),
        r"got g \(2, 3, 5\) and x \(2, 3, 4\)",
    ),
    "affine-mean-alone": (
        lambda: ops.affine_reduce(G, mean=torch.zeros(2, 3, 1)),
        "mean was given without x",
    ),
    "affine-rstd-shape": (
        lambda: ops.affine_reduce(G, G, rstd=torch.zeros(2, 2, 1)),
        r"expected rstd to broadcast to \(2, 3, 5\), got \(2, 2, 1\)",
    ),
    "affine-mean-dims": (
        lambda: ops.affine_reduce(G, G, torch.zeros(5)),
        r"expected mean to broadcast to \(2, 3, 5\), got \(5,\)",
    ),
    "backend-name": (lambda: pc.backend("cuda").__enter__(), "among native, triton, reference"),
}

TYPE_ERRORS: Calls = {
    "linear-integer": (
        lambda: ops.linear_reduce(X.long(), G.long()),
        "linear_reduce: expected x to be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "linear-complex": (lambda: ops.linear_reduce(X.cfloat(), G.cfloat()), "got torch.complex64"),
    "linear-mixed": (
        lambda: ops.linear_reduce(X, G.double()),
        "g to have the dtype and device of x .*float32, cpu.*, got torch.float64",
    ),
    "linear-devices": (lambda: ops.linear_reduce(X, META), "got torch.float32 on meta"),
    "want-string": (
        lambda: ops.linear_reduce(X, G, want="sq_norms"),
        r"such as \('sq_norms',\), got a string",
    ),
    "coef-integer": (
        lambda: ops.linear_reduce(X, G, coef=torch.ones(2).long(), want=("weighted_sum",)),
        "expected coef to be floating on cpu, got torch.int64",
    ),
    "direction-device": (
        lambda: ops.linear_reduce(X, G, direction=META.new_zeros(5, 4), want=("dots",)),
        "expected direction to be floating on cpu, got torch.float32 on meta",
    ),
    "conv-mixed": (lambda: ops.conv_reduce(IMAGE, OUT.half(), (1, 1)), "g to have the dtype"),
    "embedding-float-ids": (
        lambda: ops.embedding_reduce(IDS.float(), G, 5),
        "expected ids to be int32 or int64 on cpu, got torch.float32",
    ),
    "embedding-short-ids": (lambda: ops.embedding_reduce(IDS.short(), G, 5), "got torch.int16"),
    "embedding-device": (lambda: ops.embedding_reduce(IDS, META, 5), "on meta, got torch.int64"),
    "embedding-integer-g": (
        lambda: ops.embedding_reduce(IDS, G.int(), 5),
        "expected g to be float",
    ),
    "affine-mixed": (lambda: ops.affine_reduce(G, G.double()), "x to have the dtype"),
    "affine-integer-rstd": (
        lambda: ops.affine_reduce(G, G, rstd=torch.ones(2, 3, 1).int()),
        "expected rstd to be floating on cpu, got torch.int32",
    ),
}

NOT_TENSORS: Calls = {
    "none": (lambda: ops.linear_reduce(None, G), "linear_reduce: expected x to be a tensor, got N"),
    "numpy": (
        lambda: ops.dense_gram(X[0].numpy()),
        "expected a to be a tensor, got nda",
    ),
    "number": (
        lambda: ops.linear_reduce(X, G, coef=2.0, want=("weighted_sum",)),
        "expected coef to be a tensor or None, got float",
    ),
    "list": (lambda: ops.row_sq_norms([1.0]), "expected rows to be a list, each a tensor, got fl"),
    "sparse": (
        lambda: ops.linear_reduce(X.to_sparse(), G),
        r"expected x to be a dense tensor, got a sparse_coo one; convert it with to_dense\(\)",
    ),
    "mkldnn": (lambda: ops.dense_order(X[0].to_mkldnn(), "median"), "got a mkldnn one"),
    "kernel-size": (
        lambda: ops.conv_reduce(IMAGE, OUT, kernel_size=(1.0, 1)),  # pyright: ignore
        "expected kernel_size to be a list, each an integer, got float",
    ),
}

INDEX_ERRORS: Calls = {
    "embedding-high": (
        lambda: ops.embedding_reduce(IDS + 5, G, 5),
        r"expected ids in \[0, 5\), got ids from 5 to 5",
    ),
    "embedding-negative": (lambda: ops.embedding_reduce(IDS - 1, G, 5), "got ids from -1 to -1"),
    "embedding-empty-table": (lambda: ops.embedding_reduce(IDS, G, 0), r"in \[0, 0\)"),
}

test_value_errors = raising(ValueError, VALUE_ERRORS)
test_type_errors = raising(TypeError, TYPE_ERRORS)
test_not_tensors = raising(TypeError, NOT_TENSORS)
test_index_errors = raising(IndexError, INDEX_ERRORS)


def test_fake_kernels_check_too() -> None:
    """Else a mistake would only show after compilation."""
    with pytest.raises(ValueError, match="flatten positions into T"):
        ops.linear_reduce(X[None].to("meta"), G[None].to("meta"))


@pytest.mark.parametrize("call", [ops.linear_gram, torch.ops.pycoherence.linear_gram])
def test_torch_says_what_does_not_fit_the_memory(call) -> None:
    x = torch.zeros(2**20, 1, 1)
    options = () if call is ops.linear_gram else (None, None)
    with pytest.raises(RuntimeError, match="tried to allocate 4398046511104 bytes"):
        call(x, x, *options)
