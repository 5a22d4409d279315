"""The mode that watches a forward pass for uses of tracked parameters."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from pycoherence.capture._call import Call, Slot
from pycoherence.capture._graph import (
    counted_gradients,
    graph_below,
    is_reentrant_checkpoint,
)
from pycoherence.capture._probes import Shape, make_probes
from pycoherence.capture._registry import Handler, guards, handlers
from pycoherence.errors import UnsupportedError

_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)

# Function modes are per thread, and so is what must not be nested.
_active = threading.local()


def tracked_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that require a gradient, by name.

    Raises:
        ValueError: There are none.
        TypeError: One is not a floating-point tensor.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            f"expected a model with parameters that require a gradient, got "
            f"{type(model).__name__} without any; call requires_grad_() on those to measure"
        )
    for name, parameter in found.items():
        if not parameter.is_floating_point():
            raise TypeError(f"expected real floating parameters, got {parameter.dtype} in {name!r}")
    return found


class Capture(TorchFunctionMode):
    """Routes each use of a tracked parameter through an autograd Function with probes.

    Args:
        model: Its parameters that require a gradient are tracked.
        outputs: What to take of every site, and the shapes of the probes.

    Attributes:
        parameters: The tracked parameters, by name.
        batch_size: Of the forward pass; `None` until a parameter has been used.
        watched: Whether a backward pass is running that was found to miss nothing.
        failed: Whether one has raised, and left some statistics without the others.
        probes: Of each parameter that has been used: output name to probe.
    """

    def __init__(self, model: nn.Module, outputs: Mapping[str, Shape]) -> None:
        super().__init__()
        self.parameters = tracked_parameters(model)
        self.batch_size: int | None = None
        self.watched = False
        self.failed = False
        self.probes: dict[str, dict[str, Tensor]] = {}
        self._model = model
        self._outputs = dict(outputs)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._function: Callable[..., Any] | None = None
        self._used: list[str] = []
        self._done: set[int] = set()
        self._calls = count()

    def __enter__(self) -> "Capture":
        if getattr(_active, "capture", None) is not None:
            raise RuntimeError(
                "captures cannot be nested: only one would see the parameters. What to do: ask one "
                "collect block for all statistics, and update meters outside it"
            )
        super().__enter__()
        _active.capture = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _active.capture = None
        super().__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _BACKWARD:
            return self._run_backward(func, args, kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        self._function = func
        self._used = [self._names[id(x)] for x in _tensors((args, kwargs)) if id(x) in self._names]
        if func in guards:
            guards[func](self, *args, **kwargs)
        if not self._used:
            return func(*args, **kwargs)
        if func in handlers:
            return self._handle(handlers[func], args, kwargs)
        result = func(*args, **kwargs)
        if any(x.grad_fn is not None for x in _tensors(result)):
            known = sorted(resolve_name(known) or repr(known) for known in handlers)
            self.refuse(
                "per-example gradients through this function are not known",
                f"write the layer with one that is ({', '.join(known)}), freeze the parameter with "
                "requires_grad_(False), or detach it here",
            )
        return result

    def _handle(self, handler: Handler, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a handler; if it raises, the call has not happened."""
        batch_size, used = self.batch_size, set(self.probes)
        try:
            return handler(self, *args, **kwargs)
        except BaseException:
            self.batch_size = batch_size
            self.probes = {name: probes for name, probes in self.probes.items() if name in used}
            raise

    def _run_backward(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        accumulate = func is not torch.autograd.grad
        if accumulate and kwargs.get("inputs") is not None:
            raise RuntimeError(
                "backward(inputs=...) would leave the statistics out, whose probes are not among "
                "these inputs; call loss.backward(), or torch.autograd.grad for other gradients"
            )
        roots = _tensors(args[0] if args else list(kwargs.values()))
        with self.backward(roots, accumulate=accumulate):
            return func(*args, **kwargs)

    def probe(self, name: str, output: str) -> Tensor:
        """The probe of one output of a parameter; a fresh one if the parameter was not used."""
        assert self.batch_size is not None
        if name in self.probes:
            return self.probes[name][output]
        return make_probes(self._outputs, self.batch_size, self.parameters[name])[output]

    def call(self, batched: Tensor, /, **parameters: Tensor | None) -> Call:
        """Describe a call to its autograd Function, and make the probes.

        Args:
            batched: The input, `[B, ...]`.
            parameters: The parameter arguments by name, in the Function's order; `None` if absent.

        Raises:
            UnsupportedError: The call cannot be measured exactly.
        """
        names = {slot: self._names.get(id(p)) for slot, p in parameters.items()}
        if sorted(name for name in names.values() if name) != sorted(self._used):
            self.refuse(
                "a parameter stands where this function takes its input",
                "freeze that parameter with requires_grad_(False), or detach it here",
            )
        self._check_batch(batched)
        return Call(
            self,
            next(self._calls),
            tuple(self._slot(slot, p, names[slot]) for slot, p in parameters.items()),
        )

    @contextmanager
    def backward(self, roots: Iterable[Tensor], *, accumulate: bool) -> Iterator[None]:
        """Run a backward pass from `roots`, after a check that it will miss nothing.

        Args:
            roots: What is differentiated.
            accumulate: Whether gradients are added to leaves, probes among them.

        Raises:
            UnsupportedError: A gradient would reach a tracked parameter past the captured calls.
            RuntimeError: It would add to the probes a second time.
        """
        self._expect_same_model()
        calls = self._find_calls(roots)
        if accumulate:
            self._expect_first(set(calls))
        expected = {name: int(accumulate) for names in calls.values() for name in names}
        self.watched = True
        try:
            with counted_gradients(self.parameters) as counts:
                yield
        except BaseException:
            self.failed |= accumulate
            raise
        finally:
            self.watched = False
        self._used = [name for name, n in counts.items() if n > expected.get(name, 0)]
        if self._used:
            self.failed = True
            self.refuse(
                "a gradient reached it from a backward pass inside this one, past the capture",
                "leave functions that run layers again in their backward, such as activation "
                "checkpointing or reversible layers, out of the block",
            )

    def _expect_same_model(self) -> None:
        now = {name: id(p) for name, p in self._model.named_parameters() if p.requires_grad}
        if now != {name: id(p) for name, p in self.parameters.items()}:
            changed = sorted(
                {*now, *self.parameters}
                - {name for name, p in self.parameters.items() if now.get(name) == id(p)}
            )
            raise RuntimeError(
                f"parameters were replaced, frozen or unfrozen inside the block: "
                f"{', '.join(changed)}; do so before it"
            )

    def _find_calls(self, roots: Iterable[Tensor]) -> dict[int, list[str]]:
        """The captured calls below `roots`, by number, and the parameters of each."""
        calls: dict[int, list[str]] = {}
        self._function = None
        for node in graph_below(roots):
            call = getattr(node, "call", None)
            if isinstance(call, Call) and call.capture is self:
                calls[call.number] = [s.parameter for s in call.used if s.parameter is not None]
                continue
            leaves = (getattr(below, "variable", None) for below, _ in node.next_functions)
            self._used = [self._names[id(leaf)] for leaf in leaves if id(leaf) in self._names]
            if self._used or is_reentrant_checkpoint(node):
                self.refuse(
                    f"a gradient would reach it through {node.name()}, past the capture",
                    "run the whole forward pass inside the block, write the layer with functions "
                    "of torch.nn.functional, without custom autograd.Function, torch.compile, "
                    "scripted code or activation checkpointing, or freeze the parameter with "
                    "requires_grad_(False)",
                )
        return calls

    def _expect_first(self, calls: set[int]) -> None:
        if calls & self._done:
            raise RuntimeError(
                "expected one backward pass over a forward pass, got a second, whose statistics "
                "would add up as if of other examples; sum the losses before one backward(), or "
                "use a block for each"
            )
        self._done |= calls

    def _slot(self, slot: str, parameter: Tensor | None, name: str | None) -> Slot | None:
        if parameter is None or not parameter.requires_grad:
            return None
        if name is None:
            return Slot(slot, None, parameter.shape, parameter.dtype, {})
        if name in self.probes:
            self.refuse(
                "this is its second use in the block, and shared parameters are not supported yet",
                "measure one forward pass in a block, and give each layer a parameter of its own",
            )
        assert self.batch_size is not None
        self.probes[name] = make_probes(self._outputs, self.batch_size, parameter)
        return Slot(slot, name, parameter.shape, parameter.dtype, self.probes[name])

    def _check_batch(self, batched: Tensor) -> None:
        if torch.is_autocast_enabled(batched.device.type):
            self.refuse("autocast is not supported yet", "leave autocast out of the block")
        if batched.dim() < 2:
            self.refuse(
                f"its input {tuple(batched.shape)} has no separate batch dimension",
                "give it an input [B, ...] of two or more dimensions; for ids of one position that "
                "is ids.unsqueeze(1), for positions that all examples share positions.expand(B, T)",
            )
        if self.batch_size is None:
            self.batch_size = batched.shape[0]
        if batched.shape[0] != self.batch_size:
            self.refuse(
                f"its input {tuple(batched.shape)} has {batched.shape[0]} rows, but the batch size "
                f"of this block is {self.batch_size}",
                "keep the batch first in every layer: expand what all examples share to [B, ...], "
                "and do not fold positions into the batch",
            )

    def refuse(self, why: str, fix: str) -> NoReturn:
        """Raise the error for the torch function being called.

        Raises:
            UnsupportedError: Always.
        """
        who = " and ".join(_describe(name) for name in self._used)
        op = "" if self._function is None else resolve_name(self._function) or str(self._function)
        where = ", used by ".join(part for part in (who, op) if part) or "the backward pass"
        raise UnsupportedError(f"{where}: {why}. What to do: {fix}.")


def _describe(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"parameter {parameter!r} of " + (f"module {module!r}" if module else "the model itself")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
