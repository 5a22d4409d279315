"""Calls that must raise, in words that help, and an error that is raised on purpose."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

Calls = Mapping[str, tuple[Callable[[], Any], str]]
"""By name: the call, and a pattern for its message."""


def raising(error: type[Exception], calls: Calls) -> Callable[..., None]:
    """A test that each of the calls raises this error."""

    @pytest.mark.parametrize(("call", "message"), calls.values(), ids=calls)
    def test(call: Callable[[], Any], message: str) -> None:
        with pytest.raises(error, match=message):
            call()

    return test


class Expected(Exception):
    """Raised on purpose."""


def fail(*args: object) -> None:
    raise Expected
