"""Several `*_reduce` ops at once: what each leaves to add up is one launch for all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycoherence.triton_kernels.launch.finish import Completed, Finish, SumRequest
from pycoherence.triton_kernels.launch.tape import taped

Found = tuple[tuple[Tensor | None, ...], Tensor | None]
"""The outputs of an op, and numbers whose squares add up to the squared norm of the sum."""


def together(
    calls: Sequence[tuple[Completed, tuple[Any, ...]]],
    dtypes: Sequence[torch.dtype | None],
    norms: bool,
) -> list[Found]:
    """The outputs of several ops.

    Args:
        calls: Each op and its arguments.
        dtypes: For each, that of the sum of gradients; `None` for the accumulation dtype, as it has
            to be if an op wants `sum_dots`.
        norms: Whether norms of the sum are wanted; they may be `None` all the same.
    """
    return taped(_together, (calls, dtypes, norms))


def _together(
    calls: Sequence[tuple[Completed, tuple[Any, ...]]],
    dtypes: Sequence[torch.dtype | None],
    norms: bool,
) -> list[Found]:
    finish = Finish()
    requests = [SumRequest(dtype, norms) for dtype in dtypes]
    found = [
        op.begin(args, request, finish) for (op, args), request in zip(calls, requests, strict=True)
    ]
    finish.run()
    return [(outputs, request.norms) for outputs, request in zip(found, requests, strict=True)]
