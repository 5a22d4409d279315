"""A trace that is carried out on other tensors."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pycoherence.capture import below_autograd
from pycoherence.errors import UnsupportedError
from pycoherence.ops.core.call import call_unchecked
from pycoherence.replay.passes import Tree
from pycoherence.replay.trace import Inputs, Trace, leaves_of, tensors_in

Backend = str | Callable[..., Any] | None
"""Nothing, a name that `torch.compile` knows, or a function that takes a graph and its inputs."""


class Replay:
    """A trace, and the settings that it was made under.

    Args:
        key: All that it depends on.
        trace: It.
        backend: The compiler of its graph.
        keep: Objects that the key tells by their `id`.

    Attributes:
        calls: How often it has run.
    """

    def __init__(self, key: Any, trace: Trace, backend: Backend, keep: list[Any]) -> None:
        self.key, self.trace, self.calls = key, trace, 0
        self._keep = keep
        self._compiled = backend is not None
        self._copies = backend == "cudagraphs"  # whose results lie where those of the next run will
        if backend is None:
            _call_directly(trace.module)
            self._run: Callable[..., Any] = trace.module.forward
        else:
            self._run = torch.compile(trace.module, backend=backend, fullgraph=True, dynamic=False)
        self._shared: set[int] | None = None

    def __call__(self, inputs: Inputs) -> Tree:
        """Carry it out."""
        self.calls += 1
        given = list(inputs)
        try:
            found = self._carry_out(given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            text = str(error).strip().partition("\n")[0][:200]
            raise UnsupportedError(
                f"pc.compile: the graph of this pass does not run ({text}). Some operators lay "
                "their results out in another way than torch's own descriptions of them say. What "
                "to do: use pc.collect or pc.aggregate."
            ) from error
        if self._shared is None:
            held = [c.tensor for c in self.trace.constants]
            self._shared = _shared(found, [*given, *held])
            self._expect_unwritten()
        if self._copies or self._shared:
            every = self._copies
            found = [x.clone() if every or i in self._shared else x for i, x in enumerate(found)]
        return self.trace.tree(found)

    def _carry_out(self, given: list[Tensor]) -> list[Tensor]:
        if self._compiled:
            with torch.no_grad(), torch.autocast(given[0].device.type, enabled=False):
                return list(self._run(*given))
        with below_autograd():
            return self._run(*given)

    def _expect_unwritten(self) -> None:
        """Refuse a pass that writes into constants, of which a check would see it twice."""
        if not all(c.is_unwritten for c in self.trace.constants):
            raise UnsupportedError(
                "pc.compile: the pass writes into a tensor that is neither in the batch nor a "
                "buffer of the model. What to do: register it as a buffer."
            )


def _call_directly(module: fx.GraphModule) -> None:
    """Have a graph call the kernels of the library's ops as the library itself does, unchecked."""
    for node in module.graph.nodes:
        target: Any = node.target
        if node.op != "call_function" or getattr(target, "namespace", None) != "pycoherence":
            continue
        given = target._schema.arguments
        args = [
            node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
            for i, a in enumerate(given)
        ]
        node.target = _unchecked(target._schema.name.partition("::")[2])
        node.args, node.kwargs = tuple(args), {}
    module.recompile()


@functools.cache
def _unchecked(op: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return call_unchecked(op, *args)

    run.__name__ = run.__qualname__ = f"unchecked_{op}"
    return run


def _shared(found: list[Tensor], others: list[Tensor]) -> set[int]:
    """The results that share memory with other tensors, into which someone may write."""
    seen = {x.untyped_storage()._cdata for x in others}
    places = set[int]()
    for i, x in enumerate(found):
        storage = x.untyped_storage()._cdata
        if storage in seen:
            places.add(i)
        seen.add(storage)
    return places


def differences(expected: Tree, found: Tree, *, exact: bool) -> list[str]:
    """The names of what differs in two trees, of which the first is right."""
    pairs = list(zip(tensors_in(expected), tensors_in(found), strict=False))
    if [name for (name, _), _ in pairs] != [name for _, (name, _) in pairs]:
        return ["the tensors that there are"]
    plain = [
        [leaf for leaf in leaves_of(t) if not isinstance(leaf[1], Tensor)]
        for t in (expected, found)
    ]
    wrong = [] if plain[0] == plain[1] else ["the batch size, or the parameters that took part"]
    if len(tensors_in(expected)) != len(tensors_in(found)):
        wrong.append("the tensors that there are")
    same = _equal if exact else _close
    return wrong + [name for (name, x), (_, y) in pairs if not same(x, y)]


def _equal(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return False
    return bool(((x == y) | ((x != x) & (y != y))).all())


def _close(x: Tensor, y: Tensor) -> bool:
    """Whether numbers agree but for roundings: in float32 or less to some 1e-3 of the largest."""
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        return False
    if not x.is_floating_point() or not x.numel():
        return bool((x == y).all())
    scale = x.abs().nan_to_num(posinf=0.0).max()
    within = (x - y).abs() <= scale * torch.finfo(x.dtype).eps ** 0.5
    return bool((within | (x == y) | ((x != x) & (y != y))).all())
