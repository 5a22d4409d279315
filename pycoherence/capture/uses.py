"""One call of a function that uses parameters, and what its backward pass makes of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pycoherence.capture.rows import Rows
from pycoherence.sites import Layout, Site, made_of, made_of_edge

ParameterUse = tuple[str, Tensor]
"""The name of a tracked parameter that an argument of a call is, or is made of; the parameter."""


class ParameterArgument(NamedTuple):
    """An argument of a call that needs the gradient of a parameter.

    Attributes:
        dtype: Dtype of the argument.
        uses: The tracked parameters that it is, or is made of; empty if there are none.
        source: The argument with its graph, if it is not the parameter itself.
        edge: The end of its graph at the time of use.
        version: How often it had been written into then.
    """

    dtype: torch.dtype
    uses: tuple[ParameterUse, ...]
    source: Tensor | None
    edge: GradientEdge | None = None
    version: int = 0

    def parts(self, site: Site) -> list[Site]:
        """The sites of the parameters, from that of the argument."""
        assert self.source is not None
        assert self.edge is not None
        leaves = [leaf for _, leaf in self.uses]
        if self.source._version == self.version:
            return made_of(site, self.source, leaves)
        # It has been written into since: the graph of that time has to be told by its end.
        return made_of_edge(site, self.edge, self.source.dtype, leaves)


class Use(NamedTuple):
    """A parameter in a backward pass.

    Attributes:
        name: The name of the parameter.
        site: The factors of its gradients.
        dtype: The dtype of the gradient that the pass takes.
    """

    name: str
    site: Site
    dtype: torch.dtype


class RunningPass(Protocol):
    """The backward pass that is running, as a call sees it."""

    def gradients(self, uses: Sequence[Use]) -> list[Tensor | None]:
        """The gradients of parameters from a use of each; `None` before the last use of it."""
        ...


class UseSink(Protocol):
    """The backward passes of a capture, as a call sees them."""

    def running_pass(self, call: int) -> RunningPass:
        """The guarded backward pass that holds this call; raises unless it is running."""
        ...


class LayerCall:
    """One captured call, for the autograd Function that carries it out.

    Attributes:
        rule: The rule that computes it and its factors.
        number: Number of this call among those of one capture.
        sink: The backward passes of the capture.
        arguments: One for each parameter argument; `None` if it is absent or needs no gradient.
        inputs: How many tensors of examples come before the parameters.
        rows: The arrangement of the rows of the input.
        names: The tracked parameters that take part, once for each use.
        layouts: How each parameter argument is distributed; `None` for a call of plain tensors.
    """

    __slots__ = ("arguments", "inputs", "layouts", "names", "number", "rows", "rule", "sink")

    def __init__(
        self,
        rule: Any,
        number: int,
        sink: UseSink,
        arguments: Sequence[ParameterArgument | None],
        inputs: int,
        rows: Rows | None,
    ) -> None:
        self.rule, self.number, self.sink = rule, number, sink
        self.arguments, self.inputs, self.rows = arguments, inputs, rows
        self.layouts: Sequence[Layout | None] | None = None
        self.names = [name for a in arguments if a is not None for name, _ in a.uses]

    def gradients(self, this: RunningPass, sites: Sequence[Site | None]) -> list[Tensor | None]:
        """Gradients of the parameter arguments, then of the parameters they were made of."""
        uses: list[Use] = []
        found: list[Tensor | None] = [None] * len(self.arguments)
        places: list[int] = []
        for i, (argument, site) in enumerate(zip(self.arguments, sites, strict=True)):
            if argument is None or site is None:
                continue
            if not argument.uses:
                total = site.reduce(("weighted_sum",)).weighted_sum
                assert total is not None
                found[i] = total.to(argument.dtype)
            elif argument.source is None:
                uses.append(Use(argument.uses[0][0], site, argument.dtype))
                places.append(i)
            else:
                for (name, leaf), part in zip(argument.uses, argument.parts(site), strict=True):
                    uses.append(Use(name, part, leaf.dtype))
                    places.append(len(found))
                    found.append(None)
        for i, gradient in zip(places, this.gradients(uses), strict=True):
            found[i] = gradient
        return found
