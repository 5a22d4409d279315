"""pycoherence: statistics of per-example gradients, without building them.

Example:
    >>> import torch, pycoherence as pc
    >>> model, x = torch.nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    >>> with pc.collect(model, pc.SqNorms()) as record:
    ...     model(x).mean().backward()
    >>> record.sq_norms, record.coherence()
    (tensor([1., 4.]), Coherence(m=1.8, n=2, parameters=1))
"""

import typing as _typing
from importlib import import_module as _import_module
from importlib import metadata as _metadata

from pycoherence import metrics, ops, optim, sites
from pycoherence.aggregate import aggregate
from pycoherence.batch_norm import replace_batch_norm
from pycoherence.capture import LayerRule, close_blocks, mark_examples, register_rule, register_site
from pycoherence.collect import collect
from pycoherence.compiled import Aggregated, CompiledStep, compile
from pycoherence.errors import RanksError, UnsupportedError, VerificationError
from pycoherence.meter import CoherenceMeter
from pycoherence.monitor import GradientMonitor
from pycoherence.ops import backend, set_workspace, workspace
from pycoherence.record import Record
from pycoherence.robust import (
    ARC,
    GAF,
    MDA,
    NNM,
    SMEA,
    AdaptiveClip,
    AutoClip,
    Bucketing,
    Bulyan,
    CenteredClip,
    Centre,
    Decision,
    FromWeighting,
    GeometricMedian,
    Krum,
    MeaMed,
    Median,
    MedianOfMeans,
    MoNNA,
    NormClip,
    Phocas,
    Report,
    Reweight,
    SignAgreement,
    Threshold,
    TrimmedMean,
    Winsorized,
    secure_normal,
)
from pycoherence.statistics import (
    Coherence,
    Dots,
    Gram,
    Moments,
    ParameterRecord,
    SignSum,
    SqNorms,
)
from pycoherence.verify import Verification, verify
from pycoherence.weighted_sum import weighted_sum

if _typing.TYPE_CHECKING:
    from pycoherence import plot as plot

try:
    __version__ = _metadata.version("pycoherence")
except _metadata.PackageNotFoundError:
    __version__ = "0+source"

__all__ = [
    "ARC",
    "GAF",
    "MDA",
    "NNM",
    "SMEA",
    "AdaptiveClip",
    "Aggregated",
    "AutoClip",
    "Bucketing",
    "Bulyan",
    "CenteredClip",
    "Centre",
    "Coherence",
    "CoherenceMeter",
    "CompiledStep",
    "Decision",
    "Dots",
    "FromWeighting",
    "GeometricMedian",
    "GradientMonitor",
    "Gram",
    "Krum",
    "LayerRule",
    "MeaMed",
    "Median",
    "MedianOfMeans",
    "MoNNA",
    "Moments",
    "NormClip",
    "ParameterRecord",
    "Phocas",
    "RanksError",
    "Record",
    "Report",
    "Reweight",
    "SignAgreement",
    "SignSum",
    "SqNorms",
    "Threshold",
    "TrimmedMean",
    "UnsupportedError",
    "Verification",
    "VerificationError",
    "Winsorized",
    "aggregate",
    "backend",
    "close_blocks",
    "collect",
    "compile",
    "mark_examples",
    "metrics",
    "ops",
    "optim",
    "register_rule",
    "register_site",
    "replace_batch_norm",
    "secure_normal",
    "set_workspace",
    "sites",
    "verify",
    "weighted_sum",
    "workspace",
]


def __getattr__(name: str) -> _typing.Any:
    """Import `pc.plot` when it is first used, since it needs matplotlib."""
    if name != "plot":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _import_module("pycoherence.plot")
