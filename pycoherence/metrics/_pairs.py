"""Pairs of gradients: checks of a Gram matrix, and similarities computed from it."""

from typing import Literal

import torch
from torch import Tensor

from pycoherence.metrics._arguments import to_tensor

Similarity = Literal["cos", "dot", "sign"]


def to_gram(caller: str, gram: Tensor) -> Tensor:
    """`gram` in float32 or better after checking that it is square."""
    square = to_tensor(caller, "gram", gram)
    if square.dim() != 2 or square.shape[0] != square.shape[1]:
        raise ValueError(
            f"{caller}: expected gram [B, B], got shape {list(square.shape)}; "
            "pass the dot products of one sample's gradients with each other"
        )
    return square


def similarity(
    caller: str, gram: Tensor, kind: Similarity, kinds: tuple[Similarity, ...]
) -> Tensor:
    """The similarity of each pair, `[B, B]`, for a kind among `kinds`."""
    square = to_gram(caller, gram)
    if kind not in kinds:
        raise ValueError(f"{caller}: expected kind to be one of {kinds}, got {kind!r}; pass one")
    if kind == "cos":
        norms = square.diagonal().sqrt()
        return divide_by_norms(square, norms, norms)
    return signs(square) if kind == "sign" else square


def signs(values: Tensor) -> Tensor:
    """The signs, with nan where a value is nan (`Tensor.sign` makes it 0)."""
    return torch.where(values.isnan(), values, values.sign())


def divide_by_norms(gram: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`gram` `[B1, B2]` divided by both norms, `[B1]` and `[B2]`: the cosines."""
    return gram / (rows.unsqueeze(1) * columns)


def off_diagonal_mean(pairs: Tensor) -> Tensor:
    """The mean over all pairs of different examples; nan when there are none."""
    n = len(pairs)
    return pairs.clone().fill_diagonal_(0).sum() / (n * (n - 1))
