"""Points that all examples share; heads, norms and losses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from catalogue.row import B, Topic, buffer, linear, normal, several, uses

T, D = 3, 6
features, sequence, square = normal(B, D), normal(B, T, D), normal(B, B, D)
POINTS = Topic("Points and positions that all examples share")
HEADS = Topic("Heads and losses")
picture = normal(B, 2, B, 3)


@POINTS(
    "DeepONet, as many points as examples",
    features,
    branch=linear(D, 5),
    trunk=linear(1, 5),
    bias=normal(1),
)
def deep_operator(m, x):
    """DeepONet: functions in the batch, points that all of them share."""
    points = torch.linspace(0, 1, B, dtype=x.dtype).unsqueeze(1)
    return m.branch(x) @ m.trunk(points).tanh().T + m.bias


@POINTS(
    "the same points in a buffer",
    features,
    branch=linear(D, 5),
    trunk=linear(1, 5),
    points=buffer(normal(B, 1)),
)
def deep_operator_kept(m, x):
    return torch.einsum("bi,ni->bn", m.branch(x), m.trunk(m.points).tanh())


@POINTS(
    "`torch.arange(n)` through a layer, n = B",
    square,
    a=linear(D, 5),
    b=linear(1, 5),
    head=linear(5, 3),
)
def arange(m, x):
    """Positions by numbers through a layer, as many as examples."""
    at = torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(-1)
    return m.head(m.a(x) + m.b(at / 3).tanh())


@POINTS("the same, and nothing else is trained", square, b=linear(1, D))
def arange_alone(m, x):
    """The layer of positions is all that is trained."""
    return x * m.b(torch.arange(B, dtype=x.dtype)[:, None]).tanh().unsqueeze(0)


@POINTS(
    "sinusoids `[1, C, H, W]` through a convolution (XCiT)",
    picture,
    token=lambda: nn.Conv2d(4, 5, 1),
    a=lambda: nn.Conv2d(2, 5, 1),
    head=lambda: nn.Conv2d(5, 3, 1),
)
def fourier_positions(m, x):
    """XCiT: sinusoids `[1, N]` of rows and columns through a convolution, then repeated."""
    h, w = x.shape[-2:]
    tall = torch.arange(1, h + 1, dtype=x.dtype)[:, None].repeat(1, 1, w)
    wide = torch.arange(1, w + 1, dtype=x.dtype).repeat(1, h, 1)
    waves = torch.stack([tall.sin(), tall.cos(), wide.sin(), wide.cos()], 1)
    p = m.token(waves).repeat(len(x), 1, 1, 1)
    return m.head(m.a(x) + p)


@POINTS(
    "NeRF, points of rays",
    normal(B, 5, 3),
    a=linear(12, 5),
    b=linear(17, 5),
    density=linear(5, 1),
    colour=linear(5, 3),
)
def field(m, x):
    """NeRF: points of rays, sinusoids of them, a skip, volumes by `cumprod`."""
    waves = torch.cat([f(x * 2**k) for k in range(2) for f in (torch.sin, torch.cos)], -1)
    h = m.a(waves).relu()
    h = m.b(torch.cat([waves, h], -1)).relu()
    density, colour = F.softplus(m.density(h)), m.colour(h).sigmoid()
    alpha = 1 - torch.exp(-density)
    left = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha], 1), 1)[:, :-1]
    return (alpha * left * colour).sum(1)


@POINTS("SIREN, pixels as examples", normal(B, 2), a=linear(2, 5), b=linear(5, 5), out=linear(5, 3))
def siren(m, x):
    for layer in (m.a, m.b):
        x = (3 * layer(x)).sin()
    return m.out(x)


@POINTS(
    "a learned plane read by `F.grid_sample`", sequence, plane=normal(1, 5, 4, 4), head=linear(5, 3)
)
def planes(m, x):
    """A learned plane, read where each example asks."""
    plane = m.plane.expand(len(x), -1, -1, -1)
    at = x[..., :2].tanh().unsqueeze(2)
    return m.head(F.grid_sample(plane, at, align_corners=True).flatten(2).mT)


@HEADS(
    "AdaIN, scale and shift of a style",
    several(picture, features),
    style=linear(D, 10),
    a=lambda: nn.Conv2d(2, 5, 1, bias=False),
    b=lambda: nn.Conv2d(5, 3, 1),
    gain=normal(5),
)
def ada_in(m, x, style):
    """Statistics of the input, scale and shift of the style."""
    scale, shift = m.style(style).unflatten(1, (2, -1, 1, 1)).unbind(1)
    h = m.a(x)
    mean, std = h.mean((2, 3), keepdim=True), h.std((2, 3), keepdim=True) + 1e-5
    h = (h - mean) / std * scale + shift
    return m.b(F.instance_norm(h) * m.gain[:, None, None])


@HEADS(
    "`F.group_norm` with columns and one number expanded",
    normal(B, 4, 3, 5),
    affine=normal(4, 2),
    one=normal(1),
    wide=normal(8),
)
def strided_norm(m, x):
    """Scale and shift are columns of one parameter, and one number expanded."""
    h = F.group_norm(x, 2, m.affine[:, 0], m.affine[:, 1])
    return F.group_norm(h.tanh(), 4, m.one.expand(4), m.wide[::2])


@HEADS(
    "`F.layer_norm` with columns and one number expanded",
    square,
    affine=normal(D, 2),
    one=normal(1),
)
def strided_layer_norm(m, x):
    return F.layer_norm(x, (D,), m.affine[:, 0], m.one.expand(D)) * m.affine.T[1]


@HEADS(
    "a norm of the response, `addcmul` (ConvNeXt v2)",
    picture,
    a=lambda: nn.Conv2d(2, 4, 1),
    b=lambda: nn.Conv2d(4, 3, 1),
    gamma=normal(4),
    beta=normal(4),
)
def response_norm(m, x):
    """ConvNeXt v2."""
    x = m.a(x)
    far = x.norm(dim=(2, 3), keepdim=True)
    x = x * (far / (far.mean(1, keepdim=True) + 1e-6))
    return m.b(torch.addcmul(m.beta.view(1, -1, 1, 1), m.gamma.view(1, -1, 1, 1), x) + x)


def fused(options=None, reduction="mean"):
    """The head and its loss in one function."""

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, y = batch
        h, w, b = model(x).flatten(0, 1), model.w, model.b
        more = {"options": nn.LinearCrossEntropyOptions(**options)} if options else {}
        found = F.linear_cross_entropy(
            h, w, y.flatten(), linear_bias=b, reduction=reduction, **more
        )
        return found.mean()

    return loss


def labels():
    return sequence(), torch.randint(7, (B, T))


for more, loss in (
    ("", fused()),
    (', `reduction="none"`', fused(reduction="none")),
    (", in chunks", fused({"batch_chunk_size": 5})),
):
    HEADS.add(
        f"`F.linear_cross_entropy`{more}",
        uses(lambda m, x: m.a(x), a=linear(D, 5), w=normal(7, 5), b=normal(7)),
        labels,
        loss=loss,
    )
