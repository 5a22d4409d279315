"""The command line: `python -m pycoherence demo | info | selftest`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    return options.pop("run")(**options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pycoherence", description="Statistics of per-example gradients."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train on true and on random labels and compare their coherence",
        argument_default=argparse.SUPPRESS,  # an option not given is left to demo.run
    )
    demo.add_argument("--steps", type=int, help="training steps of each network")
    demo.add_argument("--seed", type=int, help="of data split, labels and weights")
    demo.add_argument("--out", type=Path, default=Path(), help="folder for picture and data")
    demo.add_argument("--device", help="where to train, such as cuda")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="versions, what was built, which backend runs each op")
    info.set_defaults(run=_info)

    selftest = commands.add_parser("selftest", help="check every op against its reference")
    selftest.set_defaults(run=_selftest)
    return parser


def _demo(**options: Any) -> int:
    from pycoherence import demo

    try:
        demo.run(**options)
    except ValueError as error:
        raise SystemExit(f"demo: {error}") from None
    return 0


def _info() -> int:
    from pycoherence.info import report

    print(report())
    return 0


def _selftest() -> int:
    from pycoherence.selftest import run

    return 0 if run() else 1
