"""Complex numbers made of real parameters."""

import math

import torch
import torch.nn.functional as F

from catalogue.row import B, Topic, linear, normal

T, D = 3, 6
sequence, square = normal(B, T, D), normal(B, B, D)
COMPLEX = Topic("Complex numbers made of real parameters")
LAYER = "`F.linear` of complex numbers, `abs`, `conj` and `polar`"


@COMPLEX("a filter of frequencies (GFNet)", normal(B, 2, B, 5), filter=normal(2, B, 3, 2))
def spectrum(m, x):
    """GFNet: a filter of all frequencies, `[H, W / 2 + 1, C, 2]`."""
    f = torch.fft.rfft2(x, dim=(2, 3), norm="ortho")
    return torch.fft.irfft2(f * torch.view_as_complex(m.filter), s=x.shape[2:], norm="ortho")


@COMPLEX(
    "a matrix for each of some frequencies (FNO)",
    square,
    real=normal(D, 5, 2),
    imaginary=normal(D, 5, 2),
    skip=linear(D, 5),
)
def fourier_operator(m, x):
    """FNO: some frequencies, a complex matrix for each, in zeros for the rest."""
    f = torch.fft.rfft(x.mT)
    found = torch.zeros(len(x), 5, f.shape[-1], dtype=f.dtype)
    w = torch.complex(m.real, m.imaginary)
    found[:, :, :2] = torch.einsum("bix,iox->box", f[:, :, :2], w)
    return torch.fft.irfft(found, n=x.shape[1]).mT + m.skip(x)


@COMPLEX(
    "a kernel by powers of a diagonal (S4D)",
    square,
    log_dt=lambda: torch.linspace(math.log(0.1), 0, D),
    c=normal(D, 2, 2),
    log_a=normal(D, 2),
    a_imaginary=normal(D, 2),
    d=normal(D),
)
def state_space(m, x):
    """S4D: a kernel of as many steps as there are, by powers of diagonal matrices."""
    t = x.shape[1]
    dt, c = m.log_dt.exp(), torch.view_as_complex(m.c)
    a = torch.complex(-m.log_a.exp(), m.a_imaginary) * dt.unsqueeze(-1)
    powers = (a.unsqueeze(-1) * torch.arange(t)).exp()
    kernel = 2 * torch.einsum("hn,hnl->hl", c * (a.exp() - 1) / a, powers).real
    f = torch.fft.rfft(x.mT, n=2 * t) * torch.fft.rfft(kernel, n=2 * t)
    return torch.fft.irfft(f, n=2 * t)[..., :t].mT + x * m.d


@COMPLEX(
    LAYER,
    sequence,
    "fallback",
    **{
        n: normal(*s)
        for n, s in (
            ("w", (4, D)),
            ("v", (4, D)),
            ("b", (4,)),
            ("r", (4,)),
            ("angle", (4,)),
        )
    },
)
def complex_layer(m, x):
    z = torch.complex(x, x.roll(1, -1))
    z = F.linear(z, torch.complex(m.w, m.v)) + torch.complex(m.b, m.b.sin())
    return z.abs() + (z.conj() * torch.polar(m.r.exp(), m.angle)).imag


@COMPLEX("learned rates of rotations", square, a=linear(D, D), rates=normal(3), head=linear(D, 3))
def rotary(m, x):
    """Learned frequencies of rotations."""
    at = torch.arange(x.shape[1])[:, None] * m.rates
    z = torch.view_as_complex(m.a(x).unflatten(-1, (-1, 2)))
    return m.head(torch.view_as_real(z * torch.polar(torch.ones_like(at), at)).flatten(2))
