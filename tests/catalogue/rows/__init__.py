"""Models that people train, a row of docs/models.md each, in the `Topic`s of every file here.

`python tests/table.py` writes the page, and tests/unit/verbs/test_rows.py proves each row.
"""

import importlib
import pkgutil
from types import ModuleType

from catalogue.row import Row, Topic


def rows_of(module: ModuleType) -> list[Row]:
    """Those of one file, topic by topic."""
    topics = [value for value in vars(module).values() if isinstance(value, Topic)]
    return [row for topic in topics for row in topic.rows]


def all_rows() -> list[Row]:
    """Those of all files, in their order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [row for module in modules for row in rows_of(module)]
