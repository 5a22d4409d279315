"""A network of two layers that gives any targets to any points: Zhang et al. 2017, Theorem 1."""

import torch
from torch import Tensor, nn


class FiniteSample(nn.Module):
    r"""Two layers of ReLU with 2n + d weights.

    .. math:: c(x) = \sum_{j=1}^{n} w_j \max(\langle a, x \rangle - b_j, 0)

    All n hidden units look along one direction a: c is piecewise linear in one number.

    Args:
        a: Direction `[d]`.
        b: Points where the slope changes, `[n]`.
        w: By how much, `[n]`.
    """

    def __init__(self, a: Tensor, b: Tensor, w: Tensor) -> None:
        super().__init__()
        self.a, self.b, self.w = nn.Parameter(a), nn.Parameter(b), nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        """Points `[m, ...]` of d numbers each to values `[m]`; float64, holds `[m, n]`."""
        z = x.flatten(1).to(self.a) @ self.a
        return torch.relu(z[:, None] - self.b) @ self.w


def fit(points: Tensor, targets: Tensor, *, seed: int, directions: int = 100) -> FiniteSample:
    r"""A network that gives each point its target.

    With :math:`z_1 < \dots < z_n` the points along a, c is the broken line through
    :math:`(z_i, y_i)`, which starts from zero to the left of them all:

    .. math:: b_j = z_{j-1}, \quad w_j = s_j - s_{j-1}, \quad
        s_j = \frac{y_j - y_{j-1}}{z_j - z_{j-1}}, \quad y_0 = s_0 = 0

    The paper has any b between the points, which makes the system to be solved triangular. With b
    between them an error at one point grows from one to the next; here none does. Only rounding
    is left, of the size of the steepest slope: the random direction whose least gap is the largest
    is taken.

    Args:
        points: `[n, ...]`, of d numbers each.
        targets: `[n]`.
        seed: Seed of the directions.
        directions: How many to try.

    Returns:
        The network in float64, on the device of `points`, with 2n + d weights; n counts equal
        points once.

    Raises:
        TypeError: Points or targets are complex.
        ValueError: The shapes do not fit, there are no points or no directions, a number is not
            finite, equal points have different targets, or no direction keeps the points apart.

    Cost: O(n d directions), and sorting.

    Source: Zhang et al. 2017, arXiv:1611.03530, Theorem 1.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> network = fit(points, torch.tensor([0.0, 1.0, 1.0, 0.0]), seed=0)
        >>> network(points).detach().round().abs()
        tensor([0., 1., 1., 0.], dtype=torch.float64)
        >>> sum(p.numel() for p in network.parameters())  # 2 * 4 + 2
        10
    """
    if directions < 1:
        raise ValueError(f"expected at least one direction, got {directions}")
    x, y = _merge(*_checked(points, targets))
    a, z = _direction(x, seed, directions)
    z, order = z.sort()
    y = y[order]
    # One ordinary gap ahead of the points, from where the line rises to the first target.
    ahead = (z[-1:] - z[:1]) / (len(z) - 1) if len(z) > 1 else torch.ones_like(z)
    b = torch.cat([z[:1] - ahead, z[:-1]])
    slopes = y.diff(prepend=y.new_zeros(1)) / (z - b)
    return FiniteSample(a, b, slopes.diff(prepend=slopes.new_zeros(1)))


def _checked(points: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Points `[n, d]` and targets `[n]` in float64."""
    for name, tensor in (("points", points), ("targets", targets)):
        if tensor.is_complex():
            raise TypeError(f"expected real {name}, got {tensor.dtype}; pass their .real")
        if not tensor.double().isfinite().all():
            raise ValueError(f"expected finite {name}, got NaN or infinity; leave those out")
    if points.dim() < 2 or not points.numel() or targets.shape != points.shape[:1]:
        raise ValueError(
            f"expected points [n, ...] and targets [n] with n at least 1, got "
            f"{list(points.shape)} and {list(targets.shape)}; pass one target for each point"
        )
    return points.flatten(1).double(), targets.to(points.device).double()


def _merge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Equal points as one."""
    unique, which = x.unique(dim=0, return_inverse=True)
    low, high = (
        y.new_zeros(len(unique)).scatter_reduce(0, which, y, kind, include_self=False)
        for kind in ("amin", "amax")
    )
    if not torch.equal(low, high):
        point = int((low != high).nonzero()[0])
        same = (which == point).nonzero().squeeze(1)
        other = int(same[y[same] != y[same[0]]][0])
        first = int(same[0])
        raise ValueError(
            f"expected equal points to have equal targets, got {y[first].item()} for point {first} "
            f"and {y[other].item()} for point {other}, which are the same; leave one out"
        )
    return unique, low


def _direction(x: Tensor, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """The random unit vector that keeps the points best apart, and where they lie on it."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, x.shape[1], generator=generator, dtype=torch.float64).to(x.device)
    drawn /= drawn.norm(dim=1, keepdim=True)
    if len(x) == 1:
        return drawn[0], x @ drawn[0]
    z = [x @ a for a in drawn]
    gaps = [(each.sort().values.diff().min() / (each.max() - each.min())).item() for each in z]
    best = max(range(count), key=lambda i: gaps[i])
    if not gaps[best] > 0:
        raise ValueError(
            f"expected one of {count} random directions to keep the points apart, but in float64 "
            "none does; try more directions or another seed, or leave out points that almost agree"
        )
    return drawn[best], z[best]
