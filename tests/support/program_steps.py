"""What random programs are made of: steps that know where the examples are, and keep them apart.

A step writes a line or more that change `h`, and says of what shape that is then.
"""

import math
import re
from collections.abc import Callable

from support.program_builder import Builder, Layout

LARGEST = 64
"""Numbers that one example may have in `h`."""

Step = Callable[[Builder], None]
Needs = Callable[[Builder], bool]
STEPS: dict[str, list[tuple[Needs, Step]]] = {}


def step(kind: str, needs: Needs = lambda b: True) -> Callable[[Step], Step]:
    def register(function: Step) -> Step:
        STEPS.setdefault(kind, []).append((needs, function))
        return function

    return register


def room(b: Builder, factor: int = 2) -> bool:
    return math.prod(b.shape) * factor <= LARGEST


UNARY = """
    {}.sin()|{}.tanh()|F.relu({})|F.gelu({})|{}.sigmoid()|F.silu({})|F.softplus({})|{}.square()
    {}.abs()|{}.clamp(-1, 1)|{} * 2|1 - {}|{}.erf()|{}.contiguous()|{}.clone()|torch.cos({})|-{}
    F.dropout({}, 0.0)|torch.zeros_like({}) + {}|{}.to(torch.float64)|F.softsign({})|{}.view_as({})
    {}.masked_fill({} > 0.83, 0.5)|{} / ({}.square() + 1)|torch.where({} > 0, {}, {} * 0.1)
    {}.exp().log1p()|torch.ones_like({}) * {}|{} * {}.detach()
"""


def forms_in(text: str) -> list[str]:
    return [form.strip() for line in text.strip().splitlines() for form in line.split("|")]


def unary(b: Builder, x: str = "h") -> str:
    form = b.pick(forms_in(UNARY))
    return form.replace("{}", x)


def branch(b: Builder) -> str:
    """An expression of the shape of `h`, with or without a parameter."""
    options = [lambda: unary(b), lambda: f"h * {b.weight(*b.broadcast())}"]
    if b.ends_free():
        options.append(lambda: f"{b.layer(linear(b, b.shape[-1]))}(h)")
    return b.pick(options)()


def linear(b: Builder, out: int) -> str:
    return f"nn.Linear({b.shape[-1]}, {out}{b.pick(['', ', bias=False'])})"


# Views


@step("views", lambda b: b.rank > 1)
def merge(b: Builder) -> None:
    merge_at(b, b.pick(range(b.rank - 1)))


def merge_at(b: Builder, i: int) -> None:
    """Joins two dimensions."""
    batch = b.at.batch
    shape = [*b.shape[:i], b.shape[i] * b.shape[i + 1], *b.shape[i + 2 :]]
    if batch == i:
        b.at = b.at._replace(inner=b.at.inner * b.shape[i + 1])
    if batch == i + 1:
        b.at = b.at._replace(outer=b.at.outer * b.shape[i])
    b.at = b.at._replace(batch=batch - (batch > i))
    sizes = b.sizes(shape, b.pick(["-1", b.rows()]))
    forms = [f"h.flatten({i}, {i + 1})", f"h.reshape({sizes})", f"h.contiguous().view({sizes})"]
    b.set(b.pick(forms), shape)


@step("views", lambda b: any(b.shape[d] > 1 for d in b.free))
def split_dim(b: Builder) -> None:
    i = b.pick(d for d in b.free if b.shape[d] > 1)
    n = b.shape[i]
    factor = b.pick(k for k in range(1, n + 1) if n % k == 0)
    shape, batch = b.resized(i, factor, n // factor)
    rows = b.rows()
    b.set(None, shape, batch)
    sizes = b.sizes(rows=b.pick(["-1", rows]))
    b.emit(f"h = {b.pick([f'h.unflatten({i}, ({factor}, {n // factor}))', f'h.reshape({sizes})'])}")


@step("rows", lambda b: not b.plain)
@step("views", lambda b: not b.plain)
def unfold_rows(b: Builder) -> None:
    i, outer, inner = b.at.batch, b.at.outer, b.at.inner
    shape = [*b.shape[:i], *[outer] * (outer > 1), 1, *[inner] * (inner > 1), *b.shape[i + 1 :]]
    b.at = b.at._replace(outer=1, inner=1)
    b.set(None, shape, i + (outer > 1))
    groups = ", ".join([str(outer)] * (outer > 1) + ["B"] + [str(inner)] * (inner > 1))
    b.emit(f"h = {b.pick([f'h.unflatten({i}, ({groups}))', f'h.reshape({b.sizes()})'])}")


@step("views", lambda b: b.rank < 5)
def unsqueeze(b: Builder) -> None:
    i = b.pick(range(b.rank + 1))
    shape = [*b.shape[:i], 1, *b.shape[i:]]
    forms = [f"h.unsqueeze({i})", f"h[{':, ' * i}None]", f"torch.unsqueeze(h, {i - b.rank - 1})"]
    b.set(b.pick(forms), shape, b.at.batch + (b.at.batch >= i))


@step("views", lambda b: any(b.shape[d] == 1 for d in b.free))
def squeeze(b: Builder) -> None:
    drop(b, b.pick(d for d in b.free if b.shape[d] == 1), "h.squeeze({})")


def drop(b: Builder, d: int, form: str) -> None:
    """A step that takes one dimension away."""
    line = form.format(b.dim(d))
    shape, batch = b.resized(d)
    b.set(line, shape, batch)


# Permutes


@step("permutes", lambda b: b.rank > 1)
def swap(b: Builder) -> None:
    i = b.pick(range(b.rank))
    j = b.pick(d for d in range(b.rank) if d != i)
    order = list(range(b.rank))
    order[i], order[j] = j, i
    forms = [f"h.transpose({i}, {j})", f"h.swapaxes({j}, {b.dim(i)})", f"h.permute({order})"]
    forms.append(f"h.clone().transpose_({i}, {j})")
    if {i, j} == {b.rank - 1, b.rank - 2}:
        forms += ["h.mT", "torch.einsum('...ij->...ji', h)", "h.movedim(-1, -2)"]
    reorder(b, b.pick(forms), order)


@step("permutes", lambda b: b.rank > 2)
def move(b: Builder) -> None:
    i, j = b.pick(range(b.rank)), b.pick(range(b.rank))
    order = [d for d in range(b.rank) if d != i]
    order.insert(j, i)
    letters = "abcdefg"[: b.rank]
    forms = [f"h.movedim({i}, {j})", f"h.permute({', '.join(map(str, order))})"]
    forms.append(f"torch.einsum('{letters}->{''.join(letters[d] for d in order)}', h)")
    reorder(b, b.pick(forms) + b.pick(["", ".contiguous()"]), order)


def reorder(b: Builder, line: str, order: list[int]) -> None:
    b.set(line, [b.shape[d] for d in order], order.index(b.at.batch))


# Movements


@step("moves", lambda b: bool(b.free) and room(b))
def token(b: Builder) -> None:
    d, n = b.pick(b.free), b.pick([1, 2])
    shape = [1 if i == b.at.batch else n if i == d else k for i, k in enumerate(b.shape)]
    sizes = b.sizes([n if i == d else k for i, k in enumerate(b.shape)])
    w = b.weight(*shape)
    times = b.sizes([1] * b.rank)
    forms = [f"{w}.expand({sizes})", f"{w}.repeat({times})", f"torch.broadcast_to({w}, ({sizes}))"]
    forms += [f"{w}.expand({sizes}).clone()", f"{w}.tile({times})", f"h.new_zeros({sizes}) + {w}"]
    both = [b.pick(forms), "h"]
    if b.choose(2):
        both.reverse()
    after = list(b.shape)
    after[d] += n
    b.set(f"torch.{b.pick(['cat', 'concat'])}([{', '.join(both)}], {b.dim(d)})", after)


@step("moves", lambda b: room(b) and b.rank < 5)
def stack(b: Builder) -> None:
    x, y, i = branch(b), branch(b), b.pick(range(b.rank + 1))
    shape = [*b.shape[:i], 2, *b.shape[i:]]
    b.set(f"torch.stack([{x}, {y}], {i})", shape, b.at.batch + (b.at.batch >= i))


@step("moves", lambda b: room(b))
def cat(b: Builder) -> None:
    d, x, y = b.pick(range(b.rank)), branch(b), branch(b)
    if d == b.at.batch:
        b.at = b.at._replace(outer=2 * b.at.outer)
    b.set(f"torch.cat([{x}, {y}], {b.dim(d)})", [n * (1 + (i == d)) for i, n in enumerate(b.shape)])


@step("moves", lambda b: bool(b.free))
def part(b: Builder) -> None:
    d = b.pick(b.free)
    n = b.shape[d]
    k = b.pick(range(n))
    size = b.pick(range(1, n - k + 1))
    before = ":, " * d
    whole = (n // size) * size == n
    forms = [f"h[{before}{k}:{k + size}]", f"h.narrow({b.dim(d)}, {k}, {size})"]
    forms.append(f"h.index_select({d}, torch.arange({k}, {k + size}))")
    forms.append(f"h[{before}{list(range(k, k + size))}]")
    forms.append(f"torch.split(h, [{k}, {size}, {n - k - size}], {d})[1]")
    if whole:
        at = b.choose(n // size)
        forms += [f"h.split({size}, {d})[{at}]", f"h.chunk({n // size}, {b.dim(d)})[{at}]"]
        forms += [f"h.unfold({d}, {size}, {size}).movedim({d}, 0)[0].movedim(-1, {d})"]
    b.set(b.pick(forms), b.resized(d, size)[0])


@step("moves", lambda b: len(b.free) > 1)
def select(b: Builder) -> None:
    d = b.pick(b.free)
    k = b.pick(range(b.shape[d]))
    form = b.pick([f"h[{':, ' * d}{k}]", f"h.select({{}}, {k})", f"h.unbind({{}})[{k}]"])
    drop(b, d, form)


@step("moves", lambda b: bool(b.free))
def shuffle(b: Builder) -> None:
    d = b.pick(b.free)
    n = b.shape[d]
    index = [b.choose(n) for _ in range(n)]
    view = ", ".join("-1" if i == d else "1" for i in range(b.rank))
    forms = [f"h.flip({b.dim(d)})", f"h.roll(1, {b.dim(d)})"]
    forms.append(f"h[{':, ' * d}torch.tensor({index})]")
    forms.append(f"h.index_select({d}, torch.tensor({index}))")
    forms.append(f"h.gather({d}, torch.tensor({index}).view({view}).expand({b.sizes()}))")
    forms.append(f"torch.take_along_dim(h, torch.tensor({index}).view({view}), {d})")
    forms.append(f"h.index_copy({d}, torch.tensor({sorted(range(n), key=lambda i: -i)}), h)")
    forms.append(f"h.index_add({d}, torch.tensor({index}), h)")
    forms.append(forms[4].replace("h.gather", "torch.zeros_like(h).scatter_add")[:-1] + ", h)")
    b.set(b.pick(forms), b.shape)


@step("moves", lambda b: b.ends_free() and room(b, 3))
def pad(b: Builder) -> None:
    left, right = b.pick([1, 0]), b.pick([0, 1])
    second = b.ends_free(2) and b.choose(2)
    pads = f"0, 0, {left}, {right}" if second else f"{left}, {right}"
    d = b.rank - 1 - bool(second)
    b.set(f"F.pad(h, ({pads}))", b.resized(d, b.shape[d] + left + right)[0])


@step("moves", lambda b: any(b.shape[d] > 1 for d in b.free) and room(b) and b.rank < 5)
def windows(b: Builder) -> None:
    d = b.pick(d for d in b.free if b.shape[d] > 1)
    n = b.shape[d]
    b.set(f"h.unfold({d}, 2, 1)", [*b.resized(d, n - 1)[0], 2])


@step("moves", lambda b: bool(b.free) and room(b))
def repeat_positions(b: Builder) -> None:
    d = b.pick(b.free)
    times = ", ".join("2" if i == d else "1" for i in range(b.rank))
    forms = [f"h.repeat_interleave(2, {b.dim(d)})", f"h.repeat({times})", f"h.tile({times})"]
    b.set(b.pick(forms), b.resized(d, 2 * b.shape[d])[0])


@step("rows", lambda b: room(b))
def repeat_rows(b: Builder) -> None:
    d = b.at.batch
    times = ", ".join("2" if i == d else "1" for i in range(b.rank))
    line = b.pick([f"h.repeat({times})", f"h.repeat_interleave(2, {d})", f"torch.cat([h, h], {d})"])
    doubled = {"inner": 2 * b.at.inner} if "inter" in line else {"outer": 2 * b.at.outer}
    b.at = b.at._replace(**doubled)
    b.set(line, b.resized(d, 2 * b.shape[d])[0])


@step("rows", lambda b: bool(b.free))
def into_rows(b: Builder) -> None:
    """A dimension beside the batch, then in it: windows, heads, time steps."""
    d, after = b.pick(b.free), b.choose(2)
    order = [i for i in range(b.rank) if i != d]
    at = order.index(b.at.batch)
    order.insert(at + after, d)
    if order != sorted(order):
        reorder(b, f"h.permute({order})", order)
    merge_at(b, at)


@step("rows", lambda b: b.at.outer > 1)
def some_rows(b: Builder) -> None:
    d, n = b.at.batch, b.at.outer
    k = b.choose(n)
    b.set(f"h.chunk({n}, {d})[{k}]", b.resized(d, b.at.inner)[0])
    b.at = b.at._replace(outer=1)


@step("rows", lambda b: b.plain and not b.at.undo)
def permute_rows(b: Builder) -> None:
    d = b.at.batch
    order = b.name("order")
    keys = ["torch.arange(B).flip(0)", "torch.arange(B).roll(1)"]
    keys.append(f"h.detach().movedim({d}, 0).reshape(B, -1)[:, 0].argsort(stable=True)")
    key = b.pick(keys)
    forms = [
        (f"h.index_select({d}, {order})", f"{{h}}.index_select({{d}}, {order}.argsort())"),
        (f"h.flip({d})", "{h}.flip({d})"),
        (f"h.roll(1, {d})", "{h}.roll(-1, {d})"),
        (f"h.index_copy({d}, {order}, h)", f"{{h}}.index_select({{d}}, {order})"),
        (f"h[{':, ' * d}{order}]", f"torch.empty_like({{h}}).index_copy({{d}}, {order}, {{h}})"),
    ]
    there, back = b.pick(forms)
    if order in there + back:
        b.emit(f"{order} = {key}")
    b.set(there, b.shape)
    b.at = b.at._replace(undo=back)


@step("rows", lambda b: b.plain and bool(b.at.undo))
def restore_rows(b: Builder) -> None:
    b.set(b.at.undo.format(h="h", d=b.at.batch), b.shape)
    b.at = b.at._replace(undo="")


@step("rows", lambda b: b.ends_free())
def route(b: Builder) -> None:
    """Some positions of some examples through a layer, as a mixture of experts has it."""
    mask, out, n = b.name("mask"), b.name("out"), b.size()
    b.emit(f"{mask} = h.detach()[..., 0] > 0.13")
    f = b.layer(linear(b, n))
    if b.choose(2):
        b.emit(f"{out} = h.new_zeros({b.sizes([*b.shape[:-1], n])})")
        b.emit(f"{out}[{mask}] = {f}(h[{mask}])")
    else:
        b.emit(f"{out} = {b.layer(linear(b, n))}(h)")
        b.emit(f"{out} = {out}.index_put({mask}.nonzero(as_tuple=True), {f}(h[{mask}]))")
    b.set(out, [*b.shape[:-1], n])


@step("inplace", lambda b: bool(b.free))
def write(b: Builder) -> None:
    d = b.pick(b.free)
    k = b.pick(range(b.shape[d]))
    at, left = ":, " * d, [n for i, n in enumerate(b.shape) if i != d]
    batch = b.at.batch - (b.at.batch > d)
    w = b.weight(*[1 if i == batch else n for i, n in enumerate(left)])
    b.emit(f"h = {b.pick(['h.clone()', 'h * 1.0', 'h + 0.5'])}")
    h = f"h[{at}{k}]"
    lines = [f"{h} += {w}", f"{h} = {w}", f"{h}.mul_({w})", f"h[{at}:] *= 2", f"{h} = 0"]
    lines += [f"h.select({d}, {k}).add_({w})", f"{h} = h[{at}0].clone() * {w}"]
    lines.append(f"h[{at}torch.tensor([{k}])] = {w}.unsqueeze({d})")
    b.emit(b.pick(lines))


@step("inplace")
def update(b: Builder) -> None:
    w = b.weight(*b.broadcast())
    b.emit("h = h.clone()")
    forms = [f"h += {w}", f"h *= {w}", f"h.add_({w}, alpha=2)", f"h.sub_({w}).tanh_()"]
    b.emit(b.pick([*forms, f"h.clamp_(min={w})"]))


@step("inplace", lambda b: bool(b.free))
def write_into_parameters(b: Builder) -> None:
    d, name = b.pick(b.free), b.name("made")
    w = b.weight(*[1 if i == b.at.batch else n for i, n in enumerate(b.shape)])
    at = ":, " * d + "0"
    form = b.pick([f"{w}.expand({b.sizes()}).clone()", f"{w} + h.new_zeros({b.sizes()})"])
    b.emit(f"{name} = {form}")
    b.emit(b.pick([f"{name}[{at}] = h[{at}]", f"{name}[{at}] += h[{at}]", f"{name}.mul_(h)"]))
    b.set(b.pick([f"h * {name}", name, f"torch.maximum(h, {name})"]), b.shape)


@step("inplace")
def write_masked(b: Builder) -> None:
    w = b.weight()
    lines = [f"h[h > 0.43] = {w}", f"h = h.masked_fill(h > 0.43, {w})", "h[h > 0.43] = 0.5"]
    if b.ends_free():
        lines.append(f"h[h[..., 0] > 0.13] = {b.weight(b.shape[-1])}")
    b.emit("h = h.clone()")
    b.emit(b.pick(lines))


# Elementwise


@step("elementwise")
def one(b: Builder) -> None:
    b.set(unary(b), b.shape)


WITH_PARAMETER = """
    h + {}|{} + h|h * {}|{} * h|h - {}|{} - h|h / {}.exp()|torch.add(h, {}, alpha=2)|h.mul({})
    torch.maximum(h, {})|torch.minimum({}, h)|torch.where(h > 0, h, {})|h.clamp(min={})
    torch.clamp(h, max={})|torch.lerp(h, {}, 0.3)|torch.lerp(h.sin(), h, {})|{}.exp() * h.cos()
    torch.logaddexp(h, {})|h * torch.broadcast_tensors(h, {})[1]|h + {}.expand_as(h)
    (h.abs() + 1) ** {}|h * ({} > 0) + {}|torch.addcmul(h, h, {})|torch.hypot(h, {})
    F.mse_loss(h, {} + 0 * h, reduction="none")|torch.stack([h, {}.expand_as(h)]).sum(0)
    h.addcdiv(h, {}.exp())|torch.where(torch.tensor(True), h * {}, h)
"""


@step("elementwise")
def with_parameter(b: Builder) -> None:
    w = b.weight(*b.broadcast())
    b.set(b.pick(forms_in(WITH_PARAMETER)).replace("{}", w), b.shape)


@step("elementwise")
def with_two_parameters(b: Builder) -> None:
    v, w = b.weight(*b.broadcast()), b.weight(*b.broadcast())
    forms = [f"torch.addcmul({v}, h, {w})", f"h * {v} + {w}", f"torch.lerp({v}, h, {w})"]
    forms += [f"torch.where(h > {v}, h, {w} * h)", f"torch.addcmul(h, {v}, {w})"]
    b.set(b.pick([*forms, f"h.clamp({v} - 1, {v} + 1)"]), b.shape)


@step("elementwise")
def with_constant(b: Builder) -> None:
    shape, name = b.broadcast(), "self." + b.name("c")
    made = f"torch.randn({shape}, dtype=torch.float64)"
    made = b.pick([made, f"nn.Buffer({made})", f"nn.Parameter({made}, requires_grad=False)"])
    b.init.append(f"{name} = {made}")
    b.set(b.pick([f"h * {name}", f"{name} + h", f"torch.maximum(h, {name})"]), b.shape)


@step("elementwise")
def with_itself(b: Builder) -> None:
    x, y = branch(b), branch(b)
    b.set(b.pick([f"({x}) * ({y})", f"({x}) + ({y})", f"torch.maximum({x}, {y})"]), b.shape)


@step("elementwise")
def save(b: Builder) -> None:
    b.saved.append((b.name("r"), b.at))
    b.emit(f"{b.saved[-1][0]} = h")


def can_join(b: Builder) -> bool:
    return any(at == b.at for _, at in b.saved)


@step("elementwise", can_join)
def join(b: Builder) -> None:
    r = b.pick(name for name, at in b.saved if at == b.at)
    b.set(b.pick([f"h + {r}", f"h * {r}.sigmoid()", f"torch.lerp({r}, h, 0.3)"]), b.shape)


# Reductions


@step("reductions", lambda b: len(b.free) > 1)
def reduce(b: Builder) -> None:
    d = b.pick(b.free)
    forms = [f"h.{name}({{}})" for name in ("mean", "sum", "amax", "logsumexp", "prod")]
    form = b.pick([*forms, "h.var({}, correction=0)", "h.max({})[0]"])
    if b.choose(2):
        drop(b, d, form)
    else:
        line = form.format(b.dim(d)).replace(")", ", keepdim=True)", 1)
        b.set(b.pick([f"h - {line}", f"h * {line}"]), b.shape)


@step("reductions", lambda b: any(b.shape[d] > 1 for d in b.free))
def scan(b: Builder) -> None:
    d = b.pick(d for d in b.free if b.shape[d] > 1)
    forms = ["h.softmax({})", "h.cumsum({})", "F.log_softmax(h, {})"]
    forms.append("h.flip({0}).cumsum({0}).flip({0})")
    b.set(b.pick(forms).format(b.dim(d)), b.shape)


@step("reductions", lambda b: any(b.shape[d] % 2 == 0 for d in b.free))
def glu(b: Builder) -> None:
    d = b.pick(d for d in b.free if b.shape[d] % 2 == 0)
    b.set(f"F.glu(h, {b.dim(d)})", b.resized(d, b.shape[d] // 2)[0])


@step("reductions", lambda b: b.rank == 3 and b.first and b.shape[-1] > 1)
def pool(b: Builder) -> None:
    n = b.shape[-1] // 2
    forms = ["F.avg_pool1d(h, 2)", "F.max_pool1d(h, 2)", f"F.adaptive_avg_pool1d(h, {n})"]
    b.set(b.pick(forms), [*b.shape[:-1], n])


# Products


@step("layers", lambda b: b.ends_free())
def dense(b: Builder) -> None:
    i, o = b.shape[-1], b.size()
    forms = [f"{b.layer(linear(b, o))}(h)"] * 2
    w = b.weight(o, i)
    forms += [f"F.linear(h, {w})", f"F.linear(h, {w}, {b.weight(o)})", f"h @ {b.weight(i, o)}"]
    forms += [f"torch.matmul(h, {w}.t())", f"torch.tensordot(h, {w}, dims=([-1], [1]))"]
    forms.append(f"{b.layer(f'weight_norm({linear(b, o)})')}(h)")
    if b.rank == 2:
        forms += [f"torch.addmm({b.weight(o)}, h, {b.weight(i, o)})", f"h.mm({w}.mT)"]
    b.set(b.pick(forms), [*b.shape[:-1], o])


def ties(b: Builder) -> list[tuple[str, int, int]]:
    """Weights `[o, i]` of layers that there are, which a linear layer of `h` may share."""
    found = []
    for made, name in b.layers.items():
        if match := re.match(r"nn\.(Linear|Embedding)\((\d+), (\d+)", made):
            n, m = int(match[2]), int(match[3])
            o, i = (m, n) if match[1] == "Linear" else (n, m)
            found += [(f"{name}.weight", o, i), (f"{name}.weight.t()", i, o)]
    return [tie for tie in found if tie[2] == b.shape[-1]]


@step("layers", lambda b: b.ends_free() and bool(ties(b)))
def tied(b: Builder) -> None:
    w, o, _ = b.pick(ties(b))
    b.set(b.pick([f"F.linear(h, {w})", f"h @ {w}.mT"]), [*b.shape[:-1], o])


@step("layers", lambda b: b.ends_free() and len(b.free) > 1)
def pool_by_vector(b: Builder) -> None:
    v = b.weight(b.shape[-1])
    forms = [f"h @ {v}", f"torch.matmul(h, {v})", f"(h @ {v}.unsqueeze(-1))[..., 0]"]
    drop(b, b.rank - 1, b.pick(forms))


@step("layers", lambda b: b.rank > 1 and b.rank - 2 in b.free)
def from_the_left(b: Builder) -> None:
    k, n = b.size(), b.shape[-2]
    w = b.weight(k, n)
    b.set(b.pick([f"{w} @ h", f"torch.matmul({w}, h)"]), [*b.shape[:-2], k, b.shape[-1]])


@step("layers", lambda b: bool(b.free) and b.rank < 6)
def einsum(b: Builder) -> None:
    letters = "abcdef"[: b.rank]
    d = b.pick(b.free)
    shared = [e for e in b.free if e != d and b.choose(3) == 0]
    new = b.size() if len(b.free) == 1 or b.choose(4) else 0
    of = [(letters[e], b.shape[e]) for e in [d, *shared]] + ([("k", new)] if new else [])
    turn = b.choose(len(of))
    of = of[turn:] + of[:turn]
    out = [(letters[e], b.shape[e]) for e in range(b.rank) if e != d]
    if new:
        out.insert(b.choose(len(out) + 1), ("k", new))
    w, names = b.weight(*(n for _, n in of)), "".join(c for c, _ in of)
    to = "".join(c for c, _ in out)
    form = b.pick([f"'{letters},{names}->{to}', h, {w}", f"'{names},{letters}->{to}', {w}, h"])
    b.set(f"torch.einsum({form})", [n for _, n in out], to.index(letters[b.at.batch]))


@step("layers", lambda b: b.rank > 2 and b.ends_free(1) and b.rank - 3 in b.free)
def heads(b: Builder) -> None:
    h, i, o = b.shape[-3], b.shape[-1], b.size()
    w = b.weight(h, i, o)
    forms = [f"h @ {w}"]
    if b.rank == 3:
        forms += [f"torch.bmm(h, {w})", f"torch.baddbmm({b.weight(h, 1, o)}, h, {w})"]
    b.set(b.pick(forms), [*b.shape[:-1], o])


@step("layers", lambda b: b.rank == 3 and b.first)
def batched(b: Builder) -> None:
    i, o = b.shape[-1], b.size()
    w = b.weight(i, o)
    expanded = b.pick([f"{w}.expand({b.rows()}, {i}, {o})", f"{w}.repeat({b.rows()}, 1, 1)"])
    b.set(b.pick([f"torch.bmm(h, {expanded})", f"h @ {expanded}"]), [*b.shape[:-1], o])


@step("derived", lambda b: b.ends_free() and b.shape[-1] > 1)
def spectral(b: Builder) -> None:
    n = b.shape[-1]
    w = f"torch.view_as_complex({b.leaf(n // 2 + 1, 2)})"
    b.set(f"torch.fft.irfft(torch.fft.rfft(h) * {w}, n={n})", b.shape)


@step("networks", lambda b: b.ends_free())
def bilinear(b: Builder) -> None:
    i, o = b.shape[-1], b.size()
    b.set(f"{b.layer(f'nn.Bilinear({i}, {i}, {o})')}(h, {unary(b)})", [*b.shape[:-1], o])


@step("networks", lambda b: b.first and b.rank in (3, 4))
def conv(b: Builder) -> None:
    n, c = b.rank - 2, b.shape[1]
    groups = b.pick([1, c])
    o = b.size() if groups == 1 else c * b.pick([1, 2])
    kernel, stride = b.pick([(3, 1), (1, 1), (3, 2)])
    extra = f"stride={stride}, padding={kernel // 2}, groups={groups}"
    forms = [f"{b.layer(f'nn.Conv{n}d({c}, {o}, {kernel}, {extra})')}(h)"]
    w = b.weight(o, c // groups, *[kernel] * n)
    forms += [f"F.conv{n}d(h, {w}, {extra})", f"F.conv{n}d(h, {w}, {b.weight(o)}, {extra})"]
    sizes = [(k - 1) // stride + 1 for k in b.shape[2:]]
    if stride == 1:
        turned = b.weight(c, o // groups, *[kernel] * n)
        forms.append(f"F.conv_transpose{n}d(h, {turned}, {extra})")
    b.set(b.pick(forms), [b.shape[0], o, *sizes])


@step("networks", lambda b: b.ends_free() and b.shape[-1] > 2)
def norm(b: Builder) -> None:
    d = b.shape[-1]
    forms = [f"nn.LayerNorm({d}, 0.1)", f"nn.RMSNorm({d}, 0.1)"]
    lines = [f"{b.layer(b.pick(forms))}(h)"]
    lines.append(f"F.layer_norm(h, ({d},), {b.weight(d)}, {b.weight(d)}, 0.1)")
    lines.append(f"F.rms_norm(h, ({d},), {b.weight(d)}, 0.1)")
    b.set(b.pick(lines), b.shape)


@step("networks", lambda b: b.first and b.rank > 2 and math.prod(b.shape[2:]) > 2)
def channel_norm(b: Builder) -> None:
    c = b.shape[1]
    forms = [f"nn.GroupNorm({b.pick([1, c])}, {c}, 0.1)"]
    if b.rank in (3, 4):
        forms.append(f"nn.InstanceNorm{b.rank - 2}d({c}, 0.1, affine=True)")
    b.set(f"{b.layer(b.pick(forms))}(h)", b.shape)


@step("networks", lambda b: b.rank > 2 and b.ends_free(2))
def attend(b: Builder) -> None:
    t, d = b.shape[-2:]
    f = [b.layer(linear(b, d)) for _ in range(3)]
    qkv = [f"{x}(h)" for x in f] if b.choose(2) else ["h", f"{f[1]}(h)", "h"]
    bias = b.weight(*b.pick([(t, t), (1, t), (1, t, t)]))
    if b.rank > 3 and b.rank - 3 in b.free and b.choose(2):
        bias = b.weight(b.shape[-3], t, t)
    q, k, v = qkv
    forms = [f"({q}, {k}, {v})", f"({q}, {k}, {v}, {bias})", f"({q}, {k}, {v}, is_causal=True)"]
    forms = [f"F.scaled_dot_product_attention{form}" for form in forms]
    forms.append(f"(({q}) @ ({k}).mT + {bias}).softmax(-1) @ {v}")
    b.set(b.pick(forms), b.shape)


def sequences(b: Builder) -> bool:
    return b.rank == 3 and b.at.batch < 2


@step("networks", sequences)
def attention_layer(b: Builder) -> None:
    d, first = b.shape[-1], b.first
    n = b.pick(k for k in range(1, d + 1) if d % k == 0)
    mha = f"nn.MultiheadAttention({d}, {n}, batch_first={first})"
    if b.choose(3) == 0 and d > 2:
        options = f"{d}, {n}, 3, 0.0, layer_norm_eps=0.1, batch_first={first}"
        line = f"{b.layer(f'nn.TransformerEncoderLayer({options})')}(h)"
    else:
        line = f"{b.layer(mha)}(h, {unary(b)}, h, need_weights={bool(b.choose(2))})[0]"
    b.set(line, b.shape)


@step("networks", sequences)
def recurrent(b: Builder) -> None:
    d, o, first = b.shape[-1], b.size(), b.first
    kind = b.pick(["GRU", "LSTM", "RNN"])
    layers = b.pick([1, 2])
    line = f"{b.layer(f'nn.{kind}({d}, {o}, {layers}, batch_first={first})')}(h)"
    if b.choose(3) == 0:
        rows = b.shape[b.at.batch]
        b.set(f"{line}[1]{'[0]' if kind == 'LSTM' else ''}", [layers, rows, o], 1)
    else:
        b.set(f"{line}[0]", [*b.shape[:-1], o])


@step("networks", sequences)
def cells(b: Builder) -> None:
    d, o, at, name = b.shape[-1], b.size(), 1 - b.at.batch, b.name("s")
    kind = b.pick(["GRUCell", "RNNCell", "LSTMCell"])
    cell, zeros = b.layer(f"nn.{kind}({d}, {o})"), f"h.new_zeros({b.rows()}, {o})"
    pair = kind == "LSTMCell"
    b.emit(f"{name} = {f'({zeros}, {zeros})' if pair else zeros}")
    b.emit(f"{name}s = []")
    b.emit(f"for step in h.unbind({at}):")
    b.emit(f"    {name} = {cell}(step, {name})")
    b.emit(f"    {name}s.append({name}{'[0]' if pair else ''})")
    if b.choose(2):
        b.set(f"torch.stack({name}s, {at})", [*b.shape[:-1], o])
    else:
        b.set(f"{name}s[-1]", [b.shape[b.at.batch], o], 0)


# Inputs that are made in the pass


@step("derived", lambda b: b.ends_free() and len(b.free) > 1)
def positions(b: Builder) -> None:
    t = b.pick(b.free[:-1])
    n, d = b.shape[t], b.shape[-1]
    sizes = ", ".join(str(k) if i in (t, b.rank - 1) else "1" for i, k in enumerate(b.shape))
    steps = b.pick([f"torch.arange({n})", f"torch.arange({n}).unsqueeze(0)"])
    if b.choose(2):
        name = "self." + b.name("grid")
        b.init.append(f"{name} = {b.pick([steps, f'nn.Buffer({steps})'])}")
        steps = name
    table = b.layer(f"nn.Embedding({n}, {d})")
    forms = [f"{table}({steps})", f"F.embedding({steps}, {b.weight(n, d)})"]
    forms.append(f"{b.layer(f'nn.Linear(1, {d})')}({steps}.double().unsqueeze(-1) / {n})")
    if b.choose(3) == 0 and b.plain:
        forms = [f"{table}({steps}.expand(B, {n}))"]
        sizes = ", ".join("B" if i == b.at.batch else k for i, k in enumerate(sizes.split(", ")))
        if b.at.batch > t:  # from [B, n, d] to [n, B, d]
            forms[0] += ".transpose(0, 1)"
    name = b.name("pos")
    b.emit(f"{name} = {b.pick(forms)}.reshape({sizes})")
    b.set(b.pick([f"h + {name}", f"h * {name}", f"torch.tanh({name}) * h"]), b.shape)


@step("derived", lambda b: b.rank == 3 and b.first)
def queries(b: Builder) -> None:
    q, d, name = b.size(), b.shape[-1], b.name("q")
    w = b.weight(q, d)
    forms = [f"{w}.expand({b.rows()}, {q}, {d})", f"{w}.unsqueeze(0).repeat({b.rows()}, 1, 1)"]
    forms.append(f"{w}.unsqueeze(1).expand({q}, {b.rows()}, {d}).transpose(0, 1)")
    b.emit(f"{name} = {b.pick(forms)}")
    line = b.pick([f"{name} = {b.layer(linear(b, d))}({name})", f"{name} = {name}.tanh()"])
    b.emit(line)
    forms = [f"F.scaled_dot_product_attention({name}, h, h)", f"({name} @ h.mT).softmax(-1) @ h"]
    b.set(b.pick(forms), [b.shape[0], q, d])


@step("derived")
def made_alone(b: Builder) -> None:
    shape, name = [1 if d == b.at.batch else n for d, n in enumerate(b.shape)], b.name("m")
    b.emit(f"{name} = {b.weight(*shape)}.expand({b.sizes()})")
    if b.ends_free():
        b.emit(f"{name} = {b.layer(linear(b, b.shape[-1]))}({name})")
    b.set(b.pick([f"h + {name}", f"h * {name}", f"{unary(b, name)} + h"]), b.shape)


@step("derived", lambda b: b.first and b.plain and b.ends_free() and not b.at.undo and bool(b.ids))
def condition(b: Builder) -> None:
    d = b.shape[-1]
    table = b.pick([f"{b.layer(f'nn.Embedding(5, {d})')}({b.ids})", f"{b.weight(5, d)}[{b.ids}]"])
    more = ", ".join("1" for _ in b.shape[2:])
    line = f"{table}.reshape(B, {more}{', ' if more else ''}{d})"
    b.set(b.pick([f"h + {line}", f"h * {line}", f"h * {line}.sigmoid()"]), b.shape)


# The whole


def inputs(b: Builder) -> list[str]:
    """The batch, examples first, and what `h` starts as."""
    dims = [b.size() for _ in range(b.pick([2, 1, 3]))]
    while math.prod(dims) > 30:
        dims.pop()
    floats = f"torch.randn({b.batch_size}, {', '.join(map(str, dims))}, dtype=torch.float64)"
    kinds = ["x", "x", "x", "ids", "sequence", "two", "conditioned"] + ["marked"] * b.can_mark
    kind = b.pick(kinds)
    b.at = Layout((1, *dims))
    if kind == "marked":
        b.can_mark = False  # the caller sees that it is to mark
        b.emit("B = x.shape[1]")
        b.at = Layout((dims[0], 1, *dims[1:]), 1)
        b.emit("h = x")
        return [floats]
    b.emit(f"B = {b.pick(['x.shape[0]', 'len(x)', 'x.size(0)'])}")
    if kind in ("ids", "sequence"):
        d, b.ids = b.size(), "x"
        sizes = [b.batch_size] if kind == "ids" else [b.batch_size, dims[0]]
        b.at = Layout((1, *sizes[1:], d))
        look = [f"{b.layer(f'nn.Embedding(5, {d})')}(x)", f"F.embedding(x, {b.weight(5, d)})"]
        b.emit(f"h = {b.pick([*look, f'{b.weight(5, d)}[x]'])}")
        b.ids = "x" if kind == "ids" else ""
        return [f"torch.randint(5, {tuple(sizes)})"]
    b.emit("h = x")
    if kind == "two":
        b.saved.append(("y", b.at))
        return [floats, floats]
    if kind == "conditioned":
        b.ids = "y"
        return [floats, f"torch.randint(5, ({b.batch_size},))"]
    return [floats]


def finish(b: Builder) -> None:
    """The examples first, in their order, and one dimension of features."""
    if not b.plain:
        unfold_rows(b)
    if not b.first:
        order = [b.at.batch, *b.free]
        reorder(b, f"h.movedim({b.at.batch}, 0)", order)
    if b.at.undo:
        restore_rows(b)
    b.emit(b.pick(["return h.reshape(B, -1)", "return h.reshape(len(h), -1)"]))


KINDS = ["layers"] * 2 + ["networks"] * 3 + ["elementwise"] * 3 + ["moves"] * 2 + ["derived"] * 2
KINDS += ["views", "permutes", "rows", "inplace", "reductions"]


def write_steps(b: Builder) -> None:
    for i in range(8):
        if i and not b.choose(7):
            return
        kind = "layers" if i == 0 else b.pick(KINDS)
        possible = [function for needs, function in STEPS[kind] if needs(b)]
        if i and can_join(b) and not b.choose(3):
            join(b)
        elif possible:
            b.pick(possible)(b)
        while math.prod(b.shape) > LARGEST:
            part(b)
