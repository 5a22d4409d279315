"""Products of two tensors: `x @ p`, `p @ x`, `torch.einsum`, `bmm`, `mv`, `addmm` and their kin.

Every product of an input and a parameter is one formula over named dimensions. Letters of the
parameter that only the input shares are features I, those that only the output shares are outputs
O, and those that all three share are groups, such as heads. All other letters are rows.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from pycoherence.capture.context import CallContext, register_decomposition, register_function
from pycoherence.capture.dimensions import letters_of
from pycoherence.capture.facts import (
    EXAMPLES,
    PARAMETERS,
    Ids,
    Lost,
    along,
    ids_of,
    regular_at,
)
from pycoherence.capture.layer import Kept, LayerRule
from pycoherence.capture.propagation import dims_of_owner
from pycoherence.capture.rows import Rows
from pycoherence.capture.spread import spread
from pycoherence.capture.torch_internals import untracked_views
from pycoherence.sites import AffineSite, ConvSite, LinearSite, Site, Window


class Product(LayerRule):
    """`einsum("x,p->out")`, with one site whatever the letters.

    Args:
        x: Letters of the input: rows, groups, then features.
        p: Letters of the parameter.
        out: Letters of the result.
        rows: Letters of the rows.
        groups: Letters that input, parameter and result share.
        inner: Letters that input and parameter share.
        outer: Letters that parameter and result share.
    """

    def __init__(
        self, x: str, p: str, out: str, rows: str, groups: str, inner: str, outer: str
    ) -> None:
        self._x, self._p, self._out = x, p, out
        self._rows, self._groups, self._inner, self._outer = rows, groups, inner, outer
        self.features = len(groups) + len(inner)

    def forward(self, x: Tensor, p: Tensor) -> tuple[Tensor, Kept]:
        with untracked_views():
            return torch.einsum(f"{self._x},{self._p}->{self._out}", x, p), (x, p)

    def input_grad(self, g: Tensor, x: Tensor, p: Tensor) -> Tensor:
        return torch.einsum(f"{self._out},{self._p}->{self._x}", g, p)

    def rows_first(self, g: Tensor) -> Tensor:
        order = self._rows + self._groups + self._outer
        return g.permute([self._out.index(c) for c in order])

    def factors(self, rows: Rows, g: Tensor, x: Tensor, p: Tensor) -> tuple[Site]:
        sizes = dict(zip(self._p, p.shape, strict=True))
        n_in = prod(sizes[c] for c in self._inner)
        n_out = prod(sizes[c] for c in self._outer)
        x, g = rows(x), rows(self.rows_first(g))
        batch, positions = x.shape[:2]
        shape = tuple(p.shape)
        if not self._groups:
            x = x.reshape(batch, positions, n_in)
            g = g.reshape(batch, positions, n_out)
            # The parameter is a matrix [O, I] or [I, O], as its letters lie.
            if self._p == self._outer + self._inner:
                return (LinearSite(x, g, shape),)
            return (LinearSite(g, x, shape),)
        # Groups of features are groups of channels of a convolution with a kernel of one number.
        n = prod(sizes[c] for c in self._groups)
        x = x.reshape(batch, positions, n * n_in).mT
        g = g.reshape(batch, positions, n * n_out).mT
        window = Window((1,), (1,), (0,), (1,), n)
        if self._p == self._groups + self._outer + self._inner:
            return (ConvSite(x, g, *window, shape),)
        return (ConvSite(g, x, *window, shape),)


class Matrix(LayerRule):
    """`y = x P + b`, for rows of `I` features and a parameter `[I, O]`."""

    def forward(self, x: Tensor, p: Tensor, b: Tensor | None = None) -> tuple[Tensor, Kept]:
        with untracked_views():
            return x @ p if b is None else torch.addmm(b, x, p), (x, p)

    def input_grad(self, g: Tensor, x: Tensor, p: Tensor) -> Tensor:
        return g @ p.mT

    def factors(self, rows: Rows, g: Tensor, x: Tensor, p: Tensor) -> tuple[Site, Site]:
        g = rows(g)
        return LinearSite(g, rows(x)), AffineSite(g)


_MATRIX = Matrix()


def product(c: CallContext, x: Tensor, of_x: str, p: Tensor, of_p: str, out: str) -> Any:
    """`einsum("x,p->out")` of an input of examples and a parameter."""
    if len(set(of_x)) < len(of_x) or len(set(of_p)) < len(of_p) or len(set(out)) < len(out):
        return NotImplemented
    if not set(out) <= {*of_x, *of_p}:
        return NotImplemented
    facts = c.facts(x)
    if facts.kind != EXAMPLES:
        return NotImplemented
    groups = "".join(l for l in of_p if l in of_x and l in out)
    inner = "".join(l for l in of_p if l in of_x and l not in out)
    outer = "".join(l for l in of_p if l not in of_x and l in out)
    if any(l not in of_x and l not in out for l in of_p):
        return NotImplemented
    if any(l not in of_p and l not in out for l in of_x):
        return NotImplemented
    sizes = dict(zip(of_x, x.shape, strict=True))
    if any(sizes.get(l, n) != n for l, n in zip(of_p, p.shape, strict=True)):
        return NotImplemented  # a dimension is broadcast
    rows = "".join(l for l in of_x if l not in of_p)
    if not isinstance(facts.owner, Lost):
        varying = [of_x[d] for d in dims_of_owner(facts.owner, tuple(x.shape))]
        if any(l not in rows for l in varying):
            return _per_example(c, x, of_x, p, of_p, out, varying)
    with c.tracked():
        p_order = groups + outer + inner if of_p != groups + inner + outer else of_p
        if of_p not in (groups + outer + inner, groups + inner + outer):
            p = p.permute([of_p.index(l) for l in p_order])
            of_p = p_order
        x_order = rows + groups + inner
        if of_x != x_order:
            x = x.permute([of_x.index(l) for l in x_order])
            of_x = x_order
        if not rows:
            x, of_x, rows = x.unsqueeze(0), "_" + of_x, "_"
    row = rows == "_"
    named = out if not row else "_" + out
    rule = Product(*_plain(of_x, of_p, named, rows, groups, inner, outer))
    found = c.layer(rule, x, p)
    if found is NotImplemented:
        return found
    kept = c.facts(x).owner
    each = [(of_x.index(l), named.index(l)) for l in rows]
    c.mark(found, _through(kept, x, found, each))
    if row:
        with c.tracked():
            return found.squeeze(0)
    return found


def _plain(*terms: str) -> list[str]:
    """The same terms, with a letter that einsum takes in place of `_`."""
    used = set("".join(terms))
    free = next(l for l in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" if l not in used)
    return [term.replace("_", free) for term in terms]


def _through(owner: Any, x: Tensor, found: Tensor, each: list[tuple[int, int]]) -> Any:
    """The owner of a result some of whose dimensions are those of the input."""
    shape = tuple(x.shape)
    if not isinstance(owner, (Ids, Lost)):
        place = along(shape, owner)
        if owner.count == 1 or 0 in shape:
            return owner if owner.count == 1 else regular_at(tuple(found.shape), 0, 1, owner.count)
        if place is not None:
            to = dict(each)[place[0]]
            return regular_at(tuple(found.shape), to, place[1], owner.count)
    ids = ids_of(owner, shape, x.device)
    size = [1] * found.dim()
    kept = sorted(each, key=lambda pair: pair[1])
    ids = ids.permute([a for a, _ in kept] + [d for d in range(x.dim()) if d not in dict(each)])
    for i, (_, to) in enumerate(kept):
        size[to] = ids.shape[i]
    return Ids(ids.reshape(size), owner.count)


def _per_example(
    c: CallContext, x: Tensor, of_x: str, p: Tensor, of_p: str, out: str, varying: list[str]
) -> Any:
    """An example in each group of features: the parameter is copied for each of them."""
    if not all(l in out for l in varying):
        return NotImplemented
    shape, owner = tuple(x.shape), c.facts(x).owner
    ids = ids_of(owner, shape, x.device)
    size = [ids.shape[of_x.index(l)] if l in varying else 1 for l in of_p]
    if any(l not in of_p for l in varying):
        return NotImplemented
    order = [of_x.index(l) for l in of_p if l in varying]
    mine = Ids(
        ids.permute(order + [d for d in range(x.dim()) if d not in order]).reshape(size),
        owner.count,
    )
    copies = spread(c, p, tuple(p.shape), mine)
    return c.dispatch(torch.einsum, (f"{of_x},{of_p}->{out}", x, copies), {})


def _letters(a: Tensor, b: Tensor) -> tuple[str, str, str] | None:
    """The letters of a matrix product that broadcasts no dimension of size 1 but missing ones."""
    batch = "ABCDEFGHIJKLM"
    n = max(a.dim(), b.dim()) - 2
    if n > len(batch):
        return None
    ahead = batch[: max(0, n)]
    of_a = ahead[len(ahead) - (a.dim() - 2) :] + "nk" if a.dim() > 1 else "k"
    of_b = ahead[len(ahead) - (b.dim() - 2) :] + "km" if b.dim() > 1 else "k"
    return of_a, of_b, ahead + ("n" if a.dim() > 1 else "") + ("m" if b.dim() > 1 else "")


@register_function(
    *(getattr(owner, name) for owner in (torch, Tensor) for name in ("matmul", "mm", "bmm", "mv")),
    Tensor.__matmul__,
)
def matmul(c: CallContext, input: Tensor, other: Tensor, *, out: Any = None) -> Any:
    if out is not None or not input.dim() or not other.dim():
        return NotImplemented
    if other.dim() == 2 and input.dim() > 1 and c.facts(input).kind == EXAMPLES:
        found = c.layer(_MATRIX, input, other, None)
        if found is not NotImplemented:
            return found
    letters = _letters(input, other)
    if letters is None:
        return NotImplemented
    of_a, of_b, result = letters
    return _either(c, input, of_a, other, of_b, result)


def _either(c: CallContext, a: Tensor, of_a: str, b: Tensor, of_b: str, out: str) -> Any:
    kinds = c.facts(a).kind, c.facts(b).kind
    if kinds == (EXAMPLES, PARAMETERS):
        return product(c, a, of_a, b, of_b, out)
    if kinds == (PARAMETERS, EXAMPLES):
        return product(c, b, of_b, a, of_a, out)
    return NotImplemented


@register_decomposition(Tensor.__rmatmul__)
def rmatmul(c: CallContext, input: Tensor, other: Tensor) -> Any:
    with c.tracked():
        return torch.matmul(other, input)


@register_function(torch.einsum)
def einsum(c: CallContext, equation: Any, *operands: Any) -> Any:
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or not all(isinstance(x, Tensor) for x in operands):
        return NotImplemented
    found = letters_of(equation, operands)
    if found is None:
        return NotImplemented
    terms, out = found
    if len(operands) == 2:
        result = _either(c, operands[0], terms[0], operands[1], terms[1], out)
        if result is not NotImplemented:
            return result
    return _copied(c, list(operands), terms, out)


def _copied(c: CallContext, operands: list[Tensor], terms: list[str], out: str) -> Any:
    """Any einsum, with a copy of each parameter for each example."""
    first = next(
        ((x, t) for x, t in zip(operands, terms, strict=True) if c.facts(x).kind == EXAMPLES), None
    )
    if first is None or isinstance(c.facts(first[0]).owner, Lost):
        return NotImplemented
    x, term = first
    owner = c.facts(x).owner
    varying = dims_of_owner(owner, tuple(x.shape))
    letters = [term[d] for d in varying]
    if any(term.count(l) > 1 or l not in out for l in letters):
        return NotImplemented
    for i, p in enumerate(operands):
        if c.facts(p).kind != PARAMETERS:
            continue
        missing = "".join(l for l in letters if l not in terms[i])
        own = zip(terms[i], p.shape, strict=True)
        size = [x.shape[term.index(l)] for l in missing]
        size += [x.shape[term.index(l)] if l in letters and n == 1 else n for l, n in own]
        terms[i] = missing + terms[i]
        ids = ids_of(owner, tuple(x.shape), x.device)
        ids = ids.permute(varying + [d for d in range(x.dim()) if d not in varying])
        ids = ids.reshape([ids.shape[j] for j in range(len(varying))])
        order = [l for l in terms[i] if l in letters]
        if len(order) != len(letters):
            return NotImplemented
        ids = ids.permute([letters.index(l) for l in order]) if ids.dim() else ids
        mine = Ids(
            ids.reshape([x.shape[term.index(l)] if l in letters else 1 for l in terms[i]]),
            owner.count,
        )
        operands[i] = spread(c, p, tuple(size), mine)
    return c.dispatch(torch.einsum, (",".join(terms) + "->" + out, *operands), {})


@register_decomposition(torch.addmm, Tensor.addmm, torch.addmv, Tensor.addmv)
def addmm(
    c: CallContext,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Any:
    if out is not None:
        return NotImplemented
    plain = beta == 1 == alpha and mat2.dim() == 2 and input.dim() == 1
    if plain and c.is_example(mat1) and not c.is_example(input) and not c.is_example(mat2):
        found = c.layer(_MATRIX, mat1, mat2, input)
        if found is not NotImplemented:
            c.mark_like(found, mat1, 1)
            return found
    with c.tracked():
        product = mat1 @ mat2
        return (product if alpha == 1 else alpha * product) + (input if beta == 1 else beta * input)


@register_decomposition(torch.baddbmm, Tensor.baddbmm)
def baddbmm(
    c: CallContext,
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Any:
    return addmm(c, input, batch1, batch2, beta=beta, alpha=alpha, out=out)


@register_function(torch.dot, Tensor.dot)
def dot(c: CallContext, input: Tensor, tensor: Tensor) -> Any:
    return _either(c, input, "k", tensor, "k", "")


@register_decomposition(torch.inner, Tensor.inner)
def inner(c: CallContext, input: Tensor, other: Tensor) -> Any:
    with c.tracked():
        if not input.dim() or not other.dim():
            return input * other
        ends: Any = ([-1], [-1])
        return torch.tensordot(input, other, ends)


@register_decomposition(torch.tensordot)
def tensordot(c: CallContext, a: Tensor, b: Tensor, dims: Any = 2, out: Any = None) -> Any:
    if out is not None or isinstance(dims, Tensor):
        return NotImplemented
    letters = "abcdefghijklmnopqrstuvwxyz"
    of_a = letters[: a.dim()]
    pairs = (
        list(zip(range(a.dim() - dims, a.dim()), range(dims), strict=True))
        if isinstance(dims, int)
        else [(d % a.dim(), e % b.dim()) for d, e in zip(*dims, strict=True)]
    )
    of_b = list(letters[a.dim() : a.dim() + b.dim()])
    for d, e in pairs:
        of_b[e] = of_a[d]
    shared = {of_a[d] for d, _ in pairs}
    out_letters = "".join(l for l in [*of_a, *of_b] if l not in shared)
    with c.tracked():
        return torch.einsum(f"{of_a},{''.join(of_b)}->{out_letters}", a, b)
