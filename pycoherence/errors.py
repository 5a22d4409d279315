"""Errors of the library's own."""


class UnsupportedError(RuntimeError):
    """A model uses a parameter, or mixes examples, in a way that cannot be measured exactly."""


class VerificationError(AssertionError):
    """A measurement on a model disagrees with autograd, one example at a time."""


class RanksError(RuntimeError):
    """The processes of a group differ in what they run, or one of them has raised an error."""
