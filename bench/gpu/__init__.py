"""Kernels and steps on a GPU, and what can be said of them without one."""
