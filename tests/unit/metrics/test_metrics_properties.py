"""Properties every gradient matrix must show: ranges, scaling, and identities between metrics."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pycoherence import metrics


@st.composite
def gradient_matrices(draw: st.DrawFn, min_n: int = 2) -> Tensor:
    """Draw gradients [n, P] around a mean of any strength, so that M covers its whole range."""
    n, size = draw(st.integers(min_n, 9)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    noise = torch.randn(n, size, dtype=torch.float64, generator=generator)
    mean = torch.randn(size, dtype=torch.float64, generator=generator)
    centre = draw(st.sampled_from([0.0, 1.0]))
    return draw(st.floats(0, 5)) * mean + noise - centre * noise.mean(0)


def sums(gradients: Tensor) -> tuple[Tensor, Tensor, int]:
    return gradients.sum(0).square().sum(), gradients.square().sum(), len(gradients)


def close(left: Tensor, right: Tensor | float) -> None:
    expected = torch.as_tensor(right, dtype=left.dtype).expand_as(left)
    torch.testing.assert_close(left, expected, rtol=1e-9, atol=1e-9)


@given(gradient_matrices())
def test_ranges(gradients: Tensor) -> None:
    s, q, n = sums(gradients)
    slack = 1e-12 * n
    assert -slack <= metrics.alpha(s, q, n) <= 1 + slack
    assert -slack <= metrics.m_coherence(s, q) <= n + slack
    assert -1 / (n - 1) - slack <= metrics.unbiased_alpha(s, q, n) <= 1 + slack
    assert metrics.gradient_variance(s, q, n) >= -slack * q
    assert metrics.normalized_gradient_variance(s, q, n) >= -slack
    assert metrics.gradient_diversity(s, q) >= (1 - slack) / n


@given(gradient_matrices(), st.floats(1e-3, 1e3))
def test_ratios_ignore_the_scale_of_the_gradients(gradients: Tensor, scale: float) -> None:
    s, q, n = sums(gradients)
    assume(s > 1e-3 * q and abs(s - q) > 1e-3 * q)
    scaled = sums(scale * gradients)
    close(metrics.alpha(*scaled), metrics.alpha(s, q, n))
    close(metrics.unbiased_alpha(*scaled), metrics.unbiased_alpha(s, q, n))
    close(metrics.noise_scale(*scaled), metrics.noise_scale(s, q, n))
    close(metrics.batch_size_bound(*scaled), metrics.batch_size_bound(s, q, n))
    close(
        metrics.normalized_gradient_variance(*scaled),
        metrics.normalized_gradient_variance(s, q, n),
    )
    close(metrics.gradient_variance(*scaled) / scale**2, metrics.gradient_variance(s, q, n))
    close(metrics.gradient_sq_norm(*scaled) / scale**2, metrics.gradient_sq_norm(s, q, n))


@given(gradient_matrices())
def test_identities_between_metrics(gradients: Tensor) -> None:
    s, q, n = sums(gradients)
    assume(s > 1e-3 * q and abs(s - q) > 1e-3 * q)
    m, alpha = metrics.m_coherence(s, q), metrics.alpha(s, q, n)
    noise_scale = metrics.noise_scale(s, q, n)
    signal, noise = metrics.gradient_sq_norm(s, q, n), metrics.gradient_variance(s, q, n)
    close(m, n * alpha)
    close(metrics.unbiased_alpha(s, q, n), (m - 1) / (n - 1))
    close(metrics.gradient_diversity(s, q), 1 / m)
    close(metrics.batch_size_bound(s, q, n), 1 / alpha)
    close(metrics.normalized_gradient_variance(s, q, n), (1 - alpha) / alpha)
    close(noise_scale * (m - 1), n - m)
    close(noise_scale * signal, noise)
    close(noise_scale * metrics.unbiased_alpha(s, q, n), n * (1 - alpha) / (n - 1))
    close(noise_scale, metrics.noise_scale_two_batch(q / n, s / n**2, 1, n))


@given(gradient_matrices())
def test_off_diagonal_dots_give_unbiased_alpha(gradients: Tensor) -> None:
    n = len(gradients)
    gram = gradients @ gradients.T
    off_diagonal = (gram.sum() - gram.trace()) / (n * (n - 1))
    close(metrics.unbiased_alpha(*sums(gradients)), off_diagonal / (gram.trace() / n))


@given(gradient_matrices(), st.integers(1, 6))
def test_layers_combine_to_the_whole(gradients: Tensor, cut: int) -> None:
    cut = min(cut, gradients.shape[1] - 1)
    s, q, n = sums(gradients)
    (first_s, first_q, _), (last_s, last_q, _) = map(sums, gradients.tensor_split([cut], dim=1))
    layer_s, layer_q = torch.stack([first_s, last_s]), torch.stack([first_q, last_q])
    close(layer_s.sum(), s)
    close(metrics.combine(metrics.alpha(layer_s, layer_q, n), layer_q), metrics.alpha(s, q, n))
    close(metrics.combine(metrics.m_coherence(layer_s, layer_q), layer_q), s / q)
    close(
        metrics.combine(metrics.unbiased_alpha(layer_s, layer_q, n), layer_q),
        metrics.unbiased_alpha(s, q, n),
    )


@given(st.floats(0, 1), st.integers(1, 1000))
def test_example_alpha_inverts_minibatch_alpha(alpha: float, k: int) -> None:
    inflated = metrics.minibatch_alpha(alpha, k)
    assert alpha * (1 - 1e-12) <= inflated <= 1
    assert abs(metrics.example_alpha(inflated, k) - alpha) <= 1e-9


@given(gradient_matrices(min_n=1), st.data())
def test_cge_weights_average_the_smallest_gradients(gradients: Tensor, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, len(gradients) - 1))
    sq_norms = gradients.square().sum(1)
    kept = gradients[sq_norms.argsort()[: len(gradients) - f]]
    close(metrics.cge_coefficients(sq_norms, f) @ gradients, kept.mean(0))


@given(gradient_matrices(min_n=1), st.floats(1e-3, 10))
def test_clipped_gradients_stay_below_the_limit(gradients: Tensor, max_norm: float) -> None:
    coefficients = metrics.clip_coefficients(gradients.square().sum(1), max_norm)
    clipped = coefficients[:, None] * gradients
    assert (clipped.norm(dim=1) <= max_norm).all()
    short = gradients.norm(dim=1) + 1e-6 <= max_norm
    assert (coefficients[short] == 1).all()
