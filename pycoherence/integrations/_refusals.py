"""Refusals of trainers that cannot be measured."""

from packaging.version import Version

from pycoherence.errors import UnsupportedError


def check_version(host: str, version: str, least: str) -> None:
    """Refuse a host that is older than the first that was found to give right numbers."""
    refuse(
        Version(version).release < Version(least).release,
        f"{host} {version} scales losses in other ways than this library knows",
        f"install {host} {least} or later",
    )


def refuse(refused: bool, why: str, way_out: str) -> None:
    """Raise `UnsupportedError` if something is refused."""
    if refused:
        raise UnsupportedError(f"{why}. What to do: {way_out}.")
