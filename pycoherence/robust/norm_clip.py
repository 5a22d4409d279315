"""Norm clipping, with noise for differential privacy."""

from dataclasses import dataclass

from torch import Tensor

from pycoherence.robust._clipping import Clipping, Limit


@dataclass(frozen=True)
class NormClip(Clipping):
    r"""The mean of the examples' gradients, none longer than a maximum, and noise: DP-SGD.

    .. math:: \frac{1}{n} \Big( \sum_b g_b \min\Big(1, \frac{C}{\lVert g_b \rVert}\Big)
        + \mathcal{N}(0, \sigma^2 C^2 I) \Big)

    with the norm over all parameters of the network, and `n` the batch size `B`, or
    `expected_batch_size`. With `loss_reduction="sum"` there is no division, and the noise of a sum
    is `N(0, sigma^2 C^2)` whatever `B` is, zero too. This is the paper's formula; opacus adds 1e-6
    to the norm. Each parameter of the model gets its noise, also if it took no part.

    Under Poisson sampling, which the accounting of DP-SGD assumes, batches differ in size, and how
    large one is tells about its examples. Give `expected_batch_size`: the sampling rate times the
    size of the data. Without it the noise of an empty batch is refused, but with `"sum"`.

    To make one step of several batches, give `pycoherence.aggregate` `last=False` for all but the
    last of them. Each adds its clipped gradients to `.grad`, and the last one the noise;
    `expected_batch_size` counts the examples of the whole step, and the loss is not divided. A step
    that was made without its noise is noticed in the next block.

    `per="parameter"` clips each parameter alone, and groups such as
    `{"head": ["fc.*"], "rest": ["*"]}` clip these together. `max_norm` may then have a `C_i` for
    each. An example may move the whole gradient by `C = sqrt(sum_i C_i^2)`, over all of them, and
    that is the `C` of the noise, which is the same at each coordinate.

    An example that `nonfinite="drop"` leaves out counts as zero here, and the divisor stays `n`.
    This does no accounting; docs/privacy.md has a recipe. Torch's generators are not cryptographic:
    `generator=pc.secure_normal` draws from the operating system.

    If the loss is scaled or divided (`GradScaler`, `loss / 4`), say so with the `loss_scale` of
    `pycoherence.aggregate`; otherwise `C` means something else.

    Give it to `pycoherence.aggregate`. The report has `weights` and `clipped`, the fraction of
    examples beyond `C`.

    Args:
        max_norm: `C`, in the units of `||g_b||`; or one for each group, by its name in `per`.
        noise_multiplier: `sigma`.
        generator: The source of the noise: a `torch.Generator` on the model's device, a function of
            shape, dtype and device that gives standard normal numbers, or torch's own if `None`.
        per: Whether the norm is that of the whole gradient, each parameter is clipped alone, or
            groups of them are: patterns of names by the name of the group.
        expected_batch_size: The examples of a step to be expected, by which its sum is divided
            instead of by `B`.

    Raises:
        TypeError: A number, the generator or a group is not one.
        ValueError: `max_norm` or `expected_batch_size` is not positive, `noise_multiplier`
            negative, or `per` unknown; on entering `aggregate`, a parameter is in no group, or a
            pattern has no parameter.
        RuntimeError: On entering `aggregate`, the parameters have moved since a batch with
            `last=False`.

    Cost: A backward pass without weight gradients, the squared norms, and one weighted sum; memory
    of the inputs and output gradients of all layers.

    Source: Abadi et al. 2016, arXiv:1607.00133; McMahan et al. 2018, arXiv:1812.06210, for groups.

    Example:
        >>> import torch, pycoherence as pc
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
        >>> with pc.aggregate(model, pc.NormClip(1.0)) as agg:
        ...     model(x).mean().backward()
        >>> model.weight.grad, agg.report.network.clipped
        (tensor([[0.3000, 0.6500]]), 0.5)
    """

    def multipliers(self, norms: Tensor, limit: Limit) -> Tensor:
        """See `Clipping.multipliers`."""
        return (limit / norms).clamp(max=1)
