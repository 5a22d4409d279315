"""Rules on vectors of every structure, against the papers' formulas and `aggregate`."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import plain_rules as plain
from support.raising import raising
from support.steps import aggregated, assert_gradients, gradients, larger
from torch import Tensor, nn

import pycoherence as pc

RULES: dict[str, Any] = {
    "winsorized": (lambda: pc.Winsorized(2), plain.coordinates("winsorized_mean", 2)),
    "trimmed-mean": (lambda: pc.TrimmedMean(3), plain.coordinates("trimmed_mean", 3)),
    "median": (lambda: pc.Median(), plain.coordinates("median")),
    "median-of-means": (lambda: pc.MedianOfMeans(3), plain.coordinates("median_of_means", 3)),
    "sign-agreement": (lambda: pc.SignAgreement(0.4), plain.coordinates("sign_agreement", 0.4)),
    "phocas": (lambda: pc.Phocas(2), plain.coordinates("phocas", 2)),
    "meamed": (lambda: pc.MeaMed(4), plain.coordinates("meamed", 4)),
    "krum": (lambda: pc.Krum(4), lambda v: plain.krum(v, 4)),
    "multi-krum": (lambda: pc.Krum(4, 3), lambda v: plain.krum(v, 4, 3)),
    "bulyan": (lambda: pc.Bulyan(2), lambda v: plain.bulyan(v, 2)),
    "geometric-median": (
        lambda: pc.GeometricMedian(),
        lambda v: plain.geometric_median(v, 100, 1e-6, 1e-6),
    ),
    "centered-clip": (
        lambda: pc.CenteredClip(0.7, 2),
        lambda v: plain.centered_clip(v, torch.zeros(v.shape[1], dtype=v.dtype), 0.7, 2),
    ),
    "norm-clip": (lambda: pc.NormClip(0.7), lambda v: plain.norm_clip(v, 0.7)),
    "auto-clip": (
        lambda: pc.AutoClip(0.7),
        lambda v: (v * 0.7 / (v.norm(dim=1, keepdim=True) + 0.01)).mean(0),
    ),
    "gaf": (lambda: pc.GAF(0.9), lambda v: plain.gaf(v, 0.9)),
}
rules = pytest.mark.parametrize("name", RULES)


def rows(n: int = 11, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 24, generator=generator, dtype=torch.float64).to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@rules
def test_a_matrix_in_every_structure(name: str) -> None:
    make, truth = RULES[name]
    v = rows()
    expected = truth(v)
    found = make()(v)
    assert found.dtype == v.dtype
    close(found, expected)
    close(make()(v.view(11, 2, 3, 4)), expected.view(2, 3, 4))
    close(make()(v.mT.contiguous().mT), expected)
    close(make()(list(v)), expected)
    close(make()(tuple(x.view(4, 6) for x in v)), expected.view(4, 6))
    close(make()(list(nn.ParameterList(v.unbind()))), expected)
    parts = {"b": v[:, :5], "a": v[:, 5:23].view(11, 3, 6), "c": v[:, 23]}
    for vectors in (parts, [{n: x[i] for n, x in parts.items()} for i in range(11)]):
        out = make()(vectors)
        assert list(out) == ["b", "a", "c"]
        assert out["a"].shape == (3, 6)
        assert out["c"].shape == ()
        close(torch.cat([x.flatten() for x in out.values()]), expected)


@rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    make, truth = RULES[name]
    v = rows(dtype=dtype)
    out = make()({"v": v, "w": v.double()})
    assert (out["v"].dtype, out["w"].dtype) == (dtype, torch.float64)
    close(
        make()(v), truth(v.double()), {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    )


@rules
def test_as_aggregate_does_it_on_a_model(name: str) -> None:
    make, _ = RULES[name]
    model, batch = larger("cnn")
    expected, report = aggregated(model, batch, make())
    found, ours = make().with_report(gradients(model, batch))
    assert_gradients(found, expected, 1e-10)
    assert ours.batch_size == report.batch_size
    assert list(ours.by_parameter) == list(report.by_parameter)
    assert (ours.network is None) == (report.network is None)
    for n, one in ours.by_parameter.items():
        other = report.by_parameter[n]
        assert (one.clipped, one.kept, one.iterations) == (
            other.clipped,
            other.kept,
            other.iterations,
        )
        if one.weights is not None:
            close(one.weights, other.weights, 1e-8)


@pytest.mark.parametrize(
    "make", [lambda: pc.Krum(2, per="parameter"), lambda: pc.NormClip(0.5, per="parameter")]
)
def test_each_part_alone(make: Any) -> None:
    v = rows()
    found, report = make().with_report({"a": v[:, :9], "b": v[:, 9:]})
    close(found["a"], make()(v[:, :9]))
    close(found["b"], make()(v[:, 9:]))
    assert report.network is None


def test_the_centre_is_carried_over() -> None:
    rule, centre = pc.CenteredClip(0.7), torch.zeros(24, dtype=torch.float64)
    for n in (11, 5, 7):
        centre = plain.centered_clip(rows(n), centre, 0.7, 1)
        close(rule(rows(n)), centre)
    assert list(rule.centre.value) == ["vector"]
    with pytest.raises(ValueError, match=r"a rule used with this model.*differs in vector"):
        rule(rows()[:, 1:])


def test_noise() -> None:
    clean = pc.NormClip(0.7)(rows())
    noisy = [
        pc.NormClip(0.7, 2.0, torch.Generator().manual_seed(seed))(rows()) - clean
        for seed in range(60)
    ]
    sample = torch.cat(noisy)
    assert abs(sample.std() / (2.0 * 0.7 / 11) - 1) < 4 / (2 * len(sample)) ** 0.5


def test_state_dicts() -> None:
    """The lower median of whole numbers is what some client has, and no few move it."""
    clients = []
    for seed in range(7):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        for _ in range(seed + 1):
            model(torch.randn(5, 3))
        clients.append(copy.deepcopy(model.state_dict()))
    merged = pc.Winsorized(2)(clients)
    assert list(merged) == list(clients[0])
    assert merged["1.num_batches_tracked"].item() == 4
    assert merged["1.num_batches_tracked"].dtype == torch.int64
    model.load_state_dict(merged)
    stacked = torch.stack([c["1.running_var"] for c in clients])
    close(merged["1.running_var"], plain.coordinates("winsorized_mean", 2)(stacked.double()), 1e-6)
    # They have no part in distances either.
    clients[0]["1.num_batches_tracked"] += 10**9
    chosen = pc.Krum(2).with_report(clients)[1].network.chosen
    plainer = [{n: x for n, x in c.items() if x.is_floating_point()} for c in clients]
    assert torch.equal(chosen, pc.Krum(2).with_report(plainer)[1].network.chosen)
    mask = pc.Median()(
        {"v": rows(3), "m": torch.tensor([[True, False], [True, False], [False, True]])}
    )
    assert mask["m"].tolist() == [True, False]


@pytest.mark.parametrize("name", ["winsorized", "krum", "geometric-median", "centered-clip"])
def test_not_finite(name: str) -> None:
    make, truth = RULES[name]
    v = rows(13)
    v[4] = torch.inf
    others = torch.cat([v[:4], v[5:]])
    assert make()(v).isnan().all()
    close(make()(v, nonfinite="drop"), truth(others))


@rules
def test_no_vectors(name: str) -> None:
    assert RULES[name][0]()(torch.zeros(0, 5)).tolist() == [0] * 5


@rules
def test_vectors_of_no_numbers(name: str) -> None:
    assert RULES[name][0]()(torch.zeros(11, 0)).shape == (0,)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=9), st.integers(0, 2**16))
def test_weights_count_vectors_several_times(counts: list[int], seed: int) -> None:
    counts[0] += 1
    v = torch.randn(len(counts), 5, generator=torch.Generator().manual_seed(seed)).double()
    repeated = v.repeat_interleave(torch.tensor(counts), 0)
    for make in (
        lambda: pc.GeometricMedian(7, nu=0.1, tolerance=0),
        lambda: pc.CenteredClip(0.7, 3),
        lambda: pc.NormClip(0.7),
        lambda: pc.AutoClip(0.7),
    ):
        close(make()(v, weights=torch.tensor(counts) * 0.3), make()(repeated), 1e-7)


def test_weights_of_vectors_that_are_left_out() -> None:
    v = rows(6)
    v[2] = torch.nan
    weights = [1.0, 2.0, 50.0, 0.5, 1.0, 1.0]
    for make in (lambda: pc.GeometricMedian(), lambda: pc.CenteredClip(0.7)):
        found = make()(v, weights=weights, nonfinite="drop")
        keep = [0, 1, 3, 4, 5]
        close(found, make()(v[keep], weights=[weights[i] for i in keep]))
        assert make()(v, weights=weights).isnan().all()


def test_nothing_is_copied_or_changed() -> None:
    v = rows()
    before, version = v.clone(), v._version
    for make, _ in RULES.values():
        out = make()(v)
        assert out.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()
    assert torch.equal(v, before)
    assert v._version == version


def test_no_gradient_flows() -> None:
    v = rows().requires_grad_()
    for make, _ in RULES.values():
        assert not make()(v).requires_grad


test_values = raising(
    ValueError,
    {
        "few": (lambda: pc.Krum(4)(rows(7)), r"2f \+ 3 = 11 examples or more, got 7; give it more"),
        "clip": (lambda: pc.Winsorized(3)(rows(6)), "needs 7 examples, got 6"),
        "shapes": (
            lambda: pc.Median()([torch.zeros(2), torch.zeros(3)]),
            r"one shape, dtype and device, got \(2,\).*number 0 and \(3,\).*number 1",
        ),
        "names": (
            lambda: pc.Median()([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}]),
            "same names in all dicts, got a, b in only one of numbers 0 and 1",
        ),
        "sizes": (
            lambda: pc.Median()({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)}),
            "as many vectors in each part.*got 2 in a, 3 in b",
        ),
        "dims": (lambda: pc.Median()(torch.tensor(1.0)), "without dimensions in vector"),
        "empty": (lambda: pc.Median()([]), "an empty list"),
        "weights": (
            lambda: pc.Krum(1)(rows(), weights=[1] * 11),
            r"Krum\(f=1.*counts all vectors alike; leave weights out",
        ),
        "noise": (
            lambda: pc.NormClip(1.0, 0.5)(rows(), weights=[1] * 11),
            "counts all vectors alike",
        ),
        "negative": (
            lambda: pc.GeometricMedian()(rows(3), weights=[1, -1, 1]),
            "3 numbers of zero or more, not all zero, got",
        ),
        "zero": (lambda: pc.GeometricMedian()(rows(3), weights=[0, 0, 0]), "not all zero"),
        "nan": (lambda: pc.CenteredClip(1)(rows(2), weights=[1, float("nan")]), "not all zero"),
        "length": (lambda: pc.GeometricMedian()(rows(3), weights=[1, 1]), r"got the shape \(2,\)"),
        "nonfinite": (lambda: pc.Median()(rows(), nonfinite="raise"), "'nan' or 'drop'"),
    },
)
test_types = raising(
    TypeError,
    {
        "record": (
            lambda: pc.Reweight(lambda record: record.losses)(rows()),
            "reads the record of a backward pass, which vectors.*give it to pycoherence.aggregate",
        ),
        "numbers": (lambda: pc.Median()([1.0, 2.0]), "got float in number 0"),
        "numpy": (lambda: pc.Median()(rows().numpy()), "got ndarray"),
        "text": (lambda: pc.Median()("abc"), "got str"),
        "whole": (lambda: pc.Median()(torch.zeros(3, 2).long()), "none of a floating dtype"),
        "complex": (lambda: pc.Median()(torch.zeros(3, 2).cfloat()), "got torch.complex64"),
        "sparse": (lambda: pc.Median()(torch.zeros(3, 2).to_sparse()), "layout torch.sparse_coo"),
        "inner": (lambda: pc.Median()({"a": [1.0]}), "got list in a"),
        "words": (lambda: pc.GeometricMedian()(rows(2), weights=["a", "b"]), "weights to be 2"),
    },
)


TINY = [pc.Krum(2), pc.MoNNA(2), pc.MDA(2), pc.Bulyan(1), pc.GeometricMedian()]


@pytest.mark.parametrize("rule", TINY)
@pytest.mark.parametrize("far", [False, True])
def test_vectors_whose_products_underflow(rule: Any, far: bool) -> None:
    """Products of them are zero in float32, as if all were in one place."""
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)) * 1e-25
    x[3] *= 0.01
    if far:
        x[5] = 1.0
    found, expected = rule(x).double(), rule(x.double())
    assert (found - expected).norm() <= 1e-6 * expected.norm()
