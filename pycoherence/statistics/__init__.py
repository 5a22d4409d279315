"""What can be asked of a backward pass, and what is made of the answers."""

from pycoherence.statistics._statistic import Statistic
from pycoherence.statistics.coherence import Coherence
from pycoherence.statistics.sq_norms import SqNorms

__all__ = ["Coherence", "SqNorms", "Statistic"]
