"""Rules that replace the mean of per-example gradients by something robust, one in each file."""

from pycoherence.robust._gram_rule import GramRule, decide
from pycoherence.robust._noise import secure_normal
from pycoherence.robust._rule import (
    NETWORK,
    CoordinateRule,
    Decision,
    NonFinite,
    Report,
    Rule,
    State,
    check_count,
    check_nonfinite,
    check_rule,
    groups_of,
)
from pycoherence.robust._space import measure
from pycoherence.robust._weight_rule import Choice, Done, WeightRule, fill
from pycoherence.robust.adaptive_clip import AdaptiveClip
from pycoherence.robust.arc import ARC
from pycoherence.robust.auto_clip import AutoClip
from pycoherence.robust.bucketing import Bucketing
from pycoherence.robust.bulyan import Bulyan
from pycoherence.robust.centered_clip import CenteredClip
from pycoherence.robust.centre import Centre
from pycoherence.robust.from_weighting import FromWeighting
from pycoherence.robust.gaf import GAF
from pycoherence.robust.geometric_median import GeometricMedian
from pycoherence.robust.krum import Krum
from pycoherence.robust.mda import MDA
from pycoherence.robust.meamed import MeaMed
from pycoherence.robust.median import Median
from pycoherence.robust.median_of_means import MedianOfMeans
from pycoherence.robust.monna import MoNNA
from pycoherence.robust.nnm import NNM
from pycoherence.robust.norm_clip import NormClip
from pycoherence.robust.phocas import Phocas
from pycoherence.robust.reweight import Reweight
from pycoherence.robust.sign_agreement import SignAgreement
from pycoherence.robust.smea import SMEA
from pycoherence.robust.threshold import Threshold
from pycoherence.robust.trimmed_mean import TrimmedMean
from pycoherence.robust.winsorized import Winsorized

__all__ = [
    "ARC",
    "GAF",
    "MDA",
    "NETWORK",
    "NNM",
    "SMEA",
    "AdaptiveClip",
    "AutoClip",
    "Bucketing",
    "Bulyan",
    "CenteredClip",
    "Centre",
    "Choice",
    "CoordinateRule",
    "Decision",
    "Done",
    "FromWeighting",
    "GeometricMedian",
    "GramRule",
    "Krum",
    "MeaMed",
    "Median",
    "MedianOfMeans",
    "MoNNA",
    "NonFinite",
    "NormClip",
    "Phocas",
    "Report",
    "Reweight",
    "Rule",
    "SignAgreement",
    "State",
    "Threshold",
    "TrimmedMean",
    "WeightRule",
    "Winsorized",
    "check_count",
    "check_nonfinite",
    "check_rule",
    "decide",
    "fill",
    "groups_of",
    "measure",
    "secure_normal",
]
