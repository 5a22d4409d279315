"""One call of a function that uses parameters, and what its backward pass makes of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.autograd.graph import GradientEdge

from pycoherence.capture.request import Request
from pycoherence.capture.results import Factors, Results, row_norms
from pycoherence.capture.rows import Rows
from pycoherence.ops import Reduced
from pycoherence.sites import Site, made_of, made_of_edge


class ParameterUse(NamedTuple):
    """A tracked parameter that an argument of a call is, or is made of."""

    name: str
    leaf: Tensor


class ParameterArgument(NamedTuple):
    """An argument of a call that needs the gradient of a parameter.

    Attributes:
        dtype: Of the argument.
        uses: What it is, or is made of; empty if that is no tracked parameter.
        source: The argument with its graph, if it is not the parameter itself.
        edge: Where its graph ended when it was used.
        version: How often it had been written into then.
    """

    dtype: object
    uses: tuple[ParameterUse, ...]
    source: Tensor | None
    edge: GradientEdge | None = None
    version: int = 0

    def parts(self, site: Site) -> list[Site]:
        """The sites of the parameters, from that of the argument."""
        assert self.source is not None
        assert self.edge is not None
        leaves = [use.leaf for use in self.uses]
        if self.source._version == self.version:
            return made_of(site, self.source, leaves)
        # It has been written into since: the graph of that time has to be told by its end.
        return made_of_edge(site, self.edge, self.source.dtype, leaves)


class RunningPass(Protocol):
    """The backward pass that is running, as a call sees it."""

    @property
    def keep(self) -> bool:
        """Whether the results of the pass are those of the block."""
        ...

    def complete(self, name: str, site: Site) -> Site | None:
        """The site of all uses of a parameter in this pass, from that of each; `None` before."""
        ...


class UseSink(Protocol):
    """The backward passes of a capture, as a call sees them."""

    def running_pass(self, call: int) -> RunningPass:
        """The guarded backward pass that holds this call; raises unless it is running."""
        ...


class LayerCall:
    """One captured call, for the autograd Function that carries it out.

    Attributes:
        rule: What computes it and its factors.
        number: Of this call among those of one capture.
        sink: The backward passes of the capture.
        arguments: One for each parameter argument; `None` if it is absent or needs no gradient.
        inputs: How many tensors of examples come before the parameters.
        rows: The arrangement of the rows of the input.
        wants: Of each parameter argument, whether its gradient is wanted.
        names: The tracked parameters that take part.
    """

    __slots__ = (
        "arguments",
        "inputs",
        "names",
        "number",
        "request",
        "results",
        "rows",
        "rule",
        "sink",
        "want",
        "wants",
    )

    def __init__(
        self,
        rule: Any,
        number: int,
        sink: UseSink,
        arguments: Sequence[ParameterArgument | None],
        inputs: int,
        rows: Rows | None,
        request: Request,
        results: Results,
        want: tuple[str, ...],
    ) -> None:
        self.rule, self.number, self.sink = rule, number, sink
        self.arguments, self.inputs, self.rows = arguments, inputs, rows
        self.request, self.results, self.want = request, results, want
        self.wants = [argument is not None for argument in arguments]
        self.names = [use.name for a in arguments if a is not None for use in a.uses]

    def gradients(self, this: RunningPass, sites: Sequence[Site | None]) -> list[Tensor | None]:
        """Gradients of the parameter arguments, then of the parameters they were made of."""
        found: list[Tensor | None] = []
        behind: list[Tensor | None] = []
        for argument, site in zip(self.arguments, sites, strict=True):
            if argument is None or site is None:
                found.append(None)
            elif not argument.uses:
                total = site.reduce(("weighted_sum",)).weighted_sum
                found.append(_cast(total, argument.dtype))
            elif argument.source is None:
                found.append(self._of_use(this, argument.uses[0], site))
            else:
                found.append(None)
                parts = zip(argument.uses, argument.parts(site), strict=True)
                behind += [self._of_use(this, use, part) for use, part in parts]
        return found + behind

    def _of_use(self, this: RunningPass, use: ParameterUse, part: Site) -> Tensor | None:
        """The gradient of a parameter; `None` until the last of its uses, which gives all."""
        name, leaf = use
        whole = this.complete(name, part)
        if whole is None:
            return None
        found = measure(name, whole, self.request, self.results, self.want, keep=this.keep)
        return _cast(found, leaf.dtype)


def measure(
    name: str,
    site: Site,
    request: Request,
    results: Results,
    want: tuple[str, ...],
    *,
    keep: bool,
) -> Tensor | None:
    """Measure the gradients of one parameter, and give the one that `.grad` gets.

    Args:
        name: Of the parameter.
        site: Of all its uses together.
        request: What to measure.
        results: Where it goes.
        want: `request.want`.
        keep: Whether the results are those of the block; otherwise only the gradient is made.
    """
    if not keep:
        want = ("weighted_sum",) if request.gradients and request.aggregate is None else ()
    reduced = site.reduce(want, direction=request.directions.get(name)) if want else Reduced()
    if keep:
        results.outputs[name] = {o: getattr(reduced, o) for o in request.outputs}
        if request.factors:
            results.factors[name] = Factors.of(site)
        if request.sum_norms and reduced.weighted_sum is not None:
            results.sum_norms[name] = row_norms(reduced.weighted_sum)
    rule = request.aggregate
    if rule is None:
        return reduced.weighted_sum if request.gradients else None
    # The rule gives a mean over examples, and `.grad` holds a sum, for both loss reductions.
    assert results.batch_size is not None
    gradient = site.order(rule.rule, rule.k, rule.drop) * results.batch_size
    if keep:
        results.aggregated[name] = gradient.count_nonzero() if rule.count else None
    return gradient


def _cast(gradient: Tensor | None, dtype: object) -> Tensor | None:
    if gradient is None or gradient.dtype == dtype:
        return gradient
    return gradient.to(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
