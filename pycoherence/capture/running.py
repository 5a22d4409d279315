"""One backward pass: it counts the uses of each parameter, and measures when all have come."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from pycoherence.capture.across import Across
from pycoherence.capture.request import Aggregate, Request
from pycoherence.capture.results import Factors, Results, outvoted_in, row_norms
from pycoherence.capture.uses import Use
from pycoherence.ops import Reduced
from pycoherence.ops.core.dispatch import forced_backend
from pycoherence.sites import Site, Wish, count_nonzero, is_dtensor, joint, reduce_together

_GRADIENT_ALONE = ("weighted_sum",)
_NORMS = frozenset(("sq_norms", "gram"))


class BackwardPass:
    """One backward pass.

    Args:
        calls: The captured calls in it, by number, and the parameters of each.
        request: The quantities to measure.
        results: The place for them.
        across: The part of the block that several processes take together.
        accumulate: Whether gradients are added to leaves.
        keep: Whether its results are those of the block; otherwise only gradients are made.

    Attributes:
        is_inner: Whether it runs inside another one.
        single: Whether the batch is one example, whose gradients are those of the batch.
    """

    def __init__(
        self,
        calls: Mapping[int, list[str]],
        request: Request,
        results: Results,
        across: Across | None,
        *,
        accumulate: bool,
        keep: bool,
    ) -> None:
        self.calls, self.accumulate, self.keep = calls, accumulate, keep
        self._across = across
        self.single = self.is_inner = False
        self.left: dict[str, int] = {}
        for names in calls.values():
            for name in names:
                self.left[name] = self.left.get(name, 0) + 1
        self.names = set(self.left)
        self._request, self._results = request, results
        self._want = request.want
        self._outputs = tuple(request.outputs)
        if across is not None:
            # The Gram matrix of this rank's examples is a part of that of all.
            self._want = across.local(self._want)
            self._outputs = across.local(self._outputs)
        self._parts: dict[str, list[Site]] = {}
        # The CPU has no launches to save, and to ask for them takes as long as a small layer.
        first = next(iter(results.parameters.values()), None)
        cpu = first is None or first.device.type == "cpu"
        self._together = not cpu or forced_backend() is not None

    def gradients(self, uses: Sequence[Use]) -> list[Tensor | None]:
        """The gradients of parameters from a use of each; `None` before the last use of it.

        Args:
            uses: Those of one call.
        """
        found: list[Tensor | None] = [None] * len(uses)
        ready: dict[int, Use] = {}
        for i, use in enumerate(uses):
            name = use.name
            left = self.left[name] = self.left[name] - 1
            if left or name in self._parts:
                self._parts.setdefault(name, []).append(use.site)
                if left:
                    continue
                use = use._replace(site=joint(self._parts.pop(name)))
            ready[i] = use
        for i, gradient in zip(ready, self.measure(tuple(ready.values())), strict=True):
            found[i] = gradient
        return found

    def measure(self, uses: Sequence[Use]) -> list[Tensor | None]:
        """Measure the gradients of some parameters, and give those that `.grad` gets.

        Args:
            uses: All uses of each parameter, as one.
        """
        if not uses:
            return []
        request, want = self._request, self._want
        if not self.keep:
            made = request.gradients and request.aggregate is None
            want = _GRADIENT_ALONE if made else ()
        if not want:
            return [self._keep(use, Reduced(), None) for use in uses]
        if not self._together:
            reduced = [
                site.reduce(want, direction=request.directions.get(name)) for name, site, _ in uses
            ]
            return [self._keep(use, each, None) for use, each in zip(uses, reduced, strict=True)]
        # Only `.grad` takes the sum then; other processes would add up what is rounded.
        alone = "weighted_sum" not in request.outputs and "sum_dots" not in want
        alone = alone and self._across is None
        wishes = [
            Wish(site, request.directions.get(name), dtype if alone else None)
            for name, site, dtype in uses
        ]
        found = reduce_together(wishes, want, norms=self.keep and request.sum_norms)
        return [self._keep(use, *each) for use, each in zip(uses, found, strict=True)]

    def _keep(self, use: Use, reduced: Reduced, norms: Tensor | None) -> Tensor | None:
        """Keep what was measured of a parameter, and give the gradient that `.grad` gets."""
        request, results, rule = self._request, self._results, self._request.aggregate
        name, site, dtype = use
        gradient = reduced.weighted_sum if request.gradients and rule is None else None
        if self.keep:
            results.outputs[name] = {o: getattr(reduced, o) for o in self._outputs}
            if request.factors:
                results.factors[name] = Factors.of(site)
            total = reduced.weighted_sum
            # A record has its own sum, but asks no other rank when it is read.
            norms_of = request.sum_norms or (
                "weighted_sum" in request.outputs
                and not _NORMS.isdisjoint(request.outputs)
                and is_dtensor(total)
            )
            if norms_of and total is not None:
                results.sum_norms[name] = row_norms(total) if norms is None else norms
        if rule is not None:
            gradient, kept = self._aggregate(use, rule)
            if self.keep:
                results.aggregated[name] = kept
            if self.keep and rule.outvoted:
                self._count_outvoted(use, rule)
        if self.keep and self._across is not None:
            self._across.measure(name, site, reduced)
        return gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype)

    def _count_outvoted(self, use: Use, rule: Aggregate) -> None:
        name, site, _ = use
        batch = self._results.batch_size
        if self._across is not None:
            self._across.count_outvoted(name, site, rule)
        elif batch:
            found = outvoted_in(site, batch, rule.rule, rule.k, rule.drop)
            self._results.outvoted[name] = found

    def _aggregate(self, use: Use, rule: Aggregate) -> tuple[Tensor, Tensor | None]:
        """The gradient that a rule gives, and how many of its numbers are not zero, if asked."""
        # The rule gives a mean over examples, and `.grad` a sum, for both loss reductions.
        if self._across is not None:
            return self._across.aggregate(use, rule, averaged=self.accumulate)
        assert self._results.batch_size is not None
        gradient = use.site.order(rule.rule, rule.k, rule.drop) * self._results.batch_size
        return gradient, count_nonzero(gradient) if rule.count else None
