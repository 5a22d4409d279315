"""Sites: one use of one parameter, as the factors of its per-example gradients."""

from pycoherence.sites._joint import joint, made_of, of_rows
from pycoherence.sites._site import Site, norm_rows
from pycoherence.sites.affine import AffineSite
from pycoherence.sites.conv import ConvSite
from pycoherence.sites.embedding import EmbeddingSite
from pycoherence.sites.linear import LinearSite

__all__ = [
    "AffineSite",
    "ConvSite",
    "EmbeddingSite",
    "LinearSite",
    "Site",
    "joint",
    "made_of",
    "norm_rows",
    "of_rows",
]
