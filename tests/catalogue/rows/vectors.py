"""Vectors, columns and scalars."""

import torch
import torch.nn.functional as F

from catalogue.row import B, Topic, linear, normal, several, uses

T, D = 3, 6
features, sequence, square = normal(B, D), normal(B, T, D), normal(B, B, D)
VECTORS = Topic("Vectors and columns")
SCALARS = Topic("Scalars")
PAIR = several(features, features)
CLIP = {"a": linear(D, 5), "b": linear(D, 5), "logit_scale": normal(), "bias": normal()}

VECTORS.add("`x @ v`, v `[D]`", uses(lambda m, x: x @ m.v, v=normal(D)), sequence)
VECTORS.add(
    "`x @ v`, v `[D]`, one position", uses(lambda m, x: (x @ m.v)[:, None], v=normal(D)), features
)
VECTORS.add(
    "`torch.mv`",
    uses(lambda m, x: torch.mv(m.a(x), m.v).unsqueeze(1), v=normal(5), a=linear(D, 5)),
    features,
)
VECTORS.add(
    "`torch.inner` and `torch.dot` of rows",
    uses(
        lambda m, x: torch.stack([torch.dot(r, m.v) for r in torch.inner(x, m.w)]),
        v=normal(5),
        w=normal(5, D),
    ),
    features,
)
for name, shape, given in (
    ("`[D, 1]`", (D, 1), features),
    ("`[D, 1]`, positions", (D, 1), square),
    ("`[1, O]`", (1, 5), normal(B, T, 1)),
):
    VECTORS.add(f"`x @ w`, w {name}", uses(lambda m, x: x @ m.w, w=normal(*shape)), given)
VECTORS.add(
    "`F.linear(x, w.t())`, w `[D, 1]`",
    uses(lambda m, x: F.linear(x, m.w.t(), m.b), w=normal(D, 1), b=normal(1)),
    sequence,
)
VECTORS.add(
    "a matrix read in another shape, `w.view(O, I)`",
    uses(lambda m, x: F.linear(x, m.w.view(4, D)), w=normal(D, 4)),
    sequence,
)
VECTORS.add(
    '`"bij,ij->b"`',
    uses(lambda m, x: torch.einsum("bij,ij->b", x, m.w).unsqueeze(1), w=normal(T, D)),
    sequence,
)
VECTORS.add(
    '`"bi,i,bi->b"` and `"i,j->ij"`',
    uses(
        lambda m, x: (
            torch.einsum("bi,i,bi->b", x, m.v, x.sin()).unsqueeze(1)
            + x @ torch.einsum("i,j->ij", m.v, m.u)
        ),
        v=normal(D),
        u=normal(4),
    ),
    features,
)
SCALARS.add(
    "scales of layers and gates of skips",
    uses(
        lambda m, x: x * m.alpha.tanh() + m.layer_scale * m.a(x) * m.gate[0] + m.gate[1],
        alpha=normal(),
        layer_scale=normal(1),
        gate=normal(2),
        a=linear(D, D),
    ),
    square,
)


@SCALARS("CLIP, similarities of all pairs, their diagonal", PAIR, **CLIP)
def clip(m, x, y):
    """Similarities of all pairs; of the loss each example has its own, on the diagonal."""
    x, y = F.normalize(m.a(x), dim=-1), F.normalize(m.b(y), dim=-1)
    return (m.logit_scale.exp() * x @ y.t() + m.bias).diagonal().unsqueeze(1)


@SCALARS("a scale of similarities of pairs", PAIR, **CLIP)
def clip_of_pairs(m, x, y):
    x, y = F.normalize(m.a(x), dim=-1), F.normalize(m.b(y), dim=-1)
    return m.logit_scale.exp() * (x * y).sum(-1, keepdim=True) + m.bias


@SCALARS("variances of tasks", features, a=linear(D, 3), b=linear(D, 3), log_var=normal(2))
def uncertainty(m, x):
    """Tasks weighted by learned variances, example by example."""
    found = torch.stack([m.a(x).square().mean(1), m.b(x).sin().mean(1)], 1)
    return found * torch.exp(-m.log_var) + m.log_var


@VECTORS(
    "additive attention, its vector `[D, 1]`",
    square,
    a=linear(D, 5),
    v=normal(5, 1),
    scale=normal(D),
)
def score(m, x):
    """Additive attention, its vector `[D, 1]`."""
    a = torch.matmul(torch.tanh(m.a(x)), m.v).squeeze(-1).softmax(1)
    return torch.bmm(a.unsqueeze(1), x).squeeze(1) * m.scale
