"""Times and classes of diffusion."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, embedding, ids, linear, normal, several, uses

V, D = 7, 6
DIFFUSION = Topic("Times and classes of diffusion")
image = normal(B, 2, 4, 4)
UNET = {
    "time": lambda: nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 5)),
    "time_a": linear(5, B),
    "time_b": linear(5, 6),
    "a": lambda: nn.Conv2d(2, B, 3, padding=1),
    "down": lambda: nn.Conv2d(B, 6, 3, 2, 1),
    "norm": lambda: nn.GroupNorm(2, 6),
    "up": lambda: nn.Conv2d(6 + B, 2, 3, padding=1),
}


def waves(t):
    at = t[:, None].float() * torch.exp(-torch.arange(3) * 2.0)
    return torch.cat([at.sin(), at.cos()], -1)


def unet(m, x, t):
    """A U-Net, small: the time goes through a network into each block."""
    t = m.time(waves(t).to(x.dtype))
    a = m.a(x) + m.time_a(F.silu(t))[:, :, None, None]
    b = m.norm(m.down(F.silu(a))) * (1 + m.time_b(F.silu(t))[..., None, None])
    b = F.interpolate(F.silu(b), scale_factor=2)
    return m.up(torch.cat([b, a], 1))


def shared_time(kind):
    """The sampler's way: one time for the whole batch."""

    def function(m, x):
        t = torch.tensor(7) if kind == "scalar" else torch.tensor([7])
        t = t.reshape(-1).expand(len(x)) if kind == "expanded" else t.reshape(-1)
        return unet(m, x, t)

    return function


def times():
    return torch.tensor([3, 0, 9, 5])


DIFFUSION.add("a U-Net, times `[B]`", uses(unet, **UNET), several(image, times))
for kind, how in (
    ("scalar", "a number"),
    ("tensor", "`[1]`"),
    ("expanded", "expanded to `[B]`"),
):
    DIFFUSION.add(f"a U-Net, one time for all, {how}", uses(shared_time(kind), **UNET), image)


@DIFFUSION(
    "learned times, looked up",
    several(image, times),
    time=embedding(10, 2),
    head=lambda: nn.Conv2d(2, 3, 3),
)
def looked_up_time(m, x, t):
    return m.head(x + m.time(t)[:, :, None, None])


@DIFFUSION(
    "modulation by times and classes (DiT)",
    several(normal(B, 4, D), times, ids(V)),
    time=linear(6, D),
    classes=embedding(V, D),
    modulation=linear(D, 6 * D),
    qkv=linear(D, 3 * D),
    mlp=linear(D, D),
)
def modulated(m, x, t, y):
    """DiT: six pieces of what the time and the class say."""
    c = F.silu(m.time(waves(t).to(x.dtype)) + m.classes(y))
    shift, scale, gate, shift2, scale2, gate2 = m.modulation(c).chunk(6, 1)
    h = F.layer_norm(x, (D,)) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    q, k, v = m.qkv(h).chunk(3, -1)
    x = x + gate.unsqueeze(1) * F.scaled_dot_product_attention(q, k, v)
    h = F.layer_norm(x, (D,)) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
    return x + gate2.unsqueeze(1) * m.mlp(h)


@DIFFUSION(
    "a table added to the modulation (PixArt)",
    several(normal(B, 4, D), times),
    time=linear(6, D),
    modulation=linear(D, 3 * D),
    table=normal(3, D),
    mlp=linear(D, D),
)
def ada_single(m, x, t):
    """PixArt: a table of each block added to what the time says."""
    c = m.modulation(F.silu(m.time(waves(t).to(x.dtype)))).view(len(x), 3, D)
    shift, scale, gate = (m.table[None] + c).chunk(3, 1)
    return x + gate * m.mlp(F.layer_norm(x, (D,)) * (1 + scale) + shift)


@DIFFUSION(
    "some classes dropped",
    several(normal(B, 3, D), ids(V)),
    classes=embedding(V + 1, D),
    head=linear(D, 3),
)
def dropped(m, x, y):
    """Some classes become the one that stands for none."""
    y = torch.where(y > 4, V, y)
    return m.head(x * m.classes(y).unsqueeze(1))
