"""Order statistics on the emulated GPU agree with the rules in float64."""

import pytest
import torch
from emulated import build, load
from torch import Tensor

import pycoherence as pc
from pycoherence.ops._rules import RULES, aggregate

KINDS = ["plain", "ties", "nonfinite"]
ORDERS = ["forward", "reversed", "shuffled"]


@pytest.fixture(scope="module")
def emulation():
    build()
    return load()


@pytest.fixture(params=ORDERS)
def ordered(emulation, request):
    emulation.set_order(ORDERS.index(request.param))
    yield emulation
    emulation.set_order(0)


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
    values = (g.double().unsqueeze(2) * x.double().unsqueeze(1)).flatten(1)
    for k in numbers(rule, batch)[:2]:
        out = torch.empty(5, 35, dtype=dtype)
        emulation.linear_order(x.numpy(), g.numpy(), rule, k, drop, out.numpy())
        check(out.flatten(), values, rule, k, drop)


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
