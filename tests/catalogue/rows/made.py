"""Weights that are made of parameters: standardised, generated, written into."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, buffer, linear, normal, several, uses

T, D = 3, 6
features, sequence, square = normal(B, D), normal(B, T, D), normal(B, B, D)
images = normal(B, 2, 5, 5)
MADE = Topic("Weights that are made")
WRITTEN = Topic("Weights written into")
CONV = {"weight": normal(3, 2, 2, 2), "gain": normal(3, 1, 1, 1), "bias": normal(3)}
QUANTISED = {"codes": buffer(normal(15, 2)), "scales": buffer(normal(15, 1))}


@MADE("standardised by `F.batch_norm` of the weight", images, **CONV)
def standardised(m, x):
    """As in normaliser-free networks: statistics of the weight, by the fastest way to them."""
    w = m.weight.reshape(1, len(m.weight), -1)
    w = F.batch_norm(w, None, None, (m.gain * 0.3).view(-1), training=True, momentum=0.0, eps=1e-6)
    return F.conv2d(x, w.reshape_as(m.weight), m.bias)


@MADE("standardised by mean and variance", images, **CONV)
def standardised_by_hand(m, x):
    mean = m.weight.mean((1, 2, 3), keepdim=True)
    var = torch.var(m.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
    return F.conv2d(x, (m.weight - mean) / (var + 1e-5).sqrt() * m.gain, m.bias)


@MADE(
    "a kernel for each example, one grouped convolution (StyleGAN2)",
    several(images, features),
    weight=normal(3, 2, 3, 3),
    style=linear(D, 2),
)
def modulated(m, x, style):
    """StyleGAN2: a kernel for each example, all of them one grouped convolution."""
    s = m.style(style).view(len(x), 1, 2, 1, 1)
    w = m.weight.unsqueeze(0) * s
    w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    x = x.reshape(1, -1, 5, 5)
    return F.conv2d(x, w.view(-1, 2, 3, 3), padding=1, groups=len(w)).view(len(w), 3, 5, 5)


@MADE(
    "kernels mixed for each example, as many as there are",
    images,
    router=linear(2, B),
    bank=normal(B, 3, 2, 2, 2),
)
def dynamic(m, x):
    """Kernels mixed by what the input says, one for each example."""
    a = m.router(x.mean((2, 3))).softmax(1)
    w = torch.einsum("bk,koihw->boihw", a, m.bank)
    return torch.stack([F.conv2d(one, k) for one, k in zip(x, w, strict=True)])


@WRITTEN(
    "a clone, `w += b @ a`, `w[1:3] = rows`",
    square,
    weight=normal(5, D),
    b=normal(5, 2),
    a=normal(2, D),
    rows=normal(2, D),
)
def lora(m, x):
    w = m.weight.clone()
    w += m.b @ m.a * 0.5
    w[1:3] = m.rows
    return F.linear(x, w)


@WRITTEN(
    "zeros, `copy_`, `mul_`, `index_add_`, `addmm_`",
    sequence,
    top=normal(3, D),
    bottom=normal(2, D),
    scale=normal(D),
    two=normal(2, D),
    b=normal(5, 2),
    a=normal(2, D),
)
def assembled(m, x):
    w = torch.zeros(5, D, dtype=x.dtype)
    w[:3] = m.top
    w[3:].copy_(m.bottom)
    w[0].mul_(m.scale)
    w.index_add_(0, torch.tensor([1, 4]), m.two)
    return F.linear(x, w.addmm_(m.b, m.a))


@WRITTEN("a triangle by its indices", sequence, entries=normal(21))
def triangular(m, x):
    """A matrix from its lower triangle, its diagonal positive."""
    w = torch.zeros(D, D, dtype=x.dtype)
    i, j = torch.tril_indices(D, D)
    w[i, j] = m.entries
    return x @ (w.tril(-1) + torch.diag_embed(F.softplus(w.diagonal())))


@MADE("`matrix_exp` and `linalg.inv`", sequence, w=lambda: torch.randn(D, D) / 4, s=normal())
def symmetric(m, x):
    w = m.w.triu()
    w = w + w.triu(1).transpose(-1, -2)
    return (
        x
        @ torch.matrix_exp(w - w.mT * m.s)
        @ torch.linalg.inv(torch.eye(D, dtype=x.dtype) + w.tril(-1))
    )


@MADE(
    "`torch.block_diag`",
    sequence,
    blocks=lambda: nn.ParameterList(torch.randn(2, 3) for _ in range(2)),
    bias=normal(4),
)
def block_diagonal(m, x):
    return F.linear(x, torch.block_diag(*m.blocks), m.bias)


@MADE("`torch.kron`", square, a=normal(2, 3), b=normal(2, 2), c=normal(4, 1))
def kronecker(m, x):
    return F.linear(x, torch.kron(m.a, m.b) * m.c)


@WRITTEN(
    "frozen blocks `[n, 2]` read as a matrix, LoRA beside",
    square,
    **QUANTISED,
    down=linear(D, 2),
    up=linear(2, 5),
)
def low_rank_beside(m, x):
    """A frozen weight kept in blocks, read as a matrix, with something trained beside it."""
    w = (m.codes * m.scales).view(5, D)
    return F.linear(x, w.detach()) + m.up(m.down(x)) * 2


@WRITTEN(
    "frozen blocks and LoRA in one matrix",
    sequence,
    **QUANTISED,
    b=normal(5, 2),
    a=normal(2, D),
    head=linear(5, 3),
)
def low_rank_first(m, x):
    w = (m.codes * m.scales).reshape(5, D)
    return m.head(F.linear(x, w + m.b @ m.a))


@WRITTEN(
    "fixed filters, kept in other shapes",
    images,
    kernels=buffer(normal(6, 3)),
    mix=lambda: nn.Conv2d(2, 3, 1),
)
def fixed_filters(m, x):
    return m.mix(F.conv2d(x, m.kernels.view(2, 1, 3, 3), groups=2))


@MADE("all weights in one vector", sequence, flat=normal(5 * D + 5 + 15))
def stacked_and_cut(m, x):
    """All weights in one vector, cut and reshaped."""
    w1, b1, w2 = m.flat.split([5 * D, 5, 15])
    return F.linear(F.linear(x, w1.view(5, D), b1).tanh(), w2.view(3, 5))


@MADE(
    "a network makes them, of a learned code",
    sequence,
    code=normal(2),
    make=linear(2, 4 * D),
    shift=linear(2, 4),
)
def generated(m, x):
    """A network makes the weights of another from a learned code, for all examples."""
    w = m.make(m.code).view(4, D)
    return F.linear(x, w, m.shift(m.code))


@MADE(
    "a network makes them, for each example",
    lambda: (sequence(), torch.randn(B, 2)),
    make=linear(2, 4 * D),
    shift=linear(2, 4),
)
def generated_for_each(m, x, z):
    w = m.make(z).view(len(z), D, 4)
    return torch.bmm(x, w) + m.shift(z).unsqueeze(1)


@MADE(
    "a bank mixed by `softmax`, as many kernels as examples",
    sequence,
    mix=normal(B),
    bank=normal(B, 4, D, 2),
    bias=normal(4),
)
def of_tokens(m, x):
    """Learned basis tensors mixed into one convolution of time."""
    kernel = (m.mix.softmax(0)[:, None, None, None] * m.bank).sum(0)
    return F.conv1d(x.mT, kernel, m.bias).mT


def spectral(m, x):
    """Power iteration, one step of it, from where the first pass began."""
    with torch.no_grad():
        norm = m.a.parametrizations.weight[0]
        norm._u.copy_(m.u)
        norm._v.copy_(m.v)
    return m.a(x)


def spectral_hook(m, x):
    with torch.no_grad():
        m.a.weight_u.copy_(m.u)
        m.a.weight_v.copy_(m.v)
    found = m.a(x)
    m.a.weight = m.a.weight.detach()  # it keeps its graph otherwise, and cannot be copied
    return found


def with_spectral_norm():
    model = uses(spectral, u=buffer(lambda: torch.ones(4) / 2), v=buffer(lambda: torch.ones(D)))()
    model.a = nn.utils.parametrizations.spectral_norm(nn.Linear(D, 4))
    return model


def with_old_spectral_norm():
    parts = {"u": buffer(lambda: torch.ones(4) / 2), "v": buffer(lambda: torch.ones(D))}
    model = uses(spectral_hook, **parts)()
    model.a = nn.utils.spectral_norm(nn.Linear(D, 4))
    return model


def weight_norm_hook(m, x):
    found = m.a(x)
    m.a.weight = m.a.weight.detach()
    return found


def with_old_weight_norm():
    model = uses(weight_norm_hook)()
    with warnings.catch_warnings(action="ignore"):
        model.a = nn.utils.weight_norm(nn.Linear(D, 4))
    model.a.weight = model.a.weight.detach()
    return model


MADE.add(
    "`spectral_norm` in training mode",
    with_spectral_norm,
    sequence,
    note="Its vectors are made anew by each pass; here each begins at the same.",
)
MADE.add("`spectral_norm` of old, in training mode", with_old_spectral_norm, square)
MADE.add("`weight_norm` of old", with_old_weight_norm, square)
