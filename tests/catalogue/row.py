"""A row of docs/models.md, and how the models of rows are written down."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from support.oracle import LossFn
from torch import Tensor, nn

import pycoherence as pc

B = 4
"""Examples of every row."""

Outcome = Literal["exact", "fallback", "refused"]
Function = Callable[..., Any]
Inputs = Callable[[], Any] | dict[str, Callable[[], Any]]


def squares(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """A mean over examples of a loss whose output gradients differ in every number."""
    out = model(*batch)
    out = out[0] if isinstance(out, tuple) else out
    flat = out.reshape(len(out), -1)
    target = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
    return (flat - target).square().sum(1).mean()


@dataclass(frozen=True)
class Row:
    """One thing that models do.

    Attributes:
        topic: Heading of the table it stands in.
        name: What it is, in Markdown.
        build: The model, in any dtype.
        inputs: Its batch, floating numbers in any dtype.
        outcome: What becomes of it.
        loss: Of the model and a batch, a mean over the examples.
        says: Pattern in the error of one that is refused.
        note: What a user has to know, in Markdown.
        context: What the pass runs in.
    """

    topic: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    outcome: Outcome = "exact"
    loss: LossFn = squares
    says: str = ""
    note: str = ""
    context: Callable[[], Any] | None = field(default=None, repr=False)

    @property
    def batch(self) -> tuple[Tensor, ...]:
        """The inputs as a tuple."""
        found = self.inputs()
        return found if isinstance(found, tuple) else (found,)

    def in_float64(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model and its batch."""
        model = self.build().double()
        return model, tuple(x.double() if x.is_floating_point() else x for x in self.batch)


class Uses(nn.Module):
    """Parameters, buffers or modules by name, and a function of them and the input.

    A tensor becomes a parameter, but for whole numbers, which stay plain attributes.
    """

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._function = function
        for name, part in parts.items():
            made = isinstance(part, (nn.Parameter, nn.Buffer))
            if isinstance(part, Tensor) and part.is_floating_point() and not made:
                part = nn.Parameter(part)
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self, *inputs)


def uses(function: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Builds a model of parts that are built anew each time."""
    return lambda: Uses(function, **{name: part() for name, part in parts.items()})


class Topic:
    """A table of docs/models.md: `add` gives it a row, and so does what it decorates.

    A decorated function is a model, of the parts that are named beside the row's name and inputs:

        @TOPIC("a layer called twice", features, a=linear(6, 6))
        def twice(m, x):
            return m.a(m.a(x))
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[Row] = []

    def add(
        self, name: str, build: Callable[[], nn.Module], inputs: Inputs, *args: Any, **options: Any
    ) -> None:
        """Adds a row, or one for each of several inputs, whose keys are what the name ends with."""
        for end, given in (inputs if isinstance(inputs, dict) else {"": inputs}).items():
            self.rows.append(Row(self.name, name + end, build, given, *args, **options))

    def __call__(
        self,
        name: str,
        inputs: Inputs,
        outcome: Outcome = "exact",
        /,
        *,
        says: str = "",
        note: str = "",
        **parts: Callable[[], Any],
    ) -> Callable[[Function], Function]:
        """Adds the row of a function, which stays as it is."""

        def decorate(function: Function) -> Function:
            self.add(name, uses(function, **parts), inputs, outcome, says=says, note=note)
            return function

        return decorate


def linear(inputs: int, outputs: int, bias: bool = True) -> Callable[[], nn.Module]:
    """Builds a linear layer."""
    return lambda: nn.Linear(inputs, outputs, bias)


def frozen(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Builds a part that is not trained."""
    return lambda: build().requires_grad_(False)


def buffer(tensor: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Builds what a model keeps and does not train."""
    return lambda: nn.Buffer(tensor())


def mark(x: Tensor, **how: Any) -> Tensor:
    """The same tensor, of which is said whose examples its rows are."""
    # An older library has no such function; it then refuses, which is what the row reports.
    found = getattr(pc, "mark_examples", lambda x, **how: x)(x, **how)
    return x if found is None else found


def normal(*shape: int) -> Callable[[], Tensor]:
    """Builds a tensor of normal numbers."""
    return lambda: torch.randn(shape)


def ids(most: int, *shape: int) -> Callable[[], Tensor]:
    """Builds whole numbers `[B, *shape]` below `most`."""
    return lambda: torch.randint(most, (B, *shape))


def several(*builds: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """Builds the inputs of a model that takes more than one."""
    return lambda: tuple(build() for build in builds)


def embedding(rows: int, width: int) -> Callable[[], nn.Module]:
    """Builds a table."""
    return lambda: nn.Embedding(rows, width)
