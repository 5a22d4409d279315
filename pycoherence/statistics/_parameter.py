"""The part of a record on one parameter."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from pycoherence.statistics._statistic import Batch, Statistic

_STATISTICS = {
    "sq_norms": "pc.SqNorms()",
    "gram": "pc.Gram()",
    "dots": "pc.Dots(direction)",
    "first_moment": "pc.Moments()",
    "second_moment": "pc.Moments()",
    "sign_sum": "pc.SignSum()",
}


class ParameterRecord:
    """The statistics of one parameter; zeros if it did not take part.

    Each is there if its statistic was asked for, and otherwise raises an `AttributeError` that
    names it. Results are new tensors each time.
    """

    def __init__(
        self,
        shape: Sequence[int],
        raw: Mapping[str, Tensor],
        statistics: Sequence[Statistic],
        batch: Batch,
    ) -> None:
        self._shape, self._raw = tuple(shape), raw
        self._statistics, self._batch = statistics, batch

    def __repr__(self) -> str:
        results = [result for one in self._statistics for result in one.results]
        return f"ParameterRecord(shape={self._shape}, results={results})"

    @property
    def sq_norms(self) -> Tensor:
        """`[B]`, `||g_b||^2`; needs `SqNorms`."""
        return self._read("sq_norms")

    @property
    def gram(self) -> Tensor:
        """`[B, B]`, `<g_b, g_c>`; needs `Gram`."""
        return self._read("gram")

    @property
    def dots(self) -> Tensor:
        """`[B]`, `<g_b, direction>`; needs `Dots`."""
        return self._read("dots")

    @property
    def first_moment(self) -> Tensor:
        """Parameter-shaped, the mean of `g_b`; needs `Moments`."""
        return self._read("first_moment")

    @property
    def second_moment(self) -> Tensor:
        """Parameter-shaped, the mean of `g_b^2`; needs `Moments`."""
        return self._read("second_moment")

    @property
    def sign_sum(self) -> Tensor:
        """Parameter-shaped, the sum of `sign(g_b)`; needs `SignSum`."""
        return self._read("sign_sum")

    def _read(self, result: str) -> Tensor:
        return provider(self._statistics, result).read(result, self._raw, self._batch)


def provider(statistics: Sequence[Statistic], result: str) -> Statistic:
    """The statistic that has a result.

    Raises:
        AttributeError: None has; the message says which would.
    """
    for statistic in statistics:
        if result in statistic.results:
            return statistic
    raise AttributeError(
        f"{result} was not asked for; add {_STATISTICS[result]} to the statistics of the block"
    )
