"""Compares a compiled step with a block on a twin of its model, bit for bit."""

from typing import Any

import torch
from torch import Tensor, nn

import pycoherence as pc
from support.oracle import LossFn


def same(x: Tensor | None, y: Tensor | None) -> bool:
    """Whether two tensors are equal, and NaN where the other is."""
    if x is None or y is None:
        return x is y
    alike = x.shape == y.shape and x.dtype == y.dtype
    return alike and bool(((x == y) | ((x != x) & (y != y))).all())


def assert_same(
    step: Any,
    model: nn.Module,
    twin: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *statistics: Any,
    rule: Any = None,
    **options: Any,
) -> Any:
    """One step of the model and one block of its twin, from the same random state.

    Args:
        step: Compiled, of the model.
        model: With gradients or without.
        twin: Equal to the model, but an object of its own.
        loss_fn: Of both.
        batch: Of both.
        statistics: Of both.
        rule: That of the twin.
        options: Of the block.

    Returns:
        The result of the step.
    """
    state = torch.get_rng_state()
    found = step(batch)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    if rule is None:
        block: Any = pc.collect(twin, *statistics, **options)
    else:
        block = pc.aggregate(twin, rule, *statistics, **options)
    with block as entered:
        loss = loss_fn(twin, batch)
        loss.backward()
    assert torch.equal(torch.get_rng_state(), after)
    record, expected = (found, entered) if rule is None else (found.record, entered.record)
    assert same(found.loss, loss.detach())
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert same(p.grad, q.grad), f"the gradient of {name}"
        assert p.grad is None or type(p.grad) is Tensor
    for (name, x), y in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert same(x, y), f"the buffer {name}"
    assert record.batch_size == expected.batch_size
    assert (record.skipped, record.fallbacks) == (expected.skipped, expected.fallbacks)
    results = [result for one in statistics for result in one.results]
    for name, known in expected.by_parameter.items() if results else ():
        for result in results:
            assert same(getattr(record.by_parameter[name], result), getattr(known, result)), name
    if "sq_norms" in results:
        assert _words(record.coherence()) == _words(expected.coherence())
    if rule is not None:
        _assert_same_report(found.report, entered.report)
    return found


def _words(x: Any) -> str:
    """All digits of its numbers, and NaN where they are not."""
    return repr(x.to_dict())


def _assert_same_report(found: Any, expected: Any) -> None:
    assert _words(found) == _words(expected)
    assert (found.network is None) == (expected.network is None)
