"""The command line: `python -m pycoherence demo | study | info | selftest | bench`."""

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycoherence.extras import STUDIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    try:
        code = options.pop("run")(**options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has enough. Nothing more is to be written on exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as shells say of a program that a closed pipe has ended
    return code


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
    demo.add_argument("--steps", type=int, help="training steps of each network (default: 4000)")
    demo.add_argument("--seed", type=int, help="of data split, labels and weights (default: 0)")
    demo.add_argument(
        "--out", type=Path, default=Path(), help="folder for picture and data (default: this one)"
    )
    demo.add_argument("--device", help="where to train, such as cuda (default: cpu)")
    demo.add_argument(
        "--distributed",
        action="store_true",
        help="train in several processes: torchrun --nproc-per-node 2 -m pycoherence demo "
        "--distributed",
    )
    demo.set_defaults(run=_demo)

    _add_study(commands)

    info = commands.add_parser("info", help="versions, what was built, which backend runs each op")
    info.set_defaults(run=_info)

    selftest = commands.add_parser("selftest", help="check every op against its reference")
    selftest.add_argument("ops", nargs="*", metavar="OP", help="ops to check (default: all)")
    selftest.set_defaults(run=_selftest)

    bench = commands.add_parser("bench", help="measure the tiles of the GPU kernels")
    bench.add_argument("--tune", action="store_true", required=True, help="find the fastest tiles")
    bench.add_argument(
        "--out", type=Path, default=Path("tiles.json"), help="file for what is found"
    )
    bench.set_defaults(run=_bench)
    return parser


def _add_study(commands: Any) -> None:
    study = commands.add_parser(
        "study",
        help="reproduce a paper, such as coherent-gradients, or all",
        description="Reproduce a paper on a small scale; Ctrl-C stops, the same command goes on.",
        epilog=_studies(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # an option not given is left to command.run
    )
    study.add_argument("name", metavar="NAME", help="one of those below, or all")
    study.add_argument(
        "--data",
        help="digits, mnist, cifar10, or a folder of train/CLASS.npy and test/CLASS.npy "
        "(default: digits)",
    )
    study.add_argument("--root", type=Path, help="where mnist and cifar10 lie (default: data)")
    study.add_argument("--download", action="store_true", help="fetch what is missing there")
    study.add_argument("--device", help="where to train, such as cuda (default: cpu)")
    study.add_argument("--seeds", type=int, help="trainings of each kind (default: 3)")
    study.add_argument(
        "--quick", action="store_true", help="a rough look with one seed, within a minute"
    )
    study.add_argument("--out", type=Path, help="folder for OUT/NAME/report.md (default: studies)")
    study.set_defaults(run=_study)


def _studies() -> str:
    """Each study and what its file says first; importing them needs more than the help does."""
    lines = []
    for path in sorted((Path(__file__).parent / "studies/papers").glob("[!_]*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines += [f"  {path.stem.replace('_', '-')}", f"      {about.partition(chr(10))[0]}"]
    return "\n".join(["studies:", *lines])


def _study(**options: Any) -> int:
    try:
        from pycoherence.studies import command

        command.run(**options)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"the studies need {error.name}, which is not installed: {STUDIES}"
        ) from None
    except ValueError as error:
        raise SystemExit(f"study: {error}") from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        return 130
    return 0


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


def _selftest(ops: Sequence[str]) -> int:
    from pycoherence.selftest import run

    try:
        return 0 if run(ops) else 1
    except ValueError as error:
        raise SystemExit(f"selftest: {error}") from None


def _bench(tune: bool, out: Path) -> int:
    # Installed from a folder beside this package, where type checkers do not look.
    measure = importlib.import_module("pycoherence.triton_kernels.engine.tune")
    try:
        measure.tune(out)
    except RuntimeError as error:
        raise SystemExit(f"bench: {error}") from None
    return 0
