"""The sites of one layer, reduced together: on a GPU their sums are one launch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pycoherence.ops import Reduced
from pycoherence.ops.core.call import call_together
from pycoherence.sites._site import FactoredSite, Site


class Wish(NamedTuple):
    """The reductions of one site that are wanted.

    Attributes:
        site: The factors.
        direction: The vector that `dots` are taken with.
        dtype: The dtype that the sum of gradients may have; `None` for its own.
    """

    site: Site
    direction: Tensor | None
    dtype: torch.dtype | None


def reduce_together(
    wishes: Sequence[Wish], want: Sequence[str], *, norms: bool
) -> list[tuple[Reduced, Tensor | None]]:
    """Reduce sites as `Site.reduce` does, in fewer launches.

    Args:
        wishes: One for each site.
        want: The outputs of all of them.
        norms: Whether numbers are welcome whose squares add up to the squared norm of the sum.

    Returns:
        For each site its outputs, the sum in its own dtype or the wished one, and such numbers if
        they came with it.
    """
    sites = [wish.site for wish in wishes if isinstance(wish.site, FactoredSite)]
    if len(sites) < len(wishes):
        return [(site.reduce(want, direction=v), None) for site, v, _ in wishes]
    calls = [
        site.reduce_call(want, None, wish.direction)
        for site, wish in zip(sites, wishes, strict=True)
    ]
    found = call_together(calls, [wish.dtype for wish in wishes], norms)
    return [(site.reduced(out), of) for site, (out, of) in zip(sites, found, strict=True)]
