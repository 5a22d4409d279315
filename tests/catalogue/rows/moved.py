"""Rows that move, are doubled, or are mixed with those of others."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, frozen, linear, mark, normal, several, uses

T, D = 3, 6
features, sequence, square = normal(B, D), normal(B, T, D), normal(B, B, D)
MOVED = Topic("Rows moved and put back")
MORE = Topic("More rows than examples")
MIXED = Topic("Inputs mixed in the block")
ORDER = torch.tensor([2, 0, 3, 1])
"""In which a batch of four is mixed."""

ALL = {"a": linear(D, 5), "b": linear(5, 3)}
WITH_KEY = lambda: (features(), torch.tensor([[0.5], [-1.0], [2.0], [-0.3]]))  # noqa: E731
LENGTHS = lambda: (sequence(), torch.tensor([2, 1, 3, 2]))  # noqa: E731
PAIR = several(features, features)


@MOVED("sorted by length", LENGTHS, **ALL, p=normal(5))
def by_length(m, x, lengths):
    order = lengths.argsort(descending=True)
    h = m.a(x[order]).tanh() * m.p
    return m.b(h[order.argsort()])


@MOVED("`index_select`, back by `gather`", WITH_KEY, **ALL)
def by_index_select(m, x, key):
    order = key[:, 0].argsort()
    h = m.a(x.index_select(0, order))
    return m.b(h.sin()).gather(0, order.argsort()[:, None].expand(-1, 3))


@MOVED("`found[order] = y`", WITH_KEY, a=linear(D, 5), norm=lambda: nn.LayerNorm(5))
def written_back(m, x, key):
    order = key[:, 0].argsort()
    h = m.a(x[order])
    found = torch.zeros_like(h)
    found[order] = m.norm(h)
    return found


@MOVED("`flip` and `roll`", features, **ALL)
def flipped(m, x):
    return m.b(m.a(x.flip(0)).flip(0).roll(1, 0)).roll(-1, 0)


@MOVED(
    "positions sorted by a score",
    square,
    score=frozen(linear(D, 1)),
    a=linear(D, 3),
    b=linear(D, 3),
)
def sorted_within(m, x):
    """Positions sorted by a score, as when patches are pruned."""
    order = m.score(x).squeeze(-1).argsort(1, descending=True)
    best = order[:, :2].unsqueeze(-1).expand(-1, -1, D)
    return torch.cat(
        [m.a(x.gather(1, best)), m.b(x.gather(1, order[:, 2:, None].expand(-1, -1, D)))], 1
    )


@MOVED("a sequence and its reverse", square, a=linear(D, 3), b=linear(D, 3))
def bidirectional(m, x):
    return torch.cat([m.a(x), m.b(x.flip(1)).flip(1)], -1)


@MOVED("`sort` and `topk` of positions", square, a=linear(D, 3), b=linear(D, 3))
def sorted_by_value(m, x):
    return m.a(x.sort(1).values) + m.b(x.topk(2, 1).values).sum(1, keepdim=True)


@MOVED("some examples through a layer, `masked_scatter`", WITH_KEY, a=linear(D, 5), b=linear(5, 5))
def gated_rows(m, x, key):
    """Only some examples go through the layer."""
    chosen = key[:, 0] > 0
    h = m.a(x)
    return h.masked_scatter(chosen[:, None].expand_as(h), m.b(h[chosen].tanh()))


@MOVED("examples that leave early", WITH_KEY, **ALL, c=linear(5, 3))
def early_exit(m, x, key):
    order = torch.cat([(key[:, 0] > 0).nonzero()[:, 0], (key[:, 0] <= 0).nonzero()[:, 0]])
    n = int((key[:, 0] > 0).sum())
    first, last = m.a(x[order]).split([n, len(x) - n])
    return torch.cat([m.b(first), m.c(last)])[order.argsort()]


@MORE("`x.repeat(2, 1)`, averaged", features, a=linear(D, 3))
def twice(m, x):
    return m.a(x.repeat(2, 1)).sin().view(2, len(x), -1).mean(0)


@MORE("`repeat_interleave`, averaged", features, a=linear(D, 3), p=normal(2, D))
def interleaved(m, x):
    return m.a(x.repeat_interleave(2, 0) * m.p.repeat(len(x), 1)).sin().view(len(x), 2, -1).mean(1)


@MORE("two views, `stack([x, y], 1).flatten(0, 1)`", PAIR, **ALL)
def two_views(m, x, y):
    h = m.a(torch.stack([x, y], 1).flatten(0, 1)).tanh()
    return m.b(h).view(len(x), -1)


@MORE("two views, `stack([x, y]).flatten(0, 1)`", PAIR, **ALL)
def two_views_apart(m, x, y):
    h, z = m.b(m.a(torch.stack([x, y]).flatten(0, 1)).tanh()).chunk(2)
    return F.normalize(h, dim=1) * F.normalize(z, dim=1)


@MORE("two views, `cat`", PAIR, **ALL, p=normal(5))
def siamese(m, x, y):
    h = m.a(torch.cat([x, y], 0)).tanh() + m.p
    return m.b(h)[: len(x)] * m.b(h)[len(x) :].sin()


@MORE("the time folded in front of the batch", square, **ALL, p=normal(5))
def time_major(m, x):
    h = m.a(x.transpose(0, 1).reshape(-1, D)).tanh()
    return m.b(h * m.p).view(-1, len(x), 3).transpose(0, 1)


@MORE(
    "samples in front, as many as examples",
    features,
    mean=linear(D, 4),
    deviation=linear(D, 4),
    decode=linear(4, 3),
)
def samples(m, x):
    """Samples of a posterior in front, as in variational networks: K = B."""
    noise = torch.linspace(-1, 1, B * 4, dtype=x.dtype).view(B, 1, 4)
    z = m.mean(x) + noise * m.deviation(x).exp()
    return m.decode(z.flatten(0, 1)).view(B, len(x), -1).logsumexp(0)


@MORE(
    "an ensemble in front, as many as examples",
    features,
    w=normal(B, D, 5),
    b=normal(B, 5),
    c=normal(B, 3),
    v=normal(B, 5, 3),
)
def ensemble(m, x):
    """Members in front, as many as examples, a matrix for each."""
    h = torch.einsum("bd,kdo->kbo", x, m.w).tanh() + m.b[:, None]
    return torch.baddbmm(m.c.unsqueeze(1), h, m.v).transpose(0, 1)


@MORE(
    "members repeated in the batch (BatchEnsemble)",
    features,
    a=linear(D, 3),
    r=normal(2, D),
    s=normal(2, 3),
)
def batch_ensemble(m, x):
    """Vectors of each member before and after one weight, members repeated in the batch."""
    h = x.repeat_interleave(2, 0) * m.r.repeat(len(x), 1)
    return (m.a(h) * m.s.repeat(len(x), 1)).view(len(x), 2, -1).logsumexp(1)


def mixed_inputs():
    x = features()
    return x, x[ORDER]


@MIXED("mixup, the mixture marked", mixed_inputs, **ALL)
def mixup(m, x, other):
    """Of a batch, rows of the inputs; of one example, the row that it meets there."""
    other = x[ORDER] if len(x) == B else other
    mixed = mark(0.7 * x + 0.3 * other, dim=0)
    return m.b(m.a(mixed).tanh())


def mixed_sequences():
    x = sequence()
    return x, x[ORDER]


@MIXED("parts of another example, marked", mixed_sequences, **ALL)
def cutmix(m, x, other):
    mixed = x.clone()
    mixed[:, :1] = (x[ORDER] if len(x) == B else other)[:, :1]
    return m.b(m.a(mark(mixed, dim=0)).tanh())


def doubled(kind):
    def function(m, x, mask):
        # A head for each column, by an expansion of one weight over as many as examples.
        w = m.v.expand(B, D) if kind == "expand" else m.v.repeat(B, 1)
        return F.linear(x, w) * m.q.expand(B, -1)[:, 0] * mask

    return function


MORE.add(
    "one weight expanded over outputs, as many as examples",
    uses(doubled("expand"), v=normal(1, D), q=normal(1, 2)),
    lambda: (features(), torch.rand(B, B)),
)
MORE.add(
    "one weight repeated over outputs, as many as examples",
    uses(doubled("repeat"), v=normal(1, D), q=normal(1, 2)),
    lambda: (features(), torch.rand(B, B)),
)
