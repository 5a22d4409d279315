"""Order statistics on the emulated GPU agree with the rules in float64."""

import pytest
import torch
from torch import Tensor

import pycoherence as pc
from pycoherence.ops.family.rules import RULES, aggregate

KINDS = ["plain", "ties", "nonfinite"]


def sample(batch: int, size: int, kind: str, dtype: torch.dtype) -> Tensor:
    """Values of which, in two of three columns, up to 0.9 are not finite where asked for."""
    made = torch.Generator().manual_seed(batch)
    values = torch.randn(batch, size, generator=made, dtype=torch.float64)
    if kind == "ties":
        values = (2 * values).round() / 2
    if kind == "nonfinite":
        share = 0.9 * torch.rand(1, size, generator=made)
        share[:, ::3] = 0
        which = torch.rand(batch, size, generator=made) / share
        for i, odd in enumerate((torch.nan, torch.inf, -torch.inf)):
            values[(which >= i / 3) & (which < (i + 1) / 3)] = odd
    return values.to(dtype)


def numbers(rule: str, batch: int) -> list[float]:
    """Numbers of a rule that fit a batch."""
    kind = RULES[rule]
    if not kind.whole:
        return [0.0, 0.25, 1.0]
    most = kind.most(batch)
    return [k for k in sorted({1, 3, 7, 33, kind.fewest, most}) if kind.fewest <= k <= most]


def check(found: Tensor, values: Tensor, rule: str, k: float, drop: bool) -> None:
    compare(found, aggregate(values, rule, k, drop))


def compare(found: Tensor, want: Tensor) -> None:
    scale = want.nan_to_num().abs().max().item()
    error = scale * (1e-12 if found.dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=error, equal_nan=True)


def check_linear(emulation, x: Tensor, g: Tensor, *tail) -> None:
    values = (g.double().unsqueeze(2) * x.double().unsqueeze(1)).flatten(1)
    out = torch.empty(g.shape[1], x.shape[1], dtype=x.dtype)
    emulation.linear_order(x.numpy(), g.numpy(), *tail, out.numpy())
    check(out.flatten(), values, *tail)


# Every way that a batch of this size takes; float64 has the same code and fewer registers.
CASES = [
    *((batch, torch.float32) for batch in (1, 3, 16, 33, 64, 128, 129)),
    *((batch, torch.float64) for batch in (7, 40)),
]


@pytest.mark.parametrize(("batch", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_dense_order(emulation, rule, batch, drop, dtype):
    for kind in KINDS:
        rows = sample(batch, 131, kind, dtype)
        for k in numbers(rule, batch):
            out = torch.empty(131, dtype=dtype)
            emulation.dense_order(rows.numpy(), rule, k, drop, out.numpy())
            check(out, rows.double(), rule, k, drop)


@pytest.mark.parametrize(("batch", "dtype"), CASES[1::2], ids=str)
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_linear_order(emulation, rule, batch, drop, dtype):
    x = sample(batch, 35, "plain", dtype)
    g = sample(batch, 5, "nonfinite", dtype)
    for k in numbers(rule, batch)[:2]:
        check_linear(emulation, x, g, rule, k, drop)


def lookups(batch: int, positions: int, width: int, rows: int, dtype: torch.dtype):
    """Row 0 for all examples, some of them often, others for some; the last row for none."""
    made = torch.Generator().manual_seed(batch)
    ids = torch.randint(rows - 1, (batch, positions), generator=made)
    ids[:, 0] = 0
    return ids, sample(batch * positions, width, "nonfinite", dtype).view(batch, positions, width)


def check_embedding(emulation, ids: Tensor, g: Tensor, rows: int, padding: int, *tail) -> None:
    table = torch.zeros(rows, g.shape[2], dtype=g.dtype)
    ordered, places = (x.numpy() for x in ids.flatten().sort(stable=True))
    emulation.embedding_order(ordered, places, g.numpy(), padding, *tail, table.numpy())
    reference = pc.ops.specs["embedding_order"].reference
    compare(table, reference(ids, g.double(), rows, padding, *tail))


@pytest.mark.parametrize(("batch", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_embedding_order(emulation, rule, batch, drop, dtype):
    for positions, width, padding in ((1, 35, -1), (7, 3, 2)):
        ids, g = lookups(batch, positions, width, 5, dtype)
        for k in numbers(rule, batch)[:2]:
            check_embedding(emulation, ids, g, 5, padding, rule, k, drop)


LARGER = [("median", 0.0), ("winsorized_mean", 2.0), ("meamed", 30.0), ("median_of_means", 40.0)]


@pytest.mark.parametrize(("rule", "k"), LARGER)
def test_batches_that_do_not_fit_shared_memory(emulation, rule, k):
    x, g = sample(400, 3, "plain", torch.float32), sample(400, 2, "nonfinite", torch.float32)
    ids, rows = lookups(400, 2, 3, 4, torch.float32)
    for drop in (False, True):
        check_linear(emulation, x, g, rule, k, drop)
        check_embedding(emulation, ids, rows, 4, -1, rule, k, drop)


@pytest.mark.parametrize(("rule", "k"), LARGER[:2])
def test_blocks_in_any_order(ordered, rule, k):
    dense = sample(9, 700, "plain", torch.float32)
    out = torch.empty(700)
    ordered.dense_order(dense.numpy(), rule, k, False, out.numpy())
    check(out, dense.double(), rule, k, False)
    check_linear(ordered, dense[:, :70].contiguous(), dense[:, 70:105].contiguous(), rule, k, False)
    check_embedding(ordered, *lookups(9, 5, 150, 20, torch.float32), 20, 3, rule, k, False)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rule", "k"), LARGER[:3])
def test_halves_as_the_bindings_convert_them(emulation, rule, k, half):
    """They have many ties, and denormals."""
    rows = sample(33, 131, "plain", half) * torch.logspace(-8, 1, 131).to(half)
    out = torch.empty(131)
    emulation.dense_order(rows.float().numpy(), rule, k, False, out.numpy())
    check(out, rows.double(), rule, k, False)


@pytest.mark.parametrize("groups", [3, 8, 20, 33])
@pytest.mark.parametrize("drop", [False, True])
def test_means_of_groups_that_leave_the_range(emulation, groups, drop):
    rows = 3e38 * sample(66, 40, "plain", torch.float32).abs().clamp(0.2, 1)
    rows[:44, ::2] *= -1
    out = torch.empty(40)
    emulation.dense_order(rows.numpy(), "median_of_means", groups, drop, out.numpy())
    want = aggregate(rows, "median_of_means", groups, drop)
    assert want.isinf().any()
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch", [5, 129])
def test_the_largest_and_the_smallest_numbers_are_finite(emulation, batch, dtype):
    limits = torch.finfo(dtype)
    kinds = torch.tensor([limits.max, limits.min, limits.smallest_normal / 4, -0.0], dtype=dtype)
    rows = kinds.repeat(batch, 1)
    rows[batch // 2 + 1 :] = torch.nan
    out = torch.empty(4, dtype=dtype)
    emulation.dense_order(rows.numpy(), "median", 0.0, True, out.numpy())
    assert torch.equal(out, kinds)


@pytest.mark.parametrize("bad", [-1, 5])
def test_ids_that_are_no_rows_of_the_table(emulation, bad):
    ids, g = lookups(3, 2, 4, 5, torch.float32)
    ids[1, 1] = bad
    with pytest.raises(RuntimeError, match="embedding_order: an id is out of range"):
        check_embedding(emulation, ids, g, 5, -1, "median", 0.0, False)


def test_batches_of_more_than_fit_a_whole_number(emulation):
    rows = torch.zeros(1).expand(2**30 + 1, 1).numpy()
    with pytest.raises(ValueError, match="at most 2\\^30, got 1073741825"):
        emulation.dense_order(rows, "median", 0.0, False, torch.empty(1).numpy())
