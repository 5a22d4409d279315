"""The command line: `python -m bench COMMAND`, from the root of the repository."""

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "ops": "ops/command",
    "training": "training/command",
    "distributed": "distributed/command",
    "hosts": "hosts/command",
    "report": "report/page",
    "overhead": "training/overhead",
    "host": "gpu/host",
    "headline": "gpu/headline",
    "steps": "gpu/steps",
    "table": "gpu/table",
    "gpu": "gpu/script",
}
"""The module of each, which has a `main` for the arguments and says first what it does."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures pycoherence; COMMAND --help tells more.",
        epilog="\n".join(["commands:", *map(_line, COMMANDS)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    module = COMMANDS[parser.parse_args(argv[:1]).command].replace("/", ".")
    return importlib.import_module(f"bench.{module}").main(argv[1:])


def _line(command: str) -> str:
    """Importing a command needs more than the help does."""
    path = Path(__file__).parent / f"{COMMANDS[command]}.py"
    about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return f"  {command:12}{about.partition(chr(10))[0]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
