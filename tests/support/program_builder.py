"""A module that is being written, for random programs (`programs.py`).

`Builder` keeps the lines of its source, and where the examples are in the tensor `h` that the steps
(`program_steps.py`) change. All that is drawn comes from one function `choose(n)`, an integer below
n, of which 0 is the simplest choice.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")
Choose = Callable[[int], int]


class Layout(NamedTuple):
    """Where the examples are in `h`, and what is left to undo.

    Index i of dimension `batch` belongs to example `order[(i // inner) % B]`, and the dimension has
    `outer * B * inner` of them. `shape` has `outer * inner` in that place.
    """

    shape: tuple[int, ...]
    batch: int = 0
    outer: int = 1
    inner: int = 1
    undo: str = ""
    """What puts the rows back in order, where `{h}` and `{d}` stand for tensor and dimension."""


class Builder:
    """A module that is being written."""

    def __init__(self, choose: Choose, can_mark: bool) -> None:
        self.choose = choose
        self.can_mark = can_mark
        self.init: list[str] = []
        self.forward: list[str] = []
        self.parameters: dict[tuple[int, ...], list[str]] = {}
        self.layers: dict[str, str] = {}
        self.saved: list[tuple[str, Layout]] = []
        self.ids = ""
        self.names = 0
        self.batch_size = self.pick([3, 2, 4, 5, 1])
        self.at = Layout(())

    def pick(self, options: Iterable[Item]) -> Item:
        options = list(options)
        return options[self.choose(len(options)) if len(options) > 1 else 0]

    def size(self, least: int = 1) -> int:
        b = self.batch_size
        return self.pick(n for n in (2, b, 3, b, b, 1, 4, 5) if n >= least)

    def name(self, prefix: str) -> str:
        self.names += 1
        return f"{prefix}{self.names}"

    def emit(self, line: str) -> None:
        self.forward.append(line)

    # The layout

    @property
    def shape(self) -> tuple[int, ...]:
        return self.at.shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def first(self) -> bool:
        """Whether the examples are in the first dimension, perhaps with more in it."""
        return self.at.batch == 0

    @property
    def plain(self) -> bool:
        """Whether each index of the batch dimension is one example."""
        return self.at.outer == self.at.inner == 1

    @property
    def free(self) -> list[int]:
        """Dimensions without examples."""
        return [d for d in range(self.rank) if d != self.at.batch]

    def ends_free(self, count: int = 1) -> bool:
        """Whether the last dimensions have no examples, and there are others."""
        return self.at.batch < self.rank - count

    def set(self, line: str | None, shape: Sequence[int], batch: int | None = None) -> None:
        """One step: `h` is this expression, of this shape."""
        if line is not None:
            self.emit(f"h = {line}")
        batch = self.at.batch if batch is None else batch
        self.at = self.at._replace(shape=tuple(shape), batch=batch)

    def resized(self, dim: int, *sizes: int) -> tuple[list[int], int]:
        """The shape with some dimensions in place of one, and where the batch is then."""
        shape = [*self.shape[:dim], *sizes, *self.shape[dim + 1 :]]
        return shape, self.at.batch + (len(sizes) - 1 if self.at.batch > dim else 0)

    def rows(self) -> str:
        n = self.at.outer * self.at.inner
        return "B" if n == 1 else f"{n} * B"

    def sizes(self, shape: Sequence[int] | None = None, rows: str | None = None) -> str:
        """The sizes of a tensor with the batch where `h` has it, in Python."""
        shape = self.shape if shape is None else shape
        rows = self.rows() if rows is None else rows
        return ", ".join(rows if d == self.at.batch else str(n) for d, n in enumerate(shape))

    def dim(self, d: int) -> int:
        return self.pick([d, d - self.rank])

    # Parameters and layers

    def leaf(self, *shape: int) -> str:
        known = self.parameters.setdefault(shape, [])
        if known and self.choose(4) == 0:
            return self.pick(known)
        known.append("self." + self.name("p"))
        self.init.append(f"{known[-1]} = nn.Parameter(torch.randn({shape}))")
        return known[-1]

    def layer(self, made: str) -> str:
        if made not in self.layers or self.choose(3) == 0:
            self.layers[made] = "self." + self.name("layer")
            self.init.append(f"{self.layers[made]} = {made}")
        return self.layers[made]

    def weight(self, *shape: int) -> str:
        """A parameter, or what is made of parameters."""
        if self.choose(3) < 2 or not shape:
            return self.leaf(*shape)
        n, rest = shape[0], shape[1:]
        return self.pick(makers(n, rest))(self, n, rest)

    def used(self) -> tuple[list[str], list[str]]:
        """The lines of `__init__` and `forward` without parameters that nothing uses."""
        init, forward, before = self.init, self.forward, -1
        while before != len(forward):
            before = len(forward)
            forward = [line for line in forward if needed(line, forward)]
        return [line for line in init if needed(line, forward + init)], forward

    def broadcast(self) -> tuple[int, ...]:
        """Shape of a tensor without examples that broadcasts to `h`."""
        chosen = [d for d in self.free if self.choose(3) < 2]
        shape = [n if d in chosen else 1 for d, n in enumerate(self.shape)]
        while shape and shape[0] == 1 and self.choose(2):
            shape.pop(0)
        return tuple(shape)


def needed(line: str, lines: list[str]) -> bool:
    """Whether what a line assigns to, if it is a name with a number, is in a line that does not."""
    found = re.match(r"((?:self\.)?[a-z]+\d+)\b", line)
    if not found:
        return True
    name = re.escape(found[1]) + r"\b"
    others = [x for x in lines if not re.match(name, x)]
    return any(re.search(r"(?<![\w.])" + name, x) for x in others)


Make = Callable[[Builder, int, tuple[int, ...]], str]


def makers(n: int, rest: tuple[int, ...]) -> list[Make]:
    """Ways to make a tensor `[n, *rest]` of parameters."""

    def assembled(b: Builder, n: int, rest: tuple[int, ...]) -> str:
        name, a, other = b.name("w"), b.leaf(n, *rest), b.leaf(1, *rest)
        b.emit(f"{name} = {a}.clone()")
        forms = [f"{name} += {other}", f"{name}[:1] = {other}", f"{name}.mul_({other})"]
        b.emit(b.pick([*forms, f"{name}[0].add_({other}[0])"]))
        return name

    def slices(b: Builder, n: int, rest: tuple[int, ...]) -> str:
        stack = b.leaf(2, n, *rest)
        return b.pick([f"{stack}[1]", f"{stack}.unbind(0)[0]", f"{stack}.sum(0)"])

    found: list[Make] = [
        lambda b, n, rest: f"({b.leaf(n, *rest)} * {b.leaf(*b.pick([(), rest, (n, *rest)]))})",
        lambda b, n, rest: f"{b.leaf(n, *rest)}.{b.pick(['tanh', 'exp', 'sin', 'clone'])}()",
        slices,
        lambda b, n, rest: f"{b.leaf(n + 1, *rest)}[1:]",
        lambda b, n, rest: f"{b.leaf(n + 1, *rest)}[torch.arange({n}).flip(0)]",
        lambda b, n, rest: f"{b.leaf(n * math.prod(rest))}.view({(n, *rest)})",
        lambda b, n, rest: f"{b.leaf(1, *rest)}.expand({(n, *rest)})",
        lambda b, n, rest: f"{b.leaf(1, *rest)}.repeat({(n, *[1] * len(rest))})",
        lambda b, n, rest: f"torch.cat([{b.leaf(1, *rest)}, {b.leaf(n, *rest)}])[:{n}]",
        assembled,
    ]
    if rest:
        turned = (rest[0], n, *rest[1:])
        found.append(lambda b, n, rest: f"{b.leaf(*turned)}.transpose(0, 1)")
        found.append(lambda b, n, rest: f"{b.leaf(*turned)}.reshape({(n, *rest)})")
    if len(rest) == 1:
        found += [
            lambda b, n, rest: f"({b.leaf(n, 2)} @ {b.leaf(2, *rest)})",
            lambda b, n, rest: f"({b.leaf(n, *rest)} + {b.leaf(n, 1)} @ {b.leaf(1, *rest)})",
            lambda b, n, rest: f"{b.leaf(*rest, n)}.t()",
            # The direction of a single number has no gradient but rounding.
            lambda b, n, rest: f"F.normalize({b.leaf(n + (n == 1), *rest)}, dim=0)[:{n}]",
        ]
    return found
