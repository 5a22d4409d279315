"""Every known layer in every form, and an input shape for it."""

from collections.abc import Callable

from torch import nn

B = 4


def randomise(model: nn.Module) -> nn.Module:
    """Norms start with scale one and shift zero, which would hide a mix-up."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2)
    return model


class NoBias(nn.LayerNorm):
    """A subclass: rivals that dispatch on the exact type lose it."""

    def __init__(self, *shape: int) -> None:
        super().__init__(shape, bias=False)


def trained(layer: nn.Module) -> nn.Module:
    """In eval mode, as its running statistics are then used."""
    return layer.eval()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear-2d": (lambda: nn.Linear(7, 5), (B, 7)),
    "linear-3d": (lambda: nn.Linear(7, 5), (B, 9, 7)),
    "linear-4d": (lambda: nn.Linear(7, 5), (B, 3, 2, 7)),
    "linear-5d": (lambda: nn.Linear(7, 5), (B, 3, 2, 4, 7)),
    "linear-one-position": (lambda: nn.Linear(7, 5), (B, 1, 7)),
    "linear-no-bias": (lambda: nn.Linear(7, 5, bias=False), (B, 3, 7)),
    "linear-one-feature": (lambda: nn.Linear(1, 1), (B, 3, 1)),
    "linear-many-positions": (lambda: nn.Linear(3, 2), (B, 300, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), (B, 3, 9)),
    "conv1d-stride-dilation": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        (B, 4, 11),
    ),
    "conv1d-no-bias": (lambda: nn.Conv1d(3, 5, 2, bias=False), (B, 3, 9)),
    "conv1d-one-output": (lambda: nn.Conv1d(3, 5, 9), (B, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2)), (B, 3, 6, 5)),
    "conv2d-options": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        (B, 4, 7, 6),
    ),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (B, 4, 6, 5)),
    "conv2d-pointwise": (lambda: nn.Conv2d(4, 3, 1), (B, 4, 3, 5)),
    "conv2d-same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (B, 3, 6, 5)),
    "conv2d-same-even": (lambda: nn.Conv2d(3, 4, (4, 2), padding="same"), (B, 3, 6, 5)),
    "conv2d-same-dilated": (
        lambda: nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(3, 2)),
        (B, 3, 6, 5),
    ),
    "conv2d-valid": (lambda: nn.Conv2d(3, 4, 2, stride=2, padding="valid"), (B, 3, 6, 5)),
    "conv2d-circular": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        (B, 3, 6, 5),
    ),
    "conv2d-reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"),
        (B, 3, 6, 5),
    ),
    "conv2d-replicate-same": (
        lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="replicate"),
        (B, 3, 6, 5),
    ),
    "conv1d-same-even": (lambda: nn.Conv1d(3, 4, 4, padding="same"), (B, 3, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (B, 2, 4, 3, 3)),
    "conv3d-options": (
        lambda: nn.Conv3d(4, 6, (2, 1, 3), stride=(1, 2, 1), padding=(0, 1, 2), groups=2),
        (B, 4, 3, 4, 3),
    ),
    "conv3d-same-even": (lambda: nn.Conv3d(2, 2, (2, 3, 2), padding="same"), (B, 2, 3, 4, 3)),
    "layer-norm": (lambda: nn.LayerNorm(6), (B, 6)),
    "layer-norm-positions": (lambda: nn.LayerNorm(6), (B, 5, 6)),
    "layer-norm-two-dims": (lambda: nn.LayerNorm((3, 6)), (B, 5, 3, 6)),
    "layer-norm-all-dims": (lambda: nn.LayerNorm((5, 3, 6)), (B, 5, 3, 6)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(6, bias=False), (B, 5, 6)),
    "layer-norm-subclass": (lambda: NoBias(3, 6), (B, 3, 6)),
    "rms-norm": (lambda: nn.RMSNorm(6, eps=1e-5), (B, 6)),
    "rms-norm-default-eps": (lambda: nn.RMSNorm(6), (B, 5, 6)),
    "rms-norm-two-dims": (lambda: nn.RMSNorm((3, 6), eps=1e-5), (B, 5, 3, 6)),
    "group-norm-2d": (lambda: nn.GroupNorm(2, 6), (B, 6)),
    "group-norm-3d": (lambda: nn.GroupNorm(3, 6), (B, 6, 5)),
    "group-norm-4d": (lambda: nn.GroupNorm(2, 6), (B, 6, 3, 4)),
    "group-norm-one-group": (lambda: nn.GroupNorm(1, 6), (B, 6, 3, 4)),
    "group-norm-each-channel": (lambda: nn.GroupNorm(6, 6), (B, 6, 3, 4)),
    "group-norm-5d": (lambda: nn.GroupNorm(2, 6), (B, 6, 2, 3, 2)),
    "instance-norm-1d": (lambda: nn.InstanceNorm1d(6, affine=True), (B, 6, 5)),
    "instance-norm-2d": (lambda: nn.InstanceNorm2d(6, affine=True), (B, 6, 3, 4)),
    "instance-norm-3d": (lambda: nn.InstanceNorm3d(6, affine=True), (B, 6, 2, 3, 2)),
    "instance-norm-running": (
        lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True),
        (B, 6, 5),
    ),
    "instance-norm-running-eval": (
        lambda: trained(nn.InstanceNorm1d(6, affine=True, track_running_stats=True)),
        (B, 6, 5),
    ),
    "batch-norm-eval-2d": (lambda: trained(nn.BatchNorm1d(6)), (B, 6)),
    "batch-norm-eval-3d": (lambda: trained(nn.BatchNorm1d(6)), (B, 6, 5)),
    "batch-norm-eval-4d": (lambda: trained(nn.BatchNorm2d(6)), (B, 6, 3, 4)),
    "batch-norm-eval-5d": (lambda: trained(nn.BatchNorm3d(6)), (B, 6, 2, 3, 2)),
}
