"""The coherence of a sample of examples, as a whole and by part of the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pycoherence import metrics
from pycoherence.tables import Printed, table

_NUMBERS = ("m", "alpha", "unbiased_alpha", "noise_scale")


@dataclass(frozen=True)
class Coherence(Printed):
    r"""How much the gradients of `n` examples agree.

    `print` shows a table: the network, its modules, its parameters.

    With `S = sum_i g_i` and `Q = sum_i ||g_i||^2`:

    Attributes:
        sum_sq_norm: `||S||^2`.
        total_sq_norm: `Q`.
        n: Number of examples.
        by_parameter: The same for each parameter, by name.
        by_module: The same for each module with parameters in or below it, by path.

    Source: Chatterjee and Zielinski 2020, arXiv:2008.01217; 2022, arXiv:2203.10036.

    Example:
        >>> c = Coherence(sum_sq_norm=10.0, total_sq_norm=4.0, n=4)
        >>> c.m, c.alpha
        (2.5, 0.625)
        >>> c
        Coherence(m=2.5, n=4)
    """

    sum_sq_norm: float
    total_sq_norm: float
    n: int
    by_parameter: Mapping[str, Coherence] = field(default_factory=dict)
    by_module: Mapping[str, Coherence] = field(default_factory=dict)

    @property
    def m(self) -> float:
        """m-coherence `||S||^2 / Q`, in `[0, n]`; 1 for orthogonal gradients, NaN if all vanish."""
        return metrics.m_coherence(self.sum_sq_norm, self.total_sq_norm)

    @property
    def alpha(self) -> float:
        """`||S||^2 / (n Q)`, in `[0, 1]`: mean dot product over mean squared norm; NaN for none."""
        if self.n < 1:
            return float("nan")
        return metrics.alpha(self.sum_sq_norm, self.total_sq_norm, self.n)

    @property
    def unbiased_alpha(self) -> float:
        """`alpha` without the dot product of an example with itself; NaN for a single example."""
        if self.n < 2:
            return float("nan")
        return metrics.unbiased_alpha(self.sum_sq_norm, self.total_sq_norm, self.n)

    @property
    def noise_scale(self) -> float:
        """`metrics.noise_scale`, the batch size at which noise is as large as the mean gradient.

        It is noisy if `n` is small, and negative if the gradients cancel; NaN for a single example.
        """
        if self.n < 2:
            return float("nan")
        return metrics.noise_scale(self.sum_sq_norm, self.total_sq_norm, self.n)

    def __repr__(self) -> str:
        parts = {"parameters": len(self.by_parameter), "modules": len(self.by_module)}
        told = "".join(f", {kind}={n}" for kind, n in parts.items() if n)
        return f"Coherence(m={self.m:.4g}, n={self.n}{told})"

    def __str__(self) -> str:
        return table(
            f"Coherence of {self.n} examples",
            _NUMBERS,
            {"": {"network": self}, "modules": self.by_module, "parameters": self.by_parameter},
            lambda part: [getattr(part, number) for number in _NUMBERS],
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, which `json` can write; NaN where there is no number."""
        numbers = {number: getattr(self, number) for number in _NUMBERS}
        sums = {"sum_sq_norm": self.sum_sq_norm, "total_sq_norm": self.total_sq_norm, "n": self.n}
        parts = {"by_parameter": self.by_parameter, "by_module": self.by_module}
        below = {
            kind: {name: part.to_dict() for name, part in each.items()}
            for kind, each in parts.items()
            if each
        }
        return {**numbers, **sums, **below}

    @classmethod
    def of(cls, parts: Mapping[str, tuple[float, float]], n: int) -> Coherence:
        """Combine the parameters of a network.

        Args:
            parts: `(||S||^2, Q)` of each parameter, by name.
            n: Number of examples.
        """
        modules: dict[str, list[tuple[float, float]]] = {}
        for name, part in parts.items():
            path = name.split(".")[:-1]
            for depth in range(1, len(path) + 1):
                modules.setdefault(".".join(path[:depth]), []).append(part)
        by_module = {path: cls(*_total(below), n) for path, below in modules.items()}
        by_parameter = {name: cls(*part, n) for name, part in parts.items()}
        return cls(*_total(parts.values()), n, by_parameter, by_module)


def _total(parts: Iterable[tuple[float, float]]) -> tuple[float, float]:
    sums, totals = zip(*parts, strict=True)
    return sum(sums), sum(totals)
