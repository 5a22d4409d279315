"""The statistics of `collect`, and what each must say of known per-example gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import pycoherence as pc

Gradients = Mapping[str, Tensor]
PER_EXAMPLE = ("sq_norms", "gram", "dots")


def direction_for(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def mean_dots(g: Gradients, directions: Gradients) -> dict[str, dict[str, Tensor]]:
    return {"dots": {n: x.flatten(1) @ x.mean(0).flatten() for n, x in g.items()}}


def dots(g: Gradients, directions: Gradients) -> dict[str, dict[str, Tensor]]:
    return {
        "dots": {n: x.flatten(1) @ directions[n].double().flatten() for n, x in g.items()},
    }


def moments(g: Gradients, directions: Gradients) -> dict[str, dict[str, Tensor]]:
    return {
        "first_moment": {n: x.mean(0) for n, x in g.items()},
        "second_moment": {n: x.square().mean(0) for n, x in g.items()},
    }


def sq_norms(g: Gradients, directions: Gradients) -> dict[str, dict[str, Tensor]]:
    return {"sq_norms": {n: x.flatten(1).square().sum(1) for n, x in g.items()}}


def gram(g: Gradients, directions: Gradients) -> dict[str, dict[str, Tensor]]:
    return {"gram": {n: x.flatten(1) @ x.flatten(1).mT for n, x in g.items()}}


def sign_sum(g: Gradients, directions: Gradients) -> dict[str, dict[str, Tensor]]:
    return {"sign_sum": {n: x.sign().sum(0) for n, x in g.items()}}


# What to ask for, from the direction, and what it should say, by result and parameter.
STATISTICS: dict[str, tuple[Callable[[Any], Any], Callable[..., dict[str, dict[str, Tensor]]]]] = {
    "sq_norms": (lambda direction: pc.SqNorms(), sq_norms),
    "gram": (lambda direction: pc.Gram(), gram),
    "dots": (pc.Dots, dots),
    "mean_dots": (lambda direction: pc.Dots("mean"), mean_dots),
    "moments": (lambda direction: pc.Moments(), moments),
    "sign_sum": (lambda direction: pc.SignSum(), sign_sum),
}
ALL = ("sq_norms", "gram", "mean_dots", "moments", "sign_sum")
RESULTS = {"sq_norms", "gram", "dots", "first_moment", "second_moment", "sign_sum"}
