"""One backward pass: it counts the uses of each parameter, and measures when all have come."""

from collections.abc import Mapping

from torch import Tensor

from pycoherence.capture.request import Request
from pycoherence.capture.results import Factors, Results, row_norms
from pycoherence.ops import Reduced
from pycoherence.sites import Site, joint

_GRADIENT_ALONE = ("weighted_sum",)


class BackwardPass:
    """One backward pass.

    Args:
        calls: The captured calls in it, by number, and the parameters of each.
        request: The quantities to measure.
        results: The place for them.
        accumulate: Whether gradients are added to leaves.
        keep: Whether its results are those of the block; otherwise only gradients are made.

    Attributes:
        single: Whether the batch is one example, whose gradients are those of the batch.
    """

    def __init__(
        self,
        calls: Mapping[int, list[str]],
        request: Request,
        results: Results,
        *,
        accumulate: bool,
        keep: bool,
    ) -> None:
        self.calls, self.accumulate, self.keep = calls, accumulate, keep
        self.single = False
        self.left: dict[str, int] = {}
        for names in calls.values():
            for name in names:
                self.left[name] = self.left.get(name, 0) + 1
        self.names = set(self.left)
        self._request, self._results = request, results
        self._want = request.want
        self._parts: dict[str, list[Site]] = {}

    def gradient(self, name: str, part: Site) -> Tensor | None:
        """The gradient of a parameter from one of its uses; `None` before the last of them.

        Args:
            name: Of the parameter.
            part: The site of this use.
        """
        left = self.left[name] = self.left[name] - 1
        if left or name in self._parts:
            self._parts.setdefault(name, []).append(part)
            if left:
                return None
            part = joint(self._parts.pop(name))
        return self.measure(name, part)

    def measure(self, name: str, site: Site) -> Tensor | None:
        """Measure the gradients of one parameter, and give the one that `.grad` gets.

        Args:
            name: Of the parameter.
            site: Of all its uses together.
        """
        request, results = self._request, self._results
        rule, want = request.aggregate, self._want
        if not self.keep:
            want = _GRADIENT_ALONE if request.gradients and rule is None else ()
        directions = request.directions
        direction = directions.get(name) if directions else None
        reduced = site.reduce(want, direction=direction) if want else Reduced()
        if self.keep:
            results.outputs[name] = {o: getattr(reduced, o) for o in request.outputs}
            if request.factors:
                results.factors[name] = Factors.of(site)
            if request.sum_norms and reduced.weighted_sum is not None:
                results.sum_norms[name] = row_norms(reduced.weighted_sum)
        if rule is None:
            return reduced.weighted_sum if request.gradients else None
        # The rule gives a mean over examples, and `.grad` holds a sum, for both loss reductions.
        assert results.batch_size is not None
        gradient = site.order(rule.rule, rule.k, rule.drop) * results.batch_size
        if self.keep:
            results.aggregated[name] = gradient.count_nonzero() if rule.count else None
        return gradient
