"""Wrappers of a model in several processes, which average its gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pycoherence.capture.across import Across
from pycoherence.capture.model import modules_of
from pycoherence.capture.torch_internals import active_ddp, has_comm_hook, is_joined
from pycoherence.errors import UnsupportedError
from pycoherence.ranks import Ranks

Refuse = Callable[[str, str], NoReturn]


def expect_no_sync(refuse: Refuse) -> None:
    """Refuse a pass whose gradients DistributedDataParallel would average before they are made."""
    ddp = active_ddp()
    if ddp is not None and ddp.require_backward_grad_sync:
        refuse(
            "DistributedDataParallel averages gradients in the backward pass, and those of a rule "
            "over whole examples are made after it",
            "give the wrapped model and group=, which applies the rule to the examples of all "
            "ranks; or run forward and backward pass inside model.no_sync(), and average each "
            ".grad afterwards with torch.distributed.all_reduce; or use a rule over coordinates",
        )


def expect_not_joined(model: nn.Module) -> None:
    """Refuse a model whose ranks stop one after another, and then answer its wrapper alone.

    Raises:
        UnsupportedError: It is or has been in `torch.distributed.algorithms.join.Join`.
    """
    for path, module in modules_of(model):
        # Torch never takes this back, and the wrapper asks all ranks in each forward pass since.
        if isinstance(module, DistributedDataParallel) and is_joined(module):
            raise UnsupportedError(
                f"module {path!r} (DistributedDataParallel) has been given to Join, by which a "
                "rank without examples answers the wrapper and not group=. What to do: leave Join "
                "out, and give such a rank an empty batch; or leave group= out."
            )


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Let each DistributedDataParallel in a model leave its gradients as they are."""
    with ExitStack() as stack:
        for _, module in modules_of(model):
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def note_averaged(
    across: Across,
    names: Sequence[str],
    parameters: Mapping[str, nn.Parameter],
    refuse: Refuse,
) -> None:
    """Note the parameters among some whose gradients a wrapper will average over all ranks."""
    ddp = active_ddp()
    if ddp is None or not ddp.require_backward_grad_sync:
        return
    managed = across.managed.get(id(ddp))
    if managed is None:
        managed = across.managed[id(ddp)] = _managed_alike(ddp, across, refuse)
    across.averaged.update(name for name in names if id(parameters[name]) in managed)


def _managed_alike(ddp: DistributedDataParallel, across: Across, refuse: Refuse) -> set[int]:
    """The `id` of each parameter that a wrapper averages over all ranks."""
    expect_same_ranks(ddp, across.ranks)
    if has_comm_hook(ddp):
        refuse(
            "DistributedDataParallel has a communication hook, which may not average what it sends",
            "register none in a model whose gradients a rule makes",
        )
    ignored = ddp.parameters_to_ignore
    return {id(p) for name, p in ddp.module.named_parameters() if name not in ignored}


def expect_same_ranks(model: nn.Module, ranks: Ranks) -> None:
    """Refuse a rule over the examples of other ranks than those whose weights are kept alike.

    Raises:
        UnsupportedError: A DistributedDataParallel in the model has other ranks.
    """
    for _, module in modules_of(model):
        if not isinstance(module, DistributedDataParallel):
            continue
        theirs = sorted(dist.get_process_group_ranks(module.process_group))
        if theirs != ranks.members:
            raise UnsupportedError(
                f"DistributedDataParallel averages over the ranks {theirs}, and group= has "
                f"{ranks.members}. What to do: give both the same processes."
            )
