"""Each study as its command runs it for a rough look, in the file named after it."""

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class Outcome:
    """What a study left in its folder."""

    text: str
    results: dict[str, Any]

    def rows(self, first: str) -> list[list[str]]:
        """The cells of the table whose first column is headed so, without the head."""
        table = self.text.split(f"| {first} |")[1].split("\n\n")[0].splitlines()[2:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.fixture(scope="module")
def quick(request, tmp_path_factory):
    """The outcome of `python -m pycoherence study NAME --quick`."""
    for module in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(module)
    from pycoherence import cli

    name = request.path.stem.removeprefix("test_").replace("_", "-")
    folder = tmp_path_factory.mktemp("out")
    assert cli.main(["study", name, "--quick", "--out", str(folder)]) == 0
    text = (folder / name / "report.md").read_text()
    for picture in re.findall(r"\]\((\w+\.png)\)", text):
        assert (folder / name / picture).read_bytes().startswith(b"\x89PNG")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    return Outcome(text, json.loads((folder / name / "results.json").read_text()))
