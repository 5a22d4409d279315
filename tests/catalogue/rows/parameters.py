"""Parameters outside of layers, and what is made of them."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, embedding, ids, linear, normal, several, uses

T = 3
features, sequence = normal(B, 6), normal(B, T, 6)
PRODUCTS = Topic("Products with a parameter")
NUMBERS = Topic("Parameters broadcast over the batch")
TIED = Topic("Shared parameters")
MADE = Topic("What is made of parameters")


def square(n: int = 6):
    return linear(n, n)


PRODUCTS.add("`x @ p`", uses(lambda m, x: x @ m.p, p=normal(6, 5)), features)
PRODUCTS.add("`x @ p`, positions", uses(lambda m, x: x @ m.p, p=normal(6, 5)), sequence)
PRODUCTS.add("`p @ x`, positions last", uses(lambda m, x: m.p @ x, p=normal(5, T)), sequence)
PRODUCTS.add(
    "`torch.addmm`",
    uses(lambda m, x: torch.addmm(m.b, x, m.p), p=normal(6, 5), b=normal(5)),
    features,
)
PRODUCTS.add(
    "`torch.baddbmm`, the parameter added",
    uses(lambda m, x: torch.baddbmm(m.p, x, x.mT, beta=0.5, alpha=2), p=normal(T, T)),
    sequence,
)
NUMBERS.add("`x + p`", uses(lambda m, x: x + m.p, p=normal(6)), sequence)
NUMBERS.add("`p * x`", uses(lambda m, x: m.p * x, p=normal(T, 1)), sequence)
NUMBERS.add(
    "`(p - x) / q * r`, r a single number",
    uses(lambda m, x: (m.p - x.tanh()) / m.q * m.r, p=normal(1, T, 6), q=normal(T, 1), r=normal()),
    sequence,
)
NUMBERS.add("`x ** p`", uses(lambda m, x: x.exp() ** m.p, p=normal(6)), sequence)
NUMBERS.add(
    "`torch.where`", uses(lambda m, x: torch.where(x > 0, x, m.p), p=normal(T, 6)), sequence
)
NUMBERS.add(
    "learned positions added",
    uses(lambda m, x: m.token(x) + m.p[:, :T], token=embedding(5, 6), p=normal(1, 7, 6)),
    ids(5, T),
)
NUMBERS.add(
    "positions `[T]` looked up",
    uses(
        lambda m, x: m.token(x) + m.position(torch.arange(T)),
        token=embedding(5, 6),
        position=embedding(7, 6),
    ),
    ids(5, T),
)
NUMBERS.add(
    "positions `[1, T]` looked up, before anything else",
    uses(
        lambda m, x: m.position(torch.arange(T)[None]) + m.token(x),
        token=embedding(5, 6),
        position=embedding(7, 6),
    ),
    ids(5, T),
)
NUMBERS.add(
    "positions `[T]`, as many as examples",
    uses(
        lambda m, x: m.token(x) + m.position(torch.arange(B)),
        token=embedding(5, 6),
        position=embedding(7, 6),
    ),
    ids(5, B),
)
TIED.add("a layer called twice", uses(lambda m, x: m.a(m.a(x).tanh()), a=square()), sequence)
TIED.add(
    "a layer called twice, one position",
    uses(lambda m, x: m.a(m.a(x).tanh()), a=square()),
    features,
)
TIED.add(
    "a convolution called twice",
    uses(lambda m, x: m.a(m.a(x).tanh()), a=lambda: nn.Conv1d(T, T, 2)),
    sequence,
)
TIED.add(
    "a norm called twice",
    uses(lambda m, x: m.a(m.a(x).tanh()), a=lambda: nn.LayerNorm(6)),
    sequence,
)
TIED.add(
    "embedding and head",
    uses(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight), a=embedding(5, 6)),
    ids(5, T),
)
TIED.add(
    "embedding and head, many rows",
    uses(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight), a=embedding(50, 2)),
    ids(50, 9),
)
TIED.add(
    "one weight in two kinds of layer",
    uses(lambda m, x: F.conv1d(m.a(x).mT, m.a.weight.unsqueeze(-1)), a=square()),
    sequence,
)
TIED.add(
    "overlapping slices",
    uses(
        lambda m, x: F.linear(
            F.linear(x, m.a.weight[:3]).tanh(), m.a.weight[2:, :3], m.a.bias[1:5]
        ),
        a=square(),
    ),
    sequence,
)
TIED.add(
    "disjoint slices, `chunk`",
    uses(
        lambda m, x: torch.cat([F.linear(x, w) for w in m.a.weight.chunk(3)], -1),
        a=linear(6, 9, False),
    ),
    sequence,
)
TIED.add(
    "a weight and its transpose",
    uses(lambda m, x: F.linear(m.a(x).tanh(), m.a.weight.T), a=linear(6, 4)),
    sequence,
)
TIED.add(
    "two forward passes, as of pairs",
    uses(lambda m, x, y: m.a(x) * m.a(y), a=square()),
    several(sequence, sequence),
    note="An example is a pair.",
)
MADE.add(
    "rows one by one",
    uses(lambda m, x: sum(x * row for row in m.a.weight), a=linear(6, 4, False)),
    features,
)
MADE.add(
    "every second row",
    uses(lambda m, x: F.linear(x, m.a.weight[::2]), a=linear(6, 4, False)),
    sequence,
)
MADE.add(
    "a product of two weights",
    uses(lambda m, x: F.linear(x, m.a @ m.b * 0.5), a=normal(4, 2), b=normal(2, 6)),
    sequence,
    note="As LoRA merged into a weight; gradients are made `[B, ...]`.",
)
MADE.add("`weight_norm`", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), sequence)
MADE.add(
    "`spectral_norm` in eval mode",
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4)).eval(),
    sequence,
)
MADE.add("`orthogonal`", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 4)), sequence)


@NUMBERS("in place", sequence, scale=normal(6), shift=normal(6))
def in_place(m, x):
    y = x * m.scale
    y += m.shift
    return y.mul_(m.scale)


@NUMBERS("a class token, `expand`", sequence, token=normal(1, 1, 6), layer=square())
def with_token(m, x):
    return torch.cat([m.token.expand(len(x), -1, -1), m.layer(x)], 1)


@NUMBERS("a class token, `repeat`", sequence, token=normal(1, 2, 6), layer=square())
def repeated(m, x):
    return torch.cat([m.token.repeat(len(x), 1, 1), m.layer(x)], 1)
