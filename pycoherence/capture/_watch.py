"""What guards a backward pass, so that no gradient goes past the capture."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from pycoherence.capture._call import Call
from pycoherence.capture._graph import counted_gradients, graph_below, is_reentrant_checkpoint
from pycoherence.capture._names import unsupported
from pycoherence.sites import Site, joint


class BackwardWatch:
    """Guards the backward passes over what one capture has seen.

    Args:
        model: Whose passes they are.
        parameters: Those that are tracked.
        once: Whether all layers have to take part in the same one.

    Attributes:
        running: Whether a backward pass is running that was found to miss nothing.
        keeping: Whether the factors of its gradients are those to keep.
        failed: Whether one has raised, and left some statistics without the others.
        seen: Whether one over a captured call has begun.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, once: bool
    ) -> None:
        self.running = False
        self.keeping = False
        self.failed = False
        self.seen = False
        self._model = model
        self._parameters = parameters
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._skipped: set[str] = set()
        self._once = once
        self._done: set[int] = set()
        self._finished: set[str] = set()
        self._left: Counter[str] = Counter()
        self._parts: dict[str, list[Site]] = {}

    def forget(self, name: str) -> None:
        """Let the gradients of a parameter go past the capture."""
        self._names.pop(id(self._parameters[name]))
        self._skipped.add(name)

    def complete(self, name: str, site: Site) -> Site | None:
        """The site of all uses of a parameter in this pass, from that of each; `None` before."""
        self._left[name] -= 1
        if name not in self._parts and not self._left[name]:
            return site
        self._parts.setdefault(name, []).append(site)
        return None if self._left[name] else joint(self._parts.pop(name))

    @contextmanager
    def backward(
        self, roots: Iterable[Tensor], *, accumulate: bool, keep: bool = False
    ) -> Iterator[None]:
        """Run a backward pass from `roots`, after a check that it will miss nothing.

        Args:
            roots: What is differentiated.
            accumulate: Whether gradients are added to leaves, probes among them.
            keep: Whether to keep factors all the same.

        Raises:
            UnsupportedError: A gradient would reach, or has reached, a tracked parameter past the
                captured calls.
            RuntimeError: It would add to the probes a second time, or the parameters have changed.
        """
        self._expect_same_model()
        calls = self._find_calls(roots)
        if accumulate:
            self._expect_first(calls)
        self.seen |= bool(calls)
        self._left = Counter(name for names in calls.values() for name in names)
        expected = dict.fromkeys(self._left, accumulate)
        self._parts.clear()
        self.running, self.keeping = True, accumulate or keep
        try:
            with counted_gradients(self._parameters) as counts:
                yield
        except BaseException:
            self.failed |= accumulate
            raise
        finally:
            self.running = self.keeping = False
            self._parts.clear()
        past = [n for n, c in counts.items() if c > expected.get(n, 0) and n not in self._skipped]
        if past:
            self.failed = True
            raise unsupported(
                past,
                None,
                "a gradient reached it from a backward pass inside this one, past the capture",
                "leave functions that run layers again in their backward, such as activation "
                "checkpointing or reversible layers, out of the block",
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

    def _find_calls(self, roots: Iterable[Tensor]) -> dict[int, list[str]]:
        """The captured calls below `roots`, by number, and the parameters of each."""
        calls: dict[int, list[str]] = {}
        for node in graph_below(roots):
            call = getattr(node, "call", None)
            if isinstance(call, Call) and call.watch is self:
                calls[call.number] = call.names
                continue
            leaves = (getattr(below, "variable", None) for below, _ in node.next_functions)
            past = [self._names[id(leaf)] for leaf in leaves if id(leaf) in self._names]
            if past or is_reentrant_checkpoint(node):
                raise unsupported(
                    past,
                    None,
                    f"a gradient would reach it through {node.name()}, past the capture",
                    "run the whole forward pass inside the block, write the layer with functions "
                    "of torch.nn.functional, without custom autograd.Function, torch.compile, "
                    "scripted code or activation checkpointing, or freeze the parameter with "
                    "requires_grad_(False)",
                )
        return calls

    def _expect_first(self, calls: Mapping[int, list[str]]) -> None:
        names = {name for used in calls.values() for name in used}
        if self._done.intersection(calls) or self._finished & names:
            raise RuntimeError(
                "expected one backward pass over a forward pass, got a second, whose statistics "
                "would add up as if of other examples; sum the losses before one backward(), or "
                "use a block for each"
            )
        if self._once and calls and self._done:
            raise RuntimeError(
                "expected one backward pass in the block, whose gradients are made of all layers "
                "together, got a second; sum the losses before one backward(), or use a block for "
                "each"
            )
        self._done.update(calls)
        self._finished |= names
