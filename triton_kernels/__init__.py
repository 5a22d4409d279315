"""Triton kernels, installed as `pycoherence.triton_kernels`; one module per op, named after it."""

if __name__ == "triton_kernels":
    raise ImportError(
        "this is pycoherence's source folder, not the package of that name: import "
        "pycoherence.triton_kernels, or run outside the repository root (python -P)"
    )
