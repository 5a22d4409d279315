"""Tests of kernels run in Triton's interpreter: TRITON_INTERPRET=1, set before Triton is imported.

`tests/kernels/test_triton_interpreter.py` runs them; a process without it does not even collect
them.
"""

from pycoherence.ops.core.dispatch import interpreted

collect_ignore_glob = [] if interpreted() else ["test_*.py"]
