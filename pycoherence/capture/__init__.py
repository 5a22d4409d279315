"""Capture: from a model's forward pass to sites.

Each file of this folder without a leading underscore teaches one torch function (or family) to
`Capture`; it is found by being here.
"""

import importlib
import pkgutil

from pycoherence.capture._call import Call, differentiable_once, saved
from pycoherence.capture._capture import Capture
from pycoherence.capture._kept import Factors, expect_unchanged
from pycoherence.capture._loss_scale import LossScale, check_loss_scale
from pycoherence.capture._parameters import tracked_parameters
from pycoherence.capture._pass import LossFn, run_pass
from pycoherence.capture._plan import OnUnsupported, Order, Plan
from pycoherence.capture._probes import Shape, like_parameter, per_example, per_pair
from pycoherence.capture._registry import register_site
from pycoherence.capture.batch_norm import check_batch_norm

__all__ = [
    "Call",
    "Capture",
    "Factors",
    "LossFn",
    "LossScale",
    "OnUnsupported",
    "Order",
    "Plan",
    "Shape",
    "check_batch_norm",
    "check_loss_scale",
    "differentiable_once",
    "expect_unchanged",
    "like_parameter",
    "per_example",
    "per_pair",
    "register_site",
    "run_pass",
    "saved",
    "tracked_parameters",
]

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")
