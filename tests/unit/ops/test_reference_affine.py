"""affine_reduce against autograd through scales, shifts and torch's normalisation functions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.materialised import assert_exactly, gradients
from support.strategies import dtypes, numbers, tails
from torch import Tensor

import pycoherence as pc


@st.composite
def calls(draw: st.DrawFn):
    dtype = draw(dtypes)
    b, t, c = (draw(st.integers(0, most)) for most in (5, 9, 20))
    g = draw(numbers((b, t, c), dtype))
    inputs: dict[str, Tensor] = {}
    if draw(st.booleans()):
        inputs["x"] = draw(numbers((b, t, c), dtype))
        for name in draw(st.sets(st.sampled_from(["mean", "rstd"]))):
            shape = [draw(st.sampled_from([1, size])) for size in (b, t, c)]
            inputs[name] = draw(numbers(shape, draw(dtypes), top=2))
    return g, inputs, draw(tails(b, (c,), dtype))


@given(calls())
def test_equals_materialised_gradients(call) -> None:
    g, inputs, tail = call
    wide = {name: value.double().expand(g.shape) for name, value in inputs.items()}

    def forward(parameter: Tensor, b: int) -> Tensor:
        if "x" not in wide:
            return parameter.expand(1, *g.shape[1:])
        part = {name: value[b : b + 1] for name, value in wide.items()}
        normal = (part["x"] - part.get("mean", 0.0)) * part.get("rstd", 1.0)
        return normal * parameter

    rows = gradients(forward, (g.shape[2],), g)
    assert_exactly("affine_reduce", lambda: pc.ops.affine_reduce(g, **inputs, **tail), rows, tail)


def factors(norm: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Input and output gradient `[B, T, C]`, and the statistics that normalise the input."""
    x, g = torch.randn(2, 4, 7, 6, dtype=torch.float64) * 3 + 1
    dims = {"layer": (2,), "instance": (1,), "group": None, "rms": (2,)}[norm]
    if norm == "rms":
        return x, g, {"rstd": (x.square().mean(2, keepdim=True) + 1e-5).rsqrt()}
    if norm == "group":
        grouped = x.unflatten(2, (3, 2))
        var, mean = torch.var_mean(grouped, (1, 3), correction=0, keepdim=True)
        mean, var = (s.expand(4, 1, 3, 2).flatten(2) for s in (mean, var))
    else:
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return x, g, {"mean": mean, "rstd": (var + 1e-5).rsqrt()}


def apply(norm: str, x: Tensor, weight: Tensor) -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, (6,), weight)
    if norm == "rms":
        return F.rms_norm(x, (6,), weight, eps=1e-5)
    if norm == "group":
        return F.group_norm(x.mT, 3, weight).mT
    return F.instance_norm(x.mT, weight=weight).mT


@pytest.mark.parametrize("norm", ["layer", "rms", "group", "instance"])
def test_equals_torch_normalisation(norm: str) -> None:
    x, g, statistics = factors(norm)
    rows = gradients(lambda w, b: apply(norm, x[b : b + 1], w), (6,), g)
    actual = pc.ops.affine_reduce(g, x, **statistics).sq_norms
    torch.testing.assert_close(actual, rows.square().sum(1), rtol=1e-11, atol=0)
