"""Models that people train, a row of docs/models.md each; every file here adds its `ROWS`.

`python tests/table.py` writes the page, and tests/unit/verbs/test_rows.py proves each row.
"""

import importlib
import pkgutil

from catalogue.row import Row


def all_rows() -> list[Row]:
    """Those of all files, in their order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [row for name in names for row in importlib.import_module(f"{__name__}.{name}").ROWS]
