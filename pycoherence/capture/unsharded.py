"""The parameters of FSDP2: shards on the model, and whole ones while its layers run.

`torch.distributed.fsdp.fully_shard` makes each parameter of a module a DTensor, whose `.grad` it
fills. Shortly before the layers run it puts a plain leaf in its place, always the same object, and
gives that its storage; the gradients of autograd arrive there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch import nn

from pycoherence.capture.across import Across
from pycoherence.capture.errors import unsupported
from pycoherence.capture.torch_internals import ShardedParameter, fully_sharded


class Unsharded:
    """The leaves that FSDP2 has put in the place of the parameters of a model.

    Args:
        modules: All modules of the model.

    Attributes:
        names: The tracked parameters of which the capture has learned the leaf.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.names: set[str] = set()
        self._every = fully_sharded(modules)
        self._waiting = self._every
        self._sharded = {id(p.sharded) for p in self._every}

    def appeared(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The parameters that have got their leaf since this was asked last, and the leaves."""
        found = [(p.sharded, p.whole) for p in self._waiting if p.whole is not None]
        if found:
            self._waiting = [p for p in self._waiting if p.whole is None]
        return found

    def expect_reduced(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Raise if FSDP2 has left gradients where they arrived.

        Raises:
            UnsupportedError: They came to a group of parameters when it was done with them.
        """
        left = {id(p.sharded) for p in self._every if p.is_left}
        names = [name for name, p in parameters.items() if id(p) in left]
        if names:
            raise unsupported(
                names,
                None,
                "torch.distributed.fsdp.fully_shard was done with its parameters before their "
                "gradient came, which is not in .grad",
                "call fully_shard on the model itself too, and not on modules that make what they "
                "return of parameters alone",
            )

    def manages(self, p: Any) -> bool:
        """Whether FSDP2 shards a parameter."""
        return id(p) in self._sharded

    def note_averaged(
        self,
        across: Across,
        names: Sequence[str],
        parameters: Mapping[str, Any],
        refuse: Callable[[str, str], NoReturn],
    ) -> None:
        """Note the parameters among some whose gradients FSDP2 will average over all ranks."""
        mine = self.names.intersection(names)
        self.expect_same_ranks(across, mine, parameters, refuse)
        if mine and any(one.divides_otherwise for one in self._every):
            refuse(
                "set_gradient_divide_factor makes FSDP2 divide by another number than that of the "
                "ranks, which a rule over the examples of all of them relies on",
                "leave it out, and scale the loss",
            )
        across.averaged.update(mine)

    def expect_same_ranks(
        self,
        across: Across,
        names: Iterable[str],
        parameters: Mapping[str, Any],
        refuse: Callable[[str, str], NoReturn],
    ) -> None:
        """Refuse a rule over the examples of other ranks than those that hold the shards."""
        for name in self.names.intersection(names):
            theirs = sorted(parameters[name].device_mesh.mesh.flatten().tolist())
            if theirs != across.ranks.members:
                refuse(
                    f"fully_shard averages over the ranks {theirs}, and group= has "
                    f"{across.ranks.members}",
                    "give both the same processes",
                )

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> "Unsharded | None":
        """Those of a model; `None` if FSDP2 has no part in it."""
        found = cls(modules)
        return found if found._waiting else None


def refuse_sharded(names: Iterable[str], function: Callable[..., Any] | None) -> NoReturn:
    """Refuse parameters whose gradients would be made when FSDP2 takes them no more."""
    raise unsupported(
        sorted(names),
        function,
        "torch.distributed.fsdp.fully_shard reduces gradients in the backward pass, and those of a "
        "rule over whole examples are made after it",
        "give group=, or use a rule over coordinates",
    )


def sharded(
    found: dict[str, nn.Parameter], modules: Iterable[nn.Module]
) -> dict[str, nn.Parameter]:
    """Parameters as `found` on modules, by name, with the sharded ones in the place of leaves.

    Modules hold the leaves between a forward pass and what frees them, and only the sharded ones
    last, have a version that counts their steps, and get `.grad`.
    """
    parameters: list[ShardedParameter] = fully_sharded(modules)
    if not parameters:
        return found
    lasting = {id(x): p.sharded for p in parameters for x in p.stand_ins}
    return {name: lasting.get(id(p), p) for name, p in found.items()}
