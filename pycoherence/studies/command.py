"""Find the studies and run them: what `python -m pycoherence study` does."""

import importlib
import pkgutil
import tempfile
from pathlib import Path

from pycoherence.device import check_device
from pycoherence.studies import papers
from pycoherence.studies.data import load
from pycoherence.studies.settings import Settings

QUICK_EXAMPLES = 1500
"""The most examples to train on for a rough look: all of the digits."""


def names() -> list[str]:
    """All studies: the files of `papers`, with hyphens."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(papers.__path__))


def run(
    name: str,
    *,
    data: str = "digits",
    root: Path = Path("data"),
    download: bool = False,
    device: str = "cpu",
    seeds: int = 3,
    quick: bool = False,
    out: Path = Path("studies"),
) -> None:
    """Run a study, or `all`, and write its report to a folder of its name in `out`.

    Raises:
        ValueError: There is no such study, a number is out of range, the data set is missing, the
            device cannot be used or the folder cannot be written to.
    """
    chosen = names() if name == "all" else [name]
    if not set(chosen) <= set(names()):
        raise ValueError(f"expected one of {', '.join(names())} or all, got {name!r}")
    if seeds < 1:
        raise ValueError(f"expected at least one seed, got {seeds}")
    check_device(device)
    loaded = load(data, root, download).to(device)
    if quick:
        loaded = loaded.first(QUICK_EXAMPLES)
    print(loaded)
    about = {"data": data, "device": device, "seeds": 1 if quick else seeds, "quick": quick}
    for each in chosen:
        folder = out / each
        _check_folder(folder)
        print(f"{each}:")
        module = importlib.import_module(f"{papers.__name__}.{each.replace('-', '_')}")
        settings = Settings(loaded, about["seeds"], quick, folder / "runs")
        module.study(settings).write(folder, about)
        print(f"wrote {folder / 'report.md'}, its pictures and results.json")


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"expected {folder} to be a folder to write to ({error.strerror}); name another with "
            "--out"
        ) from None
