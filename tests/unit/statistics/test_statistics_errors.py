"""What the statistics refuse, before anything runs."""

from typing import Any

import pytest
import torch
from support.raising import Calls, raising
from torch import nn

import pycoherence as pc

MODEL = nn.Linear(3, 2)
WEIGHT, BIAS = torch.zeros(2, 3), torch.zeros(2)


def frozen_bias() -> nn.Module:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    return model


VALUE_ERRORS: Calls = {
    "name-of-a-mean": (
        lambda: pc.Dots("average"),
        r'a dict of tensors, or "mean", got \'average\'',
    ),
    "missing": (
        lambda: pc.collect(MODEL, pc.Dots({"weight": WEIGHT})),
        r"got none for \['bias'\]; give zeros",
    ),
    "unknown": (
        lambda: pc.collect(MODEL, pc.Dots({"weight": WEIGHT, "bias": BIAS, "b": BIAS})),
        r"got one for \['b'\], which are frozen or not in the model",
    ),
    "frozen": (
        lambda: pc.collect(frozen_bias(), pc.Dots({"weight": WEIGHT, "bias": BIAS})),
        r"require a gradient.*got one for \['bias'\]",
    ),
    "shape": (
        lambda: pc.collect(MODEL, pc.Dots({"weight": WEIGHT.mT, "bias": BIAS})),
        r"direction of 'weight' to have its shape \(2, 3\), got \(3, 2\)",
    ),
    "two-directions": (
        lambda: pc.collect(MODEL, pc.Dots("mean"), pc.Dots({"weight": WEIGHT, "bias": BIAS})),
        "each statistic once, got 2 of Dots; use a block for each",
    ),
    "twice": (lambda: pc.collect(MODEL, pc.Gram(), pc.Gram()), "got 2 of Gram"),
    "nothing": (lambda: pc.collect(MODEL), "one or more statistics"),
}

TYPE_ERRORS: Calls = {
    "list": (lambda: pc.Dots([WEIGHT]), r'a dict of tensors, or "mean", got list'),
    "tensor": (lambda: pc.Dots(WEIGHT), "got Tensor"),
    "number": (
        lambda: pc.collect(MODEL, pc.Dots({"weight": 1.0, "bias": BIAS})),
        "direction of 'weight' to be a tensor, got 1.0",
    ),
    "integer": (
        lambda: pc.collect(MODEL, pc.Dots({"weight": WEIGHT.long(), "bias": BIAS})),
        "direction of 'weight' to be floating on cpu, got torch.int64",
    ),
    "device": (
        lambda: pc.collect(MODEL, pc.Dots({"weight": WEIGHT, "bias": BIAS.to("meta")})),
        "direction of 'bias' to be floating on cpu, got torch.float32 on meta",
    ),
    "class": (lambda: pc.collect(MODEL, pc.Moments), r"got a class; write Moments\(\)"),
}

test_value_errors = raising(ValueError, VALUE_ERRORS)
test_type_errors = raising(TypeError, TYPE_ERRORS)


@pytest.mark.parametrize(
    ("result", "statistic"),
    [
        ("sq_norms", "SqNorms"),
        ("gram", "Gram"),
        ("dots", "Dots"),
        ("first_moment", "Moments"),
        ("second_moment", "Moments"),
        ("sign_sum", "SignSum"),
    ],
)
def test_what_was_not_asked_for_says_what_to_add(result: str, statistic: str) -> None:
    other = pc.SignSum() if result != "sign_sum" else pc.Gram()
    with pc.collect(MODEL, other) as record:
        MODEL(torch.ones(4, 3)).sum().backward()
    message = rf"{result} was not asked for; add pc\.{statistic}\("
    with pytest.raises(AttributeError, match=message):
        getattr(record.by_parameter["weight"], result)
    with pytest.raises(AttributeError, match=message):
        getattr(record, result)


@pytest.mark.parametrize("result", ["first_moment", "second_moment", "sign_sum"])
def test_what_has_no_total_says_where_it_is(result: str) -> None:
    with pc.collect(MODEL, pc.Moments(), pc.SignSum()) as record:
        MODEL(torch.ones(4, 3)).sum().backward()
    with pytest.raises(AttributeError, match=rf"read record\.by_parameter\[name\]\.{result}$"):
        getattr(record, result)


def test_coherence_needs_norms() -> None:
    with pc.collect(MODEL, pc.Gram()) as record:
        MODEL(torch.ones(4, 3)).sum().backward()
    with pytest.raises(AttributeError, match=r"add pc\.SqNorms\(\)"):
        record.coherence()


@pytest.mark.parametrize("statistic", [pc.Gram(), pc.Dots("mean"), pc.Moments(), pc.SignSum()])
def test_nothing_can_be_read_before_the_backward_pass(statistic: Any) -> None:
    with pc.collect(MODEL, statistic) as record:
        with pytest.raises(RuntimeError, match="no parameter of the model was used"):
            _ = record.by_parameter
        loss = MODEL(torch.ones(4, 3)).sum()
        with pytest.raises(RuntimeError, match="no backward pass has run on this batch of 4"):
            _ = record.by_parameter
        loss.backward()
    assert record.by_parameter.keys() == {"weight", "bias"}
