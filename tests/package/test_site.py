"""The documentation site names all that is public, once, and its examples run."""

import ast
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.ranks import needs_gloo

import pycoherence as pc
from pycoherence import robust, statistics

ROOT = Path(__file__).parents[2]
API = ROOT / "docs/api"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
INTEGRATIONS = sorted((ROOT / "pycoherence/integrations").glob("[!_]*.py"))
NEEDS = {f"pycoherence.integrations.{path.stem}": path.stem for path in INTEGRATIONS}
NEEDS["pycoherence.plot"] = "matplotlib"
ENTRY = re.compile(r"^\.\. (?:auto(?:class|exception|function|data)|data):: ([\w.]+)$")
MODULE = re.compile(r"^\.\. (?:current)?module:: ([\w.]+)$")


def documented() -> Counter[str]:
    """How often the pages describe each name."""
    found = Counter[str]()
    for page in API.glob("*.rst"):
        module = ""
        for line in page.read_text().splitlines():
            if here := MODULE.match(line):
                module = here[1]
            elif entry := ENTRY.match(line):
                found[f"{module}.{entry[1]}"] += 1
    return found


def public() -> dict[int, set[str]]:
    """The names of each public object; some have several."""
    modules = [pc, pc.metrics, pc.optim, pc.ops, pc.sites, statistics]
    for module, package in NEEDS.items():
        if importlib.util.find_spec(package):
            modules.append(importlib.import_module(module))
    names: dict[int, set[str]] = {}
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                names.setdefault(id(value), set()).add(f"{module.__name__}.{name}")
    return names


def test_every_public_name_is_described_once() -> None:
    pages = documented()
    for names in public().values():
        times = sum(pages[name] for name in names)
        assert times == 1, f"docs/api describes {' or '.join(sorted(names))} {times} times"


def test_nothing_is_described_that_is_not_public() -> None:
    names = set().union(
        *public().values(), (f"pycoherence.robust.{name}" for name in robust.__all__)
    )
    absent = {module for module, package in NEEDS.items() if not importlib.util.find_spec(package)}
    described = {name for name in documented() if name.rpartition(".")[0] not in absent}
    assert described <= names


def test_every_public_name_has_a_docstring() -> None:
    for names in public().values():
        module, _, name = min(names).rpartition(".")
        value = getattr(importlib.import_module(module), name)
        if inspect.isfunction(value) or inspect.isclass(value):
            own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
            assert own, min(names)


def imported(path: Path) -> set[str]:
    """The packages that a file imports, wherever it does."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    """Each runs as it is, in a process and a folder of its own."""
    for package in imported(path):
        pytest.importorskip(package)
    settings = {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
