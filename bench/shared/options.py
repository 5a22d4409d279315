"""Options that several commands have."""

import argparse
from pathlib import Path


def parser(command: str, about: str | None) -> argparse.ArgumentParser:
    """A parser without options.

    Args:
        command: Its name.
        about: The docstring of its module, whose first line tells what it does.
    """
    return argparse.ArgumentParser(
        prog=f"python -m bench {command}", description=(about or "").partition("\n")[0]
    )


def measuring(
    command: str, about: str | None, device: str | None = None, kept: bool = False
) -> argparse.ArgumentParser:
    """The same with `--quick`, `--out` and, if there is a usual one, `--device`.

    Without `--out`, results that are `kept` go to the folder of those.
    """
    found = parser(command, about)
    if device:
        found.add_argument("--device", choices=("cpu", "cuda"), default=device)
    found.add_argument("--quick", action="store_true", help="the least there is, to try it")
    usual = "a file for this machine in bench/results/" if kept else "none"
    found.add_argument("--out", type=Path, help=f"file for the results; default: {usual}")
    return found
