"""Capture: from a model's forward pass to the factors of per-example gradients.

Read in this order: `mode` (what happens to one torch function), `facts` and `propagation` (whose
elements a tensor holds), `meeting` (where parameters meet examples), `layer` and `uses` (the
autograd Function and what its backward pass does), `backward` (what guards the passes), `results`.
Each file of `functions/` teaches one torch function or a family.
"""

from pycoherence.capture import functions
from pycoherence.capture.across import Across, FactorsAcross
from pycoherence.capture.blocks import (
    close_blocks,
    current,
    expect_not_compiling,
    resting,
)
from pycoherence.capture.custom import register_site
from pycoherence.capture.groups import GroupBy, Grouping, Groups, check_grouping
from pycoherence.capture.layer import LayerRule
from pycoherence.capture.marks import mark_examples
from pycoherence.capture.mode import Capture
from pycoherence.capture.model import (
    check_batch_norm,
    check_not_sharded,
    lasting_parameters,
    modules_of,
    tracked_parameters,
)
from pycoherence.capture.passes import LossFn, run_pass
from pycoherence.capture.request import (
    Aggregate,
    GradScale,
    LossScale,
    OnUnsupported,
    Request,
    Shape,
    check_grad_scale,
    check_loss_scale,
    check_scale,
    like_parameter,
    per_example,
    per_pair,
    scale_of,
)
from pycoherence.capture.results import (
    Factors,
    ParameterInfo,
    Results,
    expect_unchanged,
    outvoted_in,
)
from pycoherence.capture.rules import register_rule
from pycoherence.capture.torch_internals import below_autograd, is_fake, set_aside
from pycoherence.capture.wrappers import expect_same_ranks, without_sync

__all__ = [
    "Across",
    "Aggregate",
    "Capture",
    "Factors",
    "FactorsAcross",
    "GradScale",
    "GroupBy",
    "Grouping",
    "Groups",
    "LayerRule",
    "LossFn",
    "LossScale",
    "OnUnsupported",
    "ParameterInfo",
    "Request",
    "Results",
    "Shape",
    "below_autograd",
    "check_batch_norm",
    "check_grad_scale",
    "check_grouping",
    "check_loss_scale",
    "check_not_sharded",
    "check_scale",
    "close_blocks",
    "current",
    "expect_not_compiling",
    "expect_same_ranks",
    "expect_unchanged",
    "functions",
    "is_fake",
    "lasting_parameters",
    "like_parameter",
    "mark_examples",
    "modules_of",
    "outvoted_in",
    "per_example",
    "per_pair",
    "register_rule",
    "register_site",
    "resting",
    "run_pass",
    "scale_of",
    "set_aside",
    "tracked_parameters",
    "without_sync",
]
