"""Experts: rows that go where a router sends them."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, linear, normal, uses

T, D, E = 5, 6, 3
sequence, square, features = normal(B, T, D), normal(B, B, D), normal(B, D)
SIZES = {"": sequence, ", `T = B`": square}
EXPERTS = Topic("Experts")
ROUTER = {"router": linear(D, E, False)}
STACKED = {"gate_up": normal(E, 8, D), "down": normal(E, D, 4)}
BMM = {"gate_up": normal(E, D, 8), "bias": normal(E, 8), "down": normal(E, 4, D)}
SLICED = {"w": normal(E, D, 4), "b": normal(E, 4)}


def chosen(m, x, k: int = 2):
    """Numbers of experts and their weights, for each token of all examples."""
    logits = m.router(x)
    weights, experts = logits.softmax(-1).topk(k, -1)
    return weights / weights.sum(-1, keepdim=True) if k > 1 else weights, experts


def modules(outputs: int = D):
    return lambda: nn.ModuleList(nn.Linear(D, outputs) for _ in range(E))


@EXPERTS("a module for each, `index_add_`", SIZES, **ROUTER, experts=modules())
def listed(m, x):
    """As in Mixtral of old: a module for each expert, `index_add_` where its tokens were."""
    flat = x.reshape(-1, D)
    weights, experts = chosen(m, flat)
    found = torch.zeros_like(flat)
    mask = F.one_hot(experts, E).permute(2, 1, 0)
    for e, expert in enumerate(m.experts):
        slot, token = torch.where(mask[e])
        y = expert(flat[None, token].reshape(-1, D)) * weights[token, slot, None]
        found.index_add_(0, token, y)
    return found.view_as(x)


@EXPERTS("slices of one parameter in a loop", SIZES, **ROUTER, **STACKED)
def stacked(m, x):
    """As in Mixtral of now: one parameter for all experts, sliced in a loop."""
    flat = x.flatten(0, 1)
    weights, experts = chosen(m, flat)
    found = torch.zeros_like(flat)
    for e in experts.unique().tolist():
        token, slot = (experts == e).nonzero(as_tuple=True)
        gate, up = F.linear(flat[token], m.gate_up[e]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, m.down[e]) * weights[token, slot, None]
        found.index_add_(0, token, y.to(found.dtype))
    return found.reshape(x.shape)


@EXPERTS("tokens sorted by expert, `split`", SIZES, **ROUTER, w=normal(E, D, 4))
def sorted_by_expert(m, x):
    """Tokens sorted by expert, split, put back by the inverse order."""
    flat = x.flatten(0, 1)
    weights, experts = chosen(m, flat)
    order = experts.flatten().argsort(stable=True)
    rows = flat[order // 2]
    sizes = torch.bincount(experts.flatten(), minlength=E).tolist()
    rows = torch.cat([part @ w for part, w in zip(rows.split(sizes), m.w, strict=True)])
    rows = rows[order.argsort()].view(*experts.shape, -1)
    return (rows * weights.unsqueeze(-1)).sum(1).view(len(x), -1, 4)


@EXPERTS("weights looked up for each token, `bmm`", SIZES, **ROUTER, **SLICED)
def batched(m, x):
    """A copy of its expert's weights for each token, `bmm`."""
    flat = x.flatten(0, 1)
    weights, experts = chosen(m, flat)
    rows = flat.repeat_interleave(2, 0).unsqueeze(-1)
    rows = torch.bmm(m.w.mT[experts.flatten()], rows).squeeze(-1) + m.b[experts.flatten()]
    rows = rows * weights.reshape(-1, 1)
    return rows.view(len(x), -1, 2, 4).sum(2)


def dense(equation):
    """All experts for all tokens, weighted by the router."""

    def function(m, x):
        return torch.einsum(
            "bte,beto->bto", m.router(x).softmax(-1), torch.einsum(equation, x, m.w)
        )

    return function


@EXPERTS("all tokens through each, `bmm`", SIZES, **ROUTER, **BMM)
def dense_bmm(m, x):
    """As in GPT-OSS and Llama 4: all tokens repeated for each expert in front."""
    flat = x.reshape(-1, D)
    scores = torch.zeros(len(flat), E, dtype=x.dtype).scatter(1, *reversed(chosen(m, flat)))
    rows = flat.repeat(E, 1).view(E, -1, D)
    gate, up = (torch.bmm(rows, m.gate_up) + m.bias[:, None, :]).chunk(2, -1)
    rows = torch.bmm(gate.clamp(max=3) * torch.sigmoid(up), m.down)
    rows = rows * scores.transpose(0, 1).unsqueeze(-1)
    return rows.sum(0).view(len(x), -1, D)


@EXPERTS("one for a token, written back by a mask", SIZES, **ROUTER, experts=modules())
def first_choice(m, x):
    """Switch: one expert for a token, written back by a mask."""
    weights, experts = chosen(m, x, 1)
    found = x.clone()
    for e, expert in enumerate(m.experts):
        mask = experts.squeeze(-1) == e
        found[mask] = expert(x[mask])
    return found * weights


@EXPERTS("one for an example", features, **ROUTER, experts=modules(4))
def whole_examples(m, x):
    """Each example goes to one expert."""
    experts = m.router(x).argmax(-1)
    found = torch.zeros(len(x), 4, dtype=x.dtype)
    for e, expert in enumerate(m.experts):
        found[experts == e] = expert(x[experts == e])
    return found + m.router(x).logsumexp(-1, keepdim=True)


@EXPERTS(
    "a bias for the choice, a shared expert, `found[token] += y`",
    sequence,
    **ROUTER,
    experts=modules(),
    shared=linear(D, D),
    correction=lambda: nn.Buffer(torch.rand(E)),
)
def with_bias(m, x):
    """As in DeepSeek-V3: groups, a bias for the choice alone, a shared expert."""
    flat = x.reshape(-1, D)
    scores = m.router(flat).sigmoid()
    experts = (scores + m.correction).topk(2, sorted=False).indices
    weights = scores.gather(1, experts)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    found = torch.zeros_like(flat)
    for e, expert in enumerate(m.experts):
        token, slot = torch.where(experts == e)
        if token.numel():
            found[token] += expert(flat[token]) * weights[token, slot].unsqueeze(-1)
    return found.view(*x.shape) + m.shared(x)


@EXPERTS("slots, as many as examples", sequence, phi=normal(E, B, D), experts=modules())
def slots(m, x):
    """Soft experts: slots are mixtures of the tokens of an example."""
    logits = torch.einsum("btd,esd->btes", x, m.phi)
    mixed = torch.einsum("btd,btes->besd", x, logits.softmax(1))
    mixed = torch.stack([expert(mixed[:, e]) for e, expert in enumerate(m.experts)], 1)
    return torch.einsum("besd,btes->btd", mixed, logits.flatten(2).softmax(-1).view_as(logits))


@EXPERTS("a buffer of slots filled by `index_put`", sequence, **ROUTER, **SLICED)
def padded_slots(m, x):
    """A buffer `[E, slots, D]` filled by `index_put`, a product for each expert, `gather`."""
    flat = x.flatten(0, 1)
    weights, experts = chosen(m, flat, 1)
    place = F.one_hot(experts.squeeze(1), E).cumsum(0).gather(1, experts).squeeze(1) - 1
    full = flat.new_zeros(E, len(flat), D).index_put((experts.squeeze(1), place), flat)
    full = torch.einsum("ecd,edo->eco", full, m.w) + m.b.unsqueeze(1)
    return (full[experts.squeeze(1), place] * weights).view(len(x), -1, 4)


EXPERTS.add(
    'all tokens through each, `"btd,edo->beto"`',
    uses(dense("btd,edo->beto"), **ROUTER, w=normal(E, D, 4)),
    sequence,
)
