"""What all metrics share: floats and tensors, precision, undefined ratios, and errors."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.raising import raising

from pycoherence import metrics

# Name -> the metric as a function of S and Q alone.
SUMS: dict[str, Callable[[Any, Any], Any]] = {
    "alpha": lambda s, q: metrics.alpha(s, q, 4),
    "m_coherence": metrics.m_coherence,
    "unbiased_alpha": lambda s, q: metrics.unbiased_alpha(s, q, 4),
    "gradient_sq_norm": lambda s, q: metrics.gradient_sq_norm(s, q, 4),
    "gradient_variance": lambda s, q: metrics.gradient_variance(s, q, 4),
    "normalized_gradient_variance": lambda s, q: metrics.normalized_gradient_variance(s, q, 4),
    "gradient_diversity": metrics.gradient_diversity,
    "batch_size_bound": lambda s, q: metrics.batch_size_bound(s, q, 4),
    "noise_scale": lambda s, q: metrics.noise_scale(s, q, 4),
    "noise_scale_two_batch": lambda s, q: metrics.noise_scale_two_batch(s, q, 1, 4),
}
RATIOS = [name for name in SUMS if name not in ("gradient_sq_norm", "gradient_variance")]
every_metric = pytest.mark.parametrize("metric", SUMS.values(), ids=SUMS.keys())


@every_metric
def test_floats_give_floats_and_tensors_tensors(metric: Callable[..., Any]) -> None:
    s, q = [20.0, 3.0, 7.0], [8.0, 5.0, 7.5]
    floats = [metric(*pair) for pair in zip(s, q, strict=True)]
    assert all(type(value) is float for value in floats)
    tensor = metric(torch.tensor(s, dtype=torch.float64), torch.tensor(q, dtype=torch.float64))
    assert tensor.dtype == torch.float64
    assert tensor.tolist() == pytest.approx(floats)


@every_metric
def test_other_numbers_are_numbers(metric: Callable[..., Any]) -> None:
    assert metric(20, np.float32(8)) == metric(20.0, 8.0)


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_promoted(metric: Callable[..., Any], dtype: torch.dtype) -> None:
    result = metric(torch.tensor([20.0, 3.0], dtype=dtype), torch.tensor([8.0, 5.0], dtype=dtype))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, metric(torch.tensor([20.0, 3.0]), torch.tensor([8.0, 5.0])))


def test_half_precision_does_not_overflow() -> None:
    sums = torch.tensor(60000.0, dtype=torch.float16)
    assert metrics.batch_size_bound(sums, sums, 100_000) == 100_000
    assert metrics.noise_scale(sums, sums / 2, 100).isfinite()


@pytest.mark.parametrize("name", RATIOS)
def test_a_ratio_of_nothing_is_nan(name: str) -> None:
    assert math.isnan(SUMS[name](0.0, 0.0))
    assert SUMS[name](torch.zeros(2), torch.zeros(2)).isnan().all()


def test_combine_of_nothing_is_nan() -> None:
    assert math.isnan(metrics.combine([math.nan, math.nan], [0.0, 0.0]))


@every_metric
def test_nan_is_never_dropped(metric: Callable[..., Any]) -> None:
    assert math.isnan(metric(math.nan, 8.0))
    assert math.isnan(metric(20.0, math.nan))


@every_metric
def test_arguments_are_left_alone(metric: Callable[..., Any]) -> None:
    s, q = torch.tensor([20.0, 3.0]), torch.tensor([8.0, 5.0])
    metric(s, q)
    assert s.tolist() == [20.0, 3.0]
    assert q.tolist() == [8.0, 5.0]


@every_metric
def test_shapes_must_agree(metric: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"one shape, got .*\[3\].*\[2\]}; pass"):
        metric(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"one shape"):
        metric(torch.ones(3), 1.0)


@every_metric
def test_integers_in_tensors_are_refused(metric: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"got torch\.int64; convert it with \.double\(\)"):
        metric(torch.tensor([20]), torch.tensor([8]))


@every_metric
def test_other_types_are_refused(metric: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"a number or a tensor, got str"):
        metric("20", 8.0)


@every_metric
def test_devices_must_agree(metric: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"one device, got \['cpu', 'meta'\]"):
        metric(torch.ones(2), torch.ones(2, device="meta"))


BAD_VALUES = {
    "alpha": (lambda: metrics.alpha(1.0, 1.0, 0), r"n >= 1, got 0; pass the number of examples"),
    "unbiased": (lambda: metrics.unbiased_alpha(1.0, 1.0, 1), r"n >= 2, got 1"),
    "sq_norm": (lambda: metrics.gradient_sq_norm(1.0, 1.0, 1), r"n >= 2, got 1"),
    "sq_norm_biased": (
        lambda: metrics.gradient_sq_norm(1.0, 1.0, 0, unbiased=False),
        r"n >= 1, got 0",
    ),
    "variance": (lambda: metrics.gradient_variance(1.0, 1.0, 1), r"n >= 2, got 1"),
    "normalized": (lambda: metrics.normalized_gradient_variance(1.0, 1.0, 0), r"n >= 1, got 0"),
    "bound": (lambda: metrics.batch_size_bound(1.0, 1.0, -3), r"n >= 1, got -3"),
    "noise_scale": (lambda: metrics.noise_scale(1.0, 1.0, 1), r"n >= 2, got 1"),
    "two_batch_small": (
        lambda: metrics.noise_scale_two_batch(1.0, 1.0, 0, 4),
        r"small_size >= 1, got 0",
    ),
    "two_batch_order": (
        lambda: metrics.noise_scale_two_batch(1.0, 1.0, 4, 4),
        r"big_size >= 5, got 4",
    ),
    "minibatch": (lambda: metrics.minibatch_alpha(0.5, 0), r"k >= 1, got 0.*not the number of"),
    "example": (lambda: metrics.example_alpha(0.5, 0), r"k >= 1, got 0.*not the number of"),
    "max_norm": (
        lambda: metrics.clip_coefficients(torch.ones(2), -1.0),
        r"max_norm >= 0, got -1",
    ),
    "f_low": (lambda: metrics.cge_coefficients(torch.ones(2), -1), r"f >= 0, got -1"),
    "f_high": (lambda: metrics.cge_coefficients(torch.ones(2), 2), r"f < 2, got 2; keep"),
    "cge_shape": (lambda: metrics.cge_coefficients(torch.ones(2, 2), 1), r"sq_norms \[n\]"),
    "grand_shape": (lambda: metrics.grand(torch.ones(2, 2, 2)), r"\[B\] or \[R, B\]"),
    "el2n_shape": (
        lambda: metrics.el2n(torch.ones(2, 3), torch.tensor([1])),
        r"got \[2, 3\] and \[1\]",
    ),
    "el2n_class": (
        lambda: metrics.el2n(torch.ones(2, 3), torch.tensor([1, -100])),
        r"targets in \[0, 3\), got values from -100 to 1",
    ),
    "combine_lengths": (lambda: metrics.combine([1.0], [1.0, 2.0]), r"one shape"),
    "combine_ragged": (
        lambda: metrics.combine([torch.ones(1), torch.ones(2)], torch.ones(2)),
        r"values of one shape, got \[\[1\], \[2\]\]",
    ),
    "combine_empty": (lambda: metrics.combine([], []), r"at least one layer"),
    "combine_scalar": (
        lambda: metrics.combine(torch.tensor(1.0), torch.tensor(1.0)),
        r"at least one layer",
    ),
}

test_bad_values_say_what_to_do = raising(ValueError, BAD_VALUES)


BAD_TYPES = {
    "n": (lambda: metrics.alpha(1.0, 1.0, 2.5), r"n to be an integer, got float"),  # pyright: ignore
    "k": (lambda: metrics.example_alpha(0.5, 1.5), r"k to be an integer"),  # pyright: ignore
    "alpha": (lambda: metrics.minibatch_alpha(torch.tensor([1]), 2), r"got torch\.int64"),
    "norms": (lambda: metrics.grand(torch.tensor([1])), r"got torch\.int64"),
    "logits": (lambda: metrics.el2n(torch.ones(1, 2).int(), torch.tensor([0])), r"torch\.int32"),
    "targets": (lambda: metrics.el2n(torch.ones(1, 2), torch.ones(1)), r"targets.*torch\.float32"),
    "targets_device": (
        lambda: metrics.el2n(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64, device="meta")),
        r"targets on cpu, got meta",
    ),
    "combine": (lambda: metrics.combine(torch.tensor([1]), torch.tensor([1])), r"torch\.int64"),
}

test_bad_types_say_what_to_do = raising(TypeError, BAD_TYPES)


def test_counts_may_be_any_integer() -> None:
    assert metrics.alpha(20.0, 8.0, torch.tensor(4)) == 0.625  # pyright: ignore
    assert metrics.alpha(20.0, 8.0, np.int64(4)) == 0.625  # pyright: ignore


def test_all_names_are_listed() -> None:
    assert sorted(metrics.__all__) == metrics.__all__
    assert all(getattr(metrics, name).__doc__ for name in metrics.__all__)
