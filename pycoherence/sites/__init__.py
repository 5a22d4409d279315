"""Sites: one use of one parameter, as the factors of its per-example gradients."""

from pycoherence.sites._derived import made_of, made_of_edge
from pycoherence.sites._exchange import Slice, exchange
from pycoherence.sites._joint import joint, of_rows
from pycoherence.sites._site import FactoredSite, Site, norm_rows
from pycoherence.sites._together import Wish, reduce_together
from pycoherence.sites.affine import AffineSite
from pycoherence.sites.conv import ConvSite, Window
from pycoherence.sites.embedding import EmbeddingSite
from pycoherence.sites.linear import LinearSite
from pycoherence.sites.parts import Part, PartsSite
from pycoherence.sites.sharded import (
    Layout,
    ShardedSite,
    count_nonzero,
    gathered,
    is_dtensor,
    local_part,
    local_values,
    norm_numbers,
    placed,
    sq_norm,
    waited,
)
from pycoherence.sites.shifted import ShiftedSite

__all__ = [
    "AffineSite",
    "ConvSite",
    "EmbeddingSite",
    "FactoredSite",
    "Layout",
    "LinearSite",
    "Part",
    "PartsSite",
    "ShardedSite",
    "ShiftedSite",
    "Site",
    "Slice",
    "Window",
    "Wish",
    "count_nonzero",
    "exchange",
    "gathered",
    "is_dtensor",
    "joint",
    "local_part",
    "local_values",
    "made_of",
    "made_of_edge",
    "norm_numbers",
    "norm_rows",
    "of_rows",
    "placed",
    "reduce_together",
    "sq_norm",
    "waited",
]
