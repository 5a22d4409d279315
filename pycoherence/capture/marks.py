"""Marks: a user says whose elements a tensor holds."""

from typing import Any

import torch
from torch import Tensor, nn

from pycoherence.capture.blocks import current
from pycoherence.capture.facts import Ids, Regular, recognise, regular_at


def mark_examples(x: Tensor, *, dim: int | None = 0, owner: Tensor | None = None) -> Tensor:
    """Say which example each element of a tensor belongs to, inside a block.

    By default the first dimension of what comes into a block is the batch. This says otherwise:
    that another dimension is, that several rows belong to one example (packed documents, the nodes
    of graphs), or that all examples share the tensor.

    Args:
        x: A tensor that the forward pass will use, as it is given to the model.
        dim: The dimension that is the batch; `None` if all examples share `x`, whatever its size.
        owner: In its place: the example of each row of `x`, `[x.shape[0]]` of whole numbers from 0,
            and -1 for rows that belong to none, such as padding. The number of examples is the
            largest of them plus 1, or that of the block if it is larger.

    Returns:
        `x` itself. Outside of a block nothing happens, so that a model may mark its inputs.

    Raises:
        ValueError: `dim` is no dimension of `x`, or `owner` is not one whole number for each row.
        TypeError: `x` is not a tensor.
        UnsupportedError: There are other numbers of examples than the block has.

    Cost: With `owner` it waits for the numbers.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> words, document = torch.eye(3), torch.tensor([0, 1, 1])  # two packed documents
        >>> with pc.collect(model, pc.SqNorms(), loss_reduction="sum") as record:
        ...     model(pc.mark_examples(words, owner=document)).sum().backward()
        >>> record.sq_norms
        tensor([1., 2.])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, got {type(x).__name__}")
    capture = current()
    if capture is None:
        return x
    with torch._C.DisableTorchFunction():
        return _mark(capture, x, dim, owner)


def _mark(capture: Any, x: Tensor, dim: int | None, owner: Tensor | None) -> Tensor:
    shape = tuple(x.shape)
    if isinstance(x, nn.Parameter):
        raise ValueError("expected a tensor of examples, got a parameter, which all examples share")
    if owner is not None:
        if not isinstance(owner, Tensor):
            raise TypeError(f"expected owner to be a tensor, got {type(owner).__name__}")
        if (
            owner.is_complex()
            or owner.shape != shape[:1]
            or owner.is_floating_point()
            or owner.dtype == torch.bool
        ):
            raise ValueError(
                f"expected owner to be one whole number for each of {shape[0] if shape else 0} "
                f"rows, got {owner.dtype} of shape {tuple(owner.shape)}"
            )
        if owner.numel() and int(owner.min()) < -1:
            raise ValueError(f"expected owners from 0, or -1 for none, got {int(owner.min())}")
        count = int(owner.max()) + 1 if owner.numel() else 0
        if capture.count is not None:
            count = max(count, capture.count)
        ids = owner.long().view(-1, *[1] * (x.dim() - 1))
        if x.dim() > 1 or len(ids) != 1:
            found = recognise(ids, shape, count, "mark_examples")
        else:
            found = None
        mine = Ids(ids, count) if found is None or not isinstance(found, (Ids, Regular)) else found
    elif dim is None:
        capture.mark_shared(x)
        return x
    else:
        if not isinstance(dim, int):
            raise TypeError(f"expected dim to be a whole number or None, got {dim!r}")
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"expected a dimension of a tensor of shape {shape}, got dim={dim}")
        mine = regular_at(shape, dim % x.dim(), 1, shape[dim])
    capture.settle(mine, x)
    capture.mark(x, mine)
    return x
