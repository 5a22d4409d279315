"""The rows of docs/models.md; `python tests/table.py` writes the page."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import rows
import torch
from oracle import LossFn
from torch import Tensor, nn

B = 4
"""Examples of every row."""

PAGE = Path(__file__).parent.parent / "docs/models.md"

INTRODUCTION = """\
# Models

What `collect`, `aggregate` and the other verbs make of models, by what these use. Each row is a
test: norms, Gram matrix, weighted sums and `.grad` agree with autograd on one example at a time, in
float64, to 1e-9. `python tests/table.py` writes this page.

- **exact**: measured in the pass itself.
- **exact, with `on_unsupported="vmap"`**: refused unless you ask for it; the gradients of the
  parameters in question are then made example by example, `B` times their size in memory, and
  `record.fallbacks` names them.
- **refused**: the error says which parameter, where, and what to do.

How passes may be run (losses, autocast, checkpointing, accumulation, compiled and parallel models)
is in [passes](passes.md), each line a test too.
"""

Outcome = Literal["exact", "vmap", "refused"]


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


class Uses(nn.Module):
    """Parameters or modules by name, and a function of them and the input."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self._function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                part = nn.Parameter(part)
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self, *inputs)


def uses(function: Callable[..., Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Builds a model of parts that are built anew each time."""
    return lambda: Uses(function, **{name: part() for name, part in parts.items()})


def normal(*shape: int) -> Callable[[], Tensor]:
    """Builds a tensor of normal numbers."""
    return lambda: torch.randn(shape)


def all_rows() -> list[Row]:
    """Those of all files, in their order."""
    names = sorted(module.name for module in pkgutil.iter_modules(rows.__path__))
    return [row for name in names for row in importlib.import_module(f"rows.{name}").ROWS]


def page() -> str:
    """The page."""
    words = {"exact": "exact", "vmap": 'exact, with `on_unsupported="vmap"`', "refused": "refused"}
    lines, topic = [INTRODUCTION.rstrip()], ""
    for row in all_rows():
        if row.topic != topic:
            topic = row.topic
            lines += ["", f"## {topic}", "", "| what | outcome | note |", "|---|---|---|"]
        lines.append(f"| {row.name} | {words[row.outcome]} | {row.note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
