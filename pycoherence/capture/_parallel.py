"""Models on several devices."""

from collections.abc import Callable
from typing import NoReturn

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pycoherence.errors import UnsupportedError


def check_parallel(model: nn.Module) -> None:
    """Refuse a model whose layers run in threads of their own, which no mode sees.

    Raises:
        UnsupportedError: It is one.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            where = f"module {path!r}" if path else "the model itself"
            raise UnsupportedError(
                f"{where} (DataParallel): its layers run as copies, in threads where they are not "
                "seen. What to do: use torch.nn.parallel.DistributedDataParallel, which runs a "
                "process for each device, or put its .module on one device."
            )


def expect_no_sync(refuse: Callable[[str, str], NoReturn]) -> None:
    """Refuse a pass whose gradients DistributedDataParallel would average before they are made."""
    active = DistributedDataParallel._get_active_ddp_module()
    if active is not None and active.require_backward_grad_sync:
        refuse(
            "DistributedDataParallel averages gradients in the backward pass, and those of a rule "
            "over whole examples are made after it",
            "run forward and backward pass inside model.no_sync(), and average each .grad "
            "afterwards with torch.distributed.all_reduce; or use a rule over coordinates",
        )
