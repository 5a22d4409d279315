"""Two layers of ReLU that fit any targets: against exact arithmetic and the system of the paper."""

from fractions import Fraction

import pytest
import torch

from pycoherence.studies.finite_sample import FiniteSample, fit


def sample(n, d=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, d, generator=generator)
    return points, torch.randn(n, generator=generator)


def exactly(network, points):
    """The value of the network at points `[n, d]`, in rational numbers from its float64 weights."""
    z = (points.double() @ network.a.detach()).tolist()
    b, w = network.b.tolist(), network.w.tolist()
    units = [(Fraction(bj), Fraction(wj)) for bj, wj in zip(b, w, strict=True)]
    return [float(sum(wj * max(Fraction(zi) - bj, 0) for bj, wj in units)) for zi in z]


@pytest.mark.parametrize("n", [1, 2, 3, 40, 200])
@pytest.mark.parametrize("d", [1, 5])
def test_any_targets_with_2n_plus_d_weights(n, d):
    points, targets = sample(n, d)
    network = fit(points, targets, seed=0)
    assert sum(p.numel() for p in network.parameters()) == 2 * n + d
    assert network.w.dtype == torch.float64
    found = network(points).detach()
    # Rounding grows with the steepest slope, which random gaps make about n^2.
    bound = 1e-13 * max(1.0, network.w.abs().max().item())
    torch.testing.assert_close(found, targets.double(), rtol=0, atol=bound)
    one_by_one = torch.cat([network(point[None]) for point in points]).detach()
    torch.testing.assert_close(one_by_one, targets.double(), rtol=0, atol=bound)
    if n <= 40:
        exact = torch.tensor(exactly(network, points), dtype=torch.float64)
        torch.testing.assert_close(found, exact, rtol=0, atol=bound)


def test_solves_the_triangular_system_of_the_paper():
    points, targets = sample(30)
    network = fit(points, targets, seed=3)
    z, order = (points.double() @ network.a.detach()).sort()
    system = (z[:, None] - network.b.detach()).clamp(min=0)
    assert system.triu(1).max() < 1e-14  # the order of a sum may move z by a rounding
    assert system.diagonal().min() > 1e-6
    w = torch.linalg.solve_triangular(system.tril(), targets[order].double()[:, None], upper=False)
    torch.testing.assert_close(network.w.detach(), w[:, 0], rtol=1e-6, atol=1e-6)


def test_is_two_layers_of_relu():
    network = FiniteSample(
        *(torch.tensor(v).double() for v in ([1.0, 2.0], [0.0, 1.0], [3.0, -4.0]))
    )
    # <a, x> = 5, and <a, x> = -1
    found = network(torch.tensor([[1.0, 2.0], [-1.0, 0.0]]))
    assert found.tolist() == [3 * 5 - 4 * 4, 0]


def test_images_of_any_shape_and_integer_labels():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 3, 4, 2, generator=generator)
    labels = torch.randint(10, (50,), generator=generator)
    network = fit(images, labels, seed=0)
    assert torch.equal(network(images).round().long(), labels)
    assert network.a.shape == (24,)
    same = fit(images, labels, seed=0)
    assert all(map(torch.equal, network.parameters(), same.parameters()))


def test_the_best_of_the_directions_is_taken():
    points, targets = sample(100)

    def least_gap(network):
        z = (points.double() @ network.a.detach()).sort().values
        return z.diff().min() / (z[-1] - z[0])

    gaps = [least_gap(fit(points, targets, seed=0, directions=k)) for k in (1, 10, 100)]
    assert gaps[0] <= gaps[1] <= gaps[2]
    assert gaps[0] < gaps[2]


def test_equal_points_count_once():
    points, targets = sample(6)
    again = torch.cat([points, points[2:3]]), torch.cat([targets, targets[2:3]])
    network = fit(*again, seed=0)
    assert len(network.w) == 6
    torch.testing.assert_close(network(again[0]).detach(), again[1].double())


def test_equal_points_with_other_targets_are_refused():
    points, targets = sample(6)
    points[4] = points[1]
    targets[1], targets[4] = 2, 3
    message = r"got 2\.0 for point 1 and 3\.0 for point 4, which are the same; leave one out"
    with pytest.raises(ValueError, match=message):
        fit(points, targets, seed=0)


def test_points_that_rounding_makes_equal_are_refused():
    points = torch.tensor([[0.0, 1e30], [1e-30, 1e30]], dtype=torch.float64)
    with pytest.raises(ValueError, match="none does; try more directions"):
        fit(points, torch.tensor([0.0, 1.0]), seed=0)


@pytest.mark.parametrize(
    ("points", "targets", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3), ValueError, r"points \[n, ...\].*got \[3\] and \[3\]"),
        (torch.eye(3), torch.zeros(2), ValueError, r"got \[3, 3\] and \[2\]; pass one target"),
        (torch.eye(3), torch.zeros(3, 1), ValueError, r"got \[3, 3\] and \[3, 1\]"),
        (torch.zeros(0, 3), torch.zeros(0), ValueError, "n at least 1"),
        (torch.zeros(3, 0), torch.zeros(3), ValueError, "n at least 1"),
        (torch.eye(3) / 0, torch.zeros(3), ValueError, "finite points"),
        (torch.eye(3), torch.full((3,), float("inf")), ValueError, "finite targets"),
        (torch.eye(3) * 1j, torch.zeros(3), TypeError, "real points, got torch.complex64"),
        (torch.eye(3), torch.zeros(3) * 1j, TypeError, "real targets"),
    ],
)
def test_mistakes(points, targets, error, message):
    with pytest.raises(error, match=message):
        fit(points, targets, seed=0)
    with pytest.raises(ValueError, match="at least one direction, got 0"):
        fit(torch.eye(3), torch.zeros(3), seed=0, directions=0)
