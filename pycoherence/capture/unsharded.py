"""The parameters of FSDP2: shards on the model, and whole ones while its layers run.

`torch.distributed.fsdp.fully_shard` makes each parameter of a module a DTensor, whose `.grad` it
fills. Shortly before the layers run it puts a plain leaf in its place, always the same object, and
gives that its storage; the gradients of autograd arrive there.
"""

from collections.abc import Iterable

from torch import nn

from pycoherence.capture.torch_internals import ShardedParameter, fully_sharded


class Unsharded:
    """The leaves that FSDP2 has put in the place of the parameters of a model.

    Args:
        modules: All modules of the model.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._waiting = fully_sharded(modules)

    def appeared(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The parameters that have got their leaf since this was asked last, and the leaves."""
        found = [(p.sharded, p.whole) for p in self._waiting if p.whole is not None]
        if found:
            self._waiting = [p for p in self._waiting if p.whole is None]
        return found

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> "Unsharded | None":
        """Those of a model; `None` if FSDP2 has no part in it."""
        found = cls(modules)
        return found if found._waiting else None


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
