"""Rows that move, are doubled, or are mixed with those of others."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Row, linear, mark, normal, uses

T, D = 3, 6
features, sequence, square = normal(B, D), normal(B, T, D), normal(B, B, D)
MOVED = "Rows moved and put back"
MORE = "More rows than examples"
MIXED = "Inputs mixed in the block"
ORDER = torch.tensor([2, 0, 3, 1])
"""In which a batch of four is mixed."""


def by_length(m, x, lengths):
    order = lengths.argsort(descending=True)
    h = m.a(x[order]).tanh() * m.p
    return m.b(h[order.argsort()])


def by_index_select(m, x, key):
    order = key[:, 0].argsort()
    h = m.a(x.index_select(0, order))
    return m.b(h.sin()).gather(0, order.argsort()[:, None].expand(-1, 3))


def written_back(m, x, key):
    order = key[:, 0].argsort()
    h = m.a(x[order])
    found = torch.zeros_like(h)
    found[order] = m.norm(h)
    return found


def flipped(m, x):
    return m.b(m.a(x.flip(0)).flip(0).roll(1, 0)).roll(-1, 0)


def sorted_within(m, x):
    """Positions sorted by a score, as when patches are pruned."""
    order = m.score(x).squeeze(-1).argsort(1, descending=True)
    best = order[:, :2].unsqueeze(-1).expand(-1, -1, D)
    return torch.cat(
        [m.a(x.gather(1, best)), m.b(x.gather(1, order[:, 2:, None].expand(-1, -1, D)))], 1
    )


def bidirectional(m, x):
    return torch.cat([m.a(x), m.b(x.flip(1)).flip(1)], -1)


def sorted_by_value(m, x):
    return m.a(x.sort(1).values) + m.b(x.topk(2, 1).values).sum(1, keepdim=True)


def gated_rows(m, x, key):
    """Only some examples go through the layer."""
    chosen = key[:, 0] > 0
    h = m.a(x)
    return h.masked_scatter(chosen[:, None].expand_as(h), m.b(h[chosen].tanh()))


def early_exit(m, x, key):
    order = torch.cat([(key[:, 0] > 0).nonzero()[:, 0], (key[:, 0] <= 0).nonzero()[:, 0]])
    n = int((key[:, 0] > 0).sum())
    first, last = m.a(x[order]).split([n, len(x) - n])
    return torch.cat([m.b(first), m.c(last)])[order.argsort()]


def twice(m, x):
    return m.a(x.repeat(2, 1)).sin().view(2, len(x), -1).mean(0)


def interleaved(m, x):
    return m.a(x.repeat_interleave(2, 0) * m.p.repeat(len(x), 1)).sin().view(len(x), 2, -1).mean(1)


def two_views(m, x, y):
    h = m.a(torch.stack([x, y], 1).flatten(0, 1)).tanh()
    return m.b(h).view(len(x), -1)


def two_views_apart(m, x, y):
    h, z = m.b(m.a(torch.stack([x, y]).flatten(0, 1)).tanh()).chunk(2)
    return F.normalize(h, dim=1) * F.normalize(z, dim=1)


def siamese(m, x, y):
    h = m.a(torch.cat([x, y], 0)).tanh() + m.p
    return m.b(h)[: len(x)] * m.b(h)[len(x) :].sin()


def time_major(m, x):
    h = m.a(x.transpose(0, 1).reshape(-1, D)).tanh()
    return m.b(h * m.p).view(-1, len(x), 3).transpose(0, 1)


def samples(m, x):
    """Samples of a posterior in front, as in variational networks: K = B."""
    noise = torch.linspace(-1, 1, B * 4, dtype=x.dtype).view(B, 1, 4)
    z = m.mean(x) + noise * m.deviation(x).exp()
    return m.decode(z.flatten(0, 1)).view(B, len(x), -1).logsumexp(0)


def ensemble(m, x):
    """Members in front, as many as examples, a matrix for each."""
    h = torch.einsum("bd,kdo->kbo", x, m.w).tanh() + m.b[:, None]
    return torch.baddbmm(m.c.unsqueeze(1), h, m.v).transpose(0, 1)


def batch_ensemble(m, x):
    """Vectors of each member before and after one weight, members repeated in the batch."""
    h = x.repeat_interleave(2, 0) * m.r.repeat(len(x), 1)
    return (m.a(h) * m.s.repeat(len(x), 1)).view(len(x), 2, -1).logsumexp(1)


def mixup(m, x, other):
    """Of a batch, rows of the inputs; of one example, the row that it meets there."""
    other = x[ORDER] if len(x) == B else other
    mixed = mark(0.7 * x + 0.3 * other, dim=0)
    return m.b(m.a(mixed).tanh())


def cutmix(m, x, other):
    mixed = x.clone()
    mixed[:, :1] = (x[ORDER] if len(x) == B else other)[:, :1]
    return m.b(m.a(mark(mixed, dim=0)).tanh())


def mixed_inputs():
    x = features()
    return x, x[ORDER]


def mixed_sequences():
    x = sequence()
    return x, x[ORDER]


def doubled(kind):
    def function(m, x, mask):
        # A head for each column, by an expansion of one weight over as many as examples.
        w = m.v.expand(B, D) if kind == "expand" else m.v.repeat(B, 1)
        return F.linear(x, w) * m.q.expand(B, -1)[:, 0] * mask

    return function


def frozen(inputs, outputs):
    return lambda: nn.Linear(inputs, outputs).requires_grad_(False)


ALL = {"a": linear(D, 5), "b": linear(5, 3)}
WITH_KEY = lambda: (features(), torch.tensor([[0.5], [-1.0], [2.0], [-0.3]]))  # noqa: E731
LENGTHS = lambda: (sequence(), torch.tensor([2, 1, 3, 2]))  # noqa: E731
PAIR = lambda: (features(), features())  # noqa: E731


ROWS = [
    *(
        Row(topic, name, uses(function, **parts), inputs)
        for topic, name, function, inputs, parts in (
            (MOVED, "sorted by length", by_length, LENGTHS, {**ALL, "p": normal(5)}),
            (MOVED, "`index_select`, back by `gather`", by_index_select, WITH_KEY, ALL),
            (
                MOVED,
                "`found[order] = y`",
                written_back,
                WITH_KEY,
                {"a": linear(D, 5), "norm": lambda: nn.LayerNorm(5)},
            ),
            (MOVED, "`flip` and `roll`", flipped, features, ALL),
            (
                MOVED,
                "positions sorted by a score",
                sorted_within,
                square,
                {"score": frozen(D, 1), "a": linear(D, 3), "b": linear(D, 3)},
            ),
            (
                MOVED,
                "a sequence and its reverse",
                bidirectional,
                square,
                {"a": linear(D, 3), "b": linear(D, 3)},
            ),
            (
                MOVED,
                "`sort` and `topk` of positions",
                sorted_by_value,
                square,
                {"a": linear(D, 3), "b": linear(D, 3)},
            ),
            (
                MOVED,
                "some examples through a layer, `masked_scatter`",
                gated_rows,
                WITH_KEY,
                {"a": linear(D, 5), "b": linear(5, 5)},
            ),
            (MOVED, "examples that leave early", early_exit, WITH_KEY, {**ALL, "c": linear(5, 3)}),
            (MORE, "`x.repeat(2, 1)`, averaged", twice, features, {"a": linear(D, 3)}),
            (
                MORE,
                "`repeat_interleave`, averaged",
                interleaved,
                features,
                {"a": linear(D, 3), "p": normal(2, D)},
            ),
            (MORE, "two views, `stack([x, y], 1).flatten(0, 1)`", two_views, PAIR, ALL),
            (MORE, "two views, `stack([x, y]).flatten(0, 1)`", two_views_apart, PAIR, ALL),
            (MORE, "two views, `cat`", siamese, PAIR, {**ALL, "p": normal(5)}),
            (
                MORE,
                "the time folded in front of the batch",
                time_major,
                square,
                {**ALL, "p": normal(5)},
            ),
            (
                MORE,
                "samples in front, as many as examples",
                samples,
                features,
                {"mean": linear(D, 4), "deviation": linear(D, 4), "decode": linear(4, 3)},
            ),
            (
                MORE,
                "an ensemble in front, as many as examples",
                ensemble,
                features,
                {"w": normal(B, D, 5), "b": normal(B, 5), "c": normal(B, 3), "v": normal(B, 5, 3)},
            ),
            (
                MORE,
                "members repeated in the batch (BatchEnsemble)",
                batch_ensemble,
                features,
                {"a": linear(D, 3), "r": normal(2, D), "s": normal(2, 3)},
            ),
            (
                MORE,
                "one weight expanded over outputs, as many as examples",
                doubled("expand"),
                lambda: (features(), torch.rand(B, B)),
                {"v": normal(1, D), "q": normal(1, 2)},
            ),
            (
                MORE,
                "one weight repeated over outputs, as many as examples",
                doubled("repeat"),
                lambda: (features(), torch.rand(B, B)),
                {"v": normal(1, D), "q": normal(1, 2)},
            ),
            (MIXED, "mixup, the mixture marked", mixup, mixed_inputs, ALL),
            (MIXED, "parts of another example, marked", cutmix, mixed_sequences, ALL),
        )
    ),
]
