"""Statistics: requests to a backward pass, and what is made of the answers."""

from pycoherence.statistics._parameter import ParameterRecord, provider
from pycoherence.statistics._statistic import Batch, Statistic, combine
from pycoherence.statistics.coherence import Coherence
from pycoherence.statistics.dots import Dots
from pycoherence.statistics.gram import Gram
from pycoherence.statistics.moments import Moments
from pycoherence.statistics.sign_sum import SignSum
from pycoherence.statistics.sq_norms import (
    SqNorms,
    can_tell_sum,
    raw_sq_norms,
    sum_sq_norm,
)

__all__ = [
    "Batch",
    "Coherence",
    "Dots",
    "Gram",
    "Moments",
    "ParameterRecord",
    "SignSum",
    "SqNorms",
    "Statistic",
    "can_tell_sum",
    "combine",
    "provider",
    "raw_sq_norms",
    "sum_sq_norm",
]
