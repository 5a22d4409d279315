"""What a backward pass leaves behind beside the gradients of probes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pycoherence.sites import Site


@dataclass(frozen=True)
class Factors:
    """A site without its graph, and what its tensors were when it was kept.

    Attributes:
        site: The factors.
        versions: How often each tensor had been changed in place.
    """

    site: Site
    versions: dict[str, int]

    @classmethod
    def of(cls, site: Site) -> "Factors":
        """Keep the factors of a site."""
        tensors = {name: x for name, x in vars(site).items() if isinstance(x, Tensor)}
        detached = {name: x.detach() for name, x in tensors.items()}
        return cls(replace(site, **detached), {name: x._version for name, x in detached.items()})

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(getattr(self.site, name).device for name in self.versions)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Site:
        """The site of other factors, each made of one of these."""
        return replace(self.site, **{n: change(getattr(self.site, n)) for n in self.versions})

    def weighted_sum(self, coef: Tensor) -> Tensor:
        """`sum_b coef_b G_b`."""
        total = self.site.reduce(("weighted_sum",), coef=coef).weighted_sum
        assert total is not None
        return total

    @property
    def changed(self) -> bool:
        """Whether a tensor has been changed in place, here or through the model."""
        return any(getattr(self.site, name)._version != n for name, n in self.versions.items())


@dataclass
class Kept:
    """By parameter, of the pass that fills the probes.

    Attributes:
        sum_norms: Norms of the rows of the gradients' sum.
        factors: What the per-example gradients are made of.
        ordered: Of the gradients that `Plan.order` gave, how many coordinates are not zero, if that
            was asked for.
    """

    sum_norms: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, Factors] = field(default_factory=dict)
    ordered: dict[str, Tensor | None] = field(default_factory=dict)


def expect_unchanged(factors: Mapping[str, Factors], what: str) -> None:
    """Raise if a tensor has been changed in place since it was kept.

    Args:
        factors: By parameter.
        what: When to have come, for the message.

    Raises:
        RuntimeError: One has.
    """
    changed = sorted(name for name, kept in factors.items() if kept.changed)
    if changed:
        raise RuntimeError(
            "an input or an output gradient has been changed in place since the backward pass, "
            f"so that the gradients of {', '.join(changed)} are lost; {what}"
        )


def row_norms(x: Tensor) -> Tensor:
    """Norms of the rows; of a single row its numbers.

    They tell the norm of the whole, and unlike it, the order in which torch adds them up does not
    depend on the number of threads.
    """
    if x.dim() < 2 or x.shape[0] == 1:
        return x.flatten().clone()  # the gradient itself belongs to the user
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())))
