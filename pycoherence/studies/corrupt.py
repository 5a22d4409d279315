"""Wrong labels and ruined images, as the papers on memorisation make them.

All are made on the CPU from a seed, so that every device gets the same, and leave their input as it
is. The seed serves this module alone: what else you draw from the same number is independent.
"""

import hashlib

import torch
from torch import Tensor


def permuted_labels(labels: Tensor, share: float, *, seed: int) -> Tensor:
    r"""Choose labels with probability `share` and permute them among each other.

    .. math:: y'_i = y_{\pi(i)} \ \text{for } i \in C, \quad P(i \in C) = \text{share}

    with :math:`\pi` a random permutation of the chosen C. Each class keeps its number of labels; a
    chosen one is true by chance: one in ten times for ten classes of equal size.

    Args:
        labels: Classes `[n]`, integer.
        share: Probability of being chosen, in [0, 1].
        seed: Seed of the choice and the permutation.

    Returns:
        The labels `[n]`, of the dtype and on the device of `labels`.

    Raises:
        TypeError: The labels are not integer.
        ValueError: They are not `[n]`, or the share is not in [0, 1].

    Source: Chatterjee 2020, arXiv:2002.10657.

    Example:
        >>> permuted_labels(torch.tensor([0, 1, 2, 3]), 1.0, seed=0).sort().values
        tensor([0, 1, 2, 3])
    """
    chosen, generator = _choose(labels, share, seed)
    moved = chosen.nonzero().squeeze(1)
    result = labels.cpu().clone()
    result[moved] = result[moved[torch.randperm(len(moved), generator=generator)]]
    return result.to(labels.device)


def uniform_labels(labels: Tensor, share: float, classes: int, *, seed: int) -> Tensor:
    r"""Replace labels with probability `share` by a class drawn from all, perhaps the true one.

    .. math:: y'_i \sim U\{0, \dots, K-1\} \ \text{with probability share, else } y_i

    so that the share of wrong labels is `share * (K - 1) / K`. Partially corrupted labels; with a
    share of 1, random labels.

    Args:
        labels: Classes `[n]`, integer, in [0, classes).
        share: Probability of being replaced, in [0, 1].
        classes: Their number, K.
        seed: Seed of the choice and the classes.

    Returns:
        The labels `[n]`, of the dtype and on the device of `labels`.

    Raises:
        TypeError: The labels are not integer.
        ValueError: They are not `[n]` or not in [0, classes), or the share is not in [0, 1].

    Source: Zhang et al. 2017, arXiv:1611.03530.

    Example:
        >>> uniform_labels(torch.zeros(8, dtype=torch.long), 1.0, 1, seed=0)
        tensor([0, 0, 0, 0, 0, 0, 0, 0])
    """
    chosen, generator = _choose(labels, share, seed)
    _check_classes(labels, classes, 1)
    drawn = torch.randint(classes, labels.shape, generator=generator)
    return torch.where(chosen, drawn.to(labels.dtype), labels.cpu()).to(labels.device)


def symmetric_labels(labels: Tensor, share: float, classes: int, *, seed: int) -> Tensor:
    r"""Replace labels with probability `share` by a class drawn from all others.

    .. math:: y'_i \sim U(\{0, \dots, K-1\} \setminus \{y_i\}) \ \text{with probability share,
        else } y_i

    Whatever is chosen is wrong: the symmetric noise of the literature on noisy labels.

    Args:
        labels: Classes `[n]`, integer, in [0, classes).
        share: Probability of being replaced, in [0, 1].
        classes: Their number, K, at least 2.
        seed: Seed of the choice and the classes.

    Returns:
        The labels `[n]`, of the dtype and on the device of `labels`.

    Raises:
        TypeError: The labels are not integer.
        ValueError: They are not `[n]` or not in [0, classes), or the share is not in [0, 1].

    Source: Patrini et al. 2017, arXiv:1609.03683.

    Example:
        >>> symmetric_labels(torch.tensor([0, 1, 0]), 1.0, 2, seed=0)
        tensor([1, 0, 1])
    """
    chosen, generator = _choose(labels, share, seed)
    _check_classes(labels, classes, 2)
    true = labels.cpu().long()
    drawn = (true + torch.randint(1, classes, labels.shape, generator=generator)) % classes
    return torch.where(chosen, drawn, true).to(labels.dtype).to(labels.device)


def shuffled_pixels(images: Tensor, *, seed: int) -> Tensor:
    r"""Move the pixels of all images by one and the same permutation.

    .. math:: x'_{i,c,p} = x_{i,c,\pi(p)}

    The channels of a pixel move together. Use the same seed for the training and the test set.

    Args:
        images: `[n, C, H, W]`.
        seed: Seed of the permutation.

    Returns:
        The images `[n, C, H, W]`.

    Raises:
        ValueError: They have another number of dimensions.

    Source: Zhang et al. 2017, arXiv:1611.03530.

    Example:
        >>> images = torch.arange(4.0).repeat(2, 1).view(2, 1, 2, 2)
        >>> one, other = shuffled_pixels(images, seed=0)
        >>> torch.equal(one, other), one.sum()
        (True, tensor(6.))
    """
    _check_images(images)
    order = torch.randperm(images[0, 0].numel(), generator=_generator("shuffled", seed))
    return images.flatten(2)[:, :, order.to(images.device)].view(images.shape)


def random_pixels(images: Tensor, *, seed: int) -> Tensor:
    r"""Move the pixels of each image by a permutation of its own.

    .. math:: x'_{i,c,p} = x_{i,c,\pi_i(p)}

    The channels of a pixel move together.

    Args:
        images: `[n, C, H, W]`.
        seed: Seed of the permutations.

    Returns:
        The images `[n, C, H, W]`.

    Raises:
        ValueError: They have another number of dimensions.

    Source: Zhang et al. 2017, arXiv:1611.03530.

    Example:
        >>> images = torch.arange(4.0).repeat(2, 1).view(2, 1, 2, 2)
        >>> random_pixels(images, seed=0).sum((1, 2, 3))
        tensor([6., 6.])
    """
    _check_images(images)
    pixels = images.flatten(2)
    # Sorting random numbers permutes every row at once; in float64 no two are equal.
    keys = torch.rand(pixels[:, 0].shape, generator=_generator("random", seed), dtype=torch.float64)
    orders = keys.argsort(dim=1).unsqueeze(1).expand(pixels.shape)
    return pixels.gather(2, orders.to(images.device)).view(images.shape)


def gaussian_images(images: Tensor, *, seed: int) -> Tensor:
    r"""Draw all pixels from the normal distribution with the mean and variance of the data set.

    .. math:: x'_{i,c,p} \sim N(\mu, \sigma^2), \quad
        \mu = \operatorname{mean} x, \ \sigma^2 = \operatorname{var} x

    over all images, channels and pixels together. Nothing of an image is left but its label.

    Args:
        images: `[n, C, H, W]`, floating.
        seed: Seed of the pixels.

    Returns:
        The images `[n, C, H, W]`, of the dtype and on the device of `images`.

    Raises:
        TypeError: The images are not floating.
        ValueError: They have another number of dimensions.

    Source: Zhang et al. 2017, arXiv:1611.03530.

    Example:
        >>> gaussian_images(torch.full((2, 1, 2, 2), 3.0), seed=0).mean()
        tensor(3.)
    """
    _check_images(images)
    if not images.is_floating_point():
        raise TypeError(f"expected floating images, got {images.dtype}; convert them with .float()")
    noise = torch.randn(images.shape, generator=_generator("gaussian", seed), dtype=images.dtype)
    # Added up in float64, so that neither the device nor the number of cores shows.
    mean = images.mean(dtype=torch.float64).to(images)
    norm = torch.linalg.vector_norm(images - mean, dtype=torch.float64)
    return mean + (norm / images.numel() ** 0.5).to(images) * noise.to(images.device)


def blended_images(images: Tensor, share: float, *, seed: int) -> Tensor:
    r"""Blend each image with noise of the mean and variance of the data set.

    .. math:: x' = (1 - \text{share}) \, x + \text{share} \cdot \text{noise}

    with the noise of :func:`gaussian_images`, which is what is left with a share of 1. In between,
    the variance is smaller than that of the images.

    Args:
        images: `[n, C, H, W]`, floating.
        share: Share of the noise, in [0, 1].
        seed: Seed of the noise.

    Returns:
        The images `[n, C, H, W]`, of the dtype and on the device of `images`.

    Raises:
        TypeError: The images are not floating.
        ValueError: They have another number of dimensions, or the share is not in [0, 1].

    Source: Badger 2022, arXiv:2211.09639, with noise of fixed mean and variance.

    Example:
        >>> images = torch.zeros(2, 1, 2, 2)
        >>> images[1] = 1.0
        >>> torch.equal(blended_images(images, 0.0, seed=0), images)
        True
    """
    _check_share(share)
    return (1 - share) * images + share * gaussian_images(images, seed=seed)


def _generator(what: str, seed: int) -> torch.Generator:
    """Seeded by a hash: from one seed, torch's uniform and normal numbers are correlated."""
    digest = hashlib.sha256(f"{what} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def _choose(labels: Tensor, share: float, seed: int) -> tuple[Tensor, torch.Generator]:
    """Which labels to change, and the generator that goes on from there."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected integer labels, got {labels.dtype}; convert them with .long()")
    if labels.dim() != 1:
        raise ValueError(f"expected labels [n], got {list(labels.shape)}; pass one class each")
    _check_share(share)
    generator = _generator("labels", seed)
    return torch.rand(len(labels), generator=generator, dtype=torch.float64) < share, generator


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"expected share to be in [0, 1], got {share}")


def _check_classes(labels: Tensor, classes: int, least: int) -> None:
    if classes < least:
        raise ValueError(f"expected at least {least} classes, got {classes}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"expected labels in [0, {classes}), got values from {int(labels.min())} to "
            f"{int(labels.max())}; number the classes from 0"
        )


def _check_images(images: Tensor) -> None:
    if images.dim() != 4:
        raise ValueError(
            f"expected images [n, C, H, W], got {list(images.shape)}; add dimensions of size one "
            "with .unsqueeze or .view"
        )
