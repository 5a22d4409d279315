"""One small model for each kind of fault that public code has brought to light."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.checks import relative_error
from support.oracle import per_example_gradients
from torch import Tensor, nn

import pycoherence as pc

D = torch.float64
Batch = tuple[Tensor, ...]


class Of(nn.Module):
    """A function of a model: shapes become parameters, tensors buffers, the rest is as it is."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, tuple):
                setattr(self, name, nn.Parameter(torch.randn(part, dtype=D)))
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part.double() if isinstance(part, nn.Module) else part)

    def forward(self, *batch: Tensor) -> Tensor:
        return self.function(self, *batch)


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def rows(model: nn.Module, batch: Batch) -> Tensor:
    """Each example's own sum of squares, and their mean."""
    found = model(*batch)
    return found.abs().square().reshape(len(found), -1).sum(1).mean()


def assert_right(
    model: nn.Module, batch: Batch, size: int, loss: Any = rows, **options: Any
) -> pc.Record:
    """Norms and Gram by the oracle, `.grad` by plain autograd, and the size."""
    truth = per_example_gradients(model, loss, batch)
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    loss(plain, batch).backward()
    with pc.collect(ours, pc.SqNorms(), pc.Gram(), **options) as record:
        value = loss(ours, batch)
        value.backward()
    torch.testing.assert_close(value, loss(plain, batch), rtol=1e-12, atol=1e-12)
    assert record.batch_size == size
    flat = torch.cat([g.reshape(len(g), -1) for g in truth.values()], 1)
    for name, gradients in {**truth, "": flat}.items():
        one = record.by_parameter[name] if name else record
        each = gradients.reshape(len(gradients), -1)
        gram = each @ each.T
        unit = gram.diagonal().max().clamp_min(1e-20)
        assert ((one.sq_norms - gram.diagonal()).abs().max() / unit) <= 1e-9, name
        assert ((one.gram - gram).abs().max() / unit) <= 1e-9, name
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        mine, other = (torch.zeros_like(x) if x.grad is None else x.grad for x in (p, q))
        assert relative_error(mine, other) <= 1e-11, name
    return record


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D)


# What a parameter is made of, and how it is written.


def merged_in_place(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w += m.b @ m.a
    return F.linear(x, w)


def assembled(m: Any, x: Tensor) -> Tensor:
    w = m.w * 1
    w[:2] = m.v
    return F.linear(x, w)


def through_a_view(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone()
    w[1:3].add_(m.v)
    return F.linear(x, w)


def added_by_index(m: Any, x: Tensor) -> Tensor:
    w = m.w.clone().index_add_(0, torch.tensor([0, 3]), m.v)
    return F.linear(x, w)


def examples_into_tiled(m: Any, x: Tensor) -> Tensor:
    h = m.layer(x)
    w = m.t.tile(len(x), 1, 1)
    w[:, 0] = h[:, 0]
    return h * w


def examples_into_added(m: Any, x: Tensor) -> Tensor:
    h = m.layer(x)
    w = m.t + torch.zeros(len(x), 1, 1, dtype=D)
    w[:, 1:] = h[:, 1:]
    return h * w


MADE = {
    "merged-in-place": lambda: (Of(merged_in_place, w=(4, 3), a=(2, 3), b=(4, 2)), (x(5, 3),)),
    "assembled": lambda: (Of(assembled, w=(4, 3), v=(2, 3)), (x(5, 3),)),
    "through-a-view": lambda: (Of(through_a_view, w=(4, 3), v=(2, 3)), (x(5, 3),)),
    "added-by-index": lambda: (Of(added_by_index, w=(4, 3), v=(2, 3)), (x(5, 3),)),
    "examples-into-tiled": lambda: (
        Of(examples_into_tiled, layer=nn.Linear(3, 3), t=(2, 3)),
        (x(5, 2, 3),),
    ),
    "examples-into-added": lambda: (
        Of(examples_into_added, layer=nn.Linear(3, 3), t=(2, 3)),
        (x(5, 2, 3),),
    ),
}

# Complex numbers.

COMPLEX = {
    "learned-filter": lambda: (
        Of(
            lambda m, x: torch.fft.irfft(
                torch.fft.rfft(m.layer(x), dim=1) * torch.view_as_complex(m.w), n=4, dim=1
            ),
            layer=nn.Linear(3, 3),
            w=(3, 3, 2),
        ),
        (x(5, 4, 3),),
    ),
    "complex-linear": lambda: (
        Of(
            lambda m, x: F.linear(
                torch.complex(m.layer(x), x), torch.complex(m.real, m.imaginary)
            ).abs(),
            real=(3, 3),
            imaginary=(3, 3),
            layer=nn.Linear(3, 3),
        ),
        (x(5, 3),),
    ),
    "complex-scale": lambda: (
        Of(
            lambda m, x: torch.view_as_real(m.layer(x) * torch.view_as_complex(m.w).conj()),
            layer=nn.Linear(3, 3),
            w=(3, 2),
        ),
        (x(5, 3),),
    ),
    "complex-shift": lambda: (
        Of(
            lambda m, x: (m.layer(x) + torch.view_as_complex(m.w)).abs(),
            layer=nn.Linear(3, 3),
            w=(3, 2),
        ),
        (x(5, 3),),
    ),
    "complex-product": lambda: (
        Of(
            lambda m, x: torch.complex(m.layer(x), x) @ torch.view_as_complex(m.w),
            layer=nn.Linear(3, 3),
            w=(3, 2, 2),
        ),
        (x(5, 3),),
    ),
}

# Where the batch is.


def queries(m: Any, x: Tensor) -> Tensor:
    made = m.q.unsqueeze(1).expand(-1, len(x), -1)
    return m.decoder(made, x.transpose(0, 1)).transpose(0, 1)


def queries_repeated(m: Any, x: Tensor) -> Tensor:
    made = m.q.unsqueeze(1).repeat(1, len(x), 1)
    return m.decoder(made, x.transpose(0, 1)).transpose(0, 1)


def decoder() -> nn.Module:
    return nn.TransformerDecoderLayer(4, 2, 8, 0.0)


def soft_prompt(m: Any, x: Tensor) -> Tensor:
    ids = m.tokens.unsqueeze(0).expand(len(x), -1)[:1]
    prompt = m.table(ids).repeat(len(x), 1, 1)
    return m.frozen(torch.cat([prompt, x], 1).tanh())


def sorted_rows(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).tanh()
    order = x[:, 0].argsort()
    return m.b(h[order])[order.argsort()]


def two_views(m: Any, x: Tensor) -> Tensor:
    return m.a(torch.stack([x, x * 0.9]).flatten(0, 1)).view(2, len(x), -1).sum(0)


def prompts(m: Any, images: Tensor) -> Tensor:
    context = m.context.unsqueeze(0).expand(len(m.names), -1, -1)
    text = m.encoder(torch.cat([context, m.names], 1)).tanh().mean(1)
    return images @ text.T


def heads(m: Any, x: Tensor) -> Tensor:
    h, _ = m.rnn(x.transpose(0, 1))
    steps, size, width = h.shape
    q = h.contiguous().view(steps, size * 2, width // 2).transpose(0, 1)
    a = torch.bmm(torch.bmm(q, q.transpose(1, 2)).softmax(-1), q)
    return m.out(a.transpose(0, 1).reshape(steps, size, width)).transpose(0, 1)


def both_directions(m: Any, x: Tensor) -> Tensor:
    h, _ = m.rnn(x.transpose(0, 1))
    return m.out(torch.stack([h, h.flip(0)])).mean(0).transpose(0, 1)


def experts(m: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    mine = (tokens[:, 0] > 0).nonzero().flatten()
    return m.a(tokens).index_add(0, mine, m.b(tokens[mine])).view(*x.shape[:2], -1)


def routed() -> Tensor:
    """Four tokens go to the expert: 2, 0, 1 and 1 of four examples of three tokens."""
    found = x(4, 3, 3)
    to_expert = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 0, 1], [0, 1, 0]], dtype=D)
    found[..., 0] = found[..., 0].abs() * (2 * to_expert - 1)
    return found


def prompt_model() -> nn.Module:
    return Of(
        soft_prompt,
        tokens=torch.arange(2),
        table=nn.Embedding(2, 3),
        frozen=frozen(nn.Linear(3, 2)),
    )


def prompts_of(classes: int) -> nn.Module:
    return Of(prompts, context=(3, 8), names=x(classes, 1, 8), encoder=frozen(nn.Linear(8, 8)))


def kernel(first: nn.Module) -> nn.Module:
    return Of(
        lambda m, x: F.conv2d(m.mix(x), m.kernel.expand(4, 1, 3, 3), groups=4),
        mix=first,
        kernel=(1, 1, 3, 3),
    )


def steps_made(trained: bool) -> nn.Module:
    embed = nn.Linear(3, 4)
    return Of(
        lambda m, x: m.embed(x) + m.mlp(torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(1)),
        embed=embed if trained else frozen(embed),
        mlp=nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 4)),
    )


def lstm(function: Any) -> nn.Module:
    return Of(function, rnn=nn.LSTM(5, 8), out=nn.Linear(8, 3))


WHERE = {
    "decoder-queries": lambda: (Of(queries, decoder=decoder(), q=(3, 4)), (x(5, 6, 4),)),
    "decoder-queries-square": lambda: (Of(queries, decoder=decoder(), q=(5, 4)), (x(5, 5, 4),)),
    "decoder-queries-repeated": lambda: (
        Of(queries_repeated, decoder=decoder(), q=(5, 4)),
        (x(5, 3, 4),),
    ),
    "frozen-blocks": lambda: (
        Of(
            lambda m, x: m.layer(F.linear(x, m.blocks.view(8, 3)).relu()),
            blocks=x(2, 12),
            layer=nn.Linear(8, 2),
        ),
        (x(4, 3),),
    ),
    "soft-prompt": lambda: (prompt_model(), (x(5, 2, 3),)),
    "soft-prompt-square": lambda: (prompt_model(), (x(2, 2, 3),)),
    "rows-sorted-and-back": lambda: (
        Of(sorted_rows, a=nn.Linear(3, 3), b=nn.Linear(3, 2)),
        (x(5, 3),),
    ),
    "two-views-stacked": lambda: (Of(two_views, a=nn.Linear(3, 2)), (x(5, 3),)),
    "two-views-of-two": lambda: (Of(two_views, a=nn.Linear(3, 2)), (x(2, 3),)),
    "expanded-over-more-classes": lambda: (prompts_of(10), (x(3, 8),)),
    "expanded-over-as-many-classes": lambda: (prompts_of(4), (x(4, 8),)),
    "expanded-over-channels": lambda: (kernel(nn.Identity()), (x(3, 4, 5, 5),)),
    "expanded-over-as-many-channels": lambda: (kernel(nn.Conv2d(4, 4, 1)), (x(4, 4, 5, 5),)),
    "expanded-over-heads": lambda: (
        Of(
            lambda m, x: m.proj(x).unflatten(-1, (4, 2)).transpose(1, 2) * m.scale.expand(4, 1, 1),
            proj=nn.Linear(8, 8),
            scale=(1, 1, 1),
        ),
        (x(4, 5, 8),),
    ),
    "expanded-over-outputs-first": lambda: (
        Of(lambda m, x: m.out(F.linear(x, m.v.expand(4, 3))), v=(1, 3), out=nn.Linear(4, 2)),
        (x(5, 3),),
    ),
    "time-first-heads-square": lambda: (lstm(heads), (x(5, 5, 5),)),
    "time-first-heads": lambda: (lstm(heads), (x(5, 7, 5),)),
    "time-first-stack-of-two": lambda: (lstm(both_directions), (x(2, 7, 5),)),
    "time-first-stack-square": lambda: (lstm(both_directions), (x(5, 5, 5),)),
    "steps-made-square": lambda: (steps_made(True), (x(5, 5, 3),)),
    "steps-made": lambda: (steps_made(True), (x(4, 7, 3),)),
    "steps-made-alone": lambda: (steps_made(False), (x(4, 7, 3),)),
    "steps-made-alone-square": lambda: (steps_made(False), (x(5, 5, 3),)),
    "an-expert-with-as-many-tokens": lambda: (
        Of(experts, a=nn.Linear(3, 4), b=nn.Linear(3, 4)),
        (routed(),),
    ),
}

# Column weights, vectors, two parameters in one function, strides.

PRODUCTS: dict[str, Any] = {
    "matmul-column": ((6, 1), lambda m, x: x @ m.w),
    "matmul-viewed-as-row": ((6, 1), lambda m, x: x[:, :1] @ m.w.view(1, 6)),
    "linear-transposed": ((6, 1), lambda m, x: F.linear(x, m.w.t())),
    "einsum-column": ((6, 1), lambda m, x: torch.einsum("bd,do->bo", x, m.w)),
    "addmm-column": ((6, 1), lambda m, x: torch.addmm(torch.zeros(1, dtype=D), x, m.w)),
    "linear-viewed": ((6, 1), lambda m, x: F.linear(x[:, :3], m.w.view(2, 3))),
    "linear-viewed-matrix": ((6, 4), lambda m, x: F.linear(x, m.w.view(4, 6))),
    "matmul-row": ((1, 5), lambda m, x: x[:, :1] @ m.w),
    "matmul-vector": ((6,), lambda m, x: x @ m.w),
    "mv": ((6,), lambda m, x: torch.mv(x, m.w)),
    "linear-vector": ((6,), lambda m, x: F.linear(x, m.w)),
    "maximum": ((6,), lambda m, x: torch.maximum(x, m.w)),
    "clamp": ((6,), lambda m, x: x.clamp(min=m.w)),
    "logaddexp": ((6,), lambda m, x: torch.logaddexp(x, m.w)),
    "atan2": ((6,), lambda m, x: torch.atan2(x, m.w)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_columns_rows_and_vectors(name: str) -> None:
    shape, function = PRODUCTS[name]
    assert_right(Of(function, w=shape), (x(4, 6),), 4)


def windows(m: Any, x: Tensor) -> Tensor:
    w = x.reshape(len(x) * 2, 4, 6)
    q, k, v = m.qkv(w).reshape(len(w), 4, 3, 2, 3).permute(2, 0, 3, 1, 4)
    a = ((q @ k.mT) + m.bias).softmax(-1) @ v
    return a.transpose(1, 2).reshape(len(x), 8, 6)


def grid(m: Any, x: Tensor) -> Tensor:
    n = torch.arange(5, dtype=D)
    at = torch.stack(torch.meshgrid(n, n, indexing="ij")).unsqueeze(0)
    return m.embed(x) + m.project(at)


def standardised(m: Any, x: Tensor) -> Tensor:
    w = F.batch_norm(m.w.reshape(1, 4, -1), None, None, training=True, momentum=0.0)
    return F.conv2d(x, w.reshape_as(m.w))


def bias_behind(m: Any, x: Tensor) -> Tensor:
    h, _ = m.rnn(x)
    return torch.cat([h, m.bias.repeat(len(h), 1, 1)], 1)


def bias_behind_time_first(m: Any, x: Tensor) -> Tensor:
    h, _ = m.rnn(x.transpose(0, 1))
    return torch.cat([h, m.bias.repeat(1, h.shape[1], 1)]).transpose(0, 1)


def bias_behind_alone(m: Any, x: Tensor) -> Tensor:
    return torch.cat([x, m.bias.repeat(len(x), 1, 1)], 1)


ONCE_REFUSED = {
    "windows": lambda: (Of(windows, qkv=nn.Linear(6, 18), bias=(2, 4, 4)), (x(3, 8, 6),)),
    "windows-as-many-as-examples": lambda: (
        Of(windows, qkv=nn.Linear(6, 18), bias=(2, 4, 4)),
        (x(2, 8, 6),),
    ),
    "grid-made": lambda: (
        Of(grid, embed=nn.Conv2d(3, 4, 1), project=nn.Conv2d(2, 4, 1)),
        (x(4, 3, 5, 5),),
    ),
    "standardised-weight": lambda: (Of(standardised, w=(4, 3, 3, 3)), (x(5, 3, 8, 8),)),
    "addcmul": lambda: (
        Of(lambda m, x: torch.addcmul(m.shift, m.scale, x), shift=(6,), scale=(6,)),
        (x(4, 5, 6),),
    ),
    "lerp": lambda: (
        Of(lambda m, x: torch.lerp(m.a, x, m.b), a=(6,), b=(6,)),
        (x(4, 5, 6),),
    ),
    "bias-behind": lambda: (
        Of(bias_behind, rnn=nn.GRU(4, 4, batch_first=True), bias=(4,)),
        (x(3, 5, 4),),
    ),
    "bias-behind-time-first": lambda: (
        Of(bias_behind_time_first, rnn=nn.GRU(4, 4), bias=(4,)),
        (x(3, 5, 4),),
    ),
    "bias-behind-alone": lambda: (Of(bias_behind_alone, bias=(4,)), (x(3, 5, 4),)),
    "bias-behind-alone-of-one": lambda: (Of(bias_behind_alone, bias=(4,)), (x(1, 5, 4),)),
    "strided-group-norm": lambda: (
        Of(lambda m, x: F.group_norm(x, 2, m.p[:, 0], m.p[:, 1]), p=(4, 2)),
        (x(3, 4, 5, 5),),
    ),
    "group-norm-of-one-scale": lambda: (
        Of(lambda m, x: F.group_norm(x, 2, m.p.expand(4)), p=(1,)),
        (x(3, 4, 5, 5),),
    ),
    "factors-by-ids": lambda: (
        Of(
            lambda m, u, i: (m.users(u) * m.items(i)).sum(-1),
            users=nn.Embedding(9, 4),
            items=nn.Embedding(7, 4),
        ),
        (torch.randint(9, (5,)), torch.randint(7, (5,))),
    ),
}


@pytest.mark.parametrize("name", [*MADE, *COMPLEX, *WHERE, *ONCE_REFUSED])
def test_models(name: str) -> None:
    model, batch = {**MADE, **COMPLEX, **WHERE, **ONCE_REFUSED}[name]()
    assert_right(model, batch, len(batch[0]))


BEHIND: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "square": torch.square,
    "softsign": F.softsign,
    "erf": torch.erf,
    "clamp_min": lambda h: h.clamp_min(0),
    "cumsum": lambda h: h.cumsum(0),
    "roll": lambda h: h.roll(2, 0),
    "unflatten": lambda h: h.unflatten(-1, (2, 2)).flatten(-2),
    "pad": lambda h: F.pad(h, (0, 0, 0, 0, 1, 0)),
    "transpose-in-place": lambda h: h.clone().transpose_(0, 1).transpose(0, 1),
    "twice-transposed": lambda h: h.mT.mT,
    "stack-and-sum": lambda h: torch.stack([h, 2 * h], 1).sum(1),
    "einsum": lambda h: torch.einsum("tbd,ed->tbe", h, torch.ones(4, 4, dtype=D)),
}


@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize("name", BEHIND)
def test_functions_behind_a_time_first_layer(name: str, steps: int) -> None:
    function = BEHIND[name]

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out(function(m.rnn(x.transpose(0, 1))[0])).transpose(0, 1)

    assert_right(Of(forward, rnn=nn.GRU(4, 4), out=nn.Linear(4, 2)), (x(3, steps, 4),), 3)


def test_a_leaf_with_a_stride_in_group_norm() -> None:
    norm = nn.GroupNorm(2, 4).double()
    norm.weight = nn.Parameter(x(4, 3)[:, 1])
    norm.bias = nn.Parameter(x(4, 2)[:, 0])
    assert_right(norm, (x(3, 4, 5, 5),), 3)


@functools.lru_cache
def pairs(n: int) -> Tensor:
    at = torch.arange(n)
    return at[None, :] - at[:, None] + n - 1


@pytest.mark.parametrize("size", [4, 5])
def test_positions_that_are_made_once_and_kept(size: int) -> None:
    pairs.cache_clear()
    model = Of(lambda m, x: m.out(x) + m.table[pairs(5)], table=(9, 2), out=nn.Linear(2, 2))
    batch = (x(size, 5, 5, 2),)
    for _ in range(3):
        assert_right(model, batch, size)
    pairs.cache_clear()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(reduction: str) -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no F.linear_cross_entropy")
    head = nn.LinearCrossEntropyLoss(5, 4, reduction=reduction)
    model = Of(lambda m, x, y: m.head(m.first(x), y), first=nn.Linear(6, 5), head=head)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(*batch).mean()

    assert_right(model, (x(7, 6), torch.randint(4, (7,))), 7, loss)


def test_ids_drawn_in_the_block() -> None:
    users = nn.Embedding(9, 4).double()
    with pc.collect(users, pc.SqNorms()) as record:
        ids = torch.randint(9, (5,))
        users(ids).square().sum(1).mean().backward()
    truth = 4 * users.weight.detach()[ids].square().sum(1)
    assert record.batch_size == 5
    torch.testing.assert_close(record.sq_norms, truth, rtol=1e-10, atol=0)


def test_an_input_drawn_in_the_block() -> None:
    model = Of(lambda m, x: torch.mv(x, m.v), v=(6,))
    with pc.collect(model, pc.SqNorms()) as record:
        drawn = torch.randn(4, 6, dtype=D)
        model(drawn).square().mean().backward()
    g = 2 * (drawn @ model.v.detach()).unsqueeze(1) * drawn
    torch.testing.assert_close(record.sq_norms, g.square().sum(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.LazyLinear(3), (4, 5)),
        (lambda: nn.LazyConv2d(3, 3), (4, 2, 5, 5)),
        (lambda: nn.LazyConvTranspose1d(2, 3), (4, 2, 5)),
    ],
    ids=["linear", "conv", "conv-transpose"],
)
def test_lazy_layers_that_have_not_run(layer: Any, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(layer()).double()
    batch = (x(*shape),)
    with pc.collect(model, pc.SqNorms()) as record:
        rows(model, batch).backward()
    truth = per_example_gradients(model, rows, batch)
    for name, gradients in truth.items():
        expected = gradients.flatten(1).square().sum(1)
        assert relative_error(record.by_parameter[name].sq_norms, expected) < 1e-10


WRONG_ONCE = {**MADE, **COMPLEX, **WHERE}


@pytest.mark.parametrize("name", WRONG_ONCE)
def test_verify_and_norm_clipping_agree(name: str) -> None:
    """The statistics and what is made of whole examples come from the same capture."""
    model, batch = WRONG_ONCE[name]()
    pc.verify(model, rows, batch)
    truth = per_example_gradients(model, rows, batch)
    norms = torch.cat([g.flatten(1) for g in truth.values()], 1).norm(dim=1)
    clip = norms.median().item()
    with pc.aggregate(model, pc.NormClip(clip)) as agg:
        rows(model, batch).backward()
    assert agg.report.batch_size == len(batch[0])
    for name, p in model.named_parameters():
        if p.requires_grad:
            factors = (clip / norms).clamp(max=1) / len(norms)
            expected = torch.tensordot(factors, truth[name], 1)
            mine = torch.zeros_like(p) if p.grad is None else p.grad
            assert (mine - expected).abs().max() <= 1e-9 * clip, name


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.b(torch.empty_like(m.a(x)).fill_(m.p) + m.a(x)),
        lambda m, x: m.b(torch.fill(m.a(x), m.p) + x),
        lambda m, x: m.b((m.a(x) * 1).fill_(m.p) + x),
    ],
    ids=["new", "copy", "in-place"],
)
def test_filled_with_a_parameter(function: Callable[..., Tensor]) -> None:
    assert_right(Of(function, a=nn.Linear(3, 3), b=nn.Linear(3, 3), p=()), (x(4, 3),), 4)
