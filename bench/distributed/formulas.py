"""The numbers that a rank receives for each statistic and rule, in formulas.

Layers are linear, and the loss is a mean over examples. `tests/unit/distributed/test_counts.py`
compares all of this with what is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

WIDTH = 16
"""Numbers of a header, of eight bytes each."""


@dataclass(frozen=True)
class Received:
    """Numbers, by the dtype that they have.

    Attributes:
        factors: Inputs and output gradients, in the dtype of the model.
        sums: Gradients and their sums, in the dtype of accumulation.
        results: Products of examples and weights, in float64.
        headers: How often all ranks tell all others what they are about to do.
    """

    factors: Fraction = Fraction(0)
    sums: Fraction = Fraction(0)
    results: Fraction = Fraction(0)
    headers: int = 0

    @property
    def numbers(self) -> Fraction:
        """All but the headers."""
        return self.factors + self.sums + self.results

    def bytes(self, factor: int = 4, accumulated: int = 4) -> Fraction:
        """Those of all but the headers.

        Args:
            factor: Those of a number of the model's dtype.
            accumulated: Those of a number of the dtype of accumulation.
        """
        return self.factors * factor + self.sums * accumulated + self.results * 8

    def __add__(self, other: "Received") -> "Received":
        return Received(
            self.factors + other.factors,
            self.sums + other.sums,
            self.results + other.results,
            self.headers + other.headers,
        )


@dataclass(frozen=True)
class Parameter:
    """A weight of a linear layer, or with no inputs its bias.

    Attributes:
        outputs: Rows of the weight.
        inputs: Columns of the weight.
        positions: How many each example has in this layer, `T`.
    """

    outputs: int
    inputs: int | None = None
    positions: int = 1

    @property
    def size(self) -> int:
        """Its numbers, `P`."""
        return self.outputs * (1 if self.inputs is None else self.inputs)


@dataclass(frozen=True)
class Place:
    """A rank among others.

    Attributes:
        sizes: The examples of each rank.
        rank: Which of them receives.
        short: The bytes of a factor over those of a number of a gradient.
    """

    sizes: tuple[int, ...]
    rank: int
    short: Fraction = Fraction(1)

    @property
    def ranks(self) -> int:
        return len(self.sizes)

    @property
    def batch(self) -> int:
        return sum(self.sizes)

    @property
    def others(self) -> int:
        """The examples of all other ranks."""
        return self.batch - self.sizes[self.rank]

    def slice(self, units: int) -> int:
        """This rank's share of some units, such as the rows of a weight."""
        return units * (self.rank + 1) // self.ranks - units * self.rank // self.ranks

    def total(self, n: int) -> Fraction:
        """A sum over ranks of tensors of `n` numbers, which all get."""
        return Fraction(2 * (self.ranks - 1) * n, self.ranks)

    def decided(self, n: int) -> int:
        """Numbers that the first rank sends to all others."""
        return 0 if self.rank == 0 else n


Parameters = Sequence[Parameter]


def channels(p: Parameter, at: Place) -> tuple[int, int] | None:
    """Those gathered and those split, if factors are exchanged; `None` if gradients are."""
    if p.inputs is None:
        # The shift of each example is made where there are several positions.
        return None if p.positions > 1 else (0, p.outputs)
    ways = [(p.inputs, p.outputs), (p.outputs, p.inputs)]
    costs = [p.positions * (a + Fraction(c, at.ranks)) * at.short for a, c in ways]
    return ways[costs.index(min(costs))] if min(costs) <= Fraction(p.size, at.ranks) else None


def exchange(p: Parameter, at: Place) -> Received:
    """All examples and a slice of a parameter, from own examples and the whole parameter."""
    found = channels(p, at)
    if found is None:
        units = max(p.outputs, p.inputs or 1)
        made = at.others * at.slice(units) * p.size // units
        return Received(sums=Fraction(made), headers=1)
    gathered, split = found
    numbers = at.others * p.positions * (gathered + at.slice(split))
    return Received(factors=Fraction(numbers), headers=1)


def exchanges(parameters: Parameters, at: Place) -> Received:
    """Those of all parameters."""
    return sum((exchange(p, at) for p in parameters), Received())


def sq_norms(parameters: Parameters, at: Place) -> Received:
    """Norms are gathered; sums are scattered, since the coherence has their norms."""
    # What is left over goes to the first ranks, as torch.tensor_split does it.
    slices = (p.size // at.ranks + (at.rank < p.size % at.ranks) for p in parameters)
    n = len(parameters)
    results = at.others * n + at.total(n)
    return PASS + Received(sums=Fraction((at.ranks - 1) * sum(slices)), results=results, headers=n)


def gram(parameters: Parameters, at: Place) -> Received:
    """Every parameter is exchanged, and has a matrix of its own."""
    matrices = at.total(at.batch**2 * len(parameters))
    return PASS + exchanges(parameters, at) + Received(results=matrices)


def moments(parameters: Parameters, at: Place) -> Received:
    """Two sums of every parameter."""
    return PASS + Received(sums=2 * at.total(_size(parameters)), headers=len(parameters))


def dots_with_mean(parameters: Parameters, at: Place) -> Received:
    """A sum of every parameter, and a number of each example."""
    n = len(parameters)
    results = Fraction(at.others * n)
    return PASS + Received(sums=at.total(_size(parameters)), results=results, headers=n)


def coordinate_rule(parameters: Parameters, at: Place, averaged: bool) -> Received:
    """Every parameter is exchanged.

    Args:
        parameters: Those of the model.
        at: The rank.
        averaged: Whether a wrapper of the model averages gradients afterwards, which is not
            counted; otherwise one more sum joins the slices.
    """
    joined = Fraction(0) if averaged else at.total(_size(parameters))
    return PASS + exchanges(parameters, at) + Received(sums=joined)


def krum(parameters: Parameters, at: Place, m: int, per_parameter: bool = False) -> Received:
    """Every parameter is exchanged, products are summed, and then the chosen gradients.

    In float32 one flag comes too, and where examples lie close together, all again in float64.

    Args:
        parameters: Those of the model.
        at: The rank.
        m: How many examples are chosen.
        per_parameter: Whether each parameter has a choice of its own.
    """
    n = len(parameters)
    choices = n if per_parameter else 1
    results = choices * (at.total(at.batch**2) + at.decided(at.batch + m))
    chosen = Received(sums=at.total(_size(parameters)), results=results, headers=choices + n)
    return PASS + exchanges(parameters, at) + chosen


def norm_clip(parameters: Parameters, at: Place, noise: bool = False) -> Received:
    """A norm of each example, the weights, and the weighted sum of the gradients.

    Args:
        parameters: Those of the model.
        at: The rank.
        noise: Whether there is some, which the first rank draws.
    """
    n, size = len(parameters), _size(parameters)
    results = Fraction(at.others + at.decided(at.batch + 1))
    found = PASS + Received(sums=at.total(size), results=results, headers=1 + n)
    return found + Received(sums=Fraction(at.decided(size)), headers=n) if noise else found


def weighted_sum(parameters: Parameters, at: Place) -> Received:
    """Norms of each parameter are gathered, and the weighted gradients summed."""
    results = Fraction(at.others * len(parameters))
    return PASS + Received(sums=at.total(_size(parameters)), results=results, headers=2)


def wrapper(parameters: Parameters, at: Place) -> Received:
    """The sum of gradients that a wrapper of the model makes, beside whatever is measured."""
    return Received(sums=at.total(_size(parameters)))


PASS = Received(headers=4)
"""Headers of every pass: sizes of batches, names of parameters, results, and its end."""


def _size(parameters: Parameters) -> int:
    return sum(p.size for p in parameters)
