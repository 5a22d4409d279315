"""A statistic: its outputs for the capture, and its reading of the results."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor

from pycoherence.capture import Request, Shape

Raw = Mapping[str, Tensor]
"""The outputs of one parameter, by name, of the loss as it is."""


class Batch(NamedTuple):
    """The scale of results.

    Attributes:
        size: `B`, the number of examples.
        share: The gradient `g_b` of example b over its share in the gradient of the loss.
    """

    size: int
    share: float


class Statistic(ABC):
    """Something about the per-example gradients that a backward pass leaves in probes.

    Attributes:
        results: The names of the results that a record then has.
    """

    results: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def outputs(self) -> Mapping[str, Shape]:
        """The outputs to take of every site, and the shapes of their probes."""

    def directions(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The directions of the output `dots`, by parameter.

        Args:
            parameters: Those that are tracked.

        Raises:
            ValueError: Names or shapes do not fit them.
            TypeError: A dtype or device does not fit.
        """
        return {}

    def read_total(self, result: str, raws: Sequence[Raw], batch: Batch) -> Tensor | None:
        """One of `results` over all parameters, if it is made in less time than by adding up.

        Args:
            result: The name.
            raws: The outputs of each parameter.
            batch: The numbers that scale them.
        """
        return None

    @abstractmethod
    def read(self, result: str, raw: Raw, batch: Batch) -> Tensor:
        """One of `results`, a new tensor, from the outputs of one parameter."""


def combine(statistics: Sequence[Statistic], parameters: Mapping[str, Tensor]) -> Request:
    """Join the needs of several statistics in a pass over some parameters.

    Raises:
        TypeError: One is a class instead of an object, or a direction does not fit.
        ValueError: Two are of the same kind, or a direction does not fit.
    """
    kinds = [type(statistic) for statistic in statistics]
    for statistic, kind in zip(statistics, kinds, strict=True):
        if isinstance(statistic, type):
            raise TypeError(f"expected an object, got a class; write {statistic.__name__}()")
        if not isinstance(statistic, Statistic):
            raise TypeError(
                "expected statistics such as pc.SqNorms(), each as an argument of its own, got "
                f"{kind.__name__}; a rule is the second argument of pc.aggregate, or rule="
            )
        if kinds.count(kind) > 1:
            raise ValueError(
                f"expected each statistic once, got {kinds.count(kind)} of {kind.__name__}; "
                "use a block for each"
            )
    outputs = {name: shape for one in statistics for name, shape in one.outputs.items()}
    sum_norms = "sq_norms" in outputs and outputs.keys().isdisjoint(("sum_dots", "weighted_sum"))
    if "gram" in outputs:
        outputs.pop("sq_norms", None)  # its diagonal
    directions = {name: v for one in statistics for name, v in one.directions(parameters).items()}
    return Request(outputs, directions, sum_norms)
