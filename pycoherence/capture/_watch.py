"""What guards a backward pass, so that no gradient goes past the capture."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pycoherence.capture._call import Call
from pycoherence.capture._graph import (
    counted_gradients,
    graph_below,
    is_custom,
    is_reentrant_checkpoint,
)
from pycoherence.capture._names import unsupported
from pycoherence.sites import Site, joint


class Pass:
    """One backward pass.

    Args:
        calls: The captured calls in it, by number, and the parameters of each.
        accumulate: Whether gradients are added to leaves, probes among them.
        keep: Whether to keep factors.
    """

    def __init__(self, calls: Mapping[int, list[str]], *, accumulate: bool, keep: bool) -> None:
        self.calls, self.accumulate, self.keep = calls, accumulate, keep
        self.left = Counter(name for names in calls.values() for name in names)
        self.names = set(self.left)
        self.parts: dict[str, list[Site]] = {}

    def complete(self, name: str, site: Site) -> Site | None:
        """As `BackwardWatch.complete`."""
        self.left[name] -= 1
        if name not in self.parts and not self.left[name]:
            return site
        self.parts.setdefault(name, []).append(site)
        return None if self.left[name] else joint(self.parts.pop(name))


class BackwardWatch:
    """Guards the backward passes over what one capture has seen.

    Args:
        model: Whose passes they are.
        parameters: Those that are tracked.
        once: Whether all layers have to take part in the same one.

    Attributes:
        failed: Whether one has raised, and left some statistics without the others.
        seen: Whether one over a captured call has begun.
        reruns: Whether layers may be run again in one.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, once: bool
    ) -> None:
        self.failed = False
        self.seen = False
        self.reruns = False
        self._model = model
        self._parameters = parameters
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._skipped: set[str] = set()
        self._once = once
        self._done: set[int] = set()
        self._finished: set[str] = set()
        self._expected: set[str] = set()
        self._pass: Pass | None = None

    @property
    def running(self) -> bool:
        """Whether a backward pass is running that was found to miss nothing."""
        return self._pass is not None

    @property
    def keeping(self) -> bool:
        """Whether the factors of its gradients are those to keep."""
        return self._pass is not None and self._pass.keep

    def is_running(self, call: int) -> bool:
        """Whether a captured call has a part in the backward pass that is running."""
        return self._pass is not None and call in self._pass.calls

    def without_modes(self) -> AbstractContextManager[Any]:
        """A context for the backward of captured calls, whose mode may be active in the pass."""
        return torch._C.DisableTorchFunction() if self.reruns else nullcontext()

    def may_measure(self, this: Pass) -> bool:
        """Whether no backward pass has measured what takes part in one."""
        return not self._finished & this.names and not self._once

    def forget(self, name: str) -> None:
        """Let the gradients of a parameter go past the capture."""
        self._names.pop(id(self._parameters[name]))
        self._skipped.add(name)

    def complete(self, name: str, site: Site) -> Site | None:
        """The site of all uses of a parameter in this pass, from that of each; `None` before."""
        assert self._pass is not None
        return self._pass.complete(name, site)

    @contextmanager
    def backward(
        self, roots: Iterable[Tensor], *, accumulate: bool, keep: bool = False
    ) -> Iterator[Pass]:
        """Run a backward pass from `roots`, after a check that it will miss nothing.

        Args:
            roots: What is differentiated.
            accumulate: Whether gradients are added to leaves, probes among them.
            keep: Whether to keep factors all the same.

        Returns:
            The pass.

        Raises:
            UnsupportedError: A gradient would reach, or has reached, a tracked parameter past the
                captured calls.
            RuntimeError: It would add to the probes a second time, or the parameters have changed.
        """
        self._expect_same_model()
        calls = self._find_calls(roots, accumulate)
        outer, this = self._pass, Pass(calls, accumulate=accumulate, keep=accumulate or keep)
        if accumulate:
            self._expect_first(this, outer)
        self.seen |= bool(calls)
        self._pass = this
        try:
            with self._counted(this) if outer is None else nullcontext():
                yield this
        except BaseException:
            self.failed |= accumulate
            raise
        finally:
            self._pass = outer

    @contextmanager
    def _counted(self, this: Pass) -> Iterator[None]:
        """Notice gradients past the capture, from passes that are not seen."""
        self._expected = set(this.names if this.accumulate else ())
        with counted_gradients(self._parameters) as counts:
            yield
        ours = self._skipped, self._expected
        past = [n for n, c in counts.items() if n not in ours[0] and c > (n in ours[1])]
        if past:
            self.failed = True
            raise unsupported(
                past,
                None,
                "a gradient reached it from a backward pass inside this one, past the capture",
                "leave functions that run layers again in their backward, such as reversible "
                "layers, out of the block; for activation checkpointing give use_reentrant=False",
            )

    def _expect_same_model(self) -> None:
        now = {name: id(p) for name, p in self._model.named_parameters() if p.requires_grad}
        then = {name: id(p) for name, p in self._parameters.items()}
        if now != then:
            changed = ", ".join(sorted({name for name, _ in now.items() ^ then.items()}))
            raise RuntimeError(
                f"parameters were replaced, frozen or unfrozen inside the block: {changed}; do so "
                "before it"
            )

    def _find_calls(self, roots: Iterable[Tensor], accumulate: bool) -> dict[int, list[str]]:
        """The captured calls below `roots`, by number, and the parameters of each."""
        calls: dict[int, list[str]] = {}
        for node in graph_below(roots):
            call = getattr(node, "call", None)
            if isinstance(call, Call) and call.watch is self:
                calls[call.number] = call.names
                continue
            self.reruns |= is_custom(node)
            leaves = (getattr(below, "variable", None) for below, _ in node.next_functions)
            past = [self._names[id(leaf)] for leaf in leaves if id(leaf) in self._names]
            if past or (is_reentrant_checkpoint(node) and not accumulate):
                raise unsupported(
                    past,
                    None,
                    f"a gradient would reach it through {node.name()}, past the capture",
                    "run the whole forward pass inside the block, write the layer with functions "
                    "of torch.nn.functional, without custom autograd.Function, torch.compile or "
                    "scripted code, give activation checkpointing use_reentrant=False, or freeze "
                    "the parameter with requires_grad_(False)",
                )
        return calls

    def _expect_first(self, this: Pass, outer: Pass | None) -> None:
        twice = self._finished & this.names
        if outer is not None and (twice or (this.names and not outer.accumulate)):
            raise unsupported(
                sorted(twice or this.names),
                None,
                "layers that are run again in a backward pass inside this one use it, and so do "
                "others"
                if twice
                else "a gradient would be added to it in a backward pass inside "
                "this one, which only asks for others",
                "checkpoint with use_reentrant=False, or leave it out of the block",
            )
        if twice or self._done.intersection(this.calls):
            raise RuntimeError(
                "expected one backward pass over a forward pass, got a second, whose statistics "
                "would add up as if of other examples; sum the losses before one backward(), or "
                "use a block for each"
            )
        if self._once and outer is None and this.calls and self._done:
            raise RuntimeError(
                "expected one backward pass in the block, whose gradients are made of all layers "
                "together, got a second; sum the losses before one backward(), or use a block for "
                "each"
            )
        self._done.update(this.calls)
        self._finished |= this.names
        self._expected |= this.names
