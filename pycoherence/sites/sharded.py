"""A parameter that is a `DTensor`: sites of its local slice, and sums over the ranks.

Factors are plain tensors here. Whoever makes such a site has seen to it that they are those of the
slice of the parameter that this rank holds. Outputs of the parameter's shape then are slices as
they are, and outputs per example are summed over the ranks that hold the other slices.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from pycoherence.errors import UnsupportedError
from pycoherence.ops import Reduced
from pycoherence.sites._site import PARAMETER_SHAPED, Site

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_PLAIN = (Tensor, nn.Parameter)


def is_dtensor(x: Any) -> "TypeGuard[DTensor]":
    """Whether a tensor is distributed; nothing is imported to tell."""
    if type(x) in _PLAIN:
        return False
    found = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(x, found.DTensor)


class Layout(NamedTuple):
    """How a parameter is distributed.

    Attributes:
        mesh: The ranks.
        placements: One for each dimension of the mesh.
        shape: That of the whole parameter.
    """

    mesh: "DeviceMesh"
    placements: "tuple[Placement, ...]"
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: Any) -> "Layout | None":
        """The layout of a tensor; `None` of a plain one."""
        if not is_dtensor(x):
            return None
        return cls(x.device_mesh, tuple(x.placements), tuple(x.shape))

    def expect_known(self, names: Sequence[str]) -> None:
        """Refuse parameters that are distributed in another way than is known.

        Raises:
            UnsupportedError: They are.
        """
        kinds = {type(p).__name__ for p in self.placements} - {"Shard", "Replicate"}
        if kinds:
            raise UnsupportedError(
                f"{', '.join(names)}: distributed as {self.placements}, of which a slice by "
                f"{', '.join(sorted(kinds))} is not known. What to do: distribute the parameters "
                "with Shard and Replicate, or freeze them with requires_grad_(False)."
            )

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """Each dimension of the mesh over which the parameter is sharded, and that of it."""
        return [(i, p.dim) for i, p in enumerate(self.placements) if p.is_shard()]  # pyright: ignore

    def moved(self, by: int) -> "tuple[Placement, ...]":
        """The placements of a tensor that has `by` dimensions before those of the parameter."""
        from torch.distributed.tensor import Shard

        cuts = dict(self.cuts)
        return tuple(Shard(cuts[i] + by) if i in cuts else p for i, p in enumerate(self.placements))

    def slice(self, x: Tensor, behind: int = 0) -> Tensor:
        """This rank's slice of a tensor `[..., *shape]`, whole or distributed in any way.

        Args:
            x: The tensor.
            behind: How many dimensions it has before those of the parameter.
        """
        return local_part(x, self.mesh, self.moved(behind))

    def span(self, dim: int) -> tuple[int, int]:
        """The first index of this rank's slice along a dimension that is cut, and how many."""
        from torch.distributed.tensor import Replicate, Shard

        cut = [Shard(0) if (i, dim) in self.cuts else Replicate() for i in range(self.mesh.ndim)]
        device = self.mesh.device_type
        mine = local_part(torch.arange(self.shape[dim], device=device), self.mesh, cut)
        return (int(mine[0]), len(mine)) if len(mine) else (0, 0)

    def join(self, part: Tensor, behind: int = 0) -> Tensor:
        """The distributed tensor of which this is this rank's slice."""
        from torch.distributed.tensor import DTensor

        shape = (*part.shape[:behind], *self.shape)
        stride = tuple(accumulate(reversed((*shape[1:], 1)), lambda a, b: a * max(b, 1)))[::-1]
        placements = self.moved(behind)
        return DTensor.from_local(
            part.contiguous(), self.mesh, placements, shape=torch.Size(shape), stride=stride
        )

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A distributed tensor of zeros."""
        whole = torch.zeros(self.shape, dtype=dtype, device=device)
        return self.join(self.slice(whole))

    def sum(self, *parts: Tensor | None) -> list[Tensor | None]:
        """Sum tensors over the ranks that hold other slices, in float64 and all at once."""
        found = [x for x in parts if x is not None]
        if not self.cuts or not found:
            return list(parts)
        flat = torch.cat([x.double().flatten() for x in found])
        for i, _ in self.cuts:
            torch.distributed.all_reduce(flat, group=self.mesh.get_group(i))
        summed = iter(flat.split([x.numel() for x in found]))
        return [None if x is None else next(summed).view(x.shape).to(x.dtype) for x in parts]


@dataclass(frozen=True)
class ShardedSite:
    """Gradients of a distributed parameter, by the factors of this rank's slice.

    Attributes:
        site: The factors of the slice.
        layout: How the parameter is distributed.
    """

    site: Site
    layout: Layout

    def reduce(
        self,
        want: Sequence[str],
        *,
        coef: Tensor | None = None,
        direction: Tensor | None = None,
    ) -> Reduced:
        """See `Site.reduce`; a direction may be whole or distributed."""
        if direction is not None:
            direction = self.layout.slice(direction)
        found = self.site.reduce(want, coef=coef, direction=direction)
        each = [name for name in Reduced._fields if name not in PARAMETER_SHAPED]
        summed = self.layout.sum(*(getattr(found, name) for name in each))
        joined = {
            name: self.layout.join(x)
            for name in PARAMETER_SHAPED
            if (x := getattr(found, name)) is not None
        }
        return found._replace(**dict(zip(each, summed, strict=True)), **joined)

    def order(self, rule: str, k: float, drop: bool) -> Tensor:
        """See `Site.order`."""
        return self.layout.join(self.site.order(rule, k, drop))

    def by_slices(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """See `Site.by_slices`: of the coordinates that this rank holds."""
        return self.layout.join(self.site.by_slices(function))

    def grouped(self, n: int) -> "ShardedSite":
        """See `Site.grouped`."""
        return replace(self, site=self.site.grouped(n))

    def picked(self, examples: Tensor) -> "ShardedSite":
        """See `Site.picked`."""
        return replace(self, site=self.site.picked(examples))

    def rows(self) -> Tensor:
        """See `Site.rows`: a distributed tensor."""
        return self.layout.join(self.site.rows(), 1)

    def with_others(self, others: "Sequence[ShardedSite]") -> "ShardedSite | None":
        """See `Site.with_others`."""
        sites = [site.site for site in (self, *others)]
        same = all(site.layout == self.layout for site in others)
        if not same or len({type(site) for site in sites}) > 1:
            return None
        found = self.site.with_others(sites[1:])
        return None if found is None else replace(self, site=found)

    def tensors(self) -> dict[str, Tensor]:
        """See `Site.tensors`: those of the slice."""
        return self.site.tensors()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "ShardedSite":
        """See `Site.with_tensors`."""
        return replace(self, site=self.site.with_tensors(tensors))


def local_part(x: Tensor, mesh: "DeviceMesh", placements: "Sequence[Placement]") -> Tensor:
    """The part of a tensor that this rank holds, if it is distributed in a given way.

    Args:
        x: A distributed tensor, which is redistributed, or one that all ranks have whole.
        mesh: The ranks.
        placements: How it is to be distributed.
    """
    from torch.distributed.tensor import DTensor, Replicate

    if not is_dtensor(x):
        if not any(p.is_shard() for p in placements):
            return x
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    if tuple(x.placements) != tuple(placements):
        x = x.redistribute(placements=placements)
    return waited(x.to_local())


def placed(x: Tensor, like: Tensor) -> Tensor:
    """A tensor that all ranks have whole, distributed as another one is."""
    layout = None if is_dtensor(x) else Layout.of(like)
    return x if layout is None else layout.join(layout.slice(x))


def gathered(x: Tensor) -> Tensor:
    """All of a tensor, which may be distributed."""
    return waited(x.full_tensor() if is_dtensor(x) else x)


def local_values(x: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, however it is distributed."""
    return waited(x.to_local()) if is_dtensor(x) else x


def waited(x: Tensor) -> Tensor:
    """A tensor that a collective gives, when it has come."""
    return x if type(x) in _PLAIN or not hasattr(x, "trigger_wait") else x.wait()  # pyright: ignore


def norm_numbers(x: Tensor) -> Tensor:
    """Numbers on all ranks whose squares add up to the squared norm of a distributed tensor."""
    layout = Layout.of(x)
    assert layout is not None
    (total,) = layout.sum(sq_norm(layout.slice(x)).reshape(1))
    assert total is not None
    return total.sqrt()


def sq_norm(x: Tensor) -> Tensor:
    """The squared norm of a tensor, in float64, the same for any number of threads."""
    if is_dtensor(x):
        return norm_numbers(x).square().sum()
    # In parts, since torch splits a longer sum by the number of threads.
    parts = [part.double().square().sum() for part in x.flatten().split(_UNSPLIT)]
    return torch.stack(parts).sum()


_UNSPLIT = 2**14


def count_nonzero(x: Tensor) -> Tensor:
    """How many numbers are not zero, in all of a tensor that may be distributed."""
    layout = Layout.of(x)
    if layout is None:
        return x.count_nonzero()
    (total,) = layout.sum(layout.slice(x).count_nonzero())
    assert total is not None
    return total


def split_rows(rows: Tensor) -> tuple[Tensor, Layout]:
    """This rank's slice of gradients `[B, *shape]`, and how the parameter is distributed then."""
    from torch.distributed.tensor import Replicate, Shard

    assert is_dtensor(rows)
    cuts = [p.dim - 1 if type(p) is Shard else -1 for p in rows.placements]
    placements = tuple(Shard(d) if d >= 0 else Replicate() for d in cuts)
    layout = Layout(rows.device_mesh, placements, tuple(rows.shape[1:]))
    return layout.slice(rows, 1), layout
