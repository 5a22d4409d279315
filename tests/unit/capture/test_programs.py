"""Random models: the capture is exact or refuses; `python tests/programs.py` runs many more."""

import pytest
from hypothesis import assume, given, settings
from programs import Program, Summary, outcome, programs


@given(programs())
@settings(max_examples=200)
def test_exact_or_refused(program: Program) -> None:
    found = outcome(program)
    assume(found.kind != "discarded")
    assert found.kind in ("exact", "refused"), f"{found.kind}: {found.says}"


@pytest.mark.slow
def test_the_same_on_larger_ones() -> None:
    """`python tests/programs.py --seed N --count 1` is one of them."""
    summary = Summary()
    for seed in range(300):
        summary.run(seed, show=0)
    assert not summary.failures, "\n".join(summary.failures)
    # The steps keep the examples apart, and few of them leave nothing to compare.
    assert summary.counts["discarded"] < 15, summary
