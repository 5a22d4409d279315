"""Builds, tests and measures on a GPU, within nine minutes: runs `bench/gpu.sh`."""

import os
import subprocess
import sys
from collections.abc import Sequence

from bench.shared import options
from bench.shared.environment import ROOT


def main(argv: Sequence[str]) -> int:
    parser = options.parser("gpu", __doc__)
    parser.add_argument("out", metavar="OUT", help="folder for what is found")
    parser.add_argument("--dry-run", action="store_true", help="what can be done without a GPU")
    given = parser.parse_args(argv)
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), given.out]
    command += ["--dry-run"] if given.dry_run else []
    settings = {"PYTHON": sys.executable, **os.environ}
    return subprocess.run(command, env=settings, check=False).returncode
