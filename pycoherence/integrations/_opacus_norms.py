"""The norms of per-example gradients that Opacus asks for in its ghost modes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from pycoherence.sites import AffineSite, ConvSite, EmbeddingSite, LinearSite, Site

NormSampler = Callable[[Any, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]


class Registration:
    """The norm samplers that `register` gave Opacus, and what was there before."""

    def __init__(self, samplers: Mapping[type[nn.Module], NormSampler]) -> None:
        table = GradSampleHooksFastGradientClipping.NORM_SAMPLERS
        self._before = {kind: table.get(kind) for kind in samplers}
        table.update(samplers)

    def remove(self) -> None:
        """Give Opacus its own norm samplers back."""
        table = GradSampleHooksFastGradientClipping.NORM_SAMPLERS
        for kind, sampler in self._before.items():
            if sampler is None:
                table.pop(kind, None)
            else:
                table[kind] = sampler


def register() -> Registration:
    r"""Give Opacus' ghost clipping the norms that pycoherence computes.

    .. math:: \lVert G_b \rVert \quad \text{from the input and output gradient of a layer}

    They replace Opacus' own for `nn.Linear` and `nn.Embedding`, whose time grows with the square of
    the sequence length, which ignore `padding_idx`, and take no more than three dimensions; and
    they add convolutions, `nn.LayerNorm`, `nn.GroupNorm`, `nn.RMSNorm` and `nn.InstanceNorm*d`,
    for which Opacus stores the gradients of all examples. The modes `"ghost"`, `"ghost_fsdp"` and
    `"ghost_tp"` of `opacus.PrivacyEngine` then use them; nothing else of the loop changes. With
    `PrivacyEngine` of this module there is nothing to register.

    Scaling: norms, not their squares, in the units of Opacus: those of each example's own loss.

    Returns:
        An object whose `remove()` gives Opacus its own back.

    Raises:
        NotImplementedError: From a backward pass, an embedding has `scale_grad_by_freq=True`.

    Cost: See `pycoherence.ops`.

    Source: Li et al. 2021, arXiv:2110.05679, for ghost clipping.

    Example:
        >>> from pycoherence.integrations.opacus import register
        >>> registration = register()
        >>> registration.remove()
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    normalisations: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
        nn.GroupNorm: lambda m, x: F.group_norm(x, m.num_groups, eps=m.eps),
        **dict.fromkeys(
            (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
            lambda m, x: F.instance_norm(x, eps=m.eps),
        ),
    }
    over_last: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
        nn.LayerNorm: lambda m, x: F.layer_norm(x, m.normalized_shape, eps=m.eps),
        nn.RMSNorm: lambda m, x: F.rms_norm(x, m.normalized_shape, eps=m.eps),
    }
    samplers: dict[type[nn.Module], NormSampler] = {
        nn.Linear: _linear,
        nn.Embedding: _embedding,
        **dict.fromkeys(convolutions, _convolution),
        **{kind: _channels_first(normal) for kind, normal in normalisations.items()},
        **{kind: _channels_last(normal) for kind, normal in over_last.items()},
    }
    return Registration(samplers)


def _norms(
    layer: Any, weight: Callable[[], Site], bias: Callable[[], Site] | None = None
) -> dict[nn.Parameter, Tensor]:
    """The norms of the gradients of the trained parameters of a layer."""
    found: dict[nn.Parameter, Tensor] = {}
    for p, site in ((layer.weight, weight), (getattr(layer, "bias", None), bias)):
        if p is not None and p.requires_grad and site is not None:
            norms = site().reduce(("sq_norms",)).sq_norms
            assert norms is not None
            found[p] = norms.sqrt()
    return found


def _shift(g: Tensor) -> AffineSite:
    """The site of a bias, from an output gradient `[B, ..., C]`."""
    return AffineSite(g.reshape(g.shape[0], -1, g.shape[-1]) if g.dim() != 2 else g.unsqueeze(1))


def _linear(layer: Any, activations: list[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
    x = activations[0].to(g.dtype)
    return _norms(layer, lambda: LinearSite(x, g), lambda: _shift(g))


def _embedding(layer: Any, activations: list[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
    if layer.scale_grad_by_freq:
        raise NotImplementedError(
            "an embedding with scale_grad_by_freq=True mixes the examples of a batch; make it "
            "without"
        )
    ids = activations[0]
    rows = g.unsqueeze(1) if ids.dim() == 1 else g
    ids = ids.unsqueeze(1) if ids.dim() == 1 else ids
    return _norms(layer, lambda: EmbeddingSite(ids, rows, layer.num_embeddings, layer.padding_idx))


def _convolution(layer: Any, activations: list[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
    x, padding = activations[0].to(g.dtype), layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(layer.kernel_size)
    window = (layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups)
    return _norms(layer, lambda: ConvSite(x, g, *window), lambda: _shift(g.movedim(1, -1)))


def _channels_first(normal: Callable[[Any, Tensor], Tensor]) -> NormSampler:
    def sample(layer: Any, activations: list[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
        return _scaled(
            layer, normal(layer, activations[0].to(g.dtype)).movedim(1, -1), g.movedim(1, -1)
        )

    return sample


def _channels_last(normal: Callable[[Any, Tensor], Tensor]) -> NormSampler:
    def sample(layer: Any, activations: list[Tensor], g: Tensor) -> dict[nn.Parameter, Tensor]:
        features = len(layer.normalized_shape)
        x = normal(layer, activations[0].to(g.dtype))
        return _scaled(layer, x.flatten(-features), g.flatten(-features))

    return sample


def _scaled(layer: Any, x: Tensor, g: Tensor) -> dict[nn.Parameter, Tensor]:
    """Norms from a normalised input and the gradient of the output, `[B, ..., C]`."""
    shape = (g.shape[0], -1, g.shape[-1]) if g.dim() != 2 else (g.shape[0], 1, g.shape[1])
    rows, normal = g.reshape(shape), x.reshape(shape)
    return _norms(layer, lambda: AffineSite(rows, normal), lambda: AffineSite(rows))
