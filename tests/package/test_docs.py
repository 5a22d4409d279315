"""What the README and the pages under docs say is true: their code runs, their table is right."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.ranks import needs_gloo

import pycoherence as pc

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"^```py\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = {"plots.md": "matplotlib", "privacy.md": "opacus"}
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#]*)(?:#([^)]*))?\)")

KERNELS = {
    "native CPU": "csrc/cpu/{}.cpp",
    "native CUDA": "csrc/cuda/{}.cu",
    "Triton": "triton_kernels/{}.py",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page in order, in one namespace, somewhere they may write."""
    monkeypatch.chdir(tmp_path)
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    text, namespace = page.read_text(), dict[str, Any](__name__="__main__")
    for block in FENCE.finditer(text):
        # Blank lines in front, so that errors name the line of the page.
        lines = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines + block[1], str(page), "exec"), namespace)


SCRIPTS = SCRIPT.findall((ROOT / "docs/distributed.md").read_text())


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("script", SCRIPTS, ids=["wrapped", "sharded"])
def test_scripts_of_several_processes_run(script: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "csrc/README.md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for link, anchor in LINK.findall(page.read_text()):
        there = page.parent / link if link else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), f"{link}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The names that headings of a page have in links."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_of_ops() -> str:
    """Which implementations of each op there are, as a Markdown table."""
    rows = [["op", "reference", *KERNELS], ["---"] * (2 + len(KERNELS))]
    for op in sorted(pc.ops.specs):
        found = [(ROOT / pattern.format(op)).exists() for pattern in KERNELS.values()]
        rows.append([f"`{op}`", "yes", *("yes" if each else "-" for each in found)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_table_of_ops_is_right() -> None:
    text = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- ops -->\n(.*?)\n?<!-- /ops -->", text, re.DOTALL)
    assert found, "README.md has no <!-- ops --> ... <!-- /ops -->"
    table = table_of_ops()
    assert found[1].strip() == table, f"the table in README.md should be\n{table}"


def test_every_page_of_docs_is_linked() -> None:
    texts = "\n".join(path.read_text() for path in PAGES)
    for page in {*(ROOT / "docs").glob("*.md")} - {ROOT / "docs/index.md"}:
        assert f"{page.name})" in texts, f"{page.name} is linked nowhere"
