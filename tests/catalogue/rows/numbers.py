"""Functions of an input and parameters."""

import torch
import torch.nn.functional as F

from catalogue.row import B, Topic, linear, normal, uses

T, D = 3, 6
features, sequence, square = normal(B, D), normal(B, T, D), normal(B, B, D)
FUNCTIONS = Topic("Functions of an input and a parameter")
POSITIONS = (("", sequence), (", `T = B`", square))

for name, call, shapes in (
    ("torch.maximum(x, p)", lambda m, x: torch.maximum(x, m.p), (("p", (D,)),)),
    ("torch.minimum(p, x)", lambda m, x: torch.minimum(m.p, x), (("p", (D,)),)),
    ("x.clamp(min=p)", lambda m, x: x.clamp(min=m.p), (("p", (D,)),)),
    (
        "torch.clamp(x, p, q)",
        lambda m, x: x.clamp(m.p.sigmoid() - 1, m.q.exp()),
        (("p", (D,)), ("q", (D,))),
    ),
    ("torch.logaddexp", lambda m, x: torch.logaddexp(x, m.p), (("p", (D,)),)),
    ("torch.atan2", lambda m, x: torch.atan2(m.p, x), (("p", (D,)),)),
    ("torch.hypot", lambda m, x: torch.hypot(x, m.p), (("p", (1, D)),)),
    ("torch.xlogy", lambda m, x: torch.xlogy(x, m.p.exp()), (("p", (D,)),)),
    (
        "torch.addcmul(p, q, x)",
        lambda m, x: torch.addcmul(m.p, m.q, x),
        (("p", (1, 1, D)), ("q", (1, 1, D))),
    ),
    (
        "torch.addcdiv(x, p, q)",
        lambda m, x: torch.addcdiv(x, m.p, m.q.exp()),
        (("p", (D,)), ("q", (D,))),
    ),
    (
        "torch.lerp(x, p, q)",
        lambda m, x: torch.lerp(x, m.p, m.q),
        (("p", (D,)), ("q", (D,))),
    ),
    (
        "torch.lerp(p, q, x)",
        lambda m, x: torch.lerp(m.p, m.q, x.sigmoid()),
        (("p", (D,)), ("q", (D,))),
    ),
    (
        "torch.where(x > 0, p * x, q)",
        lambda m, x: torch.where(x > 0, m.p * x, m.q),
        (("p", (D,)), ("q", (D,))),
    ),
    (
        "torch.where(x > p, p, q)",
        lambda m, x: torch.where(x > m.p, m.p, m.q) * m.r,
        (("p", (D,)), ("q", ()), ("r", (1, D))),
    ),
    (
        "torch.stack([x, p.expand_as(x)], -1)",
        lambda m, x: torch.stack([x, m.p.expand_as(x)], -1) * m.q,
        (("p", (D,)), ("q", (2,))),
    ),
    ("F.threshold of x * p", lambda m, x: F.threshold(x * m.p, 0.1, 2), (("p", (D,)),)),
    (
        "torch.cross",
        lambda m, x: torch.linalg.cross(x[..., :3], m.p.expand_as(x[..., :3])),
        (("p", (3,)),),
    ),
    (
        "(x - p).abs() ** q",
        lambda m, x: (x - m.p).abs() ** m.q.exp(),
        (("p", (D,)), ("q", ())),
    ),
):
    for more, given in POSITIONS:
        if not more or name in ("torch.maximum(x, p)", "torch.addcmul(p, q, x)"):
            FUNCTIONS.add(
                f"`{name}`{more}", uses(call, **{n: normal(*s) for n, s in shapes}), given
            )


@FUNCTIONS(
    "`torch.distributions.Normal`, a free deviation", features, a=linear(D, 3), log_std=normal(3)
)
def gaussian(m, x):
    """A policy whose standard deviation is free of the input."""
    policy = torch.distributions.Normal(m.a(x), m.log_std.exp(), validate_args=False)
    return policy.log_prob(x.detach()[..., :3].sin()) + policy.entropy()


@FUNCTIONS(
    "a learned step of rounding, straight through",
    square,
    weight=normal(4, D),
    step=lambda: torch.rand(4, 1) + 0.5,
    step_x=lambda: torch.tensor(0.3),
    low=lambda: torch.tensor(-1.5),
    high=lambda: torch.tensor(1.5),
)
def quantised(m, x):
    """Rounded by a learned step, straight through (LSQ)."""
    w = m.weight / m.step
    w = ((w.clamp(-3, 3).round() - w.clamp(-3, 3)).detach() + w.clamp(-3, 3)) * m.step
    x = (x / m.step_x).clamp(m.low, m.high)
    return F.linear((x + (x.round() - x).detach()) * m.step_x, w)


class Rounded(torch.autograd.Function):
    """Rounds weights, and lets gradients through as they are."""

    @staticmethod
    def forward(ctx, w):
        return w.mul(4).round() / 4

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


class Hadamard(torch.autograd.Function):
    """The product of two products of factors, which are multiplied again in the backward pass."""

    @staticmethod
    def forward(ctx, a, b, c, d):
        ctx.save_for_backward(a, b, c, d)
        return (a @ b) * (c @ d)

    @staticmethod
    def backward(ctx, *grads):
        a, b, c, d = ctx.saved_tensors
        left, right = grads[0] * (c @ d), grads[0] * (a @ b)
        return left @ b.T, a.T @ left, right @ d.T, c.T @ right


@FUNCTIONS(
    "weights rounded by a custom `autograd.Function`, straight through",
    sequence,
    weight=normal(B, D),
    bias=normal(B),
)
def rounded(m, x):
    return F.linear(x, Rounded.apply(m.weight), m.bias)


@FUNCTIONS(
    "a Hadamard product of factors by a custom `autograd.Function` (LoHa)",
    square,
    **{name: normal(4, 2) for name in "ac"},
    **{name: normal(2, D) for name in "bd"},
    base=lambda: torch.nn.Parameter(torch.randn(4, D), requires_grad=False),
)
def hadamard(m, x):
    """LoHa, beside a weight that is not trained."""
    return F.linear(x, m.base.detach() + Hadamard.apply(m.a, m.b, m.c, m.d))


@FUNCTIONS(
    "distances to centres, as many as examples",
    sequence,
    c=normal(B, D),
    width=normal(B),
    w=normal(B, 3),
)
def centres(m, x):
    """Radial functions: distances to learned centres, a width for each."""
    return (-(x.unsqueeze(-2) - m.c).square().sum(-1) * m.width.exp()).exp() @ m.w


@FUNCTIONS(
    "a function of each feature for each output (KAN)",
    features,
    w=normal(5, D, 3),
    scale=normal(5, D),
    base=normal(5, D),
)
def splines(m, x):
    """A learned function of each feature for each output (KAN)."""
    basis = torch.stack([(x * k).sin() for k in range(1, 4)], -1)
    found = torch.einsum("bik,oik->bo", basis, m.w * m.scale.unsqueeze(-1))
    return found + F.linear(F.silu(x), m.base)


@FUNCTIONS("prototypes `[K, 1, D]`, as many as examples", features, p=normal(B, 1, D), w=normal(B))
def prototypes(m, x):
    return (x.unsqueeze(0) - m.p).square().sum(-1).T * m.w


@FUNCTIONS("a periodic activation with a rate", sequence, a=linear(D, 4), alpha=normal(4))
def snake(m, x):
    x = m.a(x)
    return x + (m.alpha * x).sin().pow(2) / (m.alpha + 1e-9)


@FUNCTIONS(
    "`torch.max` of two layers", sequence, a=linear(D, 4), b=linear(D, 4), p=normal(4), q=normal(4)
)
def maxout(m, x):
    return torch.max(m.a(x) * m.p, m.b(x) + m.q)


@FUNCTIONS("`torch.broadcast_tensors`", square, a=linear(D, 4), p=normal(4))
def mean_teacher(m, x):
    """Broadcast to a common shape, as distributions do."""
    x, p = torch.broadcast_tensors(m.a(x), m.p)
    return x * p


@FUNCTIONS("`view_as` and `expand_as`", sequence, a=linear(D, D), p=normal(T * D), q=normal(D))
def centred(m, x):
    """A parameter made like the input, and read in its shape."""
    return m.a(x) * m.p.view_as(x[0]) + m.q.expand_as(x) * torch.ones_like(x) * m.p.sum()


@FUNCTIONS("`masked_fill` with a parameter", square, a=linear(D, D), p=normal(), q=normal(D))
def filled(m, x):
    return m.a(x.masked_fill(x > 1, 0)).masked_fill(x > 0, m.p) * m.q
