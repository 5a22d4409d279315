"""The mode that watches a forward pass for uses of tracked parameters."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pycoherence.capture._call import Call, Slot
from pycoherence.capture._kept import Kept
from pycoherence.capture._names import describe, function_name, unsupported
from pycoherence.capture._plan import Plan
from pycoherence.capture._probes import make_probes
from pycoherence.capture._registry import Handler, guards, handlers
from pycoherence.capture._watch import BackwardWatch

_BACKWARD = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)

# Function modes are per thread, and so is what must not be nested.
_active = threading.local()


class Capture(TorchFunctionMode):
    """Routes each use of a tracked parameter through an autograd Function with probes.

    Args:
        model: Whose pass it is.
        parameters: Its `tracked_parameters`.
        plan: What to measure.
        around: Gives what a backward pass that makes gradients of parameters runs inside.

    Attributes:
        parameters: The tracked parameters, by name.
        batch_size: Examples of the forward pass; `None` until a parameter has been used.
        watch: What guards the backward passes.
        probes: Of each parameter that has been used: output name to probe.
        kept: What the backward pass leaves behind beside the gradients of probes.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        plan: Plan,
        around: Callable[["Capture"], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self.parameters = parameters
        self.batch_size: int | None = None
        self.watch = BackwardWatch(model, self.parameters, once=not plan.gradients)
        self.probes: dict[str, dict[str, Tensor]] = {}
        self.plan = plan
        self.kept = Kept()
        self._around = around
        self._want = plan.want
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._function: Callable[..., Any] | None = None
        self._used: list[str] = []
        self._batch_source = ""
        self._calls = count()

    def __enter__(self) -> "Capture":
        if getattr(_active, "capture", None) is not None:
            raise RuntimeError(
                "the blocks of collect and aggregate cannot be nested: only one would see the "
                "parameters. What to do: ask one collect block for all statistics, measure and "
                "aggregate in passes of their own, and update meters outside both"
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
        self._used = []
        self._find_used(args)
        if kwargs:
            self._find_used(kwargs.values())
        if func in guards:
            guards[func](self, *args, **kwargs)
        if not self._used:
            return func(*args, **kwargs)
        if func in handlers:
            return self._handle(handlers[func], args, kwargs)
        result = func(*args, **kwargs)
        if any(x.grad_fn is not None for x in _tensors(result)):
            known = ", ".join(sorted(function_name(known) for known in handlers))
            self.refuse(
                "per-example gradients through this function are not known",
                f"write the layer with one that is ({known}); look up what all examples share, "
                "such as positions, with embedding(positions.expand(B, T), weight); leave an L2 "
                "penalty to the optimizer's weight_decay, and take others outside the block; take "
                "print-outs of parameter.detach(); or freeze the parameter with "
                "requires_grad_(False)",
            )
        return result

    def _find_used(self, values: Iterable[Any]) -> None:
        """Add the tracked parameters among some arguments; each torch function pays for this."""
        for value in values:
            if id(value) in self._names:
                self._used.append(self._names[id(value)])
            elif isinstance(value, (tuple, list)):
                self._find_used(value)
            elif isinstance(value, dict):
                self._find_used(value.values())

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
        if not accumulate:
            self._check_inputs(args[1] if len(args) > 1 else kwargs.get("inputs"))
        # A gradient that is made after the pass has no part in torch.autograd.grad.
        around = self._around(self) if accumulate or self.plan.gradients else nullcontext()
        with around, self.watch.backward(roots, accumulate=accumulate):
            return func(*args, **kwargs)

    def _check_inputs(self, inputs: Any) -> None:
        """Refuse `torch.autograd.grad` of parameters whose gradients are made after the pass."""
        names = [self._names[id(x)] for x in _tensors(inputs) if id(x) in self._names]
        if names and not self.plan.gradients:
            raise RuntimeError(
                f"torch.autograd.grad cannot give the gradients of {', '.join(names)}, which are "
                "made of all layers together after the backward pass; call loss.backward()"
            )

    def probes_of(self, name: str) -> Mapping[str, Tensor]:
        """The probes of a parameter, by output; fresh ones if it was not used."""
        assert self.batch_size is not None
        if name in self.probes:
            return self.probes[name]
        return make_probes(self.plan.outputs, self.batch_size, self.parameters[name])

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
        batch_size = self._check_batch(batched)
        return Call(
            self.watch,
            next(self._calls),
            tuple(self._slot(slot, p, names[slot]) for slot, p in parameters.items()),
            batch_size,
            self.plan,
            self._want,
            self.kept,
        )

    def _slot(self, slot: str, parameter: Tensor | None, name: str | None) -> Slot | None:
        if parameter is None or not parameter.requires_grad:
            return None
        if name is None:
            return Slot(slot, None, parameter.dtype, {})
        if name in self.probes:
            self.refuse(
                "expected one forward and backward pass in a block, with one use of each "
                "parameter, got a second use",
                "open the block inside the loop or closure, around one forward and backward pass; "
                "shared parameters are not supported yet, so give each layer one of its own",
            )
        assert self.batch_size is not None
        self.probes[name] = make_probes(self.plan.outputs, self.batch_size, parameter)
        return Slot(slot, name, parameter.dtype, self.probes[name])

    def _check_batch(self, batched: Tensor) -> int:
        if torch.is_autocast_enabled(batched.device.type):
            self.refuse("autocast is not supported yet", "leave autocast out of the block")
        if batched.dim() < 2:
            self.refuse(
                f"its input {tuple(batched.shape)} has no separate batch dimension",
                "give it an input [B, ...] of two or more dimensions; for ids of one position that "
                "is ids.unsqueeze(1), for positions that all examples share positions.expand(B, T)",
            )
        rows, group_size = batched.shape[0], self.plan.group_size
        if self.batch_size is None:
            if rows % group_size:
                self.refuse(
                    f"its input {tuple(batched.shape)} has {rows} rows, which are not whole groups "
                    f"of group_size={group_size}",
                    f"give it a multiple of {group_size} rows, each group's next to each other",
                )
            self.batch_size = rows // group_size
            self._batch_source = f"{describe(self._used[0])} with input {tuple(batched.shape)}"
        if rows != self.batch_size * group_size:
            self.refuse(
                f"its input {tuple(batched.shape)} has {rows} rows, but the batch size of this "
                f"block is {self.batch_size * group_size}, as set by {self._batch_source}",
                "keep the batch first in every layer: expand what all examples share to [B, ...], "
                "and do not fold positions into the batch",
            )
        return self.batch_size

    def refuse(self, why: str, fix: str) -> NoReturn:
        """Raise the error for the torch function being called.

        Raises:
            UnsupportedError: Always.
        """
        raise unsupported(self._used, self._function, why, fix)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
