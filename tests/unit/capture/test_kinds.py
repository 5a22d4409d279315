"""One small model for each kind of fault that public code has brought to light."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue.row import Row, Topic, buffer, embedding, frozen, linear, normal, several, uses
from support.checks import Batch, assert_gram, assert_norms, grad_of, relative_error
from support.oracle import joined, per_example_gradients
from torch import Tensor, nn

import pycoherence as pc

D = torch.float64


def rows(model: nn.Module, batch: Batch) -> Tensor:
    """Each example's own sum of squares, and their mean."""
    found = model(*batch)
    return found.abs().square().reshape(len(found), -1).sum(1).mean()


def assert_right(model: nn.Module, batch: Batch, loss: Any = rows) -> None:
    """The loss, norms and Gram by the oracle, `.grad` by plain autograd, and the size."""
    truth = per_example_gradients(model, loss, batch)
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    expected = loss(plain, batch)
    expected.backward()
    with pc.collect(ours, pc.SqNorms(), pc.Gram()) as record:
        value = loss(ours, batch)
        value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert record.batch_size == len(batch[0])
    assert_norms(record, truth, 1e-9)
    assert_gram(record, truth, 1e-9)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert relative_error(grad_of(p), grad_of(q)) <= 1e-11


MADE = Topic("what a parameter is made of, and how it is written")
WRITTEN = {"w": normal(4, 3), "v": normal(2, 3)}
TILED = {"layer": linear(3, 3), "t": normal(2, 3)}


@MADE("merged-in-place", normal(5, 3), w=normal(4, 3), a=normal(2, 3), b=normal(4, 2))
def merged_in_place(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w += m.b @ m.a
    return F.linear(x, w)


@MADE("assembled", normal(5, 3), **WRITTEN)
def assembled(m: Any, x: Tensor) -> Tensor:
    w = m.w * 1
    w[:2] = m.v
    return F.linear(x, w)


@MADE("through-a-view", normal(5, 3), **WRITTEN)
def through_a_view(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w[1:3].add_(m.v)
    return F.linear(x, w)


@MADE("added-by-index", normal(5, 3), **WRITTEN)
def added_by_index(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone().index_add_(0, torch.tensor([0, 3]), m.v)
    return F.linear(x, w)


@MADE("examples-into-tiled", normal(5, 2, 3), **TILED)
def examples_into_tiled(m: Any, x: Tensor) -> Tensor:
    h = m.layer(x)
    w = m.t.tile(len(x), 1, 1)
    w[:, 0] = h[:, 0]
    return h * w


@MADE("examples-into-added", normal(5, 2, 3), **TILED)
def examples_into_added(m: Any, x: Tensor) -> Tensor:
    h = m.layer(x)
    w = m.t + torch.zeros(len(x), 1, 1, dtype=D)
    w[:, 1:] = h[:, 1:]
    return h * w


COMPLEX = Topic("complex numbers")


@COMPLEX("learned-filter", normal(5, 4, 3), layer=linear(3, 3), w=normal(3, 3, 2))
def learned_filter(m: Any, x: Tensor) -> Tensor:
    found = torch.fft.rfft(m.layer(x), dim=1) * torch.view_as_complex(m.w)
    return torch.fft.irfft(found, n=4, dim=1)


@COMPLEX(
    "complex-linear",
    normal(5, 3),
    real=normal(3, 3),
    imaginary=normal(3, 3),
    layer=linear(3, 3),
)
def complex_linear(m: Any, x: Tensor) -> Tensor:
    return F.linear(torch.complex(m.layer(x), x), torch.complex(m.real, m.imaginary)).abs()


@COMPLEX("complex-scale", normal(5, 3), layer=linear(3, 3), w=normal(3, 2))
def complex_scale(m: Any, x: Tensor) -> Tensor:
    return torch.view_as_real(m.layer(x) * torch.view_as_complex(m.w).conj())


@COMPLEX("complex-shift", normal(5, 3), layer=linear(3, 3), w=normal(3, 2))
def complex_shift(m: Any, x: Tensor) -> Tensor:
    return (m.layer(x) + torch.view_as_complex(m.w)).abs()


@COMPLEX("complex-product", normal(5, 3), layer=linear(3, 3), w=normal(3, 2, 2))
def complex_product(m: Any, x: Tensor) -> Tensor:
    return torch.complex(m.layer(x), x) @ torch.view_as_complex(m.w)


WHERE = Topic("where the batch is")
PROMPT = {"table": embedding(2, 3), "frozen": frozen(linear(3, 2))}
LSTM = {"rnn": lambda: nn.LSTM(5, 8), "out": linear(8, 3)}
STEPS_MADE = {"mlp": lambda: nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 4))}


def decoder() -> nn.Module:
    return nn.TransformerDecoderLayer(4, 2, 8, 0.0)


@WHERE("decoder-queries", normal(5, 6, 4), decoder=decoder, q=normal(3, 4))
@WHERE("decoder-queries-square", normal(5, 5, 4), decoder=decoder, q=normal(5, 4))
def queries(m: Any, x: Tensor) -> Tensor:
    made = m.q.unsqueeze(1).expand(-1, len(x), -1)
    return m.decoder(made, x.transpose(0, 1)).transpose(0, 1)


@WHERE("decoder-queries-repeated", normal(5, 3, 4), decoder=decoder, q=normal(5, 4))
def queries_repeated(m: Any, x: Tensor) -> Tensor:
    made = m.q.unsqueeze(1).repeat(1, len(x), 1)
    return m.decoder(made, x.transpose(0, 1)).transpose(0, 1)


@WHERE("frozen-blocks", normal(4, 3), blocks=buffer(normal(2, 12)), layer=linear(8, 2))
def frozen_blocks(m: Any, x: Tensor) -> Tensor:
    return m.layer(F.linear(x, m.blocks.view(8, 3)).relu())


# Prompt tuning as peft has it: one row is looked up, and repeated for the batch.
@WHERE(
    "soft-prompt",
    {"": normal(5, 2, 3), "-square": normal(2, 2, 3)},
    tokens=buffer(lambda: torch.arange(2)),
    **PROMPT,
)
@WHERE(
    "soft-prompt-of-kept-ids",
    {f"-{b}-{t}": normal(b, t, 3) for b, t in ((5, 4), (2, 4), (1, 4), (4, 2))},
    tokens=lambda: torch.arange(2),
    **PROMPT,
)
def soft_prompt(m: Any, x: Tensor) -> Tensor:
    ids = m.tokens.unsqueeze(0).expand(len(x), -1)[:1]
    prompt = m.table(ids).repeat(len(x), 1, 1)
    return m.frozen(torch.cat([prompt, x], 1).tanh())


@WHERE("rows-sorted-and-back", normal(5, 3), a=linear(3, 3), b=linear(3, 2))
def sorted_rows(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    order = x[:, 0].argsort()
    return m.b(h[order])[order.argsort()]


@WHERE("two-views-", {"stacked": normal(5, 3), "of-two": normal(2, 3)}, a=linear(3, 2))
def two_views(m: Any, x: Tensor) -> Tensor:
    return m.a(torch.stack([x, x * 0.9]).flatten(0, 1)).view(2, len(x), -1).sum(0)


def prompts(m: Any, images: Tensor) -> Tensor:
    context = m.context.unsqueeze(0).expand(len(m.names), -1, -1)
    text = m.encoder(torch.cat([context, m.names], 1)).tanh().mean(1)
    return images @ text.T


for name, classes, images in (("more", 10, 3), ("as-many", 4, 4)):
    names, encoder = buffer(normal(classes, 1, 8)), frozen(linear(8, 8))
    model = uses(prompts, context=normal(3, 8), names=names, encoder=encoder)
    WHERE.add(f"expanded-over-{name}-classes", model, normal(images, 8))


@WHERE("expanded-over-channels", normal(3, 4, 5, 5), mix=nn.Identity, kernel=normal(1, 1, 3, 3))
@WHERE(
    "expanded-over-as-many-channels",
    normal(4, 4, 5, 5),
    mix=lambda: nn.Conv2d(4, 4, 1),
    kernel=normal(1, 1, 3, 3),
)
def kernel(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(m.mix(x), m.kernel.expand(4, 1, 3, 3), groups=4)


@WHERE("expanded-over-heads", normal(4, 5, 8), proj=linear(8, 8), scale=normal(1, 1, 1))
def scaled_heads(m: Any, x: Tensor) -> Tensor:
    return m.proj(x).unflatten(-1, (4, 2)).transpose(1, 2) * m.scale.expand(4, 1, 1)


@WHERE("expanded-over-outputs-first", normal(5, 3), v=normal(1, 3), out=linear(4, 2))
def expanded_first(m: Any, x: Tensor) -> Tensor:
    return m.out(F.linear(x, m.v.expand(4, 3)))


@WHERE("time-first-heads", {"-square": normal(5, 5, 5), "": normal(5, 7, 5)}, **LSTM)
def heads(m: Any, x: Tensor) -> Tensor:
    h, _ = m.rnn(x.transpose(0, 1))
    steps, size, width = h.shape
    q = h.contiguous().view(steps, size * 2, width // 2).transpose(0, 1)
    a = torch.bmm(torch.bmm(q, q.transpose(1, 2)).softmax(-1), q)
    return m.out(a.transpose(0, 1).reshape(steps, size, width)).transpose(0, 1)


@WHERE("time-first-stack-", {"of-two": normal(2, 7, 5), "square": normal(5, 5, 5)}, **LSTM)
def both_directions(m: Any, x: Tensor) -> Tensor:
    h, _ = m.rnn(x.transpose(0, 1))
    return m.out(torch.stack([h, h.flip(0)])).mean(0).transpose(0, 1)


STEPS = {"-square": normal(5, 5, 3), "": normal(4, 7, 3)}


@WHERE("steps-made", STEPS, embed=linear(3, 4), **STEPS_MADE)
@WHERE("steps-made-alone", STEPS, embed=frozen(linear(3, 4)), **STEPS_MADE)
def steps_made(m: Any, x: Tensor) -> Tensor:
    return m.embed(x) + m.mlp(torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(1))


def routed() -> Tensor:
    """Four tokens go to the expert: 2, 0, 1 and 1 of four examples of three tokens."""
    found = torch.randn(4, 3, 3)
    to_expert = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 0, 1], [0, 1, 0]])
    found[..., 0] = found[..., 0].abs() * (2 * to_expert - 1)
    return found


@WHERE("an-expert-with-as-many-tokens", routed, a=linear(3, 4), b=linear(3, 4))
def experts(m: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    mine = (tokens[:, 0] > 0).nonzero().flatten()
    return m.a(tokens).index_add(0, mine, m.b(tokens[mine])).view(*x.shape[:2], -1)


PRODUCTS = Topic("columns, rows and vectors")
for name, shape, function in (
    ("matmul-column", (6, 1), lambda m, x: x @ m.w),
    ("matmul-viewed-as-row", (6, 1), lambda m, x: x[:, :1] @ m.w.view(1, 6)),
    ("linear-transposed", (6, 1), lambda m, x: F.linear(x, m.w.t())),
    ("einsum-column", (6, 1), lambda m, x: torch.einsum("bd,do->bo", x, m.w)),
    ("addmm-column", (6, 1), lambda m, x: torch.addmm(torch.zeros(1, dtype=D), x, m.w)),
    ("linear-viewed", (6, 1), lambda m, x: F.linear(x[:, :3], m.w.view(2, 3))),
    ("linear-viewed-matrix", (6, 4), lambda m, x: F.linear(x, m.w.view(4, 6))),
    ("matmul-row", (1, 5), lambda m, x: x[:, :1] @ m.w),
    ("matmul-vector", (6,), lambda m, x: x @ m.w),
    ("mv", (6,), lambda m, x: torch.mv(x, m.w)),
    ("linear-vector", (6,), lambda m, x: F.linear(x, m.w)),
    ("maximum", (6,), lambda m, x: torch.maximum(x, m.w)),
    ("clamp", (6,), lambda m, x: x.clamp(min=m.w)),
    ("logaddexp", (6,), lambda m, x: torch.logaddexp(x, m.w)),
    ("atan2", (6,), lambda m, x: torch.atan2(x, m.w)),
):
    PRODUCTS.add(name, uses(function, w=normal(*shape)), normal(4, 6))


ONCE_REFUSED = Topic("what was refused once")


@ONCE_REFUSED(
    "windows",
    {"": normal(3, 8, 6), "-as-many-as-examples": normal(2, 8, 6)},
    qkv=linear(6, 18),
    bias=normal(2, 4, 4),
)
def windows(m: Any, x: Tensor) -> Tensor:
    w = x.reshape(len(x) * 2, 4, 6)
    q, k, v = m.qkv(w).reshape(len(w), 4, 3, 2, 3).permute(2, 0, 3, 1, 4)
    a = ((q @ k.mT) + m.bias).softmax(-1) @ v
    return a.transpose(1, 2).reshape(len(x), 8, 6)


@ONCE_REFUSED(
    "grid-made",
    normal(4, 3, 5, 5),
    embed=lambda: nn.Conv2d(3, 4, 1),
    project=lambda: nn.Conv2d(2, 4, 1),
)
def grid(m: Any, x: Tensor) -> Tensor:
    n = torch.arange(5, dtype=D)
    at = torch.stack(torch.meshgrid(n, n, indexing="ij")).unsqueeze(0)
    return m.embed(x) + m.project(at)


@ONCE_REFUSED("standardised-weight", normal(5, 3, 8, 8), w=normal(4, 3, 3, 3))
def standardised(m: Any, x: Tensor) -> Tensor:
    w = F.batch_norm(m.w.reshape(1, 4, -1), None, None, training=True, momentum=0.0)
    return F.conv2d(x, w.reshape_as(m.w))


@ONCE_REFUSED(
    "bias-behind", normal(3, 5, 4), rnn=lambda: nn.GRU(4, 4, batch_first=True), b=normal(4)
)
def bias_behind(m: Any, x: Tensor) -> Tensor:
    h, _ = m.rnn(x)
    return torch.cat([h, m.b.repeat(len(h), 1, 1)], 1)


@ONCE_REFUSED("bias-behind-time-first", normal(3, 5, 4), rnn=lambda: nn.GRU(4, 4), b=normal(4))
def bias_behind_time_first(m: Any, x: Tensor) -> Tensor:
    h, _ = m.rnn(x.transpose(0, 1))
    return torch.cat([h, m.b.repeat(1, h.shape[1], 1)]).transpose(0, 1)


@ONCE_REFUSED("bias-behind-alone", {"": normal(3, 5, 4), "-of-one": normal(1, 5, 4)}, b=normal(4))
def bias_behind_alone(m: Any, x: Tensor) -> Tensor:
    return torch.cat([x, m.b.repeat(len(x), 1, 1)], 1)


@ONCE_REFUSED(
    "factors-by-ids",
    several(lambda: torch.randint(9, (5,)), lambda: torch.randint(7, (5,))),
    users=embedding(9, 4),
    items=embedding(7, 4),
)
def factors_by_ids(m: Any, u: Tensor, i: Tensor) -> Tensor:
    return (m.users(u) * m.items(i)).sum(-1)


@ONCE_REFUSED("addcmul", normal(4, 5, 6), shift=normal(6), scale=normal(6))
def addcmul(m: Any, x: Tensor) -> Tensor:
    return torch.addcmul(m.shift, m.scale, x)


@ONCE_REFUSED("lerp", normal(4, 5, 6), a=normal(6), b=normal(6))
def lerp(m: Any, x: Tensor) -> Tensor:
    return torch.lerp(m.a, x, m.b)


@ONCE_REFUSED("strided-group-norm", normal(3, 4, 5, 5), p=normal(4, 2))
def strided_group_norm(m: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, 2, m.p[:, 0], m.p[:, 1])


@ONCE_REFUSED("group-norm-of-one-scale", normal(3, 4, 5, 5), p=normal(1))
def group_norm_of_one_scale(m: Any, x: Tensor) -> Tensor:
    return F.group_norm(x, 2, m.p.expand(4))


def with_strided_leaves() -> nn.Module:
    norm = nn.GroupNorm(2, 4).double()
    norm.weight = nn.Parameter(torch.randn(4, 3, dtype=D)[:, 1])
    norm.bias = nn.Parameter(torch.randn(4, 2, dtype=D)[:, 0])
    return norm


ONCE_REFUSED.add("group-norm-of-strided-leaves", with_strided_leaves, normal(3, 4, 5, 5))
for name, function in (
    ("new", lambda m, x: m.b(torch.empty_like(m.a(x)).fill_(m.p) + m.a(x))),
    ("copy", lambda m, x: m.b(torch.fill(m.a(x), m.p) + x)),
    ("in-place", lambda m, x: m.b((m.a(x) * 1).fill_(m.p) + x)),
):
    filled = uses(function, a=linear(3, 3), b=linear(3, 3), p=normal())
    ONCE_REFUSED.add(f"filled-with-a-parameter-{name}", filled, normal(4, 3))


BEHIND = Topic("functions behind a layer that has the time first")


def behind(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda m, x: m.out(function(m.rnn(x.transpose(0, 1))[0])).transpose(0, 1)


for name, function in (
    ("tanh", torch.tanh),
    ("square", torch.square),
    ("softsign", F.softsign),
    ("erf", torch.erf),
    ("clamp_min", lambda h: h.clamp_min(0)),
    ("cumsum", lambda h: h.cumsum(0)),
    ("roll", lambda h: h.roll(2, 0)),
    ("unflatten", lambda h: h.unflatten(-1, (2, 2)).flatten(-2)),
    ("pad", lambda h: F.pad(h, (0, 0, 0, 0, 1, 0))),
    ("transpose-in-place", lambda h: h.clone().transpose_(0, 1).transpose(0, 1)),
    ("twice-transposed", lambda h: h.mT.mT),
    ("stack-and-sum", lambda h: torch.stack([h, 2 * h], 1).sum(1)),
    ("einsum", lambda h: torch.einsum("tbd,ed->tbe", h, torch.ones(4, 4, dtype=D))),
):
    model = uses(behind(function), rnn=lambda: nn.GRU(4, 4), out=linear(4, 2))
    BEHIND.add(name, model, {"-3": normal(3, 3, 4), "-7": normal(3, 7, 4)})


WRONG_ONCE = {row.name: row for topic in (MADE, COMPLEX, WHERE) for row in topic.rows}
OTHERS = {row.name: row for topic in (PRODUCTS, ONCE_REFUSED, BEHIND) for row in topic.rows}
ROWS = WRONG_ONCE | OTHERS


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_models(row: Row) -> None:
    assert_right(*row.in_float64())


@functools.lru_cache
def pairs(n: int) -> Tensor:
    at = torch.arange(n)
    return at[None, :] - at[:, None] + n - 1


@pytest.mark.parametrize("size", [4, 5])
def test_positions_that_are_made_once_and_kept(size: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(x) + m.table[pairs(5)]

    pairs.cache_clear()
    model = uses(forward, table=normal(9, 2), out=linear(2, 2))().double()
    for _ in range(3):
        assert_right(model, (torch.randn(size, 5, 5, 2, dtype=D),))
    pairs.cache_clear()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(reduction: str) -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no F.linear_cross_entropy")

    def head() -> nn.Module:
        return nn.LinearCrossEntropyLoss(5, 4, reduction=reduction)

    model = uses(lambda m, x, y: m.head(m.first(x), y), first=linear(6, 5), head=head)().double()
    batch = (torch.randn(7, 6, dtype=D), torch.randint(4, (7,)))
    assert_right(model, batch, lambda model, batch: model(*batch).mean())


def test_ids_drawn_in_the_block() -> None:
    users = nn.Embedding(9, 4).double()
    with pc.collect(users, pc.SqNorms()) as record:
        ids = torch.randint(9, (5,))
        users(ids).square().sum(1).mean().backward()
    truth = 4 * users.weight.detach()[ids].square().sum(1)
    assert record.batch_size == 5
    torch.testing.assert_close(record.sq_norms, truth, rtol=1e-10, atol=0)


def test_an_input_drawn_in_the_block() -> None:
    model = uses(lambda m, x: torch.mv(x, m.v), v=normal(6))().double()
    with pc.collect(model, pc.SqNorms()) as record:
        drawn = torch.randn(4, 6, dtype=D)
        model(drawn).square().mean().backward()
    g = 2 * (drawn @ model.v.detach()).unsqueeze(1) * drawn
    torch.testing.assert_close(record.sq_norms, g.square().sum(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("row", WRONG_ONCE.values(), ids=WRONG_ONCE)
def test_verify_and_norm_clipping_agree(row: Row) -> None:
    """The statistics and what is made of whole examples come from the same capture."""
    model, batch = row.in_float64()
    assert not pc.verify(model, rows, batch).failures
    truth = per_example_gradients(model, rows, batch)
    norms = joined(truth).norm(dim=1)
    clip = norms.median().item()
    with pc.aggregate(model, pc.NormClip(clip)) as agg:
        rows(model, batch).backward()
    assert agg.report.batch_size == len(batch[0])
    for name, p in model.named_parameters():
        if p.requires_grad:
            factors = (clip / norms).clamp(max=1) / len(norms)
            expected = torch.tensordot(factors, truth[name], 1)
            assert (grad_of(p) - expected).abs().max() <= 1e-9 * clip, name
