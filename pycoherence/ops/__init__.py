"""The ops: reductions over per-example gradients, on plain tensors.

Each file of this folder is one op: `<op>.py` holds its `OpSpec` and the function of the same name,
which is found by its file name and offered here. `core/` holds what every op is made of, `family/`
what the ops of a family share.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pycoherence.ops.core.dispatch import BACKENDS, backend
from pycoherence.ops.core.register import specs
from pycoherence.ops.core.workspace import set_workspace, workspace
from pycoherence.ops.family.reduce import Reduced

__all__ = ["BACKENDS", "Reduced", "backend", "set_workspace", "specs", "workspace"]

for _name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    if _name not in ("core", "family"):
        globals()[_name] = getattr(importlib.import_module(f"{__name__}.{_name}"), _name)
        __all__ += [_name]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...
