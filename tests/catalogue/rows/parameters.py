"""Parameters outside of layers, and what is made of them."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Row, normal, uses

T = 3
features, sequence = normal(B, 6), normal(B, T, 6)


def ids(vocabulary: int = 5, length: int = T):
    return lambda: torch.randint(vocabulary, (B, length))


def in_place(m, x):
    y = x * m.scale
    y += m.shift
    return y.mul_(m.scale)


def with_token(m, x):
    return torch.cat([m.token.expand(len(x), -1, -1), m.layer(x)], 1)


def repeated(m, x):
    return torch.cat([m.token.repeat(len(x), 1, 1), m.layer(x)], 1)


def square(n: int = 6):
    return lambda: nn.Linear(n, n)


PRODUCTS = "Products with a parameter"
NUMBERS = "Parameters broadcast over the batch"
TIED = "Shared parameters"
MADE = "What is made of parameters"

ROWS = [
    Row(PRODUCTS, "`x @ p`", uses(lambda m, x: x @ m.p, p=normal(6, 5)), features),
    Row(PRODUCTS, "`x @ p`, positions", uses(lambda m, x: x @ m.p, p=normal(6, 5)), sequence),
    Row(PRODUCTS, "`p @ x`, positions last", uses(lambda m, x: m.p @ x, p=normal(5, T)), sequence),
    Row(
        PRODUCTS,
        "`torch.addmm`",
        uses(lambda m, x: torch.addmm(m.b, x, m.p), p=normal(6, 5), b=normal(5)),
        features,
    ),
    Row(
        PRODUCTS,
        "`torch.baddbmm`, the parameter added",
        uses(lambda m, x: torch.baddbmm(m.p, x, x.mT, beta=0.5, alpha=2), p=normal(T, T)),
        sequence,
    ),
    Row(NUMBERS, "`x + p`", uses(lambda m, x: x + m.p, p=normal(6)), sequence),
    Row(NUMBERS, "`p * x`", uses(lambda m, x: m.p * x, p=normal(T, 1)), sequence),
    Row(
        NUMBERS,
        "`(p - x) / q * r`, r a single number",
        uses(
            lambda m, x: (m.p - x.tanh()) / m.q * m.r,
            p=normal(1, T, 6),
            q=normal(T, 1),
            r=normal(),
        ),
        sequence,
    ),
    Row(NUMBERS, "`x ** p`", uses(lambda m, x: x.exp() ** m.p, p=normal(6)), sequence),
    Row(NUMBERS, "in place", uses(in_place, scale=normal(6), shift=normal(6)), sequence),
    Row(
        NUMBERS,
        "`torch.where`",
        uses(lambda m, x: torch.where(x > 0, x, m.p), p=normal(T, 6)),
        sequence,
    ),
    Row(
        NUMBERS,
        "learned positions added",
        uses(
            lambda m, x: m.token(x) + m.p[:, :T],
            token=lambda: nn.Embedding(5, 6),
            p=normal(1, 7, 6),
        ),
        ids(),
    ),
    Row(
        NUMBERS,
        "a class token, `expand`",
        uses(with_token, token=normal(1, 1, 6), layer=square()),
        sequence,
    ),
    Row(
        NUMBERS,
        "a class token, `repeat`",
        uses(repeated, token=normal(1, 2, 6), layer=square()),
        sequence,
    ),
    Row(
        NUMBERS,
        "positions `[T]` looked up",
        uses(
            lambda m, x: m.token(x) + m.position(torch.arange(T)),
            token=lambda: nn.Embedding(5, 6),
            position=lambda: nn.Embedding(7, 6),
        ),
        ids(),
    ),
    Row(
        NUMBERS,
        "positions `[1, T]` looked up, before anything else",
        uses(
            lambda m, x: m.position(torch.arange(T)[None]) + m.token(x),
            token=lambda: nn.Embedding(5, 6),
            position=lambda: nn.Embedding(7, 6),
        ),
        ids(),
    ),
    Row(
        NUMBERS,
        "positions `[T]`, as many as examples",
        uses(
            lambda m, x: m.token(x) + m.position(torch.arange(B)),
            token=lambda: nn.Embedding(5, 6),
            position=lambda: nn.Embedding(7, 6),
        ),
        ids(length=B),
    ),
    Row(TIED, "a layer called twice", uses(lambda m, x: m.a(m.a(x).tanh()), a=square()), sequence),
    Row(
        TIED,
        "a layer called twice, one position",
        uses(lambda m, x: m.a(m.a(x).tanh()), a=square()),
        features,
    ),
    Row(
        TIED,
        "a convolution called twice",
        uses(lambda m, x: m.a(m.a(x).tanh()), a=lambda: nn.Conv1d(T, T, 2)),
        sequence,
    ),
    Row(
        TIED,
        "a norm called twice",
        uses(lambda m, x: m.a(m.a(x).tanh()), a=lambda: nn.LayerNorm(6)),
        sequence,
    ),
    Row(
        TIED,
        "embedding and head",
        uses(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight), a=lambda: nn.Embedding(5, 6)),
        ids(),
    ),
    Row(
        TIED,
        "embedding and head, many rows",
        uses(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight), a=lambda: nn.Embedding(50, 2)),
        ids(50, 9),
    ),
    Row(
        TIED,
        "one weight in two kinds of layer",
        uses(
            lambda m, x: F.conv1d(m.a(x).mT, m.a.weight.unsqueeze(-1)),
            a=square(),
        ),
        sequence,
    ),
    Row(
        TIED,
        "overlapping slices",
        uses(
            lambda m, x: F.linear(
                F.linear(x, m.a.weight[:3]).tanh(), m.a.weight[2:, :3], m.a.bias[1:5]
            ),
            a=square(),
        ),
        sequence,
    ),
    Row(
        TIED,
        "disjoint slices, `chunk`",
        uses(
            lambda m, x: torch.cat([F.linear(x, w) for w in m.a.weight.chunk(3)], -1),
            a=lambda: nn.Linear(6, 9, bias=False),
        ),
        sequence,
    ),
    Row(
        TIED,
        "a weight and its transpose",
        uses(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight.T), a=lambda: nn.Linear(6, 4)),
        sequence,
    ),
    Row(
        TIED,
        "two forward passes, as of pairs",
        uses(lambda m, x, y: m.a(x) * m.a(y), a=square()),
        lambda: (sequence(), sequence()),
        note="An example is a pair.",
    ),
    Row(
        MADE,
        "rows one by one",
        uses(lambda m, x: sum(x * row for row in m.a.weight), a=lambda: nn.Linear(6, 4, False)),
        features,
    ),
    Row(
        MADE,
        "every second row",
        uses(lambda m, x: F.linear(x, m.a.weight[::2]), a=lambda: nn.Linear(6, 4, False)),
        sequence,
    ),
    Row(
        MADE,
        "a product of two weights",
        uses(lambda m, x: F.linear(x, m.a @ m.b * 0.5), a=normal(4, 2), b=normal(2, 6)),
        sequence,
        note="As LoRA merged into a weight; gradients are made `[B, ...]`.",
    ),
    Row(
        MADE,
        "`weight_norm`",
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)),
        sequence,
    ),
    Row(
        MADE,
        "`spectral_norm` in eval mode",
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)).eval(),
        sequence,
    ),
    Row(
        MADE,
        "`orthogonal`",
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 4)),
        sequence,
    ),
]
