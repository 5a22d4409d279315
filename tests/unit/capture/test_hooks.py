"""Hooks of the user's own see what they always see."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.checks import assert_norms, relative_error
from support.models import MODELS, classification, make
from support.oracle import per_example_gradients
from torch import Tensor, nn

import pycoherence as pc

# What each hook saw, by the name of the module or parameter that it is on.
Seen = dict[str, list[Tensor]]


def note(seen: Seen, name: str, *tensors: Tensor | None) -> None:
    seen.setdefault(name, []).extend(x.detach().clone() for x in tensors if x is not None)


def forward_hooks(model: nn.Module, seen: Seen) -> None:
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, n=name: note(seen, n, *args, out))


def backward_hooks(model: nn.Module, seen: Seen) -> None:
    for name, module in model.named_modules():
        module.register_full_backward_hook(lambda m, i, o, n=name: note(seen, n, *i, *o))


def output_hooks(model: nn.Module, seen: Seen) -> None:
    for name, module in model.named_modules():

        def install(m: nn.Module, args: tuple[Tensor, ...], out: Tensor, n: str = name) -> None:
            out.register_hook(lambda g: note(seen, n, g))

        module.register_forward_hook(install)


def parameter_hooks(model: nn.Module, seen: Seen) -> None:
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, n=name: note(seen, n, g))


def accumulation_hooks(model: nn.Module, seen: Seen) -> None:
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, n=name: note(seen, n, p.grad))


HOOKS: list[Callable[[nn.Module, Seen], None]] = [
    forward_hooks,
    backward_hooks,
    output_hooks,
    parameter_hooks,
    accumulation_hooks,
]


def out_of_place(model: nn.Module) -> nn.Module:
    """torch forbids backward hooks around activations in place."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("install", HOOKS, ids=lambda hook: hook.__name__)
def test_hooks_see_what_they_always_see(
    install: Callable[[nn.Module, Seen], None], name: str
) -> None:
    model, batch = make(name, torch.float64)
    plain = copy.deepcopy(out_of_place(model))
    ours, theirs = Seen(), Seen()
    install(model, ours)
    install(plain, theirs)
    classification("mean")(plain, batch).backward()
    with pc.collect(model, pc.SqNorms()) as record:
        classification("mean")(model, batch).backward()
    # Positions are looked up once for all examples and then again for each, without its hooks.
    theirs.pop("position", None)
    assert set(ours) - {"position"} == set(theirs) != set()
    for label, tensors in theirs.items():
        for one, other in zip(ours[label], tensors, strict=True):
            assert relative_error(one, other) < 1e-9, label
    gradients = per_example_gradients(plain, classification("mean"), batch)
    assert_norms(record, gradients, 1e-10)


def test_a_retained_gradient_is_the_plain_one() -> None:
    model, (inputs, labels) = make("mlp", torch.float64)
    found = []
    for captured in (False, True):
        with pc.collect(model, pc.SqNorms()) if captured else torch.enable_grad():
            hidden = model[0](inputs)
            hidden.retain_grad()
            out = nn.Sequential(*list(model)[1:])(hidden)
            nn.functional.cross_entropy(out, labels).backward()
        found.append(hidden.grad)
    assert relative_error(*found) < 1e-12


def test_an_optimizer_in_the_backward_pass() -> None:
    """Stepping and freeing each gradient as soon as it is there."""
    model, batch = make("mlp", torch.float64)
    plain = copy.deepcopy(model)
    gradients = per_example_gradients(model, classification("mean"), batch)
    for net in (plain, model):
        for parameter in net.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.1)

            def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
    classification("mean")(plain, batch).backward()
    with pc.collect(model, pc.SqNorms()) as record:
        classification("mean")(model, batch).backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative_error(ours, expected) < 1e-12
        assert ours.grad is None
    assert_norms(record, gradients, 1e-10)
