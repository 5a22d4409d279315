"""The page docs/models.md, of the rows in `catalogue/rows`; `python tests/table.py` writes it."""

from pathlib import Path

from catalogue.rows import all_rows

PAGE = Path(__file__).parent.parent / "docs/models.md"

INTRODUCTION = """\
# Models

`collect`, `aggregate` and the other verbs treat models by what these use. Each row is a
test: norms, Gram matrix, weighted sums and `.grad` agree with autograd on one example at a time, in
float64, to 1e-9. `python tests/table.py` writes this page.

- **exact**: measured in the pass itself.
- **exact, example by example**: nobody has described the function; the gradients of the parameters
  in question are made one by one, as long as `B` times their size fits the workspace, and
  `record.fallbacks` names them. With `on_unsupported="raise"` they are refused.
- **refused**: the error says which parameter, where, and what to do.

How passes may be run (losses, autocast, checkpointing, accumulation, compiled and parallel models)
is in [passes](passes.md), each line a test too.
"""


def page() -> str:
    """The page."""
    words = {"exact": "exact", "fallback": "exact, example by example", "refused": "refused"}
    lines, topic = [INTRODUCTION.rstrip()], ""
    for row in all_rows():
        if row.topic != topic:
            topic = row.topic
            lines += ["", f"## {topic}", "", "| what | outcome | note |", "|---|---|---|"]
        lines.append(f"| {row.name} | {words[row.outcome]} | {row.note} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
