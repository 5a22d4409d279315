"""Windows, rows and blocks folded into the batch."""

import torch
import torch.nn.functional as F
from torch import nn

from catalogue.row import B, Topic, buffer, linear, normal
from catalogue.rows.tables import QKV, TABLE, D, H, N, index, projected

WINDOWS = Topic("Windows folded into the batch")
grid, sequence = normal(B, 4, 4, D), normal(B, 8, D)


def into_windows(x):
    x = x.view(len(x), 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5)
    return x.contiguous().view(-1, N, D)


def from_windows(w):
    return w.view(-1, 2, 2, 2, 2, D).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, D)


def into_grid(x):
    return x.view(len(x), 2, 2, 2, 2, D).permute(0, 2, 4, 1, 3, 5).reshape(-1, N, D)


def shift_mask():
    regions = torch.zeros(1, 4, 4, D)
    regions[:, 3:] += 1
    regions[:, :, 3:] += 2
    regions = into_windows(regions)[..., 0]
    return (regions[:, None] != regions[:, :, None]).float() * -100


def table_bias(m):
    return m.table[m.index.view(-1)].view(N, N, H).permute(2, 0, 1).contiguous()


@WINDOWS("Swin", grid, **QKV, **TABLE)
def swin(m, x):
    w = into_windows(x)
    q, k, v = projected(m, w)
    a = (q * 0.5) @ k.transpose(-2, -1) + table_bias(m).unsqueeze(0)
    w = (a.softmax(-1) @ v).transpose(1, 2).reshape(-1, N, D)
    return from_windows(m.out(w))


@WINDOWS("Swin, shifted, its mask a buffer", grid, **QKV, **TABLE, mask=buffer(shift_mask))
def swin_shifted(m, x):
    w = into_windows(x.roll((-1, -1), (1, 2)))
    q, k, v = projected(m, w)
    a = (q @ k.transpose(-2, -1)) * 0.5 + table_bias(m)
    a = a.view(-1, N, H, N, N) + m.mask.unsqueeze(1).unsqueeze(0)
    a = a.view(-1, H, N, N).softmax(-1)
    w = (a @ v).transpose(1, 2).reshape(-1, N, D)
    return from_windows(m.out(w)).roll((1, 1), (1, 2)) + x


@WINDOWS("Swin, the bias expanded over windows", grid, **QKV, **TABLE)
def swin_fused(m, x):
    q, k, v = projected(m, into_windows(x))
    bias = table_bias(m).expand(len(q), -1, -1, -1)
    w = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return from_windows(m.out(w.transpose(1, 2).reshape(-1, N, D)))


@WINDOWS(
    "Swin v2, `logit_scale` and positions through a network",
    grid,
    weight=normal(3 * D, D),
    q_bias=normal(D),
    v_bias=normal(D),
    logit_scale=normal(H, 1, 1),
    mlp=lambda: nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, H, False)),
    coords=buffer(normal(1, 3, 3, 2)),
    index=buffer(index),
    out=linear(D, D),
)
def swin_v2(m, x):
    w = into_windows(x)
    bias = torch.cat([m.q_bias, torch.zeros_like(m.v_bias), m.v_bias])
    q, k, v = F.linear(w, m.weight, bias).view(len(w), N, 3, H, -1).permute(2, 0, 3, 1, 4)
    a = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    a = a * torch.clamp(m.logit_scale, max=4.6).exp()
    table = m.mlp(m.coords).view(-1, H)
    near = table[m.index.view(-1)].view(N, N, H).permute(2, 0, 1)
    a = (a + 16 * torch.sigmoid(near).unsqueeze(0)).softmax(-1)
    return from_windows(m.out((a @ v).transpose(1, 2).reshape(-1, N, D)))


@WINDOWS("MaxViT, attention over a grid", grid, **QKV, **TABLE, qkv0=linear(D, D), scale=normal(D))
def grid_attention(m, x):
    q, k, v = projected(m, into_grid(m.qkv0(x)))
    w = F.scaled_dot_product_attention(q, k, v, attn_mask=table_bias(m))
    w = w.transpose(1, 2).reshape(-1, 2, 2, 2, 2, D).permute(0, 3, 1, 4, 2, 5)
    return m.out(w.reshape(-1, 4, 4, D)) * m.scale


@WINDOWS("overlapping blocks by `as_strided`, heads in front", sequence, **QKV, bias=normal(2, 6))
def chunks(m, x):
    """As in Longformer: overlapping blocks of keys, heads and blocks in front."""
    q, k, v = (z.flatten(0, 1) for z in projected(m, x))
    k, v = (F.pad(z, (0, 0, 2, 2)) for z in (k, v))
    size = (len(q), 4, 6, D // H)
    k, v = (z.as_strided(size, (z.stride(0), 2 * z.stride(1), z.stride(1), 1)) for z in (k, v))
    a = torch.einsum("bcxd,bcyd->bcxy", q.view(-1, 4, 2, D // H), k)
    x = torch.einsum("bcxy,bcyd->bcxd", (a + m.bias).softmax(-1), v).reshape(-1, H, 8, D // H)
    return m.out(x.transpose(1, 2).flatten(2))


@WINDOWS(
    "overlapping windows by `Tensor.unfold`",
    sequence,
    a=linear(D, D),
    position=normal(1, 4, D),
    out=linear(D, 3),
)
def unfolded(m, x):
    w = F.pad(x, (0, 0, 1, 1)).unfold(1, 4, 2).transpose(2, 3)
    w = m.out(m.a(w.reshape(-1, 4, D)).tanh() + m.position)
    return w.unflatten(0, (len(x), -1))


@WINDOWS(
    "blocks and what surrounds them, by `F.unfold`",
    grid,
    q=lambda: nn.Conv2d(D, D, 1),
    kv=lambda: nn.Conv2d(D, 2 * D, 1, bias=False),
    relative=normal(16, D),
    out=linear(D, 3),
)
def halo(m, x):
    """Blocks of an image and what surrounds them, heads in front."""
    x = x.permute(0, 3, 1, 2)
    q = m.q(x).view(-1, D, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, D)
    kv = F.unfold(m.kv(x), 4, stride=2, padding=1).view(-1, 2 * D, 16, 4)
    k, v = kv.permute(0, 3, 2, 1).reshape(-1, 16, 2 * D).chunk(2, -1)
    a = (q @ k.mT + q @ m.relative.mT).softmax(-1)
    return m.out(a @ v).view(len(x), -1)


@WINDOWS(
    "rows and columns of an image into `nn.LSTM`",
    grid,
    wide=lambda: nn.LSTM(D, 4, batch_first=True),
    tall=lambda: nn.LSTM(D, 2, batch_first=True, bidirectional=True),
    out=linear(8, 3),
)
def sequencer(m, x):
    wide, _ = m.wide(x.reshape(-1, 4, D))
    tall, _ = m.tall(x.permute(0, 2, 1, 3).reshape(-1, 4, D))
    wide = wide.view(-1, 4, 4, 4)
    tall = tall.view(-1, 4, 4, 4).permute(0, 2, 1, 3)
    return m.out(torch.cat([tall, wide], -1))


@WINDOWS(
    "pixels of patches, then patches (TNT)",
    grid,
    position=normal(1, N, D),
    norm=lambda: nn.LayerNorm(D),
    inner=linear(D, D),
    patch=linear(4 * D, 5),
    places=normal(1, 4, 5),
)
def nested(m, x):
    """As in TNT: pixels of patches in front, then patches."""
    pixels = into_windows(x) + m.position
    pixels = m.inner(m.norm(pixels)).tanh() + pixels
    patches = m.patch(pixels.reshape(len(x), 4, -1))
    return patches + m.places


@WINDOWS(
    "norms, scales and gates of windows",
    grid,
    norm=lambda: nn.LayerNorm(D),
    scale=normal(D),
    gate=normal(N, 1),
    out=linear(D, D),
)
def windowed_norms(m, x):
    w = m.norm(into_windows(x)) * m.scale
    return from_windows(m.out(w.abs() + m.gate.sigmoid() * w.flip(1)))
