"""The ops: reductions over per-example gradients, on plain tensors.

Each file of this folder is one op: `<op>.py` holds its `OpSpec` and the function of the same name,
which is found by its file name and offered here. `core/` holds what every op is made of, `family/`
what the ops of a family share.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from pycoherence.ops.core.dispatch import BACKENDS, backend
from pycoherence.ops.core.outputs import Reduced
from pycoherence.ops.core.register import specs
from pycoherence.ops.core.workspace import set_workspace, workspace

__all__ = ["BACKENDS", "Reduced", "backend", "set_workspace", "specs", "workspace"]

for _name, _is_folder in sorted((each.name, each.ispkg) for each in pkgutil.iter_modules(__path__)):
    if not _is_folder:
        globals()[_name] = getattr(importlib.import_module(f"{__name__}.{_name}"), _name)
        __all__ += [_name]

# Checkers of types do not run the loop.
if TYPE_CHECKING:
    from pycoherence.ops.affine_reduce import affine_reduce as affine_reduce
    from pycoherence.ops.conv_gram import conv_gram as conv_gram
    from pycoherence.ops.conv_order import conv_order as conv_order
    from pycoherence.ops.conv_reduce import conv_reduce as conv_reduce
    from pycoherence.ops.dense_gram import dense_gram as dense_gram
    from pycoherence.ops.dense_order import dense_order as dense_order
    from pycoherence.ops.embedding_gram import embedding_gram as embedding_gram
    from pycoherence.ops.embedding_order import embedding_order as embedding_order
    from pycoherence.ops.embedding_reduce import embedding_reduce as embedding_reduce
    from pycoherence.ops.gram_filter import gram_filter as gram_filter
    from pycoherence.ops.gram_median import gram_median as gram_median
    from pycoherence.ops.identity import identity as identity
    from pycoherence.ops.linear_gram import linear_gram as linear_gram
    from pycoherence.ops.linear_order import linear_order as linear_order
    from pycoherence.ops.linear_reduce import linear_reduce as linear_reduce
    from pycoherence.ops.row_sq_norms import row_sq_norms as row_sq_norms
