"""The folders agree with each other, and imports only point down."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pycoherence as pc
from pycoherence.capture.context import guards, handlers
from pycoherence.ops.core.dispatch import NATIVE_NAMESPACE
from pycoherence.ops.core.spec import tensors_of

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pycoherence"

OPS = sorted(path.stem for path in (PACKAGE / "ops").glob("[!_]*.py"))
FUNCTIONS = sorted(path.stem for path in (PACKAGE / "capture/functions").glob("[!_]*.py"))
MODULES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "triton_kernels").rglob("*.py"))

# From the bottom up; a part may import its own level and those below. What is not named is on top.
LEVELS = (
    {"errors", "tables"},
    {"ranks"},
    {"ops", "triton_kernels"},
    {"sites"},
    {"capture"},
    {"statistics", "metrics", "robust"},
    {"collect", "aggregate", "weighted_sum", "meter", "verify", "record", "optim", "scalars"},
)
HEAVY = {"matplotlib", "sklearn", "tqdm", "rich"}
MAY_BE_HEAVY = {"demo", "demo_picture", "plot", "studies"}


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def level(part: str) -> int:
    return next((i for i, parts in enumerate(LEVELS) if part in parts), len(LEVELS))


def test_every_op_file_registers_the_op_of_its_name() -> None:
    assert set(pc.ops.specs) == set(OPS)
    for name, spec in pc.ops.specs.items():
        module = importlib.import_module(f"pycoherence.ops.{name}")
        assert module.SPEC is spec
        assert spec.name == name


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_one_schema_in_both_namespaces(op: str) -> None:
    schemas = [
        str(getattr(getattr(torch.ops, space), op).default._schema)
        for space in ("pycoherence", NATIVE_NAMESPACE)
    ]
    assert [schema.partition("::")[2] for schema in schemas] == [schemas[0].partition("::")[2]] * 2
    plain = pc.ops.specs[op].schema.replace(" ", "")
    assert schemas[0].partition("::")[2].replace(" ", "") == plain


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_a_public_function_with_type_hints(op: str) -> None:
    function = getattr(pc.ops, op)
    assert op in pc.ops.__all__
    assert inspect.isfunction(function)
    assert function.__name__ == op
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_types_shown_to_checkers(op: str) -> None:
    line = f"    from pycoherence.ops.{op} import {op} as {op}"
    text = (PACKAGE / "ops/__init__.py").read_text()
    assert line in text.splitlines(), f"add it to pycoherence/ops/__init__.py: {line}"


@pytest.mark.parametrize("op", OPS)
def test_every_op_documents_itself(op: str) -> None:
    text = inspect.getdoc(getattr(pc.ops, op))
    assert text
    first, blank, *_ = text.splitlines()
    assert first.endswith(".")
    assert not blank
    needed = [".. math::", "Args:", "Returns:", "Raises:", "Cost:", "Example:", ">>> "]
    if op != "identity":  # the template computes nothing
        needed += ["Scaling:", "Source:"]
    missing = [section for section in needed if section not in text]
    assert not missing
    for parameter in inspect.signature(getattr(pc.ops, op)).parameters:
        assert re.search(rf"^\s+{parameter}: ", text, re.MULTILINE), parameter


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_samples_of_every_kind(op: str) -> None:
    """Empty, single, strided and odd ones, or a backend could hide behind easy shapes."""
    samples = list(pc.ops.specs[op].samples("cpu", torch.float32))
    tensors = [list(tensors_of(args)) for args in samples]
    assert any(x.numel() == 0 for args in tensors for x in args)
    assert any(x.numel() == 1 for args in tensors for x in args)
    assert any(not x.is_contiguous() for args in tensors for x in args)
    assert any(max(x.shape, default=0) % 2 for args in tensors for x in args)


@pytest.mark.parametrize("folder", ["csrc/cpu/*.cpp", "csrc/cuda/*.cu", "triton_kernels/[!_]*.py"])
def test_every_kernel_is_named_after_an_op(folder: str) -> None:
    settings = {"workspace"}  # what all kernels share
    assert {path.stem for path in ROOT.glob(folder)} <= {*OPS, *settings}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_captured_function_has_a_file_that_registers_it(name: str) -> None:
    module = f"pycoherence.capture.functions.{name}"
    importlib.import_module(module)
    functions = [*handlers.values(), *guards.values()]
    assert any(function.__module__ == module for function in functions)


def test_no_capture_handler_lives_elsewhere() -> None:
    modules = {handler.__module__ for handler in handlers.values()}
    # Examples of the docs teach it more.
    homes = {name.rpartition(".")[2] for name in modules if name.startswith("pycoherence.")}
    assert homes <= set(FUNCTIONS)


def imports(path: Path, tree: ast.AST) -> Iterator[str]:
    """Full names of all that a module imports, also inside functions."""
    names = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}: relative import"
            for alias in node.names:
                is_module = node.module == "pycoherence" and alias.name in names
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)


@pytest.mark.parametrize("path", [p for p in MODULES if p != PACKAGE / "__init__.py"], ids=short)
def test_imports_only_point_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path, ast.parse(path.read_text())):
        package, _, below = name.partition(".")
        if package != "pycoherence":
            continue
        if level(part) < len(LEVELS):
            assert below, f"{short(path)} imports the whole package"
        assert level(below.partition(".")[0]) <= level(part), f"{short(path)} imports {name}"


def module_of(path: Path) -> str:
    """The full name of a file's module, as it is imported once installed."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "triton_kernels":
        parts = ("pycoherence", *parts)
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("path", [*MODULES, *KERNELS], ids=short)
def test_no_sentence_opens_with_a_riddle(path: Path) -> None:
    """Docstrings, their sentences and their entries name the thing first."""
    opening = re.compile(r"(?:\A|[.:!?]\s+|\n\s*\n\s*)(?:Of|What|Where|As)\b.*")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found = opening.search(str(node.value.value))
            assert not found, f"{short(path)}:{node.lineno}: {found[0].strip()!r}"


def test_there_are_no_import_circles() -> None:
    """None inside functions or behind TYPE_CHECKING either, in all folders."""
    known = {module_of(path): path for path in (*MODULES, *KERNELS)}
    below: dict[str, set[str]] = {}
    for name, path in known.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                # A name of a package is its module, if there is one.
                found |= {
                    full if (full := f"{node.module}.{alias.name}") in known else str(node.module)
                    for alias in node.names
                }
        below[name] = (found & known.keys()) - {name}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(below[name]):
                walk(other, (*path, name))
            done.add(name)

    for name in sorted(below):
        walk(name, ())


def test_no_twelve_lines_stand_in_two_files() -> None:
    """Code and docstrings; blank lines and imports do not count."""
    seen: dict[tuple[str, ...], Path] = {}
    for path in MODULES:
        text = path.read_text()
        imported = {
            row
            for node in top_level(ast.parse(text).body)
            for row in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        numbered = enumerate(map(str.strip, text.splitlines()), 1)
        lines = [line for row, line in numbered if line and row not in imported]
        for start in range(len(lines) - 11):
            window = tuple(lines[start : start + 12])
            other = seen.setdefault(window, path)
            assert other == path, f"{short(other)} and {short(path)} share {window[0]!r} and on"


@pytest.mark.parametrize("path", KERNELS, ids=short)
def test_kernels_call_no_ops(path: Path) -> None:
    """Ops call kernels, which get what they need of another op as an argument."""
    for name in imports(path, ast.parse(path.read_text())):
        if name.startswith("pycoherence.") and "triton_kernels" not in name:
            assert re.match(r"pycoherence\.ops\.(core|family)\.", name), name
            assert not re.match(r"pycoherence\.ops\.core\.(dispatch|register)", name), name


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_heavy_packages_are_imported_where_they_are_used(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in MAY_BE_HEAVY:
        return
    body = ast.parse(path.read_text()).body
    found = [name.partition(".")[0] for node in top_level(body) for name in imports(path, node)]
    assert not HEAVY.intersection(found)


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Import statements that run when the module is imported."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for field in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from top_level(handler.body)


def test_public_names_exist_and_are_documented() -> None:
    for module in (pc, pc.ops, pc.optim, pc.metrics):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                assert inspect.getdoc(value), name


def test_the_package_shows_only_its_own_names() -> None:
    modules = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    shown = {name for name in dir(pc) if not name.startswith("_")}
    assert shown <= {*pc.__all__, *modules, "triton_kernels"}
