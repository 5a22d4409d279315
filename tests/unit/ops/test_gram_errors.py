"""Each check of the `*_gram` ops: the right kind of error, and words that help."""

import pytest
import torch
from support.raising import Calls, raising

import pycoherence as pc

ops = pc.ops
X, G = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
IDS = torch.zeros(2, 3, dtype=torch.long)
IMAGE, OUT = torch.zeros(2, 4, 6, 6), torch.zeros(2, 6, 6, 6)

VALUE_ERRORS: Calls = {
    "linear-2d": (
        lambda: ops.linear_gram(X[:, 0], G[:, 0]),
        r"linear_gram: expected x \[B, T, I\] and g \[B, T, O\], got \(2, 4\)",
    ),
    "second-2d": (
        lambda: ops.linear_gram(X, G, X[:, 0], G[:, 0]),
        r"linear_gram, second batch: expected x \[B, T, I\]",
    ),
    "half-a-batch": (
        lambda: ops.linear_gram(X, G, X),
        "linear_gram: expected x2 and g2 together, got one of them",
    ),
    "other-half": (
        lambda: ops.embedding_gram(IDS, G, g2=G),
        "embedding_gram: expected ids2 and g2 together",
    ),
    "inputs-differ": (
        lambda: ops.linear_gram(X, G, G, G),
        r"gradients of one shape, got \(5, 4\) and \(5, 5\)",
    ),
    "outputs-differ": (
        lambda: ops.linear_gram(X, G, X, X),
        r"gradients of one shape, got \(5, 4\) and \(4, 4\)",
    ),
    "conv-positions": (
        lambda: ops.conv_gram(IMAGE, OUT, (1, 1), IMAGE, OUT[..., :5]),
        r"conv_gram, second batch: .*output positions \[6, 6\], but g is \(2, 6, 6, 5\)",
    ),
    "conv-channels": (
        lambda: ops.conv_gram(IMAGE, OUT, (1, 1), IMAGE[:, :2], OUT),
        r"one shape, got \(6, 4, 1, 1\) and \(6, 2, 1, 1\)",
    ),
    "embedding-width": (
        lambda: ops.embedding_gram(IDS, G, IDS, X),
        r"embedding_gram: .*one shape, got \(5,\) and \(4,\)",
    ),
    "embedding-padding": (
        lambda: ops.embedding_gram(IDS, G, padding_idx=-1),
        "expected padding_idx >= 0, got -1",
    ),
    "dense-3d": (
        lambda: ops.dense_gram(G),
        r"dense_gram: expected a \[B1, P\].*got a \(2, 3, 5\); flatten\(1\)",
    ),
    "dense-columns": (
        lambda: ops.dense_gram(X[0], G[0]),
        r"got a \(3, 4\) and b \(3, 5\)",
    ),
}

TYPE_ERRORS: Calls = {
    "mixed": (
        lambda: ops.linear_gram(X, G, X.double(), G.double()),
        "linear_gram: expected g2 to have the dtype and device of g1",
    ),
    "integer": (lambda: ops.conv_gram(IMAGE.int(), OUT.int(), (1, 1)), "x to be float16"),
    "float-ids": (
        lambda: ops.embedding_gram(IDS, G, IDS.float(), G),
        "embedding_gram, second batch: expected ids to be int32 or int64 on cpu",
    ),
    "dense-mixed": (
        lambda: ops.dense_gram(G[0], G[0].half()),
        "dense_gram: expected b to have the dtype and device of a",
    ),
}

test_value_errors = raising(ValueError, VALUE_ERRORS)
test_type_errors = raising(TypeError, TYPE_ERRORS)


def test_negative_ids_are_index_errors() -> None:
    with pytest.raises(IndexError, match="expected ids >= 0, got -1"):
        ops.embedding_gram(IDS - 1, G)
