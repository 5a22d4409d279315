"""The statistics and rules over the examples of several processes, in the pass that measures them.

All numbers are sent inside `backward()`, the end of a block and its errors on leaving. The
gradients of this rank's examples are those of its own loss; `share` brings them to those of one
loss over all examples, as one process would have it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pycoherence.capture.request import Aggregate, Request, per_example, per_pair
from pycoherence.capture.results import (
    Factors,
    Results,
    order_of_mixtures,
    outvoted_in,
    row_norms,
)
from pycoherence.capture.uses import Use
from pycoherence.errors import RanksError, UnsupportedError
from pycoherence.ops import Reduced
from pycoherence.ops.core.chunks import mirrored
from pycoherence.ops.core.spec import accumulate_dtype
from pycoherence.ranks import Ranks
from pycoherence.sites import Site, exchange

_POWERS = {"sq_norms": 2, "dots": 1, "sum_dots": 1, "weighted_sum": 1, "second_moment": 2}
_POWERS |= {"sign_sum": 0, "gram": 2}
"""How often the scale of a loss goes into an output; into `sum_dots` beside that of the sum."""


class Across:
    """The part of a block that all ranks take together.

    Args:
        ranks: The processes.
        request: The quantities to measure.
        results: Those of this rank's examples.

    Attributes:
        ranks: Those processes.
        whole: The results of the examples of all ranks.
        sizes: How many examples each rank has; empty until the first pass.
        managed: By the `id` of a wrapper, those of the parameters that it averages.
        averaged: Parameters whose gradients a wrapper of the model averages over the ranks.
    """

    def __init__(self, ranks: Ranks, request: Request, results: Results) -> None:
        self.ranks = ranks
        self.sizes: list[int] = []
        self.managed: dict[int, set[int]] = {}
        self.averaged: set[str] = set()
        self.whole = Results(
            results.parameters, skipped=results.skipped, fallbacks=results.fallbacks
        )
        self._request, self._own = request, results
        self._sums: dict[str, list[Tensor]] = {}
        self._dots: dict[str, Tensor] = {}

    # The course of a pass.

    def meet(self) -> None:
        """Learn how many examples each rank has.

        Raises:
            RanksError: A rank asks for something else, or has met no examples.
        """
        size = self._own.batch_size
        advice = "give all ranks the same statistics, rule and options, and the same loss_scale"
        said = self.ranks.step(self._asked(), [-1 if size is None else size], advice)
        sizes = [header[0] for header in said]
        if -1 in sizes:
            self.ranks.end()
            raise RanksError(
                f"no parameter of the model has met an example on rank {sizes.index(-1)}; run the "
                "forward pass in the block on all ranks, with an empty batch where there are none"
            )
        self._expect_whole()
        self._sums.clear()
        self._dots.clear()
        self.sizes, self.whole.batch_size = sizes, sum(sizes)
        self.whole.loss_scale = self._own.loss_scale

    def _expect_whole(self) -> None:
        found = [name for name, info in self.whole.parameters.items() if info.layout is not None]
        if found:
            raise UnsupportedError(
                f"{', '.join(found)}: group= cannot be given together with parameters that are "
                "DTensors by tensor parallelism, of which each rank holds a slice. What to do: "
                "leave group= out, which measures the examples of this rank exactly, or freeze "
                "them with requires_grad_(False)."
            )

    def _asked(self) -> str:
        request = self._request
        outputs = ", ".join(sorted(request.outputs))
        return (
            f"outputs {outputs or 'none'}; {request.rule or 'no rule'}; keep_factors "
            f"{request.factors}; {request.grouping}; loss_scale "
            f"{self._own.loss_scale}; loss_reduction {'mean' if request.is_mean else 'sum'}"
        )

    def expect_same(self, names: Sequence[str]) -> None:
        """Raise on all ranks unless each has the same parameters in its pass."""
        skipped = f"; without {', '.join(self._own.skipped)}" if self._own.skipped else ""
        self.ranks.step(f"parameters {', '.join(names)}{skipped}")

    @property
    def share(self) -> float:
        """The gradient of one loss over all examples, over that of the loss of this rank."""
        if not self._request.is_mean or not self.whole.batch_size:
            return 1.0
        return self.sizes[self.ranks.rank] / self.whole.batch_size

    @property
    def own(self) -> slice:
        """The place of this rank's examples among all."""
        start = sum(self.sizes[: self.ranks.rank])
        return slice(start, start + self.sizes[self.ranks.rank])

    def scales(self, like: Tensor) -> Tensor:
        """The `share` of each example, `[B]`."""
        size = self.whole.batch_size or 1
        shares = [n / size if self._request.is_mean else 1.0 for n in self.sizes]
        counts = torch.tensor(self.sizes)
        return torch.tensor(shares, dtype=torch.float64).repeat_interleave(counts).to(like.device)

    # One parameter.

    def local(self, want: Sequence[str]) -> tuple[str, ...]:
        """The outputs that a site of this rank has to compute, for a wish."""
        return tuple(name for name in want if name != "gram")

    def measure(self, name: str, site: Site, reduced: Reduced) -> None:
        """Measure a parameter over the examples of all ranks."""
        request, whole = self._request, self.whole
        found: dict[str, Tensor] = {}
        total: Tensor | None = None
        asked = [o for o, shape in request.outputs.items() if shape not in (per_example, per_pair)]
        needs_total = "weighted_sum" in asked or "sum_dots" in request.outputs
        if asked or needs_total or request.sum_norms:
            self.ranks.step(f"sums of {name}")
        if needs_total:
            total = self.ranks.total(_sum(site, reduced) * self.share)
        for output in asked:
            if output == "weighted_sum":
                assert total is not None
                found[output] = total
                continue
            value: Tensor | None = getattr(reduced, output)
            assert value is not None
            found[output] = self.ranks.total(value * self.share ** _POWERS[output])
        if "sum_dots" in request.outputs:
            dots = site.reduce(("dots",), direction=total).dots
            assert dots is not None
            self._dots[name] = dots
        partial: list[Tensor] = []
        if "gram" in request.outputs:
            partial.append(self.gram(name, site).reshape(-1))
        if request.sum_norms:
            if total is not None:
                whole.sum_norms[name] = row_norms(total)
            else:
                mine = self.ranks.sum_slice(_sum(site, reduced) * self.share)
                partial.append(mine.double().square().sum().reshape(1))
        whole.outputs[name] = found
        self._sums[name] = partial

    def gram(self, name: str, site: Site) -> Tensor:
        """This rank's part of the Gram matrix, float64; those of all ranks add up to it."""
        like = next(iter(site.tensors().values()))
        size = sum(self.sizes)
        gram = torch.zeros(size, size, dtype=torch.float64, device=like.device)
        for part in exchange(site, self.ranks, name):
            found = part.site.reduce(("gram",)).gram
            assert found is not None
            gram += found
        scales = self.scales(like)
        return gram * scales[:, None] * scales

    def total_gram(self, part: Tensor) -> Tensor:
        """The Gram matrix, from the part that each rank has of it."""
        # Ranks add numbers up in an order that depends on their place, and ties have to stay.
        return mirrored(self.ranks.total(part))

    def aggregate(
        self, use: Use, rule: Aggregate, *, averaged: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient that a rule over all examples gives, and how many of its numbers count.

        If a wrapper of the model averages it afterwards, it is this rank's slice within zeros,
        times the number of ranks, so that the average is the whole; else it is the whole already.
        """
        name, site, dtype = use
        uneven = len(set(self.sizes)) > 1
        out = self.order(name, site, rule, self.share if uneven else None)
        kept = out.count_nonzero() if rule.count else None
        # One scale for all leaves the order of the examples as it is, and is exact afterwards.
        scale = sum(self.sizes) * (1.0 if uneven else self.share)
        # A gradient that is only asked for reaches no wrapper, and a multiple of one in half
        # precision may overflow where the average does not.
        if averaged and name in self.averaged and dtype != torch.float16:
            return out * (scale * self.ranks.size), kept
        return self.ranks.total(out) * scale, kept

    def count_outvoted(self, name: str, site: Site, rule: Aggregate) -> None:
        """Keep in how many coordinates the rule clips each example of all, or cuts it away."""
        like = next(iter(site.tensors().values()))
        total = torch.zeros(sum(self.sizes), dtype=torch.float64, device=like.device)
        scale = self.share if len(set(self.sizes)) > 1 else None
        for part in exchange(site, self.ranks, name, scale):
            if len(total):
                total += outvoted_in(part.site, len(total), rule.rule, rule.k, rule.drop)
        self.whole.outvoted[name] = self.ranks.total(total)

    def order(
        self,
        name: str,
        site: Site,
        rule: Aggregate,
        scale: float | None = None,
        examples: Tensor | None = None,
        mixing: Tensor | None = None,
    ) -> Tensor:
        """This rank's slices of a robust aggregate over all examples, within zeros.

        It may be over some of them, or over sums of them with the weights `mixing`.
        """
        info = self.whole.parameters[name]
        like = next(x for x in site.tensors().values() if x.is_floating_point())
        out = torch.zeros(info.shape, dtype=accumulate_dtype(like.dtype), device=like.device)
        for part in exchange(site, self.ranks, name, scale):
            some = part.site if examples is None else part.site.picked(examples)
            if mixing is None:
                found = some.order(rule.rule, rule.k, rule.drop)
            else:
                found = order_of_mixtures(some, mixing, rule.rule, rule.k, rule.drop)
            part.put(out, found)
        return out

    # The end of a pass.

    def finish(self) -> None:
        """Join what the ranks have measured of all parameters."""
        names, whole, request = sorted(self._sums), self.whole, self._request
        self.ranks.step(f"results of {len(names)} parameters")
        self._join_examples(names)
        self._join_sums(names)
        for name in names:
            info = whole.parameters[name]
            dtype = accumulate_dtype(info.dtype)
            found = whole.outputs[name]
            whole.outputs[name] = {o: found[o].to(info.device, dtype) for o in request.outputs}
            if "gram" in request.outputs:
                block = found["gram"][self.own, self.own] / self.share**2
                self._own.outputs[name]["gram"] = block.to(info.device, dtype)
        self._join_counts()
        self._sums.clear()
        self._dots.clear()

    def _join_counts(self) -> None:
        mine = self._own.aggregated
        counts = {name: n for name, n in mine.items() if n is not None}
        self.whole.aggregated.update(mine)
        if counts:
            device = next(iter(counts.values())).device
            flat = self.ranks.total(torch.stack([n.to(device) for n in counts.values()]))
            self.whole.aggregated.update(zip(counts, flat, strict=True))

    def _join_examples(self, names: Sequence[str]) -> None:
        """Gather the outputs that each rank has of its own examples."""
        request = self._request
        single = [o for o, shape in request.outputs.items() if shape is per_example]
        if not single or not names:
            return
        mine = [
            self._dots[n] if o == "sum_dots" else self._own.outputs[n][o]
            for n in names
            for o in single
        ]
        device = mine[0].device
        columns = torch.stack([x.to(device, torch.float64) for x in mine], 1)
        rows = self.gather(columns).unbind(1)
        scales = self.scales(columns)
        for i, name in enumerate(names):
            for j, output in enumerate(single):
                power = _POWERS[output]
                row = rows[i * len(single) + j]
                self.whole.outputs[name][output] = row * scales**power

    def _join_sums(self, names: Sequence[str]) -> None:
        """Add up the parts that each rank has of its slices."""
        partial = [x for name in names for x in self._sums[name]]
        if not partial:
            return
        device, size = partial[0].device, sum(self.sizes)
        flat = self.ranks.total(torch.cat([x.to(device) for x in partial]))
        pieces = iter(flat.split([x.numel() for x in partial]))
        for name in names:
            if "gram" in self._request.outputs:
                self.whole.outputs[name]["gram"] = mirrored(next(pieces).view(size, size))
            if self._request.sum_norms and name not in self.whole.sum_norms:
                self.whole.sum_norms[name] = next(pieces).sqrt()

    def gather(self, x: Tensor) -> Tensor:
        """The rows of all examples, from those of this rank's."""
        return self.ranks.gather(x, self.sizes)

    def decided(self, x: Tensor) -> Tensor:
        """The decision of the first rank, which all others follow."""
        return self.ranks.from_rank(0, x)

    def totals(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of some tensors of all parameters over the ranks."""
        self.ranks.step("weighted sums")
        return {name: self.ranks.total(x) for name, x in sums.items()}

    # The end of a block.

    def leave(self, error: type[BaseException] | None) -> None:
        """Leave the block together.

        Raises:
            RanksError: Another rank has raised an error, or runs another pass.
        """
        if error is None:
            self.ranks.leave()
        else:
            self.ranks.fail()


@dataclass(frozen=True)
class FactorsAcross(Factors):
    """The factors of one parameter's gradients on this rank, for what all ranks make of them.

    Attributes:
        across: The part of the block that all ranks take together.
        name: The name of the parameter.
    """

    across: Across
    name: str

    def weighted_sum(self, coef: Tensor) -> Tensor:
        """See `Factors.weighted_sum`: over the examples of all ranks, `[B]`."""
        across = self.across
        across.ranks.step(f"weighted sum of {self.name}")
        return across.ranks.total(super().weighted_sum(coef[across.own] * across.share))

    def order(self, examples: Tensor, rule: str, k: float) -> Tensor:
        """See `Factors.order`."""
        return self._order(Aggregate(rule, k, drop=False, count=False), examples=examples)

    def order_of_mixtures(self, mixing: Tensor, rule: str, k: float, drop: bool) -> Tensor:
        """See `Factors.order_of_mixtures`."""
        return self._order(Aggregate(rule, k, drop, count=False), mixing=mixing)

    def _order(self, aggregate: Aggregate, **options: Tensor) -> Tensor:
        across = self.across
        uneven = len(set(across.sizes)) > 1
        share = across.share if uneven else None
        found = across.order(self.name, self.site, aggregate, share, **options)
        return across.ranks.total(found) * (1.0 if uneven else across.share)


def _sum(site: Site, reduced: Reduced) -> Tensor:
    """The sum of the gradients, which has been made with what else was reduced, or is made now."""
    found = reduced.weighted_sum
    if found is None:
        found = site.reduce(("weighted_sum",)).weighted_sum
        assert found is not None
    return found
