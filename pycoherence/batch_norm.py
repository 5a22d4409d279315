"""BatchNorm layers, which mix the examples of a batch, replaced by layers that do not."""

from collections.abc import Callable
from numbers import Integral
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from pycoherence.errors import UnsupportedError

_PLAIN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def replace_batch_norm(
    model: nn.Module, groups: int = 32, *, norm: Callable[[Any], nn.Module] | None = None
) -> dict[str, nn.Module]:
    r"""Replace each BatchNorm layer of a model by a GroupNorm layer, in place.

    .. math:: y = \gamma \, (x - \mu_{bk}) / \sqrt{\sigma_{bk}^2 + \epsilon} + \beta

    The mean and the variance are those of example b and channel group k, and no longer those of the
    batch, so that each example has a gradient of its own. The network computes another function
    than before: train it, or train it further, and load checkpoints of the old one first, since
    running statistics are gone.

    `weight` and `bias` are the same parameters as before, so that an optimizer that holds them goes
    on; `eps`, training mode and hooks are kept too. A layer that is used in several places stays
    one layer.

    Args:
        model: Any module. Call this before a wrapper such as `DistributedDataParallel` is put
            around it, and before `torch.compile`.
        groups: The most groups of channels. A layer of `C` channels takes the largest divisor of
            `C` that is not above it and leaves two or more channels in a group. `BatchNorm1d` takes
            one group, since its input may be `[B, C]`, of whose channels a small group would leave
            little.
        norm: In place of GroupNorm, the layer to put for one of BatchNorm, which it is given. Its
            `weight` and `bias`, if they have the old ones' shapes, become the old ones.

    Returns:
        The new layers by path. That of a model which is itself a BatchNorm layer has the path `""`;
        it cannot be changed in place, so use the layer that is returned.

    Raises:
        TypeError: `model` is not a module, `groups` not an integer, or `norm` gives something else
            than a module.
        ValueError: `groups` is less than one.
        UnsupportedError: A layer does or holds more than BatchNorm, such as an activation, and no
            `norm` is given; or it is lazy and has not run yet. Nothing has been replaced then.

    Cost: No pass over any data.

    Source: Wu and He 2018, arXiv:1803.08494.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 48, 3), torch.nn.BatchNorm2d(48))
        >>> list(pc.replace_batch_norm(model))
        ['1']
        >>> model[1].num_groups, model[1].num_channels
        (24, 48)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(groups, Integral) or isinstance(groups, bool):
        raise TypeError(f"expected groups to be a whole number, got {groups!r}")
    if groups < 1:
        raise ValueError(f"expected groups to be 1 or more, got {groups}")
    made: dict[nn.Module, nn.Module] = {}
    found: dict[str, nn.Module] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, _BatchNorm):
            if layer not in made:
                made[layer] = _replacement(path, layer, int(groups), norm)
            found[path] = made[layer]
    for path, new in found.items():
        if path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)
    return found


def _replacement(
    path: str,
    layer: _BatchNorm,
    groups: int,
    norm: Callable[[Any], nn.Module] | None,
) -> nn.Module:
    where = f"module {path!r} ({type(layer).__name__})"
    tensors = [*layer.parameters(), *layer.buffers()]
    if any(map(is_lazy, tensors)):
        raise UnsupportedError(
            f"{where}: it does not know its number of channels yet. What to do: run the model on "
            "one batch first."
        )
    if norm is None:
        _expect_plain(where, layer)
        channels = layer.num_features
        most = 1 if isinstance(layer, nn.BatchNorm1d) else min(groups, max(1, channels // 2))
        number = next(g for g in range(most, 0, -1) if channels % g == 0)
        new = nn.GroupNorm(number, channels, layer.eps, layer.affine)
    else:
        new = norm(layer)
        if not isinstance(new, nn.Module):
            raise TypeError(f"expected norm to give a module, got {type(new).__name__}")
    if tensors:  # the first is a parameter or a running mean, and no counter
        new.to(tensors[0].device, tensors[0].dtype)
    for name in _AFFINE:
        old, other = getattr(layer, name), getattr(new, name, None)
        if old is not None and other is not None and other.shape == old.shape:
            setattr(new, name, old)
    # Handles of hooks know the dict that they are in: the same one keeps them alive.
    new.__dict__.update({k: v for k, v in vars(layer).items() if "hook" in k and k in vars(new)})
    return new.train(layer.training)


def _expect_plain(where: str, layer: _BatchNorm) -> None:
    """Raise unless a layer does and holds nothing but what BatchNorm does."""
    more = [*layer._modules, *(name for name in layer._parameters if name not in _AFFINE)]
    if type(layer).forward in _PLAIN and not more:
        return
    why = f"it also holds {', '.join(more)}" if more else "it has a forward of its own"
    raise UnsupportedError(
        f"{where}: {why}, which GroupNorm would lose. What to do: give norm=, a function that "
        "is given this layer and returns one for its place."
    )


_AFFINE = ("weight", "bias")
