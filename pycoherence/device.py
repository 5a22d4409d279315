"""The device that a command is told to run on."""

import torch


def check_device(device: str) -> None:
    """Raise `ValueError` for a device that torch cannot use here."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"expected a device that torch can use here, got {device!r}: {reason}"
        ) from error
