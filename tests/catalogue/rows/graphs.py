"""Graphs: messages between nodes, dense, and of all examples in one list."""

import torch
import torch.nn.functional as F

from catalogue.row import B, Topic, embedding, linear, mark, normal

N, D = 5, 6
GRAPHS = Topic("Graphs")
SIZES = torch.tensor([3, 5, 2, 4])
EDGES = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0]])
"""Those of every graph, between its first two nodes; a graph of n nodes is a ring as well."""


def graphs():
    """Nodes `[B, N, D]` and how many of them count."""
    return torch.randn(B, N, D), SIZES.clone()


def as_one_list(x, sizes):
    """What a loader of graphs gives: nodes, edges and the graph of each node.

    It gives new tensors, as read from disk; the example that a node belongs to has to be said.
    """
    nodes = [row for graph, n in zip(x.tolist(), sizes, strict=True) for row in graph[:n]]
    owner = torch.arange(len(x)).repeat_interleave(sizes)
    first = (sizes.cumsum(0) - sizes).tolist()
    edges = [EDGES + start for start in first]
    for start, n in zip(first, sizes.tolist(), strict=True):
        ring = torch.arange(n)
        edges.append(torch.stack([ring, (ring + 1) % n], 1) + start)
    return torch.tensor(nodes, dtype=x.dtype), torch.cat(edges).T, owner


def marked(x, sizes):
    nodes, edges, owner = as_one_list(x, sizes)
    return mark(nodes, owner=owner), edges, owner


def mean_of_graphs(h, owner, b: int):
    total = torch.zeros(b, h.shape[1], dtype=h.dtype).index_add_(0, owner, h)
    return total / torch.bincount(owner, minlength=b).unsqueeze(1)


@GRAPHS(
    "nodes of all graphs in one list, `index_add`",
    graphs,
    note="`mark_examples` says to which graph a node belongs.",
    a=linear(2 * D, D),
    b=linear(2 * D, D),
    head=linear(D, 3),
)
def messages(m, x, sizes):
    h, (source, target), owner = marked(x, sizes)
    for layer in (m.a, m.b):
        sent = torch.zeros_like(h).index_add(0, target, h[source])
        h = layer(torch.cat([h, sent], 1)).tanh()
    return m.head(mean_of_graphs(h, owner, len(x)))


@GRAPHS(
    "a network of edges, `scatter_add_` and `scatter_reduce`",
    graphs,
    edge=linear(2 * D, 4),
    gate=normal(4),
    node=linear(D, 4),
    head=linear(4, 3),
)
def edge_network(m, x, sizes):
    """Messages made for each edge of what is at both ends, added by `scatter_add_`."""
    h, (source, target), owner = marked(x, sizes)
    sent = m.edge(torch.cat([h[source], h[target]], -1)).relu() * m.gate
    index = target.unsqueeze(1).expand_as(sent)
    h = m.node(h) + torch.zeros(len(h), sent.shape[1], dtype=h.dtype).scatter_add_(0, index, sent)
    found = torch.full((len(x), h.shape[1]), -torch.inf, dtype=h.dtype)
    index = owner.unsqueeze(1).expand_as(h)
    return m.head(found.scatter_reduce(0, index, h, "amax"))


@GRAPHS(
    "attention to neighbours, vectors `[D, 1]`",
    graphs,
    node=linear(D, D, False),
    left=normal(D, 1),
    right=normal(D, 1),
    bias=normal(D),
    head=linear(D, 3),
)
def attention(m, x, sizes):
    """GAT: a vector `[D, 1]`, softmax over the neighbours of a node."""
    h, (source, target), owner = marked(x, sizes)
    h = m.node(h)
    scores = F.leaky_relu((h @ m.left)[target] + (h @ m.right)[source], 0.2).squeeze(1)
    most = torch.full((len(h),), -torch.inf, dtype=h.dtype)
    most = most.scatter_reduce(0, target, scores.detach(), "amax")
    weight = (scores - most[target]).exp()
    total = torch.zeros(len(h), dtype=h.dtype).index_add(0, target, weight)
    sent = h[source] * (weight / total[target]).unsqueeze(1)
    h = torch.zeros_like(h).index_add(0, target, sent).relu() + m.bias
    return m.head(mean_of_graphs(h, owner, len(x)))


@GRAPHS(
    "a weight for each kind of edge",
    graphs,
    kinds=embedding(N, D),
    w=normal(2, D, D),
    own=linear(D, D),
    head=linear(D, 3),
)
def relations(m, x, sizes):
    """A weight for each kind of edge, looked up by slices; nodes know their kind by an id."""
    h, (source, target), owner = marked(x, sizes)
    h = h + m.kinds(torch.arange(len(h)) - (sizes.cumsum(0) - sizes)[owner])
    kind = (source - target).clamp(0, 1)
    sent = torch.cat([h[source[kind == k]] @ m.w[k] for k in range(2)])
    target = torch.cat([target[kind == k] for k in range(2)])
    h = m.own(h).index_add(0, target, sent)
    return m.head(mean_of_graphs(h.tanh(), owner, len(x)))


@GRAPHS(
    "a norm over the nodes of each graph",
    graphs,
    a=linear(D, D),
    share=normal(D),
    scale=normal(D),
    shift=normal(D),
    head=linear(D, 3),
)
def norm_of_graphs(m, x, sizes):
    """Each graph centred by its own mean, a learned share of it."""
    h, _, owner = marked(x, sizes)
    h = m.a(h)
    h = h - mean_of_graphs(h, owner, len(x))[owner] * m.share
    h = m.scale * h / (mean_of_graphs(h.square(), owner, len(x)) + 1e-5).sqrt()[owner] + m.shift
    return m.head(mean_of_graphs(h.sin(), owner, len(x)))


@GRAPHS(
    "packed sequences in one list, attention within each",
    graphs,
    note="Marked again behind it, as the mask alone keeps the examples apart.",
    qkv=linear(D, 3 * D),
    places=embedding(N, D),
    head=linear(D, 3),
)
def packed(m, x, sizes):
    """Sequences one behind the other, attention within each, as in padding-free training."""
    h, _, owner = marked(x, sizes)
    q, k, v = m.qkv(h.unsqueeze(0)).chunk(3, -1)
    own = owner[:, None] == owner
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=own[None])[0]
    h = mark(h, owner=owner)  # the mask keeps them apart, which the function itself does not
    at = torch.arange(len(owner)) - (sizes.cumsum(0) - sizes)[owner]
    return m.head(mean_of_graphs(h * m.places(at), owner, len(x)))


@GRAPHS("nodes picked out by a mask, and put back", graphs, a=linear(D, D), b=linear(D, 4))
def of_a_mask(m, x, sizes):
    """Nodes picked out of `[B, N, D]` by a mask, which says whose they are; then padded again."""
    mask = torch.arange(N) < sizes[:, None]
    found = x.new_zeros(len(x), N, 4)
    found[mask] = m.b(m.a(x[mask]).tanh())
    return found.sum(1)


@GRAPHS(
    "dense, a graph for each example", graphs, a=linear(D, D), own=linear(D, D), head=linear(D, 3)
)
def dense(m, x, sizes):
    near = (x @ x.mT).softmax(-1) * (torch.arange(N) < sizes[:, None]).unsqueeze(1)
    h = m.a(near @ x).relu()
    return m.head(near @ h + m.own(x))


@GRAPHS(
    "one graph for all, as many nodes as examples",
    graphs,
    left=normal(B, 2),
    right=normal(2, B),
    a=linear(D, D),
    bias=normal(B),
    head=linear(D, 3),
)
def fixed_graph(m, x, sizes):
    """A graph that all examples share, as many nodes as examples, adapted by a parameter."""
    near = torch.eye(B, dtype=x.dtype).roll(1, 0) + (m.left @ m.right).relu()
    h = torch.einsum("nm,bmd->bnd", near, m.a(x[:, :B]))
    return m.head(h + m.bias[:, None])


@GRAPHS("pairs of nodes", graphs, left=linear(D, D), right=linear(D, D, False), head=linear(D, 3))
def joined(m, x, sizes):
    """Pairs of nodes of an example, `[B, N, N, D]`, by `repeat` and `cat`."""
    left = m.left(x).repeat_interleave(N, 1)
    right = m.right(x).repeat(1, N, 1)
    return m.head((left + right).tanh()).view(len(x), N, N, -1).sum(2)
