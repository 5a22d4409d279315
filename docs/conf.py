"""The documentation site: `make docs` builds it with Sphinx, and fails on the first warning."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.ext.autodoc import Options

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))  # a source tree without an install serves as well

import pycoherence as pc  # noqa: E402

project = "pycoherence"
author = "pycoherence contributors"
copyright = author
version = release = pc.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
suppress_warnings = ["config.cache"]  # the gallery's settings hold a function

# Links to this package must lead somewhere. Other libraries are named without a link, since a build
# asks no network for their indexes.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?s)(?!pycoherence\b).*"),
    # Types in signatures that no page describes.
    (r"py:class", r"pycoherence\.(capture|ranks|replay|ops\.core)\..*|pycoherence\.(.*\.)?_.*"),
]
default_role = "py:obj"  # `name` in a docstring

myst_enable_extensions = ["attrs_block", "colon_fence", "dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"pycoherence {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
    "write_computation_times": False,
    "image_scrapers": ("matplotlib",),
    "reset_modules": ("matplotlib",),
    "capture_repr": (),
    "abort_on_example_error": True,
}

# Pages outside of docs/ that the site shows, and where.
SHOWN = {
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}
LINK = re.compile(
    r"(?P<image>!?)\[(?P<words>[^\]]*)\]"
    r"\((?!https?:|mailto:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
)


def on_site(there: Path) -> Path:
    """The page of the site that shows a file; the file itself if none does."""
    path = os.path.relpath(there, ROOT)
    if path == "README.md":
        return DOCS / "index.md"
    if path == "examples":
        return DOCS / "gallery/index.rst"
    if there.parent == ROOT / "examples":
        return DOCS / "gallery" / f"{there.stem}.rst"
    return DOCS / SHOWN[path] if path in SHOWN else there


def rewrite_links(text: str, page: Path, docname: str) -> str:
    """Links as they work on the site, from links as they work among the files of the repository.

    A file that no page shows becomes a download, and a folder stays a name without a link.
    """

    def replace(link: re.Match[str]) -> str:
        there = on_site((page.parent / link["target"]).resolve())
        if there.is_dir():
            return link["words"]
        target = os.path.relpath(there, (DOCS / docname).parent)
        if there.suffix == ".md" and not there.is_relative_to(DOCS):
            target = f"path:{target}"  # as a file; there is no page of that name
        return f"{link['image']}[{link['words']}]({target}{link['anchor'] or ''})"

    return LINK.sub(replace, text)


def show(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put files from outside of docs/ in the place of the pages that stand for them."""
    page = Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return
    outside = {shown: ROOT / path for path, shown in SHOWN.items()}
    if f"{docname}.md" in outside:
        page = outside[f"{docname}.md"]
        app.env.note_dependency(str(page))
        source[0] = page.read_text()
    source[0] = rewrite_links(source[0], page, docname)


def polish(
    app: Sphinx, what: str, name: str, obj: object, options: Options, lines: list[str]
) -> None:
    """Make the names of last paragraphs bold, `Cost: ...` and the like, and keep dots in code."""
    for i, line in enumerate(lines):
        line = re.sub(r"^(Cost|Scaling|Source|Sources):(?= \S)", r"**\1:**", line)
        lines[i] = re.sub(r"(?<![^\s(])`([.~][^`]*)`(?!`)", r"``\1``", line)


def skip(app: Sphinx, what: str, name: str, obj: object, skipped: bool, options: Options) -> bool:
    """Leave out fields of named tuples, which the docstring of the class describes."""
    return skipped or type(obj).__name__ == "_tuplegetter"


def setup(app: Sphinx) -> None:
    """Register the hooks above."""
    app.connect("source-read", show)
    app.connect("autodoc-process-docstring", polish)
    app.connect("autodoc-skip-member", skip)
