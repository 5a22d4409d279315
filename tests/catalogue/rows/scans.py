"""Recurrences that a model writes itself, step by step."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, linear, normal

T, D, N = 3, 6, 2
SCANS = Topic("Recurrences in a loop")
sequence, square = normal(B, T, D), normal(B, B, D)
SIZES = {"": sequence, ", `T = B`": square}


@SCANS("`nn.LSTMCell` from zeros", SIZES, cell=lambda: nn.LSTMCell(D, 5), head=linear(5, 3))
def cells(m, x):
    """From zeros, the input of a step cut out of `[B, T, D]`."""
    h, c = (torch.zeros(len(x), 5, dtype=x.dtype) for _ in range(2))
    found = []
    for t in range(x.shape[1]):
        h, c = m.cell(x[:, t], (h, c))
        found.append(h)
    return m.head(torch.stack(found, 1))


@SCANS("`nn.GRUCell` over steps in front", SIZES, cell=lambda: nn.GRUCell(D, 5), head=linear(5, 3))
def cells_time_first(m, x):
    h = x.new_zeros(len(x), 5)
    found = []
    for step in x.transpose(0, 1):
        h = m.cell(step, h)
        found += [h]
    return m.head(torch.stack(found)).transpose(0, 1)


@SCANS(
    "states written into zeros, a learned first state",
    SIZES,
    cell=lambda: nn.RNNCell(D, 5),
    h=normal(1, 5),
    head=linear(5, 3),
)
def cells_written(m, x):
    found = x.new_zeros(x.shape[1], len(x), 5)
    h = m.h.expand(len(x), -1)
    for t, step in enumerate(x.unbind(1)):
        found[t] = h = m.cell(step, h)
    return m.head(found.permute(1, 0, 2))


def mixed_with_last(m, x, mix):
    last = F.pad(x, (0, 0, 1, -1))
    return x * mix + last * (1 - mix)


@SCANS(
    "RWKV",
    SIZES,
    **{n: linear(D, D, False) for n in ("key", "value", "receptance", "out")},
    **{n: normal(1, 1, D) for n in ("mix_k", "mix_v", "mix_r")},
    decay=normal(D),
    first=normal(D),
)
def rwkv(m, x):
    k = m.key(mixed_with_last(m, x, m.mix_k))
    v = m.value(mixed_with_last(m, x, m.mix_v))
    r = m.receptance(mixed_with_last(m, x, m.mix_r)).sigmoid()
    decay, found = -m.decay.exp(), torch.zeros_like(v)
    num = torch.zeros_like(k[:, 0])
    den = torch.zeros_like(k[:, 0])
    most = torch.zeros_like(k[:, 0]) - 1e38
    for t in range(k.shape[1]):
        key, value = k[:, t], v[:, t]
        top = torch.maximum(most, key + m.first)
        e1, e2 = (most - top).exp(), (key + m.first - top).exp()
        found[:, t] = (e1 * num + e2 * value) / (e1 * den + e2)
        top = torch.maximum(most + decay, key)
        e1, e2 = (most + decay - top).exp(), (key - top).exp()
        num, den, most = e1 * num + e2 * value, e1 * den + e2, top
    return m.out(r * found)


@SCANS(
    "Mamba, a selective scan",
    SIZES,
    inputs=linear(D, 2 * D, False),
    conv=lambda: nn.Conv1d(D, D, 2, padding=1, groups=D),
    x_proj=linear(D, 1 + 2 * N, False),
    dt_proj=linear(1, D),
    a_log=normal(D, N),
    d=normal(D),
    out=linear(D, 3),
)
def mamba(m, x):
    x, z = m.inputs(x).chunk(2, -1)
    x = F.silu(m.conv(x.mT)[..., : x.shape[1]])
    dt, b, c = m.x_proj(x.mT).split([1, N, N], -1)
    dt = F.softplus(m.dt_proj(dt)).mT
    a = -m.a_log.exp()
    decay = (dt.unsqueeze(-1) * a[None, :, None]).exp()
    drive = dt.unsqueeze(-1) * b[:, None] * x.unsqueeze(-1)
    state, found = x.new_zeros(len(x), D, N), []
    for t in range(x.shape[-1]):
        state = decay[:, :, t] * state + drive[:, :, t]
        found.append(torch.matmul(state, c[:, t].unsqueeze(-1))[..., 0])
    y = torch.stack(found, -1) + x * m.d[None, :, None]
    return m.out(y.mT * F.silu(z))


@SCANS(
    "a gated recurrence, gates of heads by `baddbmm`",
    SIZES,
    w_in=normal(2, 3, 3),
    b_in=normal(2, 3),
    w_a=normal(2, 3, 3),
    b_a=normal(2, 3),
    rate=normal(D),
    out=linear(D, 3),
)
def gated(m, x):
    """RG-LRU of Griffin: gates of each head by `baddbmm`, heads in front."""
    b, t, _ = x.shape
    h = x.reshape(b * t, 2, D // 2).permute(1, 0, 2)
    gates = [
        torch.baddbmm(bias[:, None], h, w).permute(1, 0, 2).reshape(b, t, D).sigmoid()
        for w, bias in ((m.w_in, m.b_in), (m.w_a, m.b_a))
    ]
    log_a = -8 * gates[1] * F.softplus(m.rate)
    x = x * gates[0] * (1 - (2 * log_a).exp() + 1e-6).sqrt()
    a, state, found = log_a.exp(), torch.zeros(b, D, dtype=x.dtype), torch.zeros_like(x)
    for i in range(t):
        state = a[:, i] * state + x[:, i]
        found[:, i] = state
    return m.out(found)


@SCANS(
    "the delta rule",
    SIZES,
    qkv=linear(D, 3 * D, False),
    beta=linear(D, 2, False),
    gate=linear(D, 2, False),
    a_log=normal(2),
    dt_bias=normal(2),
    out=linear(D, 3),
)
def delta(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
    beta, g = m.beta(x).sigmoid().mT, -m.a_log.exp() * F.softplus(m.gate(x) + m.dt_bias)
    k, g = F.normalize(k, dim=-1), g.mT
    state, found = torch.zeros(len(x), 2, D // 2, D // 2, dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = state * g[:, :, t, None, None].exp()
        was = (state * k[:, :, t].unsqueeze(-1)).sum(-2)
        change = (v[:, :, t] - was) * beta[:, :, t].unsqueeze(-1)
        state = state + k[:, :, t].unsqueeze(-1) * change.unsqueeze(-2)
        found.append((state * q[:, :, t].unsqueeze(-1)).sum(-2))
    return m.out(torch.stack(found, 1).flatten(2))


@SCANS(
    "a scan by `cumsum` and `logcumsumexp`",
    SIZES,
    gate=linear(D, D),
    value=linear(D, D),
    scale=normal(D),
    out=linear(D, 3),
)
def parallel(m, x):
    """A scan without a loop, `cumsum` of logarithms."""
    z = m.gate(x).sigmoid()
    log_a = torch.cumsum((1 - z).log(), 1)
    states = (m.value(x).exp() * z).log() - log_a
    return m.out((log_a + torch.logcumsumexp(states, 1)).exp() * m.scale)


@SCANS("a neural differential equation", SIZES, a=linear(D + 1, D), out=linear(D, 3))
def ode(m, x):
    """Runge-Kutta of a network that sees the time, the same for all."""
    h = 0.25
    for i in range(3):
        t = torch.full((1, 1, 1), i * h, dtype=x.dtype)
        k1 = m.a(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1)).tanh()
        k2 = m.a(torch.cat([x + h * k1, (t + h).expand_as(x[..., :1])], -1)).tanh()
        x = x + h / 2 * (k1 + k2)
    return m.out(x)


@SCANS("states written into slices", SIZES, a=linear(D, 5), w=normal(5, 5), head=linear(5, 3))
def echo(m, x):
    """A state kept in one tensor of all steps, written by slices."""
    states = torch.zeros(len(x), x.shape[1] + 1, 5, dtype=x.dtype)
    for t in range(x.shape[1]):
        states[:, t + 1] = (m.a(x[:, t]) + states[:, t].clone() @ m.w).tanh()
    return m.head(states[:, 1:])


@SCANS(
    "as many steps as an example wants", SIZES, a=linear(D, D), stop=linear(D, 1), head=linear(D, 3)
)
def halting(m, x):
    """Adaptive computation: each example stops when it has had enough."""
    h, left, found = x.mean(1), torch.ones(len(x), 1, dtype=x.dtype), 0
    for _ in range(4):
        h = m.a(h).tanh()
        p = torch.minimum(m.stop(h).sigmoid(), left)
        found, left = found + p * h, left - p
    return m.head(found + left * h)


@SCANS(
    "two states for each example, reordered",
    SIZES,
    a=linear(D, 5),
    cell=lambda: nn.GRUCell(D, 5),
    head=linear(5, 3),
)
def beams(m, x):
    """States of all examples in one list, two for each, reordered at each step."""
    h = m.a(x[:, 0]).repeat_interleave(2, 0)
    for step in x.unbind(1)[1:]:
        h = m.cell(step.repeat_interleave(2, 0), h)
        order = m.head(h).sum(-1).view(-1, 2).argsort(1, descending=True)
        h = h[(order + 2 * torch.arange(len(x))[:, None]).flatten()]
    return m.head(h).view(len(x), -1)
