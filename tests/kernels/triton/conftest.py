"""Tests of kernels run in Triton's interpreter: TRITON_INTERPRET=1, set before Triton is imported.

`tests/kernels/test_triton_interpreter.py` runs them; a process without it does not even collect
them.
"""

from pathlib import Path

import pytest

from pycoherence.ops.core.dispatch import interpreted

collect_ignore_glob = [] if interpreted() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """NumPy, in which the interpreter computes, tells of what a GPU does silently."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
