"""Arithmetic of launches, in less than the microseconds that Triton's own functions take."""


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not less than a positive number."""
    return 1 << (n - 1).bit_length()
