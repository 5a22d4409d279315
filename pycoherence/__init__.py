"""pycoherence: statistics of per-example gradients, without building them."""

from importlib import metadata as _metadata

from pycoherence import metrics, ops, optim
from pycoherence.collect import collect
from pycoherence.errors import UnsupportedError, VerificationError
from pycoherence.meter import CoherenceMeter
from pycoherence.ops import backend, set_workspace, workspace
from pycoherence.record import Record
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

try:
    __version__ = _metadata.version("pycoherence")
except _metadata.PackageNotFoundError:
    __version__ = "0+source"

__all__ = [
    "Coherence",
    "CoherenceMeter",
    "Dots",
    "Gram",
    "Moments",
    "ParameterRecord",
    "Record",
    "SignSum",
    "SqNorms",
    "UnsupportedError",
    "Verification",
    "VerificationError",
    "backend",
    "collect",
    "metrics",
    "ops",
    "optim",
    "set_workspace",
    "verify",
    "weighted_sum",
    "workspace",
]
