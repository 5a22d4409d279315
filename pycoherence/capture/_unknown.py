"""What errors say of functions that are not known."""

from collections.abc import Mapping, Sequence
from typing import Any

from pycoherence.capture._names import describe, function_name
from pycoherence.capture._registry import handlers
from pycoherence.capture._rows import Refuse


def refuse_unknown(refuse: Refuse) -> None:
    """Refuse a function of parameters and examples that has no handler."""
    names = (function_name(known) for known in handlers)
    known = ", ".join(sorted(name for name in names if name.startswith("F.")))
    refuse(
        "per-example gradients through this function are not known",
        f"write the layer with one that is ({known}, or products and sums of tensors); ask for "
        "on_unsupported='vmap', which makes them example by example, or 'skip', which leaves "
        "the parameter out; teach the function to the capture with pc.register_site; leave an L2 "
        "penalty to the optimizer's weight_decay, and take others outside the block; take "
        "print-outs of parameter.detach(); or freeze the parameter with requires_grad_(False)",
    )


def expect_unmeasured(used: Sequence[str], probes: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuse to skip a parameter that has been measured in another function."""
    measured = [name for name in used if name in probes]
    if measured:
        refuse(
            f"per-example gradients through this function are not known, and "
            f"{describe(measured[0])} has been measured in another one, so that it cannot be "
            "skipped",
            "ask for on_unsupported='vmap', or freeze it with requires_grad_(False)",
        )
