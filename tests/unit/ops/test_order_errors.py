"""Each check of the `*_order` ops: the right kind of error, and words that help."""

import pytest
import torch
from support.raising import Calls, raising

import pycoherence as pc
from pycoherence.sites import AffineSite, LinearSite

ops = pc.ops
X, G = torch.zeros(8, 3, 4), torch.zeros(8, 3, 5)
ROWS = torch.zeros(8, 3)
IDS = torch.zeros(8, 3, dtype=torch.long)
IMAGE, OUT = torch.zeros(8, 4, 6, 6), torch.zeros(8, 6, 6, 6)

VALUE_ERRORS: Calls = {
    "rule": (
        lambda: ops.linear_order(X, G, "mean"),
        r"linear_order: expected a rule among winsorized_mean, .*, meamed, got 'mean'",
    ),
    "winsorized-half": (
        lambda: ops.dense_order(ROWS, "winsorized_mean", 4),
        "dense_order: expected k of winsorized_mean to be a whole number from 0 to 3 for a batch "
        "of 8, got 4",
    ),
    "trimmed-negative": (lambda: ops.dense_order(ROWS, "trimmed_mean", -1), "from 0 to 3.*got -1"),
    "trimmed-fraction": (
        lambda: ops.dense_order(ROWS, "trimmed_mean", 0.5),
        r"a whole number from 0 to 3 .* got 0\.5",
    ),
    "phocas-half": (lambda: ops.dense_order(ROWS, "phocas", 4), "phocas .* from 0 to 3"),
    "meamed-all": (lambda: ops.dense_order(ROWS, "meamed", 8), "meamed .* from 0 to 7"),
    "median-k": (lambda: ops.dense_order(ROWS, "median", 1), "median .* from 0 to 0 .* got 1"),
    "lower-median-k": (lambda: ops.dense_order(ROWS, "lower_median", 1), "from 0 to 0"),
    "groups-none": (lambda: ops.dense_order(ROWS, "median_of_means"), "from 1 to 8 .* got 0"),
    "groups-many": (lambda: ops.dense_order(ROWS, "median_of_means", 9), "from 1 to 8 .* got 9"),
    "agreement-high": (
        lambda: ops.dense_order(ROWS, "sign_agreement", 1.5),
        r"sign_agreement to be a number from 0 to 1 .* got 1\.5",
    ),
    "k-nan": (lambda: ops.dense_order(ROWS, "sign_agreement", float("nan")), "got nan"),
    "k-inf": (lambda: ops.dense_order(ROWS, "meamed", float("inf")), "got inf"),
    "one-example": (lambda: ops.dense_order(ROWS[:1], "phocas", 1), "from 0 to 0 for a batch of 1"),
    "nonfinite": (
        lambda: ops.conv_order(IMAGE, OUT, (1, 1), "median", nonfinite="skip"),
        "conv_order: expected nonfinite to be 'nan' or 'drop', got 'skip'",
    ),
    "scalar": (
        lambda: ops.dense_order(ROWS[0, 0], "median"),
        r"dense_order: expected rows \[B, \.\.\.\]",
    ),
    "linear-2d": (
        lambda: ops.linear_order(X[:, 0], G[:, 0], "median"),
        r"linear_order: expected x \[B, T, I\] and g \[B, T, O\], got \(8, 4\)",
    ),
    "conv-positions": (
        lambda: ops.conv_order(IMAGE, OUT, (3, 3), "median"),
        r"conv_order: .*output positions \[4, 4\], but g is \(8, 6, 6, 6\)",
    ),
    "embedding-padding": (
        lambda: ops.embedding_order(IDS, G, 5, "median", padding_idx=5),
        r"embedding_order: expected padding_idx in \[0, 5\), got 5",
    ),
    "site": (
        lambda: LinearSite(X, G).order("winsorized_mean", 4, False),
        "linear_order: expected k of winsorized_mean .* for a batch of 8",
    ),
    "affine-site": (lambda: AffineSite(G).order("phocas", 4, True), "dense_order: expected k of"),
}

TYPE_ERRORS: Calls = {
    "integer": (lambda: ops.dense_order(ROWS.int(), "median"), "dense_order: expected rows to be"),
    "mixed": (lambda: ops.linear_order(X, G.double(), "median"), "g to have the dtype and device"),
    "float-ids": (
        lambda: ops.embedding_order(IDS.float(), G, 5, "median"),
        "embedding_order: expected ids to be int32 or int64",
    ),
}

INDEX_ERRORS: Calls = {
    "high": (
        lambda: ops.embedding_order(IDS + 5, G, 5, "median"),
        r"embedding_order: expected ids in \[0, 5\), got ids from 5 to 5",
    ),
    "negative": (lambda: ops.embedding_order(IDS - 1, G, 5, "median"), "got ids from -1 to -1"),
}

test_value_errors = raising(ValueError, VALUE_ERRORS)
test_type_errors = raising(TypeError, TYPE_ERRORS)
test_index_errors = raising(IndexError, INDEX_ERRORS)


def test_fake_kernels_check_too() -> None:
    """Else a mistake would only show after compilation."""
    with pytest.raises(ValueError, match="from 0 to 3 for a batch of 8"):
        ops.linear_order(X.to("meta"), G.to("meta"), "trimmed_mean", 4)
