"""Random models against the oracle; `python tests/programs.py --count 20000` runs many.

A program is the source of a module that never mixes examples, by construction: each of its steps
(`support/program_steps.py`) knows where the examples are. So the capture has to be exact on it, or
refuse.
"""

import argparse
import copy
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from support.oracle import per_example_gradients
from support.plain_rules import coordinates
from support.program_builder import Builder, Choose
from support.program_steps import finish, inputs, write_steps
from torch import Tensor, nn

import pycoherence as pc

TOLERANCE = 1e-8
"""Relative to the largest number of a parameter."""

CAN_MARK = hasattr(pc, "mark_examples")

HEAD = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

class Program(nn.Module):
    def __init__(self):
        super().__init__()
        {init}

    def forward(self, {names}):
        {forward}

torch.manual_seed(0)
model = Program().double()
batch = ({batch},)

def loss_fn(model, batch):
    out = model(*batch)
    target = torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)
    return (out - target).square().sum(1).mean()
"""

TAIL = """
import pycoherence as pc

with pc.collect(model, pc.SqNorms()) as record:
    {mark}loss_fn(model, batch).backward()
truth = []
for b in range({size}):
    model.zero_grad()
    loss_fn(model, tuple({cut} for x in batch)).backward()
    grads = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    truth.append([grad.square().sum().item() for grad in grads])
for (name, one), expected in zip(record.by_parameter.items(), zip(*truth)):
    print(name, one.sq_norms.tolist(), list(expected))
"""


@dataclass(frozen=True)
class Program:
    """The source of a module, its batch and its loss.

    Attributes:
        head: Python that defines `model`, `batch` and `loss_fn(model, batch)`.
        marked: Whether the batch has the examples second, and is to be marked.
        size: Examples in the batch.
    """

    head: str
    marked: bool
    size: int

    def __repr__(self) -> str:
        mark = "[pc.mark_examples(x, dim=1) for x in batch]\n    " * self.marked
        cut = "x[:, b : b + 1]" if self.marked else "x[b : b + 1]"
        return "\n" + self.head + TAIL.format(mark=mark, cut=cut, size=self.size)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what hypothesis shows


def program(choose: Choose) -> Program:
    """The program of some choices: `choose(n)` is an integer below n."""
    builder = Builder(choose, CAN_MARK)
    batch = inputs(builder)
    marked = CAN_MARK and not builder.can_mark
    write_steps(builder)
    finish(builder)
    init, forward = builder.used()
    if marked:
        batch = [f"{x}.transpose(0, 1).contiguous()" for x in batch]
    parts = {"init": "\n        ".join(init), "forward": "\n        ".join(forward)}
    names = ", ".join("xy"[: len(batch)])
    head = HEAD.format(names=names, batch=", ".join(batch), **parts)
    return Program(head, marked, builder.batch_size)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    return program(lambda n: draw(st.integers(0, n - 1)))


class Outcome(NamedTuple):
    """What became of a program.

    `kind` is "exact", "refused", "wrong", "crash", or "discarded" if plain autograd cannot tell.
    """

    kind: str
    says: str = ""
    fallbacks: bool = False


Gradients = dict[str, Tensor]


def outcome(program: Program, **options: Any) -> Outcome:
    """Runs a program one example at a time and in the capture, with these options for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Casting complex")  # torch gives it once in a process
        scope: dict[str, Any] = {}
        exec(program.head, scope)
        model, loss_fn, batch = scope["model"], scope["loss_fn"], scope["batch"]
        try:
            truth = truth_of(model, loss_fn, batch, program.marked)
        except Exception as error:
            return Outcome("discarded", f"{type(error).__name__}: {error}")
        if isinstance(truth, str):
            return Outcome("discarded", truth)
        try:
            says, fallbacks = compared(model, loss_fn, batch, program, truth, options)
        except pc.UnsupportedError as error:
            return Outcome("refused", str(error))
        except Exception as error:
            return Outcome("crash", f"{type(error).__name__}: {error}")
        if says and shaky(model, loss_fn, batch, program.marked, truth):
            return Outcome("discarded", "ill-conditioned")
        return Outcome("wrong" if says else "exact", says, fallbacks)


def alone(loss_fn: Any, model: nn.Module, batch: Any, marked: bool) -> Gradients:
    """Gradient of each example, by the oracle, which cuts the first dimension."""
    if not marked:
        return per_example_gradients(model, loss_fn, batch)
    turned = tuple(x.transpose(0, 1) for x in batch)
    return per_example_gradients(
        model, lambda m, one: loss_fn(m, tuple(x.transpose(0, 1) for x in one)), turned
    )


def truth_of(model: nn.Module, loss_fn: Any, batch: Any, marked: bool) -> Gradients | str:
    """Gradient of each example, or why that cannot be told."""
    plain = copy.deepcopy(model)
    loss_fn(plain, batch).backward()
    truth = alone(loss_fn, model, batch, marked)
    total = sum(g.square().sum().item() for g in truth.values())
    if not 1e-6 < total < 1e16:
        return "no gradient, or a large one"
    losses = [loss_fn(model, one).item() for one in cut(batch, marked)]
    if abs(sum(losses) / len(losses) - loss_fn(model, batch).item()) > 1e-8 * max(losses):
        return "examples that are mixed: a fault of the step"
    for name, p in plain.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        if p.requires_grad and off(grad, truth[name].mean(0), scale_of(truth, name, 1)) > 1e-10:
            return "ill-conditioned"
    return truth


def cut(batch: Any, marked: bool) -> list[tuple[Tensor, ...]]:
    """The examples, each a batch of one."""
    parts = [x.split(1, int(marked)) for x in batch]
    return list(zip(*parts, strict=True))


def scale_of(truth: Gradients, name: str, power: int) -> float:
    """Largest norm of a gradient of one parameter; not below the noise of all of them."""
    norms = {n: g.reshape(len(g), -1).norm(dim=1).max().item() for n, g in truth.items()}
    return max(norms[name], 1e-5 * max(norms.values())) ** power


def off(actual: Tensor, expected: Tensor, scale: float) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    error = (actual.detach().double() - expected).abs().max().item() / scale
    return float("inf") if error != error else error


def shaky(model: nn.Module, loss_fn: Any, batch: Any, marked: bool, truth: Gradients) -> bool:
    """Whether the truth jumps when the parameters move by rounding errors."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in moved.parameters():
            p += 1e-12 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    again = alone(loss_fn, moved, batch, marked)
    return any(off(again[n], truth[n], scale_of(truth, n, 1)) > TOLERANCE for n in truth)


def compared(
    model: nn.Module, loss_fn: Any, batch: Any, program: Program, truth: Gradients, options: Any
) -> tuple[str, bool]:
    """What is wrong, if anything, and whether something was made example by example."""
    measured, robust = copy.deepcopy(model), copy.deepcopy(model)
    with pc.collect(measured, pc.SqNorms(), pc.Gram(), **options) as record:
        loss_fn(measured, marks(batch, program)).backward()
    if record.batch_size != program.size:
        return f"batch_size is {record.batch_size}", False
    rows = {name: g.reshape(len(g), -1) for name, g in truth.items()}
    found: list[tuple[str, Tensor, Tensor, float]] = []
    for name, p in measured.named_parameters():
        if p.requires_grad:
            one, expected, square = record.by_parameter[name], rows[name], scale_of(truth, name, 2)
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            found.append((f"{name}.grad", grad, truth[name].mean(0), square**0.5))
            found.append((f"norms of {name}", one.sq_norms, expected.square().sum(1), square))
            found.append((f"Gram of {name}", one.gram, expected @ expected.T, square))
    everything = torch.cat([*rows.values()], 1)
    square = everything.square().sum(1).max().item()
    found.append(("total norms", record.sq_norms, everything.square().sum(1), square))
    found.append(("total Gram", record.gram, everything @ everything.T, square))
    if program.size >= 3:
        with pc.aggregate(robust, pc.Winsorized(1), **options):
            loss_fn(robust, marks(batch, program)).backward()
        for name, p in robust.named_parameters():
            if p.requires_grad:
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                expected = coordinates("winsorized_mean", 1)(rows[name]).view_as(p)
                found.append((f"Winsorized {name}", grad, expected, scale_of(truth, name, 1)))
    errors = [(what, off(actual, expected, scale)) for what, actual, expected, scale in found]
    says = ", ".join(f"{what} off by {error:.2g}" for what, error in errors if error > TOLERANCE)
    return says, bool(getattr(record, "fallbacks", ()))


def marks(batch: Any, program: Program) -> Any:
    """The batch, marked if its examples are not first."""
    if not program.marked:
        return batch
    marked = [pc.mark_examples(x, dim=1) for x in batch]  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(x if y is None else y for x, y in zip(batch, marked, strict=True))


def group_of(found: Outcome) -> str:
    """The part of what an outcome says that does not depend on names and numbers."""
    if found.kind == "wrong":
        return ", ".join(dict.fromkeys(re.findall(r"grad|norms|batch_size|Winsorized", found.says)))
    says = re.sub(r"^parameter .*?(used by|: )", r"\1", found.says.split("\n")[0])
    says = re.sub(r"'[^']*'|\"[^\"]*\"", "'..'", says).split(" What to do")[0]
    return re.sub(r"[(\[]*-?\d[\d., ]*[)\]]*", "# ", says)[:150]


def form_of(program: Program) -> str:
    """The forward pass without names and numbers, to tell failures of one kind."""
    forward = program.head.partition("def forward")[2].partition("torch.manual_seed")[0]
    return re.sub(r"\d+|[pcw]\d+", "#", forward)


def recorded(seed: int) -> tuple[Program, list[int]]:
    """A random program, and the choices that it came from."""
    rng, choices = random.Random(seed), []

    def choose(n: int) -> int:
        choices.append(rng.randrange(n))
        return choices[-1]

    return program(choose), choices


def replayed(choices: list[int]) -> Program:
    rest = iter(choices)
    return program(lambda n: min(next(rest, 0), n - 1))


def shrunk(choices: list[int], fails: Callable[[Program], bool]) -> Program:
    """The program of fewer and smaller choices that still fails."""

    before: list[int] = []
    while before != choices:
        before = choices
        for width in (16, 8, 4, 2, 1):
            for i in reversed(range(len(choices))):
                shorter = choices[:i] + choices[i + width :]
                if len(shorter) < len(choices) and fails(replayed(shorter)):
                    choices = shorter
        for i in range(len(choices)):
            for smaller in (0, choices[i] // 2, choices[i] - 1):
                lower = [*choices[:i], smaller, *choices[i + 1 :]]
                if 0 <= smaller < choices[i] and fails(replayed(lower)):
                    choices = lower
    return replayed(choices)


class Summary:
    """What became of many programs.

    Attributes:
        counts: How many of each kind.
        groups: How many of each kind and message.
        failures: What is printed of each that is wrong or crashes.
        fallbacks: How many of the exact ones have gradients made example by example.
    """

    def __init__(self) -> None:
        self.counts, self.groups = Counter[str](), Counter[tuple[str, str]]()
        self.failures: list[str] = []
        self.fallbacks = 0
        self._shrunk: list[str] = []

    def run(self, seed: int, show: int, **options: Any) -> None:
        """One program; of the first few that fail in different ways also its smallest form."""
        made, choices = recorded(seed)
        found = outcome(made, **options)
        group = (found.kind, group_of(found))
        self.counts[found.kind] += 1
        self.groups[group] += 1
        self.fallbacks += found.fallbacks
        if found.kind not in ("wrong", "crash"):
            return
        text = f"seed {seed}: {found.kind}: {found.says[:200]}"
        if len(self._shrunk) < show:

            def fails(program: Program) -> bool:
                one = outcome(program, **options)
                return (one.kind, group_of(one)) == group

            small = shrunk(choices, fails)
            self._shrunk.append(form_of(small))
            if self._shrunk.count(form_of(small)) == 1:
                text += f"\nshrunk: {outcome(small, **options).says[:200]}\n{small!r}"
        self.failures.append(text)
        print(text, flush=True)

    def __str__(self) -> str:
        lines = [f"{n:6} {kind:9} {says}" for (kind, says), n in self.groups.most_common() if says]
        kinds = ("exact", "refused", "wrong", "crash", "discarded")
        lines.append(", ".join(f"{self.counts[kind]} {kind}" for kind in kinds))
        lines.append(f"{self.fallbacks} with gradients made example by example")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Random models against one example at a time.")
    parser.add_argument("--count", type=int, default=1000, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first; each next has one more")
    parser.add_argument("--show", type=int, default=20, help="failures to shrink")
    parser.add_argument("--on-unsupported", help="as in pc.collect")
    options = parser.parse_args()
    extra = {"on_unsupported": options.on_unsupported} if options.on_unsupported else {}
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)
    summary = Summary()
    for seed in range(options.seed, options.seed + options.count):
        summary.run(seed, options.show, **extra)
    print(summary)


if __name__ == "__main__":
    main()
